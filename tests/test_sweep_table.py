"""launch sweep: the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from sweeps import QUICK

from distrib.compare import p_value
from launch.sweep import table
from launch.sweep.plan import Sweep, plan_sweep
from launch.sweep.state import Found


def results(sweep: Sweep, top1: Callable[[int], float], **more: float) -> dict[str, Found]:
    return {
        element.name: Found("finished", {"top1": top1(k), "loss": 1.0, **more})
        for k, element in enumerate(sweep.elements)
    }


def test_rows_by_hand() -> None:
    sweep = plan_sweep(QUICK, ["optim.lr=1,2,3", "seed=0..2"])
    top1 = [50.0, 52.0, 57.0, 60.0, 61.0, 68.0, 10.0, 11.0, 12.0]
    found = results(sweep, top1.__getitem__, top5=90.0, images_per_second=1234.0)
    found["lr=3,seed=0"] = replace(found["lr=3,seed=0"], state="diverged")
    found["lr=3,seed=1"] = Found("running")
    rows = table.rows_of(sweep, found)
    assert [(row.settings["optim.lr"], row.n, row.best) for row in rows] == [
        ("1", 3, False),
        ("2", 3, True),
        ("3", 1, False),
    ]
    # Differences 10, 9, 11 of mean 10 and deviation 1.
    assert rows[0].p == pytest.approx(p_value([10.0, 9.0, 11.0]))
    assert (rows[1].p, rows[2].p) == (None, None)
    lines = table.as_markdown(sweep, rows).splitlines()
    # 53 and the root of (9 + 1 + 16) / 2; 63 and the root of (9 + 4 + 25) / 2.
    assert lines[:6] == [
        "# quickstart-sweep",
        "",
        "| optim.lr | n | top-1, % | best | top-5, % | loss | images/s | p | runs |",
        "|---|---|---|---|---|---|---|---|---|",
        "| 1 | 3 | 53.00 ± 3.61 | 57.00 | 90.00 ± 0.00 | 1.0000 ± 0.0000 | 1,234 | 0.0033 | 3 finished |",
        "| 2 | 3 | **63.00 ± 4.36** | 68.00 | 90.00 ± 0.00 | 1.0000 ± 0.0000 | 1,234 |  | 3 finished |",
    ]
    assert lines[6] == "| 3 | 1 | 12.00 | 12.00 | 90.00 | 1.0000 | 1,234 |  | 1 finished, 1 diverged, 1 running |"
    assert "paired t-test" in lines[-1]
    values = table.as_json(sweep, rows, found)
    assert values["rows"][0]["top1"] == {"mean": 53.0, "standard_deviation": pytest.approx(13**0.5), "max": 57.0}
    assert values["rows"][2]["top1"] == {"mean": 12.0, "standard_deviation": None, "max": 12.0}
    assert [run["state"] for run in values["rows"][2]["runs"]] == ["diverged", "running", "finished"]
    assert [run["top1"] for run in values["rows"][2]["runs"]] == [None, None, 12.0]


def test_seeds_are_paired_by_their_number() -> None:
    sweep = plan_sweep(QUICK, ["optim.lr=1,2", "seed=0..3"])
    top1 = [1.0, 2.0, 3.0, 4.0, 11.0, 13.0, 12.0, 99.0]
    found = results(sweep, top1.__getitem__)
    found["lr=1,seed=0"] = found["lr=2,seed=3"] = Found("waiting")
    rows = table.rows_of(sweep, found)
    assert rows[0].p == pytest.approx(p_value([2.0 - 13.0, 3.0 - 12.0]))


def test_an_averages_figures_count_where_there_is_one() -> None:
    sweep = plan_sweep(QUICK, ["seed=0,1"])
    rows = table.rows_of(sweep, results(sweep, lambda k: 1.0, ema_top1=7.0, ema_loss=0.5))
    assert (rows[0].of("top1"), rows[0].of("loss")) == ([7.0, 7.0], [0.5, 0.5])


def test_a_table_of_one_seed_and_one_of_nothing() -> None:
    sweep = plan_sweep(QUICK, ["optim.lr=1,2"])
    lines = table.as_markdown(sweep, table.rows_of(sweep, results(sweep, float))).splitlines()
    assert lines[2] == "| optim.lr | n | top-1, % | best | loss | runs |"
    assert lines[5] == "| 2 | 1 | **1.00** | 1.00 | 1.0000 | 1 finished |"
    nothing = {element.name: Found("waiting") for element in sweep.elements}
    lines = table.as_markdown(sweep, table.rows_of(sweep, nothing)).splitlines()
    assert lines[2:5] == ["| optim.lr | n | runs |", "|---|---|---|", "| 1 | 0 | 1 waiting |"]
    seeds = plan_sweep(QUICK, ["seed=0,1"])
    lines = table.as_markdown(seeds, table.rows_of(seeds, results(seeds, lambda k: 3.0 + 2 * k))).splitlines()
    assert lines[4] == f"| {QUICK} | 2 | 4.00 ± 1.41 | 5.00 | 1.0000 ± 0.0000 | 2 finished |"
