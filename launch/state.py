"""What state a run is in: a pure function of what its folder holds and of what Slurm says.

Who asks for a state gets the first row that fits. "The job" is the one of the run's jobs that runs, else the newest;
"covers" means that the summary is of the last line of ``metrics.jsonl`` or later, so that no later start has gone on.

    what is seen                                                state
    the job waits in Slurm's queue, and has not begun yet       queued
                                    and has begun before        requeued
    the job is suspended                                        suspended
    the job runs, nobody writes, and a summary that covers,     that
      written since it began, says finished or diverged
    the job runs, and a stop was asked for, or Slurm or its     stopping
                  script is ending it, or its ranks have ended
                  and its writer lives                          running
                  and nobody writes, or no line yet             starting
    no job is there, and somebody writes                        as if the job ran
    the summary covers, says finished or diverged, and is of a  that
      later step than the job's end or was written after the
      job was submitted and last began: by it, or without it
    the job's script said how it ended, and that it is over     finished, stopped, diverged or failed, by its exit code;
                                                                cancelled where it or Slurm says so; an end with 0
                                                                without a summary is none: failed, or stopped
                                                                where that was asked for
    Slurm calls the job cancelled, or does not have one that    cancelled; stopped where a stop was asked for
      waited when a stop was asked for
    the summary covers, and says finished or diverged           that
    Slurm's accounts call it preempted, or lost with its node,  requeued
      and its queue, where it may be again, does not answer
    Slurm calls it failed, timed out, …                         failed, with Slurm's word
    it was to be queued again, and the queue has it not         lost; requeued where Slurm does not answer
    it never began                                              cancelled; queued where Slurm does not answer
    the summary covers                                          what it says: finished, stopped or diverged
    the writer is gone and left its name                        lost
    nobody writes, and no summary covers                        failed

A run without jobs has the rows of the writer and of the summary alone. Slurm's queue is believed before its accounting:
after a node's death or a preemption that calls the job ended though it waits to go on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from distrib.lease import Sight
from launch.command import FINISHED, STOPPED

DONE = ("finished", "diverged")  # what a summary says where nothing is left to train
WAITS = ("queued", "requeued")  # in Slurm's queue
OVER = ("finished", "stopped", "diverged", "failed", "cancelled", "lost")  # nothing goes on by itself

# Slurm's words for a job of which something is still to come.
WAITING = ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT")
ENDING = ("COMPLETING", "STAGE_OUT", "SIGNALING")
ACTIVE = (*WAITING, *ENDING, "RUNNING", "CONFIGURING", "RESIZING", "SUSPENDED", "STOPPED", "POWER_UP_NODE")
# Ends after which Slurm itself may queue a job again.
AGAIN = ("NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "REQUEUED")

CANCELLED = "cancelled"  # the script's reason for an end that Slurm's user wanted
SILENT = "Slurm does not answer"


@dataclass(frozen=True)
class Job:
    """What Slurm says of one start of a job. Times are ISO 8601 in the machine's zone, empty where there is none."""

    job: str  # number, with _INDEX in an array
    state: str  # one word in capitals
    reason: str = ""  # why it waits
    start: str = ""  # for one that waits: when Slurm thinks that it will begin
    end: str = ""
    nodes: str = ""  # in Slurm's short form
    code: str = ""  # "EXIT:SIGNAL"


@dataclass(frozen=True)
class Slurm:
    """Slurm's answers; None where it gave none or was not asked."""

    queue: Mapping[str, Job] | None = None  # the jobs that wait or run
    past: Mapping[str, Sequence[Job]] | None = None  # each job's starts, oldest first


