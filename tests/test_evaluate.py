"""distrib.engine.evaluate: every image counts once, the same at any world size, and training is left alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_step import ALONE, MEAN, STD, assert_equal, copied, run_ranks, small_run

from distrib.config import EmaConfig, ModelConfig
from distrib.data import Batch, EvalPlan
from distrib.engine.evaluate import Evaluator
from distrib.engine.prepare import Objective
from distrib.engine.state import Weights
from distrib.faults import Agreement, Interrupted
from distrib.models import build_model
from distrib.optim import Ema
from distrib.runtime import Runtime

IMAGES, BATCH, SIZE = 1013, 64, 12  # 16 batches, the last of 53: divides by neither 2 nor 3 ranks
ROUNDS = {1: 16, 2: 8, 3: 6}
UNREADABLE = (5, 700, 1012)  # ids whose label is -1


pytestmark = pytest.mark.usefixtures("one_thread")


def pool() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    # Flat colours with noise, so that the net answers more than one class.
    colours = torch.randint(256, (IMAGES, 3, 1, 1), generator=generator)
    noise = torch.randint(-60, 60, (IMAGES, 3, SIZE, SIZE), generator=generator)
    return (colours + noise).clamp(0, 255).to(torch.uint8), torch.randint(10, (IMAGES,), generator=generator)


def make_parts() -> tuple[Objective, Weights]:
    torch.manual_seed(0)
    net = build_model(ModelConfig(name="resnet20", num_classes=10, zero_init_residual=False))
    torch.nn.init.normal_(net.fc.weight)
    objective = Objective(net.to(memory_format=torch.channels_last), MEAN, STD, torch.bfloat16)
    ema = Ema(net, EmaConfig(decay=0.5))
    for images in pool()[0].split(128):
        objective.logits(images)  # statistics
        ema.update()
    return objective, {"model": net.state_dict(), "ema": ema.state_dict()}


class Loader:
    """The batches of a plan; counts the passes and the batches, and calls ``at`` with each batch's number."""

    def __init__(self, unreadable: tuple[int, ...] = (), at: Any = None) -> None:
        self.images, self.labels = pool()
        self.labels[list(unreadable)] = -1
        self.at, self.passes, self.batches = at, 0, 0

    def evaluate(self, plan: EvalPlan) -> Iterator[Batch]:
        self.passes += 1
        for part in plan.slices():
            self.batches += 1
            if self.at is not None:
                self.at(self.batches)
            yield Batch(self.images[part.ids], self.labels[part.ids], part.ids)


def evaluate(
    runtime: Runtime,
    unreadable: tuple[int, ...] = (),
    stops: int | None = None,
    at: int = 3,
    arrives: bool = True,
) -> tuple[Any, int, list[tuple[int, int]]]:
    """Evaluates; rank ``stops`` is asked to stop at its batch ``at``, which ``arrives`` or not.

    Returns the result, the batches taken, and what was told of the progress.
    """
    told: list[tuple[int, int]] = []
    objective, weights = make_parts()
    stop = SimpleNamespace(received=None)

    def ask(batch: int) -> None:
        if runtime.rank == stops and batch == at:
            stop.received = "SIGTERM"
            if not arrives:
                raise Interrupted

    loader, plan = Loader(unreadable, ask), EvalPlan(IMAGES, BATCH, runtime.rank, runtime.world)
    agreement = Agreement(runtime.control)
    result = Evaluator(objective, ["model", "ema"], compile_=False)(
        weights, loader.evaluate(plan), plan, runtime, agreement, stop, lambda *rounds: told.append(rounds)
    )
    agreement.close()
    assert loader.passes == 1
    return result, loader.batches, told


def on_rank(runtime: Runtime) -> dict[str, Any]:
    found = {"all": evaluate(runtime), "unreadable": evaluate(runtime, UNREADABLE)}
    last = runtime.world - 1
    found["stopped"] = evaluate(runtime, stops=last)
    found["stopped too late"] = evaluate(runtime, stops=0, at=ROUNDS[runtime.world])

    found["missed the last batch"] = evaluate(runtime, stops=0, at=ROUNDS[runtime.world], arrives=False)

    run = small_run(runtime)  # of another net, with each rank's own statistics
    run.train(0, 2)
    before = copied([run.net.state_dict(), run.ema.state_dict()])
    run.state.weights()
    found["untouched"] = all(
        torch.equal(a, b)
        for now, then in zip([run.net.state_dict(), run.ema.state_dict()], before, strict=True)
        for a, b in zip(now.values(), then.values(), strict=True)
    )
    return found


