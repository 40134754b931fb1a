"""Programs in Slurm's place: squeue, sacct and scancel as a test wants them, and the folders of runs with jobs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import runs

from launch.__main__ import main
from launch.record import Record


class Fake:
    """squeue, sacct and scancel, which print what a test wrote and note how they were called."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for name in ("squeue", "sacct", "scancel"):
            self.says(name)

    def says(self, name: str, out: str = "", err: str = "", code: int = 0, seconds: float = 0) -> None:
        """What a command does from now on."""
        path = self._folder / name
        for suffix, text in (("out", out), ("err", err)):
            (self._folder / f"{name}.{suffix}").write_text(text)
        new = path.with_suffix(".new")
        new.write_text(
            f'#!/bin/sh\necho "$@" >> "{path}.calls"\nenv > "{path}.env"\n'
            f'{f"exec sleep {seconds}" if seconds else ""}\ncat "{path}.out"\ncat "{path}.err" >&2\nexit {code}\n'
        )
        new.chmod(0o755)
        new.replace(path)

    def then(self, name: str, other: str, out: str) -> None:
        """What ``other`` prints once ``name`` has been called."""
        (self._folder / f"{name}.then").write_text(out)
        self.does(name, f'cp "{self._folder / name}.then" "{self._folder / other}.out"')

    def does(self, name: str, line: str) -> None:
        """A line of shell that a command runs before it prints."""
        path = self._folder / name
        path.write_text(path.read_text().replace("cat ", f"{line}\ncat ", 1))

    def calls(self, name: str) -> list[str]:
        path = self._folder / f"{name}.calls"
        return path.read_text().splitlines() if path.exists() else []

    def environ(self, name: str) -> str:
        return (self._folder / f"{name}.env").read_text()


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """A Slurm that has no jobs, and a working directory with a folder ``runs``."""
    place = tmp_path / "bin"
    place.mkdir()
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    return Fake(place)


def make(name: str, *jobs: str, step: int = 0) -> Record:
    """A run that was submitted as these jobs, and has trained so many steps."""
    record = Record(Path("runs", name))
    record.run.mkdir(parents=True, exist_ok=True)
    for job in jobs:
        record.add("submitted", {"job": job, "name": name, "nodes": 2, "procs": 16, "submission": f"s{job}"})
    if step:
        line = {"kind": "train", "step": step, "epoch": step / 8, "loss": 2.0, "lr": 0.1, "images_per_second": 999.0,
                "eta_seconds": 3600.0, "data_wait": 0.01}  # fmt: skip
        (record.run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        (record.run / "config.yaml").write_text("train:\n  epochs: 10\n  steps: null\n")
    return record


def writes(record: Record, age: float = 1.0, **changes: Any) -> None:
    """A writer on another machine, whose last heartbeat is so many seconds old."""
    values = {"token": "0123456789abcdef", "host": "n1", "pid": 4242, "since": "2026-11-25T10:00:00+0000"}
    path = record.run / "writer.json"
    path.write_text(json.dumps(values | {"machine": "another boot", "born": "17"} | changes))
    os.utime(path, (time.time() - age,) * 2)


def state_of(folder: Path, capfd: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What ``launch list --json`` says of the one run in a folder."""
    capfd.readouterr()
    assert main(["list", "--json", str(folder)]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    (found,) = json.loads(out) if out else [{"state": ""}]
    return found


def launch(*words: str, cwd: Path = runs.ROOT, **environ: str) -> subprocess.Popen[str]:
    """A command of the launcher in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "launch", *words],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(runs.ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
