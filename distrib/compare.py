"""Means, spreads and paired t-tests of the values that seeds come to. Imports nothing of ours."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def compare(values: Sequence[float], other: Sequence[float]) -> tuple[float, float] | None:
    """The mean difference of values that belong to the same seeds, and its p; None where there is nothing to tell."""
    differences = [a - b for a, b in zip(values, other, strict=True)]
    if not any(differences) or len(differences) < 2:
        return None
    return statistics.mean(differences), p_value(differences)


def spread(values: Sequence[float]) -> float | None:
    """The standard deviation; None of a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


def mean_and_spread(values: Sequence[float], digits: int) -> str:
    """``45.10 ± 0.20``, or the value alone where there is one."""
    deviation = spread(values)
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if deviation is None else f"{mean} ± {deviation:.{digits}f}"


def show_p(value: float) -> str:
    """A p as it stands in a table."""
    return "< 0.0001" if value < 0.0001 else f"{value:.4f}"


def p_value(differences: Sequence[float]) -> float:
    """Two-sided p of a paired t-test, Student's distribution integrated numerically (Simpson's rule).

    With x = sqrt(free) / tan(angle) the tail beyond t is an integral of sin(angle) ** (free - 1), smooth and over a
    finite range however large t is; as a tail, not as 1 minus the rest, it stays exact where it is small.
    """
    n = len(differences)
    deviation = statistics.stdev(differences)
    if deviation == 0:
        return 0.0
    t, free = abs(statistics.mean(differences)) / (deviation / math.sqrt(n)), n - 1
    scale = math.exp(math.lgamma((free + 1) / 2) - math.lgamma(free / 2)) / math.sqrt(math.pi)
    steps = 10_000
    h = math.atan2(math.sqrt(free), t) / steps
    weights = (1 if k in (0, steps) else 4 if k % 2 else 2 for k in range(steps + 1))
    tail = sum(w * math.sin(k * h) ** (free - 1) for k, w in enumerate(weights)) * h / 3
    return min(1.0, 2 * scale * tail)
