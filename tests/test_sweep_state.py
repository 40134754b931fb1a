"""launch sweep: how far runs are, and folders of other settings."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from sweeps import QUICK, trained

from distrib.config import UserError
from distrib.lease import Lease
from launch.sweep.plan import Element, plan_sweep
from launch.sweep.state import Found, Progress, look_at


def found(element: Element) -> Found:
    return look_at([element])[element.name]


def test_states(tmp_path: Path) -> None:
    sweep = plan_sweep(QUICK, ["seed=0,1", f"run.dir={tmp_path}"])
    one = sweep.elements[0]
    assert found(one) == Found(Progress.WAITING)
    trained(one.folder, sweep)
    assert found(one).state == Progress.UNFINISHED
    for status, expected in (("stopped", Progress.UNFINISHED), ("finished", "finished"), ("diverged", "diverged")):
        trained(one.folder, sweep, status=status, top1=3.0)
        assert found(one) == Found(expected, {"step": 1, "status": status, "top1": 3.0})
    lease = Lease(one.folder).acquire()
    assert found(one).state == Progress.RUNNING
    # Its process is gone; and one elsewhere, whose heart stands still.
    written = json.loads((one.folder / "writer.json").read_text())
    (one.folder / "writer.json").write_text(json.dumps(written | {"born": "1"}))
    assert found(one).state == Progress.DIVERGED
    (one.folder / "writer.json").write_text(json.dumps(written | {"machine": "another"}))
    assert found(one).state == Progress.RUNNING
    os.utime(one.folder / "writer.json", (time.time() - 60,) * 2)
    assert found(one).state == Progress.DIVERGED
    lease.release()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train.epochs=9"], "train.epochs 9.0, and now it is 8.0: set it back"),
        (["optim.momentum=0.8", "train.epochs=9"], r"optim.momentum 0.8, and now it is 0.9 \(and 1 more\)"),
        (["ema.decay=0.9"], "ema.decay 0.9, and now it is null"),
        (["run.seed=5"], "run.seed 5, and now it is 0"),
        (
            [
                "launch.preflight=false",
                "log.every_steps=3",
                "data.workers=7",
                "wandb.project=x",
                "run.name=y",
                "checkpoint.keep=1",
            ],
            None,
        ),
        (["launch.preflight=false"], None),
        (["model.num_classes=10", "train.compile=false"], None),  # settled by the run
    ],
)
def test_a_folder_of_other_settings(tmp_path: Path, words: list[str], told: str | None) -> None:
    sweep = plan_sweep(QUICK, ["seed=0,1", f"run.dir={tmp_path}"])
    trained(sweep.elements[0].folder, sweep, *words, status="finished")
    if told is None:
        assert found(sweep.elements[0]).state == "finished"
    else:
        with pytest.raises(UserError, match=told):
            found(sweep.elements[0])


def test_a_batch_that_became_the_images(tmp_path: Path) -> None:
    """The built-in sample has 8,000: a larger batch became so many, and any other batch is another setting."""
    words = ["seed=0,1", f"run.dir={tmp_path}", "train.global_batch=9000", "train.micro_batch=9000"]
    sweep = plan_sweep(QUICK, words)
    one = sweep.elements[0]
    trained(one.folder, sweep, "train.global_batch=8000", "train.micro_batch=8000")
    assert found(one).state == Progress.UNFINISHED
    trained(one.folder, sweep, "train.global_batch=7000", "train.micro_batch=7000")
    with pytest.raises(UserError, match=r"train\.global_batch 7000, and now it is 9000"):
        found(one)
