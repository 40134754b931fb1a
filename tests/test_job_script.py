"""launch/slurm/job.sh alone, in each shell that is here: what it makes of the ranks' words and of Slurm's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from launch.record import Record

SHELLS = [name for name in ("dash", "bash", "busybox") if shutil.which(name)]

# scontrol as it answers: the fields of the file "job", and what it was asked to do is written down.
SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then cat "$FAKE/job"; else echo "$*" >>"$FAKE/asked"; fi
[ ! -e "$FAKE/refuses" ] || [ "$1" = show ]
"""
RUNNING = "JobId=7 JobName=a run JobState=RUNNING Reason=None Restarts=0 ExcNodeList=(null) NodeList=n[1-2]"


class Script:
    """job.sh around a command in srun's place."""

    def __init__(self, folder: Path, shell: str) -> None:
        self.shell = shell
        self.run = folder / 'a run of "50 %" of 7\\8'
        self.fake = folder / "fake"
        self.fake.mkdir(parents=True)
        self.job(RUNNING)
        scontrol = self.fake / "scontrol"
        scontrol.write_text(SCONTROL)
        scontrol.chmod(0o755)
        (folder / "runs").write_text(f"{folder}/another\n{self.run}\n")
        self.environ = {
            "PATH": f"{self.fake}:{os.environ['PATH']}",
            "FAKE": str(self.fake),
            "DISTRIB_SUBMISSION": str(folder),
            "DISTRIB_WORLD": "2",
            "DISTRIB_FAILURES": "3",
            "DISTRIB_EXCLUDE": "false",
            "SLURM_JOB_ID": "7",
            "SLURM_ARRAY_JOB_ID": "6",
            "SLURM_ARRAY_TASK_ID": "1",
            "SLURM_JOB_NODELIST": "n[1-2]",
        }

    def job(self, fields: str) -> None:
        """What Slurm says of the job."""
        (self.fake / "job").write_text(f"{fields}\n")

    def srun(self, code: int = 0, does: str = "", start: int = 0) -> int:
        """One start in which srun does and ends so; returns the script's code."""
        (self.fake / "srun").write_text(f"#!/bin/sh\n{does}\nexit {code}\n")
        (self.fake / "srun").chmod(0o755)
        lines = f". {Path(__file__).parent.parent}/launch/slurm/job.sh\nbegin\nsrun --label x\nfinish $?\n"
        shell = [self.shell, "sh"] if self.shell == "busybox" else [self.shell]
        done = subprocess.run(
            [*shell, "-uc", lines],
            env={**self.environ, "SLURM_RESTART_COUNT": str(start)},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=60,
        )
        assert not done.stderr, done.stderr
        return done.returncode

    def says(self, *lines: str) -> str:
        """For srun: ranks' reports."""
        text = "".join(f"{line}\n" for line in lines)
        (self.fake / "says").write_text(text, errors="surrogateescape")
        return 'cat "$FAKE/says" >>"$DISTRIB_REPORTS/n1"'

    def ended(self) -> dict[str, Any]:
        return self.events("ended")[-1]

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in Record(self.run).read() if event["event"] == kind]

    def asked(self) -> list[str]:
        """What Slurm was asked to do."""
        file = self.fake / "asked"
        return file.read_text().splitlines() if file.exists() else []

    def saves(self, step: int) -> None:
        (self.run / "checkpoints").mkdir(parents=True, exist_ok=True)
        (self.run / "checkpoints" / f"step_{step:08d}.pt").touch()


@pytest.fixture(params=SHELLS)
def script(tmp_path: Path, request: pytest.FixtureRequest) -> Script:
    return Script(tmp_path / "a folder", request.param)


@pytest.mark.parametrize(
    ("srun", "reports", "expected"),
    [
        (0, ["0 0", "1 0"], 0),
        (0, ["0 75", "1 75"], 75),
        (0, ["0 75", "1 0"], 75),
        (0, [], 75),  # both tasks were stopped before they had ranks
        (0, ["0 75"], 75),
        (75, ["none 75 stopped before it began"], 75),
        (137, ["0 75", "1 75"], 75),  # the task was killed when all was saved
        (137, ["0 0", "1 0"], 0),
        (137, ["0 75"], 1),
        (1, ["0 75", "1 1 no disk"], 1),
        (1, ["0 1 no disk", "0 75", "1 75"], 75),  # the last word counts
        (1, ["0 2 no such folder", "1 75"], 2),
        (1, [], 1),
        (143, ["0 7x", "x 0", "1", ""], 1),
        (0, ["0 1 no disk", "1 0"], 1),
    ],
)
def test_how_a_start_ended(script: Script, srun: int, reports: list[str], expected: int) -> None:
    assert script.srun(srun, script.says(*reports)) == expected
    assert script.ended()["code"] == expected
    requeued = expected in (1, 75)
    assert script.asked() == (["requeue 6_1"] if requeued else [])
    assert script.ended()["then"] == ("requeued" if requeued else "over")
    assert script.events("began") == [
        {**script.events("began")[0], "job": "6_1", "restart": 0, "nodes": "n[1-2]", "step": 0}
    ]


