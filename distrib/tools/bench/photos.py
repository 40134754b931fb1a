"""JPEGs that cost a decoder what ImageNet's do, made up from a fixed seed: no data set needed.

ILSVRC 2012's training images measure 500 × 375 pixels most often and about 110 KB on average (138 GB, 1,281,167
files). What a JPEG costs to decode follows from its pixels and its bytes; the subject does not matter.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from distrib.config import UserError
from distrib.layout import cache_dir
from distrib.tools.bench.report import cores, positive

Floats = npt.NDArray[np.float32]

VERSION = 1  # of the pictures: other ones need another folder
WIDTH, HEIGHT = 500, 375
CLASSES = 10
SEED = 20121029
FIELDS, SIDE = 8, 1024  # stock of textures, and their side in pixels
SLOPE = 1.5  # amplitude falls as 1/f^SLOPE
NOISE = (2, 18)  # grey levels, standard deviation
QUALITY = 95


def make(count: int, notify: Callable[[str], None] = lambda text: None, cache: Path | None = None) -> Path:
    """Returns a folder with ``count`` photographs in train/ and a tenth as many in val/, in ten classes each.

    Raises:
        UserError: fewer photographs than classes, or the cache cannot be written.
    """
    if count < CLASSES:
        raise UserError(f"{count} photographs are fewer than their {CLASSES} classes: ask for more")
    base = cache or cache_dir()
    target = base / f"photos-{VERSION}-{count}"
    if target.exists():
        return target
    notify(f"making {count} photographs in {target}, once")
    try:
        base.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".photos-", dir=base))
        files = []
        for split, number in (("train", count), ("val", max(CLASSES, count // 10))):
            for k in range(CLASSES):
                (work / split / f"class-{k}").mkdir(parents=True)
            files += [work / split / f"class-{k % CLASSES}" / f"{k:06d}.jpg" for k in range(number)]
        stock = textures()
        with ThreadPoolExecutor(cores()) as pool:  # numpy and the JPEG encoder both let go of Python's lock
            for data, file in zip(pool.map(partial(photo, stock), range(len(files))), files, strict=True):
                file.write_bytes(data)
        try:
            os.rename(work, target)
        except OSError:
            shutil.rmtree(work, ignore_errors=True)
            if not target.exists():  # else another process was first: the same files
                raise
    except OSError as error:
        raise UserError(f"cannot write photographs to {base}: {error.strerror}: set XDG_CACHE_HOME") from None
    return target


def textures() -> Floats:
    """Random fields, float32 [FIELDS, SIDE, SIDE], variance 1.

    Steeper than the 1/f of natural images (Field 1987): outlines and noise add the rest of the high frequencies.
    """
    generator = np.random.default_rng(SEED)
    rows, columns = np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE)[None, :]
    frequency = np.maximum(np.hypot(rows, columns), 1 / SIDE)
    fields = np.fft.irfft2(np.fft.rfft2(generator.standard_normal((FIELDS, SIDE, SIDE))) / frequency**SLOPE)
    return (fields / fields.std(axis=(1, 2), keepdims=True)).astype(np.float32)


def photo(stock: Floats, number: int) -> bytes:
    """The file of photograph ``number``: textures, an outline with a sharp edge, colour, and a sensor's noise."""
    generator = np.random.default_rng([SEED, number])

    def cut() -> Floats:
        field, top, left = generator.integers((FIELDS, SIDE - HEIGHT, SIDE - WIDTH), endpoint=False)
        return stock[field, top : top + HEIGHT, left : left + WIDTH]

    noise = generator.standard_normal((HEIGHT, WIDTH), dtype=np.float32) * generator.uniform(*NOISE)
    light = 115 + 42 * cut() + 60 * (cut() > 0.4) + noise
    warm, cold = 16 * cut(), 16 * cut()
    pixels = np.stack([light + warm, light, light + cold], axis=2).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``photos``."""
    parser.add_argument("count", type=positive, help="how many for train/; val/ gets a tenth")


def run(args: argparse.Namespace) -> None:
    """Makes them and prints their folder."""
    print(make(args.count))
