"""Residual networks: ResNet, ResNeXt and Wide ResNet for ImageNet, and the three-stage ResNets for small images.

- He et al. 2015, Deep Residual Learning for Image Recognition, arXiv 1512.03385
- Xie et al. 2016, Aggregated Residual Transformations for Deep Neural Networks (ResNeXt), arXiv 1611.05431
- Zagoruyko and Komodakis 2016, Wide Residual Networks, arXiv 1605.07146

Names, shapes and order of the parameters are torchvision's for the networks that torchvision has: its state dicts load
strictly, and the outputs are the same to the bit.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from distrib.config import ModelConfig, UserError, settled


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution that keeps the image's size at stride 1; the norm behind it has the bias."""
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions: (N, inputs, H, W) → (N, outputs, ⌈H/stride⌉, ⌈W/stride⌉). He et al., figure 5 left.

    ``downsample`` carries the input past the convolutions; None leaves a plain block, without a shortcut.
    """

    expansion = 1

    def __init__(
        self, inputs: int, inner: int, outputs: int, stride: int, groups: int, downsample: nn.Module | None
    ) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, inner, 3, stride, groups)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = _conv(inner, outputs, 3, groups=groups)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = downsample

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The norm right before the addition."""
        return self.bn2

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(convolutions(x) + shortcut(x))."""
        out = self.bn1(self.conv1(x)).relu_()
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            out = out + self.downsample(x)
        return out.relu_()


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions: (N, inputs, H, W) → (N, outputs, ⌈H/stride⌉, ⌈W/stride⌉). Figure 5 right.

    The stride is on the 3×3 ("v1.5"), where the paper has it on the first 1×1. ``downsample`` is as in ``BasicBlock``.
    """

    expansion = 4

    def __init__(
        self, inputs: int, inner: int, outputs: int, stride: int, groups: int, downsample: nn.Module | None
    ) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, inner, 1)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = _conv(inner, inner, 3, stride, groups)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = _conv(inner, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = downsample

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The norm right before the addition."""
        return self.bn3

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(convolutions(x) + shortcut(x))."""
        out = self.bn1(self.conv1(x)).relu_()
        out = self.bn2(self.conv2(out)).relu_()
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            out = out + self.downsample(x)
        return out.relu_()


class ZeroPadShortcut(nn.Module):
    """Shortcut without parameters: every ``stride``-th pixel, zeros for the new channels (option A, section 4.2).

    The pooling of single pixels is a subsampling that, unlike a strided slice, keeps channels-last dense.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.new_channels = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) → (N, outputs, ⌈H/stride⌉, ⌈W/stride⌉)."""
        pixels = functional.avg_pool2d(x, kernel_size=1, stride=self.stride)
        return functional.pad(pixels, (0, 0, 0, 0, 0, self.new_channels))


@dataclass(frozen=True)
class Architecture:
    """What tells one network from another. Each stage has twice the channels of the one before, at half the size."""

    block: type[BasicBlock] | type[Bottleneck]
    depths: tuple[int, ...]  # blocks in each stage
    width: int = 64  # channels of the stem, and of the first stage before the block's expansion
    widen: float = 1  # channels of the 3×3 over the stage's width
    groups: int = 1  # groups of the 3×3
    stem: Literal["imagenet", "small"] = "imagenet"
    projection: bool = True  # where the shape changes: a 1×1 convolution (option B) or zero padding (option A)


ARCHITECTURES = {
    # He et al., table 1
    "resnet18": Architecture(BasicBlock, (2, 2, 2, 2)),
    "resnet34": Architecture(BasicBlock, (3, 4, 6, 3)),
    "resnet50": Architecture(Bottleneck, (3, 4, 6, 3)),
    "resnet101": Architecture(Bottleneck, (3, 4, 23, 3)),
    "resnet152": Architecture(Bottleneck, (3, 8, 36, 3)),
    # Xie et al., table 1: 32x4d is 32 groups of 4 channels in the first stage, 128 = 2 × 64
    "resnext50_32x4d": Architecture(Bottleneck, (3, 4, 6, 3), widen=2, groups=32),
    "resnext101_32x8d": Architecture(Bottleneck, (3, 4, 23, 3), widen=4, groups=32),
    "resnext101_64x4d": Architecture(Bottleneck, (3, 4, 23, 3), widen=4, groups=64),
    # Zagoruyko and Komodakis: the bottleneck twice as wide
    "wide_resnet50_2": Architecture(Bottleneck, (3, 4, 6, 3), widen=2),
    "wide_resnet101_2": Architecture(Bottleneck, (3, 4, 23, 3), widen=2),
    # He et al., section 4.2: 6n + 2 layers, three stages of 16, 32 and 64 channels
    **{
        f"resnet{6 * n + 2}": Architecture(BasicBlock, (n, n, n), width=16, stem="small", projection=False)
        for n in (3, 5, 7, 9, 18)
    },
    # Xie et al., section 5.3, narrow, and with the sizes of table 2: more groups, as many parameters (to 1.3 %)
    "resnext29_1x16d": Architecture(Bottleneck, (3, 3, 3), width=16, stem="small"),
    "resnext29_2x10d": Architecture(Bottleneck, (3, 3, 3), width=16, widen=1.25, groups=2, stem="small"),
    "resnext29_4x6d": Architecture(Bottleneck, (3, 3, 3), width=16, widen=1.5, groups=4, stem="small"),
}

MODEL_NAMES = tuple(ARCHITECTURES)


class ResNet(nn.Sequential):
    """A network of ``ARCHITECTURES``: images (N, 3, H, W) → logits (N, num_classes), for any H and W.

    The stages see H/4 × W/4 behind the ImageNet stem (7×7 at stride 2, max-pool), H × W behind the small one (3×3).
    """

    def __init__(
        self,
        arch: Architecture,
        num_classes: int = 1000,
        stem: Literal["imagenet", "small"] | None = None,
        plain: bool = False,
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__()
        small = (stem or arch.stem) == "small"
        self.conv1 = _conv(3, arch.width, 3) if small else _conv(3, arch.width, 7, stride=2)
        self.bn1 = nn.BatchNorm2d(arch.width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, stride=2, padding=1)
        channels = arch.width
        for i, depth in enumerate(arch.depths):
            stage = _stage(arch, channels, arch.width * 2**i, depth, stride=1 if i == 0 else 2, plain=plain)
            self.add_module(f"layer{i + 1}", stage)
            channels = arch.width * 2**i * arch.block.expansion
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(channels, num_classes)
        self._initialise(zero_gamma=zero_init_residual and not plain)

    def _initialise(self, zero_gamma: bool) -> None:
        """He et al. 2015, arXiv 1502.01852, for convolutions; norms are the identity or, last in a block, zero."""
        if self.fc.weight.is_meta:  # shapes alone are wanted; random numbers there import torch's compiler, for 2 s
            return
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, BasicBlock | Bottleneck) and zero_gamma:
                nn.init.zeros_(module.last_norm.weight)


def _stage(arch: Architecture, inputs: int, width: int, depth: int, stride: int, plain: bool) -> nn.Sequential:
    """``depth`` blocks at one resolution; the first one changes the shape."""
    outputs = width * arch.block.expansion
    blocks = []
    for _ in range(depth):
        shortcut = None if plain else _shortcut(inputs, outputs, stride, arch.projection)
        blocks.append(arch.block(inputs, int(width * arch.widen), outputs, stride, arch.groups, shortcut))
        inputs, stride = outputs, 1
    return nn.Sequential(*blocks)


def _shortcut(inputs: int, outputs: int, stride: int, projection: bool) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    if projection:
        return nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
    return ZeroPadShortcut(inputs, outputs, stride)


def build_model(cfg: ModelConfig) -> nn.Module:
    """Build and initialise the network ``cfg.name``: images (N, 3, H, W) → logits (N, ``cfg.num_classes``).

    - ``stem``: "imagenet" or "small" instead of the network's own.
    - ``zero_init_residual``: the last norm of each block starts at zero, so each block starts as its shortcut (Goyal et
      al. 2017, arXiv 1706.02677, section 5.1).
    - ``plain``: the twin without shortcuts (He et al. 2015, section 4.1), with the same layers otherwise. Its norms all
      start at one, whatever ``zero_init_residual`` says: without shortcuts a zero would let no signal through.
    """
    if cfg.name not in ARCHITECTURES:
        near = difflib.get_close_matches(cfg.name.lower(), MODEL_NAMES, n=1, cutoff=0.75)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(MODEL_NAMES)}"
        raise UserError(f"model.name {cfg.name!r} is not a network; {hint}")
    return ResNet(ARCHITECTURES[cfg.name], settled(cfg.num_classes), cfg.stem, cfg.plain, cfg.zero_init_residual)
