"""Twenty starts with a mistake, on 2 and 4 ranks: one line, exit code 2 on every rank, no rank dies of a signal."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import runs
from PIL import Image

NOWHERE = ("no data at /nope/train", ["model.num_classes=2", "data.root=/nope", "train.global_batch=4"])
CLASSES = ("model.num_classes", ["model.num_classes=7", "data.root={data}", "train.global_batch=4"])
SHARE = ("data.val_split 0.9 leaves nothing to train on in", ["data.root={data}", "data.val_split=0.9"])
FEW = (
    "processes are more than the 1 training images: start fewer",
    ["data.root=/nope", "data.loader=synthetic", "data.synthetic.train=1"],
)
SMALL = (
    "train.global_batch 1 is smaller than the",
    ["data.root=/nope", "data.loader=synthetic", "train.global_batch=1"],
)
OPTION = ("--lr is no option; write optim.lr=0.1", ["--lr", "0.1"])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of two images, in both splits."""
    folder = tmp_path_factory.mktemp("images")
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (32, 32), (80 * i, 99, 10)).save(folder / split / name / f"{i}.jpg")
    return folder


def start(command: list[str], codes: Path) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if name != "LOGLEVEL"}
    environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DISTRIB_EXIT_CODE_FILE": str(codes)}
    return subprocess.run(
        command, cwd=runs.ROOT, env=environ, capture_output=True, text=True, timeout=runs.TIMEOUT, check=False
    )


def fill(words: list[str], data: Path, tmp_path: Path) -> list[str]:
    given = [word.format(data=data) for word in words]
    return ["--config=configs/quickstart.yaml", *given, f"run.dir={tmp_path}/run"]


@pytest.mark.parametrize(
    ("procs", "mistake"),
    [(2, NOWHERE)] * 4 + [(2, CLASSES), (2, SHARE), (2, SMALL), (2, OPTION), (4, NOWHERE), (4, FEW)],
)
def test_torchrun(procs: int, mistake: tuple[str, list[str]], data: Path, tmp_path: Path) -> None:
    part, words = mistake
    done = start(runs.command(procs, *fill(words, data, tmp_path)), tmp_path / "codes")
    assert done.returncode == 1, done.stderr  # torchrun says 1 for whatever its workers say
    codes = sorted(line.split()[:2] for line in (tmp_path / "codes").read_text().splitlines())
    assert codes == [[str(rank), "2"] for rank in range(procs)]
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert part in line
    assert "terminate called" not in done.stderr
    assert 'train.py", line' not in done.stderr  # of a traceback of ours
    # torchrun's table: what each rank died of, and why.
    assert re.findall(r"exitcode  : (-?\d+)", done.stderr) == ["2"] * procs
    assert re.findall(r"traceback : (.*)", done.stderr) == [line.removeprefix("error: ")] * procs
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("procs", "mistake"),
    [(2, NOWHERE)] * 3 + [(2, CLASSES), (2, SHARE), (2, SMALL), (2, OPTION), (4, NOWHERE), (4, FEW), (4, SMALL)],
)
def test_launch(procs: int, mistake: tuple[str, list[str]], data: Path, tmp_path: Path) -> None:
    part, words = mistake
    command = [sys.executable, "-m", "launch", "local", "--procs", str(procs), *fill(words, data, tmp_path)]
    done = start(command, tmp_path / "codes")
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert part in line
    assert not (tmp_path / "run").exists()
