"""Exponential moving average of a model's weights and batch-norm statistics (Polyak and Juditsky 1992)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from distrib.config import EmaConfig, settled


class Ema:
    """Keeps average = decay · average + (1 - decay) · value for every floating-point tensor of the model's state."""

    def __init__(self, model: nn.Module, cfg: EmaConfig) -> None:
        self.every, self._step_size = cfg.every, 1 - settled(cfg.decay)
        self._model = model
        live = model.state_dict()
        self.average = {k: v.detach().clone() for k, v in live.items() if v.is_floating_point()}
        self._average = list(self.average.values())
        self._live = [live[k].detach() for k in self.average]  # the same storage: updates in place show here

    @torch.no_grad()
    def update(self, skip: torch.Tensor | None = None) -> None:
        """Moves the average towards the model, in a few launches for all tensors together.

        ``skip``: fp32 [] on the device; 1 leaves the average as it is, and the host need not know.
        """
        if skip is None:
            torch._foreach_lerp_(self._average, self._live, self._step_size)
            return
        # foreach has no launch that depends on a value of the device, and the fused optimizer has: with the model for a
        # gradient, average - lr · (model + decay · average) is the same move where decay is -1 and lr negative.
        torch._fused_sgd_(
            self._average,
            self._live,
            [],
            weight_decay=-1.0,
            momentum=0.0,
            lr=-self._step_size,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
            found_inf=skip,
        )

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The average under the model's own keys; counters are the model's."""
        return {k: self.average.get(k, v) for k, v in self._model.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the floating-point tensors of ``state_dict``."""
        for key, tensor in self.average.items():
            tensor.copy_(state[key])