@pytest.fixture(scope="module", params=[1, 2, 3])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(tmp_path_factory.mktemp("ranks"), request.param, on_rank)


def plain_loop(state: dict[str, torch.Tensor], labels: torch.Tensor) -> dict[str, float]:
    """The same network over the same images in plain torch; no plan, no filling up."""
    net = build_model(ModelConfig(name="resnet20", num_classes=10)).to(memory_format=torch.channels_last)
    net.load_state_dict(state)
    net.eval()
    images, top1, top5, loss, seen = pool()[0], 0, 0, 0.0, 0
    answers = set()
    with torch.no_grad():
        for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True):
            x = (x.float() - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
            with torch.autocast("cpu", torch.bfloat16):
                logits = net(x.contiguous(memory_format=torch.channels_last)).float()
            for row, label in zip(logits, y.tolist(), strict=True):
                if label >= 0:
                    best = row.topk(5).indices.tolist()
                    answers.add(best[0])
                    top1, top5, seen = top1 + (best[0] == label), top5 + (label in best), seen + 1
                    loss -= float(row.log_softmax(0)[label])
    assert len(answers) > 3  # or the counts would say little
    return {"top1": 100 * top1 / seen, "top5": 100 * top5 / seen, "loss": loss / seen, "images": seen}


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, dict[str, float]]]:
    _, labels = pool()
    readable = labels.clone()
    readable[list(UNREADABLE)] = -1
    weights = make_parts()[1]
    return {
        which: {name: plain_loop(state, y) for name, state in weights.items()}
        for which, y in (("all", labels), ("unreadable", readable))
    }


@pytest.mark.parametrize("which", ["all", "unreadable"])
def test_the_counts_are_a_plain_loops_at_every_world_size(
    ranks: list[dict[str, Any]], expected: dict[str, dict[str, dict[str, float]]], which: str
) -> None:
    plain = expected[which]
    for rank in ranks:
        result = rank[which][0]
        keys = ["top1", "top5", "loss", "images", "ema_top1", "ema_top5", "ema_loss", "seconds"]
        assert sorted(result) == sorted(keys)
        assert result["images"] == IMAGES - (len(UNREADABLE) if which == "unreadable" else 0)
        assert type(result["images"]) is int
        for prefix, name in (("", "model"), ("ema_", "ema")):
            for key in ("top1", "top5"):
                assert result[prefix + key] == plain[name][key]
            assert result[f"{prefix}loss"] == pytest.approx(plain[name]["loss"], rel=1e-5)
        assert result["seconds"] > 0
    assert plain["ema"] != plain["model"]


def test_ranks_share_the_batches(ranks: list[dict[str, Any]]) -> None:
    taken = [rank["all"][1] for rank in ranks]
    assert sum(taken) == 16
    assert max(taken) == ROUNDS[len(ranks)]


def test_it_tells_each_round(ranks: list[dict[str, Any]]) -> None:
    rounds = ROUNDS[len(ranks)]
    for rank in ranks:
        assert rank["all"][2] == [(done, rounds) for done in range(rounds + 1)]
        assert rank["stopped"][2] == [(done, rounds) for done in range(4)]  # and never that all is done


def test_all_ranks_stop_together_and_soon(ranks: list[dict[str, Any]]) -> None:
    assert [rank["stopped"][0] for rank in ranks] == [None] * len(ranks)
    taken = {rank["stopped"][1] for rank in ranks}
    assert taken == {4}  # asked in round 3, known to all one round later


def test_a_request_in_the_last_round_comes_too_late(ranks: list[dict[str, Any]]) -> None:
    """The result is there by the time that all know."""
    for rank in ranks:
        assert rank["stopped too late"][0] | {"seconds": 0} == rank["all"][0] | {"seconds": 0}


def test_a_request_in_the_last_round_without_its_batch_leaves_no_result(ranks: list[dict[str, Any]]) -> None:
    assert [rank["missed the last batch"][0] for rank in ranks] == [None] * len(ranks)


def test_reading_the_weights_leaves_each_ranks_own(ranks: list[dict[str, Any]]) -> None:
    assert all(rank["untouched"] for rank in ranks)


