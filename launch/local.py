"""``launch local``: checks the configuration, then trains through torchrun on this machine, or on several by hand."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from distrib.cli import load_config
from distrib.config import Config, UserError
from distrib.entry import print_config
from distrib.layout import SPLITS, count_images, look
from distrib.options import Parser, parse_start, positive, start_words
from distrib.surroundings import ForgivingStream, usable_cores
from launch.child import run
from launch.command import FINISHED, TRAIN, build_torchrun
from launch.nodes import add_options, read_rendezvous


def main(argv: Sequence[str], train: Path = TRAIN) -> int:
    """Trains with torchrun on this machine; returns 0 finished, 75 stopped with all saved, 1 failed.

    With --nnodes this machine is one of several; each has a launcher of its own.

    Raises:
        UserError: a mistake that can be seen before a process starts.
    """
    # The command is printed as it is read back: a file name may hold bytes that are no text.
    if isinstance(sys.stdout, io.TextIOWrapper | ForgivingStream):
        sys.stdout.reconfigure(errors="surrogateescape")
    parser = Parser(
        prog="python -m launch local",
        description="Train on this machine. The same command again continues the run.",
    )
    parser.add_argument("--procs", type=positive, required=True, metavar="N", help="processes: one for each GPU here")
    add_options(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the command and start nothing")
    args = parse_start(parser, argv)

    config = load_config(args.config, args.overrides)
    if args.print_config:
        print_config(config)
        return FINISHED
    rendezvous = read_rendezvous(args, config.run.name)
    world = args.procs * (rendezvous.nodes if rendezvous else 1)
    check_batch(config, world)
    words = [*start_words(args), *args.overrides]
    command = build_torchrun(args.procs, args.config, words, os.environ, usable_cores(), train, rendezvous)
    if args.dry_run:  # perhaps on a machine that has not the data
        print(command)
        return FINISHED
    check_data(config, world)
    print(command, flush=True)
    if not train.is_file():
        raise UserError(f"{train} is missing: install distrib again, or restore it in the checkout")
    outcome = run(command.through_agent(), args.procs, os.environ)
    if outcome.message:
        print(outcome.message, file=sys.stderr)
    return outcome.code


def check_batch(config: Config, procs: int) -> None:
    """Says what the workers would, in their words, before any of them starts.

    Raises:
        UserError: more processes than images in a batch.
    """
    batch = config.train.global_batch
    if procs > batch:
        raise UserError(f"train.global_batch {batch} is smaller than the {procs} processes: raise it, or start fewer")


def check_data(config: Config, procs: int) -> None:
    """Looks at the data's folders, and counts images until each process has one.

    Raises:
        UserError: the data is not there or does not fit together, or there are fewer images than processes.
    """
    look(config.data, config.model.num_classes)
    images = count_images(config.data, SPLITS[0], procs)
    if procs > images:
        raise UserError(f"the {procs} processes are more than the {images} training images: start fewer")
