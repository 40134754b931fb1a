"""Evaluation that counts every image exactly once, at any world size."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from distrib.data.loader import Batch
from distrib.data.order import EvalPlan, Ids
from distrib.engine.prepare import Compiler
from distrib.engine.state import Weights
from distrib.faults import Agreement, Interrupted, StopSignals
from distrib.runtime import Runtime

Observe = Callable[[str, Ids, torch.Tensor, torch.Tensor], None]  # the network's name, ids [n], logits, labels [n]


class Evaluator:
    """Runs the networks it is given on the validation images, all of them in one pass over the data.

    It works on copies of the network, so that training's own weights and statistics are not touched: an evaluation
    that is broken off and repeated after a restart leaves the run as it was.
    """

    def __init__(
        self,
        objective: nn.Module,
        names: list[str],
        compile_: bool,
        backend: Compiler = "inductor",
        observe: Observe | None = None,
    ) -> None:
        """``objective`` has a ``network`` and ``logits`` as ``engine.prepare.Objective`` has.

        ``observe`` gets what each network says of each batch, on the device.
        """
        self._observe = observe
        self._copies: dict[str, Any] = {name: copy.deepcopy(objective).eval().requires_grad_(False) for name in names}
        self._calls: dict[str, Any] = {
            name: torch.compile(net.logits, dynamic=False, backend=backend) if compile_ else net.logits
            for name, net in self._copies.items()
        }

    @torch.inference_mode()
    def __call__(
        self,
        weights: Weights,
        batches: Iterator[Batch],
        plan: EvalPlan,
        runtime: Runtime,
        agreement: Agreement,
        stop: StopSignals,
        progress: Callable[[int, int], None] = lambda done, rounds: None,
    ) -> dict[str, float] | None:
        """Returns top1 and top5 in percent, loss and images, and the same for the EMA as ema_…; None if stopped.

        All ranks count the busiest rank's rounds, to agree meanwhile on whether somebody asked to stop; ``progress``
        hears how many of them are done. A short batch is filled up: one shape for the compiler, and the arithmetic of a
        sample never depends on the world size.
        """
        began = time.monotonic()
        for name, net in self._copies.items():
            net.network.load_state_dict(weights[name])
        # Counts are exact in float64 up to 2^53; one tensor, so one reduction. The last counts missed batches.
        sums = {name: torch.zeros(5, dtype=torch.float64, device=runtime.device) for name in self._copies}
        for done in range(plan.rounds):
            progress(done, plan.rounds)
            try:
                batch = next(batches, None)
            except Interrupted:  # in a wait for images
                batch = None
                for total in sums.values():
                    total[-1] += 1
            if batch is not None:
                images, labels = _fill(batch, plan.batch)
                for name, call in self._calls.items():
                    logits = call(images)
                    sums[name][:-1] += _count(logits, labels)
                    if self._observe is not None:
                        self._observe(name, batch.ids, logits[: len(batch.ids)], batch.labels)
            if agreement.exchange(stop=stop.received is not None)[0]:
                return None
        progress(plan.rounds, plan.rounds)
        result: dict[str, float] = {}
        for name, total in sums.items():
            images_seen, top1, top5, loss, missed = runtime.sum(total).tolist()
            if missed:  # the agreement on the stop comes rounds later, and there may be none left
                return None
            prefix = "" if name == "model" else f"{name}_"
            result[f"{prefix}top1"] = 100 * top1 / max(images_seen, 1)
            result[f"{prefix}top5"] = 100 * top5 / max(images_seen, 1)
            result[f"{prefix}loss"] = loss / max(images_seen, 1)
            result["images"] = int(images_seen)
        return result | {"seconds": time.monotonic() - began}


def _fill(batch: Batch, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    missing = size - len(batch.labels)
    if missing == 0:
        return batch.images, batch.labels
    images = torch.cat([batch.images, batch.images[:1].expand(missing, -1, -1, -1)])
    return images.contiguous(memory_format=torch.channels_last), F.pad(batch.labels, (0, missing), value=-1)


def _count(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[images, right at first, right among five, summed loss] over the labels that are not -1, float64 [4]."""
    valid = labels >= 0
    found = logits.topk(min(5, logits.shape[1])).indices == labels.unsqueeze(1)
    loss = F.cross_entropy(logits, labels, ignore_index=-1, reduction="none").double()
    return torch.stack([valid.sum(), found[:, 0].sum(), found.sum(), loss.sum()]).double()
