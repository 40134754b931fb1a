"""Whether a run that has begun can go on as it is asked to: what a rank would say, before a job waits for hours."""

from __future__ import annotations

from distrib.cli import load_config
from distrib.config import Config, UserError
from distrib.folder import FIXED, WAYS_OUT, RunFolder
from launch.settings import differences


def is_left(config: Config, fresh: bool, must_resume: bool) -> bool:
    """Whether there is anything left to train.

    Raises:
        UserError: there is no checkpoint to resume from and must be, or it was trained with other settings.
    """
    folder = RunFolder(config.run.dir)
    begun = any(folder.checkpoints.glob("step_*.pt"))
    if must_resume and not begun:
        raise UserError(f"--resume must: {folder.checkpoints} holds no checkpoint: see run.dir and run.name")
    file = folder.path / "config.yaml"
    if fresh or not begun or not file.exists():
        return True
    changed = differences(config, load_config(file))
    for key, (before, now) in changed.items():
        if any(key == fixed or key.startswith(f"{fixed}.") for fixed in FIXED):
            raise UserError(f"{key} is {now}, but {folder.path} was trained with {before}: set it back, {WAYS_OUT}")
    return bool(changed) or (folder.summary() or {}).get("status") != "finished"
