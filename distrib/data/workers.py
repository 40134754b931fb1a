"""The torchvision loader: worker processes that decode, crop and resize with torchvision's v2 functions.

It runs wherever torch runs, and it is the yardstick that the DALI loader's pixels are held against.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.io import ImageReadMode, decode_image, read_file
from torchvision.transforms.v2 import functional as F

from distrib.config import DataConfig
from distrib.data.draws import crop_boxes, draws, flips
from distrib.data.index import Index
from distrib.data.loader import Batch
from distrib.data.order import EvalPlan, Slice, TrainPlan
from distrib.data.quarantine import Quarantine
from distrib.faults import STOP_SIGNALS

JPEG = b"\xff\xd8"  # how a JPEG file begins

Bad = list[tuple[int, str]]  # samples that could not be read, and why


def decode(path: Path, size: Sequence[int]) -> torch.Tensor:
    """Decodes a file to uint8 RGB [3, height, width] without applying its EXIF rotation, as ImageNet's labels assume.

    Raises:
        RuntimeError, OSError: the file cannot be read, or its size is not ``size`` (height, width).
    """
    if min(size) == 0:
        raise RuntimeError("its header cannot be read")
    encoded = read_file(str(path))
    try:
        if bytes(encoded[:2].numpy()) != JPEG:  # only those: torchvision's PNG decoder crashes on some corrupt files
            raise RuntimeError("not a JPEG")
        image = decode_image(encoded, mode=ImageReadMode.RGB)
    except RuntimeError:  # PIL reads the other formats, and JPEGs of colour spaces that libjpeg does not convert
        image = _decode_with_pil(path)
    if tuple(image.shape[1:]) != tuple(int(side) for side in size):
        raise RuntimeError(f"it is {image.shape[2]}×{image.shape[1]} now, the index says {size[1]}×{size[0]}")
    return image


def _decode_with_pil(path: Path) -> torch.Tensor:
    try:
        with Image.open(path) as picture:
            if picture.mode.startswith("I;16"):  # 16-bit grey, whose values `convert` would cut off at 255
                pixels = (np.asarray(picture) >> 8).astype(np.uint8)[..., None].repeat(3, axis=2)
            else:
                pixels = np.array(picture.convert("RGB"))
    except Exception as error:  # a broken file makes PIL raise almost anything: SyntaxError, DecompressionBombError …
        raise RuntimeError(_first_line(error)) from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


class _TrainSlices(Dataset[Any]):
    """Item k is a whole slice of the plan; workers compute order and draws themselves, only k travels to them."""

    def __init__(self, index: Index, plan: TrainPlan, cfg: DataConfig, bad: set[int]) -> None:
        self._index, self._plan, self._cfg, self._bad = index, plan, cfg, bad

    def __getitem__(self, item: int) -> tuple[torch.Tensor, torch.Tensor, Slice, Bad]:
        step, k = divmod(item, self._plan.accumulation)
        part = self._plan.slices(step)[k]
        uniform = draws(self._plan.seed, part.epoch, part.positions)
        mirrored = flips(uniform, self._cfg.flip)
        size, count = self._cfg.size, len(part.ids)
        images = torch.empty((count, size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
        labels = torch.empty(count, dtype=torch.int64)
        boxes = crop_boxes(uniform, self._index.sizes[part.ids], self._cfg.scale, self._cfg.ratio)
        bad: Bad = []
        for row, sample in enumerate(part.ids.tolist()):
            image, read = self._read(sample, bad)
            if image is None:
                break  # not one can be read: the quarantine stops the run when it gets this list
            if read != sample:
                shape = self._index.sizes[read : read + 1]
                boxes[row] = crop_boxes(uniform[row : row + 1], shape, self._cfg.scale, self._cfg.ratio)[0]
            top, left, height, width = boxes[row].tolist()
            image = F.resized_crop(image, top, left, height, width, [size, size], antialias=True)
            images[row] = F.horizontal_flip(image) if mirrored[row] else image
            labels[row] = int(self._index.labels[read])
        return images, labels, part, bad

    def _read(self, sample: int, bad: Bad) -> tuple[torch.Tensor | None, int]:
        """The sample, or the first good one after it, as Quarantine.replace does; None where there is no good one."""
        for _ in range(len(self._index)):
            if sample not in self._bad:
                try:
                    return decode(self._index.path(sample), self._index.sizes[sample]), sample
                except (RuntimeError, OSError) as error:
                    bad.append((sample, _first_line(error)))
                    self._bad.add(sample)
            sample = (sample + 1) % len(self._index)
        return None, sample


class _EvalSlices(Dataset[Any]):
    """Item k is the k-th batch of this rank's share."""

    def __init__(self, index: Index, plan: EvalPlan, cfg: DataConfig) -> None:
        self._index, self._slices, self._cfg = index, plan.slices(), cfg

    def __len__(self) -> int:
        return len(self._slices)

    def __getitem__(self, item: int) -> tuple[torch.Tensor, torch.Tensor, Slice, Bad]:
        part, size = self._slices[item], self._cfg.eval_size
        images = torch.zeros((len(part.ids), size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
        labels = torch.from_numpy(self._index.labels[part.ids].astype(np.int64))
        bad: Bad = []
        for row, sample in enumerate(part.ids.tolist()):
            try:
                image = decode(self._index.path(sample), self._index.sizes[sample])
            except (RuntimeError, OSError) as error:
                bad.append((sample, _first_line(error)))
                labels[row] = -1
                continue
            image = F.resize(image, [self._cfg.eval_resize], antialias=True)
            images[row] = F.center_crop(image, [size, size])
        return images, labels, part, bad


class _Steps(Sampler[int]):
    """Item numbers first … last - 1, at any offset, without a list of them."""

    def __init__(self, items: range) -> None:
        self._items = items

    def __iter__(self) -> Iterator[int]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


class WorkerLoader:
    """Decodes on the host, ``cfg.workers`` processes a rank; 0 decodes in this one."""

    def __init__(
        self, cfg: DataConfig, train: Index, val: Index, device: torch.device, bad: tuple[Quarantine, Quarantine]
    ) -> None:
        self._cfg, self._train, self._val, self._device = cfg, train, val, device
        self._bad_train, self._bad_val = bad

    def train(self, plan: TrainPlan, first: int, last: int) -> Iterator[Batch]:
        """The batches of steps first … last - 1."""
        dataset = _TrainSlices(self._train, plan, self._cfg, self._bad_train.known())
        items = range(first * plan.accumulation, last * plan.accumulation)
        return self._batches(dataset, _Steps(items), self._bad_train, self._train)

    def evaluate(self, plan: EvalPlan) -> Iterator[Batch]:
        """The batches of this rank's share of the validation images."""
        dataset = _EvalSlices(self._val, plan, self._cfg)
        return self._batches(dataset, _Steps(range(len(dataset))), self._bad_val, self._val)

    def _batches(self, dataset: Dataset[Any], items: _Steps, bad: Quarantine, index: Index) -> Iterator[Batch]:
        workers = min(self._cfg.workers, len(items))
        # Items a worker holds. With one, it would idle from when that is done until the others' turns have passed.
        ahead = max(2, -(-self._cfg.prefetch // max(1, workers)))
        loader = DataLoader(
            dataset,
            sampler=items,
            batch_size=None,  # an item is a batch already
            num_workers=workers,
            prefetch_factor=ahead if workers else None,
            pin_memory=self._device.type == "cuda",
            worker_init_fn=_ignore_stop_signals,
        )
        for images, labels, part, found in loader:
            for sample, reason in found:
                bad.add(sample, index.path(sample), reason)
            images = images.to(self._device, non_blocking=True)
            yield Batch(images, labels.to(self._device, non_blocking=True), part.ids)


def _ignore_stop_signals(worker: int) -> None:
    # torchrun and Slurm signal the whole process group; the rank finishes its step and needs its workers for it.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
