"""A stranger's path with folders of pictures: train, stop, continue, fine-tune on other classes, kill, continue."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from PIL import Image

from distrib.finite import spoilt

OWN = [str(runs.ROOT / "train.py"), "--config", "configs/own_images.yaml"]
SMALL = ["model.name=resnet20", "data.size=16", "data.workers=1", "train.global_batch=16", "log.every_steps=2"]
FIRST, SECOND = ("ant", "bee", "cat", "dog"), ("elk", "fox", "gnu", "hen")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a stranger works: pets/ with eight classes of 24 pictures, and no val/."""
    place = tmp_path_factory.mktemp("shelf")
    random = np.random.default_rng(0)
    for k, name in enumerate((*FIRST, *SECOND)):
        folder = place / "pets" / name
        folder.mkdir(parents=True)
        tint = np.array([40 * (k % 4), 200 * (k // 4), 120]) * 0.5
        for i in range(24):
            pixels = tint + random.integers(0, 60, (24, 30, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg")
    return place


def environ() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def begin(place: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, *OWN, "--data", "pets", *SMALL, *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=place, env=environ(), text=True, stdout=pipe, stderr=subprocess.STDOUT, start_new_session=True
    )


def train(place: Path, *words: str, code: int = 0) -> str:
    process = begin(place, *words)
    printed = runs.finish(process)
    assert process.returncode == code, printed
    assert "Traceback" not in printed
    return printed


def until_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    def there() -> bool:
        file = run / "metrics.jsonl"
        return file.exists() and any(record["step"] >= step for record in records(file))

    runs.wait_until(there, process)


def records(file: Path) -> list[dict[str, int]]:
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "last.pt", weights_only=True)["model"]


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def kinds(names: tuple[str, ...]) -> str:
    return f"data.classes=[{','.join(names)}]"


@pytest.fixture(scope="module")
def first(shelf: Path) -> Iterator[Path]:
    """A run on four classes that was stopped by Ctrl-C and continued by the same command."""
    run = shelf / "runs" / "resnet20-pets"
    process = begin(shelf, kinds(FIRST), "train.epochs=6")
    until_step(run, 6, process)
    os.killpg(process.pid, signal.SIGINT)  # a terminal's Ctrl-C reaches the workers too
    printed = runs.finish(process)
    assert process.returncode == 75, printed
    assert "the same command continues runs/resnet20-pets" in printed
    again = train(shelf, kinds(FIRST), "train.epochs=6")
    assert re.search(r"continuing runs/resnet20-pets/checkpoints/step_\d+\.pt: step \d+ of 30", again)
    (shelf / "said").write_text(printed)
    return run


def test_what_followed_was_said(first: Path, shelf: Path) -> None:
    said = (shelf / "said").read_text()
    assert "training: 88 images, validation: 8 (10 % of each class are held out: data.val_split), 4 classes" in said
    assert "learning rate 0.0125;" in said  # 0.05 at 64 images a step
    assert "crops of 16 px, evaluated at 16 of 18" in said
    assert "model.num_classes=4, train.compile=false, schedule.warmup_epochs=0.6" in said


def test_what_it_leaves(first: Path) -> None:
    saved = torch.load(first / "checkpoints" / "best.pt", weights_only=True)
    assert saved["classes"] == list(FIRST)
    summary = json.loads((first / "summary.json").read_text())
    assert (summary["status"], summary["step"]) == ("finished", 30)
    assert saved["progress"]["step"] == summary["best"]["step"]
    epochs = {path.name for path in (first / "checkpoints").glob("step_*.pt")}
    assert {f"step_{step:08d}.pt" for step in (20, 30)} <= epochs  # at ends of epochs, ten steps apart at least
    settled = json.loads(json.dumps(runs_config(first)))
    assert settled["model"]["num_classes"] == 4
    assert settled["schedule"]["warmup_epochs"] == 0.6


def runs_config(run: Path) -> dict[str, dict[str, object]]:
    import yaml

    return yaml.safe_load((run / "config.yaml").read_text())


def test_fine_tuning_on_other_classes_survives_kill_9_to_the_bit(first: Path, shelf: Path) -> None:
    words = [kinds(SECOND), "--init-from", str(first / "checkpoints" / "best.pt"), "train.epochs=4"]
    words += ["optim.freeze=layer1", "optim.head_lr=10", "optim.layer_decay=0.9", "ema=true"]
    printed = train(shelf, *words, "run.name=undisturbed")
    assert "best.pt" in printed
    assert "the head is new" in printed
    run = shelf / "runs" / "killed"
    process = begin(shelf, *words, "run.name=killed")
    until_step(run, 12, process)
    runs.kill_group(process)
    assert not (run / "summary.json").exists()  # it was on its way
    moved = first.rename(first.with_name("away"))  # the weights that it began with are not needed again
    try:
        assert "continuing runs/killed/checkpoints" in train(shelf, *words, "run.name=killed")
    finally:
        moved.rename(first)
    undisturbed = shelf / "runs" / "undisturbed"
    assert_equal(weights(run), weights(undisturbed))
    begun = torch.load(first / "checkpoints" / "best.pt", weights_only=True)["model"]
    frozen = [key for key in begun if key.startswith(("conv1.", "bn1.", "layer1."))]
    assert len(frozen) > 10
    assert_equal({key: weights(run)[key] for key in frozen}, {key: begun[key] for key in frozen})
    assert not torch.equal(weights(run)["layer2.0.conv1.weight"], begun["layer2.0.conv1.weight"])


def test_more_epochs_after_the_end(first: Path, shelf: Path) -> None:
    printed = train(shelf, kinds(FIRST), "train.epochs=7")
    assert "step 30 of 35" in printed
    assert re.search(
        r"it had ended there and goes on with the schedule of a run of 35 steps, at a learning rate of 0\.000", printed
    )
    assert runs_config(first)["schedule"]["warmup_epochs"] == 0.6  # of six epochs, as it was begun


def test_fresh_moves_the_old_run_aside(first: Path, shelf: Path) -> None:
    words = [kinds(FIRST), "run.name=again", "train.steps=3"]
    train(shelf, *words)
    run = shelf / "runs" / "again"
    before = {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    # Nothing is moved for a start that then fails.
    (shelf / "broken.pt").write_bytes(b"no weights")
    assert "broken.pt" in train(shelf, *words, "--fresh", "--init-from", "broken.pt", code=2)
    assert {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    printed = train(shelf, *words, "--fresh", "run.seed=1")
    aside = next(
        path for path in (shelf / "runs").iterdir() if re.fullmatch(r"again\.20\d\d-\d\d-\d\dT[\d-]{8}", path.name)
    )
    assert f"--fresh: the earlier run lies in runs/{aside.name}" in printed
    assert {str(path.relative_to(aside)): path.read_bytes() for path in aside.rglob("*") if path.is_file()} == before
    assert json.loads((run / "summary.json").read_text())["step"] == 3
    assert "continuing" not in printed
    time.sleep(1)  # each moved folder has its second in its name
    assert "continuing" in train(shelf, *words, "train.steps=4", "run.seed=1", "--resume", "must")


def test_a_run_of_no_numbers_is_nobodys_best(shelf: Path) -> None:
    words = [kinds(FIRST), "run.name=nan", "optim.lr=1e8", "log.every_steps=1"]
    printed = train(shelf, *words, "train.steps=12", code=1)
    assert "nothing is learnt any more" in printed  # nan or inf, as the processor has it
    saved = torch.load(shelf / "runs" / "nan" / "checkpoints" / "last.pt", weights_only=True)
    assert saved["progress"]["best_step"] is None or saved["progress"]["best_step"] < saved["progress"]["step"]
    again = train(shelf, *words, "train.steps=14", code=1)
    assert "warning: the loss was no number any more when step_00000012.pt was saved" in again
    assert "there is no checkpoint of before to go back to" in again.splitlines()[-1]
    assert spoilt(saved) is None


def test_resume_must(first: Path, shelf: Path) -> None:
    printed = train(shelf, kinds(FIRST), "run.name=nothing", "--resume", "must", code=2)
    assert "error: --resume must: runs/nothing/checkpoints holds no checkpoint" in printed
    assert not (shelf / "runs" / "nothing").exists()


def test_other_classes_in_the_same_folder_are_refused(first: Path, shelf: Path) -> None:
    printed = train(shelf, kinds(SECOND), "train.epochs=7", code=2)
    assert "data.classes" in printed.splitlines()[-1]


def test_from_another_working_directory(first: Path, shelf: Path, tmp_path: Path) -> None:
    command = [sys.executable, *OWN, "--data", str(shelf / "pets"), *SMALL, kinds(FIRST), "train.steps=1"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environ(), capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "resnet20-pets" / "summary.json").exists()


def test_other_first_weights_are_another_run(first: Path, shelf: Path) -> None:
    words = [kinds(SECOND), "train.steps=2"]
    train(shelf, *words, "--init-from", str(first))
    assert (shelf / "runs" / "resnet20-pets-finetuned").is_dir()
    other = first / "checkpoints" / "last.pt"
    printed = train(shelf, *words, "--init-from", str(other), code=2)
    assert printed.splitlines()[-1].startswith(f"error: model.weights is {other}, but runs/resnet20-pets-finetuned")
    assert "--fresh" in printed
    assert "finished already" in train(shelf, *words, "--init-from", str(first))


def test_a_folder_of_classes_is_no_place_for_runs(shelf: Path) -> None:
    command = [sys.executable, *OWN, "--data", ".", *SMALL]
    done = subprocess.run(command, cwd=shelf / "pets", env=environ(), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "lies among the class folders" in done.stderr
    assert not (shelf / "pets" / "runs").exists()


def test_fresh_on_a_full_disk_moves_nothing(first: Path, small_disk: Path, shelf: Path) -> None:
    run = small_disk / "run"
    run.mkdir()
    (run / "summary.json").write_text("{}")
    printed = train(shelf, kinds(FIRST), f"run.dir={run}", "--fresh", code=2)
    assert "cannot write checkpoints to" in printed
    assert [path.name for path in small_disk.iterdir()] == ["run"]
    assert (run / "summary.json").read_text() == "{}"


def test_fresh_moves_only_what_a_run_wrote(first: Path, shelf: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "other").mkdir()
    for _ in range(2):
        train(shelf, kinds(FIRST), f"run.dir={tmp_path}", "train.steps=1", "--fresh")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (aside,) = tmp_path.parent.glob(f"{tmp_path.name}.20*")
    assert {path.name for path in aside.iterdir()} == {"checkpoints", "config.yaml", "metrics.jsonl", "summary.json"}
