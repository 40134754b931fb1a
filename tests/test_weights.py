"""Weights from files of all forms and from torchvision by name; what does not fit or is damaged is one line."""

from __future__ import annotations

import argparse
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from test_bad_input import SYNTHETIC, refused, start
from torch import nn

from distrib import weights as weights_module
from distrib.checkpoint import commit
from distrib.config import Config, ModelConfig, UserError
from distrib.models import build_model
from distrib.trained import open_trained
from distrib.weights import Weights, describe, load_weights, read_file, read_weights

CLASSES = 7
State = dict[str, torch.Tensor]

pytestmark = pytest.mark.usefixtures("one_thread")


def randomised(net: nn.Module) -> nn.Module:
    """With statistics and gammas that no fresh network has."""
    generator = torch.Generator().manual_seed(1)
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.weight.data, norm.running_mean, norm.running_var):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            norm.num_batches_tracked.fill_(11)
    return net.eval()


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    torch.manual_seed(3)
    return randomised(torchvision.models.resnet18(num_classes=CLASSES))


@pytest.fixture
def state(theirs: nn.Module) -> State:
    return dict(theirs.state_dict())


def load(
    text: str | Path, classes: list[str] | None = None, heard: list[str] | None = None, **settings: Any
) -> tuple[nn.Module, str]:
    cfg = ModelConfig(**{"name": "resnet18", "num_classes": CLASSES, "weights": str(text), **settings})
    torch.manual_seed(0)
    net = build_model(cfg)
    return net.eval(), load_weights(net, cfg, classes, (heard if heard is not None else []).append)


def error(text: str | Path, **settings: Any) -> str:
    """The one line that a load must end in."""
    with pytest.raises(UserError) as raised:
        load(text, **settings)
    line = str(raised.value)
    assert len(line.splitlines()) == 1
    return line


def saved(content: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def same_outputs(net: nn.Module, reference: nn.Module) -> bool:
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        return torch.equal(net(images), reference(images))


def shifted(state: State) -> State:
    """Other weights, which must not be taken."""
    return {key: tensor + 1 for key, tensor in state.items()}


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: tensor for key, tensor in state.items()}


FORMS: dict[str, Callable[[State], Any]] = {
    "bare": lambda s: s,
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "model": lambda s: {"model": s, "optimizer": {"state": {}}},
    "model_ema": lambda s: {"model": shifted(s), "model_ema": s},
    "state_dict_ema": lambda s: {"state_dict": shifted(s), "state_dict_ema": s},
    "ema": lambda s: {"model": shifted(s), "ema": s},
    "an average that is none": lambda s: {"model": s, "model_ema": None},
    "DDP": lambda s: {"state_dict": prefixed(s, "module.")},
    "compiled": lambda s: prefixed(s, "_orig_mod."),
    "compiled DDP": lambda s: prefixed(s, "_orig_mod.module."),
    "DDP of compiled, averaged": lambda s: prefixed(s, "module.module._orig_mod."),
    "torchvision's script": lambda s: {
        "model": shifted(s),
        "model_ema": {"n_averaged": torch.tensor(5), **prefixed(s, "module.")},
        "args": argparse.Namespace(lr=0.1, model="resnet18"),
    },
    "before counters": lambda s: {k: v for k, v in s.items() if not k.endswith("num_batches_tracked")},
    "parameters": lambda s: {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in s.items()},
}


