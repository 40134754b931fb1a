"""The table of benchmarks/over_seeds.py: means, spreads, and a t-test against known values."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).resolve().parent.parent / "benchmarks" / "over_seeds.py"


@pytest.fixture
def over_seeds() -> ModuleType:
    spec = importlib.util.spec_from_file_location("over_seeds", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_p_values_of_a_table(over_seeds: ModuleType) -> None:
    # Student's distribution, 4 degrees of freedom: t = 2.776 is 5 %, t = 4.604 is 1 % (two-sided).
    for t, p in ((2.776, 0.05), (4.604, 0.01)):
        spread = 5**0.5 / t  # of five differences whose mean is 1
        a = spread * (5 - 1) ** 0.5 / 2**0.5
        assert over_seeds.p_value([1 - a, 1 + a, 1.0, 1.0, 1.0]) == pytest.approx(p, rel=2e-3)
    assert over_seeds.p_value([2.0, 2.0, 2.0]) == 0


def test_the_table(over_seeds: ModuleType) -> None:
    lines = over_seeds.table({"a": [10.0, 20.0, 30.0], "b": [12.0, 23.0, 34.0]}).splitlines()
    assert lines[2] == "| a | 20.00 | 10.00 | 10.00, 20.00, 30.00 | | |"
    assert lines[3].startswith("| b | 23.00 | 11.00 | 12.00, 23.00, 34.00 | +3.00 | 0.0")


def test_each_variant_and_seed_is_a_run(
    over_seeds: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    stand_in = tmp_path / "train.py"
    stand_in.write_text(
        "import json, pathlib, sys\n"
        "words = dict(word.partition('=')[::2] for word in sys.argv[1:])\n"
        "folder = pathlib.Path(words['run.dir']); folder.mkdir(parents=True)\n"
        "top1 = float(words['optim.lr']) + int(words['run.seed'])\n"
        "(folder / 'summary.json').write_text(json.dumps({'top1': top1}))\n"
    )
    monkeypatch.setattr(over_seeds, "TRAIN", stand_in)
    runs = ["--runs", str(tmp_path / "runs"), "--seeds", "2"]
    variants = ["--variant", "low: optim.lr=1", "--variant", "high: optim.lr=5 'run.notes=a b'"]
    assert over_seeds.main([*runs, *variants, "--", "train.epochs=3"]) == 0
    printed = capfd.readouterr().out
    assert "| low | 1.50 | 0.71 | 1.00, 2.00 | | |" in printed
    assert "| high | 5.50 | 0.71 | 5.00, 6.00 | +4.00 | 0.0000 |" in printed
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert [re.sub("[0-9a-f]{8}$", "", name) for name in names] == ["high-0-", "high-1-", "low-0-", "low-1-"]
    # Other words are other runs: none of the old figures is taken.
    assert over_seeds.main([*runs, *variants, "--", "train.epochs=4"]) == 0
    assert len(list((tmp_path / "runs").iterdir())) == 8
    stand_in.write_text("raise SystemExit(75)")
    assert over_seeds.main([*runs, *variants, "--", "train.epochs=5"]) == 75
