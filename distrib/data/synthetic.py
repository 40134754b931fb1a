"""Random images that live on the device: the speed of the model without a data path."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from distrib.config import DataConfig, settled
from distrib.data.loader import Batch
from distrib.data.order import EvalPlan, Slice, TrainPlan


class SyntheticLoader:
    """Yields slices of one fixed batch. Labels follow the sample's id, so they are the same at every world size."""

    def __init__(self, cfg: DataConfig, classes: int, device: torch.device) -> None:
        self._cfg, self._classes, self._device = cfg, classes, device
        self._pool = torch.empty(0)

    def train(self, plan: TrainPlan, first: int, last: int) -> Iterator[Batch]:
        """The batches of steps first … last - 1."""
        return self._batches(plan.stream(first, last), plan.largest_slice, self._cfg.size)

    def evaluate(self, plan: EvalPlan) -> Iterator[Batch]:
        """The batches of this rank's share of the validation images."""
        return self._batches(plan.slices(), plan.batch, settled(self._cfg.eval_size))

    def _batches(self, slices: Iterable[Slice], largest: int, size: int) -> Iterator[Batch]:
        if self._pool.shape[:1] != (largest,) or self._pool.shape[-1] != size:
            generator = torch.Generator().manual_seed(0)
            pool = torch.randint(256, (largest, 3, size, size), dtype=torch.uint8, generator=generator)
            self._pool = pool.to(self._device, memory_format=torch.channels_last)
        pool = self._pool
        for part in slices:
            labels = torch.from_numpy(part.ids % self._classes).to(self._device, non_blocking=True)
            yield Batch(pool[: len(part.ids)], labels, part.ids)
