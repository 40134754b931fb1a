"""What training measures of itself: sums that stay on the device, and the time that steps spend waiting for data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from distrib.data import Batch, TrainPlan
from distrib.faults import Interrupted
from distrib.runtime import Runtime


@dataclass
class Skips:
    """Steps that were passed over, as far as intervals were read. All ranks have the same numbers."""

    total: int = 0
    row: int = 0  # of them, one after the other, up to the last step that was read
    longest: int = 0  # the longest such row since somebody last set this to 0


class SkipCount:
    """Counts steps that are passed over where the verdict is, on the device."""

    def __init__(self, skips: Skips, device: torch.device) -> None:
        """``skips``: what there was before; ``read`` adds to it."""
        self._skips = skips
        self._interval = self._longest = torch.zeros((), dtype=torch.float64, device=device)
        self._row = torch.full_like(self._interval, skips.row)

    def add(self, skipped: torch.Tensor) -> None:
        """Counts a step: bool []."""
        self._interval = self._interval + skipped
        self._row = (self._row + 1) * skipped
        self._longest = torch.maximum(self._longest, self._row)

    def close_interval(self) -> torch.Tensor:
        """The interval's numbers, float64 [3], to be given to ``read`` when they are on the host."""
        numbers = torch.stack([self._interval, self._row, self._longest])
        self._interval = self._longest = torch.zeros_like(self._row)
        return numbers

    def read(self, numbers: Sequence[float]) -> int:
        """Takes an interval's numbers into ``skips``; returns how many of its steps were passed over."""
        count, self._skips.row, longest = (round(number) for number in numbers)
        self._skips.total += count
        self._skips.longest = max(self._skips.longest, longest)
        return count

    def forget_row(self) -> None:
        """The next step begins a new row. What is still to be read must have been."""
        self._row = torch.zeros_like(self._row)
        self._skips.row = self._skips.longest = 0


