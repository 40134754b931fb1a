"""Images/s of a whole training step: our network as the trainer runs it against torchvision's as others run it.

Torchvision's networks come in the usual way (contiguous, the default optimizer, eager) and in channels-last. All
variants live in one process and run in turns, on images that are on the device already. With ``--deterministic`` our
network runs both ways, so that what ``train.deterministic`` costs stands beside what it is without.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from distrib.config import Config, ModelConfig, TrainConfig, UserError
from distrib.data import Batch, TrainPlan
from distrib.engine.guard import Guard
from distrib.engine.prepare import DTYPES, Objective, effective_precision, set_up_device, wrap
from distrib.engine.step import TrainStep
from distrib.models import build_model
from distrib.optim import build_optimizer
from distrib.runtime import Runtime, start
from distrib.tools.bench.report import Report, positive

LR = 0.1
DETERMINISTIC = ", deterministic"
Step = Callable[[], object]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``model``."""
    gpu = torch.cuda.is_available()
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch", type=positive, default=256 if gpu else 32, help="default here: %(default)s")
    parser.add_argument("--size", type=positive, default=224 if gpu else 128, help="pixels; default here: %(default)s")
    parser.add_argument("--precision", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--compile", action="store_true", help="measure our network compiled, too")
    parser.add_argument("--deterministic", action="store_true", help="measure our network deterministic, too")
    parser.add_argument("--warm-up", type=positive, default=20 if gpu else 2, help="steps; default here: %(default)s")
    parser.add_argument(
        "--steps", type=positive, default=50 if gpu else 4, help="of a round; default here: %(default)s"
    )
    parser.add_argument("--rounds", type=positive, default=5)


def run(args: argparse.Namespace) -> None:
    """Warms every variant up, measures ``--rounds`` rounds of all, and prints the report."""
    if args.model not in torchvision.models.list_models(torchvision.models):
        raise UserError(f"--model {args.model} is not one of torchvision's: there is no peer")
    runtime = start()
    device, precision = runtime.device, effective_precision(args.precision, runtime.device)
    settings = {key: value for key, value in vars(args).items() if key not in ("json", "command", "run")}
    report = Report("model", {**settings, "precision_here": precision}, args.json)
    dtype = DTYPES[precision]
    makers: dict[str, Callable[[], Step]] = {"ours": lambda: ours(args, runtime, precision, compiled=False)}
    if args.compile:
        makers["ours, compiled"] = lambda: ours(args, runtime, precision, compiled=True)
    peers = {"torchvision": torch.contiguous_format, "torchvision, channels-last": torch.channels_last}
    for name, layout in peers.items():
        makers[name] = lambda layout=layout: theirs(args, device, dtype, layout)  # type: ignore[misc]
    for own in makers:
        for peer in peers:
            if own not in peers:
                report.compare(own, peer)
    if args.deterministic:
        own = "ours, compiled" if args.compile else "ours"
        makers[own + DETERMINISTIC] = makers[own]
        report.compare(own + DETERMINISTIC, own)
        set_up_device(device, precision, deterministic=True)  # cuBLAS asks for its workspace once

    steps = {}
    for name, make in makers.items():
        set_up_device(device, precision, name.endswith(DETERMINISTIC))
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        steps[name] = make()
        timed(steps[name], args.warm_up, device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # the search for kernels takes more than the steps do
            timed(steps[name], 2, device)
            report.add(f"{name}: peak memory", "MiB", (torch.cuda.max_memory_allocated() - before) / 2**20)
    for _ in range(args.rounds):
        for name, step in steps.items():
            set_up_device(device, precision, name.endswith(DETERMINISTIC))
            step()  # brings this variant's weights and code back into the caches
            report.add(name, "images/s", args.steps * args.batch / timed(step, args.steps, device))
        report.save()
    print(report)


def timed(step: Step, count: int, device: torch.device) -> float:
    """Seconds that ``count`` steps take, by the device's own clock where it has one."""
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(count):
            step()
        return time.perf_counter() - began
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    first.record()
    for _ in range(count):
        step()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1000


def ours(args: argparse.Namespace, runtime: Runtime, precision: str, compiled: bool) -> Step:
    """A step of the trainer: uint8 images, normalisation, network, loss, optimizer."""
    config = Config()
    device = runtime.device
    network = (
        build_model(ModelConfig(name=args.model, num_classes=1000)).to(memory_format=torch.channels_last).to(device)
    )
    objective = Objective(network, config.data.mean, config.data.std, DTYPES[precision]).to(device)
    call, ddp = wrap(objective, TrainConfig(compile=compiled), runtime)
    optimizer = build_optimizer(network, config.optim, LR)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    guard = Guard(optimizer, network)
    step = TrainStep(call, ddp, optimizer, scaler, None, world=1, global_batch=args.batch, guard=guard)
    images = torch.randint(256, (args.batch, 3, args.size, args.size), dtype=torch.uint8, device=device)
    labels = torch.randint(1000, (args.batch,), device=device)
    ids = TrainPlan(args.batch, args.batch, seed=0).slices(0)[0].ids
    batch = Batch(images.to(memory_format=torch.channels_last), labels, ids)
    return lambda: step([batch], 0, LR)


def theirs(args: argparse.Namespace, device: torch.device, dtype: torch.dtype, layout: torch.memory_format) -> Step:
    """A step as pytorch/examples' ImageNet script has it, with autocast, on images that are normalised already."""
    model: nn.Module = torchvision.models.get_model(args.model, weights=None).to(memory_format=layout).to(device)
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, weight_decay=1e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    images = torch.randn(args.batch, 3, args.size, args.size, device=device).to(memory_format=layout)
    labels = torch.randint(1000, (args.batch,), device=device)

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return step
