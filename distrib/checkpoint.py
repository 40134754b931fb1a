"""Checkpoints: copied to host memory, written behind the training, committed by rename, verified before use.

A checkpoint is one file of ``torch.save``, loadable with ``weights_only=True``. That format is a zip archive; its own
checksums cover the records but not the directory that leads to them, so the archive's comment holds one of the whole.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from distrib.config import UserError

PATTERN = re.compile(r"^step_(\d{8,})\.pt$")
TEMPORARY = ".partial"
LABEL = b"crc32 "  # begins the archive's comment; eight hexadecimal digits follow and end the file
DIGITS = 8


def path_for(folder: Path, step: int) -> Path:
    """The file of the checkpoint after ``step`` steps."""
    return folder / f"step_{step:08d}.pt"


def steps_in(folder: Path) -> list[int]:
    """The steps that have a committed file, newest first."""
    if not folder.is_dir():
        return []
    return sorted((int(m[1]) for name in os.listdir(folder) if (m := PATTERN.match(name))), reverse=True)


def verify(path: Path) -> str | None:
    """Reads the whole file against its checksum; returns what is wrong with it, or None."""
    try:
        with path.open("rb") as file:
            size = max(0, os.fstat(file.fileno()).st_size - DIGITS)
            found, written = _checksum(file, size), file.read()
    except OSError as error:
        return error.strerror or str(error)
    return None if found == written else "it does not match its checksum"


def _checksum(file: BinaryIO, size: int) -> bytes:
    """CRC-32 of the first ``size`` bytes, as ``DIGITS`` digits; leaves the file behind them."""
    file.seek(0)
    value = 0
    while size and (part := file.read(min(size, 1 << 20))):
        value, size = zlib.crc32(part, value), size - len(part)
    return b"%08x" % value


def newest_valid(folder: Path, notify: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies; says which newer ones it passed over and why."""
    for step in steps_in(folder):
        path = path_for(folder, step)
        fault = verify(path)
        if fault is None:
            return path
        notify(f"checkpoint {path} is damaged and passed over: {fault}")
    return None


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Loads a checkpoint's tensors and plain values; never code.

    Raises:
        UserError: the file is not there or not a checkpoint.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"cannot load checkpoint {path}: {told}") from None


class Checkpointer:
    """Saves into one folder. Only the rank that writes makes one; ``save`` returns after the copy to host memory.

    A save that fails (a full disk) is reported by ``notify`` and leaves the older files as they are.
    """

    def __init__(self, folder: Path, keep: int, notify: Callable[[str], None]) -> None:
        self._folder, self._keep, self._notify = folder, keep, notify
        self._thread: threading.Thread | None = None
        self._saved: int | None = None  # the newest step that is on disk by this object's doing
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(f"*{TEMPORARY}"):  # a save that was killed
                left.unlink()
            probe = folder / f".probe{TEMPORARY}"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise UserError(f"cannot write checkpoints to {folder}: {error.strerror}: set run.dir") from None

    def save(self, state: dict[str, Any], step: int, best: int | None) -> None:
        """Takes a copy of ``state`` and writes it in the background; keeps the last ``keep`` files and step ``best``.

        Waits first where the previous save is still being written: two at a time would only slow each other.
        """
        self.wait()
        snapshot = _to_host(state)
        copied = torch.cuda.Event() if torch.cuda.is_available() else None
        if copied is not None:
            copied.record()

        def write() -> None:
            if copied is not None:
                copied.synchronize()
            path = path_for(self._folder, step)
            try:
                commit(snapshot, path)
                self._saved = step
                self._retire(step, best)
            except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                self._notify(f"checkpoint {path} was not saved: {reason}; the run and older checkpoints go on")

        self._thread = threading.Thread(target=write, name="checkpoint", daemon=False)
        self._thread.start()

    def wait(self) -> int | None:
        """Waits for the save under way; returns the newest step that this object has saved."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self._saved

    def _retire(self, newest: int, best: int | None) -> None:
        older = [step for step in steps_in(self._folder) if step < newest]
        for step in older[self._keep - 1 :]:
            if step != best:
                with contextlib.suppress(FileNotFoundError):
                    path_for(self._folder, step).unlink()


def commit(state: dict[str, Any], path: Path) -> None:
    """Writes ``state`` so that ``path`` is either absent or whole, also after a power cut."""
    partial = path.with_name(path.name + TEMPORARY)
    try:
        with partial.open("w+b") as file:
            torch.save(state, file)
            file.seek(-2, os.SEEK_END)  # the length of the archive's comment, which comes last
            file.write((len(LABEL) + DIGITS).to_bytes(2, "little") + LABEL)
            file.write(_checksum(file, file.tell()))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def _to_host(value: Any) -> Any:
    """A copy of nested containers with their tensors in host memory; copies from a GPU are only begun."""
    if isinstance(value, torch.Tensor):
        if value.is_cuda:
            # Pinned, from torch's cache of such memory: the copy then runs beside the training.
            host = torch.empty_like(value, device="cpu", pin_memory=True)
            return host.copy_(value.detach(), non_blocking=True)
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _to_host(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to_host(inner) for inner in value)
    return value
