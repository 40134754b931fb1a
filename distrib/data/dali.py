"""The DALI loader: one graph for the CPU and the GPU, fed with files' bytes, boxes and flips.

DALI reads nothing and draws nothing itself. An external source hands it each slice's files and numbers, so its batches
are those of the other loaders, and a run continues at any step without winding a reader forward. What not every
decoder reads alike comes decoded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali import fn, pipeline_def, types

from distrib.config import DataConfig, UserError, settled
from distrib.data.ahead import ReadAhead, Rows
from distrib.data.decode import ContentError, decode, plain_shape, to_ppm
from distrib.data.draws import centre_boxes, crop_boxes, draws, flips
from distrib.data.fetch import Fetcher
from distrib.data.files import Encoded
from distrib.data.index import Index
from distrib.data.loader import Batch
from distrib.data.order import EvalPlan, Slice, TrainPlan
from distrib.data.quarantine import Quarantine
from distrib.data.waiting import Waiting

MIN_HEALTHY = 32  # if so many samples in a row fail alone, DALI is broken and not the images

Feed = tuple[Any, ...]  # what one run of the graph is fed with: lists and arrays, one row a sample


class _Picture(NamedTuple):
    """A picture as DALI gets it: a file's bytes (uint8 [n]), and height and width."""

    file: npt.NDArray[np.uint8]
    shape: tuple[int, int]
    source: Encoded | None  # the file on the disk; None where ``file`` was made from it


def _prepare(transcode: set[int], sample: int, encoded: Encoded) -> _Picture:
    """Plain files go to DALI as they are; all else, and what is in ``transcode``, decoded.

    Raises:
        ContentError: the file holds no picture.
    """
    if encoded.problem:
        raise ContentError(encoded.problem)
    shape = None if sample in transcode else plain_shape(encoded.data)
    if shape:
        return _Picture(np.frombuffer(encoded.data, dtype=np.uint8), shape, encoded)
    image = decode(encoded.data)
    return _Picture(to_ppm(image), (image.shape[1], image.shape[2]), None)


@pipeline_def
def _train_graph(source: Any, size: int, decoder: dict[str, Any], crop_in_resize: bool, on_gpu: bool) -> Any:
    # no_copy: the files are 30 MB a batch, and would be copied on the main thread.
    encoded, top_left, shape, mirrored = fn.external_source(source=source, num_outputs=4, batch=True, no_copy=True)
    resize = {"size": [size, size], "interp_type": types.INTERP_LINEAR, "antialias": True}
    if crop_in_resize:
        images = fn.decoders.image(encoded, adjust_orientation=False, **decoder)
        images = fn.resize(images, roi_start=top_left, roi_end=top_left + shape, **resize)
    else:
        images = fn.decoders.image_slice(
            encoded, fn.cast(top_left, dtype=types.INT32), fn.cast(shape, dtype=types.INT32),
            axis_names="HW", adjust_orientation=False, **decoder,
        )  # fmt: skip
        images = fn.resize(images, **resize)
    return _to_device(fn.flip(images, horizontal=mirrored), decoder, on_gpu)


@pipeline_def
def _eval_graph(source: Any, size: int, decoder: dict[str, Any], crop_in_resize: bool, on_gpu: bool) -> Any:
    encoded, resized, top_left = fn.external_source(source=source, num_outputs=3, batch=True, no_copy=True)
    images = fn.decoders.image(encoded, adjust_orientation=False, **decoder)
    images = fn.resize(images, size=resized, interp_type=types.INTERP_LINEAR, antialias=True)
    images = fn.slice(images, start=fn.cast(top_left, dtype=types.INT32), shape=[size, size], axis_names="HW")
    return _to_device(images, decoder, on_gpu)


def _to_device(images: Any, decoder: dict[str, Any], on_gpu: bool) -> Any:
    # DALI copies what the CPU decoded to the GPU itself: were it torch's asynchronous copy, DALI could reuse the host
    # buffer before the copy has read it.
    return images.gpu() if on_gpu and decoder["device"] == "cpu" else images


