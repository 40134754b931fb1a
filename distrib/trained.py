"""A network with its weights, from a run or from anybody's file: what the tools begin with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from distrib.cli import change_config
from distrib.config import Config, ModelConfig, UserError, settled
from distrib.engine.inference import Classifier, fold
from distrib.engine.prepare import DTYPES, effective_precision, set_up_device
from distrib.follow import follow_names
from distrib.keys import find_kind
from distrib.layout import imagenet
from distrib.layout.folders import shown
from distrib.models import build_model
from distrib.weights import HEAD, fit, identify, is_torchvisions, read_weights


@dataclass(frozen=True)
class Trained:
    """A network, filled.

    Attributes:
        network: on the CPU, in evaluation mode.
        config: the run's; for other weights the defaults of their network.
        classes: names of the outputs, in order, where the weights know them.
        source: what was loaded, for messages.
    """

    network: nn.Module
    config: Config
    classes: tuple[str, ...] | None
    source: str

    @property
    def outputs(self) -> int:
        """How many classes the network tells apart."""
        return settled(self.config.model.num_classes)

    @property
    def is_imagenets(self) -> bool:
        """Whether the outputs are ImageNet's 1,000 classes, which files of other trainers do not say."""
        return self.outputs == len(imagenet.wnids()) and self.classes in (None, imagenet.wnids())

    def names(self) -> tuple[str, ...] | None:
        """The outputs' class folders, in order: the weights' own, or ImageNet's; None where nobody knows them."""
        return imagenet.wnids() if self.is_imagenets else self.classes

    def labels(self) -> list[str]:
        """The class of each output, as its folder is called, or its number where nobody knows a name."""
        names = self.names()
        return [str(k) for k in range(self.outputs)] if names is None else list(names)

    def titles(self) -> list[str]:
        """What a person calls each output."""
        return [imagenet.title(name) for name in self.labels()]


def open_trained(
    text: str, model: str | None, overrides: Sequence[str], notify: Callable[[str], None] = print
) -> Trained:
    """Loads what ``text`` names: a run's folder (its best), a file, or torchvision's name of weights of ``model``.

    Args:
        model: the network's name; None: what the weights fit.
        overrides: ``key=value`` words that change the run's configuration.

    Raises:
        UserError: there are no such weights, no network here that they fit, or ``overrides`` ask for another one.
    """
    if model is not None:
        with torch.device("meta"):  # looks at the name
            build_model(ModelConfig(name=model, num_classes=1))
    elif is_torchvisions(text):
        raise UserError(f"torchvision has {text} for several networks: add --model, as in --model resnet50")
    weights = read_weights(text, model or "", notify)
    own = _config(weights.config)
    config = own or Config()
    asked = config.model.model_copy(update={"weights": None} | ({"name": model} if model else {}))
    told = model is None and own is not None and "model" in weights.config and asked.num_classes != "auto"
    found = asked if told else identify(weights, asked)
    if found is None:
        raise UserError(f"the weights {weights.source} are of a network that is not here (distrib models lists them)")
    if HEAD[0] not in weights.state:
        raise UserError(f"the weights {weights.source} have no last layer: there is nothing to tell classes apart")
    if model is not None and found.name != model:
        raise UserError(f"the weights {weights.source} are of {found.name}, not {model}: leave --model out")
    config = follow_names(change_config(config.model_copy(update={"model": found}), overrides))
    for key in ("name", "num_classes", "stem", "plain"):
        if getattr(config.model, key) != getattr(found, key):
            raise UserError(
                f"the weights {weights.source} are of model.{key}={getattr(found, key)}, not "
                f"{getattr(config.model, key)}: leave it out"
            )
    with torch.device("meta"):  # all numbers come from the weights: none are drawn before
        network = build_model(config.model)
    # Not by to_empty, which imports sympy. Zeros, as older weights lack the norms' counters.
    network._apply(lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype))
    fit(network, weights, config.model, weights.classes)
    return Trained(network.eval(), config, weights.classes, weights.source)


def for_use(trained: Trained, device: torch.device, exact: bool = False) -> Classifier:
    """The network as predictions need it, on ``device``.

    Args:
        exact: in fp32 with its batch norms, as trained; else folded, and in 16 bits where the device is fast in them.
    """
    precision = "fp32" if exact else effective_precision("bf16", device)
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        precision = "fp16"
    network = trained.network if exact else fold(trained.network)
    cfg = trained.config.data
    return Classifier(network, cfg.mean, cfg.std, DTYPES[precision]).eval().requires_grad_(False).to(device)


def begin_use(trained: Trained, exact: bool, notify: Callable[[str], None]) -> tuple[Classifier, torch.device]:
    """The network as ``for_use`` gives it, on this machine's GPU or else its CPU, with kernels that give the same bits
    each time; ``notify`` hears of its arithmetic.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    classifier = for_use(trained, device, exact)
    if device.type == "cuda":  # a CPU has no others, and torch's switch imports its compiler, for 2 s
        set_up_device(device, "fp32" if classifier.dtype == torch.float32 else "bf16", deterministic=True)
    notify(f"{trained.source}: {trained.config.model.name}, {trained.outputs} classes; {arithmetic(classifier, exact)}")
    return classifier, device


def arithmetic(classifier: Classifier, exact: bool) -> str:
    """In what ``classifier`` computes: "bf16, folded"."""
    name = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[classifier.dtype]
    return f"{name}, " + ("as trained" if exact else "batch norms folded (--exact: fp32, as trained)")


def output_of(folders: Sequence[str], trained: Trained) -> list[int]:
    """For each class folder the network's output that is meant.

    ImageNet's are told by id or by number, and may be any of the 1,000.

    Raises:
        UserError: a folder is none of the network's classes, or their number differs where it knows no names.
    """
    if trained.is_imagenets:
        if (found := imagenet.outputs(folders)) is not None:
            return found
        strange = [name for name in folders if name not in imagenet.wnids()]
        if len(strange) < len(folders):  # some are told by id, and the order of such a mixture tells nothing
            more = f", nor are {len(strange) - 1} more" if strange[1:] else ""
            raise UserError(
                f"the class folder {shown(strange[0])} is none of ImageNet's 1,000{more}: leave it out (data.classes)"
            )
    if trained.classes is None:
        if len(folders) != trained.outputs:
            raise UserError(
                f"{trained.source} tells {trained.outputs} classes apart and knows no names, but there are "
                f"{len(folders)} class folders: give those that it was trained on"
            )
        return list(range(len(folders)))
    place = {name: k for k, name in enumerate(trained.classes)}
    other = [name for name in folders if name not in place]
    if other:
        more = f" nor {len(other) - 1} more" if other[1:] else ""
        known = ", ".join(map(shown, trained.classes[:5])) + (" …" if trained.classes[5:] else "")
        raise UserError(f"{trained.source} does not know the class {shown(other[0])}{more}; it knows {known}")
    return [place[name] for name in folders]


def _config(values: Mapping[str, Any]) -> Config | None:
    """A checkpoint's configuration; keys that this version does not have are left out. None for another program's."""
    parts = {}
    for name, value in values.items():
        kind = find_kind(name) if isinstance(name, str) else None
        if kind is None:
            continue
        if kind.part is None or (value is None and kind.optional):
            parts[name] = value
        elif isinstance(value, Mapping):
            parts[name] = {key: inner for key, inner in value.items() if key in kind.part.model_fields}
        else:
            return None
    try:
        return Config.model_validate(parts)
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"][:2]))  # below are names of types
        raise UserError(
            f"the checkpoint's configuration is of another version: {key} is not what it takes here"
        ) from None
