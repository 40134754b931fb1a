"""What ranks and their nodes said of each start of a job, in ``launch/reports`` of a run's folder."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from launch.command import Report, read_reports
from launch.record import Record

AGAIN = ".restarts"  # ends the name of the file in which a node says why its workers were started again
KILLED = "was killed"  # of launch.agent's words: the cause, where other nodes' ranks tell of a lost connection


def restarts_within(record: Record) -> list[tuple[str, str, str]]:
    """(JOB.RESTART, host, "TIME REASON") of each time that workers were started again within a start of a job.

    All nodes start their workers again together, and each says why: told is the node that names a killed rank, else the
    first by name. A node that joined later counts from its own first time.
    """
    lines: dict[str, list[list[tuple[str, str, str]]]] = {}
    with contextlib.suppress(OSError):
        for file in sorted(record.reports.glob(f"*/*{AGAIN}")):
            start, said = file.parent.name, _text(file).splitlines()
            host = file.name.removesuffix(AGAIN)
            lines.setdefault(start, []).append([(start, host, line.strip()) for line in said if line.strip()])
    return [
        next((one for one in each if one is not None and KILLED in one[2]), next(filter(None, each)))
        for nodes in lines.values()
        for each in zip_longest(*nodes)
    ]


def reports(record: Record) -> dict[str, list[tuple[str, int, Report]]]:
    """(host, rank, what it said as it ended), by JOB.RESTART; what cannot be read is left out."""
    found: dict[str, list[tuple[str, int, Report]]] = {}
    with contextlib.suppress(OSError):
        for file in sorted(record.reports.glob("*/*")):
            if not file.name.endswith(AGAIN):
                said = read_reports(_text(file))
                found.setdefault(file.parent.name, []).extend((file.name, *pair) for pair in sorted(said.items()))
    return found


def last_codes(record: Record, events: Sequence[Mapping[str, Any]]) -> list[int]:
    """What ranks said as they ended in the newest start; [] where its script has said how it ended.

    What they said before their node started them again stands there until the new ones begin, and is left out.
    """
    newest = next((event for event in reversed(events) if event["event"] in ("began", "ended")), None)
    if newest is None or newest["event"] == "ended":
        return []
    codes: list[int] = []
    with contextlib.suppress(OSError):
        for file in (record.reports / f"{newest.get('job')}.{newest.get('restart')}").iterdir():
            again = file.with_name(f"{file.name}{AGAIN}")
            if file.name.endswith(AGAIN) or (again.exists() and again.stat().st_mtime >= file.stat().st_mtime):
                continue
            codes += [report.code for report in read_reports(_text(file)).values()]
    return codes


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")
