"""``launch list``, ``status``, ``logs``, ``stop``: on real runs of this machine, and with programs in Slurm's place."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import runs

from launch import jobs, logs
from launch.__main__ import main
from launch.record import Record

# Endless, and quick to start.
TINY = [
    *("--config", "configs/quickstart.yaml", "data.loader=synthetic", "data.size=16", "data.eval_size=16"),
    *("data.eval_resize=16", "data.synthetic.train=64", "data.synthetic.val=16", "train.global_batch=8"),
    *("train.micro_batch=null", "train.eval_every_epochs=2", "log.every_steps=2", "trace=false"),
]


def launch(*words: str, cwd: Path = runs.ROOT, **environ: str) -> subprocess.Popen[str]:
    """A command of the launcher in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "launch", *words],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(runs.ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def state_of(folder: Path, capfd: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What ``launch list --json`` says of the one run in a folder."""
    capfd.readouterr()
    assert main(["list", "--json", str(folder)]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    (found,) = json.loads(out) if out else [{"state": ""}]
    return found


def wait_for_state(name: str, folder: Path, process: subprocess.Popen[str], capfd: Any) -> dict[str, Any]:
    deadline = time.monotonic() + runs.TIMEOUT
    while not folder.is_dir() or (found := state_of(folder, capfd))["state"] != name:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.3)
    return found


# Runs of this machine


def test_the_life_of_a_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "runs" / "a"
    process = runs.begin(1, folder, *TINY, "train.steps=1000000")
    found = wait_for_state("running", folder, process, capfd)
    assert found["steps"] == 1_000_000
    assert found["step"] > 0
    assert found["eta_seconds"] > 0
    assert found["images_per_second"] > 0
    assert not found["over"]

    assert main(["stop", str(folder), "--wait"]) == 0
    asked, saved = capfd.readouterr().out.splitlines()
    assert asked == f"{folder}: process {process.pid} on this machine was asked to save and stop"
    step = int(runs.newest_checkpoint(folder).stem.removeprefix("step_"))
    newest = f"{folder}/checkpoints/step_{step:08d}.pt"
    assert saved == f"{folder} is stopped at step {step}; newest checkpoint: {newest}"
    runs.finish(process)
    assert process.returncode == 75
    assert state_of(folder, capfd)["state"] == "stopped"
    assert not Record(folder).path.exists()  # which is the launcher's, for jobs

    total = step + 3
    runs.train(1, folder, *TINY, f"train.steps={total}")
    found = state_of(folder, capfd)
    assert (found["state"], found["step"], found["steps"], found["eta_seconds"]) == ("finished", total, total, None)
    assert found["best"]["top1"] == max(record["best_top1"] for record in runs.records(folder, "eval"))
    assert main(["stop", str(folder)]) == 0
    assert capfd.readouterr().out == f"{folder} is finished already, at step {total}: nothing is to be stopped\n"

    process = runs.begin(1, folder, *TINY, "train.steps=1000000")
    deadline = time.monotonic() + runs.TIMEOUT
    while state_of(folder, capfd)["step"] <= total:  # the summary of the run that finished is there still
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.3)
    assert state_of(folder, capfd)["state"] == "running"
    runs.kill_group(process)
    found = state_of(folder, capfd)
    assert (found["state"], found["reason"]) == ("lost", found["reason"])
    assert found["reason"].endswith("was killed")
    assert main(["status", str(folder)]) == 0
    told = capfd.readouterr().out
    assert f"process {process.pid} on" in told
    assert f"newest: {folder}/checkpoints/" in told


def test_a_signal_to_the_writer_stops_all_ranks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "runs" / "a"
    process = launch("local", "--procs", "2", *TINY, "train.steps=1000000", f"run.dir={folder}")
    try:
        wait_for_state("running", folder, process, capfd)
        assert main(["stop", str(folder)]) == 0
        out, err = process.communicate(timeout=runs.TIMEOUT)
    finally:
        if process.poll() is None:
            runs.kill_group(process)
    assert process.returncode == 75, out + err
    assert state_of(folder, capfd)["state"] == "stopped"


# With programs in Slurm's place


class Fake:
    """squeue, sacct and scancel, which print what a test wrote and note how they were called."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for name in ("squeue", "sacct", "scancel"):
            self.says(name)

    def says(self, name: str, out: str = "", err: str = "", code: int = 0, seconds: float = 0) -> None:
        """What a command does from now on."""
        path = self._folder / name
        for suffix, text in (("out", out), ("err", err)):
            (self._folder / f"{name}.{suffix}").write_text(text)
        new = path.with_suffix(".new")
        new.write_text(
            f'#!/bin/sh\necho "$@" >> "{path}.calls"\nenv > "{path}.env"\n'
            f'{f"exec sleep {seconds}" if seconds else ""}\ncat "{path}.out"\ncat "{path}.err" >&2\nexit {code}\n'
        )
        new.chmod(0o755)
        new.replace(path)

    def calls(self, name: str) -> list[str]:
        path = self._folder / f"{name}.calls"
        return path.read_text().splitlines() if path.exists() else []

    def environ(self, name: str) -> str:
        return (self._folder / f"{name}.env").read_text()


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """A Slurm that has no jobs, and a working directory with a folder ``runs``."""
    place = tmp_path / "bin"
    place.mkdir()
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    return Fake(place)


def make(name: str, *jobs: str, step: int = 0) -> Record:
    """A run that was submitted as these jobs, and has trained so many steps."""
    record = Record(Path("runs", name))
    record.run.mkdir(parents=True, exist_ok=True)
    for job in jobs:
        record.add("submitted", {"job": job, "name": name, "nodes": 2, "procs": 16, "submission": f"s{job}"})
    if step:
        line = {"kind": "train", "step": step, "epoch": step / 8, "loss": 2.0, "lr": 0.1, "images_per_second": 999.0,
                "eta_seconds": 3600.0, "data_wait": 0.01}  # fmt: skip
        (record.run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        (record.run / "config.yaml").write_text("train:\n  epochs: 10\n  steps: null\n")
    return record


def writes(record: Record, age: float = 1.0, **changes: Any) -> None:
    """A writer on another machine, whose last heartbeat is so many seconds old."""
    values = {"token": "0123456789abcdef", "host": "n1", "pid": 4242, "since": "2026-11-25T10:00:00+0000"}
    path = record.run / "writer.json"
    path.write_text(json.dumps(values | {"machine": "another boot", "born": "17"} | changes))
    os.utime(path, (time.time() - age,) * 2)


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
    assert "steps 0 to 20, saved and stopped: preempted; queued again" in out
    assert "n[3-4], steps 20 to 40, goes on" in out
    assert main(["status", "--json", "102"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert [start["code"] for start in told["starts"]] == [75, None]
    assert told["writer"]["alive"] is True


def test_a_start_without_a_word_is_explained(slurm: Fake, capfd: pytest.CaptureFixture[str]) -> None:
    record = make("a", "7", step=40)
    record.add("began", {"job": "7", "restart": 0, "nodes": "n[1-2]"})
    reports = record.reports / "7.0"
    reports.mkdir(parents=True)
    (reports / "n1").write_text("0 75 \n1 1 rank 3 was lost\n")
    (reports / "n1.restarts").write_text("2026-11-25T10:00:00 rank 1 was killed by SIGKILL\n")
    slurm.says("sacct", "7|NODE_FAIL|2026-11-25T09:00:00|2026-11-25T09:00:02|2026-11-25T10:30:00|n[1-2]|0:0\n")
    assert main(["status", "a"]) == 0
    out = capfd.readouterr().out
    assert out.startswith("a  failed  Slurm says NODE_FAIL, and did not queue it again\n")
    assert "to 2026-11-25 10:30:00, n[1-2], steps 0 to 40, ended without a word: Slurm says NODE_FAIL" in out
    assert "workers started again, n1: 2026-11-25T10:00:00 rank 1 was killed by SIGKILL" in out
    assert "rank 1 on n1 ended with 1: rank 3 was lost" in out
    assert "rank 0 on n1 ended with 75\n" in out


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
    assert (found["state"], found["over"]) == ("lost", True)
    assert "never began" in found["reason"]


def test_a_slurm_that_hangs_is_not_waited_for(
    slurm: Fake, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make("a", "7")
    monkeypatch.setattr(jobs, "SECONDS", 0.2)
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


@pytest.mark.parametrize(
    ("job", "state", "began", "call"),
    [
        ("7", "RUNNING", True, "--signal=USR2 7"),
        ("7", "RUNNING", False, "--signal=USR2 7"),
        ("12_3", "RUNNING", True, "--signal=USR2 12_3"),
        ("7", "PENDING", False, "7"),
        ("7", "PENDING", True, "7"),
        ("12_3", "PENDING", False, "12_3"),
    ],
)
def test_stops_a_job(
    job: str, state: str, began: bool, call: str, slurm: Fake, capfd: pytest.CaptureFixture[str]
) -> None:
    record = make("a", job, step=40)
    if began:
        record.add("began", {"job": job, "restart": 0, "nodes": "n1"})
    slurm.says("squeue", f"{job}|{state}|N/A|N/A||None\n")
    assert main(["stop", "a"]) == 0
    out, err = capfd.readouterr()
    assert (out.count("\n"), err) == (1, "")
    assert f"job {job} of a " in out
    assert slurm.calls("scancel") == [call]
    assert record.stop.exists()
    assert state_of(Path("runs"), capfd)["state"] == {"PENDING": "requeued" if began else "queued"}.get(
        state, "starting"
    )


def test_what_scancel_refuses_is_told(slurm: Fake, capfd: pytest.CaptureFixture[str]) -> None:
    make("a", "7")
    slurm.says("squeue", "7|RUNNING|N/A|N/A|n1|None\n")
    slurm.says("scancel", err="scancel: error: Kill job error on job id 7: Access/permission denied\n", code=1)
    assert main(["stop", "a"]) == 2
    assert capfd.readouterr().err == (
        "error: scancel --signal=USR2 7: scancel: error: Kill job error on job id 7: Access/permission denied\n"
    )


def test_waits_until_a_job_has_stopped(
    slurm: Fake, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = make("a", "7", step=40)
    record.add("began", {"job": "7", "restart": 0, "nodes": "n1"})
    writes(record)
    slurm.says("squeue", "7|RUNNING|N/A|N/A|n1|None\n")

    def end() -> None:
        while not slurm.calls("scancel"):
            time.sleep(0.01)
        record.add("ended", {"job": "7", "restart": 0, "code": 75, "step": 41, "reason": "stopped", "then": "over"})
        (record.run / "writer.json").unlink()
        (record.run / "checkpoints").mkdir()
        (record.run / "checkpoints" / "step_00000041.pt").touch()
        slurm.says("squeue")

    ending = threading.Thread(target=end)
    ending.start()
    assert main(["stop", "a", "--wait"]) == 0
    ending.join()
    lines = capfd.readouterr().out.splitlines()
    assert lines[1] == f"a is stopped at step 40; newest checkpoint: {record.run}/checkpoints/step_00000041.pt"


@pytest.mark.parametrize("command", ["status", "logs", "stop"])
@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("nothing", "there is no run 'nothing', here or below runs"),
        ("4711", "no run below runs knows a job 4711"),
        ("sweep", "sweep is no run's folder: name one of those in it, such as sweep/x"),
        ("12", "job 12 has 2 runs below runs: name one of them, such as 12_0"),
        ("", "there is no run ''"),
    ],
)
def test_a_run_that_is_not_there(
    command: str, word: str, part: str, slurm: Fake, capfd: pytest.CaptureFixture[str]
) -> None:
    make("sweep/x", "12_0")
    make("sweep/y", "12_1")
    assert main([command, word]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert part in err


def test_a_job_that_is_gone_is_not_stopped(slurm: Fake, capfd: pytest.CaptureFixture[str]) -> None:
    record = make("a", "7", step=40)
    assert main(["stop", "a"]) == 0
    assert capfd.readouterr().out == "a is lost already, at step 40: nothing is to be stopped\n"
    assert slurm.calls("scancel") == []
    assert not record.stop.exists()


def test_a_writer_elsewhere_is_named(slurm: Fake, capfd: pytest.CaptureFixture[str]) -> None:
    writes(make("a", step=40))
    assert main(["stop", "a"]) == 2
    assert "a is written by process 4242 on n1: stop it there, by `kill -TERM 4242`" in capfd.readouterr().err


def test_lists_nothing(slurm: Fake, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    assert capfd.readouterr() == ("", "no runs below runs\n")
    assert main(["list", "no/such"]) == 2
    assert capfd.readouterr().err == "error: there is no folder no/such\n"
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


# Logs


@pytest.mark.parametrize("command", ["list", "status", "logs", "stop"])
def test_needs_no_torch(command: str) -> None:
    code = f"import sys, launch.__main__, launch.{command}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=runs.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_shows_the_last_lines(slurm: Fake, capfd: pytest.CaptureFixture[str]) -> None:
    record = make("a", "7")
    record.logs.mkdir(parents=True)
    record.log_of(0).write_text("".join(f"line {k}\n" for k in range(50_000)))
    record.log_of(3).write_bytes(b"rank 3 \xff\nhalf")
    assert main(["logs", "a", "--lines", "2"]) == 0
    assert capfd.readouterr().out == "line 49998\nline 49999\n"
    assert main(["logs", "a", "--rank", "3"]) == 0
    assert "rank 3 " in capfd.readouterr().out
    assert main(["logs", "a"]) == 0
    assert capfd.readouterr().out.count("\n") == logs.LINES
    record.log_of(4).touch()  # it has said nothing: that is no reason to show what the job printed
    (record.path / "s7").mkdir()
    (record.path / "s7" / "7_0_log.out").write_text("other\n")
    assert main(["logs", "a", "--rank", "4"]) == 0
    assert capfd.readouterr() == ("", "")
    assert main(["logs", "a", "--rank", "5"]) == 2
    assert capfd.readouterr().err.startswith("error: runs/a has no log of rank 5 yet: it is lost: job 7 never began")


@pytest.mark.parametrize(
    ("data", "lines", "expected"),
    [
        (b"", 3, b""),
        (b"a", 3, b"a"),
        (b"a\nb\n", 1, b"b\n"),
        (b"a\nb", 1, b"b"),
        (b"a\n\n", 1, b"\n"),
        (b"a\rb\rc\nd\n", 2, b"a\rb\rc\nd\n"),
        (b"x" * 70_000 + b"\n" + b"y" * 70_000 + b"\nz\n", 2, b"y" * 70_000 + b"\nz\n"),
    ],
)
def test_last_lines(data: bytes, lines: int, expected: bytes, tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(data)
    assert logs.last_lines(tmp_path / "log", lines) == (expected, len(data))


def test_what_a_job_printed_before_python_began(slurm: Fake, capfd: pytest.CaptureFixture[str]) -> None:
    record = make("a", "7", "8")
    slurm.says("squeue", "8|PENDING|N/A|N/A||Priority\n")
    assert main(["logs", "a"]) == 2
    assert capfd.readouterr().err == "error: runs/a has no log of rank 0 yet: it is queued as job 8: Priority\n"
    for name in ("s7", "s8"):
        (record.path / name).mkdir()
        (record.path / name / f"{name[1:]}_0_log.out").write_text(f"slurmstepd: error of {name}\n")
    assert main(["logs", "a"]) == 0
    assert capfd.readouterr().out == "slurmstepd: error of s8\n"
    assert main(["status", "a"]) == 0
    assert f"{record.path}/s8/8_0_log.out" in capfd.readouterr().out


def test_a_run_of_this_machine_has_no_log(slurm: Fake, capfd: pytest.CaptureFixture[str]) -> None:
    make("a", step=4)
    assert main(["logs", "a", "-f"]) == 2
    assert capfd.readouterr().err == (
        "error: runs/a has no log: a run that no job trains prints to its terminal alone\n"
    )


@pytest.fixture
def following(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Record], tuple[list[str], threading.Thread]]]:
    """Begins to follow a record's log in a thread; gives what the follower says, and the thread."""
    monkeypatch.setattr(logs, "ASK_SECONDS", 0.2)
    monkeypatch.setattr(logs, "LOOK_SECONDS", 0.02)
    threads = []

    def begin(record: Record) -> tuple[list[str], threading.Thread]:
        told: list[str] = []
        thread = threading.Thread(target=logs.follow, args=(record,), kwargs={"notify": told.append}, daemon=True)
        thread.start()
        threads.append(thread)
        return told, thread

    yield begin
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_follows_over_requeues_until_the_end(
    slurm: Fake, capfd: pytest.CaptureFixture[str], following: Callable[[Record], tuple[list[str], threading.Thread]]
) -> None:
    record, shown = make("a", "7"), ""

    def shows(text: str) -> Callable[[], bool]:
        def look() -> bool:
            nonlocal shown
            shown += capfd.readouterr().out
            return text in shown

        return look

    slurm.says("squeue", "7|PENDING|N/A|N/A||Priority\n")
    told, thread = following(record)
    until(lambda: told == ["queued as job 7: Priority"])
    slurm.says("squeue", "7|RUNNING|N/A|N/A|n1|None\n")
    record.add("began", {"job": "7", "restart": 0, "nodes": "n1"})
    (record.path / "s7").mkdir()
    (record.path / "s7" / "7_0_log.out").write_text("the job's own output\n")
    until(shows("the job's own output"))
    until(lambda: told[-1] == "starting as job 7")
    record.logs.mkdir()
    log = record.log_of(0)
    log.write_text("first\n")
    until(shows("first\n"))
    with log.open("a") as file:
        file.write("second\n")
    until(shows("second\n"))
    log.write_text("cut\n")  # shorter than what was read
    until(shows("cut\n"))
    slurm.says("squeue", "7|PENDING|N/A|N/A||BeginTime\n")
    until(lambda: told[-1] == "requeued as job 7: BeginTime")
    other = log.with_suffix(".new")
    other.write_text("another file\nof a later start\n")
    other.replace(log)
    until(shows("of a later start\n"))
    assert thread.is_alive()
    slurm.says("squeue")
    record.add("ended", {"job": "7", "restart": 0, "code": 0, "step": 40, "reason": "", "then": "over"})
    with log.open("a") as file:
        file.write("the last words\n")
    thread.join(30)
    shows("")()
    assert shown == ("the job's own output\nfirst\nsecond\ncut\nanother file\nof a later start\nthe last words\n")
    assert told[1:] == ["starting as job 7", "requeued as job 7: BeginTime", "finished"]


def test_a_follower_says_once_that_slurm_fails(
    slurm: Fake, following: Callable[[Record], tuple[list[str], threading.Thread]]
) -> None:
    record = make("a", "7")
    slurm.says("squeue", err="no contact\n", code=1)
    told, _ = following(record)
    until(lambda: len(slurm.calls("squeue")) > 3)
    assert told == [
        "squeue: no contact: sacct and the folders say how jobs are",
        "queued as job 7: Slurm does not answer",
    ]
    record.add("began", {"job": "7", "restart": 0, "nodes": "n1"})
    record.add("ended", {"job": "7", "restart": 0, "code": 1, "step": 4, "reason": "x", "then": "over"})


@pytest.mark.parametrize("way", ["ctrl-c", "reader left"])
def test_a_follower_that_is_ended(way: str, slurm: Fake, tmp_path: Path) -> None:
    record = make("a", "7")
    record.logs.mkdir(parents=True)
    record.log_of(0).write_text("first\n")
    slurm.says("squeue", "7|RUNNING|N/A|N/A|n1|None\n")
    process = launch("logs", "-f", "a", cwd=tmp_path)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "first\n"
    assert process.stderr.readline() == "[starting as job 7]\n"
    if way == "ctrl-c":
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=30)
    else:
        process.stdout.close()
        with record.log_of(0).open("a") as file:
            file.write("second\n")
        out, err = "", process.stderr.read()
        process.wait(30)
    assert (process.returncode, out, err) == (0, "", "")
