"""What tools have in common: exit codes, and outputs that appear whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import runs

from distrib.config import UserError
from distrib.program import Output

PROGRAM = """
import os, signal, sys, time
from distrib.config import UserError
from distrib.faults import Failure, Interrupted
from distrib.program import run, say
def work(stop):
    word = sys.argv[1]
    say("at work")
    if word == "user": raise UserError("name it")
    if word == "failure": raise Failure("it went wrong")
    if word == "own": return 1
    if word == "wait":
        os.kill(os.getpid(), signal.SIGTERM)
        while not stop.requested(): time.sleep(0.01)
        raise Interrupted
    print("result")
sys.exit(run(work))
"""


@pytest.mark.parametrize(
    ("word", "code", "out", "err"),
    [
        ("well", 0, "result\n", ""),
        ("own", 1, "", ""),
        ("user", 2, "", "error: name it\n"),
        ("failure", 1, "", "error: it went wrong\n"),
        ("wait", 75, "", "stopped (SIGTERM) before the end\n"),
    ],
)
def test_exit_codes(word: str, code: int, out: str, err: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(runs.ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, word], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, out, f"at work\n{err}")


def test_of_several_ranks_the_first_tells(tmp_path: Path) -> None:
    """Each leaves its exit code for the launcher."""
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    place |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500", "DISTRIB_EXIT_CODE_FILE": str(tmp_path / "codes")}
    environment = os.environ | {"PYTHONPATH": str(runs.ROOT)} | place
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "user"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (2, "at work\n")
    assert (tmp_path / "codes").read_text() == "1 2 name it\n"


def test_an_output_appears_whole(tmp_path: Path) -> None:
    output = Output(tmp_path / "file.txt")
    assert os.listdir(tmp_path) == []
    with output.writing() as place:
        place.write_text("all of it")
        assert place.suffix == ".txt"
        assert not output.path.exists()
    assert output.path.read_text() == "all of it"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    output = Output(tmp_path / "file.txt")

    def fail(place: Path) -> None:
        place.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError), output.writing() as place:
        fail(place)
    with pytest.raises(UserError, match=r"cannot write .*file\.txt: No such file"), output.writing():
        pass
    assert os.listdir(tmp_path) == []


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("mine")
    with pytest.raises(UserError, match=r"file.txt exists: name another"):
        Output(tmp_path / "file.txt")
    output = Output(tmp_path / "late.txt")

    def write_both(place: Path) -> None:
        place.write_text("ours")
        output.path.write_text("theirs")

    with pytest.raises(UserError, match="was made by somebody else"), output.writing() as place:
        write_both(place)
    assert output.path.read_text() == "theirs"
    with pytest.raises(UserError, match="there is no folder"):
        Output(tmp_path / "missing" / "file.txt")


def test_a_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"cannot write /proc/file\.txt"):
        Output("/proc/file.txt")
    with pytest.raises(UserError, match="there is no folder ~nobody-of-that-name"):
        Output("~nobody-of-that-name/file.txt")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="there is no folder"):
        Output(tmp_path / "file" / "file.txt")
    with pytest.raises(UserError, match="exists"):
        Output("/")

    def refuse(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "lstat", refuse)
    with pytest.raises(UserError, match=r"cannot write .*: Permission denied"):
        Output(tmp_path / "file.txt")


def test_long_names(tmp_path: Path) -> None:
    name = "f" * 251 + ".txt"
    with Output(tmp_path / name).writing() as place:
        place.write_text("all of it")
    assert os.listdir(tmp_path) == [name]
    with pytest.raises(UserError, match="File name too long"):
        Output(tmp_path / f"f{name}")
