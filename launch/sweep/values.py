"""The several values that a word of a sweep gives a setting: ``optim.lr=0.5,1.0``, ``seed=0..4``.

What a key takes (``distrib.keys``) decides what a comma means:

    =================  =======================================================  ==========================
    key                rule                                                     example
    =================  =======================================================  ==========================
    any                between [ and ] with a bar: bars alone separate values   data.scale=[0.08,1|0.25,1]
    a list             a comma belongs to the value                             data.classes=cat,dog
    run.*, wandb.*     one value; but run.seed is a whole number as any other   wandb.notes=a, b
    a part             commas separate true, false and null, and nothing else   ema=true,false
    a whole number     commas separate; a..b is all from a to b, b included     seed=0..4,10
    any other          commas separate; one in "double quotes" belongs to it    model.name=resnet18,resnet34
    =================  =======================================================  ==========================

``seed`` is short for ``run.seed``.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_origin

from distrib.config import UserError
from distrib.keys import NULL, TRUE_OR_FALSE, Kind, find_kind, read_typed

SHORT = {"seed": "run.seed"}
LONGEST = 100_000  # numbers in one range, which is written out
RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")


@dataclass(frozen=True)
class Setting:
    """A key and its values, as typed; more than one where it is varied."""

    key: str
    values: tuple[str, ...]

    def words(self) -> list[str]:
        """``key=value`` for each value."""
        return [f"{self.key}={value}" for value in self.values]


def read_settings(words: Sequence[str]) -> list[Setting]:
    """What the ``key=value`` words say, in their order; a key that is typed twice, with one value each, counts twice.

    Raises:
        UserError: a word is none; a value is empty or stands twice; a varied key is typed twice, or may not vary.
    """
    settings = [_read(word) for word in words]
    keys = [setting.key for setting in settings]
    for setting in settings:
        key = setting.key
        if len(setting.values) > 1 and keys.count(key) > 1:
            raise UserError(f"{key} is typed twice: give it all its values in one word, {key}=a,b")
        if len(setting.values) > 1 and _is_a_name(key):
            raise UserError(
                f"{key} cannot be varied: it does not change what is trained, and a sweep sets names itself"
            )
    return settings


def _read(word: str) -> Setting:
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise UserError(f"{word!r} is not key=value (a configuration file goes behind --config)")
    key = SHORT.get(key, key)
    values = _split(key, text)
    if len(values) > 1:
        _check(word, [read_typed(key, value) if value else "" for value in values])
    return Setting(key, tuple(values))


def _check(word: str, values: Sequence[object]) -> None:
    if "" in values:
        raise UserError(f"{word} has an empty value: leave no comma or bar at an end, nor two side by side")
    twice = next((value for k, value in enumerate(values) if value in values[:k]), None)
    if twice is not None or values.count(None) > 1:
        raise UserError(f"{word} has {'null' if twice is None else twice} twice: leave one out")


def _split(key: str, text: str) -> list[str]:
    kind, inner = find_kind(key), text.strip()
    if kind is None:  # which the configuration's own check tells, with the key that was meant
        return [text]
    if inner.startswith("[") and inner.endswith("]") and "|" in inner:
        items = inner[1:-1].split("|")
    elif _is_one(key, kind, inner):
        return [text]
    else:
        items = _at_commas(inner)
    ranged = [number for item in items for number in _range(key, kind, item.strip())]
    return ranged if len(ranged) > 1 or ranged[0] != inner else [text]


def _at_commas(text: str) -> list[str]:
    try:
        return next(csv.reader([text], skipinitialspace=True), [text])
    except csv.Error:  # a value of several lines, which the configuration's own check tells
        return [text]


def _is_one(key: str, kind: Kind, text: str) -> bool:
    """Whether what is typed is one value, commas included."""
    if kind.part:
        return any(item.strip().lower() not in (*TRUE_OR_FALSE, *NULL) for item in text.split(","))
    return _is_a_name(key) or get_origin(kind.base) is tuple


def _is_a_name(key: str) -> bool:
    return key.partition(".")[0] in ("run", "wandb") and key != "run.seed"


def _range(key: str, kind: Kind, item: str) -> list[str]:
    found = RANGE.fullmatch(item)
    if found is None or kind.base is not int:
        return [item]
    first, last = int(found[1]), int(found[2])
    if last < first:
        raise UserError(f"{key}={item}: a range goes up, {last}..{first}")
    if last - first >= LONGEST:
        raise UserError(f"{key}={item} are {last - first + 1} values, more than {LONGEST}: give a shorter range")
    return [str(number) for number in range(first, last + 1)]
