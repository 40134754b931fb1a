"""Checkpoints: copied to host memory, written behind the training, committed by rename, verified before use.

A checkpoint is one file of ``torch.save``, loadable with ``weights_only=True``. That format is a zip archive; its own
checksums cover the records but not the directory that leads to them, so the archive's comment holds one of the whole.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import re
import secrets
import shutil
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

import torch

from distrib.config import UserError
from distrib.finite import spoilt
from distrib.layout.folders import patiently

LAST, BEST = "last.pt", "best.pt"  # links to two of the files; what a run continues from is found without them
PATTERN = re.compile(r"^step_(\d{8,})\.pt$")
TEMPORARY = ".partial"
PROBE = 1 << 16  # bytes that are really written to see whether the disk takes any: an empty file fits a full one
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
    """Reads the whole file against its checksum; returns what is wrong with it, or None.

    Raises:
        OSError: it cannot be read now, which says nothing about it.
    """
    try:
        with path.open("rb") as file:
            left, found = max(0, os.fstat(file.fileno()).st_size - DIGITS), 0
            while left and (part := file.read(min(left, 1 << 20))):
                found, left = zlib.crc32(part, found), left - len(part)
            written = file.read()
    except (FileNotFoundError, IsADirectoryError) as error:
        return error.strerror
    return None if b"%08x" % found == written else "it does not match its checksum"


def newest_valid(
    folder: Path, notify: Callable[[str], None], accepts: Callable[[dict[str, Any]], bool] | None = None
) -> Path | None:
    """The newest checkpoint that verifies; says which newer ones it passed over and why.

    ``accepts`` looks at what it holds, where more is asked of it.

    Raises:
        UserError: one cannot be read, perhaps only now: to go on from an older one would lose what it holds.
    """
    path = folder
    try:
        for step in patiently(steps_in, folder):
            path = path_for(folder, step)
            fault = patiently(verify, path)
            if fault is None:
                if accepts is None or accepts(load(path)):
                    return path
                continue
            notify(f"checkpoint {path} is damaged and passed over: {fault}")
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}: start again when it can be read, or move it away"
        ) from None
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


def check_room(folder: Path, needed: int = 0) -> None:
    """Makes ``folder``, and looks whether a checkpoint of about ``needed`` bytes can be written to it.

    Raises:
        UserError: it cannot be written, or the disk has no room.
    """
    probe = folder / f".probe.{secrets.token_hex(8)}{TEMPORARY}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with probe.open("wb") as file:
                file.write(bytes(PROBE))
                file.flush()
                os.fsync(file.fileno())  # a network disk says it no sooner
        finally:
            probe.unlink(missing_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        _remove_empty(folder)
        raise UserError(f"cannot write checkpoints to {folder}: {error.strerror}: set run.dir") from None
    if free < needed:
        _remove_empty(folder)
        raise UserError(
            f"{folder} has room for {free / 1e6:.0f} MB, and one checkpoint takes about {needed / 1e6:.0f} MB: "
            "make room, or set run.dir"
        )


class Checkpointer:
    """Saves into one folder. Only the rank that writes makes one; ``save`` returns after the copy to host memory.

    What holds a value that is no number is not saved: a run that went on from it could not recover. The thread looks at
    its copy in host memory, so the training does not wait for it.

    ``writer`` is unique to this start and part of the temporary files' names, so that nothing of two writers is ever
    mixed; ``owned`` says before each commit whether the folder is still ours. A save that fails (a full disk) is
    reported by ``notify`` and leaves the older files as they are.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        notify: Callable[[str], None],
        writer: str = "",
        owned: Callable[[], bool] = lambda: True,
        needed: int = 0,
    ) -> None:
        """``needed``: bytes of one checkpoint, about.

        Raises:
            UserError: the folder cannot be written, or the disk has no room for one checkpoint.
        """
        self._folder, self._keep, self._notify = folder, keep, notify
        self._writer, self._owned = writer, owned
        self._thread: threading.Thread | None = None
        self._saved: int | None = None  # the newest step that is on disk by this object's doing
        check_room(folder, needed)
        for left in folder.glob(f"*{TEMPORARY}"):  # a save that was killed
            with contextlib.suppress(OSError):
                left.unlink()

    def save(self, state: dict[str, Any], step: int, best: int | None, good: int | None = None) -> None:
        """Takes a copy of ``state`` and writes it in the background; keeps the last ``keep`` files, ``best``, ``good``.

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
            if (where := spoilt(snapshot)) is not None:
                self._notify(f"checkpoint {path} was not saved: {where} holds a value that is no number (NaN)")
                return
            try:
                commit(snapshot, path, self._writer, self._owned)
                self._saved = step
            except (OSError, RuntimeError) as error:
                told = error.strerror if isinstance(error, OSError) else str(error)
                reason = told.splitlines()[0] if told else type(error).__name__
                self._notify(f"checkpoint {path} was not saved: {reason}; the run and older checkpoints go on")
                return
            if self._owned():
                self._link(LAST, step)
                if best is not None:
                    self._link(BEST, best)
                self._retire(step, (best, good))

        self._thread = threading.Thread(target=write, name="checkpoint", daemon=False)
        self._thread.start()

    def wait(self) -> int | None:
        """Waits for the save under way; returns the newest step that this object has saved."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self._saved

    def _link(self, name: str, step: int) -> None:
        """Points ``name`` at a checkpoint, where the disk knows symbolic links; at none, if that could not be saved."""
        target, link = path_for(self._folder, step), self._folder / name
        partial = self._folder / f"{name}.{self._writer}{TEMPORARY}"
        with contextlib.suppress(OSError):
            if not target.exists():
                link.unlink(missing_ok=True)
            else:
                partial.symlink_to(target.name)  # relative: the folder may be moved
                os.replace(partial, link)

    def _retire(self, newest: int, kept: tuple[int | None, ...]) -> None:
        older = [step for step in steps_in(self._folder) if step < newest]
        for step in older[self._keep - 1 :]:
            if step not in kept:
                with contextlib.suppress(OSError):  # it stays for the next time
                    path_for(self._folder, step).unlink()


