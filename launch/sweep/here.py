"""Trains a sweep's runs on this machine: each by train.py, or by ``launch local`` where it takes several processes."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distrib.config import UserError
from distrib.folder import RunFolder
from distrib.jobs import Task, last_line, run_all, share_cores
from launch.child import stop_requests
from launch.command import EXIT_CODE_FILE, FAILED, FINISHED, STOPPED
from launch.record import Record
from launch.sweep.plan import Element, Sweep
from launch.sweep.state import Progress

# Of the whole sweep, and no run's own: where its launcher reads how it ended, and one W&B id.
NOT_THEIRS = (EXIT_CODE_FILE, "WANDB_RUN_ID")
GPU = re.compile(r"nvidia\d+")


def command_of(file: str, element: Element, procs: int, train: Path) -> tuple[str, ...]:
    """What trains one run."""
    words = ("--config", file, *element.words)
    if procs == 1:
        return (sys.executable, str(train), *words)
    return (sys.executable, "-m", "launch", "local", "--procs", str(procs), *words)


def log_of(element: Element) -> Path:
    """What a run says, over all its starts: rank 0's log, with what the other ranks say to a terminal too."""
    return Record(element.folder).log_of(0)


def visible_gpus(environ: Mapping[str, str], devices: Path = Path("/dev")) -> list[str]:
    """The GPUs as ``CUDA_VISIBLE_DEVICES`` names them; without it, the numbers of those that there are."""
    if "CUDA_VISIBLE_DEVICES" in environ:
        return [name for name in environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    return [str(number) for number in range(sum(GPU.fullmatch(file.name) is not None for file in devices.glob("*")))]


def make_slots(
    at_once: int, procs: int, environ: Mapping[str, str], cores: int, gpus: Sequence[str]
) -> list[dict[str, str]]:
    """The environments of what runs at the same time: cores are shared, GPUs dealt out, in turns where they are few."""
    own = {name: value for name, value in environ.items() if name not in NOT_THEIRS}
    if at_once == 1:
        return [own]
    slots = [share_cores(own, cores, at_once * procs) for _ in range(at_once)]
    if len(gpus) >= procs:
        for k, slot in enumerate(slots):
            dealt = [gpus[(k * procs + j) % len(gpus)] for j in range(procs)]
            slot["CUDA_VISIBLE_DEVICES"] = ",".join(dealt)
    return slots


def train_here(
    sweep: Sweep, elements: Sequence[Element], procs: int, slots: Sequence[Mapping[str, str]], train: Path
) -> tuple[int, set[str]]:
    """Trains ``elements``, one a slot at a time; returns the exit code and the names of those that failed.

    Where one fails the others go on. A request to stop has all that run save and end. The code is 1 where one failed,
    else 75 where one was stopped, else 0.

    Raises:
        UserError: a run's log cannot be written.
    """
    tasks = {Task(command_of(sweep.file, e, procs, train), log_of(e)): e for e in elements}
    failed: set[str] = set()
    stopped = False
    done = len(sweep.elements) - len(elements)

    def ended(task: Task, code: int) -> None:
        nonlocal done, stopped
        element = tasks[task]
        summary = RunFolder(str(element.folder)).summary() or {}
        if code == FINISHED or (code == FAILED and summary.get("status") == Progress.DIVERGED):
            done += 1
            say(f"{done}/{len(sweep.elements)} {element.name}: {_told(summary)}")
        elif code == STOPPED:
            stopped = True
            say(f"{element.name}: stopped, everything is saved")
        else:
            failed.add(element.name)
            say(f"{element.name}: {last_line(task.log)}")
            say(f"it ended with {code}; {task.log} says more")

    with stop_requests() as stop:
        try:
            run_all(list(tasks), slots, lambda: stop.asked is not None, ended)
        except OSError as error:
            raise UserError(f"cannot write {error.filename}: {error.strerror}: make room, or set run.dir") from None
        stopped = stopped or (stop.asked is not None and done < len(sweep.elements))
    return FAILED if failed else STOPPED if stopped else FINISHED, failed


def say(text: str) -> None:
    """A line for the person, beside the table, which alone goes to stdout."""
    print(text, file=sys.stderr, flush=True)


def _told(summary: Mapping[str, Any]) -> str:
    if summary.get("status") == Progress.DIVERGED:
        return "diverged: its loss is no number"
    return f"top-1 {summary.get('top1', float('nan')):.2f} % in {summary.get('seconds', float('nan')):.0f} s"
