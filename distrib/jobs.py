"""Runs processes to their ends, some at a time, each with a log of its own. Imports no torch."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from distrib.parent import death_request

LOOK_SECONDS = 0.1


@dataclass(frozen=True)
class Task:
    """A process to run: its words, and the file to which all that it says is appended."""

    argv: tuple[str, ...]
    log: Path


def run_all(
    tasks: Sequence[Task],
    slots: Sequence[Mapping[str, str]],
    stop: Callable[[], bool],
    ended: Callable[[Task, int], None],
) -> None:
    """Runs ``tasks`` in their order, one a slot at a time; returns when all that were started have ended.

    Args:
        slots: the environment of what runs there.
        stop: asked ten times a second; once it says so nothing more is started, and what runs gets SIGTERM.
        ended: hears the exit code of each as it ends; below 0: of what signal it died.

    Raises:
        OSError: a log cannot be written. What was running has ended by then, after a SIGTERM.
    """
    waiting, free = list(tasks), list(range(len(slots)))
    running: dict[subprocess.Popen[bytes], tuple[Task, int]] = {}
    asked = False
    try:
        while running or (waiting and not asked):
            if not asked and stop():
                asked = True
                for process in running:
                    process.terminate()
            while waiting and free and not asked:
                task, slot = waiting.pop(0), free.pop(0)
                running[_start(task, slots[slot])] = task, slot
            for process in [process for process in running if process.poll() is not None]:
                task, slot = running.pop(process)
                free.append(slot)
                ended(task, process.returncode)
            time.sleep(LOOK_SECONDS)
    finally:
        _end(running)


def _start(task: Task, environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
    task.log.parent.mkdir(parents=True, exist_ok=True)
    with task.log.open("ab") as log:
        # In a session of its own: a terminal's Ctrl-C would reach it beside our SIGTERM.
        return subprocess.Popen(
            task.argv,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=end_with_us(),
        )


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


def end_with_us() -> Callable[[], None] | None:
    """For ``preexec_fn``: has Linux send the process SIGTERM should we be killed, as it would go on unseen."""
    return death_request()


def share_cores(environ: Mapping[str, str], cores: int, processes: int) -> dict[str, str]:
    """``environ`` for each of ``processes``, if they are several: else each takes all cores, and all wait."""
    shared = {"OMP_NUM_THREADS": str(max(1, cores // processes))} if processes > 1 else {}
    return {**environ, **shared}


def last_line(log: Path) -> str:
    """The last line that says something; "failed" where there is none."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return "failed"
    return next((line for line in reversed(lines) if line.strip()), "failed")
