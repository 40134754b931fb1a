"""distrib study: what it leaves behind when it cannot start a run or draw the figure, and when it is interrupted."""

from __future__ import annotations

import functools
import json
import math
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from distrib.config import UserError
from distrib.faults import StopSignals
from distrib.tools.study import __main__ as command
from distrib.tools.study import jobs, plan, report

SLEEPS = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, {on_stop})
pathlib.Path({ready!r}).touch()
time.sleep(300)
"""
# In place of train.py: finished at once, its records at epochs that no other seed has.
RECORDS = """
import json, pathlib, sys
words = dict(word.partition("=")[::2] for word in sys.argv[1:] if "=" in word)
folder, seed = pathlib.Path(words["run.dir"]), int(words["run.seed"])
folder.mkdir(parents=True)
rows = [{"kind": "train", "step": s, "epoch": s + seed / 9, "loss": 1.0, "top1": 50.0 + seed} for s in (1, 2)]
(folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
(folder / "summary.json").write_text(json.dumps({"status": "finished", "top1": 60.0 + seed, "seconds": 1.0}))
(folder / "config.yaml").write_text("model: {name: resnet20, num_classes: 10}\\n")
"""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The processes that are started."""
    made: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        made.append(popen(*args, **options))
        return made[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    return made


def sleeper(folder: Path, on_stop: str) -> tuple[Path, Path]:
    """A run that goes on until it is stopped, and the file that it makes once it can be."""
    ready, train = folder / "ready", folder / "train.py"
    train.write_text(SLEEPS.format(on_stop=on_stop, ready=str(ready)))
    return train, ready


def planned(folder: Path) -> list[plan.Job]:
    study = plan.typed_study(["a: optim.lr=1.0", "b: optim.lr=2.0"], ["--config", "configs/quickstart.yaml"])
    return plan.jobs_of(study, 1, folder)


def interrupt_when(ready: Path) -> bool:
    if ready.exists():
        raise KeyboardInterrupt
    return False


def test_a_run_that_cannot_start_leaves_no_other_behind(tmp_path: Path, started: list[subprocess.Popen[bytes]]) -> None:
    train, _ = sleeper(tmp_path, "lambda *_: sys.exit(75)")
    first, second = planned(tmp_path / "runs")
    jobs.log_of(second).mkdir(parents=True)
    with pytest.raises(UserError, match=r"cannot write .*choose another --runs"):
        jobs.train_all([first, second], 2, lambda: False, train)
    (process,) = started
    assert process.returncode is not None


def test_a_second_interrupt_leaves_no_run_behind(tmp_path: Path, started: list[subprocess.Popen[bytes]]) -> None:
    train, ready = sleeper(tmp_path, "lambda *_: sys.exit(75)")
    with pytest.raises(KeyboardInterrupt):
        jobs.train_all(planned(tmp_path / "runs")[:1], 1, lambda: interrupt_when(ready), train)
    assert [process.returncode for process in started] == [75]


def test_a_figure_that_cannot_be_drawn_costs_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "_study.yaml").write_text("title: Mine\nfigure: curves\n")
    (folder / "one.yaml").write_text("model: {name: resnet20}\ndata: {loader: synthetic}\n")
    (tmp_path / "train.py").write_text(RECORDS)
    monkeypatch.setattr(jobs, "train_all", functools.partial(jobs.train_all, train=tmp_path / "train.py"))
    stop = StopSignals.__new__(StopSignals)  # without its handlers
    stop._received, stop._deadline = None, math.inf

    def study() -> int:
        args, behind = command.parse([str(folder), "--seeds", "2", "--runs", str(tmp_path / "runs")])
        return command.run(args, behind, stop)

    with pytest.raises(UserError, match=r"^one: its seeds have no epoch in common"):
        study()
    table = (tmp_path / "runs" / "table.md").read_text()
    assert capsys.readouterr().out == table
    results = json.loads((tmp_path / "runs" / "results.json").read_text())
    assert results["variants"]["one"]["top1"]["values"] == [60.0, 61.0]
    assert not (tmp_path / "runs" / "figure.png").exists()

    # As the message says: drawn in another way, and nothing is trained again.
    (folder / "_study.yaml").write_text("title: Mine\nfigure: points\n")
    (tmp_path / "train.py").write_text("raise SystemExit(1)")
    assert study() == 0
    assert (tmp_path / "runs" / "table.md").read_text() == table
    assert (tmp_path / "runs" / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "files",
    [
        {"table.md": "mine"},
        {"figure.png": "mine"},
        {"results.json": "mine"},
        {"results.json": "[1]", "table.md": "mine"},
        {"results.json": '{"study": "another"}', "figure.png": "mine"},
    ],
)
def test_files_of_others_stay(files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "train_all", lambda *_: pytest.fail("it trains"))
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    args, behind = command.parse(["degradation", "--runs", str(tmp_path / "runs"), "--output", str(tmp_path)])
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path))}/.* is not of the study degradation: choose"):
        command.run(args, behind, StopSignals.__new__(StopSignals))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files


def test_files_of_its_own_may_be_replaced(tmp_path: Path) -> None:
    study = plan.Study("mine", plan.About(title="Mine"), ())
    report.check_output(tmp_path / "new", study)
    report.write_results(tmp_path, "table", {"study": "mine"})
    report.check_output(tmp_path, study)
    with pytest.raises(UserError, match=r"results\.json is not of the study other"):
        report.check_output(tmp_path, plan.Study("other", study.about, ()))
