"""What is frozen stays to the bit and costs no backward; layers learn at their own rates; runs of it continue."""

from __future__ import annotations

import copy
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from test_resume import assert_same
from test_step import ALONE, CLASSES, IMAGES, MEAN, SIZE, STD, make_batches, make_step, norm_net, run_ranks
from torch import nn

from distrib.config import EmaConfig, ModelConfig, OptimConfig, TrainConfig, UserError
from distrib.data import TrainPlan
from distrib.engine.evaluate import Evaluator
from distrib.engine.prepare import Objective, check_batch_norm, warm_up, wrap
from distrib.engine.state import TrainState
from distrib.models import build_model
from distrib.optim import Ema, build_optimizer, freeze, parameter_groups
from distrib.optim.finetune import lr_factors
from distrib.runtime import Runtime

pytestmark = pytest.mark.usefixtures("one_thread")


def build(name: str) -> nn.Module:
    with torch.device("meta"):
        return build_model(ModelConfig(name=name, num_classes=7))


# What is frozen


@pytest.mark.parametrize("last", ["conv1", "bn1", "layer1", "layer3", "layer4", "backbone"])
def test_everything_up_to_a_stage_is_frozen(last: str) -> None:
    net = build("resnet18")
    freeze(net, last)
    order = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool", "flatten", "fc"]
    frozen = order[: order.index("layer4" if last == "backbone" else last) + 1]
    for name, child in net.named_children():
        assert all(p.requires_grad == (name not in frozen) for p in child.parameters())
        assert all(module.training == (name not in frozen) for module in child.modules())
    assert net.training


def test_a_stage_that_there_is_not() -> None:
    with pytest.raises(UserError) as raised:
        freeze(build("resnet20"), "layer4")
    assert str(raised.value) == (
        "optim.freeze 'layer4' is no stage of the network; there are conv1, bn1, layer1, layer2, layer3, backbone"
    )
    net = build("resnet20")
    with pytest.raises(UserError) as raised:
        freeze(net, "fc")
    assert str(raised.value) == "optim.freeze fc leaves nothing to train: layer3 trains fc alone"
    assert all(p.requires_grad for p in net.parameters())


def test_a_frozen_norm_needs_no_variance() -> None:
    """One image whose last stage has a single pixel: only what trains has to normalise it."""
    arguments = (1, 4)
    net = norm_net()
    with pytest.raises(UserError):
        check_batch_norm(net, *arguments)
    freeze(net, "layer3")
    check_batch_norm(net, *arguments)


def states(net: nn.Module) -> dict[str, torch.Tensor]:
    return {key: tensor.detach().clone() for key, tensor in net.state_dict().items()}


@dataclass
class Outcome:
    """Of three steps: the networks before and after, the losses, and what the first layer kept for a backward."""

    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]
    average: dict[str, torch.Tensor]
    losses: list[torch.Tensor]
    graph: bool
    saved: dict[str, Any]


def fine_tune(runtime: Runtime, backend: str | None, last: str = "layer2") -> Outcome:
    """Three steps with accumulation and an average, put together as train.py does."""
    torch.compiler.reset()
    net = norm_net()
    with torch.no_grad():
        for buffer in net.buffers():
            if buffer.is_floating_point():
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=torch.Generator().manual_seed(4)))
    freeze(net, last)
    before = states(net)
    plan = TrainPlan(IMAGES, 13, 0, runtime.rank, runtime.world, 2)
    objective = Objective(net, MEAN, STD, torch.float32)
    call, ddp = wrap(objective, TrainConfig(compile=backend is not None), runtime, backend or "eager")
    warm_up(call, ddp, objective, plan.slice_sizes, SIZE, torch.device("cpu"))
    assert all(torch.equal(tensor, before[key]) for key, tensor in states(net).items())
    cfg = OptimConfig(head_lr=10, layer_decay=0.5, weight_decay=0.1)
    optimizer = build_optimizer(net, cfg, 0.1)
    ema = Ema(net, EmaConfig(decay=0.9))
    state = TrainState(net, optimizer, torch.amp.GradScaler("cpu", enabled=False), ema, runtime)
    evaluator = Evaluator(objective, ["model"], compile_=False)
    step = make_step(call, ddp, optimizer, plan, ema=ema)
    losses = [step(make_batches(plan, i), i, 0.1) for i in range(3)]
    modes = {name: module.training for name, module in net.named_modules()}
    assert not any(module.training for copied in evaluator._copies.values() for module in copied.modules())
    assert modes == {name: module.training for name, module in net.named_modules()}
    assert (modes["layer1.0.bn1"], modes["layer3.0.bn1"]) == (False, last != "layer3")
    graph = net.layer2(net.layer1(net.bn1(net.conv1(torch.rand(2, 3, SIZE, SIZE))))).requires_grad
    return Outcome(before, states(net), dict(ema.state_dict()), losses, graph, copy.deepcopy(state.capture()))