class _Feeder:
    """Makes a phase's feeds from its slices and remembers what is in flight, to repeat it after a failure."""

    graph: Any
    size: int

    def __init__(
        self, slices: Iterator[Slice], index: Index, bad: Quarantine, cfg: DataConfig, waiting: Waiting, threads: int
    ) -> None:
        self.index, self.bad, self.cfg = index, bad, cfg
        self.transcode: set[int] = set()  # plain files that DALI refuses and the other loader does not
        self.fetcher = Fetcher(index, bad.known())
        prepare = partial(_prepare, self.transcode)
        self.ahead = ReadAhead(slices, self.fetcher, prepare, waiting, threads, cfg.prefetch)
        # Fed and not yet taken, and, since DALI reads the memory that it was fed with, those taken last.
        self.pending: deque[tuple[Rows[_Picture], Feed]] = deque()
        self.taken: deque[tuple[Rows[_Picture], Feed]] = deque(maxlen=cfg.prefetch + 1)

    def __call__(self) -> Feed:
        rows = self.ahead.next()
        self.name_bad()
        if rows is None:
            raise StopIteration  # ends the pipeline's epoch
        feed = self.feed(rows.part, rows.items)
        self.pending.append((rows, feed))
        return feed

    def take(self) -> Rows[_Picture]:
        """What the output that DALI has just given was made of."""
        self.taken.append(self.pending.popleft())
        return self.taken[-1][0]

    def rewind(self) -> None:
        """Everything in flight is read and fed again."""
        self.ahead.rewind([rows.part for rows, _ in self.pending])
        self.pending.clear()

    def name_bad(self) -> None:
        """Names the bad samples that the threads have met.

        In evaluation too a stand-in keeps the batch's shape; a label of -1 takes it out again.
        """
        while self.ahead.found:
            self.bad.add(self.ahead.found.popleft())

    def feed(self, part: Slice, pictures: list[_Picture]) -> Feed:
        """The graph's inputs for a slice."""
        raise NotImplementedError


def _sizes(pictures: list[_Picture]) -> npt.NDArray[np.int64]:
    return np.array([picture.shape for picture in pictures], dtype=np.int64)


class _TrainFeeder(_Feeder):
    graph = staticmethod(_train_graph)

    def __init__(self, plan: TrainPlan, first: int, last: int, *args: Any) -> None:
        super().__init__(plan.stream(first, last), *args)
        self.seed, self.size = plan.seed, self.cfg.size

    def feed(self, part: Slice, pictures: list[_Picture]) -> Feed:
        uniform = draws(self.seed, part.epoch, part.positions)
        boxes = crop_boxes(uniform, _sizes(pictures), self.cfg.scale, self.cfg.ratio).astype(np.float32)
        mirrored = flips(uniform, self.cfg.flip).astype(np.int32)
        top_left, shape = (np.ascontiguousarray(half) for half in np.hsplit(boxes, 2))
        return [picture.file for picture in pictures], top_left, shape, mirrored


class _EvalFeeder(_Feeder):
    graph = staticmethod(_eval_graph)

    def __init__(self, plan: EvalPlan, *args: Any) -> None:
        super().__init__(iter(plan.slices()), *args)
        self.size = settled(self.cfg.eval_size)

    def feed(self, part: Slice, pictures: list[_Picture]) -> Feed:
        resized, top_left = centre_boxes(_sizes(pictures), settled(self.cfg.eval_resize), self.size)
        return [picture.file for picture in pictures], resized.astype(np.float32), top_left.astype(np.float32)