@pytest.mark.parametrize(
    ("fields", "then", "asked"),
    [
        ("JobState=COMPLETING Reason=None Restarts=0", "over", []),  # cancelled
        ("JobState=CANCELLED Reason=None Restarts=0", "over", []),
        ("JobState=COMPLETING Reason=TimeLimit Restarts=0", "requeued", ["requeue 6_1"]),
        ("JobState=TIMEOUT Reason=TimeLimit Restarts=0", "requeued", ["requeue 6_1"]),
        ("JobState=COMPLETING Reason=None Restarts=1", "requeued", []),  # scontrol requeue, or preempted
        ("JobState=PENDING Reason=BeginTime Restarts=1", "requeued", []),
        ("slurm_load_jobs error: Unable to contact slurm controller", "requeued", ["requeue 6_1"]),
    ],
)
def test_what_slurm_has_in_mind(script: Script, fields: str, then: str, asked: list[str]) -> None:
    does = f'{script.says("0 75", "1 75")}; echo {fields!r} >"$FAKE/job"'
    assert script.srun(0, does) == 75
    assert script.ended()["then"] == then
    assert script.asked() == asked
    assert (script.ended()["reason"] == "cancelled") == (then == "over")


def test_failures_at_one_step_are_counted(script: Script) -> None:
    for start, step in enumerate([0, 0, 10, 10]):
        script.saves(step)
        assert script.srun(1, script.says("1 1 no disk"), start) == 1
        assert script.ended()["then"] == "requeued"
        assert script.events("began")[-1]["step"] == step
    script.srun(0, script.says("0 75", "1 75"), 4)  # a stop is no failure
    script.srun(1, script.says("1 1 no disk"), 5)
    assert script.ended()["then"] == "over"
    assert script.ended()["step"] == 10
    assert script.ended()["reason"] == "failed 3 times at step 10 without a newer checkpoint: rank 1: no disk"
    assert len(script.asked()) == 5


def test_a_run_that_diverged_is_over(script: Script) -> None:
    assert script.srun(1, script.says("0 3 the loss is NaN", "1 75")) == 1
    assert script.asked() == []
    assert (script.ended()["code"], script.ended()["then"]) == (1, "over")
    assert script.ended()["reason"] == "diverged, and another start would again: rank 0: the loss is NaN"


def test_a_bad_machine_is_a_failure_that_may_be_mended(script: Script) -> None:
    script.environ["DISTRIB_EXCLUDE"] = "true"
    said = script.says("0 4 preflight: rank 1 on n2 is slow", "1 4 preflight: rank 1 on n2 is slow")
    bad = 'echo "n2 rank 1 on n2 is slow" >"$DISTRIB_BAD_HOSTS_FILE"'
    for start in range(3):
        assert script.srun(1, f"{said}; {bad}", start) == 1
        last = start == 2
        assert (script.ended()["code"], script.ended()["then"]) == (1, "over" if last else "requeued")
        reason = "n2 rank 1 on n2 is slow"
        many = "failed 3 times at step 0 without a newer checkpoint: "
        assert script.ended()["reason"] == (f"{many}{reason}" if last else reason)
    assert script.asked() == ["requeue 6_1", "update JobId=6_1 ExcNodeList=n2"] * 2


def test_stops_without_a_step_are_counted_too(script: Script) -> None:
    script.srun(0, script.says("0 75", "1 75"))
    attempts = Record(script.run).reports / "6_1.attempts"
    assert attempts.read_text() == "stopped 0 1\n"
    attempts.write_text("stopped 0 18\nfailed 0 1\n")
    for start in (1, 2):
        assert script.ended()["then"] == "requeued"
        script.srun(0, script.says("0 75", "1 75"), start)
    assert script.ended()["then"] == "over"
    assert script.ended()["reason"].startswith("stopped 20 times at step 0 without a newer checkpoint: asked to stop")


def test_starts_that_say_nothing_are_counted_too(script: Script) -> None:
    """As where a run takes its node along each time."""
    for start in range(2):
        assert script.srun(0, "kill -9 $PPID", start) == -9
    attempts = Record(script.run).reports / "6_1.attempts"
    assert attempts.read_text() == "lost 0 1\n"
    attempts.write_text("lost 0 19\n")
    assert not script.events("ended")
    assert script.srun(0, script.says("0 0", "1 0"), 2) == 1
    assert script.ended()["reason"].startswith("lost 20 times at step 0 without a newer checkpoint: the start before")
    assert len(script.events("began")) == 3


