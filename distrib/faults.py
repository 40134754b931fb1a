"""Stopping: signals only set a flag, all ranks agree on the step, and the exit code says how a run ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

FINISHED, FAILED, USER_ERROR = 0, 1, 2
STOPPED = 75  # EX_TEMPFAIL: stopped on request with everything saved, start me again

# What Slurm, submitit, torchrun, a terminal that is closed, and a person at one send when the time is up.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


class Interrupted(Exception):
    """Somebody asked to stop while the run waited for something that may never come, such as a disk or another rank."""


class Failure(Exception):
    """Ends the run with one line and exit code 1: nothing in the configuration or the data would mend it.

    ``everywhere``: all ranks of the run meet it, so that rank 0 alone tells it.
    """

    def __init__(self, message: str, everywhere: bool = False) -> None:
        super().__init__(message)
        self.everywhere = everywhere


class StopSignals:
    """Remembers the first stop signal. Saving inside a handler would run at any point of a step, so it only notes.

    Who presses Ctrl-C again, a second later or more, gets Python's own way out, without a save.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._since = 0.0
        self._waits_for: str | None = None  # while that is so, nothing is lost by leaving at once
        # Python runs a handler between two of its own instructions: not while C code waits for another rank. The
        # number of a signal reaches this pipe at any time, and so the thread that reads it.
        self._numbers, numbers = os.pipe()
        os.set_blocking(numbers, False)
        signal.set_wakeup_fd(numbers, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="stop", daemon=True).start()
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup means it
                signal.signal(number, self._note)

    def requested(self) -> bool:
        """Whether a stop signal has come."""
        return self.received is not None

    @contextlib.contextmanager
    def leaving_at_once(self, waits_for: str) -> Iterator[None]:
        """For a wait in C code before anything is trained: a stop signal ends the process there and then, with 75."""
        self._waits_for = waits_for  # before the look: a signal between the two must not be lost
        try:
            if self.requested():
                raise Interrupted
            yield
        finally:
            self._waits_for = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._since = signal.Signals(number).name, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > 1:
            signal.default_int_handler(number, frame)

    def _watch(self) -> None:
        while numbers := os.read(self._numbers, 64):
            number = next((n for n in numbers if n in STOP_SIGNALS), None)
            waits_for = self._waits_for
            if number is None or waits_for is None:
                continue
            line = f"{signal.Signals(number).name}: stopped while waiting for {waits_for}; nothing was trained yet\n"
            with contextlib.suppress(OSError):
                os.write(2, line.encode())
            report_exit(STOPPED)
            os._exit(STOPPED)

    @staticmethod
    def ignore() -> None:
        """For a process whose exit code is settled: torchrun sends SIGTERM to the ranks that are not the first to end.

        Python forgets its handlers while it shuts down, and the signal would kill the rank; ignored ones stay ignored.
        """
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)


class Agreement:
    """Flags that any rank raises, seen by all ranks at the same call, without waiting for the device.

    Each ``exchange`` posts this rank's flags on the gloo control group and returns what the ranks together posted at
    the *previous* call: that all-reduce ran in the background during the step between, so the wait is short. All
    ranks must call it equally often.
    """

    def __init__(self, group: Any = None) -> None:
        import torch  # here, not above: a run takes over its signals before torch's slow import

        self._torch, self._group = torch, group
        self._flags = torch.zeros(2, dtype=torch.int32)
        self._work: Any = None

    def exchange(self, *, stop: bool, save: bool = False) -> tuple[bool, bool]:
        """Returns (stop, save): whether any rank asked for it."""
        if self._group is None:
            return stop, save
        self.close()
        agreed_stop, agreed_save = (bool(flag) for flag in self._flags.tolist())
        dist = self._torch.distributed
        self._flags = self._torch.tensor([stop, save], dtype=self._torch.int32)
        self._work = dist.all_reduce(self._flags, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return agreed_stop, agreed_save

    def close(self) -> None:
        """Waits for the exchange that is under way, so that no rank leaves while another still needs it."""
        if self._work is not None:
            self._work.wait()
            self._work = None


def report_exit(code: int, message: str = "") -> int:
    """Tells the launcher how this rank ended, as a line "RANK CODE MESSAGE": torchrun says 1 for every failure.

    torchrun's own table of failures gets the message through the file that it names for it.
    """
    message = " ".join(message.split())
    if path := os.environ.get("DISTRIB_EXIT_CODE_FILE"):
        with contextlib.suppress(OSError), open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{os.environ.get('RANK', 0)} {code} {message}\n")
    if code != FINISHED and (path := os.environ.get("TORCHELASTIC_ERROR_FILE")):
        words = message or ("stopped on request, everything is saved" if code == STOPPED else "failed, see above")
        extra = {"timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": words, "extraInfo": extra}}, file)
    return code
