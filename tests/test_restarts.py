"""distrib.restarts and distrib.parent: crash loops end, and no worker outlives its torchrun."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import runs
import torch

from distrib import faults, parent
from distrib.faults import BAD_MACHINE, FAILED, Failure, report_exit
from distrib.lease import _born
from distrib.restarts import LIMIT, count_start, forget_starts
from distrib.runtime import Runtime

ALONE = Runtime(0, 1, 0, 1, torch.device("cpu"))
JOB = "torchrun, process 7 of here"


@pytest.fixture(autouse=True)
def _own_reports(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(faults, "_also", None)
    monkeypatch.delenv("DISTRIB_EXIT_CODE_FILE", raising=False)
    monkeypatch.setenv("RANK", "3")
    return


def start(folder: Path, step: int, restart: int, job: str = JOB, most: int = 100, **more: str) -> float:
    environ: Mapping[str, str] = {
        "TORCHELASTIC_RESTART_COUNT": str(restart),
        "TORCHELASTIC_MAX_RESTARTS": str(most),
        **more,
    }
    return count_start(ALONE, folder / "faults", job, step, environ)


def refused(folder: Path, step: int, restart: int, **more: str) -> str:
    with pytest.raises(Failure, match="given up") as caught:
        start(folder, step, restart, **more)
    assert (caught.value.code, caught.value.everywhere) == (BAD_MACHINE, True)
    return str(caught.value)


def test_starts_at_one_step_are_bounded(tmp_path: Path) -> None:
    for restart in range(LIMIT):
        start(tmp_path, 40, restart)
        report_exit(FAILED, "RuntimeError: no\nmemory")
        report_exit(FAILED, "another rank has left")
    line = refused(tmp_path, 40, LIMIT)
    assert line.startswith("given up at step 40: 3 starts in a row ended without a newer checkpoint.")
    assert "The last one: rank 3: RuntimeError: no memory." in line
    refused(tmp_path, 40, LIMIT + 1)


def test_starts_that_get_further_are_not(tmp_path: Path) -> None:
    for restart in range(30):
        start(tmp_path, 10 * (restart // LIMIT), restart)
    refused(tmp_path, 90, 30)


def test_an_older_step_is_another_step(tmp_path: Path) -> None:
    """The newest checkpoint was damaged: the run goes on from the one before."""
    for restart, step in enumerate([40, 40, 40, 30, 30, 30]):
        start(tmp_path, step, restart)
    refused(tmp_path, 30, 6)


def test_a_start_by_hand_or_of_another_job_begins_anew(tmp_path: Path) -> None:
    for restart in range(LIMIT):
        start(tmp_path, 40, restart)
    start(tmp_path, 40, 0)
    start(tmp_path, 40, 1)
    start(tmp_path, 40, 2, job="Slurm job 8")
    start(tmp_path, 40, 3, job="Slurm job 8")
    start(tmp_path, 40, 4, job="Slurm job 8")
    refused(tmp_path, 40, 5, job="Slurm job 8")


def test_our_agent_knows_of_killed_ranks(tmp_path: Path) -> None:
    reports = str(tmp_path / "reports")
    Path(f"{reports}.restarts").write_text("2026-11-27T12:00:00+0000 rank 1 was killed\n")
    for restart in range(LIMIT):
        start(tmp_path, 40, restart)
    assert "The last one: rank 1 was killed." in refused(tmp_path, 40, LIMIT, DISTRIB_EXIT_CODE_FILE=reports)


def test_silent_ranks_are_called_so(tmp_path: Path) -> None:
    for restart in range(LIMIT):
        start(tmp_path, 0, restart)
    assert "its ranks said nothing" in refused(tmp_path, 0, LIMIT)


def test_the_first_start_tells_when_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distrib.restarts.BEGAN", 1000.0)
    assert start(tmp_path, 0, 0) == 1000
    monkeypatch.setattr("distrib.restarts.BEGAN", 2000.0)
    assert start(tmp_path, 10, 1) == 1000
    assert start(tmp_path, 10, 0) == 2000


def test_what_nothing_starts_again_leaves_nothing(tmp_path: Path) -> None:
    start(tmp_path, 0, 0, most=0)
    count_start(ALONE, tmp_path / "faults", None, 0, {})
    assert list(tmp_path.iterdir()) == []
    start(tmp_path, 0, 0)
    report_exit(FAILED, "no")
    forget_starts(tmp_path / "faults")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "faults").write_text("")
    for restart in range(2 * LIMIT):
        start(tmp_path, 0, restart)


def test_restarts_are_torchruns() -> None:
    assert parent.restarts({}) == (0, 0)
    assert parent.restarts({"TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_MAX_RESTARTS": "5"}) == (2, 5)


# A process and its child, which asks for SIGTERM at its parent's end and says when it has come.

CHILD = """
import os, signal, sys, time
from distrib.parent import end_with_parent
signal.signal(signal.SIGTERM, lambda *_: (print("stops", flush=True), os._exit(0)))
end_with_parent(os.environ)
print("ready", flush=True)
time.sleep(float(sys.argv[1]))
print("outlives", flush=True)
"""
PARENT = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]]).wait()
"""


