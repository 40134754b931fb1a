"""distrib.engine: one step is the global batch's mean gradient however it is cut; the state comes back to the bit."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distrib.config import EmaConfig, OptimConfig, TrainConfig
from distrib.data import Batch, TrainPlan
from distrib.engine.prepare import Objective, effective_precision, warm_up, wrap
from distrib.engine.state import SAVED_AS, TrainState
from distrib.engine.step import TrainStep
from distrib.metrics import TrainMeter
from distrib.models.resnet import Architecture, BasicBlock, ResNet
from distrib.optim import Ema, build_optimizer
from distrib.runtime import Runtime

MEAN, STD = (120.0, 110.0, 100.0), (60.0, 50.0, 40.0)
IMAGES, CLASSES, SIZE = 40, 5, 8
ALONE = Runtime(0, 1, 0, 1, torch.device("cpu"))
CUTS = [(11, 1), (11, 2), (17, 3)]  # (global batch, slices): none divides by 2 or 3 ranks


pytestmark = pytest.mark.usefixtures("one_thread")


# Real ranks


def run_ranks(folder: Path, world: int, body: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``body(runtime, *args)`` returns on each of ``world`` ranks: processes on the CPU, joined by gloo."""
    context = get_context("forkserver")  # imports torch once, for all ranks of the session
    context.set_forkserver_preload(["distrib.engine.evaluate", "distrib.engine.step", "distrib.models"])
    folder.mkdir(exist_ok=True)
    processes = [context.Process(target=_rank, args=(folder, rank, world, body, args)) for rank in range(world)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 120
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    for process in processes:
        process.kill()
    assert [process.exitcode for process in processes] == [0] * world
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _rank(folder: Path, rank: int, world: int, body: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    runtime = Runtime(rank, world, rank, world, torch.device("cpu"), dist.new_group(backend="gloo"))
    torch.save(body(runtime, *args), folder / f"{rank}.pt")
    dist.destroy_process_group()


# A small run


class Recorder(torch.optim.SGD):
    """Keeps the gradients that it was given."""

    gradients: list[torch.Tensor]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.gradients = [p.grad.clone() for group in self.param_groups for p in group["params"]]
        super().step()


def plain_net() -> nn.Module:
    """Without batch norm: no image's result depends on its neighbours."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, CLASSES)
    )


def norm_net() -> nn.Module:
    torch.manual_seed(0)
    return ResNet(Architecture(BasicBlock, (1, 1, 1), width=8, stem="small"), CLASSES)


def pool() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (IMAGES, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    return images, torch.randint(CLASSES, (IMAGES,), generator=generator)


def make_batches(plan: TrainPlan, step: int) -> list[Batch]:
    images, labels = pool()
    return [
        Batch(images[part.ids].contiguous(memory_format=torch.channels_last), labels[part.ids], part.ids)
        for part in plan.slices(step)
    ]


def make_step(call: Any, ddp: Any, optimizer: Any, plan: TrainPlan, **settings: Any) -> TrainStep:
    scaler = settings.pop("scaler", torch.amp.GradScaler("cpu", enabled=False))
    ema = settings.pop("ema", None)
    return TrainStep(call, ddp, optimizer, scaler, ema, world=plan.world, global_batch=plan.global_batch, **settings)


def gradients(
    runtime: Runtime, global_batch: int, accumulation: int, **settings: Any
) -> tuple[list[torch.Tensor], float]:
    """One step of the plain net: what the optimizer was given, and the summed loss."""
    plan = TrainPlan(IMAGES, global_batch, 0, runtime.rank, runtime.world, accumulation)
    smoothing, dtype = settings.pop("smoothing", 0.0), settings.pop("dtype", torch.float32)
    objective = Objective(plain_net(), MEAN, STD, dtype, smoothing)
    call, ddp = wrap(objective, TrainConfig(compile=False), runtime)
    optimizer = Recorder(objective.parameters(), lr=0.1)
    result = make_step(call, ddp, optimizer, plan, **settings)(make_batches(plan, 1), 1, 0.1)
    assert all(p.grad is None for p in objective.parameters())
    return optimizer.gradients, float(result.loss)


def plain_forward(global_batch: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """The plain net, the logits it has for that global batch, and the labels."""
    (batch,) = make_batches(TrainPlan(IMAGES, global_batch, 0), 1)
    net = plain_net()
    x = (batch.images.float() - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    return net, net(x), batch.labels


def written_out(global_batch: int, smoothing: float = 0.0) -> tuple[list[torch.Tensor], float]:
    """Mean gradient and summed loss of the same global batch, in plain torch."""
    net, logits, labels = plain_forward(global_batch)
    log_p = functional.log_softmax(logits, dim=1)
    right = log_p[torch.arange(global_batch), labels]
    losses = -(1 - smoothing) * right - smoothing * log_p.mean(dim=1)
    return list(torch.autograd.grad(losses.mean(), list(net.parameters()))), float(losses.detach().sum())


def assert_close(ours: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float = 1e-6) -> None:
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# One process


@pytest.mark.parametrize("accumulation", [1, 2, 3, 11])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_slices_add_up_to_the_mean_gradient(accumulation: int, smoothing: float) -> None:
    found, loss = gradients(ALONE, 11, accumulation, smoothing=smoothing)  # slices of 3, 4 and 4
    expected, expected_loss = written_out(11, smoothing)
    assert_close(found, expected)
    assert loss == pytest.approx(expected_loss, rel=1e-6)


def test_smoothing_changes_the_loss() -> None:
    assert gradients(ALONE, 11, 1, smoothing=0.1)[1] != pytest.approx(gradients(ALONE, 11, 1)[1], rel=1e-3)


def test_clipping_sees_the_whole_gradient() -> None:
    expected, _ = written_out(11)
    norm = torch.cat([g.flatten() for g in expected]).norm()
    for accumulation in (1, 3):
        found, _ = gradients(ALONE, 11, accumulation, clip_grad_norm=float(norm) / 2)
        assert_close(found, [g / 2 for g in expected])
        found, _ = gradients(ALONE, 11, accumulation, clip_grad_norm=float(norm) * 2)
        assert_close(found, expected)


def test_the_learning_rate_is_the_steps_own() -> None:
    net = plain_net()
    optimizer = build_optimizer(net, OptimConfig(momentum=0.0, weight_decay=0.0), 1.0)
    plan = TrainPlan(IMAGES, 4, 0)
    step = make_step(Objective(net, MEAN, STD, torch.float32), None, optimizer, plan)
    before = [p.detach().clone() for p in net.parameters()]
    step(make_batches(plan, 0), 0, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))
    step(make_batches(plan, 0), 1, 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}
    assert not torch.equal(net[0].weight, before[0])


def test_the_average_follows_every_nth_step() -> None:
    net = plain_net()
    ema = Ema(net, EmaConfig(decay=0.5, every=2))
    plan = TrainPlan(IMAGES, 4, 0)
    optimizer = build_optimizer(net, OptimConfig(), 0.1)
    step = make_step(Objective(net, MEAN, STD, torch.float32), None, optimizer, plan, ema=ema)
    seen = [ema.average["0.weight"].clone()]
    for i in range(4):
        step(make_batches(plan, i), i, 0.1)
        seen.append(ema.average["0.weight"].clone())
    assert [torch.equal(a, b) for a, b in pairwise(seen)] == [True, False, True, False]


# What a step tells


NUMBERS_CUTS = [(1, 31), (2, 31), (3, 31)]  # (slices, global batch)


def numbers(runtime: Runtime, accumulation: int, global_batch: int, **settings: Any) -> tuple[int, float | None]:
    """One step of the plain net: how many of the rank's images it had right, and the gradient's norm."""
    plan = TrainPlan(IMAGES, global_batch, 0, runtime.rank, runtime.world, accumulation)
    objective = Objective(plain_net(), MEAN, STD, torch.float32)
    call, ddp = wrap(objective, TrainConfig(compile=False), runtime)
    measure = settings.pop("measure_norm", True)
    step = make_step(call, ddp, torch.optim.SGD(objective.parameters(), lr=0.1), plan, **settings)
    result = step(make_batches(plan, 1), 1, 0.1, measure_norm=measure)
    return int(result.right), None if result.gradient_norm is None else float(result.gradient_norm)


def train_records(
    runtime: Runtime, measured: tuple[bool, bool], layers_too: bool = False, **settings: Any
) -> list[dict[str, Any]]:
    """What the meter makes of two such steps, whose learning rate is 0."""
    plan = TrainPlan(IMAGES, 31, 0, runtime.rank, runtime.world, settings.pop("accumulation", 1))
    objective = Objective(plain_net(), MEAN, STD, torch.float32)
    call, ddp = wrap(objective, TrainConfig(compile=False), runtime)
    layers = dict(objective.network.named_parameters()) if layers_too else None
    step = make_step(call, ddp, torch.optim.SGD(objective.parameters()), plan, layers=layers, **settings)
    meter = TrainMeter(runtime, plan, 8, layers=step.names)
    for measure_norm in measured:
        meter.add(*step(make_batches(plan, 1), 1, 0.0, measure_norm=measure_norm))
    return meter.flush(2, 0.0)


def expected_numbers(global_batch: int) -> tuple[int, float]:
    net, logits, labels = plain_forward(global_batch)
    right = sum(row.index(max(row)) == label for row, label in zip(logits.tolist(), labels.tolist(), strict=True))
    assert 0 < right < global_batch
    functional.cross_entropy(logits, labels).backward()
    return right, float(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]).norm())


@pytest.mark.parametrize(("accumulation", "global_batch"), NUMBERS_CUTS)
def test_a_step_counts_what_is_right_and_measures_the_gradient(accumulation: int, global_batch: int) -> None:
    right, norm = expected_numbers(global_batch)
    for clip in (None, norm / 2, norm * 2):  # measured before it is clipped
        found = numbers(ALONE, accumulation, global_batch, clip_grad_norm=clip)
        assert found == (right, pytest.approx(norm, rel=1e-5))


def test_the_gradient_is_measured_where_asked_for_or_clipped() -> None:
    assert numbers(ALONE, 1, 31, measure_norm=False)[1] is None
    assert numbers(ALONE, 1, 31, measure_norm=False, clip_grad_norm=1.0) == numbers(ALONE, 1, 31)


def test_a_record_has_the_norm_of_its_last_step_or_none() -> None:
    right, norm = expected_numbers(31)
    (record,) = train_records(ALONE, (False, True))
    assert record["loss"] == pytest.approx(written_out(31)[1] / 31, rel=1e-6)
    assert record["top1"] == pytest.approx(100 * right / 31)
    assert record["gradient_norm"] == pytest.approx(norm, rel=1e-5)
    (record,) = train_records(ALONE, (True, False))
    assert "gradient_norm" not in record


def expected_norms() -> dict[str, float]:
    """The norm of each parameter's gradient of that batch's mean loss, by autograd alone."""
    net, logits, labels = plain_forward(31)
    functional.cross_entropy(logits, labels).backward()
    return {
        name: float(p.grad.double().pow(2).sum().sqrt()) for name, p in net.named_parameters() if p.grad is not None
    }


def assert_norms(record: dict[str, Any]) -> None:
    expected = expected_norms()
    assert list(record["gradient_norms"]) == list(expected)
    assert record["gradient_norms"] == pytest.approx(expected, rel=1e-5)
    whole = sum(norm**2 for norm in record["gradient_norms"].values()) ** 0.5
    assert record["gradient_norm"] == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_record_has_each_layers_norm_before_clipping(clip: float | None, accumulation: int) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    settings = {"clip_grad_norm": clip, "accumulation": accumulation, "scaler": scaler}
    (record,) = train_records(ALONE, (False, True), layers_too=True, **settings)
    assert_norms(record)
    (record,) = train_records(ALONE, (True, False), layers_too=True)
    assert "gradient_norms" not in record


def test_layers_that_do_not_train_have_no_norm() -> None:
    net = plain_net()
    net[0].requires_grad_(False)
    plan = TrainPlan(IMAGES, 31, 0)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    step = make_step(
        Objective(net, MEAN, STD, torch.float32), None, optimizer, plan, layers=dict(net.named_parameters())
    )
    norms = step(make_batches(plan, 1), 1, 0.0, measure_norm=True).gradient_norms
    found = dict(zip(step.names, norms.tolist(), strict=True))
    expected = {name: norm for name, norm in expected_norms().items() if not name.startswith("0.")}
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("clip", [None, 0.1])
def test_measuring_layers_changes_no_bit(clip: float | None) -> None:
    runs = []
    for layers_too in (False, True):
        net = norm_net()
        plan = TrainPlan(IMAGES, 11, 0, accumulation=2)
        layers = dict(net.named_parameters()) if layers_too else None
        objective, optimizer = Objective(net, MEAN, STD, torch.float32), build_optimizer(net, OptimConfig(), 0.1)
        step = make_step(objective, None, optimizer, plan, clip_grad_norm=clip, layers=layers)
        results = [step(make_batches(plan, i), i, 0.1, measure_norm=True) for i in range(3)]
        runs.append([*(r.loss for r in results), *(r.gradient_norm for r in results), *net.state_dict().values()])
    assert_equal(*runs)


@pytest.mark.parametrize("clip", [None, 0.1])
def test_measuring_changes_no_bit(clip: float | None) -> None:
    runs = []
    for measure in (False, True):
        net = norm_net()
        optimizer = build_optimizer(net, OptimConfig(), 0.1)
        # On fp32 the scaler works everywhere; its powers of two cost no bit.
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        plan = TrainPlan(IMAGES, 11, 0, accumulation=2)
        objective = Objective(net, MEAN, STD, torch.float32)
        step = make_step(objective, None, optimizer, plan, scaler=scaler, clip_grad_norm=clip)
        losses = [step(make_batches(plan, i), i, 0.1, measure_norm=measure).loss for i in range(3)]
        runs.append([*losses, *net.state_dict().values()])
    assert_equal(*runs)


@pytest.mark.parametrize("scale", [1.0, 2.0**12])
def test_the_norm_is_of_the_unscaled_gradient(scale: float) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    assert numbers(ALONE, 2, 31, scaler=scaler)[1] == pytest.approx(expected_numbers(31)[1], rel=1e-5)


# Precision


def test_bf16_computes_in_bf16_and_keeps_fp32() -> None:
    kinds: list[torch.dtype] = []
    net = plain_net()
    net[2].register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    objective = Objective(net, MEAN, STD, torch.bfloat16)
    images, labels = pool()
    assert objective.logits(images).dtype == torch.float32
    loss, right = objective(images, labels)
    assert (loss.dtype, right.dtype) == (torch.float32, torch.int64)
    assert kinds == [torch.bfloat16] * 2
    assert {p.dtype for p in net.parameters()} == {torch.float32}

    found, loss = gradients(ALONE, 11, 2, dtype=torch.bfloat16)
    expected, expected_loss = written_out(11)
    assert {g.dtype for g in found} == {torch.float32}
    assert_close(found, expected, 0.03)
    assert loss == pytest.approx(expected_loss, rel=0.03)


def test_the_processor_has_the_last_word_on_bf16() -> None:
    cpu = torch.device("cpu")
    assert effective_precision("bf16", cpu) in ("bf16", "fp32")
    assert [effective_precision(name, cpu) for name in ("fp16", "fp32")] == ["fp16", "fp32"]
    assert effective_precision("bf16", torch.device("cuda")) == "bf16"


@pytest.fixture
def needs_fp16() -> None:
    try:
        gradients(ALONE, 4, 1, dtype=torch.float16)
    except RuntimeError as error:
        pytest.skip(f"no fp16 training on this CPU: {error}")


@pytest.mark.usefixtures("needs_fp16")
@pytest.mark.parametrize("clip", [None, 1e6])
def test_fp16_gives_the_optimizer_unscaled_gradients(clip: float | None) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    found, _ = gradients(ALONE, 11, 2, dtype=torch.float16, scaler=scaler, clip_grad_norm=clip)
    assert_close(found, written_out(11)[0], 0.01)
    assert scaler.get_scale() == 256.0


@pytest.mark.usefixtures("needs_fp16")
@pytest.mark.parametrize("clip", [None, 1.0])
def test_fp16_skips_a_step_that_overflows(clip: float | None) -> None:
    net = plain_net()
    before = [p.detach().clone() for p in net.parameters()]
    plan = TrainPlan(IMAGES, 4, 0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    optimizer = build_optimizer(net, OptimConfig(), 0.1)
    objective = Objective(net, MEAN, STD, torch.float16)
    step = make_step(objective, None, optimizer, plan, scaler=scaler, clip_grad_norm=clip)
    step(make_batches(plan, 0), 0, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))
    assert scaler.get_scale() == 2.0**39
    losses = [float(step(make_batches(plan, 0), i, 0.1).loss) for i in range(1, 40)]
    assert not torch.equal(net[0].weight, before[0])
    assert all(p.isfinite().all() for p in net.parameters())
    assert losses[-1] < losses[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU makes the host wait; needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_step_does_not_wait_for_the_device(dtype: torch.dtype, clip: float | None) -> None:
    device = torch.device("cuda")
    objective = Objective(norm_net(), MEAN, STD, dtype).to(device)
    plan = TrainPlan(IMAGES, 8, 0, accumulation=2)
    batches = [[b._replace(images=b.images.to(device), labels=b.labels.to(device)) for b in make_batches(plan, 0)]] * 6
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    optimizer, ema = (
        build_optimizer(objective.network, OptimConfig(), 0.1),
        Ema(objective.network, EmaConfig(decay=0.9999)),
    )
    step = make_step(objective, None, optimizer, plan, scaler=scaler, ema=ema, clip_grad_norm=clip)
    for i in range(3):
        step(batches[i], i, 0.1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(3, 6):
            step(batches[i], i, 0.1, measure_norm=i > 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Several ranks


@dataclass
class Small:
    """A run of the net with batch norm, put together as train.py does."""

    plan: TrainPlan
    net: nn.Module
    ema: Ema
    optimizer: torch.optim.Optimizer
    state: TrainState
    step: TrainStep

    def train(self, first: int, last: int) -> None:
        for i in range(first, last):
            self.step(make_batches(self.plan, i), i, 0.1)


def small_run(runtime: Runtime, accumulation: int = 2, **options: Any) -> Small:
    plan = TrainPlan(IMAGES, 14, 0, runtime.rank, runtime.world, accumulation)
    objective = Objective(norm_net(), MEAN, STD, torch.float32)
    call, ddp = wrap(objective, TrainConfig(compile=False), runtime)
    if ddp is not None:
        warm_up(call, ddp, objective, plan.slice_sizes, SIZE, runtime.device)
    optimizer = build_optimizer(objective.network, OptimConfig(nesterov=True), 0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    ema = Ema(objective.network, EmaConfig(decay=0.8))
    state = TrainState(objective.network, optimizer, scaler, ema, runtime, **options)
    return Small(plan, objective.network, ema, optimizer, state, make_step(call, ddp, optimizer, plan, ema=ema))


def copied(value: Any) -> Any:
    """By way of a file: what a checkpoint holds, and nothing that training changes later."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def own(run: Small) -> dict[str, Any]:
    """This rank's tensors as they are."""
    moments = [run.optimizer.state[p]["momentum_buffer"] for g in run.optimizer.param_groups for p in g["params"]]
    return copied({"model": run.net.state_dict(), "ema": run.ema.state_dict(), "moments": moments})


def on_rank(runtime: Runtime) -> dict[str, Any]:
    """All that the tests below look at, in one start of the ranks."""
    found: dict[str, Any] = {"gradients": {cut: gradients(runtime, *cut) for cut in CUTS}}
    found["numbers"] = [numbers(runtime, *cut) for cut in NUMBERS_CUTS]
    found["records"] = train_records(runtime, (False, True))
    found["layers"] = train_records(runtime, (False, True), layers_too=True)
    run = small_run(runtime)
    run.train(0, 3)
    found["own"], found["weights"] = own(run), copied(run.state.weights())
    assert_equal(own(run), found["own"])  # reading the mean leaves the rank's own alone
    found["allocated"] = {}
    for name, call in (("weights", run.state.weights), ("capture", run.state.capture)):
        with Largest() as largest:
            call()
        found["allocated"][name] = largest.elements
    found["captured"] = copied(run.state.capture())
    captured = from_rank_0(found["captured"])
    run.train(3, 5)
    found["end"] = own(run)

    again = small_run(runtime)
    again.train(0, 1)  # something else than what is restored
    again.state.restore(copied(captured))
    found["restored"] = own(again)
    again.train(3, 5)
    found["end again"] = own(again)

    fewer = small_run(runtime)
    fewer.state.restore(captured | {"statistics": captured["statistics"][1:]})  # as one rank less would have saved
    found["from another world"] = own(fewer)

    many = small_run(runtime, rows_up_to=runtime.world - 1)
    many.train(0, 3)
    found["many"] = {"exact": [run.state.continues_exactly, many.state.continues_exactly]}
    with Largest() as largest:
        many.state.capture()
    found["many"]["allocated"], found["many"]["captured"] = largest.elements, copied(many.state.capture())
    again = small_run(runtime, rows_up_to=runtime.world - 1)
    again.state.restore(from_rank_0(found["many"]["captured"]))
    found["many"]["restored"] = own(again)
    again.train(3, 5)
    found["many"]["end"] = own(again)
    return found


class Largest(TorchDispatchMode):
    """Counts the elements of the largest tensor that any operation makes, views left out."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, tensor.numel())
        return made


def from_rank_0(value: Any) -> Any:
    """What rank 0 has, as all ranks read a checkpoint that it wrote."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def assert_equal(a: Any, b: Any) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_equal(a[key], b[key])
    else:
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)


# Floats of the net's and the average's statistics.
STATISTICS = [key for key in norm_net().state_dict() if key.endswith(("running_mean", "running_var"))]
COUNT = 2 * sum(norm_net().state_dict()[key].numel() for key in STATISTICS)


def is_statistic(key: str) -> bool:
    return key.endswith(("running_mean", "running_var"))


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(tmp_path_factory.mktemp("ranks"), request.param, on_rank)


@pytest.mark.parametrize("cut", CUTS)
def test_uneven_shares_give_the_global_mean(ranks: list[dict[str, Any]], cut: tuple[int, int]) -> None:
    expected, expected_loss = written_out(cut[0])
    for rank in ranks:
        assert_close(rank["gradients"][cut][0], expected)
        assert_equal(rank["gradients"][cut][0], ranks[0]["gradients"][cut][0])
    assert sum(rank["gradients"][cut][1] for rank in ranks) == pytest.approx(expected_loss, rel=1e-6)


def test_ranks_count_their_own_and_measure_the_whole_gradient(ranks: list[dict[str, Any]]) -> None:
    for k, (_, global_batch) in enumerate(NUMBERS_CUTS):
        right, norm = expected_numbers(global_batch)
        counts, norms = zip(*(rank["numbers"][k] for rank in ranks), strict=True)
        assert sum(counts) == right
        assert set(norms) == {norms[0]}
        assert norms[0] == pytest.approx(norm, rel=1e-5)


def test_a_record_is_of_all_ranks(ranks: list[dict[str, Any]]) -> None:
    right, norm = expected_numbers(31)
    for rank in ranks:
        (record,) = rank["records"]
        assert record["loss"] == pytest.approx(written_out(31)[1] / 31, rel=1e-6)
        assert record["top1"] == pytest.approx(100 * right / 31)
        assert record["gradient_norm"] == pytest.approx(norm, rel=1e-5)


def test_each_layers_norm_is_of_the_whole_batch(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["layers"] == [{**rank["layers"][0], "gradient_norms": ranks[0]["layers"][0]["gradient_norms"]}]
        assert_norms(rank["layers"][0])


@pytest.mark.parametrize("when", ["own", "end"])
def test_ranks_share_weights_and_not_statistics(ranks: list[dict[str, Any]], when: str) -> None:
    first = ranks[0][when]
    for rank in ranks[1:]:
        assert_equal(rank[when]["moments"], first["moments"])
        for which in ("model", "ema"):
            for key, value in rank[when][which].items():
                assert torch.equal(value, first[which][key]) != is_statistic(key), key


def test_readers_get_the_mean_of_the_statistics(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert_equal(rank["weights"], ranks[0]["weights"])
        for which, saved in SAVED_AS.items():
            assert_equal(rank["captured"][saved], rank["weights"][which])
            for key, value in rank["weights"][which].items():
                mean = sum(r["own"][which][key] for r in ranks) / len(ranks)
                if is_statistic(key):
                    torch.testing.assert_close(value, mean, atol=1e-6, rtol=1e-6)
                else:
                    assert torch.equal(value, rank["own"][which][key]), key


def test_a_capture_is_the_same_on_all_ranks_and_rows_are_on_the_first(ranks: list[dict[str, Any]]) -> None:
    rows = ranks[0]["captured"]["statistics"]
    assert rows.shape == (len(ranks), COUNT)
    for number, rank in enumerate(ranks):
        for part in ("model", "model_ema"):
            assert_equal(rank["captured"][part], ranks[0]["captured"][part])
        own = [rank["own"][which][key].flatten() for which in SAVED_AS for key in STATISTICS]
        assert torch.equal(torch.cat(own), rows[number])
        if number > 0:
            assert rank["captured"]["statistics"].shape == (0, COUNT)


def test_the_mean_does_not_depend_on_the_order_of_the_ranks(ranks: list[dict[str, Any]]) -> None:
    rows = ranks[0]["captured"]["statistics"].double()
    saved = [ranks[0]["captured"][name][key].flatten() for name in SAVED_AS.values() for key in STATISTICS]
    for order in (rows, rows.flip(0)):
        total = torch.zeros(COUNT, dtype=torch.float64)
        for row in order:
            total += row
        assert torch.equal(torch.cat(saved), (total / len(rows)).float())


def test_no_rank_but_the_first_holds_all_statistics(ranks: list[dict[str, Any]]) -> None:
    all_of_them = len(ranks) * COUNT
    assert ranks[0]["allocated"]["capture"] == all_of_them  # or the next lines would say nothing
    for rank in ranks:
        assert rank["allocated"]["weights"] < all_of_them
        assert rank["many"]["allocated"] < all_of_them
    for rank in ranks[1:]:
        assert rank["allocated"]["capture"] < all_of_them


def test_many_ranks_keep_the_mean_alone(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        many = rank["many"]
        assert many["exact"] == [True, False]
        assert many["captured"]["statistics"].shape == (0, COUNT)
        for which, saved in SAVED_AS.items():
            assert_equal(many["captured"][saved], rank["captured"][saved])
            assert_equal(many["restored"][which], many["captured"][saved])
        assert_equal(many["restored"]["moments"], rank["own"]["moments"])
        assert_equal(many["end"]["moments"], ranks[0]["many"]["end"]["moments"])


def test_as_many_ranks_continue_to_the_bit(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert_equal(rank["restored"], rank["own"])
        assert_equal(rank["end again"], rank["end"])


def test_another_number_of_ranks_continues_with_the_mean(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for which, saved in SAVED_AS.items():
            assert_equal(rank["from another world"][which], rank["captured"][saved])
        assert_equal(rank["from another world"]["moments"], rank["own"]["moments"])
    alone = small_run(ALONE)
    alone.state.restore(ranks[0]["captured"])
    assert_equal(own(alone)["model"], ranks[0]["captured"]["model"])
    assert_equal(own(alone)["ema"], ranks[0]["captured"]["model_ema"])


# The state of one process


def test_one_process_continues_to_the_bit() -> None:
    run = small_run(ALONE)
    run.train(0, 3)
    captured, expected = copied(run.state.capture()), own(run)
    again = small_run(ALONE)
    again.state.restore(captured)
    assert_equal(own(again), expected)
    run.train(3, 6)
    again.train(3, 6)
    assert_equal(own(again), own(run))


def test_changed_options_of_the_optimizer_hold_after_a_restart() -> None:
    """Restoring must not bring back the old ones, which the user was told have changed."""
    run = small_run(ALONE)
    run.train(0, 1)
    captured = copied(run.state.capture())
    net = norm_net()
    optimizer = build_optimizer(net, OptimConfig(momentum=0.5, weight_decay=0.3), 0.7)
    state = TrainState(net, optimizer, torch.amp.GradScaler("cpu", enabled=False), None, ALONE)
    state.restore(captured)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert [(g["momentum"], g["nesterov"], g["lr"]) for g in optimizer.param_groups] == [(0.5, False, 0.7)] * 2
    buffer = optimizer.state[net.conv1.weight]["momentum_buffer"]
    assert torch.equal(buffer, run.optimizer.state[run.net.conv1.weight]["momentum_buffer"])


def test_an_average_may_begin_or_end_with_a_restart() -> None:
    run = small_run(ALONE)
    run.train(0, 2)
    captured = copied(run.state.capture())
    net = norm_net()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    without = TrainState(net, build_optimizer(net, OptimConfig(), 0.1), scaler, None, ALONE)
    without.restore(captured)
    assert_equal(copied(net.state_dict()), captured["model"])
    assert "ema" not in without.weights()

    begun = small_run(ALONE)
    begun.state.restore(copied(without.capture()))
    assert_equal(copied(begun.ema.state_dict()), captured["model"])


@pytest.mark.parametrize(("before", "after"), [(False, True), (True, False), (True, True)])
def test_precision_may_change_with_a_restart(before: bool, after: bool) -> None:
    states, scalers = [], []
    for enabled, scale in ((before, 64.0), (after, 8.0)):
        net = norm_net()
        scalers.append(torch.amp.GradScaler("cpu", enabled=enabled, init_scale=scale))
        optimizer = build_optimizer(net, OptimConfig(), 0.1)
        states.append(TrainState(net, optimizer, scalers[-1], None, ALONE))
    states[1].restore(copied(states[0].capture()))
    assert scalers[1].is_enabled() == after
    if after:
        assert scalers[1].get_scale() == (64.0 if before else 8.0)


def test_warming_up_leaves_no_trace() -> None:
    net = norm_net()
    objective = Objective(net, MEAN, STD, torch.float32)
    before = copied(objective.state_dict() | dict(objective.named_buffers()))
    warm_up(objective, None, objective, (4, 3), SIZE, torch.device("cpu"))
    assert_equal(copied(objective.state_dict() | dict(objective.named_buffers())), before)
    assert all(p.grad is None for p in net.parameters())
