"""Run folders, as an onlooker reads them: where they are, and what lies in one.

Of long files only the ends are read: a list of hundreds of runs is there at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from distrib.config import UserError
from distrib.lease import NAME as WRITER
from distrib.lease import disk_time, look
from launch.record import FOLDER, Record
from launch.reports import last_codes
from launch.state import Seen

RUNS = "runs"  # where runs lie by default
DEPTH = 4  # how far below a folder runs are looked for
# Each is written by train.py or the launcher alone. A queued run has nothing but the launcher's record.
SIGNS = ("metrics.jsonl", "checkpoints", "summary.json", WRITER, f"{FOLDER}/events.jsonl")
JOB = re.compile(r"\d+(_\d+)?")
CHECKPOINT = re.compile(r"step_(\d{8,})\.pt")

# metrics.jsonl is read in blocks from its end, until an evaluation is found.
BLOCK, MOST = 1 << 18, 1 << 24  # bytes
EVALUATION = b'{"kind": "eval"'
LAST_LINES = 8  # a training record is among so many: each evaluation follows one
# The parser in C, where PyYAML was built with it: ten times as fast.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Run:
    """What lies in a run's folder."""

    name: str  # what a person types for it
    record: Record
    seen: Seen
    train: dict[str, Any]  # the last training record and the last evaluation; empty where there is none
    evaluation: dict[str, Any]
    steps: int | None  # that the run is to have in all, where that is known
    silent: float | None  # seconds since the last line of metrics.jsonl, by the disk's clock

    @property
    def path(self) -> Path:
        """The folder."""
        return self.record.run

    @property
    def step(self) -> int:
        """Steps done, as far as its files say."""
        summary = self.seen.summary or {}
        return max(self.seen.step, summary["step"] if isinstance(summary.get("step"), int) else 0)

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and top-1 (percent) of the best evaluation."""
        step, top1 = self.evaluation.get("best_step"), self.evaluation.get("best_top1")
        if isinstance(step, int) and isinstance(top1, int | float):
            return step, float(top1)
        return None


class Clock:
    """The time of each disk, asked once: by a file of ours beside the runs, which is gone at once."""

    def __init__(self) -> None:
        self._asked: dict[int, tuple[float | None, float]] = {}

    def now(self, run: Path) -> float | None:
        """Seconds, or None where neither the run's folder nor the one around it can be written."""
        disk = run.stat().st_dev
        if disk not in self._asked:
            beside = run.parent
            shown = disk_time(beside) if beside.stat().st_dev == disk else None
            self._asked[disk] = (disk_time(run) if shown is None else shown), time.monotonic()
        shown, when = self._asked[disk]
        return None if shown is None else shown + time.monotonic() - when


def is_run(folder: Path) -> bool:
    """Whether a run lies in it."""
    return any(os.path.lexists(folder / sign) for sign in SIGNS)


def find(folder: Path, depth: int = DEPTH) -> Iterator[Path]:
    """The runs in and below a folder, in the order of their names; a run holds no other.

    What the launcher keeps of a sweep lies beside its runs, and may hold copies of code by the thousand: passed over.
    """
    if is_run(folder):
        yield folder
        return
    if depth == 0:
        return
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())
        for name in names:
            if name != FOLDER or is_run(folder / name):
                yield from find(folder / name, depth - 1)


def shown_name(folder: Path) -> str:
    """What a person may type for a run: below ``runs`` its name there, elsewhere its path as it was reached."""
    parts = folder.parts
    return str(Path(*parts[1:])) if len(parts) > 1 and parts[0] == RUNS else str(folder)


def resolve(word: str) -> Path:
    """The run that ``word`` means: a folder, a name below ``runs``, or a job's number.

    Raises:
        UserError: there is none, or the job has several.
    """
    places = _places(word)
    for place in places:
        if is_run(place):
            return place
    if JOB.fullmatch(word):
        found = _runs_of(word)
        if len(found) > 1:
            jobs = sorted(found.values())
            raise UserError(f"job {word} has {len(found)} runs below {RUNS}: name one of them, such as {jobs[0]}")
        if found:
            return next(iter(found))
        raise UserError(f"no run below {RUNS} knows a job {word}: name the run's folder")
    if not word or not any(map(os.path.isdir, places)):
        raise UserError(
            f"there is no run {word!r}, here or below {RUNS}: `python -m launch list` shows those there are"
        )
    inside = next(place for place in places if os.path.isdir(place))
    below = next(find(inside), None)
    hint = f": name one of those in it, such as {shown_name(below)}" if below else ""
    raise UserError(f"{inside} is no run's folder{hint}")


