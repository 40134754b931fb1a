"""The layers: imports run downward only. Reads sources with ``ast`` and imports nothing of ours."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the top. A name stands for the module or the whole package. A unit imports units of lower layers only.
# fmt: off
LAYERS = (
    ("train", "distrib.tools", "distrib.__main__"),
    ("distrib.progress",),
    ("distrib.mirror", "distrib.rescue", "distrib.trained"),
    (
        "distrib.alike",
        "distrib.budget",
        "distrib.engine",
        "distrib.checkpoint",
        "distrib.due",
        "distrib.folder",
        "distrib.log",
        "distrib.metrics",
        "distrib.preflight",
        "distrib.restarts",
        "distrib.trace",
        "distrib.watchdog",
        "distrib.weights",
        "distrib.words",
    ),
    ("distrib.data", "distrib.models", "distrib.optim", "distrib.augment", "distrib.digest"),
    ("distrib.runtime", "distrib.entry", "distrib.finite", "distrib.program"),
    ("distrib.lease", "distrib.store"),
    ("distrib.faults", "distrib.jsonl", "distrib.jobs"),
    ("distrib.layout", "distrib.parent", "distrib.place", "distrib.surroundings"),
    ("distrib.cli", "distrib.options"),
    ("distrib.keys", "distrib.follow"),
    ("distrib.config", "distrib.root", "distrib.compare"),
    ("distrib",),  # the package itself: its version
)
# fmt: on
DEPTH = {unit: depth for depth, layer in enumerate(LAYERS) for unit in layer}
APART = ("distrib.tools",)  # programs, each a module or a sub-package, that do not import each other either
LAUNCH_MAY = (
    "distrib.config", "distrib.cli", "distrib.compare", "distrib.entry", "distrib.folder", "distrib.follow",
    "distrib.jobs", "distrib.jsonl", "distrib.keys", "distrib.layout", "distrib.lease", "distrib.options",
    "distrib.place", "distrib.root", "distrib.surroundings",
)  # fmt: skip
WITHOUT_TORCH = ("launch", "distrib", "distrib.__main__", *LAUNCH_MAY)  # a login node has none
AGENT = "launch.agent"  # the one exception: a program that stands in for torchrun, started only where torch is
OURS = ("distrib", "launch", "train", "tests", "benchmarks")


def read_sources(root: Path) -> dict[str, str]:
    """Text by path, relative to ``root``, of all that has a layer."""
    files = [root / "train.py", *sorted(root.glob("distrib/**/*.py")), *sorted(root.glob("launch/**/*.py"))]
    return {str(file.relative_to(root)): file.read_text(encoding="utf-8") for file in files if file.exists()}


def module_of(path: str) -> str:
    parts = Path(path).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: str, text: str, modules: frozenset[str]) -> Iterator[tuple[int, str]]:
    """Line and full name of each imported module, wherever it stands; ``name.*`` for a star import."""
    module = module_of(path)
    package = module if path.endswith("__init__.py") else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(text, path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                kept = parents[: len(parents) - node.level + 1]
                base = ".".join([*kept, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield node.lineno, full if alias.name == "*" or full in modules or full in DEPTH else base
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def unit_of(module: str) -> str:
    """The layer's unit that holds a module: ``distrib.data`` for ``distrib.data.order``."""
    return ".".join(module.split(".")[:2]) if module.startswith("distrib.") else module.partition(".")[0]


def forbidden(importer: str, imported: str) -> str | None:
    """Why ``importer`` must not import ``imported``, or None when it may."""
    top = imported.partition(".")[0]
    if imported.endswith(".*"):
        return "a star import hides what is used"
    here, there = unit_of(importer), unit_of(imported)
    if imported == AGENT:
        return "it imports torch; start it as a program of its own"
    if here in WITHOUT_TORCH and top in ("torch", "torchvision") and importer != AGENT:
        return f"{here} must work on a login node, which has no torch"
    if top not in OURS:
        return None
    if here == "launch":
        return (
            None if there == "launch" or imported in LAUNCH_MAY else f"launch imports only {' and '.join(LAUNCH_MAY)}"
        )
    if there not in DEPTH:
        what = "is in no layer of tests/test_layers.py" if top == "distrib" else "lies above all layers"
        return f"{there} {what}"
    if here == there:
        other = here in APART and _program(importer, here) != _program(imported, here)
        return f"the programs of {here} do not import each other" if other else None
    if DEPTH[here] == DEPTH[there]:
        return "they stand side by side on one layer"
    return None if DEPTH[here] < DEPTH[there] else "imports run downward only"


def _program(module: str, package: str) -> str:
    return module.removeprefix(package).lstrip(".").partition(".")[0]


def violations(sources: Mapping[str, str]) -> list[str]:
    """One line for each import that breaks the layers."""
    modules = frozenset(map(module_of, sources))
    found = []
    for path, text in sources.items():
        importer = module_of(path)
        if unit_of(importer) not in DEPTH and unit_of(importer) != "launch":
            found.append(f"{path}:1: {importer} is in no layer of tests/test_layers.py: give it one")
            continue
        for line, imported in imports(path, text, modules):
            reason = forbidden(importer, imported)
            if reason:
                found.append(f"{path}:{line}: {importer} imports {imported}: {reason}")
    return found


def test_imports_run_downward() -> None:
    sources = read_sources(ROOT)
    assert {"distrib/config.py", "distrib/cli.py", "launch/__main__.py"} <= set(sources)
    found = violations(sources)
    assert not found, "\n" + "\n".join(found)


