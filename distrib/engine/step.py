"""One training step. Nothing in it waits for the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from distrib.data.loader import Batch
from distrib.engine.guard import Guard
from distrib.optim.ema import Ema


class StepResult(NamedTuple):
    """What a step tells of itself, on the device.

    loss: this rank's summed loss, fp32 [].
    right: how many of this rank's images were classified right, int64 [].
    gradient_norm: L2 norm of the global batch's mean gradient over all parameters, before clipping, fp32 [], equal on
        all ranks; None where it was not asked for. Not finite in a step that is skipped.
    gradient_norms: the same of each parameter alone, fp32 [``TrainStep.names``]; None where it was not asked for.
    skipped: whether the step was passed over, as gradient or loss were no numbers: bool [], equal on all ranks.
    """

    loss: torch.Tensor
    right: torch.Tensor
    gradient_norm: torch.Tensor | None = None
    gradient_norms: torch.Tensor | None = None
    skipped: torch.Tensor | None = None


class TrainStep:
    """Forward and backward over the step's slices, then optimizer and EMA.

    Each image's loss counts 1 / global_batch, however the batch is cut into ranks and slices: DDP divides the
    gradients by ``world``, so the summed loss of a slice is weighted with world / global_batch.

    The gradient's norm decides whether the step is taken (``engine.guard``), so it is measured in each: one pass over
    the gradients, which clipping needs anyway.
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
        layers: Mapping[str, torch.nn.Parameter] | None = None,
        guard: Guard | None = None,
    ) -> None:
        """``layers``: parameters whose own norms are measured where asked for; those that train alone count.

        ``guard``: by default one for a network without statistics.
        """
        self._call, self._ddp, self._optimizer, self._scaler, self._ema = call, ddp, optimizer, scaler, ema
        self._weight = world / global_batch
        self._clip = clip_grad_norm
        self._guard = guard or Guard(optimizer)
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._layers = {name: p for name, p in (layers or {}).items() if p.requires_grad}

    @property
    def names(self) -> tuple[str, ...]:
        """Which parameters ``StepResult.gradient_norms`` belong to."""
        return tuple(self._layers)

    def __call__(self, batches: Sequence[Batch], step: int, lr: float, measure_norm: bool = False) -> StepResult:
        """Trains step ``step``, counted from 0; ``measure_norm``: tells the norm also where nothing is clipped."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group.get("lr_factor", 1.0)
        losses, counts = [], []
        self._guard.remember()
        for k, batch in enumerate(batches):
            # Gradients are reduced once a step, in the last backward.
            local_only = self._ddp is not None and k < len(batches) - 1
            with self._ddp.no_sync() if local_only else nullcontext():
                loss, right = self._call(batch.images, batch.labels)
                self._scaler.scale(loss * self._guard.weigh(loss, self._weight)).backward()
            losses.append(loss.detach())
            counts.append(right)
        self._scaler.unscale_(self._optimizer)
        norms = self._measure_layers() if measure_norm and self._layers else None
        norm = self._clip_and_measure()
        skipped = self._guard.judge(norm)
        average_due = self._ema is not None and (step + 1) % self._ema.every == 0
        self._guard.update(skipped, self._ema if average_due else None)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        told = norm if measure_norm or self._clip is not None else None
        return StepResult(_sum(losses), _sum(counts), told, norms, skipped)

    def _clip_and_measure(self) -> torch.Tensor:
        """The norm of the gradient, which is then clipped where that is asked for."""
        if self._clip is not None:
            return torch.nn.utils.clip_grad_norm_(self._parameters, self._clip, foreach=True)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients, foreach=True)

    def _measure_layers(self) -> torch.Tensor:
        """The norm of each layer's gradient, before it is clipped; 0 for one that the loss does not depend on."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._layers.values()]
        return torch.stack(torch._foreach_norm(gradients))


def _sum(values: Sequence[torch.Tensor]) -> torch.Tensor:
    return values[0] if len(values) == 1 else torch.stack(list(values)).sum()
