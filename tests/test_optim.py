"""distrib.optim: the same numbers as the formulas written out in plain torch, and schedules as pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from distrib.config import EmaConfig, ModelConfig, OptimConfig, ScheduleConfig
from distrib.data import Batch
from distrib.engine.prepare import Objective
from distrib.engine.state import TrainState
from distrib.engine.step import TrainStep
from distrib.models import MODEL_NAMES, build_model
from distrib.models.resnet import Architecture, BasicBlock, ResNet
from distrib.optim import Ema, build_optimizer, build_schedule, parameter_groups, peak_lr
from distrib.runtime import Runtime

MEAN, STD = (120.0, 110.0, 100.0), (60.0, 50.0, 40.0)
STEPS, BATCH = 20, 6


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    arch = Architecture(BasicBlock, (1, 1, 1), width=8, stem="small")
    return ResNet(arch, num_classes=5).to(memory_format=torch.channels_last)


def batches() -> list[Batch]:
    torch.manual_seed(1)
    images = torch.randint(256, (STEPS, BATCH, 3, 8, 8), dtype=torch.uint8)
    labels = torch.randint(5, (STEPS, BATCH))
    return [
        Batch(x.contiguous(memory_format=torch.channels_last), y, np.arange(BATCH))
        for x, y in zip(images, labels, strict=True)
    ]


# Twenty steps


def train_ours(optim: OptimConfig, schedule: ScheduleConfig, ema: EmaConfig, clip: float | None) -> tuple[Any, ...]:
    net = tiny_net()
    lr = peak_lr(optim, BATCH)
    optimizer = build_optimizer(net, optim, lr)
    average = Ema(net, ema)
    step = TrainStep(
        Objective(net, MEAN, STD, torch.float32),
        None,
        optimizer,
        torch.amp.GradScaler("cpu", enabled=False),
        average,
        world=1,
        global_batch=BATCH,
        clip_grad_norm=clip,
    )
    lr_at = build_schedule(schedule, lr, steps_per_epoch=4, total_steps=STEPS)
    losses = [step([batch], i, lr_at(i)).loss for i, batch in enumerate(batches())]
    return net.state_dict(), average.state_dict(), torch.stack(losses)


def train_written_out(
    lr_at: Callable[[int], float],
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    decay: float,
    every: int,
    clip: float | None,
) -> tuple[Any, ...]:
    net = tiny_net()
    norms_and_biases = {
        id(p)
        for module in net.modules()
        for name, p in module.named_parameters(recurse=False)
        if isinstance(module, nn.BatchNorm2d) or name == "bias"
    }
    buffers: dict[int, torch.Tensor] = {}
    average = {key: value.clone() for key, value in net.state_dict().items()}
    losses = []
    for i, (images, labels, _) in enumerate(batches()):
        x = (images.float() - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
        loss = functional.cross_entropy(net(x), labels, reduction="sum")
        parameters = list(net.parameters())
        gradients = torch.autograd.grad(loss * (1 / BATCH), parameters)
        losses.append(loss.detach())
        if clip is not None:
            # The order of the groups: the norm of the norms depends on it in the last bit.
            order = sorted(range(len(parameters)), key=lambda k: id(parameters[k]) in norms_and_biases)
            norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(gradients[k]) for k in order]))
            gradients = [g * (clip / (norm + 1e-6)).clamp(max=1.0) for g in gradients]
        with torch.no_grad():
            for p, gradient in zip(parameters, gradients, strict=True):
                if id(p) not in norms_and_biases:
                    gradient = gradient.add(p, alpha=weight_decay)
                buffer = buffers[id(p)].mul(momentum).add(gradient) if id(p) in buffers else gradient.clone()
                buffers[id(p)] = buffer
                p.add_(gradient.add(buffer, alpha=momentum) if nesterov else buffer, alpha=-lr_at(i))
            if (i + 1) % every == 0:
                for key, value in net.state_dict().items():
                    # decay · average + (1 - decay) · value, rounded as torch.lerp does
                    average[key] = average[key].lerp(value, 1 - decay) if value.is_floating_point() else value.clone()
    return net.state_dict(), average, torch.stack(losses)


@pytest.mark.parametrize(
    ("nesterov", "clip", "weight_decay", "every"),
    [(False, None, 1e-4, 1), (True, None, 5e-2, 1), (True, 0.5, 5e-2, 3), (False, 100.0, 0.0, 1)],
)
def test_twenty_steps_are_the_formulas_to_the_bit(
    nesterov: bool, clip: float | None, weight_decay: float, every: int
) -> None:
    """Weights, statistics, EMA and losses. Nothing here is only close: all of it is fp32 in the same order."""
    optim = OptimConfig(lr=0.4, reference_batch=12, momentum=0.9, nesterov=nesterov, weight_decay=weight_decay)
    schedule = ScheduleConfig(name="cosine", warmup_epochs=1, warmup_start=0.1)

    def lr_at(step: int) -> float:
        if step < 4:
            return 0.2 * (0.1 + 0.9 * step / 4)
        return 0.2 * (1 + math.cos(math.pi * ((step - 4) / 16))) / 2

    ours = train_ours(optim, schedule, EmaConfig(decay=0.9, every=every), clip)
    written = train_written_out(lr_at, 0.9, nesterov, weight_decay, 0.9, every, clip)
    assert torch.isfinite(ours[2]).all()
    assert torch.equal(ours[2], written[2])
    for which in (0, 1):
        assert list(ours[which]) == list(written[which])
        for key, value in written[which].items():
            if which == 1 and key.endswith("num_batches_tracked"):  # counters are the model's own
                value = written[0][key]
            assert torch.equal(ours[which][key], value), key
    assert not torch.equal(ours[0]["fc.weight"], tiny_net().state_dict()["fc.weight"])
    assert not torch.equal(ours[0]["fc.weight"], ours[1]["fc.weight"])


def test_clipping_bounds_the_update() -> None:
    optim = OptimConfig(lr=1.0, scaling="none", momentum=0.0, weight_decay=0.0)
    net = tiny_net()
    before = [p.detach().clone() for p in net.parameters()]
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    objective = Objective(net, MEAN, STD, torch.float32)
    optimizer = build_optimizer(net, optim, 1.0)
    step = TrainStep(objective, None, optimizer, scaler, None, world=1, global_batch=BATCH, clip_grad_norm=0.01)
    step(batches()[:1], 0, 1.0)
    moved = torch.cat([(p.detach() - b).flatten() for p, b in zip(net.parameters(), before, strict=True)])
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


# EMA


def test_the_average_is_the_sum_over_the_past() -> None:
    """decay^n · first + (1 - decay) · Σ decay^(n-1-i) · value_i: close, not equal, since the rounding differs."""
    net = nn.Linear(3, 2)
    ema = Ema(net, EmaConfig(decay=0.7))
    values = [net.weight.detach().clone()]
    for i in range(6):
        with torch.no_grad():
            net.weight.add_(i)
        values.append(net.weight.detach().clone())
        ema.update()
    expected = 0.7**6 * values[0] + sum(0.3 * 0.7 ** (5 - i) * value for i, value in enumerate(values[1:]))
    torch.testing.assert_close(ema.state_dict()["weight"], expected)


def test_the_average_goes_to_its_copy_and_back() -> None:
    net = tiny_net()
    ema = Ema(net, EmaConfig(decay=0.5))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.add_(1)
            module.num_batches_tracked.add_(3)
    ema.update()
    assert ema.state_dict()["bn1.running_mean"].tolist() == [0.5] * 8
    assert ema.state_dict()["bn1.num_batches_tracked"] == 3
    assert list(ema.state_dict()) == list(net.state_dict())
    other = Ema(tiny_net(1), EmaConfig(decay=0.9999))
    other.load_state_dict(ema.state_dict())
    for key, value in ema.average.items():
        assert torch.equal(other.average[key], value)
    assert net.bn1.running_mean.tolist() == [1.0] * 8


# Schedules


def schedule(name: Any, warmup: float = 2, **settings: Any) -> Callable[[int], float]:
    cfg = ScheduleConfig(name=name, warmup_epochs=warmup, **settings)
    return build_schedule(cfg, 0.8, steps_per_epoch=10, total_steps=100)


@pytest.mark.parametrize("name", ["cosine", "step", "polynomial", "linear"])
def test_warm_up_is_a_line(name: str) -> None:
    lr = schedule(name, warmup_start=0.25)
    assert [lr(0), lr(10), lr(20)] == pytest.approx([0.2, 0.5, 0.8])
    assert lr(19) == pytest.approx(0.8 * (0.25 + 0.75 * 19 / 20))
    assert schedule(name, warmup=0)(0) == 0.8
    assert schedule(name, warmup_start=0)(0) == 0.0
    assert schedule(name, warmup=0.05)(0) == 0.8  # half a step rounds to none
    assert schedule(name, warmup=0.25, warmup_start=0)(1) == pytest.approx(0.4)  # 2.5 steps round to 2


@pytest.mark.parametrize(
    ("name", "middle", "last"),
    [
        ("cosine", 0.5, (1 + math.cos(math.pi * 79 / 80)) / 2),
        ("polynomial", 0.25, (1 / 80) ** 2),
        ("linear", 0.5, 1 / 80),
    ],
)
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_smooth_ones_end_at_final(name: str, middle: float, last: float, final: float) -> None:
    lr = schedule(name, final=final)
    assert lr(60) == pytest.approx(0.8 * (final + (1 - final) * middle))
    assert lr(99) == pytest.approx(0.8 * (final + (1 - final) * last))
    assert lr(100) == pytest.approx(0.8 * final, abs=1e-12)
    values = [lr(step) for step in range(20, 101)]
    assert values == sorted(values, reverse=True)


def test_the_polynomials_power() -> None:
    assert schedule("polynomial", power=3.0)(60) == pytest.approx(0.8 * 0.5**3)
    assert schedule("polynomial", power=1.0)(33) == pytest.approx(schedule("linear")(33))


def test_steps_fall_at_the_milestones() -> None:
    lr = schedule("step", milestones=(3, 5.5, 8), gamma=0.1)
    # At the milestone itself, in steps from the run's first one, warm-up included.
    for step, factor in ((20, 1), (29, 1), (30, 0.1), (54, 0.1), (55, 0.01), (79, 0.01), (80, 0.001), (99, 0.001)):
        assert lr(step) == pytest.approx(0.8 * factor), step


def test_a_milestone_within_the_warm_up_counts_afterwards() -> None:
    lr = schedule("step", milestones=(1, 5), gamma=0.1)
    assert lr(15) == pytest.approx(0.8 * (0.01 + 0.99 * 0.75))
    assert lr(20) == pytest.approx(0.08)


@pytest.mark.parametrize("name", ["cosine", "step", "polynomial", "linear"])
def test_schedules_remember_nothing(name: str) -> None:
    lr = schedule(name)
    forwards = [lr(step) for step in range(100)]
    assert [lr(step) for step in reversed(range(100))] == forwards[::-1]
    assert [schedule(name)(step) for step in range(100)] == forwards
    assert all(value >= 0 for value in forwards)


@pytest.mark.parametrize("name", ["cosine", "step", "polynomial", "linear"])
def test_a_run_that_ends_within_its_warm_up(name: str) -> None:
    lr = build_schedule(ScheduleConfig(name=name, warmup_epochs=5), 1.0, steps_per_epoch=10, total_steps=3)
    assert [lr(0), lr(1), lr(2)] == pytest.approx([0.01 + 0.99 * i / 50 for i in range(3)])
    lr = build_schedule(ScheduleConfig(name=name, warmup_epochs=5), 1.0, steps_per_epoch=10, total_steps=50)
    assert lr(50) == 1.0  # nothing left to divide by


def test_the_peak_follows_the_batch() -> None:
    assert peak_lr(OptimConfig(lr=0.1, reference_batch=256, scaling="linear"), 1024) == pytest.approx(0.4)
    assert peak_lr(OptimConfig(lr=0.1, reference_batch=256, scaling="sqrt"), 1024) == pytest.approx(0.2)
    assert peak_lr(OptimConfig(lr=0.1, reference_batch=256, scaling="none"), 1024) == 0.1
    assert peak_lr(OptimConfig(lr=0.1, reference_batch=256, scaling="linear"), 64) == pytest.approx(0.025)
    for scaling in ("linear", "sqrt", "none"):
        assert peak_lr(OptimConfig(lr=0.1, reference_batch=256, scaling=scaling), 256) == 0.1


# Groups


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_norms_and_biases_do_not_decay(name: str) -> None:
    with torch.device("meta"):
        net = build_model(ModelConfig(name=name, num_classes=7))
    decayed, plain = parameter_groups(net, 0.05)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    ids = [id(p) for group in (decayed, plain) for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in net.parameters())  # each once
    weights = {id(m.weight) for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert {id(p) for p in decayed["params"]} == weights
    assert len(weights) + 2 * sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) + 1 == len(ids)


def test_frozen_parameters_are_left_out() -> None:
    net = tiny_net()
    net.conv1.requires_grad_(False)
    optimizer = build_optimizer(net, OptimConfig(), 0.1)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in net.parameters()} - {id(net.conv1.weight)}


def test_the_optimizer_is_what_the_configuration_says() -> None:
    cfg = OptimConfig(momentum=0.8, nesterov=True, weight_decay=0.01)
    optimizer = build_optimizer(tiny_net(), cfg, 0.3)
    assert isinstance(optimizer, torch.optim.SGD)
    for group, weight_decay in zip(optimizer.param_groups, (0.01, 0.0), strict=True):
        assert (group["lr"], group["momentum"], group["nesterov"]) == (0.3, 0.8, True)
        assert (group["weight_decay"], group["dampening"]) == (weight_decay, 0)


# The first step


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_a_momentum_of_zeros_is_torchs_own_first_step(fused: bool, nesterov: bool) -> None:
    net, other = tiny_net(), tiny_net()
    cfg = OptimConfig(nesterov=nesterov, weight_decay=0.05)
    groups = parameter_groups(other, cfg.weight_decay)
    plain = torch.optim.SGD(groups, lr=0.3, momentum=0.9, nesterov=nesterov, fused=fused, foreach=False)
    ours = build_optimizer(net, cfg, 0.3)
    for group in ours.param_groups:
        group["fused"] = fused
    for _ in range(3):
        for a, b in zip(net.parameters(), other.parameters(), strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        ours.step()
        plain.step()
        for a, b in zip(net.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)
            assert torch.equal(ours.state[a]["momentum_buffer"], plain.state[b]["momentum_buffer"])
            assert ours.state[a]["momentum_buffer"].stride() == a.stride()


def test_without_momentum_nothing_is_kept() -> None:
    assert not build_optimizer(tiny_net(), OptimConfig(momentum=0.0), 0.1).state


@pytest.fixture
def fused_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a GPU run uses, and memory that nobody wrote to is NaN."""
    real = torch.optim.SGD

    def sgd(*args: Any, **settings: Any) -> torch.optim.Optimizer:
        return real(*args, **{**settings, "fused": True})

    monkeypatch.setattr(torch.optim, "SGD", sgd)
    torch.use_deterministic_algorithms(True)
    kept = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = kept
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("fused_on_the_cpu")
@pytest.mark.parametrize("restored", [None, "before the first step", "without momentum"])
def test_a_first_step_that_overflows_leaves_no_momentum(restored: str | None) -> None:
    """The loss scaler skips it; the next one is then torch's first."""
    optim = OptimConfig(momentum=0.9, nesterov=True, weight_decay=0.05)
    net = tiny_net()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    optimizer = build_optimizer(net, optim, 0.1)
    runtime = Runtime(0, 1, 0, 1, torch.device("cpu"))
    state = TrainState(net, optimizer, scaler, None, runtime)
    if restored is not None:  # from a checkpoint that holds no momentum
        momentum = {"before the first step": 0.9, "without momentum": 0.0}[restored]
        saved = state.capture()
        optimizer_state = {"state": {}, "param_groups": saved["optimizer"]["param_groups"]}
        for group in optimizer_state["param_groups"]:
            group["momentum"] = momentum
        state.restore({**saved, "optimizer": optimizer_state})
    objective = Objective(net, MEAN, STD, torch.float32)
    first, second = (
        TrainStep(objective, None, optimizer, scaler, None, world=world, global_batch=BATCH) for world in (1000, 1)
    )
    before = [p.detach().clone() for p in net.parameters()]
    first(batches()[:1], 0, 0.1)  # a loss of about 300 times the scale
    assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))
    assert scaler.get_scale() == 2.0**126

    scaler.update(1.0)
    second(batches()[1:2], 1, 0.1)
    other = tiny_net()
    plain = Objective(other, MEAN, STD, torch.float32)
    loss, _ = plain(batches()[1].images, batches()[1].labels)
    (loss / BATCH).backward()
    torch.optim.SGD(parameter_groups(other, 0.05), lr=0.1, momentum=0.9, nesterov=True).step()
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)