def resolve_all(word: str) -> list[Path]:
    """The runs that ``word`` means: one as in ``resolve``, or those right in a sweep's folder, or of an array.

    Raises:
        UserError: there is none; or it names the folder of all runs, which nobody means by that.
    """
    places = _places(word)
    if word and not any(map(is_run, places)):
        if JOB.fullmatch(word) and len(found := _runs_of(word)) > 1:
            return list(found)
        inside = next((place for place in places if os.path.isdir(place)), None)
        if inside is not None and (below := list(find(inside, 1))):
            if os.path.isdir(RUNS) and os.path.samefile(inside, RUNS):
                raise UserError(f"{inside} holds all runs: name one, or a sweep, such as {shown_name(below[0])}")
            return below
    return [resolve(word)]


def _places(word: str) -> list[Path]:
    return [Path(os.path.expanduser(word)), Path(RUNS, word)]


def _runs_of(number: str) -> dict[Path, str]:
    """The runs below ``runs`` that know a job, or an element of that array, and by which number."""
    return {
        path: job for path in find(Path(RUNS)) for job in Record(path).jobs() if number in (job, job.partition("_")[0])
    }


def read(folder: Path, clock: Clock) -> Run:
    """Reads a run's folder.

    Raises:
        UserError: it cannot be read.
    """
    record = Record(folder)
    try:
        now = clock.now(folder)
        lines, changed = tail(folder / "metrics.jsonl")
        writer = look(folder, now)
        stop = record.stop.exists()
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}") from None
    train: dict[str, Any] = next((line for line in reversed(lines) if line.get("kind") == "train"), {})
    evaluation: dict[str, Any] = next((line for line in reversed(lines) if line.get("kind") == "eval"), {})
    step = max((line["step"] for line in lines if isinstance(line.get("step"), int)), default=0)
    summary, written = _json(folder / "summary.json")
    events = record.read()
    seen = Seen(events, stop, summary, step, writer, written, last_codes(record, events))
    return Run(
        shown_name(folder),
        record,
        seen,
        train,
        evaluation,
        total_steps(folder, train or evaluation, summary or {}),
        None if now is None or changed is None else max(0.0, now - changed),
    )


def tail(path: Path) -> tuple[list[dict[str, Any]], float | None]:
    """The last evaluation and the last few lines of ``metrics.jsonl``, in their order, and when the file changed.

    Lines of another form, such as one that is being written, are passed over. ([], None) where there is no file.
    """
    pieces: list[bytes] = []
    try:
        with path.open("rb") as file:
            about = os.fstat(file.fileno())
            at, head = about.st_size, b""
            while at > 0 and about.st_size - at < MOST:
                length = min(at, BLOCK)
                at = file.seek(at - length)
                block = file.read(length) + head
                if not pieces:
                    pieces = (b"\n" * (at == 0) + block).rsplit(b"\n", LAST_LINES + 1)[1:]
                if (found := block.rfind(EVALUATION)) >= 0:
                    pieces.insert(0, block[found:].partition(b"\n")[0])
                    break
                head = block.partition(b"\n")[0]  # the end of a line that the block before begins
    except FileNotFoundError:
        return [], None
    lines = []
    for piece in pieces:
        with contextlib.suppress(ValueError):
            line = json.loads(piece)
            if isinstance(line, dict):
                lines.append(line)
    return lines, about.st_mtime


def total_steps(folder: Path, line: dict[str, Any], summary: dict[str, Any]) -> int | None:
    """How many steps the run is to have, computed from its configuration as train.py does; None where unknown.

    The steps of an epoch follow from any record: each has its step and its epoch.
    """
    asked = train_settings(folder)
    if isinstance(steps := asked.get("steps"), int):
        return steps
    source = line or summary
    step, epoch, epochs = source.get("step"), source.get("epoch"), asked.get("epochs")
    if isinstance(step, int) and isinstance(epoch, float | int) and isinstance(epochs, float | int) and epoch > 0:
        return max(1, round(epochs * step / epoch))
    return None


def train_settings(folder: Path) -> dict[str, Any]:
    """The part ``train`` of a run's configuration. Only that is parsed: the whole takes 200 runs seconds."""
    try:
        text = (folder / "config.yaml").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    part = re.search(r"^train:\n((?:[ #].*\n|\n)*)", text, re.MULTILINE)
    try:
        values = yaml.load(part[0], LOADER)["train"] if part else {}
    except (yaml.YAMLError, KeyError, TypeError):
        return {}
    return values if isinstance(values, dict) else {}


def checkpoints(folder: Path) -> list[tuple[int, Path, int]]:
    """Step, file and bytes of each checkpoint, oldest first."""
    found = []
    with contextlib.suppress(OSError), os.scandir(folder / "checkpoints") as entries:
        for entry in entries:
            match = CHECKPOINT.fullmatch(entry.name)
            if match:
                with contextlib.suppress(OSError):
                    found.append((int(match[1]), Path(entry.path), entry.stat().st_size))
    return sorted(found)


def _json(path: Path) -> tuple[dict[str, Any] | None, float | None]:
    """What a file holds, and when it was written."""
    try:
        with path.open(encoding="utf-8") as file:
            values, written = json.load(file), os.fstat(file.fileno()).st_mtime
    except (OSError, ValueError):
        return None, None
    return (values, written) if isinstance(values, dict) else (None, None)
