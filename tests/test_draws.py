"""The draws: the same rows wherever they are asked for, and crops as torchvision's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from distrib.data.draws import ATTEMPTS, COLUMNS, FLIP, LEFT, TOP, centre_boxes, crop_boxes, draws, flips
from distrib.data.order import TrainPlan

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def boxes_of(height: int, width: int, count: int, scale: tuple = SCALE, ratio: tuple = RATIO, seed: int = 0):
    sizes = np.tile(np.array([[height, width]], dtype=np.int32), (count, 1))
    return crop_boxes(draws(seed, 0, range(count)), sizes, scale, ratio)


def test_rows_do_not_depend_on_the_slice_they_are_asked_in() -> None:
    rows = draws(7, 3, range(500))
    assert rows.shape == (500, COLUMNS)
    assert rows.dtype == np.float64
    assert rows.min() >= 0
    assert rows.max() < 1
    for start, stop in ((0, 1), (0, 500), (1, 2), (123, 321), (499, 500), (250, 250)):
        assert np.array_equal(draws(7, 3, range(start, stop)), rows[start:stop])


@pytest.mark.parametrize(("world", "accumulation"), [(1, 3), (2, 1), (3, 2), (7, 1)])
def test_ranks_rows_are_the_global_rows(world: int, accumulation: int) -> None:
    (batch,) = TrainPlan(1000, 50, seed=2).slices(31)
    rows = draws(2, batch.epoch, batch.positions)
    parts = [p for rank in range(world) for p in TrainPlan(1000, 50, 2, rank, world, accumulation).slices(31)]
    assert np.array_equal(np.concatenate([draws(2, part.epoch, part.positions) for part in parts]), rows)


def test_rows_seeds_and_epochs_are_unrelated() -> None:
    rows = np.concatenate([draws(seed, epoch, range(200)) for seed in (0, 1, 2**63 - 1) for epoch in (0, 1, 89)])
    assert len(np.unique(rows)) == rows.size
    assert np.abs(np.corrcoef(rows, rowvar=False) - np.eye(COLUMNS)).max() < 0.1
    counts, _ = np.histogram(rows, bins=100, range=(0, 1))
    assert ((counts - rows.size / 100) ** 2 / (rows.size / 100)).sum() < 99 + 4 * np.sqrt(198)


def test_far_positions_of_neighbouring_epochs_do_not_meet() -> None:
    assert not np.array_equal(draws(0, 0, range(2**40, 2**40 + 5)), draws(0, 1, range(5)))
    assert np.array_equal(draws(0, 0, range(2**40, 2**40 + 5))[3:], draws(0, 0, range(2**40 + 3, 2**40 + 5)))


@pytest.mark.parametrize("ratio", [RATIO, (1.0, 1.0), (3.0, 4.0), (0.2, 0.25), (0.1, 10.0)])
@pytest.mark.parametrize("scale", [SCALE, (1.0, 1.0), (1e-6, 1e-5)])
@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (1, 2), (2, 1), (1, 1000), (1000, 1), (9000, 20), (20, 9000), (3, 2), (375, 500)]
)
def test_boxes_lie_in_the_image(height: int, width: int, scale: tuple, ratio: tuple) -> None:
    boxes = boxes_of(height, width, 300, scale, ratio)
    assert boxes.dtype == np.int32
    top, left, h, w = boxes.T
    assert top.min() >= 0
    assert left.min() >= 0
    assert h.min() >= 1
    assert w.min() >= 1
    assert (top + h).max() <= height
    assert (left + w).max() <= width


def test_boxes_of_many_sizes_at_once_are_those_of_each() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 600, size=(200, 2)).astype(np.int32)
    uniform = draws(0, 0, range(200))
    together = crop_boxes(uniform, sizes, SCALE, RATIO)
    for k in range(200):
        assert np.array_equal(crop_boxes(uniform[k : k + 1], sizes[k : k + 1], SCALE, RATIO)[0], together[k])


def test_extreme_draws_reach_the_borders_and_no_further() -> None:
    uniform = np.full((2, COLUMNS), 0.5)
    uniform[:, :ATTEMPTS] = 0.0  # the smallest area, so that there is room
    uniform[0, [TOP, LEFT]] = 0.0
    uniform[1, [TOP, LEFT]] = np.nextafter(1.0, 0.0)
    first, last = crop_boxes(uniform, np.array([[300, 400], [300, 400]]), SCALE, RATIO)
    assert first[:2].tolist() == [0, 0]
    assert (last[:2] + last[2:]).tolist() == [300, 400]


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [
        (375, 500, SCALE, RATIO),
        (500, 333, (0.35, 1.0), RATIO),
        (28, 28, (0.6, 1.0), RATIO),
        (100, 400, SCALE, RATIO),  # many attempts fail, some all ten
        (60, 500, (0.5, 1.0), RATIO),  # all fail: the central box
        (400, 150, (0.2, 0.9), (0.5, 2.0)),
    ],
)
def test_boxes_are_distributed_as_torchvisions(height: int, width: int, scale: tuple, ratio: tuple) -> None:
    count = 5000
    ours = boxes_of(height, width, count, scale, ratio, seed=1).astype(np.float64)
    image = torch.empty(3, height, width, device="meta")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = np.array([RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(count)])
    theirs = theirs.astype(np.float64)

    def features(boxes: np.ndarray) -> dict[str, np.ndarray]:
        top, left, h, w = boxes.T
        return {
            "area": h * w / (height * width),
            "log ratio": np.log(w / h),
            "top": top / height,
            "left": left / width,
            "bottom": (top + h) / height,
            "right": (left + w) / width,
        }

    for name, here in features(ours).items():
        there = features(theirs)[name]
        spread = max(here.std(), there.std())
        # Five standard errors of the difference; and Kolmogorov and Smirnov's distance, where 0.033 is the 1 % point.
        assert abs(here.mean() - there.mean()) <= 5 * spread * np.sqrt(2 / count) + 1e-9, name
        grid = np.unique(np.concatenate([here, there]))
        steps = [np.searchsorted(np.sort(x), grid, side="right") / count for x in (here, there)]
        assert np.abs(steps[0] - steps[1]).max() < 0.035, name
        for q in (0.05, 0.25, 0.5, 0.75, 0.95):
            assert abs(np.quantile(here, q) - np.quantile(there, q)) < 0.15 * spread + 1e-9, (name, q)


def test_where_nothing_fits_the_box_is_torchvisions() -> None:
    for height, width in ((1, 1000), (1000, 3), (9000, 20), (20, 9000), (7, 61)):
        expected = RandomResizedCrop.get_params(torch.empty(3, height, width, device="meta"), [1.0, 1.0], list(RATIO))
        assert np.array_equal(boxes_of(height, width, 20, (1.0, 1.0)), np.tile(expected, (20, 1)))


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])
def test_flips_have_their_probability(probability: float) -> None:
    uniform = draws(3, 1, range(20_000))
    mirrored = flips(uniform, probability)
    assert mirrored.dtype == np.bool_
    assert abs(mirrored.mean() - probability) <= 4 * np.sqrt(probability * (1 - probability) / 20_000)
    assert np.array_equal(mirrored, uniform[:, FLIP] < probability)


def test_flips_have_nothing_to_do_with_the_boxes() -> None:
    mirrored = flips(draws(1, 0, range(5000)), 0.5)
    for column in boxes_of(375, 500, 5000, seed=1).T.astype(np.float64):
        assert abs(np.corrcoef(column, mirrored)[0, 1]) < 0.05


@pytest.mark.parametrize(("resize", "crop"), [(256, 224), (232, 224), (28, 28), (33, 32), (37, 12)])
def test_centre_boxes_are_torchvisions(resize: int, crop: int) -> None:
    rng = np.random.default_rng(resize)
    sizes = np.concatenate(
        [
            rng.integers(20, 700, size=(60, 2)),
            [[1, 1], [1, 9], [9, 1], [375, 500], [500, 375], [256, 256], [257, 256], [255, 256], [333, 500], [3, 1]],
        ]
    )
    resized, top_left = centre_boxes(sizes, resize, crop)
    assert resized.dtype == top_left.dtype == np.int32
    for size, shape, corner in zip(sizes.tolist(), resized.tolist(), top_left.tolist(), strict=True):
        image = F.resize(torch.zeros(1, *size, dtype=torch.uint8), [resize], antialias=False)
        assert list(image.shape[1:]) == shape, size
        rows, columns = torch.arange(shape[0]).view(1, -1, 1), torch.arange(shape[1]).view(1, 1, -1)
        box = F.center_crop(rows * 100_000 + columns, [crop, crop])
        assert box.shape == (1, crop, crop)
        assert [int(box[0, 0, 0]) // 100_000, int(box[0, 0, 0]) % 100_000] == corner, size
