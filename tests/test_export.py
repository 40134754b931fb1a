"""Exported files, read by those for whom they are made, give what the network gives; nothing else gets a name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import runs
import safetensors.torch
import timm
import torch
import torchvision
from PIL import Image
from torch import nn

from distrib.config import Config, DataConfig, ModelConfig, UserError
from distrib.data import EvalPlan, build_loader
from distrib.data.index import open_index
from distrib.engine.evaluate import Evaluator
from distrib.engine.prepare import Objective
from distrib.faults import Agreement, Failure, Interrupted
from distrib.layout import find_split
from distrib.models import build_model
from distrib.runtime import Runtime
from distrib.tools.export import forms, states
from distrib.tools.export.__main__ import export, parse, sentences
from distrib.trained import open_trained

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = ("ant", "bee", "cat", "dög", "eel")
MEAN, STD = (120.0, 115.0, 100.0), (60.0, 58.0, 57.0)
ON, OFF = (SimpleNamespace(requested=lambda on=on: on) for on in (True, False))


def randomised(net: nn.Module) -> nn.Module:
    """With statistics and gammas that no fresh network has, and logits that depend on the image."""
    generator = torch.Generator().manual_seed(1)
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.weight.data.uniform_(0.5, 1.5, generator=generator)
            norm.bias.data.normal_(0, 0.2, generator=generator)
            norm.running_mean.normal_(0, 0.2, generator=generator)
            norm.running_var.uniform_(0.5, 2, generator=generator)
    with torch.inference_mode():
        assert net.eval()(images(2, 3, 48, 48)).diff(dim=0).abs().max() > 1e-4  # without shortcuts little arrives
    return net


def checkpoint(path: Path, net: nn.Module, classes: tuple[str, ...] = CLASSES, **model: Any) -> Path:
    """As a run saves it: the averaged network is the one that counts."""
    data = {"size": 40, "mean": MEAN, "std": STD, "eval_size": 48, "eval_resize": 56}
    config = Config.model_validate({"model": {"num_classes": len(classes), **model}, "data": data})
    state = net.state_dict()
    other = {key: tensor + 1 for key, tensor in state.items()}
    body = {"model": other, "model_ema": state, "classes": list(classes), "config": config.model_dump(mode="json")}
    torch.save(body | {"progress": {"step": 12}}, path)
    return path


@pytest.fixture(scope="module")
def reference() -> nn.Module:
    """Torchvision's, of which ours is another form."""
    torch.manual_seed(3)
    return randomised(torchvision.models.resnet18(num_classes=len(CLASSES)))


@pytest.fixture(scope="module")
def file(reference: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("exported") / "a.pt", reference, name="resnet18")


def exported(file: Path, form: str, output: Path, *words: str, stop: SimpleNamespace = OFF) -> dict[str, Any]:
    return export(parse([str(file), "--to", form, "--output", str(output), *words]), stop)


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def same(call: Any, reference: nn.Module, *shape: int) -> bool:
    with torch.inference_mode():
        return torch.equal(call(images(*shape)), reference(images(*shape)))


def test_torchvisions(file: Path, reference: nn.Module, tmp_path: Path) -> None:
    result = exported(file, "torchvision", tmp_path / "a.pth")
    net = torchvision.models.resnet18(num_classes=5)
    net.load_state_dict(torch.load(tmp_path / "a.pth", weights_only=True))
    assert same(net.eval(), reference, 2, 3, 64, 64)
    assert result["weights"] == f"{file} (EMA, step 12)"
    assert (result["model"], result["classes"], result["bytes"]) == ("resnet18", 5, (tmp_path / "a.pth").stat().st_size)
    assert result["compared"]["difference"] == 0
    assert result["compared"]["shapes"] == ((1, 48, 48), (2, 48, 48), (5, 48, 48), (2, 60, 54))
    said = sentences(result)
    assert "torchvision.models.resnet18(num_classes=5)" in said
    assert "48×48 and 60×54, equal to the bit" in said
    assert os.listdir(tmp_path) == ["a.pth"]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_timms(suffix: str, file: Path, reference: nn.Module, tmp_path: Path) -> None:
    exported(file, "timm", tmp_path / f"a{suffix}")
    net = timm.create_model("resnet18", num_classes=5, checkpoint_path=str(tmp_path / f"a{suffix}"))
    assert same(net.eval(), reference, 2, 3, 64, 64)


