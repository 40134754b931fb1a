"""The study's table and its figures as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distrib.config import UserError
from distrib.jsonl import dumps, replace_file
from distrib.tools.study.compare import compare, spread, table
from distrib.tools.study.network import Size
from distrib.tools.study.outcome import COMPARED, METRICS, Outcome
from distrib.tools.study.plan import Study

Outcomes = Mapping[str, Sequence[Outcome]]


def values_of(outcomes: Outcomes, metric: str) -> dict[str, list[float]]:
    """A metric's values by variant, in the seeds' order."""
    return {variant: [run.values[metric] for run in runs] for variant, runs in outcomes.items()}


def as_markdown(study: Study, outcomes: Outcomes, sizes: Mapping[str, Size]) -> str:
    """An overview, then each compared metric with the seeds' values."""
    head = ["variant", "parameters", "MACs", *(name for name, _ in METRICS.values())]
    overview = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for variant in outcomes:
        cells = [variant, f"{sizes[variant].parameters:,}", f"{sizes[variant].macs / 1e6:,.1f} M"]
        for metric, (_, digits) in METRICS.items():
            values = values_of(outcomes, metric)[variant]
            deviation = spread(values)
            shown = f"{statistics.mean(values):.{digits}f}"
            cells.append(shown if deviation is None else f"{shown} ± {deviation:.{digits}f}")
        overview.append(f"| {' | '.join(cells)} |")
    tables = [table(METRICS[m][0], values_of(outcomes, m), study.against, METRICS[m][1]) for m in COMPARED]
    blocks = [f"# {study.about.title}", study.about.question, "\n".join(overview), *tables]
    return "\n\n".join(block for block in blocks if block) + "\n"


def as_json(study: Study, outcomes: Outcomes, sizes: Mapping[str, Size], settings: Mapping[str, Any]) -> dict[str, Any]:
    """All figures. ``settings``: each variant's words for train.py."""
    variants = {}
    for variant, runs in outcomes.items():
        other = study.against(variant)
        metrics: dict[str, Any] = {}
        for metric in METRICS:
            values = values_of(outcomes, metric)
            own = values[variant]
            metrics[metric] = {"mean": statistics.mean(own), "standard_deviation": spread(own), "values": own}
            found = compare(own, values[other]) if other is not None else None
            if found is not None:
                metrics[metric] |= {"difference": found[0], "p": found[1]}
        variants[variant] = {
            "settings": settings[variant],
            "parameters": sizes[variant].parameters,
            "macs": sizes[variant].macs,
            "seeds": [run.seed for run in runs],
            "against": other,
            **metrics,
        }
    return {"study": study.name, **study.about.model_dump(mode="json"), "variants": variants}


def write(output: Path, markdown: str, results: Mapping[str, Any], figure: bytes) -> None:
    """Writes ``table.md``, ``results.json`` and ``figure.png``.

    Raises:
        UserError: they cannot be written.
    """
    files = {
        "table.md": markdown.encode(),
        "results.json": f"{dumps(results, indent=2)}\n".encode(),
        "figure.png": figure,
    }
    for name, data in files.items():
        try:
            replace_file(output / name, data)
        except OSError as error:
            raise UserError(f"cannot write {output / name}: {error.strerror}: choose another --output") from None
