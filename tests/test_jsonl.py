"""distrib.jsonl: no line is lost to a disk that fails for a while, none is torn, and every parser reads them."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest

from distrib import jsonl
from distrib.jsonl import JsonlFile, cut_back, dumps


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.ESTALE, errno.EDQUOT])
@pytest.mark.parametrize("call", ["write", "open", "fstat", "ftruncate"])
def test_a_disk_that_fails_for_a_while(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    file = JsonlFile(path, said.append)
    file.append({"step": 1})
    path.open("ab").write(b'{"torn')  # so that ftruncate has something to do

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(jsonl.os, call, fail)
        file._let_go()  # so that open has something to do
        for step in (2, 3, 4):
            file.append({"step": step})
        assert len(said) == 1
        assert os.strerror(number) in said[0]
        assert str(path) in said[0]
    file.append({"step": 5})
    assert "nothing is missing" in said[1]
    file.close()
    assert lines(path) == [{"step": step} for step in range(1, 6)]
    assert len(said) == 2


def test_a_disk_that_takes_half_a_line(tmp_path: Path, said: list[str]) -> None:
    """A real limit: the kernel writes what fits."""
    file = JsonlFile(tmp_path / "m.jsonl", said.append)
    file.append({"step": 1})
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
        file.append({"step": 2})
        file.append({"step": 3})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    file.close()
    assert lines(tmp_path / "m.jsonl") == [{"step": 1}, {"step": 2}, {"step": 3}]
    assert len(said) == 2


def test_what_stays_lost_is_said(tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    file = JsonlFile(tmp_path / "m.jsonl", said.append)

    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(jsonl.os, "write", full)
    file.append({"step": 1})
    file.append({"step": 2})
    file.close()
    assert "2 lines could not be written" in said[-1]


def test_a_file_that_a_person_emptied(tmp_path: Path, said: list[str]) -> None:
    file = JsonlFile(tmp_path / "m.jsonl", said.append)
    file.append({"step": 1})
    (tmp_path / "m.jsonl").write_bytes(b"")
    file.append({"step": 2})
    assert lines(tmp_path / "m.jsonl") == [{"step": 2}]
    assert said == []


def test_a_rewrite_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.jsonl").write_bytes(b'{"step": 1}\n')

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(jsonl.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        cut_back(tmp_path / "m.jsonl", 0)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("m.jsonl", b'{"step": 1}\n')]


def test_the_folder_of_another_is_left_alone(tmp_path: Path, said: list[str]) -> None:
    ours = [True]
    file = JsonlFile(tmp_path / "m.jsonl", said.append, lambda: ours[0])
    file.append({"step": 1})
    ours[0] = False
    file.append({"step": 2})
    file.close()
    assert lines(tmp_path / "m.jsonl") == [{"step": 1}]


def test_numbers_that_are_none() -> None:
    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    values = {"a": math.nan, "b": [math.inf, 1], "c": {"d": -math.inf}, "e": None, "f": True}
    expected = {"a": None, "b": [None, 1], "c": {"d": None}, "e": None, "f": True}
    assert json.loads(dumps(values), parse_constant=no_constant) == expected
    assert json.loads(dumps(values, indent=2), parse_constant=no_constant) == expected


def test_cut_back_drops_later_steps_and_torn_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    kept = b'{"kind": "train", "step": 1, "loss": 0.10}\n{"kind":"eval","step":2}\n'
    edited = b'[1, 2]\n{"step": "two"}\n{"step": null}\n\n7\nnull\n\xff\xfe\n'  # by a person, who knows how
    path.write_bytes(kept + b'{"kind": "tra{"step": 1}\n' + edited + b'{"step": 3}\n{"step": 2}')
    cut_back(path, 2)
    assert path.read_bytes() == kept
    cut_back(path, -1)
    assert path.read_bytes() == b""
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]
    cut_back(tmp_path / "none.jsonl", 5)


def test_a_predecessor_that_still_writes_is_out_of_sight(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    predecessor = JsonlFile(path)
    predecessor.append({"step": 1})
    cut_back(path, 1)
    successor = JsonlFile(path)
    predecessor.append({"step": 2, "by": "predecessor"})
    successor.append({"step": 2, "by": "successor"})
    assert lines(path) == [{"step": 1}, {"step": 2, "by": "successor"}]
