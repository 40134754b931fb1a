"""Runs that are stopped or killed and started again end bit-identical to runs that were not.

Real processes, real signals, real JPEGs through DALI; each run is the real train.py.
"""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import runs
import torch

from distrib.digest import digest

SAVE_EVERY = 10  # runs.SMALL


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Path]]:
    folders = {}
    for procs in (1, 2, 3):
        folders[procs] = tmp_path_factory.mktemp("undisturbed") / f"{procs}_ranks"
        runs.train(procs, folders[procs])
    return folders


def random_step() -> int:
    step = random.SystemRandom().randint(3, 55)
    print(f"the signal comes after step {step}")
    return step


def assert_same(folder: Path, reference: Path, procs: int) -> None:
    assert runs.digest(folder) == runs.digest(reference)
    assert runs.trace(folder, procs) == runs.trace(reference, procs)  # ids, draws and the losses' bits, each step once
    for kind in ("train", "eval"):
        logged, expected = runs.records(folder, kind), runs.records(reference, kind)
        steps = [record["step"] for record in logged]
        assert steps == sorted(set(steps))
        assert {r["step"] for r in expected} <= set(steps)  # a stopped run logs the step at which it stopped too
    timing = {"seconds", "images_per_second"}
    evaluations = [{k: v for k, v in r.items() if k not in timing} for r in runs.records(folder, "eval")]
    assert evaluations == [{k: v for k, v in r.items() if k not in timing} for r in runs.records(reference, "eval")]


@pytest.mark.parametrize("procs", [1, 2, 3])
def test_sigterm_at_a_random_step_costs_nothing(procs: int, undisturbed: dict[int, Path], tmp_path: Path) -> None:
    folder, step = tmp_path / "run", random_step()
    process = runs.begin(procs, folder)
    runs.wait_until(lambda: runs.steps_traced(folder) >= step, process)
    process.send_signal(signal.SIGTERM)
    printed = runs.finish(process)

    assert runs.exit_codes(folder) == [75] * procs, printed
    assert procs > 1 or process.returncode == 75  # torchrun itself says 1 for whatever its workers say
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "stopped"
    stopped_at = summary["step"]
    assert {len(lines) for lines in runs.trace(folder, procs)} == {stopped_at}  # all ranks, at one step
    assert summary["sha256"] == digest(torch.load(runs.newest_checkpoint(folder), weights_only=True))

    printed = runs.train(procs, folder)
    assert f"step {stopped_at} of 60" in printed
    assert_same(folder, undisturbed[procs], procs)


@pytest.mark.parametrize("procs", [1, 2])
def test_kill_9_costs_at_most_the_save_interval(procs: int, undisturbed: dict[int, Path], tmp_path: Path) -> None:
    folder, step = tmp_path / "run", random_step()
    process = runs.begin(procs, folder)
    runs.wait_until(lambda: runs.steps_traced(folder) >= step, process)
    runs.kill_group(process)
    done = runs.steps_traced(folder)
    committed = [int(path.stem[5:]) for path in (folder / "checkpoints").glob("step_*.pt")]
    # A save is written beside the training: the newest one may not have been there yet.
    assert done - max(committed, default=0) < 2 * SAVE_EVERY

    printed = runs.train(procs, folder)
    if committed:
        assert f"step {max(committed)} of 60" in printed
    assert_same(folder, undisturbed[procs], procs)


