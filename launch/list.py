"""``launch list``: the runs below a folder, a line each."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
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
REASON = 20  # columns that the reason is given at least; it is folded


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
    folders = [Path(folder).expanduser() for folder in args.folders or [RUNS]]
    for folder in folders:
        if not folder.is_dir():
            hint = "" if args.folders else "; name the folder in which your runs lie"
            raise UserError(f"there is no folder {folder}{hint}")
    views = survey([run for folder in folders for run in find(folder)])
    if args.json:
        print(json.dumps([view.as_json() for view in views], indent=2))
    elif views:
        show(views, console())
    else:
        print(f"no runs below {', '.join(map(str, folders))}", file=sys.stderr)
    return FINISHED


def show(views: Sequence[View], where: Console) -> None:
    """Prints the table; columns that would be empty are left out."""
    rows = [row(view) for view in views]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    used = _fitting(rows, where.width)
    for k in used:
        name, side = COLUMNS[k]
        # What somebody copies is never cut; the reason gives way first.
        table.add_column(name, justify=side, no_wrap=k != len(COLUMNS) - 1, overflow="fold")  # type: ignore[arg-type]
    for view, cells in zip(views, rows, strict=True):
        texts = [Text(cell) for cell in cells]
        texts[1].stylize(COLOURS[view.state.name])
        table.add_row(*(texts[k] for k in used))
    where.print(table)


def _fitting(rows: Sequence[Sequence[str]], width: int) -> list[int]:
    """The columns that are not empty, without those that a narrow terminal has no room for."""
    widths = [max(len(cells[k]) for cells in rows) for k in range(len(COLUMNS))]
    used = [k for k in range(len(COLUMNS)) if widths[k]]
    for name in SPARED:
        needed = sum(2 + (REASON if k == len(COLUMNS) - 1 else max(widths[k], len(COLUMNS[k][0]))) for k in used)
        if needed <= width:
            break
        used = [k for k in used if COLUMNS[k][0] != name]
    return used


def row(view: View) -> list[str]:
    """A run's cells, in the order of ``COLUMNS``."""
    run, state, best = view.run, view.state, view.run.best
    speed = view.images_per_second
    reason = state.reason + (f"; starts about {moment(state.start)}" if state.start and state.name != "running" else "")
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
