"""Images to batches: an index of the files, the order, the draws, and three loaders that yield the same batches."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from distrib.config import DataConfig, UserError
from distrib.data import sample
from distrib.data.files import DataUnavailable
from distrib.data.index import Index, cache_dir, check_same_classes, open_index
from distrib.data.loader import Batch, Loader
from distrib.data.order import EvalPlan, TrainPlan
from distrib.data.quarantine import Quarantine
from distrib.data.synthetic import SyntheticLoader
from distrib.data.waiting import Waiting

__all__ = [
    "Batch",
    "DataUnavailable",
    "EvalPlan",
    "Index",
    "Loader",
    "TrainPlan",
    "build_loader",
    "open_data",
]


def open_data(
    cfg: DataConfig, classes: int, notify: Callable[[str], None] = lambda text: None
) -> tuple[Index, Index] | None:
    """The indexes of the training and validation images, built where there are none; None for synthetic data.

    Raises:
        UserError: the data is not there or does not fit together, or ``classes`` is not what it holds.
    """
    if cfg.loader == "synthetic":
        return None
    if "${" in cfg.root or not cfg.root:
        raise UserError(
            f"data.root is {cfg.root!r} and that variable is not set: set IMAGENET_DIR to the folder that holds "
            "train/ and val/, or train the built-in sample: --config configs/quickstart.yaml"
        )
    root = sample.unpack(cache_dir(), notify) if cfg.root == sample.ROOT else Path(cfg.root).expanduser()
    train, val = (open_index(root, split, cfg.index_dir, notify) for split in ("train", "val"))
    check_same_classes(train, val)
    if len(train.classes) != classes:
        raise UserError(
            f"model.num_classes is {classes}, but {root} has {len(train.classes)} class folders: "
            f"set model.num_classes={len(train.classes)}"
        )
    return train, val


def build_loader(
    cfg: DataConfig,
    indexes: tuple[Index, Index] | None,
    classes: int,
    device: torch.device,
    bad_samples: Path | None = None,
    notify: Callable[[str], None] = lambda text: None,
    *,
    notify_once: Callable[[str], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    local_ranks: int = 1,
) -> Loader:
    """The loader that ``cfg.loader`` names; without DALI on this machine, torchvision's, and a word about it.

    Args:
        notify_once: told what all ranks would say alike.
        stop: whether somebody asked to stop; looked at while images do not come.
        local_ranks: how many share this machine's cores.
    """
    if indexes is None:
        return SyntheticLoader(cfg, classes, device)
    once = notify_once or notify
    workers = max(1, usable_cores() // local_ranks) if cfg.workers is None else cfg.workers
    train, val = (
        (index, Quarantine(split, index, bad_samples, notify, once), Waiting(index, cfg.wait_minutes, stop, notify))
        for split, index in zip(("train", "val"), indexes, strict=True)
    )
    if cfg.loader == "dali":
        try:
            from distrib.data.dali import DaliLoader

            return DaliLoader(cfg, workers, device, train, val)
        except ImportError as error:
            once(
                f"nvidia.dali cannot be imported ({error}; pip install 'distrib[cuda13]' or '[cuda12]', Linux only): "
                "loading with torchvision's worker processes, the same batches but slower"
            )
    from distrib.data.workers import WorkerLoader

    return WorkerLoader(cfg, workers, device, train, val, notify)


def usable_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
