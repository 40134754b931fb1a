"""The torchvision loader: worker processes that decode, crop and resize with torchvision's v2 functions.

It runs wherever torch runs, and it is the yardstick that the DALI loader's pixels are held against.
"""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import util
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from distrib.config import DataConfig, settled
from distrib.data import vision as F
from distrib.data.decode import ContentError, decode, jpeg_shape
from distrib.data.draws import crop_boxes, draws, flips
from distrib.data.fetch import Bad, Fetcher
from distrib.data.files import Encoded, Outage
from distrib.data.index import Index
from distrib.data.loader import Batch
from distrib.data.order import EvalPlan, Ids, Slice, TrainPlan
from distrib.data.quarantine import Quarantine
from distrib.data.waiting import Waiting
from distrib.faults import STOP_SIGNALS

TIME_OUT = 1  # seconds after which torch's loader lets us look around
GRACE = 2.0  # seconds that a worker has to end by itself once it is no longer wanted

Row = tuple[int, int, Encoded]  # row of a slice, the sample that was read for it, its file


class _Item(NamedTuple):
    """A slice from a worker. Tensors travel in shared memory, numpy arrays (images [n, size, size, 3]) in a pipe."""

    images: torch.Tensor | npt.NDArray[np.uint8]
    labels: torch.Tensor | npt.NDArray[np.int64]
    part: Slice
    bad: list[Bad]


