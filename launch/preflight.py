"""``launch preflight``: looks at the machines as training does before its first step, and starts nothing else."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from distrib.config import UserError
from distrib.options import PlainParser, positive
from distrib.surroundings import usable_cores
from launch.child import run
from launch.command import TRAIN, Command, Rendezvous, through_torchrun
from launch.nodes import PORT, find_rendezvous

TOOL = "distrib.tools.preflight"
EXAMPLES = """examples:
  python -m launch preflight --procs 8 --run-dir runs/resnet50
  python -m launch preflight --procs 8 --run-dir runs/resnet50 --nnodes 2 --rdzv-endpoint gpu01   # on each node
  srun --ntasks-per-node=8 python -m launch preflight --run-dir runs/resnet50                     # a task a rank

It ends with 0 where all is well, 2 where something is yours to mend, and 1 where a machine is bad.
"""


def main(argv: Sequence[str], train: Path = TRAIN) -> int:
    """Looks at this machine, or at several; returns the exit code. ``train`` is of no use here.

    Raises:
        UserError: a mistake among the words.
    """
    parser = PlainParser(
        prog="python -m launch preflight",
        description="Look at the machines as training does before its first step: versions, GPUs, clocks, an "
        "all-reduce, links, and the run folder.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--procs",
        type=positive,
        metavar="N",
        help="processes on this machine, through torchrun; without: this one alone, or srun's tasks",
    )
    parser.add_argument(
        "--run-dir", default="runs", metavar="DIR", help="the folder to write in; default: %(default)s; nothing stays"
    )
    parser.add_argument("--nnodes", type=positive, default=1, metavar="N", help="machines; the same command on each")
    parser.add_argument(
        "--rdzv-endpoint", metavar="HOST[:PORT]", help=f"one of them, where they meet (default port: {PORT})"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the command and start nothing")
    args = parser.parse_args(argv)
    if args.nnodes > 1 and (args.procs is None or args.rdzv_endpoint is None):
        raise UserError("--nnodes needs --procs, and --rdzv-endpoint HOST, which is the same on all of them")
    if args.nnodes == 1 and args.rdzv_endpoint is not None:
        raise UserError("--rdzv-endpoint is for several machines: give their number by --nnodes, or leave it out")
    rendezvous = (
        find_rendezvous(args.rdzv_endpoint, args.nnodes, "preflight") if args.rdzv_endpoint is not None else None
    )
    command = build(args.procs, args.run_dir, rendezvous, os.environ, usable_cores())
    if args.dry_run:
        print(command)
        return 0
    if args.procs is None:
        sys.stdout.flush()
        os.execvpe(command.argv[0], command.argv, {**os.environ, **command.env})
    outcome = run(command.through_agent(), args.procs, os.environ)
    if outcome.message:
        print(outcome.message, file=sys.stderr)
    return outcome.code


def build(
    procs: int | None, run_dir: str, rendezvous: Rendezvous | None, environ: Mapping[str, str], cores: int
) -> Command:
    """The tool through torchrun, or by itself where no ``procs`` are asked for."""
    words = ("-m", TOOL, "--run-dir", run_dir)
    if procs is None:
        return Command((sys.executable, *words), {})
    return through_torchrun(words, procs, environ, cores, rendezvous)
