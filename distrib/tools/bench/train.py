"""What the trainer adds to its own arithmetic: images/s of ``train.py`` against a bare loop of plain torch code.

Both run the same network, batch, precision, memory format and number of threads, each in a fresh process, in turns.
The bare loop has one batch of normalised images on the device and does forward, backward and optimizer: no order of
samples, no normalisation, no logs, no stop signals, no step count.

A run's rate is that over all its steps but the first interval's. On a processor that others use too, whoever runs
beside a pair decides its ratio; there the fastest interval of each run is compared as well, as ``timeit`` compares.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from distrib.config import Config, ModelConfig, UserError
from distrib.engine.prepare import DTYPES, effective_precision, set_up_device
from distrib.models import build_model
from distrib.root import TRAIN
from distrib.runtime import start
from distrib.tools.bench import photos
from distrib.tools.bench.report import ROOT, Report, clean_environment, cores, has_dali, in_fresh_process, positive

GOAL = (">=", 0.97)
INTERVALS = 8  # of a run; the first is not counted: caches fill, and cuDNN searches
FASTEST = "fastest interval of "

Ends = list[tuple[int, float]]  # of the logged intervals: the step, and seconds on the run's own clock


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``train``."""
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch", type=positive, default=64)
    parser.add_argument("--size", type=positive, default=128, help="pixels")
    parser.add_argument("--precision", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--compile", action="store_true", help="both sides")
    parser.add_argument("--steps", type=positive, default=40, help="of a run; the first eighth is not counted")
    parser.add_argument("--pairs", type=positive, default=5)
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--data", type=Path, metavar="ROOT", help="train on these images too (train/, val/)")
    data.add_argument("--photos", type=positive, metavar="N", help="train on N made-up photographs too")
    parser.add_argument("--workers", type=positive, default=cores(), help="decoding threads; default: %(default)s")


def run(args: argparse.Namespace) -> None:
    """Measures ``--pairs`` pairs and prints the report."""
    if args.steps < 2 * INTERVALS:
        raise UserError(f"--steps {args.steps} is too short to measure: give {2 * INTERVALS} or more")
    build_model(ModelConfig(name=args.model, num_classes=1000))  # a name that is none is told before anything runs
    root = photos.make(args.photos) if args.photos else args.data
    settings = {
        "model": args.model,
        "classes": class_folders(root) if root else 1000,
        "batch": args.batch,
        "size": args.size,
        "precision": args.precision,
        "compile": args.compile,
        "steps": args.steps,
        "workers": args.workers,
    }
    report = Report("train", {**settings, "pairs": args.pairs, "data": str(root) if root else None}, args.json)
    report.compare("train.py", "bare loop", GOAL)
    report.compare("train.py on images", "train.py")
    report.compare(f"{FASTEST}train.py", f"{FASTEST}bare loop", GOAL)
    if root:
        report.notes.append(
            f"loader of the images: {'DALI' if has_dali() else 'torchvision, as DALI is not installed'}"
        )
    for _ in range(args.pairs):
        add_rates(report, "train.py", trainer(settings, None), args.batch)
        report.save()
        add_rates(report, "bare loop", in_fresh_process(__name__, settings)["ends"], args.batch)
        report.save()
        if root:
            add_rates(report, "train.py on images", trainer(settings, root), args.batch)
            report.save()
    print(report)


def class_folders(root: Path) -> int:
    """How many classes ``root/train`` has.

    Raises:
        UserError: there is no such folder.
    """
    if not (root / "train").is_dir():
        raise UserError(f"--data {root} has no folder train/")
    return sum(entry.is_dir() for entry in (root / "train").iterdir())


def add_rates(report: Report, name: str, ends: Ends, batch: int) -> None:
    """Notes a run's images/s: from its first interval's end to its last one's, and on a CPU of the fastest between."""
    (first, began), (last, ended) = ends[0], ends[-1]
    report.add(name, "images/s", (last - first) * batch / (ended - began))
    if not torch.cuda.is_available():  # a GPU's host runs ahead of it by some steps: intervals end early or late
        rates = [(b - a) * batch / (end - start) for (a, start), (b, end) in pairwise(ends)]
        report.add(FASTEST + name, "images/s", max(rates))


def trainer(settings: dict[str, Any], root: Path | None) -> Ends:
    """Intervals of a run of ``train.py``, from its ``metrics.jsonl``, on synthetic images where ``root`` is None.

    Raises:
        RuntimeError: the run failed.
    """
    with tempfile.TemporaryDirectory(prefix="distrib-bench-") as folder:
        config = trainer_config(settings, root, Path(folder) / "run")
        file = Path(folder) / "bench.yaml"
        file.write_text(json.dumps(config.model_dump(mode="json")), encoding="utf-8")  # JSON is YAML
        command = [sys.executable, str(TRAIN), "--config", str(file)]
        done = subprocess.run(command, env=clean_environment(), cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            words = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
            raise RuntimeError(f"train.py ended with exit code {done.returncode}: {words}")
        return interval_ends(Path(folder) / "run" / "metrics.jsonl")


def trainer_config(settings: dict[str, Any], root: Path | None, run_dir: Path) -> Config:
    """The run: one evaluation, of a few images, behind the last step; one checkpoint there; four logged intervals."""
    size, batch = settings["size"], settings["batch"]
    data = {"loader": "dali", "root": str(root.absolute())} if root else {"loader": "synthetic"}
    return Config.model_validate(
        {
            "run": {"name": "bench", "dir": str(run_dir)},
            "model": {"name": settings["model"], "num_classes": settings["classes"]},
            "data": {
                **data, "size": size, "eval_resize": size, "eval_size": size, "eval_batch": 8,
                "workers": settings["workers"], "synthetic": {"val": 8},
            },
            "train": {
                "steps": settings["steps"], "global_batch": batch, "precision": settings["precision"],
                "compile": settings["compile"], "eval_every_epochs": 1e9,
            },
            "schedule": {"warmup_epochs": 0},
            "checkpoint": {"every_steps": None, "every_minutes": None},
            "log": {"every_steps": settings["steps"] // INTERVALS},
            "wandb": {"mode": "disabled"},
        }
    )  # fmt: skip


def interval_ends(metrics: Path) -> Ends:
    """Where a run's logged intervals ended."""
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return [(record["step"], record["seconds"]) for record in records if record["kind"] == "train"]


def bare(settings: dict[str, Any]) -> Ends:
    """Intervals of the bare loop, as long as those of ``train.py``; a GPU is waited for at the first and the last."""
    runtime = start()  # the same device and threads
    device, precision = runtime.device, effective_precision(settings["precision"], runtime.device)
    set_up_device(device, precision, deterministic=False)  # and the same search for kernels
    dtype, defaults = DTYPES[precision], Config().optim
    model = build_model(ModelConfig(name=settings["model"], num_classes=settings["classes"]))
    model = model.to(memory_format=torch.channels_last).to(device)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=defaults.momentum, weight_decay=defaults.weight_decay,
        fused=device.type == "cuda",
    )  # fmt: skip
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    images = torch.randn(settings["batch"], 3, settings["size"], settings["size"], device=device)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(settings["classes"], (settings["batch"],), device=device)

    def loss_of(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return F.cross_entropy(model(images), labels)

    forward = torch.compile(loss_of, dynamic=False) if settings["compile"] else loss_of

    interval = settings["steps"] // INTERVALS
    ends: Ends = []
    for step in range(1, INTERVALS * interval + 1):
        scaler.scale(forward(images, labels)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if step % interval == 0:
            if device.type == "cuda" and step in (interval, INTERVALS * interval):
                torch.cuda.synchronize()
            ends.append((step, time.perf_counter()))
    return ends


if __name__ == "__main__":
    print(json.dumps({"ends": bare(json.loads(sys.argv[1]))}))
