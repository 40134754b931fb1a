"""Hands a run, or an array of them, to Slurm through submitit; or prints what that would be."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import SlurmExecutor

from distrib.cli import dump_config
from distrib.config import Config, UserError
from distrib.root import TRAIN
from launch.record import Record
from launch.slurm.options import Request
from launch.slurm.profile import words as options
from launch.slurm.snapshot import take
from launch.slurm.task import Task

CODE = Path(__file__).resolve().parent.parent.parent  # the checkout, or site-packages
SCRIPT = "launch/slurm/job.sh"
KEPT = ("SLURM_CONF", "SLURM_CLUSTERS")  # which cluster it is


@dataclass(frozen=True)
class Element:
    """One run. ``words``: --fresh and the like; its settings stand in the configuration."""

    config: Config
    words: tuple[str, ...] = ()

    @property
    def record(self) -> Record:
        """What the launcher keeps of it."""
        return Record(self.config.run.dir)


@dataclass(frozen=True)
class Submission:
    """What a batch script is made of. ``folder`` gets the configurations, the script and its output."""

    elements: tuple[Element, ...]
    request: Request
    name: str
    folder: Path
    code: Path
    at_most: int | None = None  # elements of an array that may run at once

    @property
    def task(self) -> Task:
        """What each task runs."""
        profile = self.request.profile
        return Task(
            train=str(self.code / TRAIN.relative_to(CODE)),
            configs=tuple(str(self.folder / f"config_{k}.yaml") for k in range(len(self.elements))),
            words=tuple(element.words for element in self.elements),
            nodes=self.request.nodes,
            procs=self.request.procs,
            form=profile.tasks,
            restarts=profile.restarts,
            numa=profile.numa,
        )

    def environment(self) -> dict[str, str]:
        """What the batch script exports before it begins: ours, then the profile's."""
        return self._ours() | self.request.profile.variables()

    def _ours(self) -> dict[str, str]:
        profile = self.request.profile
        return {
            "DISTRIB_SUBMISSION": str(self.folder),
            "DISTRIB_WORLD": str(self.request.world),
            "DISTRIB_FAILURES": str(profile.failures),
            "DISTRIB_EXCLUDE": str(profile.exclude_failed).lower(),
        }

    def setup(self) -> list[str]:
        """The batch script's lines before srun."""
        profile = self.request.profile
        return [
            *(f"export {key}={shlex.quote(value)}" for key, value in self._ours().items()),
            f". {shlex.quote(str(self.code / SCRIPT))}",  # before the profile's PATH, which may lack Slurm
            *(f"export {key}={shlex.quote(value)}" for key, value in profile.variables().items()),
            f"export PYTHONPATH={shlex.quote(str(self.code))}${{PYTHONPATH:+:$PYTHONPATH}}",
            f"cd {shlex.quote(str(self.code))}",  # `python -m` looks there first
            *(f"module load {shlex.quote(module)}" for module in profile.modules),
            *profile.setup,
            "begin",
        ]

    def srun(self) -> list[str]:
        """srun's options. One failed task ends the step; a task that is done early does not."""
        profile, words = self.request.profile, ["--kill-on-bad-exit=1", "--wait=0"]
        if self._cpus_per_task:  # since Slurm 22.05 srun does not take it from the job
            words.append(f"--cpus-per-task={self._cpus_per_task}")
        if profile.container is not None:
            words.append(f"--container-image={profile.container.image}")
            words.append(f"--container-mounts={','.join([*self._mounts(), *profile.container.mounts])}")
        return [*words, *options(profile.srun)]

    def parameters(self) -> dict[str, Any]:
        """submitit's parameters."""
        request, profile = self.request, self.request.profile
        more: dict[str, Any] = {"requeue": True} | ({"mem": profile.mem} if profile.mem is not None else {})
        for word in options(profile.slurm):
            key, equals, value = word[2:].partition("=")
            more[key] = value if equals else True
        values = {
            "job_name": self.name,
            "time": profile.time,
            "nodes": request.nodes,
            "ntasks_per_node": 1 if profile.tasks == "node" else request.procs,
            "gpus_per_node": profile.gpus_per_node or None,
            "cpus_per_task": self._cpus_per_task,
            "partition": profile.partition,
            "account": profile.account,
            "qos": profile.qos,
            "constraint": profile.constraint,
            "exclude": profile.exclude,
            "dependency": request.dependency,
            "comment": request.comment,
            "signal_delay_s": profile.signal_seconds,
            "setup": self.setup(),
            "teardown": ["finish $?"],
            "srun_args": self.srun(),
            "stderr_to_stdout": True,
            "wckey": None,  # submitit's own would be refused where keys are checked
            "additional_parameters": more,
        }
        if self.at_most is not None:
            values["array_parallelism"] = self.at_most
        return values

    def script(self) -> str:
        """The batch script."""
        executor = self._executor()
        if len(self.elements) > 1:
            executor.parameters["map_count"] = len(self.elements)
        return str(executor._make_submission_file_text(executor._submitit_command_str, ""))

    def submit(self) -> list[str]:
        """Writes the folder and submits; returns the elements' job ids.

        Raises:
            UserError: the folder cannot be written, or sbatch refuses; nothing is submitted then.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for element, path in zip(self.elements, self.task.configs, strict=True):
                Path(path).write_text(dump_config(element.config), encoding="utf-8", errors="surrogateescape")
            runs = "".join(f"{element.record.run}\n" for element in self.elements)
            (self.folder / "runs").write_text(runs, encoding="utf-8", errors="surrogateescape")
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror}: set run.dir") from None
        executor = self._executor()
        try:
            with _as_from_a_shell(), contextlib.redirect_stderr(io.StringIO()):  # submitit prints what sbatch does
                if len(self.elements) > 1:
                    with executor.batch():
                        jobs = [executor.submit(self.task) for _ in self.elements]
                else:
                    jobs = [executor.submit(self.task)]
        except (FailedJobError, FailedSubmissionError, subprocess.CalledProcessError, OSError) as error:
            raise UserError(f"sbatch refused the job: {_reason(error)}") from None
        return [str(job.job_id) for job in jobs]

    def discard(self) -> None:
        """Removes what was written for nothing, and the copy of the code if no other submission uses it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        base = self.folder.parent
        if self.code.parent == base / "code" and not any(base.glob("*/*_submission.sh")):
            shutil.rmtree(self.code.parent, ignore_errors=True)
        for folder in (base, base.parent):
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()

    @property
    def _cpus_per_task(self) -> int | None:
        cpus, profile = self.request.profile.cpus_per_node, self.request.profile
        if cpus is None:
            return None
        return cpus if profile.tasks == "node" else max(1, cpus // self.request.procs)

    def _mounts(self) -> list[str]:
        """What the ranks read and write, each folder where it is, the data and first weights read-only.

        Raises:
            UserError: pyxis would take such a path for two.
        """
        configs = [element.config for element in self.elements]
        written = {self.folder.parent.parent, self.code, *(element.record.run for element in self.elements)}
        written |= {Path(path) for c in configs for path in (c.data.index_dir, c.wandb.dir) if path is not None}
        read = {Path(path) for c in configs for path in (c.data.root, c.model.weights) if path is not None}
        read = {path for path in read if path.is_absolute() and path.exists()}
        outer = _outermost(written)
        mounts = [*outer, *(path for path in _outermost(read) if not _within(path, outer))]
        for path in mounts:
            if re.search("[:,]", str(path)):
                raise UserError(f"{path}: --container-mounts takes no ':' and no ',' in a path: use another folder")
        return [f"{path}:{path}{'' if path in outer else ':ro'}" for path in mounts]

    def _executor(self) -> SlurmExecutor:
        profile = self.request.profile
        python = profile.python or ("python3" if profile.container else None)
        executor = _Executor(self.folder, python=shlex.quote(python) if python else None)
        executor.update_parameters(**self.parameters())
        return executor


def _outermost(folders: Collection[Path]) -> list[Path]:
    return sorted(path for path in folders if not _within(path, set(folders) - {path}))


def _within(path: Path, folders: Collection[Path]) -> bool:
    return path in folders or any(parent in folders for parent in path.parents)


class _Executor(SlurmExecutor):
    """submitit's, but it can write a script on a machine without Slurm."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def prepare(
    elements: Sequence[Element], request: Request, base: Record, name: str, at_most: int | None, copy: bool
) -> Submission:
    """A submission under ``base``; ``copy``: with a copy of the code, else it names where the code lies now.

    Raises:
        UserError: the code cannot be copied.
    """
    code = take(CODE, base.path / "code")[0] if copy else CODE
    folder = base.path / time.strftime("%Y%m%d-%H%M%S")
    suffix = 1
    while folder.exists():
        suffix += 1
        folder = folder.with_name(f"{folder.name.partition('.')[0]}.{suffix}")
    return Submission(tuple(elements), request, name, folder, code, at_most)


def submit(
    elements: Sequence[Element], request: Request, base: Record, name: str, at_most: int | None = None
) -> list[str]:
    """Copies the code, submits, and notes that in each element's record; returns the job ids, ``123_0`` in an array.

    Raises:
        UserError: it cannot be submitted, or not be noted; no job is left behind then.
    """
    submission = prepare(elements, request, base, name, at_most, copy=True)
    stops = [element.record.stop for element in elements if element.record.stop.exists()]
    try:
        for stop in stops:  # before the job, which may begin at once and would heed it
            stop.unlink()
    except OSError as error:
        raise UserError(f"cannot remove {error.filename}: {error.strerror}") from None
    try:
        jobs = submission.submit()
    except UserError:
        for stop in stops:
            stop.touch()
        submission.discard()
        raise
    try:
        for element, job in zip(elements, jobs, strict=True):
            facts = {"job": job, "name": element.config.run.name, "nodes": request.nodes, "procs": request.procs}
            kind = {"tasks": request.profile.tasks, "submission": str(submission.folder)}
            element.record.add("submitted", facts | kind)
    except OSError as error:
        number = jobs[0].partition("_")[0]
        with contextlib.suppress(OSError):
            subprocess.run(["scancel", number], capture_output=True)
        raise UserError(
            f"cannot write to {base.run}: {error.strerror}: make room; job {number} was cancelled"
        ) from None
    return jobs


@contextlib.contextmanager
def _as_from_a_shell() -> Iterator[None]:
    """Without what sbatch takes over the script's own lines, and what a job around us has set."""
    ours = {name for name in os.environ if name.startswith(("SBATCH_", "SLURM_")) and name not in KEPT}
    before = {name: os.environ.pop(name) for name in ours}
    try:
        yield
    finally:
        os.environ.update(before)


def _reason(error: BaseException) -> str:
    printed = getattr(error, "stderr", None) or str(error)
    text = printed.decode("utf-8", "replace") if isinstance(printed, bytes) else str(printed)
    lines = [line.strip() for line in text.splitlines() if "sbatch: error:" in line]
    return " ".join(line.partition("sbatch: error:")[2].strip() for line in lines) or " ".join(text.split())
