"""The DALI loader: one graph for the CPU and the GPU, fed with file names, boxes and flips.

DALI draws nothing itself. An external source hands it each slice's numbers, so its batches are those of the other
loaders, and a run continues at any step without winding a reader forward.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types

from distrib.config import DataConfig, UserError
from distrib.data.draws import centre_boxes, crop_boxes, draws, flips
from distrib.data.index import Index
from distrib.data.loader import Batch
from distrib.data.order import EvalPlan, Ids, Slice, TrainPlan
from distrib.data.quarantine import Quarantine

MIN_HEALTHY = 32  # if so many samples in a row fail alone, DALI or the disk is broken and not the images

Feed = tuple[Any, ...]  # what one run of the graph is fed with: lists and arrays, one row a sample


@pipeline_def
def _train_graph(source: Any, size: int, decoder: str, crop_in_resize: bool, on_gpu: bool) -> Any:
    files, top_left, shape, mirrored = fn.external_source(source=source, num_outputs=4, batch=True)
    encoded = fn.io.file.read(files)
    resize = {"size": [size, size], "interp_type": types.INTERP_LINEAR, "antialias": True}
    if crop_in_resize:
        images = fn.decoders.image(encoded, device=decoder, adjust_orientation=False)
        images = fn.resize(images, roi_start=top_left, roi_end=top_left + shape, **resize)
    else:
        images = fn.decoders.image_slice(
            encoded, fn.cast(top_left, dtype=types.INT32), fn.cast(shape, dtype=types.INT32),
            device=decoder, axis_names="HW", adjust_orientation=False,
        )  # fmt: skip
        images = fn.resize(images, **resize)
    return _to_device(fn.flip(images, horizontal=mirrored), decoder, on_gpu)


@pipeline_def
def _eval_graph(source: Any, size: int, decoder: str, crop_in_resize: bool, on_gpu: bool) -> Any:
    files, resized, top_left = fn.external_source(source=source, num_outputs=3, batch=True)
    images = fn.decoders.image(fn.io.file.read(files), device=decoder, adjust_orientation=False)
    images = fn.resize(images, size=resized, interp_type=types.INTERP_LINEAR, antialias=True)
    images = fn.slice(images, start=fn.cast(top_left, dtype=types.INT32), shape=[size, size], axis_names="HW")
    return _to_device(images, decoder, on_gpu)


def _to_device(images: Any, decoder: str, on_gpu: bool) -> Any:
    # DALI copies what the CPU decoded to the GPU itself: were it torch's asynchronous copy, DALI could reuse the host
    # buffer before the copy has read it.
    return images.gpu() if on_gpu and decoder == "cpu" else images


class _Feeder:
    """Makes a phase's feeds from its slices and remembers what is in flight, to repeat it after a failure."""

    graph: Any
    size: int

    def __init__(self, slices: Iterator[Slice], index: Index, bad: Quarantine, cfg: DataConfig) -> None:
        self.slices, self.index, self.bad, self.cfg = slices, index, bad, cfg
        self.again: deque[Slice] = deque()  # to be fed again, before `slices`
        self.pending: deque[tuple[Slice, Ids]] = deque()  # fed and not yet taken: the slice, the samples really read

    def __call__(self) -> Feed:
        part = self.again.popleft() if self.again else next(self.slices)  # StopIteration ends the pipeline's epoch
        ids = self.samples(part)
        self.pending.append((part, ids))
        return self.feed(part, ids)

    def rewind(self) -> None:
        """Everything in flight goes back to the front."""
        self.again = deque([part for part, _ in self.pending] + list(self.again))
        self.pending.clear()

    def samples(self, part: Slice) -> Ids:
        """The samples to read for a slice, int64 [n]: its own, and stand-ins for bad ones.

        In evaluation too a stand-in keeps the batch's shape; a label of -1 takes it out again. A sample without a size
        has no box to read, whatever DALI may make of the file, and the worker loader refuses it as well.
        """
        while True:
            ids = self.bad.replace(part.ids)
            unsized = ids[self.index.sizes[ids].min(axis=1) == 0]
            if not len(unsized):
                return ids
            for sample in unsized.tolist():
                self.bad.add(sample, self.index.path(sample), "its header cannot be read")

    def feed(self, part: Slice, ids: Ids) -> Feed:
        """The graph's inputs for a slice."""
        raise NotImplementedError


class _TrainFeeder(_Feeder):
    graph = staticmethod(_train_graph)

    def __init__(self, plan: TrainPlan, first: int, last: int, *args: Any) -> None:
        super().__init__(plan.stream(first, last), *args)
        self.seed, self.size = plan.seed, self.cfg.size

    def feed(self, part: Slice, ids: Ids) -> Feed:
        uniform = draws(self.seed, part.epoch, part.positions)
        boxes = crop_boxes(uniform, self.index.sizes[ids], self.cfg.scale, self.cfg.ratio).astype(np.float32)
        mirrored = flips(uniform, self.cfg.flip).astype(np.int32)
        top_left, shape = (np.ascontiguousarray(half) for half in np.hsplit(boxes, 2))
        return self.index.encoded_paths(ids), top_left, shape, mirrored


