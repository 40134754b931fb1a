"""From the arguments to the figures: weights, folders, the logits as asked, every image once over all ranks."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from distrib.config import DataConfig, UserError, settled
from distrib.data import EvalPlan, build_loader
from distrib.data.index import Index, open_index
from distrib.data.workers import WorkerLoader
from distrib.engine.evaluate import Evaluator
from distrib.engine.inference import Classifier
from distrib.engine.prepare import DTYPES, Objective, effective_precision, set_up_device
from distrib.faults import Agreement, Failure, Interrupted, StopSignals
from distrib.layout import find_split
from distrib.layout.splits import Split
from distrib.place import Place
from distrib.program import Tell, bar, say
from distrib.runtime import Runtime, leave, start
from distrib.tools.evaluate.real import labels_of, read_labels
from distrib.tools.evaluate.report import Answers, Names, details
from distrib.trained import Trained, for_use, open_trained, output_of
from distrib.weights import checksum

BEST = 5  # guesses kept of each image


class Scored(nn.Module):
    """A network's logits as they are asked for; called as ``inner`` is.

    hidden: bool [outputs], the outputs that must not be guessed: their logits are -inf, so the loss is over the others.
    flip: whether logits are the mean of those of a picture and of its mirror image.
    """

    hidden: torch.Tensor | None

    def __init__(self, inner: Objective | Classifier, hidden: torch.Tensor | None, flip: bool) -> None:
        super().__init__()
        self.inner, self.flip = inner, flip
        self.register_buffer("hidden", hidden, persistent=False)

    @property
    def network(self) -> nn.Module:
        """The network alone."""
        return self.inner.network

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Images uint8 [n, 3, h, w] → logits fp32 [n, classes]."""
        logits = self.inner.logits(images)
        if self.flip:
            logits = (logits + self.inner.logits(images.flip(3))) / 2
        return logits if self.hidden is None else logits.masked_fill(self.hidden, -torch.inf)


