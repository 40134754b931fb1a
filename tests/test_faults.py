"""distrib.faults: how often the ranks exchange their flags, and that none is lost where they do so seldom."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import runs
from test_step import run_ranks

import launch.command as launcher
from distrib import faults
from distrib.faults import Agreement, exchange_interval, report_exit, ring_seconds
from distrib.runtime import Runtime

EVERY = 3
CALLS = 4 * EVERY


def test_small_worlds_exchange_at_every_call() -> None:
    assert [exchange_interval(world) for world in (1, 2, 8, 63, 64)] == [1] * 5
    assert [exchange_interval(world) for world in (65, 128, 129, 1024, 4096)] == [2, 2, 3, 16, 64]


def test_an_exchange_needs_a_fraction_of_a_step_at_any_size() -> None:
    """Of steps of 30 ms; and they are no rarer than that needs, as a stop waits for two of them."""
    for world in (*range(1, 400), 1024, 4096, 100_000):
        low, high = ring_seconds(world)
        calls = exchange_interval(world)
        assert 0 <= low <= high < calls * 0.0065
        assert world <= 64 or calls * 0.0065 < 2.5 * high


@pytest.mark.parametrize(
    ("code", "ends_with"),
    [("FINISHED", 0), ("FAILED", 1), ("USER_ERROR", 2), ("STOPPED", 75), ("DIVERGED", 1), ("BAD_MACHINE", 1)],
)
def test_the_launcher_reads_what_a_rank_reports(
    code: str, ends_with: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTRIB_EXIT_CODE_FILE", str(tmp_path / "reports"))
    monkeypatch.setenv("RANK", "3")
    assert report_exit(getattr(faults, code), "why\n not") == ends_with
    said = launcher.read_reports((tmp_path / "reports").read_text())
    assert said == {3: launcher.Report(getattr(launcher, code), "why not")}


def test_the_model_of_the_ring() -> None:
    assert ring_seconds(1) == (0, 0)
    assert ring_seconds(1024) == pytest.approx((0.0409, 0.1023), rel=1e-3)


def test_alone_a_flag_is_seen_at_once() -> None:
    agreement = Agreement()
    assert agreement.exchange(stop=False, save=True) == (False, True)
    assert agreement.exchange(stop=True) == (True, False)
    agreement.close()


# Real ranks


def exchanges(runtime: Runtime, every: int | None, asked: dict[str, range], who: int) -> list[tuple[bool, bool]]:
    """What each of ``CALLS`` calls returns, where rank ``who`` raises the flags at the calls in ``asked``."""
    agreement, found = Agreement(runtime.control, every), []
    none = range(0)
    for call in range(CALLS):
        mine = runtime.rank == who
        flags = {name: mine and call in asked.get(name, none) for name in ("stop", "save")}
        found.append(agreement.exchange(**flags))
    time.sleep(0.1 * runtime.rank)  # the last exchange is under way, and the ranks end one after the other
    agreement.close()
    return found


def on_rank(runtime: Runtime) -> dict[str, Any]:
    last = runtime.world - 1
    found: dict[str, Any] = {
        "stops": [exchanges(runtime, EVERY, {"stop": range(call, call + 1)}, last) for call in range(2 * EVERY)],
        "each call": exchanges(runtime, None, {"stop": range(2, 3)}, last),
        "nobody": exchanges(runtime, EVERY, {}, last),
    }
    found["saves"] = {}
    for every in (1, EVERY):
        agreement, saved = Agreement(runtime.control, every), []
        due = False  # as ``metrics.SaveTimer``: from a moment on, until there is a save
        for call in range(CALLS):
            due = due or (call == 1 and runtime.rank == last)
            if agreement.exchange(stop=False, save=due)[1]:
                saved.append(call)
                due = False
        agreement.close()
        found["saves"][every] = saved
        # Asked for at call 0, and made for another reason before the ranks hear of it; asked for once more later.
        agreement, heard = Agreement(runtime.control, every), []
        for call in range(CALLS):
            heard += [call] if agreement.exchange(stop=False, save=call in (0, 2 * every))[1] else []
            if call == every - 1:
                agreement.answer()
        agreement.close()
        found.setdefault("answered", {})[every] = heard
    # A save that was due, and made for another reason before the ranks had heard of it.
    found["withdrawn"] = exchanges(runtime, EVERY, {"save": range(1, EVERY)}, last)
    return found


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(tmp_path_factory.mktemp("ranks"), request.param, on_rank)


@pytest.mark.parametrize("call", range(2 * EVERY))
def test_a_stop_at_any_call_reaches_all_ranks_at_one(ranks: list[dict[str, Any]], call: int) -> None:
    """Also one that is raised at one call only, between two exchanges."""
    for rank in ranks:
        seen = [k for k, (stop, _) in enumerate(rank["stops"][call]) if stop]
        posted = -(-call // EVERY) * EVERY
        assert seen[0] == posted + EVERY <= call + 2 * EVERY - 1
        assert not any(save for _, save in rank["stops"][call])


def test_where_each_call_exchanges_all_know_at_the_next(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert [stop for stop, _ in rank["each call"]].index(True) == 3


def test_what_nobody_asked_for_nobody_sees(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["nobody"] == rank["withdrawn"] == [(False, False)] * CALLS


def test_a_save_that_is_due_is_made_once(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["saves"] == {1: [2], EVERY: [2 * EVERY]}


def test_a_save_that_was_made_meanwhile_is_not_made_again(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["answered"] == {1: [3], EVERY: [3 * EVERY]}


# The real train.py, with an exchange at every fourth step


@pytest.fixture
def seldom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.change(tmp_path, monkeypatch, "import distrib.faults as f; f.exchange_interval = lambda world: 4")


@pytest.mark.usefixtures("seldom")
def test_a_stopped_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    reference, folder = tmp_path / "reference", tmp_path / "run"
    runs.train(2, reference)
    process = runs.begin(2, folder)
    runs.wait_until(lambda: runs.steps_traced(folder) >= 13, process)
    process.send_signal(signal.SIGTERM)
    printed = runs.finish(process)
    assert runs.exit_codes(folder) == [75, 75], printed
    stopped_at = json.loads((folder / "summary.json").read_text())["step"]
    assert {len(lines) for lines in runs.trace(folder, 2)} == {stopped_at}
    assert 13 <= stopped_at < 60
    runs.train(2, folder)
    assert runs.digest(folder) == runs.digest(reference)
    assert runs.trace(folder, 2) == runs.trace(reference, 2)


# The first batch of an evaluation comes when the test has seen that it is waited for, and has asked for a stop.
WAITS = """
import os, pathlib, time
from distrib.engine.evaluate import Evaluator

def evaluate(self, network, batches, plan, runtime, agreement, stop, tell):
    def late():
        pathlib.Path(os.environ["EVALUATES"]).touch()
        while not stop.requested():
            time.sleep(0.01)
        yield from batches

    return ordinary(self, network, late(), plan, runtime, agreement, stop, tell)

ordinary, Evaluator.__call__ = Evaluator.__call__, evaluate
"""


def test_a_stop_within_an_evaluation_is_seen_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["data.loader=synthetic", "data.synthetic.train=5000", "data.synthetic.val=9000", "data.eval_batch=50"]
    words += ["train.eval_every_epochs=0.3"]  # each 30 steps
    folder, evaluates = tmp_path / "run", tmp_path / "evaluates"
    monkeypatch.setenv("EVALUATES", str(evaluates))
    runs.change(tmp_path, monkeypatch, f"import distrib.faults as f; f.exchange_interval = lambda world: 4\n{WAITS}")
    process = runs.begin(2, folder, *words)
    runs.wait_until(lambda: evaluates.exists(), process)
    process.send_signal(signal.SIGTERM)
    runs.finish(process)
    assert runs.exit_codes(folder) == [75, 75]
    assert (runs.steps_traced(folder), runs.records(folder, "eval")) == (30, [])