@dataclass(frozen=True)
class Seen:
    """What a run's folder says."""

    events: Sequence[Mapping[str, Any]] = ()  # the launcher's record, oldest first
    stop: bool = False  # whether a stop was asked for
    summary: Mapping[str, Any] | None = None
    step: int = 0  # of the last line of metrics.jsonl
    writer: Sight | None = None
    written: float | None = None  # when the summary was, in seconds since 1970 by the disk's clock
    codes: Sequence[int] = ()  # what ranks said as they ended in the newest start, where its script has yet to say it

    def jobs(self) -> list[str]:
        """The jobs that were submitted, oldest first."""
        return [str(event.get("job")) for event in self.events if event["event"] == "submitted"]

    def last(self, event: str, job: str) -> Mapping[str, Any] | None:
        """The newest event of this kind of a job."""
        return next((e for e in reversed(self.events) if e["event"] == event and str(e.get("job")) == job), None)

    def end(self, job: str) -> Mapping[str, Any] | None:
        """How the job's newest start ended, where its script could say it."""
        began, ended = self.last("began", job), self.last("ended", job)
        newest = began is None or ended is None or began.get("restart") == ended.get("restart")
        return ended if newest else None

    def covered(self) -> str:
        """What the summary says, where it is about the end of what was trained; else nothing."""
        if self.summary is None or not isinstance(step := self.summary.get("step"), int) or step < self.step:
            return ""
        status = self.summary.get("status")
        return status if status in (*DONE, "stopped") else ""  # another word is no state, whoever wrote it

    def done(self, job: str) -> str:
        """What the summary says, where that is that all is done, and was not so before this job's newest start.

        A finished run whose steps were raised still has its summary when a job that was to go on fails at once. Clocks
        of two machines are compared here, where the steps do not tell: the times lie as far apart as a job's life.
        """
        covered, end = self.covered(), self.end(job)
        if covered not in DONE or self.summary is None:
            return ""
        if end is not None and isinstance(step := end.get("step"), int) and self.summary["step"] > step:
            return covered
        return covered if self._is_later(self.last("began", job) or self.last("submitted", job)) else ""

    def ending(self, job: str) -> bool:
        """Whether ranks of the job's newest start have ended and nobody writes, and its script has yet to say it."""
        began = next((event for event in reversed(self.events) if event["event"] == "began"), None)
        if began is None or str(began.get("job")) != job or self.end(job) is not None:
            return False
        writes = self.writer is not None and self.writer.alive is not False
        return not writes and (bool(self.codes) or (self.covered() != "" and self._is_later(began)))

    def _is_later(self, event: Mapping[str, Any] | None) -> bool:
        """Whether the summary was written after an event."""
        since = _seconds(event)
        return since is not None and self.written is not None and self.written > since


@dataclass(frozen=True)
class State:
    """The state's name, and why it is so; for a run of Slurm's also the job, and where it runs or waits."""

    name: str
    reason: str = ""
    job: str = ""
    nodes: str = ""
    start: str = field(default="", compare=False)  # when Slurm thinks that it will begin

    @property
    def over(self) -> bool:
        """Whether nothing goes on by itself."""
        return self.name in OVER


def judge(seen: Seen, slurm: Slurm) -> State:
    """The run's state, by the table above."""
    jobs = seen.jobs()
    if not jobs:
        return _by_folder(seen)
    active = [job for job in (_active(job, slurm) for job in jobs) if job is not None]
    if active:
        return _active_state(seen, next((job for job in active if job.state not in WAITING), active[-1]))
    job = jobs[-1]
    writes = seen.writer is not None and seen.writer.alive is not False  # such as a run that goes on without Slurm
    name, reason = _named(_by_folder(seen)) if writes else _ended(seen, job, slurm)
    if writes and slurm.queue is not None:
        reason = _join(reason, f"Slurm has no job {job} that waits or runs")
    nodes = seen.writer.holder.host if writes and seen.writer else ""
    return State(name, _join(reason, SILENT if slurm.queue is None and name not in OVER else ""), job, nodes)


def _active(job: str, slurm: Slurm) -> Job | None:
    if slurm.queue is not None:
        return slurm.queue.get(job)
    row = _row(job, slurm)
    return row if row is not None and row.state in ACTIVE and row.state != "REQUEUED" else None


def _row(job: str, slurm: Slurm) -> Job | None:
    """The newest start that Slurm's accounting has of a job."""
    rows = (slurm.past or {}).get(job)
    return rows[-1] if rows else None


def _active_state(seen: Seen, job: Job) -> State:
    writer = seen.writer
    if job.state in WAITING:
        began = seen.last("began", job.job) is not None
        reason = job.reason if job.reason not in ("", "None") else job.state if job.state != "PENDING" else ""
        return State("requeued" if began else "queued", reason, job.job, job.nodes, job.start)
    if job.state in ("SUSPENDED", "STOPPED"):
        return State("suspended", job.reason if job.reason != "None" else "", job.job, job.nodes)
    end, gone = seen.end(job.job), writer is None or writer.alive is False
    if gone and (done := seen.done(job.job)):  # the job takes some seconds more
        return State(done, "", job.job, job.nodes)
    if seen.ending(job.job):
        reason = "" if set(seen.codes) <= {FINISHED, STOPPED} else "a rank has failed"
        return State("stopping", reason, job.job, job.nodes)
    if job.state in ENDING or seen.stop or (end is not None and end.get("then") == "over"):
        return State("stopping", "", job.job, job.nodes)
    if writer is None:
        return State("starting", "", job.job, job.nodes)
    if writer.alive is False:
        return State("starting", f"the last writer, {_gone(writer)}", job.job, job.nodes)
    name, reason = _named(_by_folder(seen))
    return State(name, reason, job.job, job.nodes)


