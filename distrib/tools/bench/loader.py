"""Images/s of our loaders against the usual ones, over the same files, with as many workers.

The peers are torchvision's ImageFolder behind a DataLoader, with the transforms of pytorch/examples' ImageNet script,
and DALI's own reader and random crop, as in NVIDIA's ResNet-50 example. All loaders run in turns, each from a fresh
start: batches flow before the clock starts, and the consumer only waits. Epochs follow without a gap on all sides.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from distrib.config import DataConfig
from distrib.data import Index, TrainPlan, build_loader, sample
from distrib.data.index import open_index
from distrib.layout import SAMPLE, data_root
from distrib.layout.splits import Split
from distrib.runtime import start
from distrib.tools.bench import photos
from distrib.tools.bench.report import Report, cores, has_dali, in_fresh_process, positive

SAMPLE_SIZE = 28  # the built-in sample's own, pixels
Batches = Callable[[], Iterator[torch.Tensor]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``loader``."""
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--data", type=Path, metavar="ROOT", help="with train/; default: the built-in sample")
    data.add_argument("--photos", type=positive, metavar="N", help="N made-up photographs")
    parser.add_argument("--batch", type=positive, default=128)
    parser.add_argument("--size", type=positive, help="pixels; default: 224, the built-in sample's 28")
    parser.add_argument("--workers", type=positive, default=cores(), help="default here: %(default)s")
    parser.add_argument("--batches", type=positive, help="of a round; default: four a worker")
    parser.add_argument("--rounds", type=positive, default=5)


def run(args: argparse.Namespace) -> None:
    """Measures ``--rounds`` rounds of all loaders and prints the report."""
    root = photos.make(args.photos) if args.photos else args.data or sample.unpack(data_root(DataConfig(root=SAMPLE)))
    size = args.size or (224 if args.photos or args.data else SAMPLE_SIZE)
    batches = args.batches or 4 * args.workers
    index = open_index(Split("train", root / "train"))
    device = start().device
    settings = {
        "data": str(root), "images": len(index), "batch": args.batch, "size": size, "workers": args.workers,
        "batches": batches, "rounds": args.rounds, "device": device.type,
    }  # fmt: skip
    report = Report("loader", settings, args.json)
    loaders: dict[str, Batches] = {
        "ours, torchvision": lambda: ours("torchvision", index, settings, device),
        "ImageFolder + DataLoader": lambda: image_folder(settings, device),
    }
    report.compare("ours, torchvision", "ImageFolder + DataLoader")
    if has_dali():
        whole = must_decode_whole(settings) if device.type == "cuda" else ""
        if whole:
            report.notes.append(f"plain DALI decodes whole images and crops them then, for {whole}")
        loaders["ours, DALI"] = lambda: ours("dali", index, settings, device)
        loaders["plain DALI"] = lambda: plain_dali(settings, device, bool(whole))
        report.compare("ours, DALI", "ImageFolder + DataLoader")
        report.compare("ours, DALI", "plain DALI")
    else:
        report.notes.append("DALI is not installed: its loaders are left out")
    for _ in range(args.rounds):
        for name, loader in loaders.items():
            report.add(name, "images/s", rate(loader(), 2 * args.workers, batches, args.batch, device))
        report.save()
    print(report)


def rate(batches: Iterator[torch.Tensor], warm_up: int, count: int, size: int, device: torch.device) -> float:
    """Images/s over ``count`` batches behind the first ``warm_up``."""
    for _ in range(warm_up):
        next(batches)
    wait(device)
    began = time.perf_counter()
    for _ in range(count):
        next(batches)
    wait(device)
    return count * size / (time.perf_counter() - began)


