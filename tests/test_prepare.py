"""distrib.engine.prepare: how a device computes, what DDP is told, and what is found before training begins."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_step import MEAN, STD, make_batches, make_step, norm_net
from torch import nn

from distrib.config import ModelConfig, OptimConfig, TrainConfig, UserError
from distrib.data import TrainPlan
from distrib.engine import prepare
from distrib.engine.prepare import DTYPES, Objective, check_batch_norm, effective_precision, set_up_device, wrap
from distrib.models import MODEL_NAMES, build_model
from distrib.optim import build_optimizer
from distrib.runtime import Runtime

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)

pytestmark = pytest.mark.usefixtures("one_thread")


# The device


def settings() -> dict[str, Any]:
    cudnn = torch.backends.cudnn
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": (cudnn.benchmark, cudnn.deterministic),
        "limit": cudnn.benchmark_limit,
        "tf32": (torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,
        "cublas": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }


@pytest.fixture
def as_before() -> Iterator[None]:
    import torch._inductor.config as inductor

    cudnn, kept, compiler = torch.backends.cudnn, settings(), inductor.deterministic
    yield
    torch.use_deterministic_algorithms(kept["deterministic"])
    cudnn.benchmark, cudnn.deterministic = kept["cudnn"]
    cudnn.benchmark_limit = kept["limit"]
    torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32 = kept["tf32"]
    torch.utils.deterministic.fill_uninitialized_memory = kept["fill"]
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    if kept["cublas"] is not None:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = kept["cublas"]
    inductor.deterministic = compiler


@pytest.mark.usefixtures("as_before")
def test_precision_says_what_fp32_means_on_a_gpu() -> None:
    """Matrices and convolutions alike; a 16-bit run leaves torch's own setting alone."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    for precision, tf32, in_torchs_words in (("tf32", True, "high"), ("fp32", False, "highest")):
        for before in (True, False):
            matmul.allow_tf32, cudnn.allow_tf32 = before, before
            set_up_device(GPU, precision, deterministic=False)
            assert settings()["tf32"] == (tf32, tf32)
            assert torch.get_float32_matmul_precision() == in_torchs_words
            assert (matmul.fp32_precision == "tf32", cudnn.conv.fp32_precision == "tf32") == (tf32, tf32)
    for precision in ("bf16", "fp16"):
        for before in ((True, False), (False, True)):
            matmul.allow_tf32, cudnn.allow_tf32 = before
            set_up_device(GPU, precision, deterministic=False)
            assert settings()["tf32"] == before


@pytest.mark.usefixtures("as_before")
def test_deterministic_is_the_opposite_of_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config as inductor

    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":8192:2")  # one that torch would refuse later
    set_up_device(GPU, "bf16", deterministic=True)
    found = settings()
    assert (found["deterministic"], found["cudnn"], found["cublas"]) == (True, (False, True), ":4096:8")
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert inductor.deterministic
    assert not found["fill"]
    set_up_device(GPU, "bf16", deterministic=False)
    found = settings()
    assert (found["deterministic"], found["cudnn"], found["limit"]) == (False, (True, False), 0)
    assert not inductor.deterministic


@pytest.mark.usefixtures("as_before")
def test_on_a_cpu_deterministic_changes_no_bit() -> None:
    kept, runs = settings(), []
    for deterministic in (False, True):
        set_up_device(CPU, "fp32", deterministic)
        objective = Objective(norm_net(), MEAN, STD, torch.float32)
        plan = TrainPlan(40, 12, 0, accumulation=2)
        step = make_step(objective, None, build_optimizer(objective.network, OptimConfig(), 0.1), plan)
        losses = [step(make_batches(plan, i), i, 0.1).loss for i in range(3)]
        runs.append([*losses, *(value.clone() for value in objective.state_dict().values())])
        assert settings() == {**kept, "deterministic": deterministic, "fill": False}
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_every_precision_has_a_type_and_a_processor() -> None:
    assert set(DTYPES) == set(TrainConfig.model_fields["precision"].annotation.__args__)  # type: ignore[union-attr]
    for precision in DTYPES:
        assert effective_precision(precision, GPU) == precision
        assert effective_precision(precision, CPU) in {precision, "fp32"}
    assert effective_precision("tf32", CPU) == "fp32"


