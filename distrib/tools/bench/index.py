"""What a data set's size costs each rank: opening the file list, memory, and the numbers of one step.

The peer is what torchvision's ImageFolder holds: a Python list of (file name, class). Its walk over the disk is left
out, its names are made from a counter. Every measurement has a process of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from distrib.config import DataConfig, UserError
from distrib.data.draws import crop_boxes, draws, flips
from distrib.data.index import Index, list_images, open_index, write_index
from distrib.data.order import TrainPlan
from distrib.layout import class_folders
from distrib.layout.splits import Split
from distrib.tools.bench.report import Report, in_fresh_process, positive

CLASSES = 1000
STEPS = 10  # that are taken after opening, spread over an epoch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``index``."""
    parser.add_argument("--files", type=positive, default=1_281_167, help="default: ImageNet's %(default)s")
    parser.add_argument("--batch", type=positive, default=32_768, help="global batch; default: %(default)s")
    parser.add_argument("--ranks", type=positive, default=8)
    parser.add_argument("--pairs", type=positive, default=5)


def run(args: argparse.Namespace) -> None:
    """Makes the index up, measures ``--pairs`` pairs of fresh processes, and prints the report."""
    if not Path("/proc/self/smaps_rollup").exists():
        raise UserError("index measures memory with /proc/self/smaps_rollup, which only Linux has")
    if args.batch > args.files or args.ranks > args.batch:
        raise UserError(f"--files {args.files} ≥ --batch {args.batch} ≥ --ranks {args.ranks} does not hold")
    settings = {"files": args.files, "batch": args.batch, "ranks": args.ranks, "pairs": args.pairs}
    report = Report("index", settings, args.json)
    report.compare("file list: memory", "index: memory")
    report.compare("file list: make", "index: open")
    with tempfile.TemporaryDirectory(prefix="distrib-bench-") as folder:
        folder_of_index = make_up(Path(folder), args.files)
        for _ in range(args.pairs):
            forget(folder_of_index)
            found = in_fresh_process(__name__, {**settings, "what": "index", "folder": folder})
            report.add("index: open", "s", found["open"], ("<", 3))
            report.add("index: open and check its sum", "s", found["verify"])
            report.add("index: memory", "MB", found["memory"], ("<", 200))
            report.add("index: memory that ranks do not share", "MB", found["own"])
            report.add("index: order, draws, boxes, first step", "ms", found["first"])
            report.add("index: order, draws, boxes, later steps", "ms", found["later"], ("<", 10))
            report.add("index: file names, first step", "ms", found["first_names"])
            report.add("index: file names, later steps", "ms", found["later_names"])
            found = in_fresh_process(__name__, {**settings, "what": "list"})
            report.add("file list: make", "s", found["make"])
            report.add("file list: memory", "MB", found["memory"])
            report.add("file list: an epoch's permutation", "ms", found["permutation"])
            report.save()
    report.notes += [
        f"a step is one rank's {-(-args.batch // args.ranks)} images of made-up sizes; before each opening the index's "
        "files are dropped from the page cache, so opening and the first step read the disk",
        "its sum is checked after the steps, by one rank a machine; part of the index is in memory then",
        "memory: resident set after opening and 10 steps, less that before; what is not shared is a rank's own",
        "the file list is made from a counter, without the walk over the disk that finds the names",
    ]
    report.save()
    print(report)


