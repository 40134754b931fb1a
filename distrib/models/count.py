"""What a network is made of, counted on torch's meta device: shapes only, no memory and no arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Counts:
    """Of one image.

    Attributes:
        layers: convolutions and linear layers as He et al. 2015 count them, without the projections on shortcuts.
        parameters: elements.
        macs: multiply-adds of convolutions and linear layers, half of what torch counts as operations.
        activations: elements that convolutions and linear layers put out (Radosavovic et al. 2020, arXiv 2003.13678).
    """

    layers: int
    parameters: int
    macs: int
    activations: int


def count(network: nn.Module, size: int) -> Counts:
    """Counts for one image of ``size`` × ``size``; ``network`` is on the meta device, in evaluation mode."""
    found = {name: m for name, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    activations = 0

    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal activations
        activations += output.numel()

    hooks = [module.register_forward_hook(add) for module in found.values()]
    try:
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            network(torch.empty(1, 3, size, size, device="meta"))
    finally:
        for hook in hooks:
            hook.remove()
    return Counts(
        layers=sum("downsample" not in name.split(".") for name in found),
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        macs=counter.get_total_flops() // 2,
        activations=activations,
    )
