"""Going back to a good checkpoint where steps without a number do not stop.

The step counter stays: the run goes on with the weights of the checkpoint and the images behind those that it could not
learn from (Chowdhery et al. 2022, PaLM, arXiv 2204.02311, section 5.1). Of deterministic training the same weights with
the same images would come to the same end.

Whether to go back follows from numbers that all ranks have alike: those of the interval records, which are summed over
the ranks. It is decided where an interval of ``log.every_steps`` ends and nowhere else, so that neither a save nor a
stop between two of them changes what a run does. On a GPU a record is read an interval late, and so is the decision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distrib import checkpoint, words
from distrib.checkpoint import Checkpointer
from distrib.config import TrainConfig
from distrib.engine.state import TrainState
from distrib.faults import DIVERGED, Failure
from distrib.finite import spoilt
from distrib.metrics import Skips
from distrib.runtime import Runtime

# A loss scaler of fp16 begins at 2^16 and halves with each step that it skips: so many in a row are its search.
SCALER_STEPS = 16


@dataclass
class Trouble:
    """What a run has met. It lies in every checkpoint: a run that is continued decides as one that was not stopped."""

    skips: Skips = field(default_factory=Skips)
    rollbacks: int = 0
    futile: int = 0  # of them since a checkpoint was saved behind which there was training again
    since: int = 0  # the step of the last one
    good: int | None = None  # the newest checkpoint that was saved while all was well

    def __post_init__(self) -> None:
        if isinstance(self.skips, dict):  # as a checkpoint has it
            self.skips = Skips(**self.skips)

    def saving(self, step: int, finite: bool) -> None:
        """A checkpoint after ``step`` steps is about to be saved."""
        if finite and self.skips.row == 0:
            self.good = step
            if step > self.since:
                self.futile = 0


class Rescue:
    """Decides when to go back, and does it."""

    def __init__(
        self,
        cfg: TrainConfig,
        folder: Path,
        runtime: Runtime,
        state: TrainState,
        checkpointer: Checkpointer | None,
        *,
        scaled: bool,
        notify: Callable[[str], None],
    ) -> None:
        """``folder``: the checkpoints'. ``checkpointer``: on the rank that writes. ``scaled``: with a loss scaler."""
        self._limit = cfg.skip_limit + (SCALER_STEPS if scaled else 0)
        self._rollbacks = cfg.rollback_limit
        self._folder, self._runtime, self._state, self._checkpointer = folder, runtime, state, checkpointer
        self._notify = notify

    def due(self, trouble: Trouble, finite: bool) -> bool:
        """Whether to go back now. All ranks must call it, with the same numbers.

        Too many steps in a row were passed over; or the last logged loss was no number (``finite``), and the weights
        are none either, so that no step will ever be taken again.
        """
        longest, trouble.skips.longest = trouble.skips.longest, 0
        return longest > self._limit or (not finite and not self._state.is_finite())

    def go_back(self, trouble: Trouble, step: int) -> None:
        """Takes the newest good checkpoint's weights for those after ``step``. All ranks must call it.

        Raises:
            Failure: on all ranks, with DIVERGED: it was done too often in vain, or there is no such checkpoint.
        """
        if trouble.futile >= self._rollbacks:
            times = f"going back to a checkpoint {self._rollbacks} times (train.rollback_limit) did not help"
            raise self._diverged(step, times if self._rollbacks else "train.rollback_limit is 0")
        found = self._runtime.on_main(self._find)
        if found is None:
            raise self._diverged(step, "there is no checkpoint of before to go back to")
        saved: dict[str, Any] = self._runtime.on_each(lambda: checkpoint.load(found))
        self._state.restore(saved)
        trouble.rollbacks += 1
        trouble.futile += 1
        trouble.since = step
        self._notify(
            f"step {step}: no step could be taken for too long; back to the weights of {found.name}, and on with the "
            f"images of step {step + 1} (going back for the {trouble.futile}. time in a row, of at most "
            f"{self._rollbacks})"
        )

    def _find(self) -> Path | None:
        if self._checkpointer is not None:
            self._checkpointer.wait()  # what is being written may be the one
        return checkpoint.newest_valid(self._folder, self._notify, is_good)

    @staticmethod
    def _diverged(step: int, reason: str) -> Failure:
        return Failure(
            f"the run diverged: up to step {step} loss or gradient were no number (NaN) for too long, and {reason}; "
            f"{words.REMEDY}",
            everywhere=True,
            code=DIVERGED,
        )


def is_good(saved: dict[str, Any]) -> bool:
    """Whether a checkpoint was saved while the loss was a number, behind a step that was taken, and holds numbers."""
    progress = saved["progress"]
    row = Trouble(**progress.get("trouble", {})).skips.row  # none in files of before 2026-11-28
    return progress["finite"] and row == 0 and spoilt(saved) is None
