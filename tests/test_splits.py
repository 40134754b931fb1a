"""Training and validation pictures chosen from one folder: which, how many, and the same ones everywhere."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from distrib.config import DataConfig, UserError
from distrib.data import open_data
from distrib.data.index import Index
from distrib.layout import count_classes, count_images, find_splits, look
from distrib.layout.splits import Split

COUNTS = {"ant": 10, "bee": 21, "cow": 2, "dog": 100}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def fill(source: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        (source / name).mkdir(parents=True)
        for k in range(count):
            (source / name / f"{k}.jpg").touch()
    return source


@pytest.fixture(params=["flat", "train"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Class folders below the root itself, or below train/."""
    fill(tmp_path / "pets" if request.param == "flat" else tmp_path / "pets" / "train", COUNTS)
    return tmp_path / "pets"


def opened(root: Path, **settings: object) -> tuple[Index, Index]:
    indexes = open_data(DataConfig(root=str(root), **settings))
    assert indexes is not None
    return indexes


def names(index: Index) -> set[str]:
    return {str(index.path(k).relative_to(index.root)) for k in range(len(index))}


def counts(index: Index) -> dict[str, int]:
    return {name: int((index.labels == k).sum()) for k, name in enumerate(index.classes)}


def test_a_tenth_of_each_class_is_held_out(root: Path) -> None:
    train, val = opened(root)
    assert counts(val) == {"ant": 1, "bee": 2, "cow": 1, "dog": 10}
    assert counts(train) == {"ant": 9, "bee": 19, "cow": 1, "dog": 90}
    assert not names(train) & names(val)
    assert len(names(train) | names(val)) == sum(COUNTS.values())
    assert train.classes == val.classes == sorted(COUNTS)
    for index in (train, val):
        assert all(index.path(k).parent.name == index.classes[index.labels[k]] for k in range(len(index)))


def test_it_is_said_once(root: Path) -> None:
    said: list[str] = []
    open_data(DataConfig(root=str(root)), notify=said.append)
    assert sum("10 % of each class are held out: data.val_split" in line for line in said) == 1
    said.clear()
    fill(root / "val", dict.fromkeys(COUNTS, 1))
    if (root / "train").exists():
        open_data(DataConfig(root=str(root)), notify=said.append)
        assert said[-1] == "training: 133 images, validation: 4, 4 classes"


def test_names_decide_and_nothing_else(root: Path, tmp_path: Path) -> None:
    train, val = opened(root)
    elsewhere = fill(tmp_path / "copy", dict(reversed(COUNTS.items())))  # another folder, written in another order
    again, held = opened(elsewhere)
    assert (names(again), names(held)) == (names(train), names(val))
    # Pictures that come later change at most the border: few of the others change sides.
    for k in range(100, 105):
        (elsewhere / "dog" / f"{k}.jpg").touch()
    more, more_held = opened(elsewhere)
    assert len(more) + len(more_held) == sum(COUNTS.values()) + 5
    assert len(names(val) & names(more_held)) >= len(val) - 2


def test_a_larger_share_holds_out_more_and_the_same(root: Path) -> None:
    _, tenth = opened(root)
    _, half = opened(root, val_split=0.5)
    assert counts(half) == {"ant": 5, "bee": 10, "cow": 1, "dog": 50}
    assert names(tenth) < names(half)


def test_fractions_are_nested_and_leave_the_validation_alone(root: Path) -> None:
    parts = [opened(root, fraction=fraction) for fraction in (0.05, 0.2, 0.5, 1.0)]
    assert counts(parts[1][0]) == {"ant": 2, "bee": 4, "cow": 1, "dog": 18}
    assert len({part[0].fingerprint for part in parts}) == 4
    assert len({part[1].fingerprint for part in parts}) == 1
    for smaller, larger in itertools.pairwise(parts):
        assert names(smaller[0]) < names(larger[0])
        assert not names(larger[0]) & names(larger[1])


def test_chosen_classes(root: Path) -> None:
    train, val = opened(root, classes=("dog", "ant"))
    assert train.classes == val.classes == ["ant", "dog"]
    assert counts(train) == {"ant": 9, "dog": 90}
    whole, _ = opened(root)
    assert names(train) == {name for name in names(whole) if name.split("/")[0] in ("ant", "dog")}
    assert count_classes(DataConfig(root=str(root), classes=("dog", "ant"))) == 2


