"""``launch logs``: the last lines, and what comes."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_slurm import Fake, launch, make, slurm, writes

from launch import logs
from launch.__main__ import main
from launch.record import Record
from launch.slurm.command import follow

__all__ = ["slurm"]


def test_shows_the_last_lines(slurm: Fake, capfd: pytest.CaptureFixture[str]) -> None:
    record = make("a", "7")
    record.logs.mkdir(parents=True)
    record.log_of(0).write_text("".join(f"line {k}\n" for k in range(50_000)))
    record.log_of(3).write_bytes(b"rank 3 \xff\nhalf")
    assert main(["logs", "a", "--lines", "2"]) == 0
    assert capfd.readouterr().out == "line 49998\nline 49999\n"
    assert main(["logs", "a", "--rank", "3"]) == 0
    assert "rank 3 " in capfd.readouterr().out
    assert main(["logs", "a"]) == 0
    assert capfd.readouterr().out.count("\n") == logs.LINES
    record.log_of(4).touch()  # it has said nothing: that is no reason to show what the job printed
    (record.path / "s7").mkdir()
    (record.path / "s7" / "7_0_log.out").write_text("other\n")
    assert main(["logs", "a", "--rank", "4"]) == 0
    assert capfd.readouterr() == ("", "")
    assert main(["logs", "a", "--rank", "5"]) == 2
    assert capfd.readouterr().err.startswith("error: runs/a has no log of rank 5 yet: it is cancelled: before it began")


@pytest.mark.parametrize(
    ("data", "lines", "expected"),
    [
        (b"", 3, b""),
        (b"a", 3, b"a"),
        (b"a\nb\n", 1, b"b\n"),
        (b"a\nb", 1, b"b"),
        (b"a\n\n", 1, b"\n"),
        (b"a\rb\rc\nd\n", 2, b"a\rb\rc\nd\n"),
        (b"x" * 70_000 + b"\n" + b"y" * 70_000 + b"\nz\n", 2, b"y" * 70_000 + b"\nz\n"),
    ],
)
def test_last_lines(data: bytes, lines: int, expected: bytes, tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(data)
    assert logs.last_lines(tmp_path / "log", lines) == (expected, len(data))


def test_what_a_job_printed_before_python_began(slurm: Fake, capfd: pytest.CaptureFixture[str]) -> None:
    record = make("a", "7", "8")
    slurm.says("squeue", "8|PENDING|N/A|N/A||Priority\n")
    assert main(["logs", "a"]) == 2
    assert capfd.readouterr().err == "error: runs/a has no log of rank 0 yet: it is queued as job 8: Priority\n"
    for name in ("s7", "s8"):
        (record.path / name).mkdir()
        (record.path / name / f"{name[1:]}_0_log.out").write_text(f"slurmstepd: error of {name}\n")
    assert main(["logs", "a"]) == 0
    assert capfd.readouterr().out == "slurmstepd: error of s8\n"
    assert main(["status", "a"]) == 0
    assert f"{record.path}/s8/8_0_log.out" in capfd.readouterr().out


def test_an_arrays_elements_share_a_folder(slurm: Fake, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    place = tmp_path / "elsewhere"
    place.mkdir()
    for k in range(2):
        record = make(f"sweep/{k}")
        record.add("submitted", {"job": f"12_{k}", "submission": str(place)})
        (place / f"12_{k}_0_log.out").write_text(f"element {k}\n")
    assert main(["logs", "12_1"]) == 0
    assert capfd.readouterr().out == "element 1\n"
    moved = tmp_path / "runs" / "sweep" / "1" / "launch" / "elsewhere"
    place.rename(moved)
    assert main(["logs", "12_1"]) == 0
    assert capfd.readouterr().out == "element 1\n"


def test_a_run_of_this_machine_has_no_log(slurm: Fake, capfd: pytest.CaptureFixture[str]) -> None:
    make("a", step=4)
    assert main(["logs", "a", "-f"]) == 2
    assert capfd.readouterr().err == (
        "error: runs/a has no log: a run that no job trains prints to its terminal alone\n"
    )


@pytest.fixture
def following(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Record], tuple[list[str], threading.Thread]]]:
    """Begins to follow a record's log in a thread; gives what the follower says, and the thread."""
    monkeypatch.setattr(logs, "ASK_SECONDS", 0.2)
    monkeypatch.setattr(logs, "LOOK_SECONDS", 0.02)
    threads = []

    def begin(record: Record) -> tuple[list[str], threading.Thread]:
        told: list[str] = []
        thread = threading.Thread(target=logs.follow, args=(record,), kwargs={"notify": told.append}, daemon=True)
        thread.start()
        threads.append(thread)
        return told, thread

    yield begin
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_follows_over_requeues_until_the_end(
    slurm: Fake, capfd: pytest.CaptureFixture[str], following: Callable[[Record], tuple[list[str], threading.Thread]]
) -> None:
    record, shown = make("a", "7"), ""

    def shows(text: str) -> Callable[[], bool]:
        def look() -> bool:
            nonlocal shown
            shown += capfd.readouterr().out
            return text in shown

        return look

    slurm.says("squeue", "7|PENDING|N/A|N/A||Priority\n")
    told, thread = following(record)
    until(lambda: told == ["queued as job 7: Priority"])
    slurm.says("squeue", "7|RUNNING|N/A|N/A|n1|None\n")
    record.add("began", {"job": "7", "restart": 0, "nodes": "n1"})
    (record.path / "s7").mkdir()
    (record.path / "s7" / "7_0_log.out").write_text("the job's own output\n")
    until(shows("the job's own output"))
    until(lambda: told[-1] == "starting as job 7")
    record.logs.mkdir()
    log = record.log_of(0)
    log.write_text("first\n")
    until(shows("first\n"))
    with log.open("a") as file:
        file.write("second\n")
    until(shows("second\n"))
    log.write_text("cut\n")  # shorter than what was read
    until(shows("cut\n"))
    slurm.says("squeue", "7|PENDING|N/A|N/A||BeginTime\n")
    until(lambda: told[-1] == "requeued as job 7: BeginTime")
    other = log.with_suffix(".new")
    other.write_text("another file\nof a later start\n")
    other.replace(log)
    until(shows("of a later start\n"))
    assert thread.is_alive()
    slurm.says("squeue")
    (record.run / "summary.json").write_text('{"status": "finished", "step": 40}')
    record.add("ended", {"job": "7", "restart": 0, "code": 0, "step": 40, "reason": "", "then": "over"})
    with log.open("a") as file:
        file.write("the last words\n")
    thread.join(30)
    shows("")()
    assert shown == ("the job's own output\nfirst\nsecond\ncut\nanother file\nof a later start\nthe last words\n")
    assert told[1:] == ["starting as job 7", "requeued as job 7: BeginTime", "finished"]


