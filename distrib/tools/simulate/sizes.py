"""What a rank's tensors and a checkpoint take, in bytes, counted on a network of which the shapes alone must exist."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from distrib.engine.state import ROWS_UP_TO, statistics_of

DOUBLE = 8  # bytes; the ranks' statistics are summed so


@dataclass(frozen=True)
class Sizes:
    """Bytes.

    Attributes:
        parameters: of the network, fp32.
        gradients: of the parameters that are trained; DDP's buckets, which every step reduces.
        momentum: of the parameters that are trained; 0 without momentum.
        ema: the moving average, batch-norm statistics included; 0 without.
        buffers: batch-norm statistics and counters.
        statistics: one rank's own batch-norm statistics, the average's included.
        rows: all ranks' statistics, on rank 0 and in a checkpoint; 0 where the mean alone is kept.
        checkpoint: the tensors in one, ``rows`` included.
    """

    parameters: int
    gradients: int
    momentum: int
    ema: int
    buffers: int
    statistics: int
    rows: int
    checkpoint: int

    @property
    def device(self) -> int:
        """On each device, from the first step to the last."""
        return self.parameters + self.gradients + self.momentum + self.ema + self.buffers

    @property
    def mean(self) -> int:
        """What an evaluation and a save sum over the ranks for the statistics' mean."""
        return self.statistics // torch.float32.itemsize * DOUBLE


def measure(network: nn.Module, world: int, ema: bool, momentum: bool) -> Sizes:
    """Of ``network`` in training mode, its frozen stages frozen, trained on ``world`` ranks with or without the two."""
    state = network.state_dict()
    averages = 1 if ema else 0
    statistics = (1 + averages) * _bytes(state[key] for key in statistics_of(network))
    trained = _bytes(p for p in network.parameters() if p.requires_grad)
    velocity = trained if momentum else 0
    rows = world * statistics if world <= ROWS_UP_TO else 0
    return Sizes(
        parameters=_bytes(network.parameters()),
        gradients=trained,
        momentum=velocity,
        ema=averages * _bytes(tensor for tensor in state.values() if tensor.is_floating_point()),
        buffers=_bytes(network.buffers()),
        statistics=statistics,
        rows=rows,
        checkpoint=(1 + averages) * _bytes(state.values()) + velocity + rows,
    )


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
