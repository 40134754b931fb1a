"""A stranger's path: the README's commands on a trained network, typed in a fresh copy of the tree, each a process."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import runs
import safetensors.torch
import timm
import torch
import torchvision
from PIL import Image

SHORT = ["train.epochs=1", "data.fraction=0.25"]  # of the README's training
RUN = "runs/quickstart"


def readme_commands() -> list[str]:
    """The lines of the README's block on trained networks, without their remarks."""
    text = (runs.ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition("## Using a trained network")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```\n(.*?)```", section, re.DOTALL)
    return [line.partition(" #")[0].strip() for line in block.splitlines()]


class Clone:
    """A copy of what is, or would be, in the repository, with a home of its own."""

    def __init__(self, folder: Path) -> None:
        self.tree, home = folder / "clone", folder / "home"
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(command, cwd=runs.ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
        for name in filter(None, names):
            if (runs.ROOT / name).is_file():  # not one that was deleted and not yet committed
                (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(runs.ROOT / name, self.tree / name)
        home.mkdir()
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("XDG_", "PYTHON"))}
        one = {"HOME": str(home), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(self.tree)}
        self.environ = kept | one
        self.images = home / ".cache" / "distrib" / "fashion-mnist-10k" / "val"

    def type(self, line: str, *more: str) -> str:
        """What a line prints, with our Python, and ``distrib`` of the copy; it must end well."""
        words = shlex.split(line.replace("~", self.environ["HOME"]))
        start = {"python": [sys.executable], "distrib": [sys.executable, "-m", "distrib"]}[words[0]]
        done = subprocess.run(
            [*start, *words[1:], *more], cwd=self.tree, env=self.environ, capture_output=True, text=True, timeout=300,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """The copy after its README's training, in short."""
    made = Clone(tmp_path_factory.mktemp("stranger"))
    train = readme_commands()[0]
    assert train == "python train.py --config quickstart"
    made.type(train, *SHORT)
    return made


@pytest.fixture(scope="module")
def evaluated(clone: Clone) -> dict[str, float]:
    """In fp32, which the other programs compute in."""
    return json.loads(clone.type(f"distrib evaluate {RUN} --json", "train.precision=fp32"))


def test_the_readmes_commands_end_well(clone: Clone) -> None:
    said = {line.split()[1]: clone.type(line) for line in readme_commands()[1:]}
    assert set(said) == {"evaluate", "predict", "features", "export", "models"}
    assert "worst classes" in said["evaluate"]
    assert said["predict"].count("\n") == len(list((clone.images / "8-bag").iterdir()))
    assert np.load(clone.tree / "features.npy").shape == (2000, 64)
    assert (clone.tree / "features.txt").read_text().count("\n") == 2000
    assert "resnet50" in said["models"]


def test_the_figures_are_the_runs_own(clone: Clone) -> None:
    found = json.loads(clone.type(f"distrib evaluate {RUN} --json"))
    (logged,) = runs.records(clone.tree / RUN, "eval")
    assert {key: found[key] for key in ("top1", "top5", "images")} == {
        key: logged[key] for key in ("top1", "top5", "images")
    }
    assert found["loss"] == pytest.approx(logged["loss"], rel=1e-12)


def test_predictions_are_what_evaluation_counts(clone: Clone, evaluated: dict[str, float]) -> None:
    lines = clone.type(f"distrib predict {shlex.quote(str(clone.images))} --weights {RUN} --json --exact").splitlines()
    found = [json.loads(line) for line in lines]
    assert len(found) == evaluated["images"] == 2000
    right = sum(each["top"][0]["class"] == Path(each["file"]).parent.name for each in found)
    assert 100 * right / len(found) == pytest.approx(evaluated["top1"], abs=0.051)  # one of 2,000: another batch size


def network(path: Path, form: str) -> torch.nn.Module:
    """What others make of an exported file of a ResNet-18."""
    if form == "torchvision":
        made = torchvision.models.resnet18(num_classes=3)
        made.load_state_dict(torch.load(path, weights_only=True))
        return made.eval()
    if form == "timm":
        return timm.create_model("resnet18", num_classes=3, checkpoint_path=str(path)).eval()
    return torch.export.load(path).module()


def test_onnxruntime_counts_the_same(clone: Clone, evaluated: dict[str, float]) -> None:
    file = clone.tree / "counted.onnx"
    clone.type(f"distrib export {RUN} --to onnx --output counted.onnx")
    session = onnxruntime.InferenceSession(file)
    about = session.get_modelmeta().custom_metadata_map
    classes, mean, std = (json.loads(about[key]) for key in ("classes", "mean_0_to_255", "std_0_to_255"))
    right = 0
    for label, name in enumerate(classes):
        pictures = [np.asarray(Image.open(each).convert("RGB")) for each in sorted((clone.images / name).iterdir())]
        images = (np.stack(pictures).astype(np.float32) - np.float32(mean)) / np.float32(std)
        (logits,) = session.run(["logits"], {"images": np.ascontiguousarray(images.transpose(0, 3, 1, 2))})
        right += int((logits.argmax(1) == label).sum())
    assert 100 * right / 2000 == pytest.approx(evaluated["top1"], abs=0.051)


@pytest.mark.parametrize(("form", "suffix"), [("torchvision", ".pth"), ("timm", ".pth"), ("torch.export", ".pt2")])
def test_what_others_load_computes_the_same(form: str, suffix: str, clone: Clone, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=3).eval()
    weights, out = tmp_path / "weights.pth", tmp_path / f"out{suffix}"
    torch.save(theirs.state_dict(), weights)
    clone.type(f"distrib export {weights} --to {form} --output {out}")
    images = torch.randn(4, 3, 224, 224)
    with torch.inference_mode():
        assert torch.equal(network(out, form)(images), theirs(images))


def test_safetensors_come_back(clone: Clone, evaluated: dict[str, float]) -> None:
    clone.type(f"distrib export {RUN} --to safetensors --output back.safetensors")
    saved = torch.load(clone.tree / RUN / "checkpoints" / "best.pt", weights_only=True)["model"]
    state = safetensors.torch.load_file(clone.tree / "back.safetensors")
    assert state.keys() == saved.keys()
    assert all(torch.equal(state[key], saved[key]) for key in saved)
    again = json.loads(
        clone.type(
            f"distrib evaluate back.safetensors --data {shlex.quote(str(clone.images))} --json train.precision=fp32"
        )
    )
    assert (again["top1"], again["loss"]) == (evaluated["top1"], evaluated["loss"])
