"""Paths of a configuration as other machines must read them: they do not start in this folder."""

from __future__ import annotations

import os
from pathlib import Path

from distrib.config import Config
from distrib.layout import SAMPLE


def located(config: Config) -> Config:
    """``config`` with absolute paths."""
    run = config.run.model_copy(update={"dir": beside(config.run.dir)})
    data, model, wandb = config.data, config.model, config.wandb
    if "${" not in data.root and data.root != SAMPLE:  # else a variable that only the nodes have
        data = data.model_copy(update={"root": beside(data.root)})
    if data.index_dir is not None:
        data = data.model_copy(update={"index_dir": beside(data.index_dir)})
    if model.weights is not None and Path(beside(model.weights)).exists():  # else a name of torchvision's
        model = model.model_copy(update={"weights": beside(model.weights)})
    if wandb.dir is not None:
        wandb = wandb.model_copy(update={"dir": beside(wandb.dir)})
    return config.model_copy(update={"run": run, "data": data, "model": model, "wandb": wandb})


def beside(path: str) -> str:
    """A path of the configuration as the nodes must read it: they do not start in this folder."""
    expanded = os.path.expanduser(path)
    return str(Path(expanded).absolute()) if expanded else path
