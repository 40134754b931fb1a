"""``launch stop``: asks a run to save and to end, and its job not to be queued again."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from distrib.config import UserError
from distrib.options import PlainParser
from launch.command import FAILED, FINISHED
from launch.queue import ask
from launch.runs import checkpoints, resolve
from launch.state import WAITS
from launch.survey import View, survey

WAIT_SECONDS = 4.0  # between looks while waiting: each asks Slurm
SCANCEL_SECONDS = 30.0
STEP_SECONDS = 30.0  # that a job's script may take from its start to its first step


def main(argv: Sequence[str], train: Path) -> int:
    """Stops a run; returns 0, or 1 where ``--wait`` saw it end without all saved.

    Raises:
        UserError: there is no such run, or it cannot be reached from here.
    """
    parser = PlainParser(
        prog="python -m launch stop",
        description="Ask a run to save and to end: a running job's ranks get SIGUSR2, a waiting job is taken out of "
        "the queue, a run on this machine gets SIGTERM. The command that started it continues it.",
    )
    parser.add_argument("run", metavar="RUN", help="a run's folder, its name below runs, or the number of its job")
    parser.add_argument("--wait", action="store_true", help="wait until it has ended, and say what is saved")
    args = parser.parse_args(argv)
    folder = resolve(args.run)
    (view,) = survey([folder])
    name, state = view.run.name, view.state
    if view.settled:
        print(f"{name} is {state.name} already, at step {view.run.step}: nothing is to be stopped")
        return FINISHED
    print(_ask(view), flush=True)
    if not args.wait:
        return FINISHED
    try:
        return _wait(folder)
    except KeyboardInterrupt:
        print("not waiting any more; the run was asked, and stops", file=sys.stderr)
        return FAILED


def _ask(view: View) -> str:
    """Asks for the stop; returns a line on what was done.

    Raises:
        UserError: it cannot be reached from here.
    """
    run, state = view.run, view.state
    if not state.job or (view.slurm.queue is not None and state.job not in view.slurm.queue):
        return _signal(view)
    if view.slurm.queue is None:
        writer = run.seen.writer
        if writer is not None and writer.here and writer.alive:  # a node on which Slurm's commands do not work
            _ask_record(view)
            return _signal(view)
        raise UserError(f"Slurm does not say how job {state.job} is, so it was not asked to stop: try again later")
    # First, so that the job's script finds it however fast the ranks end.
    _ask_record(view)
    return _ask_job(view)


def _ask_job(view: View) -> str:
    """Takes the job out of the queue, or signals its ranks, whichever it takes by now; returns a line on that.

    Raises:
        UserError: scancel refuses, or the job runs nothing that could be signalled.
    """
    name, job = view.run.name, view.state.job
    deadline = time.monotonic() + STEP_SECONDS
    while not view.settled and view.state.job == job:  # else it is over, and the run's next one takes its turn
        if view.state.name in WAITS:
            _take_out(view)
            view = _look(view)
            if view.settled or view.state.name in WAITS:
                saved = "; what it has trained is saved" if view.run.step else ", before it began"
                return f"job {job} of {name} was taken out of the queue{saved}"
        # Without --batch and --full it reaches the tasks of all steps, and not the script, which must outlive them.
        if _scancel("--signal=USR2", job):
            return f"job {job} of {name} was asked to save and stop"
        if time.monotonic() > deadline:
            raise UserError(f"job {job} runs nothing yet that could be asked to stop: try again in a moment")
        time.sleep(STEP_SECONDS / 30)
        view = _look(view)
    return f"{name} has just ended"


def _take_out(view: View) -> None:
    """Cancels a job that waits, and not one that has begun by the time Slurm hears it, where Slurm can tell them apart.

    An array's element cannot be asked about: with a filter Slurm 22.05 cancels all that wait of the array. One that
    begins in that moment gets SIGTERM, and saves.
    """
    number, job = view.state.job, (view.slurm.queue or {}).get(view.state.job)
    held = job is not None and job.state != "PENDING"  # it does not begin by itself, nor does Slurm call it pending
    _scancel(*([] if held or "_" in number else ["--state=PENDING"]), number)


def _look(view: View) -> View:
    (view,) = survey([view.run.path])
    return view


def _ask_record(view: View) -> None:
    file = view.run.record.stop
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}: stop it as the user who runs it") from None


def _scancel(*words: str) -> bool:
    """Calls scancel; False where the job has no step that could hear a signal: not yet, or not any more.

    Raises:
        UserError: it cannot be called, or refuses.
    """
    answer = ask(["scancel", *words], SCANCEL_SECONDS)
    if answer.code is None:
        raise UserError(f"{answer.wrong}: try again")
    # "Already done" is what Slurm calls it, in words or by the exit code alone.
    if answer.code != 0 and answer.said and "already completing or completed" not in answer.said:
        raise UserError(f"scancel {' '.join(words)}: {answer.said}")
    return answer.code == 0


def _signal(view: View) -> str:
    """Signals the process that writes the folder; the other ranks stop with it, at the same step."""
    writer, name = view.run.seen.writer, view.run.name
    if writer is None:
        raise UserError(f"{name} is {view.state.name}, and nobody writes its folder yet: try again in a moment")
    holder = writer.holder
    if not writer.here:
        raise UserError(
            f"{name} is written by process {holder.pid} on {holder.host}: stop it there, by `kill -TERM {holder.pid}`"
        )
    try:
        os.kill(holder.pid, signal.SIGTERM)
    except ProcessLookupError:
        return f"{name} has just ended"
    except PermissionError:
        raise UserError(f"process {holder.pid} of {name} is another user's: ask them to stop it") from None
    return f"{name}: process {holder.pid} on this machine was asked to save and stop"


def _wait(folder: Path) -> int:
    """Waits for the end; says what is saved."""
    told: set[str] = set()

    def tell(line: str) -> None:
        if line not in told:
            told.add(line)
            print(f"note: {line}", file=sys.stderr)

    while True:
        (view,) = survey([folder], tell)
        if view.settled:
            break
        time.sleep(WAIT_SECONDS)
    saved = checkpoints(view.run.path)
    where = f"; newest checkpoint: {saved[-1][1]}" if saved else "; there is no checkpoint"
    print(f"{view.run.name} is {view.state.name} at step {view.run.step}{where}")
    return FINISHED if view.state.name in ("stopped", "finished") else FAILED
