"""The networks: torchvision's to the bit, the paper's counts, and what plain, stem and zero gamma mean."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from distrib.config import ModelConfig, UserError
from distrib.models import MODEL_NAMES, build_model
from distrib.models.resnet import BasicBlock, Bottleneck

SMALL = {"resnet20": 0.27, "resnet32": 0.46, "resnet44": 0.66, "resnet56": 0.85, "resnet110": 1.7}
CARDINALITY = {"resnext29_1x16d": (16, 1), "resnext29_2x10d": (20, 2), "resnext29_4x6d": (24, 4)}  # C × d, C
TORCHVISION = [name for name in MODEL_NAMES if name not in SMALL and name not in CARDINALITY]


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def build(name: str, **settings: Any) -> nn.Module:
    return build_model(ModelConfig(name=name, **{"num_classes": 1000, **settings}))


def theirs(name: str, **settings: Any) -> nn.Module:
    return torchvision.models.get_model(name, weights=None, **settings)


def blocks(net: nn.Module) -> list[Any]:
    return [module for module in net.modules() if isinstance(module, BasicBlock | Bottleneck)]


def randomise_norms(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            module.running_mean = 0.1 * torch.randn(module.num_features)
            module.running_var = 0.5 + torch.rand(module.num_features)


def test_names_cover_torchvision() -> None:
    registered = torchvision.models.list_models(torchvision.models)
    assert sorted(TORCHVISION) == [name for name in registered if name.startswith(("resne", "wide_resnet"))]


@pytest.mark.parametrize("name", TORCHVISION)
def test_equals_torchvision(name: str) -> None:
    reference = theirs(name, num_classes=10)
    randomise_norms(reference)
    state = reference.state_dict()
    with torch.device("meta"):
        net = build(name, num_classes=10)
    assert [(key, value.shape) for key, value in net.state_dict().items()] == [
        (key, value.shape) for key, value in state.items()
    ]
    assert [key for key, _ in net.named_parameters()] == [key for key, _ in reference.named_parameters()]
    net.load_state_dict(state, strict=True, assign=True)
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        logits = net.eval()(images)
        assert torch.equal(logits, reference.eval()(images))
    assert logits.isfinite().all()
    assert not torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
def test_trains_as_torchvision(name: str) -> None:
    reference, net = theirs(name, num_classes=10), build(name, num_classes=10)
    net.load_state_dict(reference.state_dict())
    images = torch.randn(4, 3, 64, 64)
    for model in (net, reference):
        model.train()(images).square().mean().backward()
    grads = dict(reference.named_parameters())
    for key, parameter in net.named_parameters():
        ours, other = parameter.grad, grads[key].grad
        assert ours is not None, key
        assert other is not None, key
        assert torch.equal(ours, other), key
    for key, value in reference.state_dict().items():  # the running statistics moved alike
        assert torch.equal(net.state_dict()[key], value), key


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_same_seed_same_initialisation_as_torchvision(name: str, zero: bool) -> None:
    torch.manual_seed(7)
    reference = theirs(name, zero_init_residual=zero).state_dict()
    torch.manual_seed(7)
    net = build(name, zero_init_residual=zero).state_dict()
    assert all(torch.equal(net[key], reference[key]) for key in reference)


@pytest.mark.parametrize(("name", "millions"), SMALL.items())
def test_small_nets_have_the_papers_parameters(name: str, millions: float) -> None:
    net = build(name, num_classes=10)
    count = sum(parameter.numel() for parameter in net.parameters()) / 1e6
    assert round(count, 1 if name == "resnet110" else 2) == millions
    assert not any("downsample" in key for key in net.state_dict())


@pytest.mark.parametrize(("name", "inner", "groups"), [(name, *sizes) for name, sizes in CARDINALITY.items()])
def test_narrow_resnexts_have_the_groups_that_they_are_called_after(name: str, inner: int, groups: int) -> None:
    net = build(name, num_classes=10)
    for k, block in enumerate(blocks(net)):
        width = inner * 2 ** (k // 3)
        assert block.conv2.weight.shape == (width, width // groups, 3, 3)
        assert block.conv2.groups == groups
        assert block.conv3.weight.shape == (64 * 2 ** (k // 3), width, 1, 1)
    assert net(torch.zeros(2, 3, 16, 16)).shape == (2, 10)


def test_more_groups_cost_no_parameters() -> None:
    # Of a block behind the first one, with D channels in C groups within a width of 64: 2·64·D + 9·D²/C.
    ours, counted = [], []
    for name, (inner, groups) in CARDINALITY.items():
        ours.append(2 * 64 * inner + 9 * inner**2 // groups)
        block = blocks(build(name))[1]
        assert sum(conv.weight.numel() for conv in (block.conv1, block.conv2, block.conv3)) == ours[-1]
        counted.append(sum(p.numel() for p in build(name, num_classes=10).parameters()))
    assert max(ours) / min(ours) < 1.004
    assert max(counted) / min(counted) < 1.013


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_depth_is_the_name(name: str) -> None:
    with torch.device("meta"):
        net = build(name)
    layers = [key for key, module in net.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    depth = "".join(c for c in name.split("_resnet")[-1].split("_")[0] if c.isdigit())
    assert sum("downsample" not in key for key in layers) == int(depth)


def test_option_a_shortcut_subsamples_and_pads_with_zeros() -> None:
    shortcut = blocks(build("resnet20"))[3].downsample
    for size in (8, 7):
        x = torch.randn(2, 16, size, size).to(memory_format=torch.channels_last)
        y = shortcut(x)
        assert torch.equal(y[:, :16], x[:, :, ::2, ::2])
        assert y.shape[1] == 32
        assert y[:, 16:].count_nonzero() == 0
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet20"])
def test_plain_twin_has_no_shortcut(name: str) -> None:
    """With its last gamma at zero a block passes nothing on, unless there is a shortcut."""
    passed: dict[bool, list[bool]] = {}
    for plain in (False, True):
        net = build(name, plain=plain, zero_init_residual=False)
        passed[plain] = []
        for block in blocks(net):
            nn.init.zeros_(block.last_norm.weight)
            passed[plain].append(bool(block(torch.rand(2, block.conv1.in_channels, 8, 8)).count_nonzero()))
    assert all(passed[False])
    assert not any(passed[True])


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet20"])
def test_plain_twin_has_the_same_layers(name: str) -> None:
    state, plain = build(name).state_dict(), build(name, plain=True).state_dict()
    assert {key: value.shape for key, value in plain.items()} == {
        key: value.shape for key, value in state.items() if "downsample" not in key
    }


def test_plain_twin_ignores_zero_gamma() -> None:
    net = build("resnet20", plain=True, zero_init_residual=True)
    assert all(bool((m.weight == 1).all()) for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    logits = net(torch.randn(2, 3, 32, 32))
    assert not torch.allclose(logits[0], logits[1])


@pytest.mark.parametrize("name", ["resnet20", "resnet50"])
def test_zero_gamma_makes_each_block_its_shortcut(name: str) -> None:
    for block in blocks(build(name, zero_init_residual=True)):
        x = torch.randn(2, block.conv1.in_channels, 8, 8)
        assert torch.equal(block(x), block.downsample(x).relu())
        assert bool((block.bn1.weight == 1).all())


@pytest.mark.parametrize(
    ("name", "stem", "sizes"),
    [
        ("resnet18", None, [8, 4, 2, 1]),
        ("resnet18", "imagenet", [8, 4, 2, 1]),
        ("resnet18", "small", [32, 16, 8, 4]),
        ("resnet50", "small", [32, 16, 8, 4]),
        ("resnet20", None, [32, 16, 8]),
        ("resnet20", "imagenet", [8, 4, 2]),
    ],
)
def test_stem_sets_the_resolution(name: str, stem: str | None, sizes: list[int]) -> None:
    net, seen = build(name, stem=stem, num_classes=10), []

    def note(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(output.shape[-1])

    for key, child in net.named_children():
        if key.startswith("layer"):
            child.register_forward_hook(note)
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert seen == sizes
    assert net.get_submodule("conv1").kernel_size == ((3, 3) if sizes[0] == 32 else (7, 7))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resnet51", "did you mean 'resnet5"),
        ("ResNeXt50_32x4d", "did you mean 'resnext50_32x4d'?"),
        ("resnext50", "did you mean 'resne"),
        ("efficientnet_b0", "there are resnet18, "),
        ("densenet121", "there are resnet18, "),
        ("", "there are resnet18, "),
    ],
)
def test_unknown_name(name: str, hint: str) -> None:
    with pytest.raises(UserError) as error:
        build(name)
    message = str(error.value)
    assert message.startswith(f"model.name {name!r} is not a network; {hint}")
    assert "\n" not in message


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d", "resnet20"])
def test_channels_last_bf16(name: str, plain: bool) -> None:
    net = build(name, num_classes=10, plain=plain).to(memory_format=torch.channels_last)
    layouts = []
    for block in blocks(net):
        block.register_forward_hook(
            lambda _m, _i, out: layouts.append((out.dtype, out.is_contiguous(memory_format=torch.channels_last)))
        )
    images = torch.randn(4, 3, 64, 64).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        loss = nn.functional.cross_entropy(net(images), torch.arange(4))
    loss.backward()
    assert set(layouts) == {(torch.bfloat16, True)}
    for key, parameter in net.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
