"""The processes of a run: ranks, device, process groups, and the few collectives that the rest uses."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from distrib.config import UserError
from distrib.faults import Interrupted, StopSignals
from distrib.place import Place
from distrib.surroundings import usable_cores

T = TypeVar("T")

# Rank 0 may index a data set of millions of files, or write a large checkpoint, while the others wait.
CONTROL_TIMEOUT = timedelta(hours=2)
STEP_MINUTES = 30.0  # for a collective of a step, and always longer than a rank may wait for its images
SLOW_SECONDS = 15.0  # a wait for the other ranks that is worth a line


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
        """Runs ``call`` on rank 0 and gives every rank its result, or its UserError or Interrupted."""
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = call()
            except (UserError, Interrupted) as error:
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
        """Runs ``call`` on rank 0, then on the first rank of each other machine, then on the rest; each gets its own.

        What the first builds on a shared disk all others find, and on local disks the first of each machine builds.
        A UserError or Interrupted of any rank is raised on all.
        """
        turn = 0 if self.is_main else 1 if self.local_rank == 0 else 2
        made: list[T] = []
        for now in range(3):
            self.on_each(lambda now=now: made.append(call()) if turn == now else None)  # type: ignore[misc]
        return made[0]

    def on_each(self, call: Callable[[], T]) -> T:
        """Runs ``call`` on every rank at once; a UserError or Interrupted of any is raised on all."""
        made: list[T] = []
        error: Exception | None = None
        try:
            made.append(call())
        except UserError as wrong:
            error = wrong if self.is_main else UserError(f"on {platform.node()}: {wrong}")
        except Interrupted as interrupted:
            error = interrupted
        self._raise_together(error)
        return made[0]

    def check_same(self, value: str, otherwise: str) -> None:
        """Compares ``value`` with rank 0's.

        Raises:
            UserError: on all ranks, "rank N on HOST" and ``otherwise``, where a rank has another one.
        """
        differs = value != self.on_main(lambda: value)
        where = f"rank {self.rank} on {platform.node()}"
        self._raise_together(UserError(f"{where} {otherwise}") if differs else None)

    def _raise_together(self, error: Exception | None) -> None:
        """Raises on every rank the error of the lowest rank that has one: no rank is left waiting for another."""
        for found in self.gather_objects(error):
            if found is not None:
                raise found

    def gather_objects(self, value: T) -> list[T]:
        """Every rank's ``value``, in rank order, on every rank; it must be one that pickle takes."""
        values: list[Any] = [value]
        if self.world > 1:
            values = [None] * self.world
            dist.all_gather_object(values, value, group=self.control)
        return values

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums ``tensor`` over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_later(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Starts to sum ``tensor`` over all ranks and to bring it to the host; the returned call waits for it."""
        return self._reduce_later(tensor, dist.ReduceOp.SUM)

    def max_later(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """As ``sum_later``, for the largest of all ranks."""
        return self._reduce_later(tensor, dist.ReduceOp.MAX)

    def _reduce_later(self, tensor: torch.Tensor, op: Any) -> Callable[[], torch.Tensor]:
        work = dist.all_reduce(tensor, op, async_op=True) if self.world > 1 else None
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

    def gather_to_main(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Stacks every rank's ``tensor`` of one shape [...] to [world, ...], in rank order, on rank 0; None elsewhere.

        All ranks must call it. None but rank 0 holds more than its own.
        """
        if self.world == 1:
            return tensor.unsqueeze(0)
        stacked = tensor.new_empty((self.world, *tensor.shape)) if self.is_main else None
        dist.gather(tensor, list(stacked) if stacked is not None else None, dst=0)
        return stacked


def step_timeout(wait_minutes: float) -> timedelta:
    """How long a collective of a step may take where a rank waits for its images for up to ``wait_minutes``."""
    return timedelta(minutes=max(STEP_MINUTES, wait_minutes + 5))


def start(place: Place = Place(), stop: StopSignals | None = None, wait_minutes: float = 0) -> Runtime:  # noqa: B008  a frozen value
    """Joins the run in which this process has its ``place``; the place is published as torchrun's variables.

    Raises:
        UserError: more processes on this machine than GPUs, or the ranks do not find each other.
        Interrupted: asked to stop before they did.
    """
    rank, world, local_rank, local_world = place.rank, place.world, place.local_rank, place.local_world
    if torch.cuda.is_available():
        if local_world > torch.cuda.device_count():
            raise UserError(
                f"{local_world} processes on {platform.node()}, which has {torch.cuda.device_count()} GPUs: "
                "lower --nproc_per_node, or set CUDA_VISIBLE_DEVICES= to train on the CPU",
                everywhere=local_rank > 0,  # the machine's first rank tells it: rank 0 may be on another one
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        # torchrun sets OMP_NUM_THREADS=1 where nobody set it; on a CPU run that would leave cores idle. The launcher,
        # which names a file for exit codes, has counted them.
        counted = "DISTRIB_EXIT_CODE_FILE" in os.environ
        if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1" and not counted:
            torch.set_num_threads(max(1, usable_cores() // local_world))
    control = None
    if place.master is not None:
        host, port = place.master
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        device_id = device if device.type == "cuda" else None
        meeting = f"all {world} ranks at {host}:{port}"
        try:
            leaving = stop.leaving_at_once(meeting) if stop is not None else contextlib.nullcontext()
            with leaving, _told_when_slow(f"rank {rank} waits for {meeting}"):
                dist.init_process_group(
                    backend,
                    rank=rank,
                    world_size=world,
                    device_id=device_id,
                    timeout=step_timeout(wait_minutes),
                )
                control = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
        except RuntimeError as error:  # torch's own kinds for a store and for sockets are RuntimeErrors
            way_out = "start them all, with the same MASTER_ADDR and a free MASTER_PORT"
            if "remote=[127." in str(error) and not host.startswith(("127.", "localhost")):
                # gloo listens where the host's own name leads: some systems give that one an address of the loopback.
                way_out = "a host's own name leads to 127.…; set GLOO_SOCKET_IFNAME to the interface of the network"
            raise UserError(
                f"rank {rank} did not meet {meeting}: {_first_line(error)}: {way_out}", everywhere=False
            ) from None
    return Runtime(rank, world, local_rank, local_world, device, control)


def leave() -> None:
    """Leaves the process groups, where ``start`` joined any.

    A rank that ends otherwise has gloo's threads alive while the interpreter is taken down, and may die of SIGABRT.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def _told_when_slow(line: str) -> Iterator[None]:
    timer = threading.Timer(SLOW_SECONDS, lambda: print(line, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
