"""What state a run is in, as tables; what squeue and sacct print, in the forms of several versions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distrib.lease import Holder, Sight
from launch.queue import parse_sacct, parse_squeue
from launch.record import Record
from launch.runs import Run
from launch.starts import starts
from launch.state import OVER, Job, Seen, Slurm, State, judge
from launch.survey import View

HOLDER = Holder("0123456789abcdef", "n1", 4242, "2026-11-25T10:00:00+0000", "boot 1", "17")
ALIVE = Sight(HOLDER, here=False, alive=True, silent=2.0)
SILENT = Sight(HOLDER, here=False, alive=False, silent=300.0)
KILLED = Sight(HOLDER, here=True, alive=False, silent=2.0)
UNKNOWN = Sight(HOLDER, here=False, alive=None, silent=None)


def submitted(job: str = "7") -> dict[str, Any]:
    return {"event": "submitted", "job": job, "submission": "s1"}


def began(restart: int = 0, job: str = "7", **more: Any) -> dict[str, Any]:
    return {"event": "began", "job": job, "restart": restart, "nodes": "n[1-2]", "time": f"t{restart}", **more}


def ended(code: int, then: str = "over", restart: int = 0, job: str = "7", reason: str = "", step: Any = 40) -> Any:
    values = {"job": job, "restart": restart, "code": code, "step": step, "reason": reason, "then": then}
    return {"event": "ended", "time": f"u{restart}", **values}


def summary(status: Any, step: int = 40) -> dict[str, Any]:
    return {"status": status, "step": step}


def queue(*jobs: Job) -> Slurm:
    """Slurm answers; it has these jobs in its queue and knows no other."""
    return Slurm({job.job: job for job in jobs}, {})


def past(*states: str, job: str = "7", code: str = "0:0", squeue: bool = True) -> Slurm:
    """The job is not in the queue (or squeue is silent); sacct has these starts of it."""
    return Slurm({} if squeue else None, {job: [Job(job, state, code=code) for state in states]})


GONE, NONE = queue(), Slurm()


@pytest.mark.parametrize(
    ("seen", "expected", "part"),
    [
        (Seen(writer=ALIVE), "starting", ""),
        (Seen(writer=ALIVE, step=5), "running", ""),
        (Seen(writer=ALIVE, step=5, stop=True), "running", ""),  # a job's stop, which is over: no job is there
        (Seen(writer=ALIVE, step=50, summary=summary("stopped")), "running", ""),
        (Seen(writer=ALIVE, step=40, summary=summary("finished")), "running", ""),
        (Seen(writer=UNKNOWN, step=5), "running", "nobody can tell from here"),
        (Seen(writer=SILENT, step=5), "lost", "process 4242 on n1, has been silent for 300 s"),
        (Seen(writer=KILLED, step=5), "lost", "was killed"),
        (Seen(writer=KILLED, step=40, summary=summary("finished")), "finished", ""),
        (Seen(writer=KILLED, step=40, summary=summary("stopped")), "lost", "was killed"),
        (Seen(step=40, summary=summary("finished")), "finished", ""),
        (Seen(step=40, summary=summary("stopped")), "stopped", ""),
        (Seen(step=40, summary=summary("diverged")), "diverged", ""),
        (Seen(step=41, summary=summary("finished")), "failed", "without a summary"),  # a later start went on
        (Seen(step=5), "failed", "without a summary"),
        (Seen(), "failed", ""),
        (Seen(step=1, summary={"status": "finished"}), "failed", ""),
        (Seen(step=40, summary=summary("paused")), "failed", "without a summary"),  # of a version to come, perhaps
        (Seen(step=40, summary=summary(["finished"])), "failed", "without a summary"),
    ],
)
def test_a_run_without_a_job(seen: Seen, expected: str, part: str) -> None:
    state = judge(seen, NONE)
    assert state.name == expected
    assert part in state.reason
    assert "Slurm" not in state.reason
    assert state.over == (expected in OVER)


RUNS, WAITS = Job("7", "RUNNING", "None", nodes="n[1-2]"), Job("7", "PENDING", "Priority", "2026-11-25T12:00:00")
S, B = submitted(), began()


@pytest.mark.parametrize(
    ("seen", "slurm", "expected", "part"),
    [
        # in the queue
        (Seen([S]), queue(WAITS), "queued", "Priority"),
        (Seen([S], stop=True), queue(WAITS), "queued", "Priority"),
        (Seen([S, B], step=5, writer=SILENT), queue(WAITS), "requeued", "Priority"),
        (Seen([S, B], step=5, writer=ALIVE), queue(WAITS), "requeued", "Priority"),
        (Seen([S, B, ended(75, "requeued")]), queue(Job("7", "PENDING", "BeginTime")), "requeued", "BeginTime"),
        (Seen([S, B]), queue(Job("7", "REQUEUE_HOLD", "JobHoldMaxRequeue")), "requeued", "JobHoldMaxRequeue"),
        (Seen([S, B]), queue(Job("7", "SPECIAL_EXIT", "None")), "requeued", "SPECIAL_EXIT"),
        (Seen([S, B]), queue(Job("7", "SUSPENDED", "None")), "suspended", ""),
        (Seen([S]), queue(RUNS), "starting", ""),
        (Seen([S, B]), queue(Job("7", "CONFIGURING", "None")), "starting", ""),
        (Seen([S, B], writer=ALIVE), queue(RUNS), "starting", ""),
        (Seen([S, B], step=5, writer=ALIVE), queue(RUNS), "running", ""),
        (Seen([S, B], step=5, writer=UNKNOWN), queue(RUNS), "running", "nobody can tell"),
        (Seen([S, B], step=5, writer=ALIVE, stop=True), queue(RUNS), "stopping", ""),
        (Seen([S, B], step=5, stop=True), queue(RUNS), "stopping", ""),  # saved, the script has yet to say it
        (Seen([S, B], step=5, writer=SILENT), queue(RUNS), "starting", "silent for 300 s"),
        (Seen([S, B], step=5, writer=ALIVE), queue(Job("7", "COMPLETING", "None")), "stopping", ""),
        (Seen([S, B, ended(0)], summary=summary("finished")), queue(RUNS), "stopping", ""),
        (Seen([S, B, ended(1, "requeued"), began(1)], step=5, writer=ALIVE), queue(RUNS), "running", ""),
        (Seen([S, B, ended(1, "requeued")], step=5), queue(RUNS), "starting", ""),  # the script has yet to say it
        # its ranks have ended, and its script has yet to say it
        (Seen([S, B], step=5, codes=[75, 75]), queue(RUNS), "stopping", ""),
        (Seen([S, B], step=5, codes=[0]), queue(RUNS), "stopping", ""),
        (Seen([S, B], step=5, codes=[75, 1], writer=SILENT), queue(RUNS), "stopping", "a rank has failed"),
        (Seen([S, B], step=5, codes=[75], writer=ALIVE), queue(RUNS), "running", ""),
        (Seen([S, B, ended(75, "requeued")], step=5, codes=[75]), queue(RUNS), "starting", ""),
        (Seen([S, B, submitted("8")], step=5, codes=[75]), queue(Job("8", "RUNNING")), "starting", ""),
        # over, as the script said it
        (Seen([S, B, ended(0)], summary=summary("finished")), GONE, "finished", ""),
        (Seen([S, B, ended(0)], summary=summary("finished")), NONE, "finished", ""),
        (Seen([S, B, ended(0)], summary=summary("diverged")), NONE, "diverged", ""),
        (Seen([S, B, ended(0)]), NONE, "failed", "no summary says"),
        (Seen([S, B, ended(0)], step=41, summary=summary("stopped")), NONE, "failed", "no summary says"),
        (Seen([S, B, ended(0)], stop=True), NONE, "stopped", "launch stop, before it began"),
        (Seen([S, B, ended(75, reason="asked by launch stop")], stop=True), GONE, "stopped", "launch stop"),
        (Seen([S, B, ended(75)]), past("CANCELLED"), "cancelled", "is saved"),
        (Seen([S, B, ended(143)]), past("CANCELLED"), "cancelled", ""),
        (Seen([S, B, ended(75, reason="cancelled")]), GONE, "cancelled", "is saved"),
        (Seen([S, B, ended(1, reason="cancelled")]), NONE, "cancelled", ""),
        (Seen([S, B, ended(143)], stop=True), past("CANCELLED"), "failed", "exit code 143"),
        (Seen([S, B, ended(1, reason="step 40 twice")]), GONE, "failed", "step 40 twice"),
        (Seen([S, B, ended(1)], step=40, summary=summary("diverged")), GONE, "diverged", "exit code 1"),
        (Seen([S, B, ended(2, reason="no data")]), past("FAILED", code="2:0"), "failed", "no data"),
        # without its word
        (Seen([S, B], step=40, summary=summary("finished")), past("NODE_FAIL"), "finished", ""),
        (Seen([S, B], step=41, summary=summary("finished")), past("NODE_FAIL"), "failed", "did not queue it again"),
        (Seen([S, B], step=5), past("CANCELLED"), "cancelled", ""),
        (Seen([S], stop=True), past("CANCELLED"), "stopped", "launch stop: it was taken out"),
        (Seen([S, B], stop=True), past("CANCELLED"), "stopped", "launch stop"),
        (Seen([S]), past("CANCELLED"), "cancelled", ""),
        (Seen([S], stop=True), GONE, "stopped", "taken out"),  # a Slurm without accounts
        (Seen([S], stop=True), NONE, "queued", "Slurm does not answer"),
        (Seen([S, B, ended(75, "requeued")], stop=True), GONE, "stopped", "taken out"),
        (Seen([S, B], step=5), past("OUT_OF_MEMORY", code="0:125"), "failed", "OUT_OF_MEMORY, exit code 0"),
        (Seen([S]), past("FAILED", code="127:0"), "failed", "Slurm says FAILED, exit code 127"),
        (Seen([S, B], step=5, writer=SILENT), past("TIMEOUT"), "failed", "TIMEOUT"),
        (Seen([S, B], step=5, writer=SILENT), GONE, "lost", "silent for 300 s; Slurm does not have the job"),
        (Seen([S, B], step=5), GONE, "failed", "without a summary: its last words say why; Slurm does not have"),
        (Seen([S, B], step=40, summary=summary("stopped")), GONE, "stopped", ""),
        (Seen([S, B, ended(75, "requeued")], step=40, summary=summary("stopped")), GONE, "lost", "go on as job 7"),
        (Seen([S]), GONE, "cancelled", "before it began: Slurm does not have job 7 any more"),
        (Seen([S, B, ended(75), submitted("8")], step=40), GONE, "cancelled", "does not have job 8"),
        # Slurm's accounts call it ended, though it waits: the newest start counts, and the queue above all
        (Seen([S, B], step=5), Slurm({"7": WAITS}, {"7": [Job("7", "NODE_FAIL")]}), "requeued", "Priority"),
        (Seen([S, B], step=5), past("NODE_FAIL", "PENDING", squeue=False), "requeued", ""),
        (Seen([S, B, began(1)], step=5, writer=ALIVE), past("PREEMPTED", "RUNNING", squeue=False), "running", ""),
        (Seen([S, B], step=5, writer=SILENT), past("NODE_FAIL", squeue=False), "requeued", "may have queued it again"),
        (Seen([S, B], step=5), past("REQUEUED", squeue=False), "requeued", "REQUEUED"),
        (Seen([S, B, began(1)], step=5), past("PREEMPTED", "COMPLETED"), "failed", "without a summary"),
        (Seen([S, B, began(1)], step=5, summary=summary("finished")), past("PREEMPTED", "COMPLETED"), "finished", ""),
        # Slurm is silent: the folder alone
        (Seen([S]), NONE, "queued", "Slurm does not answer"),
        (Seen([S, B], step=5, writer=ALIVE), NONE, "running", "Slurm does not answer"),
        (Seen([S, B], step=5, writer=SILENT), NONE, "lost", "silent for 300 s; Slurm does not answer"),
        (Seen([S, B, ended(75, "requeued")]), NONE, "requeued", "Slurm does not answer"),
        # somebody goes on without Slurm
        (Seen([S, B, ended(75)], step=50, writer=ALIVE), GONE, "running", "no job 7"),
        (Seen([S, B, ended(75)], step=50, writer=ALIVE, stop=True), GONE, "running", "no job 7"),
        # several jobs
        (Seen([S, B, ended(75), submitted("8")], step=40), queue(Job("8", "PENDING", "Resources")), "queued", "Res"),
        (Seen([S, B, submitted("8")], step=5, writer=ALIVE), queue(RUNS, Job("8", "PENDING", "Dependency")),
         "running", ""),
        (Seen([S, B, ended(75), submitted("8")], step=40, summary=summary("stopped")), past("CANCELLED", job="8"),
         "cancelled", ""),
        (Seen([S, B, ended(75), submitted("8"), began(0, "8")], step=60, writer=ALIVE),
         queue(Job("8", "RUNNING", "None")), "running", ""),
    ],
)  # fmt: skip
def test_a_run_with_a_job(seen: Seen, slurm: Slurm, expected: str, part: str) -> None:
    state = judge(seen, slurm)
    assert state.name == expected, state
    assert part in state.reason
    assert state.job in ("7", "8")
    assert "\n" not in state.reason


@pytest.mark.parametrize("status", ["finished", "diverged"])
@pytest.mark.parametrize(
    ("end", "slurm"),
    [
        (ended(75, reason="launch stop"), GONE),
        (ended(75, reason="cancelled"), GONE),
        (ended(75), past("CANCELLED")),
        (ended(1, reason="rank 3 was killed"), GONE),
        (ended(1, reason="rank 3 was killed"), NONE),
        (ended(75, "requeued"), past("CANCELLED")),
        (None, past("CANCELLED")),
    ],
)
@pytest.mark.parametrize("stop", [True, False])
def test_what_went_on_to_its_end_without_its_job(end: Any, slurm: Slurm, stop: bool, status: str) -> None:
    events = [S, {**B, "time": "2026-11-25T10:00:00+0100"}, *([end] if end else [])]
    began = 1795597200.0  # seconds since 1970
    seen = Seen(events, stop, summary(status, 80), 80, None, began + 3600)
    assert judge(seen, slurm) == State(status, "", "7")
    # Of the step of the last save, such as when only the last evaluation was left to do.
    seen = replace(seen, summary=summary(status, 40), step=40)
    assert judge(seen, slurm) == State(status, "", "7")
    # The run was at its end before, and its steps were raised: what the job did counts.
    seen = replace(seen, written=began - 3600)
    assert (judge(seen, slurm).name == status) == (end is not None and status == "diverged" and end["code"] == 1)
    # Went on beyond what the summary is of.
    seen = replace(seen, step=41, written=began + 3600)
    assert judge(seen, slurm).name not in ("finished", "diverged")


@pytest.mark.parametrize("state", ["RUNNING", "COMPLETING"])
@pytest.mark.parametrize("status", ["finished", "diverged", "stopped"])
def test_a_job_outlives_its_run(status: str, state: str) -> None:
    events = [S, {**B, "time": "2026-11-25T10:00:00+0100"}]
    job = queue(Job("7", state, nodes="n1"))
    seen = Seen(events, False, summary(status), 40, None, 1795597200.0 + 60)
    assert judge(seen, job) == State("stopping" if status == "stopped" else status, "", "7", "n1")
    assert judge(replace(seen, writer=ALIVE), job).name == ("running" if state == "RUNNING" else "stopping")
    # The summary is of the start before.
    before = judge(replace(seen, written=1795597200.0 - 60), job).name
    assert before == ("starting" if state == "RUNNING" else "stopping")


def test_a_job_that_was_cancelled_before_it_began() -> None:
    events = [S, B, ended(0), {**submitted("8"), "time": "2026-11-25T10:00:00+0100"}]
    seen = Seen(events, False, summary("finished"), 40, None, 1795597200.0 - 60)
    assert judge(seen, past("CANCELLED", job="8")).name == "cancelled"
    assert judge(replace(seen, written=1795597200.0 + 60), past("CANCELLED", job="8")).name == "finished"


@pytest.mark.parametrize(
    ("seen", "slurm", "expected"),
    [
        (Seen([S, B], step=5, writer=SILENT), NONE, False),  # lost, or waiting to go on
        (Seen([S, B], step=5, writer=SILENT), GONE, True),
        (Seen([S, B, ended(0)], summary=summary("finished")), NONE, True),
        (Seen(step=5, writer=SILENT), NONE, True),
        (Seen(step=5, writer=ALIVE), NONE, False),
    ],
)
def test_a_silent_slurm_settles_no_loss(seen: Seen, slurm: Slurm, expected: bool, tmp_path: Path) -> None:
    view = View(Run("a", Record(tmp_path), seen, {}, {}, None, None), judge(seen, slurm), slurm, 0)
    assert view.settled is expected


def test_says_where_and_when() -> None:
    assert judge(Seen([S]), queue(WAITS)) == State("queued", "Priority", "7")
    assert judge(Seen([S]), queue(WAITS)).start == "2026-11-25T12:00:00"
    assert judge(Seen([S, B], step=1, writer=ALIVE), queue(RUNS)).nodes == "n[1-2]"
    element = Job("12_3", "RUNNING", nodes="n4")
    assert judge(Seen([submitted("12_3")]), queue(element)) == State("starting", "", "12_3", "n4")


# What `squeue -h -r -o '%i|%T|%S|%e|%N|%r'` prints.
SQUEUE = """\
101|RUNNING|2026-11-25T10:00:00|2026-11-26T10:00:00|n[1-2]|None
102|PENDING|N/A|N/A||Resources
103|PENDING|2026-11-25T14:30:00|2026-11-26T14:30:00||(Priority)
104_0|COMPLETING|2026-11-25T09:00:00|2026-11-25T10:00:00|n3|None
104_12|PENDING|N/A|N/A||JobArrayTaskLimit
105|PENDING|2026-11-25T10:02:00|N/A||BeginTime
slurm_load_jobs error: something else

