"""``launch logs``: what a rank prints, over all starts of a run; ``follow`` shows it as it comes."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from distrib.config import UserError
from distrib.options import PlainParser, positive
from launch.command import FAILED, FINISHED
from launch.record import Record
from launch.runs import resolve
from launch.state import State
from launch.survey import survey

LINES = 200
LOOK_SECONDS = 0.5  # between looks at the file
ASK_SECONDS = 10.0  # between questions to Slurm, which many people ask
FOLDER_SECONDS = 2.0  # between looks at the folder of a run without Slurm


def main(argv: Sequence[str], train: Path) -> int:
    """Shows a log; returns 0, or with ``--follow`` how the run ended (see ``follow``).

    Raises:
        UserError: there is no such run, or it keeps no log.
    """
    parser = PlainParser(
        prog="python -m launch logs",
        description="What a rank of a job prints, over all its starts. A run that no job trains prints to its "
        "terminal alone.",
        epilog="with -f the exit code says how the run ended: 0 finished, 75 stopped with all saved, 2 its "
        "configuration or data is wrong, 1 otherwise, and where Ctrl-C came first",
    )
    parser.add_argument("run", metavar="RUN", help="a run's folder, its name below runs, or the number of its job")
    parser.add_argument("-f", "--follow", action="store_true", help="show what comes until the run is over")
    parser.add_argument("--rank", type=_rank, default=0, metavar="N", help="default: 0")
    parser.add_argument(
        "--lines", type=positive, default=LINES, metavar="K", help="how many of the last ones; default: %(default)s"
    )
    args = parser.parse_args(argv)
    folder = resolve(args.run)
    record = Record(folder)
    if not record.jobs() and not log_files(record, args.rank):
        raise UserError(f"{folder} has no log: a run that no job trains prints to its terminal alone")
    if args.follow:
        return follow(record, args.rank, args.lines)
    files = log_files(record, args.rank)
    if not files:
        (view,) = survey([folder])
        raise UserError(f"{folder} has no log of rank {args.rank} yet: it is {_words(view.state)}")
    for file in files:
        try:
            data = last_lines(file, args.lines)[0]
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror}") from None
        with contextlib.suppress(BrokenPipeError):
            _write(data)
    return FINISHED


def log_files(record: Record, rank: int) -> list[Path]:
    """The rank's log; as long as rank 0 has said nothing, what the newest job itself printed; [] for neither."""
    log = record.log_of(rank)
    if _bytes(log) or _bytes(record.log_of(0)):
        return [log] if log.exists() else []
    for event in reversed(record.read()):
        if event["event"] != "submitted" or not event.get("submission"):
            continue
        place = Path(str(event["submission"]))  # an array's elements share one, outside their folders
        if not place.is_dir():  # the run's folder has moved
            place = record.path / place.name
        found = sorted(file for file in place.glob(f"{event.get('job')}_*log.*") if _bytes(file))
        if found:
            return [file for file in found if file.suffix == ".out"] or found
    return []


def follow(record: Record, rank: int = 0, lines: int = LINES, notify: Callable[[str], None] | None = None) -> int:
    """Shows what a rank prints until the run is over; returns how it ended, as an exit code (``View.code``).

    1 also where Ctrl-C, or a reader that leaves, came first: nobody knows then how the run ends. The file may not be
    there yet, be cut, or be replaced. A run that waits to go on is waited for.

    Args:
        record: the run's; its events say which jobs are asked about.
        rank: whose log.
        lines: how many of those that are there are shown first.
        notify: hears each change of state, in a line; default: stderr.

    Raises:
        UserError: the run's folder cannot be read.
    """
    tell = notify or (lambda line: print(f"[{line}]", file=sys.stderr, flush=True))
    silence: list[str] = []  # Slurm's failures, each told once
    reader, told, code = _Reader(record, rank, lines), ("", "", ""), None
    asked, state = -float("inf"), State("starting")
    try:
        while True:
            came = reader.show()
            if time.monotonic() - asked >= (ASK_SECONDS if state.job else FOLDER_SECONDS):
                (view,) = survey([record.run], lambda line: _once(line, silence, tell))
                asked, state = time.monotonic(), view.state
                # Why a run starts or runs may say seconds, which are no news.
                key = (state.name, state.job, state.reason if state.over or state.name.endswith("queued") else "")
                if key != told:
                    told = key
                    tell(_words(state))
                code = view.code if view.settled else None
            elif code is not None and not came:  # looked at since: nobody writes to it any more
                return code
            time.sleep(LOOK_SECONDS)
    except (KeyboardInterrupt, BrokenPipeError):
        return FAILED


def last_lines(path: Path, lines: int) -> tuple[bytes, int]:
    """The last lines of a file, and where it ended then.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        end = at = file.seek(0, os.SEEK_END)
        data = b""
        while at > 0 and data[:-1].count(b"\n") < lines:
            length = min(at, 1 << 16)
            at = file.seek(at - length)
            data = file.read(length) + data
    # A progress bar's \r ends no line.
    return b"\n".join(data[:-1].rsplit(b"\n", lines)[-lines:]) + data[-1:], end


class _Reader:
    """Where in which file a follower is."""

    def __init__(self, record: Record, rank: int, lines: int) -> None:
        self._record, self._rank, self._lines = record, rank, lines
        self._path: Path | None = None
        self._node, self._at = 0, 0

    def show(self) -> bool:
        """Writes what is new; returns whether anything was."""
        log = self._record.log_of(self._rank)
        path = log if _bytes(log) else self._path
        if path is None or (path != log and not _bytes(path)):
            files = log_files(self._record, self._rank)
            path = files[0] if files else None
        if path is None:
            return False
        try:
            data = self._first(path) if path != self._path else self._next(path)
        except OSError:  # gone for a moment, or its disk is: it is looked at again
            return False
        _write(data)
        return bool(data)

    def _first(self, path: Path) -> bytes:
        data, at = last_lines(path, self._lines)
        self._path, self._node, self._at = path, path.stat().st_ino, at
        return data

    def _next(self, path: Path) -> bytes:
        # Opened anew each time: a network disk shows the file as it is only then.
        with path.open("rb") as file:
            about = os.fstat(file.fileno())
            if about.st_ino != self._node or about.st_size < self._at:
                self._node, self._at = about.st_ino, 0
            file.seek(self._at)
            data = file.read(1 << 20)
        self._at += len(data)
        return data


def _write(data: bytes) -> None:
    """Bytes as they are, to stdout itself: the stream would go on in silence when its reader has left.

    Raises:
        BrokenPipeError: the reader has left.
    """
    while data:
        data = data[os.write(1, data) :]


def _words(state: State) -> str:
    start = f", starts about {state.start.replace('T', ' ')}" if state.start and state.name.endswith("queued") else ""
    job = f" as job {state.job}" if state.job and not state.over else ""
    return f"{state.name}{job}{f': {state.reason}' if state.reason else ''}{start}"


def _once(line: str, told: list[str], tell: Callable[[str], None]) -> None:
    if line not in told:
        told.append(line)
        tell(line)


def _bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _rank(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no rank: they count from 0")
    return int(text)
