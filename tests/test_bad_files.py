"""Files that hold no picture: alike for both loaders, each named once, remembered as long as they stay the same."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from loading import (
    DEPRECATED,
    IMAGES,
    LOADERS,
    Opened,
    corruptions,
    distances,
    encoded,
    entries,
    files,
    needs_dali,
    reference,
    same,
)
from PIL import Image

from distrib.config import DataConfig, UserError
from distrib.data import Index, TrainPlan, quarantine
from distrib.data.decode import plain_shape, to_ppm
from distrib.data.order import Slice

pytestmark = [DEPRECATED, pytest.mark.usefixtures("one_thread")]


def relative(index: Index, sample: int) -> str:
    return str(index.path(sample).relative_to(index.root))


@pytest.fixture
def planted(photographs: Path, tmp_path: Path) -> tuple[Path, dict[int, str], dict[int, int]]:
    """The photographs with bad files: the root, the bad samples of either split, and the stand-in of each."""
    root = tmp_path / "planted"
    shutil.copytree(photographs / "444", root)
    # Two in a row, and the last one, whose stand-in is the first.
    bad = dict(zip((4, 5, 20, 33, 47, IMAGES - 1), corruptions(), strict=True))
    for split in ("train", "val"):
        for sample, name in bad.items():
            files(root, split)[sample].write_bytes(corruptions()[name])
    return root, bad, {4: 6, 5: 6, 20: 21, 33: 34, 47: 48, IMAGES - 1: 0}


@pytest.mark.parametrize("kind", LOADERS)
def test_bad_files_are_named_once_and_replaced(
    planted: tuple[Path, dict[int, str], dict[int, int]], small: DataConfig, tmp_path: Path, kind: str
) -> None:
    root, bad, stand_in = planted
    cfg, path = small.model_copy(update={"root": str(root)}), tmp_path / "bad_samples.jsonl"
    opened = Opened(kind, cfg, bad=path)
    plan = TrainPlan(IMAGES, 16, 3)
    batches = opened.train(0, 12)  # three epochs
    scores = [opened.evaluate() for _ in range(2)]

    for split, index in (("train", opened.index), ("val", opened.val)):
        rows = entries(path, split)
        assert sorted(row["file"] for row in rows) == sorted(relative(index, sample) for sample in bad)
        for row in rows:
            assert row.keys() == quarantine.FIELDS.keys()
            status = (index.root / row["file"]).stat()
            assert (row["kind"], row["bytes"], row["mtime_ns"]) == ("decode", status.st_size, status.st_mtime_ns)
            assert row["reason"]
            assert "\n" not in row["reason"]
    assert len(opened.said) == 2 * len(bad)
    for sample in bad:
        assert sum(str(opened.index.path(sample)) in line and "replaced" in line for line in opened.said) == 1
        assert sum(str(opened.val.path(sample)) in line and "not counted" in line for line in opened.said) == 1

    met = 0
    for part, batch in zip(plan.stream(0, 12), batches, strict=True):
        assert np.array_equal(batch.ids, part.ids)
        for row, (position, sample) in enumerate(zip(part.positions, part.ids.tolist(), strict=True)):
            if sample in bad:
                met += 1
                read = stand_in[sample]
                assert batch.labels[row] == opened.index.labels[read]
                expected = reference(opened.index, read, cfg, 3, part.epoch, position)
                assert (batch.images[row].int() - expected.int()).abs().float().mean() < 0.5
            else:
                assert batch.labels[row] == opened.index.labels[sample]
    assert met == 3 * len(bad)

    for batch in (batch for score in scores for batch in score):
        wrong = [int(sample) in bad for sample in batch.ids]
        assert torch.equal(batch.labels == -1, torch.tensor(wrong))
        assert np.array_equal(batch.labels[batch.labels >= 0].numpy(), opened.val.labels[batch.ids[~np.array(wrong)]])

    # A restart knows them: not a word, and the same batches from any step on.
    again = Opened(kind, cfg, bad=path)
    assert same(again.train(5, 12), batches[5:])
    again.evaluate()
    assert again.said == []
    assert len(path.read_text().splitlines()) == 2 * len(bad)


@needs_dali
def test_both_loaders_replace_alike(
    planted: tuple[Path, dict[int, str], dict[int, int]], small: DataConfig, tmp_path: Path
) -> None:
    cfg = small.model_copy(update={"root": str(planted[0])})
    paths = [tmp_path / kind for kind in ("dali", "torchvision")]
    both = [Opened(path.name, cfg, bad=path) for path in paths]
    assert distances(*(opened.train(0, 8, batch=13, accumulation=2) for opened in both)).mean() < 0.3
    good = [
        [
            batch._replace(images=batch.images[batch.labels >= 0], labels=batch.labels[batch.labels >= 0])
            for batch in opened.evaluate()
        ]
        for opened in both
    ]
    assert distances(*good).mean() < 0.3
    found = [
        {(row["split"], row["file"], row["reason"]) for s in ("train", "val") for row in entries(path, s)}
        for path in paths
    ]
    assert found[0] == found[1]
    assert len(found[0]) == 2 * len(planted[1])


@needs_dali
def test_bad_files_where_the_resize_crops(
    planted: tuple[Path, dict[int, str], dict[int, int]], small: DataConfig
) -> None:
    cfg = small.model_copy(update={"root": str(planted[0])})
    opened = Opened("dali", cfg)
    opened.loader._crop_in_resize = True  # type: ignore[attr-defined]
    assert distances(opened.train(0, 8), Opened("torchvision", cfg).train(0, 8)).mean() < 0.4
    assert len(opened.said) == len(planted[1])


def test_worker_processes_name_a_bad_file_once(
    planted: tuple[Path, dict[int, str], dict[int, int]], small: DataConfig, tmp_path: Path
) -> None:
    """Each process finds it for itself."""
    root, bad, _ = planted
    cfg, path = small.model_copy(update={"root": str(root)}), tmp_path / "bad_samples.jsonl"
    helped = Opened("torchvision", cfg, bad=path, workers=2)
    assert same(helped.train(0, 12), Opened("torchvision", cfg).train(0, 12))
    assert sorted(row["file"] for row in entries(path, "train")) == [relative(helped.index, k) for k in sorted(bad)]


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("name", ["truncated", "text"])  # with a header and without
def test_no_good_file_at_all_is_the_users_error(small: DataConfig, tmp_path: Path, kind: str, name: str) -> None:
    for split in ("train", "val"):
        for k in range(8):
            file = tmp_path / "all bad" / split / f"class{k % 2}" / f"{k}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(corruptions()[name])
    cfg, path = small.model_copy(update={"root": str(tmp_path / "all bad")}), tmp_path / "bad_samples.jsonl"
    opened = Opened(kind, cfg, bad=path, classes=2, workers=1)
    with pytest.raises(UserError, match=r"none of the 8 images in .*/train can be read"):
        opened.train(0, 2, batch=4)
    with pytest.raises(UserError, match=r"none of the 8 images in .*/val can be read"):
        opened.evaluate()
    with pytest.raises(
        UserError, match="all 8 images of train/ unreadable"
    ):  # and not an endless search for a good one
        Opened(kind, cfg, bad=path, classes=2)


@needs_dali
def test_a_graph_that_fails_on_everything_is_not_the_files_fault(
    small: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distrib.data import dali

    def feed(self: object, part: Slice, pictures: list[object]) -> tuple[object, ...]:
        boxes = np.zeros((2, len(pictures), 2), dtype=np.float32)
        return [np.frombuffer(b"no picture", dtype=np.uint8)] * len(pictures), *boxes, np.zeros(len(pictures), np.int32)

    opened = Opened("dali", small)
    monkeypatch.setattr(dali._TrainFeeder, "feed", feed)
    with pytest.raises(RuntimeError, match="not over single bad files"):
        opened.train(0, 4)
    assert opened.said == []


@needs_dali
def test_what_only_dali_refuses_is_decoded_for_it(
    photographs: Path, small: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And with the same pixels wherever it turns up: from the start, later, alone or among others."""
    from distrib.data import dali

    root = tmp_path / "refused"
    shutil.copytree(photographs / "444", root)
    with Image.open(files(root)[9]) as picture:
        tiff = encoded(picture.convert("1"), "TIFF")  # which DALI does not read
        shape = picture.height, picture.width
    for split in ("train", "val"):
        files(root, split)[9].write_bytes(tiff)
    monkeypatch.setattr(dali, "plain_shape", lambda data: shape if data == tiff else plain_shape(data))
    cfg = small.model_copy(update={"root": str(root)})
    path = tmp_path / "bad_samples.jsonl"
    made = []
    opened = Opened("dali", cfg, bad=path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dali, "to_ppm", lambda image: made.append(image.shape) or to_ppm(image))
        batches, scores = opened.train(0, 8), opened.evaluate()
    assert made
    assert opened.said == []
    assert entries(path, "train") == entries(path, "val") == []
    other = Opened("torchvision", cfg)
    assert distances(batches, other.train(0, 8)).mean() < 0.3
    assert distances(scores, other.evaluate()).mean() < 0.3
    for first in (1, 3, 6):
        assert same(Opened("dali", cfg).train(first, 8), batches[first:])
