"""How far each run of a sweep is, by its folder alone, and whether that folder is of the same settings.

==========  ======================================================================
state       the folder
==========  ======================================================================
finished    summary.json says so
diverged    summary.json says so: a result too, and nothing to train again
running     somebody writes it now (writer.json)
unfinished  there is a configuration, and none of the above: goes on
waiting     there is no configuration: not begun
==========  ======================================================================
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distrib.cli import load_config
from distrib.config import Config, UserError
from distrib.folder import RunFolder
from distrib.follow import follow
from distrib.layout import SPLITS, count_images
from distrib.lease import NAME as WRITER
from distrib.lease import disk_time, look
from launch.paths import located
from launch.sweep.plan import Element, settings_of

FINISHED, DIVERGED, RUNNING, UNFINISHED, WAITING = "finished", "diverged", "running", "unfinished", "waiting"
FAILED = "failed"  # unfinished, and this start of the sweep saw it end so
STATES = (FINISHED, DIVERGED, FAILED, RUNNING, UNFINISHED, WAITING)
# Other values come to the same result: how often it is saved and told, where indexes lie, what the machine is like.
FREE = ("log.", "checkpoint.", "trace", "data.index_dir", "data.wait_minutes")
MACHINE = (
    "data.workers", "data.prefetch", "data.decoder", "data.hw_decoder_load", "data.preallocate", "train.compile",
)  # fmt: skip


@dataclass(frozen=True)
class Found:
    """What one look at a run's folder tells; ``summary`` is ``summary.json``, empty where there is none."""

    state: str
    summary: Mapping[str, Any] = field(default_factory=dict)


def look_at(element: Element) -> Found:
    """The state of an element's run.

    Raises:
        UserError: the folder is that of a run with other settings.
    """
    folder = element.folder
    if not (folder / "config.yaml").exists():
        return Found(WAITING)
    changed = differences(element.config, load_config(folder / "config.yaml"))
    if changed:
        key, (before, now) = next(iter(changed.items()))
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise UserError(
            f"{folder} was trained with {key} {_shown(before)}, and now it is {_shown(now)}{more}: set it back, or "
            "give this sweep a --name of its own"
        )
    summary = RunFolder(str(folder)).summary() or {}
    if _is_written(folder):
        return Found(RUNNING, summary)
    status = summary.get("status")
    return Found(status if status in (FINISHED, DIVERGED) else UNFINISHED, summary)


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


def _is_written(folder: Path) -> bool:
    """Whether somebody writes there; also where nobody can tell, as the run itself finds out whether it may."""
    if not (folder / WRITER).exists():
        return False
    with contextlib.suppress(OSError):
        sight = look(folder, disk_time(folder))
        return sight is not None and sight.alive is not False
    return False


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
