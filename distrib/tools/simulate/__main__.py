"""The command line of ``distrib simulate``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from distrib.cli import load_config
from distrib.faults import FINISHED, StopSignals
from distrib.options import DEFAULT_CONFIG, Parser, positive
from distrib.program import run
from distrib.tools.simulate.rank import Assumed, place_of, simulate
from distrib.tools.simulate.report import lines

EXAMPLES = """examples:
  distrib simulate --world 1024 --config configs/resnet50.yaml
  distrib simulate --world 64 --local-world 4 --rank 0 train.global_batch=8192 --json
"""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments.

    Raises:
        UserError: they are wrong.
        SystemExit: ``--help`` was asked for.
    """
    parser = Parser(
        parts=(),
        prog="distrib simulate",
        description="What a rank of a run would do and need, computed without the other ranks; nothing is trained.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--world", type=positive, required=True, metavar="N", help="ranks in all")
    parser.add_argument("--local-world", type=positive, metavar="N", help="ranks on a machine; default: 8, or all")
    parser.add_argument("--rank", type=_rank, metavar="N", help="which one, from 0; default: the last")
    parser.add_argument("--config", default=DEFAULT_CONFIG, metavar="FILE", help="default: %(default)s")
    parser.add_argument(
        "--step", type=positive, default=30, metavar="MS", help="assume such steps; default: %(default)s"
    )
    parser.add_argument(
        "--write", type=positive, default=1000, metavar="MB/S", help="assume such a disk; default: %(default)s"
    )
    parser.add_argument(
        "--no-rendezvous", action="store_true", help="leave torchrun's words out, where a launcher says its own"
    )
    parser.add_argument("--json", action="store_true", help="print an object: bytes, seconds")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, as for train.py")
    return parser.parse_words(argv)


def _rank(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0, 2 the user's to mend."""

    def work(stop: StopSignals) -> int:
        args = parse(argv)
        place = place_of(args.rank, args.world, args.local_world)
        config = load_config(args.config, args.overrides)
        found = simulate(config, place, Assumed(args.step / 1e3, args.write * 1e6), not args.no_rendezvous)
        print(json.dumps(found, indent=2) if args.json else "\n".join(lines(found)))
        return FINISHED

    return run(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
