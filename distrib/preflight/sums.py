"""An all-reduce whose result is known, and its bandwidth."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

import torch
import torch.distributed as dist

from distrib.preflight.watch import Watch
from distrib.runtime import Runtime

# fp32 numbers in the all-reduce: 64 MiB on GPUs, more than half of ResNet-50's gradients (25.6 million parameters),
# where a ring is at its full speed; on CPUs 4 MiB, as gloo has a hundredth of that speed.
NUMBERS = {"cuda": 1 << 24, "cpu": 1 << 20}
PERIOD = 127  # of the pattern; its numbers are small, so that fp32 holds and adds them exactly
MOST_TRIES, TIMING_SECONDS = 10, 1.0


def wrong_parts(runtime: Runtime, watch: Watch) -> list[list[int]]:
    """For each rank the ranks whose part of the sum is wrong there; the same on all ranks, which all must call it.

    Each rank adds numbers that only it can have added, in a part of its own, where the others add zeros. So the sum is
    exact in any order, and a wrong number tells whose part it stands in.
    """
    shape = runtime.world, max(1, NUMBERS[runtime.device.type] // runtime.world)
    rows, columns = (torch.arange(size, dtype=torch.int32, device=runtime.device) for size in shape)
    expected = ((columns + 31 * rows[:, None]) % PERIOD + 1).float()
    total = torch.zeros_like(expected)
    total[runtime.rank] = expected[runtime.rank]
    add_up(total)
    wrong = (total != expected).any(dim=1).nonzero().flatten().tolist()
    watch("a wait for the other ranks' sums")
    return runtime.gather_objects(wrong)


def wrong_ranks(parts: Sequence[Sequence[int]]) -> list[tuple[int, str]]:
    """Who is to blame for wrong parts, and of what: whose part most ranks find wrong, else who finds one wrong."""
    seen = Counter(part for found in parts for part in found)
    giving = sorted(part for part, times in seen.items() if 2 * times > len(parts))
    if giving:
        return [(rank, "adds wrong numbers to the all-reduce") for rank in giving]
    return [(rank, "gets wrong numbers from the all-reduce") for rank, found in enumerate(parts) if found]


def bus_bandwidth(runtime: Runtime) -> float:
    """The all-reduce's bus bandwidth in GB/s (10^9 bytes), the same on all ranks, which all must call it.

    As nccl-tests define it (doc/PERFORMANCE.md there): bytes / seconds × 2 (n − 1) / n, which the slowest link bounds
    whatever the number n of ranks. The slowest rank's time counts.
    """
    numbers = torch.zeros(NUMBERS[runtime.device.type], device=runtime.device)
    tries, seconds = 1, 0.0
    for _ in range(2):  # the first tells how many the second can afford
        runtime.barrier()
        synchronize(runtime)
        began = time.perf_counter()
        for _ in range(tries):
            add_up(numbers)
        synchronize(runtime)
        seconds = max(runtime.gather_objects(time.perf_counter() - began)) / tries
        tries = max(1, min(MOST_TRIES, int(TIMING_SECONDS / seconds)))
    return numbers.nbytes / seconds * 2 * (runtime.world - 1) / runtime.world / 1e9


def add_up(tensor: torch.Tensor) -> None:
    """Sums over all ranks, in place, as DDP does: NCCL's on GPUs, else gloo's."""
    dist.all_reduce(tensor)


def synchronize(runtime: Runtime) -> None:
    """Waits for the device, where it runs beside the host."""
    if runtime.device.type == "cuda":
        torch.cuda.synchronize(runtime.device)