@pytest.mark.parametrize(("form", "zipped"), [*((form, True) for form in FORMS), ("model_ema", False)])
def test_torchvisions_in_each_form(form: str, zipped: bool, state: State, theirs: nn.Module, tmp_path: Path) -> None:
    torch.save(FORMS[form](state), tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    net, said = load(tmp_path / "a.pth")
    assert same_outputs(net, theirs)
    if form != "before counters":
        assert net.bn1.num_batches_tracked == 11
    average = form in ("model_ema", "state_dict_ema", "ema", "torchvision's script")
    assert said == f"weights: {tmp_path}/a.pth" + " (EMA)" * average


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
@pytest.mark.parametrize("form", ["pth", "pth wrapped", "safetensors"])
def test_timms(name: str, form: str, tmp_path: Path) -> None:
    reference = randomised(timm.create_model(name, num_classes=CLASSES))
    path = tmp_path / f"a.{form.partition(' ')[0]}"
    if form == "safetensors":
        safetensors.torch.save_file(reference.state_dict(), path)
    else:
        torch.save({"state_dict": reference.state_dict()} if "wrapped" in form else reference.state_dict(), path)
    net, said = load(path, name=name)
    assert same_outputs(net, reference)
    assert said == f"weights: {path}"


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
def test_ours_in_torchvision_and_timm(name: str, tmp_path: Path) -> None:
    net = randomised(build_model(ModelConfig(name=name, num_classes=CLASSES)))
    path = saved({"model": shifted(net.state_dict()), "model_ema": net.state_dict()}, tmp_path / "a.pt")
    reference = torchvision.models.get_model(name, num_classes=CLASSES)
    reference.load_state_dict(torch.load(path, weights_only=True)["model_ema"])
    assert same_outputs(reference.eval(), net)
    assert same_outputs(timm.create_model(name, num_classes=CLASSES, checkpoint_path=str(path)).eval(), net)


# What the metadata of safetensors tell


def described(state: State, path: Path, metadata: dict[str, str] | None) -> Weights:
    safetensors.torch.save_file(state, path, metadata)
    return read_file(path, "x")


def test_metadata_of_ours(state: State, tmp_path: Path) -> None:
    data = {"mean": (1.0, 2.0, 3.0), "eval_size": 40, "eval_resize": 48}
    config = Config.model_validate({"model": {"name": "resnet18", "num_classes": CLASSES}, "data": data})
    names = ["a", "b, c", 'd"', "ü", "\udcff", "null", "7"]
    found = described(state, tmp_path / "a.safetensors", describe(config, names, "a run"))
    assert found.classes == tuple(names)
    kept = {"name": "resnet18", "num_classes": CLASSES, "stem": None, "plain": False}
    sizes = {"mean": [1.0, 2.0, 3.0], "std": [58.395, 57.12, 57.375], "eval_size": 40, "eval_resize": 48}
    assert found.config == {"model": kept, "data": sizes}
    assert all(torch.equal(tensor, state[key]) for key, tensor in found.state.items())
    assert described(state, tmp_path / "b.safetensors", describe(config, None, "a run")).classes is None


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {},
        {"format": "pt"},
        {"classes": "[1", "model.name": "resnet99", "data.mean": "0.485"},
        {"producer": "timm", "classes": '["a", "b", "c", "d", "e", "f", "g"]', "model.name": "resnet50"},
        {"producer": "distribution 3", "classes": "cats"},
        {"producer": "distrib 0", "classes": "cats"},  # damaged
    ],
)
def test_metadata_of_others_mean_nothing(
    metadata: dict[str, str] | None, state: State, theirs: nn.Module, tmp_path: Path
) -> None:
    found = described(state, tmp_path / "a.safetensors", metadata)
    assert (found.classes, dict(found.config)) == (None, {})
    assert same_outputs(open_trained(str(tmp_path / "a.safetensors"), None, []).network, theirs)


@pytest.mark.parametrize(
    ("key", "value"), [("data.mean", "grey"), ("model.stem", "huge"), ("model.num_classes", "-1"), ("model.plain", "2")]
)
def test_metadata_of_ours_with_a_mistake(key: str, value: str, state: State, tmp_path: Path) -> None:
    config = Config.model_validate({"model": {"name": "resnet18", "num_classes": CLASSES}})
    described(state, tmp_path / "a.safetensors", describe(config, None, "a run") | {key: value})
    with pytest.raises(UserError, match=rf"of another version: {key} is not what it takes here"):
        open_trained(str(tmp_path / "a.safetensors"), None, [])


# Where they are


def test_a_runs_folder(state: State, theirs: nn.Module, tmp_path: Path) -> None:
    """best.pt, else last.pt, else the newest step; each is made and the ones before are shown to be passed over."""
    folder, progress = tmp_path / "run", {"progress": {"step": 1000}, "config": {"model": {}}}
    for name in ("step_00000900.pt", "step_100000000.pt", "last.pt", "best.pt"):
        for older in folder.glob("checkpoints/*"):
            saved({"model": shifted(state)}, older)
        path = saved({"model": shifted(state), "model_ema": state, **progress}, folder / "checkpoints" / name)
        for place in (folder, folder / "checkpoints"):
            net, said = load(place)
            assert same_outputs(net, theirs)
            assert said == f"weights: {path} (EMA, step 1000)"


