"""An end to crash loops: a run that torchrun starts again and again is given up where it gets no further.

torchrun counts restarts, whatever they achieve: with a small number a run of weeks ends at the n-th fault, with a large
one a run that dies at the same step each time burns its machines. Here restarts are free while a newer checkpoint
comes between them, and ``LIMIT`` starts in a row from one step are the last.

Rank 0 counts, in ``RUN/faults/starts.json``; beside it the ranks say how they failed. A start by hand, or of another
job's torchrun, begins anew. So does one after Slurm has queued a job again: its script bounds those by itself
(``--failures``), each with so many starts of ours. The end is final: the ranks report BAD_MACHINE, after which our
agent starts none again, and a torchrun that knows no such code gets SIGTERM.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from distrib.faults import BAD_MACHINE, Failure, report_failures_to
from distrib.jsonl import replace_file
from distrib.parent import BEGAN, end_parent_too, restarts
from distrib.runtime import Runtime
from distrib.surroundings import same_command

LIMIT = 3
LONGEST = 300  # characters of what the last start said
STARTS, ENDS = "starts.json", "ends.txt"


@dataclass(frozen=True)
class Starts:
    """What ``starts.json`` holds: ``count`` starts in a row of a ``job`` went on from ``step``.

    ``since``: when the first start of this torchrun began, in seconds since 1970.
    """

    job: str
    step: int
    count: int
    since: float

    def following(self, before: Starts | None) -> Starts:
        """This start, which is torchrun's again, with what ``before`` it has counted."""
        if before is None or before.job != self.job:
            return self
        count = before.count + 1 if before.step == self.step else 1
        return Starts(self.job, self.step, count, before.since)


def count_start(runtime: Runtime, faults: Path, job: str | None, step: int, environ: Mapping[str, str]) -> float:
    """Counts a start from the checkpoint of ``step``; returns when the first of this torchrun began, since 1970.

    All ranks must call it.

    Raises:
        Failure: on all ranks: the starts before it ended at this step, too many of them.
    """
    done, most = restarts(environ)
    if most == 0:
        return BEGAN
    refusal, since = runtime.on_main(lambda: _count(faults, Starts(job or "", step, 1, BEGAN), done > 0, environ))
    if refusal:
        end_parent_too(environ, runtime.local_rank)
        raise Failure(refusal, everywhere=True, code=BAD_MACHINE)
    report_failures_to(faults / ENDS)
    return since


def forget_starts(faults: Path) -> None:
    """The run has ended well, or as it was asked to. Rank 0 only."""
    for name in (STARTS, ENDS):
        with contextlib.suppress(OSError):
            (faults / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        faults.rmdir()


def _count(faults: Path, start: Starts, again: bool, environ: Mapping[str, str]) -> tuple[str, float]:
    """The refusal, or nothing, and the first start's time. Where nothing can be written nothing is counted."""
    file, ends = faults / STARTS, faults / ENDS
    start = start.following(_read(file)) if again else start
    said = _last_words(ends, environ)
    if start.count > LIMIT:
        return (
            f"given up at step {start.step}: {LIMIT} starts in a row ended without a newer checkpoint. "
            f"The last one: {said}. Once that is mended, {same_command()} continues"
        ), start.since
    with contextlib.suppress(OSError):
        faults.mkdir(parents=True, exist_ok=True)
        ends.unlink(missing_ok=True)
        replace_file(file, json.dumps(asdict(start)).encode())
    return "", start.since


def _read(file: Path) -> Starts | None:
    try:
        return Starts(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _last_words(ends: Path, environ: Mapping[str, str]) -> str:
    """Why the start before ended: as our agent saw it, who knows of killed ranks; else what the first rank said."""
    path = environ.get("DISTRIB_EXIT_CODE_FILE")
    with contextlib.suppress(OSError, IndexError):
        lines = Path(f"{path}.restarts").read_text(encoding="utf-8", errors="replace").splitlines()
        return lines[-1].partition(" ")[2][:LONGEST]
    with contextlib.suppress(OSError, IndexError, ValueError):
        lines = ends.read_text(encoding="utf-8", errors="replace").splitlines()
        rank, _, message = lines[0].split(" ", 2)
        return f"rank {rank}: {message}"[:LONGEST]
    return "its ranks said nothing: they were killed, for want of memory perhaps"
