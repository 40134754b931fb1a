"""The built-in sample: 10,000 Fashion-MNIST images, unpacked once into class folders of JPEGs.

From there on it takes the very path that ImageNet takes. It is for a first run and for tests, not for results.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from distrib.config import UserError

ROOT = "sample:fashion-mnist"  # what data.root says for it
TRAIN_IMAGES = 8_000  # the rest are held out
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")
QUALITY = 95
ARCHIVE = Path(__file__).parent / "fashion_mnist_10k.npz"


def unpack(cache: Path, notify: Callable[[str], None] = lambda text: None) -> Path:
    """Returns the sample's folder below ``cache``, with train/ and val/; about five seconds the first time.

    Raises:
        UserError: the cache cannot be written.
    """
    target = cache / "fashion-mnist-10k"
    if target.exists():
        return target
    notify(f"unpacking the built-in sample to {target}, once")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".sample-", dir=cache))
        with np.load(ARCHIVE) as archive:
            images, labels = archive["images"], archive["labels"]
        for k, (pixels, label) in enumerate(zip(images, labels, strict=True)):
            # Numbered, so that the folders sort in the order of Debian, Kaggle and everyone's label tables.
            folder = work / ("train" if k < TRAIN_IMAGES else "val") / f"{label}-{CLASSES[label]}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{k:05d}.jpg", quality=QUALITY)
        try:
            os.rename(work, target)
        except OSError:
            shutil.rmtree(work, ignore_errors=True)
            if not target.exists():  # else another process was first: the same files
                raise
    except OSError as error:
        raise UserError(f"cannot unpack the sample to {cache}: {error.strerror}: set XDG_CACHE_HOME") from None
    return target
