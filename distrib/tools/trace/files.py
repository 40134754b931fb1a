"""A run's traces, step by step over all ranks. One line a rank is held at a time, and decoded only where asked for."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from distrib.config import UserError
from distrib.folder import RunFolder
from distrib.layout.folders import reason, shown

NAME = re.compile(r"rank_(\d{5,})\.jsonl")
HEAD = re.compile(rb'\{"step": (\d+), ')  # as distrib/trace.py writes it: the step, without decoding the line


@dataclass(frozen=True)
class Seen:
    """What a rank saw at a step: samples, checksums of their draws, and the two numbers as ``float.hex()``.

    ``gradient_norm`` is None in traces of before it was written.
    """

    ids: list[int]
    draws: list[int]
    loss: str
    gradient_norm: str | None


@dataclass(frozen=True)
class Line:
    """A line as it stands in ``file``, whose ``number``-th it is."""

    file: Path
    number: int
    raw: bytes

    @property
    def step(self) -> int:
        """Whose it is.

        Raises:
            UserError: it is no line of a trace.
        """
        head = HEAD.match(self.raw)
        step = int(head[1]) if head else self._decoded().get("step")
        if not isinstance(step, int):
            raise self._foreign()
        return step

    def seen(self) -> Seen:
        """What it says.

        Raises:
            UserError: it is no line of a trace.
        """
        values = self._decoded()
        ids, draws, loss, norm = (values.get(key) for key in ("ids", "draws", "loss", "gradient_norm"))
        lists = all(isinstance(each, list) and all(type(n) is int for n in each) for each in (ids, draws))
        if not lists or not _is_number(loss) or not (norm is None or _is_number(norm)):
            raise self._foreign()
        return Seen(ids, draws, loss, norm)  # type: ignore[arg-type]  # looked at above

    def _decoded(self) -> Mapping[str, object]:
        try:
            values = json.loads(self.raw)
        except ValueError:
            values = None
        if not isinstance(values, dict):
            raise self._foreign()
        return values

    def _foreign(self) -> UserError:
        return UserError(f"{shown(self.file)}, line {self.number}: this is no line of a trace")


@dataclass(frozen=True)
class Step:
    """A step's lines, by rank."""

    number: int
    lines: Mapping[int, Line]

    def seen(self) -> dict[int, Seen]:
        """What each rank saw, in the ranks' order."""
        return {rank: self.lines[rank].seen() for rank in sorted(self.lines)}


def rank_files(run: Path) -> dict[int, Path]:
    """The trace of each rank.

    Raises:
        UserError: there is no such run, or it was not traced.
    """
    folder = RunFolder(str(run)).trace
    try:
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        there = folder.parent.is_dir()
    except OSError as error:
        raise UserError(f"cannot read {shown(folder)}: {reason(error)}") from None
    files = {int(match[1]): folder / name for name in names if (match := NAME.fullmatch(name))}
    if not there:
        raise UserError(f"there is no run folder {shown(run)}")
    if not files:
        raise UserError(f"{shown(run)} has no trace: train with trace=true")
    return dict(sorted(files.items()))


def read_steps(run: Path) -> Iterator[Step]:
    """The steps of a run that all of its ranks have written, ascending. A rank may come or go between two of them.

    Raises:
        UserError: the run has no trace, or a file cannot be read or is none.
    """
    with contextlib.ExitStack() as opened:
        streams = {rank: _lines(opened, file) for rank, file in rank_files(run).items()}
        heads = {rank: line for rank, stream in streams.items() if (line := next(stream, None)) is not None}
        ranks, images = set(heads), None
        while heads:
            number = min(line.step for line in heads.values())
            lines = {rank: line for rank, line in heads.items() if line.step == number}
            if images is None or set(lines) != ranks:
                # Another number of ranks, or a run that was killed between two ranks' lines: then images are missing.
                found = sum(len(line.seen().ids) for line in lines.values())
                if images is not None and found < images:
                    return
                ranks, images = set(lines), found
            yield Step(number, lines)
            for rank in lines:
                line = next(streams[rank], None)
                if line is None:
                    del heads[rank]
                else:
                    heads[rank] = line


def _lines(opened: contextlib.ExitStack, path: Path) -> Iterator[Line]:
    try:
        file: BinaryIO = opened.enter_context(path.open("rb"))
    except OSError as error:  # of many ranks perhaps "Too many open files"
        raise UserError(f"cannot read {shown(path)}: {reason(error)}") from None
    return _read(file, path)


def _read(file: BinaryIO, path: Path) -> Iterator[Line]:
    before = 0
    try:
        for number, raw in enumerate(file, 1):
            if not raw.endswith(b"\n"):  # torn, or being written
                return
            line = Line(path, number, raw)
            if line.step <= before:
                raise UserError(f"{shown(path)}, line {number}: step {line.step} comes after step {before}")
            before = line.step
            yield line
    except OSError as error:
        raise UserError(f"cannot read {shown(path)}: {reason(error)}") from None


def _is_number(value: object) -> bool:
    if not isinstance(value, str):
        return False
    try:
        float.fromhex(value)
    except (ValueError, OverflowError):
        return False
    return True
