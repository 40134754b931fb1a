"""Whether tensors hold numbers: no NaN, no infinity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch


def spoilt(value: Any) -> str | None:
    """Where in nested containers the first tensor lies that holds a value which is no number, as a/b/c; None: nowhere.

    One pass over each tensor, without a copy; on a GPU the host waits.
    """
    return next((path for path, tensor in _floats(value) if not _largest(tensor).isfinite()), None)


@torch.no_grad()
def all_finite(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Whether all are numbers, bool [], on their device; for tensors of one device, at least one of them."""
    return torch.stack(torch._foreach_norm(list(tensors), ord=float("inf"))).isfinite().all()


def _largest(tensor: torch.Tensor) -> torch.Tensor:
    """The largest magnitude, which NaN and infinity both spoil; no finite values can, as they would a sum."""
    return torch.linalg.vector_norm(tensor.detach(), float("inf"))


def _floats(value: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() and value.numel():
            yield path, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _floats(inner, f"{path}/{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for k, inner in enumerate(value):
            yield from _floats(inner, f"{path}/{k}")