class DaliLoader:
    """Decodes with ``workers`` threads: on the GPU where the run has one ("mixed"), else on the CPU."""

    def __init__(
        self,
        cfg: DataConfig,
        workers: int,
        device: torch.device,
        train: tuple[Index, Quarantine, Waiting],
        val: tuple[Index, Quarantine, Waiting],
    ) -> None:
        self._cfg, self._workers, self._device = cfg, max(1, workers), device
        self._train, self._val = train, val
        on_gpu = device.type == "cuda"
        if cfg.decoder == "mixed" and not on_gpu:
            raise UserError("data.decoder is mixed, but this run has no GPU: set data.decoder=auto")
        self._decoder = decoder_arguments(cfg, on_gpu)
        # nvImageCodec 0.9, which DALI 2.3 and 2.4 bring, crashes when it decodes a region on a GPU (nvImageCodec
        # issue 55). There the whole image is decoded and the resize reads the box alone.
        self._crop_in_resize = self._decoder["device"] == "mixed"

    def train(self, plan: TrainPlan, first: int, last: int) -> Iterator[Batch]:
        """The batches of steps first … last - 1."""
        index, bad, waiting = self._train
        feeder = _TrainFeeder(plan, first, last, index, bad, self._cfg, waiting, self._workers)
        return self._batches(feeder, plan.largest_slice)

    def evaluate(self, plan: EvalPlan) -> Iterator[Batch]:
        """The batches of this rank's share of the validation images."""
        index, bad, waiting = self._val
        return self._batches(_EvalFeeder(plan, index, bad, self._cfg, waiting, self._workers), plan.batch)

    def _batches(self, feeder: _Feeder, largest: int) -> Iterator[Batch]:
        on_gpu = self._device.type == "cuda"
        try:
            pipeline = self._pipeline(feeder, feeder, largest)
            while True:
                try:
                    # On torch's stream: without one DALI would wait for the GPU.
                    (output,) = pipeline.run(torch.cuda.current_stream(self._device)) if on_gpu else pipeline.run()
                except StopIteration:
                    return
                except RuntimeError as error:
                    # DALI does not say which file failed, and a pipeline that failed is spent. Find the culprits
                    # among what is in flight, and go on from there with a new pipeline.
                    if not self._find_culprits(feeder):
                        raise RuntimeError(f"DALI failed, and not over single bad files: {error}") from error
                    feeder.rewind()
                    pipeline = self._pipeline(feeder, feeder, largest)
                    continue
                rows = feeder.take()
                part, read = rows.part, rows.ids
                labels = torch.from_numpy(feeder.index.labels[read].astype(np.int64))
                if isinstance(feeder, _EvalFeeder):
                    labels[torch.from_numpy(read != part.ids)] = -1
                # No copy: the tensor keeps DALI's buffer.
                images = torch.from_dlpack(output.as_tensor()).permute(0, 3, 1, 2)
                images = images.to(self._device, non_blocking=True)
                yield Batch(images, labels.to(self._device, non_blocking=True), part.ids)
        finally:
            feeder.ahead.close()

    def _pipeline(self, feeder: _Feeder, source: Any, largest: int) -> Any:
        pipeline = feeder.graph(
            source=source,
            size=feeder.size,
            decoder=self._decoder,
            crop_in_resize=self._crop_in_resize,
            on_gpu=self._device.type == "cuda",
            batch_size=largest,
            num_threads=self._workers,
            device_id=self._device.index if self._device.type == "cuda" else None,
            prefetch_queue_depth=self._cfg.prefetch,
            exec_dynamic=True,
        )
        pipeline.build()
        return pipeline

    def _find_culprits(self, feeder: _Feeder) -> bool:
        """Finds the files in flight that hold no picture, or else those that only DALI refuses; False for none.

        The latter are decoded here from now on. Both depend on the file alone and not on what was in flight with it.
        """
        plain = [
            (sample, picture.source)
            for rows, _ in feeder.pending
            for sample, picture in zip(rows.ids.tolist(), rows.items, strict=True)
            if picture.source is not None
        ]
        healthy = True
        for sample, encoded in plain:
            try:
                decode(encoded.data)
            except ContentError as error:
                feeder.fetcher.refuse(sample, encoded, error, feeder.ahead.found)
                healthy = False
        if not healthy:
            feeder.name_bad()
            return True
        refused = self._refused(feeder)
        feeder.transcode.update(refused)
        return bool(refused)

    def _refused(self, feeder: _Feeder) -> set[int]:
        """Runs the same graph on each plain file in flight alone; the samples that it cannot read.

        None where it can read none at all: then the graph is at fault, not the files.
        """
        ones = deque(
            (sample, Slice(rows.part.epoch, rows.part.positions[row : row + 1], rows.ids[row : row + 1]), picture)
            for rows, _ in feeder.pending
            for row, (sample, picture) in enumerate(zip(rows.ids.tolist(), rows.items, strict=True))
            if picture.source is not None
        )
        tried, refused = 0, set()
        while ones:
            # One pipeline for all up to the first that fails: on a GPU it costs far more to build than to run.
            feeds = [feeder.feed(part, [picture]) for _, part, picture in ones]
            pipeline = self._pipeline(feeder, iter(feeds), 1)
            try:
                while ones:
                    pipeline.run()
                    ones.popleft()
                    tried += 1
            except RuntimeError:
                sample, part, picture = (
                    ones.popleft()
                )  # perhaps: it may fail early, over one that it has only prefetched
                tried += 1
                feeds = [feeder.feed(part, [picture])]
                try:
                    self._pipeline(feeder, iter(feeds), 1).run()
                except RuntimeError:
                    refused.add(sample)
            if len(refused) == tried >= MIN_HEALTHY:
                return set()
        return refused


def decoder_arguments(cfg: DataConfig, on_gpu: bool) -> dict[str, Any]:
    """What DALI's image decoders are given: where they decode, and how the GPU does."""
    device = {"auto": "mixed" if on_gpu else "cpu"}.get(cfg.decoder, cfg.decoder)
    if device != "mixed":
        return {"device": device}
    width, height = cfg.preallocate or (0, 0)
    return {
        "device": device,
        "hw_decoder_load": cfg.hw_decoder_load,
        "preallocate_width_hint": width,
        "preallocate_height_hint": height,
        "jpeg_fancy_upsampling": True,  # chroma as libjpeg, and so the other loader, makes it
    }
