"""``launch list``: the runs below a folder, a line each."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from distrib.config import UserError
from distrib.options import PlainParser
from launch.command import FINISHED
from launch.runs import RUNS, find
from launch.survey import View, duration, moment, survey
from launch.terminal import COLOURS, console

COLUMNS = (
    ("run", "left"), ("state", "left"), ("step", "right"), ("", "right"), ("top-1", "right"), ("img/s", "right"),
    ("left", "right"), ("job", "left"), ("nodes", "left"), ("restarts", "right"), ("last line", "right"),
    ("why", "left"),
)  # fmt: skip
SPARED = ("nodes", "restarts", "last line", "", "img/s", "job", "left")  # on a narrow terminal, in this order
REASON = 20  # columns that the reason is given at least


def main(argv: Sequence[str], train: Path) -> int:
    """Lists runs; returns 0.

    Raises:
        UserError: a folder is not there.
    """
    parser = PlainParser(
        prog="python -m launch list",
        description="The runs below a folder: state, progress, best top-1, speed, what Slurm says. Needs no Slurm.",
        epilog="states: queued, starting, running, stopping, requeued (waits to go on), suspended; "
        "over: finished, stopped (all is saved), diverged, failed, cancelled, lost (killed, or its node is gone)",
    )
    parser.add_argument("folders", nargs="*", metavar="DIR", help=f"default: {RUNS}")
    parser.add_argument("--json", action="store_true", help="as a JSON array, with whole paths and seconds")
    args = parser.parse_args(argv)
    folders = [Path(os.path.expanduser(folder)) for folder in args.folders or [RUNS]]
    for folder in folders:
        if not os.path.isdir(folder):
            hint = "" if args.folders else "; name the folder in which your runs lie"
            raise UserError(f"there is no folder {folder}{hint}")
    views = survey([run for folder in folders for run in find(folder)], skip=True)
    if args.json:
        print(json.dumps([view.as_json() for view in views], indent=2))
    elif views:
        show(views, console())
    else:
        print(f"no runs below {', '.join(map(str, folders))}", file=sys.stderr)
    return FINISHED


def show(views: Sequence[View], where: Console) -> None:
    """Prints the table; columns that would be empty are left out. rich's own takes 2 ms for each line."""
    rows = [[name for name, _ in COLUMNS], *(row(view) for view in views)]
    widths = [max(cell_len(cells[k]) for cells in rows) for k in range(len(COLUMNS))]
    used = _fitting([k for k in range(len(COLUMNS)) if any(cells[k] for cells in rows[1:])], widths, where.width)
    text = Text()
    for cells, style in zip(rows, ["", *(COLOURS[view.state.name] for view in views)], strict=True):
        line = Text(style="" if style else "bold")
        for k in used:
            pad = " " * (widths[k] - cell_len(cells[k]))
            right = COLUMNS[k][1] == "right"
            line.append((pad if right else "") + cells[k], style if COLUMNS[k][0] == "state" else "")
            line.append("  " if right else f"{pad}  ")
        line.rstrip()
        text.append_text(line).append("\n")
    where.print(text, end="", soft_wrap=True)


def _fitting(used: list[int], widths: Sequence[int], width: int) -> list[int]:
    """The columns for which a terminal has room. The reason comes last, and is folded by the terminal."""
    for name in SPARED:
        if sum(2 + min(widths[k], REASON if COLUMNS[k][0] == "why" else widths[k]) for k in used) <= width:
            break
        used = [k for k in used if COLUMNS[k][0] != name]
    return used


def row(view: View) -> list[str]:
    """A run's cells, in the order of ``COLUMNS``."""
    run, state, best = view.run, view.state, view.run.best
    speed = view.images_per_second
    reason = state.reason + (f"; starts about {moment(state.start)}" if state.start else "")
    return [
        run.name,
        state.name,
        f"{run.step}/{run.steps}" if run.steps else f"{run.step}" if run.step else "",
        f"{100 * run.step / run.steps:.0f} %" if run.steps else "",
        f"{best[1]:.2f}" if best else "",
        f"{speed:.0f}" if speed is not None else "",
        duration(view.eta),
        state.job,
        state.nodes,
        str(view.restarts) if view.restarts else "",
        f"{duration(run.silent)} ago" if run.silent is not None else "",
        reason.removeprefix("; "),
    ]
