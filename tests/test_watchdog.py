"""distrib.watchdog: a rank that hangs is ended, with the stacks of all ranks, and the run goes on to the bit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import runs

from distrib.config import Config
from distrib.watchdog import (
    EVALUATION,
    HEAD,
    MARK,
    SAVE,
    START,
    TRAINING,
    Watchdog,
    limit_seconds,
    record_collectives,
)

MINUTES = 60.0


@pytest.mark.parametrize("phase", [START, SAVE, TRAINING, EVALUATION])
def test_what_was_not_seen_yet_may_take_what_a_collective_may(phase: str) -> None:
    assert limit_seconds(phase, None, "auto", 10) == 30 * MINUTES
    assert limit_seconds(phase, None, "auto", 60) == 65 * MINUTES
    assert limit_seconds(phase, None, 0.2, 0.1) == 30 * MINUTES
    assert limit_seconds(phase, None, 90.0, 10) == 90 * MINUTES


def test_the_limit_follows_the_longest_interval() -> None:
    assert limit_seconds(TRAINING, 0.03, "auto", 10) == 15 * MINUTES
    assert limit_seconds(TRAINING, 3 * MINUTES, "auto", 10) == 15 * MINUTES
    assert limit_seconds(EVALUATION, 3.1 * MINUTES, "auto", 10) == 30 * MINUTES
    assert limit_seconds(TRAINING, 0.03, 0.5, 0.1) == 30
    for longest in (0.0, 10.0, 1000.0):  # a save may wait for a disk, however quick the last ones were
        assert limit_seconds(SAVE, longest, "auto", 10) == 30 * MINUTES


@pytest.mark.parametrize("longest", [0.001, 1.0, 60.0, 600.0, 6000.0])
@pytest.mark.parametrize("wait", [0.0, 10.0, 25.0, 600.0])
def test_no_limit_is_below_what_is_legitimate(longest: float, wait: float) -> None:
    for phase in (START, TRAINING, EVALUATION, SAVE):
        assert limit_seconds(phase, longest, "auto", wait) > 60 * wait
        assert phase in (START, SAVE) or limit_seconds(phase, longest, "auto", wait) >= 5 * longest


def test_a_limit_within_the_wait_for_images_is_a_mistake() -> None:
    with pytest.raises(ValueError, match=r"train\.hang_minutes 10 is not above data\.wait_minutes 10"):
        Config.model_validate({"train": {"hang_minutes": 10}})
    assert Config.model_validate({"train": {"hang_minutes": 10}, "data": {"wait_minutes": 1}}).train.hang_minutes == 10
    assert Config.model_validate({"train": {"hang_minutes": None}}).train.hang_minutes is None


def test_a_rank_without_a_fault_leaves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "faults" / "rank_00000.txt"
    watchdog = Watchdog(file, 7, "auto", 10)
    watchdog.beat(8, TRAINING)
    line = file.read_bytes()
    assert len(line) == HEAD
    assert line.startswith(MARK.encode())
    assert f"process {os.getpid()}, step 7, start, limit 1800 s" in line.decode()
    watchdog.close()
    watchdog.close()
    assert not file.parent.exists()


def test_stacks_of_earlier_starts_stay_and_lines_without_stacks_go(tmp_path: Path) -> None:
    file, earlier = tmp_path / "rank_00000.txt", f"{MARK}earlier\nstacks\n"
    killed = f"{MARK}of a start that was killed".ljust(HEAD - 1) + "\n"
    file.write_text(earlier + killed)
    watchdog = Watchdog(file, 5, "auto", 10)
    assert file.stat().st_size == len(earlier) + HEAD
    assert "step 5, start" in file.read_text()
    watchdog.close()
    assert file.read_text() == earlier


def test_one_that_was_replaced_leaves_its_successors_file(tmp_path: Path) -> None:
    """As on a node that was cut off while its job was queued again, and comes back."""
    file = tmp_path / "faults" / "rank_00000.txt"
    watchdog = Watchdog(file, 3, "auto", 10)
    other = "=== 2026-11-27T10:00:00+0000 host node17, process 4242, step 5, training, limit 900 s"
    file.write_text(f"{other:<199}\n")  # who comes later takes the line of one without stacks
    watchdog.close()
    assert file.read_text().startswith(other)


def test_no_watch_leaves_no_file(tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path / "faults" / "rank_00000.txt", 0, None, 10)
    watchdog.beat(1, TRAINING)
    watchdog.close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "faults").write_text("")
    watchdog = Watchdog(tmp_path / "faults" / "rank_00000.txt", 0, "auto", 10)
    watchdog.close()
    assert "warning: no stacks in" in capsys.readouterr().err


def test_what_the_user_said_to_torch_stays(tmp_path: Path) -> None:
    environ = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "9", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "/mine"}
    record_collectives(tmp_path, environ)
    assert environ == {
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "9",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "/mine",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }
    environ = {}
    record_collectives(tmp_path, environ)
    assert environ["TORCH_FR_DUMP_TEMP_FILE"] == f"{tmp_path}/nccl_"


# The real train.py on two ranks. At its first start rank 1 hangs in the 29th step: five beats after the last save.

HANGS = """
import ctypes, os, time
import distrib.watchdog as watchdog
from distrib.engine.step import TrainStep

