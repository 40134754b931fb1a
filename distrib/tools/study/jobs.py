"""Trains a study's runs, some at a time, each by train.py in a process of its own. Imports no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from distrib.config import UserError
from distrib.faults import FAILED, FINISHED, STOPPED
from distrib.jobs import Task, last_line, run_all, share_cores
from distrib.program import bar, say
from distrib.root import TRAIN
from distrib.surroundings import usable_cores
from distrib.tools.study.plan import Job


def train_all(jobs: Sequence[Job], at_once: int, stop: Callable[[], bool], train: Path = TRAIN) -> int:
    """Trains the jobs that are not finished; returns 0, or the exit code of the first that fails, or 75.

    Once one has failed, or ``stop`` says so, the others are asked to save and stop: the next call goes on with them.

    Raises:
        UserError: a run's log cannot be written.
    """
    tasks = {Task((sys.executable, str(train), *job.words), log_of(job)): job for job in jobs if not job.finished}
    done, code = len(jobs) - len(tasks), FINISHED

    def over() -> bool:
        nonlocal code
        if code == FINISHED and stop():
            code = STOPPED
        return code != FINISHED

    def ended(task: Task, returned: int) -> None:
        nonlocal done, code
        job = tasks[task]
        if returned == FINISHED:
            done += 1
            say(f"{done}/{len(jobs)} {job.variant}, seed {job.seed}: {_told(job)}")
            tell(done, len(jobs))
        elif code == FINISHED:
            code = returned if returned > 0 else FAILED
            if code != STOPPED:
                say(f"{job.variant}, seed {job.seed}: {last_line(task.log)}")
                say(f"it ended with {returned}; {task.log} says more")

    with bar(f"{len(jobs)} runs") as tell:
        tell(done, len(jobs))
        try:
            run_all(list(tasks), [share_cores(os.environ, usable_cores(), at_once)] * at_once, over, ended)
        except OSError as error:
            raise UserError(f"cannot write {error.filename}: {error.strerror}: choose another --runs") from None
    return code


def log_of(job: Job) -> Path:
    """What the run says, over all its starts."""
    return job.folder.with_name(f"{job.folder.name}.log")


def _told(job: Job) -> str:
    summary = job.summary() or {}
    return f"top-1 {summary.get('top1', float('nan')):.2f} % in {summary.get('seconds', float('nan')):.0f} s"