def on_ranks(world: int, folder: Path, *args: Any) -> list[Outcome]:
    return run_ranks(folder, world, fine_tune, *args) if world > 1 else [fine_tune(ALONE, *args)]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_frozen_stages_stay_to_the_bit(world: int, tmp_path: Path) -> None:
    for outcome in on_ranks(world, tmp_path / "ranks", None):
        assert not outcome.graph
        for key, tensor in outcome.before.items():
            frozen = key.startswith(("conv1", "bn1", "layer1", "layer2"))
            for now in (outcome.after, outcome.saved["model"]):  # the second: with the ranks' mean of the statistics
                assert torch.equal(now[key], tensor) == frozen, key
            if tensor.is_floating_point():
                for now in (outcome.average, outcome.saved["model_ema"]):
                    assert torch.equal(now[key], tensor) == frozen, key


@pytest.mark.parametrize("world", [1, 2])
def test_nothing_but_the_head_trains(world: int, tmp_path: Path) -> None:
    for outcome in on_ranks(world, tmp_path / "ranks", None, "layer3"):
        changed = {
            key for key, tensor in outcome.before.items() if not torch.equal(outcome.saved["model"][key], tensor)
        }
        assert changed == {"fc.weight", "fc.bias"}


def test_compiled_as_eager() -> None:
    eager, compiled = fine_tune(ALONE, None), fine_tune(ALONE, "aot_eager")
    torch.testing.assert_close(
        torch.stack([r.loss for r in compiled.losses]), torch.stack([r.loss for r in eager.losses])
    )
    for key, tensor in eager.after.items():
        torch.testing.assert_close(compiled.after[key], tensor)
        if key.startswith("layer2"):
            assert torch.equal(compiled.after[key], tensor)