def commit(state: dict[str, Any], path: Path, writer: str = "", owned: Callable[[], bool] = lambda: True) -> None:
    """Writes ``state`` so that ``path`` is either absent or whole, also after a power cut.

    Raises:
        OSError: the disk's own word for why it could not be written.
        RuntimeError: ``owned()`` no more, when all was written.
    """
    partial = path.with_name(f"{path.name}.{writer}{TEMPORARY}")
    try:
        with partial.open("xb") as file:
            summed = _Summed(file)
            try:
                torch.save(state, cast(IO[bytes], summed))
            except RuntimeError:  # torch's zip writer says "unexpected pos" of a full disk
                if summed.error is not None:
                    raise summed.error from None
                raise
            summed.finish()
            file.flush()
            os.fsync(file.fileno())
        if not owned():  # as late as can be: writing takes long enough for another to take the folder over
            raise RuntimeError("the folder could not be shown to be this run's still")
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


class _Summed:
    """Takes torch's zip archive as it comes and adds up the checksum of what was meant, not of what the disk holds.

    The archive's last two bytes are held back: they are the length of its comment, which then is the checksum.
    """

    LENGTH = 2

    def __init__(self, file: io.BufferedWriter) -> None:
        self._file, self._sum, self._tail = file, 0, b""
        self.error: OSError | None = None  # torch loses it

    def write(self, data: bytes | memoryview) -> int:
        """Appends ``data``."""
        view = memoryview(data)
        if len(view) >= self.LENGTH:
            self._put(self._tail)
            self._put(view[: -self.LENGTH])
            self._tail = bytes(view[-self.LENGTH :])
        else:
            whole = self._tail + bytes(view)
            self._put(whole[: -self.LENGTH])
            self._tail = whole[-self.LENGTH :]
        return len(view)

    def flush(self) -> None:
        """Nothing: the caller flushes."""

    def finish(self) -> None:
        """Ends the archive with its comment: label and checksum of all before the checksum."""
        self._put((len(LABEL) + DIGITS).to_bytes(self.LENGTH, "little") + LABEL)
        self._file.write(b"%08x" % self._sum)

    def _put(self, data: bytes | memoryview) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self._sum = zlib.crc32(data, self._sum)


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


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
