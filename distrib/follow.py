"""Settings that follow from others, the data or the machine: what ``auto`` means, as pure functions.

A key that says auto is settled once, as soon as what it follows from is known, and is written down so: the run's folder
holds the value. Workers and decoder stay auto there, as each machine has its own, and so do the look for a val/ and the
preflight, which follows from each start's number of nodes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distrib.config import Config

IMAGENET = "${IMAGENET_DIR}"
WARMUP_SHARE, WARMUP_EPOCHS = 0.1, 5.0
EMA_SHARE, EMA_STEPS = 0.1, 10_000
# A begun run keeps these: they follow from the run's length, and it may be made longer.
KEPT = ("schedule.warmup_epochs", "ema.decay")


def follow_names(config: Config) -> Config:
    """Settles what the configuration alone tells: the run's name and the evaluation's sizes."""
    data = config.data
    values: dict[str, Any] = {}
    size = data.size if data.eval_size == "auto" else data.eval_size
    if data.eval_size == "auto" and data.eval_resize != "auto":
        size = min(size, data.eval_resize)
    values["data.eval_size"] = size
    values["data.eval_resize"] = round(size * 8 / 7) if data.eval_resize == "auto" else data.eval_resize
    if config.run.name == "auto":
        values["run.name"] = f"{_safe(config.model.name)}-{_data_name(config)}{_begun_from(config)}"
    return _with(config, values)


def keep(asked: Config, config: Config, saved: Mapping[str, Any]) -> Config:
    """``config`` with what the begun run has settled where ``asked`` says auto; ``saved``: its checkpoint."""
    typed, begun = flatten(asked.model_dump()), flatten(saved["config"])
    kept = {key: begun[key] for key in KEPT if typed.get(key) == "auto" and begun.get(key) not in (None, "auto")}
    if config.train.steps is None and "schedule.warmup_epochs" in kept:  # the run may have been made shorter, too
        kept["schedule.warmup_epochs"] = min(kept["schedule.warmup_epochs"], config.train.epochs)
    return _with(config, kept)


def follow(config: Config, *, classes: int | None = None, images: int | None = None, gpu: bool | None = None) -> Config:
    """Settles what follows from the data and the machine; what is None is not known and leaves its keys as they are.

    Args:
        classes: class folders.
        images: training images. A larger ``train.global_batch`` becomes that many.
        gpu: whether there is one to compile for.
    """
    train, schedule = config.train, config.schedule
    values: dict[str, Any] = {}
    if config.model.num_classes == "auto" and classes is not None:
        values["model.num_classes"] = classes
    if train.compile == "auto" and gpu is not None:
        values["train.compile"] = gpu
    epochs: float | None = train.epochs if train.steps is None else None
    if images is not None and train.steps is not None:
        epochs = train.steps / max(1, images // min(train.global_batch, images))
    if schedule.warmup_epochs == "auto" and epochs is not None:
        values["schedule.warmup_epochs"] = min(WARMUP_EPOCHS, round(WARMUP_SHARE * epochs, 6))
    if images is not None:
        batch = min(train.global_batch, images)
        values["train.global_batch"] = batch
        if train.micro_batch is not None:
            values["train.micro_batch"] = min(train.micro_batch, batch)
        if config.ema is not None and config.ema.decay == "auto":
            steps = train.steps or max(1, round(train.epochs * (images // batch)))
            updates = max(1.0, min(EMA_STEPS, EMA_SHARE * steps) / config.ema.every)
            values["ema.decay"] = round(1 - 1 / updates, 6)
    return _with(config, values)


def told(before: Config, after: Config) -> list[str]:
    """What has been settled between the two, as ``key=value``, with the earlier value where that was no auto."""
    old, new = flatten(before.model_dump()), flatten(after.model_dump())
    return [
        f"{key}={_shown(new[key])}" + ("" if old[key] == "auto" else f" (not {old[key]})")
        for key in new
        if new[key] != old.get(key)
    ]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested parts to dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _with(config: Config, values: Mapping[str, Any]) -> Config:
    """A copy with other values; they are known to be valid."""
    parts: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        part, _, name = key.partition(".")
        parts.setdefault(part, {})[name] = value
    return config.model_copy(update={part: getattr(config, part).model_copy(update=new) for part, new in parts.items()})


def _data_name(config: Config) -> str:
    if config.data.loader == "synthetic":
        return "synthetic"
    if IMAGENET in config.data.root:
        return "imagenet"
    root = os.path.expandvars(config.data.root).rpartition("sample:")[2]
    return _safe(Path(root).expanduser().absolute().name)


def _begun_from(config: Config) -> str:
    """So that what begins with weights is another run than what does not."""
    if config.optim.freeze is not None:
        return f"-frozen-{_safe(config.optim.freeze)}"
    return "-finetuned" if config.model.weights is not None else ""


def _safe(name: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", name).strip("-") or "data"


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
