"""What every benchmark reports: all runs with their spread, ratios pair by pair, the machine and the command."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import distrib

ROOT = Path(distrib.__file__).resolve().parent.parent
PACKAGES = ("torch", "torchvision", "numpy", "nvidia-dali-cuda130", "nvidia-dali-cuda120")
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "DISTRIB_EXIT_CODE_FILE")


@dataclass
class Row:
    """One figure: every run's value, and what its median is to reach ("<" or ">=", number)."""

    name: str
    unit: str
    goal: tuple[str, float] | None = None
    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Of the runs."""
        return statistics.median(self.values)

    @property
    def met(self) -> bool | None:
        """Whether the median reaches the goal; None without one."""
        if self.goal is None:
            return None
        return self.median < self.goal[1] if self.goal[0] == "<" else self.median >= self.goal[1]

    def as_dict(self) -> dict[str, Any]:
        """For the JSON file."""
        spread = {"median": self.median, "min": min(self.values), "max": max(self.values), "values": self.values}
        goal = {"goal": f"{self.goal[0]} {self.goal[1]:g}", "met": self.met} if self.goal else {}
        return {"name": self.name, "unit": self.unit, **spread, **goal}


class Report:
    """Collects a benchmark's figures. ``save`` after each pair: who is cut off by a time limit keeps what there is."""

    def __init__(self, bench: str, settings: Mapping[str, Any], file: Path | None) -> None:
        self._file = file
        self._rows: dict[str, Row] = {}
        self._ratios: list[tuple[Row, str, str]] = []
        self.notes: list[str] = []
        threads = [f"{key}={os.environ[key]}" for key in ("OMP_NUM_THREADS",) if key in os.environ]
        self._head = {
            "bench": bench,
            "date": datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": shlex.join([*threads, "python", "-m", "distrib.tools.bench", *sys.argv[1:]]),
            "hardware": hardware(),
            "software": software(),
            # Who else used the machine: processes ready to run, over the last 1, 5 and 15 minutes.
            "load_before": [round(load, 2) for load in os.getloadavg()],
            "settings": dict(settings),
        }

    def add(self, name: str, unit: str, value: float, goal: tuple[str, float] | None = None) -> None:
        """Notes one run's value of a row."""
        self._rows.setdefault(name, Row(name, unit, goal)).values.append(value)

    def compare(self, over: str, under: str, goal: tuple[str, float] | None = None) -> None:
        """Asks for the ratio of two rows, run by run. A row without values leaves it out."""
        self._ratios.append((Row(f"{over} / {under}", "ratio", goal), over, under))

    def rows(self) -> list[Row]:
        """All rows, the ratios behind them."""
        ratios = []
        for row, over, under in self._ratios:
            if over in self._rows and under in self._rows:
                pairs = zip(self._rows[over].values, self._rows[under].values, strict=False)
                ratios.append(Row(row.name, row.unit, row.goal, [a / b for a, b in pairs]))
        return [*self._rows.values(), *ratios]

    def save(self) -> None:
        """Writes the JSON file, if one was asked for."""
        if self._file is not None:
            results = [row.as_dict() for row in self.rows()]
            body = {**self._head, "notes": self.notes, "results": results}
            self._file.write_text(json.dumps(body, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        head = self._head
        lines = [f"{head[key]}" for key in ("hardware", "software")]
        lines.append(f"{head['date']}, load before {head['load_before']}")
        table: list[tuple[str, ...]] = [("", "unit", "median", "min", "max", "runs", "goal")]
        for row in self.rows():
            spread = (number(value, row.unit) for value in (row.median, min(row.values), max(row.values)))
            goal = f"{row.goal[0]} {row.goal[1]:g}: {'met' if row.met else 'MISSED'}" if row.goal else ""
            table.append((row.name, row.unit, *spread, str(len(row.values)), goal))
        widths = [max(len(line[k]) for line in table) for k in range(len(table[0]))]
        for line in table:
            columns = enumerate(zip(line, widths, strict=True))
            cells = [cell.ljust(width) if k in (0, 1, 6) else cell.rjust(width) for k, (cell, width) in columns]
            lines.append("  ".join(cells).rstrip())
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def number(value: float, unit: str) -> str:
    """A figure for people: ratios to three places, others to three or more digits."""
    if unit == "ratio":
        return f"{value:.3f}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def hardware() -> str:
    """The machine in a line."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    except OSError:  # not Linux
        pass
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpus = [torch.cuda.get_device_properties(k) for k in range(torch.cuda.device_count())]
    names = ", ".join(f"{gpu.name} {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus) or "no GPU"
    return f"{cores()} of {os.cpu_count()} × {model}, {memory:.0f} GiB; {names}"


def software() -> str:
    """Versions in a line, and torch's threads on the CPU."""
    found = [f"{package.name} {package.version}" for package in distributions() if package.name in PACKAGES]
    cuda = f", CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}" if torch.cuda.is_available() else ""
    return f"Python {platform.python_version()}, {', '.join(found)}{cuda}, {torch.get_num_threads()} threads"


def has_dali() -> bool:
    """Whether DALI is installed."""
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def clean_environment() -> dict[str, str]:
    """The environment for a process of its own: no rank of a run around it, and this copy of the code."""
    kept = {key: value for key, value in os.environ.items() if key not in RANK_VARIABLES}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**kept, "PYTHONPATH": os.pathsep.join(paths), "WANDB_MODE": "disabled"}


def in_fresh_process(module: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Runs ``python -m module SETTINGS``, whose last line of output is its result as JSON.

    Raises:
        RuntimeError: it failed; with its exit code and last words.
    """
    command = [sys.executable, "-m", module, json.dumps(dict(settings))]
    return json.loads(last_line(command))


def last_line(command: list[str]) -> str:
    """The last line that a command prints.

    Raises:
        RuntimeError: it failed; with its exit code and last words.
    """
    done = subprocess.run(command, env=clean_environment(), cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        words = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise RuntimeError(f"{' '.join(command[1:3])} ended with exit code {done.returncode}: {words}")
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


def positive(text: str) -> int:
    """An argument that must be a whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)
