"""One training step. Nothing in it waits for the device."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from distrib.data.loader import Batch
from distrib.optim.ema import Ema


class StepResult(NamedTuple):
    """What a step tells of itself, on the device.

    loss: this rank's summed loss, fp32 [].
    right: how many of this rank's images were classified right, int64 [].
    gradient_norm: L2 norm of the global batch's mean gradient over all parameters, before clipping, fp32 [], equal on
        all ranks; None where it was not measured. Not finite in a step that the loss scaler skips.
    """

    loss: torch.Tensor
    right: torch.Tensor
    gradient_norm: torch.Tensor | None = None


class TrainStep:
    """Forward and backward over the step's slices, then optimizer and EMA.

    Each image's loss counts 1 / global_batch, however the batch is cut into ranks and slices: DDP divides the
    gradients by ``world``, so the summed loss of a slice is weighted with world / global_batch.
    """

    def __init__(
        self,
        call: Any,
        ddp: Any,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        ema: Ema | None,
        *,
        world: int,
        global_batch: int,
        clip_grad_norm: float | None = None,
    ) -> None:
        self._call, self._ddp, self._optimizer, self._scaler, self._ema = call, ddp, optimizer, scaler, ema
        self._weight = world / global_batch
        self._clip = clip_grad_norm
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def __call__(self, batches: Sequence[Batch], step: int, lr: float, measure_norm: bool = False) -> StepResult:
        """Trains step ``step``, counted from 0; ``measure_norm``: also where nothing is clipped."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group.get("lr_factor", 1.0)
        losses, counts = [], []
        for k, batch in enumerate(batches):
            # Gradients are reduced once a step, in the last backward.
            local_only = self._ddp is not None and k < len(batches) - 1
            with self._ddp.no_sync() if local_only else nullcontext():
                loss, right = self._call(batch.images, batch.labels)
                self._scaler.scale(loss * self._weight).backward()
            losses.append(loss.detach())
            counts.append(right)
        norm = self._clip_and_measure() if measure_norm or self._clip is not None else None
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        if self._ema is not None and (step + 1) % self._ema.every == 0:
            self._ema.update()
        return StepResult(_sum(losses), _sum(counts), norm)

    def _clip_and_measure(self) -> torch.Tensor:
        """The norm of the gradient, which is unscaled for it and then clipped where that is asked for."""
        self._scaler.unscale_(self._optimizer)
        if self._clip is not None:
            return torch.nn.utils.clip_grad_norm_(self._parameters, self._clip, foreach=True)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients, foreach=True)


def _sum(values: Sequence[torch.Tensor]) -> torch.Tensor:
    return values[0] if len(values) == 1 else torch.stack(list(values)).sum()
