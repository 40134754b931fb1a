"""The command line of ``launch sweep``: plans, checks everything, trains what is missing, and makes the table."""

from __future__ import annotations

import argparse
import os
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from distrib.config import UserError
from distrib.options import Parser, add_configuration, positive
from distrib.surroundings import usable_cores
from launch.command import FINISHED, STOPPED, TRAIN
from launch.local import check_batch, check_data
from launch.slurm.options import OF_PROFILE, add_options
from launch.sweep import here, table
from launch.sweep.array import SlurmArray
from launch.sweep.here import say
from launch.sweep.plan import MOST, Element, Sweep, plan_sweep
from launch.sweep.state import Found, Progress, look_at

# Beside those that stand in a profile too.
OF_ARRAY = ("--dependency", "--comment", "--slurm", "--srun", "--profile", "--data-on-nodes", "--at-most")

HELP = """values:
  optim.lr=0.5,1.0,2.0            commas separate; a value in "double quotes" may hold some
  seed=0..4                       all of 0 to 4; seed is short for run.seed
  data.scale=[0.08,1|0.25,1]      between brackets bars alone separate: for lists, and for any key
  data.classes=cat,dog            one value: the key takes a list (data.scale, schedule.milestones, wandb.tags, …)
  ema=true,false                  a part that can be switched off

Each combination is a run, in the sweep's folder by the name of its values: lr=0.5,seed=0. The same sweep again, with
more values or fewer, trains what is missing; other settings under the same names are refused. A run that diverged is
a result; one that failed is tried again.
"""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments.

    Raises:
        UserError: they are wrong.
        SystemExit: ``--help`` was asked for.
    """
    parser = Parser(
        parts=[],
        prog="python -m launch sweep",
        description="Train each combination of values, and make one table: means and deviations over the seeds.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_configuration(parser)
    parser.add_argument("--name", metavar="NAME", help="of the sweep and its folder; default: the run's, and -sweep")
    parser.add_argument("--procs", type=positive, metavar="N", help="processes a run: one for each GPU; default: 1")
    parser.add_argument("--at-once", type=positive, metavar="N", help="runs at a time; default: 1")
    parser.add_argument("--table", action="store_true", help="make the table of what is done, and train nothing")
    parser.add_argument("--dry-run", action="store_true", help="list the runs, and what would be started")
    parser.add_argument("--yes", action="store_true", help=f"consent to more than {MOST} runs")
    parser.add_argument("--on-slurm", action="store_true", help="as one array of jobs; the options below go with it")
    parser.add_argument("--at-most", type=positive, metavar="N", help="runs of the array at a time")
    add_options(parser)
    if "--fresh" in argv:
        raise UserError("--fresh: a sweep's runs begin and go on as needed: leave it out, or give another --name")
    args = parser.parse_words(argv)
    if args.on_slurm:
        for flag, instead in (("--procs", "--nodes and --gpus-per-node"), ("--at-once", "--at-most")):
            if _is_given(args, flag):
                raise UserError(f"{flag} is for this machine: with --on-slurm, give {instead} in its stead")
    elif given := [flag for flag in (*(flag for flag, *_ in OF_PROFILE), *OF_ARRAY) if _is_given(args, flag)]:
        raise UserError(f"{given[0]} goes with --on-slurm: give that too, or leave it out")
    return args


def _is_given(args: argparse.Namespace, flag: str) -> bool:
    return bool(getattr(args, flag[2:].replace("-", "_")))


def main(argv: Sequence[str], train: Path = TRAIN) -> int:
    """Returns the exit code: 0 all is done, 75 stopped with everything saved, 1 a run failed.

    Raises:
        UserError: a mistake that can be seen before anything starts.
    """
    args = parse(argv)
    slurm = SlurmArray(args) if args.on_slurm and not args.table else None
    sweep = plan_sweep(args.config, args.overrides, args.name, None if args.yes else MOST)
    found = look_at(sweep.elements)
    if args.table:
        make_table(sweep, found)
        return FINISHED
    # Each seed's runs before the next one's: a table of half a sweep has all its rows.
    seeds = list(dict.fromkeys(element.seed for element in sweep.elements))
    ordered = sorted(sweep.elements, key=lambda element: seeds.index(element.seed))
    todo = [element for element in ordered if found[element.name].state in (Progress.UNFINISHED, Progress.WAITING)]
    procs = slurm.request.world if slurm is not None else args.procs or 1
    if args.dry_run:
        for element in ordered:
            print(f"{found[element.name].state:<10} {element.name}")
            if slurm is None:
                print(f"{'':<10} {shlex.join(here.command_of(sweep.file, element, procs, train))}")
        if slurm is not None:
            slurm.show(sweep, todo)
        return FINISHED

    check(todo, procs, train, data=slurm is None or not slurm.request.profile.data_on_nodes)
    counts = Counter(one.state for one in found.values())
    say(f"{sweep.name}: {len(sweep.elements)} runs in {sweep.folder}: {table.count_states(counts)}")
    table.check_folder(sweep)
    if slurm is not None:
        slurm.submit(sweep, todo)
        make_table(sweep, found)
        return FINISHED
    code = FINISHED
    if todo:
        slots = here.make_slots(args.at_once or 1, procs, os.environ, usable_cores(), here.visible_gpus(os.environ))
        code, failed = here.train_here(sweep, todo, procs, slots, train)
        found = look_at(sweep.elements)
        for name in failed:
            found[name] = replace(found[name], state=Progress.FAILED)
    make_table(sweep, found)
    if code == STOPPED:
        say("stopped; the same command goes on")
    elif names := [name for name, one in found.items() if one.state == Progress.FAILED]:
        say(f"error: {len(names)} of {len(found)} runs failed: {', '.join(names[:3])}{' …' if names[3:] else ''}")
    elif others := counts[Progress.RUNNING] + counts[Progress.QUEUED]:
        say(f"{others} of {len(found)} runs are queued or trained elsewhere: left alone")
    return code


def check(elements: Sequence[Element], procs: int, train: Path, data: bool = True) -> None:
    """Looks at what ``launch local`` would, at each distinct set of data once; ``data``: whether it lies here.

    Raises:
        UserError: a batch is too small for the processes, the data is not there, or train.py is missing.
    """
    for element in elements:
        check_batch(element.config, procs)
    for config in {(e.config.data, e.config.model.num_classes): e.config for e in elements if data}.values():
        check_data(config, procs)
    if not train.is_file():
        raise UserError(f"{train} is missing: install distrib again, or restore it in the checkout")


def make_table(sweep: Sweep, found: Mapping[str, Found]) -> None:
    """Prints the table, and writes it into the sweep's folder.

    Raises:
        UserError: it cannot be written.
    """
    rows = table.rows_of(sweep, found)
    markdown = table.as_markdown(sweep, rows)
    print(markdown, end="", flush=True)
    if any(one.state in (Progress.FINISHED, Progress.DIVERGED) for one in found.values()):
        table.write(table.check_folder(sweep), markdown, table.as_json(sweep, rows, found))
