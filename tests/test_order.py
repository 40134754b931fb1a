"""The order: a bijection that is evaluated anywhere, and the same global batches at every world size."""

from __future__ import annotations

import numpy as np
import pytest

from distrib.data.order import EvalPlan, Slice, TrainPlan, permute, split

COUNTS = (*range(1, 40), 63, 64, 65, 100, 255, 256, 257, 1000, 1023, 1025, 4095, 4097, 10_000, 65_536, 65_537)


def whole(count: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    return permute(np.arange(count), count, seed, epoch)


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**63 - 1])
def test_permute_is_a_bijection(seed: int) -> None:
    for count in COUNTS:
        for epoch in (0, 1, 89):
            order = whole(count, seed, epoch)
            assert order.dtype == np.int64
            assert np.array_equal(np.sort(order), np.arange(count)), (count, epoch)


def test_permute_is_a_bijection_at_the_size_of_imagenet() -> None:
    order = whole(1_281_167, seed=3, epoch=7)
    assert np.array_equal(np.bincount(order, minlength=1_281_167), np.ones(1_281_167))
    neighbours = np.corrcoef(order[:-1], order[1:])[0, 1]
    assert abs(neighbours) < 0.005
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.005


def test_epochs_and_seeds_differ() -> None:
    orders = {whole(1000, seed, epoch).tobytes() for seed in range(5) for epoch in range(20)}
    assert len(orders) == 100
    # Unrelated orders agree at one position on average.
    agree = [np.sum(whole(1000, 0, epoch) == whole(1000, 0, epoch + 1)) for epoch in range(100)]
    assert 0.6 < np.mean(agree) < 1.4


def test_random_access_equals_the_whole() -> None:
    rng = np.random.default_rng(0)
    for count in (1, 2, 3, 10, 257, 10_000):
        order = whole(count, 5, 2)
        positions = rng.integers(0, count, size=50)
        assert np.array_equal(permute(positions, count, 5, 2), order[positions])
        assert [permute(np.array([p]), count, 5, 2).item() for p in positions[:10]] == order[positions[:10]].tolist()
        assert np.array_equal(permute(positions.reshape(5, 10), count, 5, 2), order[positions].reshape(5, 10))
        assert permute(np.empty(0, dtype=np.int64), count, 5, 2).shape == (0,)


def test_permute_leaves_its_argument_alone() -> None:
    positions = np.arange(100)
    permute(positions, 100, 0, 0)
    assert np.array_equal(positions, np.arange(100))


@pytest.mark.parametrize("count", [2, 3, 5, 8, 13, 17])
def test_every_sample_is_everywhere_equally_often(count: int) -> None:
    epochs = 1000
    seen = np.zeros((count, count))
    for epoch in range(epochs):
        seen[np.arange(count), whole(count, seed=9, epoch=epoch)] += 1
    expected = epochs / count
    chi_square = ((seen - expected) ** 2 / expected).sum()
    freedom = (count - 1) ** 2
    # Its mean is `freedom` and its variance 2 × `freedom`; the draws are fixed, so this never flickers.
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom), (chi_square, freedom)


def test_every_order_of_three_and_of_four_turns_up_equally_often() -> None:
    for count, orders in ((3, 6), (4, 24)):
        epochs = 200 * orders
        found: dict[bytes, int] = {}
        for epoch in range(epochs):
            key = whole(count, 1, epoch).tobytes()
            found[key] = found.get(key, 0) + 1
        assert len(found) == orders
        chi_square = sum((n - 200) ** 2 / 200 for n in found.values())
        assert chi_square < (orders - 1) + 4 * np.sqrt(2 * (orders - 1)), (count, chi_square)


