"""Optimizer, schedule and moving average, each built from its own part of the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from distrib.config import OptimConfig
from distrib.optim.ema import Ema
from distrib.optim.finetune import freeze, lr_factors
from distrib.optim.schedule import build_schedule

__all__ = ["Ema", "build_optimizer", "build_schedule", "fill_momentum", "freeze", "peak_lr"]


def peak_lr(cfg: OptimConfig, global_batch: int) -> float:
    """The learning rate after warm-up: ``cfg.lr`` scaled from the recipe's batch to this run's.

    Linear: Goyal et al. 2017, arXiv 1706.02677, section 2.1. Square root: Krizhevsky 2014, arXiv 1404.5997.
    """
    growth = global_batch / cfg.reference_batch
    return cfg.lr * {"linear": growth, "sqrt": growth**0.5, "none": 1.0}[cfg.scaling]


def parameter_groups(
    model: nn.Module, weight_decay: float, factors: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Groups for the optimizer of what is to be trained: two for each factor on the learning rate, in forward order.

    Weights of convolutions and linear layers decay; vectors (norms, biases) do not (He et al. 2018, 1812.01187).
    ``factors`` are by a parameter's name, 1 where it has none. Each group's lies under "lr_factor" for the step, which
    sets the learning rates.
    """
    factors = factors or {}
    trained = [(factors.get(name, 1.0), p) for name, p in model.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = []
    for factor in dict.fromkeys(factor for factor, _ in trained):
        own = [p for other, p in trained if other == factor]
        weights, vectors = [p for p in own if p.ndim > 1], [p for p in own if p.ndim <= 1]
        groups.append({"params": weights, "weight_decay": weight_decay, "lr_factor": factor})
        groups.append({"params": vectors, "weight_decay": 0.0, "lr_factor": factor})
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, cfg: OptimConfig, lr: float) -> torch.optim.Optimizer:
    """SGD with momentum as torch defines it (the learning rate outside of the momentum buffer).

    On a GPU fused: one kernel a group, which also takes the loss scaler's verdict without asking the host. On a CPU
    the plain loop over tensors: faster there than foreach, and to the bit what the formula gives, which fused is not.
    """
    on_gpu = next(model.parameters()).is_cuda
    optimizer = torch.optim.SGD(
        parameter_groups(model, cfg.weight_decay, lr_factors(model, cfg.head_lr, cfg.layer_decay)),
        lr=lr,
        momentum=cfg.momentum,
        nesterov=cfg.nesterov,
        fused=on_gpu,
        foreach=False,
    )
    fill_momentum(optimizer)
    return optimizer


def fill_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Gives zeros to each parameter that is to have a momentum and has none yet.

    Torch would make them in the first step. Its fused SGD makes them without writing to them, and leaves them so where
    the loss scaler skips that step: the next one goes on with whatever lay in memory. From zeros the first step is
    torch's own, to the bit: momentum · 0 + gradient, without dampening.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            if group["momentum"] != 0 and optimizer.state[p].get("momentum_buffer") is None:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