ALLOWED = {
    "train.py": "import torch\nfrom distrib import __version__, checkpoint\nfrom distrib.engine.step import step\n"
    "from distrib.cli import load_config\nfrom distrib.data import build_loader\nimport distrib.faults\n",
    "distrib/__init__.py": "__version__ = '1'\n",
    "distrib/config.py": "from distrib import __version__\nimport pydantic\n",
    "distrib/cli.py": "from .config import Config\nimport yaml\n",
    "distrib/runtime.py": "import torch\nfrom distrib.config import UserError\n",
    "distrib/faults.py": "import torch\n",
    "distrib/jsonl.py": "import json\n",
    "distrib/checkpoint.py": "from distrib.runtime import Runtime\n",
    "distrib/data/__init__.py": "from distrib.data.order import Order\nfrom . import draws\n",
    "distrib/data/order.py": "from .draws import draw\nfrom ..config import DataConfig\n",
    "distrib/data/draws.py": "import numpy\n",
    "distrib/engine/step.py": "from distrib.optim.ema import Ema\nfrom .state import State\n",
    "distrib/engine/state.py": "",
    "distrib/optim/ema.py": "",
    "distrib/tools/__init__.py": "",
    "distrib/tools/bench.py": "from distrib.engine import step\nfrom distrib import models\n",
    "launch/__init__.py": "",
    "launch/__main__.py": "from launch.command import build\nimport distrib.config\nfrom distrib import cli\n",
    "launch/command.py": "import shlex\n",
    "launch/agent.py": "from torch.distributed import run\nfrom launch.command import FAILED\n",
}


def test_what_the_layers_allow() -> None:
    assert violations(ALLOWED) == []


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("distrib/config.py", "import os\nimport distrib.cli\n", "2: distrib.config imports distrib.cli: imports run"),
        (
            "distrib/cli.py",
            "from distrib.runtime import start\n",
            "1: distrib.cli imports distrib.runtime: imports run",
        ),
        (
            "distrib/faults.py",
            "\n\nfrom . import jsonl\n",
            "3: distrib.faults imports distrib.jsonl: they stand side",
        ),
        (
            "distrib/faults.py",
            "from distrib.data.order import x\n",
            "1: distrib.faults imports distrib.data.order: imp",
        ),
        (
            "distrib/data/order.py",
            "from ..models import x\n",
            "1: distrib.data.order imports distrib.models: they stand",
        ),
        (
            "distrib/data/order.py",
            "def f():\n    import distrib.engine.step\n",
            "2: distrib.data.order imports distrib.e",
        ),
        ("distrib/data/__init__.py", "from ..engine import x\n", "1: distrib.data imports distrib.engine: imports run"),
        ("distrib/engine/step.py", "from distrib import checkpoint\n", "1: distrib.engine.step imports distrib.check"),
        ("distrib/engine/step.py", "import train\n", "1: distrib.engine.step imports train: imports run downward"),
        ("distrib/tools/bench.py", "import train\n", "1: distrib.tools.bench imports train: they stand side by side"),
        (
            "train.py",
            "from distrib.tools import bench\n",
            "1: train imports distrib.tools.bench: they stand side by side",
        ),
        (
            "distrib/tools/report.py",
            "from .bench import x\n",
            "1: distrib.tools.report imports distrib.tools.bench: the",
        ),
        ("distrib/tools/report.py", "from distrib.tools import bench\n", "1: distrib.tools.report imports distrib.too"),
        (
            "distrib/tools/__init__.py",
            "from . import bench\n",
            "1: distrib.tools imports distrib.tools.bench: the pr",
        ),
        ("distrib/log.py", "import launch.command\n", "1: distrib.log imports launch.command: launch lies above all"),
        ("distrib/log.py", "from tests import helper\n", "1: distrib.log imports tests: tests lies above all layers"),
        (
            "distrib/log.py",
            "from distrib.other import x\n",
            "1: distrib.log imports distrib.other: distrib.other is in no",
        ),
        ("distrib/other.py", "", "1: distrib.other is in no layer of tests/test_layers.py"),
        ("distrib/log.py", "from distrib.config import *\n", "1: distrib.log imports distrib.config.*: a star import"),
        ("train.py", "from os.path import *\n", "1: train imports os.path.*: a star import"),
        (
            "distrib/__init__.py",
            "from distrib.config import Config\n",
            "1: distrib imports distrib.config: imports run",
        ),
        ("distrib/cli.py", "def f():\n    import torch.cuda\n", "2: distrib.cli imports torch.cuda: distrib.cli must"),
        (
            "distrib/data/draws.py",
            "import importlib\nimportlib.import_module('distrib.log')\n",
            "2: distrib.data.draws im",
        ),
        (
            "launch/command.py",
            "from distrib.faults import STOPPED\n",
            "1: launch.command imports distrib.faults: launch",
        ),
        (
            "launch/command.py",
            "from distrib import models\n",
            "1: launch.command imports distrib.models: launch imports",
        ),
        (
            "launch/command.py",
            "import distrib\n",
            "1: launch.command imports distrib: launch imports only distrib.config",
        ),
        ("launch/command.py", "import train\n", "1: launch.command imports train: launch imports only distrib.config"),
        (
            "launch/slurm.py",
            "from launch import agent\n",
            "1: launch.slurm imports launch.agent: it imports torch",
        ),
        (
            "launch/agent.py",
            "import distrib.log\n",
            "1: launch.agent imports distrib.log: launch imports only",
        ),
        ("distrib/keys.py", "import torchvision\n", "1: distrib.keys imports torchvision: distrib.keys must"),
        ("launch/slurm.py", "from torch import cuda\n", "1: launch.slurm imports torch: launch must work on a login"),
    ],
)
def test_what_the_layers_forbid(path: str, text: str, expected: str) -> None:
    found = violations({**ALLOWED, path: text})
    assert len(found) == 1, found
    assert found[0].startswith(f"{path}:{expected}")