def test_safetensors_tell_what_the_run_knew(file: Path, reference: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    exported(file, "safetensors", path, "data.eval_resize=50")
    state = safetensors.torch.load_file(path)
    assert state.keys() == reference.state_dict().keys()
    assert all(torch.equal(tensor, reference.state_dict()[key]) for key, tensor in state.items())
    with safetensors.safe_open(path, "pt") as opened:
        told = opened.metadata()
    assert (told["model.name"], told["model.stem"], told["model.plain"]) == ("resnet18", "null", "false")
    assert (json.loads(told["classes"]), json.loads(told["data.mean"])) == (list(CLASSES), list(MEAN))
    assert told["source"] == f"{file} (EMA, step 12)"
    again = open_trained(str(path), None, [])
    assert again.classes == CLASSES
    data = again.config.data
    assert (data.mean, data.std, data.eval_size, data.eval_resize) == (MEAN, STD, 48, 50)
    assert same(again.network, reference, 1, 3, 64, 64)


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"name": "resnet20"}, "resnet20"),
        ({"name": "resnet18", "stem": "small"}, "resnet18 with the small stem"),
        ({"name": "resnet18", "plain": True}, "resnet18 without shortcuts"),
        ({"name": "resnet20", "plain": True, "stem": "imagenet"}, "resnet20 without shortcuts"),
    ],
)
def test_networks_that_others_lack(settings: dict[str, Any], kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = randomised(build_model(ModelConfig(num_classes=5, **settings)))
    file = checkpoint(tmp_path / "in.pt", net, **settings)
    for form in ("torchvision", "timm"):
        with pytest.raises(UserError, match=rf"network, {kind}, is none of {form}'s; safetensors, onnx and torch.ex"):
            exported(file, form, tmp_path / "a.pth")
    exported(file, "safetensors", tmp_path / "a.safetensors")
    again = open_trained(str(tmp_path / "a.safetensors"), None, []).config.model
    assert (again.name, again.stem, again.plain) == (
        settings["name"],
        settings.get("stem"),
        settings.get("plain", False),
    )
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "in.pt"]


