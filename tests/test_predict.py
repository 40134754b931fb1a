"""``distrib predict``: what the network says, in the order of the pictures, and a line for each that is none."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import runs
import torch
import torchvision
from PIL import Image

from distrib.config import DataConfig, ModelConfig, UserError
from distrib.data.pictures import find_readable
from distrib.engine.inference import Classifier
from distrib.faults import Failure, Interrupted
from distrib.models import build_model
from distrib.place import find_place
from distrib.tools import predict as tool
from distrib.tools.evaluate.__main__ import parse
from distrib.tools.evaluate.scoring import evaluate
from distrib.trained import begin_use, open_trained

SIZES = ["data.eval_size=32", "data.eval_resize=32"]
NAMES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty pictures of the size that is looked at, in two folders, and weights for seven classes with names."""
    place, random = tmp_path_factory.mktemp("predict"), np.random.default_rng(3)
    for k in range(40):
        file = place / "pictures" / ("a", "b")[k % 2] / f"{k:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        tint = random.integers(0, 256, 3)
        Image.fromarray((random.integers(0, 128, (32, 32, 3)) + tint // 2).astype(np.uint8)).save(file)
    torch.manual_seed(1)
    network = build_model(ModelConfig(name="resnet20", num_classes=7))
    config = {"model": {"name": "resnet20", "num_classes": 7}, "data": {"workers": 1}}
    torch.save({"model": network.state_dict(), "config": config, "classes": list(NAMES)}, place / "named.pt")
    theirs = torchvision.models.resnet18(num_classes=4)
    torch.save(theirs.state_dict(), place / "four.pth")
    return place


def predict(*words: object, stop: Any = None) -> None:
    tool.predict(tool.parse(list(map(str, words))), stop or SimpleNamespace(requested=lambda: False))


def files_of(folder: Path) -> list[Path]:
    return sorted((folder / "pictures").glob("*/*.png"))


def by_hand(folder: Path, files: list[Path], exact: bool) -> torch.Tensor:
    """Probabilities [n, 7], all at once."""
    classifier, _ = begin_use(open_trained(str(folder / "named.pt"), None, [], print), exact, lambda text: None)
    images = torch.from_numpy(np.stack([np.asarray(Image.open(file)) for file in files])).permute(0, 3, 1, 2)
    with torch.inference_mode():
        return classifier.logits(images).softmax(1)


@pytest.mark.parametrize("loader", ["dali", "torchvision"])
@pytest.mark.parametrize("exact", [True, False])
def test_what_the_network_says(folder: Path, exact: bool, loader: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [folder / "pictures", "--weights", folder / "named.pt", "--json", *SIZES, f"data.loader={loader}"]
    predict(*words, *["--exact"] * exact)
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    files = files_of(folder)
    assert [line["file"] for line in lines] == list(map(str, files))
    wanted = by_hand(folder, files, exact)
    for line, row in zip(lines, wanted, strict=True):
        assert len(line["top"]) == 5
        shares, order = row.sort(descending=True)
        assert [entry["class"] for entry in line["top"]] == [NAMES[k] for k in order[:5]]
        assert [entry["title"] for entry in line["top"]] == [NAMES[k] for k in order[:5]]
        found = torch.tensor([entry["probability"] for entry in line["top"]])
        torch.testing.assert_close(found, shares[:5], rtol=1e-3 if exact else 0.05, atol=1e-4)
    (told,) = [line for line in err.splitlines() if "named.pt" in line]
    assert "resnet20, 7 classes" in told
    assert told.endswith("fp32, as trained") == exact


def test_for_a_person(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = files_of(folder)
    twice = [files[5], files[2], files[5]]  # in the order that was asked for, as often as it was
    predict(*twice, "--weights", folder / "four.pth", "--exact", *SIZES)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == list(map(str, twice))
    assert len(lines) == 3 * (1 + 4)  # fewer classes than five
    shares = [float(line.split()[0]) for line in lines[1:5]]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.3)
    assert lines[1].split()[1] == "%"
    assert {line.split()[2] for line in lines[1:5]} == {"0", "1", "2", "3"}  # no names: the outputs' numbers
    assert lines[:5] == lines[10:]
    predict(files[2], "--weights", folder / "four.pth", "--top", 1, *SIZES)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{files[2]}: ")
    assert line.endswith(" %")


def test_imagenets_classes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = torchvision.models.resnet18()
    network.fc.weight.data.zero_()
    network.fc.bias.data.zero_()
    network.fc.bias.data[1] = 30.0
    torch.save(network.state_dict(), tmp_path / "r18.pth")
    predict(files_of(folder)[0], "--weights", tmp_path / "r18.pth", "--json", "--top=1", *SIZES)
    (entry,) = json.loads(capsys.readouterr().out)["top"]
    assert (entry["class"], entry["title"]) == ("n01443537", "goldfish (n01443537)")
    assert entry["probability"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("loader", ["dali", "torchvision"])
@pytest.mark.parametrize("good", [40, 3, 0])
def test_what_is_no_picture_is_named(
    folder: Path, tmp_path: Path, good: int, loader: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files = files_of(folder)[:good]
    bad = [tmp_path / f"bad{k}.png" for k in range(3)]
    for file, content in zip(bad, (b"", b"no picture", files_of(folder)[0].read_bytes()[:200]), strict=True):
        file.write_bytes(content)
    gone, away = tmp_path / "gone.png", tmp_path / "link.png"
    away.symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    odd = [bad[0], gone, bad[1], away, tmp_path / "pipe", bad[2]]
    asked = [*files[:1], *odd[:2], *files[1:], *odd[2:]]
    with pytest.raises(Failure, match=rf"^6 of {good + 6} pictures could not be read$"):
        predict(*asked, "--weights", folder / "named.pt", "--json", *SIZES, f"data.loader={loader}")
    out, err = capsys.readouterr()
    assert [json.loads(line)["file"] for line in out.splitlines()] == list(map(str, files))
    named = [line for line in err.splitlines() if line.startswith("cannot ")]
    assert sorted(line.split()[2].rstrip(":") for line in named) == sorted(map(str, odd))
    assert f"cannot read {gone}: No such file or directory" in named
    assert f"cannot decode {bad[1]}: no picture in a known format" in named
    assert not any("counted" in line or "black.png" in line for line in named)


def test_many_that_are_no_pictures(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / f"{k}.jpg" for k in range(100)]
    for file in files:
        file.write_bytes(b"rubbish")
    with pytest.raises(Failure, match=r"^100 of 101 pictures could not be read$"):
        predict(*files, files_of(folder)[0], "--weights", folder / "named.pt", "--top=1", *SIZES)
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    assert sum(line.startswith("cannot decode ") for line in err.splitlines()) == 100


def test_paths_from_stdin(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = files_of(folder)[:3]
    odd = tmp_path / "carriage\rreturn.png"
    odd.symlink_to(files[1])
    text = b"\n".join(map(os.fsencode, [files[0], odd])) + b"\n\n"
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(text)))
    predict(files[2], "-", "--weights", folder / "named.pt", "--json", *SIZES)
    found = [json.loads(line)["file"] for line in capsys.readouterr().out.splitlines()]
    assert found == list(map(str, [files[2], files[0], odd]))
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"\n")))
    with pytest.raises(UserError, match="no picture is named"):
        predict("-", "--weights", folder / "named.pt")


def test_a_request_to_stop(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Interrupted):
        predict(
            folder / "pictures", "--weights", folder / "named.pt", "--json", *SIZES, "data.loader=torchvision",
            stop=SimpleNamespace(requested=lambda: True),
        )  # fmt: skip
    assert capsys.readouterr().out.count("\n") == 32  # the batch that was begun
    predict(
        files_of(folder)[0], "--weights", folder / "named.pt", *SIZES, stop=SimpleNamespace(requested=lambda: True)
    )  # all was done before it came


def test_too_little_memory(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = [folder / "pictures", "--weights", folder / "named.pt", "--exact", *SIZES, "data.loader=torchvision"]
    predict(*words)
    wanted = capsys.readouterr().out
    seen, logits, most = list[int](), Classifier.logits, [5]

    def small(self: Classifier, images: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        if len(images) > most[0]:
            raise torch.OutOfMemoryError
        return logits(self, images)

    monkeypatch.setattr(Classifier, "logits", small)
    predict(*words)
    assert capsys.readouterr().out == wanted
    assert seen == [32, 16, 8] + 10 * [4]
    most[0] = 0
    with pytest.raises(Failure, match="cpu has too little memory for one of 32 pixels"):
        predict(*words)


def test_no_numbers(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each line is JSON, also where the network's numbers were too large for their type."""
    monkeypatch.setattr(Classifier, "logits", lambda self, images: torch.full((len(images), 7), torch.inf))
    predict(files_of(folder)[0], "--weights", folder / "named.pt", "--json", *SIZES)
    line = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert [entry["probability"] for entry in line["top"]] == [None] * 5


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["{empty}"], "holds no pictures"),
        (["{picture}", "data.eval_sise=32"], "did you mean data.eval_size?"),
        (["{picture}", "--top=0"], "--top 0: one class a picture is the least"),
        (["{picture}", "--model=resnet50"], "are of resnet20, not resnet50"),
        (["{picture}", "--topp=3"], "--topp is no option; did you mean --top?"),
        ([], "the following arguments are required"),
    ],
)
def test_one_line_for_what_does_not_fit(words: list[str], part: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    names = {"empty": tmp_path / "empty", "picture": files_of(folder)[0]}
    with pytest.raises(UserError) as error:
        predict(*(word.format(**names) for word in words), "--weights", folder / "named.pt")
    assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_settings_and_files_with_an_equals_sign(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data.size=3").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    args = tool.parse(["data.size=3", "a.png", "data.size=4", "--weights", "w"])
    assert (args.pictures, args.overrides) == (["data.size=3", "a.png"], ["data.size=4"])


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    told: list[str] = []
    (tmp_path / "a.png").write_bytes(b"")
    names = [str(tmp_path / "a.png"), str(tmp_path / "b.png"), "x" * 5000, "nul\0.png", "~nobody-of-that-name/a.png"]
    assert find_readable(names, told.append) == ([tmp_path / "a.png"], 4)
    assert len(told) == 4


COLD = """
import sys
from distrib.tools.predict import main
assert "torch" not in sys.modules  # --help needs none
code = main(sys.argv[1:])
heavy = ("torch._dynamo", "torch._inductor", "sympy", "nvidia.dali", "wandb", "rich", "torchvision.transforms.v2")
assert not [name for name in heavy if name in sys.modules], [name for name in heavy if name in sys.modules]
import multiprocessing, threading
assert not multiprocessing.active_children()
sys.exit(code)
"""


def test_a_start_imports_no_more_than_it_needs(folder: Path) -> None:
    words = [str(files_of(folder)[0]), str(folder / "gone.png"), "--weights", str(folder / "named.pt"), *SIZES]
    environment = os.environ | {"PYTHONPATH": str(runs.ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", COLD, *words], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith(f"{files_of(folder)[0]}\n")
    assert done.stderr.splitlines()[-1] == "error: 1 of 2 pictures could not be read"
    assert "Traceback" not in done.stderr


def test_the_counts_of_evaluate(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The class that predict names first is right as often as evaluate's top-1 says."""
    files = files_of(folder)
    guess = by_hand(folder, files, exact=True).argmax(1).tolist()
    for k, file in enumerate(files):  # two thirds are put into the folder of what the network sees
        name = NAMES[guess[k] if k % 3 else (guess[k] + 1) % 7]
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / file.name).symlink_to(file)
    predict(tmp_path, "--weights", folder / "named.pt", "--exact", "--json", "--top=1", *SIZES)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    right = sum(Path(line["file"]).parent.name == line["top"][0]["class"] for line in lines)
    assert right == sum(k % 3 != 0 for k in range(40))
    words = [str(folder / "named.pt"), "--data", str(tmp_path), "train.precision=fp32", *SIZES]
    stop = SimpleNamespace(requested=lambda: False, received=None)  # signals are the test's own
    result = evaluate(parse(words), find_place({}), stop)  # type: ignore[arg-type]
    assert result is not None
    assert result["top1"] == pytest.approx(100 * right / 40)
    assert DataConfig().eval_batch >= 40
