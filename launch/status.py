"""``launch status``: all that is known of one run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from distrib.options import PlainParser
from launch.command import FINISHED, STOPPED
from launch.logs import log_files
from launch.reports import reports, restarts_within
from launch.runs import checkpoints, resolve
from launch.starts import Start, starts
from launch.state import DONE, WAITS
from launch.survey import View, duration, moment, size, survey
from launch.terminal import COLOURS, console

NAMES = (("top-1", "top1"), ("top-5", "top5"), ("EMA top-1", "ema_top1"), ("EMA top-5", "ema_top5"))


def main(argv: Sequence[str], train: Path) -> int:
    """Shows a run; returns 0.

    Raises:
        UserError: there is no such run.
    """
    parser = PlainParser(
        prog="python -m launch status",
        description="What is known of a run: state, progress, every start and how it ended, checkpoints, logs.",
    )
    parser.add_argument("run", metavar="RUN", help="a run's folder, its name below runs, or the number of its job")
    parser.add_argument("--json", action="store_true", help="as a JSON object, with whole paths and seconds")
    args = parser.parse_args(argv)
    (view,) = survey([resolve(args.run)], all_ends=True)
    if args.json:
        print(json.dumps(as_json(view), indent=2))
    else:
        show(view, console())
    return FINISHED


def starts_of(view: View) -> list[Start]:
    """Every start of the run that the launcher knows."""
    in_queue = view.state.job in (view.slurm.queue or {})  # a job ends some seconds after its run
    alive = (in_queue or not view.state.over) and view.state.name not in WAITS
    run, past = view.run, view.slurm.past or {}
    codes = {name: [report.code for _, _, report in said] for name, said in reports(run.record).items()}
    return starts(run.seen.events, past, restarts_within(run.record), codes, run.step, alive)


def as_json(view: View) -> dict[str, Any]:
    """What ``--json`` says: ``list``'s fields and more."""
    run, writer = view.run, view.run.seen.writer
    saved = checkpoints(run.path)
    return {
        **view.as_json(),
        "writer": {"host": writer.holder.host, "pid": writer.holder.pid, "since": writer.holder.since,
                   "alive": writer.alive, "silent_seconds": writer.silent} if writer else None,
        "stop_asked": run.seen.stop,
        "last_train": run.train or None,
        "last_eval": run.evaluation or None,
        "checkpoints": [{"step": step, "path": str(path), "bytes": length} for step, path, length in saved],
        "bad_samples": bad_samples(run.path),
        "starts": [start.as_json() for start in starts_of(view)],
        "logs": [str(path) for path in log_files(run.record, 0)],
    }  # fmt: skip


def show(view: View, where: Console) -> None:
    """Prints it: a heading, then a line for each thing that there is."""
    state = view.state
    where.print(
        Text.assemble((view.run.name, "bold"), "  ", (state.name, COLOURS[state.name]), f"  {state.reason}".rstrip())
    )
    for label, text in lines(view):
        where.print(Text.assemble((f"  {label:<12} ", "dim"), text), soft_wrap=True)


def lines(view: View) -> Iterator[tuple[str, str]]:
    """(what, in words) of all that is known."""
    run, state, writer = view.run, view.state, view.run.seen.writer
    yield "folder", str(run.path)
    if state.job:
        parts = [f"job {state.job}", f"on {state.nodes}" if state.nodes else ""]
        parts.append(f"starts about {moment(state.start)}" if state.start else "")
        yield "slurm", ", ".join(part for part in parts if part)
    if writer is not None:
        beat = "" if writer.silent is None else f", last heartbeat {duration(writer.silent)} ago"
        yield "writer", f"{writer.holder}{'' if writer.here and writer.alive else beat}"
    if run.seen.stop and state.name not in DONE:  # else it went on without its job, which alone looks for that
        what = "saved stop" if run.seen.last("began", state.job) else "stop before it began"
        yield "stop", f"a {what} was asked for; the job is not queued again"
    yield from _progress(view)
    said = reports(run.record)
    for start in starts_of(view):
        yield f"start {start.job}.{start.restart}", _start(start)
        for line in start.within:
            yield "", f"workers started again, {line}"
        for host, rank, report in said.get(f"{start.job}.{start.restart}", []) if not start.then else []:
            if report.code not in (FINISHED, STOPPED):
                yield "", f"rank {rank} on {host} ended with {report.code}: {report.message}".removesuffix(": ")
    saved = checkpoints(run.path)
    if saved:
        total = size(sum(length for _, _, length in saved))
        yield "checkpoints", f"{len(saved)}, {total} in all, newest: {saved[-1][1]}"
    if bad := bad_samples(run.path):
        yield "bad samples", f"{bad}, listed in {run.path / 'bad_samples.jsonl'}"
    for path in log_files(run.record, 0):
        yield "log", str(path)


def _progress(view: View) -> Iterator[tuple[str, str]]:
    run, speed = view.run, view.images_per_second
    done = f"{run.step} of {run.steps} ({100 * run.step / run.steps:.1f} %)" if run.steps else str(run.step)
    parts = [done, f"{speed:.0f} images/s" if speed is not None else ""]
    parts.append(f"{duration(view.eta)} left" if view.eta is not None else "")
    parts.append(f"last line {duration(run.silent)} ago" if run.silent is not None else "")
    yield "step", ", ".join(part for part in parts if part)
    if run.train:
        wait = run.train.get("data_wait")
        parts = [f"loss {_figure(run.train.get('loss'))}", f"lr {_figure(run.train.get('lr'))}"]
        parts.append(f"{100 * wait:.0f} % of the time waiting for data" if isinstance(wait, int | float) else "")
        yield "training", ", ".join(part for part in parts if part)
    if run.evaluation:
        at = run.evaluation
        parts = [f"{name} {_figure(at[key])} %" for name, key in NAMES if key in at]
        yield "evaluation", f"{', '.join(parts)}, loss {_figure(at.get('loss'))}, at step {at.get('step')}"
    if run.best:
        yield "best", f"top-1 {run.best[1]:.2f} % at step {run.best[0]}"


def _start(start: Start) -> str:
    steps = f"steps {'?' if start.first is None else start.first} to {'?' if start.last is None else start.last}"
    when = moment(start.began) + (f" to {moment(start.ended)}" if start.ended else "")
    then = {"requeued": "; queued again", "over": ""}.get(start.then, "")
    return f"{when}, {start.nodes or 'nodes unknown'}, {steps}, {start.how}{then}"


def bad_samples(folder: Path) -> int:
    """How many images could not be read or decoded."""
    try:
        with (folder / "bad_samples.jsonl").open("rb") as file:
            return sum(1 for _ in file)
    except OSError:
        return 0


def _figure(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "no number"