def test_a_path_beside_the_code_or_the_home(state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, home, here = tmp_path / "code", tmp_path / "home", tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(weights_module, "ROOT", code)
    assert error("a/b.pth") == (
        f"model.weights a/b.pth is not in {here} and {code}: name a file, a run's folder, or torchvision's weights as "
        "IMAGENET1K_V1"
    )
    saved(state, code / "a" / "b.pth")
    assert load("a/b.pth")[1] == f"weights: {code}/a/b.pth"
    saved(state, here / "a" / "b.pth")
    assert load("a/b.pth")[1] == "weights: a/b.pth"
    saved(state, home / "c.pth")
    assert load("~/c.pth")[1] == f"weights: {home}/c.pth"


def test_weights_that_are_no_numbers(tmp_path: Path) -> None:
    state = randomised(torchvision.models.resnet18(num_classes=4)).state_dict()
    state["layer2.0.conv1.weight"][0, 0, 0, 0] = float("nan")
    path = saved(state, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"hold numbers that are none \(NaN\) in layer2.0.conv1.weight"):
        load(path, num_classes=4)


# The head


def fresh_head() -> nn.Module:
    torch.manual_seed(0)
    return build_model(ModelConfig(name="resnet18", num_classes=4))


@pytest.mark.parametrize(
    ("known", "mine", "why"),
    [
        (None, None, None),
        (["a", "b", "c", "d"], None, None),
        (None, ["a", "b", "c", "d"], ""),
        (["a", "b", "c", "d"], ["a", "b", "c", "d"], None),
        (["a", "b", "c", "d"], ["a", "b", "e", "d"], "other classes, e where the weights have c"),
        (["b", "a", "c", "d"], ["a", "b", "c", "d"], "other classes, a where the weights have b"),
    ],
)
def test_class_names_decide_on_the_head(
    known: list[str] | None, mine: list[str] | None, why: str | None, tmp_path: Path
) -> None:
    reference = randomised(torchvision.models.resnet18(num_classes=4))
    path = saved({"model": reference.state_dict(), "classes": known}, tmp_path / "a.pt")
    net, said = load(path, num_classes=4, classes=mine)
    unknown = "; the head is theirs, of 4 classes too, whose names the file does not tell"
    ends = {None: "", "": unknown}
    assert said == f"weights: {path}" + ends.get(why, f"; the head is new: {why}")
    head = fresh_head().fc if why else reference.fc
    assert torch.equal(net.fc.weight, head.weight)
    assert torch.equal(net.fc.bias, head.bias)
    assert torch.equal(net.conv1.weight, reference.conv1.weight)


@pytest.mark.parametrize("headless", [False, True])
def test_another_number_of_classes_has_a_new_head(headless: bool, state: State, tmp_path: Path) -> None:
    kept = {key: tensor for key, tensor in state.items() if not (headless and key.startswith("fc."))}
    path = saved({"model": kept, "classes": list("abcdefg")}, tmp_path / "a.pt")
    net, said = load(path, num_classes=4, classes=list("abcd"))
    why = "the weights have none" if headless else f"4 classes, the weights have {CLASSES}"
    assert said == f"weights: {path}; the head is new: {why}"
    assert torch.equal(net.fc.weight, fresh_head().fc.weight)
    assert torch.equal(net.layer4[1].bn2.running_var, state["layer4.1.bn2.running_var"])


# What does not fit


@pytest.mark.parametrize(
    ("settings", "way_out"),
    [
        ({"name": "resnet50"}, "set model.name=resnet18, which they fit"),
        ({"name": "resnet20"}, "set model.name=resnet18, which they fit"),
        ({"stem": "small"}, "set model.stem=null, which they fit"),
        ({"plain": True}, "set model.plain=false, which they fit"),
        ({"name": "resnet34", "stem": "small"}, "set model.name=resnet18 model.stem=null, which they fit"),
    ],
)
def test_another_network_is_named(settings: dict[str, Any], way_out: str, state: State, tmp_path: Path) -> None:
    line = error(saved(state, tmp_path / "a.pth"), **settings)
    assert line.endswith(f": {way_out}")
    assert f"the weights {tmp_path}/a.pth do not fit model.name {settings.get('name', 'resnet18')}: " in line


def test_the_first_differences_and_their_number(state: State, tmp_path: Path) -> None:
    del state["layer1.0.bn1.bias"]
    state["conv1.weight"] = torch.zeros(64, 1, 7, 7)
    path = saved(state, tmp_path / "a.pth")
    assert error(path) == (
        f"the weights {path} do not fit model.name resnet18: conv1.weight is [64, 1, 7, 7], not [64, 3, 7, 7]; they "
        "lack layer1.0.bn1.bias [64]: they are of a network that is not here; name others in model.weights"
    )
    path = saved({**state, "x": torch.zeros(2), "y": torch.zeros(()), "z": torch.zeros(1)}, tmp_path / "a.pth")
    assert "layer1.0.bn1.bias [64]; x [2] is too much and 2 more: " in error(path)


def test_half_a_head(state: State, tmp_path: Path) -> None:
    del state["fc.bias"]
    assert "they lack fc.bias [7]: all but the last layer fits" in error(saved(state, tmp_path / "a.pth"))


def test_a_network_that_is_refused_stays_as_it_was(state: State, tmp_path: Path) -> None:
    del state["layer4.1.bn2.bias"]
    cfg = ModelConfig(name="resnet18", num_classes=CLASSES, weights=str(saved(state, tmp_path / "a.pth")))
    net = build_model(cfg)
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    with pytest.raises(UserError):
        load_weights(net, cfg, None, pytest.fail)
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())


