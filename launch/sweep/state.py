"""How far each run of a sweep is, as ``launch list`` judges it, and whether its folder is of the same settings.

==========  ====================================================================================
state       what is seen
==========  ====================================================================================
finished    the summary says so, of the last line of metrics.jsonl or later
diverged    likewise: a result too, and nothing to train again
queued      a job of it waits in Slurm's queue: left alone
running     somebody writes it now, or a job of it runs: left alone
unfinished  there is a configuration, and none of the above: goes on
waiting     there is no configuration, and none of the above: not begun
failed      unfinished, and this start of the sweep saw it end so
==========  ====================================================================================
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distrib.cli import load_config
from distrib.config import UserError
from launch.runs import is_run
from launch.settings import differences
from launch.state import DONE, WAITS
from launch.survey import View, survey
from launch.sweep.plan import Element


class Progress:
    """The states, as they stand in tables."""

    FINISHED, DIVERGED, FAILED = "finished", "diverged", "failed"
    RUNNING, QUEUED, UNFINISHED, WAITING = "running", "queued", "unfinished", "waiting"
    ALL = (FINISHED, DIVERGED, FAILED, RUNNING, QUEUED, UNFINISHED, WAITING)


@dataclass(frozen=True)
class Found:
    """What one look at a run tells; ``summary`` is ``summary.json``, empty where there is none."""

    state: str
    summary: Mapping[str, Any] = field(default_factory=dict)


def look_at(elements: Sequence[Element]) -> dict[str, Found]:
    """The state of each run, by its name. Slurm is asked once about all, and only where one was submitted as a job.

    Raises:
        UserError: a folder is that of a run with other settings, or cannot be read.
    """
    begun = {element.name for element in elements if _has_settings_of(element)}
    there = [element for element in elements if element.name in begun or is_run(element.folder)]
    views = dict(zip((element.name for element in there), survey([one.folder for one in there]), strict=True))
    return {name: _found(views.get(name), name in begun) for name in (element.name for element in elements)}


def _found(view: View | None, begun: bool) -> Found:
    summary = (view.run.seen.summary if view else None) or {}
    if view is not None and _is_busy(view):
        return Found(Progress.QUEUED if view.state.name in WAITS else Progress.RUNNING, summary)
    if view is not None and begun and (status := view.run.seen.covered()) in DONE:
        return Found(status, summary)  # whatever its last job said: of these settings nothing is left to train
    return Found(Progress.UNFINISHED if begun else Progress.WAITING, summary)


def _is_busy(view: View) -> bool:
    """Whether somebody writes the run, or a job of it waits or runs."""
    queue, writer = view.slurm.queue, view.run.seen.writer
    if queue is not None and view.state.job in queue:
        return True
    if writer is not None and writer.alive is not False:
        return bool(writer.alive)  # where nobody can tell, the run itself finds out whether it may write
    if view.settled or view.run.seen.covered() in DONE:
        return False
    # A Slurm that does not answer may have the job in its queue. Where there is none the folder has been copied.
    return shutil.which("squeue") is not None


def _has_settings_of(element: Element) -> bool:
    """Whether there is a configuration; it has the element's settings then.

    Raises:
        UserError: it has others.
    """
    file = element.folder / "config.yaml"
    if not os.path.exists(file):  # a folder that may not be entered is looked at when the run begins
        return False
    changed = differences(element.config, load_config(file))
    if changed:
        key, (before, now) = next(iter(changed.items()))
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise UserError(
            f"{element.folder} was trained with {key} {_shown(before)}, and now it is {_shown(now)}{more}: set it "
            "back, or give this sweep a --name of its own"
        )
    return True


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
