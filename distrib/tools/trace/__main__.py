"""The command line: compares two runs, or hashes a checkpoint. A mistake is one line and exit code 2."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from distrib.config import UserError
from distrib.faults import FAILED, FINISHED, Interrupted, StopSignals
from distrib.folder import PARTS, RunFolder
from distrib.layout.folders import shown
from distrib.options import PlainParser
from distrib.program import run, say
from distrib.tools.trace import report
from distrib.tools.trace.files import read_steps
from distrib.tools.trace.parting import compare, pairs

EXAMPLES = """examples:
  distrib trace diff runs/a runs/b        # both trained with trace=true
  distrib trace hash runs/a               # of its newest checkpoint; summary.json has those of the last
  distrib trace hash runs/a/checkpoints/best.pt

diff ends with 0 where the runs are alike as far as both go, with 1 where they part. Of runs on another number of
ranks the global batch of each step is compared, and how far losses and gradient norms are apart is told.
"""
T = TypeVar("T")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments.

    Raises:
        UserError: they are wrong.
        SystemExit: ``--help`` was asked for.
    """
    parser = PlainParser(
        prog="distrib trace",
        description="Says where two runs part first, to the bit; hashes what a checkpoint holds.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="diff|hash")
    diff = commands.add_parser("diff", help="compare two runs, step by step and rank by rank", allow_abbrev=False)
    diff.add_argument("a", type=_path, metavar="RUN_A", help="a run's folder")
    diff.add_argument("b", type=_path, metavar="RUN_B", help="another one's")
    hashes = commands.add_parser("hash", help="SHA-256 of weights, buffers, optimizer and EMA", allow_abbrev=False)
    hashes.add_argument("source", type=_path, metavar="FILE|RUN", help="a checkpoint, or a run: its newest one")
    return parser.parse_args(argv)


def diff(a: Path, b: Path, stop: Callable[[], bool]) -> int:
    """Prints where the runs in two folders part; returns 0 where they do not, else 1.

    Raises:
        UserError: one has no trace, or none of the other's steps.
        Interrupted: ``stop()`` before the end.
    """
    names = [f"{letter} ({shown(path)})" for letter, path in (("A", a), ("B", b))]
    found = compare(_until(stop, pairs(read_steps(a), read_steps(b))))
    if not found.alike.count and not found.partings:
        has = [
            f"{name} has {f'steps {spans}' if spans.count else 'none'}"
            for name, spans in zip(names, found.only, strict=True)
        ]
        raise UserError(f"the runs have no traced step in common: {', '.join(has)}")
    state, agree = report.final_states([RunFolder(str(path)).summary() for path in (a, b)], names, found.exact)
    parts = bool(found.partings) or (found.exact and agree is False)
    print("\n".join([*names, *report.as_lines(found, names), state]))
    return FAILED if parts else FINISHED


def print_hashes(source: Path) -> None:
    """Prints a line for each part: its name and its SHA-256.

    Raises:
        UserError: there is no checkpoint.
    """
    from distrib import checkpoint  # imports torch, which a comparison does not need
    from distrib.digest import digest

    if source.is_dir():
        folder = RunFolder(str(source)).checkpoints
        path = checkpoint.newest_valid(folder, say)
        if path is None:
            raise UserError(f"{shown(folder)} holds no checkpoint")
    else:
        path = source
        if not path.exists():
            raise UserError(f"there is no {shown(path)}")
        fault = checkpoint.verify(path)
        if fault is not None:  # which part is another may be just what is asked
            say(f"warning: {shown(path)}: {fault}")
    saved: object = checkpoint.load(path)
    if not isinstance(saved, dict) or any(part not in saved for part in PARTS):
        raise UserError(f"{shown(path)} is no checkpoint of this trainer")
    say(shown(path))
    print("\n".join(f"{part:<9}  {value}" for part, value in digest(saved).items()))


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text))


def _until(stop: Callable[[], bool], values: Iterator[T]) -> Iterator[T]:
    for value in values:
        if stop():
            raise Interrupted
        yield value


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0 alike or hashed, 1 the runs part, 75 stopped on request, 2 the user's to mend."""

    def work(stop: StopSignals) -> int:
        args = parse(argv)
        if args.command == "diff":
            return diff(args.a, args.b, stop.requested)
        print_hashes(args.source)
        return FINISHED

    return run(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
