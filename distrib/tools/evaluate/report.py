"""What the guesses tell, class by class, and how a person reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from rich.cells import cell_len

from distrib.config import TOP5_CLASSES
from distrib.layout import imagenet
from distrib.layout.folders import shown

if TYPE_CHECKING:
    from distrib.trained import Trained

PAIRS = 100  # of confused classes, in the result


@dataclass(frozen=True)
class Answers:
    """The guesses beside what is right.

    Attributes:
        folders: each image's class folder, int [images].
        columns: the output that each folder means, int [folders].
        best: the best outputs of each image, best first, int [images, 5]; -1 in the first place: not counted.
    """

    folders: npt.NDArray[Any]
    columns: npt.NDArray[Any]
    best: npt.NDArray[np.int32]


@dataclass(frozen=True)
class Names:
    """Of each output: ``names`` as folders are called, ``titles`` for a person; ``folders``: the class folders'."""

    folders: Sequence[str]
    names: Sequence[str]
    titles: Sequence[str]

    @classmethod
    def of(cls, folders: Sequence[str], columns: Sequence[int], trained: Trained) -> Names:
        """Outputs without a folder are called as the weights call them: ImageNet's by number where the folders are."""
        if trained.is_imagenets and imagenet.outputs(folders) is not None:
            numbered = folders[0] not in imagenet.wnids()
            known = list(map(str, range(trained.outputs))) if numbered else list(imagenet.wnids())
            names, titles = known, trained.titles()
        elif trained.classes is not None:
            names, titles = list(trained.classes), trained.titles()
        else:  # there is a folder for each output, and no other name
            names = list(folders)
            titles = names
        return cls(folders, names, titles)


def details(answers: Answers, names: Names, real: Sequence[Sequence[int]] | None) -> dict[str, Any]:
    """The part of the result that needs to know each image's guess.

    per_class has each folder in order, confused the most frequent pairs, the most frequent first; with ``real``, the
    ReaL labels of each image, real_top1 (percent) and real_images: those without a label are left out.
    """
    counted = answers.best[:, 0] >= 0
    folders, guess = answers.folders[counted], answers.best[counted, 0]
    right = guess == answers.columns[folders]
    images = np.bincount(folders, minlength=len(names.folders))
    hits = np.bincount(folders[right], minlength=len(names.folders))
    titles = [names.titles[column] for column in answers.columns]
    per_class = [
        {"class": name, "title": title, "images": int(n), "top1": 100 * int(k) / int(n) if n else None}
        for name, title, n, k in zip(names.folders, titles, images, hits, strict=True)
    ]
    pairs, times = np.unique(np.stack([folders[~right], guess[~right]], axis=1), axis=0, return_counts=True)
    first = np.argsort(-times, kind="stable")[:PAIRS]
    confused = [
        {
            "class": names.folders[folder],
            "as": names.names[output],
            "images": int(n),
            "title": titles[folder],
            "as_title": names.titles[output],
        }
        for (folder, output), n in zip(pairs[first].tolist(), times[first], strict=True)
    ]
    return {**_real(answers.best[:, 0], real), "per_class": per_class, "confused": confused}


def _real(guesses: npt.NDArray[np.int32], real: Sequence[Sequence[int]] | None) -> dict[str, Any]:
    if real is None:
        return {}
    right = [guess in labels for guess, labels in zip(guesses.tolist(), real, strict=True) if labels and guess >= 0]
    return {"real_top1": 100 * sum(right) / max(len(right), 1), "real_images": len(right)}


def sentence(result: Mapping[str, Any]) -> str:
    """The result for a person."""
    top5 = f"top-5 {result['top5']:.2f} %, " if result["outputs"] >= TOP5_CLASSES else ""
    real = ""
    if "real_top1" in result:
        real = f"; ReaL top-1 {result['real_top1']:.2f} % on the {result['real_images']:,} that have such labels"
    ways = [f"crop {result['size']} of {result['resize']} px", result["arithmetic"]]
    ways += ["mirror images too"] if result["flip"] else []
    ways += ["guessed among these classes alone"] if result["scored_over"] == "subset" else []
    return (
        f"{result['weights']}: top-1 {result['top1']:.2f} %, {top5}loss {result['loss']:.4f} on {result['images']:,} "
        f"images of {result['data']} ({', '.join(ways)}){real}"
    )


def tables(result: Mapping[str, Any], rows: int | None) -> list[str]:
    """Lines: the worst classes and the most confused pairs, ``rows`` of each; none without a number."""
    if rows is None:
        return []
    scored = [row for row in result["per_class"] if row["images"]]
    worst = sorted(scored, key=lambda row: (row["top1"], -row["images"]))[:rows]
    pairs = result["confused"][:rows]
    lines = _aligned(
        ("worst classes", "top-1", "images"),
        [(row["title"], f"{row['top1']:.2f} %", f"{row['images']:,}") for row in worst],
    )
    if not pairs:
        return ["", *lines, "", "no image was taken for another class"]
    told = [(f"{row['title']} as {row['as_title']}", f"{row['images']:,}") for row in pairs]
    return ["", *lines, "", *_aligned(("most often confused", "images"), told)]


def _aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of text, the first one to the left, numbers to the right."""
    table = [[shown(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(cell_len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        pads = [" " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)]
        lines.append("   ".join([row[0] + pads[0], *(pad + cell for pad, cell in zip(pads[1:], row[1:], strict=True))]))
    return lines
