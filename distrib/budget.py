"""Stops a run before its time is up: ``train.max_minutes``, and the end of the Slurm job.

Rank 0 alone reckons, and asks for a stop as a signal would (``StopSignals.at``): all ranks agree on the step, save
once, and end with 75. When that must begin follows from what was measured: the steps until all have heard, the next
evaluation if it would begin meanwhile, and two saves, as one may be under way.

A job of ``launch slurm`` gets its signal long before (120 s by default), so this is a second net for it: it asks
``MARGIN`` (20 s) and what was measured before the end, no sooner. The 20 s are for closing the logs and leaving.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping

from distrib.faults import StopSignals

MARGIN = 20.0  # seconds for what cannot be measured: what comes after the last save
SAVE_GUESS = 10.0  # seconds for the first
DECAY = 0.9  # a slow step counts for some steps
SLURM_END = "SLURM_JOB_END_TIME"  # seconds since 1970


def find_end(minutes: float | None, began: float, environ: Mapping[str, str]) -> tuple[float, str] | None:
    """When this start must have ended, in seconds since 1970, and what says so; None: never.

    ``began``: when it, or the start that torchrun has repeated, began. Slurm's end is left alone where it is over
    already: a shell remembers the job that it was opened in. A job without end has none, or one years away.
    """
    ends = [] if minutes is None else [(began + 60 * minutes, "train.max_minutes")]
    slurm = environ.get(SLURM_END, "")
    if slurm.isdecimal() and int(slurm) > time.time():
        ends.append((float(slurm), "the Slurm job's time is up"))
    return min(ends, default=None)


class Budget:
    """Keeps the moment at which to ask for a stop up to date.

    Args:
        end: seconds since 1970, and the reason (``find_end``); None: there is none, or another rank reckons.
        stop: what is asked.
        lag: steps until all ranks have heard of it.
        saving: the seconds of the longest save so far; None before the first.
    """

    def __init__(
        self,
        end: tuple[float, str] | None,
        stop: StopSignals,
        lag: int,
        saving: Callable[[], float | None] | None = None,
    ) -> None:
        self._end, self._reason = (end[0] - time.time() + time.monotonic(), end[1]) if end else (math.inf, "")
        self._stop, self._lag, self._saving = stop, lag, saving
        self._pace = self._evaluation = 0.0
        self._ask(0)
        self.resume()

    def resume(self) -> None:
        """Steps take their time from now on: an evaluation, or the start, has passed."""
        self._mark = time.monotonic()

    def step(self, to_evaluation: int) -> None:
        """A step is done; the next evaluation comes ``to_evaluation`` steps later (0: now)."""
        if self._end == math.inf:
            return
        now = time.monotonic()
        self._pace = max(now - self._mark, DECAY * self._pace)
        self._mark = now
        self._ask(self._evaluation if to_evaluation <= self._lag else 0)  # it would begin before all have heard

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Measures an evaluation. One that has begun is cut short only where the save would come too late."""
        self._ask(0)
        began = time.monotonic()
        yield
        self._evaluation = time.monotonic() - began
        self.resume()

    def _ask(self, more: float) -> None:
        seconds = self._saving() if self._saving is not None else None
        saves = SAVE_GUESS if seconds is None else 2 * seconds
        self._stop.at(self._end - MARGIN - saves - (self._lag + 1) * self._pace - more, self._reason)
