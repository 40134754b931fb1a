"""Looks at what can be wrong before a job is submitted: the partition, the run's folder, a job that is there."""

from __future__ import annotations

import contextlib
import difflib
import re
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distrib.config import UserError
from launch.queue import ask, look_up
from launch.record import Record
from launch.slurm.options import Request, minutes
from launch.state import ACTIVE

PATIENCE = 20.0  # seconds for sinfo: here there is time to wait
FORM = "%P|%D|%c|%G|%l|%a"  # sinfo: partition (* at the default one), nodes, CPUs, GPUs, time limit, up or not


@dataclass(frozen=True)
class NodeType:
    """Nodes of one partition that are alike. ``limit``: the partition's, in minutes."""

    partition: str
    nodes: int
    cpus: int
    gpus: int
    limit: float
    up: bool
    default: bool = False


def need_slurm() -> None:
    """Looks for Slurm's commands.

    Raises:
        UserError: this machine has none.
    """
    missing = [name for name in ("sbatch", "srun") if shutil.which(name) is None]
    if missing:
        raise UserError(
            f"no Slurm on this machine: {' and '.join(missing)} cannot be found; submit on a login node, or use "
            "`python -m launch local`"
        )


def read_partitions(printed: str) -> list[NodeType]:
    """The cluster's partitions, from what ``sinfo -h -o FORM`` prints."""
    kinds = []
    for line in printed.splitlines():
        fields = line.strip().split("|")
        if len(fields) != 6 or not fields[1].isdecimal():
            continue
        name, nodes, cpus, gres, limit, up = fields
        gpus = sum(int(n) for n in re.findall(r"(?:^|,)gpu(?::[^:,(]+)?:(\d+)", gres))
        try:
            most = minutes(limit)
        except UserError:  # n/a
            most = float("inf")
        least = re.match(r"\d+", cpus)  # 16+ where they differ
        kinds.append(
            NodeType(
                name.rstrip("*"), int(nodes), int(least[0]) if least else 0, gpus, most, up == "up", name[-1] == "*"
            )
        )
    return kinds


def partitions() -> list[NodeType] | None:
    """The cluster's; None where sinfo does not answer."""
    printed = ask(["sinfo", "-h", "-o", FORM], PATIENCE).text
    return None if printed is None else read_partitions(printed)


def choose(kinds: Sequence[NodeType], request: Request) -> list[NodeType]:
    """The kinds of nodes in the partition that is asked for, or in the default one; none where that is not known.

    Raises:
        UserError: there is no such partition, or it is down.
    """
    asked = request.profile.partition
    if asked is None:
        return [kind for kind in kinds if kind.default]
    names = sorted({kind.partition for kind in kinds})
    found = [kind for kind in kinds if kind.partition in asked.split(",")]
    unknown = [name for name in asked.split(",") if name not in names]
    if unknown and names:
        near = difflib.get_close_matches(unknown[0], names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
        raise UserError(f"--partition {unknown[0]}: the cluster has no such partition; {hint}")
    if found and not any(kind.up for kind in found):
        raise UserError(f"--partition {asked} is down: choose another")
    return found


def check_fits(kinds: Sequence[NodeType], request: Request) -> None:
    """Looks whether the nodes, GPUs, cores and time can be had in a partition with these ``kinds`` of nodes.

    Raises:
        UserError: they cannot.
    """
    wrong: list[UserError] = []
    for name in dict.fromkeys(kind.partition for kind in kinds if kind.up):
        try:
            _check_partition(name, [kind for kind in kinds if kind.partition == name], request)
            return  # a job runs in one of the partitions that are asked for
        except UserError as error:
            wrong.append(error)
    if wrong:
        raise wrong[0]


def _check_partition(name: str, kinds: Sequence[NodeType], request: Request) -> None:
    profile = request.profile
    have = sum(kind.nodes for kind in kinds)
    if request.nodes > have:
        raise UserError(f"--nodes {request.nodes}: partition {name} has {have}; ask for fewer")
    gpus, cpus = profile.gpus_per_node or 0, profile.cpus_per_node or 0
    with_gpus = [kind for kind in kinds if kind.gpus >= gpus]
    if sum(kind.nodes for kind in with_gpus) < request.nodes:
        most = max(kind.gpus for kind in kinds)
        raise UserError(
            f"--gpus-per-node {gpus}: partition {name} has fewer than {request.nodes} such nodes; the most that a node "
            f"has is {most}"
        )
    if sum(kind.nodes for kind in with_gpus if kind.cpus >= cpus) < request.nodes:
        raise UserError(
            f"--cpus-per-node {cpus}: partition {name} has fewer than {request.nodes} such nodes; the most is "
            f"{max(kind.cpus for kind in with_gpus)}"
        )
    limit = max(kind.limit for kind in kinds)
    if profile.time is not None and minutes(profile.time) > limit:
        raise UserError(
            f"--time {profile.time}: partition {name} allows {limit:g} minutes; ask for that, the job is queued again "
            "until the run is finished"
        )


def check_writable(record: Record) -> None:
    """Makes the launcher's folder in the run's, and writes a file there.

    Raises:
        UserError: it cannot be written.
    """
    probe = record.path / f".probe.{secrets.token_hex(4)}"
    try:
        record.path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"1")
    except OSError as error:
        raise UserError(f"cannot write to {record.run}: {error.strerror}: set run.dir to a shared disk") from None
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    if "\n" in str(record.run):
        raise UserError(f"run.dir {str(record.run)!r} has a line break in its name: set another")


def active(records: Sequence[Record], need: bool = False) -> dict[Path, tuple[str, str]]:
    """The runs of which a job is queued or runs: its number and state, by the run's folder.

    Where Slurm does not answer there are none, or with ``need`` an error.

    Raises:
        UserError: Slurm does not answer, and an answer is needed.
    """
    jobs = {job: record.run for record in records for job in record.jobs()}
    told: list[str] = []
    queue = look_up(list(jobs), [], told.append).queue
    if queue is None and need:
        raise UserError(f"nobody can tell whether job {next(iter(jobs))} is over ({'; '.join(told)}): try again")
    there = {job: found.state for job, found in (queue or {}).items() if job in jobs and found.state in ACTIVE}
    return {jobs[job]: (job, state.lower()) for job, state in there.items()}


def check_alone(record: Record) -> None:
    """Looks whether a job of this run is queued or runs.

    Raises:
        UserError: one is, or nobody can tell.
    """
    for run, (job, state) in active([record], need=True).items():
        raise UserError(
            f"job {job} of {run} is {state} already: `python -m launch stop {run}` stops it, or choose another run.name"
        )
