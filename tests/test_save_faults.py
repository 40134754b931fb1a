"""Saves that fail or die at every system call, and disks that do so: the old checkpoint or the new one is whole."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import failing
import pytest
import runs
import torch
from failing import KILL, Strike
from test_checkpoint import assert_same, make_state

from distrib.checkpoint import Checkpointer, commit, load, newest_valid, path_for, steps_in

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT_ONLY = pytest.mark.skipif(os.getuid() != 0, reason="only root may mount a small disk")


def state(step: int) -> dict[str, Any]:
    return make_state(step, width=64)


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("before") / "checkpoints"
    made = Checkpointer(folder, 2, pytest.fail)
    for step in (1, 2):
        made.save(state(step), step, best=step)
        made.wait()
    return folder


def in_child(call: Callable[[], object]) -> tuple[int, Any]:
    """Runs ``call`` in a process of its own: its status as ``waitpid`` has it, and what it returned, if it did."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        write, leave = os.write, os._exit
        try:
            write(writer, json.dumps(call()).encode())
            leave(0)
        except BaseException:
            traceback.print_exc()
            leave(99)
    os.close(writer)
    with open(reader, "rb") as stream:
        answer = stream.read()
    status = os.waitpid(child, 0)[1]
    return status, json.loads(answer) if answer else None


def saving(folder: Path, strike: Strike) -> dict[str, Any]:
    """Saves step 3, for a child: the newest step that is saved, what was said, and the calls that it took."""
    notes: list[str] = []
    made = Checkpointer(folder, 2, notes.append, writer="me")
    failing.install(strike)
    made.save(state(3), 3, best=2)
    saved = made.wait()
    return {"saved": saved, "notes": notes, "calls": strike.calls}


def check(folder: Path, told: dict[str, Any] | None, what: str) -> int:
    """The newest checkpoint is an old one or the new one, whole, and the next start goes on; which one it is."""
    damaged: list[str] = []
    path = newest_valid(folder, damaged.append)
    assert path is not None, what
    step = int(path.stem[5:])
    assert (step in (2, 3), damaged) == (True, []), what
    assert_same(load(path), state(step))
    if told is not None:
        assert told["saved"] in (None, 3), what
        assert step == 3 or told["saved"] is None, what
        assert len(told["notes"]) == (told["saved"] is None), what
    again = Checkpointer(folder, 2, pytest.fail, writer="next")
    assert not list(folder.glob("*.partial")), what
    again.save(state(4), 4, best=4)
    assert again.wait() == 4, what
    assert steps_in(folder)[0] == 4, what
    assert {(folder / name).resolve().name for name in ("last.pt", "best.pt")} == {"step_00000004.pt"}, what
    return step