106|PENDING|Unknown|NONE||Nodes required for job are DOWN, DRAINED or reserved
"""


def test_reads_squeue() -> None:
    jobs = {job.job: job for job in parse_squeue(SQUEUE)}
    assert list(jobs) == ["101", "102", "103", "104_0", "104_12", "105", "106"]
    assert jobs["101"] == Job("101", "RUNNING", "None", "2026-11-25T10:00:00", "2026-11-26T10:00:00", "n[1-2]")
    assert jobs["102"] == Job("102", "PENDING", "Resources")
    assert jobs["103"].reason == "Priority"
    assert jobs["106"] == Job("106", "PENDING", "Nodes required for job are DOWN, DRAINED or reserved")


# What `sacct -n -P -X -D -o JobID,State,Submit,Start,End,NodeList,ExitCode` prints: the starts of a job in any order.
SACCT = """\
101|NODE_FAIL|2026-11-25T09:00:00|2026-11-25T09:00:02|2026-11-25T10:00:00|n[1-2]|0:0
101|RUNNING|2026-11-25T11:00:00|2026-11-25T11:00:30|Unknown|n[3-4]|0:0
101|PREEMPTED|2026-11-25T10:00:00|2026-11-25T10:02:00|2026-11-25T11:00:00|n[2-3]|0:15
102|CANCELLED by 1000|2026-11-25T09:00:00|None|2026-11-25T09:30:00|None assigned|0:0
103|CANCELLED+|2026-11-25T09:00:00|Unknown|2026-11-25T09:30:00|None assigned|0:0
104_0|COMPLETED|2026-11-25T09:00:00|2026-11-25T09:00:02|2026-11-25T10:00:00|n1|0:0
104_[1-3,7%2]|PENDING|2026-11-25T09:00:00|Unknown|Unknown|None assigned|0:0
105_[0-20:5]|PENDING|2026-11-25T09:00:00|Unknown|Unknown|None assigned|0:0
106|OUT_OF_MEMORY|2026-11-25T09:00:00|2026-11-25T09:00:02|2026-11-25T10:00:00|n1|0:125
107|OUT_OF_ME+|broken line
"""


def test_reads_sacct() -> None:
    asked = ["101", "102", "103", "104_0", "104_2", "104_7", "104_8", "105_10", "105_11", "10", "106"]
    jobs = parse_sacct(SACCT, asked)
    assert [job.state for job in jobs["101"]] == ["NODE_FAIL", "PREEMPTED", "RUNNING"]
    assert jobs["101"][0].end == "2026-11-25T10:00:00"
    assert jobs["101"][2] == Job("101", "RUNNING", start="2026-11-25T11:00:30", nodes="n[3-4]", code="0:0")
    assert jobs["102"] == [Job("102", "CANCELLED", end="2026-11-25T09:30:00", code="0:0")]
    assert jobs["103"][0].state == "CANCELLED"
    assert {job: rows[0].state for job, rows in jobs.items() if "_" in job} == {
        "104_0": "COMPLETED", "104_2": "PENDING", "104_7": "PENDING", "105_10": "PENDING",
    }  # fmt: skip
    assert set(jobs) == {"101", "102", "103", "104_0", "104_2", "104_7", "105_10", "106"}


def test_every_start_and_its_end() -> None:
    events = [S, B, ended(75, "requeued", reason="preempted"), began(1), began(2), ended(1, step=90, restart=2),
              submitted("8"), began(0, "8", nodes=["n4", "n5"], step=80)]  # fmt: skip
    slurms = {"7": [Job("7", "PREEMPTED"), Job("7", "NODE_FAIL", end="2026-11-25T10:00:00"), Job("7", "FAILED")]}
    restarts = [("7.1", "n1", "10:00 rank 3 was killed"), ("7.2", "n1", "other")]
    made = starts(events, slurms, restarts, {"7.1": [75, 1]}, 110, alive=True)
    assert [(s.job, s.restart, s.first, s.last, s.code, s.then) for s in made] == [
        ("7", 0, None, 40, 75, "requeued"), ("7", 1, 40, None, None, ""), ("7", 2, None, 90, 1, "over"),
        ("8", 0, 80, 110, None, ""),
    ]  # fmt: skip
    assert [s.how for s in made] == [
        "saved and stopped: preempted", "ended; Slurm says NODE_FAIL", "failed (1)", "goes on",
    ]  # fmt: skip
    assert (made[1].ended, made[1].within) == ("2026-11-25T10:00:00", ("n1: 10:00 rank 3 was killed",))
    assert (made[0].nodes, made[3].nodes) == ("n[1-2]", "n4,n5")
    fresh = [began(0, "9", step=120), ended(75, job="9", step=30)]
    assert [(s.first, s.last) for s in starts([*events, *fresh], {}, [], {}, 30, alive=False)][-1] == (None, 30)
    killed = "ended: its node failed, or it was killed"
    assert starts(events, {}, [], {}, 110, alive=False)[3].how == killed


@pytest.mark.parametrize(
    ("states", "codes", "alive", "expected"),
    [
        (["RUNNING"], [], True, "goes on"),
        ([], [], True, "goes on"),
        (["RUNNING"], [75, 75], True, "saved and stopped"),  # its job ends some seconds later
        (["RUNNING"], [0, 0], True, "finished"),
        (["RUNNING"], [75, 1], True, "goes on"),  # its workers may be started again
        ([], [75, 0], False, "saved and stopped"),
        (["CANCELLED"], [75, 75], False, "saved and stopped; Slurm says CANCELLED"),
        (["REQUEUED"], [75, 1], False, "ended; Slurm says REQUEUED"),
        (["COMPLETED"], [], False, "ended: its node failed, or it was killed"),
    ],
)
def test_a_start_of_which_the_script_says_no_end(
    states: list[str], codes: list[int], alive: bool, expected: str
) -> None:
    past = {"7": [Job("7", state) for state in states]}
    assert [start.how for start in starts([S, B], past, [], {"7.0": codes}, 1, alive)] == [expected]
