"""Stopping: signals only set a flag, all ranks agree on the step, and the exit code says how a run ended."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

FINISHED, FAILED, USER_ERROR = 0, 1, 2
STOPPED = 75  # EX_TEMPFAIL: stopped on request with everything saved, start me again
# Of a rank's report alone, for whoever starts ranks again; the process ends with FAILED.
DIVERGED = 3  # the loss is no number: another start would end so too
BAD_MACHINE = 4  # the preflight failed, or start after start at one step: another on the same machines would, too

# What Slurm, submitit, torchrun, a terminal that is closed, and a person at one send when the time is up.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)

RANKS_A_CALL = 64
MESSAGE_SECONDS = 20e-6, 50e-6

_also: Path | None = None  # a file that gets failures too, for the next start


class Interrupted(Exception):
    """Somebody asked to stop while the run waited for something that may never come, such as a disk or another rank."""


class Failure(Exception):
    """Ends the run with one line and exit code 1: nothing in the configuration or the data would mend it.

    ``everywhere``: all ranks of the run meet it, so that rank 0 alone tells it. ``code``: what the rank reports.
    """

    def __init__(self, message: str, everywhere: bool = False, code: int = FAILED) -> None:
        super().__init__(message)
        self.everywhere = everywhere
        self.code = code


class StopSignals:
    """Remembers the first stop signal. Saving inside a handler would run at any point of a step, so it only notes.

    Who presses Ctrl-C again, a second later or more, gets Python's own way out, without a save. A time that is up
    (``at``) counts as a request, too.
    """

    def __init__(self) -> None:
        self._received: str | None = None
        self._since: float | None = None  # when the first signal came
        self._deadline, self._reason = math.inf, ""
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

    @property
    def received(self) -> str | None:
        """What asks to stop: the first signal's name, or the reason why the time is up; None so far."""
        if self._received is None and time.monotonic() >= self._deadline:
            self._received = self._reason
        return self._received

    def requested(self) -> bool:
        """Whether anything asks to stop."""
        return self.received is not None

    def at(self, deadline: float, reason: str) -> None:
        """From ``deadline`` on, seconds of ``time.monotonic``, a stop is requested; the last call holds."""
        self._deadline, self._reason = deadline, reason

    @property
    def timed(self) -> bool:
        """Whether it was the time, and no signal: nobody outside knows of it."""
        return self._received is not None and self._received == self._reason

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
        if self._since is None:
            self._since = time.monotonic()
            self._received = self._received or signal.Signals(number).name
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


def exchange_interval(world: int) -> int:
    """Calls of ``Agreement.exchange`` from one all-reduce to the next: 1 for up to 64 ranks, 16 for 1,024.

    gloo sends around a ring, where 2 · (world - 1) messages wait for one another: its time grows with the ranks,
    however few bytes there are (``ring_seconds``). On 1,024 that is 41 to 102 ms, and a step may take 30. One exchange
    for each 64 ranks needs 6.4 ms a step at most, at any size, and is over long before the next one asks for it.
    """
    return -(-world // RANKS_A_CALL)


def ring_seconds(world: int) -> tuple[float, float]:
    """What gloo's all-reduce of a few bytes takes over a network, from and to: a model, never measured on a cluster.

    Of messages that take 20 to 50 µs, as TCP's within a data centre do (assumed). Measured were 230 µs, for up to 16
    ranks on 2 cores that others used too (``python -m distrib.tools.bench exchange``, Intel Xeon, 2026-11-27).
    """
    low, high = MESSAGE_SECONDS
    return 2 * (world - 1) * low, 2 * (world - 1) * high


class Agreement:
    """Flags that any rank raises, seen by all ranks at the same call, without waiting for the device.

    Every ``every``-th ``exchange`` posts this rank's flags on the gloo control group and returns what the ranks
    together posted ``every`` calls before: that all-reduce ran in the background during the steps between, so the wait
    is short. The calls between cost nothing and return nothing. All ranks must call it equally often.

    A stop that is asked for at one call is known to all 2 · ``every`` - 1 calls later at the latest.
    """

    def __init__(self, group: Any = None, every: int | None = None) -> None:
        """``every``: by default what ``exchange_interval`` says for the group's ranks."""
        import numpy as np  # here, not above: a run takes over its signals before torch's slow import
        import torch

        self._group = group
        self.every = every or exchange_interval(1 if group is None else group.size())
        self._calls = 0
        self._stop = False
        self._answered = False  # a save was begun since the flags under way were posted
        # Once in a step Python's and torch's code is cold in the caches: a new tensor took 200 µs of the call's 420,
        # torch's own all_reduce around the group's 100 (two ranks, 30 ms apart, a Xeon that others used, 2026-11-27).
        self._flags = np.zeros(2, dtype=np.int32)
        self._tensor = torch.from_numpy(self._flags)
        self._options = torch.distributed.AllreduceOptions()
        self._options.reduceOp = torch.distributed.ReduceOp.MAX
        self._work: Any = None

    def exchange(self, *, stop: bool, save: bool = False) -> tuple[bool, bool]:
        """Returns (stop, save): whether any rank asked for it.

        A stop is remembered until it is posted. A save is asked for as long as it is due; one that was made meanwhile,
        for another reason, answers it (``answer``).
        """
        if self._group is None:
            return stop, save
        self._stop = self._stop or stop
        due, self._calls = self._calls % self.every == 0, self._calls + 1
        if not due:
            return False, False
        self.close()
        agreed_stop, agreed_save = self._flags.tolist()
        agreed_save, self._answered = agreed_save and not self._answered, False
        # Who asks for a save cannot know yet that this call answers it: two saves would follow each other.
        self._flags[:] = self._stop, save and not agreed_save
        self._work = self._group.allreduce([self._tensor], self._options)
        return bool(agreed_stop), bool(agreed_save)

    def answer(self) -> None:
        """A save was begun: who asked for one before has it. All ranks must call it after the same ``exchange``."""
        self._answered = True

    def close(self) -> None:
        """Waits for the exchange that is under way, so that no rank leaves while another still needs it."""
        if self._work is not None:
            self._work.wait()
            self._work = None


def report_failures_to(file: Path) -> None:
    """From now on ``report_exit`` appends a failure to ``file`` as well: what the launcher hears it may forget."""
    global _also
    _also = file


def report_exit(code: int, message: str = "") -> int:
    """Tells the launcher how this rank ended, as a line "RANK CODE MESSAGE": torchrun says 1 for every failure.

    Returns the process's exit code: FAILED for DIVERGED and BAD_MACHINE, else ``code``. torchrun's own table of
    failures gets the message through the file that it names for it.
    """
    message = " ".join(message.split())
    for path in (os.environ.get("DISTRIB_EXIT_CODE_FILE"), _also if code not in (FINISHED, STOPPED) else None):
        if path:
            with contextlib.suppress(OSError), open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{os.environ.get('RANK', 0)} {code} {message}\n")
    if code != FINISHED and (path := os.environ.get("TORCHELASTIC_ERROR_FILE")):
        words = message or ("stopped on request, everything is saved" if code == STOPPED else "failed, see above")
        extra = {"timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": words, "extraInfo": extra}}, file)
    return FAILED if code in (DIVERGED, BAD_MACHINE) else code