def test_split_covers_evenly_and_in_order() -> None:
    for count in range(25):
        for parts in range(1, 9):
            pieces = [split(range(100, 100 + count), k, parts) for k in range(parts)]
            assert [p for piece in pieces for p in piece] == list(range(100, 100 + count))
            assert max(map(len, pieces)) - min(map(len, pieces)) <= 1


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("accumulation", [1, 2, 3, 5])
@pytest.mark.parametrize(("images", "batch"), [(1000, 64), (997, 37), (50, 50), (1_281_167, 256)])
def test_ranks_slices_make_the_global_batch(world: int, accumulation: int, images: int, batch: int) -> None:
    alone = TrainPlan(images, batch, seed=4)
    ranks = [TrainPlan(images, batch, 4, rank, world, accumulation) for rank in range(world)]
    per_epoch = images // batch
    assert all(plan.steps_per_epoch == per_epoch for plan in ranks)
    for step in (0, 1, per_epoch - 1, per_epoch, per_epoch + 1, 3 * per_epoch + 2, 89 * per_epoch):
        (expected,) = alone.slices(step)
        assert expected.epoch == step // per_epoch
        assert len(expected.ids) == batch
        parts = [part for plan in ranks for part in plan.slices(step)]
        assert len(parts) == world * accumulation
        assert np.array_equal(np.concatenate([part.ids for part in parts]), expected.ids)
        assert [p for part in parts for p in part.positions] == list(expected.positions)
        assert {part.epoch for part in parts} == {expected.epoch}
        assert all(len(part.ids) == len(part.positions) > 0 for part in parts)
        for plan in ranks:
            sizes = [len(part.ids) for part in plan.slices(step)]
            assert max(sizes) - min(sizes) <= 1
            assert max(sizes) <= plan.largest_slice
            assert plan.slice_sizes == tuple(sorted(set(sizes), reverse=True))
        shares = [sum(len(part.ids) for part in plan.slices(step)) for plan in ranks]
        assert max(shares) - min(shares) <= 1
        assert max(len(part.ids) for part in parts) == ranks[0].largest_slice  # no forward is larger than need be
        assert min(len(part.ids) for part in parts) == ranks[0].smallest_slice


def test_stream_is_the_steps_one_after_the_other() -> None:
    plan = TrainPlan(100, 12, seed=1, rank=1, world=2, accumulation=2)
    streamed = list(plan.stream(5, 20))
    expected = [part for step in range(5, 20) for part in plan.slices(step)]
    assert len(streamed) == 30
    for left, right in zip(streamed, expected, strict=True):
        assert (left.epoch, left.positions) == (right.epoch, right.positions)
        assert np.array_equal(left.ids, right.ids)
    assert list(plan.stream(7, 7)) == []


def test_an_epoch_visits_each_sample_at_most_once_and_leaves_out_others_each_time() -> None:
    plan = TrainPlan(100, 12, seed=1)
    left_out = []
    for epoch in range(20):
        first = epoch * plan.steps_per_epoch
        ids = np.concatenate([part.ids for part in plan.stream(first, first + plan.steps_per_epoch)])
        assert len(ids) == len(set(ids.tolist())) == 96
        left_out.append(tuple(sorted(set(range(100)) - set(ids.tolist()))))
    assert len(set(left_out)) == 20


@pytest.mark.parametrize(("images", "batch"), [(1, 4), (10, 4), (12, 4), (50, 7), (256, 256), (257, 256)])
def test_evaluation_sees_every_image_once_in_the_same_batches(images: int, batch: int) -> None:
    def borders(parts: list[Slice]) -> list[tuple[int, int]]:
        return [(part.positions.start, part.positions.stop) for part in parts]

    alone = borders(EvalPlan(images, batch).slices())
    assert [stop - start for start, stop in alone[:-1]] == [batch] * (len(alone) - 1)
    for world in (1, 2, 3, 5):
        plans = [EvalPlan(images, batch, rank, world) for rank in range(world)]
        parts = [plan.slices() for plan in plans]
        ids = np.concatenate([part.ids for mine in parts for part in mine])
        assert sorted(ids.tolist()) == list(range(images))
        assert sorted(border for mine in parts for border in borders(mine)) == alone
        assert {plan.rounds for plan in plans} == {max(map(len, parts))}
        assert all(np.array_equal(part.ids, np.array(part.positions)) for mine in parts for part in mine)
