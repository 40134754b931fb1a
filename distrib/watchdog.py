"""Ends a rank that does not get on, with the stacks of all its threads in ``RUN/faults/rank_00003.txt``.

A rank that hangs stops the run for ever, and a thousand others with it: they wait in a collective, in C code that no
signal interrupts. Each rank has a watchdog of its own, so the stacks of all are there: of those that wait, and of the
one they wait for. The process ends with 1, and torchrun starts the group again.

Two layers. A thread looks each second whether the loop has said anything (``beat``); it can tell the launcher what it
saw. Some seconds later comes ``faulthandler``'s own thread, in C, which needs no lock of Python's: it ends a process
whose C code holds that lock and never returns.

Not watched is what may take any time on one rank while the others wait for it: all before the folder is this run's,
such as the listing of millions of files, and the end, with the last save. There ``runtime.CONTROL_TIMEOUT`` holds.

A process that is halted as a whole (SIGSTOP) does not count that time, but ``faulthandler`` does: where a scheduler
suspends jobs for longer than the limit, say ``train.hang_minutes=null``.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, MutableMapping
from pathlib import Path

from distrib.config import Auto
from distrib.faults import FAILED, report_exit
from distrib.runtime import step_timeout

START, TRAINING, EVALUATION, SAVE = "start", "training", "evaluation", "save"

LOOK = 1.0  # seconds between two looks, each of which also puts off the backstop
GRACE = 5.0  # from the stacks to the end: who ends first has torchrun end the others, which are to leave theirs
# More than GRACE, and less than the 30 s after which torchrun kills what is left of a group.
BACKSTOP = 15.0
MULTIPLE = 5  # of the longest interval seen
ROOM_MINUTES = 5.0  # beyond what a rank may wait for its images
HEAD = 200  # bytes of the line above the stacks
MARK = "=== "


def limit_seconds(phase: str, longest: float | None, minutes: float | Auto, wait_minutes: float) -> float:
    """How long a rank may be silent in ``phase``, of which ``longest`` seconds were the longest interval so far.

    A first time, which compiles, and a save, where rank 0 may wait for a slow disk and the others for rank 0, may take
    what a collective may (``runtime.step_timeout``: 30 minutes). Else ``train.hang_minutes``; auto: five times the
    longest interval, and always longer than a rank may wait for its images. That is doubled from 15 minutes on and not
    taken as it is, so that the ranks, whose intervals differ a little, agree.
    """
    patience = step_timeout(wait_minutes).total_seconds()
    if longest is None or phase in (START, SAVE):
        return patience if minutes == "auto" else max(patience, 60 * minutes)
    if minutes != "auto":
        return 60 * minutes
    limit = 60 * (wait_minutes + ROOM_MINUTES)
    while limit < MULTIPLE * longest:
        limit *= 2
    return limit


class Watchdog:
    """Watches this process from here on until ``close``; ``minutes``: ``train.hang_minutes``, None for no watch.

    ``lag``: steps that the host may be ahead of what it has begun. So many beats after a save this rank may still come
    to wait for rank 0's. ``last_act`` is called between the stacks and the end, and may hang.
    """

    def __init__(
        self,
        file: Path,
        step: int,
        minutes: float | Auto | None,
        wait_minutes: float,
        lag: int = 0,
        last_act: Callable[[], None] = lambda: None,
    ) -> None:
        self._file, self._minutes, self._wait_minutes, self._lag = file, minutes, wait_minutes, lag
        self._last_act = last_act
        self._step, self._phase, self._since = step, START, time.monotonic()
        self._beats, self._saved = 0, -lag - 1
        self._longest: dict[str, float] = {}
        self._main = threading.main_thread().ident
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        if minutes is not None:
            self._fd, self._base = _open(file)
            self._head(step, START, self._limit())
            self._arm()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def beat(self, step: int, phase: str) -> None:
        """The loop has got to here: ``step`` steps are done, and ``phase`` goes on or begins. About a microsecond."""
        now = time.monotonic()
        took, before = now - self._since, self._phase
        if took > self._longest.get(before, 0.0):
            self._longest[before] = took
        self._step, self._phase, self._since = step, phase, now
        self._beats += 1
        if phase == SAVE:
            self._saved = self._beats

    def close(self) -> None:
        """Ends the watch; a file without stacks goes. A second call does nothing."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._over.set()
        thread.join()
        faulthandler.cancel_dump_traceback_later()
        _close(self._file, self._fd, self._base)

    def _limit(self) -> float:
        phase = SAVE if self._beats - self._saved <= self._lag else self._phase
        assert self._minutes is not None
        return limit_seconds(phase, self._longest.get(phase), self._minutes, self._wait_minutes)

    def _watch(self) -> None:
        seen, silent, told = self._beats, 0.0, time.monotonic()
        before = told
        while not self._over.wait(LOOK):
            now, limit = time.monotonic(), self._limit()
            if self._beats != seen:
                seen, silent = self._beats, min(now - self._since, 5 * LOOK)
            else:
                silent += min(now - before, 5 * LOOK)  # more than that, and the process was halted
            before = now
            if silent > limit:
                self._end(limit)
            if now - told > max(LOOK, limit / 20):  # the disk is not to hear of it each second
                told = now
                self._head(self._step, self._phase, limit)
            self._arm()

    def _arm(self, seconds: float | None = None) -> None:
        """Puts the backstop off: it watches this thread, which can not run where C code holds Python's lock."""
        later = self._limit() + BACKSTOP if seconds is None else seconds
        faulthandler.dump_traceback_later(later, exit=True, file=self._fd)

    def _end(self, limit: float) -> None:
        step, phase = self._step, self._phase
        self._head(step, phase, limit)
        faulthandler.dump_traceback(file=self._fd, all_threads=True)
        self._arm(BACKSTOP - GRACE)  # what follows may hang itself
        frame = sys._current_frames().get(self._main or 0)
        where = f", in {frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})" if frame else ""
        silent = time.monotonic() - self._since
        line = f"no progress for {silent:.0f} s after step {step} ({phase}){where}: stacks in {self._file.parent}"
        with contextlib.suppress(OSError):
            os.write(2, f"error: rank {os.environ.get('RANK', 0)}: {line}\n".encode(errors="replace"))
        code = report_exit(FAILED, line)
        with contextlib.suppress(Exception):
            self._last_act()
        time.sleep(GRACE)
        os._exit(code)

    def _head(self, step: int, phase: str, limit: float) -> None:
        """Writes the line above the stacks that may come, in the place of the last one: C code cannot write it."""
        if self._base is None:
            return
        text = f"{MARK}{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {_who()}, step {step}, {phase}, limit {limit:.0f} s"
        with contextlib.suppress(OSError):
            os.pwrite(self._fd, text.encode(errors="replace")[: HEAD - 1].ljust(HEAD - 1) + b"\n", self._base)


