"""Runs of the real train.py in real processes, and what the tests compare of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import distrib.digest

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 180

# Small and quick, but with everything that a step may depend on: EMA, accumulation, an uneven last slice, evaluation
# in mid-epoch, several saves, real JPEGs.
SMALL = [
    "--config",
    "configs/quickstart.yaml",
    "data.size=16",
    "data.eval_resize=16",
    "data.eval_size=16",
    "data.workers=1",
    "train.global_batch=50",
    "train.micro_batch=20",
    "train.steps=60",
    "train.eval_every_epochs=0.15",  # each 24 steps
    "schedule.warmup_epochs=0.1",
    "checkpoint.every_steps=10",
    "log.every_steps=5",
    "ema.decay=0.9",
    "trace=true",
]


def command(procs: int, *words: str) -> list[str]:
    if procs == 1:
        return [sys.executable, str(ROOT / "train.py"), *words]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr=localhost", f"--nproc-per-node={procs}"]
    signals = "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1,SIGUSR2"
    return [sys.executable, *torchrun, signals, str(ROOT / "train.py"), *words]


def change(folder: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    """Runs of this test are those of a train.py before which ``line`` of Python was executed."""
    program, train = folder / "changed.py", str(ROOT / "train.py")
    program.write_text(
        f"import runpy, sys\n{line}\nsys.argv[0] = {train!r}\nrunpy.run_path({train!r}, run_name='__main__')\n"
    )
    ordinary = command
    monkeypatch.setitem(
        globals(), "command", lambda *args: [str(program) if word == train else word for word in ordinary(*args)]
    )
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def begin(procs: int, folder: Path, *words: str) -> subprocess.Popen[str]:
    """Starts a run in a session of its own, so that all of it can be killed."""
    environ = os.environ | {
        "OMP_NUM_THREADS": "1",
        "DISTRIB_EXIT_CODE_FILE": str(folder.parent / f"{folder.name}.exit"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    return subprocess.Popen(
        command(procs, *SMALL, f"run.dir={folder}", *words),
        cwd=ROOT,
        env=environ,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Waits for a run; returns what it printed."""
    try:
        return process.communicate(timeout=TIMEOUT)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"no end within {TIMEOUT} s:\n{process.communicate()[0]}") from None


def train(procs: int, folder: Path, *words: str) -> str:
    """A run that must finish; returns what it printed."""
    process = begin(procs, folder, *words)
    printed = finish(process)
    assert process.returncode == 0, printed
    return printed


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def steps_traced(folder: Path) -> int:
    path = folder / "trace" / "rank_00000.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def exit_codes(folder: Path) -> list[int]:
    """What each rank reported as it ended, over all starts of a run."""
    path = folder.parent / f"{folder.name}.exit"
    return [int(line.split()[1]) for line in path.read_text().splitlines()] if path.exists() else []


def kill_group(process: subprocess.Popen[str]) -> None:
    """SIGKILL for a run and everything it started: torchrun gives each worker a session of its own."""
    for pid in [process.pid, *descendants(process.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()


def descendants(pid: int) -> list[int]:
    """The process ids of all that a process has started, and theirs."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


def newest_checkpoint(folder: Path) -> Path:
    return max((folder / "checkpoints").glob("step_*.pt"))


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of each part of the final checkpoint: weights, buffers with the ranks' statistics, optimizer, EMA."""
    saved = torch.load(newest_checkpoint(folder), weights_only=True)
    assert saved["progress"]["step"] == 60
    return distrib.digest.digest(saved)


def trace(folder: Path, procs: int) -> list[list[dict[str, Any]]]:
    """The ranks' trace lines."""
    files = [folder / "trace" / f"rank_{rank:05d}.jsonl" for rank in range(procs)]
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def global_batches(folder: Path, procs: int) -> dict[int, list[tuple[int, int]]]:
    """For each step, (sample, checksum of its draws) over the ranks, in the ranks' order."""
    batches: dict[int, list[tuple[int, int]]] = {}
    for lines in trace(folder, procs):
        for line in lines:
            pairs = zip(line["ids"], line["draws"], strict=True)
            batches.setdefault(line["step"], []).extend(pairs)
    return batches


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]
