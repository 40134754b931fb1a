"""A run is its folder: what lies in it, whether it can be continued, and what is written at the start and the end."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from distrib.cli import dump_config
from distrib.config import Config, UserError
from distrib.follow import flatten
from distrib.jsonl import dumps, replace_file
from distrib.root import INSTALLED, REVISION

PACKAGES = ("distrib", "torch", "torchvision", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "wandb")
WAYS_OUT = "choose another run.name, or begin anew with --fresh"
PARTS = ("progress", "config", "data", "model", "optimizer", "statistics", "scaler")  # of each checkpoint
# Another value would make a step mean something else: other images, another network.
FIXED = (
    "model.name", "model.num_classes", "model.stem", "model.plain", "run.seed", "train.global_batch", "data.size",
    "optim.freeze", "optim.head_lr", "optim.layer_decay",
)  # fmt: skip


# What a run writes into its folder. Checkpoints first: without them nothing is continued, whatever else is there.
OWN = (
    "checkpoints", "config.yaml", "metrics.jsonl", "trace", "summary.json", "bad_samples.jsonl", "wandb", "faults",
    ".fresh",
)  # fmt: skip


class RunFolder:
    """Paths of a run folder and its small files."""

    def __init__(self, path: str) -> None:
        self.path = Path(os.path.expanduser(path))  # a shell leaves the ~ of run.dir=~/runs/a to us
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.bad_samples = self.path / "bad_samples.jsonl"
        self.trace = self.path / "trace"
        self.faults = self.path / "faults"
        self._summary = self.path / "summary.json"
        self._fresh = self.path / ".fresh"  # the job that began here with --fresh

    def check_apart(self, sources: Sequence[Path]) -> None:
        """Looks that the folder is not among the class folders of ``sources``, where it would become a class.

        Raises:
            UserError: it is.
        """
        for source in sources:
            if self.path.resolve().is_relative_to(source.resolve()):
                raise UserError(f"run.dir {self.path} lies among the class folders of {source}: set run.dir elsewhere")

    def is_begun_by(self, job: str | None) -> bool:
        """Whether ``start_fresh`` made it for this job: then this is a restart, which goes on."""
        try:
            return job is not None and self._fresh.read_text(encoding="utf-8") == job
        except (OSError, ValueError):
            return False

    def start_fresh(self, job: str | None, notify: Callable[[str], None]) -> None:
        """Moves what a run left here to a folder beside it, with the time in its name; nothing is deleted.

        Raises:
            UserError: it cannot be moved.
        """
        path = self.path.absolute()
        aside = path.with_name(f"{path.name}.{time.strftime('%Y-%m-%dT%H-%M-%S')}")
        try:
            with contextlib.suppress(OSError):
                self.checkpoints.rmdir()  # an empty one, which a look for room has made
            there = [name for name in OWN if os.path.lexists(path / name)]
            if there:
                aside.mkdir()  # an error where it is there, so that nothing is ever mixed
            for name in there:
                (path / name).rename(aside / name)
            if job is not None:
                replace_file(self._fresh, job.encode())
        except OSError as error:
            where = f" (some of it lies in {aside})" if aside.exists() else ""
            raise UserError(f"cannot move {path} aside{where}: {error.strerror}: set run.dir") from None
        if there:
            notify(f"--fresh: the earlier run lies in {self.path.with_name(aside.name)}")

    def write_config(self, config: Config) -> None:
        """``config.yaml``: a header with versions, then what ``--config`` reads back to the same run.

        Raises:
            UserError: the folder cannot be written.
        """
        header = [
            f"# {' '.join(sys.orig_argv)}",
            f"# {', '.join(_versions())}, Python {platform.python_version()}, git {_git_revision()}",
        ]
        try:
            text = "\n".join([*header, dump_config(config)])
            replace_file(self.path / "config.yaml", text.encode("utf-8", "surrogateescape"))
        except OSError as error:
            raise UserError(f"cannot write to {self.path}: {error.strerror}: make room, or set run.dir") from None

    def write_summary(self, values: Mapping[str, Any]) -> None:
        """``summary.json``: how the run ended.

        Raises:
            OSError: the folder cannot be written.
        """
        replace_file(self._summary, f"{dumps(values, indent=2)}\n".encode())

    def summary(self) -> dict[str, Any] | None:
        """The last summary; None where there is none, or none that a run has written."""
        try:
            values = json.loads(self._summary.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return values if isinstance(values, dict) else None


def check_checkpoint(saved: object, path: Path) -> dict[str, Any]:
    """What ``path`` holds, which must be a checkpoint of this trainer.

    Raises:
        UserError: it is not.
    """
    missing = [part for part in PARTS if not isinstance(saved, dict) or part not in saved]
    if missing or not isinstance(saved, dict):
        raise UserError(f"{path} has no {missing[0]!r}, so it is no checkpoint of this trainer: move it away")
    return saved


def check_resumable(
    saved: Mapping[str, Any], config: Config, data: str, path: Path, notify: Callable[[str], None]
) -> None:
    """Refuses a checkpoint of another network, data set, seed or batch; says which other keys have changed.

    Raises:
        UserError: naming the key, both values and the way out.
    """
    new = flatten(config.model_dump(mode="json"))
    # A key that is younger than the checkpoint had the value then that it has by default.
    old = flatten(Config().model_dump(mode="json")) | flatten(saved["config"])
    changed = {key: (old.get(key), new.get(key)) for key in sorted(old | new) if old.get(key) != new.get(key)}
    for key, (before, now) in changed.items():
        if key == "model.num_classes" and saved["data"] != data:
            continue  # it follows from the images, of which is told below
        if any(key == fixed or key.startswith(f"{fixed}.") for fixed in FIXED):
            raise UserError(f"{key} is {now}, but {path} was trained with {before}: set it back, {WAYS_OUT}")
    before, now = changed.get("model.weights", (None, None))
    if now is not None:
        raise UserError(f"model.weights is {now}, but {path} began with {before or 'none'}: set it back, {WAYS_OUT}")
    if saved["data"] != data:
        raise UserError(
            f"the images under data.root are not those that {path} was trained on (files were added, removed or "
            "renamed, or data.classes, data.fraction or data.val_split were changed): restore them, "
            f"{WAYS_OUT}"
        )
    told = [
        f"{key} {'null' if before is None else before} → {'null' if now is None else now}"
        for key, (before, now) in changed.items()
        if not key.startswith(("run.", "log.", "launch."))
    ]
    if told:
        notify(f"changed since {path.name}: {', '.join(told)}")


def _versions() -> list[str]:
    installed = {d.name: d.version for d in distributions()}
    return [f"{name} {installed[name]}" for name in PACKAGES if name in installed]


def _git_revision() -> str:
    """The commit of the code, with "+changes" where the tree differs from it; a copy has it in a file beside it."""
    try:
        copied = " ".join(REVISION.read_text(encoding="utf-8", errors="replace").split())
    except OSError:
        copied = ""
    if copied or INSTALLED:  # a repository around the environment, or around a run's folder, is not the code's
        return copied or "unknown"
    code = Path(__file__).resolve().parent.parent
    try:
        commands = (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        revision, changes = (
            subprocess.run(["git", "-C", str(code), *c], capture_output=True, text=True, check=True, timeout=10).stdout
            for c in commands
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return revision.strip() + ("+changes" if changes.strip() else "")
