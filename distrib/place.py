"""Which process of a run this is: what torchrun, srun and mpirun say in environment variables. Imports no torch."""

from __future__ import annotations

import os
import platform
import re
import zlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from distrib.config import UserError

# What all tasks of one start have in common, and no other start: of Slurm and of Open MPI.
JOB = ("SLURM_JOB_ID", "SLURM_STEP_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid")


@dataclass(frozen=True)
class Place:
    """Which process of a run this is, and where the processes meet."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    master: tuple[str, int] | None = None  # host and port; None for a run of one process


def find_place(environ: Mapping[str, str]) -> Place:
    """Reads what torchrun, Open MPI, Slurm's srun or another MPI's launcher say, in this order.

    mpirun and torchrun may run within a Slurm job, so they are asked first. srun itself may set PMI's variables, but
    not those by which Hydra (MPICH's and Intel's mpirun) numbers a host's ranks.

    Raises:
        UserError: variables that are set in part, are no numbers or contradict each other; several tasks, no rank.
    """
    for read in (_torchrun, _open_mpi, _hydra, _slurm, _pmi):
        place = read(environ)
        if place is not None:
            return place
    return Place()


def find_job(environ: Mapping[str, str]) -> str | None:
    """What a start and its restarts have in common, and no other start: torchrun's, or Slurm's after a requeue.

    None for a process that nothing starts again.
    """
    if "SLURM_JOB_ID" in environ:  # first: a requeued job has another torchrun, but the same number
        return f"Slurm job {environ['SLURM_JOB_ID']}, step {environ.get('SLURM_STEP_ID', 'batch')}"
    if environ.get("TORCHELASTIC_RUN_ID", "none") != "none":
        return f"torchrun {environ['TORCHELASTIC_RUN_ID']}"
    if "TORCHELASTIC_RUN_ID" in environ:  # torchrun without a name of its own: its process stays when a worker dies
        return f"torchrun, process {os.getppid()} of {platform.node()}"
    return None


def count_starts(environ: Mapping[str, str]) -> int:
    """How often Slurm has started this job before; 0 where it does not tell."""
    count = environ.get("SLURM_RESTART_COUNT", "")
    return int(count) if count.isdecimal() else 0


def publish(place: Place, environ: MutableMapping[str, str]) -> None:
    """Says it in torchrun's words, which torch and other libraries read."""
    values = {"RANK": place.rank, "WORLD_SIZE": place.world}
    environ.update({name: str(value) for name, value in values.items()})
    environ.update({"LOCAL_RANK": str(place.local_rank), "LOCAL_WORLD_SIZE": str(place.local_world)})
    if place.master is not None:
        environ.update({"MASTER_ADDR": place.master[0], "MASTER_PORT": str(place.master[1])})