def _who() -> str:
    return f"host {platform.node()}, process {os.getpid()}"


def _open(file: Path) -> tuple[int, int | None]:
    """A descriptor that stands behind the line for this start, and where that line goes; stderr's where no disk is."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)  # not O_APPEND, which pwrite would heed
        base = os.fstat(fd).st_size
        if base >= HEAD and os.pread(fd, len(MARK), base - HEAD) == MARK.encode():
            base -= HEAD  # of a start that was killed, and left no stacks
        os.lseek(fd, base + HEAD, os.SEEK_SET)
    except OSError as error:
        print(f"warning: no stacks in {file.parent} should a rank hang: {error.strerror}", file=sys.stderr)
        return 2, None
    return fd, base


def _close(file: Path, fd: int, base: int | None) -> None:
    if base is None:
        return
    with contextlib.suppress(OSError):
        if _who().encode() not in os.pread(fd, HEAD, base):  # a successor's by now, who watches: this one was replaced
            os.close(fd)
            return
        os.ftruncate(fd, base)
        os.close(fd)
        if base == 0:
            file.unlink()
            file.parent.rmdir()  # the last one out: it is not empty before


def record_collectives(faults: Path, environ: MutableMapping[str, str]) -> None:
    """Asks torch to record NCCL's last collectives and to leave them in ``faults`` when one times out.

    Read by ``torchfrtrace --prefix nccl_ FAULTS``. Before the process group is made; what the user has set stays. Names
    as torch 2.15 reads them (``FlightRecorder.hpp``, ``ProcessGroupNCCL.hpp``); never run, for want of several GPUs.
    """
    wanted = (
        (("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"), "2000"),
        (("TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_FR_DUMP_ON_TIMEOUT"), "1"),
        (("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"), f"{faults.absolute()}/nccl_"),  # and the rank
    )
    for names, value in wanted:
        if not any(name in environ for name in names):
            environ[names[0]] = value


def save_collectives(faults: Path, rank: int) -> None:
    """Writes what NCCL's recorder holds: this process ends before NCCL's own timeout would. May hang with the GPU."""
    import torch
    from torch._C import _distributed_c10d

    dump = getattr(_distributed_c10d, "_dump_nccl_trace", None)
    if dump is not None and torch.cuda.is_initialized():
        (faults / f"nccl_{rank}").write_bytes(dump())
