"""``launch stop``: asks a run, or all of a sweep, to save and to end, and their jobs not to be queued again."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from distrib.config import UserError
from distrib.options import PlainParser
from launch.command import FAILED, FINISHED, USER_ERROR
from launch.queue import ask
from launch.runs import checkpoints, resolve_all
from launch.state import WAITS
from launch.survey import View, survey

WAIT_SECONDS = 4.0  # between looks while waiting: each asks Slurm
SCANCEL_SECONDS = 30.0
STEP_SECONDS = 30.0  # that a job's script may take from its start to its first step


def main(argv: Sequence[str], train: Path) -> int:
    """Stops runs; returns 0, or 1 where ``--wait`` saw one end without all saved, or 2 where some cannot be reached.

    Raises:
        UserError: there is no such run, or the only one cannot be reached from here.
    """
    parser = PlainParser(
        prog="python -m launch stop",
        description="Ask a run to save and to end: a running job's ranks get SIGUSR2, a waiting job is taken out of "
        "the queue, a run on this machine gets SIGTERM. The command that started it continues it.",
    )
    parser.add_argument(
        "run",
        metavar="RUN",
        help="a run's folder, its name below runs, or the number of its job; a sweep's folder or an array's number: "
        "all its runs",
    )
    parser.add_argument("--wait", action="store_true", help="wait until it has ended, and say what is saved")
    args = parser.parse_args(argv)
    views = survey(resolve_all(args.run))
    asked, code = _ask_one(views[0]) if len(views) == 1 else _ask_many(views, args.run)
    if not args.wait:
        return code
    try:
        return max([code, *(_wait(view) for view in asked)])
    except KeyboardInterrupt:
        print("not waiting any more; what was asked stops", file=sys.stderr)
        return FAILED


def _ask_one(view: View) -> tuple[list[View], int]:
    """Asks a run to stop; returns it, where there is something to wait for, and 0.

    Raises:
        UserError: it cannot be reached from here.
    """
    if view.settled:
        print(f"{view.run.name} is {view.state.name} already, at step {view.run.step}: nothing is to be stopped")
        return [], FINISHED
    print(_ask(view), flush=True)
    return [view], FINISHED


def _ask_many(views: Sequence[View], word: str) -> tuple[list[View], int]:
    """Asks those that are under way, and goes on where one cannot be reached; returns those asked and an exit code."""
    going = [view for view in views if not view.settled]
    if not going:
        print(f"none of the {len(views)} runs of {word} is under way: nothing is to be stopped")
    # Those that wait come first: the others' ends let them begin. One that begins all the same finds the request.
    going.sort(key=lambda view: view.state.name not in WAITS)
    asked: list[View] = []
    code = FINISHED
    for view in going:
        try:
            print(_ask(view), flush=True)
            asked.append(view)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            code = USER_ERROR
    return asked, code


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


def _wait(asked: View) -> int:
    """Waits for a run's end; says what is saved."""
    told: set[str] = set()

    def tell(line: str) -> None:
        if line not in told:
            told.add(line)
            print(f"note: {line}", file=sys.stderr)

    while True:
        (view,) = survey([asked.run.path], tell)
        if view.settled:
            break
        time.sleep(WAIT_SECONDS)
    saved = checkpoints(view.run.path)
    where = f"; newest checkpoint: {saved[-1][1]}" if saved else "; there is no checkpoint"
    print(f"{asked.run.name} is {view.state.name} at step {view.run.step}{where}")
    return FINISHED if view.state.name in ("stopped", "finished") else FAILED