def make_up(folder: Path, files: int) -> Path:
    """An index of ``files`` images in ``folder/index`` whose class folders exist; returns the index's own folder."""
    source = folder / "data" / "train"
    classes = min(CLASSES, files)
    for k in range(classes):
        (source / class_name(k)).mkdir(parents=True)
        (source / class_name(k) / "0.JPEG").touch()
        # Old, as a data set is: what changed a moment ago is waited for.
        os.utime(source / class_name(k), (0, 0))
    listing = list_images(Split("train", source), class_folders(source))
    paths = [file_name(k, files).encode() for k in range(files)]
    labels = np.array([k * classes // files for k in range(files)], dtype=np.int32)
    return write_index(folder / "index", replace(listing, paths=paths, labels=labels)).folder


def class_name(number: int) -> str:
    """As long as a WordNet id."""
    return f"n{number:08d}"


def file_name(number: int, files: int) -> str:
    """The relative path of a file, as long as ImageNet's: n01440764/n01440764_10026.JPEG."""
    name = class_name(number * min(CLASSES, files) // files)
    return f"{name}/{name}_{number % 10_000}.JPEG"


def forget(folder: Path) -> None:
    """Drops the folder's files from the page cache."""
    for file in folder.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())  # only pages that are on disk can be dropped
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident() -> tuple[float, float]:
    """This process's resident memory and, of it, the part that no other can share, MB."""
    gc.collect()
    lines = [line.split() for line in Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()[1:]]
    kilobytes = {words[0]: int(words[1]) for words in lines}
    return kilobytes["Rss:"] * 1024 / 1e6, kilobytes["Anonymous:"] * 1024 / 1e6


def open_and_step(settings: dict[str, Any]) -> dict[str, float]:
    """Opens the index and takes steps, spread over the epoch as the samples of each are anyway."""
    cfg = DataConfig()
    before, own_before = resident()
    began = time.perf_counter()
    folder = Path(settings["folder"])
    place = Split("train", folder / "data" / "train"), str(folder / "index")
    index = open_index(*place, verify=False)
    opened = time.perf_counter() - began
    if len(index) != settings["files"]:
        raise RuntimeError(f"the index was built anew, with {len(index)} files")
    plan = TrainPlan(len(index), settings["batch"], seed=0, rank=0, world=settings["ranks"])
    numbers, names = [], []
    for k in range(STEPS):
        a, b = one_step(index, plan, cfg, k * plan.steps_per_epoch // STEPS)
        numbers.append(a)
        names.append(b)
    after, own_after = resident()
    began = time.perf_counter()
    open_index(*place, verify=True)
    return {
        "open": opened,
        "verify": time.perf_counter() - began,
        "memory": after - before,
        "own": own_after - own_before,
        "first": numbers[0],
        "later": statistics.median(numbers[1:]),
        "first_names": names[0],
        "later_names": statistics.median(names[1:]),
    }


def one_step(index: Index, plan: TrainPlan, cfg: DataConfig, step: int) -> tuple[float, float]:
    """Milliseconds for a step's samples, draws, crop boxes and flips, and for the names of its files."""
    count = len(plan.slices(step)[0].ids)
    sizes = np.random.default_rng(step).integers(300, 600, (count, 2), dtype=np.int32)  # the loaders know them
    began = time.perf_counter()
    (part,) = plan.slices(step)
    uniform = draws(plan.seed, part.epoch, part.positions)
    crop_boxes(uniform, sizes, cfg.scale, cfg.ratio)
    flips(uniform, cfg.flip)
    between = time.perf_counter()
    for sample in part.ids.tolist():
        index.encoded_path(sample)
    return 1000 * (between - began), 1000 * (time.perf_counter() - between)


def make_list(settings: dict[str, Any]) -> dict[str, float]:
    """The peer: names and classes as Python objects, and an epoch's order as an array."""
    files = settings["files"]
    before, _ = resident()
    began = time.perf_counter()
    samples = [(f"/data/imagenet/train/{file_name(k, files)}", k * CLASSES // files) for k in range(files)]
    made = time.perf_counter() - began
    after, _ = resident()
    began = time.perf_counter()
    np.random.default_rng(0).permutation(len(samples))
    return {"make": made, "memory": after - before, "permutation": 1000 * (time.perf_counter() - began)}


if __name__ == "__main__":
    _settings = json.loads(sys.argv[1])
    print(json.dumps(open_and_step(_settings) if _settings["what"] == "index" else make_list(_settings)))
