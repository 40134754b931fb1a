"""What the tools have in common: exit codes, a progress bar, and outputs that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from distrib.config import UserError
from distrib.faults import FINISHED, STOPPED, USER_ERROR, Failure, Interrupted, StopSignals, report_exit
from distrib.layout.folders import reason, shown
from distrib.place import find_place
from distrib.surroundings import settle

Tell = Callable[[int, int], None]  # hears how much is done, and of how much


def run(work: Callable[[StopSignals], int | None]) -> int:
    """Does a tool's work; returns the exit code: the work's own (None: 0), 75 stopped, 2 the user's to mend, 1 failed.

    What the user may mend, and what stopped it, is one line; of several ranks that met the same, rank 0 tells it.
    """
    stop = StopSignals()
    settle()
    try:
        return work(stop) or FINISHED
    except UserError as error:
        if _is_first() or not error.everywhere:
            print(f"error: {error}", file=sys.stderr)
        return report_exit(USER_ERROR, str(error))
    except Failure as error:
        if _is_first() or not error.everywhere:
            print(f"error: {error}", file=sys.stderr)
        return report_exit(error.code, str(error))
    except (Interrupted, KeyboardInterrupt):
        if _is_first():
            print(f"stopped ({stop.received or 'on request'}) before the end", file=sys.stderr)
        return report_exit(STOPPED, "stopped before the end")


def _is_first() -> bool:
    """Whether this is rank 0, or alone."""
    try:
        return find_place(os.environ).rank == 0
    except UserError:  # the variables that say so are wrong, which is told
        return True


def say(text: str) -> None:
    """A line for the person, beside the results, which alone go to stdout."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def bar(label: str, wanted: bool = True) -> Iterator[Tell]:
    """A progress bar on stderr, where that is a terminal."""
    if not (wanted and sys.stderr.isatty()):
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


class Output:
    """A file that a tool is to write, looked at before the work begins."""

    def __init__(self, path: str | Path) -> None:
        """Looks at the place.

        Raises:
            UserError: something is there already, or nothing can be written there.
        """
        self.path = Path(os.path.expanduser(path))
        folder = self.path.parent
        # Short, as the file's own name may be as long as the disk takes; drawn, as machines share disks and numbers.
        self._beside = folder / f".part-{secrets.token_hex(8)}{self.path.suffix}"
        try:
            if _is_there(self.path):
                raise UserError(f"{shown(self.path)} exists: name another file, or remove it")
            if not os.path.isdir(folder):
                raise UserError(f"cannot write {shown(self.path)}: there is no folder {shown(folder)}")
            with self._beside.open("xb") as file:
                file.write(bytes(4096))
                file.flush()
                os.fsync(file.fileno())  # some disks say only now that they are full
        except OSError as error:
            raise UserError(f"cannot write {shown(self.path)}: {reason(error)}") from None
        finally:
            with contextlib.suppress(OSError):
                self._beside.unlink()

    @contextlib.contextmanager
    def writing(self) -> Iterator[Path]:
        """A name beside the file's, of the same suffix: what is written there becomes the file when the block ends.

        Raises:
            UserError: it cannot be written; nothing of it stays.
        """
        with writing(self) as (place,):
            yield place

    @property
    def beside(self) -> Path:
        """The name beside the file's."""
        return self._beside


@contextlib.contextmanager
def writing(*outputs: Output, folder: Path | None = None) -> Iterator[list[Path]]:
    """The names beside those of ``outputs``, which all become the files when the block ends, in this order, or none.

    Args:
        folder: on the same disk, where they lie meanwhile instead, under names that do not change.

    Raises:
        UserError: one cannot be written; nothing of them stays.
    """
    placed: list[Path] = []
    places = [folder / f"new-{k}{o.path.suffix}" if folder else o.beside for k, o in enumerate(outputs)]
    try:
        yield places
        for place in places:
            descriptor = os.open(place, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        for place, output in zip(places, outputs, strict=True):
            if _is_there(output.path):
                raise UserError(f"{shown(output.path)} was made by somebody else meanwhile: name another file")
            os.rename(place, output.path)
            placed.append(output.path)
        placed.clear()
    except OSError as error:
        names = " and ".join(shown(output.path) for output in outputs)
        raise UserError(f"cannot write {names}: {reason(error)}") from None
    finally:
        for path in [*placed, *places]:
            with contextlib.suppress(OSError):
                path.unlink()


def _is_there(path: Path) -> bool:
    """Whether there is something under the name, be it a broken link.

    Raises:
        OSError: it cannot be: the name is too long, say, or the folder not ours to look into.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
