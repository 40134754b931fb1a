"""Where a run is: what of it lies in every checkpoint, and from which one a start goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distrib import checkpoint
from distrib.checkpoint import Checkpointer
from distrib.config import Config, UserError
from distrib.folder import RunFolder, check_checkpoint, check_resumable
from distrib.jsonl import cut_back
from distrib.lease import Lease
from distrib.log import Log, new_run_id
from distrib.mirror import Mirror, newest_of_both
from distrib.rescue import Trouble
from distrib.runtime import Runtime

Found = tuple[Path, dict[str, Any]]  # a checkpoint's file and what it holds


@dataclass
class Progress:
    """Where the run is. It lies in every checkpoint, so a restart begins with it."""

    step: int = 0  # steps done
    evaluated: int = 0  # the last of them after which the weights were evaluated
    result: dict[str, float] = field(default_factory=dict)  # of that evaluation
    best_step: int | None = None
    best_top1: float = -1.0
    finite: bool = True  # whether the last logged loss was a number
    trouble: Trouble = field(default_factory=Trouble)
    seconds: float = 0.0  # of training, over all starts
    wandb_id: str = field(default_factory=new_run_id)

    def __post_init__(self) -> None:
        if isinstance(self.trouble, dict):  # as a checkpoint has it
            self.trouble = Trouble(**self.trouble)


def find_checkpoint(runtime: Runtime, folder: RunFolder, mirror: Mirror | None, needed: bool, log: Log) -> Found | None:
    """The newest valid checkpoint, of the folder or its mirror, and what it holds.

    Raises:
        UserError: it cannot be read or is none of this trainer's, or there is none and one is ``needed``.
    """
    newest = runtime.on_main(lambda: newest_of_both(mirror, folder.checkpoints, log.warning))
    if newest is not None:
        return newest, runtime.on_each(lambda: check_checkpoint(checkpoint.load(newest), newest))
    if needed:
        raise UserError(f"--resume must: {folder.checkpoints} holds no checkpoint: see run.dir and run.name")
    return None


def find_progress(found: Found | None, config: Config, data: str, total_steps: int, log: Log) -> Progress:
    """Where the run is.

    Raises:
        UserError: the checkpoint is another run's, or has more steps than are asked for.
    """
    if found is None:
        return Progress()
    newest, saved = found
    check_resumable(saved, config, data, newest, log.message)
    progress = Progress(**saved["progress"])
    if progress.step > total_steps:
        raise UserError(
            f"train.epochs or train.steps ask for {total_steps} steps, but {newest} has {progress.step} already: "
            "raise them, or choose another run.name"
        )
    return progress


def open_folder(
    folder: RunFolder,
    lease: Lease | None,
    mirror: Mirror | None,
    config: Config,
    step: int,
    state_bytes: int,
    warn: Callable[[str], None],
) -> Checkpointer:
    """Makes the run folder ready to go on from ``step``. Rank 0 only.

    Raises:
        UserError: it cannot be written.
    """
    assert lease is not None
    keep = config.checkpoint.keep
    made = Checkpointer(folder.checkpoints, keep, warn, lease.token, lease.held, state_bytes, mirror)
    folder.write_config(config)
    try:
        for file in (folder.metrics, *folder.trace.glob("*.jsonl")):
            cut_back(file, step)
    except OSError as error:
        raise UserError(f"cannot write to {folder.path}: {error.strerror}: make room, or set run.dir") from None
    return made
