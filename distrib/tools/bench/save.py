"""What a save costs the training beside it: steps with one save each ``--every`` steps against steps without any.

One process, one network, in turns. The step waits for the copy to host memory; the file is written by a thread, which
takes processor's time of its own and, on a machine without a core to spare, that of the steps. Both are told: the ratio
of whole steps holds all, "the copy" is the wait alone, as a part of the steps from one save to the next.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from distrib.checkpoint import Checkpointer, path_for
from distrib.config import Config, ModelConfig, TrainConfig, UserError
from distrib.data import Batch, TrainPlan
from distrib.engine.prepare import DTYPES, Objective, effective_precision, set_up_device, wrap
from distrib.engine.state import TrainState
from distrib.engine.step import TrainStep
from distrib.models import build_model
from distrib.optim import build_optimizer
from distrib.runtime import Runtime, start
from distrib.tools.bench.report import Report, positive

GOAL = ("<", 1.02)
LR = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``save``."""
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch", type=positive, default=16)
    parser.add_argument("--size", type=positive, default=96, help="pixels; default: %(default)s")
    parser.add_argument("--precision", choices=tuple(DTYPES), default="bf16")
    parser.add_argument(
        "--every", type=positive, default=10, help="steps from a save to the next; default: %(default)s"
    )
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to write to; default: a temporary one")


def run(args: argparse.Namespace) -> None:
    """Measures ``--rounds`` pairs and prints the report."""
    if args.folder is not None and not args.folder.is_dir():
        raise UserError(f"--folder {args.folder} is no folder")
    runtime = start()
    precision = effective_precision(args.precision, runtime.device)
    set_up_device(runtime.device, precision, deterministic=False)
    names = ("model", "batch", "size", "every", "rounds", "precision")
    report = Report("save", {name: getattr(args, name) for name in names}, args.json)
    report.compare("step, with saves", "step, without", GOAL)
    step, state = trainer(args, runtime, precision)
    with tempfile.TemporaryDirectory(prefix="distrib-bench-", dir=args.folder) as folder:
        told: list[str] = []
        checkpointer = Checkpointer(Path(folder), 1, told.append)

        def save(number: int) -> float:
            began = time.perf_counter()
            checkpointer.save(state.capture(), number, None)
            return time.perf_counter() - began

        for number in range(2):  # caches, and the momentum that the first step makes
            step()
            save(number)
            checkpointer.wait()
        for k in range(args.rounds):
            for saves in (k % 2 == 0, k % 2 == 1):  # who goes first takes turns
                step()
                began = time.perf_counter()
                copy = save(k + 2) if saves else 0.0
                for _ in range(args.every):
                    step()
                wait(runtime)
                took = time.perf_counter() - began
                checkpointer.wait()  # what is left of the writing is nobody's
                report.add(f"step, {'with saves' if saves else 'without'}", "ms", 1e3 * took / args.every)
                if saves:
                    report.add("the copy", "ms a save", 1e3 * copy)
                    report.add("the copy, of the steps from a save to the next", "%", 100 * copy / took, ("<", 2))
            began, worked, own = time.perf_counter(), time.process_time(), time.thread_time()
            copy = save(k + 2)
            checkpointer.wait()
            report.add("writing, alone", "s a save", time.perf_counter() - began - copy)
            others = time.process_time() - worked - (time.thread_time() - own)
            report.add("processor's time of the writing thread", "s a save", others)
            report.add("file", "MB", path_for(Path(folder), k + 2).stat().st_size / 1e6)
            report.save()
        if told:
            raise UserError(told[0])
    report.notes.append(
        f"one save each {args.every} steps is many times as often as by default (1000, or an epoch, or 15 minutes)"
    )
    report.save()
    print(report)


def trainer(args: argparse.Namespace, runtime: Runtime, precision: str) -> tuple[Callable[[], object], TrainState]:
    """A training step of the trainer's own on random images that are on the device, and the state that it changes."""
    config, device = Config(), runtime.device
    network = build_model(ModelConfig(name=args.model, num_classes=1000))
    network = network.to(memory_format=torch.channels_last).to(device)
    objective = Objective(network, config.data.mean, config.data.std, DTYPES[precision]).to(device)
    call, ddp = wrap(objective, TrainConfig(compile=False), runtime)
    optimizer = build_optimizer(network, config.optim, LR)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    images = torch.randint(256, (args.batch, 3, args.size, args.size), dtype=torch.uint8, device=device)
    labels = torch.randint(1000, (args.batch,), device=device)
    ids = TrainPlan(args.batch, args.batch, seed=0).slices(0)[0].ids
    batch = Batch(images.to(memory_format=torch.channels_last), labels, ids)
    own = TrainStep(call, ddp, optimizer, scaler, None, world=1, global_batch=args.batch)
    return lambda: own([batch], 0, LR), TrainState(network, optimizer, scaler, None, runtime)


def wait(runtime: Runtime) -> None:
    """Waits for the device."""
    if runtime.device.type == "cuda":
        torch.cuda.synchronize()
