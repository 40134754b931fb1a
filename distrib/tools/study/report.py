"""The study's table and its figures as JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distrib.compare import compare, mean_and_spread, show_p, spread
from distrib.config import UserError
from distrib.jsonl import dumps, replace_file
from distrib.tools.study.outcome import COMPARED, METRICS, Outcome
from distrib.tools.study.plan import Study

if TYPE_CHECKING:
    from distrib.models.count import Counts

RESULTS, TABLE, FIGURE = "results.json", "table.md", "figure.png"

Outcomes = Mapping[str, Sequence[Outcome]]
Against = Callable[[str], str | None]  # what a variant is compared with


def values_of(outcomes: Outcomes, metric: str) -> dict[str, list[float]]:
    """A metric's values by variant, in the seeds' order."""
    return {variant: [run.values[metric] for run in runs] for variant, runs in outcomes.items()}


def as_markdown(study: Study, outcomes: Outcomes, sizes: Mapping[str, Counts]) -> str:
    """An overview, then each compared metric with the seeds' values."""
    head = ["variant", "parameters", "MACs", *(name for name, _ in METRICS.values())]
    overview = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for variant in outcomes:
        cells = [variant, f"{sizes[variant].parameters:,}", f"{sizes[variant].macs / 1e6:,.1f} M"]
        for metric, (_, digits) in METRICS.items():
            cells.append(mean_and_spread(values_of(outcomes, metric)[variant], digits))
        overview.append(f"| {' | '.join(cells)} |")
    tables = [table(METRICS[m][0], values_of(outcomes, m), study.against, METRICS[m][1]) for m in COMPARED]
    blocks = [f"# {study.about.title}", study.about.question, "\n".join(overview), *tables]
    return "\n\n".join(block for block in blocks if block) + "\n"


def table(name: str, values: Mapping[str, Sequence[float]], against: Against, digits: int = 2) -> str:
    """Mean and standard deviation of each variant, and how it differs from another one, paired by seed."""
    lines = [
        f"| variant | {name} | standard deviation | seeds | difference | to | p |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant, own in values.items():
        deviation = spread(own)
        row = [
            variant,
            f"{statistics.mean(own):.{digits}f}",
            "" if deviation is None else f"{deviation:.{digits}f}",
            ", ".join(f"{value:.{digits}f}" for value in own),
        ]
        other = against(variant)
        found = compare(own, values[other]) if other is not None else None
        row += ["", "", ""] if found is None else [f"{found[0]:+.{digits}f}", str(other), show_p(found[1])]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def as_json(
    study: Study, outcomes: Outcomes, sizes: Mapping[str, Counts], settings: Mapping[str, Any]
) -> dict[str, Any]:
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


def check_output(output: Path, study: Study) -> None:
    """Looks whether ``output`` may be written to: before hours of training, not behind them.

    Raises:
        UserError: a file of one of the three names is there, and is not known to be this study's.
    """
    there = next((name for name in (RESULTS, TABLE, FIGURE) if (output / name).exists()), None)
    if there is None:
        return
    try:
        results = json.loads((output / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        results = None
    if not isinstance(results, dict) or results.get("study") != study.name:
        raise UserError(f"{output / there} is not of the study {study.name}: choose another --output, or move it away")


def write_results(output: Path, markdown: str, results: Mapping[str, Any]) -> None:
    """Writes ``results.json``, which tells whose folder this is, and then ``table.md``.

    Raises:
        UserError: they cannot be written.
    """
    _write(output / RESULTS, f"{dumps(results, indent=2)}\n".encode())
    _write(output / TABLE, markdown.encode())


def write_figure(output: Path, figure: bytes) -> None:
    """Writes ``figure.png``.

    Raises:
        UserError: it cannot be written.
    """
    _write(output / FIGURE, figure)


def _write(file: Path, data: bytes) -> None:
    try:
        replace_file(file, data)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}: choose another --output") from None
