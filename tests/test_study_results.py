"""distrib study: its statistics against known values, networks' sizes, what it reads of runs, reports and figures."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from distrib.compare import compare, p_value
from distrib.config import ModelConfig, UserError
from distrib.models.count import Counts
from distrib.tools.study import outcome, plan, report
from distrib.tools.study.network import size_of
from distrib.tools.study.plan import Job
from distrib.tools.study.report import table

# Statistics


def test_p_values_of_a_table() -> None:
    # Student's distribution, 4 degrees of freedom: t = 2.776 is 5 %, t = 4.604 is 1 % (two-sided).
    for t, p in ((2.776, 0.05), (4.604, 0.01)):
        spread = 5**0.5 / t  # of five differences whose mean is 1
        a = spread * (5 - 1) ** 0.5 / 2**0.5
        assert p_value([1 - a, 1 + a, 1.0, 1.0, 1.0]) == pytest.approx(p, rel=2e-3)
    assert p_value([2.0, 2.0, 2.0]) == 0


@pytest.mark.parametrize("t", [0.5, 12.0, 10_000.0])
def test_p_values_in_closed_form(t: float) -> None:
    """Of two values Student's distribution is Cauchy's; of three it is algebraic."""
    assert p_value([1 - 1 / t, 1 + 1 / t]) == pytest.approx(1 - 2 * math.atan(t) / math.pi, rel=1e-6)
    a = 3**0.5 / t
    assert p_value([1 - a, 1.0, 1 + a]) == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-6)


def test_the_table() -> None:
    values = {"a": [10.0, 20.0, 30.0], "b": [12.0, 23.0, 34.0], "c": [12.0, 23.0, 35.0]}
    lines = table("top-1, %", values, {"a": None, "b": "a", "c": "b"}.get).splitlines()
    assert lines[2] == "| a | 20.00 | 10.00 | 10.00, 20.00, 30.00 |  |  |  |"
    assert lines[3].startswith("| b | 23.00 | 11.00 | 12.00, 23.00, 34.00 | +3.00 | a | 0.0")
    assert lines[4].startswith("| c | 23.33 | 11.50 | 12.00, 23.00, 35.00 | +0.33 | b | 0.42")
    assert "nan" not in table("top-1, %", {"a": [1.0], "b": [2.0]}, {"b": "a"}.get)


def test_nothing_is_said_of_one_seed_or_of_equal_values() -> None:
    assert compare([1.0], [2.0]) is None
    assert compare([1.0, 2.0], [1.0, 2.0]) is None


# Networks' sizes


@pytest.mark.parametrize(("name", "gmacs"), [("resnet18", 1.81), ("resnet50", 4.09), ("resnext50_32x4d", 4.23)])
def test_sizes_are_torchvisions(name: str, gmacs: float) -> None:
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name, weights=None)
    size = size_of(ModelConfig(name=name), 224)
    assert size.parameters == sum(p.numel() for p in theirs.parameters())
    assert size.macs / 1e9 == pytest.approx(gmacs, abs=0.01)  # torchvision's tables, "GFLOPS"


def test_the_networks_of_a_study_are_as_large_as_it_says() -> None:
    basic, bottleneck = (size_of(ModelConfig(name=name, num_classes=10), 32) for name in ("resnet34", "resnet50"))
    assert basic.parameters < bottleneck.parameters
    plain, residual = (
        size_of(ModelConfig(name="resnet56", plain=plain, num_classes=10), 32) for plain in (True, False)
    )
    assert plain == residual  # the shortcuts have no parameters


# What the runs tell


def write_run(folder: Path, records: list[dict[str, Any]], **summary: Any) -> Job:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"kind": "train", **r}) + "\n" for r in records))
    (folder / "summary.json").write_text(json.dumps({"top1": 50.0, "seconds": 9.0, **summary}))
    return Job("a", 0, folder, ())


def test_layers_are_averaged_over_the_seeds(tmp_path: Path) -> None:
    row = {"epoch": 1.0, "loss": 1.0, "top1": 1.0}
    found = []
    for k, norms in enumerate(([1.0, 4.0], [4.0, 1.0])):
        names = {"layer1.0.conv1.weight": norms[0], "layer1.0.bn1.weight": 9.0, "fc.weight": norms[1]}
        records = [
            {**row, "step": 1, "gradient_norms": names},
            {**row, "step": 2, "gradient_norms": names | {"fc.weight": None}},
        ]
        found.append(outcome.read_outcome(write_run(tmp_path / str(k), records)))
    steps, layers, rows = outcome.mean_gradients(found, lambda name: "bn" not in name)
    assert (steps, layers) == ([1, 2], ["layer1.0.conv1.weight", "fc.weight"])
    assert rows[0] == pytest.approx([2.0, 2.0])  # the geometric mean
    assert rows[1][0] == pytest.approx(2.0)
    assert math.isnan(rows[1][1])


def test_a_short_record_is_joined_with_the_next() -> None:
    rows = [(4, 10.0), (8, 20.0), (9, 60.0), (12, 40.0), (13, 90.0)]
    records = [{"step": step, "epoch": step / 4, "top1": top1} for step, top1 in rows]
    # Steps 9 and 10 to 12 together: (60 + 3 · 40) / 4; the last, alone, is left out.
    assert outcome.training_errors(records) == [(1.0, 90.0), (2.0, 80.0), (3.0, 55.0)]


def test_runs_that_were_stopped_are_drawn_where_all_have_points(tmp_path: Path) -> None:
    row, norms = {"loss": 1.0}, {"conv1.weight": 2.0}
    whole = [{**row, "step": s, "epoch": s / 4, "top1": 10.0 * s, "gradient_norms": norms} for s in (2, 4, 6)]
    stopped = [*whole[:1], {**row, "step": 3, "epoch": 0.75, "top1": 35.0}, *whole[1:]]
    runs = [outcome.read_outcome(write_run(tmp_path / name, rows)) for name, rows in (("a", whole), ("b", stopped))]
    assert [point[0] for point in outcome.mean_curve(runs)] == [0.5, 1.0, 1.5]
    assert outcome.mean_curve(runs)[0] == (0.5, 80, 80, 80)
    assert outcome.mean_gradients(runs[::-1], lambda name: True)[0] == [2, 4, 6]


def test_a_run_without_records_is_told(tmp_path: Path) -> None:
    job = write_run(tmp_path / "a", [])
    with pytest.raises(UserError, match="not complete: remove"):
        outcome.read_outcome(job)


def two() -> plan.Study:
    return plan.typed_study(["a: optim.lr=1", "b: optim.lr=2"], ["--config", "configs/quickstart.yaml"])


def test_results_as_json() -> None:
    values = dict.fromkeys(outcome.METRICS, 1.0)
    runs = {
        name: [outcome.Outcome(seed, values | {"top1": top1 + seed * k}, [], []) for seed in range(3)]
        for name, top1, k in (("a", 10.0, 1), ("b", 13.0, 2))
    }
    study = two()
    found = report.as_json(study, runs, dict.fromkeys(runs, Counts(3, 5, 7, 9)), {"a": {}, "b": {}})
    b = found["variants"]["b"]
    assert (b["parameters"], b["macs"], b["against"], b["seeds"]) == (5, 7, "a", [0, 1, 2])
    assert b["top1"]["values"] == [13.0, 15.0, 17.0]
    assert b["top1"]["difference"] == pytest.approx(4.0)
    assert b["top1"]["p"] == pytest.approx(p_value([3.0, 4.0, 5.0]))
    assert "difference" not in b["train_error"]
    assert found["variants"]["a"]["against"] is None


@pytest.mark.parametrize("kind", ["curves", "points", "gradients"])
def test_figures_show_what_is_there(kind: str, tmp_path: Path) -> None:
    from distrib.tools.study import figure

    about = plan.About.model_validate({"title": "Two", "figure": kind, "panels": {"left": ["a"], "right": ["b"]}})
    study = plan.Study("two", about, two().variants)
    values = dict.fromkeys(outcome.METRICS, 1.0)
    norms = [
        (1, {"conv1.weight": 0.5, "layer1.0.conv1.weight": 2.0}),
        (2, {"conv1.weight": 0.1, "layer1.0.conv1.weight": 1.0}),
    ]
    runs = {n: [outcome.Outcome(s, values, [(0.5, 90.0 - s), (1.0, 80.0)], norms) for s in (0, 1)] for n in ("a", "b")}
    with Image.open(io.BytesIO(figure.draw(study, runs))) as image:
        pixels = image.convert("L")
        assert min(image.size) > 300
        assert len(np.unique(np.asarray(pixels))) > 20
    apart = [outcome.Outcome(s, values, [(1.0 + s, 80.0)], norms[s : s + 1]) for s in (0, 1)]
    if kind != "points":  # they need something that all seeds have, of each variant
        with pytest.raises(UserError, match=r"^b: .* common to draw|^b: .* hold no norms"):
            figure.draw(study, {"a": runs["a"], "b": apart})