@pytest.mark.parametrize(
    "settings",
    [{}, {"val_split": 0.3}, {"fraction": 0.3}, {"classes": ("bee", "dog"), "fraction": 0.1, "val_split": 0.25}],
)
def test_they_are_counted_as_they_are_listed(root: Path, settings: dict[str, object]) -> None:
    cfg = DataConfig(root=str(root), **settings)
    train, val = opened(root, **settings)
    assert count_images(cfg, "train", 10**6) == len(train)
    assert count_images(cfg, "val", 10**6) == len(val)
    assert count_images(cfg, "train", 7) == 7


def test_a_validation_folder_is_taken_as_it_is_unless_a_share_is_written(tmp_path: Path) -> None:
    root = tmp_path / "pets"
    fill(root / "train", COUNTS)
    fill(root / "valid", dict.fromkeys(COUNTS, 3))
    train, val = opened(root)
    assert (len(train), len(val)) == (133, 12)
    assert val.root == root / "valid"
    train, val = opened(root, val_split=0.5)
    assert val.root == train.root == root / "train"
    assert len(train) + len(val) == 133


def refused(root: Path, **settings: object) -> str:
    lines = []
    for call in (opened, lambda root, **settings: count_images(DataConfig(root=str(root), **settings), "train", 10**6)):
        with pytest.raises(UserError) as error:
            call(root, **settings)
        lines.append(str(error.value))
    assert lines[0] == lines[1]
    assert lines[0].isprintable()
    return lines[0]


def test_a_share_that_leaves_a_class_empty(root: Path) -> None:
    folder = (root / "train" if (root / "train").exists() else root) / "cow"
    (folder / "0.jpg").unlink()
    line = refused(root)
    assert line.startswith(f"data.val_split 0.1 leaves nothing to train on in {folder} (1 picture): ")
    assert "data.classes" in line
    assert "leaves nothing" in refused(root, val_split=0.99)
    assert opened(root, classes=("ant", "bee", "dog"))[0].classes == ["ant", "bee", "dog"]


def test_an_unknown_class(root: Path) -> None:
    for cfg in ({"classes": ("ant", "dogs")}, {"root": "sample:fashion-mnist", "classes": ("3-dres",)}):
        with pytest.raises(UserError, match=r"no class folder '(dogs|3-dres)'; did you mean (dog|3-dress)\?"):
            look(DataConfig(**{"root": str(root), **cfg}))


def test_parts_of_the_sample() -> None:
    cfg = DataConfig(root="sample:fashion-mnist", classes=("8-bag", "1-trouser"), fraction=0.01)
    indexes = open_data(cfg)
    assert indexes is not None
    assert counts(indexes[0]) == {"1-trouser": 9, "8-bag": 8}
    assert (len(indexes[0]), len(indexes[1])) == (count_images(cfg, "train", 999), count_images(cfg, "val", 999))


def test_the_choice_is_the_same_in_every_locale_and_on_every_machine(tmp_path: Path) -> None:
    split = Split("val", tmp_path, held_out=0.3)
    paths = [b"c/%d.jpg" % k for k in range(10)]
    assert split.choose(paths, b"c") == [b"c/4.jpg", b"c/6.jpg", b"c/7.jpg"]  # of blake2b, whatever computes it
    rest = Split("train", tmp_path, held_out=0.3).choose(paths, b"c")
    assert sorted([*rest, b"c/4.jpg", b"c/6.jpg", b"c/7.jpg"]) == sorted(paths)


def test_folders_that_hold_no_pictures_are_no_classes(tmp_path: Path) -> None:
    (tmp_path / "ILSVRC" / "Data").mkdir(parents=True)
    with pytest.raises(UserError, match="no data at"):
        find_splits(DataConfig(root=str(tmp_path)))


def test_class_folders_called_as_splits_are(tmp_path: Path) -> None:
    """``valid`` and ``test`` are folders of splits only where they hold folders."""
    root = fill(tmp_path / "words", {"invalid": 4, "valid": 4, "Test": 4, "training": 4})
    assert opened(root)[0].classes == ["Test", "invalid", "training", "valid"]
    (root / "val").touch()  # whatever bears the name itself is meant
    with pytest.raises(UserError, match="no data at"):
        find_splits(DataConfig(root=str(root)))


def test_the_exact_name_comes_first(tmp_path: Path) -> None:
    for name in ("Train", "train", "Val", "val"):
        fill(tmp_path / "d" / name, {name: 3, "other": 3})
    train, val = find_splits(DataConfig(root=str(tmp_path / "d")))
    assert (train.source.name, val.source.name) == ("train", "val")
