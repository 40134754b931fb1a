"""ImageNet's 1,000 classes: their WordNet ids, which are the folders' names, and what people call them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

FILE = Path(__file__).with_name("imagenet_classes.txt")


@functools.cache
def wnids() -> tuple[str, ...]:
    """The ids in the order of the outputs of every usual network, which is their own order."""
    return tuple(_names())


def title(name: str) -> str:
    """A class for a person: "tench (n01440764)"; names that are not ImageNet's as they are."""
    known = _names().get(name)
    return name if known is None else f"{known} ({name})"


def outputs(folders: Sequence[str]) -> list[int] | None:
    """The outputs that class folders mean, by id or by number as ImageNet-V2 has them; None where they do not tell.

    Numbers are taken as such: "10" is output 10, though it stands before "2" in the folders' order.
    """
    place = {name: k for k, name in enumerate(wnids())}
    if all(name in place for name in folders):
        return [place[name] for name in folders]
    numbers = [int(name) if name.isascii() and name.isdecimal() else -1 for name in folders]
    if all(0 <= number < len(place) for number in numbers) and len(set(numbers)) == len(numbers):
        return numbers
    return None


@functools.cache
def _names() -> dict[str, str]:
    lines = FILE.read_text(encoding="utf-8").splitlines()
    return dict(line.split(" ", 1) for line in lines if not line.startswith("#"))
