"""Weights to begin with: a run's, torchvision's and timm's, from files of all their forms and from torchvision by name.

Reading (``read_weights``) knows the forms; fitting (``fit``) compares with the network, and replaces its last layer
where the classes are others. ``load_weights`` is both.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import socket
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.client import HTTPException
from itertools import product
from pathlib import Path
from typing import Any
from urllib.error import URLError

import safetensors.torch
import torch
from torch import Tensor, nn

from distrib import __version__
from distrib.config import Config, ModelConfig, UserError
from distrib.follow import flatten
from distrib.layout.folders import patiently, reason, shown
from distrib.models import build_model
from distrib.models.resnet import ARCHITECTURES
from distrib.root import ROOT

# Where the state dict lies in a file, the better first: ours ("ema" in older files) and those of torchvision's and
# timm's training scripts.
EMA_KEYS = ("model_ema", "state_dict_ema", "ema")
STATE_KEYS = (*EMA_KEYS, "model", "state_dict")
PREFIXES = re.compile(r"^(?:(?:module|_orig_mod)\.)+")  # DDP's and AveragedModel's, torch.compile's
NO_WEIGHT = "n_averaged"  # AveragedModel's counter
COUNTER = ".num_batches_tracked"  # younger than the oldest files; nothing here reads it
HEAD = ("fc.weight", "fc.bias")
STEP_FILE = re.compile(r"step_(\d+)\.pt")
CHECKSUM = re.compile(rb"crc32 ([0-9a-f]{8})\Z")  # how a file of ``distrib.checkpoint`` ends
TORCHVISION_NAME = re.compile(r"(?:(\w+_Weights)\.)?([A-Z][A-Z0-9_]*)")
GRAPHS = (".onnx", ".pt2")  # of distrib export
PICKLE = b"\x80"  # how one begins, torch.save's of before 1.6 too
DOWNLOAD_TIMEOUT = 30.0  # seconds without a byte; a node behind a firewall would wait for minutes
NAMED = 3  # keys that a message names of those that differ
PRODUCER = "distrib"  # with it safetensors' metadata is ours; others' may mean anything
DESCRIBED = (
    "model.name", "model.num_classes", "model.stem", "model.plain",
    "data.mean", "data.std", "data.eval_size", "data.eval_resize",
)  # fmt: skip

Notify = Callable[[str], None]


@dataclass(frozen=True)
class Weights:
    """What a file holds for a network.

    Attributes:
        state: tensors on the CPU, under the network's own keys, prefixes taken off.
        source: the file, and what of it was taken; for messages.
        classes: names of the classes in the order of the last layer's rows, where the file knows them.
        config: the run's configuration in a checkpoint of ours, a part of it in safetensors of ours, the evaluation's
            sizes with torchvision's names, else empty.
    """

    state: dict[str, Tensor]
    source: str
    classes: tuple[str, ...] | None
    config: Mapping[str, Any]


def load_weights(network: nn.Module, cfg: ModelConfig, classes: Sequence[str] | None, notify: Notify) -> str:
    """Fills ``network``, which was built from ``cfg``, with ``cfg.weights``; returns the line that says so.

    ``classes`` are the data's, where it has names. ``notify`` hears of a download before it begins.

    Raises:
        UserError: there are no such weights, or they do not fit.
    """
    assert cfg.weights is not None
    return fit(network, read_weights(cfg.weights, cfg.name, notify), cfg, classes)


def read_weights(text: str, model: str, notify: Notify) -> Weights:
    """The weights that ``text`` names: a file, a run's folder, or one of torchvision's names for network ``model``.

    Raises:
        UserError: there are none, or what is there holds none.
    """
    name = TORCHVISION_NAME.fullmatch(text)
    if name is None or not is_torchvisions(text):
        path = find_file(text)
        return read_file(path, shown(path))
    path, sizes = _torchvision_file(text, name[1], name[2], model, notify)
    return replace(read_file(path, f"{text} of {model}, {shown(path)}"), config={"data": sizes})


def is_torchvisions(text: str) -> bool:
    """Whether ``text`` is a name of torchvision's, and not of a file that is there."""
    return TORCHVISION_NAME.fullmatch(text) is not None and not os.path.lexists(text)


