"""The benchmarks: arguments, what they write, the photographs, and the GPU script. No figure is judged here."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from distrib.cli import load_config
from distrib.tools.bench import exchange, photos, train
from distrib.tools.bench.__main__ import main
from distrib.tools.bench.report import Report

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
SPREAD = {"name", "unit", "median", "min", "max", "values"}


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache of its own, and one thread: several spin while they wait for each other, where others use the machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(cores)[os.getpid() % len(cores)]})
    torch.set_num_threads(1)
    yield
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)


def measure(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """Runs a benchmark and returns what it wrote, checked for what every report has."""
    file = tmp_path / "report.json"
    assert main([*arguments, "--json", str(file)]) == 0
    report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    assert report["bench"] == arguments[0]
    assert {"date", "command", "hardware", "software", "load_before", "settings", "notes"} <= set(report)
    assert f"torch {torch.__version__.partition('+')[0]}" in report["software"]
    for row in report["results"]:
        assert set(row) >= SPREAD
        assert 0 < row["min"] <= row["median"] <= row["max"]
        assert min(row["values"]) == row["min"]
    return report


def medians(report: dict[str, Any], unit: str) -> dict[str, float]:
    return {row["name"]: row["median"] for row in report["results"] if row["unit"] == unit}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", "train|model|loader|inference|index|exchange|save|photos"),
        ("bogus", "invalid choice: 'bogus'"),
        ("model --batch 0", "argument --batch: '0' is not a whole number of 1 or more"),
        ("model --model resnet20", "resnet20 is not one of torchvision's"),
        ("model --precision fp8", "invalid choice: 'fp8'"),
        ("model --json /nowhere/report.json", "there is no folder /nowhere"),
        ("train --model resnet51", "did you mean 'resnet"),
        ("train --steps 3", "--steps 3 is too short"),
        ("train --data /nowhere", "--data /nowhere has no folder train/"),
        ("index --files 10", "--files 10 ≥ --batch 32768"),
        ("loader --data /nowhere", "no data at /nowhere/train"),
        ("loader --photos 20 --data .", "not allowed with"),
        ("inference --model resnet20", "resnet20 is not one of torchvision's"),
        ("inference --validate /nowhere.py", "there is no such file"),
        ("exchange --ranks 1 2", "--ranks: one rank exchanges nothing"),
        ("exchange --steps 31", "--steps 31 holds no two exchanges 16 steps apart: give 32 or more"),
        ("save --model resnet51", "did you mean 'resnet"),
        ("save --folder /nowhere", "--folder /nowhere is no folder"),
        ("photos 3", "3 photographs are fewer than their 10 classes"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments.split()) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ")
    assert told.err.count("\n") == 1
    assert expected in told.err


def test_report(tmp_path: Path) -> None:
    report = Report("train", {"batch": 2}, tmp_path / "r.json")
    report.compare("a", "b", (">=", 0.97))
    report.compare("a", "absent")
    for a, b in ((1.0, 2.0), (4.0, 4.0), (3.0, 2.0)):
        report.add("a", "images/s", a)
        report.add("b", "images/s", b)
    report.add("a", "images/s", 9.0)  # the pair that was cut off
    report.add("open", "s", 5.0, ("<", 3))
    report.save()
    results = {row["name"]: row for row in json.loads((tmp_path / "r.json").read_text())["results"]}
    assert list(results) == ["a", "b", "open", "a / b"]
    ratio = results["a / b"]
    assert (ratio["unit"], ratio["median"], ratio["values"]) == ("ratio", 1.0, [0.5, 1.0, 1.5])
    assert (ratio["goal"], ratio["met"]) == (">= 0.97", True)
    assert results["open"]["met"] is False
    assert ">= 0.97: met" in str(report)
    assert "< 3: MISSED" in str(report)


def test_photographs_are_as_large_as_imagenets_and_always_the_same(tmp_path: Path) -> None:
    root = photos.make(20)
    assert root.parent == tmp_path / "cache" / "distrib"
    files = sorted(root.rglob("*.jpg"))
    assert len(files) == 20 + 10
    assert {len(list(folder.iterdir())) for folder in (root / "train").iterdir()} == {2}
    assert {len(list(folder.iterdir())) for folder in (root / "val").iterdir()} == {1}
    contents = [file.read_bytes() for file in files]
    assert len(set(contents)) == len(contents)
    assert 95_000 < sum(map(len, contents)) / len(contents) < 125_000
    for data in contents:
        with Image.open(io.BytesIO(data)) as image:
            assert (image.size, image.mode) == ((500, 375), "RGB")
    stamps = [file.stat().st_mtime_ns for file in files]
    assert photos.make(20) == root
    assert [file.stat().st_mtime_ns for file in files] == stamps
    again = photos.make(20, cache=tmp_path / "other")
    assert [file.read_bytes() for file in sorted(again.rglob("*.jpg"))] == contents


def test_photographs_need_a_cache_that_can_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cache").write_text("a file")
    assert main(["photos", "20"]) == 2
    assert "set XDG_CACHE_HOME" in capsys.readouterr().err


def test_index(tmp_path: Path) -> None:
    sizes = ["--files", "3000", "--batch", "64", "--ranks", "2", "--pairs", "1"]
    report = measure(tmp_path, "index", *sizes)
    assert report["settings"] == {"files": 3000, "batch": 64, "ranks": 2, "pairs": 1}
    assert {"index: open", "index: open and check its sum", "file list: make"} == set(medians(report, "s"))
    goals = {row["name"]: row["goal"] for row in report["results"] if "goal" in row}
    assert goals == {
        "index: open": "< 3",
        "index: memory": "< 200",
        "index: order, draws, boxes, later steps": "< 10",
    }
    assert "file list: memory / index: memory" in medians(report, "ratio")


def test_exchange(tmp_path: Path) -> None:
    sizes = ["--ranks", "2", "3", "--at", "130", "--step", "2", "--steps", "6", "--rounds", "2"]
    report = measure(tmp_path, "exchange", *sizes)
    assert report["settings"]["every"] == 3
    ratios = {f"step{way}: {n} ranks / step alone: {n} ranks" for n in (2, 3) for way in ("", ", 1 in 3")}
    assert set(medians(report, "ratio")) == ratios
    assert {name.partition(":")[0] for name in medians(report, "ms")} == {
        "all-reduce", "step alone", "step", "step, 1 in 3", "fit",
    }  # fmt: skip
    assert set(medians(report, "µs a step")) == {
        f"{what} it{way}: {n} ranks"
        for what in ("lost to", "processor's time in") for n in (2, 3) for way in ("", ", 1 in 3")
    }  # fmt: skip
    assert all(len(row["values"]) == 2 for row in report["results"])
    goals = {row["name"]: row["goal"] for row in report["results"] if "goal" in row}
    assert goals == {"model, a network's messages: lost of a step, 1 in 3, 130 ranks": "< 0.1"}


def test_save(tmp_path: Path) -> None:
    sizes = ["--batch", "2", "--size", "16", "--every", "2", "--rounds", "2", "--precision", "fp32"]
    report = measure(tmp_path, "save", "--model", "resnet20", *sizes, "--folder", str(tmp_path))
    assert set(medians(report, "ms")) == {"step, with saves", "step, without"}
    assert set(medians(report, "s a save")) == {"writing, alone", "processor's time of the writing thread"}
    assert all(len(row["values"]) == 2 for row in report["results"])
    goals = {row["name"]: row["goal"] for row in report["results"] if "goal" in row}
    copy = "the copy, of the steps from a save to the next"
    assert goals == {"step, with saves / step, without": "< 1.02", copy: "< 2"}
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_the_model_of_an_exchange() -> None:
    assert exchange.message_seconds({2: 2e-4, 4: 6e-4, 16: 30e-4}) == pytest.approx(1e-4)
    assert exchange.message_seconds({2: 1e-4, 4: 9e-4}) == pytest.approx((2 * 1 + 6 * 9) / (4 + 36) * 1e-4)
    # An all-reduce within its steps costs them what the call does; what is longer they wait for.
    assert exchange.share(own=6e-5, ring=0.1, calls=16, step=0.03) == pytest.approx(6e-5 / 0.48)
    assert exchange.share(own=6e-5, ring=0.1, calls=1, step=0.03) == pytest.approx((6e-5 + 0.07) / 0.03)


def test_an_exchange_whose_ranks_fail_says_which() -> None:
    with pytest.raises(RuntimeError, match=r"of 2 ranks these failed: \[0, 1\]"):
        exchange.on_ranks(2, {"steps": 1, "step_ms": 1, "rounds": 1, "ways": None})


def test_train(tmp_path: Path) -> None:
    sizes = ["--batch", "2", "--size", "16", "--steps", "16", "--pairs", "1", "--precision", "fp32"]
    report = measure(tmp_path, "train", "--model", "resnet20", *sizes)
    assert {"train.py", "bare loop"} <= set(medians(report, "images/s"))
    ratio = next(row for row in report["results"] if row["name"] == "train.py / bare loop")
    assert ratio["goal"] == ">= 0.97"


def test_the_trainers_run_is_a_valid_configuration(tmp_path: Path) -> None:
    settings = {
        "model": "resnet18", "classes": 10, "batch": 8, "size": 32, "precision": "bf16", "compile": True, "steps": 16,
        "workers": 1,
    }  # fmt: skip
    for root in (None, tmp_path):
        config = train.trainer_config(settings, root, tmp_path / "run")
        file = tmp_path / "bench.yaml"
        file.write_text(json.dumps(config.model_dump(mode="json")), encoding="utf-8")
        assert load_config(file) == config
        assert config.log.every_steps * train.INTERVALS == 16
        assert config.data.loader == ("dali" if root else "synthetic")


def test_rates_leave_the_first_interval_out(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    records = [{"kind": "train", "step": s, "seconds": t} for s, t in ((10, 99.0), (20, 100.0), (30, 104.0))]
    records.append({"kind": "eval", "step": 30, "seconds": 1.0})
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    ends = train.interval_ends(metrics)
    assert ends == [(10, 99.0), (20, 100.0), (30, 104.0)]
    report = Report("train", {}, None)
    train.add_rates(report, "train.py", ends, batch=5)
    rates = {row.name: row.values for row in report.rows()}
    assert rates["train.py"] == [20.0]
    if not torch.cuda.is_available():
        assert rates["fastest interval of train.py"] == [50.0]


def test_model(tmp_path: Path) -> None:
    sizes = ["--batch", "2", "--size", "32", "--warm-up", "1", "--steps", "1", "--rounds", "2", "--precision", "fp32"]
    report = measure(tmp_path, "model", "--model", "resnet18", "--deterministic", *sizes)
    torch.use_deterministic_algorithms(False)
    own = {"ours", "ours, deterministic"}
    assert set(medians(report, "images/s")) == {*own, "torchvision", "torchvision, channels-last"}
    peers = {"ours / torchvision", "ours / torchvision, channels-last"}
    assert set(medians(report, "ratio")) == {*peers, "ours, deterministic / ours"}


def test_loader(tmp_path: Path) -> None:
    sizes = ["--photos", "20", "--size", "32", "--batch", "4", "--batches", "2", "--workers", "1", "--rounds", "1"]
    report = measure(tmp_path, "loader", *sizes)
    assert {"ours, torchvision", "ImageFolder + DataLoader"} <= set(medians(report, "images/s"))
    assert "ours, torchvision / ImageFolder + DataLoader" in medians(report, "ratio")
    assert ("ours, DALI / plain DALI" in medians(report, "ratio")) or "DALI is not installed" in report["notes"][0]


def test_inference(tmp_path: Path) -> None:
    """validate.py's place is taken by a script that takes its words and does nothing."""
    (tmp_path / "validate.py").write_text("import sys; assert '--checkpoint' in sys.argv")
    words = ["--validate", str(tmp_path / "validate.py"), "--model", "resnet18", "--photos", "20", "--size", "32"]
    report = measure(tmp_path, "inference", *words, "--workers", "1", "--rounds", "1")
    sides = medians(report, "pictures/s")
    assert {"evaluate, fp32", "evaluate --fast", "features", "features --exact", "torchvision loop, fp32"} < set(sides)
    assert len(medians(report, "ratio")) == 5


def run_script(**variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, **variables}
    return subprocess.run([SCRIPT], env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_gpu_script_parses() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_gpu_script_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    done = run_script(OUT=str(tmp_path / "out"))
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert "no GPU" in done.stderr
    assert not (tmp_path / "out").exists()


def test_gpu_script_runs_through(tmp_path: Path) -> None:
    done = run_script(OUT=str(tmp_path / "out"), CPU_SMOKE="1", PARTS="model-bf16")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "== model-bf16: passed" in done.stdout
    report = json.loads((tmp_path / "out" / "model-bf16.json").read_text(encoding="utf-8"))
    assert report["settings"]["precision"] == "bf16"
    assert "== model-bf16: passed" in (tmp_path / "out" / "log.txt").read_text(encoding="utf-8")