def test_another_job_of_the_run_counts_anew(script: Script) -> None:
    for start in range(3):
        script.srun(1, start=start)
    assert script.ended()["then"] == "over"
    script.environ["SLURM_ARRAY_JOB_ID"] = "8"
    script.srun(1)
    assert script.ended()["then"] == "requeued"
    assert script.asked()[-1] == "requeue 8_1"


def test_an_overrun_is_queued_again_before_the_ranks_have_ended(script: Script) -> None:
    fields = "JobState=COMPLETING Reason=TimeLimit Restarts=0"
    waits = 'until [ -e "$FAKE/asked" ]; do sleep 0.1; done'
    does = f'echo {fields!r} >"$FAKE/job"; kill -TERM $PPID; {waits}; kill -9 $PPID'
    assert script.srun(0, does) == -9
    assert script.asked() == ["requeue 6_1"]
    assert not script.events("ended")
    assert (Record(script.run).reports / "6_1.attempts").read_text() == "failed 0 1\n"


def test_signals_do_not_end_the_script(script: Script) -> None:
    does = f"for name in USR1 USR2 TERM TERM; do kill -$name $PPID; done; sleep 0.3; {script.says('0 75', '1 75')}"
    assert script.srun(0, does) == 75
    assert script.ended()["then"] == "requeued"


def test_slurm_may_not_take_the_job_back(script: Script) -> None:
    (script.fake / "refuses").touch()
    assert script.srun(1, script.says("0 1 no disk")) == 1
    assert script.ended()["then"] == "over"
    assert script.ended()["reason"] == "rank 0: no disk; scontrol could not queue the job again"


def test_what_ranks_say_becomes_json(script: Script) -> None:
    said = 'it\'s "C:\\new\\table"\tat $HOME `ls` %s * \x01 é\udcff'
    script.srun(1, script.says(f"1 1   {said}"))
    text = Record(script.run).events.read_bytes().decode(errors="replace")
    assert [json.loads(line)["event"] for line in text.splitlines()] == ["began", "ended"]
    assert script.ended()["reason"] == 'rank 1: it\'s "C:\\new\\table" at $HOME `ls` %s *  é\ufffd'


def test_the_killed_rank_is_named_before_those_that_lost_it(script: Script) -> None:
    script.srun(1, script.says("0 1 connection reset by peer", "1 1 rank 1 was killed by SIGKILL"))
    assert script.ended()["reason"] == "rank 1 was killed by SIGKILL"


def test_launch_stop(script: Script) -> None:
    does = f'touch "$DISTRIB_RANK_LOGS/../stop"; {script.says("0 75", "1 75")}'
    assert script.srun(0, does) == 75
    assert (script.ended()["then"], script.ended()["reason"]) == ("over", "launch stop")
    assert script.srun(0, 'touch "$FAKE/started"') == 75
    assert not (script.fake / "started").exists()
    assert script.asked() == []


@pytest.mark.parametrize(("before", "after"), [("(null)", "n2,n4"), ("n7,n[11-12]", "n7,n[11-12],n2,n4")])
def test_bad_nodes_are_left_out_once_the_job_is_queued(script: Script, before: str, after: str) -> None:
    script.job(RUNNING.replace("(null)", before))
    bad = 'printf "%s\\n" "n4 its GPU 3 is hot" "n2 slow" "n4 again" >"$DISTRIB_BAD_HOSTS_FILE"'
    script.srun(1, bad)
    assert script.asked() == ["requeue 6_1"]  # only where the profile says so
    assert script.ended()["reason"] == "n4 its GPU 3 is hot"
    script.environ["DISTRIB_EXCLUDE"] = "true"
    script.srun(1, bad, 1)
    assert script.asked()[1:] == ["requeue 6_1", f"update JobId=6_1 ExcNodeList={after}"]


def test_the_ranks_path_is_theirs_alone(script: Script) -> None:
    lines = f". {Path(__file__).parent.parent}/launch/slurm/job.sh\nPATH=/nowhere\nbegin\nsrun\nfinish $?\n"
    (script.fake / "srun").write_text('#!/bin/sh\n[ "$PATH" = /nowhere ] && exit 0\nexit 1\n')
    (script.fake / "srun").chmod(0o755)
    done = subprocess.run([shutil.which("dash") or "/bin/sh", "-c", lines], env=script.environ, timeout=60)
    assert done.returncode == 75
    assert script.asked() == ["requeue 6_1"]
