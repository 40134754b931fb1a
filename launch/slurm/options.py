"""The words behind ``launch slurm``: a request for a job, from the options and the profile."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distrib.config import UserError
from distrib.options import Parser, parse_start, positive
from launch.slurm.profile import Found, Profile, changed, find_profile

TIME_FORMS = (
    "minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes or days-hours:minutes:seconds"
)

# Options that are keys of the profile too; what they take, and what --help says.
OF_PROFILE: tuple[tuple[str, str, str], ...] = (
    ("--nodes", "N", "nodes (default: 1)"),
    ("--gpus-per-node", "N", "GPUs of a node, one rank each; 0 for none (default: all that sinfo tells)"),
    ("--procs-per-node", "N", "ranks of a node, where that is not its number of GPUs"),
    ("--cpus-per-node", "N", "cores of a node (default: the GPUs' share of them)"),
    ("--mem", "SIZE", "memory of a node: 200G; 0: all"),
    ("--time", "TIME", "time limit, as sbatch takes it; the job goes on beyond it (default: the partition's)"),
    ("--partition", "NAME", "partition"),
    ("--account", "NAME", "account"),
    ("--qos", "NAME", "quality of service"),
    ("--constraint", "FEATURES", "features that nodes must have"),
    ("--exclude", "NODES", "nodes that are not to be used"),
    ("--tasks", "node|gpu", "node: one torchrun a node; gpu: one task a rank, without torchrun"),
    ("--restarts", "N", "how often torchrun may start a node's workers again within an allocation (default: 3)"),
    ("--failures", "N", "starts that may fail at one step, before the job is given up (default: 3)"),
    ("--signal-seconds", "N", "how long before the time limit the ranks are asked to save (default: 120)"),
)  # fmt: skip


EXAMPLES = """examples:
  python -m launch slurm --nodes 4 --config configs/resnet50.yaml --dry-run      # what would be submitted
  python -m launch slurm --nodes 4 --config configs/resnet50.yaml --follow       # submit, and show rank 0's log
  python -m launch slurm --nodes 4 --slurm reservation=maint --slurm exclusive   # any option of sbatch
