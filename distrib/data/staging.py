"""Folders that are filled beside their place and renamed into it, so that nobody sees half of one."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ABANDONED = 3600  # seconds after which a hidden folder is what a killed process left


@contextlib.contextmanager
def staged(target: Path, prefix: str, sound: Callable[[], bool]) -> Iterator[Path]:
    """A folder to fill, hidden beside ``target``; it takes that place when the block ends, or leaves no trace.

    Several processes may do so at once, such as two jobs with a shared home: the first one's folder stays if it is
    ``sound``. One that is not is replaced.

    Raises:
        OSError: the disk is full, or the place cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=target.parent, ignore_cleanup_errors=True) as scratch:
        work = Path(scratch) / "new"
        work.mkdir()  # for all who may read here; the scratch folder is for its owner alone
        yield work
        _sync(work)
        while not _renamed(work, target) and not sound():
            discard(target, prefix)
        _sync(target.parent)  # the rename itself


def discard(folder: Path, prefix: str) -> None:
    """Takes ``folder`` away in one step, because another process may be putting its own there.

    Raises:
        OSError: it cannot be taken away.
    """
    with (
        contextlib.suppress(FileNotFoundError),
        tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent, ignore_cleanup_errors=True) as scratch,
    ):
        os.rename(folder, Path(scratch) / "old")


def sweep(parent: Path, prefix: str) -> None:
    """Removes what killed processes left in ``parent``."""
    for scratch in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            if time.time() - scratch.stat().st_mtime > ABANDONED:
                shutil.rmtree(scratch, ignore_errors=True)


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Writes a file to the disk itself, not only to the system's memory.

    Raises:
        OSError: with the system's words, which ``numpy.save`` and Pillow keep to themselves.
    """
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _renamed(work: Path, target: Path) -> bool:
    """Renames ``work`` to ``target``, unless there is one already."""
    try:
        os.rename(work, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
