"""What the loaders' tests share: made-up photographs, opened loaders, and how their batches are compared."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter
from torchvision.transforms.v2 import functional as F

from distrib.config import DataConfig
from distrib.data import Batch, EvalPlan, Index, Loader, TrainPlan, build_loader, open_data
from distrib.data.draws import crop_boxes, draws, flips

HAS_DALI = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
needs_dali = pytest.mark.skipif(not HAS_DALI, reason="nvidia.dali is not installed")
LOADERS = [pytest.param("dali", marks=needs_dali), "torchvision"]
CPU = torch.device("cpu")
CLASSES, IMAGES = 4, 64
DEPRECATED = pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities:DeprecationWarning")
SUBSAMPLING = {"444": 0, "420": 2}  # PIL's numbers


def photograph(rng: np.random.Generator) -> Image.Image:
    """Smooth colours, edges of all directions, some noise; 300–500 pixels a side."""
    height, width = (int(side) for side in rng.integers(300, 501, size=2))
    coarse = rng.integers(0, 256, (height // 40 + 2, width // 40 + 2, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    for k in range(12):
        x, y, r = int(rng.integers(width)), int(rng.integers(height)), int(rng.integers(5, 90))
        colour = tuple(rng.integers(0, 256, 3).tolist())
        if k % 2:
            pen.ellipse([x - r, y - r, x + r, y + r], fill=colour)
        else:
            pen.line([x, y, int(rng.integers(width)), int(rng.integers(height))], fill=colour, width=1 + r // 20)
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(0.7))) + rng.normal(0, 3, (height, width, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **({"quality": 95} if kind == "JPEG" else {}) | options)
    return stream.getvalue()


def write_photographs(base: Path) -> Path:
    """Folders 444 and 420 with the same ``IMAGES`` photographs for both splits; sample k is ``files(root)[k]``."""
    rng = np.random.default_rng(0)
    for k in range(IMAGES):
        image = photograph(rng)
        for name, number in SUBSAMPLING.items():
            data = encoded(image, subsampling=number)
            for split in ("train", "val"):
                file = base / name / split / f"class{k * CLASSES // IMAGES}" / f"{k:03d}.JPEG"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)
    return base


def corruptions() -> dict[str, bytes]:
    rng = np.random.default_rng(5)
    photo = photograph(rng)
    jpeg, png = encoded(photo), encoded(photo, "PNG")
    return {
        "truncated": jpeg[: len(jpeg) * 2 // 3],
        "garbage": rng.integers(0, 256, 4000, dtype=np.uint8).tobytes(),
        "empty": b"",
        "text": b"this is no image\n" * 40,
        "header only": jpeg[:700],
        "png": png[:3000] + b"\0" * 200 + png[3200:],  # torchvision's own PNG decoder dies of this one
    }


def files(root: Path, split: str = "train") -> list[Path]:
    return sorted((root / split).glob("*/*"))


def config(root: Path | str, **other: object) -> DataConfig:
    return DataConfig(
        **{
            "root": str(root),
            "eval_resize": 256,
            "eval_size": 224,
            "workers": 2,
            "eval_batch": 24,
            "prefetch": 2,
            **other,
        }
    )


class Opened:
    """A loader with what a test asks it about. Torchvision's decodes in this process, where nothing else is asked."""

    def __init__(
        self,
        kind: str,
        cfg: DataConfig,
        *,
        bad: Path | None = None,
        classes: int = CLASSES,
        workers: int | None = None,
        **other: Any,
    ) -> None:
        processes = workers if workers is not None else 0 if kind == "torchvision" else 2
        self.cfg = cfg.model_copy(update={"loader": kind, "workers": processes})
        self.said: list[str] = []
        indexes = open_data(self.cfg, classes)
        assert indexes is not None
        self.index: Index = indexes[0]
        self.val: Index = indexes[1]
        self.loader: Loader = build_loader(self.cfg, indexes, classes, CPU, bad, self.said.append, **other)
        assert type(self.loader).__name__ == {"dali": "DaliLoader", "torchvision": "WorkerLoader"}[kind]

    def train(self, first: int, last: int, batch: int = 16, seed: int = 3, **plan: int) -> list[Batch]:
        return list(self.loader.train(TrainPlan(len(self.index), batch, seed, **plan), first, last))

    def evaluate(self, **plan: int) -> list[Batch]:
        return list(self.loader.evaluate(EvalPlan(len(self.val), self.cfg.eval_batch, **plan)))


def distances(left: list[Batch], right: list[Batch]) -> torch.Tensor:
    """Absolute pixel differences, [images, 3, size, size]; ids and labels must be the same."""
    for a, b in zip(left, right, strict=True):
        assert np.array_equal(a.ids, b.ids)
        assert torch.equal(a.labels, b.labels)
        assert a.images.shape == b.images.shape
    return torch.cat([(a.images.int() - b.images.int()).abs() for a, b in zip(left, right, strict=True)]).float()


def same(left: list[Batch], right: list[Batch]) -> bool:
    """Bit for bit, however the images are cut into batches."""
    ids = [np.concatenate([batch.ids for batch in side]).tolist() for side in (left, right)]
    images, labels = ([torch.cat([batch[k] for batch in side]) for side in (left, right)] for k in (0, 1))
    return ids[0] == ids[1] and torch.equal(*images) and torch.equal(*labels)


def reference(index: Index, read: int, cfg: DataConfig, seed: int, epoch: int, position: int) -> torch.Tensor:
    """Sample ``read`` with the crop and flip of a position, made by PIL and torchvision without our loaders."""
    with Image.open(index.path(read)) as picture:
        image = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    uniform = draws(seed, epoch, range(position, position + 1))
    size = np.array([image.shape[1:]])
    image = F.resized_crop(
        image, *crop_boxes(uniform, size, cfg.scale, cfg.ratio)[0].tolist(), [cfg.size] * 2, antialias=True
    )
    return F.horizontal_flip(image) if flips(uniform, cfg.flip)[0] else image


def entries(path: Path, split: str) -> list[dict[str, Any]]:
    """The lines of a ``bad_samples.jsonl`` about a split."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if row["split"] == split]
