"""The processes of a run: ranks, device, process groups, and the few collectives that the rest uses."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from distrib.config import UserError

T = TypeVar("T")

# Rank 0 may index a data set of millions of files, or write a large checkpoint, while the others wait.
CONTROL_TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class Runtime:
    """Where this process stands. ``control`` is a gloo group for messages that must not touch the device."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    device: torch.device
    control: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the logs and the checkpoints."""
        return self.rank == 0

    def on_main(self, call: Callable[[], T]) -> T:
        """Runs ``call`` on rank 0 and gives every rank its result, or its UserError."""
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = call()
            except UserError as error:
                outcome[1] = error
        if self.world > 1:
            dist.broadcast_object_list(outcome, src=0, group=self.control)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def on_main_only(self, call: Callable[[], T]) -> T | None:
        """As ``on_main``, for a result that cannot travel: the other ranks get None."""
        made: list[T] = []
        self.on_main(lambda: made.append(call()))
        return made[0] if made else None

    def barrier(self) -> None:
        """Waits until all ranks are here."""
        if self.world > 1:
            dist.barrier(group=self.control)

    def main_first(self, call: Callable[[], T]) -> T:
        """Runs ``call`` on rank 0, then on the first rank of each machine, then on the others.

        What the first builds on a shared disk all others find, and on local disks the first of each machine builds.
        """
        self.on_main_only(call)
        try:
            return self._each_machine_first(call)
        except UserError as error:
            raise UserError(f"on {platform.node()}: {error}", everywhere=False) from None

    def _each_machine_first(self, call: Callable[[], T]) -> T:
        for turn in (True, False):
            if (self.local_rank == 0) == turn:
                result = call()
            self.barrier()
        return result

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums ``tensor`` over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_later(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Starts to sum ``tensor`` over all ranks and to bring it to the host; the returned call waits for it."""
        work = dist.all_reduce(tensor, async_op=True) if self.world > 1 else None
        if self.device.type != "cuda":

            def wait() -> torch.Tensor:
                if work is not None:
                    work.wait()
                return tensor

            return wait
        if work is not None:
            work.wait()  # orders the copy behind the sum on the device; the host goes on
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def wait_for_copy() -> torch.Tensor:
            copied.synchronize()
            return host

        return wait_for_copy

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Stacks every rank's ``tensor`` of one shape [...] to [world, ...], in rank order, on every rank."""
        if self.world == 1:
            return tensor.unsqueeze(0)
        rows = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(rows, tensor)
        return torch.stack(rows)

    def close(self) -> None:
        """Leaves the process groups; the last thing a healthy rank does."""
        leave()


def start() -> Runtime:
    """Joins the run that torchrun's environment describes (RANK, WORLD_SIZE, …); without one, a run of one process.

    Raises:
        UserError: more processes on this machine than GPUs.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if torch.cuda.is_available():
        if local_world > torch.cuda.device_count():
            raise UserError(
                f"{local_world} processes on a machine with {torch.cuda.device_count()} GPUs: "
                "lower --nproc_per_node, or set CUDA_VISIBLE_DEVICES= to train on the CPU"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    else:
        device = torch.device("cpu")
        # torchrun sets OMP_NUM_THREADS=1 where nobody set it; on a CPU run that would leave cores idle.
        if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1":
            torch.set_num_threads(max(1, _cores() // local_world))
    control = None
    if world > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        device_id = device if device.type == "cuda" else None
        dist.init_process_group(backend, rank=rank, world_size=world, device_id=device_id)
        control = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
    return Runtime(rank, world, local_rank, local_world, device, control)


def leave() -> None:
    """Leaves the process groups, where ``start`` joined any.

    A rank that ends otherwise has gloo's threads alive while the interpreter is taken down, and may die of SIGABRT.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_main_process() -> bool:
    """Whether this is rank 0, also before ``start``."""
    return int(os.environ.get("RANK", 0)) == 0
