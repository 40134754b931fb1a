"""distrib study: its runs, the studies that we have, mistakes, and a real one from end to end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from distrib.cli import load_config
from distrib.surroundings import usable_cores
from distrib.tools.study import jobs, outcome, plan, report
from distrib.tools.study.network import size_of

ROOT = Path(__file__).resolve().parent.parent
STUDIES = sorted(path.parent.name for path in (ROOT / "configs" / "studies").glob("*/_study.yaml"))

# In place of train.py: writes what a run writes, by a formula.
STAND_IN = """
import json, os, pathlib, sys, time
words = dict(word.partition("=")[::2] for word in sys.argv[1:] if "=" in word)
folder = pathlib.Path(words["run.dir"]); folder.mkdir(parents=True, exist_ok=True)
lr, seed = float(words["optim.lr"]), int(words["run.seed"])
print("threads", os.environ.get("OMP_NUM_THREADS"))
rows = [{"kind": "train", "step": s, "epoch": s / 4, "loss": lr / s, "top1": s + seed} for s in (2, 4, 5, 8)]
(folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
summary = {"status": "finished", "top1": lr + seed, "seconds": 1.0}
(folder / "summary.json").write_text(json.dumps(summary))
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    (tmp_path / "train.py").write_text(STAND_IN)
    return tmp_path / "train.py"


# Runs


def typed(*variants: str, words: tuple[str, ...] = ()) -> plan.Study:
    return plan.typed_study(variants, ["--config", "configs/quickstart.yaml", *words])


def test_each_variant_and_seed_is_a_run(stand_in: Path, tmp_path: Path) -> None:
    study = typed("low: optim.lr=1", "high: optim.lr=5 'wandb.notes=a b'", words=("train.epochs=3",))
    planned = plan.jobs_of(study, 2, tmp_path / "runs")
    assert jobs.train_all(planned, 1, lambda: False, stand_in) == 0
    names = sorted(path.name for path in (tmp_path / "runs").iterdir() if path.is_dir())
    assert [re.sub("[0-9a-f]{8}$", "", name) for name in names] == ["high-0-", "high-1-", "low-0-", "low-1-"]
    outcomes = {v.name: [outcome.read_outcome(j) for j in planned if j.variant == v.name] for v in study.variants}
    assert report.values_of(outcomes, "top1") == {"low": [1.0, 2.0], "high": [5.0, 6.0]}
    # Of the last epoch's steps 5 to 8: one of 100 − 5, three of 100 − 8.
    assert report.values_of(outcomes, "train_error")["low"] == [92.75, 91.75]
    assert outcomes["low"][0].curve[0] == (0.5, 98)
    # Finished, nothing runs again.
    stand_in.write_text("raise SystemExit(1)")
    assert jobs.train_all(planned, 1, lambda: False, stand_in) == 0
    # Other settings are other runs: none of the old figures is taken.
    others = plan.jobs_of(typed("low: optim.lr=1", words=("train.epochs=4",)), 2, tmp_path / "runs")
    assert not {job.folder for job in others} & {job.folder for job in planned}
    assert jobs.train_all(others, 1, lambda: False, stand_in) == 1


def test_the_name_of_a_run_is_its_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def folder(text: str) -> Path:
        (tmp_path / "a.yaml").write_text(text)
        return plan.jobs_of(plan.Study("s", plan.About(title="t"), (variant,)), 1, tmp_path)[0].folder

    variant = plan.Variant("a", str(tmp_path / "a.yaml"), ("train.epochs=3",))
    first = folder("optim: {lr: 0.3}")
    assert folder("# a remark\noptim:\n  lr: 0.3\n") == first
    assert folder("optim: {lr: 0.3}\nrun: {name: other}") == first
    assert folder("optim: {lr: 0.4}") != first
    monkeypatch.setenv("WANDB_PROJECT", "another")
    assert folder("optim: {lr: 0.3}") == first


def test_a_run_that_fails_ends_the_study(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train = tmp_path / "train.py"
    train.write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "if 'optim.lr=1.0' in sys.argv: time.sleep(1); sys.exit('error: no such data')\n"
        "time.sleep(60)\n"
    )
    planned = plan.jobs_of(typed("b: optim.lr=2.0", "a: optim.lr=1.0"), 2, tmp_path / "runs")
    began = time.monotonic()
    assert jobs.train_all(planned, 2, lambda: False, train) == 1
    assert time.monotonic() - began < 30  # the other was asked to stop
    assert "a, seed 0: error: no such data" in capfd.readouterr().err
    train.write_text("raise SystemExit(75)")
    assert jobs.train_all(planned, 2, lambda: False, train) == 75


def test_runs_share_the_cores(stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    for at_once, threads in ((1, 7), (2, max(1, usable_cores() // 2))):
        (job,) = plan.jobs_of(typed("a: optim.lr=1"), 1, tmp_path / str(at_once))
        assert jobs.train_all([job], at_once, lambda: False, stand_in) == 0
        assert jobs.log_of(job).read_text() == f"threads {threads}\n"


# Studies


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_of_ours_is_sound(name: str) -> None:
    study = plan.read_study(name, [])
    planned = plan.jobs_of(study, 3, Path("runs"))
    assert len({job.folder for job in planned}) == 3 * len(study.variants) >= 6
    configs = [variant.config(0) for variant in study.variants]
    assert len({config.model_copy(update={"run": configs[0].run}).model_dump_json() for config in configs}) == len(
        configs
    )
    for variant, config in zip(study.variants, configs, strict=True):
        size_of(config.model, config.data.size)
        assert study.against(variant.name) in {None, *(v.name for v in study.variants)} - {variant.name}
        assert config.train.eval_every_epochs > config.train.epochs  # evaluated at the end alone
        assert config.log.layers == (study.about.figure == "gradients")


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()

    def refused(*words: str) -> str:
        environ = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "distrib", "study", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        return done.stderr

    assert "did you mean degradation?" in refused("degradatoin")
    assert "give the name or the folder of one study" in refused()
    assert "'0' is not a whole number of 1 or more" in refused("degradation", "--seeds", "0")
    assert "train.epoch" in refused("degradation", "train.epoch=3")
    assert "--variant is in place of a study" in refused("degradation", "--variant", "a: optim.lr=1")
    assert "is not 'NAME: key=value …'" in refused("--variant", "optim.lr=1")
    assert "two variants are called a" in refused("--variant", "a: optim.lr=1", "--variant", "a: optim.lr=2")
    assert "leave --fresh" in refused("--variant", "a: --fresh", "--", "--config", "quickstart")
    assert "holds no configurations" in refused("mine")
    (folder / "one.yaml").write_text("optim: {lr: 1}\n")
    assert "cannot read mine/_study.yaml: No such file" in refused("mine")
    (folder / "_study.yaml").write_text("title: Mine\nagainst: {one: two}\n")
    assert "there is no variant two; there are one" in refused("mine")
    (folder / "_study.yaml").write_text("title: Mine\nfigure: pie\n")
    assert "_study.yaml: figure: " in refused("mine")
    assert sorted(path.name for path in folder.iterdir()) == ["_study.yaml", "one.yaml"]
    (folder / "_study.yaml").write_text("title: Mine\nfigure: gradients\n")
    (folder / "one.yaml").write_text("log: {layers: true}\n")
    (folder / "two.yaml").write_text("log: {layers: false}\n")
    assert "log.layers=true in every variant: two is without" in refused("mine", "--data", "nowhere")
    assert "no data at" in refused("degradation", "--data", "nowhere")
    assert list(tmp_path.iterdir()) == [folder]


def test_a_missing_matplotlib_is_told_before_the_first_run(tmp_path: Path) -> None:
    code = (
        "import runpy, sys; sys.modules['matplotlib'] = None; "
        "sys.argv[0] = 'study'; runpy.run_module('distrib.tools.study', run_name='__main__')"
    )
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, "degradation", "--data", "nowhere"],
        cwd=tmp_path, env=environ, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stderr == "error: the figure needs matplotlib: pip install 'distrib[plots]'\n"
    assert done.returncode == 2
    assert list(tmp_path.iterdir()) == []


SHORT = (
    "data.fraction=0.02", "data.size=16", "data.eval_resize=16", "train.global_batch=20", "train.epochs=2",
    "schedule.warmup_epochs=0.5", "log.every_steps=4", "data.workers=1", "train.eval_every_epochs=99",
)  # fmt: skip


@pytest.fixture(scope="module")
def own_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two variants on the built-in sample, in a folder of one's own."""
    folder = tmp_path_factory.mktemp("mine") / "shortcuts"
    folder.mkdir()
    (folder / "_study.yaml").write_text("title: Shortcuts\nquestion: With or without?\nfigure: gradients\n")
    (folder / "_base.yaml").write_text("extends: quickstart.yaml\nlog: {layers: true}\n")
    (folder / "a-residual.yaml").write_text("extends: _base.yaml\n")
    (folder / "b-plain.yaml").write_text("extends: _base.yaml\nmodel: {plain: true}\n")
    return folder


def study_command(folder: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "distrib", "study", str(folder), *SHORT, "--seeds", "2", "--jobs", "2", *words]


def test_a_study_from_end_to_end(own_study: Path, tmp_path: Path) -> None:
    environ = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = study_command(own_study, "--runs", "runs", "--output", "out")

    # Stopped in its runs, it saves and ends with 75; the same command goes on.
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 240
    while not list((tmp_path / "runs").glob("*/metrics.jsonl")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    stopped = process.communicate(timeout=240)
    assert process.returncode == 75, stopped
    assert "the same command goes on" in stopped[1]
    assert not list((tmp_path / "out").iterdir())

    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["figure.png", "results.json", "table.md"]
    assert (tmp_path / "out" / "table.md").read_text() == done.stdout
    assert done.stdout.startswith("# Shortcuts\n\nWith or without?\n\n| variant | parameters | MACs |")
    with Image.open(tmp_path / "out" / "figure.png") as image:
        assert image.format == "PNG"
        assert image.width > 600
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["variants"]) == ["a-residual", "b-plain"]
    for name, found in results["variants"].items():
        for k, seed in enumerate((0, 1)):
            (folder,) = (path for path in (tmp_path / "runs").glob(f"{name}-{seed}-*") if path.is_dir())
            summary = json.loads((folder / "summary.json").read_text())
            assert found["top1"]["values"][k] == summary["top1"]
            rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            train = [row for row in rows if row["kind"] == "train"]
            assert [row["step"] for row in train][-3:] == [8, 12, 14]  # seven an epoch; a stop ends a record early
            assert found["train_error"]["values"][k] == pytest.approx(
                100 - (4 * train[-2]["top1"] + 2 * train[-1]["top1"]) / 6
            )
            assert all("layer3.2.conv2.weight" in row["gradient_norms"] for row in train[-3:])
            config = load_config(folder / "config.yaml")
            assert (config.run.seed, config.model.plain, config.data.fraction) == (seed, name == "b-plain", 0.02)

    # Again, there is nothing to train: the same table, at once.
    again = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=300, check=False)
    assert (again.returncode, again.stdout, again.stderr) == (0, done.stdout, "")
