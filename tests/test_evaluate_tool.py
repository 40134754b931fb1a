"""``distrib evaluate``: the run's own figures again, anybody's weights, and one line for what does not fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
import torchvision
from PIL import Image

from distrib.config import Config, DataConfig, UserError
from distrib.models import build_model
from distrib.trained import open_trained, output_of

SMALL = ["data.size=16", "data.eval_resize=16", "data.workers=1", "train.global_batch=50", "data.eval_batch=100"]


def evaluate(*words: str, procs: int = 1, code: int = 0, cwd: Path = runs.ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "distrib", "evaluate", *words]
    if procs > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={procs}"]
        command = [*torchrun, "--local-addr=localhost", "-m", "distrib.tools.evaluate", *words]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(runs.ROOT)}
    done = subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def result(*words: str, procs: int = 1) -> dict[str, float]:
    return json.loads(evaluate(*words, "--json", procs=procs).stdout)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on three classes of the sample, with an EMA."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    kinds = "data.classes=[1-trouser,8-bag,9-ankle-boot]"
    words = ["--config=configs/quickstart.yaml", *SMALL, kinds, "data.fraction=0.2", "train.epochs=2", "ema.decay=0.5"]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(runs.command(1, *words, f"run.dir={folder}"), cwd=runs.ROOT, env=environ, check=True, timeout=180)
    return folder


@pytest.mark.parametrize("procs", [1, 2])
def test_the_runs_own_figures(run: Path, procs: int) -> None:
    summary = json.loads((run / "summary.json").read_text())
    logged = next(r for r in runs.records(run, "eval") if r["step"] == summary["best"]["step"])
    found = result(str(run), procs=procs)
    assert (found["top1"], found["top5"], found["images"]) == (logged["ema_top1"], logged["ema_top5"], logged["images"])
    assert found["loss"] == pytest.approx(logged["ema_loss"], rel=1e-12)
    assert f"step {summary['best']['step']}" in str(found["weights"])


def test_the_sentence_and_the_training_images(run: Path) -> None:
    said = evaluate(str(run), "--split", "train").stdout
    assert said.startswith(f"{run}/checkpoints/best.pt (EMA, step ")
    trained_on = torch.load(run / "checkpoints" / "last.pt", weights_only=True)
    assert trained_on["classes"] == ["1-trouser", "8-bag", "9-ankle-boot"]
    assert "top-5" not in said  # of three classes
    assert " on 490 images of " in said  # a fifth of each class


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes of three pictures, at the size that is evaluated, without train/ and val/."""
    place, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(1)
    for name in ("ant", "bee", "cat", "dog"):
        (place / name).mkdir()
        for i in range(3):
            Image.fromarray(random.integers(0, 256, (32, 32, 3)).astype(np.uint8)).save(place / name / f"{i}.png")
    return place


def torchvision_file(folder: Path, outputs: int) -> tuple[Path, torch.nn.Module]:
    torch.manual_seed(outputs)
    network = torchvision.models.resnet18(num_classes=outputs).eval()
    torch.save({"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}}, folder / "r18.pth")
    return folder / "r18.pth", network


def test_torchvisions_weights_score_as_torchvision_does(pictures: Path, tmp_path: Path) -> None:
    file, network = torchvision_file(tmp_path, 4)
    found = result(
        str(file), "--data", str(pictures), "data.eval_size=32", "data.eval_resize=32", "train.precision=fp32"
    )
    images, labels = [], []
    for k, name in enumerate(("ant", "bee", "cat", "dog")):
        for i in range(3):
            images.append(np.asarray(Image.open(pictures / name / f"{i}.png")))
            labels.append(k)
    cfg = DataConfig()
    batch = (torch.from_numpy(np.stack(images)).float() - torch.tensor(cfg.mean)) / torch.tensor(cfg.std)
    with torch.inference_mode():
        logits = network(batch.permute(0, 3, 1, 2))
    target = torch.tensor(labels)
    assert found["images"] == 12
    assert found["top1"] == pytest.approx(100 * (logits.argmax(1) == target).double().mean().item())
    assert found["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, target).item(), rel=1e-4)


def test_class_folders_are_the_outputs_of_their_names(run: Path, tmp_path: Path) -> None:
    trained = open_trained(str(run), None, [], print)
    assert output_of(["9-ankle-boot", "1-trouser"], trained) == [2, 0]
    one = [
        result(str(run), "--data", "sample:fashion-mnist", f"data.classes=[{name}]") for name in trained.classes or ()
    ]
    own = result(str(run))
    assert [part["images"] for part in one] == [167, 198, 198]
    assert sum(part["top1"] * part["images"] for part in one) == pytest.approx(own["top1"] * own["images"])


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["/nope", "--data", "{pictures}"], "cannot read"),
        (["{file}", "--data", "{pictures}/nope"], "no data at"),
        (["{file}", "--data", "{pictures}", "--model", "resnet50"], "are of resnet18, not resnet50"),
        (["{five}", "--data", "{pictures}"], "tells 5 classes apart and knows no names, but there are 4"),
        (["{run}", "--data", "{pictures}"], "does not know the class ant nor 3 more; it knows 1-trouser, 8-bag"),
        (["{rubbish}", "--data", "{pictures}"], "is damaged, or no file of weights"),
        (["{file}", "--data", "{pictures}", "data.eval_sise=32"], "did you mean data.eval_size?"),
        (["{file}", "--data", "{pictures}", "--split", "test"], "invalid choice"),
        ([], "the following arguments are required: weights"),
    ],
)
def test_one_line_for_what_does_not_fit(words: list[str], part: str, run: Path, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "rubbish.pt").write_bytes(b"rubbish" * 99)
    for name in ("four", "five"):
        (tmp_path / name).mkdir()
    names = {"run": run, "pictures": pictures, "rubbish": tmp_path / "rubbish.pt"}
    names |= {"file": torchvision_file(tmp_path / "four", 4)[0], "five": torchvision_file(tmp_path / "five", 5)[0]}
    done = evaluate(*(word.format(**names) for word in words), code=2)
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("indexing")]
    assert line.startswith("error: ")
    assert part in line
    assert done.stdout == ""


def test_a_checkpoint_of_another_version(tmp_path: Path) -> None:
    config = Config.model_validate({"model": {"name": "resnet20", "num_classes": 4}, "ema": {"decay": 0.5}})
    torch.manual_seed(0)
    file, values = tmp_path / "a.pt", config.model_dump(mode="json")
    state = build_model(config.model).state_dict()
    values["ema"]["older"], values["gone"] = 1, {"key": 2}  # keys that are no more are passed over
    torch.save({"model": state, "config": values, "classes": None}, file)
    assert open_trained(str(file), None, [], print).config.ema == config.ema
    torch.save({"model": state, "config": values | {"data": {"size": "big"}}}, file)
    with pytest.raises(UserError, match=r"of another version: data\.size is not what it takes here"):
        open_trained(str(file), None, [], print)
    torch.save({k: v for k, v in state.items() if not k.startswith("fc.")}, file)
    with pytest.raises(UserError, match="have no last layer"):
        open_trained(str(file), None, [], print)
