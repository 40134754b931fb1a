"""The command line: picks the data set; a mistake is one line and exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from distrib.faults import StopSignals
from distrib.options import PlainParser
from distrib.program import run
from distrib.tools.dataset import cifar10

DATASETS = {"cifar10": cifar10}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; ``convert`` is the data set's function.

    Raises:
        UserError: they are wrong.
    """
    parser = PlainParser(
        prog="distrib dataset",
        description="Folders of pictures, train/CLASS and val/CLASS, of a data set's own archives.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(DATASETS))
    for name, module in DATASETS.items():
        text = (module.__doc__ or "").partition("\n")[0]
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.add_argument("source", type=Path, metavar="SOURCE", help=module.SOURCE)
        command.add_argument("dest", type=Path, metavar="DEST", help="a folder that does not exist, or is empty")
        command.set_defaults(convert=module.convert)
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0, 75 stopped on request with nothing written, 2 the user's to mend."""

    def work(stop: StopSignals) -> None:
        args = parse(argv)
        print(args.convert(args.source, args.dest, stop=stop.requested))

    return run(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
