"""How fast each node sends and receives, measured between pairs of nodes, so that a slow one can be named.

Nodes form a ring, and neighbours exchange in pairs: half of them at once, then the others, so that the time does not
grow with their number. A node is as good as the better of its two links. One that looks slow exchanges again, more
often, with one that is fast: what was its neighbour's fault, or a moment's, does not stay on it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median_high

import torch
import torch.distributed as dist

from distrib.preflight.sums import synchronize
from distrib.preflight.watch import Watch
from distrib.runtime import Runtime

NUMBERS = {"cuda": 1 << 24, "cpu": 1 << 20}  # fp32 numbers each way: 64 MiB between GPUs, 4 MiB between CPUs
SLOW = 0.5  # of the median
SPARED = {"cuda": 0.0, "cpu": 0.1}  # seconds: gloo's threads share the cores with other work
TRIES, MORE_TRIES, SECONDS_AGAIN = 3, 200, 1.0
MOST_ROUNDS = 4  # to measure slow links again: with one slow link one is enough
FEWEST = 3  # nodes: of two, who is to say which one is slow

Pair = tuple[int, int]  # of nodes


@dataclass
class Links:
    """What was measured between ``nodes`` nodes: GB/s (10^9 bytes) each way, of both ways at once, by pair.

    So many ``bytes`` go each way; what is later than the median by ``spared`` seconds only is not slow.
    """

    nodes: int
    speeds: dict[Pair, float] = field(default_factory=dict)
    bytes: int = 0
    spared: float = 0.0

    def by_node(self) -> list[float | None]:
        """The speed of each node's best link; None where there is one node."""
        best: list[float | None] = [None] * self.nodes
        for pair, speed in self.speeds.items():
            for node in pair:
                best[node] = max(speed, best[node] or 0.0)
        return best

    @property
    def median(self) -> float:
        """Half of the nodes are so fast at least."""
        return median_high(speed or 0.0 for speed in self.by_node())

    @property
    def bound(self) -> float:
        """What is less is slow; 0 where there are too few nodes to say."""
        median = self.median if self.nodes >= FEWEST else 0.0
        slower = median / (1 + self.spared * median * 1e9 / self.bytes) if self.bytes else median
        return min(SLOW * median, slower)

    def slow(self) -> list[int]:
        """The nodes that are slow with all that they were measured with, slowest first."""
        bound, best = self.bound, [speed or 0.0 for speed in self.by_node()]
        return sorted((node for node in range(self.nodes) if best[node] < bound), key=lambda node: best[node])

    def slow_nodes(self) -> list[tuple[int, str]]:
        """The same, with the reason."""
        best = self.by_node()
        return [
            (node, f"sends and receives {best[node]:.3g} GB/s, half of the nodes {self.median:.3g} or more")
            for node in self.slow()
        ]

    def slow_links(self) -> list[tuple[Pair, float]]:
        """The slow links between nodes that are not slow."""
        slow, bound = set(self.slow()), self.bound
        return [(pair, speed) for pair, speed in self.speeds.items() if speed < bound and not slow & set(pair)]

    def doubtful(self) -> list[Pair]:
        """Each slow node with a fast one of its own: at least half are fast."""
        slow, best = self.slow(), self.by_node()
        fast = sorted((n for n in range(self.nodes) if n not in slow), key=lambda n: best[n] or 0.0, reverse=True)
        return list(zip(slow, fast, strict=False))

    def note(self, speeds: dict[Pair, float]) -> None:
        """Keeps the better of what is known and of ``speeds``, whichever way round the pairs are."""
        for (a, b), speed in speeds.items():
            known = (b, a) if (b, a) in self.speeds else (a, b)
            self.speeds[known] = max(speed, self.speeds.get(known, 0.0))


def ring(nodes: int) -> list[list[Pair]]:
    """The pairs of neighbours, in rounds of pairs that share no node."""
    rounds = [[(k, k + 1) for k in range(begin, nodes - 1, 2)] for begin in (0, 1)]
    if nodes > 2:
        rounds.append([(nodes - 1, 0)])
    return [pairs for pairs in rounds if pairs]


def in_rounds(pairs: Iterable[Pair]) -> list[list[Pair]]:
    """The same pairs, in rounds of pairs that share no node."""
    rounds: list[list[Pair]] = []
    for pair in pairs:
        free = next((r for r in rounds if not any(set(pair) & set(other) for other in r)), None)
        if free is None:
            rounds.append(free := [])
        free.append(pair)
    return rounds


def measure(runtime: Runtime, firsts: Sequence[int], watch: Watch) -> Links:
    """Measures between the first ranks of the nodes, ``firsts``; the same on all ranks, which all must call it."""
    kind = runtime.device.type
    links = Links(len(firsts), bytes=4 * NUMBERS[kind], spared=SPARED[kind])

    def exchange(pairs: Sequence[Pair], tries: int) -> None:
        links.note(_exchange(runtime, firsts, pairs, tries, watch))

    for pairs in ring(len(firsts)):
        exchange(pairs, TRIES)
    # In a second all together, as the slowest was measured; a slow link is one only with nodes that are not.
    more = max(TRIES, min(MORE_TRIES, int(SECONDS_AGAIN * min(links.speeds.values(), default=0.0) * 1e9 / links.bytes)))
    if doubtful := links.doubtful():
        exchange(doubtful, more)
    for pairs in in_rounds(pair for pair, _ in links.slow_links())[:MOST_ROUNDS]:
        exchange(pairs, more)
    return links


def _exchange(
    runtime: Runtime, firsts: Sequence[int], pairs: Sequence[Pair], tries: int, watch: Watch
) -> dict[Pair, float]:
    """Measures these pairs at once; the best try counts, after one that does not."""
    peer = next((b if runtime.rank == a else a for a, b in _ranks(firsts, pairs) if runtime.rank in (a, b)), None)
    seconds = 0.0
    if peer is not None:
        watch(f"the exchange with rank {peer}")
        numbers = NUMBERS[runtime.device.type]
        ours, theirs = torch.zeros(numbers, device=runtime.device), torch.empty(numbers, device=runtime.device)
        times = []
        for _ in range(tries + 1):
            synchronize(runtime)
            began = time.perf_counter()
            transfer(ours, theirs, peer)
            synchronize(runtime)
            times.append(time.perf_counter() - began)
        seconds = min(times[1:])
    watch("a wait for the other nodes' exchanges")
    by_rank = runtime.gather_objects(seconds)
    size = 4 * NUMBERS[runtime.device.type]
    return {
        pair: size / max(by_rank[a], by_rank[b]) / 1e9
        for pair, (a, b) in zip(pairs, _ranks(firsts, pairs), strict=True)
    }


def _ranks(firsts: Sequence[int], pairs: Sequence[Pair]) -> list[Pair]:
    return [(firsts[a], firsts[b]) for a, b in pairs]


def transfer(ours: torch.Tensor, theirs: torch.Tensor, peer: int) -> None:
    """Sends ``ours`` to rank ``peer`` while ``theirs`` comes from it.

    As one batch it goes over the communicator that the all-reduce has made: NCCL makes none for the pair. Two of all
    ranks may do that only after a collective of all (torch's page on ``batch_isend_irecv``).
    """
    both = [dist.P2POp(dist.isend, ours, peer), dist.P2POp(dist.irecv, theirs, peer)]
    for work in dist.batch_isend_irecv(both):
        work.wait()
