"""A step without a number leaves nothing behind, on any rank; what does not stop is gone back from; no NaN is saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from test_step import ALONE, IMAGES, MEAN, STD, assert_equal, copied, make_batches, make_step, norm_net
from torch import nn

from distrib import checkpoint
from distrib.checkpoint import Checkpointer
from distrib.config import EmaConfig, OptimConfig
from distrib.data import TrainPlan
from distrib.digest import digest
from distrib.engine.guard import Guard
from distrib.engine.prepare import Objective
from distrib.faults import DIVERGED
from distrib.finite import spoilt
from distrib.metrics import Skips, TrainMeter
from distrib.optim import Ema, build_optimizer, freeze
from distrib.rescue import Trouble, is_good

NAN, INF = float("nan"), float("inf")

pytestmark = pytest.mark.usefixtures("one_thread")


# One step


class Faulty:
    """An objective; ``fault`` changes its loss while it ``strikes``."""

    def __init__(self, objective: Objective, fault: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        self._objective, self._fault, self.strikes = objective, fault, False

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss, right = self._objective(images, labels)
        return (self._fault(self._objective.network, loss) if self.strikes else loss), right


def no_gradient(net: nn.Module, loss: torch.Tensor) -> torch.Tensor:
    loss = loss * 1
    loss.register_hook(lambda gradient: gradient * NAN)
    return loss


def overflow(net: nn.Module, loss: torch.Tensor) -> torch.Tensor:
    net.get_buffer("bn1.running_var").data.fill_(INF)  # the backward must not see that it was changed
    return loss


FAULTS: dict[str, Callable[[nn.Module, torch.Tensor], torch.Tensor]] = {
    "loss and gradient": lambda net, loss: loss * NAN,
    "loss alone": lambda net, loss: loss + INF,
    "gradient alone": no_gradient,
    "a gradient whose norm overflows": lambda net, loss: loss * 1e30,
    "a statistic": overflow,
}


def train(
    steps: list[tuple[int, bool]],
    fault: str = "loss and gradient",
    *,
    fused: bool = False,
    accumulation: int = 1,
    clip: float | None = None,
    dtype: torch.dtype = torch.float32,
    frozen: str | None = None,
) -> tuple[dict[str, Any], list[bool]]:
    """Trains the ``steps``, (number, whether it has the fault); returns all state, and which were passed over."""
    net = norm_net()
    if frozen is not None:
        freeze(net, frozen)
    optimizer = build_optimizer(net, OptimConfig(nesterov=True), 0.1)
    if fused:  # what a GPU run has
        groups = [{k: v for k, v in group.items() if k not in ("fused", "foreach")} for group in optimizer.param_groups]
        state = optimizer.state
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, fused=True)
        optimizer.state.update(state)
    ema = Ema(net, EmaConfig(decay=0.8))
    call = Faulty(Objective(net, MEAN, STD, dtype), FAULTS[fault])
    plan = TrainPlan(IMAGES, 12, 0, accumulation=accumulation)
    step = make_step(call, None, optimizer, plan, ema=ema, clip_grad_norm=clip, guard=Guard(optimizer, net))
    skipped = []
    for number, call.strikes in steps:
        skipped.append(bool(step(make_batches(plan, number), number, 0.1).skipped))
    moments = [optimizer.state[p]["momentum_buffer"] for g in optimizer.param_groups for p in g["params"]]
    return copied({"model": net.state_dict(), "ema": ema.state_dict(), "moments": moments}), skipped


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_step_without_a_number_leaves_nothing_behind(fault: str, fused: bool) -> None:
    found, skipped = train([(0, False), (1, True), (2, False)], fault, fused=fused)
    expected, none = train([(0, False), (2, False)], fused=fused)
    assert (skipped, none) == ([False, True, False], [False, False])
    assert_equal(found, expected)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"accumulation": 3},
        {"clip": 0.1},
        {"dtype": torch.bfloat16},
        {"frozen": "layer1"},
        {"accumulation": 2, "clip": 0.1, "frozen": "conv1"},
    ],
    ids=str,
)
def test_in_every_kind_of_step(settings: dict[str, Any], fused: bool) -> None:
    found, skipped = train([(0, False), (1, True), (2, False)], fused=fused, **settings)
    assert skipped == [False, True, False]
    assert_equal(found, train([(0, False), (2, False)], fused=fused, **settings)[0])


@pytest.mark.parametrize("fused", [False, True])
def test_the_first_steps_may_be_passed_over(fused: bool) -> None:
    found, skipped = train([(0, True), (1, True), (2, False)], fused=fused)
    assert skipped == [True, True, False]
    assert_equal(found, train([(2, False)], fused=fused)[0])


def test_an_optimizer_with_or_without_a_verdict_does_the_same() -> None:
    plain, fused = (train([(0, False), (1, True), (2, False)], fused=fused)[0] for fused in (False, True))
    for which in ("model", "ema"):
        for key, value in plain[which].items():
            torch.testing.assert_close(fused[which][key], value, atol=1e-6, rtol=1e-5)


def test_a_loss_scaler_leaves_the_verdict_to_the_guard() -> None:
    states = []
    for steps in ([0, 1, 2], [0, 2]):
        net = norm_net()
        optimizer = build_optimizer(net, OptimConfig(), 0.1)
        scaler, ema = torch.amp.GradScaler("cpu", init_scale=2.0**10), Ema(net, EmaConfig(decay=0.8))
        call = Faulty(Objective(net, MEAN, STD, torch.float32), FAULTS["loss alone"])
        plan = TrainPlan(IMAGES, 12, 0)
        step = make_step(call, None, optimizer, plan, ema=ema, scaler=scaler, guard=Guard(optimizer, net))
        for number in steps:
            call.strikes = number == 1
            step(make_batches(plan, number), number, 0.1)
        states.append(copied({"model": net.state_dict(), "ema": ema.state_dict()}))
        assert scaler.get_scale() == (2.0**9 if 1 in steps else 2.0**10)
    assert_equal(*states)


# What is counted


def add(meter: TrainMeter, *steps: tuple[float, bool]) -> None:
    for loss, skipped in steps:
        meter.add(torch.tensor(loss), torch.tensor(5), skipped=torch.tensor(skipped))


def test_a_record_counts_what_was_passed_over_and_means_the_rest() -> None:
    skips = Skips(total=2, row=2)
    meter = TrainMeter(ALONE, TrainPlan(IMAGES, 10, 0), 100, skips=skips)
    add(meter, (NAN, True), (20.0, False), (40.0, False), (NAN, True), (7.0, True))
    (record,) = meter.close_interval(5, 0.1)
    assert (record["skipped"], record["loss"], record["top1"]) == (3, 3.0, 50.0)
    assert skips == Skips(total=5, row=2, longest=3)  # the first row began before
    add(meter, (NAN, True), (20.0, True))
    (record,) = meter.close_interval(7, 0.1)
    assert (record["skipped"], record["loss"]) == (2, 2.0)  # of the last step: there is no other
    assert skips == Skips(total=7, row=4, longest=4)
    meter.skips.forget_row()
    add(meter, (20.0, False))
    (record,) = meter.close_interval(8, 0.1)
    assert "skipped" not in record
    assert skips == Skips(total=7, row=0, longest=0)


def test_progress_is_a_good_checkpoint_with_steps_behind_a_rollback() -> None:
    trouble = Trouble(rollbacks=2, futile=2, since=20, good=10)
    trouble.saving(20, finite=True)  # the rollback's own
    assert (trouble.futile, trouble.good) == (2, 20)
    trouble.saving(25, finite=False)
    assert (trouble.futile, trouble.good) == (2, 20)
    trouble.skips.row = 1
    trouble.saving(30, finite=True)
    assert (trouble.futile, trouble.good) == (2, 20)
    trouble.skips.row = 0
    trouble.saving(35, finite=True)
    assert (trouble.rollbacks, trouble.futile, trouble.good) == (2, 0, 35)


# What is saved


def test_where_a_value_is_no_number() -> None:
    state: dict[str, Any] = {"model": {"w": torch.ones(3), "n": torch.tensor(1)}, "rows": [torch.full((9,), 3e38)]}
    assert spoilt(state) is None  # nor do large ones pass for infinite
    for value in (NAN, INF, -INF):
        assert spoilt(state | {"optimizer": {"state": {0: {"b": torch.tensor([1.0, value])}}}}) == "optimizer/state/0/b"


def test_what_is_no_number_is_not_saved_and_good_ones_stay(tmp_path: Path) -> None:
    told: list[str] = []
    saver = Checkpointer(tmp_path, 1, told.append)

    def state(finite: bool, value: float, row: int = 0) -> dict[str, Any]:
        trouble = {"skips": {"row": row}}
        return {"progress": {"finite": finite, "trouble": trouble}, "model": {"w": torch.tensor([value])}}

    for step, values, good in (
        (10, state(True, 1.0), 10),
        (20, state(False, 2.0), 10),
        (30, state(True, 3.0, row=1), 10),
        (40, state(True, NAN), 40),
    ):
        saver.save(values, step, None, good=good)
        kept = saver.wait()
    assert kept == 30
    assert checkpoint.steps_in(tmp_path) == [30, 10]
    (line,) = told
    assert "step_00000040.pt was not saved: model/w holds a value that is no number" in line
    found = checkpoint.path_for(tmp_path, 10)
    assert checkpoint.newest_valid(tmp_path, told.append, is_good) == found
    checkpoint.commit(state(True, INF), checkpoint.path_for(tmp_path, 50))  # as older versions may have left one
    checkpoint.path_for(tmp_path, 60).write_bytes(b"torn")
    assert checkpoint.newest_valid(tmp_path, told.append, is_good) == found
    assert "step_00000060.pt is damaged" in told[-1]


# Runs

FAULT = """
import os, torch
from distrib.engine.step import StepResult, TrainStep

