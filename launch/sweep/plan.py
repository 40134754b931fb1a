"""What a sweep consists of: a run for each combination of the values, as a pure function of the typed words.

A run's name says its values, ``lr=0.5,seed=3``, and is its folder's; the seed always stands in it. So the same words,
or more values of the same keys, mean the same runs, and only what is missing is trained.
"""

from __future__ import annotations

import itertools
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from distrib.cli import load_config
from distrib.config import Config, UserError
from launch.settings import settings_of
from launch.sweep.values import Setting, read_settings

MOST = 1000  # runs, without a word of consent
SEED = "run.seed"
LONG = 120  # characters of a run's name
TAG = 64  # W&B takes no longer ones


@dataclass(frozen=True)
class Element:
    """One run.

    settings: the varied keys but the seed, with their values as words.
    words: for train.py, behind ``--config FILE``.
    """

    name: str
    seed: int
    settings: Mapping[str, str]
    config: Config
    words: list[str]

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.run.dir).expanduser()


@dataclass(frozen=True)
class Sweep:
    """A sweep; ``elements`` with the last typed key changing fastest, ``keys`` those that vary but the seed."""

    name: str
    folder: Path
    file: str  # for --config
    common: list[str]  # the words of all runs
    keys: list[str]
    elements: list[Element]


def plan_sweep(file: str, words: Sequence[str], name: str | None = None, most: int | None = MOST) -> Sweep:
    """The sweep that ``words`` mean, every configuration checked.

    Its folder is ``run.dir`` where that is typed, else ``name`` beside the folder that the configuration's run would
    have; ``name`` is that run's with -sweep behind it where it is None. W&B's group is the sweep's name, and tags are
    the run's values, where the user has set none.

    Raises:
        UserError: a word or a configuration is wrong, nothing is varied, there are more than ``most`` runs, or two of
            them would be the same.
    """
    settings = read_settings(words)
    varied = [setting for setting in settings if len(setting.values) > 1]
    count = math.prod(len(setting.values) for setting in varied)
    if most is not None and count > most:
        raise UserError(f"{count} runs are more than {most}: leave values out, or consent with --yes")
    folders = [setting.words()[0] for setting in settings if setting.key == "run.dir"]
    common = [setting.words()[0] for setting in settings if len(setting.values) == 1 and setting.key != "run.dir"]
    combinations = list(itertools.product(*(setting.words() for setting in varied)))

    base = _base(file, [*common, *folders], combinations[0])
    if not varied:
        raise UserError("nothing is varied: give a setting several values, optim.lr=0.5,1.0 or seed=0..4")
    name = name or f"{base.run.name}-sweep"
    if not re.fullmatch(r"[\w.+-]+", name):
        raise UserError(f"--name {name}: a name is made of letters, digits, '_', '.', '+' and '-'")
    folder = Path(base.run.dir) if folders else Path(base.run.dir).parent / name
    short = _short_names([setting.key for setting in varied])
    elements = [_element(file, [*common, *own], varied, short, _Names(name, folder, base)) for own in combinations]
    _check_distinct(elements)
    keys = [setting.key for setting in varied if setting.key != SEED]
    return Sweep(name, folder, file, common, keys, elements)


@dataclass(frozen=True)
class _Names:
    """What the names of all runs follow from."""

    sweep: str
    folder: Path
    base: Config  # of the words that all have in common


def _base(file: str, common: Sequence[str], first: Sequence[str]) -> Config:
    """The configuration without the varied values; with the first of them where it cannot be without."""
    try:
        return load_config(file, common)
    except UserError:
        return load_config(file, [*common, *first])


def _element(
    file: str, words: Sequence[str], varied: Sequence[Setting], short: Mapping[str, str], names: _Names
) -> Element:
    config = load_config(file, words)
    typed = dict(word.partition("=")[::2] for word in words)
    shown = {setting.key: show_value(config, setting.key, typed[setting.key]) for setting in varied}
    own = {short[key]: safe(value) for key, value in shown.items() if key != SEED}
    name = ",".join(f"{key}={value}" for key, value in [*own.items(), ("seed", str(config.run.seed))])
    if len(name) > LONG:
        name = f"{name[:LONG]}-{zlib.crc32(name.encode()):08x}"
    run = f"run.name={names.sweep}_{name.replace('=', '-').replace(',', '_')}"
    ours = [run, f"run.dir={names.folder / name}"]
    if names.base.wandb.group is None:
        ours.append(f"wandb.group={names.sweep}")
    if names.base.wandb.tags is None:
        tags = [f"{short[key]}={safe(value)}"[:TAG] for key, value in shown.items()]
        ours.append(f"wandb.tags=[{','.join(tags)}]")
    config = load_config(file, [*words, *ours])
    settings = {key: value for key, value in shown.items() if key != SEED}
    return Element(name, config.run.seed, settings, config, [*words, *ours])


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each key, or all of it where that would not tell two apart."""
    last = [key.rpartition(".")[2] for key in keys]
    return {
        key: key if last.count(leaf) > 1 or (leaf == "seed" and key != SEED) else leaf
        for key, leaf in zip(keys, last, strict=True)
    }


def _check_distinct(elements: Sequence[Element]) -> None:
    names: set[str] = set()
    marks: dict[str, str] = {}
    for element in elements:
        mark = repr(settings_of(element.config))
        if mark in marks:
            both = " and ".join(dict.fromkeys([marks[mark], element.name]))
            raise UserError(f"two runs would be the same, {both}: leave a value out")
        if element.name in names:
            raise UserError(f"two runs would be called {element.name}: letters and digits must tell values apart")
        names.add(element.name)
        marks[mark] = element.name


def show_value(config: Config, key: str, typed: str) -> str:
    """The value in one spelling: 1, 1.0 and 1e0 are the same run."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name) if value is not None else None
    if isinstance(value, BaseModel):  # a part: keys of its own are shown as typed
        return typed.strip() if "{" in typed else "true"
    if value is None:
        return "false" if typed.strip().lower() == "false" else "null"
    if isinstance(value, tuple):
        return ",".join(map(_plain, value))
    return _plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def safe(value: str) -> str:
    """``value`` with only what file names and W&B's lists take everywhere."""
    return re.sub(r"[^\w.+-]+", "-", value).strip("-") or "-"
