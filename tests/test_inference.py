"""Folded networks give what the trained ones give; a stage's features are the mean of its activations."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import nn

from distrib.config import ModelConfig
from distrib.engine.inference import Classifier, fold, stages
from distrib.models import MODEL_NAMES, build_model

MEAN, STD = (120.0, 115.0, 100.0), (58.0, 57.0, 56.0)


def trained(name: str = "resnet18", **options: object) -> nn.Module:
    """A network whose norms do something, in double precision where folding must not show."""
    torch.manual_seed(0)
    network = build_model(ModelConfig(name=name, num_classes=10, **options)).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
    return network


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_folding_changes_nothing_but_rounding(name: str) -> None:
    network = trained(name).double()
    before = copy.deepcopy(network.state_dict())
    folded = fold(network)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(folded(images), network(images), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("folded", [False, True])
def test_features_are_the_stages_means(folded: bool) -> None:
    network = trained()
    theirs = torchvision.models.resnet18(num_classes=10).eval()
    theirs.load_state_dict(network.state_dict())
    seen: dict[str, torch.Tensor] = {}
    for name in ("relu", "layer1", "layer2", "layer3", "layer4", "fc"):
        getattr(theirs, name).register_forward_hook(lambda module, given, out, name=name: seen.setdefault(name, out))
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    classifier = Classifier(fold(network) if folded else network, MEAN, STD)
    normalised = (images.float() - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    seen.clear()
    with torch.inference_mode():
        logits = theirs(normalised)
        assert stages(network) == ["conv1", "layer1", "layer2", "layer3", "layer4", "fc"]
        for stage in stages(network):
            there = seen["relu" if stage == "conv1" else stage]
            wanted = there.mean((2, 3)) if there.ndim == 4 else there
            torch.testing.assert_close(classifier.features(images, stage), wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(classifier.logits(images), logits, rtol=1e-4, atol=1e-5)


def test_sixteen_bits_are_near() -> None:
    network = trained()
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    exact, fast = Classifier(copy.deepcopy(network), MEAN, STD), Classifier(fold(network), MEAN, STD, torch.bfloat16)
    with torch.inference_mode():
        wanted, found, folded = (each.logits(images) for each in (exact, fast, Classifier(fold(network), MEAN, STD)))
    for name, logits in (("folded", folded), ("folded, bf16", found)):
        print(f"{name}: {(logits - wanted).abs().max() / wanted.abs().max():.1e} of the largest logit")
    assert found.dtype == torch.float32
    assert not torch.equal(found, wanted)
    assert (found - wanted).abs().max() < 0.03 * wanted.abs().max()
