"""The keys of a configuration: which there are, what each takes, and how a value typed on a command line is read.

All of it follows from the annotations in ``distrib.config``; nothing here knows a single key but the tables of the
names that other trainers use.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from distrib.config import Auto, Config, UserError, Words

# How torchvision's references, timm and PyTorch's ImageNet example name what has another last name here.
USUAL_NAMES = {
    "a": "model.name",
    "arch": "model.name",
    "b": "train.global_batch",
    "batch_size": "train.global_batch",
    "clip_grad": "train.clip_grad_norm",
    "data_dir": "data.root",
    "data_path": "data.root",
    "experiment": "run.name",
    "img_size": "data.size",
    "j": "data.workers",
    "learning_rate": "optim.lr",
    "lr_scheduler": "schedule.name",
    "model_ema": "ema",
    "model_ema_decay": "ema.decay",
    "num_workers": "data.workers",
    "opt": "optim.name",
    "output": "run.dir",
    "output_dir": "run.dir",
    "print_freq": "log.every_steps",
    "sched": "schedule.name",
    "smoothing": "train.label_smoothing",
    "train_crop_size": "data.size",
    "val_crop_size": "data.eval_size",
    "val_resize_size": "data.eval_resize",
    "wd": "optim.weight_decay",
}
# Options that other trainers have and that are no setting here.
NO_SETTING = {
    **dict.fromkeys(("resume", "auto_resume", "start_epoch"), "the same command continues the run by itself"),
    **dict.fromkeys(
        ("gpus", "nproc_per_node", "nnodes", "node_rank"),
        "torchrun's options stand before train.py; launch has --procs",
    ),
    "pretrained": "write model.weights=IMAGENET1K_V1 (configs/finetune.yaml has it)",
    "initial_checkpoint": "write model.weights=FILE, or --init-from FILE",
    "log_wandb": "write wandb.mode=online",
    "no_wandb": "write wandb.mode=disabled",
    **dict.fromkeys(("evaluate", "test_only"), "`distrib evaluate RUN` evaluates"),
    **dict.fromkeys(("amp", "channels_last"), "it is always so; train.precision chooses between bf16 and others"),
    **dict.fromkeys(("local_rank", "dist_url", "world_size"), "start several processes with torchrun"),
}
REMARKS = {"train.global_batch": "the whole step's, over all processes"}
NUMBER_WORDS = {2: "two", 3: "three"}
TRUE_OR_FALSE = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)
NULL = ("null", "~", "none")


@dataclass(frozen=True)
class Kind:
    """What a key takes: one of the four below, null where ``optional``, and the word auto where ``auto``."""

    base: Any  # bool, int, float, str; a Literal; a tuple; or the class of a part
    bounds: tuple[Any, ...] = ()
    optional: bool = False
    default: Any = None
    words: str | None = None  # the annotation's own ``Words``
    auto: bool = False

    @property
    def part(self) -> type[BaseModel] | None:
        """The class, where the key has keys of its own."""
        return self.base if isinstance(self.base, type) and issubclass(self.base, BaseModel) else None

    @property
    def is_text(self) -> bool:
        """Whether whatever was typed is the value."""
        return self.base is str or get_origin(self.base) is Literal


def find_kind(key: str) -> Kind | None:
    """What the dotted ``key`` takes; None for a key that does not exist."""
    part: type[BaseModel] | None = Config
    kind = None
    for name in key.split("."):
        info = part.model_fields.get(name) if part else None
        if info is None:
            return None
        kind = _kind(info)
        part = kind.part
    return kind


def _kind(info: FieldInfo) -> Kind:
    base, bounds = _unwrap(info.annotation)
    members = get_args(base) if get_origin(base) in (Union, UnionType) else ()
    if members:
        inner = [kind for kind in members if kind not in (NoneType, Auto)]
        base, more = _unwrap(inner[0] if len(inner) == 1 else Union[tuple(inner)])  # noqa: UP007 - made at run time
        bounds += more
    metadata = (*info.metadata, *_flat(bounds))
    words = next((bound.text for bound in metadata if isinstance(bound, Words)), None)
    return Kind(base, metadata, NoneType in members, info.get_default(), words, Auto in members)


def _unwrap(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    if get_origin(annotation) is Annotated:
        return annotation.__origin__, annotation.__metadata__
    return annotation, ()


def _flat(bounds: Sequence[Any]) -> list[Any]:
    return [inner for bound in bounds for inner in (bound.metadata if isinstance(bound, FieldInfo) else [bound])]


def valid_keys(part: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every dotted key that a configuration may hold, parts included."""
    keys = []
    for name, info in part.model_fields.items():
        keys.append(prefix + name)
        inner = _kind(info).part
        if inner:
            keys += valid_keys(inner, f"{prefix}{name}.")
    return keys