# Learning rates


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_layer_decay_is_timms(name: str) -> None:
    import timm  # here: each rank's process imports this file
    from timm.optim import param_groups_layer_decay

    theirs = timm.create_model(name, num_classes=7)
    names = {id(p): key for key, p in theirs.named_parameters()}
    groups = param_groups_layer_decay(theirs, 0.05, layer_decay=0.75)
    expected = {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    net = build(name)
    names = {id(p): key for key, p in net.named_parameters()}
    ours = parameter_groups(net, 0.05, lr_factors(net, 1, 0.75))
    found = {names[id(p)]: (g["lr_factor"], g["weight_decay"]) for g in ours for p in g["params"]}
    assert found == expected
    assert len(found) == sum(len(group["params"]) for group in ours)


def test_the_heads_factor_is_its_own() -> None:
    net = build("resnet20")
    factors = lr_factors(net, 10, 1)
    assert {key for key, factor in factors.items() if factor == 10} == {"fc.weight", "fc.bias"}
    assert set(factors.values()) == {1, 10}
    factors = lr_factors(net, 10, 0.5)
    assert (factors["fc.bias"], factors["layer3.2.bn2.bias"], factors["layer3.1.conv1.weight"]) == (10, 0.5, 0.25)
    assert factors["conv1.weight"] == factors["bn1.weight"] == 0.5**10


def test_groups_without_factors_are_as_ever() -> None:
    net = norm_net()
    plain = parameter_groups(net, 0.05)
    weights, vectors = parameter_groups(net, 0.05, lr_factors(net, 1, 1))
    assert [id(p) for p in weights["params"]] == [id(p) for p in net.parameters() if p.ndim > 1]
    assert [id(p) for p in vectors["params"]] == [id(p) for p in net.parameters() if p.ndim <= 1]
    assert [(g["weight_decay"], g["lr_factor"]) for g in (weights, vectors)] == [(0.05, 1.0), (0.0, 1.0)]
    assert [[id(p) for p in g["params"]] for g in plain] == [[id(p) for p in g["params"]] for g in (weights, vectors)]


def test_the_step_follows_the_factors() -> None:
    """One step of SGD without momentum: each parameter moves by its rate times its gradient."""
    net, (batch,) = norm_net(), make_batches(TrainPlan(IMAGES, 11, 0), 0)
    freeze(net, "layer1")
    objective = Objective(net, MEAN, STD, torch.float32)
    other = copy.deepcopy(objective)
    (other(batch.images, batch.labels)[0] / 11).backward()
    optimizer = build_optimizer(net, OptimConfig(head_lr=10, layer_decay=0.5, momentum=0, weight_decay=0), 99.0)
    make_step(objective, None, optimizer, TrainPlan(IMAGES, 11, 0))([batch], 0, 0.2)
    rates = {"layer2": 0.2 * 0.25, "layer3": 0.2 * 0.5, "fc": 0.2 * 10}
    for (name, now), before in zip(net.named_parameters(), other.network.parameters(), strict=True):
        stage = name.partition(".")[0]
        if stage in rates:
            torch.testing.assert_close(now.detach(), before.detach() - rates[stage] * before.grad)
        else:
            assert before.grad is None
            assert torch.equal(now, before)


def test_a_checkpoint_from_before_the_factors_continues() -> None:
    net = norm_net()
    optimizer = build_optimizer(net, OptimConfig(), 0.1)
    state = TrainState(net, optimizer, torch.amp.GradScaler("cpu", enabled=False), None, ALONE)
    saved = copy.deepcopy(state.capture())
    for group in saved["optimizer"]["param_groups"]:
        del group["lr_factor"]
    state.restore(saved)
    assert [group["lr_factor"] for group in optimizer.param_groups] == [1.0, 1.0]


# The real train.py

FROZEN = ("conv1.", "bn1.", "layer1.")
TUNED = ["optim.freeze=layer1", "optim.head_lr=10", "optim.layer_decay=0.75"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network for other classes, with statistics that are its own."""
    torch.manual_seed(5)
    net = build_model(ModelConfig(name="resnet20", num_classes=CLASSES, zero_init_residual=False))
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean = 0.1 * torch.randn(norm.num_features)  # about 0, or the frozen rectifiers pass nothing
            norm.running_var = 0.5 + torch.rand(norm.num_features)
    path = tmp_path_factory.mktemp("weights") / "a.pt"
    torch.save({"model": net.state_dict(), "classes": ["a", "b", "c", "d", "e"]}, path)
    return path


@pytest.mark.parametrize("procs", [1, 2])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(procs: int, weights: Path, tmp_path: Path) -> None:
    reference, folder = tmp_path / "reference", tmp_path / "run"
    begun = torch.load(weights, weights_only=True)["model"]
    printed = runs.train(procs, reference, *TUNED, f"model.weights={weights}")
    assert f"weights: {weights}; the head is new: 10 classes, the weights have 5" in printed
    assert "M of them trained" in printed

    copied = tmp_path / "copied.pt"
    copied.write_bytes(weights.read_bytes())
    process = runs.begin(procs, folder, *TUNED, f"model.weights={copied}")
    runs.wait_until(lambda: runs.steps_traced(folder) >= 27, process)
    process.send_signal(signal.SIGTERM)
    printed = runs.finish(process)
    assert runs.exit_codes(folder) == [75] * procs, printed
    copied.unlink()  # a run that continues does without
    printed = runs.train(procs, folder, *TUNED, f"model.weights={copied}")
    assert "weights:" not in printed
    assert_same(folder, reference, procs)

    saved = torch.load(runs.newest_checkpoint(folder), weights_only=True)
    average = saved["model_ema"]
    for key, tensor in begun.items():
        if not key.startswith("fc."):
            frozen = key.startswith(FROZEN)
            assert torch.equal(saved["model"][key], tensor) == frozen, key
            assert torch.equal(average[key], tensor) == frozen, key


def test_an_unknown_stage_is_one_line(tmp_path: Path) -> None:
    process = runs.begin(1, tmp_path / "run", "optim.freeze=layer9")
    printed = runs.finish(process)
    assert process.returncode == 2
    assert [line for line in printed.splitlines() if "optim.freeze 'layer9' is no stage" in line]
    assert "Traceback" not in printed
    assert not (tmp_path / "run").exists()