# What is no file of weights


class Trap:
    """Makes a file of its argument where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_not_run(zipped: bool, state: State, tmp_path: Path) -> None:
    torch.save(
        {"model": state, "x": Trap(tmp_path / "sprung")}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped
    )
    assert f"{tmp_path}/a.pt holds Python objects (" in error(tmp_path / "a.pt")
    assert not (tmp_path / "sprung").exists()
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert (tmp_path / "sprung").exists()  # it was a trap


def test_a_whole_network(theirs: nn.Module, tmp_path: Path) -> None:
    line = error(saved(theirs, tmp_path / "a.pt"))
    assert "holds Python objects (torchvision.models.resnet.ResNet)" in line
    assert "torch.save(network.state_dict(), FILE)" in line


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("part", [0, 5, 60, 0.5, 0.999])
def test_a_truncated_file(form: str, part: float, state: State, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    if form == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    os.truncate(path, int(part if part > 1 else path.stat().st_size * part))
    line = error(path)
    assert f"{path} is {'damaged' if part else 'empty'}" in line
    assert "model.weights" in line


@pytest.mark.parametrize(
    "text", [b"hello", b"\x89PNG\r\n\x1a\n" + bytes(99), bytes(4096), b'{"a": {}', b"PK\x03\x04" * 9]
)
def test_another_file(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(text)
    assert f"{tmp_path}/a.pt is damaged, or no file of weights" in error(tmp_path / "a.pt")


@pytest.mark.parametrize("content", [[1, 2], {}, {"model": {"a": 1}}, 3, torch.zeros(2)])
def test_a_file_without_weights(content: Any, tmp_path: Path) -> None:
    assert f"{tmp_path}/a.pt holds no weights: a state dict" in error(saved(content, tmp_path / "a.pt"))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_torchscript_archive(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "a.pt")
    recwarn.clear()
    assert f"{tmp_path}/a.pt is damaged, or no file of weights" in error(tmp_path / "a.pt")
    assert not recwarn.list


def test_a_flipped_bit_in_a_checkpoint_of_ours(state: State, theirs: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    commit({"model": state}, path)
    assert same_outputs(load(path)[0], theirs)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    torch.load(path, weights_only=True)  # which does not notice
    assert f"{path} does not match its checksum" in error(path)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    assert error("/nope/a.pt") == "cannot read /nope/a.pt: No such file or directory (model.weights)"
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert f"{tmp_path}/run holds no weights: neither checkpoints/best.pt" in error(tmp_path / "run")


def test_a_disk_that_is_away_for_a_moment(
    state: State, theirs: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, failures = Path.read_bytes, [OSError(5, "Input/output error")]

    def flaky(path: Path) -> bytes:
        if failures:
            raise failures.pop()
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", flaky)
    assert same_outputs(load(saved(state, tmp_path / "a.pth"))[0], theirs)
    assert not failures


# torchvision's by name


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """torch's cache, empty; whoever asks the network is told that there is none."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def no_network(*args: Any, **kwargs: Any) -> None:
        raise URLError(OSError(101, "Network is unreachable"))

    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    return tmp_path / "torch" / "hub" / "checkpoints"


URL = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url


def test_without_a_network(cache: Path) -> None:
    heard: list[str] = []
    path = cache / URL.rpartition("/")[2]
    assert error("IMAGENET1K_V1", num_classes=1000, heard=heard) == (
        f"cannot download {URL}: Network is unreachable: fetch it where there is a network and put it to {path} "
        "(TORCH_HOME moves that folder), or name a file in model.weights"
    )
    assert heard == [f"downloading {URL}"]
    assert list(cache.iterdir()) == []  # no half a file