def _ended(seen: Seen, job: str, slurm: Slurm) -> tuple[str, str]:
    """Name and reason for a job that is neither in the queue nor has a writer."""
    row, end, covered = _row(job, slurm), seen.end(job), seen.covered()
    if done := seen.done(job):
        return done, ""
    slurms = row.state if row is not None else ""
    then = end.get("then") if end is not None else ""
    if end is not None and then == "over":
        code, reason = end.get("code"), str(end.get("reason") or "")
        if code == FINISHED and covered in DONE:
            return covered, ""
        if code == FINISHED and not seen.stop:  # nobody trained: the script was misled
            return "failed", "its job ended with 0, but no summary says that the training is done"
        if reason == CANCELLED or (slurms == "CANCELLED" and not seen.stop):
            return "cancelled", "what it had done is saved" if code == STOPPED else ""
        if code in (FINISHED, STOPPED):
            return "stopped", reason if code == STOPPED else "launch stop, before it began"
        return ("diverged" if covered == "diverged" else "failed"), reason or f"exit code {code}"
    waited = then == "requeued" or (seen.last("began", job) is None and end is None)
    # Of a job, or an array's element, that was cancelled before it began Slurm's accounts may say nothing.
    taken_out = seen.stop and waited and not slurms and slurm.queue is not None
    if slurms == "CANCELLED" or taken_out:
        if seen.stop:
            return "stopped", "launch stop" + (": it was taken out of Slurm's queue" if waited else "")
        return "cancelled", ""
    if covered in DONE:
        return covered, ""
    if slurms in AGAIN and slurm.queue is None:
        return "requeued", f"Slurm says {slurms}, and may have queued it again"
    if slurms and slurms not in ("COMPLETED", *ACTIVE):
        code = f", exit code {row.code.partition(':')[0]}" if row and row.code not in ("", "0:0") else ""
        return "failed", f"Slurm says {slurms}{code}" + (", and did not queue it again" if slurms in AGAIN else "")
    if then == "requeued":
        if slurm.queue is None:
            return "requeued", ""
        return "lost", f"it was to go on as job {job}, which Slurm does not have any more"
    if waited and not slurms:
        if slurm.queue is None:
            return "queued", ""
        return "cancelled", f"before it began: Slurm does not have job {job} any more"
    name, reason = _named(_by_folder(seen))
    if name in ("failed", "lost"):
        reason = _join(reason, "Slurm does not have the job any more" if slurm.queue is not None else SILENT)
    return name, reason


def _by_folder(seen: Seen) -> State:
    """What the folder alone says."""
    writer, covered = seen.writer, seen.covered()
    if writer is not None and writer.alive is not False:
        reason = "" if writer.alive else "nobody can tell from here whether it lives: the folder cannot be written"
        name = "running" if seen.step or seen.summary else "starting"
        return State(name, reason, nodes=writer.holder.host)
    if writer is None and covered:
        return State(covered)
    if covered in DONE:
        return State(covered)  # killed as it left
    if writer is not None:
        return State("lost", f"{_gone(writer)}", nodes=writer.holder.host)
    return State("failed", "it ended without a summary: its last words say why")


def _gone(writer: Sight) -> str:
    holder = writer.holder
    if writer.here:
        return f"process {holder.pid} on {holder.host}, was killed"
    return f"process {holder.pid} on {holder.host}, has been silent for {writer.silent or 0:.0f} s"


def _seconds(event: Mapping[str, Any] | None) -> float | None:
    """When an event was, in seconds since 1970."""
    with contextlib.suppress(ValueError):
        return datetime.strptime(str((event or {}).get("time")), "%Y-%m-%dT%H:%M:%S%z").timestamp()
    return None


def _named(state: State) -> tuple[str, str]:
    return state.name, state.reason


def _join(*reasons: str) -> str:
    return "; ".join(reason for reason in reasons if reason)
