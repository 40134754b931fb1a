"""One rank of a run, computed in its place: as in ``train.py``, but with a process group that reaches nobody."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from distrib import words
from distrib.config import Config, UserError, settled
from distrib.data import EvalPlan, TrainPlan, make_plans, open_data
from distrib.data.order import Slice
from distrib.engine.prepare import DTYPES, Objective, check_batch_norm, wrap
from distrib.faults import Agreement, ring_seconds
from distrib.follow import follow
from distrib.layout import SAMPLE, SYNTHETIC_CLASSES, data_root
from distrib.models import build_model
from distrib.optim import freeze, peak_lr
from distrib.place import Place, publish
from distrib.program import say
from distrib.runtime import CONTROL_TIMEOUT, Runtime, step_timeout
from distrib.tools.simulate.sizes import Sizes, measure

FIRST_NODE = "FIRST_NODE"  # stands for its name, which Slurm gives out
PORT = 29400  # torchrun's own


@dataclass(frozen=True)
class Assumed:
    """What depends on machines that are not here.

    Attributes:
        step: seconds of a training step.
        write: bytes a second that the run folder's disk takes.
    """

    step: float
    write: float


def simulate(asked: Config, place: Place, assumed: Assumed, meeting: bool = True) -> dict[str, Any]:
    """All that is printed, for the rank at ``place``; sizes in bytes, times in seconds.

    ``meeting``: with torchrun's words and the rank's variables, as for nodes where it is started by hand.

    Raises:
        UserError: the configuration or the data is wrong, or does not fit so many ranks.
    """
    data, images, classes = _look_at_data(asked)
    config = follow(asked, classes=classes, images=images[0], gpu=True)
    plan, eval_plan = make_plans(config.train, config.run.seed, images, config.data.eval_batch, place.rank, place.world)
    with torch.device("meta"):
        network = build_model(config.model)
    if config.optim.freeze is not None:
        freeze(network, config.optim.freeze)
    check_batch_norm(network, plan.smallest_slice, config.data.size)
    ema, momentum = config.ema is not None, config.optim.momentum > 0
    sizes, state = measure(network, place.world, ema, momentum), network.state_dict()
    with _fake_group(place) as runtime:
        every = Agreement(runtime.control).every
        # Memory that nobody writes to. Module.to_empty does it too, and imports 2 s worth of symbols.
        network.load_state_dict({k: torch.empty(t.shape, dtype=t.dtype) for k, t in state.items()}, assign=True)
        objective = Objective(network, config.data.mean, config.data.std, DTYPES[config.train.precision])
        with _compiler_not_asked():
            _, ddp = wrap(objective, config.train.model_copy(update={"compile": False}), runtime)
        reduced = sum(p.numel() * p.element_size() for p in (ddp or objective).parameters() if p.requires_grad)
    lr = peak_lr(config.optim, plan.global_batch)
    gpu = replace(runtime, device=torch.device("cuda"))
    return {
        "place": _place(place),
        "data": {**data, "train": images[0], "val": images[1], "classes": settled(config.model.num_classes)},
        "resolved": words.resolved(asked, config, gpu, plan, config.train.precision, lr, network),
        "plan": _plan(config, plan, lr),
        "first_step": [_slice(part) for part in plan.slices(0)],
        "evaluation": _evaluation(eval_plan),
        "rendezvous": {
            **(_meeting(config.run.name, place) if meeting else {}),
            **_waiting(config.data.wait_minutes, every),
        },
        "memory": {
            "device": {
                "parameters": sizes.parameters, "gradients": sizes.gradients, "momentum": sizes.momentum,
                "ema": sizes.ema, "buffers": sizes.buffers, "total": sizes.device,
            },
            "host_of_a_save": {"rank_0": sizes.checkpoint, "others": 0},
        },
        "checkpoint": {
            "bytes": sizes.checkpoint,
            "statistics": sizes.rows,
            "exact_resume": sizes.rows > 0 or sizes.statistics == 0,
            "kept": config.checkpoint.keep + 1,
        },
        "cost": {
            "assumed": {"step": assumed.step, "write_bytes_per_second": assumed.write},
            "step": {"reduced_bytes": reduced},
            "exchange": _exchange(place.world, every, assumed),
            "save": _save(sizes, assumed),
        },
    }  # fmt: skip


def _look_at_data(config: Config) -> tuple[dict[str, Any], tuple[int, int], int]:
    """Where the numbers come from, how many images there are to train on and to evaluate, and classes."""
    cfg = config.data
    if cfg.loader != "synthetic" and _is_here(config):
        indexes = open_data(cfg, config.model.num_classes, say, verify=False)
        assert indexes is not None
        train, val = indexes
        return {"source": "index", "root": str(train.root)}, (len(train), len(val)), len(train.classes)
    source = "synthetic" if cfg.loader == "synthetic" else "data.synthetic"
    return {"source": source, "root": None}, (cfg.synthetic.train, cfg.synthetic.val), SYNTHETIC_CLASSES


def _is_here(config: Config) -> bool:
    if config.data.root == SAMPLE:
        return True
    try:
        return os.path.lexists(data_root(config.data))
    except UserError:  # its variable is not set
        return False


@contextlib.contextmanager
def _fake_group(place: Place) -> Iterator[Runtime]:
    """The run that ``place`` says, with groups of its size whose collectives return at once and change nothing."""
    # Torch's own tests use it; there is no public one.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    alone = place.world == 1
    if not alone:
        dist.init_process_group("fake", rank=place.rank, world_size=place.world, store=FakeStore())
    try:
        control = None if alone else dist.new_group(backend="fake")
        yield Runtime(place.rank, place.world, place.local_rank, place.local_world, torch.device("cpu"), control)
    finally:
        if not alone:
            dist.destroy_process_group()


@contextlib.contextmanager
def _compiler_not_asked() -> Iterator[None]:
    """Answers the one question that DDP has for torch's compiler as it is made: importing that takes 2 s.

    Whether the compiler is to reduce the gradients in DDP's place: no, as by default.
    """
    if "torch._dynamo" in sys.modules:
        yield
        return
    answer = SimpleNamespace(utils=SimpleNamespace(get_optimize_ddp_mode=lambda: "ddp_optimizer"))
    vars(torch)["_dynamo"] = answer
    try:
        yield
    finally:
        if vars(torch).get("_dynamo") is answer:
            del vars(torch)["_dynamo"]  # torch imports it where it is asked for next


def _place(place: Place) -> dict[str, Any]:
    return {
        "rank": place.rank,
        "world": place.world,
        "local_rank": place.local_rank,
        "local_world": place.local_world,
        "node": place.rank // place.local_world,
        "nodes": place.world // place.local_world,
    }


def _plan(config: Config, plan: TrainPlan, lr: float) -> dict[str, Any]:
    return {
        "global_batch": plan.global_batch,
        "share": sum(len(part.ids) for part in plan.slices(0)),
        "accumulation": plan.accumulation,
        "slice_sizes": list(plan.slice_sizes),
        "largest_slice": plan.largest_slice,
        "steps_per_epoch": plan.steps_per_epoch,
        "total_steps": plan.length(config.train.epochs, config.train.steps),
        "learning_rate": lr,
        "warmup_epochs": settled(config.schedule.warmup_epochs),
    }


def _slice(part: Slice) -> dict[str, Any]:
    return {"epoch": part.epoch, "positions": [part.positions.start, part.positions.stop], "ids": part.ids.tolist()}


def _evaluation(plan: EvalPlan) -> dict[str, Any]:
    own = plan.slices()
    return {
        "batch": plan.batch,
        "batches": -(-plan.images // plan.batch),
        "rounds": plan.rounds,
        "own": [[part.positions.start, part.positions.stop] for part in own],
        "own_images": sum(len(part.positions) for part in own),
    }


def _meeting(name: str, place: Place) -> dict[str, Any]:
    environment: dict[str, str] = {}
    publish(place, environment)
    nodes, each = place.world // place.local_world, f"--nproc-per-node={place.local_world}"
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={FIRST_NODE}:{PORT}", f"--rdzv-id={name}"]
    return {
        "torchrun": ["--standalone", each] if nodes == 1 else [f"--nnodes={nodes}", each, *meeting],
        "environment": environment,
    }


def _waiting(wait_minutes: float, every: int) -> dict[str, Any]:
    return {
        "step_timeout": step_timeout(wait_minutes).total_seconds(),
        "control_timeout": CONTROL_TIMEOUT.total_seconds(),
        "exchange_every": every,
        "stop_known_within": 2 * every - 1,
    }


def _exchange(world: int, every: int, assumed: Assumed) -> dict[str, Any]:
    """By the model of ``distrib.faults``: what is left of an all-reduce behind its ``every`` steps is waited for."""
    low, high = ring_seconds(world)
    waited = [max(0.0, ring - every * assumed.step) / every for ring in (low, high)]
    return {
        "every": every,
        "ring": [low, high],
        "waited_a_step": waited,
        "share_of_step": [seconds / assumed.step for seconds in waited],
    }


def _save(sizes: Sizes, assumed: Assumed) -> dict[str, Any]:
    return {
        "summed_bytes": sizes.mean,
        "gathered_bytes": sizes.rows,
        "copied_bytes": sizes.checkpoint,
        "written_bytes": sizes.checkpoint,
        "write_seconds": sizes.checkpoint / assumed.write,
    }


def place_of(rank: int | None, world: int, local_world: int | None) -> Place:
    """The place of ``rank`` (default: the last) of ``world``, ``local_world`` to a machine (default: 8, or all).

    Raises:
        UserError: they do not fit together.
    """
    local = min(8, world) if local_world is None else local_world
    rank = world - 1 if rank is None else rank
    if world % local:
        raise UserError(
            f"--world {world} is no multiple of --local-world {local}: torchrun starts as many on each machine"
        )
    if rank >= world:
        raise UserError(f"--rank {rank} is not below --world {world}: ranks are counted from 0")
    master = (FIRST_NODE, PORT) if world > 1 else None
    return Place(rank, world, rank % local, local, master)
