"""What a user may get wrong, through the real train.py: exit code 2, one line that helps, and nothing is touched."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import runs
from PIL import Image

SYNTHETIC = [
    "--config=configs/quickstart.yaml",
    "data.loader=synthetic",
    "data.synthetic.train=16",
    "data.synthetic.val=4",
    "train.global_batch=8",
    "train.steps=1",
]
FILES = ["--config=configs/quickstart.yaml", "model.num_classes=2", "train.global_batch=4"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with all that a run leaves there."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    done = start(1, *SYNTHETIC, f"run.dir={folder}")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in folder.iterdir()} >= {"checkpoints", "config.yaml", "metrics.jsonl", "summary.json"}
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two classes of two images, in both splits."""
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            for i in range(2):
                path = tmp_path / "data" / split / name / f"{i}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (32, 32), (80 * i, 99, 10)).save(path)
    return tmp_path / "data"


def start(procs: int, *words: str) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        runs.command(procs, *words),
        cwd=runs.ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=runs.TIMEOUT,
        check=False,
    )


def content(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def refused(tmp_path: Path, *words: str) -> str:
    """The line that the run must end in, having touched nothing of what lies in the test's folder."""
    before = content(tmp_path)
    done = start(1, *words)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "Traceback" not in done.stdout
    assert content(tmp_path) == before
    return line


def test_no_such_data_folder(folder: Path, tmp_path: Path) -> None:
    line = refused(tmp_path, *FILES, f"data.root={tmp_path}/nowhere", f"run.dir={folder}")
    assert f"no data at {tmp_path}/nowhere/train" in line
    assert "data.root" in line


def test_the_default_configuration_without_imagenet_dir(folder: Path, tmp_path: Path) -> None:
    line = refused(tmp_path, f"run.dir={folder}")
    assert "set IMAGENET_DIR" in line
    assert "--config configs/quickstart.yaml" in line


def test_an_empty_data_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    line = refused(tmp_path, *FILES, f"data.root={tmp_path}/empty", f"run.dir={folder}")
    assert "must hold train/ and val/" in line


def test_a_split_without_class_folders(folder: Path, data: Path, tmp_path: Path) -> None:
    shutil.rmtree(data / "val" / "cat")
    shutil.rmtree(data / "val" / "dog")
    (data / "val" / "0.jpg").write_bytes(b"")
    line = refused(tmp_path, *FILES, f"data.root={data}", f"run.dir={folder}")
    assert f"{data}/val has no class folders" in line


def test_a_class_folder_without_images(folder: Path, data: Path, tmp_path: Path) -> None:
    for file in (data / "train" / "dog").iterdir():
        file.rename(file.with_suffix(".txt"))
    line = refused(tmp_path, *FILES, f"data.root={data}", f"run.dir={folder}")
    assert "no image" in line
    assert f"{data}/train" in line
    assert "dog" in line


def test_class_folders_that_differ(folder: Path, data: Path, tmp_path: Path) -> None:
    (data / "val" / "dog").rename(data / "val" / "cow")
    line = refused(tmp_path, *FILES, f"data.root={data}", f"run.dir={folder}")
    assert "class folders differ" in line
    assert f"dog (1 in all) in {data}/train but not in {data}/val" in line


def test_a_wrong_number_of_classes(folder: Path, data: Path, tmp_path: Path) -> None:
    line = refused(tmp_path, *FILES, "model.num_classes=10", f"data.root={data}", f"run.dir={folder}")
    assert "set model.num_classes=2" in line


def test_a_checkpoint_of_another_network(folder: Path, tmp_path: Path) -> None:
    line = refused(tmp_path, *SYNTHETIC, "model.name=resnet32", f"run.dir={folder}")
    assert f"model.name is resnet32, but {folder}/checkpoints/step_00000001.pt was trained with resnet20" in line
    assert "run.name" in line


def test_a_checkpoint_of_other_images(folder: Path, tmp_path: Path) -> None:
    line = refused(tmp_path, *SYNTHETIC, "data.synthetic.train=17", f"run.dir={folder}")
    assert f"{folder}/checkpoints/step_00000001.pt" in line


def test_a_run_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    line = refused(tmp_path, *SYNTHETIC, f"run.dir={tmp_path}/file/run")
    assert f"{tmp_path}/file/run" in line
    assert "run.dir" in line


def test_an_unknown_key(folder: Path, tmp_path: Path) -> None:
    line = refused(tmp_path, *SYNTHETIC, "optim.momentun=0.5", f"run.dir={folder}")
    assert "unknown key optim.momentun (command line); did you mean optim.momentum?" in line


def test_an_unknown_network_is_told_before_the_data_is_looked_at(tmp_path: Path) -> None:
    words = [f"data.root={tmp_path}/nothing", f"run.dir={tmp_path}/new"]
    assert "did you mean 'resnet" in refused(tmp_path, *FILES, *words, "model.name=resnet21")
    assert "optim.freeze 'layer9' is no stage" in refused(tmp_path, *FILES, *words, "optim.freeze=layer9")


def test_more_ranks_than_images_in_a_batch(
    folder: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = tmp_path_factory.mktemp("exit") / "codes"
    monkeypatch.setenv("DISTRIB_EXIT_CODE_FILE", str(codes))
    before = content(tmp_path)
    done = start(3, *SYNTHETIC, "train.global_batch=2", f"run.dir={folder}")
    assert done.returncode != 0  # torchrun says 1 for whatever its workers say, and adds lines of its own
    assert sorted(line.split()[:2] for line in codes.read_text().splitlines()) == [[str(r), "2"] for r in range(3)]
    (line,) = [line for line in done.stderr.splitlines() if "error: " in line]
    assert line == "error: train.global_batch 2 is smaller than the 3 processes: raise it, or start fewer"
    assert 'train.py", line' not in done.stderr  # of a traceback
    assert content(tmp_path) == before