class TrainMeter:
    """Collects an interval's numbers, and reads them one interval later, when a GPU has long been there.

    Time is counted from one ``add`` to the next, or from ``resume``, before which an evaluation may have passed.
    """

    def __init__(
        self,
        runtime: Runtime,
        plan: TrainPlan,
        total_steps: int,
        before: float = 0.0,
        layers: Sequence[str] = (),
        skips: Skips | None = None,
    ) -> None:
        """``layers``: the names that belong to ``add``'s ``gradient_norms``. ``skips`` is kept up to date."""
        self._runtime, self._plan, self._total = runtime, plan, total_steps
        self._layers = tuple(layers)
        self._before = before  # seconds trained by earlier starts of this run
        self._loss, self._right = self._zeros()
        self._last_loss = self._loss
        self.skips = SkipCount(Skips() if skips is None else skips, runtime.device)
        self._gradient_norm: torch.Tensor | None = None
        self._gradient_norms: torch.Tensor | None = None
        self._posted: Callable[[], dict[str, Any]] | None = None
        self._steps = self._all_steps = 0
        self._wait = self._busy = self._all_busy = 0.0
        self._mark = time.perf_counter()

    def fetch(self, stream: Iterator[Batch]) -> list[Batch] | None:
        """Takes a step's batches from the loader and notes how long that kept the step waiting.

        None where somebody asked to stop while the data did not come.
        """
        began = time.perf_counter()
        try:
            batches = [next(stream) for _ in range(self._plan.accumulation)]
        except Interrupted:
            return None
        self._wait += time.perf_counter() - began
        return batches

    def add(
        self,
        loss: torch.Tensor,
        right: torch.Tensor,
        gradient_norm: torch.Tensor | None = None,
        gradient_norms: torch.Tensor | None = None,
        skipped: torch.Tensor | None = None,
    ) -> None:
        """Counts one step: this rank's summed loss [], how many images it had right [], the gradient's norm [].

        ``gradient_norms``: the norm of each layer's gradient [layers]. ``skipped``: whether the step was passed over,
        bool []: then it counts as such alone.
        """
        self._last_loss = loss
        if skipped is not None:
            self.skips.add(skipped)
            loss, right = loss.masked_fill(skipped, 0), right.masked_fill(skipped, 0)
        self._loss += loss
        self._right += right
        self._gradient_norm, self._gradient_norms = gradient_norm, gradient_norms
        self._steps += 1
        now = time.perf_counter()
        self._busy += now - self._mark
        self._mark = now

    def resume(self) -> None:
        """Counts time from now on."""
        self._mark = time.perf_counter()

    def close_interval(self, step: int, lr: float) -> list[dict[str, Any]]:
        """Ends the interval at ``step``; returns the records that are ready. All ranks must call it.

        On a GPU that is the interval before, which is there without a wait; on a CPU this one too. ``gradient_norm``
        stands in a record whose last step measured it, on all ranks or on none; ``gradient_norms`` likewise.
        ``skipped`` stands where steps were passed over: how many. Loss and top-1 are of the others; where there are
        none, the loss is the last step's, and top-1 no number.
        """
        records = self._posted_records()
        images = self._steps * self._plan.global_batch
        known = {
            "kind": "train",
            "step": step,
            "epoch": step / self._plan.steps_per_epoch,
            "lr": lr,
            "images_per_second": images / self._busy,
            "seconds": self.seconds,
            "eta_seconds": (self._total - step) * self._busy / self._steps,
        }
        waited = torch.tensor(self._wait / self._busy, dtype=torch.float64).to(self._runtime.device, non_blocking=True)
        skips = self.skips.close_interval()
        taken = images - skips[0] * self._plan.global_batch
        last_loss = self._last_loss.double() / self._plan.global_batch
        sums = {
            "loss": torch.where(taken > 0, self._loss / taken, last_loss),
            "top1": 100 * self._right / taken,
            "data_wait": waited / self._runtime.world,
        }
        if self._gradient_norm is not None:  # equal on all ranks
            sums["gradient_norm"] = self._gradient_norm.double() / self._runtime.world
        parts, layers = [torch.stack(list(sums.values())), skips / self._runtime.world], self._layers
        if self._gradient_norms is None:
            layers = ()
        else:
            parts.append(self._gradient_norms.double() / self._runtime.world)
        read = self._runtime.sum_later(torch.cat(parts))  # all in one transfer

        def resolve() -> dict[str, Any]:
            values, end = read().tolist(), len(sums) + len(skips)
            record = {**known, **dict(zip(sums, values, strict=False))}
            if count := self.skips.read(values[len(sums) : end]):
                record["skipped"] = count
            if layers:
                record["gradient_norms"] = dict(zip(layers, values[end:], strict=True))
            return record

        self._posted = resolve
        self._all_steps, self._all_busy = self._all_steps + self._steps, self._all_busy + self._busy
        self._loss, self._right = self._zeros()
        self._steps, self._wait, self._busy = 0, 0.0, 0.0
        return records if self._runtime.device.type == "cuda" else records + self._posted_records()

    def flush(self, step: int, lr: float) -> list[dict[str, Any]]:
        """The records that are still to come, at the end. All ranks must call it."""
        records = self.close_interval(step, lr) if self._steps else []
        return records + self._posted_records()

    def _zeros(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums that begin, float64 [] each: it counts exactly to 2^53."""
        zeros = torch.zeros(2, dtype=torch.float64, device=self._runtime.device)
        return zeros[0], zeros[1]

    def _posted_records(self) -> list[dict[str, Any]]:
        posted, self._posted = self._posted, None
        return [posted()] if posted is not None else []

    @property
    def seconds(self) -> float:
        """Seconds of training so far, over all starts of the run."""
        return self._before + self._all_busy + self._busy

    @property
    def images_per_second(self) -> float:
        """Over all steps since this start, all ranks together; 0 before the first step."""
        steps, busy = self._all_steps + self._steps, self._all_busy + self._busy
        return steps * self._plan.global_batch / busy if steps else 0.0


class SaveTimer:
    """Says when ``minutes`` have passed since the last save; never, for None."""

    def __init__(self, minutes: float | None) -> None:
        self._minutes = minutes
        self.restart()

    def restart(self) -> None:
        """A save has begun."""
        self._since = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether it is time."""
        return self._minutes is not None and time.monotonic() - self._since >= 60 * self._minutes
