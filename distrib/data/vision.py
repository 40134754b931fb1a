"""torchvision's decoder, and its functions on pictures, without torch's compiler, which takes 2 s to import.

``torchvision.ops.roi_align`` imports ``torch._dynamo`` for one question that only a call of it asks. While torchvision
is imported, a module stands there that answers it later, and that fetches the compiler for whoever wants anything else.
``torchvision.transforms.v2`` needs the compiler at once, so the four functions that are used of it are written out
here; they give the same bits (``tests/test_vision.py``).
"""

from __future__ import annotations

import importlib
import platform
import sys
from types import ModuleType
from typing import Any

import torch
from torch.nn.functional import interpolate, pad

COMPILER = "torch._dynamo"


class _Later(ModuleType):
    """In the place of a module of the compiler, until it is asked for what is in it."""

    __path__: list[str] = []  # noqa: RUF012  # modules below it are looked for

    def __getattr__(self, name: str) -> Any:
        if name == "is_compile_supported":
            return lambda device: _real(self.__name__).is_compile_supported(device)
        if name.startswith("__"):  # the import system's own questions
            raise AttributeError(name)
        return getattr(_real(self.__name__), name)


def _real(name: str) -> Any:
    _withdraw()
    return importlib.import_module(name)


def _withdraw() -> None:
    for name in (COMPILER, f"{COMPILER}.utils"):
        if isinstance(sys.modules.get(name), _Later):
            del sys.modules[name]


def _import_torchvision() -> None:
    if COMPILER not in sys.modules:
        for name in (COMPILER, f"{COMPILER}.utils"):
            sys.modules[name] = _Later(name)
    try:
        import torchvision  # noqa: F401
    finally:
        _withdraw()


_import_torchvision()

from torchvision.io import ImageReadMode, decode_image  # noqa: E402  # deprecated for torchcodec since 0.29

__all__ = ["ImageReadMode", "center_crop", "decode_image", "horizontal_flip", "resize", "resized_crop"]


def resize(image: torch.Tensor, size: list[int], *, antialias: bool = True) -> torch.Tensor:
    """A picture uint8 [3, height, width] resized bilinearly: to ``[height, width]``, or ``[shorter side]``."""
    height, width = image.shape[-2:]
    if len(size) == 1:
        longer = size[0] * max(height, width) // min(height, width)
        size = [longer, size[0]] if width <= height else [size[0], longer]
    if size == [height, width]:
        return image
    batch = image.unsqueeze(0)
    if batch.is_contiguous(memory_format=torch.channels_last) and batch.numel() != batch.stride(0):
        # interpolate takes one picture for contiguous otherwise, and copies its result (pytorch issue 68430).
        batch = batch.as_strided(batch.shape, (batch.numel(), *batch.stride()[1:]))
    options: dict[str, Any] = {"mode": "bilinear", "align_corners": False, "antialias": antialias}
    if _in_whole_numbers():
        return interpolate(batch, size, **options).squeeze(0)
    return interpolate(batch.float(), size, **options).round_().to(image.dtype).squeeze(0)


def _in_whole_numbers() -> bool:
    """Whether this processor has a kernel that resizes uint8 as such; elsewhere fp32 is faster."""
    vectors = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return vectors or platform.machine() in ("aarch64", "arm64")


def center_crop(image: torch.Tensor, size: list[int]) -> torch.Tensor:
    """The middle ``[height, width]`` of a picture [3, height, width], with black around it where it is smaller."""
    lack = [max(0, wanted - side) for wanted, side in zip(size, image.shape[-2:], strict=True)]
    if any(lack):
        image = pad(image, [lack[1] // 2, (lack[1] + 1) // 2, lack[0] // 2, (lack[0] + 1) // 2])
    top, left = (round((side - wanted) / 2) for wanted, side in zip(size, image.shape[-2:], strict=True))
    return image[..., top : top + size[0], left : left + size[1]]


def resized_crop(
    image: torch.Tensor, top: int, left: int, height: int, width: int, size: list[int], *, antialias: bool = True
) -> torch.Tensor:
    """A box within a picture [3, height, width], resized to ``size``, ``[height, width]``."""
    return resize(image[..., top : top + height, left : left + width], size, antialias=antialias)


def horizontal_flip(image: torch.Tensor) -> torch.Tensor:
    """A picture mirrored."""
    return image.flip(-1)
