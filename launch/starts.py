"""The starts of a run's jobs, from the launcher's record, Slurm's accounts and what ranks said: a pure function."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from launch.command import FINISHED, STOPPED, USER_ERROR
from launch.state import ACTIVE, Job


@dataclass(frozen=True)
class Start:
    """One start of a job. Times are ISO 8601, empty where they are not known."""

    job: str
    restart: int  # how often Slurm had started the job before
    nodes: str
    began: str
    ended: str
    first: int | None  # the step from which it went on, and the one that it reached; None where nobody knows
    last: int | None
    code: int | None
    how: str  # how it ended, and why, or that it goes on
    then: str  # "requeued", "over", or nothing
    within: tuple[str, ...]  # "HOST: TIME REASON" of each time that its workers were started again

    def as_json(self) -> dict[str, Any]:
        """As values of JSON."""
        return asdict(self)


def starts(
    events: Sequence[Mapping[str, Any]],
    past: Mapping[str, Sequence[Job]],
    restarts: Sequence[tuple[str, str, str]],
    codes: Mapping[str, Collection[int]],
    step: int,
    alive: bool,
) -> list[Start]:
    """Every start that the record knows, oldest first.

    Args:
        events: the record's.
        past: each job's starts as Slurm's accounts have them, oldest first.
        restarts: (JOB.RESTART, host, "TIME REASON") for the times that workers were started again.
        codes: what ranks said as they ended, by JOB.RESTART.
        step: that the run has reached by now.
        alive: whether the newest start's job still runs.
    """
    ends = {(str(e.get("job")), e.get("restart")): e for e in events if e["event"] == "ended"}
    began = [event for event in events if event["event"] == "began"]
    made: list[Start] = []
    for k, event in enumerate(began):
        job, restart = str(event.get("job")), _whole(event.get("restart")) or 0
        end = ends.get((job, event.get("restart")))
        newest = k == len(began) - 1
        rows = past.get(job, ())
        row = rows[restart] if restart < len(rows) else None
        told = _whole(event.get("step"))  # of the newest checkpoint, where the script says it
        last = _whole(end.get("step")) if end else step if newest else None
        first = told if told is not None else made[-1].last if made else None
        if first is not None and last is not None and last < first:  # --fresh: it took away what was there
            first = None
        code = _whole(end.get("code")) if end else None
        nodes = event.get("nodes")
        made.append(
            Start(
                job=job,
                restart=restart,
                nodes=",".join(map(str, nodes))
                if isinstance(nodes, list)
                else str(nodes or (row.nodes if row else "")),
                began=str(event.get("time", "")),
                ended=str(end.get("time", "")) if end else row.end if row else "",
                first=first,
                last=last,
                code=code,
                how=_how(end, row, codes.get(f"{job}.{restart}", ()), newest and alive),
                then=str(end.get("then") or "") if end else "",
                within=tuple(f"{host}: {line}" for name, host, line in restarts if name == f"{job}.{restart}"),
            )
        )
    return made


def _how(end: Mapping[str, Any] | None, row: Job | None, codes: Collection[int], alive: bool) -> str:
    if end is not None:
        code, reason = end.get("code"), str(end.get("reason") or "")
        means = {FINISHED: "finished", STOPPED: "saved and stopped", USER_ERROR: "refused"}
        word = means.get(code, f"failed ({code})") if isinstance(code, int) else "ended"
        return f"{word}: {reason}" if reason else word
    # The script was killed before it could say so, or has yet to: the ranks' own words are left.
    saved = ""
    if codes and set(codes) <= {FINISHED, STOPPED}:
        saved = "saved and stopped" if STOPPED in codes else "finished"
    if row is not None and row.state not in ("", "COMPLETED", *(s for s in ACTIVE if s != "REQUEUED")):
        return f"{saved or 'ended'}; Slurm says {row.state}"
    if alive:
        return saved or "goes on"
    return saved or "ended: its node failed, or it was killed"


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
