"""How large a network is. Imports torch, when it is asked."""

from __future__ import annotations

from typing import Any, NamedTuple

from distrib.config import ModelConfig


class Size(NamedTuple):
    """Parameters, and multiply-accumulate operations of convolutions and the last layer for one image."""

    parameters: int
    macs: int


def size_of(cfg: ModelConfig, pixels: int) -> Size:
    """The size of a network on square images of ``pixels`` a side; 1000 classes where that is not known yet.

    Raises:
        UserError: there is no such network.
    """
    import torch
    from torch import nn

    from distrib.models import build_model

    if cfg.num_classes == "auto":
        cfg = cfg.model_copy(update={"num_classes": 1000})
    macs = 0

    def count(module: Any, inputs: Any, output: Any) -> None:
        nonlocal macs
        weight = module.weight
        macs += weight.numel() * (output.shape[2] * output.shape[3] if weight.ndim == 4 else 1)

    with torch.device("meta"):
        network = build_model(cfg).eval()
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_hook(count)
        network(torch.empty(1, 3, pixels, pixels))
    return Size(sum(p.numel() for p in network.parameters()), macs)
