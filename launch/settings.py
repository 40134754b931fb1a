"""Which settings decide about a run's result, and whether two configurations mean the same run."""

from __future__ import annotations

import contextlib
from typing import Any

from distrib.config import Config, UserError
from distrib.follow import flatten, follow
from distrib.layout import SPLITS, count_images
from launch.paths import located

# Other values come to the same result: how often it is saved and told, how long it may take, where indexes lie,
# what the machine is like.
FREE = (
    "log.", "checkpoint.", "trace", "data.index_dir", "data.wait_minutes", "train.check_replicas", "train.hang_minutes",
    "train.max_minutes",
)  # fmt: skip
MACHINE = (
    "data.workers", "data.prefetch", "data.decoder", "data.hw_decoder_load", "data.preallocate", "train.compile",
)  # fmt: skip


def settings_of(config: Config) -> dict[str, Any]:
    """What decides about a run's result, by dotted key: no names, no W&B, nor how it is launched."""
    flat = flatten(config.model_dump(mode="json", exclude={"wandb", "launch"}))
    return {key: value for key, value in flat.items() if key not in ("run.name", "run.dir")}


def differences(asked: Config, trained: Config) -> dict[str, tuple[Any, Any]]:
    """The settings that decide about the result and differ, with their values in ``trained`` and in ``asked``.

    What is auto in ``asked`` and does not follow from the configuration alone agrees with any value, and so does a
    variable that is not set here. A batch that is larger than the images are became as many as there are.
    """
    # A job of Slurm's has absolute paths where a run on this machine has them as they were typed.
    before, now = settings_of(located(trained)), settings_of(located(follow(asked)))
    changed = {
        key: (before.get(key), now.get(key))
        for key in sorted(before | now)
        if before.get(key) != now.get(key) and not _is_open(now.get(key)) and not key.startswith((*FREE, *MACHINE))
    }
    if "train.global_batch" in changed and _images(asked) == trained.train.global_batch:
        del changed["train.global_batch"]
        if trained.train.micro_batch == trained.train.global_batch:
            changed.pop("train.micro_batch", None)
    return changed


def _is_open(value: Any) -> bool:
    return value == "auto" or (isinstance(value, str) and "${" in value)


def _images(config: Config) -> int | None:
    """How many there are to train on, counted up to a batch."""
    with contextlib.suppress(UserError):  # the data is not to be seen from here
        return count_images(config.data, SPLITS[0], config.train.global_batch)
    return None
