"""A contact sheet of nearest neighbours: pictures on the left, and right of each those whose vectors are the likest.

    python -m distrib features photos/ --weights RUN --output photos.npy
    python benchmarks/neighbours.py photos.npy neighbours.png

Likeness is the cosine of the angle between the vectors of ``distrib features``. It also prints how often the nearest
neighbour lies in the same folder, and how often one drawn at random would.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

GAP = 2  # pixels between tiles
CHUNK = 1024  # vectors compared with all others at once


def main(argv: Sequence[str]) -> int:
    """Writes the sheet and prints the share; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("features", type=Path, help="F.npy of distrib features, with F.txt beside it")
    parser.add_argument("output", type=Path, help="picture to write")
    parser.add_argument("--rows", type=int, default=6, help="pictures; default: %(default)s")
    parser.add_argument("--columns", type=int, default=6, help="neighbours of each; default: %(default)s")
    parser.add_argument("--tile", type=int, default=64, help="pixels a side; default: %(default)s")
    args = parser.parse_args(argv)
    try:
        vectors = np.load(args.features)
        names = os.fsdecode(args.features.with_suffix(".txt").read_bytes()).removesuffix("\n").split("\n")
        if args.output.exists():
            raise ValueError(f"{args.output} exists")
        if vectors.ndim != 2 or len(vectors) != len(names):
            raise ValueError(f"{args.features} holds {list(vectors.shape)} numbers, its .txt {len(names)} names")
        if len(vectors) <= args.columns or min(args.rows, args.columns, args.tile) < 1:
            raise ValueError(f"{len(vectors)} pictures are too few for {args.columns} neighbours")
        chosen = np.linspace(0, len(vectors) - 1, args.rows).round().astype(np.int64)
        sheet([[names[k] for k in (row, *near)] for row, near in zip(chosen, nearest(vectors, args.columns)[chosen],
              strict=True)], args.tile).save(args.output)  # fmt: skip
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(told(names, nearest(vectors, 1)[:, 0]))
    return 0


def nearest(vectors: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.int64]:
    """For each of the vectors [n, channels] the ``count`` others of the largest cosine, the nearest first: [n, count].

    Of a picture that is there twice the copy is a neighbour.
    """
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    found = []
    for first in range(0, len(unit), CHUNK):
        cosines = unit[first : first + CHUNK] @ unit.T
        rows = np.arange(len(cosines))
        cosines[rows, first + rows] = -np.inf  # each is its own nearest
        found.append(np.argsort(-cosines, axis=1, kind="stable")[:, :count])
    return np.concatenate(found)


def told(names: Sequence[str], neighbours: npt.NDArray[np.int64]) -> str:
    """How often a picture's neighbour is in the same folder, beside chance: that of any other picture."""
    folders = [Path(name).parent for name in names]
    same = sum(folders[k] == folders[near] for k, near in enumerate(neighbours))
    count, sizes = len(names), Counter(folders)
    chance = sum(size * (size - 1) for size in sizes.values()) / (count * (count - 1))
    return (
        f"the nearest neighbour is in the same folder for {100 * same / count:.1f} % of {count} pictures in "
        f"{len(sizes)} folders; chance: {100 * chance:.1f} %"
    )


def sheet(rows: Sequence[Sequence[str]], tile: int) -> Image.Image:
    """The pictures of the files, in rows; the first of each row stands apart."""
    step = tile + GAP
    page = Image.new("RGB", (step * len(rows[0]) + 3 * GAP, step * len(rows) - GAP), "white")
    for y, row in enumerate(rows):
        for x, name in enumerate(row):
            with Image.open(name) as picture:
                page.paste(ImageOps.fit(picture.convert("RGB"), (tile, tile)), (x * step + 4 * GAP * (x > 0), y * step))
    return page.quantize(256)  # a third of the bytes


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
