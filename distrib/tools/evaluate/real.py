"""ReaL labels of ImageNet's validation pictures: all that a picture shows, where the original label names one thing.

Beyer et al. 2020, Are we done with ImageNet?, arXiv 2006.07159.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distrib.config import UserError
from distrib.layout.folders import reason, shown

WHERE = "github.com/google-research/reassessed-imagenet"
NUMBER = re.compile(rb"ILSVRC2012_val_(\d{8})(?!\d)")


def read_labels(path: Path, outputs: int) -> list[list[int]]:
    """The labels of each validation picture, in the order of the pictures' numbers, which begin with 1.

    Raises:
        UserError: the file cannot be read, or is not a list of lists of outputs.
    """
    try:
        labels = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {shown(path)}: {reason(error)} (--real)") from None
    except (ValueError, RecursionError):
        raise UserError(f"{shown(path)} is not JSON: --real takes real.json of {WHERE}") from None
    wrong = None
    if not isinstance(labels, list) or not labels:
        wrong = f"holds {_kind(labels)}"
    else:
        at = next((k for k, entry in enumerate(labels) if not _is_entry(entry, outputs)), None)
        if at is not None:
            wrong = f"has {_kind(labels[at])} as entry {at}"
    if wrong:
        raise UserError(
            f"{shown(path)} {wrong}: --real takes a list of lists of labels from 0 to {outputs - 1}, a list a picture, "
            f"as real.json of {WHERE}"
        )
    return labels


def labels_of(files: Sequence[bytes], labels: Sequence[Sequence[int]], source: Path) -> list[Sequence[int]]:
    """The labels of each file, told by the number in its name.

    Raises:
        UserError: a name has no number, or the list ends before it.
    """
    found = []
    for file in files:
        name = file.rpartition(b"/")[2]
        match = NUMBER.match(name)
        if match is None:
            raise UserError(
                f"--real: {shown(file)} is not named as ImageNet's validation pictures are, "
                "ILSVRC2012_val_00000001.JPEG: their numbers say which labels are whose"
            )
        number = int(match[1])
        if not 0 < number <= len(labels):
            raise UserError(
                f"--real: {shown(source)} has labels for the pictures 1 to {len(labels):,}, none for {shown(file)}"
            )
        found.append(labels[number - 1])
    return found


def _is_entry(entry: Any, outputs: int) -> bool:
    return isinstance(entry, list) and all(type(label) is int and 0 <= label < outputs for label in entry)


def _kind(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
