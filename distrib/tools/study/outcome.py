"""What a run's folder tells: its figures, its curve, its layers' gradients."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from distrib.config import UserError
from distrib.tools.study.plan import Job

METRICS = {  # of a run: what it is called, and digits behind the point
    "train_error": ("training error, %", 2),
    "train_loss": ("training loss", 4),
    "top1": ("validation top-1, %", 2),
    "seconds": ("seconds a run", 0),
}
COMPARED = ("train_error", "top1")


@dataclass(frozen=True)
class Outcome:
    """One run's figures.

    values: those of ``METRICS``; training error and loss are the means of the last epoch's batches, as they were
        trained on, with their crops.
    curve: epochs done and the training error of the batches since the point before, percent.
    gradients: steps done and the norm of each parameter's gradient, where ``log.layers`` is on.
    """

    seed: int
    values: Mapping[str, float]
    curve: Sequence[tuple[float, float]]
    gradients: Sequence[tuple[int, Mapping[str, float | None]]]


def read_outcome(job: Job) -> Outcome:
    """The figures of a run that is finished.

    Raises:
        UserError: what it wrote is not there any more.
    """
    summary, file = job.summary(), job.folder / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        records = [line for line in lines if line["kind"] == "train"]
        if summary is None or not records:
            raise ValueError
        values = {
            "train_error": 100 - last_epoch(records, "top1"),
            "train_loss": last_epoch(records, "loss"),
            "top1": float(summary["top1"]),
            "seconds": float(summary["seconds"]),
        }
        curve = training_errors(records)
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{file} is not complete: remove {job.folder}, and the same command trains it again") from None
    gradients = [(record["step"], record["gradient_norms"]) for record in records if "gradient_norms" in record]
    return Outcome(job.seed, values, curve, gradients)


def training_errors(records: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Epoch and training error, percent. A record that a save cut short is joined with the next: few steps jump."""
    spans = [record["step"] - before["step"] for before, record in pairwise([{"step": 0}, *records])]
    points, steps, right = [], 0, 0.0
    for span, record in zip(spans, records, strict=True):
        steps, right = steps + span, right + span * record["top1"]
        if 2 * steps >= max(spans):
            points.append((record["epoch"], 100 - right / steps))
            steps, right = 0, 0.0
    return points


def last_epoch(records: Sequence[Mapping[str, Any]], key: str) -> float:
    """The mean of ``key`` over the last epoch's steps: a record is the mean of the steps since the one before.

    Records that began earlier do not count; without any other, the last one does.
    """
    begin = records[-1]["epoch"] - 1 - 1e-9
    total = steps = 0.0
    for before, record in pairwise([{"step": 0, "epoch": 0.0}, *records]):
        if before["epoch"] >= begin or (record is records[-1] and not steps):
            total += record[key] * (record["step"] - before["step"])
            steps += record["step"] - before["step"]
    return total / steps


def mean_curve(outcomes: Sequence[Outcome]) -> list[tuple[float, float, float, float]]:
    """Epoch, and mean, lowest and highest training error over the seeds, where all of them have a point.

    A run that was stopped and went on has others besides.
    """
    curves = [dict(outcome.curve) for outcome in outcomes]
    points = []
    for epoch in sorted(set(curves[0]).intersection(*curves[1:])):
        errors = [curve[epoch] for curve in curves]
        points.append((epoch, sum(errors) / len(errors), min(errors), max(errors)))
    return points


def mean_gradients(
    outcomes: Sequence[Outcome], wanted: Callable[[str], bool]
) -> tuple[list[int], list[str], list[list[float]]]:
    """Steps that all seeds measured, layers, and the geometric mean over the seeds of each norm, [layers][steps]."""
    seeds = [dict(outcome.gradients) for outcome in outcomes]
    steps = sorted(set(seeds[0]).intersection(*seeds[1:]))
    layers = [name for name in (seeds[0][steps[0]] if steps else {}) if wanted(name)]
    table = []
    for layer in layers:
        row = []
        for step in steps:
            norms = [measured[step][layer] or math.nan for measured in seeds]  # a norm may be 0 or null
            row.append(math.exp(sum(math.log(norm) for norm in norms) / len(norms)))
        table.append(row)
    return steps, layers, table
