"""Who may write a run folder: one at a time, on this machine and on others, and a dead one's successor."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from distrib import lease as module
from distrib.config import UserError
from distrib.faults import Interrupted
from distrib.lease import Lease, LeaseLost, Sight, disk_time, look


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(module, "DEAD_SECONDS", 0.5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "a"


def write(folder: Path, age: float = 0.0, **changes: Any) -> None:
    """A ``writer.json`` as another process left it ``age`` seconds ago."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"token": "0123456789abcdef", "host": "node17", "pid": 4242, "since": "2026-11-25T10:00:00+0000"}
    values |= {"machine": "another boot", "born": "17", **changes}
    (folder / "writer.json").write_text(json.dumps(values))
    then = time.time() - age
    os.utime(folder / "writer.json", (then, then))


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_one_at_a_time(folder: Path) -> None:
    first = Lease(folder).acquire()
    assert names(folder) == ["writer.json"]
    with pytest.raises(UserError, match=rf"is being written by process {os.getpid()} on .*, since .*run\.name"):
        Lease(folder).acquire()
    assert first.held()
    first.check()
    assert names(folder) == ["writer.json"]
    first.release()
    first.release()
    second = Lease(folder).acquire()
    assert second.held()
    second.release()


def test_what_was_made_for_it_goes_with_it(folder: Path, tmp_path: Path) -> None:
    Lease(folder).acquire().release()
    assert os.listdir(tmp_path) == []
    lease = Lease(folder).acquire()
    (folder / "metrics.jsonl").write_text("")
    lease.release()
    assert names(folder) == ["metrics.jsonl"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"cannot write to .*/file/run: Not a directory: set run\.dir"):
        Lease(tmp_path / "file" / "run").acquire()


def test_a_killed_holder_is_taken_over_at_once(folder: Path) -> None:
    code = f"import os, pathlib, distrib.lease as l; l.Lease(pathlib.Path({str(folder)!r})).acquire(); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 9
    assert names(folder) == ["writer.json"]
    said: list[str] = []
    lease = Lease(folder).acquire(said.append)
    assert lease.held()
    assert len(said) == 1
    assert "taking over" in said[0]
    lease.release()


def test_a_process_id_that_is_used_again_is_not_the_holder(folder: Path) -> None:
    write(folder, pid=os.getpid(), machine=module._machine(), born="1")  # ours, but it began at another time
    Lease(folder).acquire().release()


def test_a_holder_that_nobody_has_reaped_is_dead(folder: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.DEVNULL)
    born = module._born(child.pid)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and still in the table
    write(folder, pid=child.pid, machine=module._machine(), born=born or "1")
    Lease(folder).acquire().release()
    child.wait()


def test_a_stopped_holder_of_this_machine_is_alive(folder: Path) -> None:
    write(folder, age=3600, pid=os.getppid(), machine=module._machine(), born=module._born(os.getppid()))
    with pytest.raises(UserError, match="is being written by"):  # however long it has not been heard
        Lease(folder).acquire()


def test_a_dead_holder_elsewhere_is_taken_over_without_a_wait(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, age=3600)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: pytest.fail("waited"))
    lease = Lease(folder).acquire()
    assert json.loads((folder / "writer.json").read_text())["pid"] == os.getpid()
    lease.release()


def test_a_silent_holder_elsewhere_is_watched_first(folder: Path) -> None:
    write(folder)
    said: list[str] = []
    Lease(folder).acquire(said.append).release()
    assert "node17" in said[0]
    assert "looking whether it lives" in said[0]


def test_a_clock_that_is_ahead_does_not_make_a_dead_holder_immortal(folder: Path) -> None:
    write(folder, age=-7200)
    Lease(folder).acquire().release()


def test_a_living_holder_elsewhere_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DEAD_SECONDS", 30.0)  # its heart may miss a beat on a busy machine
    write(folder)
    over = threading.Event()

    def beat() -> None:
        while not over.wait(0.1):
            os.utime(folder / "writer.json")

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        with pytest.raises(UserError, match="process 4242 on node17, since 2026-11-25T10:00:00"):
            Lease(folder).acquire()
    finally:
        over.set()
        heart.join()


def test_a_later_start_of_the_same_job_takes_over_from_one_that_lives(folder: Path) -> None:
    write(folder, age=-1000.0, job="Slurm job 7, step 0", start=1)  # a clock that is ahead: alive for long
    said: list[str] = []
    lease = Lease(folder, "Slurm job 7, step 0", 2).acquire(said.append)
    assert lease.held()
    (line,) = said
    assert re.match("process 4242 on node17, .* is of this job.s start before; taking over", line)
    lease.release()


@pytest.mark.parametrize(("job", "start"), [("Slurm job 7, step 0", 1), ("Slurm job 7, step 0", 0), ("", 2)])
def test_no_other_start_does(folder: Path, job: str, start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DEAD_SECONDS", 5.0)
    write(folder, job="Slurm job 7, step 0", start=1)
    over = threading.Event()

    def beat() -> None:
        while not over.wait(0.01):
            os.utime(folder / "writer.json")

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        with pytest.raises(UserError, match="is being written by process 4242 on node17"):
            Lease(folder, job, start).acquire()
    finally:
        over.set()
        heart.join()


def test_who_is_overtaken_by_its_own_jobs_next_start_writes_nothing_more(folder: Path) -> None:
    orphan = Lease(folder, "Slurm job 7, step 0", 0).acquire()
    newer = Lease(folder, "Slurm job 7, step 0", 1).acquire()
    assert newer.held()
    assert not orphan.held()
    with pytest.raises(LeaseLost):
        orphan.check()
    orphan.release()
    assert newer.held()
    newer.release()


def test_a_holder_elsewhere_that_leaves_meanwhile(folder: Path) -> None:
    write(folder)
    threading.Timer(0.1, (folder / "writer.json").unlink).start()
    Lease(folder).acquire().release()


def test_a_request_to_stop_ends_the_wait(folder: Path, tmp_path: Path) -> None:
    write(folder)
    with pytest.raises(Interrupted):
        Lease(folder).acquire(stop=lambda: True)
    assert names(folder) == ["writer.json"]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"token": "../../x"}', '{"token": 7, "pid": "x"}', "\ud83d"]
)
def test_a_damaged_file_has_a_heartbeat_all_the_same(folder: Path, content: str) -> None:
    write(folder)
    (folder / "writer.json").write_text(content, errors="surrogatepass")
    Lease(folder).acquire().release()
    assert names(folder.parent) == ["a"]


