"""launch sweep where Slurm has its runs, or is to have them: what is left alone, and what would be submitted."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_slurm import Fake, slurm
from sweeps import QUICK, ROOT, stand_in, starts, trained

from distrib.lease import Holder, Sight
from launch.__main__ import main
from launch.record import Record
from launch.runs import Run
from launch.state import Job, Seen, Slurm, judge
from launch.survey import View
from launch.sweep.plan import plan_sweep
from launch.sweep.state import Found, _found

__all__ = ["slurm", "stand_in"]

WORDS = ("sweep", "--config", str(ROOT / QUICK), "--name", "s", "optim.lr=1,2")


def submit(name: str, job: str) -> Record:
    record = Record(Path("runs", "s", name))
    record.add("submitted", {"job": job, "submission": "s1"})
    return record


def test_what_is_queued_is_not_trained_here_too(slurm: Fake, stand_in: Path, capfd: pytest.CaptureFixture[str]) -> None:
    submit("lr=1,seed=0", "12_0")
    slurm.says("squeue", "12_0|PENDING|N/A|N/A||Priority\n")
    assert main([*WORDS], stand_in) == 0
    out, err = capfd.readouterr()
    assert "| 1 | 0 |  |  |  | 1 queued |" in out
    assert err.endswith("1 of 2 runs are queued or trained elsewhere: left alone\n")
    assert starts(Path("runs/s")) == {"lr=2,seed=0": 1}
    assert slurm.calls("squeue") == [slurm.calls("squeue")[0]] * 2  # before, and for the table
    slurm.says("squeue")  # it was cancelled: the sweep goes on here
    assert main([*WORDS], stand_in) == 0
    assert starts(Path("runs/s")) == {"lr=1,seed=0": 1, "lr=2,seed=0": 1}


def test_nobody_asks_a_slurm_that_has_no_jobs_of_the_sweep(slurm: Fake, stand_in: Path) -> None:
    assert main([*WORDS], stand_in) == 0
    assert slurm.calls("squeue") == []


HOLDER = Holder("0123456789abcdef", "n1", 4242, "2026-11-25T10:00:00+0000", "boot 1", "17")
S, B = {"event": "submitted", "job": "7"}, {"event": "began", "job": "7", "restart": 0}
OVER = {"event": "ended", "job": "7", "restart": 0, "code": 75, "step": 4, "reason": "launch stop", "then": "over"}
AGAIN = {**OVER, "then": "requeued"}
DONE = {"status": "finished", "step": 4}
SILENT, EMPTY = Slurm(), Slurm({}, {})


def sight(alive: bool | None) -> Sight:
    return Sight(HOLDER, here=False, alive=alive, silent=None if alive is None else 2.0)


@pytest.mark.parametrize(
    ("seen", "slurm_says", "here", "expected"),
    [
        (Seen([S]), Slurm({"7": Job("7", "PENDING")}, {}), True, "queued"),
        (Seen([S, B], step=4), Slurm({"7": Job("7", "RUNNING")}, {}), True, "running"),
        (Seen([S, B, AGAIN], step=4), Slurm({"7": Job("7", "PENDING")}, {}), True, "queued"),
        (Seen([S, B], step=4, summary=DONE), Slurm({"7": Job("7", "COMPLETING")}, {}), True, "running"),
        (Seen([S]), EMPTY, True, "unfinished"),
        (Seen([S, B, AGAIN], step=4), EMPTY, True, "unfinished"),
        (Seen([S, B, OVER], step=4), EMPTY, True, "unfinished"),
        (Seen([S, B, OVER], step=4, summary=DONE), EMPTY, True, "finished"),
        (Seen([S, B, {**OVER, "code": 1}], step=4, summary=DONE), SILENT, True, "finished"),
        # A Slurm that does not answer may have it; none at all has not.
        (Seen([S]), SILENT, True, "queued"),
        (Seen([S]), SILENT, False, "unfinished"),
        (Seen([S, B, AGAIN], step=4), SILENT, True, "queued"),
        (Seen([S, B, AGAIN], step=4), SILENT, False, "unfinished"),
        (Seen([S, B, OVER], step=4), SILENT, True, "unfinished"),
        (Seen([S, B, OVER], step=4, summary=DONE), SILENT, True, "finished"),
        # Where nobody can tell whether the writer lives, the run finds out.
        (Seen(step=4, writer=sight(True)), EMPTY, True, "running"),
        (Seen(step=4, writer=sight(False)), EMPTY, True, "unfinished"),
        (Seen(step=4, writer=sight(None)), EMPTY, True, "unfinished"),
        (Seen([S, B], step=4, writer=sight(None)), Slurm({"7": Job("7", "RUNNING")}, {}), True, "running"),
        (Seen([S, B, OVER], step=9, writer=sight(True)), EMPTY, True, "running"),
        (Seen(step=4, summary=DONE, writer=sight(True)), EMPTY, True, "running"),
        (Seen(step=4, summary=DONE, writer=sight(False)), EMPTY, True, "finished"),
        (Seen(step=5, summary=DONE), EMPTY, True, "unfinished"),  # a later start went on
    ],
)
def test_how_far_a_run_with_jobs_is(
    seen: Seen, slurm_says: Slurm, here: bool, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/squeue" if here else None)
    view = View(Run("a", Record(tmp_path), seen, {}, {}, None, None), judge(seen, slurm_says), slurm_says, 0)
    assert _found(view, begun=True) == Found(expected, seen.summary or {})
    assert _found(view, begun=False).state == (expected if expected in ("running", "queued") else "waiting")


def test_the_table_needs_no_cluster(slurm: Fake, stand_in: Path, capfd: pytest.CaptureFixture[str]) -> None:
    slurm.says("sinfo", code=1)
    assert main([*WORDS, "--on-slurm", "--table"], stand_in) == 0
    assert "| 1 | 0 | 1 waiting |" in capfd.readouterr().out


def test_a_dry_run_shows_the_array(slurm: Fake, stand_in: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = [*WORDS, "seed=0,1", "--on-slurm", "--dry-run", "--gpus-per-node", "2", "--nodes", "2", "--at-most", "3"]
    slurm.says("sinfo", code=1)
    submit("lr=2,seed=0", "12_1")
    slurm.says("squeue", "12_1|RUNNING|N/A|N/A|n1|None\n")
    assert main(words, stand_in) == 0
    out = capfd.readouterr().out
    assert out.splitlines()[:4] == [
        *("waiting    lr=1,seed=0", "running    lr=2,seed=0"),
        *("waiting    lr=1,seed=1", "waiting    lr=2,seed=1"),
    ]
    assert "#SBATCH --array=0-2%3\n" in out
    assert "#SBATCH --nodes=2\n" in out
    assert "launch local" not in out
    assert not list(Path("runs/s").glob("*/config.yaml"))

    for lr, seed in ((1, 0), (1, 1), (2, 1)):
        sweep = plan_sweep(str(ROOT / QUICK), [f"optim.lr={lr},9", f"seed={seed},9"], "s")
        trained(sweep.elements[0].folder, sweep, status="finished")
    assert main(words, stand_in) == 0
    assert [line.split()[0] for line in capfd.readouterr().out.splitlines()] == [
        *("finished", "running", "finished", "finished"),  # and no script
    ]