rank, call = int(os.environ.get("RANK", 0)), TrainStep.__call__

def faulty(self, batches, step, lr, measure_norm=False):
    forward = self._call
    if {strikes}:
        def spoil(images, labels):
            loss, right = forward(images, labels)
            return loss * float("nan"), right
        self._call = spoil
    if {missing}:
        return StepResult(torch.tensor(0.0), torch.tensor(0), torch.tensor(float("nan")), skipped=torch.tensor(True))
    try:
        return call(self, batches, step, lr, measure_norm)
    finally:
        self._call = forward

TrainStep.__call__ = faulty
"""
WORDS = [
    "data.loader=synthetic", "data.synthetic.train=500", "data.synthetic.val=50", "train.steps=40",
    "train.eval_every_epochs=100", "checkpoint.every_steps=5", "checkpoint.keep=2", "train.skip_limit=3",
]  # fmt: skip


def inject(folder: Path, patch: pytest.MonkeyPatch, strikes: str = "False", missing: str = "False") -> None:
    """Runs from now on have a loss that is no number, or no step at all, where these Python words say so."""
    folder.mkdir(exist_ok=True)
    runs.change(folder, patch, FAULT.format(strikes=strikes, missing=missing))


def saved(folder: Path) -> dict[int, dict[str, Any]]:
    """What each checkpoint on disk holds, all of it numbers."""
    found = {}
    for step in checkpoint.steps_in(folder / "checkpoints"):
        found[step] = torch.load(checkpoint.path_for(folder / "checkpoints", step), weights_only=True)
        assert spoilt(found[step]) is None
    return found


def test_a_loss_of_one_rank_that_is_no_number_costs_all_ranks_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = []
    for name, faults in (("faulty", {"strikes": "rank == 1 and step == 7"}), ("missing", {"missing": "step == 7"})):
        with monkeypatch.context() as patch:
            inject(tmp_path / name, patch, **faults)
            printed = runs.train(2, tmp_path / name / "run", *WORDS, "train.steps=10")
        assert printed.count("warning: 1 step up to step 10 had a gradient or a loss that is no number") == 1
        logged = runs.records(tmp_path / name / "run", "train")
        assert [record.get("skipped") for record in logged] == [None, 1]
        assert " 1 skipped" in printed
        state = saved(tmp_path / name / "run")[10]
        assert state["progress"]["finite"]
        assert state["progress"]["trouble"]["skips"]["total"] == 1
        ends.append((digest(state), [(r["loss"], r["top1"]) for r in logged]))
    assert ends[0] == ends[1]


BURST = "rank == 0 and 16 <= step < 22"  # the steps 17 to 22, as they are counted from 1


@pytest.fixture(scope="module")
def gone_back(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of two ranks in which more steps in a row were no numbers than are let pass, and what it printed."""
    folder = tmp_path_factory.mktemp("gone_back")
    with pytest.MonkeyPatch.context() as patch:
        inject(folder, patch, BURST)
        return folder / "run", runs.train(2, folder / "run", *WORDS, "checkpoint.keep=100")


