"""Which pictures are trained on and which validated: two folders, or a fixed share of each class of one."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distrib.config import UserError
from distrib.layout.folders import as_utf8, patiently, scan, shown, unreadable

# As people's folders are called, in small letters or not; the first that is there is taken.
FOLDERS = {"train": ("train", "training"), "val": ("val", "validation", "valid", "test")}
HELD_OUT = 0.1  # of each class, where there is no folder to validate on and nothing is said
LOOKED_INTO = 10  # folders, to tell class folders from others
WNID = re.compile(rb"n\d{8}")  # ImageNet's class folders


@dataclass(frozen=True)
class Split:
    """A split's folder of class folders, and which part of it belongs to the split.

    Attributes:
        classes: names of the class folders that count; None: all of them.
        held_out: share of each class that is validated on; None: this folder is the split's own.
        fraction: share to train on, of each class's pictures that are not held out.
    """

    name: Literal["train", "val"]
    source: Path
    classes: tuple[str, ...] | None = None
    held_out: float | None = None
    fraction: float = 1.0

    @property
    def is_whole(self) -> bool:
        """Whether every picture below ``source`` belongs to it."""
        return self.classes is None and self.held_out is None and self._fraction == 1

    @property
    def _fraction(self) -> float:
        return self.fraction if self.name == "train" else 1.0

    def key(self) -> list[object]:
        """What tells this choice from others of the same folder; empty for the whole."""
        return [] if self.is_whole else [self.name, self.held_out, self._fraction]

    def count(self, pictures: int, name: bytes) -> int:
        """How many of a class's pictures belong to the split.

        Raises:
            UserError: the class ``name`` has too few to be divided.
        """
        if not pictures:
            return 0
        held = 0 if self.held_out is None else max(1, round(self.held_out * pictures))
        left = pictures - held
        if left < 1:
            raise UserError(
                f"data.val_split {self.held_out:g} leaves nothing to train on in "
                f"{shown(self.source / os.fsdecode(name))} ({pictures} {'picture' if pictures == 1 else 'pictures'}): "
                f"add some, {'lower data.val_split, ' if pictures > 1 else ''}or leave the class out (data.classes)"
            )
        return held if self.held_out is not None and self.name == "val" else max(1, round(self._fraction * left))

    def choose(self, paths: Sequence[bytes], name: bytes) -> list[bytes]:
        """The pictures of the class ``name`` that belong to the split, in their order.

        The smallest hashes of the names are held out, the next ones trained on: the same pictures on every machine and
        in every order of listing, more of them, never others, for a larger ``fraction``.

        Args:
            paths: relative to ``source``.

        Raises:
            UserError: the class has too few to be divided.
        """
        if self.held_out is None and self._fraction == 1:
            return list(paths)
        count = self.count(len(paths), name)
        first = 0 if self.held_out is None or self.name == "val" else max(1, round(self.held_out * len(paths)))
        chosen = set(sorted(paths, key=_hash)[first : first + count])
        return [path for path in paths if path in chosen]


def folders_of(root: Path) -> dict[str, Path | None]:
    """The folder of each split below ``root``; for "train" ``root`` itself where it holds class folders.

    Raises:
        UserError: ``root`` cannot be read.
    """
    try:
        found = _named(root)
        within = root.name.lower() in FOLDERS["train"] and _named(root.parent)["val"] is not None
    except OSError as error:
        raise unreadable(root, error) from None
    if not any(found.values()) and not within and _holds_classes(root):
        found["train"] = root
    return found


def check_classes(wanted: Sequence[str], names: Sequence[bytes], source: Path) -> None:
    """Looks for each of ``wanted`` among the class folders ``names``.

    Raises:
        UserError: one is not there.
    """
    there = [as_utf8(name) for name in names]
    for name in wanted:
        if name not in there:
            near = difflib.get_close_matches(name, there, n=1)
            hint = f"did you mean {shown(near[0])}?" if near else f"there are {', '.join(map(shown, there[:5]))}"
            raise UserError(f"data.classes: {shown(source)} has no class folder {name!r}; {hint}")


def _named(root: Path) -> dict[str, Path | None]:
    """train/ and val/ whatever they are; folders of other names where they hold folders, as a class folder does not."""
    try:
        names = sorted(patiently(os.listdir, root))
    except FileNotFoundError:
        names = []
    found: dict[str, Path | None] = {}
    for split, known in FOLDERS.items():
        others = (name for usual in known for name in names if name.lower() == usual and _holds_folders(root / name))
        name = split if split in names else next(others, None)
        found[split] = root / name if name is not None else None
    return found


def _holds_folders(folder: Path) -> bool:
    return folder.is_dir() and bool(patiently(scan, os.fsencode(folder))[0])


def _holds_classes(root: Path) -> bool:
    try:
        folders = scan(os.fsencode(root))[0]
        return any(scan(os.fsencode(root) + b"/" + name)[1] for name in folders[:LOOKED_INTO])
    except OSError:
        return False


def _hash(path: bytes) -> bytes:
    return hashlib.blake2b(path, digest_size=8).digest()
