"""What a training state comes to, in four SHA-256: two runs that ended with the same bits have the same ones.

A digest is taken of what ``TrainState.capture`` returned or ``checkpoint.load`` read, and depends on neither device,
memory format nor the order of keys. Any program can do the same. SHA-256 is fed, for each entry in the order of its
name (by code points), one line of UTF-8, and for a tensor its elements behind it:

    tensor   ``layer1.0.conv1.weight float32 [64, 64, 3, 3]\\n``, then the elements, row-major, each little-endian
    number   ``scaler.scale 0x1.0000000000000p+16\\n``: Python's ``float.hex()``; of a whole number its decimal digits

The dtype is torch's name of it without ``torch.``; a scalar's shape is ``[]``. Which entries:

    weights     of "model" all that are no buffers
    buffers     of "model" those whose last name is in ``BUFFERS``; and "statistics", each rank's own, under that name
                unless it is empty
    optimizer   of "optimizer" each parameter's state, as ``0.momentum_buffer``; of "scaler" each number, as
                ``scaler.scale``. Not the groups' options, such as the learning rate: they come from the configuration
    ema         all of "model_ema", where there is one
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")  # of a batch norm; the networks have no others

Entries = Iterator[tuple[str, Any]]


def digest(state: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 in hexadecimal, by "weights", "buffers", "optimizer" and, where there is one, "ema".

    Costs a pass over the state, and room for a copy of one tensor at a time.
    """
    model: Mapping[str, Any] = state["model"]
    ema = state.get("model_ema", state.get("ema"))  # "ema": in files of before 2026-11-25
    parts = {
        "weights": ((name, value) for name, value in model.items() if not _is_buffer(name)),
        "buffers": _buffers(model, state["statistics"]),
        "optimizer": _optimizer(state["optimizer"], state["scaler"]),
    }
    if ema is not None:
        parts["ema"] = iter(ema.items())
    return {part: _sha256(entries) for part, entries in parts.items()}


def _is_buffer(name: str) -> bool:
    return name.rpartition(".")[2] in BUFFERS


def _buffers(model: Mapping[str, Any], statistics: torch.Tensor) -> Entries:
    yield from ((name, value) for name, value in model.items() if _is_buffer(name))
    if statistics.numel():
        yield "statistics", statistics


def _optimizer(optimizer: Mapping[str, Any], scaler: Mapping[str, Any]) -> Entries:
    for index, values in optimizer["state"].items():
        yield from ((f"{index}.{name}", value) for name, value in values.items() if value is not None)
    yield from ((f"scaler.{name}", value) for name, value in scaler.items())


def _sha256(entries: Entries) -> str:
    found = hashlib.sha256()
    for name, value in sorted(entries, key=lambda entry: entry[0]):
        if isinstance(value, torch.Tensor):
            found.update(f"{name} {str(value.dtype).removeprefix('torch.')} {list(value.shape)}\n".encode())
            rows = value.detach().cpu().clone(memory_format=torch.contiguous_format)  # of one element also the strides
            found.update(rows.reshape(-1).view(torch.uint8).numpy().data)  # bytes: numpy has no bfloat16
        else:
            found.update(f"{name} {value.hex() if isinstance(value, float) else value}\n".encode())
    return found.hexdigest()