def wait(device: torch.device) -> None:
    """Until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def total(settings: dict[str, Any]) -> int:
    """Batches that a round may take: workers must not run out of work at its end, where all sides work ahead."""
    return settings["batches"] + 8 * settings["workers"]


def ours(loader: str, index: Index, settings: dict[str, Any], device: torch.device) -> Iterator[torch.Tensor]:
    """The trainer's loader."""
    config = {"loader": loader, "root": settings["data"], "size": settings["size"], "workers": settings["workers"]}
    made = build_loader(DataConfig.model_validate(config), (index, index), len(index.classes), device)
    plan = TrainPlan(len(index), settings["batch"], seed=0)
    for batch in made.train(plan, 0, total(settings)):
        yield batch.images


def image_folder(settings: dict[str, Any], device: torch.device) -> Iterator[torch.Tensor]:
    """Torchvision's, as in github.com/pytorch/examples, imagenet/main.py."""
    from torch.utils.data import DataLoader, RandomSampler
    from torchvision import datasets, transforms

    config = DataConfig()
    steps = [
        transforms.RandomResizedCrop(settings["size"]),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize([m / 255 for m in config.mean], [s / 255 for s in config.std]),
    ]
    dataset = datasets.ImageFolder(str(Path(settings["data"]) / "train"), transforms.Compose(steps))
    sampler = RandomSampler(dataset, num_samples=total(settings) * settings["batch"])  # permutations, one by one
    loader = DataLoader(
        dataset, settings["batch"], sampler=sampler, num_workers=settings["workers"], pin_memory=device.type == "cuda"
    )
    for images, labels in loader:
        labels.to(device, non_blocking=True)
        yield images.to(device, non_blocking=True)


def plain_dali(settings: dict[str, Any], device: torch.device, whole: bool) -> Iterator[torch.Tensor]:
    """DALI's, as in github.com/NVIDIA/DALI, docs/examples/use_cases/pytorch/resnet50/main.py."""
    from nvidia.dali import fn, pipeline_def, types

    gpu, config = device.type == "cuda", DataConfig()
    box: dict[str, Any] = {
        "random_aspect_ratio": list(config.ratio),
        "random_area": list(config.scale),
        "num_attempts": 100,
    }
    size = settings["size"]

    @pipeline_def
    def graph() -> Any:
        files, labels = fn.readers.file(
            file_root=str(Path(settings["data"]) / "train"), random_shuffle=True, pad_last_batch=True, name="Reader"
        )
        kind = "mixed" if gpu else "cpu"
        if whole:
            images = fn.random_resized_crop(fn.decoders.image(files, device=kind), size=[size, size], **box)
        else:
            images = fn.decoders.image_random_crop(files, device=kind, output_type=types.RGB, **box)
            images = fn.resize(images, resize_x=size, resize_y=size, interp_type=types.INTERP_TRIANGULAR)
        images = fn.crop_mirror_normalize(
            images, dtype=types.FLOAT, output_layout="CHW", crop=(size, size), mean=list(config.mean),
            std=list(config.std), mirror=fn.random.coin_flip(probability=0.5),
        )  # fmt: skip
        return images, labels.gpu() if gpu else labels

    pipeline = graph(
        batch_size=settings["batch"], num_threads=settings["workers"], device_id=device.index if gpu else None,
        seed=12, prefetch_queue_depth=config.prefetch, exec_dynamic=True,
    )  # fmt: skip
    pipeline.build()
    while True:
        images, _ = pipeline.run()
        yield torch.from_dlpack(images.as_tensor())


def must_decode_whole(settings: dict[str, Any]) -> str:
    """Why plain DALI cannot decode regions here ("" where it can): nvImageCodec 0.9 crashes on a GPU (its issue 55)."""
    try:
        in_fresh_process(__name__, settings)
    except RuntimeError as error:
        return f"its decoder of regions fails here: {error}"
    return ""


if __name__ == "__main__":
    _settings = json.loads(sys.argv[1])
    _batches = plain_dali(_settings, start().device, whole=False)
    for _ in range(3):
        next(_batches)
    wait(start().device)
    print("{}")
