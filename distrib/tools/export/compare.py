"""A file that was written, loaded again, against the network that it is of: logits of random images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distrib.config import settled
from distrib.faults import Failure
from distrib.trained import Trained

Call = Callable[[Tensor], Tensor]  # images fp32 [n, 3, h, w], normalised → logits [n, classes]
SEED = 0
BATCHES = (1, 2, 5)


@dataclass(frozen=True)
class Comparison:
    """What was compared.

    Attributes:
        shapes: (images, height, width) of each batch.
        difference: the largest of the logits' differences.
        largest: the largest of the network's logits, regardless of sign.
    """

    shapes: tuple[tuple[int, int, int], ...]
    difference: float
    largest: float

    @property
    def relative(self) -> float:
        """``difference`` over ``largest``."""
        return self.difference / self.largest if self.difference else 0.0


def compare(trained: Trained, call: Call, any_size: bool, tolerance: float) -> Comparison:
    """Compares ``call``, the reloaded file, with the network in fp32.

    Args:
        any_size: try another height and width, too, than the evaluation's.
        tolerance: the greatest difference, as a part of the largest logit; 0: equal to the bit.

    Raises:
        Failure: it is greater.
    """
    size = settled(trained.config.data.eval_size)
    shapes = [(count, size, size) for count in BATCHES]
    if any_size:
        shapes.append((2, size + size // 4, size + size // 7))
    generator = torch.Generator().manual_seed(SEED)
    mean, std = (
        torch.tensor(values).view(1, 3, 1, 1) for values in (trained.config.data.mean, trained.config.data.std)
    )
    difference, largest = 0.0, 0.0
    for count, height, width in shapes:
        pixels = torch.randint(256, (count, 3, height, width), generator=generator).float()
        images = (pixels - mean) / std
        with torch.inference_mode():
            expected = trained.network(images)
        if not expected.isfinite().all():
            raise Failure(f"the logits of {trained.source} are no numbers (NaN) on random images: nothing was written")
        found, most = call(images), expected.abs().max().item()
        if found.shape != expected.shape:
            raise Failure(f"the file gives {list(found.shape)} logits, not {list(expected.shape)}: nothing was written")
        gap = (found - expected).abs().max().item()
        difference, largest = max(difference, gap), max(largest, most)
        if not gap <= tolerance * most:  # so that NaN fails
            raise Failure(
                f"the file's logits differ from the network's by {gap:.3g} on {count} images of {height}×{width}, "
                f"where the largest is {most:.3g}: nothing was written"
            )
    return Comparison(tuple(shapes), difference, largest)
