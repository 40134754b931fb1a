"""The command line: picks the benchmark; a mistake is one line and exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from distrib.config import UserError
from distrib.faults import FAILED, FINISHED, USER_ERROR
from distrib.tools.bench import exchange, index, inference, loader, model, photos, save, train

BENCHMARKS = {
    "train": (train, "the trainer's own overhead: train.py against a bare loop"),
    "model": (model, "a training step of our networks against torchvision's"),
    "loader": (loader, "our loaders against torchvision's and DALI's usual ones"),
    "inference": (inference, "evaluate and features against timm's validate.py and a plain torchvision loop"),
    "index": (index, "a large data set's file list: time to open, memory, time a step"),
    "exchange": (exchange, "the ranks' agreement on stops: what a step loses to it, here and on 1,024 ranks"),
    "save": (save, "a save's cost to the steps beside it, and the writing thread's own"),
    "photos": (photos, "make up photographs to load, and print their folder"),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; ``run`` is the benchmark's function.

    Raises:
        UserError: they are wrong.
    """
    parser = _Parser(prog="python -m distrib.tools.bench", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(BENCHMARKS))
    for name, (module, text) in BENCHMARKS.items():
        command = commands.add_parser(name, help=text, description=module.__doc__, allow_abbrev=False)
        module.add_arguments(command)
        if module is not photos:
            command.add_argument("--json", type=Path, metavar="FILE", help="write the report there, too")
        command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    file = getattr(args, "json", None)
    if file is not None and not file.parent.is_dir():
        raise UserError(f"--json {file}: there is no folder {file.parent}")
    return args


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0 measured, 1 a part failed, 2 the arguments are wrong."""
    try:
        args = parse(argv)
        args.run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    return FINISHED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
