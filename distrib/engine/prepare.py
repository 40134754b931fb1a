"""From a network to what the step calls: normalisation and loss around it, channels-last, DDP, compiled, warm."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from distrib.config import TrainConfig, UserError, settled
from distrib.runtime import Runtime

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
Compiler = str | Callable[..., Any]  # what torch.compile takes as its backend
LARGEST_STRIDE = 32  # pixels of a picture for one of the last stage, rounded up, in any of the networks


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

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the cross entropy summed over the images, fp32 [], and how many are classified right, int64 []."""
        logits = self.logits(images)
        loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.label_smoothing)
        return loss, (logits.detach().argmax(dim=1) == labels).sum()


def effective_precision(precision: str, device: torch.device) -> str:
    """``precision``, but fp32 on a CPU for tf32, which it has not, and for bf16 where it would emulate it, slowly."""
    if device.type != "cpu" or precision not in ("bf16", "tf32"):
        return precision
    if precision == "tf32":
        return "fp32"
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n", 1)[0].split()
    except OSError:  # not Linux
        flags = []
    return "bf16" if {"avx512_bf16", "amx_bf16", "bf16"} & set(flags) else "fp32"


def set_up_device(device: torch.device, precision: str, deterministic: bool) -> None:
    """Settles for this process how kernels are chosen; before the first of them runs.

    ``precision`` is the effective one. Torch would have fp32 mean IEEE for matrices and TF32 for cuDNN's convolutions;
    here it is IEEE for both, and tf32 TF32 for both. In bf16 and fp16 nothing is left to it: autocast runs all
    convolutions and matrices in 16 bits. These are torch's older switches: the newer ones, ``fp32_precision``, leave
    the older ones contradictory, which torch 2.11 reads when it compiles, and raises.

    ``deterministic``: the same bits each time, on the same device and versions; an operation that has no such kernel
    raises RuntimeError. Otherwise cuDNN times all its kernels for each new shape and takes the fastest. A CPU's kernels
    are the same either way.
    """
    torch.use_deterministic_algorithms(deterministic)
    # Would cost a kernel for each new tensor; nothing here reads one before it is written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type != "cuda":
        return
    cudnn = torch.backends.cudnn
    cudnn.benchmark, cudnn.deterministic = not deterministic, deterministic
    cudnn.benchmark_limit = 0  # none: all kernels, not the ten that a heuristic puts first
    if DTYPES[precision] == torch.float32:
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        cudnn.allow_tf32 = precision == "tf32"
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when cuBLAS is first used
    import torch._inductor.config as inductor  # here, as it loads the compiler, which a CPU may do without

    inductor.deterministic = deterministic  # whether it may choose kernels by timing where that changes the sum


def check_batch_norm(network: nn.Module, images: int, size: int) -> None:
    """Looks for a norm that one forward of ``images`` images of ``size`` pixels gives a single value a channel.

    Its variance does not exist, and torch would raise in the first step. Only shapes are computed, on the meta device,
    and only where it may be so, as torch's import for them takes 2 s: two images have two values at least, and of a
    picture larger than the largest stride the last stage sees several pixels.

    Raises:
        UserError: there is one.
    """
    if images > 1 or size > LARGEST_STRIDE:
        return

    def look(name: str, norm: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if norm.training and inputs[0].numel() == inputs[0].shape[1]:
            raise UserError(
                f"one image a forward and data.size {size} leave the batch norm {name} a single value a channel, which "
                "has no variance: raise train.global_batch, train.micro_batch or data.size, or start fewer processes"
            )

    norms = [(name, m) for name, m in network.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    hooks = [norm.register_forward_pre_hook(partial(look, name)) for name, norm in norms]
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    try:
        with torch.no_grad():
            torch.func.functional_call(network, shapes, torch.empty(images, 3, size, size, device="meta"))
    finally:
        for hook in hooks:
            hook.remove()


def wrap(objective: Objective, cfg: TrainConfig, runtime: Runtime, backend: Compiler = "inductor") -> tuple[Any, Any]:
    """Returns (what the step calls, the DDP module in it, or None for one process).

    Buffers are not broadcast: each rank keeps the batch-norm statistics of its own images, and they are averaged
    where somebody reads them (``engine.state``). Without ``static_graph``: it lays the buckets out anew after some
    steps, not after the first, so that a resumed run would sum in another order than ``warm_up`` can bring about.
    """
    ddp = None
    if runtime.world > 1:
        arguments = inspect.signature(DistributedDataParallel).parameters
        fetch_buffers = "forward_sync_buffers" if "forward_sync_buffers" in arguments else "broadcast_buffers"
        options: dict[str, Any] = {fetch_buffers: False}  # torch 2.15 warns of the older name, 2.11 has no other
        ddp = DistributedDataParallel(
            objective,
            device_ids=[runtime.device.index] if runtime.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **options,
        )
    module: Any = ddp if ddp is not None else objective
    return (torch.compile(module, dynamic=False, backend=backend) if settled(cfg.compile) else module), ddp


def warm_up(call: Any, ddp: Any, objective: Objective, slices: Sequence[int], size: int, device: torch.device) -> None:
    """A forward and backward of each size in ``slices`` (images, largest first), before the state is restored.

    They leave no trace. They compile, and they have DDP lay out its gradient buckets in the order of the first
    backward. A resumed run would otherwise reduce its first step in another layout than the undisturbed run did, and
    with three ranks or more the sums would differ in the last bit.

    The largest comes last and is the only one that is reduced: a rank may have two sizes where another has one, all
    must reduce equally often, and the forward behind the first reduction waits for the other ranks, to agree on the
    buckets.
    """
    kept = {name: buffer.clone() for name, buffer in objective.named_buffers()}
    for images in reversed(slices):
        blank = torch.zeros((images, 3, size, size), dtype=torch.uint8, device=device)
        labels = torch.zeros(images, dtype=torch.int64, device=device)
        with ddp.no_sync() if ddp is not None and images != slices[0] else nullcontext():
            loss, _ = call(blank.to(memory_format=torch.channels_last), labels)
            loss.backward()
    with torch.no_grad():
        for name, buffer in objective.named_buffers():
            buffer.copy_(kept[name])
    objective.zero_grad(set_to_none=True)