@pytest.mark.parametrize("name", ["SIGINT", "SIGUSR1", "SIGUSR2"])
def test_every_stop_signal_saves_and_exits_75(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = runs.begin(1, folder)
    runs.wait_until(lambda: runs.steps_traced(folder) >= 3, process)
    process.send_signal(signal.Signals[name])
    printed = runs.finish(process)
    assert process.returncode == 75, printed
    assert f"{name}: stopped at step" in printed
    assert int(runs.newest_checkpoint(folder).stem[5:]) == runs.steps_traced(folder)


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    runs.change(
        tmp_path,
        monkeypatch,
        "import time\n"
        "from distrib.engine.step import TrainStep\n"
        "ordinary = TrainStep.__call__\n"
        "TrainStep.__call__ = lambda self, batches, step, *rest, **named: "
        "(time.sleep(600 if step == 20 else 0), ordinary(self, batches, step, *rest, **named))[1]\n",
    )
    process = runs.begin(1, folder)
    runs.wait_until(lambda: runs.steps_traced(folder) == 20, process)
    process.send_signal(signal.SIGINT)
    time.sleep(1.5)  # sooner it would be the same one, pressed long
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    printed = runs.finish(process)
    assert process.returncode == 1
    assert "interrupted twice" in printed
    assert runs.newest_checkpoint(folder).name == "step_00000020.pt"


def test_a_signal_before_the_first_step_is_not_lost(tmp_path: Path) -> None:
    process = runs.begin(1, tmp_path / "run")
    time.sleep(0.7)  # in the middle of importing torch
    process.send_signal(signal.SIGTERM)
    printed = runs.finish(process)
    assert process.returncode == 75, printed


@pytest.mark.parametrize("procs", [1, 2])
def test_a_stop_within_an_evaluation_repeats_it(procs: int, tmp_path: Path) -> None:
    slow = ["data.loader=synthetic", "data.synthetic.train=5000", "data.synthetic.val=9000", "data.eval_batch=50"]
    slow += ["train.eval_every_epochs=0.3"]  # each 30 steps
    reference, folder = tmp_path / "reference", tmp_path / "run"
    runs.train(procs, reference, *slow)
    process = runs.begin(procs, folder, *slow)
    runs.wait_until(lambda: runs.steps_traced(folder) >= 30, process)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    runs.finish(process)
    assert runs.exit_codes(folder) == [75] * procs
    assert (runs.steps_traced(folder), runs.records(folder, "eval")) == (30, [])
    runs.train(procs, folder, *slow)
    assert [record["step"] for record in runs.records(folder, "eval")] == [30, 60]
    assert_same(folder, reference, procs)


def test_all_world_sizes_see_the_same_batches(undisturbed: dict[int, Path]) -> None:
    batches = {procs: runs.global_batches(folder, procs) for procs, folder in undisturbed.items()}
    assert sorted(batches[1]) == list(range(1, 61))
    assert {len(batch) for batch in batches[1].values()} == {50}
    assert batches[1] == batches[2] == batches[3]


@pytest.mark.parametrize("procs", [3, 1])
def test_two_ranks_begin_and_another_number_finishes(procs: int, undisturbed: dict[int, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = runs.begin(2, folder)
    runs.wait_until(lambda: runs.steps_traced(folder) >= 27, process)
    process.send_signal(signal.SIGTERM)
    runs.finish(process)
    stopped_at = runs.steps_traced(folder)
    begun = runs.global_batches(folder, 2)
    for file in (folder / "trace").iterdir():
        file.unlink()  # each start's share apart
    runs.train(procs, folder)
    finished = runs.global_batches(folder, procs)
    assert sorted(finished) == list(range(stopped_at + 1, 61))
    assert begun | finished == runs.global_batches(undisturbed[1], 1)


def test_a_finished_run_stays_as_it_is(undisturbed: dict[int, Path]) -> None:
    folder = undisturbed[1]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "config.yaml"}
    printed = runs.train(1, folder)
    assert "finished already: top-1" in printed
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "config.yaml"}
    assert after == before


def test_a_stop_within_the_last_evaluation_ends_finished(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ["data.loader=synthetic", "data.synthetic.train=5000", "data.synthetic.val=20000", "data.eval_batch=50"]
    words += ["train.eval_every_epochs=1000", "train.steps=10"]  # only after the last step
    process = runs.begin(1, folder, *words)
    runs.wait_until(lambda: runs.steps_traced(folder) >= 10, process)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    runs.finish(process)
    assert process.returncode == 75
    assert json.loads((folder / "summary.json").read_text())["status"] == "stopped"
    for _ in range(2):  # the second start has nothing left to do
        runs.train(1, folder, *words)
        summary = json.loads((folder / "summary.json").read_text())
        assert (summary["status"], summary["step"], summary["images"]) == ("finished", 10, 20000)
        assert [record["step"] for record in runs.records(folder, "eval")] == [10]


def test_fewer_steps_than_the_checkpoint_has_are_refused(undisturbed: dict[int, Path]) -> None:
    process = runs.begin(1, undisturbed[1], "train.steps=40")
    printed = runs.finish(process)
    assert process.returncode == 2
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "train.steps" in errors[0]
    assert "Traceback" not in printed


def test_many_ranks_save_the_mean_of_their_statistics_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As above 256 ranks. What they save continues there, and on as few ranks as keep each one's own."""
    folder = tmp_path / "run"
    with monkeypatch.context() as bound:
        line = "import distrib.engine.state as s; s.TrainState.__init__.__defaults__ = (1,)"
        runs.change(tmp_path, bound, line)
        for steps, step in ((10, 0), (14, 10)):
            printed = runs.train(2, folder, f"train.steps={steps}")
            assert printed.count("2 ranks are too many to save each one's batch-norm statistics") == 1
            assert (f"continuing {folder}" in printed) == bool(step)
            saved = torch.load(runs.newest_checkpoint(folder), weights_only=True)
            assert (saved["progress"]["step"], len(saved["statistics"])) == (steps, 0)
    printed = runs.train(2, folder, "train.steps=18")
    assert "step 14 of 18" in printed
    assert "too many" not in printed
    saved = torch.load(runs.newest_checkpoint(folder), weights_only=True)
    assert len(saved["statistics"]) == 2
    rows = {len(set(map(float, column))) for column in saved["statistics"].T}
    assert rows == {2}  # each its own again