def _torchrun(environ: Mapping[str, str]) -> Place | None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if not any(name in environ for name in names):
        return None
    alone = environ.get("WORLD_SIZE", "").strip() == "1"
    needed = names[:2] if alone else (*names, "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in environ]
    if missing:
        found = [name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if name in environ]
        raise UserError(
            f"{', '.join(found)} {'is' if len(found) == 1 else 'are'} set, but {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not: start with torchrun, or unset "
            f"{', '.join(found)} for a run of one process",
            everywhere=False,
        )
    rank, world, local_rank, local_world = (_number(environ, name, 0 if "RANK" in name else 1) for name in names)
    return _checked(Place(rank, world, local_rank, local_world, _master(environ) if world > 1 else None), names)


def _open_mpi(environ: Mapping[str, str]) -> Place | None:
    ompi = "OMPI_COMM_WORLD_"
    return _of_a_launcher(environ, (f"{ompi}RANK", f"{ompi}SIZE", f"{ompi}LOCAL_RANK", f"{ompi}LOCAL_SIZE"), "mpirun")


def _hydra(environ: Mapping[str, str]) -> Place | None:
    return _pmi(environ) if "MPI_LOCALRANKID" in environ else None


def _pmi(environ: Mapping[str, str]) -> Place | None:
    return _of_a_launcher(environ, ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"), "mpirun")


def _slurm(environ: Mapping[str, str]) -> Place | None:
    size = next((name for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS") if name in environ), None)
    if size is None or _number(environ, size) == 1:
        return None
    tasks = _number(environ, size)
    # A batch script's own shell is rank 0 to Slurm, though nobody started the others.
    in_script = environ.get("ENVIRONMENT") == "BATCH" and "SLURM_STEP_ID" not in environ
    if "SLURM_PROCID" not in environ or in_script:
        raise UserError(
            f"{size} is {tasks}, but this process was not started by srun: use `srun python train.py …` or torchrun, "
            f"or unset {size} for a run of one process",
            everywhere=False,
        )
    environ = {**environ, "_local_size": str(_tasks_on_this_node(environ, tasks))}
    return _of_a_launcher(environ, ("SLURM_PROCID", size, "SLURM_LOCALID", "_local_size"), "srun")


def _of_a_launcher(environ: Mapping[str, str], names: tuple[str, str, str, str], launcher: str) -> Place | None:
    if not any(name in environ for name in names[:2]):
        return None
    if environ.get(names[1], "").strip() == "1":
        return None
    missing = [name for name in names if name not in environ]
    if missing:
        raise UserError(
            f"{launcher} set {' and '.join(name for name in names if name in environ)}, but not "
            f"{', '.join(missing)}: start with {launcher} or torchrun, or unset the former for a run of one process",
            everywhere=False,
        )
    rank, world, local_rank, local_world = (_number(environ, name) for name in names)
    one_host = local_world == world
    return _checked(Place(rank, world, local_rank, local_world, _master(environ, one_host)), names)


def _checked(place: Place, names: tuple[str, ...]) -> Place:
    for low, high in ((place.rank, place.world), (place.local_rank, place.local_world)):
        if not 0 <= low < high:
            values = (place.rank, place.world, place.local_rank, place.local_world)
            told = ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
            raise UserError(
                f"{told.replace('_local_size', 'tasks on this node')} do not fit together", everywhere=False
            )
    if place.local_world > place.world:
        raise UserError(f"{names[3]} {place.local_world} exceeds {names[1]} {place.world}", everywhere=False)
    return place


def _master(environ: Mapping[str, str], one_host: bool = False) -> tuple[str, int]:
    """Where rank 0 listens: as told, else on the first host, at a port that all tasks of the job find alike."""
    host = environ.get("MASTER_ADDR")
    if host is None:
        nodes = next((environ[name] for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
                      if name in environ), None)  # fmt: skip
        if one_host:
            host = "127.0.0.1"
        elif nodes is None:
            raise UserError("these ranks span several hosts: set MASTER_ADDR to the first one's name", everywhere=False)
        else:
            host = first_host(nodes)
    if "MASTER_PORT" in environ:
        port = _number(environ, "MASTER_PORT")
        if not 0 < port < 65536:
            raise UserError(f"MASTER_PORT is {port}, which is no port", everywhere=False)
        return host, port
    # Jobs, and steps of one, may share a host. Ephemeral ports begin at 32768.
    job = " ".join(environ.get(name, "") for name in JOB)
    return host, 20000 + zlib.crc32(job.encode("utf-8", "replace")) % 10000


def first_host(nodes: str) -> str:
    """The first host of Slurm's compact list: ``gpu[07-09,12],login1`` → ``gpu07``."""
    first = re.match(r"([^,\[]*)(?:\[([^,\-\]]*)[^\]]*\])?([^,\[]*)", nodes)
    assert first is not None  # all parts may be empty
    return "".join(part or "" for part in first.groups())


def _tasks_on_this_node(environ: Mapping[str, str], tasks: int) -> int:
    """From ``4(x2),3`` (four tasks on two nodes, three on the next) and this node's number."""
    counts = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE")
    if counts is None:
        nodes = environ.get("SLURM_STEP_NUM_NODES") or environ.get("SLURM_NNODES") or "1"
        return tasks if nodes.strip() == "1" else -(-tasks // _number({"SLURM_NNODES": nodes}, "SLURM_NNODES"))
    each: list[int] = []
    for part in counts.split(","):
        match = re.fullmatch(r"\s*([0-9]+)(?:\(x([0-9]+)\))?\s*", part)
        if match is None:
            raise UserError(f"SLURM_TASKS_PER_NODE is {counts!r}, which is not of Slurm's form", everywhere=False)
        each += [int(match[1])] * int(match[2] or 1)
    node = _number(environ, "SLURM_NODEID", 0)
    if node >= len(each):
        raise UserError(f"SLURM_NODEID {node} is not within SLURM_TASKS_PER_NODE {counts!r}", everywhere=False)
    return each[node]


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name, "" if default is None else str(default))
    if not re.fullmatch(r"\s*[0-9]{1,9}\s*", text):
        raise UserError(f"{name} is {text!r}, which is no number: set it right, or unset it", everywhere=False)
    return int(text)