@pytest.mark.parametrize(("worker", "expected"), [(True, "stops"), (False, "outlives")])
def test_only_a_worker_of_torchrun_ends_with_its_parent(worker: bool, expected: str) -> None:
    """``nohup python train.py`` is to outlive its shell."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")}
    environ |= {"TORCHELASTIC_RUN_ID": "none"} if worker else {}
    seconds = "600" if worker else "1"
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD, seconds], cwd=runs.ROOT, env=environ, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.kill()
    assert process.stdout.read() == f"{expected}\n"  # to the child's end, which holds the pipe
    process.wait()


# The real train.py on two ranks


def test_workers_of_a_torchrun_that_was_killed_save_and_stop(tmp_path: Path) -> None:
    reference, folder = tmp_path / "reference", tmp_path / "run"
    runs.train(2, reference)
    process = runs.begin(2, folder)
    runs.wait_until(lambda: runs.steps_traced(folder) >= 13, process)
    left = [(pid, _born(pid)) for pid in runs.descendants(process.pid)]
    assert len(left) >= 2
    os.kill(process.pid, signal.SIGKILL)
    printed = runs.finish(process)  # to the end of all that hold its output
    assert runs.exit_codes(folder) == [75, 75], printed
    with contextlib.suppress(ProcessLookupError):  # of none that is alive
        assert not [pid for pid, born in left if born and _born(pid) == born]
    runs.train(2, folder)
    assert runs.digest(folder) == runs.digest(reference)
    assert runs.trace(folder, 2) == runs.trace(reference, 2)


DIES = """
import os
from distrib.engine.step import TrainStep

def step(self, batches, number, lr, **words):
    if os.environ["RANK"] == "1" and number == 12:
        raise RuntimeError("no such kernel")
    return ordinary(self, batches, number, lr, **words)

ordinary, TrainStep.__call__ = TrainStep.__call__, step
"""


def test_a_run_that_dies_at_one_step_each_time_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    runs.change(tmp_path, monkeypatch, DIES)
    monkeypatch.setenv("PET_MAX_RESTARTS", "100")  # torchrun's own variable
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    process = runs.begin(2, folder)
    printed = runs.finish(process)
    assert process.returncode == 1
    assert "error: given up at step 10: 3 starts in a row ended without a newer checkpoint." in printed
    assert "RuntimeError: no such kernel" in printed.partition("given up")[2]
    starts = 1 + LIMIT  # the first one saved at step 10
    assert printed.count("no such kernel") >= starts
    assert runs.exit_codes(folder).count(BAD_MACHINE) == 2
    assert sorted(set(runs.exit_codes(folder))) == [FAILED, BAD_MACHINE]
    assert len(runs.exit_codes(folder)) <= 2 * (starts + 1)
    assert runs.newest_checkpoint(folder).name == "step_00000010.pt"
