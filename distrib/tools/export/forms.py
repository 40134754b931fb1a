"""The forms of a file, and what can be said of one before the weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from distrib.config import UserError
from distrib.layout.folders import shown


@dataclass(frozen=True)
class Form:
    """What a file of this form is called, and needs.

    Attributes:
        suffixes: those of its files; each reader goes by them.
        load: how a person loads it; ``{name}``, ``{classes}``, ``{file}`` (for Python) and ``{path}`` (for a shell) are
            filled in.
        packages: what must be installed beyond what a training needs.
        graph: whether the network itself is in the file, not only its weights.
        tolerance: how far its logits may be from the network's, as a part of the largest; 0: equal to the bit.
    """

    suffixes: tuple[str, ...]
    load: str
    packages: tuple[str, ...] = ()
    graph: bool = False
    tolerance: float = 0.0


FORMS = {
    "torchvision": Form(
        (".pth", ".pt"),
        "network = torchvision.models.{name}(num_classes={classes}); "
        "network.load_state_dict(torch.load({file}, weights_only=True))",
    ),
    "timm": Form(
        (".safetensors", ".pth", ".pt"),
        'timm.create_model("{name}", num_classes={classes}, checkpoint_path={file})',
        ("timm",),
    ),
    "safetensors": Form((".safetensors",), "safetensors.torch.load_file({file}), or here as distrib evaluate {path}"),
    "onnx": Form(
        (".onnx",),
        'onnxruntime.InferenceSession({file}).run(["logits"], {{"images": images}})',
        ("onnx", "onnxscript", "onnxruntime"),
        graph=True,
        tolerance=1e-4,
    ),
    "torch.export": Form((".pt2",), "torch.export.load({file}).module()(images)", graph=True),
}


def look_at(name: str, path: Path) -> Form:
    """The form ``name``, to be written to ``path``.

    Raises:
        UserError: ``path`` has another suffix, or a package is missing.
    """
    form = FORMS[name]
    if path.suffix not in form.suffixes:
        *others, last = form.suffixes
        raise UserError(
            f"--output {shown(path)}: {name} is written as {', '.join(others)}{' or ' * bool(others)}{last}"
        )
    missing = [package for package in form.packages if find_spec(package) is None]
    if missing:
        *others, last = missing
        named = f"{', '.join(others)}{' and ' * bool(others)}{last}, which {'are' if others else 'is'} not installed"
        raise UserError(f"--to {name} needs {named}: pip install 'distrib[export]'")
    return form
