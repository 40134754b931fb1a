"""Settings that follow from others: what auto means, that what is written stays, a begun run keeps its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distrib.cli import dump_config, load_config
from distrib.config import Config
from distrib.follow import flatten, follow, keep, told


def load(tmp_path: Path, *words: str, text: str = "{}") -> Config:
    (tmp_path / "config.yaml").write_text(text)
    return load_config(tmp_path / "config.yaml", words)


@pytest.mark.parametrize(
    ("words", "resize", "size"),
    [
        ((), 256, 224),
        (("data.size=64",), 73, 64),
        (("data.size=176", "data.eval_size=224"), 256, 224),
        (("data.size=64", "data.eval_resize=64"), 64, 64),
        (("data.size=64", "data.eval_resize=50"), 50, 50),
        (("data.size=64", "data.eval_size=80", "data.eval_resize=90"), 90, 80),
    ],
)
def test_evaluation_sizes(tmp_path: Path, words: tuple[str, ...], resize: int, size: int) -> None:
    data = load(tmp_path, *words).data
    assert (data.eval_resize, data.eval_size) == (resize, size)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ((), "resnet50-imagenet"),
        (("data.root=/data/My pets!/", "model.name=resnet18"), "resnet18-My-pets"),
        (("data.root=sample:fashion-mnist",), "resnet50-fashion-mnist"),
        (("data.root=${PETS}/cats",), "resnet50-cats"),
        (("data.loader=synthetic",), "resnet50-synthetic"),
        (("data.root=/",), "resnet50-data"),
        (("data.root=/pets", "model.weights=a.pt"), "resnet50-pets-finetuned"),
        (("data.root=/pets", "model.weights=a.pt", "optim.freeze=layer2"), "resnet50-pets-frozen-layer2"),
        (("run.name=mine",), "mine"),
        (("run.name=auto",), "resnet50-imagenet"),
    ],
)
def test_the_name_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], name: str
) -> None:
    monkeypatch.setenv("PETS", "/pets")
    monkeypatch.setenv("IMAGENET_DIR", "/somewhere/ILSVRC2012")  # whether it is set must not rename a run
    config = load(tmp_path, *words)
    assert (config.run.name, config.run.dir) == (name, f"runs/{name}")


def test_a_folder_of_the_working_directory_gives_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "birds").mkdir()
    monkeypatch.chdir(tmp_path / "birds")
    assert load(tmp_path, "data.root=.").run.name == "resnet50-birds"


@pytest.mark.parametrize(("epochs", "warmup"), [(90, 5), (100, 5), (50, 5), (30, 3), (3, 0.3), (1, 0.1), (0.5, 0.05)])
def test_warm_up_fits_the_run(epochs: float, warmup: float) -> None:
    config = Config.model_validate({"train": {"epochs": epochs}})
    assert follow(config).schedule.warmup_epochs == warmup
    written = Config.model_validate({"train": {"epochs": 90}, "schedule": {"warmup_epochs": 0}})
    assert follow(written).schedule.warmup_epochs == 0


def test_classes_batch_and_compiling(tmp_path: Path) -> None:
    config = load(tmp_path, "train.micro_batch=100")
    settled = follow(config, classes=4, images=60, gpu=False)
    assert settled.model.num_classes == 4
    assert (settled.train.global_batch, settled.train.micro_batch) == (60, 60)
    assert settled.train.compile is False
    assert follow(config, gpu=True).train.compile is True
    unknown = follow(config)
    assert (unknown.model.num_classes, unknown.train.compile, unknown.train.global_batch) == ("auto", "auto", 1024)
    written = load(tmp_path, "model.num_classes=7", "train.compile=true")
    kept = follow(written, classes=4, images=2000, gpu=False)
    assert (kept.model.num_classes, kept.train.compile, kept.train.global_batch) == (7, True, 1024)


@pytest.mark.parametrize(
    ("epochs", "steps", "every", "decay"),
    [
        (90, None, 1, 0.9999),  # 112,590 steps of ImageNet: no more than 10,000
        (90, None, 32, round(1 - 32 / 10_000, 6)),
        (1, 500, 1, 0.98),
        (1, 5, 1, 0.0),  # a tenth is less than a step: the average is the model
    ],
)
def test_the_average_spans_a_tenth_of_the_run(epochs: float, steps: int | None, every: int, decay: float) -> None:
    values: dict[str, Any] = {"train": {"epochs": epochs, "steps": steps}, "ema": {"every": every}}
    settled = follow(Config.model_validate(values), images=1_281_167)
    assert settled.ema is not None
    assert settled.ema.decay == pytest.approx(decay)


def test_a_begun_run_keeps_what_followed_from_its_length(tmp_path: Path) -> None:
    first = load(tmp_path, "ema=true", "train.epochs=10")
    begun = follow(first, classes=4, images=2048)
    saved = {"config": begun.model_dump(mode="json")}
    longer = load(tmp_path, "ema=true", "train.epochs=40")
    config = keep(longer, follow(longer, classes=4, images=2048), saved)
    assert config.train.epochs == 40
    assert config.schedule.warmup_epochs == begun.schedule.warmup_epochs == 1
    assert config.ema == begun.ema
    written = load(tmp_path, "ema.decay=0.5", "train.epochs=40", "schedule.warmup_epochs=2")
    config = keep(written, follow(written, classes=4, images=2048), saved)
    assert (config.schedule.warmup_epochs, config.ema.decay if config.ema else None) == (2, 0.5)
    assert keep(longer, longer, {"config": {}}) == longer  # a checkpoint from before there was any of it
    shorter = load(tmp_path, "ema=true", "train.epochs=0.5")
    assert keep(shorter, follow(shorter, classes=4, images=2048), saved).schedule.warmup_epochs == 0.5


def test_warm_up_of_a_run_cut_by_steps() -> None:
    config = Config.model_validate({"train": {"steps": 1000}})
    assert follow(config).schedule.warmup_epochs == "auto"  # how long an epoch is, the data tells
    assert follow(config, images=1_281_167).schedule.warmup_epochs == pytest.approx(0.1 * 1000 / 1251, abs=1e-6)


def test_what_was_settled_is_told(tmp_path: Path) -> None:
    config = load(tmp_path, "train.epochs=3")
    lines = told(config, follow(config, classes=4, images=60, gpu=False))
    assert lines == [
        "model.num_classes=4",
        "train.global_batch=60 (not 1024)",
        "train.compile=false",
        "schedule.warmup_epochs=0.3",
    ]
    assert told(config, config) == []


def test_what_is_settled_is_read_back(tmp_path: Path) -> None:
    settled = follow(load(tmp_path, "ema=true", "train.micro_batch=64"), classes=4, images=60, gpu=False)
    assert load(tmp_path, text=dump_config(settled)) == settled
    left = {key for key, value in flatten(settled.model_dump()).items() if value == "auto"}
    # The data's, the machine's and the job's own, each time.
    assert left == {"data.val_split", "data.workers", "data.decoder", "launch.preflight", "train.hang_minutes"}