class Guesses:
    """The best outputs of each image, as an evaluation goes on."""

    def __init__(self, images: int, device: torch.device) -> None:
        # One more than the output, so that the ranks' tables, each 0 where another counted, add up to the whole.
        self._table = torch.zeros((images, BEST), dtype=torch.int32, device=device)

    def __call__(self, name: str, ids: npt.NDArray[np.int64], logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Takes a batch's: ids int64 [n] on the host, logits [n, classes], labels int64 [n], -1 for no picture."""
        best = logits.topk(min(BEST, logits.shape[1]))
        counted = (labels >= 0).unsqueeze(1) & (best.values != -torch.inf)
        rows = torch.from_numpy(ids).to(logits.device, non_blocking=True)
        self._table[rows, : best.indices.shape[1]] = torch.where(counted, best.indices.int() + 1, 0)

    def gather(self, runtime: Runtime) -> npt.NDArray[np.int32]:
        """Those of all ranks: int32 [images, 5], best first; -1 where an image was not counted or has no more."""
        return (runtime.sum(self._table) - 1).cpu().numpy()


def evaluate(args: argparse.Namespace, place: Place, stop: StopSignals) -> dict[str, Any] | None:
    """What the arguments ask for, on rank 0; {} on the others, and None on all where it was stopped.

    top1, top5 (percent), loss, images and seconds; what was used; real_top1 and real_images; per_class and confused.

    Raises:
        UserError: weights or data are not there, or do not fit each other.
        Failure: the device has too little memory for a batch.
        Interrupted: asked to stop before the evaluation began.
    """
    tell = say if place.rank == 0 else lambda text: None
    given = {word.partition("=")[0] for word in args.overrides}
    if args.fast and "train.precision" in given:
        raise UserError("--fast takes the arithmetic that the processor is fast in: leave it or train.precision out")
    trained = open_trained(args.weights, args.model, [*args.overrides, *_sizes(args, given)], tell)
    if args.real and not trained.is_imagenets:
        raise UserError(
            f"--real has labels of ImageNet's 1,000 classes, which are not the {trained.outputs} of {trained.source}"
        )
    cfg = trained.config.data
    elsewhere = "data.root" in given  # nothing there was trained on
    if elsewhere and "data.classes" not in given:
        cfg = cfg.model_copy(update={"classes": None})  # the run's choice was among its own
    split = find_split(cfg, args.split, whole=elsewhere)
    runtime = start(place, stop, cfg.wait_minutes)
    try:
        result = _score(args, trained, cfg, split, runtime, stop, tell)
    except (UserError, Failure, Interrupted):
        leave()
        raise
    except torch.OutOfMemoryError:
        leave()
        raise Failure(
            f"{runtime.device} has too little memory for {cfg.eval_batch} pictures at once: "
            f"set data.eval_batch={max(1, cfg.eval_batch // 2)} or less"
        ) from None
    leave()
    return result


def _sizes(args: argparse.Namespace, given: set[str]) -> list[str]:
    """The words that ``--size`` and ``--resize`` are short for."""
    words = []
    for option, key, value in (
        ("--size", "data.eval_size", args.size),
        ("--resize", "data.eval_resize", args.resize),
    ):
        if value is not None and key in given:
            raise UserError(f"{option} {value} is {key}={value}: leave one of them out")
        words += [] if value is None else [f"{key}={value}"]
    follows = args.size is not None and args.resize is None and "data.eval_resize" not in given
    return [*words, "data.eval_resize=auto"] if follows else words


def _score(
    args: argparse.Namespace,
    trained: Trained,
    cfg: DataConfig,
    split: Split,
    runtime: Runtime,
    stop: StopSignals,
    tell: Callable[[str], None],
) -> dict[str, Any] | None:
    """All that the ranks do together."""
    index = runtime.main_first(lambda: open_index(split, cfg.index_dir, say, stop.requested))
    runtime.check_same(index.fingerprint, "finds other images than rank 0: is data.root still being copied to?")
    runtime.check_same(checksum(trained.network), f"has other weights than rank 0: {trained.source}")
    columns = output_of(index.classes, trained)
    real = runtime.on_main_only(lambda: _real_labels(args.real, index, trained.outputs)) if args.real else None
    hidden = _others(columns, trained.outputs) if args.classes == "subset" else None
    network, arithmetic = _network(trained, runtime.device, args.fast)
    scored = Scored(network, hidden, args.flip).to(runtime.device)
    loader = runtime.on_each(
        lambda: build_loader(
            cfg, (index, index), trained.outputs, runtime.device, notify=say, notify_once=tell, stop=stop.requested,
            ranks=runtime.world, local_ranks=runtime.local_world,
        )
    )  # fmt: skip
    plan = EvalPlan(len(index), cfg.eval_batch, runtime.rank, runtime.world)
    output = torch.tensor(columns, device=runtime.device)
    batches = (b._replace(labels=torch.where(b.labels < 0, -1, output[b.labels])) for b in loader.evaluate(plan))
    guesses = Guesses(len(index), runtime.device)
    with bar("evaluating", runtime.is_main) as progress:
        result = _run(scored, batches, plan, runtime, stop, progress, guesses)
    if result is None:
        return None
    best = guesses.gather(runtime)
    if not runtime.is_main:
        return {}
    used = {
        "weights": trained.source,
        "data": str(index.root),
        "classes": len(index.classes),
        "outputs": trained.outputs if hidden is None else len(columns),
        "scored_over": args.classes,
        "arithmetic": arithmetic,
        "flip": args.flip,
        "resize": settled(cfg.eval_resize),
        "size": settled(cfg.eval_size),
        "loader": "torchvision" if isinstance(loader, WorkerLoader) else cfg.loader,
    }
    answers = Answers(np.asarray(index.labels), np.array(columns), best)
    return {**result, **used, **details(answers, Names.of(index.classes, columns, trained), real)}


def _run(
    scored: Scored, batches: Any, plan: EvalPlan, runtime: Runtime, stop: StopSignals, progress: Tell, observe: Guesses
) -> dict[str, float] | None:
    evaluator, agreement = Evaluator(scored, ["model"], compile_=False, observe=observe), Agreement(runtime.control)
    result = evaluator({"model": scored.network.state_dict()}, batches, plan, runtime, agreement, stop, progress)
    agreement.close()
    return result


def _network(trained: Trained, device: torch.device, fast: bool) -> tuple[Objective | Classifier, str]:
    """The network in the trainer's own arithmetic, or in the fast one, and what that is called; sets up the device."""
    deterministic = trained.config.train.deterministic
    if fast:
        classifier = for_use(trained, device)
        precision = next(name for name in ("bf16", "fp16", "fp32") if DTYPES[name] == classifier.dtype)
        set_up_device(device, precision, deterministic)
        return classifier, f"{precision}, batch norms folded"
    precision = effective_precision(trained.config.train.precision, device)
    set_up_device(device, precision, deterministic)
    network = trained.network.to(memory_format=torch.channels_last)
    cfg = trained.config.data
    return Objective(network, cfg.mean, cfg.std, DTYPES[precision]), precision


def _others(columns: Sequence[int], outputs: int) -> torch.Tensor | None:
    """The outputs without a folder, bool [outputs]; None where each has one."""
    hidden = torch.ones(outputs, dtype=torch.bool)
    hidden[list(columns)] = False
    return hidden if hidden.any() else None


def _real_labels(file: str, index: Index, outputs: int) -> list[Sequence[int]]:
    path = Path(os.path.expanduser(file))
    labels = read_labels(path, outputs)
    return labels_of([index.encoded_path(sample) for sample in range(len(index))], labels, path)
