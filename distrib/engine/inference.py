"""A trained network as people use it: batch norms folded into the convolutions, in 16 bits where that is fast."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


class Classifier(nn.Module):
    """Images to logits, without gradients. ``logits`` is called as that of ``engine.prepare.Objective``.

    mean, std: of red, green and blue, on a scale of 0 to 255.
    dtype: in which the network computes.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self, network: nn.Module, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.network = network.to(dtype).to(memory_format=torch.channels_last)
        self.dtype = dtype
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """Images uint8 [n, 3, h, w] → what the network takes, ``dtype`` [n, 3, h, w]."""
        return ((images.float() - self.mean) / self.std).to(self.dtype)

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Images uint8 [n, 3, h, w] → logits fp32 [n, classes]."""
        return self.network(self.normalise(images)).float()

    def features(self, images: torch.Tensor, stage: str) -> torch.Tensor:
        """Images uint8 [n, 3, h, w] → the mean over the pixels of what ``stage`` gives, fp32 [n, channels].

        ``stage`` is one of ``stages(network)``. "fc" gives the logits.
        """
        out = self.normalise(images)
        for name, module in self.network.named_children():
            out = module(out)
            if name == ("relu" if stage == "conv1" else stage):
                break
        return out.float().mean((2, 3)) if out.ndim == 4 else out.float()


def stages(network: nn.Module) -> list[str]:
    """What ``Classifier.features`` takes: conv1 (with its norm and ReLU), layer1 … layer4, fc."""
    return [name for name, _ in network.named_children() if name in ("conv1", "fc") or name.startswith("layer")]


def fold(network: nn.Module) -> nn.Module:
    """A copy of ``network`` in which each batch norm behind a convolution has become part of it; for evaluation only.

    The result is the same but for rounding: a norm with fixed statistics is a factor and a summand for each channel.
    Children must be registered in the order in which they are called.
    """
    network = copy.deepcopy(network).eval()
    for module in network.modules():
        before: tuple[str, nn.Conv2d] | None = None
        for name, child in list(module.named_children()):
            if before is not None and isinstance(child, nn.BatchNorm2d):
                setattr(module, before[0], fuse_conv_bn_eval(before[1], child))
                setattr(module, name, nn.Identity())
            before = (name, child) if isinstance(child, nn.Conv2d) else None
    return network