def nearest(key: str) -> str | None:
    """The valid key that was most likely meant by ``key``; None where nothing is near."""
    names = valid_keys()
    leaf = key.rpartition(".")[2]
    same_leaf = [name for name in names if name.rpartition(".")[2] == leaf]
    if len(same_leaf) == 1:
        return same_leaf[0]
    if leaf in USUAL_NAMES:
        return USUAL_NAMES[leaf]
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    return close[0] if close else None


# Reading


def is_null(kind: Kind, text: str) -> bool:
    """Whether ``text`` says null, and the key takes that."""
    return kind.optional and text.strip().lower() in NULL


def read_typed(key: str, text: str) -> Any:
    """The value that ``text``, typed behind ``key=``, means; what the key does not take comes back as typed.

    A key that takes text takes it as it is: no quotes, comments or numbers are seen in it.

    Raises:
        UserError: nothing was typed.
    """
    kind = find_kind(key)
    if kind is None:
        return text
    if not text.strip():
        raise UserError(f"{key}= stands without a value: {describe(key)} (command line)")
    if is_null(kind, text):
        return None
    word = text.strip()
    if kind.base is bool:
        return TRUE_OR_FALSE.get(word.lower(), word)
    if get_origin(kind.base) is tuple:
        of_text = _unwrap(get_args(kind.base)[0])[0] is str
        return _read_list(word, (lambda item: item) if of_text else _read_number)
    return _read_number(word) if kind.base in (int, float) else text


def _read_number(word: str) -> Any:
    try:
        return int(word)
    except ValueError:
        pass
    try:
        return float(word)
    except ValueError:
        return word


def _read_list(word: str, read: Callable[[str], Any]) -> Any:
    for opening, closing in ("[]", "()"):
        if word.startswith(opening) and word.endswith(closing):
            word = word[1:-1]
            break
    items = [item.strip() for item in word.split(",")]
    if items[-1] == "":  # of [] and of a last comma
        items.pop()
    return [read(item) for item in items]


# Telling


def describe(key: str) -> str:
    """What ``key`` takes, as the end of a sentence: "optim.lr takes a number above 0"."""
    kind = find_kind(key)
    if kind is None:
        return f"{key} is no key"
    return f"{key} takes {_words(key, kind)}"


def takes(key: str) -> str:
    """What ``key`` takes, in a few words."""
    kind = find_kind(key)
    assert kind is not None
    words = re.split(r" \(|:", _words(key, kind))[0]
    return words.removeprefix("a ").replace(" that is not empty", "").replace(" of at least", " from")


def refuse(key: str, value: Any) -> str:
    """One sentence for a ``value`` that ``key`` does not take, with the form that it does take."""
    kind = find_kind(key)
    assert kind is not None
    if kind.part and not isinstance(value, dict):
        return f"{key} takes {_words(key, kind, value)}"
    finite = not isinstance(value, float) or math.isfinite(value)
    return f"{describe(key)}, got {value!r}{'' if finite else ', which is not finite'}"


def show(key: str, value: Any) -> str:
    """``key=value`` as it is typed."""
    text = f"[{','.join(str(item) for item in value)}]" if isinstance(value, tuple) else str(value)
    return f"{key}={text.lower() if isinstance(value, bool) else text}"


def _words(key: str, kind: Kind, value: Any = None) -> str:
    example = ""
    if kind.part:
        words = [*(["true", "false"] if kind.optional else []), "keys of its own"]
        example = f": {_first_inside(key, kind.part, value)}"
    elif kind.words:
        words = [kind.words]
    elif kind.base is bool:
        words = ["true", "false"]
    elif kind.base is str:
        words = ["text"]
    elif get_origin(kind.base) is Literal:
        words = list(get_args(kind.base))
    elif get_origin(kind.base) is tuple:
        items = get_args(kind.base)
        words = [f"{'a list of' if Ellipsis in items else NUMBER_WORDS[len(items)]} numbers"]
        example = f": {show(key, kind.default)}"
    else:
        words = [f"{'a whole number' if kind.base is int else 'a number'}{_bounds(kind.bounds)}"]
    words += (["auto"] if kind.auto else []) + (["null"] if kind.optional else [])
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1]))) + example


def _first_inside(key: str, part: type[BaseModel], value: Any) -> str:
    """The part's first key with ``value`` where it could take that, else with its default."""
    inner = f"{key}.{next(iter(part.model_fields))}"
    kind = find_kind(inner)
    assert kind is not None
    takes = isinstance(value, str if kind.is_text else int | float) and not isinstance(value, bool)
    if get_origin(kind.base) is Literal:
        takes = value in get_args(kind.base)
    return show(inner, value if takes else kind.default)


def _bounds(bounds: Sequence[Any]) -> str:
    signs = {
        annotated_types.Gt: ("gt", "above"),
        annotated_types.Ge: ("ge", "of at least"),
        annotated_types.Lt: ("lt", "below"),
        annotated_types.Le: ("le", "of at most"),
    }
    said = []
    for bound in bounds:
        name, word = signs.get(type(bound), ("", ""))
        if name:
            said.append(f"{word} {getattr(bound, name)}")
    return f" {' and '.join(said)}" if said else ""