def find_file(text: str) -> Path:
    """The file that ``text`` means. ``~`` is the home; what the working directory lacks may stand beside the code.

    Of a run's folder, or its checkpoints/, that is best.pt, else last.pt, else the newest step.

    Raises:
        UserError: there is none.
    """
    path = Path(os.path.expanduser(text))
    if not os.path.lexists(path) and not path.is_absolute():
        if not os.path.lexists(ROOT / path):
            where = " and ".join(dict.fromkeys((str(Path.cwd()), str(ROOT))))
            raise UserError(
                f"model.weights {shown(path)} is not in {where}: name a file, a run's folder, or torchvision's weights "
                "as IMAGENET1K_V1"
            )
        path = ROOT / path
    return _in_folder(path) if path.is_dir() else path


def _in_folder(folder: Path) -> Path:
    for place in (folder / "checkpoints", folder):
        try:
            names = patiently(os.listdir, place) if place.is_dir() else []
        except OSError as error:
            raise UserError(f"cannot read {shown(place)}: {reason(error)} (model.weights)") from None
        steps = {int(match[1]): name for name in names if (match := STEP_FILE.fullmatch(name))}
        newest = [steps[max(steps)]] if steps else []
        for name in ("best.pt", "last.pt", *newest):
            if name in names:
                return place / name
    raise UserError(
        f"{shown(folder)} holds no weights: neither checkpoints/best.pt, last.pt nor step_*.pt (model.weights)"
    )


def read_file(path: Path, source: str) -> Weights:
    """Reads a file of ``torch.save`` or safetensors, told by its content; ``source`` is what messages call it.

    Only tensors and plain values are made of it, never other objects: those could run code.

    Raises:
        UserError: it cannot be read, is damaged, or holds no weights.
    """
    content = _parse(_read_bytes(path), shown(path))
    key, state = _unwrap(content)
    if not state:
        raise UserError(
            f"{shown(path)} holds no weights: a state dict is wanted, bare or under one of {', '.join(STATE_KEYS)}"
        )
    progress, classes, config = (content.get(name) for name in ("progress", "classes", "config"))
    step = progress.get("step") if isinstance(progress, Mapping) else None
    taken = ["EMA"] * (key in EMA_KEYS) + [f"step {step}"] * (step is not None)
    return Weights(
        state=state,
        source=source + (f" ({', '.join(taken)})" if taken else ""),
        classes=tuple(map(str, classes)) if isinstance(classes, list | tuple) else None,
        config=config if isinstance(config, Mapping) else {},
    )


def _read_bytes(path: Path) -> bytes:
    """All of the file: then whatever fails while it is parsed is the content's fault, not the disk's."""
    try:
        data = patiently(path.read_bytes)
    except OSError as error:
        raise UserError(f"cannot read {shown(path)}: {reason(error)} (model.weights)") from None
    if not data:
        raise UserError(f"{shown(path)} is empty: copy it again (model.weights)")
    checksum = CHECKSUM.search(data[-32:])
    if checksum is not None and int(checksum[1], 16) != zlib.crc32(memoryview(data)[:-8]):
        raise UserError(f"{shown(path)} does not match its checksum: take another checkpoint (model.weights)")
    return data


def _parse(data: bytes, name: str) -> Mapping[str, Any]:
    """What a file's bytes hold; an empty mapping where that is no mapping.

    torch raises whatever comes of reading bytes that mean something else: KeyError, IndexError, OSError and more.
    """
    try:
        if data[8:9] == b"{":  # safetensors: the header's length in 8 bytes, then the header, which is JSON
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            return safetensors.torch.load(data) | _described(header.get("__metadata__") or {})
        # The training scripts of torchvision and timm save their options too, as a Namespace, which is a bare record.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TorchScript, which is refused
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{name} holds Python objects ({found[1]}), and to load those may run code: save the state dict "
                "alone, torch.save(network.state_dict(), FILE)"
            ) from None
        if name.endswith(GRAPHS):
            raise UserError(
                f"{name} is a network for other programs, not weights: name what it was exported from (model.weights)"
            ) from None
        if data[:1] == PICKLE:
            raise UserError(
                f"{name} is damaged, or no file of weights but another program's pickle, which may run code when it "
                "is loaded: copy it again, or save the state dict alone (model.weights)"
            ) from None
        raise UserError(
            f"{name} is damaged, or no file of weights (torch.save's or safetensors): copy it again, or name another "
            "in model.weights"
        ) from None
    return content if isinstance(content, Mapping) else {}


