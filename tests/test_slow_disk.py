"""A disk that is slower than the saves are due: no rank waits for it, and the run ends as on a fast one."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import runs
from test_checkpoint import assert_same, make_state

from distrib import checkpoint
from distrib.checkpoint import Checkpointer, commit, load, steps_in

# Each file of a checkpoint takes as long as seven steps to reach the disk, and 3 s where no more steps come: the other
# ranks and the steps are as quick as ever. In steps, so that it is as slow beside them on a machine that is busy.
SLOW = """
import os, pathlib, threading, time
def fsync(file, ordinary=os.fsync):
    if threading.current_thread().name == "checkpoint" and os.fstat(file).st_mode & 0o100000:
        began = seen = steps()
        since = time.monotonic()
        while seen < began + 7 and time.monotonic() < since + 3:
            time.sleep(0.01)
            if steps() > seen:
                seen, since = steps(), time.monotonic()
    ordinary(file)
def steps():
    return pathlib.Path(os.environ["TRACE"]).read_bytes().count(b"\\n")
os.fsync = fsync
"""
SYNTHETIC = ["data.loader=synthetic", "data.synthetic.train=5000", "data.synthetic.val=50"]
PASSED = re.compile(r"is slow: step (\d+) is still being written, so the save of step (\d+) is passed over")


class Disk:
    """Writing a checkpoint ends when it is let go on, one by one."""

    def __init__(self) -> None:
        self.turns = threading.Semaphore(0)

    def commit(self, *args: Any) -> None:
        assert self.turns.acquire(timeout=60)
        commit(*args)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    made = Disk()
    monkeypatch.setattr(checkpoint, "commit", made.commit)
    yield made
    for _ in range(20):
        made.turns.release()


def until_written(made: Checkpointer, disk: Disk) -> None:
    """Lets all that is under way be written."""
    for _ in range(3):
        disk.turns.release()
    made.wait()
    while disk.turns.acquire(blocking=False):
        pass


def test_what_is_due_meanwhile_is_passed_over_and_told_once(tmp_path: Path, disk: Disk) -> None:
    notes: list[str] = []
    made = Checkpointer(tmp_path, 9, notes.append)
    assert made.save(make_state(1), 1, None)
    assert not made.overdue
    assert not made.save(make_state(2), 2, None)
    assert not made.save(make_state(3), 3, 1)
    assert not made.overdue  # not while it is being written
    until_written(made, disk)
    assert made.overdue
    assert made.save(make_state(4), 4, None)  # made up for
    assert not made.overdue
    assert not made.save(make_state(5), 5, None)
    (note,) = notes
    assert PASSED.search(note).groups() == ("1", "2")  # type: ignore[union-attr]
    until_written(made, disk)
    assert made.save(make_state(6), 6, None)
    until_written(made, disk)
    assert made.save(make_state(7), 7, None)  # at its time: the disk keeps up again
    assert not made.save(make_state(8), 8, None)
    assert len(notes) == 2
    until_written(made, disk)
    assert steps_in(tmp_path) == [7, 6, 4, 1]


def test_the_best_waits_its_turn_and_only_the_newest_of_them(tmp_path: Path, disk: Disk) -> None:
    notes: list[str] = []
    made = Checkpointer(tmp_path, 1, notes.append)
    made.save(make_state(1), 1, None)
    assert not made.save(make_state(2), 2, None)
    for step in (3, 4):
        state = make_state(step)
        assert made.save(state, step, best=step)
        state["progress"]["step"] = 99  # what is saved is what was there then
    assert not made.save(make_state(5), 5, best=4)
    until_written(made, disk)
    assert steps_in(tmp_path) == [4]
    assert_same(load(tmp_path / "best.pt"), make_state(4))
    assert made.overdue
    assert len(notes) == 1


def test_the_last_one_waits_and_says_so(tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SILENCE", 0.05)
    notes: list[str] = []
    made = Checkpointer(tmp_path, 9, notes.append, "me")
    (tmp_path / "step_00000001.pt.me.partial").write_bytes(b"as far as it has come")
    made.save(make_state(1), 1, None)
    threading.Timer(0.5, lambda: [(tmp_path / "step_00000001.pt.me.partial").unlink(), disk.turns.release()]).start()
    assert made.save(make_state(2), 2, None, last=True)
    until_written(made, disk)
    assert steps_in(tmp_path) == [2, 1]
    assert notes
    assert all(note == f"waiting for {tmp_path}: 0 MB of step 1 are written" for note in notes)
    assert len(notes) < 6  # each time twice as long


def test_whatever_a_save_dies_of_the_next_one_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    made = Checkpointer(tmp_path, 9, notes.append)

    def fail(*args: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "commit", fail)
        made.save(make_state(1), 1, None)
        assert made.wait() is None
    assert "was not saved: MemoryError" in notes[0]
    assert made.save(make_state(2), 2, None)
    assert made.wait() == 2


# The real train.py


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folders = {procs: tmp_path_factory.mktemp("undisturbed") / f"{procs}" for procs in (1, 2)}
    for procs, folder in folders.items():
        assert "passed over" not in runs.train(procs, folder, *SYNTHETIC)
    return folders


@pytest.mark.parametrize("procs", [1, 2])
def test_a_run_on_a_slow_disk_ends_with_the_same_bits(
    tmp_path: Path, undisturbed: dict[int, Path], monkeypatch: pytest.MonkeyPatch, procs: int
) -> None:
    folder = tmp_path / "run"
    monkeypatch.setenv("TRACE", str(folder / "trace" / "rank_00000.jsonl"))
    runs.change(tmp_path, monkeypatch, SLOW)
    printed = runs.train(procs, folder, *SYNTHETIC, "checkpoint.every_steps=3", "checkpoint.keep=99")
    assert len(PASSED.findall(printed)) == 1, printed
    saved = sorted(int(path.stem[5:]) for path in (folder / "checkpoints").glob("step_*.pt"))
    assert saved[0] == 3
    assert saved[-1] == 60
    assert len(saved) < 20  # due were that many
    assert (folder / "checkpoints" / "best.pt").exists()
    assert runs.digest(folder) == runs.digest(undisturbed[procs])
    assert runs.trace(folder, procs) == runs.trace(undisturbed[procs], procs)


def test_a_stop_while_a_save_is_being_written_is_saved_after_it(
    tmp_path: Path, undisturbed: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    monkeypatch.setenv("TRACE", str(folder / "trace" / "rank_00000.jsonl"))
    with monkeypatch.context() as patch:
        runs.change(tmp_path, patch, SLOW)
        process = runs.begin(2, folder, *SYNTHETIC, "checkpoint.every_steps=3")
        runs.wait_until(lambda: any(folder.glob("checkpoints/step_*.partial")), process)
        process.send_signal(signal.SIGTERM)
        printed = runs.finish(process)
    assert runs.exit_codes(folder) == [75, 75], printed
    steps = runs.steps_traced(folder)
    assert steps_in(folder / "checkpoints")[0] == steps < 60
    runs.train(2, folder, *SYNTHETIC)
    assert runs.digest(folder) == runs.digest(undisturbed[2])
    assert runs.trace(folder, 2) == runs.trace(undisturbed[2], 2)