@pytest.fixture(scope="module")
def calls(before: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """All that a save asks of the operating system, in order."""
    folder = shutil.copytree(before, tmp_path_factory.mktemp("calls") / "c", symlinks=True)
    status, told = in_child(lambda: saving(folder, Strike(0, KILL)))
    assert (status, told["saved"], told["notes"]) == (0, 3, [])
    assert {*failing.CALLS, "write"} == set(told["calls"])
    assert told["calls"].count("write") >= 5
    return told["calls"]


@pytest.mark.parametrize(
    ("how", "times"), [("ENOSPC", 1), ("EIO", 1), ("EROFS", 10**6), (KILL, 1)], ids=["ENOSPC", "EIO", "EROFS", KILL]
)
def test_a_save_that_fails_or_dies_at_any_call(
    before: Path, calls: list[str], tmp_path: Path, how: str, times: int
) -> None:
    """EROFS: from this call on nothing more can be written."""
    found = set()
    for at, name in enumerate(calls, 1):
        folder = shutil.copytree(before, tmp_path / f"{at}", symlinks=True)
        strike = Strike(at, how, times=times)
        status, told = in_child(lambda: saving(folder, strike))  # noqa: B023  it is called here and now
        assert status == (9 if how == KILL else 0), (at, name)
        found.add(check(folder, told, f"{how} at call {at}, {name}"))
    assert found == {2, 3}


def test_a_link_that_could_not_be_moved_is_moved_by_the_next_save(before: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(before, tmp_path / "c", symlinks=True)

    def save_twice() -> list[str]:
        notes: list[str] = []
        made = Checkpointer(folder, 2, notes.append, writer="me")
        failing.install(Strike(2, "EIO", "replace"))  # the first gives the checkpoint its name
        links = []
        for step in (3, 4):
            made.save(state(step), step, best=2)
            made.wait()
            links.append(os.readlink(folder / "last.pt"))
        return [*links, *notes]

    assert in_child(save_twice) == (0, ["step_00000002.pt", "step_00000004.pt"])
    assert not list(folder.glob("*.partial"))


# Disks


def mount(folder: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)


@ROOT_ONLY
@pytest.mark.parametrize("what", ["full", "read-only"])
def test_a_disk_that_takes_nothing_for_a_while(small_disk: Path, what: str) -> None:
    notes: list[str] = []
    made = Checkpointer(small_disk, 2, notes.append)
    made.save(make_state(1), 1, None)
    assert made.wait() == 1
    filler = small_disk / "filler"
    if what == "full":
        free = os.statvfs(small_disk)
        filler.write_bytes(bytes(free.f_bavail * free.f_frsize - 4096))
    else:
        mount(small_disk, "ro")
    for step in (2, 3):
        made.save(make_state(step), step, None)
        assert made.wait() == 1
    assert [("No space left" in note) or ("Read-only file system" in note) for note in notes] == [True, True]
    assert newest_valid(small_disk, pytest.fail) == path_for(small_disk, 1)
    if what == "full":
        filler.unlink()
    else:
        mount(small_disk, "rw")
    made.save(make_state(4), 4, None)
    assert made.wait() == 4
    assert not list(small_disk.glob("*.partial"))


def test_a_folder_in_the_place_of_a_checkpoint(before: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(before, tmp_path / "c", symlinks=True)
    (path_for(folder, 3) / "mine").mkdir(parents=True)
    notes: list[str] = []
    assert newest_valid(folder, notes.append) == path_for(folder, 2)
    assert "Is a directory" in notes.pop()
    made = Checkpointer(folder, 1, notes.append)
    for step, saved in ((3, None), (4, 4), (5, 5)):
        made.save(state(step), step, None)
        assert made.wait() == saved
    assert len(notes) == 1
    assert steps_in(folder) == [5, 3]


def test_flipped_bits_of_a_large_one_are_noticed(tmp_path: Path) -> None:
    """At random places; ``test_checkpoint`` flips one in every byte of a small one."""
    path = tmp_path / "step_00000001.pt"
    commit({"x": torch.randn(400_000)}, path)
    draw, whole = random.Random(0), path.read_bytes()
    for _ in range(20):
        position, bit = draw.randrange(len(whole)), draw.randrange(8)
        flipped = bytes([whole[position] ^ 1 << bit])
        with path.open("r+b") as file:
            file.seek(position)
            file.write(flipped)
            said: list[str] = []
            file.flush()
            assert newest_valid(tmp_path, said.append) is None, position
            assert "does not match its checksum" in said[0]
            file.seek(position)
            file.write(whole[position : position + 1])
    assert newest_valid(tmp_path, pytest.fail) == path


# The real train.py

SYNTHETIC = ["data.loader=synthetic", "data.synthetic.train=5000", "data.synthetic.val=50"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folders = {procs: tmp_path_factory.mktemp("undisturbed") / f"{procs}" for procs in (1, 2)}
    for procs, folder in folders.items():
        runs.train(procs, folder, *SYNTHETIC)
    return folders


@pytest.mark.parametrize(
    ("strike", "code", "told"),
    [
        ('Strike(150, KILL, "write")', -9, 0),
        ('Strike(4, KILL, "replace")', -9, 0),
        ('Strike(30, "ENOSPC", "write")', 0, 1),
        ('Strike(1, "EIO", "fsync", 10**6)', 1, 6),
    ],
    ids=["killed as it writes", "killed as it renames", "full for a moment", "no fsync ever"],
)
def test_a_run_whose_saves_fail_ends_as_if_they_had_not(
    tmp_path: Path, undisturbed: dict[int, Path], monkeypatch: pytest.MonkeyPatch, strike: str, code: int, told: int
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        tests = str(Path(__file__).parent)
        line = f"sys.path.insert(0, {tests!r}); import failing; from failing import KILL, Strike"
        # The look for room, before the first save, is the main thread's and goes through.
        runs.change(tmp_path, patch, f"{line}\nfailing.install({strike})")
        process = runs.begin(1, folder, *SYNTHETIC)
        printed = runs.finish(process)
    assert process.returncode == code, printed
    assert (printed.count("was not saved: ") > 0) == (told > 0), printed
    if told == 1:
        assert printed.count("was not saved: No space left on device") == 1
    if code:
        there = steps_in(folder / "checkpoints")
        assert code == -9 or not there
        printed = runs.train(1, folder, *SYNTHETIC)
        assert ("continuing" in printed) == bool(there)
    assert runs.digest(folder) == runs.digest(undisturbed[1])
    assert runs.trace(folder, 1) == runs.trace(undisturbed[1], 1)
    assert not list(folder.glob("checkpoints/*.partial"))


def test_two_ranks_fall_back_to_the_same_older_file(tmp_path: Path, undisturbed: dict[int, Path]) -> None:
    folder = shutil.copytree(undisturbed[2], tmp_path / "run", symlinks=True)
    newest, second, third = (path_for(folder / "checkpoints", step) for step in steps_in(folder / "checkpoints")[:3])
    content = bytearray(newest.read_bytes())
    content[len(content) // 3] ^= 4
    newest.write_bytes(content)
    os.truncate(second, 1000)
    (newest.parent / f"{newest.name}.gone.partial").write_bytes(b"half")
    printed = runs.train(2, folder, *SYNTHETIC)
    for path in (newest, second):
        assert printed.count(f"checkpoint {path} is damaged and passed over") == 1
    assert f"continuing {third}" in printed
    assert runs.digest(folder) == runs.digest(undisturbed[2])
    assert runs.trace(folder, 2) == runs.trace(undisturbed[2], 2)
    assert not list(folder.glob("checkpoints/*.partial"))
