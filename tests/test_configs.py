"""Every file in configs/ loads, is a run of its own, and trains three steps."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torchvision

from distrib.checkpoint import newest_valid
from distrib.cli import dump_config, load_config
from distrib.models import MODEL_NAMES

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
TINY = [
    "data.loader=synthetic",
    "data.synthetic.train=12",
    "data.synthetic.val=5",
    "data.size=32",
    "data.eval_resize=32",
    "data.eval_size=32",
    "data.eval_batch=8",
    "train.global_batch=4",
    "train.steps=3",
    "train.compile=false",
    "wandb.mode=disabled",
]


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def config(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A run folder that goes with the test: the large networks' checkpoints have hundreds of megabytes."""
    yield tmp_path / "run"
    shutil.rmtree(tmp_path / "run", ignore_errors=True)


def test_there_are_configs() -> None:
    assert (ROOT / "configs" / "resnet50.yaml") in CONFIGS


def test_each_is_a_run_of_its_own() -> None:
    loaded = [load_config(path) for path in CONFIGS]
    for values in ([c.run.name for c in loaded], [c.run.dir for c in loaded]):
        assert len(set(values)) == len(values)


def test_it_loads_and_its_dump_loads_to_the_same(config: Path, tmp_path: Path) -> None:
    loaded = load_config(config)
    assert loaded.model.name in MODEL_NAMES
    (tmp_path / "dump.yaml").write_text(dump_config(loaded))
    assert load_config(tmp_path / "dump.yaml") == loaded


@pytest.fixture(scope="module")
def torch_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where torch finds "ImageNet's" weights without a network."""
    home = tmp_path_factory.mktemp("torch")
    name = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    (home / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(torchvision.models.resnet18().state_dict(), home / "hub" / "checkpoints" / name)
    return home


def test_it_trains_three_steps(config: Path, folder: Path, torch_home: Path) -> None:
    command = [sys.executable, "train.py", "--config", str(config), *TINY, f"run.dir={folder}"]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}
    environ["TORCH_HOME"] = str(torch_home)
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["step"], summary["images"]) == ("finished", 3, 5)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(r["kind"], r["step"]) for r in records] == [("train", 3), ("eval", 3)]
    assert newest_valid(folder / "checkpoints", pytest.fail) == folder / "checkpoints" / "step_00000003.pt"
    asked, written = load_config(config).model, load_config(folder / "config.yaml").model
    assert written.num_classes == 1000  # of the synthetic images
    assert written == asked.model_copy(update={"num_classes": written.num_classes})