def test_a_burst_beyond_the_limit_goes_back_and_on(gone_back: tuple[Path, str]) -> None:
    folder, printed = gone_back
    (line,) = [line for line in printed.splitlines() if "back to the weights of" in line]
    assert line.startswith("warning: step 20: ")
    assert "step_00000015.pt" in line
    assert "images of step 21" in line
    states = saved(folder)
    assert digest(states[15]) == digest(states[20])
    assert [states[step]["progress"]["trouble"]["futile"] for step in (15, 20, 25)] == [0, 1, 0]
    assert states[40]["progress"]["trouble"]["rollbacks"] == 1
    assert states[40]["progress"]["trouble"]["skips"] == {"total": 6, "row": 0, "longest": 0}
    assert [r.get("skipped") for r in runs.records(folder, "train")] == [None, None, None, 4, 2, None, None, None]
    assert json.loads((folder / "summary.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("kill_after", [18, 21, 28])  # within the burst, right behind the rollback, later
def test_a_killed_run_goes_back_as_it_would_have(
    kill_after: int, gone_back: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inject(tmp_path, monkeypatch, BURST)
    folder = tmp_path / "run"
    process = runs.begin(2, folder, *WORDS)
    runs.wait_until(lambda: runs.steps_traced(folder) >= kill_after, process)
    runs.kill_group(process)
    runs.train(2, folder, *WORDS)
    ours, theirs = saved(folder)[40], saved(gone_back[0])[40]
    assert digest(ours) == digest(theirs)
    assert ours["progress"]["trouble"] == theirs["progress"]["trouble"]
    assert runs.trace(folder, 2) == runs.trace(gone_back[0], 2)


def test_a_loss_that_stays_no_number_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inject(tmp_path, monkeypatch, "rank == 1 and step >= 12")
    folder = tmp_path / "run"
    process = runs.begin(2, folder, *WORDS, "train.steps=400", "train.rollback_limit=2")
    printed = runs.finish(process)
    assert process.returncode == 1
    assert printed.count("back to the weights of") == 2
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: the run diverged: up to step 30 ")
    assert "going back to a checkpoint 2 times (train.rollback_limit) did not help" in line
    assert runs.exit_codes(folder) == [DIVERGED] * 2
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["step"]) == ("diverged", 30)
    assert saved(folder)


def test_the_weights_of_one_rank_that_are_gone_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long before the limit: with such weights no step will ever be taken again."""
    gone = "rank == 1 and step == 7 and [p.detach().fill_(float('inf')) for p in self._parameters] is None"
    inject(tmp_path, monkeypatch, gone)
    folder = tmp_path / "run"
    printed = runs.train(2, folder, *WORDS, "train.skip_limit=100", "train.steps=20")
    (line,) = [line for line in printed.splitlines() if "back to the weights of" in line]
    assert line.startswith("warning: step 15: ")
    assert "step_00000005.pt" in line
    assert [r.get("skipped") for r in runs.records(folder, "train")] == [None, 3, 5, None]
    assert saved(folder)[20]["progress"]["finite"]


def test_a_run_that_was_never_well_has_nothing_to_go_back_to(tmp_path: Path) -> None:
    """The first step's learning rate makes weights of 1e37, and all losses behind it no numbers."""
    folder = tmp_path / "run"
    process = runs.begin(1, folder, *WORDS, "optim.lr=1e38", "schedule.warmup_epochs=0")
    printed = runs.finish(process)
    assert process.returncode == 1, printed
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert "the run diverged: up to step 5 " in line
    assert "there is no checkpoint of before to go back to" in line
    assert "Traceback" not in printed
    assert runs.exit_codes(folder) == [DIVERGED]
    assert json.loads((folder / "summary.json").read_text())["status"] == "diverged"
    assert not saved(folder)
