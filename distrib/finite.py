"""Whether tensors hold numbers: no NaN, no infinity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch


@torch.no_grad()
def all_finite(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Whether all values of one or more tensors of one device are numbers: bool [], there."""
    return torch.stack(torch._foreach_norm(list(tensors), ord=float("inf"))).isfinite().all()


def spoilt(value: Any) -> str | None:
    """Where in nested containers the first tensor lies that holds a value which is no number, as a/b/c; None: nowhere.

    One pass over each tensor in host memory, without a copy.
    """
    return next((path for path, tensor in _floats(value) if not _is_finite(tensor)), None)


def _is_finite(tensor: torch.Tensor) -> bool:
    # A sum is as fast as memory, and NaN and infinity spoil it. So do numbers that overflow together, hence the rest.
    return bool(tensor.detach().sum().isfinite() or tensor.isfinite().all())


def _floats(value: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield path, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _floats(inner, f"{path}/{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for k, inner in enumerate(value):
            yield from _floats(inner, f"{path}/{k}")