class _EvalFeeder(_Feeder):
    graph = staticmethod(_eval_graph)

    def __init__(self, plan: EvalPlan, *args: Any) -> None:
        super().__init__(iter(plan.slices()), *args)
        self.size = self.cfg.eval_size

    def feed(self, part: Slice, ids: Ids) -> Feed:
        resized, top_left = centre_boxes(self.index.sizes[ids], self.cfg.eval_resize, self.cfg.eval_size)
        return self.index.encoded_paths(ids), resized.astype(np.float32), top_left.astype(np.float32)


class DaliLoader:
    """Decodes with ``cfg.workers`` threads: on the GPU where the run has one ("mixed"), else on the CPU."""

    def __init__(
        self, cfg: DataConfig, train: Index, val: Index, device: torch.device, bad: tuple[Quarantine, Quarantine]
    ) -> None:
        self._cfg, self._train, self._val, self._device = cfg, train, val, device
        self._bad_train, self._bad_val = bad
        on_gpu = device.type == "cuda"
        if cfg.decoder == "mixed" and not on_gpu:
            raise UserError("data.decoder is mixed, but this run has no GPU: set data.decoder=auto")
        self._decoder = {"auto": "mixed" if on_gpu else "cpu"}.get(cfg.decoder, cfg.decoder)
        # nvImageCodec 0.9, which DALI 2.3 and 2.4 bring, crashes when it decodes a region on a GPU (nvImageCodec
        # issue 55). There the whole image is decoded and the resize reads the box alone.
        self._crop_in_resize = self._decoder == "mixed"

    def train(self, plan: TrainPlan, first: int, last: int) -> Iterator[Batch]:
        """The batches of steps first … last - 1."""
        feeder = _TrainFeeder(plan, first, last, self._train, self._bad_train, self._cfg)
        return self._batches(feeder, plan.largest_slice)

    def evaluate(self, plan: EvalPlan) -> Iterator[Batch]:
        """The batches of this rank's share of the validation images."""
        return self._batches(_EvalFeeder(plan, self._val, self._bad_val, self._cfg), plan.batch)

    def _batches(self, feeder: _Feeder, largest: int) -> Iterator[Batch]:
        pipeline = self._pipeline(feeder, feeder, largest)
        while True:
            try:
                (output,) = pipeline.run()
            except StopIteration:
                return
            except RuntimeError as error:
                # DALI does not say which file failed, and a pipeline that failed is spent. Find the bad ones among
                # what is in flight, and go on from there with a new pipeline.
                if not self._name_bad(feeder):
                    raise RuntimeError(f"DALI failed, and not over single bad files: {error}") from error
                feeder.rewind()
                pipeline = self._pipeline(feeder, feeder, largest)
                continue
            part, read = feeder.pending.popleft()
            labels = torch.from_numpy(feeder.index.labels[read].astype(np.int64))
            if isinstance(feeder, _EvalFeeder):
                labels[torch.from_numpy(read != part.ids)] = -1
            # No copy: the tensor keeps DALI's buffer, and on a GPU DALI orders it before torch's current stream.
            images = torch.from_dlpack(output.as_tensor()).permute(0, 3, 1, 2)
            images = images.to(self._device, non_blocking=True)
            yield Batch(images, labels.to(self._device, non_blocking=True), part.ids)

    def _pipeline(self, feeder: _Feeder, source: Any, largest: int) -> Any:
        pipeline = feeder.graph(
            source=source,
            size=feeder.size,
            decoder=self._decoder,
            crop_in_resize=self._crop_in_resize,
            on_gpu=self._device.type == "cuda",
            batch_size=largest,
            num_threads=max(1, self._cfg.workers),
            device_id=self._device.index if self._device.type == "cuda" else None,
            prefetch_queue_depth=self._cfg.prefetch,
            exec_dynamic=True,
        )
        pipeline.build()
        return pipeline

    def _name_bad(self, feeder: _Feeder) -> bool:
        """Runs the same graph on each sample in flight alone and quarantines those it cannot read; False for none."""
        parts = [(part, ids, row) for part, ids in feeder.pending for row in range(len(ids))]
        ones = deque(Slice(p.epoch, p.positions[row : row + 1], ids[row : row + 1]) for p, ids, row in parts)
        tried, failed = 0, []
        while ones:
            # One pipeline for all up to the first that fails: on a GPU it costs far more to build than to run.
            pipeline = self._pipeline(feeder, iter([feeder.feed(one, one.ids) for one in ones]), 1)
            try:
                while ones:
                    pipeline.run()
                    ones.popleft()
                    tried += 1
            except RuntimeError:
                one = ones.popleft()  # perhaps: a pipeline may fail early, over one that it has only prefetched
                tried += 1
                try:
                    self._pipeline(feeder, iter([feeder.feed(one, one.ids)]), 1).run()
                except RuntimeError as error:
                    failed.append((int(one.ids[0]), _reason(error)))
            if len(failed) == tried >= MIN_HEALTHY:
                return False  # not one of so many could be read: the graph is at fault, not the files
        for sample, reason in failed:
            feeder.bad.add(sample, feeder.index.path(sample), reason)
        return bool(failed)


def _reason(error: RuntimeError) -> str:
    """What DALI encountered, in one line, without the graph's and the library's stacks."""
    told = str(error).partition("encountered:")[2] or str(error)
    line = next((line.strip() for line in told.splitlines() if line.strip()), "DALI cannot read it")
    return "cannot be decoded" if line.startswith("Failed to decode sample") else line[:300]
