"""What each step really saw and came to, for comparing runs bit by bit: with ``trace: true``, a file a rank."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from distrib.data import Batch, TrainPlan
from distrib.data.draws import draws
from distrib.jsonl import JsonlFile


class Trace:
    """``trace/rank_00000.jsonl``. Each step waits for the device; ``distrib trace diff`` compares two runs'."""

    def __init__(self, folder: Path, plan: TrainPlan, notify: Callable[[str], None] = print) -> None:
        self._plan = plan
        self._file = JsonlFile(folder / f"rank_{plan.rank:05d}.jsonl", notify)

    def step(self, step: int, batches: Sequence[Batch], loss: torch.Tensor, gradient_norm: torch.Tensor | None) -> None:
        """Writes what step ``step``, counted from 1, was.

        {"step"; "ids": this rank's samples, in order; "draws": a CRC-32 of each one's uniform numbers; "loss": of this
        rank, summed; "gradient_norm": of the global batch, equal on all ranks}, the last two as ``float.hex()``.

        Args:
            batches: the step's.
            loss: fp32 [].
            gradient_norm: fp32 []. As the step measures it.
        """
        assert gradient_norm is not None  # it is measured at each step of a run that is traced
        checksums = [
            zlib.crc32(row.tobytes())
            for part in self._plan.slices(step - 1)
            for row in draws(self._plan.seed, part.epoch, part.positions)
        ]
        ids = [sample for batch in batches for sample in batch.ids.tolist()]
        summed, norm = torch.stack([loss.double(), gradient_norm.double()]).tolist()  # one wait for both
        line = {"step": step, "ids": ids, "draws": checksums, "loss": summed.hex(), "gradient_norm": norm.hex()}
        self._file.append(line)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
