"""From a network to what the step calls: normalisation and loss around it, channels-last, DDP, compiled, warm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from distrib.config import TrainConfig
from distrib.runtime import Runtime

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Objective(nn.Module):
    """The network with what surrounds it in training, in one graph so that a compiler may fuse them."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        network: nn.Module,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        dtype: torch.dtype,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.network, self.dtype, self.label_smoothing = network, dtype, label_smoothing
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Images uint8 [n, 3, h, w] → logits fp32 [n, classes]; the network computes in ``dtype``."""
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.network((images.float() - self.mean) / self.std).float()

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Returns the cross entropy summed over the images, fp32 []."""
        return F.cross_entropy(self.logits(images), labels, reduction="sum", label_smoothing=self.label_smoothing)


def effective_precision(precision: str, device: torch.device) -> str:
    """``precision``, but fp32 for bf16 on a processor that would only emulate it, many times slower."""
    if precision != "bf16" or device.type != "cpu":
        return precision
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n", 1)[0].split()
    except OSError:  # not Linux
        flags = []
    return "bf16" if {"avx512_bf16", "amx_bf16", "bf16"} & set(flags) else "fp32"


def wrap(objective: Objective, cfg: TrainConfig, runtime: Runtime) -> tuple[Any, Any]:
    """Returns (what the step calls, the DDP module in it, or None for one process).

    Buffers are not broadcast: each rank keeps the batch-norm statistics of its own images, and they are averaged
    where somebody reads them (``engine.state``). Without ``static_graph``: it lays the buckets out anew after some
    steps, not after the first, so that a resumed run would sum in another order than ``warm_up`` can bring about.
    """
    ddp = None
    if runtime.world > 1:
        ddp = DistributedDataParallel(
            objective,
            device_ids=[runtime.device.index] if runtime.device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )
    module: Any = ddp if ddp is not None else objective
    return (torch.compile(module, dynamic=False) if cfg.compile else module), ddp


def warm_up(call: Any, objective: Objective, images: int, size: int, device: torch.device) -> None:
    """One forward and backward that leave no trace, before the state is restored and the clock starts.

    It compiles, and it has DDP lay out its gradient buckets in the order of the first backward. A resumed run would
    otherwise reduce its first step in another layout than the undisturbed run did, and with three ranks or more the
    sums would differ in the last bit.
    """
    kept = {name: buffer.clone() for name, buffer in objective.named_buffers()}
    blank = torch.zeros((images, 3, size, size), dtype=torch.uint8, device=device)
    call(blank.to(memory_format=torch.channels_last), torch.zeros(images, dtype=torch.int64, device=device)).backward()
    with torch.no_grad():
        for name, buffer in objective.named_buffers():
            buffer.copy_(kept[name])
    objective.zero_grad(set_to_none=True)