def test_who_was_taken_over_writes_nothing_more(folder: Path) -> None:
    lease = Lease(folder).acquire()
    lease.check()
    write(folder)
    assert not lease.held()
    with pytest.raises(LeaseLost, match="taken over by process 4242 on node17"):
        lease.check()
    lease.release()
    assert json.loads((folder / "writer.json").read_text())["pid"] == 4242  # the successor's stays


def test_the_heart_notices_it_too(folder: Path) -> None:
    lease = Lease(folder).acquire()
    write(folder)
    deadline = time.monotonic() + 30
    while lease._lost is None and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(LeaseLost):
        lease.check()
    lease.release()


def test_while_the_disk_is_away_nobody_can_tell_whose_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = Lease(folder).acquire()

    def fails(path: Path) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(module, "_read", fails)
        assert not lease.held()
        lease.check()  # and the run goes on
    assert lease.held()
    lease.release()
    assert not lease.held()


def test_the_heart_beats(folder: Path) -> None:
    lease = Lease(folder).acquire()
    os.utime(folder / "writer.json", (1, 1))
    deadline = time.monotonic() + 30
    while (folder / "writer.json").stat().st_mtime < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lease.release()


def test_without_hard_links(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(module.os, "link", refuse)
    lease = Lease(folder).acquire()
    with pytest.raises(UserError, match="is being written"):
        Lease(folder).acquire()
    lease.release()


def _contend(folder: Path, gate: Any, answers: Any) -> None:
    module.BEAT_SECONDS, module.DEAD_SECONDS = 0.05, 0.5
    gate.wait()
    try:
        lease = Lease(folder).acquire()
    except UserError:
        answers.put("refused")
        return
    answers.put("held" if lease.held() else "lost")
    gate.wait()  # until all have answered
    lease.release()


@pytest.mark.parametrize("left", ["nothing", "dead", "elsewhere", "half taken over"])
def test_of_many_that_start_at_once_one_gets_it(folder: Path, left: str) -> None:
    fork = multiprocessing.get_context("fork")
    for _ in range(5):
        if left != "nothing":
            write(folder, age=3600, **({"machine": module._machine()} if left == "dead" else {}))
        if left == "half taken over":  # by a successor that was killed in the middle
            turn = folder / ".writer.json.after-0123456789abcdef"
            turn.mkdir(exist_ok=True)
            os.utime(turn, (1, 1))
        gate, answers = fork.Barrier(6), fork.SimpleQueue()
        processes = [fork.Process(target=_contend, args=(folder, gate, answers), daemon=True) for _ in range(6)]
        for process in processes:
            process.start()
        found = sorted(answers.get() for _ in processes)
        gate.abort()
        for process in processes:
            process.join()
        assert found == ["held", *["refused"] * 5]
        for file in folder.glob("*.json") if folder.exists() else ():
            file.unlink()


# Onlookers


def test_an_onlooker_sees_who_holds_the_folder(folder: Path) -> None:
    folder.mkdir(parents=True)
    assert look(folder, disk_time(folder)) is None
    lease = Lease(folder).acquire()
    seen = look(folder, None)
    assert seen is not None
    assert (seen.here, seen.alive, seen.holder.pid, seen.silent) == (True, True, os.getpid(), None)
    lease.release()
    assert look(folder, disk_time(folder)) is None


@pytest.mark.parametrize(("age", "alive"), [(0.1, True), (60.0, False)])
def test_an_onlooker_of_another_machine_looks_at_the_heartbeat(folder: Path, age: float, alive: bool) -> None:
    write(folder)
    seen = look(folder, (folder / "writer.json").stat().st_mtime + age)
    assert seen is not None
    assert (seen.here, seen.alive) == (False, alive)
    assert seen.silent == pytest.approx(age)
    assert look(folder, None) == Sight(seen.holder, False, None, None)  # nobody can tell
    assert names(folder) == ["writer.json"]


def test_an_onlooker_knows_a_dead_process_of_this_machine(folder: Path) -> None:
    write(folder, pid=os.getpid(), machine=module._machine(), born="1")
    seen = look(folder, disk_time(folder))
    assert seen is not None
    assert (seen.here, seen.alive) == (True, False)


def test_a_disk_that_cannot_be_written_tells_no_time(tmp_path: Path) -> None:
    assert disk_time(tmp_path / "no such folder") is None


def test_the_disks_time(tmp_path: Path) -> None:
    (tmp_path / "before").touch()
    now = disk_time(tmp_path)
    (tmp_path / "after").touch()
    assert now is not None
    assert (tmp_path / "before").stat().st_mtime <= now <= (tmp_path / "after").stat().st_mtime
    assert names(tmp_path) == ["after", "before"]
