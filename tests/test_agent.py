"""launch.agent: torchrun that restarts workers, but not those that stopped on request or found a mistake."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.command import EXIT_CODE_FILE, SIGNALS

ROOT = Path(__file__).resolve().parent.parent

# Each start of each rank leaves a file; PLAN says what rank 1 does at its first start. Later ones finish.
WORKER = """
import os, signal, sys, time
from pathlib import Path

rank, notes, plan = int(os.environ["RANK"]), Path(os.environ["NOTES"]), os.environ["PLAN"]
got = []
for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"):
    signal.signal(getattr(signal, name), lambda number, frame: got.append(number))
start = len(list(notes.glob(f"start{rank}.*")))
(notes / f"start{rank}.{start}").touch()

def leave(code, message=""):
    with open(os.environ["DISTRIB_EXIT_CODE_FILE"], "a") as file:
        file.write(f"{rank} {code} {message}\\n")
    sys.exit(1 if code in (3, 4) else code)

while not (notes / f"start{1 - rank}.{start}").exists():
    time.sleep(0.01)
if plan == "finish" or start > 0:
    leave(0)
if plan == "kill" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if plan == "fail" and rank == 1:
    leave(1, "no memory")
if plan in ("75", "2", "3", "4"):
    time.sleep(0 if rank else 1)  # one is always first
    leave(int(plan))
deadline = time.monotonic() + 60
while not got and time.monotonic() < deadline:
    time.sleep(0.01)
time.sleep(2)  # a save, in which more signals come
leave(75 if got and plan == "wait" else 1)
"""


def agent(folder: Path, plan: str, restarts: int = 1) -> subprocess.Popen[str]:
    (folder / "worker.py").write_text(WORKER)
    words = ["--standalone", "--local-addr=localhost", "--nproc-per-node=2", f"--max-restarts={restarts}"]
    words += [f"--signals-to-handle={','.join(SIGNALS)}", "--shutdown-timeout=60", str(folder / "worker.py")]
    environ = os.environ | {
        "PLAN": plan,
        "NOTES": str(folder),
        EXIT_CODE_FILE: str(folder / "reports"),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "launch.agent", *words],
        cwd=ROOT,
        env=environ,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def starts(folder: Path) -> int:
    return len(list(folder.glob("start0.*")))


@pytest.mark.parametrize(("plan", "reason"), [("kill", "rank 1 was killed"), ("fail", "rank 1: no memory")])
def test_a_worker_that_fails_is_started_again(plan: str, reason: str, tmp_path: Path) -> None:
    process = agent(tmp_path, plan)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert starts(tmp_path) == 2
    assert reason in (tmp_path / "reports.restarts").read_text()
    assert f"workers are started again: {reason}" in err
    assert sorted((tmp_path / "reports").read_text().split("\n")) == ["", "0 0 ", "1 0 "]  # of the last start alone


@pytest.mark.parametrize("plan", ["75", "2", "3", "4"])
def test_a_worker_that_would_end_so_again_is_not(plan: str, tmp_path: Path) -> None:
    """Which stopped, found a mistake, diverged, or found a bad machine."""
    process = agent(tmp_path, plan, restarts=3)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert starts(tmp_path) == 1
    assert not (tmp_path / "reports.restarts").exists()
    assert {line.split()[1] for line in (tmp_path / "reports").read_text().splitlines()} == {plan}
    assert "Traceback" not in err


def test_a_killed_worker_is_reported_for(tmp_path: Path) -> None:
    process = agent(tmp_path, "kill", restarts=0)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert "1 1 rank 1 was killed by SIGKILL" in (tmp_path / "reports").read_text().splitlines()


def test_one_of_many_signals_is_heeded(tmp_path: Path) -> None:
    process = agent(tmp_path, "wait", restarts=3)
    deadline = time.monotonic() + 60
    while starts(tmp_path) == 0 or not (tmp_path / "start1.0").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.5)
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR2):
        process.send_signal(number)
        time.sleep(0.3)
    _, err = process.communicate(timeout=120)
    assert sorted((tmp_path / "reports").read_text().splitlines()) == ["0 75 ", "1 75 "], err
    assert starts(tmp_path) == 1
    assert "Traceback" not in err