@pytest.fixture(scope="module")
def graph(file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    path = tmp_path_factory.mktemp("graph") / "a.onnx"
    return path, exported(file, "onnx", path)


def test_onnx_in_onnxruntime(graph: tuple[Path, dict[str, Any]], reference: nn.Module) -> None:
    path, result = graph
    assert os.listdir(path.parent) == ["a.onnx"]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for shape in ((1, 3, 48, 48), (2, 3, 48, 48), (5, 3, 48, 48), (3, 3, 33, 70), (1, 3, 224, 224), (2, 3, 20, 20)):
        (found,) = session.run(["logits"], {"images": images(*shape).numpy()})
        with torch.inference_mode():
            expected = reference(images(*shape))
        assert found.dtype == np.float32
        assert (torch.from_numpy(found) - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert 0 < result["compared"]["relative"] < 1e-5
    assert "of the largest" in sentences(result)


def test_what_the_onnx_file_says(graph: tuple[Path, dict[str, Any]], file: Path) -> None:
    model = onnx.load(graph[0])
    assert [(each.domain, each.version) for each in model.opset_import] == [("", graph[1]["opset"])]
    (taken,), (given,) = model.graph.input, model.graph.output
    dims = [[d.dim_param or d.dim_value for d in each.type.tensor_type.shape.dim] for each in (taken, given)]
    assert (taken.name, given.name, dims) == ("images", "logits", [["N", 3, "H", "W"], ["N", 5]])
    assert taken.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    told = {each.key: each.value for each in model.metadata_props}
    values = {key: json.loads(told[key]) for key in ("mean_0_to_255", "std_0_to_255", "classes", "size", "resize")}
    expected = {"mean_0_to_255": list(MEAN), "std_0_to_255": list(STD), "classes": list(CLASSES)}
    assert values == expected | {"size": 48, "resize": 56}
    assert json.loads(told["mean_0_to_1"]) == pytest.approx([120 / 255, 115 / 255, 100 / 255])
    assert json.loads(told["std_0_to_1"]) == pytest.approx([60 / 255, 58 / 255, 57 / 255])
    assert (told["model"], told["source"]) == ("resnet18", f"{file} (EMA, step 12)")
    assert str(Path(__file__).parent.parent).encode() not in graph[0].read_bytes()  # where whose code lies


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Eleven made-up pictures of each class, coarse, so that the network's answers differ."""
    random = np.random.default_rng(1)
    for name in CLASSES:
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(11):
            blocks = random.integers(0, 256, (4, 5, 3)).astype(np.uint8)
            Image.fromarray(blocks).resize((80, 64)).save(tmp_path / "pictures" / name / f"{i}.png")
    return tmp_path / "pictures"


def test_onnx_counts_as_the_evaluator_does(
    graph: tuple[Path, dict[str, Any]], file: Path, pictures: Path, tmp_path: Path
) -> None:
    trained = open_trained(str(file), None, [f"data.root={pictures}", "data.loader=torchvision", "data.workers=0"])
    cfg = trained.config.data.model_copy(update={"eval_batch": 8})
    index = open_index(find_split(cfg, "val", whole=True), str(tmp_path / "lists"), lambda text: None)
    assert (len(index), tuple(index.classes)) == (55, tuple(sorted(CLASSES)))
    loader, plan = build_loader(cfg, (index, index), 5, torch.device("cpu")), EvalPlan(len(index), 8)
    objective = Objective(trained.network, cfg.mean, cfg.std, torch.float32)
    alone = Runtime(0, 1, 0, 1, torch.device("cpu"))
    evaluator, stop = Evaluator(objective, ["model"], compile_=False), SimpleNamespace(received=None)
    weights = {"model": trained.network.state_dict()}
    expected = evaluator(weights, loader.evaluate(plan), plan, alone, Agreement(), stop)
    session = onnxruntime.InferenceSession(graph[0], providers=["CPUExecutionProvider"])
    told = {each.key: each.value for each in onnx.load(graph[0]).metadata_props}
    mean, std = (np.float32(json.loads(told[f"{key}_0_to_1"]))[:, None, None] for key in ("mean", "std"))
    right, answers = 0, []
    for batch in loader.evaluate(plan):
        pixels = batch.images.numpy().astype(np.float32) / np.float32(255)
        (logits,) = session.run(["logits"], {"images": (pixels - mean) / std})
        right += int((logits.argmax(1) == batch.labels.numpy()).sum())
        answers += logits.argmax(1).tolist()
    assert len(set(answers)) > 1  # or the count would say little
    assert expected is not None
    assert (right, len(answers)) == (round(expected["top1"] * 55 / 100), expected["images"])


def test_torch_export(file: Path, reference: nn.Module, tmp_path: Path) -> None:
    result = exported(file, "torch.export", tmp_path / "a.pt2")
    extra = {"about.json": ""}
    call = torch.export.load(tmp_path / "a.pt2", extra_files=extra).module()
    for shape in ((1, 3, 48, 48), (5, 3, 48, 48), (2, 3, 33, 70), (1, 3, 224, 224)):
        assert same(call, reference, *shape)
    told = json.loads(extra["about.json"])
    assert (json.loads(told["classes"]), json.loads(told["mean_0_to_255"])) == (list(CLASSES), list(MEAN))
    assert result["compared"]["difference"] == 0


def test_torch_export_of_pictures_that_shrink_to_a_pixel(file: Path, reference: nn.Module, tmp_path: Path) -> None:
    words = ["data.eval_size=32", "data.eval_resize=32"]
    result = exported(file, "torch.export", tmp_path / "a.pt2", *words)
    assert same(torch.export.load(tmp_path / "a.pt2").module(), reference, 7, 3, 32, 32)
    assert result["compared"]["shapes"] == ((1, 32, 32), (2, 32, 32), (5, 32, 32))


# What is refused


@pytest.mark.parametrize(
    ("form", "name", "part"),
    [
        ("onnx", "a.pth", r"a\.pth: onnx is written as \.onnx$"),
        ("timm", "a.onnx", r"a\.onnx: timm is written as \.safetensors, \.pth or \.pt$"),
        ("torchvision", "a", r"torchvision is written as \.pth or \.pt$"),
        ("torch.export", "a.pt", r"torch\.export is written as \.pt2$"),
        ("safetensors", "there.safetensors", r"there\.safetensors exists: name another file, or remove it"),
        ("onnx", "nope/a.onnx", "there is no folder .*nope"),
        ("onnx", "there.safetensors/a.onnx", "there is no folder"),
        ("onxx", "a.onnx", "invalid choice: 'onxx'"),
    ],
)
def test_mistakes_are_told_before_the_weights_are_read(form: str, name: str, part: str, tmp_path: Path) -> None:
    (tmp_path / "there.safetensors").write_bytes(b"kept")
    with pytest.raises(UserError, match=part) as raised:
        exported(Path("/nope.pt"), form, tmp_path / name)
    assert len(str(raised.value).splitlines()) == 1
    assert os.listdir(tmp_path) == ["there.safetensors"]
    assert (tmp_path / "there.safetensors").read_bytes() == b"kept"


@pytest.mark.parametrize(
    ("form", "gone", "part"),
    [
        ("timm", {"timm"}, "--to timm needs timm, which is not installed: pip install 'distrib[export]'"),
        ("onnx", {"onnxscript"}, "--to onnx needs onnxscript, which is not installed"),
        ("onnx", {"onnx", "onnxscript", "onnxruntime"}, "needs onnx, onnxscript and onnxruntime, which are not"),
    ],
)
def test_missing_packages(
    form: str, gone: set[str], part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forms, "find_spec", lambda name: None if name in gone else True)
    with pytest.raises(UserError) as raised:
        exported(Path("/nope.pt"), form, tmp_path / f"a{forms.FORMS[form].suffixes[0]}")
    assert part in str(raised.value)


def test_a_process_says_one_line_and_2(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "distrib",
        "export",
        "nope",
        "--to",
        "onnx",
        "--output",
        "a.bin",
    ]
    environ = os.environ | {"PYTHONPATH": str(runs.ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=300, check=False)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert line == "error: --output a.bin: onnx is written as .onnx"
    assert (done.returncode, done.stdout, os.listdir(tmp_path)) == (2, "", [])
    assert "distrib.tools.export.forms" in imported
    assert "torch" not in imported


def test_a_file_that_gives_other_logits_gets_no_name(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = states.write

    def wrong(form: str, trained: Any, suffix: str) -> bytes:
        other = build_model(trained.config.model)
        other.load_state_dict(trained.network.state_dict())
        other.fc.bias.data[2] += 0.01
        return write(form, SimpleNamespace(**{**vars(trained), "network": other, "names": trained.names}), suffix)

    monkeypatch.setattr(states, "write", wrong)
    for form, name in (("torchvision", "a.pth"), ("timm", "a.pth"), ("safetensors", "a.safetensors")):
        with pytest.raises(Failure, match=r"differ from the network's by 0\.01 on 1 images of 48×48"):
            exported(file, form, tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_logits_that_are_no_numbers(tmp_path: Path) -> None:
    net = randomised(build_model(ModelConfig(name="resnet20", num_classes=5)))
    net.fc.weight.data.fill_(3e38)
    file = checkpoint(tmp_path / "in.pt", net, name="resnet20")
    with pytest.raises(Failure, match="are no numbers"):
        exported(file, "safetensors", tmp_path / "a.safetensors")
    assert os.listdir(tmp_path) == ["in.pt"]


def test_a_stop_leaves_nothing(file: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        exported(file, "torchvision", tmp_path / "a.pth", stop=ON)
    assert os.listdir(tmp_path) == []


def test_others_weights_tell_no_classes(reference: nn.Module, tmp_path: Path) -> None:
    torch.save(reference.state_dict(), tmp_path / "in.pth")
    exported(tmp_path / "in.pth", "safetensors", tmp_path / "a.safetensors", "data.eval_size=40", "data.eval_resize=40")
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as opened:
        told = opened.metadata()
    assert "classes" not in told
    assert json.loads(told["data.mean"]) == list(DataConfig().mean)
    assert open_trained(str(tmp_path / "a.safetensors"), None, []).classes is None
