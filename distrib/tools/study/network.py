"""How large a network is. Imports torch, when it is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distrib.config import ModelConfig

if TYPE_CHECKING:
    from distrib.models.count import Counts


def size_of(cfg: ModelConfig, pixels: int) -> Counts:
    """Counts for a square image of ``pixels`` a side; with 1000 classes where their number is not known yet.

    Raises:
        UserError: there is no such network.
    """
    import torch

    from distrib.models import build_model
    from distrib.models.count import count

    if cfg.num_classes == "auto":
        cfg = cfg.model_copy(update={"num_classes": 1000})
    with torch.device("meta"):
        network = build_model(cfg).eval()
    return count(network, pixels)