def describe(config: Config, classes: Sequence[str] | None, source: str) -> dict[str, str]:
    """The metadata of our safetensors: what ``read_file`` takes back. Values that are no text are JSON."""
    flat = flatten(config.model_dump(mode="json"))
    values = {key: flat[key] for key in DESCRIBED} | ({"classes": classes} if classes is not None else {})
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
    return {"format": "pt", "producer": f"{PRODUCER} {__version__}", "source": source, **texts}


def _described(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Classes and configuration, as a checkpoint has them, from ``describe``'s metadata; nothing from others'."""
    if metadata.get("producer", "").partition(" ")[0] != PRODUCER:
        return {}
    config: dict[str, dict[str, Any]] = {}
    for key in DESCRIBED:
        if key in metadata:
            part, _, name = key.partition(".")
            config.setdefault(part, {})[name] = metadata[key] if key == "model.name" else _value(metadata[key])
    return {"config": config} | ({"classes": _value(metadata["classes"])} if "classes" in metadata else {})


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _unwrap(content: Mapping[str, Any]) -> tuple[str, dict[str, Tensor]]:
    """The key under which the state dict lay ("" where it is the file itself), and its tensors."""
    for key in STATE_KEYS:
        inner = content.get(key)
        if isinstance(inner, Mapping) and (state := _tensors(inner)):
            return key, state
    return "", _tensors(content)


def _tensors(values: Mapping[str, Any]) -> dict[str, Tensor]:
    return {
        PREFIXES.sub("", str(key)): value
        for key, value in values.items()
        if isinstance(value, Tensor) and key != NO_WEIGHT
    }


def fit(network: nn.Module, weights: Weights, cfg: ModelConfig, classes: Sequence[str] | None) -> str:
    """Fills ``network``, which was built from ``cfg``; returns a line that says with what.

    The last layer (``HEAD``) stays as it was initialised where the weights are for other classes: another number, or
    other names where both sides know names (``classes`` are the network's).

    Raises:
        UserError: a key is missing, is too much, or has another shape; the network is as it was.
    """
    own = network.state_dict()
    renewed = _why_new_head(own, weights, classes)
    state = _without_head(weights.state) if renewed else weights.state
    differences = _differences(_without_head(own) if renewed else own, state)
    if differences:
        more = f" and {len(differences) - NAMED} more" if len(differences) > NAMED else ""
        raise UserError(
            f"the weights {weights.source} do not fit model.name {cfg.name}: {'; '.join(differences[:NAMED])}{more}: "
            f"{_way_out(weights, cfg)}"
        )
    if spoilt := next((key for key, t in state.items() if t.is_floating_point() and not t.isfinite().all()), None):
        raise UserError(f"the weights {weights.source} hold numbers that are none (NaN) in {spoilt}: take others")
    network.load_state_dict({key: state.get(key, tensor) for key, tensor in own.items()})
    if renewed:
        return f"weights: {weights.source}; the head is new: {renewed}"
    kept = f"; the head is theirs, of {len(own[HEAD[0]])} classes too, whose names the file does not tell"
    return f"weights: {weights.source}" + (kept if classes is not None and weights.classes is None else "")


def checksum(network: nn.Module) -> str:
    """A CRC-32 of all parameters and buffers, in their order."""
    found = 0
    for tensor in network.state_dict().values():
        found = zlib.crc32(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes(), found)
    return f"{found:08x}"


def _why_new_head(own: Mapping[str, Tensor], weights: Weights, classes: Sequence[str] | None) -> str | None:
    """Why the weights' last layer is of no use here, or None where it is."""
    if not any(key in weights.state for key in HEAD):
        return "the weights have none"
    count, theirs = len(own[HEAD[0]]), weights.state.get(HEAD[0])
    if theirs is not None and theirs.ndim == 2 and len(theirs) != count:
        return f"{count} classes, the weights have {len(theirs)}"
    if classes is None or weights.classes is None or tuple(classes) == weights.classes:
        return None
    pairs = zip(classes, weights.classes, strict=False)
    ours, other = next((pair for pair in pairs if pair[0] != pair[1]), (len(classes), len(weights.classes)))
    return f"other classes, {ours} where the weights have {other}"


def _without_head(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state.items() if key not in HEAD}


def _differences(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """What keeps ``state`` from being loaded into a network with the tensors ``own``, in the network's order."""
    found = []
    for key, tensor in own.items():
        if key not in state:
            found += [] if key.endswith(COUNTER) else [f"they lack {key} {list(tensor.shape)}"]
        elif state[key].shape != tensor.shape:
            found.append(f"{key} is {list(state[key].shape)}, not {list(tensor.shape)}")
    return found + [f"{key} {list(tensor.shape)} is too much" for key, tensor in state.items() if key not in own]


def identify(weights: Weights, near: ModelConfig) -> ModelConfig | None:
    """The network that the weights' shapes belong to: of those that fit, the one with most of ``near``'s settings.

    Only the settings that make another network are looked at; without a last layer there are ``near``'s classes.
    """
    blocks = sum(key.endswith(".conv1.weight") for key in weights.state)
    names = [name for name, arch in ARCHITECTURES.items() if sum(arch.depths) == blocks]
    stems = dict.fromkeys((near.stem, None, "imagenet", "small"))
    for stem, plain, name in product(stems, (near.plain, not near.plain), names):
        tried = ModelConfig(name=name, num_classes=1, stem=stem, plain=plain)
        with torch.device("meta"):  # shapes only
            own = build_model(tried).state_dict()
        if not _differences(_without_head(own), _without_head(weights.state)):
            head = weights.state.get(HEAD[0])
            return tried.model_copy(update={"num_classes": near.num_classes if head is None else len(head)})
    return None


def _way_out(weights: Weights, cfg: ModelConfig) -> str:
    """The settings under which the weights would fit."""
    found = identify(weights, cfg)
    if found is None:
        return "they are of a network that is not here; name others in model.weights"
    texts = {"name": found.name, "stem": found.stem or "null", "plain": str(found.plain).lower()}
    changed = [f"model.{key}={texts[key]}" for key in texts if getattr(found, key) != getattr(cfg, key)]
    if not changed:
        return "all but the last layer fits, which must have both its weight and its bias, or neither"
    return f"set {' '.join(changed)}, which they fit"


def _torchvision_file(
    text: str, enum: str | None, name: str, model: str, notify: Notify
) -> tuple[Path, dict[str, int]]:
    """The file of torchvision's weights in torch's cache, and the sizes at which it states their accuracy.

    It is downloaded where it is not there.

    Raises:
        UserError: torchvision has none of that name for the network, or they cannot be downloaded.
    """
    from torchvision.models import get_model_weights, list_models  # here: it takes a second that files do not need

    if model not in list_models():
        raise UserError(f"torchvision has no {text} for model.name {model}, nor others: name a file in model.weights")
    known = get_model_weights(model)
    if name not in known.__members__ or enum not in (None, known.__name__):
        there = ", ".join(known.__members__)
        raise UserError(f"model.weights: torchvision has no {text} for model.name {model}; there are {there}")
    url = known[name].url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.exists():
        notify(f"downloading {url}")
        _download(url, path)
    seen = known[name].transforms()
    return path, {"eval_size": seen.crop_size[0], "eval_resize": seen.resize_size[0]}


def _download(url: str, path: Path) -> None:
    """Brings a file whose name ends in the first digits of its SHA-256, as torch.hub's do.

    Raises:
        UserError: it does not come, is another one, or cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _timeout(DOWNLOAD_TIMEOUT):
            torch.hub.download_url_to_file(url, str(path), path.stem.rpartition("-")[2], progress=False)
    except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: another checksum
        why = error.reason if isinstance(error, URLError) else error
        told = reason(why) if isinstance(why, OSError) else str(why) or type(why).__name__
        raise UserError(
            f"cannot download {url}: {told}: fetch it where there is a network and put it to {path} (TORCH_HOME moves "
            "that folder), or name a file in model.weights"
        ) from None


@contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    """Limits waits for the network; torch.hub passes none on."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
