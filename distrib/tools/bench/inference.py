"""Pictures/s of ``distrib evaluate`` and ``distrib features`` against timm's validate.py and a plain torchvision loop.

All read the same files and the same weights, ResNet-50's of torchvision by default, with as many worker processes or
threads. A figure is that of the whole command, from its start to its end, imports included, as a user waits for it.
validate.py is timm's own script, from a checkout of github.com/huggingface/pytorch-image-models; it is no part of
timm's package, so that its place is an argument, and evaluation is left out without it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from distrib.config import UserError
from distrib.tools.bench import photos
from distrib.tools.bench.report import ROOT, Report, clean_environment, cores, positive

OURS, THEIRS = "evaluate", "timm's validate.py"
LOOP = "torchvision loop"
AT_ONCE = 32  # pictures in a batch, on all sides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``inference``."""
    parser.add_argument("--validate", type=Path, metavar="FILE", help="timm's validate.py; without: features alone")
    parser.add_argument("--model", default="resnet50", help="one that torchvision and timm have; default: %(default)s")
    parser.add_argument("--photos", type=positive, default=400, help="made-up photographs; default: %(default)s")
    parser.add_argument("--size", type=positive, default=224, help="pixels; default: %(default)s")
    parser.add_argument("--workers", type=positive, default=cores(), help="default here: %(default)s")
    parser.add_argument("--rounds", type=positive, default=3, help="default: %(default)s")


def run(args: argparse.Namespace) -> None:
    """Measures ``--rounds`` rounds of all commands in turns and prints the report."""
    import torchvision

    if args.model not in torchvision.models.list_models(torchvision.models):
        raise UserError(f"--model {args.model} is not one of torchvision's: there is no peer")
    if args.validate is not None and not args.validate.is_file():
        raise UserError(f"--validate {args.validate}: there is no such file")
    root, device = photos.make(args.photos), "cuda" if torch.cuda.is_available() else "cpu"
    settings = {key: getattr(args, key) for key in ("model", "photos", "size", "workers", "rounds")}
    report = Report("inference", {**settings, "batch": AT_ONCE, "device": device}, args.json)
    with tempfile.TemporaryDirectory() as scratch:
        weights = Path(scratch) / "weights.pth"
        torch.manual_seed(0)
        network = torchvision.models.get_model(args.model, num_classes=photos.CLASSES)
        torch.save(network.state_dict(), weights)
        commands = evaluations(args, root, weights, device) if args.validate else {}
        commands |= features(args, root, weights, device)
        if args.validate:
            report.compare(f"{OURS}, fp32", f"{THEIRS}, fp32", (">=", 1.0))
            report.compare(f"{OURS}, bf16", f"{THEIRS}, bf16, channels-last", (">=", 1.0))
            report.compare(f"{OURS} --fast", f"{THEIRS}, fp32", (">=", 1.5))
        report.compare("features --exact", f"{LOOP}, fp32", (">=", 1.0))
        report.compare("features", f"{LOOP}, fp32", (">=", 1.5))
        for _ in range(args.rounds):
            for name, command in commands.items():
                output = Path(scratch) / "features.npy"
                for old in (output, output.with_suffix(".txt")):
                    old.unlink(missing_ok=True)
                report.add(name, "pictures/s", args.photos / seconds([*command], scratch))
            report.save()
    print(report)


def evaluations(args: argparse.Namespace, root: Path, weights: Path, device: str) -> dict[str, list[str]]:
    """Both sides' commands that evaluate, by the rows' names."""
    resize = round(args.size * 8 / 7)
    ours = [sys.executable, "-m", "distrib.tools.evaluate", str(weights), "--data", str(root), "--split", "train",
            f"data.eval_size={args.size}", f"data.eval_resize={resize}", f"data.workers={args.workers}",
            f"data.eval_batch={AT_ONCE}"]  # fmt: skip
    theirs = [sys.executable, str(args.validate), str(root), "--split", "train", "--model", args.model,
              "--num-classes", str(photos.CLASSES), "--checkpoint", str(weights), "--batch-size", str(AT_ONCE),
              "--workers", str(args.workers), "--img-size", str(args.size), "--crop-pct", str(args.size / resize),
              "--interpolation", "bilinear", "--device", device]  # fmt: skip
    return {
        f"{OURS}, fp32": [*ours, "train.precision=fp32"],
        f"{THEIRS}, fp32": theirs,
        f"{OURS}, bf16": ours,
        f"{THEIRS}, bf16, channels-last": [*theirs, "--amp", "--amp-dtype", "bfloat16", "--channels-last"],
        f"{OURS} --fast": [*ours, "--fast"],
    }


def features(args: argparse.Namespace, root: Path, weights: Path, device: str) -> dict[str, list[str]]:
    """Both sides' commands that write features, by the rows' names."""
    resize = round(args.size * 8 / 7)
    ours = [sys.executable, "-m", "distrib.tools.features", str(root / "train"), "--weights", str(weights),
            "--output", "features.npy", f"data.eval_size={args.size}", f"data.eval_resize={resize}",
            f"data.workers={args.workers}"]  # fmt: skip
    loop = {"root": str(root / "train"), "weights": str(weights), "model": args.model, "size": args.size,
            "resize": resize, "workers": args.workers, "device": device}  # fmt: skip
    return {
        "features --exact": [*ours, "--exact"],
        "features": ours,
        f"{LOOP}, fp32": [sys.executable, "-m", __name__, json.dumps(loop)],
    }


def seconds(command: list[str], folder: str) -> float:
    """What a command takes, in ``folder``.

    Raises:
        RuntimeError: it failed; with its last words.
    """
    environment = clean_environment() | {"PYTHONPATH": str(ROOT)}
    began = time.perf_counter()
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    took = time.perf_counter() - began
    if done.returncode != 0:
        words = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise RuntimeError(f"{' '.join(command[1:3])} ended with exit code {done.returncode}: {words}")
    return took


def plain_loop(settings: dict[str, Any]) -> None:
    """The features of a folder as most people write it: ImageFolder, DataLoader, the last layer taken off."""
    import numpy as np
    import torchvision
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    steps = [
        transforms.Resize(settings["resize"]),
        transforms.CenterCrop(settings["size"]),
        transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
    dataset = datasets.ImageFolder(settings["root"], transforms.Compose(steps))
    loader = DataLoader(dataset, AT_ONCE, num_workers=settings["workers"], pin_memory=settings["device"] == "cuda")
    network = torchvision.models.get_model(settings["model"], num_classes=photos.CLASSES)
    network.load_state_dict(torch.load(settings["weights"], weights_only=True))
    network.fc = torch.nn.Identity()
    network.eval().to(settings["device"])
    found = []
    with torch.inference_mode():
        for images, _ in loader:
            found.append(network(images.to(settings["device"], non_blocking=True)).cpu().numpy())
    np.save("features.npy", np.concatenate(found))


if __name__ == "__main__":
    plain_loop(json.loads(sys.argv[1]))
