"""How far the machines' clocks are apart."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from distrib.runtime import Runtime

LARGEST_SKEW = 5.0  # seconds; beyond it lines of two nodes' logs can not be put in order by eye
ROUNDS = 5

Times = Sequence[tuple[float, float]]  # of one rank: before and after each barrier, by its own clock


@dataclass(frozen=True)
class Clock:
    """Seconds by which a rank's clock is ahead of the middle one, and how far from that it may be at most."""

    skew: float
    accuracy: float


def compare_clocks(runtime: Runtime) -> list[Clock]:
    """Each rank's clock, in rank order, on all ranks; all must call it."""
    times = []
    for _ in range(ROUNDS):
        before = wall_clock()
        runtime.barrier()
        times.append((before, wall_clock()))
    return judge(runtime.gather_objects(times))


def judge(ranks: Sequence[Times]) -> list[Clock]:
    """Each rank's clock from when all came to, and left, the same barriers.

    Nobody leaves a barrier before the last one has come. So rank i's time of leaving is later than rank j's of coming,
    whatever their clocks say, and the other way round: that bounds i's clock against j's from both sides, and the
    narrowest of the rounds counts. The accuracy is half of what is left: about the time that a barrier takes.
    """
    offsets, accuracies = [], []
    for times in ranks:
        low = max(before - first_after for (before, _), (_, first_after) in zip(times, ranks[0], strict=True))
        high = min(after - first_before for (_, after), (first_before, _) in zip(times, ranks[0], strict=True))
        offsets.append((low + high) / 2)
        accuracies.append(abs(high - low) / 2)
    offsets[0] = accuracies[0] = 0.0  # a clock against itself
    ordered = sorted(offsets)
    middle = min(ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2], key=abs)  # of two, rank 0's
    return [Clock(offset - middle, accuracy) for offset, accuracy in zip(offsets, accuracies, strict=True)]


def wall_clock() -> float:
    """Seconds since 1970, as this machine thinks."""
    return time.time()