"""
MAY_BE_NONE = ("gpus_per_node", "restarts")
# sbatch's own defaults, which a cluster's manual may tell people to export. They would win over the batch script.
OF_SBATCH = {
    "partition": "SBATCH_PARTITION", "account": "SBATCH_ACCOUNT", "qos": "SBATCH_QOS", "time": "SBATCH_TIMELIMIT",
    "constraint": "SBATCH_CONSTRAINT", "mem": "SBATCH_MEM_PER_NODE",
}  # fmt: skip
# Of sbatch and srun: the job's size, its logs, its signal and its requeue are of one piece.
OWN = (
    "array", "cpus-per-task", "error", "gpus", "gres", "job-name", "kill-on-bad-exit", "no-requeue", "ntasks",
    "ntasks-per-node", "open-mode", "output", "requeue", "signal", "wait",
)  # fmt: skip


@dataclass(frozen=True)
class Request:
    """One job that is to be. ``profile`` holds what the options and the profile's file say together."""

    profile: Profile
    where: str  # the profile's file, for a person; empty: none
    dependency: str | None = None
    comment: str | None = None

    @property
    def nodes(self) -> int:
        """Nodes of the job."""
        return self.profile.nodes or 1

    @property
    def procs(self) -> int:
        """Ranks of a node."""
        return self.profile.procs_per_node or self.profile.gpus_per_node or 1

    @property
    def world(self) -> int:
        """Ranks of the run."""
        return self.nodes * self.procs

    def __str__(self) -> str:
        nodes, ranks = self.nodes, self.procs
        return f"{nodes} node{'s' * (nodes > 1)} × {ranks} rank{'s' * (ranks > 1)}"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that say what kind of job is wanted."""
    job = parser.add_argument_group("the job (each may stand in a launch.yaml too: docs/cluster.md)")
    for flag, metavar, text in OF_PROFILE:
        job.add_argument(flag, metavar=metavar, help=text)
    job.add_argument("--dependency", metavar="RULE", help="start only then: afterok:1234")
    job.add_argument("--comment", metavar="TEXT", help="comment of the job")
    job.add_argument("--slurm", action="append", default=[], metavar="key=value", help="any other option of sbatch")
    job.add_argument("--srun", action="append", default=[], metavar="key=value", help="any other option of srun")
    job.add_argument(
        "--profile",
        metavar="FILE",
        help="the cluster's launch.yaml (default: beside the configuration, here, or in ~/.config/distrib)",
    )
    job.add_argument(
        "--data-on-nodes", action="store_true", help="do not look for the data here: only the nodes have it"
    )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """All words of ``launch slurm``."""
    parser = Parser(
        prog="python -m launch slurm",
        description="Train as a Slurm job, which is queued again until the run is finished.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser)
    parser.add_argument("--follow", action="store_true", help="show rank 0's log until the run is over")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the batch script and what its tasks run; submit nothing"
    )
    parser.add_argument("--simulate", action="store_true", help="with --dry-run: plan and memory of the last rank")
    return parse_start(parser, argv)


def read_request(args: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> Request:
    """The job that the options ask for, else the profile, else the variables that sbatch reads.

    Raises:
        UserError: an option, or a key of the profile, that cannot be.
    """
    found: Found = find_profile(args.config, args.profile)
    values: dict[str, Any] = {}
    for flag, metavar, _ in OF_PROFILE:
        key = flag[2:].replace("-", "_")
        given = getattr(args, key)
        if given is None:
            continue
        if metavar == "N":
            try:
                values[key] = 0 if key in MAY_BE_NONE and given == "0" else positive(given)
            except argparse.ArgumentTypeError as error:
                raise UserError(f"{flag}: {error}") from None
        else:
            values[key] = given
    if args.data_on_nodes:
        values["data_on_nodes"] = True
    for name in ("slurm", "srun"):
        values[name] = {**getattr(found.profile, name), **_pairs(f"--{name}", getattr(args, name))}
    for key, variable in OF_SBATCH.items():
        if getattr(found.profile, key) is None and environ.get(variable):
            values.setdefault(key, environ[variable])
    profile = changed(found.profile, values, "command line")
    _check_own(profile)
    if profile.time is not None and minutes(profile.time) * 60 <= profile.signal_seconds:
        raise UserError(
            f"--time {profile.time} is no longer than the {profile.signal_seconds} s before its end at which the ranks "
            "are asked to save: ask for more time, or lower --signal-seconds"
        )
    return Request(profile, str(found.path or ""), args.dependency, args.comment)


def _check_own(profile: Profile) -> None:
    """Looks that ``slurm`` and ``srun`` hold nothing that the launcher says itself.

    Raises:
        UserError: they do.
    """
    options = {flag[2:]: flag for flag, *_ in OF_PROFILE} | {"dependency": "--dependency", "comment": "--comment"}
    for name, given in (("slurm", profile.slurm), ("srun", profile.srun)):
        for key in (key.replace("_", "-") for key in given):
            if name == "slurm" and key in options:
                raise UserError(f"--{name} {key}: write {options[key]}")
            if key in OWN:
                raise UserError(f"--{name} {key}: the launcher says that itself: leave it out")


def _pairs(flag: str, words: Sequence[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for word in words:
        key, equals, value = word.lstrip("-").partition("=")
        if not re.fullmatch(r"[A-Za-z][\w-]*", key):
            raise UserError(f"{flag} takes key=value, as in {flag} reservation=maint, got {word!r}")
        pairs[key.replace("_", "-")] = value if equals else "true"
    return pairs


def minutes(time: str) -> float:
    """Minutes of a time limit in one of sbatch's forms; infinite for UNLIMITED.

    Raises:
        UserError: it is of another form.
    """
    if time.strip().lower() in ("unlimited", "infinite"):
        return float("inf")
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time.strip())
    if match is None or not any(int(part or 0) for part in match.groups()):
        raise UserError(f"--time {time!r} is no time limit: sbatch takes {TIME_FORMS}")
    days, first, second, third = (int(part) if part is not None else None for part in match.groups())
    if days is not None:
        return days * 1440 + (first or 0) * 60 + (second or 0) + (third or 0) / 60
    if third is not None:
        return (first or 0) * 60 + (second or 0) + third / 60
    return (first or 0) + (second or 0) / 60