watchdog.GRACE, watchdog.BACKSTOP = 2.0, 5.0

def {name}():
    {hang}

def step(self, batches, number, lr, **words):
    if (os.environ["RANK"], number, os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", 28, "0"):
        time.sleep(2.5)  # so that the watchdog has looked since the last save, after which it waits for longer
        {name}()
    return ordinary(self, batches, number, lr, **words)

ordinary, TrainStep.__call__ = TrainStep.__call__, step
"""
# C code that keeps Python's lock, and that torchrun's SIGTERM does not wake as it would a sleep: a mutex taken twice.
LOCKED = "lib, mutex = ctypes.PyDLL(None), bytes(64); lib.pthread_mutex_lock(mutex); lib.pthread_mutex_lock(mutex)"
LIMIT = ["data.wait_minutes=0.1", "train.hang_minutes=0.2"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    runs.train(2, folder)
    assert not (folder / "faults").exists()
    return folder


@pytest.mark.parametrize(
    ("name", "hang", "holds"),
    [("sleeps_for_ever", "time.sleep(600)", False), ("holds_the_lock", LOCKED, True)],
    ids=["sleeps", "holds the lock"],
)
def test_a_rank_that_hangs_is_ended_and_the_run_goes_on(
    name: str, hang: str, holds: bool, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    runs.change(tmp_path, monkeypatch, HANGS.format(name=name, hang=hang))
    monkeypatch.setenv("PET_MAX_RESTARTS", "1")  # torchrun's own variable
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    printed = runs.train(2, folder, *LIMIT)
    stacks = [(folder / "faults" / f"rank_{rank:05d}.txt").read_text() for rank in range(2)]
    for text in stacks:
        assert text.startswith(MARK)
        assert text.count(MARK) == 1
        assert ", limit 12 s" in text.splitlines()[0]
    assert f" in {name}\n" in stacks[1]
    assert " in loop\n" in stacks[0]
    assert name not in stacks[0]
    assert "after step 28 (training)" in printed
    assert "step 28, training" in stacks[0].splitlines()[0]
    assert ("Timeout (" in stacks[1]) == holds  # faulthandler's own word, where Python had none
    assert sorted(file.name for file in (folder / "faults").iterdir()) == ["rank_00000.txt", "rank_00001.txt"]
    assert runs.exit_codes(folder) == ([1, 0, 0] if holds else [1, 1, 0, 0])
    assert runs.digest(folder) == runs.digest(undisturbed)
    assert runs.trace(folder, 2) == runs.trace(undisturbed, 2)