def test_a_follower_says_once_that_slurm_fails(
    slurm: Fake, following: Callable[[Record], tuple[list[str], threading.Thread]]
) -> None:
    record = make("a", "7")
    slurm.says("squeue", err="no contact\n", code=1)
    told, _ = following(record)
    until(lambda: len(slurm.calls("squeue")) > 3)
    assert told == [
        "squeue: no contact: sacct and the folders say how jobs are",
        "queued as job 7: Slurm does not answer",
    ]
    record.add("began", {"job": "7", "restart": 0, "nodes": "n1"})
    record.add("ended", {"job": "7", "restart": 0, "code": 1, "step": 4, "reason": "x", "then": "over"})


@pytest.mark.parametrize(
    ("code", "reason", "status", "expected"),
    [
        (0, "", "finished", 0),
        (0, "", "diverged", 1),
        (75, "launch stop", "stopped", 75),
        (75, "cancelled", "stopped", 1),
        (1, "rank 3 was killed", None, 1),
        (2, "rank 0: unknown key optim.lrr", None, 2),
    ],
)
def test_a_follower_ends_as_the_run_did(
    code: int, reason: str, status: str | None, expected: int, slurm: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = make("a", "7", step=40)
    if status:
        (record.run / "summary.json").write_text(json.dumps({"status": status, "step": 40}))
    record.add("began", {"job": "7", "restart": 0, "nodes": "n1"})
    record.add("ended", {"job": "7", "restart": 0, "code": code, "step": 40, "reason": reason, "then": "over"})
    monkeypatch.setattr(logs, "LOOK_SECONDS", 0.01)
    assert main(["logs", "-f", "a"]) == expected
    assert follow(record) == expected  # as `launch slurm --follow` returns it


def test_a_lost_run_ends_its_follower_with_1(slurm: Fake) -> None:
    make("a", "7")
    assert main(["logs", "-f", "a"]) == 1


@pytest.mark.parametrize("way", ["ctrl-c", "reader left"])
def test_a_follower_that_is_ended(way: str, slurm: Fake, tmp_path: Path) -> None:
    record = make("a", "7")
    record.logs.mkdir(parents=True)
    record.log_of(0).write_text("first\n")
    slurm.says("squeue", "7|RUNNING|N/A|N/A|n1|None\n")
    process = launch("logs", "-f", "a", cwd=tmp_path)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "first\n"
    assert process.stderr.readline() == "[starting as job 7]\n"
    if way == "ctrl-c":
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=30)
    else:
        process.stdout.close()
        with record.log_of(0).open("a") as file:
            file.write("second\n")
        out, err = "", process.stderr.read()
        process.wait(30)
    assert (process.returncode, out, err) == (1, "", "")  # nobody knows how the run ends


@pytest.mark.parametrize(
    ("code", "status", "last"), [(0, "finished", "finished"), (75, "stopped", "stopping as job 7")]
)
def test_a_run_that_has_ended_does_not_start_again(
    code: int,
    status: str,
    last: str,
    slurm: Fake,
    capfd: pytest.CaptureFixture[str],
    following: Callable[[Record], tuple[list[str], threading.Thread]],
) -> None:
    record = make("a", "7", step=40)
    record.add("began", {"job": "7", "restart": 0, "nodes": "n1", "step": 0})
    writes(record)
    slurm.says("squeue", "7|RUNNING|N/A|N/A|n1|None\n")
    told, thread = following(record)
    until(lambda: told == ["running as job 7"])
    (record.run / "summary.json").write_text(json.dumps({"status": status, "step": 40}))
    (record.run / "writer.json").unlink()
    until(lambda: told == ["running as job 7", last])  # its job still runs
    record.add("ended", {"job": "7", "restart": 0, "code": code, "step": 40, "reason": "", "then": "over"})
    slurm.says("squeue")
    thread.join(30)
    assert told[2:] == (["stopped"] if code else [])
