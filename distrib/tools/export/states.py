"""State dicts: bare ones under torchvision's and timm's names, which are ours too, and safetensors with metadata."""

from __future__ import annotations

import io
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from distrib.config import UserError
from distrib.faults import Failure
from distrib.models.resnet import ARCHITECTURES
from distrib.tools.export.compare import Call
from distrib.trained import Trained, open_trained
from distrib.weights import describe


def check(form: str, trained: Trained) -> None:
    """Looks for the network in the library that is to load the file.

    Raises:
        UserError: it has none of that kind.
    """
    if form == "safetensors":
        return
    cfg = trained.config.model
    if form == "torchvision":
        from torchvision import models

        known = cfg.name in models.list_models(module=models)
    else:
        import timm

        known = timm.is_model(cfg.name)
    small = (cfg.stem or ARCHITECTURES[cfg.name].stem) == "small"
    kind = f"{cfg.name}{' with the small stem' * (small and known)}{' without shortcuts' * cfg.plain}"
    if cfg.plain or small or not known:
        raise UserError(
            f"{trained.source}: its network, {kind}, is none of {form}'s; safetensors, onnx and torch.export take it"
        )


def write(form: str, trained: Trained, suffix: str) -> bytes:
    """The file's content: fp32, contiguous."""
    state = {key: tensor.detach().contiguous() for key, tensor in trained.network.state_dict().items()}
    if suffix == ".safetensors":
        return safetensors.torch.save(state, describe(trained.config, trained.names(), trained.source))
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def reload(form: str, trained: Trained, path: Path) -> Call:
    """The network that the form's own library makes of the file, strictly."""
    if form == "safetensors":
        return _ours(trained, path)
    name, outputs = trained.config.model.name, trained.outputs
    network: nn.Module
    if form == "torchvision":
        from torchvision import models

        network = models.get_model(name, weights=None, num_classes=outputs)
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=True)
    else:
        import timm

        network = timm.create_model(name, num_classes=outputs, checkpoint_path=str(path))
    return inferring(network.eval())


def _ours(trained: Trained, path: Path) -> Call:
    """The network that ``open_trained`` makes of the file, which must know all that the metadata should tell it."""
    again = open_trained(str(path), None, [])
    told, known = (describe(each.config, each.names(), trained.source) for each in (again, trained))
    if told != known:
        raise Failure(f"the file tells {told} of its network, not {known}: nothing was written")
    return inferring(again.network)


def any_size(form: str, trained: Trained) -> bool:
    """Whether height and width are free."""
    return True


def inferring(network: nn.Module) -> Call:
    """Calls ``network`` without gradients."""

    def call(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return network(images)

    return call
