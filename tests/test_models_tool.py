"""Counts of networks against formulas and published figures; hours of a training from benchmarks' own reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from distrib.config import UserError
from distrib.models import MODEL_NAMES
from distrib.models.count import count
from distrib.models.resnet import ARCHITECTURES
from distrib.tools.bench import report as report_module
from distrib.tools.bench.report import Report
from distrib.tools.models import count as counting
from distrib.tools.models.__main__ import costs, look_up, networks, parse
from distrib.tools.models.cost import REPORTS, ROWS, read_speeds
from distrib.tools.models.count import agreement, as_published, differences, row
from distrib.tools.models.table import table

IMAGENETS = [name for name in MODEL_NAMES if ARCHITECTURES[name].stem == "imagenet"]


def test_counts_are_the_formulas() -> None:
    """Output 5×5 of stride 2 with padding, groups, a bias, a projection that is no layer, and a linear layer."""
    net = nn.Sequential()
    net.add_module("conv1", nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False))
    net.add_module("bn1", nn.BatchNorm2d(8))
    net.add_module("conv2", nn.Conv2d(8, 12, 3, padding=1, groups=4))
    net.add_module("downsample", nn.Conv2d(12, 6, 1, bias=False))
    net.add_module("pool", nn.AdaptiveAvgPool2d(1))
    net.add_module("flatten", nn.Flatten())
    net.add_module("fc", nn.Linear(6, 7))
    found = count(net.to("meta").eval(), 9)
    assert found.layers == 3
    assert found.parameters == 3 * 8 * 9 + 2 * 8 + (2 * 12 * 9 + 12) + 12 * 6 + (6 * 7 + 7)
    assert found.macs == 25 * (3 * 9 * 8 + 2 * 9 * 12 + 12 * 6) + 6 * 7
    assert found.activations == 25 * (8 + 12 + 6) + 7
    with torch.device("meta"):
        count(net, 9)
    assert not any(module._forward_hooks for module in net.modules())


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, Any]]:
    return {found["name"]: found for found in look_up(parse([]))["networks"]}


def test_all_are_there_in_order(rows: dict[str, dict[str, Any]]) -> None:
    assert tuple(rows) == MODEL_NAMES


@pytest.mark.parametrize("name", IMAGENETS)
def test_torchvisions_published_figures(name: str, rows: dict[str, dict[str, Any]]) -> None:
    meta = next(iter(torchvision.models.get_model_weights(name))).meta
    assert rows[name]["parameters"] == meta["num_params"]
    assert rows[name]["macs"] / 1e9 == pytest.approx(meta["_ops"], abs=0.0005)
    assert rows[name]["layers"] == int(
        "".join(c for c in name.partition("_")[0] if c.isdigit()) or name[11:].partition("_")[0]
    )
    assert (differences(rows[name]), as_published(rows[name])) == ([], True)
    assert (rows[name]["size"], rows[name]["classes"]) == (224, 1000)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("resnet20", 0.27), ("resnet32", 0.46), ("resnet44", 0.66), ("resnet56", 0.85), ("resnet110", 1.7)],
)
def test_the_papers_parameters_of_small_networks(name: str, millions: float, rows: dict[str, dict[str, Any]]) -> None:
    """He et al. 2015, table 6."""
    places = len(str(millions).partition(".")[2])
    assert round(rows[name]["parameters"] / 1e6, places) == millions
    assert rows[name]["layers"] == int(name.removeprefix("resnet"))
    assert (rows[name]["size"], rows[name]["classes"], rows[name]["torchvision"]) == (32, 10, None)


@pytest.mark.parametrize(
    ("name", "millions"), [("resnet50", 11.1), ("resnet101", 16.2), ("resnet152", 22.6), ("resnext50_32x4d", 14.4)]
)
def test_the_papers_activations(name: str, millions: float, rows: dict[str, dict[str, Any]]) -> None:
    """Radosavovic et al. 2020, arXiv 2003.13678, the tables of ResNets and ResNeXts."""
    assert round(rows[name]["activations"] / 1e6, 1) == millions


def test_other_sizes_and_classes(rows: dict[str, dict[str, Any]]) -> None:
    found = row("resnet18", 64, 10)
    assert found["parameters"] == rows["resnet18"]["parameters"] - 990 * 513
    assert "published" not in found["torchvision"]
    assert differences(found) == []
    large = row("resnet20", 64, None)
    assert large["macs"] - 640 == 4 * (rows["resnet20"]["macs"] - 640)
    assert agreement([large]) == []


def test_a_difference_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(counting.ResNet):
        def __init__(self, arch: Any, classes: int) -> None:
            super().__init__(arch, classes)
            self.fc = nn.Linear(512, classes, bias=False)

    monkeypatch.setattr(counting, "ResNet", Other)
    found = row("resnet18", None, None)
    (told,) = differences(found)
    assert told == f"{1000 / (11_689_512 - 1000):+.2%} parameters"
    assert told in networks([found], 80)
    first, second = agreement([found])
    assert first.endswith("the same for 0 of 1.")
    assert second.endswith("the same for 0 of 1; others for resnet18.")


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits(width: int, rows: dict[str, dict[str, Any]]) -> None:
    lines = networks(list(rows.values()), width).splitlines()
    assert max(map(len, lines)) <= width
    assert sum(line.endswith("the same") for line in lines) == len(IMAGENETS)
    (line,) = [line.split() for line in lines if line.startswith("resnet50 ")]
    assert line == ["resnet50", "50", "224", "25,557,032", "4,089.2", "11,114,984", "the", "same"]
    text = " ".join(" ".join(lines).split())
    assert "224×224 (1,000 classes) or 32×32 (10 classes)" in text
    assert (
        "counted in the same way: the same for 10 of 10. The parameters and GMACs that it publishes: the same for 10"
        in text
    )


def test_columns_stand_below_each_other() -> None:
    text = table([("a", "number", "words"), ("longer", "1", "one two three four five six")], (0, 2), 36)
    assert text.splitlines() == [
        "a       number  words",
        "longer       1  one two three four",
        "                five six",
    ]


# Hours


def report(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    bench: str,
    name: str,
    date: str = "2026-11-20",
    gpu: str = "NVIDIA H100 79 GiB",
    values: dict[str, tuple[float, ...]] | None = None,
    **settings: Any,
) -> None:
    """Written by the benchmarks' own code, as a machine with that GPU would."""
    monkeypatch.setattr(report_module, "hardware", lambda: f"16 of 16 × AMD EPYC, 128 GiB; {gpu}")
    known = {"model": "resnet50", "size": 224, "batch": 256, "precision": "bf16", "compile": True}
    made = Report(bench, known | settings, folder / name)
    made._head["date"] = f"{date}T10:00:00+00:00"
    for row_name, each in (values or {"train.py": (1000.0, 1200.0, 1100.0)}).items():
        for value in each:
            made.add(row_name, "images/s", value)
    made.save()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Reports of a GPU, of none, of other benchmarks, and files that are none."""
    (tmp_path / "gpu-2").mkdir()
    report(tmp_path, monkeypatch, "train", "old.json", date="2025-01-01", values={"train.py": (1.0,)})
    report(tmp_path, monkeypatch, "train", "new.json")
    report(tmp_path, monkeypatch, "train", "cpu.json", gpu="no GPU", date="2026-12-01", values={"train.py": (3.0,)})
    both = {"train.py": (2000.0,), "train.py on images": (1500.0,), "bare loop": (9999.0,)}
    two = "NVIDIA H200 139 GiB, NVIDIA H200 139 GiB"
    report(tmp_path / "gpu-2", monkeypatch, "train", "files.json", gpu=two, values=both, compile=False)
    alone = {"ours": (2100.0,), "torchvision": (9999.0,), "ours, compiled": (2500.0,)}
    report(tmp_path, monkeypatch, "model", "model.json", values=alone, precision_here="fp16", model="resnet18")
    report(tmp_path, monkeypatch, "loader", "loader.json", values={"ours": (5.0,)})
    report(tmp_path, monkeypatch, "train", "empty.json", values={"bare loop": (5.0,)}, model="resnet34")
    (tmp_path / "cut.json").write_text((tmp_path / "new.json").read_text()[:500])
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "other.json").write_text('{"bench": "train", "hardware": "x; y", "results": [3]}')
    return tmp_path


def test_hours_of_what_was_measured(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = look_up(parse(["resnet50", "resnet18", "--cost", "--epochs", "18", "--reports", str(folder)]))
    got = [(e["model"], e["rate"], e["what"], e["gpu"], e["precision"], e["size"]) for e in result["cost"]]
    assert got == [
        ("resnet50", 1100.0, "train.py, made-up images, compiled", "NVIDIA H100 79 GiB", "bf16", 224),
        ("resnet50", 1500.0, "train.py, from files", "NVIDIA H200 139 GiB", "bf16", 224),
        ("resnet18", 2500.0, "a step alone, compiled", "NVIDIA H100 79 GiB", "fp16", 224),
    ]
    assert [e["gpu_hours"] for e in result["cost"]] == pytest.approx(
        [18 * 1_281_167 / r / 3600 for r in (1100, 1500, 2500)]
    )
    assert result["cost"][0]["file"] == str(folder / "new.json")
    said = capsys.readouterr().err.splitlines()
    assert said == [f"passed over: {folder}/{name}.json is no report of distrib bench" for name in ("cut", "other")]
    json.dumps(result)
    for width in (80, 120):
        text = costs(result["cost"], ["resnet50", "resnet18"], folder, width)
        assert max(map(len, text.splitlines())) <= width
        flat = " ".join(text.split())
        assert "18 epochs of 1,281,167 images" in flat
        assert "NVIDIA H200 139 GiB" in flat
        assert "2026-11-20" in flat
        assert "5.8" in text.splitlines()[1].split()  # 18 × 1,281,167 / 1,100 / 3,600


def test_names_of_rows_are_those_that_the_benchmarks_write() -> None:
    sources = {name: Path(report_module.__file__).with_name(f"{name}.py").read_text() for name in ROWS}
    assert all(f'"{row_name}"' in sources[name] for name, known in ROWS.items() for row_name in known)


def test_this_repositorys_own_reports_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(REPORTS.glob("*.json"))
    assert all("GiB" in speed.gpu for speed in read_speeds(REPORTS, pytest.fail))


@pytest.mark.parametrize("there", [True, False])
def test_none_on_file(there: bool, tmp_path: Path) -> None:
    place = tmp_path if there else tmp_path / "no folder, as beside a wheel"
    assert read_speeds(place, pytest.fail) == []
    said = " ".join(costs([], ["resnet50"], place, 80).split())
    assert said.startswith(f"No training speed of resnet50 on a GPU is on file in {place}.")
    assert "distrib bench train --model resnet50" in said
    assert "distrib models --cost --reports FOLDER" in said


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["resnt50"], "there is no network resnt50; did you mean resnet50?"),
        (["ResNet18"], "did you mean resnet18?"),
        (["vgg"], "there is no network vgg; there are resnet18, resnet34"),
        (["--size", "0"], "'0' is not a whole number of 1 or more"),
        (["--classes", "x"], "'x' is not a whole number"),
        (["--epochs", "5"], "--epochs says nothing without --cost"),
        (["--reports", "/nope"], "--reports says nothing without --cost"),
        (["--cost", "--epochs", "0"], "a number above 0 is wanted"),
        (["--cost", "--epochs", "nan"], "a number above 0 is wanted"),
        (["--cost", "--reports", "/nope"], "--reports /nope: there is no such folder"),
        (["--sise", "3"], "unrecognized arguments: --sise"),
    ],
)
def test_mistakes(words: list[str], part: str) -> None:
    with pytest.raises(UserError) as raised:
        look_up(parse(words))
    assert part in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1
