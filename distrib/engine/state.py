"""All that the next step depends on, captured from and restored to one place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from distrib.finite import all_finite
from distrib.optim import Ema, fill_momentum
from distrib.runtime import Runtime

Weights = dict[str, dict[str, torch.Tensor]]

SAVED_AS = {"model": "model", "ema": "model_ema"}  # torchvision and timm look for a moving average under that name

# Above so many ranks a checkpoint holds the mean alone. A rank's statistics of a ResNet-50 are 212 KB, with an EMA
# 425 KB: 54 or 109 MB for 256 ranks, beside 205 or 307 MB of weights and momentum; 217 or 435 MB for 1,024.
ROWS_UP_TO = 256


class TrainState:
    """Model, optimizer, loss scaler and EMA of a rank.

    Weights are equal on all ranks; batch-norm statistics are each rank's own. Who reads a model gets the mean of the
    statistics over the ranks. A checkpoint holds that mean, under torchvision's keys, and beside it every rank's own:
    on as many ranks each continues with its own, to the bit; on another number all continue with the mean. So do runs
    of more than ``rows_up_to`` ranks, whose checkpoints hold no rank's own.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        ema: Ema | None,
        runtime: Runtime,
        rows_up_to: int = ROWS_UP_TO,
    ) -> None:
        self._model, self._optimizer, self._scaler, self._ema, self._runtime = model, optimizer, scaler, ema, runtime
        # Where each rank-local tensor stands: (which network, its key).
        self._keys = [(which, name) for which in self._networks() for name in statistics_of(model)]
        self._keeps_rows = runtime.world <= rows_up_to

    @property
    def continues_exactly(self) -> bool:
        """Whether a checkpoint holds all that as many ranks need to go on to the bit."""
        return self._keeps_rows or not self._keys

    def weights(self) -> Weights:
        """State dicts of "model" and, where there is one, "ema", with averaged statistics. All ranks must call it."""
        return self._with_statistics(self._mean())

    def capture(self) -> dict[str, Any]:
        """What a checkpoint holds of the training: tensors of the device, not copies. All ranks must call it.

        "statistics" has a row for each rank, [world, count], on rank 0 alone; none elsewhere and where the mean alone
        is kept, [0, count].
        """
        own = self._flat()
        rows = self._runtime.gather_to_main(own) if self._keeps_rows else None
        return {
            **{SAVED_AS[which]: state for which, state in self._with_statistics(self._mean()).items()},
            "statistics": own.new_empty((0, own.numel())) if rows is None else rows,
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
        }

    def is_finite(self) -> bool:
        """Whether the weights of all ranks are numbers. All ranks must call it; the host waits for the device."""
        wrong = ~all_finite(list(self._model.parameters()))
        return not self._runtime.sum(wrong.double())

    @torch.no_grad()
    def restore(self, saved: Mapping[str, Any]) -> None:
        """Continues from what ``capture`` returned, on any number of ranks."""
        self._model.load_state_dict(saved["model"])
        own = [{k: v for k, v in group.items() if k != "params"} for group in self._optimizer.param_groups]
        self._optimizer.load_state_dict(saved["optimizer"])
        for group, options in zip(self._optimizer.param_groups, own, strict=True):
            group.update(options)  # this start's, where weight decay, momentum or the device have changed
        fill_momentum(self._optimizer)  # none is saved before the first step, nor by a run without momentum
        if saved["scaler"]:  # empty where the run was not fp16 before
            self._scaler.load_state_dict(saved["scaler"])
        if self._ema is not None:  # an EMA that begins with this resume begins at the weights
            older = saved.get("ema", saved["model"])  # "ema": in files of before 2026-11-25
            self._ema.load_state_dict(saved.get(SAVED_AS["ema"], older))
        rows = saved["statistics"]
        if len(rows) == self._runtime.world and rows.shape[1] == self._flat().numel():
            live = self._networks()
            for (which, name), value in self._unpacked(rows[self._runtime.rank]).items():
                live[which][name].copy_(value)

    def _networks(self) -> Weights:
        networks: Weights = {"model": self._model.state_dict()}
        if self._ema is not None:
            networks["ema"] = self._ema.state_dict()
        return networks

    def _flat(self) -> torch.Tensor:
        live = self._networks()
        tensors = [live[which][name].detach().reshape(-1) for which, name in self._keys]
        return torch.cat(tensors) if tensors else torch.empty(0, device=self._runtime.device)

    def _mean(self) -> torch.Tensor:
        """The ranks' mean, [count], equal on all of them.

        What is evaluated and what is saved comes from here, so that both are the same bits. Summed in double precision:
        then the order in which gloo or NCCL add the ranks up hardly ever shows.
        """
        own = self._flat()
        return (self._runtime.sum(own.double()) / self._runtime.world).to(own.dtype)

    def _unpacked(self, flat: torch.Tensor) -> dict[tuple[str, str], torch.Tensor]:
        live = self._networks()
        shapes = [live[which][name].shape for which, name in self._keys]
        parts = flat.split([shape.numel() for shape in shapes])
        return {key: part.view(shape) for key, part, shape in zip(self._keys, parts, shapes, strict=True)}

    def _with_statistics(self, flat: torch.Tensor) -> Weights:
        networks = {which: dict(state) for which, state in self._networks().items()}
        for (which, name), value in self._unpacked(flat).items():
            networks[which][name] = value
        return networks


def statistics_of(model: nn.Module) -> list[str]:
    """The keys of the buffers that each rank has its own of; without those of frozen norms, which never change."""
    return [
        key
        for name, module in model.named_modules()
        if module.training
        for key, buffer in module.named_buffers(name, recurse=False)
        if buffer.is_floating_point()
    ]
