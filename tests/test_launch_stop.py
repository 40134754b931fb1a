"""``launch stop``: on real runs of this machine, and with programs in Slurm's place."""

from __future__ import annotations

import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import runs
from fake_slurm import Fake, launch, make, slurm, state_of, writes

from launch import stop
from launch.__main__ import main
from launch.record import Record

__all__ = ["slurm"]


# Endless, and quick to start.
TINY = [
    *("--config", "configs/quickstart.yaml", "data.loader=synthetic", "data.size=16", "data.eval_size=16"),
    *("data.eval_resize=16", "data.synthetic.train=64", "data.synthetic.val=16", "train.global_batch=8"),
    *("train.micro_batch=null", "train.eval_every_epochs=2", "log.every_steps=2", "trace=false"),
]


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


# Jobs


@pytest.mark.parametrize(
    ("job", "state", "began", "call"),
    [
        ("7", "RUNNING", True, "--signal=USR2 7"),
        ("7", "RUNNING", False, "--signal=USR2 7"),
        ("12_3", "RUNNING", True, "--signal=USR2 12_3"),
        ("7", "PENDING", False, "--state=PENDING 7"),
        ("7", "PENDING", True, "--state=PENDING 7"),
        ("7", "REQUEUE_HOLD", True, "7"),
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
    waits = "requeued" if began else "queued"
    assert state_of(Path("runs"), capfd)["state"] == ("stopping" if state == "RUNNING" else waits)


def test_what_scancel_refuses_is_told(slurm: Fake, capfd: pytest.CaptureFixture[str]) -> None:
    make("a", "7")
    slurm.says("squeue", "7|RUNNING|N/A|N/A|n1|None\n")
    slurm.says("scancel", err="scancel: error: Kill job error on job id 7: Access/permission denied\n", code=1)
    assert main(["stop", "a"]) == 2
    assert capfd.readouterr().err == (
        "error: scancel --signal=USR2 7: scancel: error: Kill job error on job id 7: Access/permission denied\n"
    )


@pytest.mark.parametrize(
    "words", ["", "scancel: error: Kill job error on job id 7: Job/step already completing or completed"]
)
def test_a_job_whose_ranks_have_not_begun_is_asked_again(
    words: str, slurm: Fake, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make("a", "7")
    slurm.says("squeue", "7|RUNNING|N/A|N/A|n1|None\n")
    slurm.says("scancel", err=words, code=229)
    monkeypatch.setattr(stop, "STEP_SECONDS", 0.5)
    assert main(["stop", "a"]) == 2
    assert "job 7 runs nothing yet that could be asked to stop: try again in a moment" in capfd.readouterr().err
    monkeypatch.setattr(stop, "STEP_SECONDS", 30.0)

    def begin() -> None:
        calls = len(slurm.calls("scancel"))
        while len(slurm.calls("scancel")) < calls + 1:
            time.sleep(0.01)
        slurm.says("scancel")

    beginning = threading.Thread(target=begin)
    beginning.start()
    assert main(["stop", "a"]) == 0
    beginning.join()
    assert capfd.readouterr().out == "job 7 of a was asked to save and stop\n"


def test_a_job_that_begins_as_it_is_taken_out_is_asked_to_save(slurm: Fake, capfd: pytest.CaptureFixture[str]) -> None:
    make("a", "7")
    slurm.says("squeue", "7|PENDING|N/A|N/A||Priority\n")
    slurm.then("scancel", "squeue", "7|RUNNING|N/A|N/A|n1|None\n")
    assert main(["stop", "a"]) == 0
    assert capfd.readouterr() == ("job 7 of a was asked to save and stop\n", "")
    assert slurm.calls("scancel") == ["--state=PENDING 7", "--signal=USR2 7"]


def test_a_job_that_is_requeued_as_it_is_asked_is_taken_out(
    slurm: Fake, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stop, "STEP_SECONDS", 3.0)
    record = make("a", "7", step=40)
    record.add("began", {"job": "7", "restart": 0, "nodes": "n1"})
    slurm.says("squeue", "7|RUNNING|N/A|N/A|n1|None\n")
    slurm.says(
        "scancel", err="scancel: error: Kill job error on job id 7: Job/step already completing or completed", code=1
    )
    slurm.then("scancel", "squeue", "7|PENDING|N/A|N/A||BeginTime\n")
    assert main(["stop", "a"]) == 0
    assert capfd.readouterr() == ("job 7 of a was taken out of the queue; what it has trained is saved\n", "")
    assert slurm.calls("scancel") == ["--signal=USR2 7", "--state=PENDING 7"]


def test_waits_until_a_job_has_stopped(
    slurm: Fake, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stop, "WAIT_SECONDS", 0.1)
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
        ("", "there is no run ''"),
        ("elsewhere", "runs/elsewhere is no run's folder"),
        ("x" * 300, "there is no run 'xxx"),
    ],
)
def test_a_run_that_is_not_there(
    command: str, word: str, part: str, slurm: Fake, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("runs", "elsewhere").mkdir()
    assert main([command, word]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert part in err


@pytest.mark.parametrize("command", ["status", "logs"])
@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("sweep", "sweep is no run's folder: name one of those in it, such as sweep/x"),
        ("12", "job 12 has 2 runs below runs: name one of them, such as 12_0"),
    ],
)
def test_several_runs_are_not_shown(
    command: str, word: str, part: str, slurm: Fake, capfd: pytest.CaptureFixture[str]
) -> None:
    make("sweep/x", "12_0")
    make("sweep/y", "12_1")
    assert main([command, word]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert part in err


ARRAY = "12_0|RUNNING|N/A|N/A|n1|None\n12_1|RUNNING|N/A|N/A|n2|None\n"


def make_sweep() -> list[Record]:
    """Two elements that run, one that waits and one that has finished; and a run below another folder."""
    records = [make(f"sweep/{name}", f"12_{k}", step=40) for k, name in enumerate("abcd")]
    for k in (0, 1, 3):
        records[k].add("began", {"job": f"12_{k}", "restart": 0, "nodes": "n1"})
    records[3].add("ended", {"job": "12_3", "restart": 0, "code": 1, "step": 40, "reason": "no disk", "then": "over"})
    make("sweep/deeper/x", "13")
    return records


@pytest.mark.parametrize("word", ["sweep", "runs/sweep", "runs/sweep/", "12"])
def test_stops_all_of_a_sweep(word: str, slurm: Fake, capfd: pytest.CaptureFixture[str]) -> None:
    records = make_sweep()
    slurm.says("squeue", f"{ARRAY}12_2|PENDING|N/A|N/A||JobArrayTaskLimit\n13|RUNNING|N/A|N/A|n4|None\n")
    assert main(["stop", word]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert out.splitlines() == [
        "job 12_2 of sweep/c was taken out of the queue; what it has trained is saved",
        "job 12_0 of sweep/a was asked to save and stop",
        "job 12_1 of sweep/b was asked to save and stop",
    ]
    assert slurm.calls("scancel") == ["12_2", "--signal=USR2 12_0", "--signal=USR2 12_1"]
    assert [record.stop.exists() for record in records] == [True, True, True, False]


def test_a_run_that_cannot_be_reached_keeps_no_other_from_stopping(
    slurm: Fake, capfd: pytest.CaptureFixture[str]
) -> None:
    make_sweep()
    writes(make("sweep/0", step=4))
    slurm.says("squeue", ARRAY)
    assert main(["stop", "sweep"]) == 2
    out, err = capfd.readouterr()
    assert out.count("was asked to save and stop") == 2
    assert err == ("error: sweep/0 is written by process 4242 on n1: stop it there, by `kill -TERM 4242`\n")


def test_waits_until_all_of_a_sweep_have_stopped(
    slurm: Fake, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stop, "WAIT_SECONDS", 0.1)
    records = make_sweep()
    slurm.says("squeue", ARRAY)

    def end() -> None:
        while len(slurm.calls("scancel")) < 2:
            time.sleep(0.01)
        for k, code in ((0, 75), (1, 1)):
            values = {"job": f"12_{k}", "restart": 0, "code": code, "step": 40, "reason": "", "then": "over"}
            records[k].add("ended", values)
        slurm.says("squeue")

    ending = threading.Thread(target=end)
    ending.start()
    assert main(["stop", "12", "--wait"]) == 1  # one failed
    ending.join()
    assert capfd.readouterr().out.splitlines()[2:] == [
        "sweep/a is stopped at step 40; there is no checkpoint",
        "sweep/b is failed at step 40; there is no checkpoint",
    ]
    assert main(["stop", "sweep"]) == 0
    assert capfd.readouterr().out == "none of the 4 runs of sweep is under way: nothing is to be stopped\n"


def test_the_folder_of_all_runs_is_no_sweep(slurm: Fake, capfd: pytest.CaptureFixture[str]) -> None:
    make("a", "7", step=40)
    slurm.says("squeue", "7|RUNNING|N/A|N/A|n1|None\n")
    assert main(["stop", "runs"]) == 2
    assert capfd.readouterr() == ("", "error: runs holds all runs: name one, or a sweep, such as a\n")
    assert slurm.calls("scancel") == []


def test_a_job_that_ends_between_two_looks(slurm: Fake, capfd: pytest.CaptureFixture[str]) -> None:
    record = make("a", "12", step=40)
    record.add("began", {"job": "12", "restart": 0, "nodes": "n1"})
    events = record.path / "events.jsonl"
    until_now = events.read_text()
    record.add("ended", {"job": "12", "restart": 0, "code": 75, "step": 40, "reason": "", "then": "over"})
    after = events.rename(record.run / "after.jsonl")
    events.write_text(until_now)
    slurm.does("squeue", f'cp "{after.absolute()}" "{events.absolute()}"')
    assert state_of(record.run, capfd)["state"] == "stopped"


def test_a_job_that_is_gone_is_not_stopped(slurm: Fake, capfd: pytest.CaptureFixture[str]) -> None:
    record = make("a", "7", step=40)
    assert main(["stop", "a"]) == 0
    assert capfd.readouterr().out == "a is cancelled already, at step 40: nothing is to be stopped\n"
    assert slurm.calls("scancel") == []
    assert not record.stop.exists()


def test_a_writer_elsewhere_is_named(slurm: Fake, capfd: pytest.CaptureFixture[str]) -> None:
    writes(make("a", step=40))
    assert main(["stop", "a"]) == 2
    assert "a is written by process 4242 on n1: stop it there, by `kill -TERM 4242`" in capfd.readouterr().err