# DDP


@pytest.mark.parametrize("names", [("broadcast_buffers",), ("broadcast_buffers", "forward_sync_buffers")])
def test_buffers_stay_each_ranks_own_by_the_name_that_torch_knows(
    names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    class Old(nn.Module):
        def __init__(self, module: Any, device_ids: Any, gradient_as_bucket_view: bool, broadcast_buffers: Any = None):
            super().__init__()
            given.update(broadcast_buffers=broadcast_buffers)

    class New(Old):
        def __init__(self, *args: Any, forward_sync_buffers: Any = None, broadcast_buffers: Any = None, **kwargs: Any):
            super().__init__(*args, **kwargs)
            given.update(forward_sync_buffers=forward_sync_buffers, broadcast_buffers=broadcast_buffers)

    monkeypatch.setattr(prepare, "DistributedDataParallel", New if len(names) > 1 else Old)
    two = Runtime(0, 2, 0, 2, CPU)
    wrap(Objective(norm_net(), MEAN, STD, torch.float32), TrainConfig(compile=False), two)
    assert given == {**dict.fromkeys(names), names[-1]: False}


# Batch norm


def trains(network: nn.Module, images: int, size: int) -> bool:
    """Whether torch itself takes a step of that shape."""
    try:
        network(torch.zeros(images, 3, size, size)).sum().backward()
    except ValueError:  # expected more than 1 value per channel
        return False
    return True


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("size", [1, 2, 4, 8, 32, 33, 64])
@pytest.mark.parametrize("name", ["resnet18", "resnet20"])
def test_a_norm_of_one_value_is_found_where_torch_would_raise(name: str, size: int, images: int) -> None:
    network = build_model(ModelConfig(name=name, num_classes=3))
    before = copy.deepcopy(network.state_dict())
    try:
        check_batch_norm(network, images, size)
        passed = True
    except UserError as error:
        passed = False
        text = str(error)
        assert "\n" not in text
        for key in ("train.global_batch", "train.micro_batch", f"data.size {size}"):
            assert key in text
        assert any(f" {norm} " in text for norm, _ in network.named_modules() if "bn" in norm)
    for key, value in network.state_dict().items():  # no trace
        assert torch.equal(value, before[key])
    assert not any(module._forward_pre_hooks for module in network.modules())
    assert all(p.device == CPU and p.grad is None for p in network.parameters())
    assert passed == trains(network, images, size)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet20"])  # the others differ in depth and width
def test_no_network_is_too_deep_for_an_image_of_one_pixel(name: str) -> None:
    with torch.device("meta"):
        network = build_model(ModelConfig(name=name, num_classes=3))
        assert network(torch.empty(2, 3, 1, 1)).shape == (2, 3)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_above_the_largest_stride_no_norm_sees_a_single_pixel(name: str) -> None:
    """``check_batch_norm`` does not look there."""
    seen: list[int] = []
    with torch.device("meta"):
        network = build_model(ModelConfig(name=name, num_classes=3))
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.register_forward_hook(lambda norm, inputs, output: seen.append(output[0, 0].numel()))
        side = prepare.LARGEST_STRIDE + 1
        network(torch.empty(1, 3, side, side))
    assert min(seen) > 1


def test_a_norm_that_does_not_train_needs_no_variance() -> None:
    check_batch_norm(build_model(ModelConfig(name="resnet18", num_classes=1000)).eval(), 1, 32)


def test_two_slices_of_different_size_are_judged_by_the_smaller() -> None:
    plan = TrainPlan(100, 7, 0, rank=1, world=2, accumulation=3)  # 1, 1, 1 and 1, 1, 2
    assert (plan.smallest_slice, plan.largest_slice) == (1, 2)
    with pytest.raises(UserError, match="single value a channel"):
        check_batch_norm(build_model(ModelConfig(name="resnet18", num_classes=1000)), plan.smallest_slice, 32)
