"""Compiled runs: the same step as the eager one on real ranks, and nothing is compiled again once the run is warm.

Compiled with aot_eager: all of torch.compile but the code generator, which takes minutes on a CPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_step import (
    ALONE,
    IMAGES,
    MEAN,
    SIZE,
    STD,
    assert_close,
    assert_equal,
    make_batches,
    norm_net,
    pool,
    run_ranks,
)
from torch._dynamo.backends.debugging import aot_eager

from distrib.config import OptimConfig, TrainConfig
from distrib.data import Batch, EvalPlan, TrainPlan
from distrib.engine.evaluate import Evaluator
from distrib.engine.prepare import Objective, warm_up, wrap
from distrib.engine.state import Weights
from distrib.engine.step import TrainStep
from distrib.faults import Agreement
from distrib.optim import build_optimizer
from distrib.runtime import Runtime

# Shares of 7 and 6 on two ranks, in slices of 3 and 4, and of 3: one rank has a size more than the other.
GLOBAL_BATCH, ACCUMULATION, STEPS = 13, 2, 3

pytestmark = pytest.mark.usefixtures("one_thread")


def counted(compilations: list[int]) -> Callable[..., Any]:
    """A backend for torch.compile; ``compilations`` grows with each graph that it is given."""

    def compile_graph(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        compilations.append(len(compilations))
        return aot_eager(graph, inputs)

    return compile_graph


def train(runtime: Runtime, compiled: bool) -> dict[str, Any]:
    """Three steps of a small net, put together as train.py does."""
    compilations: list[int] = []
    torch.compiler.reset()
    plan = TrainPlan(IMAGES, GLOBAL_BATCH, 0, runtime.rank, runtime.world, ACCUMULATION)
    objective = Objective(norm_net(), MEAN, STD, torch.float32)
    call, ddp = wrap(objective, TrainConfig(compile=compiled), runtime, counted(compilations))
    warm_up(call, ddp, objective, plan.slice_sizes, SIZE, runtime.device)
    warm = len(compilations)
    optimizer = build_optimizer(objective.network, OptimConfig(), 0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    step = TrainStep(call, ddp, optimizer, scaler, None, world=plan.world, global_batch=plan.global_batch)
    results = [step(make_batches(plan, i), i, 0.1, measure_norm=i == STEPS - 1) for i in range(STEPS)]
    return {
        "sizes": plan.slice_sizes,
        "compiled": warm,
        "again": len(compilations) - warm,
        "losses": torch.stack([result.loss for result in results]),
        "right": [int(result.right) for result in results],
        "norms": [result.gradient_norm for result in results],
        "weights": [p.detach().clone() for p in objective.parameters()],
    }


def on_rank(runtime: Runtime) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        return {"eager": train(runtime, compiled=False), "compiled": train(runtime, compiled=True)}


@pytest.fixture(scope="module", params=[1, 2])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(tmp_path_factory.mktemp("ranks"), request.param, on_rank)


def test_compiled_ranks_agree_and_follow_the_eager_run(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert_equal(rank["compiled"]["weights"], ranks[0]["compiled"]["weights"])
        assert_close(rank["compiled"]["weights"], rank["eager"]["weights"], 1e-5)
        torch.testing.assert_close(rank["compiled"]["losses"], rank["eager"]["losses"], atol=1e-4, rtol=1e-5)
        assert rank["compiled"]["right"] == rank["eager"]["right"]
        assert rank["compiled"]["norms"][:-1] == rank["eager"]["norms"][:-1] == [None] * (STEPS - 1)
        torch.testing.assert_close(rank["compiled"]["norms"][-1], rank["eager"]["norms"][-1], atol=0, rtol=1e-5)
        assert rank["compiled"]["norms"] == ranks[0]["compiled"]["norms"]
    assert 0 < sum(sum(rank["compiled"]["right"]) for rank in ranks) < STEPS * GLOBAL_BATCH
    initial = [p.detach() for p in norm_net().parameters()]
    assert not any(torch.equal(a, b) for a, b in zip(initial, ranks[0]["compiled"]["weights"], strict=True))


def test_warming_up_compiles_all_that_the_steps_run(ranks: list[dict[str, Any]]) -> None:
    sizes = [rank["compiled"]["sizes"] for rank in ranks]
    assert sizes == ([(7, 6)] if len(ranks) == 1 else [(3,), (4, 3)])
    for rank in ranks:
        assert rank["compiled"]["compiled"] >= len(rank["compiled"]["sizes"])
        assert rank["compiled"]["again"] == 0
        assert rank["eager"]["compiled"] == 0


def test_a_compiled_evaluation_is_the_eager_one_and_compiles_once() -> None:
    compilations: list[int] = []
    torch.compiler.reset()
    objective = Objective(norm_net(), MEAN, STD, torch.float32)
    plan, stop = EvalPlan(IMAGES, 16), SimpleNamespace(received=None)  # the last batch is a short one
    images, labels = pool()
    one = objective.network.state_dict()
    other = {key: value + 0.1 if value.is_floating_point() else value for key, value in one.items()}

    def run(evaluator: Evaluator, weights: Weights) -> dict[str, Any]:
        batches = (Batch(images[part.ids], labels[part.ids], part.ids) for part in plan.slices())
        result = evaluator(weights, batches, plan, ALONE, Agreement(), stop)
        assert result is not None
        return result | {"seconds": 0}

    eager = Evaluator(objective, ["model", "ema"], compile_=False)
    compiled = Evaluator(objective, ["model", "ema"], compile_=True, backend=counted(compilations))
    for weights in ({"model": one, "ema": other}, {"model": other, "ema": one}):  # other weights, the same code
        result = run(compiled, weights)
        assert result == pytest.approx(run(eager, weights), rel=1e-5)
        assert result["loss"] != pytest.approx(result["ema_loss"], rel=1e-3)
        assert len(compilations) == 2  # one of each network
