"""The network as a graph that needs none of our code: ONNX and torch.export.

Batch, height and width are free, but for torch.export's where the evaluation's pictures have 32 pixels or fewer. The
norms' statistics are fixed; ONNX's exporter folds them into the convolutions.
"""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distrib.config import UserError, settled
from distrib.faults import Failure
from distrib.tools.export.compare import Call
from distrib.tools.export.states import inferring
from distrib.trained import Trained
from distrib.weights import describe

OPSET = 18  # what torch's exporter writes without converting; of December 2022
LARGEST = 2**31 - 2**20  # bytes; an ONNX file is one protobuf message, which ends at 2 GiB
TRACED = (2, 3, 64, 64)  # no 1, which would be taken for a constant; all stages see more than one pixel


def about(trained: Trained) -> dict[str, str]:
    """What a user of the graph must know: JSON but for the first three, pixels and means on both usual scales."""
    data, names = trained.config.data, trained.names()
    values: dict[str, Any] = {
        "input": "RGB, (pixel - mean) / std, fp32 [N, 3, H, W]",
        "mean_0_to_255": data.mean,
        "std_0_to_255": data.std,
        "mean_0_to_1": [value / 255 for value in data.mean],
        "std_0_to_1": [value / 255 for value in data.std],
        "size": data.eval_size,
        "resize": data.eval_resize,
    } | ({"classes": names} if names is not None else {})
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
    kept = describe(trained.config, names, trained.source)
    return {"model": trained.config.model.name, "source": kept["source"], "producer": kept["producer"], **texts}


def any_size(form: str, trained: Trained) -> bool:
    """Whether height and width are free: torch.export guards against a last stage of one pixel, which pools alike."""
    return form == "onnx" or settled(trained.config.data.eval_size) > 32


def check(form: str, trained: Trained) -> None:
    """Looks whether the form can hold the network.

    Raises:
        UserError: ONNX would need a second file.
    """
    size = sum(tensor.nbytes for tensor in trained.network.state_dict().values())
    if form == "onnx" and size > LARGEST:
        raise UserError(
            f"{size / 2**30:.1f} GiB of weights do not fit in one file of ONNX: --to torch.export or safetensors"
        )


def write(form: str, trained: Trained, suffix: str) -> bytes:
    """The file's content.

    Raises:
        Failure: the exporter does not get through.
    """
    try:
        with _quiet():
            return _onnx(trained) if form == "onnx" else _torch_export(trained)
    except Exception as error:
        words = str(error).strip().splitlines() or [type(error).__name__]
        raise Failure(f"torch {torch.__version__} cannot write the network as {form}: {words[0]}") from error


def _onnx(trained: Trained) -> bytes:
    program = torch.onnx.export(
        trained.network, (torch.zeros(TRACED),), dynamo=True, opset_version=OPSET, verbose=False,
        input_names=["images"], output_names=["logits"], dynamic_shapes=({0: "N", 2: "H", 3: "W"},),
    )  # fmt: skip
    assert program is not None
    model = program.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]  # where in the exporter's machine each line of source lies
    for key, value in about(trained).items():
        model.metadata_props.add(key=key, value=value)
    return model.SerializeToString()


def _torch_export(trained: Trained) -> bytes:
    size = settled(trained.config.data.eval_size)
    free = any_size("torch.export", trained)
    images = torch.zeros(TRACED if free else (TRACED[0], 3, size, size))
    axes = dict.fromkeys((0, 2, 3) if free else (0,), torch.export.Dim.DYNAMIC)
    program = torch.export.export(trained.network, (images,), dynamic_shapes=(axes,))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # as above
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"about.json": json.dumps(about(trained), indent=1)})
    return buffer.getvalue()


def reload(form: str, trained: Trained, path: Path) -> Call:
    """The graph in the form's own runtime, on the CPU.

    Raises:
        Failure: the file is not valid ONNX.
    """
    if form == "torch.export":
        with _quiet():
            return inferring(torch.export.load(path).module())
    import onnx
    import onnxruntime

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except onnx.checker.ValidationError as error:
        raise Failure(f"onnx.checker refuses the file: {str(error).splitlines()[0]}") from None
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def call(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    return call


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters' progress and warnings are about their own insides."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
