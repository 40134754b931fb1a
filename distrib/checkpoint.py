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
import time
import zlib
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import IO, Any, Protocol, cast

import torch

from distrib.config import UserError
from distrib.digest import digest
from distrib.finite import spoilt
from distrib.layout.folders import patiently

LAST, BEST = "last.pt", "best.pt"  # links to two of the files; what a run continues from is found without them
PATTERN = re.compile(r"^step_(\d{8,})\.pt$")
TEMPORARY = ".partial"
PROBE = 1 << 16  # bytes that are really written to see whether the disk takes any: an empty file fits a full one
LABEL = b"crc32 "  # begins the archive's comment; eight hexadecimal digits follow and end the file
DIGITS = 8
SILENCE = 10.0  # seconds of a wait for the disk before it is worth a line; then twice as long, and so on


def path_for(folder: Path, step: int) -> Path:
    """The file of the checkpoint after ``step`` steps."""
    return folder / f"step_{step:08d}.pt"


def steps_in(folder: Path) -> list[int]:
    """The steps that have a committed file, newest first."""
    if not folder.is_dir():
        return []
    return sorted((int(m[1]) for name in os.listdir(folder) if (m := PATTERN.match(name))), reverse=True)


def superseded(steps: Iterable[int], newest: int, keep: int, others: Collection[int | None]) -> list[int]:
    """Which of ``steps`` are not kept when ``newest`` has been saved: the last ``keep`` are, and ``others``."""
    older = sorted((step for step in steps if step < newest), reverse=True)
    return [step for step in older[keep - 1 :] if step not in others]


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


class SecondPlace(Protocol):
    """Where committed files are copied to, by a thread of its own: only ``wait`` takes time, and nothing raises."""

    def offer(self, path: Path, step: int, best: int | None) -> None:
        """Takes note of a committed file; ``best``: the step whose file is kept besides the newest."""

    def reads(self, step: int) -> bool:
        """Whether the file of ``step`` is still needed here."""

    def wait(self) -> None:
        """Waits for what is under way, as long as there is hope."""


