"""What a sweep came to: a row for each combination of the varied settings, over its seeds."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distrib.compare import compare, mean_and_spread, show_p, spread
from distrib.config import UserError
from distrib.jsonl import dumps, replace_file
from launch.sweep.plan import Element, Sweep
from launch.sweep.state import Found, Progress

MARKDOWN, JSON = "table.md", "table.json"
METRICS = {  # of summary.json: how it is called in the table, and digits behind the point
    "top1": ("top-1, %", 2),
    "top5": ("top-5, %", 2),
    "loss": ("loss", 4),
    "images_per_second": ("images/s", 0),
}
OF_WEIGHTS = ("top1", "top5", "loss")  # with an EMA, its weights' count, as in choosing the best checkpoint
NOTE = "n: finished runs; ±: standard deviation over their seeds (n − 1); best: of the seeds; bold: highest mean.\n"
NOTE_P = (
    "p: paired t-test over the seeds in common with the bold row. That row was chosen by these same figures, so its "
    "lead is rather too large: train the two that matter with further seeds.\n"
)


@dataclass
class Row:
    """One combination. ``values``: each metric of the finished runs, by seed."""

    settings: Mapping[str, str]
    elements: list[Element] = field(default_factory=list)
    states: Counter[str] = field(default_factory=Counter)
    values: dict[str, dict[int, float]] = field(default_factory=lambda: {metric: {} for metric in METRICS})
    p: float | None = None  # against the best row
    best: bool = False

    @property
    def n(self) -> int:
        """Runs that count."""
        return len(self.values["top1"])

    def of(self, metric: str) -> list[float]:
        """A metric's values, in the seeds' order as typed."""
        return list(self.values[metric].values())


def rows_of(sweep: Sweep, found: Mapping[str, Found]) -> list[Row]:
    """The rows in the order of the words; ``found`` by the elements' names."""
    rows: dict[tuple[str, ...], Row] = {}
    for element in sweep.elements:
        row = rows.setdefault(tuple(element.settings.values()), Row(element.settings))
        row.elements.append(element)
        state, summary = found[element.name].state, found[element.name].summary
        row.states[state] += 1
        if state == Progress.FINISHED:
            for metric, values in row.values.items():
                value = _value(summary, metric)
                if value is not None:
                    values[element.seed] = value
    ranked = [row for row in rows.values() if row.n]
    if len(ranked) > 1:
        best = max(ranked, key=lambda row: statistics.mean(row.of("top1")))
        best.best = True
        for row in ranked:
            row.p = _p(row, best)
    return list(rows.values())


def _value(summary: Mapping[str, Any], metric: str) -> float | None:
    value = summary.get(metric)
    if metric in OF_WEIGHTS:
        value = summary.get(f"ema_{metric}", value)
    return float(value) if isinstance(value, int | float) else None


def _p(row: Row, best: Row) -> float | None:
    mine, other = row.values["top1"], best.values["top1"]
    seeds = [seed for seed in mine if seed in other]
    found = compare([mine[seed] for seed in seeds], [other[seed] for seed in seeds]) if row is not best else None
    return found[1] if found else None


def as_markdown(sweep: Sweep, rows: Sequence[Row]) -> str:
    """The table, with a title and notes."""
    metrics = [metric for metric in METRICS if any(row.values[metric] for row in rows)]
    with_p = any(row.p is not None for row in rows)
    head = [*(sweep.keys or ["configuration"]), "n"]
    for metric in metrics:
        head += [METRICS[metric][0], *(["best"] if metric == "top1" else [])]
    head += [*(["p"] if with_p else []), "runs"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [*(row.settings.values() if sweep.keys else [sweep.file]), str(row.n)]
        for metric in metrics:
            digits, values = METRICS[metric][1], row.of(metric)
            shown = mean_and_spread(values, digits) if values else ""
            if metric != "top1":
                cells.append(
                    shown if metric != "images_per_second" or not values else f"{statistics.mean(values):,.0f}"
                )
                continue
            cells += [f"**{shown}**" if row.best else shown, f"{max(values):.{digits}f}" if values else ""]
        cells += [*([show_p(row.p) if row.p is not None else ""] if with_p else []), count_states(row.states)]
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join([f"# {sweep.name}", "", *lines, "", NOTE + (NOTE_P if with_p else "")])


def count_states(states: Mapping[str, int]) -> str:
    """``3 finished, 1 running``."""
    return ", ".join(f"{states[state]} {state}" for state in Progress.ALL if states.get(state))


def as_json(sweep: Sweep, rows: Sequence[Row], found: Mapping[str, Found]) -> dict[str, Any]:
    """All figures, and each run's own."""
    return {
        "sweep": sweep.name,
        "config": sweep.file,
        "common": sweep.common,
        "rows": [
            {
                "settings": row.settings,
                "n": row.n,
                "best": row.best,
                "p": row.p,
                **{metric: _summed(row.of(metric)) for metric in METRICS},
                "runs": [_run(element, found[element.name], row) for element in row.elements],
            }
            for row in rows
        ],
    }


def _summed(values: Sequence[float]) -> dict[str, float | None] | None:
    if not values:
        return None
    return {"mean": statistics.mean(values), "standard_deviation": spread(values), "max": max(values)}


def _run(element: Element, found: Found, row: Row) -> dict[str, Any]:
    return {
        "name": element.name,
        "seed": element.seed,
        "state": found.state,
        "folder": str(element.folder),
        **{metric: row.values[metric].get(element.seed) for metric in METRICS},
    }


def check_folder(sweep: Sweep) -> Path:
    """Makes the sweep's folder where there is none; what is there is looked at before anything is overwritten.

    Raises:
        UserError: it cannot be made, or a table there is not this sweep's.
    """
    folder = sweep.folder.expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {folder}: {error.strerror}: set run.dir") from None
    if (folder / "config.yaml").exists():
        raise UserError(f"{folder} is the folder of a run: give the sweep a --name, or set run.dir")
    there = next((name for name in (MARKDOWN, JSON) if (folder / name).exists()), None)
    owner = _owner(folder / JSON)
    if there is not None and owner is None:
        raise UserError(f"{folder / there} is not a sweep's: set run.dir, or move it away")
    if owner is not None and owner != sweep.name:
        raise UserError(f"{folder} is the folder of the sweep {owner}: set run.dir, or give --name {owner} to go on")
    return folder


def _owner(file: Path) -> str | None:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values.get("sweep") if isinstance(values, dict) else None


def write(folder: Path, markdown: str, values: Mapping[str, Any]) -> None:
    """Writes ``table.json``, which tells whose folder this is, and then ``table.md``.

    Raises:
        UserError: they cannot be written.
    """
    for name, data in ((JSON, f"{dumps(values, indent=2)}\n"), (MARKDOWN, markdown)):
        try:
            replace_file(folder / name, data.encode("utf-8", "surrogateescape"))
        except OSError as error:
            raise UserError(f"cannot write {folder / name}: {error.strerror}: make room; --table writes it") from None
