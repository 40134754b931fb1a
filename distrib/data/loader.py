"""What every loader yields and promises."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch

from distrib.data.order import EvalPlan, Ids, TrainPlan


class Batch(NamedTuple):
    """One forward's images, on the training device.

    images: uint8 [n, 3, size, size], channels-last in memory, RGB in 0–255; the model's front normalises them, so a
        quarter of the bytes of fp32 travel to the device.
    labels: int64 [n]; -1 for an image that could not be read (evaluation only).
    ids: int64 [n] on the host, the samples as the plan orders them.
    """

    images: torch.Tensor
    labels: torch.Tensor
    ids: Ids


class Loader(Protocol):
    """Batches at any position of the run, at the cost of the position's own batch.

    Threads and worker processes belong to the iterators and end with them.
    """

    def train(self, plan: TrainPlan, first: int, last: int) -> Iterator[Batch]:
        """The batches of steps first … last - 1: ``plan.accumulation`` of them a step."""

    def evaluate(self, plan: EvalPlan) -> Iterator[Batch]:
        """The batches of this rank's share of the validation images, in order."""
