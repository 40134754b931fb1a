"""Runs with their states: reads the folders, asks Slurm once for all of them, judges each."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distrib.config import UserError
from launch.command import FAILED, FINISHED, STOPPED, USER_ERROR
from launch.queue import look_up
from launch.reports import restarts_within
from launch.runs import Clock, Run, read
from launch.state import Slurm, State, judge


@dataclass(frozen=True)
class View:
    """A run as it is now."""

    run: Run
    state: State
    slurm: Slurm
    restarts: int  # of jobs by Slurm, and of all workers within a job

    @property
    def settled(self) -> bool:
        """Whether it is over for certain: a Slurm that does not answer may have queued a lost run again."""
        silent = self.slurm.queue is None and self.state.job != ""
        return self.state.over and not (silent and self.state.name in ("failed", "lost"))

    @property
    def code(self) -> int:
        """How it ended, as an exit code: 0 finished, 75 stopped with all saved, 2 the user's to mend, 1 all else.

        2 where its job's script says so: no other start would get further.
        """
        if self.state.name in ("finished", "stopped"):
            return FINISHED if self.state.name == "finished" else STOPPED
        end = self.run.seen.end(self.state.job) if self.state.name == "failed" else None
        return USER_ERROR if end is not None and end.get("code") == USER_ERROR else FAILED

    @property
    def images_per_second(self) -> float | None:
        """Of the last interval while it runs; of its last start where it is over; None while it waits."""
        if self.state.over:
            return _number((self.run.seen.summary or self.run.train).get("images_per_second"))
        running = self.state.name in ("running", "stopping")
        return _number(self.run.train.get("images_per_second")) if running else None

    @property
    def eta(self) -> float | None:
        """Seconds of training that are left, at the speed of the last interval; None while it does not train."""
        return _number(self.run.train.get("eta_seconds")) if self.state.name == "running" else None

    def as_json(self) -> dict[str, Any]:
        """What ``--json`` says of it; times in seconds."""
        run, state, best = self.run, self.state, self.run.best
        return {
            "name": run.name,
            "path": str(run.path),
            "state": state.name,
            "reason": state.reason or None,
            "over": state.over,
            "step": run.step,
            "steps": run.steps,
            "best": {"step": best[0], "top1": best[1]} if best else None,
            "images_per_second": self.images_per_second,
            "eta_seconds": self.eta,
            "job": state.job or None,
            "nodes": state.nodes or None,
            "expected_start": state.start or None,
            "restarts": self.restarts,
            "silent_seconds": run.silent,
        }


def survey(
    folders: Sequence[Path],
    notify: Callable[[str], None] | None = None,
    all_ends: bool = False,
    skip: bool = False,
) -> list[View]:
    """Looks at the runs in ``folders``.

    Args:
        folders: each a run's.
        notify: hears that Slurm does not answer; default: a note on stderr.
        all_ends: asks Slurm also for every earlier start, and for jobs whose end the folder tells.
        skip: leaves out what cannot be read, and notifies.

    Raises:
        UserError: a folder cannot be read.
    """
    tell = notify or (lambda line: print(f"note: {line}", file=sys.stderr))
    clock, runs, places = Clock(), [], []
    for folder in folders:
        try:
            runs.append(read(folder, clock))
            places.append(folder)
        except UserError as error:
            if not skip:
                raise
            tell(str(error))
    jobs, past = [], []
    for run in runs:
        if not (submitted := run.seen.jobs()):
            continue
        end = run.seen.end(submitted[-1]) or {}
        # What ended for another reason than a stop was not cancelled, or its script has said so.
        if not all_ends and end.get("then") == "over" and end.get("code") in (FINISHED, FAILED, USER_ERROR):
            continue
        jobs += submitted
        past.append(submitted[-1])
        past += submitted[:-1] if all_ends else []
    slurm = look_up(jobs, past, tell, every_start=all_ends)
    # Their script may have said how they ended since the first look.
    runs = [read(folder, clock) if _gone(run, slurm) else run for folder, run in zip(places, runs, strict=True)]
    return [View(run, judge(run.seen, slurm), slurm, _restarts(run)) for run in runs]


def _gone(run: Run, slurm: Slurm) -> bool:
    """Whether the run's job has left Slurm's queue, and nothing said so when the folder was read."""
    jobs = run.seen.jobs()
    if not jobs or slurm.queue is None or jobs[-1] in slurm.queue:
        return False
    return (run.seen.end(jobs[-1]) or {}).get("then") != "over"


def _restarts(run: Run) -> int:
    began = [event for event in run.seen.events if event["event"] == "began"]
    return len(began) - len({event.get("job") for event in began}) + len(restarts_within(run.record) if began else [])


def duration(seconds: float | None) -> str:
    """For people: "45 s", "12 min", "3 h 05", "2 d 4 h"."""
    if seconds is None:
        return ""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02}"
    return f"{hours // 24} d {hours % 24} h"


def moment(text: object) -> str:
    """An ISO 8601 time as people read it: "2026-11-25 10:00:00", without its zone."""
    return str(text or "")[:19].replace("T", " ")


def size(number: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.0f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None
