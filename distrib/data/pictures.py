"""Single pictures and folders of them, without classes, as an index that the loaders take."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from distrib.config import UserError
from distrib.data.index import Index, Listing, write_index
from distrib.layout.folders import shown, walk
from distrib.layout.splits import Split


def find_pictures(paths: Iterable[str]) -> tuple[list[Path], list[str]]:
    """The files that ``paths`` name, of folders all pictures in and below them; and those that are not there.

    A file is taken whatever its name. Hidden files, and other files in a folder, are passed over.

    Raises:
        UserError: a folder cannot be read, or holds no picture.
    """
    found: list[Path] = []
    missing: list[str] = []
    for text in paths:
        path = Path(os.path.expanduser(text))
        inside: list[Path] = []
        if path.is_dir():
            above, own = os.path.split(os.fsencode(os.path.abspath(path)))
            for folder in walk(Path(os.fsdecode(above)), own):
                here = path / os.fsdecode(os.path.relpath(folder.path, own))
                inside += [here / os.fsdecode(name) for name in folder.pictures]
            if not inside:
                raise UserError(f"{shown(path)} holds no pictures")
            found += inside
        elif os.path.lexists(path):
            found.append(path)
        else:
            missing.append(text)
    return found, missing


def index_pictures(files: Sequence[Path], folder: Path) -> Index:
    """An index of ``files`` in their order, all with label 0, kept below ``folder``: a temporary one.

    Raises:
        UserError: ``folder`` cannot be written.
    """
    absolute = [os.fsencode(os.path.abspath(file)) for file in files]
    root = os.path.commonpath([os.path.dirname(path) for path in absolute])
    names = [os.path.relpath(path, root) for path in absolute]
    split = Split("val", Path(os.fsdecode(root)))
    return write_index(folder, Listing(split, [b"."], [0], {}, names, np.zeros(len(names), dtype=np.int32)))