def test_a_download_with_another_checksum(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "other.pth").write_bytes(b"a page of the provider's")
    monkeypatch.undo()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    other = (tmp_path / "other.pth").as_uri()
    open_url = torch.hub.urlopen
    monkeypatch.setattr(torch.hub, "urlopen", lambda request: open_url(other))
    assert 'invalid hash value (expected "f37072fd", got' in error("IMAGENET1K_V1")
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["IMAGENET1K_V1", "DEFAULT", "ResNet18_Weights.IMAGENET1K_V1", "ResNet18_Weights.DEFAULT"]
)
def test_from_a_filled_cache(name: str, cache: Path, theirs: nn.Module, state: State) -> None:
    path = saved(state, cache / URL.rpartition("/")[2])
    net, said = load(name)
    assert same_outputs(net, theirs)
    assert said == f"weights: {name} of resnet18, {path}"


@pytest.mark.parametrize(("name", "resize"), [("IMAGENET1K_V1", 256), ("IMAGENET1K_V2", 232)])
def test_torchvisions_names_know_the_sizes_of_their_published_accuracy(name: str, resize: int, cache: Path) -> None:
    url = torchvision.models.ResNet50_Weights[name].url
    saved({"fc.bias": torch.zeros(1000)}, cache / url.rpartition("/")[2])
    assert read_weights(name, "resnet50", print).config == {"data": {"eval_size": 224, "eval_resize": resize}}


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("name", "settings", "line"),
    [
        (
            "IMAGENET1K_V2",
            {},
            "model.weights: torchvision has no IMAGENET1K_V2 for model.name resnet18; there are IMAGENET1K_V1, DEFAULT",
        ),
        (
            "ResNet18_Weights.IMAGENET1K_V1",
            {"name": "resnet50"},
            "model.weights: torchvision has no ResNet18_Weights.IMAGENET1K_V1 for model.name resnet50; there are "
            "IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT",
        ),
        (
            "DEFAULT",
            {"name": "resnet20"},
            "torchvision has no DEFAULT for model.name resnet20, nor others: name a file in model.weights",
        ),
    ],
)
def test_a_name_that_there_is_not(name: str, settings: dict[str, Any], line: str) -> None:
    assert error(name, **settings) == line


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("name", ["DEFAULT", "IMAGENET1K_V1", "IMAGENET1K_V2"])
@pytest.mark.parametrize("model", ["resnet50", "wide_resnet101_2", "resnext50_32x4d"])
def test_each_name_has_a_url_that_ends_in_its_checksum(model: str, name: str) -> None:
    assert ".pth: Network is unreachable" in error(name, name=model)
    url = torchvision.models.get_model_weights(model)[name].url
    assert len(url.rpartition("-")[2]) == len("f37072fd.pth")


# The real train.py


def small_weights(path: Path, classes: int = 10) -> Path:
    net = randomised(build_model(ModelConfig(name="resnet20", num_classes=classes)))
    return saved({"model": net.state_dict()}, path)


@pytest.mark.parametrize("fresh", [False, True])
def test_a_mistake_touches_nothing(fresh: bool, tmp_path: Path) -> None:
    words, folder = [*SYNTHETIC, f"run.dir={tmp_path}/run"], tmp_path / "run"
    if fresh:
        done = start(1, *words)
        assert done.returncode == 0, done.stderr
        words.append("--fresh")
    (tmp_path / "a.pt").write_bytes(b"hello")
    assert f"{tmp_path}/a.pt is damaged" in refused(tmp_path, *words, f"model.weights={tmp_path}/a.pt")
    assert folder.exists() == fresh


def test_a_run_that_continues_needs_no_weights_and_a_fresh_one_may_begin_with_its_own(tmp_path: Path) -> None:
    words = [*SYNTHETIC, f"run.dir={tmp_path}/run"]
    file = small_weights(tmp_path / "a.pt")
    done = start(1, *words, f"model.weights={file}")
    assert f"weights: {file}; the head is new: 1000 classes, the weights have 10" in done.stdout, done.stderr
    file.unlink()
    done = start(1, *words, f"model.weights={file}", "train.steps=2")
    assert "step 1 of 2" in done.stdout, done.stderr
    assert "weights:" not in done.stdout
    done = start(1, *words, f"model.weights={tmp_path}/run", "--fresh")
    assert f"weights: {tmp_path}/run/checkpoints/" in done.stdout, done.stderr
    assert re.search(r"checkpoints/best.pt \(step [12]\)", done.stdout)
    assert done.returncode == 0
    shutil.rmtree(tmp_path / "run")
