"""Rows that are done, in a hidden folder beside the output, so that the same command goes on where it was."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distrib.config import UserError
from distrib.data.staging import write_file
from distrib.layout.folders import reason, shown

SAVE_EVERY = 1.0  # seconds; what a kill -9 costs at most is computed again
CHUNK = 4096  # rows read at once


class Work:
    """The rows of one output, fp32 [rows, columns], and which of them are none.

    In its folder, ``rows`` holds the numbers, ``progress`` a line for each save (rows done, and those without a
    picture since the last line), ``meta.json`` what it all is for: the leftover of another command is thrown away.
    """

    def __init__(self, output: Path, purpose: Mapping[str, Any], columns: int, batch: int | None, default: int) -> None:
        """Opens the folder, anew or where it was left.

        Args:
            purpose: what decides the rows, as JSON has it.
            batch: rows a batch; None: as the same work was begun, else ``default``. Other borders give other last bits.

        Raises:
            UserError: nothing can be written there, or another process is at it.
        """
        self.folder, self.columns = folder_of(output), columns
        self.done, self.bad = 0, list[int]()
        self._unsaved, self._saved_at = list[int](), time.monotonic()
        try:
            self.folder.mkdir(exist_ok=True)
            self._lock, _ = _hold(output, os.O_CREAT)
            begun = self._begun()
            same = {key: value for key, value in begun.items() if key != "batch"} == dict(purpose) | {
                "columns": columns
            }
            self.batch = batch or (begun["batch"] if same and "batch" in begun else default)
            meta = dict(purpose) | {"columns": columns, "batch": self.batch}
            if begun != meta:
                for name in os.listdir(self.folder):
                    if name != "lock":
                        (self.folder / name).unlink()
                write_file(self.folder / "new", json.dumps(meta).encode())
                os.rename(self.folder / "new", self.folder / "meta.json")
            self._take_over()
            self._rows = os.open(self.folder / "rows", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self._progress = os.open(
                self.folder / "progress", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_APPEND, 0o666
            )
        except OSError as error:
            raise UserError(f"cannot write {shown(self.folder)}: {reason(error)}") from None

    def _begun(self) -> dict[str, Any]:
        try:
            found = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _take_over(self) -> None:
        """Reads what is done; cuts off a line that a kill has torn."""
        with contextlib.suppress(FileNotFoundError), (self.folder / "progress").open("r+b") as file:
            whole = 0
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self.done, bad = json.loads(line)
                self.bad += bad
                whole += len(line)
            file.truncate(whole)

    def add(self, rows: npt.NDArray[np.float32], good: npt.NDArray[np.bool_]) -> None:
        """Adds a batch behind those that are done; ``good`` bool [n]: which rows are of pictures.

        Raises:
            UserError: the disk does not take them.
        """
        try:
            data = memoryview(np.ascontiguousarray(rows, dtype=np.float32).tobytes())
            at = self.done * self.columns * 4
            while data:
                written = os.pwrite(self._rows, data, at)
                data, at = data[written:], at + written
        except OSError as error:
            raise UserError(f"cannot write {shown(self.folder)}: {reason(error)}") from None
        found = (self.done + np.flatnonzero(~good)).tolist()
        self.bad += found
        self._unsaved += found
        self.done += len(rows)
        if time.monotonic() - self._saved_at > SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Notes what is done so far, once the rows are on the disk.

        Raises:
            UserError: the disk does not take it.
        """
        try:
            os.fsync(self._rows)
            os.write(self._progress, json.dumps([self.done, self._unsaved]).encode() + b"\n")
            os.fsync(self._progress)
        except OSError as error:
            raise UserError(f"cannot write {shown(self.folder)}: {reason(error)}") from None
        self._unsaved, self._saved_at = [], time.monotonic()

    def good(self) -> npt.NDArray[np.int64]:
        """The rows of pictures, in order."""
        return np.setdiff1d(np.arange(self.done), self.bad)

    def chunks(self) -> Iterator[npt.NDArray[np.float32]]:
        """The rows of pictures, ``CHUNK`` at a time."""
        rows = np.memmap(self.folder / "rows", np.float32, "r", shape=(self.done, self.columns))
        good = self.good()
        for first in range(0, len(good), CHUNK):
            yield np.asarray(rows[good[first : first + CHUNK]])

    def finishing(self, mark: str) -> None:
        """Notes that the outputs are about to appear; ``mark`` tells ours from others (``finished``)."""
        write_file(self.folder / "finishing", mark.encode())

    def close(self) -> None:
        """Lets go of the folder, which stays."""
        for descriptor in (self._rows, self._progress, self._lock):
            os.close(descriptor)

    def remove(self) -> None:
        """Lets go of the folder, and removes it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()


def folder_of(output: Path) -> Path:
    """Where the work for an output lies."""
    name = os.fsencode(output.name)
    if len(name) > 240:  # bytes; a disk takes 255
        name = hashlib.sha256(name).hexdigest().encode()
    return output.with_name(f".{os.fsdecode(name)}.work")


@contextlib.contextmanager
def finished(output: Path) -> Iterator[str | None]:
    """The mark of the work for ``output`` whose outputs were about to appear when it was killed; held meanwhile.

    None also on a disk without locks, where the process may be alive.

    Raises:
        UserError: another process is at it.
    """
    try:
        lock, held = _hold(output)
    except OSError:
        yield None
        return
    try:
        mark = None
        folder = folder_of(output)
        with contextlib.suppress(OSError):
            if held and os.path.samestat(os.fstat(lock), os.stat(folder / "lock")):  # not removed since it was opened
                mark = (folder / "finishing").read_text(encoding="utf-8")
        yield mark
    finally:
        os.close(lock)


def _hold(output: Path, flags: int = 0) -> tuple[int, bool]:
    """The open lock of the work for ``output``, and whether it is locked: not on a disk without locks."""
    lock = os.open(folder_of(output) / "lock", os.O_RDWR | os.O_CLOEXEC | flags, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UserError(f"another process is writing {shown(output)}: wait for it, or name another file") from None
    except OSError:
        return lock, False
    return lock, True
