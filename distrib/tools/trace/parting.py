"""Where two runs part first. Pure: steps in, findings out.

As long as both run on as many ranks, each rank's line is compared to the bit. From the first step at which they do not,
sums have another order and batch norms other batches: then the global batch alone has to be the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

from distrib.tools.trace.files import Seen, Step

LISTS, NUMBERS = ("ids", "draws"), ("loss", "gradient_norm")


@dataclass
class Spans:
    """Steps in the order they came, as ranges."""

    ranges: list[tuple[int, int]] = field(default_factory=list)  # first and last
    count: int = 0

    def add(self, step: int) -> None:
        """Takes one more, higher than those before."""
        self.count += 1
        if self.ranges and self.ranges[-1][1] == step - 1:
            self.ranges[-1] = (self.ranges[-1][0], step)
        else:
            self.ranges.append((step, step))

    def __str__(self) -> str:
        return ", ".join(f"{first}" if first == last else f"{first} to {last}" for first, last in self.ranges)


@dataclass(frozen=True)
class Parting:
    """What first was another: at ``step``, on ``rank`` (None: in the global batch), ``what`` of LISTS and NUMBERS.

    ``a`` and ``b`` are the values, of a list those at ``place``, counted from 0, None where one of them has ended;
    ``of`` is how many stand there (the longer one), ``others`` how many of them differ.
    """

    step: int
    rank: int | None
    what: str
    a: str | int | None
    b: str | int | None
    place: int = 0
    of: int = 0
    others: int = 0


@dataclass
class Comparison:
    """What was found.

    Attributes:
        alike: the steps before the runs part, or all that both have.
        only: those that stand in A, or in B, alone, as far as was read.
        partings: of the first step that differs; none where all is alike.
        worlds: the numbers of ranks that were met, in A and in B.
        exact: whether losses and norms were to agree to the bit, at all steps.
        norms: whether all steps that were looked at had their gradient norm.
        largest: where not ``exact``, the greatest relative difference of a number, and its step.
    """

    alike: Spans = field(default_factory=Spans)
    only: tuple[Spans, Spans] = field(default_factory=lambda: (Spans(), Spans()))
    partings: list[Parting] = field(default_factory=list)
    worlds: tuple[set[int], set[int]] = field(default_factory=lambda: (set(), set()))
    exact: bool = True
    norms: bool = True
    largest: dict[str, tuple[float, int]] = field(default_factory=dict)


def pairs(a: Iterator[Step], b: Iterator[Step]) -> Iterator[tuple[Step | None, Step | None]]:
    """The steps of both side by side, ascending; None for one that stands in the other alone."""
    left, right = next(a, None), next(b, None)
    while left is not None or right is not None:
        behind = right is None or (left is not None and left.number < right.number)
        ahead = left is None or (right is not None and right.number < left.number)
        yield (None if ahead else left), (None if behind else right)
        left, right = (left if ahead else next(a, None)), (right if behind else next(b, None))


def compare(steps: Iterator[tuple[Step | None, Step | None]]) -> Comparison:
    """Compares up to the first step at which the runs part."""
    found = Comparison()
    for a, b in steps:
        if a is None or b is None:
            present = a or b
            assert present is not None
            found.only[0 if b is None else 1].add(present.number)
            continue
        for worlds, step in zip(found.worlds, (a, b), strict=True):
            worlds.add(len(step.lines))
        found.exact = found.exact and a.lines.keys() == b.lines.keys()
        found.partings = _ranks(found, a, b) if found.exact else _whole(found, a, b)
        if found.partings:
            break
        found.alike.add(a.number)
    return found


def _ranks(found: Comparison, a: Step, b: Step) -> list[Parting]:
    """Rank by rank, to the bit."""
    partings = []
    for rank in sorted(a.lines):
        one, other = a.lines[rank], b.lines[rank]
        if one.raw == other.raw and found.alike.count:  # of the first step it is to be seen whether it has norms
            continue
        x, y = one.seen(), other.seen()
        partings += _lists(a.number, rank, x, y)
        for what in _numbers(found, x, y):
            if getattr(x, what) != getattr(y, what):
                partings.append(Parting(a.number, rank, what, getattr(x, what), getattr(y, what)))
    return partings


def _whole(found: Comparison, a: Step, b: Step) -> list[Parting]:
    """The global batch, over the ranks in order; losses and norms are measured only."""
    x, y = (list(step.seen().values()) for step in (a, b))
    one, other = (
        Seen(list(chain.from_iterable(s.ids for s in seen)), list(chain.from_iterable(s.draws for s in seen)), "", None)
        for seen in (x, y)
    )
    for what in _numbers(found, *x, *y):
        left, right = (_total(seen, what) for seen in (x, y))
        gap = relative(left, right)
        if what not in found.largest or gap > found.largest[what][0]:
            found.largest[what] = (gap, a.number)
    return _lists(a.number, None, one, other)


def _numbers(found: Comparison, *seen: Seen) -> tuple[str, ...]:
    found.norms = found.norms and all(each.gradient_norm is not None for each in seen)
    return NUMBERS if found.norms else NUMBERS[:1]


def _total(seen: list[Seen], what: str) -> float:
    """The ranks' summed loss, or the norm, which is of the global batch already."""
    return (
        math.fsum(float.fromhex(s.loss) for s in seen) if what == "loss" else float.fromhex(str(seen[0].gradient_norm))
    )


def _lists(step: int, rank: int | None, x: Seen, y: Seen) -> list[Parting]:
    partings = []
    for what in LISTS:
        one, other = getattr(x, what), getattr(y, what)
        if one == other:
            continue
        of = max(len(one), len(other))
        one, other = ([*values, *[None] * (of - len(values))] for values in (one, other))
        places = [k for k in range(of) if one[k] != other[k]]
        partings.append(Parting(step, rank, what, one[places[0]], other[places[0]], places[0], of, len(places)))
    return partings


def relative(a: float, b: float) -> float:
    """The difference as a part of the larger one; infinite where only one is a finite number."""
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    return abs(a - b) / max(abs(a), abs(b)) if math.isfinite(a) and math.isfinite(b) else math.inf
