"""Helps to test sweeps: a program in train.py's place, and what runs leave."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from distrib.cli import dump_config, load_config
from launch.sweep.plan import Sweep

ROOT = Path(__file__).resolve().parent.parent
QUICK = "configs/quickstart.yaml"

# In place of train.py: does what its learning rate says, and leaves what a run leaves, by a formula.
STAND_IN = """
import json, os, pathlib, signal, sys, time
sys.path.insert(0, os.environ["ROOT"])
from distrib.cli import dump_config, load_config
words = sys.argv[3:]
config = load_config(sys.argv[2], words)
folder, lr, seed = pathlib.Path(config.run.dir), config.optim.lr, config.run.seed
folder.mkdir(parents=True, exist_ok=True)
(folder / "config.yaml").write_text(dump_config(config))
with (folder / "starts").open("a") as file:
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    file.write(f"{os.getpid()} {os.environ.get('OMP_NUM_THREADS')} {gpus} {os.environ.get('WANDB_RUN_ID')}\\n")

def end(status, code):
    (folder / "summary.json").write_text(json.dumps({"status": status, "step": 1, "top1": 10 * lr + seed, "loss": lr}))
    sys.exit(code)

if lr == 3 and not (folder / "mended").exists():
    sys.exit("error: no such data")
if lr == 4:
    end("diverged", 1)
if lr == 5:
    signal.signal(signal.SIGTERM, lambda *_: end("stopped", 75))
    (folder / "ready").touch()
    time.sleep(60)
end("finished", 0)
"""
SWEEP = (
    "import sys; from pathlib import Path; from launch.__main__ import main; "
    "sys.exit(main(sys.argv[2:], Path(sys.argv[1])))"
)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of the stand-in, for runs without a GPU."""
    monkeypatch.setenv("ROOT", str(ROOT))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "train.py").write_text(STAND_IN)
    return tmp_path / "train.py"


def trained(folder: Path, sweep: Sweep, *words: str, **summary: Any) -> None:
    """What a run of the first element, with ``words`` behind its own, leaves."""
    folder.mkdir(parents=True, exist_ok=True)
    config = load_config(str(ROOT / QUICK), [*sweep.elements[0].words, *words])
    (folder / "config.yaml").write_text(dump_config(config))
    if summary:
        (folder / "summary.json").write_text(json.dumps({"step": 1} | summary))


def starts(folder: Path) -> dict[str, int]:
    """How often each run was started."""
    return {file.parent.name: len(file.read_text().splitlines()) for file in sorted(folder.glob("*/starts"))}


def wait_for(*files: Path) -> None:
    deadline = time.monotonic() + 120
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.02)
