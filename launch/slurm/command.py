"""``launch slurm``: looks at everything that can be wrong, then submits; or shows what it would submit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from distrib.cli import load_config
from distrib.config import Config, UserError
from distrib.entry import print_config
from distrib.options import start_words
from launch import local
from launch.command import FINISHED, TRAIN, USER_ERROR
from launch.paths import located
from launch.record import Record
from launch.slurm.check import check_alone, check_fits, check_writable, choose, need_slurm, partitions
from launch.slurm.continued import is_left
from launch.slurm.options import Request, parse, read_request
from launch.slurm.profile import changed

if TYPE_CHECKING:
    from launch.slurm.submit import Submission

SIMULATE = "distrib.tools.simulate"


def main(argv: Sequence[str], train: Path = TRAIN) -> int:
    """Submits a run; returns 0, or with --follow how the run ended.

    Raises:
        UserError: a mistake that can be seen from here; nothing is submitted then.
    """
    args = parse(argv)
    config = located(load_config(args.config, args.overrides))
    if args.print_config:
        print_config(config)
        return FINISHED
    if args.simulate and not args.dry_run:
        raise UserError("--simulate goes with --dry-run: it submits nothing")
    request = read_request(args)
    if not args.dry_run:
        need_slurm()
    request = fitted(request)
    local.check_batch(config, request.world)

    from launch.slurm.submit import Element, prepare, submit  # submitit takes 0.1 s, which mistakes need not wait for

    element = Element(config, start_words(args))
    if args.dry_run:
        submission = prepare([element], request, element.record, config.run.name, None, copy=False)
        show(submission)
        return simulate(args.config, args.overrides, request) if args.simulate else FINISHED
    if not request.profile.data_on_nodes:
        check_data(config, request.world)
    if not is_left(config, args.fresh, args.resume == "must"):
        print(f"{config.run.dir} is finished already: raise train.epochs, or begin anew with --fresh")
        return FINISHED
    check_writable(element.record)
    check_alone(element.record)
    (job,) = submit([element], request, element.record, config.run.name)
    print(f"job {job}: {config.run.name}, {request}; run folder: {config.run.dir}")
    print(f"  python -m launch status {config.run.dir}\n  python -m launch logs -f {config.run.dir}", flush=True)
    return follow(element.record) if args.follow else FINISHED


def fitted(request: Request) -> Request:
    """``request`` with what the partition says of its nodes, where sinfo answers.

    Raises:
        UserError: the partition does not exist or has not what is asked for.
    """
    kinds = partitions()
    chosen = choose(kinds, request) if kinds is not None else []
    profile, where = request.profile, request.where or "command line"
    if profile.gpus_per_node is None:
        if not chosen:
            raise UserError("--gpus-per-node is needed: sinfo does not tell how many GPUs a node has (0: none)")
        with_gpus = [kind.gpus for kind in chosen if kind.gpus]  # a partition may have some nodes without
        profile = changed(profile, {"gpus_per_node": min(with_gpus, default=0)}, where)
    gpus, procs = profile.gpus_per_node or 0, profile.procs_per_node or 0
    if procs > gpus > 0:
        raise UserError(
            f"--procs-per-node {procs} is more than the {gpus} GPUs of a node: --gpus-per-node 0 trains on the CPUs"
        )
    if profile.tasks == "gpu" and profile.numa:
        raise UserError("numa: true needs --tasks node: it is torchrun that binds the ranks")
    request = replace(request, profile=profile)
    check_fits(chosen, request)
    if profile.cpus_per_node is None and chosen:
        nodes = [kind for kind in chosen if kind.gpus >= (profile.gpus_per_node or 0)]
        share = min(kind.cpus * (profile.gpus_per_node or 0) // kind.gpus if kind.gpus else kind.cpus for kind in nodes)
        if share:
            request = replace(request, profile=changed(profile, {"cpus_per_node": share}, where))
    return request


def check_data(config: Config, world: int) -> None:
    """As ``launch local`` does, with the way out where only the nodes have the data.

    Raises:
        UserError: the data is not there or does not fit together, or there are fewer images than ranks.
    """
    try:
        local.check_data(config, world)
    except UserError as error:
        raise UserError(f"{error} (--data-on-nodes, where only the nodes have it)") from None


def show(submission: Submission) -> None:
    """Prints the batch script, the environment and what each task runs."""
    print(f"# the batch script; the code will be a copy of {submission.code}\n\n{submission.script().rstrip()}\n")
    print("# variables of the ranks, beside Slurm's and those that are set here\n")
    for key, value in submission.environment().items():
        print(f"{key}={value}")
    request = submission.request
    slurm = {"SLURM_JOB_ID": "JOB", "SLURM_JOB_NODELIST": "NODE0", "SLURMD_NODENAME": "NODE0"}
    by_node = request.profile.tasks == "node"
    what = f"each of {request.nodes} nodes" if by_node else f"each of {request.world} tasks"
    command = submission.task.command(slurm, request.profile.cpus_per_node or 1)
    print(f"\n# what {what if request.world > 1 else 'the task'} runs\n\n{command}")


def simulate(config: str, overrides: Sequence[str], request: Request) -> int:
    """Computes the plan and the memory of the last rank, in a process of its own, as it needs torch."""
    print(flush=True)
    size = ["--world", str(request.world), "--local-world", str(request.procs), "--rank", str(request.world - 1)]
    done = subprocess.run([sys.executable, "-m", SIMULATE, "--no-rendezvous", *size, "--config", config, *overrides])
    return done.returncode if done.returncode in (FINISHED, USER_ERROR) else 1


def follow(record: Record) -> int:
    """Shows rank 0's log until the run is over."""
    from launch.logs import follow as follow_log

    return follow_log(record, 0)
