"""Which sample stands where: pure functions of (seed, epoch, position), the same at every world size.

Nothing here advances, so a resumed run has nothing to replay: the batch of any step costs the same to find.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distrib.config import TrainConfig, UserError

Ids = npt.NDArray[np.int64]

ROUNDS = 8


def permute(positions: Ids, count: int, seed: int, epoch: int) -> Ids:
    """The samples at ``positions`` of an epoch's random order of ``count`` samples.

    A keyed bijection of range(count), evaluated only where asked: a shuffled array of ImageNet's 1.28 million ids
    costs about 30 ms and 10 MB a rank each epoch, this under 2 ms for a slice of 4,096 (one Xeon core, 2026-11-22;
    `python -m distrib.tools.bench index` compares them). It is a balanced Feistel network over the next power of four,
    walked until the value falls below ``count`` (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002: the
    method behind tf.random.experimental.index_shuffle too).

    Args:
        positions: int64, any shape, each in [0, count).

    Returns:
        int64 of the same shape.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    keys = np.random.Generator(np.random.Philox(key=[seed, 0], counter=[0, epoch, 0, 0])).integers(
        2**64, size=ROUNDS, dtype=np.uint64
    )
    values = positions.astype(np.uint64).reshape(-1)
    outside = np.arange(values.size)
    while outside.size:
        moved = _feistel(values[outside], np.uint64(half), keys)
        values[outside] = moved
        outside = outside[moved >= count]
    return values.astype(np.int64).reshape(positions.shape)


def _feistel(values: npt.NDArray[np.uint64], half: np.uint64, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << half) | right


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class Slice:
    """One forward's share of a step: ``positions`` of ``epoch`` hold the samples ``ids`` (int64 [n])."""

    epoch: int
    positions: range
    ids: Ids


@dataclass(frozen=True)
class TrainPlan:
    """What this rank trains on at each step: ``accumulation`` slices of the step's global batch.

    The global batch of a step is the same at every world size. Ranks' shares, and the slices of a share, differ by
    at most one sample. Each epoch leaves out the remainder that fills no batch, another one each time.
    """

    images: int
    global_batch: int
    seed: int
    rank: int = 0
    world: int = 1
    accumulation: int = 1

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch."""
        return self.images // self.global_batch

    def steps_in(self, epochs: float) -> int:
        """The nearest number of steps, one at least."""
        return max(1, round(epochs * self.steps_per_epoch))

    def length(self, epochs: float, steps: int | None) -> int:
        """Steps of a run of so many epochs, or of ``steps``."""
        return steps or self.steps_in(epochs)

    @property
    def largest_slice(self) -> int:
        """The most images that any rank sees in one forward."""
        share = -(-self.global_batch // self.world)
        return -(-share // self.accumulation)

    @property
    def smallest_slice(self) -> int:
        """The fewest images that any rank sees in one forward."""
        return self.global_batch // self.world // self.accumulation

    @property
    def slice_sizes(self) -> tuple[int, ...]:
        """The distinct sizes of this rank's slices, largest first: one or two, the same ones at every step."""
        share = split(range(self.global_batch), self.rank, self.world)
        sizes = {len(split(share, k, self.accumulation)) for k in range(self.accumulation)}
        return tuple(sorted(sizes, reverse=True))

    def slices(self, step: int) -> list[Slice]:
        """This rank's slices of step ``step`` (counted from 0 over all epochs), in order."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        share = split(range(batch * self.global_batch, (batch + 1) * self.global_batch), self.rank, self.world)
        parts = [split(share, k, self.accumulation) for k in range(self.accumulation)]
        return [Slice(epoch, p, permute(np.arange(p.start, p.stop), self.images, self.seed, epoch)) for p in parts]

    def stream(self, first: int, last: int) -> Iterator[Slice]:
        """The slices of steps first … last - 1, one after the other."""
        for step in range(first, last):
            yield from self.slices(step)


@dataclass(frozen=True)
class EvalPlan:
    """Which images this rank evaluates: every ``world``-th batch of ``batch`` images.

    The batches' borders do not depend on the world size. The same images therefore meet in the same batch at every
    world size, which a 16-bit network needs to give the same answer; each image is in one batch, the last is short.
    """

    images: int
    batch: int
    rank: int = 0
    world: int = 1

    @property
    def rounds(self) -> int:
        """Batches of the busiest rank; every rank counts so many, so that all can agree after each."""
        batches = -(-self.images // self.batch)
        return -(-batches // self.world)

    def slices(self) -> list[Slice]:
        """This rank's batches, in order; at most ``rounds``."""
        starts = range(self.rank * self.batch, self.images, self.world * self.batch)
        ranges = [range(start, min(start + self.batch, self.images)) for start in starts]
        return [Slice(0, r, np.arange(r.start, r.stop)) for r in ranges]


def split(whole: range, part: int, parts: int) -> range:
    """Part ``part`` of ``parts`` of a range, in sizes that differ by at most one."""
    count = len(whole)
    return whole[part * count // parts : (part + 1) * count // parts]


def make_plans(
    cfg: TrainConfig, seed: int, images: tuple[int, int], eval_batch: int, rank: int, world: int
) -> tuple[TrainPlan, EvalPlan]:
    """What rank ``rank`` of ``world`` trains on and evaluates; ``images``: to train on, and to evaluate.

    Raises:
        UserError: more ranks than images, or than images in a batch.
    """
    batch, (train, val) = cfg.global_batch, images
    if world > train:
        raise UserError(f"the {world} processes are more than the {train} training images: start fewer")
    if world > batch:
        raise UserError(f"train.global_batch {batch} is smaller than the {world} processes: raise it, or start fewer")
    accumulation = min(-(-batch // (world * (cfg.micro_batch or batch))), batch // world)
    return TrainPlan(train, batch, seed, rank, world, accumulation), EvalPlan(val, eval_batch, rank, world)
