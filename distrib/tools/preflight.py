"""Looks at all nodes as training does before its first step: ``distrib preflight``, one process a rank."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distrib.faults import StopSignals
from distrib.program import run, say

if TYPE_CHECKING:
    from distrib.preflight import Report

EXAMPLES = """examples:
  srun --ntasks-per-node=8 --gpus-per-node=8 distrib preflight --run-dir runs/resnet50
  torchrun --nproc_per_node=8 -m distrib preflight --run-dir runs/resnet50
  python -m launch preflight --procs 8 --run-dir runs/resnet50                      # starts torchrun itself
"""
HEAD = ("rank", "host", "GPU", "memory free", "GB/s", "clock")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments.

    Raises:
        UserError: they are wrong.
        SystemExit: ``--help`` was asked for.
    """
    from distrib.options import PlainParser

    parser = PlainParser(
        prog="distrib preflight",
        description="Looks at all nodes: versions, GPUs, clocks, an all-reduce, links, and the run folder.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--run-dir", default="runs", metavar="DIR", help="the folder to write in; default: %(default)s; nothing stays"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str], stop: StopSignals) -> None:
    """Looks, and prints a table of the ranks.

    Raises:
        UserError: the arguments are wrong, or what was found is the user's to mend.
        Failure: a machine is bad.
        Interrupted: asked to stop before the ranks met.
    """
    args = parse(argv)
    from distrib.place import find_place, publish

    place = find_place(os.environ)
    publish(place, os.environ)  # before torch is imported
    from distrib.preflight import preflight
    from distrib.runtime import leave, start

    runtime = start(place, stop)
    try:
        report = preflight(runtime, Path(os.path.expanduser(args.run_dir)), say)
    finally:
        leave()
    if runtime.is_main:
        print("\n".join(table(report)))


def table(report: Report) -> list[str]:
    """A line for each rank, and one for the versions, which all have."""
    rows = [HEAD]
    for rank, clock, speed in zip(report.ranks, report.clocks, report.link_speeds, strict=True):
        free = f"{rank.free / 2**30:.1f} of {rank.total / 2**30:.1f} GiB" if rank.total else "-"
        skew = f"{clock.skew * 1e3:+.1f} ± {clock.accuracy * 1e3:.1f} ms"
        speed_said = "-" if speed is None else f"{speed:.3g}"
        rows.append((str(rank.rank), rank.host, rank.machine["GPU"], free, speed_said, skew))
    widths = [max(len(row[k]) for row in rows) for k in range(len(HEAD))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    versions = {**report.ranks[0].versions, "driver": report.ranks[0].machine.get("driver", "none")}
    return [*lines, ", ".join(f"{name} {value}" for name, value in versions.items() if value != "none")]


if __name__ == "__main__":
    sys.exit(run(lambda stop: main(sys.argv[1:], stop)))