class Checkpointer:
    """Saves into one folder. Only the rank that writes makes one; ``save`` returns after the copy to host memory.

    The training never waits for a slow disk: what falls due while a file is being written is passed over, told once,
    and ``overdue`` says when it can be made up for. Only the copy of the best waits its turn, one at most.

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
        second: SecondPlace | None = None,
    ) -> None:
        """``needed``: bytes of one checkpoint, about.

        Raises:
            UserError: the folder cannot be written, or the disk has no room for one checkpoint.
        """
        self._folder, self._keep, self._notify = folder, keep, notify
        self._writer, self._owned = writer, owned
        self._second = second
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()  # of the next two
        self._next: tuple[int, Callable[[], None]] | None = None
        self._writing: int | None = None  # which step
        self._owed = False  # a save was passed over, and none was begun since
        self._told = False  # that saves are passed over, until one begins when it is due
        self._saved: int | None = None  # the newest step that is on disk by this object's doing
        self._last: tuple[int, dict[str, Any]] | None = None  # step and state of the last save of all
        self.seconds: float | None = None  # what the longest save took, from the call to the disk
        check_room(folder, needed)
        for left in folder.glob(f"*{TEMPORARY}"):  # a save that was killed
            with contextlib.suppress(OSError):
                left.unlink()

    @property
    def overdue(self) -> bool:
        """Whether a save that was passed over can be made now."""
        return self._owed and self._writing is None

    def save(
        self, state: dict[str, Any], step: int, best: int | None, last: bool = False, good: int | None = None
    ) -> bool:
        """Takes a copy of ``state`` and writes it in the background; keeps the last ``keep`` files, ``best``, ``good``.

        Returns whether it did: not where another is still being written. If this is the best it is copied all the same,
        and written next; if it is the ``last`` of a start, the others are waited for.
        """
        if last:
            self.wait()
        writing = self._writing
        if writing is not None and step != best:
            if not self._told:
                self._notify(
                    f"{self._folder} is slow: step {writing} is still being written, so the save of step {step} is "
                    "passed over, and made up for as soon as that is done"
                )
            self._owed = self._told = True
            return False
        # What is made up for, or waits its turn, is no sign that the disk keeps up.
        self._told = self._told and (self._owed or writing is not None)
        self._owed = False
        began = time.monotonic()
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
            commit(snapshot, path, self._writer, self._owned)
            self._saved = step
            self.seconds = max(self.seconds or 0.0, time.monotonic() - began)
            if last:
                self._last = step, snapshot
            if self._owned():
                self._link(LAST, step)
                if best is not None:
                    self._link(BEST, best)
                if self._second is not None:
                    self._second.offer(path, step, best)
                self._retire(step, best, good)

        with self._lock:
            self._next = step, write  # in the place of a best that is none any more
            if self._writing is None:
                self._writing = step
                self._thread = threading.Thread(target=self._work, name="checkpoint", daemon=False)
                self._thread.start()
        return True

    def wait(self) -> int | None:
        """Waits for the saves under way, telling so after a while; returns the newest step that this object has saved.

        A signal's handler runs meanwhile.
        """
        patience = SILENCE
        while self._thread is not None:
            self._thread.join(patience)
            if not self._thread.is_alive():
                self._thread = None
            elif (writing := self._writing) is not None:
                partial = self._partial(path_for(self._folder, writing).name)
                with contextlib.suppress(OSError):
                    written = partial.stat().st_size
                    self._notify(f"waiting for {self._folder}: {written / 1e6:.0f} MB of step {writing} are written")
                patience *= 2
        return self._saved

    def sha256(self, step: int) -> dict[str, str] | None:
        """The digest of the checkpoint of ``step``, from its file where this start has not saved it; None without one.

        Raises:
            UserError: the file cannot be read.
        """
        self.wait()
        if self._last is not None and self._last[0] == step:
            return digest(self._last[1])  # of the copy in memory
        path = path_for(self._folder, step)
        return digest(load(path)) if path.exists() else None

    def close(self) -> None:
        """Waits for the saves under way, and for the second place, while that takes anything."""
        self.wait()
        if self._second is not None:
            self._second.wait()

    def _work(self) -> None:
        """Writes what there is to write, and ends."""
        while True:
            with self._lock:
                due, self._next = self._next, None
                self._writing = None if due is None else due[0]
            if due is None:
                return
            step, write = due
            try:
                write()
            except Exception as error:  # whatever it is: it must not cost the saves to come
                told = str((isinstance(error, OSError) and error.strerror) or error)
                reason = told.splitlines()[0] if told else type(error).__name__
                path = path_for(self._folder, step)
                self._notify(f"checkpoint {path} was not saved: {reason}; the run and older checkpoints go on")

    def _partial(self, name: str) -> Path:
        return self._folder / f"{name}.{self._writer}{TEMPORARY}"

    def _link(self, name: str, step: int) -> None:
        """Points ``name`` at a checkpoint, where the disk knows symbolic links; at none, if that could not be saved."""
        target, link = path_for(self._folder, step), self._folder / name
        partial = self._partial(name)
        try:
            if not target.exists():
                link.unlink(missing_ok=True)
            else:
                partial.symlink_to(target.name)  # relative: the folder may be moved
                os.replace(partial, link)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink()  # else it would be in the way of the next

    def _retire(self, newest: int, best: int | None, good: int | None) -> None:
        with contextlib.suppress(OSError):
            there = steps_in(self._folder)
            # The save of ``good`` may have been passed over: then the one before it is what there is to go back to.
            good = max((step for step in there if good is not None and step <= good), default=None)
            for step in superseded(there, newest, self._keep, (best, good)):
                if self._second is None or not self._second.reads(step):
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
