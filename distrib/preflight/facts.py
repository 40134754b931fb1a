"""What a rank finds on its machine, and whether all find the same."""

from __future__ import annotations

import hashlib
import os
import platform
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import distrib
from distrib.config import UserError
from distrib.root import TRAIN
from distrib.runtime import Runtime

PACKAGES = ("torchvision", "nvidia-dali-cuda120", "nvidia-dali-cuda130")  # beside those that tell their own version
NONE = "none"

# Bytes on a rank's GPU that its process did not allocate as tensors: a context, kernels and NCCL's buffers take about
# 1 GiB, and as much on each; a display a few hundred MiB.
MORE_THAN_THE_LEAST, AT_MOST = 1 << 30, 4 << 30


@dataclass(frozen=True)
class Rank:
    """A rank and its machine. ``versions`` must be alike on all ranks, ``machine`` should be.

    ``held``: bytes of the GPU's memory that are in use, but not by this process's tensors; 0 on a CPU, as are
    ``free`` and ``total``.
    """

    rank: int
    local_rank: int
    host: str
    versions: dict[str, str]
    machine: dict[str, str]
    free: int = 0
    total: int = 0
    held: int = 0

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


@dataclass(frozen=True)
class Bad:
    """A rank whose machine is bad, and why: a predicate, such as "has no GPU"."""

    rank: Rank
    reason: str

    def __str__(self) -> str:
        return f"{self.rank} {self.reason}"


def look(runtime: Runtime) -> Rank:
    """What this rank finds."""
    versions = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or NONE,
        "NCCL": _nccl(),
        **{name: _installed(name) for name in PACKAGES},
        "distrib": distrib.__version__,
        "source code": source_checksum(),
    }
    if runtime.device.type != "cuda":
        return Rank(runtime.rank, runtime.local_rank, host(), versions, {"GPU": NONE})
    free, total = torch.cuda.mem_get_info(runtime.device)
    major, minor = torch.cuda.get_device_capability(runtime.device)
    machine = {
        "GPU": torch.cuda.get_device_name(runtime.device),
        "compute capability": f"{major}.{minor}",
        "driver": _driver(),
        "number of visible GPUs": str(torch.cuda.device_count()),
    }
    held = total - free - torch.cuda.memory_reserved(runtime.device)
    return Rank(runtime.rank, runtime.local_rank, host(), versions, machine, free, total, held)


def host() -> str:
    """This machine's name; Slurm's, by which it can be excluded, where there is one."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def group(ranks: Sequence[Rank]) -> list[list[Rank]]:
    """The nodes, in the order of their first ranks, each with its ranks.

    Two agents on one machine are two nodes, though they have one name: there each local rank comes twice.
    """
    nodes: dict[tuple[str, int], list[Rank]] = {}
    seen: Counter[tuple[str, int]] = Counter()
    for rank in ranks:
        place = rank.host, rank.local_rank
        nodes.setdefault((rank.host, seen[place]), []).append(rank)
        seen[place] += 1
    return [sorted(node, key=lambda rank: rank.local_rank) for node in nodes.values()]


def check_versions(ranks: Sequence[Rank]) -> None:
    """Compares what must be alike.

    Raises:
        UserError: a rank has another version than most.
    """
    for name in ranks[0].versions:
        told = _odd(ranks, lambda rank, name=name: rank.versions.get(name, NONE), name)  # type: ignore[misc]
        if told:
            raise UserError(f"preflight: {told}: install the same on all nodes")


def differences(ranks: Sequence[Rank]) -> list[str]:
    """A line for each thing that should be alike and is not."""
    names = dict.fromkeys(name for rank in ranks for name in rank.machine)
    found = (_odd(ranks, lambda rank, name=name: rank.machine.get(name, NONE), name) for name in names)  # type: ignore[misc]
    return [
        f"{told}: the slowest sets the pace" if name == "GPU" else told
        for name, told in zip(names, found, strict=True)
        if told
    ]


def check_gpus(ranks: Sequence[Rank]) -> list[Bad]:
    """The ranks without a GPU where others have one, and those whose GPU other processes use, too."""
    having = [rank for rank in ranks if rank.machine["GPU"] != NONE]
    if not having:
        return []
    bad = [Bad(rank, f"has no GPU, {having[0]} has one") for rank in ranks if rank.machine["GPU"] == NONE]
    bound = min(min(rank.held for rank in having) + MORE_THAN_THE_LEAST, AT_MOST)
    bad += [
        Bad(rank, f"has a GPU of which other processes hold memory: {rank.held / 2**30:.1f} GiB are in use")
        for rank in having
        if rank.held > bound
    ]
    return bad


def source_checksum() -> str:
    """Of the package's sources and train.py, by their names: 12 digits of their SHA-256."""
    package = Path(distrib.__file__).resolve().parent
    state = hashlib.sha256()
    for file in [*sorted(package.rglob("*.py")), TRAIN]:
        content = file.read_bytes() if file.is_file() else b""
        name = os.fsencode(os.path.relpath(file, package))
        state.update(b"%d %s %d " % (len(name), name, len(content)) + content)
    return state.hexdigest()[:12]


def _odd(ranks: Sequence[Rank], value: Callable[[Rank], str], name: str) -> str:
    """Which rank has another value than most, for a person; nothing where all have the same."""
    counts = Counter(map(value, ranks))
    if len(counts) == 1:
        return ""
    usual, having = counts.most_common(1)[0]  # of equally many, the one of the lowest rank
    odd = [rank for rank in ranks if value(rank) != usual]
    more = f" (one of {len(odd)} ranks that differ)" if len(odd) > 1 else ""
    with_it = next(rank for rank in ranks if value(rank) == usual)
    others = f"{with_it} has {usual}" if having == 1 else f"{having} ranks have {usual}"
    return f"{odd[0]} has {name} {value(odd[0])}{more}, {others}"


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return NONE


def _nccl() -> str:
    if not torch.distributed.is_nccl_available():
        return NONE
    return ".".join(map(str, torch.cuda.nccl.version()))


def _driver() -> str:
    """NVIDIA's kernel module says it there; a container may hide it."""
    try:
        return Path("/sys/module/nvidia/version").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return "unknown"
