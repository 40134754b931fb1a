"""distrib.budget: a run stops, with everything saved, before its time is up."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import runs

from distrib.budget import MARGIN, SAVE_GUESS, SLURM_END, Budget, find_end

HOUR = 3600.0


def test_without_a_limit_there_is_no_end() -> None:
    assert find_end(None, time.time(), {}) is None
    for value in ("", "UNLIMITED", "0", "-1", str(int(time.time()) - 5)):  # the last: of a job that is over
        assert find_end(None, time.time(), {SLURM_END: value}) is None


def test_the_first_end_counts() -> None:
    now = time.time()
    late, soon = str(int(now + 2 * HOUR)), str(int(now + HOUR / 2))
    assert find_end(60, now, {}) == (now + HOUR, "train.max_minutes")
    assert find_end(60, now - HOUR, {SLURM_END: late}) == (now, "train.max_minutes")
    assert find_end(60, now, {SLURM_END: soon}) == (float(soon), "the Slurm job's time is up")
    assert find_end(None, now, {SLURM_END: soon}) == (float(soon), "the Slurm job's time is up")


class Asked:
    """Takes the place of the process's one ``StopSignals``, whose handlers a test does not want."""

    def __init__(self) -> None:
        self.before_end, self.end = math.nan, time.monotonic() + HOUR

    def at(self, deadline: float, reason: str) -> None:
        assert reason == "because"
        self.before_end = self.end - deadline


def budget(asked: Asked, lag: int = 2, saving: float | None = None) -> Budget:
    return Budget((time.time() + HOUR, "because"), asked, lag, lambda: saving)  # type: ignore[arg-type]


def test_it_asks_in_time_for_what_was_measured() -> None:
    asked = Asked()
    made = budget(asked)
    assert asked.before_end == pytest.approx(MARGIN + SAVE_GUESS, abs=0.05)
    made = budget(asked, saving=60.0)
    assert asked.before_end == pytest.approx(MARGIN + 120, abs=0.05)
    made.resume()
    time.sleep(0.3)
    made.step(100)
    assert asked.before_end >= MARGIN + 120 + 3 * 0.3 - 0.05  # until all have heard, and one step more
    for _ in range(100):  # a slow step is forgotten
        made.step(100)
    assert asked.before_end == pytest.approx(MARGIN + 120, abs=0.05)


def test_an_evaluation_is_begun_only_if_there_is_time_for_it() -> None:
    asked = Asked()
    made = budget(asked, saving=0.0)
    for steps in (3, 2, 1, 0):  # none was measured yet
        made.step(steps)
        assert asked.before_end == pytest.approx(MARGIN, abs=0.1)
    with made.evaluation():
        time.sleep(0.5)
    made.step(3)
    assert asked.before_end < MARGIN + 0.2
    for steps in (2, 1, 0):  # the ranks may hear of the stop within it
        made.step(steps)
        assert asked.before_end >= MARGIN + 0.5
    with made.evaluation():  # begun, it is not what there must be time for any more
        assert asked.before_end < MARGIN + 0.2


def test_without_an_end_nothing_is_asked() -> None:
    class Never:
        def at(self, deadline: float, reason: str) -> None:
            assert deadline == math.inf

    made = Budget(None, Never(), 2)  # type: ignore[arg-type]
    made.step(0)
    with made.evaluation():
        pass


# Steps of half a second: 60 of them do not fit in 30 s. Torchrun would start the ranks again, were it not told.
SLOW = """
import time
import distrib.budget as budget
from distrib.engine.step import TrainStep

budget.MARGIN, budget.SAVE_GUESS = 5.0, 1.0

def step(self, *args, **words):
    time.sleep(0.5)
    return ordinary(self, *args, **words)

ordinary, TrainStep.__call__ = TrainStep.__call__, step
"""


def test_a_run_stops_in_time_and_goes_on_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, folder = tmp_path / "reference", tmp_path / "run"
    runs.train(2, reference)
    with monkeypatch.context() as slow:
        runs.change(tmp_path, slow, SLOW)
        slow.setenv("PET_MAX_RESTARTS", "5")  # torchrun's own variable
        slow.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
        printed = runs.finish(runs.begin(2, folder, "train.max_minutes=0.5"))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "stopped"
    stopped_at = summary["step"]
    assert 1 <= stopped_at < 60
    assert f"train.max_minutes: stopped at step {stopped_at}, everything is saved" in printed
    assert runs.exit_codes(folder) == [75, 75]  # once
    assert {len(lines) for lines in runs.trace(folder, 2)} == {stopped_at}
    assert not (folder / "faults").exists()
    printed = runs.train(2, folder)
    assert f"step {stopped_at} of 60" in printed
    assert runs.digest(folder) == runs.digest(reference)
    assert runs.trace(folder, 2) == runs.trace(reference, 2)
