"""Files of one JSON object a line: appended whole, kept while the disk fails, cut back when a run is continued."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class JsonlFile:
    """Appends objects to a file of which this process is the only writer.

    A line that cannot be written (a full disk, a server that is away) waits in memory and is tried again with the
    next one; half of a line that reached the disk is taken back first. ``notify`` hears when that begins and when all
    is written again. Nothing is written while ``owned`` says that the folder is another process's by now.
    """

    def __init__(
        self, path: Path, notify: Callable[[str], None] = print, owned: Callable[[], bool] = lambda: True
    ) -> None:
        self._path, self._notify, self._owned = path, notify, owned
        self._waiting: list[bytes] = []
        self._told = False
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: int | None = self._open()
        self._end = os.fstat(self._file).st_size  # whole lines end here

    def append(self, value: Mapping[str, Any]) -> None:
        """Writes one line; it is with the operating system when this returns, or waits for the next call."""
        self._waiting.append((dumps(value) + "\n").encode())
        self._write()

    def close(self) -> None:
        """Tries once more what still waits, and says how much of it is lost."""
        if self._waiting and not self._write():
            self._notify(f"{self._path}: {len(self._waiting)} lines could not be written")
        self._let_go()

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def _write(self) -> bool:
        if not self._owned():
            return False
        data = b"".join(self._waiting)
        try:
            if self._file is None:
                self._file = self._open()
            size = os.fstat(self._file).st_size
            self._end = min(self._end, size)  # a person may have emptied it
            if size != self._end:
                os.ftruncate(self._file, self._end)
            if os.write(self._file, data) < len(data):
                raise OSError(28, "No space left on device")  # a disk that fills up takes what fits
        except OSError as error:
            self._let_go()  # a file handle does not outlive its server (ESTALE): open it anew next time
            if not self._told:
                self._told = True
                self._notify(f"cannot write {self._path}: {error.strerror}; keeping the lines and trying again")
            return False
        self._end += len(data)
        self._waiting.clear()
        if self._told:
            self._told = False
            self._notify(f"{self._path} can be written again; nothing is missing")
        return True

    def _let_go(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                os.close(file)


def cut_back(path: Path, step: int) -> None:
    """Drops the lines of later steps, and torn ones: a resumed run does their work again and logs it once.

    A missing file is fine. The old file or the new one is there at any time, never half of one. It becomes a new file
    also where nothing is dropped: a predecessor on a node that was cut off may still hold the old one open, and what
    it has yet to write goes there, out of sight.
    """
    if not path.exists():
        return
    kept = [line for line in path.read_bytes().splitlines(keepends=True) if _belongs(line, step)]
    replace_file(path, b"".join(kept))


def replace_file(path: Path, data: bytes) -> None:
    """Writes a file anew: the old one or the new one is there at any time, also after a power cut.

    Raises:
        OSError: it cannot be written; the old one stays.
    """
    new = path.with_name(f"{path.name}.new")
    try:
        with new.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink()
        raise


def _belongs(line: bytes, step: int) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= step
    except (ValueError, TypeError, KeyError):
        return False


def dumps(value: Any, indent: int | None = None) -> str:
    """JSON that every parser reads: NaN and infinities become null, which pandas reads as NaN again."""
    return json.dumps(_jsonable(value), allow_nan=False, indent=indent)


def _jsonable(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(inner) for inner in value]
    return _jsonable(value.item()) if hasattr(value, "item") else str(value)  # numpy's and torch's numbers
