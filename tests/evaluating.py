"""What the tests of ``distrib evaluate`` share: evaluations in this process, and networks whose guesses differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.nn import functional as F

from distrib.config import DataConfig
from distrib.layout import imagenet
from distrib.place import Place
from distrib.tools.evaluate.__main__ import parse
from distrib.tools.evaluate.scoring import evaluate

PLAIN = ["train.precision=fp32", "data.loader=torchvision", "data.workers=0"]
IMAGES = 60
WNIDS = imagenet.wnids()
SIDE = 32  # of made-up pictures, which are evaluated at this size


def stop(received: str | None = None) -> Any:
    return SimpleNamespace(received=received, requested=lambda: received is not None)


def score(*words: str | Path, asked: str | None = None) -> dict[str, Any]:
    """The result of `distrib evaluate`, in this process; ``asked``: the signal that asked to stop."""
    found = evaluate(parse([*map(str, words), *PLAIN]), Place(), stop(asked))
    assert found is not None
    return found


def sized(side: int = SIDE) -> list[str]:
    """Pictures of this size as they are."""
    return [f"--size={side}", f"--resize={side}"]


def noise(count: int, seed: int = 0) -> torch.Tensor:
    """Pictures that differ in colour and pattern, uint8 [count, 3, SIDE, SIDE]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(256, (count, 3, 4, 4), generator=generator).float()
    fine = torch.randint(-40, 40, (count, 3, SIDE, SIDE), generator=generator)
    return (F.interpolate(coarse, SIDE, mode="bilinear") + fine).clamp(0, 255).to(torch.uint8)


def varied(outputs: int, make: Callable[..., nn.Module] = torchvision.models.resnet18) -> nn.Module:
    """Random weights whose norms have statistics of such pictures, so that not all are guessed to be the same."""
    torch.manual_seed(outputs)
    network = make(num_classes=outputs).train()
    with torch.no_grad():
        for norm in network.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = None
        network(normalised(noise(64, seed=1)))
        network.fc.weight.normal_(0, 1)
    return network.eval()


def normalised(images: torch.Tensor) -> torch.Tensor:
    cfg = DataConfig()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (cfg.mean, cfg.std))
    return (images.float() - mean) / std


@torch.inference_mode()
def logits_of(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """By hand: without our loaders, network and evaluator."""
    return network(normalised(images))


def save(network: nn.Module, file: Path, **more: Any) -> Path:
    torch.save({"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}, **more}, file)
    return file


def write(image: torch.Tensor, file: Path) -> None:
    """A picture that is read back as it is."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())).save(file, "PNG")


def figures(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """top1 and top5 in percent, and the loss, counted one by one."""
    order = logits.topk(min(5, logits.shape[1])).indices.tolist()
    pairs = list(zip(order, labels.tolist(), strict=True))
    return {
        "top1": 100 * sum(best[0] == label for best, label in pairs) / len(pairs),
        "top5": 100 * sum(label in best for best, label in pairs) / len(pairs),
        "loss": -logits.double().log_softmax(1)[range(len(labels)), labels].mean().item(),
    }


def close(found: dict[str, Any], expected: dict[str, float]) -> bool:
    same = all(abs(found[key] - expected[key]) < 1e-9 for key in ("top1", "top5"))
    return same and abs(found["loss"] - expected["loss"]) < 1e-4 * abs(expected["loss"])


class Set:
    """Pictures, a network of 1,000 outputs, and labels among which some are right, some among five, some neither."""

    def __init__(self, folder: Path) -> None:
        self.network = varied(1000)
        self.weights = save(self.network, folder / "r18.pth")
        self.images = noise(IMAGES)
        self.logits = logits_of(self.network, self.images)
        order = self.logits.argsort(1, descending=True)
        self.labels = order[torch.arange(IMAGES), torch.tensor([0, 2, 40, 0, 900, 4]).repeat(IMAGES // 6)]
        self.classes = sorted(set(self.labels.tolist()))
        assert len(self.classes) > 20

    def lay_out(self, root: Path, names: list[str], form: str = "{:03d}.png") -> Path:
        """A folder of the class folders ``names[label]``."""
        for k, (image, label) in enumerate(zip(self.images, self.labels.tolist(), strict=True)):
            write(image, root / names[label] / form.format(k))
        return root