class _Slices(Dataset[Any]):
    """Item k is a whole slice of the plan; workers compute order and draws themselves, only k travels to them."""

    size: int

    def __init__(self, index: Index, cfg: DataConfig, bad: set[int]) -> None:
        self._index, self._cfg = index, cfg
        self._fetcher = Fetcher(index, bad)

    def __getitem__(self, item: int) -> _Item | Outage:
        part, bad = self.part(item), list[Bad]()
        images = torch.zeros((len(part.ids), self.size, self.size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
        ids = part.ids.copy()
        todo = dict(enumerate(part.ids.tolist()))
        try:
            while todo:
                rows, todo = self._fetcher.fetch(todo, bad), {}
                transform = self.transform(part, rows)
                for row, sample, encoded in rows:
                    try:
                        if encoded.problem:
                            raise ContentError(encoded.problem)
                        images[row] = transform(row, decode(encoded.data))
                        ids[row] = sample
                    except ContentError as error:
                        self._fetcher.refuse(sample, encoded, error, bad)
                        todo[row] = sample
        except Outage as outage:
            return outage  # as a result: what is raised in a worker comes wrapped in its traceback
        labels = torch.from_numpy(self.labels(part, ids).astype(np.int64))
        return _Item(*_share(images, labels), part, bad)

    def part(self, item: int) -> Slice:
        """The slice of an item."""
        raise NotImplementedError

    def transform(self, part: Slice, rows: list[Row]) -> Callable[[int, torch.Tensor], torch.Tensor]:
        """What makes the picture of a row, uint8 [3, height, width], into one of the batch."""
        raise NotImplementedError

    def labels(self, part: Slice, read: Ids) -> npt.NDArray[Any]:
        """The labels for a slice, of which the samples ``read`` were read."""
        raise NotImplementedError


class _TrainSlices(_Slices):
    def __init__(self, plan: TrainPlan, *args: Any) -> None:
        super().__init__(*args)
        self._plan, self.size = plan, self._cfg.size

    def part(self, item: int) -> Slice:
        step, k = divmod(item, self._plan.accumulation)
        return self._plan.slices(step)[k]

    def transform(self, part: Slice, rows: list[Row]) -> Callable[[int, torch.Tensor], torch.Tensor]:
        cfg = self._cfg
        uniform = draws(self._plan.seed, part.epoch, part.positions)
        mirrored = flips(uniform, cfg.flip)
        # A box costs a twentieth of a decoded image when it is made alone, and nothing to speak of with the others.
        shapes = [(row, shape) for row, _, encoded in rows if (shape := jpeg_shape(encoded.data))]
        known = [row for row, _ in shapes]
        sizes = np.array([shape for _, shape in shapes], dtype=np.int64).reshape(-1, 2)
        boxes = dict(zip(known, crop_boxes(uniform[known], sizes, cfg.scale, cfg.ratio).tolist(), strict=True))

        def transform(row: int, image: torch.Tensor) -> torch.Tensor:
            if row not in boxes:
                size = np.array([image.shape[1:]])
                boxes[row] = crop_boxes(uniform[row : row + 1], size, cfg.scale, cfg.ratio)[0].tolist()
            top, left, height, width = boxes[row]
            image = F.resized_crop(image, top, left, height, width, [cfg.size, cfg.size], antialias=True)
            return F.horizontal_flip(image) if mirrored[row] else image

        return transform

    def labels(self, part: Slice, read: Ids) -> npt.NDArray[Any]:
        return self._index.labels[read]


class _EvalSlices(_Slices):
    def __init__(self, plan: EvalPlan, *args: Any) -> None:
        super().__init__(*args)
        self._slices, self.size = plan.slices(), settled(self._cfg.eval_size)

    def __len__(self) -> int:
        return len(self._slices)

    def part(self, item: int) -> Slice:
        return self._slices[item]

    def transform(self, part: Slice, rows: list[Row]) -> Callable[[int, torch.Tensor], torch.Tensor]:
        resize, crop = [settled(self._cfg.eval_resize)], [self.size, self.size]
        return lambda row, image: F.center_crop(F.resize(image, resize, antialias=True), crop)

    def labels(self, part: Slice, read: Ids) -> npt.NDArray[Any]:
        return np.where(read == part.ids, self._index.labels[part.ids], -1)


class _Steps(Sampler[int]):
    """Item numbers first … last - 1, at any offset, without a list of them."""

    def __init__(self, items: range) -> None:
        self._items = items

    def __iter__(self) -> Iterator[int]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


class WorkerLoader:
    """Decodes on the host, ``workers`` processes a rank; 0 decodes in this one."""

    def __init__(
        self,
        cfg: DataConfig,
        workers: int,
        device: torch.device,
        train: tuple[Index, Quarantine, Waiting],
        val: tuple[Index, Quarantine, Waiting],
        notify: Callable[[str], None],
    ) -> None:
        self._cfg, self._workers, self._device = cfg, workers, device
        self._train, self._val, self._notify = train, val, notify
        self._told_of_memory = False

    def train(self, plan: TrainPlan, first: int, last: int) -> Iterator[Batch]:
        """The batches of steps first … last - 1."""
        index, bad, waiting = self._train
        items = range(first * plan.accumulation, last * plan.accumulation)
        return self._batches(lambda: _TrainSlices(plan, index, self._cfg, bad.known()), items, bad, waiting)

    def evaluate(self, plan: EvalPlan) -> Iterator[Batch]:
        """The batches of this rank's share of the validation images."""
        index, bad, waiting = self._val
        items = range(len(plan.slices()))
        return self._batches(lambda: _EvalSlices(plan, index, self._cfg, bad.known()), items, bad, waiting)

    def _batches(
        self, dataset: Callable[[], _Slices], items: range, bad: Quarantine, waiting: Waiting
    ) -> Iterator[Batch]:
        while items:
            for item in self._items(dataset(), items, waiting):
                if isinstance(item, Outage):
                    waiting.outlast(item)
                    break  # and on from this item, with new workers
                waiting.arrived()
                for each in item.bad:
                    bad.add(each)
                items = items[1:]
                images, labels = self._received(item)
                images = images.to(self._device, non_blocking=True)
                yield Batch(images, labels.to(self._device, non_blocking=True), item.part.ids)

    def _items(self, dataset: _Slices, items: range, waiting: Waiting) -> Iterator[_Item | Outage]:
        workers = min(self._workers, len(items))
        # Items a worker holds. With one, it would idle from when that is done until the others' turns have passed.
        ahead = max(2, -(-self._cfg.prefetch // max(1, workers)))
        unwanted, end = multiprocessing.Pipe(duplex=False)
        # At the end of the process too, before multiprocessing waits there for the workers.
        close = util.Finalize(None, end.send_bytes, args=(b"end",), exitpriority=0)
        loader = DataLoader(
            dataset,
            sampler=_Steps(items),
            batch_size=None,  # an item is a batch already
            collate_fn=_as_it_is,
            num_workers=workers,
            prefetch_factor=ahead if workers else None,
            pin_memory=self._device.type == "cuda",
            worker_init_fn=partial(_begin, unwanted),
            timeout=TIME_OUT if workers else 0,
        )
        iterator = iter(loader)
        try:
            while (item := _next(iterator, waiting.watch())) is not None:
                yield item
        finally:
            close()
            del iterator  # ends the workers

    def _received(self, item: _Item) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = item.images, item.labels
        if isinstance(images, np.ndarray) and not self._told_of_memory:
            self._told_of_memory = True
            self._notify(
                "/dev/shm is full: batches come from the workers by a slower way (give the container more, with "
                "docker run --shm-size=1g or --ipc=host, or lower data.workers)"
            )
        if isinstance(images, np.ndarray):
            images = torch.from_numpy(images).permute(0, 3, 1, 2)
        return images, torch.from_numpy(labels) if isinstance(labels, np.ndarray) else labels


def _next(iterator: Iterator[Any], look: Callable[[], None]) -> _Item | Outage | None:
    """The next item, None behind the last; ``look`` is called about once a second until it is there."""
    while True:
        try:
            return next(iterator, None)
        except RuntimeError as error:
            # Torch's loader can be asked again after its time-out. At each it has looked at the workers' health, but
            # not at that of its own thread.
            thread: threading.Thread | None = getattr(iterator, "_pin_memory_thread", None)
            if not str(error).startswith("DataLoader timed out") or (thread and not thread.is_alive()):
                raise
            look()


def _share(images: torch.Tensor, labels: torch.Tensor) -> tuple[Any, Any]:
    """Puts a worker's batch into shared memory here, where its lack is noticed, or else into numpy arrays.

    Torch would do so on a thread of the queue's, where an error is printed and the batch is lost.
    """
    if get_worker_info() is None:
        return images, labels
    try:
        return images.share_memory_(), labels.share_memory_()
    except (RuntimeError, OSError):
        return images.permute(0, 2, 3, 1).numpy(), labels.numpy()


def _as_it_is(item: Any) -> Any:
    return item  # torch's own function would make tensors of arrays


def _begin(unwanted: Connection, worker: int) -> None:
    # torchrun and Slurm signal the whole process group; the rank finishes its step and needs its workers for it.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    gc.freeze()  # what a fork brought along is not this process's to end: a DALI pipeline would wait for its threads
    threading.Thread(target=_end_in_time, args=(unwanted,), daemon=True).start()


def _end_in_time(unwanted: Connection) -> None:
    """Ends a worker that nobody wants any more and that hangs, as in a read from a dead network disk."""
    parent = multiprocessing.parent_process()
    multiprocessing.connection.wait([unwanted, *([parent.sentinel] if parent else [])])
    time.sleep(GRACE)
    os._exit(0)
