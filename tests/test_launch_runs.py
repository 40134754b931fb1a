"""What the launcher reads in run folders, and where it finds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.record import Record
from launch.reports import restarts_within
from launch.runs import Clock, find, read, resolve, tail, total_steps
from launch.survey import duration, size


def submitted(job: str = "7") -> dict[str, Any]:
    return {"event": "submitted", "job": job, "submission": "s1"}


# The folder


def line(step: int, kind: str = "train", **more: Any) -> str:
    return json.dumps({"kind": kind, "step": step, "epoch": step / 8, **more}) + "\n"


def test_reads_only_the_end_of_a_long_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert tail(path) == ([], None)
    lines = [line(1, "eval", best_step=1, best_top1=10.0)]
    lines += [line(step, padding="x" * 200) for step in range(2, 5000)]
    path.write_text("".join(lines) + '{"kind": "train", "step": 9')  # the last one is being written
    found, changed = tail(path)
    assert found[0]["best_top1"] == 10.0
    assert found[-1]["step"] == 4999
    assert len(found) <= 9
    assert changed == path.stat().st_mtime


@pytest.mark.parametrize("count", [0, 1, 2, 20])
@pytest.mark.parametrize("length", [1, 30_000])  # as long as with log.layers, and longer than one read
def test_reads_short_files_and_long_lines(tmp_path: Path, count: int, length: int) -> None:
    path, steps = tmp_path / "metrics.jsonl", list(range(2, count + 2))
    first = line(1, "eval", padding="x" * length)
    path.write_text(first + "".join(line(step, padding="x" * length) for step in steps))
    found, _ = tail(path)
    assert found[0] == json.loads(first)
    assert [one["step"] for one in found if one["kind"] == "train"] == steps[-8:]


@pytest.mark.parametrize(
    ("config", "source", "expected"),
    [
        ("train:\n  epochs: 8.0\n  steps: null\noptim:\n  steps: 3\n", {"step": 60, "epoch": 0.48}, 1000),
        ("train:\n  epochs: 8.0\n  steps: 77\n", {}, 77),
        ("# a header\nrun:\n  name: train\ntrain:\n  epochs: 0.001\n", {"step": 60, "epoch": 0.48}, 1),
        ("train:\n  epochs: 8.0\n", {}, None),
        ("train: [\n", {"step": 60, "epoch": 0.48}, None),
        ("run:\n  name: x\n", {"step": 60, "epoch": 0.48}, None),
    ],
)
def test_steps_in_all(tmp_path: Path, config: str, source: dict[str, Any], expected: int | None) -> None:
    (tmp_path / "config.yaml").write_text(config)
    assert total_steps(tmp_path, source, {}) == expected


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs of several kinds below ``runs``, which lies in the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "a/wandb/x", "lr-sweep/lr=0.5", "lr-sweep/lr=1.0", "configs", ".hidden"):
        Path("runs", name).mkdir(parents=True)
    for name in ("a", "a/wandb/x", "lr-sweep/lr=0.5", ".hidden"):
        Path("runs", name, "metrics.jsonl").write_text(line(5))
    record = Path("runs", "lr-sweep", "lr=1.0", "launch")
    record.mkdir()
    (record / "events.jsonl").write_text(json.dumps(submitted("31_1")) + '\n{"half')
    Path("runs", "lr-sweep", "launch", "code").mkdir(parents=True)
    Path("runs", "configs", "config.yaml").write_text("")
    return Path("runs")


def test_finds_runs_and_what_a_word_means(tree: Path) -> None:
    names = ["a", "lr-sweep/lr=0.5", "lr-sweep/lr=1.0"]
    assert [read(path, Clock()).name for path in find(tree)] == names
    assert [str(path) for path in find(tree / "a")] == ["runs/a"]
    for word, name in (
        ("a", "a"),
        ("runs/a", "a"),
        ("lr-sweep/lr=1.0", names[2]),
        ("31_1", names[2]),
        ("31", names[2]),
    ):
        assert resolve(word) == tree / name
    assert resolve(str(tree.absolute() / "a")) == tree.absolute() / "a"
    assert read(tree.absolute() / "a", Clock()).name == str(tree.absolute() / "a")


def test_what_the_launcher_keeps_of_a_sweep_is_passed_over(tree: Path) -> None:
    inside = tree / "lr-sweep" / "launch" / "code" / "runs"
    inside.mkdir()
    (inside / "metrics.jsonl").touch()
    for name in ("launch", "x/launch"):  # a run of this name is one
        (tree / name).mkdir(parents=True)
        (tree / name / "metrics.jsonl").touch()
    names = ["a", "launch", "lr-sweep/lr=0.5", "lr-sweep/lr=1.0", "x/launch"]
    assert [str(path.relative_to(tree)) for path in find(tree)] == names


def test_a_queued_run_holds_its_record_alone(tree: Path) -> None:
    run = read(tree / "lr-sweep" / "lr=1.0", Clock())
    assert run.seen.jobs() == ["31_1"]
    assert (run.step, run.steps, run.best, run.train) == (0, None, None, {})


def test_looking_leaves_nothing_behind(tree: Path) -> None:
    before = sorted(map(str, tree.rglob("*")))
    clock = Clock()
    for path in find(tree):
        assert (read(path, clock).silent or 0) < 60
    assert sorted(map(str, tree.rglob("*"))) == before


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, ""), (0, "0 s"), (99, "99 s"), (100, "2 min"), (3570, "1 h 00"), (11100, "3 h 05"), (187200, "2 d 4 h")],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_sizes() -> None:
    assert [size(n) for n in (0, 999, 1000, 2.2e6, 5.13e8, 3e12)] == [
        "0 B",
        "999 B",
        "1 kB",
        "2 MB",
        "513 MB",
        "3.0 TB",
    ]


def test_workers_that_all_nodes_start_again_count_once(tmp_path: Path) -> None:
    record = Record(tmp_path)
    assert restarts_within(record) == []
    said = {
        "7.0/n1": "t1 rank 0: gloo: connection closed by peer\nt3 a node came or left; everything is saved\n",
        "7.0/n2.domain": "t2 rank 9 was killed\n\nt4 a node came or left; everything is saved\n",
        "7.0/n3": "t2 rank 17: gloo: connection reset\n",
        "7.1/n1": "t5 rank 1: no memory\n",
    }
    for name, text in said.items():
        file = record.reports / f"{name}.restarts"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert restarts_within(record) == [
        ("7.0", "n2.domain", "t2 rank 9 was killed"),
        ("7.0", "n1", "t3 a node came or left; everything is saved"),
        ("7.1", "n1", "t5 rank 1: no memory"),
    ]
