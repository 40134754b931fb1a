"""``launch list`` and ``status``, with programs in Slurm's place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import runs
from fake_slurm import Fake, make, slurm, state_of, writes

from launch import queue
from launch.__main__ import main

__all__ = ["slurm"]


def test_one_question_for_all_runs(slurm: Fake, capfd: pytest.CaptureFixture[str]) -> None:
    make("waits", "101")
    busy = make("busy", "102", step=40)
    busy.add("began", {"job": "102", "restart": 0, "nodes": "n[1-2]"})
    busy.add("ended", {"job": "102", "restart": 0, "code": 75, "step": 20, "reason": "preempted", "then": "requeued"})
    busy.add("began", {"job": "102", "restart": 1, "nodes": "n[3-4]"})
    writes(busy)
    again = make("again", "103", step=10)
    again.add("began", {"job": "103", "restart": 0, "nodes": "n1"})
    make("gone", "104_3")
    done = make("done", "90", step=80)
    (done.run / "summary.json").write_text(json.dumps({"status": "finished", "step": 80}))
    done.add("began", {"job": "90", "restart": 0, "nodes": "n1"})
    done.add("ended", {"job": "90", "restart": 0, "code": 0, "step": 80, "reason": "", "then": "over"})
    make("local", step=40)
    slurm.says(
        "squeue",
        "101|PENDING|2026-11-25T12:00:00|N/A||Priority\n102|RUNNING|2026-11-25T11:00:00|N/A|n[3-4]|None\n"
        "103|PENDING|N/A|N/A||BeginTime\n",
    )
    slurm.says("sacct", "104_3|CANCELLED by 0|2026-11-25T11:00:00|None|2026-11-25T11:01:00|None assigned|0:0\n")

    assert main(["list"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert len(slurm.calls("squeue")) == len(slurm.calls("sacct")) == 1
    assert slurm.calls("squeue")[0].endswith("-j 103,102,104_3,101")  # what is over is not asked about
    assert slurm.calls("sacct")[0].endswith("-j 104_3")
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == [*("run", "state", "step", "img/s", "left", "job", "nodes", "restarts", "last", "line", "why")]
    table = {row[0]: row[1:] for row in rows[1:]}
    assert table["again"][:3] == ["requeued", "10/80", "12"]
    assert table["again"][-1] == "BeginTime"
    assert table["done"][:2] == ["finished", "80/80"]
    assert table["gone"] == ["cancelled", "104_3"]
    assert table["busy"][:10] == ["running", "40/80", "50", "%", "999", "1", "h", "00", "102", "n[3-4]"]
    assert table["busy"][10] == "1"
    assert " ".join(table["waits"]) == "queued 101 Priority; starts about 2026-11-25 12:00:00"
    assert table["local"][0] == "failed"
    assert "\x1b" not in out

    assert main(["status", "102"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert out.startswith("busy  running\n")
    assert "job 102, on n[3-4]" in out
    assert "steps ? to 20, saved and stopped: preempted; queued again" in out
    assert "n[3-4], steps 20 to 40, goes on" in out
    assert main(["status", "--json", "102"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert [start["code"] for start in told["starts"]] == [75, None]
    assert told["writer"]["alive"] is True


def test_a_start_without_a_word_is_explained(slurm: Fake, capfd: pytest.CaptureFixture[str]) -> None:
    record = make("a", "7", step=40)
    record.add("began", {"job": "7", "restart": 0, "nodes": "n[1-2]", "step": 0})
    reports = record.reports / "7.0"
    reports.mkdir(parents=True)
    (reports / "n1").write_text("0 75 \n1 1 rank 3 was lost\n")
    (reports / "n1.restarts").write_text("2026-11-25T10:00:00 rank 1 was killed by SIGKILL\n")
    slurm.says("sacct", "7|NODE_FAIL|2026-11-25T09:00:00|2026-11-25T09:00:02|2026-11-25T10:30:00|n[1-2]|0:0\n")
    assert main(["status", "a"]) == 0
    out = capfd.readouterr().out
    assert out.startswith("a  failed  Slurm says NODE_FAIL, and did not queue it again\n")
    assert "to 2026-11-25 10:30:00, n[1-2], steps 0 to 40, ended; Slurm says NODE_FAIL" in out
    assert "workers started again, n1: 2026-11-25T10:00:00 rank 1 was killed by SIGKILL" in out
    assert "rank 1 on n1 ended with 1: rank 3 was lost" in out
    assert "rank 0 on n1" not in out  # it has saved


def test_a_stopped_job_whose_run_went_on_without_it(slurm: Fake, capfd: pytest.CaptureFixture[str]) -> None:
    record = make("a", "7", step=40)
    record.add("began", {"job": "7", "restart": 0, "nodes": "n1"})
    record.add("ended", {"job": "7", "restart": 0, "code": 75, "step": 40, "reason": "launch stop", "then": "over"})
    record.stop.touch()
    assert main(["status", "a"]) == 0
    assert capfd.readouterr().out.startswith("a  stopped  launch stop\n")
    make("a", step=80)
    (record.run / "summary.json").write_text(json.dumps({"status": "finished", "step": 80}))
    assert main(["status", "a"]) == 0
    told = capfd.readouterr().out
    assert told.startswith("a  finished\n")
    assert "a saved stop was asked for" not in told


def test_a_stop_of_what_never_began(slurm: Fake, capfd: pytest.CaptureFixture[str]) -> None:
    make("a", "7").stop.touch()
    assert main(["status", "a"]) == 0
    told = capfd.readouterr().out
    assert told.startswith("a  stopped  launch stop: it was taken out of Slurm's queue\n")
    assert "a stop before it began was asked for" in told
    assert "saved" not in told


def test_what_ranks_said_counts_until_they_are_started_again(slurm: Fake, capfd: pytest.CaptureFixture[str]) -> None:
    record = make("a", "7", step=40)
    record.add("began", {"job": "7", "restart": 0, "nodes": "n[1-2]", "step": 0})
    slurm.says("squeue", "7|RUNNING|N/A|N/A|n[1-2]|None\n")
    reports = record.reports / "7.0"
    reports.mkdir(parents=True)
    (reports / "n1").write_text("0 75 \n1 75 \n")
    found = state_of(Path("runs"), capfd)
    assert (found["state"], found["reason"]) == ("stopping", None)
    assert main(["status", "a"]) == 0
    assert "steps 0 to 40, saved and stopped\n" in capfd.readouterr().out
    (reports / "n1.restarts").write_text("2026-11-25T10:00:00 a node came or left; everything is saved\n")
    assert state_of(Path("runs"), capfd)["state"] == "starting"
    (reports / "n1").write_text("0 75 \n1 1 no disk\n")
    os.utime(reports / "n1.restarts", (1, 1))
    assert state_of(Path("runs"), capfd)["reason"] == "a rank has failed"
    record.add("ended", {"job": "7", "restart": 0, "code": 1, "step": 40, "reason": "no disk", "then": "over"})
    assert state_of(Path("runs"), capfd)["state"] == "failed"
    record.add("began", {"job": "7", "restart": 1, "nodes": "n[1-2]", "step": 40})
    assert state_of(Path("runs"), capfd)["state"] == "starting"


@pytest.mark.parametrize("name", ["squeue", "sacct"])
def test_a_slurm_that_fails_is_told_once(name: str, slurm: Fake, capfd: pytest.CaptureFixture[str]) -> None:
    for run in ("a", "b"):
        record = make(run, {"a": "7", "b": "8"}[run], step=40)
        record.add("began", {"job": record.jobs()[0], "restart": 0, "nodes": "n1"})
    slurm.says(name, err="slurm_load_jobs error: Unable to contact slurm controller\n", code=1)
    assert main(["list"]) == 0
    out, err = capfd.readouterr()
    assert err.startswith(f"note: {name}: slurm_load_jobs error: Unable to contact slurm controller")
    assert err.count("\n") == 1
    assert len(out.splitlines()) == 3


def test_a_slurm_without_accounts_is_no_news(slurm: Fake, capfd: pytest.CaptureFixture[str]) -> None:
    make("a", "7")
    slurm.says("squeue", err="slurm_load_jobs error: Invalid job id specified\n", code=1)
    slurm.says("sacct", err="Slurm accounting storage is disabled\n", code=1)
    found = state_of(Path("runs"), capfd)
    assert (found["state"], found["over"]) == ("cancelled", True)
    assert "before it began" in found["reason"]


def test_a_slurm_that_hangs_is_not_waited_for(
    slurm: Fake, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make("a", "7")
    monkeypatch.setattr(queue, "SECONDS", 0.2)
    slurm.says("squeue", seconds=60)
    assert main(["list"]) == 0
    out, err = capfd.readouterr()
    assert err == "note: squeue gave no answer within 0.2 s: sacct and the folders say how jobs are\n"
    assert "queued" in out


def test_no_slurm_here(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    make("local", step=4)
    assert main(["list"]) == 0
    assert capfd.readouterr().err == ""  # nobody needs it
    writes(make("a", "7", step=4))
    assert main(["list"]) == 0
    out, err = capfd.readouterr()
    assert err == "note: there is no Slurm on this machine: the folders alone say how their jobs are\n"
    assert "running" in out
    assert main(["stop", "a"]) == 2
    assert "Slurm does not say how job 7 is" in capfd.readouterr().err


def test_a_persons_defaults_hide_no_job(slurm: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    make("a", "7")
    monkeypatch.setenv("SQUEUE_STATES", "RUNNING")
    monkeypatch.setenv("SACCT_FORMAT", "jobid")
    assert main(["list"]) == 0
    for name in ("squeue", "sacct"):
        assert "SQUEUE_" not in slurm.environ(name)
        assert "SACCT_" not in slurm.environ(name)


def test_what_cannot_be_read_is_left_out_and_told(slurm: Fake, capfd: pytest.CaptureFixture[str]) -> None:
    make("a", step=4)
    (make("b", "7").run / "metrics.jsonl").mkdir()
    assert main(["list"]) == 0
    out, err = capfd.readouterr()
    assert err == "note: cannot read runs/b: Is a directory\n"
    assert [line.split()[0] for line in out.splitlines()] == ["run", "a"]
    assert main(["status", "b"]) == 2
    assert capfd.readouterr().err == "error: cannot read runs/b: Is a directory\n"


def test_lists_nothing(slurm: Fake, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    assert capfd.readouterr() == ("", "no runs below runs\n")
    assert main(["list", "no/such"]) == 2
    assert capfd.readouterr().err == "error: there is no folder no/such\n"
    for name in ("x" * 300, "~nobody-of-this-name"):  # a name too long for the disk is an error of the system's
        assert main(["list", name]) == 2
        assert capfd.readouterr().err == f"error: there is no folder {name}\n"
    Path("runs").rmdir()
    assert main(["list"]) == 2
    assert capfd.readouterr().err.startswith("error: there is no folder runs; name the folder")


def test_a_terminal_gets_colours_and_no_more_than_fits(slurm: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    record = make("a-rather-long-name-of-a-run", "7", step=40)
    record.add("began", {"job": "7", "restart": 0, "nodes": "n[1-2]"})
    slurm.says("squeue", "7|PENDING|N/A|N/A||Nodes required for job are DOWN, DRAINED or reserved\n")
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "launch", "list"],
        env=os.environ | {"PYTHONPATH": str(runs.ROOT), "TERM": "xterm", "COLUMNS": "80"},
        stdout=theirs,
    )
    os.close(theirs)
    data = b""
    try:
        while piece := os.read(ours, 4096):
            data += piece
    except OSError:  # Linux says so where the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0
    text = data.decode()
    assert "\x1b[33mrequeued" in text
    assert "a-rather-long-name-of-a-run" in text
    assert "40/80" in text


@pytest.mark.parametrize("command", ["list", "status", "logs", "stop"])
def test_needs_no_torch(command: str) -> None:
    code = f"import sys, launch.__main__, launch.{command}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=runs.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
