"""Images that are away for a while, in real runs: waited for, or told; never a verdict, never other weights."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import runs

from distrib.config import DataConfig
from distrib.data import open_data

LOADERS = ["dali", "torchvision"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The built-in sample by way of links, which can be taken away."""
    indexes = open_data(DataConfig(root="sample:fashion-mnist"), 10)
    assert indexes is not None
    (tmp_path / "data").mkdir()
    for index in indexes:
        (tmp_path / "data" / index.root.name).symlink_to(index.root)
    return tmp_path / "data"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {loader: tmp_path_factory.mktemp("undisturbed") / loader for loader in LOADERS}
    for loader, folder in folders.items():
        runs.train(1, folder, f"data.loader={loader}")
    return folders


@contextmanager
def away(split: Path) -> Iterator[None]:
    hidden = split.with_name("hidden")
    os.rename(split, hidden)
    yield
    os.rename(hidden, split)


def reached(folder: Path, step: int) -> bool:
    return runs.steps_traced(folder) >= step


def assert_same(folder: Path, reference: Path) -> None:
    assert runs.digest(folder) == runs.digest(reference)
    assert runs.trace(folder, 1) == runs.trace(reference, 1)
    scores = [[(r["step"], r["top1"], r["images"]) for r in runs.records(f, "eval")] for f in (folder, reference)]
    assert scores[0] == scores[1]
    assert not (folder / "bad_samples.jsonl").exists()


@pytest.mark.parametrize("loader", LOADERS)
def test_half_a_second_without_the_images_changes_nothing(
    data: Path, tmp_path: Path, undisturbed: dict[str, Path], loader: str
) -> None:
    folder = tmp_path / "run"
    process = runs.begin(1, folder, f"data.root={data}", f"data.loader={loader}", "data.prefetch=1")
    for step in (5, 24, 40):  # after step 24 it evaluates
        runs.wait_until(partial(reached, folder, step), process)
        with away(data / ("val" if step == 24 else "train")):
            time.sleep(0.5)
    printed = runs.finish(process)
    assert process.returncode == 0, printed
    assert_same(folder, undisturbed[loader])


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("end", ["patience", "SIGTERM"])
def test_images_that_stay_away_end_the_run_and_a_restart_goes_on(
    data: Path, tmp_path: Path, undisturbed: dict[str, Path], loader: str, end: str
) -> None:
    folder = tmp_path / "run"
    words = [f"data.root={data}", f"data.loader={loader}", "data.prefetch=1"]
    process = runs.begin(1, folder, *words, f"data.wait_minutes={0.01 if end == 'patience' else 10}")
    runs.wait_until(partial(reached, folder, 13), process)
    with away(data / "train"):
        if end == "SIGTERM":
            time.sleep(1)
            process.send_signal(signal.SIGTERM)
        printed = runs.finish(process)
        steps = runs.steps_traced(folder)
        assert steps < 60
        assert "Traceback" not in printed
        if end == "SIGTERM":
            assert process.returncode == 75, printed
            assert int(runs.newest_checkpoint(folder).stem[5:]) == steps
        else:
            assert process.returncode == 1, printed
            (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
            assert f"{data}/train" in line
            assert "No such file or directory" in line
            assert "the same command continues" in line
    runs.train(1, folder, *words)
    assert_same(folder, undisturbed[loader])
