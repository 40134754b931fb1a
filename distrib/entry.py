"""What a start reads before torch is imported, which takes seconds: its place, its words and its configuration."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec

from distrib.cli import dump_config, load_config
from distrib.config import Config, UserError
from distrib.faults import FINISHED, USER_ERROR, report_exit
from distrib.follow import follow
from distrib.layout import count_classes
from distrib.options import parse_args
from distrib.place import Place, count_starts, find_job, find_place, publish
from distrib.surroundings import check_limits, keep_output

LATER = 1.0  # seconds


@dataclass(frozen=True)
class Start:
    """What was asked for. ``fresh``: the old run is to be moved aside; ``must_resume``: there must be one.

    ``job``: which start of torchrun's or Slurm's this is, its restarts included; None where nothing restarts it.
    ``starts``: how often Slurm has started it before.
    """

    config: Config
    place: Place = field(default_factory=Place)
    job: str | None = None
    starts: int = 0
    fresh: bool = False
    must_resume: bool = False


def read_start(argv: Sequence[str]) -> Start:
    """The start that ``argv`` asks for; ``--help``, ``--print-config`` and mistakes are answered and end the program.

    Raises:
        SystemExit: with the exit code.
    """
    place = Place()
    try:
        place = find_place(os.environ)
        publish(place, os.environ)
        keep_output(place.rank, os.environ)
        check_limits()
        args = parse_args(argv)
        config = load_config(args.config, args.overrides)
        if args.print_config:
            print_config(config)
            raise SystemExit(FINISHED)
        if find_spec("torch") is None:
            raise UserError(f"{sys.executable} has no torch: activate .venv (make setup makes it), or install distrib")
    except UserError as error:
        if place.rank == 0 or not error.everywhere:
            print(f"error: {error}", file=sys.stderr)
        code = report_exit(USER_ERROR, str(error))
        if place.world > 1:  # torchrun ends the others as soon as one has ended, and they are about to say the same
            time.sleep(LATER)
        raise SystemExit(code) from None
    job, starts = find_job(os.environ), count_starts(os.environ)
    return Start(config, place, job, starts, args.fresh, args.resume == "must")


def print_config(config: Config) -> None:
    """Prints what ``config`` resolves to as far as this machine tells, as YAML that ``--config`` reads back."""
    print(dump_config(follow(config, classes=_classes(config))), end="")


def _classes(config: Config) -> int | None:
    """How many there are, where the data can be looked at from here."""
    try:
        return count_classes(config.data, config.model.num_classes)
    except UserError:
        return None
