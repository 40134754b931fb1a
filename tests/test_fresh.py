"""--fresh and --resume must, on real runs of two processes: what moves aside, what a restart keeps, what is said."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import runs

from distrib.surroundings import same_command

SHORT = [
    *runs.SMALL, "data.loader=synthetic", "data.synthetic.train=500", "data.synthetic.val=50", "train.steps=8",
    "schedule.warmup_epochs=0", "train.eval_every_epochs=1000", "log.every_steps=1", "checkpoint.every_steps=2",
]  # fmt: skip
LONG = [*SHORT, "train.steps=100000"]


def start(*words: str) -> subprocess.Popen[str]:
    environ = {name: value for name, value in os.environ.items() if name != "LOGLEVEL"}
    environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen(
        [sys.executable, *words], cwd=runs.ROOT, env=environ, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def launch(folder: Path, *words: str) -> subprocess.Popen[str]:
    return start("-m", "launch", "local", "--procs", "2", *words, f"run.dir={folder}")


def aside(folder: Path) -> list[Path]:
    """The folders into which --fresh has moved earlier runs."""
    return sorted(folder.parent.glob(f"{folder.name}.*"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 8 steps; not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    process = start("train.py", *SHORT, f"run.dir={folder}")
    printed = runs.finish(process)
    assert process.returncode == 0, printed
    return folder


def steps_saved(folder: Path) -> int:
    saved = [int(file.stem.partition("_")[2]) for file in (folder / "checkpoints").glob("step_*.pt")]
    return max(saved, default=0)


def test_what_continues_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "optim.lr=1"])
    assert same_command() == "the same command"
    monkeypatch.setattr(sys, "argv", ["train.py", "optim.lr=1", "--fresh"])
    assert same_command() == "the same command without --fresh"


def test_launch_starts_afresh_and_says_once_what_continues(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    process = launch(folder, *LONG, "--fresh")
    try:
        runs.wait_until(lambda: len(aside(folder)) == 1 and steps_saved(folder) > 8, process)
        process.send_signal(signal.SIGINT)
        printed = runs.finish(process)
    finally:
        if process.poll() is None:
            runs.kill_group(process)
    assert process.returncode == 75, printed
    (old,) = aside(folder)
    assert f"--fresh: the earlier run lies in {old}" in printed
    assert json.loads((old / "summary.json").read_text())["step"] == 8
    assert "continuing" not in printed
    assert printed.count("the same command") == 1
    assert printed.splitlines()[-1] == f"the same command without --fresh continues {folder}"

    stopped = json.loads((folder / "summary.json").read_text())["step"]
    words = [*LONG, f"train.steps={stopped + 2}", f"run.dir={folder}"]
    process = start("train.py", *words, "--resume", "must")
    printed = runs.finish(process)
    assert process.returncode == 0, printed
    assert f"step {stopped} of {stopped + 2}" in printed
    assert aside(folder) == [old]


def test_must_resume_refuses_an_empty_folder(tmp_path: Path) -> None:
    process = launch(tmp_path / "run", *SHORT, "--resume", "must")
    printed = runs.finish(process)
    assert process.returncode == 2, printed
    assert [line for line in printed.splitlines() if line.startswith("error: ")] == [
        f"error: --resume must: {tmp_path / 'run/checkpoints'} holds no checkpoint: see run.dir and run.name"
    ]


def test_a_restarted_worker_is_not_fresh_again(finished: Path, tmp_path: Path) -> None:
    """torchrun starts all ranks again with the words that were typed; --fresh then would cost what was trained."""
    folder = shutil.copytree(finished, tmp_path / "run")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr=localhost", "--nproc-per-node=2"]
    words = [*LONG, "train.steps=60", "--fresh", f"run.dir={folder}"]
    process = start(*torchrun, "--max-restarts=1", "--monitor-interval=0.1", "train.py", *words)
    try:
        runs.wait_until(lambda: len(aside(folder)) == 1 and steps_saved(folder) >= 10, process)
        os.kill(worker(process.pid, rank=1), signal.SIGKILL)
        printed = runs.finish(process)
    finally:
        if process.poll() is None:
            runs.kill_group(process)
    assert process.returncode == 0, printed
    assert len(aside(folder)) == 1  # the first start's
    assert printed.count("--fresh: the earlier run lies in") == 1
    assert "continuing" in printed
    assert json.loads((folder / "summary.json").read_text())["step"] == 60


def worker(torchrun: int, rank: int) -> int:
    """The process id of a rank of ``torchrun``, another process id."""
    for pid in runs.descendants(torchrun):
        if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return pid
    raise AssertionError(f"no rank {rank}")
