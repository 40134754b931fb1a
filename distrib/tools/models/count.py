"""Our networks' counts beside torchvision's, and beside what it publishes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from distrib.models.count import count
from distrib.models.resnet import ARCHITECTURES, ResNet

IMAGENET = (224, 1000)  # pixels a side, classes
SMALL = (32, 10)  # CIFAR-10's, for which He et al. 2015, section 4.2, made these networks


def row(name: str, size: int | None, classes: int | None) -> dict[str, Any]:
    """The network ``name`` and torchvision's of that name, counted alike.

    Args:
        size: pixels a side; None: as the network was made for.
        classes: the same.

    Returns:
        size, classes and ``Counts``' names; "torchvision": None, or its counts and, where they are for this size and
        number of classes, "published": what it says of its own weights (parameters, gmacs).
    """
    arch = ARCHITECTURES[name]
    usual = SMALL if arch.stem == "small" else IMAGENET
    size, classes = size or usual[0], classes or usual[1]
    with torch.device("meta"):
        own = ResNet(arch, classes).eval()
    return {
        "name": name,
        "size": size,
        "classes": classes,
        **vars(count(own, size)),
        "torchvision": _torchvision(name, size, classes),
    }


def _torchvision(name: str, size: int, classes: int) -> dict[str, Any] | None:
    from torchvision import models

    if name not in models.list_models(module=models):
        return None
    with torch.device("meta"):
        theirs = models.get_model(name, weights=None, num_classes=classes).eval()
    published = {}
    if (size, classes) == IMAGENET:
        meta = next(iter(models.get_model_weights(name))).meta
        if "num_params" in meta and "_ops" in meta:
            published = {"published": {"parameters": meta["num_params"], "gmacs": meta["_ops"]}}
    return vars(count(theirs, size)) | published


def differences(found: dict[str, Any]) -> list[str]:
    """Where torchvision's counts are others than ours, as "+1.2 % MACs" of theirs over ours."""
    words = {"parameters": "parameters", "macs": "MACs", "activations": "activations"}
    theirs = found["torchvision"]
    return [f"{theirs[key] / found[key] - 1:+.2%} {word}" for key, word in words.items() if theirs[key] != found[key]]


def as_published(found: dict[str, Any]) -> bool:
    """Whether ours are the parameters that torchvision publishes, and its GMACs to the three places that it gives."""
    published = found["torchvision"]["published"]
    return (found["parameters"], round(found["macs"] / 1e9, 3)) == (
        published["parameters"],
        round(published["gmacs"], 3),
    )


def torchvision_version() -> str:
    """That with which is compared."""
    import torchvision

    return str(torchvision.__version__)


def agreement(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Sentences on how far torchvision's networks and its published figures are the same."""
    both = [found for found in rows if found["torchvision"]]
    published = [found for found in both if "published" in found["torchvision"]]
    lines = []
    if both:
        same = sum(not differences(found) for found in both)
        lines.append(
            f"torchvision {torchvision_version()}, counted in the same way: the same for {same} of {len(both)}."
        )
    if published:
        other = [found["name"] for found in published if not as_published(found)]
        same = len(published) - len(other)
        lines.append(
            f"The parameters and GMACs that it publishes: the same for {same} of {len(published)}"
            + (f"; others for {', '.join(other)}." if other else ".")
        )
    return lines
