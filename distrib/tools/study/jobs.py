"""Trains a study's runs, some at a time, each by train.py in a process of its own. Imports no torch."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from distrib.config import UserError
from distrib.faults import FAILED, FINISHED, STOPPED
from distrib.program import bar, say
from distrib.root import TRAIN
from distrib.tools.study.plan import Job

LOOK_SECONDS = 0.1


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def train_all(jobs: Sequence[Job], at_once: int, stop: Callable[[], bool], train: Path = TRAIN) -> int:
    """Trains the jobs that are not finished; returns 0, or the exit code of the first that fails, or 75.

    Once one has failed, or ``stop`` says so, the others are asked to save and stop: the next call goes on with them.

    Raises:
        UserError: a run's log cannot be written.
    """
    waiting = [job for job in jobs if not job.finished]
    running: dict[subprocess.Popen[bytes], Job] = {}
    code, asked = FINISHED, False
    done = len(jobs) - len(waiting)
    with bar(f"{len(jobs)} runs") as tell:
        tell(done, len(jobs))
        try:
            while running or (waiting and code == FINISHED):
                if code == FINISHED and stop():
                    code = STOPPED
                while waiting and code == FINISHED and len(running) < at_once:
                    job = waiting.pop(0)
                    running[_start(job, at_once, train)] = job
                if code != FINISHED and not asked:
                    asked = True
                    for process in running:
                        process.terminate()
                for process in [process for process in running if process.poll() is not None]:
                    job = running.pop(process)
                    if process.returncode == FINISHED:
                        done += 1
                        say(f"{done}/{len(jobs)} {job.variant}, seed {job.seed}: {_told(job)}")
                        tell(done, len(jobs))
                    elif code == FINISHED:
                        code = process.returncode if process.returncode > 0 else FAILED
                        if code != STOPPED:
                            say(f"{job.variant}, seed {job.seed}: {_last_line(log_of(job))}")
                            say(f"it ended with {process.returncode}; {log_of(job)} says more")
                time.sleep(LOOK_SECONDS)
        finally:
            _end(running)
    return code


def _end(processes: Collection[subprocess.Popen[bytes]]) -> None:
    """Asks what still runs, after an error or a second Ctrl-C, to save and stop; at a third one, kills it."""
    try:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
    except KeyboardInterrupt:
        for process in processes:
            process.kill()
        raise


def log_of(job: Job) -> Path:
    """What the run says, over all its starts."""
    return job.folder.with_name(f"{job.folder.name}.log")


def _start(job: Job, at_once: int, train: Path) -> subprocess.Popen[bytes]:
    environ = dict(os.environ)
    if at_once > 1:  # or each would take all cores, and all wait for each other
        environ["OMP_NUM_THREADS"] = str(max(1, cores() // at_once))
    try:
        log_of(job).parent.mkdir(parents=True, exist_ok=True)
        with log_of(job).open("ab") as log:
            return subprocess.Popen(
                [sys.executable, str(train), *job.words],
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
    except OSError as error:
        raise UserError(f"cannot write {log_of(job)}: {error.strerror}: choose another --runs") from None


def _told(job: Job) -> str:
    summary = job.summary() or {}
    return f"top-1 {summary.get('top1', float('nan')):.2f} % in {summary.get('seconds', float('nan')):.0f} s"


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return "failed"
    return next((line for line in reversed(lines) if line.strip()), "failed")
