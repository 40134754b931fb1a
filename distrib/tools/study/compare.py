"""Means, spreads and paired t-tests of the seeds' values, and tables of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

Against = Callable[[str], str | None]  # what a variant is compared with


def compare(values: Sequence[float], other: Sequence[float]) -> tuple[float, float] | None:
    """The mean difference of values that belong to the same seeds, and its p; None where there is nothing to tell."""
    differences = [a - b for a, b in zip(values, other, strict=True)]
    if not any(differences) or len(differences) < 2:
        return None
    return statistics.mean(differences), p_value(differences)


def spread(values: Sequence[float]) -> float | None:
    """The standard deviation; None of a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


def table(name: str, values: Mapping[str, Sequence[float]], against: Against, digits: int = 2) -> str:
    """Mean and standard deviation of each variant, and how it differs from another one, paired by seed."""
    lines = [
        f"| variant | {name} | standard deviation | seeds | difference | to | p |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant, own in values.items():
        deviation = spread(own)
        row = [
            variant,
            f"{statistics.mean(own):.{digits}f}",
            "" if deviation is None else f"{deviation:.{digits}f}",
            ", ".join(f"{value:.{digits}f}" for value in own),
        ]
        other = against(variant)
        found = compare(own, values[other]) if other is not None else None
        row += ["", "", ""] if found is None else [f"{found[0]:+.{digits}f}", str(other), _p(found[1])]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def _p(value: float) -> str:
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
