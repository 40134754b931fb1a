"""Images to batches: an index of the files, the order, the draws, and three loaders that yield the same batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from distrib.config import Auto, DataConfig
from distrib.data import sample, waiting
from distrib.data.index import Index, open_index
from distrib.data.loader import Batch, Loader
from distrib.data.order import EvalPlan, TrainPlan, make_plans
from distrib.data.quarantine import Quarantine
from distrib.data.synthetic import SyntheticLoader
from distrib.layout import SAMPLE, data_root, find_splits, look
from distrib.surroundings import usable_cores

__all__ = ["Batch", "EvalPlan", "Index", "Loader", "TrainPlan", "build_loader", "make_plans", "open_data"]


def open_data(
    cfg: DataConfig,
    classes: int | Auto = "auto",
    notify: Callable[[str], None] = lambda text: None,
    stop: Callable[[], bool] = lambda: False,
    verify: bool = True,
) -> tuple[Index, Index] | None:
    """The indexes of the training and validation images, built where there are none; None for synthetic data.

    Args:
        verify: whether to check that the indexes are what was written, which reads them: for one process a machine.

    Raises:
        UserError: the data is not there or does not fit together, or ``classes`` is not what it holds.
        Interrupted: ``stop()`` while the data was listed.
    """
    if cfg.loader == "synthetic":
        return None
    look(cfg, classes)
    if cfg.root == SAMPLE:
        sample.unpack(data_root(cfg), notify, verify)
    splits = find_splits(cfg)
    train, val = (open_index(split, cfg.index_dir, notify, stop, verify) for split in splits)
    held_out = splits[1].held_out
    of_train = "" if held_out is None else f" ({100 * held_out:g} % of each class are held out: data.val_split)"
    notify(f"training: {len(train):,} images, validation: {len(val):,}{of_train}, {len(train.classes)} classes")
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
    ranks: int = 1,
    local_ranks: int = 1,
) -> Loader:
    """The loader that ``cfg.loader`` names; without DALI on this machine, torchvision's, and a word about it.

    Args:
        notify_once: told what all ranks would say alike.
        stop: whether somebody asked to stop; looked at while images do not come.
        ranks: how many the run has. Those of one that has several wait longer for a slow batch, as all save together.
        local_ranks: how many share this machine's cores.
    """
    if indexes is None:
        return SyntheticLoader(cfg, classes, device)
    once = notify_once or notify
    workers = max(1, usable_cores() // local_ranks) if cfg.workers is None or cfg.workers == "auto" else cfg.workers
    patience = waiting.ALONE if ranks == 1 else waiting.TOGETHER
    train, val = (
        (
            index,
            Quarantine(split, index, bad_samples, notify, once),
            waiting.Waiting(index, cfg.wait_minutes, stop, notify, patience),
        )
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
