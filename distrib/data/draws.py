"""How each sample is augmented: pure functions of (seed, epoch, position), the same at every world size.

Loaders are given these numbers; none draws its own, so all loaders yield the same crops.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Boxes = npt.NDArray[np.int32]

ATTEMPTS = 10  # torchvision's RandomResizedCrop tries so often to fit a box before it takes the centre
# Columns of a sample's row of uniform numbers. A new use takes a spare column or a stream of its own, so that it
# leaves the old numbers as they were.
AREA, RATIO = slice(0, ATTEMPTS), slice(ATTEMPTS, 2 * ATTEMPTS)
TOP, LEFT, FLIP = 20, 21, 22
COLUMNS = 24  # a multiple of four: Philox makes four words at a time
STREAM = 1  # stream 0 of the same seed orders the samples


def draws(seed: int, epoch: int, positions: range) -> Floats:
    """Uniform numbers in [0, 1) for consecutive positions of an epoch: float64 [len(positions), COLUMNS].

    Philox (Salmon et al., SC 2011) makes any block of its sequence directly, so a slice costs its own length.
    """
    counter = [positions.start * (COLUMNS // 4), epoch, 0, 0]
    generator = np.random.Generator(np.random.Philox(key=[seed, STREAM], counter=counter))
    return generator.random((len(positions), COLUMNS))


def crop_boxes(
    uniform: Floats, sizes: npt.NDArray[np.integer], scale: tuple[float, float], ratio: tuple[float, float]
) -> Boxes:
    """Random resized crops, distributed as torchvision's RandomResizedCrop draws them (Szegedy et al. 2015).

    Args:
        uniform: rows of ``draws``, [n, COLUMNS].
        sizes: [n, 2] heights and widths of the images, pixels.
        scale: range of the box's share of the image's area.
        ratio: range of the box's width over height.

    Returns:
        int32 [n, 4]: top, left, height, width, in pixels of the source image.
    """
    height, width = sizes[:, :1].astype(np.float64), sizes[:, 1:].astype(np.float64)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * uniform[:, AREA])
    low, high = np.log(ratio[0]), np.log(ratio[1])
    aspect = np.exp(low + (high - low) * uniform[:, RATIO])
    widths, heights = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = fits.argmax(axis=1)
    rows = np.arange(len(uniform))
    h, w = heights[rows, first], widths[rows, first]
    height, width = height[:, 0], width[:, 0]
    top = np.floor(uniform[:, TOP] * (height - h + 1))
    left = np.floor(uniform[:, LEFT] * (width - w + 1))

    none = ~fits.any(axis=1)  # then the largest centred box whose aspect lies in the range
    shape = width / np.maximum(height, 1)
    h = np.where(none, np.where(shape < ratio[0], np.maximum(np.rint(width / ratio[0]), 1), height), h)
    w = np.where(none, np.where(shape > ratio[1], np.maximum(np.rint(height * ratio[1]), 1), width), w)
    top = np.where(none, (height - h) // 2, top)
    left = np.where(none, (width - w) // 2, left)
    return np.stack([top, left, h, w], axis=1).astype(np.int32)


def flips(uniform: Floats, probability: float) -> npt.NDArray[np.bool_]:
    """Which of the samples are mirrored: bool [n]."""
    return uniform[:, FLIP] < probability


def centre_boxes(sizes: npt.NDArray[np.integer], resize: int, crop: int) -> tuple[Boxes, Boxes]:
    """Evaluation's geometry, rounded as torchvision's Resize and CenterCrop round.

    Returns:
        int32 [n, 2] heights and widths after resizing the shorter side to ``resize``, and int32 [n, 2] top and left
        of the central ``crop`` × ``crop`` box in the resized image.
    """
    sizes = np.maximum(sizes.astype(np.int64), 1)
    resized = (resize * sizes / sizes.min(axis=1, keepdims=True)).astype(np.int32)
    return resized, np.rint((resized - crop) / 2).astype(np.int32)