@pytest.mark.parametrize("stops", [None, 0])
def test_training_is_left_alone(stops: int | None) -> None:
    """Weights, statistics, gradients and mode of the net that trains, also where the evaluation is cut short."""
    objective, weights = make_parts()
    objective(*pool())[0].backward()
    before = copied(objective.network.state_dict())
    gradients = [p.grad.clone() for p in objective.network.parameters()]
    given = copied(weights)
    evaluator = Evaluator(objective, ["model", "ema"], compile_=False)
    plan = EvalPlan(IMAGES, BATCH)
    stop = SimpleNamespace(received="SIGTERM" if stops == 0 else None)
    result = evaluator(weights, Loader().evaluate(plan), plan, ALONE, Agreement(), stop)
    assert (result is None) == (stops == 0)
    assert_equal(copied(objective.network.state_dict()), before)
    assert_equal(copied(weights), given)
    assert_equal([p.grad for p in objective.network.parameters()], gradients)
    assert all(module.training for module in objective.modules())
    assert all(p.requires_grad and not p.is_inference() for p in objective.parameters())
    objective(*pool())[0].backward()  # and it trains on


def test_it_evaluates_what_it_is_given_and_not_what_it_was_made_from() -> None:
    objective, weights = make_parts()
    evaluator = Evaluator(objective, ["model"], compile_=False)
    plan, stop = EvalPlan(IMAGES, BATCH), SimpleNamespace(received=None)

    def run(state: dict[str, torch.Tensor]) -> dict[str, Any]:
        result = evaluator({"model": state}, Loader().evaluate(plan), plan, ALONE, Agreement(), stop)
        assert result is not None
        return result | {"seconds": 0}

    first = run(weights["model"])
    other = copy.deepcopy(weights["model"])
    other["fc.bias"][3] += 1000
    always_three = run(other)
    share = (pool()[1] == 3).sum().item() / IMAGES
    assert always_three["top1"] == pytest.approx(100 * share)
    assert run(weights["model"]) == first


@pytest.mark.parametrize("classes", [1, 2, 4])
def test_fewer_than_five_classes(classes: int) -> None:
    net = build_model(ModelConfig(name="resnet20", num_classes=classes))
    evaluator = Evaluator(Objective(net, MEAN, STD, torch.float32), ["model"], compile_=False)
    batch = Batch(pool()[0][:7], torch.arange(7) % classes, torch.arange(7).numpy())
    stop = SimpleNamespace(received=None)
    result = evaluator({"model": net.state_dict()}, iter([batch]), EvalPlan(7, 10), ALONE, Agreement(), stop)
    assert result is not None
    assert (result["images"], result["top5"]) == (7, 100.0)


def test_nothing_readable() -> None:
    net = build_model(ModelConfig(name="resnet20", num_classes=10))
    evaluator = Evaluator(Objective(net, MEAN, STD, torch.float32), ["model"], compile_=False)
    batch = Batch(pool()[0][:7], torch.full((7,), -1), torch.arange(7).numpy())
    stop = SimpleNamespace(received=None)
    result = evaluator({"model": net.state_dict()}, iter([batch]), EvalPlan(7, 10), ALONE, Agreement(), stop)
    assert result is not None
    assert (result["images"], result["top1"], result["top5"], result["loss"]) == (0, 0, 0, 0)


def test_who_observes_gets_each_image_once_and_changes_nothing() -> None:
    objective, weights = make_parts()
    plan, stop = EvalPlan(IMAGES, BATCH), SimpleNamespace(received=None)
    seen: dict[str, list[tuple[Any, torch.Tensor, torch.Tensor]]] = {"model": [], "ema": []}

    def run(**more: Any) -> dict[str, float]:
        evaluator = Evaluator(objective, ["model", "ema"], compile_=False, **more)
        result = evaluator(weights, Loader(UNREADABLE).evaluate(plan), plan, ALONE, Agreement(), stop)
        assert result is not None
        return result | {"seconds": 0}

    result = run(observe=lambda name, *batch: seen[name].append(batch))
    assert result == run()
    for prefix, batches in (("", seen["model"]), ("ema_", seen["ema"])):
        ids, logits, labels = (
            torch.cat([torch.as_tensor(part) for part in column]) for column in zip(*batches, strict=True)
        )
        assert ids.tolist() == list(range(IMAGES))  # without what fills the last batch up
        expected = pool()[1]
        expected[list(UNREADABLE)] = -1
        assert torch.equal(labels, expected)
        right = (logits.argmax(1) == labels).sum().item()
        assert result[f"{prefix}top1"] == 100 * right / (IMAGES - len(UNREADABLE))
