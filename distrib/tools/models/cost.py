"""GPU hours of a training, from the speeds that ``distrib bench`` has measured and that lie on file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distrib.layout.folders import reason, shown
from distrib.root import ROOT

REPORTS = ROOT / "benchmarks" / "results"  # a wheel carries none
IMAGES = 1_281_167  # ImageNet's to train on
# The figures of a report that are a training's speed, the nearer to a real one first, and what they are called.
ROWS = {
    "train": {"train.py on images": "train.py, from files", "train.py": "train.py, made-up images"},
    "model": {"ours, compiled": "a step alone, compiled", "ours": "a step alone"},
}


@dataclass(frozen=True)
class Speed:
    """A measured training speed, on one GPU.

    Attributes:
        rate: images/s.
        what: what was measured.
        size: pixels a side.
        gpu: its name; benchmarks use one, however many the machine has.
        date: ISO 8601.
        file: the report.
    """

    model: str
    rate: float
    what: str
    size: int
    batch: int
    precision: str
    gpu: str
    date: str
    file: str

    def hours(self, epochs: float) -> float:
        """GPU hours of so many epochs of ImageNet."""
        return epochs * IMAGES / self.rate / 3600


def read_speeds(folder: Path, notify: Callable[[str], None]) -> list[Speed]:
    """The newest measurement of each kind from the reports in ``folder`` and below, those of a GPU only.

    A file that is no report is passed over; ``notify`` hears of one that cannot be read.
    """
    newest: dict[tuple[object, ...], Speed] = {}
    for path in sorted(folder.rglob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found = list(_speeds(content, path)) if isinstance(content, dict) else []
        except OSError as error:
            notify(f"passed over: {shown(path)}: {reason(error)}")
            continue
        except (ValueError, LookupError, TypeError, AttributeError):  # cut off, or of another make
            notify(f"passed over: {shown(path)} is no report of distrib bench")
            continue
        for speed in found:
            key = (speed.model, speed.gpu, speed.size, speed.precision, speed.what)
            if key not in newest or newest[key].date < speed.date:
                newest[key] = speed
    return sorted(newest.values(), key=lambda speed: (speed.model, speed.gpu, speed.size, speed.hours(1)))


def _speeds(report: dict[str, Any], path: Path) -> Iterator[Speed]:
    """The one that says most, if the report has any."""
    rows = ROWS.get(report.get("bench", ""), {})
    gpus = str(report["hardware"]).rpartition("; ")[2] if rows else "no GPU"
    if gpus == "no GPU":
        return
    medians = {each["name"]: float(each["median"]) for each in report["results"]}
    settings = report["settings"]
    for name, what in rows.items():
        if medians.get(name, 0) > 0:
            compiled = ", compiled" * (bool(settings["compile"]) and report["bench"] == "train")
            yield Speed(
                model=str(settings["model"]), rate=medians[name], what=what + compiled, size=int(settings["size"]),
                batch=int(settings["batch"]), precision=str(settings.get("precision_here", settings["precision"])),
                gpu=gpus.split(", ")[0], date=str(report["date"]), file=str(path),
            )  # fmt: skip
            return
