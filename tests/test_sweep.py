"""launch sweep on this machine: what it starts, and real sweeps."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sweeps import QUICK, ROOT, SWEEP, stand_in, starts, trained, wait_for

from distrib.cli import load_config
from distrib.lease import Lease
from launch.__main__ import main
from launch.sweep import here
from launch.sweep.plan import plan_sweep

__all__ = ["stand_in"]


def test_cores_are_shared_and_gpus_dealt_out(tmp_path: Path) -> None:
    environ = {"A": "1", "WANDB_RUN_ID": "x", "DISTRIB_EXIT_CODE_FILE": "y", "OMP_NUM_THREADS": "9"}
    assert here.make_slots(1, 2, environ, 8, ["0"]) == [{"A": "1", "OMP_NUM_THREADS": "9"}]

    def dealt(at_once: int, procs: int, gpus: list[str]) -> list[str | None]:
        slots = here.make_slots(at_once, procs, environ, 8, gpus)
        assert {slot["OMP_NUM_THREADS"] for slot in slots} == {str(max(1, 8 // (at_once * procs)))}
        return [slot.get("CUDA_VISIBLE_DEVICES") for slot in slots]

    assert dealt(2, 1, []) == [None, None]
    assert dealt(2, 2, ["0", "1", "2", "3"]) == ["0,1", "2,3"]
    assert dealt(3, 1, ["4", "7"]) == ["4", "7", "4"]
    assert dealt(2, 4, ["0", "1"]) == [None, None]  # launch tells that they are too few
    for name in ("nvidia0", "nvidia3", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    assert here.visible_gpus({}, tmp_path) == ["0", "1"]
    assert here.visible_gpus({"CUDA_VISIBLE_DEVICES": "GPU-a,3"}, tmp_path) == ["GPU-a", "3"]
    assert here.visible_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == []


def test_one_process_is_train_py_and_several_are_launch_local(tmp_path: Path) -> None:
    element = plan_sweep(QUICK, ["seed=0,1"]).elements[1]
    train = tmp_path / "train.py"
    assert here.command_of(QUICK, element, 1, train) == (
        sys.executable, str(train), "--config", QUICK, *element.words,
    )  # fmt: skip
    assert here.command_of(QUICK, element, 4, train) == (
        *(sys.executable, "-m", "launch", "local", "--procs", "4", "--config", QUICK), *element.words,
    )  # fmt: skip


def test_a_sweep_and_again(
    stand_in: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "runs"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setenv("WANDB_RUN_ID", "of-the-sweep")
    words = ["sweep", "--config", QUICK, f"run.dir={runs}", "--at-once", "2", "optim.lr=0.5,1"]
    assert main([*words, "seed=0,1"], stand_in) == 0
    out, err = capfd.readouterr()
    assert err.splitlines()[0] == f"quickstart-sweep: 4 runs in {runs}: 4 waiting"
    assert sorted(line.partition(" ")[0] for line in err.splitlines()[1:]) == ["1/4", "2/4", "3/4", "4/4"]
    assert out == (runs / "table.md").read_text()
    assert "| 0.5 | 2 | 5.50 ± 0.71 | 6.00 | 0.5000 ± 0.0000 | " in out
    values = json.loads((runs / "table.json").read_text())
    assert [row["top1"]["mean"] for row in values["rows"]] == [5.5, 10.5]
    assert set(starts(runs).values()) == {1}
    found = [file.read_text().split() for file in runs.glob("*/starts")]
    assert {gpus for _, _, gpus, _ in found} == {"4", "7"}
    assert {wandb_id for _, _, _, wandb_id in found} == {"None"}

    # Again, nothing is started; with more values, those alone.
    assert main([*words, "seed=0,1"], stand_in) == 0
    again, err = capfd.readouterr()
    assert (again, err) == (out, f"quickstart-sweep: 4 runs in {runs}: 4 finished\n")
    assert main([*words[:-1], "optim.lr=0.5,1,2", "seed=0..2"], stand_in) == 0
    assert starts(runs) == {f"lr={lr},seed={seed}": 1 for lr in ("0.5", "1", "2") for seed in (0, 1, 2)}
    capfd.readouterr()

    # Other settings under the same names are refused, and nothing is touched.
    assert main([*words, "seed=0,1", "train.epochs=3"], stand_in) == 2
    err = capfd.readouterr().err
    assert "lr=0.5,seed=0 was trained with train.epochs 8.0, and now it is 3.0" in err
    assert err.count("\n") == 1


def test_a_run_that_fails_or_diverges_leaves_the_others(
    stand_in: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    words = ["sweep", "--config", QUICK, f"run.dir={runs}", "optim.lr=3,4,1"]
    assert main(words, stand_in) == 1
    out, err = capfd.readouterr()
    assert "lr=3,seed=0: error: no such data\nit ended with 1; " in err
    assert "lr=4,seed=0: diverged: its loss is no number\n" in err
    assert err.endswith("error: 1 of 3 runs failed: lr=3,seed=0\n")
    assert [line.split("|")[-2].strip() for line in out.splitlines()[4:7]] == ["1 failed", "1 diverged", "1 finished"]
    # What failed is tried again, what diverged is not.
    (runs / "lr=3,seed=0" / "mended").touch()
    assert main(words, stand_in) == 0
    assert starts(runs) == {"lr=1,seed=0": 1, "lr=3,seed=0": 2, "lr=4,seed=0": 1}


@contextmanager
def sweeping(stand_in: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """``launch sweep`` in a process group of its own, as a shell's job is; all of it has ended after the block."""
    process = subprocess.Popen(
        [sys.executable, "-c", SWEEP, str(stand_in), "sweep", "--config", QUICK, *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=60)


def test_ctrl_c_saves_what_runs(stand_in: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    with sweeping(stand_in, f"run.dir={runs}", "optim.lr=5,1", "seed=0,1") as process:
        wait_for(runs / "lr=5,seed=0" / "ready")
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "SIGINT: asking the workers to save and stop\n" in err
    assert "lr=5,seed=0: stopped, everything is saved\n" in err
    assert err.endswith("stopped; the same command goes on\n")
    assert "| 5 | 0 | 1 unfinished, 1 waiting |" in out
    assert starts(runs) == {"lr=5,seed=0": 1}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for it")
def test_runs_save_though_the_sweep_was_killed(stand_in: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    with sweeping(stand_in, f"run.dir={runs}", "optim.lr=5,1") as process:
        wait_for(runs / "lr=5,seed=0" / "ready")
        process.kill()
        wait_for(runs / "lr=5,seed=0" / "summary.json")
    assert json.loads((runs / "lr=5,seed=0" / "summary.json").read_text())["status"] == "stopped"


def test_a_run_that_somebody_else_trains_is_left_alone(
    stand_in: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    words = ["optim.lr=0.5,1", f"run.dir={runs}"]
    sweep = plan_sweep(QUICK, words)
    trained(sweep.elements[0].folder, sweep)
    lease = Lease(sweep.elements[0].folder).acquire()
    assert main(["sweep", "--config", QUICK, *words], stand_in) == 0
    lease.release()
    out, err = capfd.readouterr()
    assert starts(runs) == {"lr=1,seed=0": 1}
    assert "| 0.5 | 0 |  |  |  | 1 running |" in out
    assert err.endswith("1 of 2 runs are queued or trained elsewhere: left alone\n")


def test_listing_and_the_table_start_nothing(stand_in: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    words = ["sweep", "--config", QUICK, f"run.dir={runs}", "optim.lr=1,2", "data.root=/nowhere"]
    assert main([*words, "--dry-run"], stand_in) == 0
    listed = capfd.readouterr().out.splitlines()
    assert [line.split() for line in listed[::2]] == [["waiting", "lr=1,seed=0"], ["waiting", "lr=2,seed=0"]]
    assert f"{stand_in} --config {QUICK} data.root=/nowhere optim.lr=1 " in listed[1]
    assert main([*words, "--table"], stand_in) == 0
    assert "| 1 | 0 | 1 waiting |" in capfd.readouterr().out
    assert not runs.exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["seed=0,1", "data.root=/nowhere"], "no data at /nowhere/train"),
        (["data.root=[sample:fashion-mnist|/nowhere]"], "no data at /nowhere/train"),
        (["train.global_batch=64,2", "--procs", "4"], "train.global_batch 2 is smaller than the 4 processes"),
        (["seed=0,1", "--name", "a/b"], "--name a/b: a name is made of"),
        (["seed=0,1", "--fresh"], "leave it out, or give another --name"),
        (["seed=0,1", "--slurm", "a=b"], "--slurm goes with --on-slurm"),
        (["seed=0,1", "--profile", "launch.yaml"], "--profile goes with --on-slurm"),
        (["seed=0,1", "--data-on-nodes"], "--data-on-nodes goes with --on-slurm"),
        (["seed=0,1", "--on-slurm", "--procs", "1"], "with --on-slurm, give --nodes and --gpus-per-node in its stead"),
        (["seed=0,1", "--on-slurm", "--at-once", "2"], "with --on-slurm, give --at-most in its stead"),
        (["seed=0,1", "--at-once", "0"], "'0' is not a whole number of 1 or more"),
        (["seed=0,1", "--procs=two"], "'two' is not a whole number of 1 or more"),
        (["--seed", "0..1"], "write run.seed=0..1"),
        (["seed=0,1", "run.dir=/proc/x"], "cannot make /proc/x"),
    ],
)
def test_mistakes_before_anything_starts(
    words: list[str], told: str, stand_in: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", "--config", QUICK, f"run.dir={tmp_path / 'runs'}", *words], stand_in) == 2
    out, err = capfd.readouterr()
    assert told in err
    assert err.startswith("error: ") or "cannot make" in told
    assert err.count("error: ") == 1
    assert out == ""
    assert not (tmp_path / "runs").exists()


def test_folders_of_others_are_left_as_they_are(
    stand_in: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["sweep", "--config", QUICK, "seed=0,1", f"run.dir={tmp_path}"]
    (tmp_path / "table.md").write_text("mine")
    assert main(words, stand_in) == 2
    assert "table.md is not a sweep's" in capfd.readouterr().err
    (tmp_path / "table.md").unlink()
    (tmp_path / "table.json").write_text('{"sweep": "a"}')
    assert main([*words, "--name", "b"], stand_in) == 2
    assert "is the folder of the sweep a: set run.dir, or give --name a to go on" in capfd.readouterr().err
    assert (tmp_path / "table.json").read_text() == '{"sweep": "a"}'
    (tmp_path / "table.json").unlink()
    (tmp_path / "config.yaml").write_text("")
    assert main(words, stand_in) == 2
    assert "is the folder of a run" in capfd.readouterr().err
    assert starts(tmp_path) == {}


# Real training


SHORT = (
    "--config", QUICK, "data.loader=torchvision", "data.fraction=0.02", "data.size=16", "data.eval_resize=16",
    "data.workers=1", "train.global_batch=20", "train.epochs=2", "schedule.warmup_epochs=0.5", "log.every_steps=2",
    "optim.lr=0.05,0.1,0.2", "seed=0,1", "--at-once", "2",
)  # fmt: skip


def test_three_by_two_interrupted_and_resumed(tmp_path: Path) -> None:
    runs = tmp_path / "runs" / "short"
    environ = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "launch", "sweep", *SHORT, "--name", "short"]

    def sweep() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=500, check=False
        )

    process = subprocess.Popen(
        command, cwd=tmp_path, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(runs / "lr=0.05,seed=0" / "metrics.jsonl")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 75, err
    assert len(list(runs.glob("lr=*"))) < 6
    assert "waiting" in out

    done = sweep()
    assert done.returncode == 0, done.stderr
    assert done.stdout == (runs / "table.md").read_text()
    summaries = {file.parent.name: json.loads(file.read_text()) for file in runs.glob("*/summary.json")}
    assert sorted(summaries) == [f"lr={lr},seed={seed}" for lr in ("0.05", "0.1", "0.2") for seed in (0, 1)]
    rows = json.loads((runs / "table.json").read_text())["rows"]
    for row, lr in zip(rows, ("0.05", "0.1", "0.2"), strict=True):
        own = [summaries[f"lr={lr},seed={seed}"] for seed in (0, 1)]
        assert all(summary["status"] == "finished" and summary["step"] == 14 for summary in own)
        a, b = (summary["top1"] for summary in own)
        assert row["settings"] == {"optim.lr": lr}
        assert row["top1"]["mean"] == pytest.approx((a + b) / 2)
        assert row["top1"]["standard_deviation"] == pytest.approx(abs(a - b) / 2**0.5)
        assert row["loss"]["mean"] == pytest.approx(statistics.mean(summary["loss"] for summary in own))
        assert f"| {lr} | 2 | " in done.stdout
        config = load_config(runs / f"lr={lr},seed=1" / "config.yaml")
        assert (config.optim.lr, config.run.seed, config.wandb.group) == (float(lr), 1, "short")
    assert sum(row["best"] for row in rows) == 1

    # Each run wrote one line a step that it logged, in spite of the stop.
    for name in summaries:
        lines = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
        steps = [line["step"] for line in lines if line["kind"] == "train"]
        assert steps == sorted(set(steps))
        assert steps[-1] == 14

    before = {file: file.stat().st_mtime_ns for file in runs.glob("*/summary.json")}
    again = sweep()
    assert (again.returncode, again.stdout) == (0, done.stdout)
    assert again.stderr == "short: 6 runs in runs/short: 6 finished\n"
    assert {file: file.stat().st_mtime_ns for file in runs.glob("*/summary.json")} == before
