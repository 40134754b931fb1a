"""The built-in sample: 10,000 Fashion-MNIST images, unpacked once into class folders of JPEGs.

From there on it takes the very path that ImageNet takes. It is for a first run and for tests, not for results.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from distrib.config import UserError
from distrib.data.staging import staged, sweep
from distrib.layout import SAMPLE_CLASSES, SAMPLE_IMAGES
from distrib.layout.folders import reason, shown

QUALITY = 95
ARCHIVE = Path(__file__).parent / "fashion_mnist_10k.npz"
SCRATCH = ".sample-"


def unpack(target: Path, notify: Callable[[str], None] = lambda text: None, verify: bool = True) -> Path:
    """Makes ``target``, with train/ and val/, and returns it; about five seconds the first time.

    Args:
        verify: whether to look that it is whole, and to make it anew if not: for one process of each machine.

    Raises:
        UserError: it cannot be written.
    """
    sweep(target.parent, SCRATCH)
    with np.load(ARCHIVE) as archive:
        names = _names(archive["labels"])
        try:
            if target.exists():
                if not verify or _is_whole(target, names):
                    return target
                notify(f"the built-in sample in {shown(target)} is not whole: unpacking it anew")
            else:
                notify(f"unpacking the built-in sample to {shown(target)}, once")
            with staged(target, SCRATCH, lambda: _is_whole(target, names)) as work:
                for name, pixels in zip(names, archive["images"], strict=True):
                    (work / name).parent.mkdir(parents=True, exist_ok=True)
                    encoded = io.BytesIO()  # on a full disk Pillow says "encoder error -2", the system what it is
                    Image.fromarray(pixels).save(encoded, "JPEG", quality=QUALITY)
                    (work / name).write_bytes(encoded.getbuffer())
        except OSError as error:
            raise UserError(
                f"cannot unpack the sample to {shown(target.parent)}: {reason(error)}: set XDG_CACHE_HOME"
            ) from None
    return target


def _names(labels: npt.NDArray[np.integer]) -> list[str]:
    """The files in the archive's order: train/ first, the rest is held out."""
    return [
        f"{'train' if k < SAMPLE_IMAGES['train'] else 'val'}/{SAMPLE_CLASSES[label]}/{k:05d}.jpg"
        for k, label in enumerate(labels.tolist())
    ]


def _is_whole(target: Path, names: list[str]) -> bool:
    """Whether just the sample's files are there and none is empty, as those that a power cut took are."""
    found: set[str] = set()
    for folder, _, files in os.walk(target):
        if any(os.path.getsize(os.path.join(folder, file)) == 0 for file in files):
            return False
        found.update(os.path.relpath(os.path.join(folder, file), target) for file in files if file[0] != ".")
    return found == set(names)
