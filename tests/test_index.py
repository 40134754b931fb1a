"""The index: built once, found again, the same for every process; and what it says where the data is not right."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distrib.config import DataConfig, UserError
from distrib.data import index as index_module
from distrib.data import open_data
from distrib.data.index import Index, cache_dir, check_same_classes, open_index, write_index

CLASSES = ("ant", "bee", "Çicada", "élan 蝶")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Both splits: in each class images of different sizes, and one file that is none."""
    root = tmp_path / "data ö"
    for split, count in (("train", 3), ("val", 2)):
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for k in range(count):
                Image.new("RGB", (10 + k, 20 + label)).save(folder / f"bild_{k} ü.JPEG", format="JPEG")
            (folder / "readme.txt").write_text("not an image")
            (folder / ".hidden.jpg").write_bytes(b"")
    return root


def opened(root: Path, split: str = "train", index_dir: Path | None = None) -> tuple[Index, list[str]]:
    said: list[str] = []
    return open_index(root, split, str(index_dir) if index_dir else None, said.append), said


def config(root: Path | str, **other: object) -> DataConfig:
    return DataConfig(root=str(root), **other)


def one_line(error: pytest.ExceptionInfo[UserError], *parts: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    assert text
    for part in parts:
        assert part in text, text


def test_builds_once_and_opens_again(root: Path, cache: Path) -> None:
    index, said = opened(root)
    assert len(said) == 1
    assert str(root / "train") in said[0]
    assert len(index) == 12
    assert index.classes == sorted(CLASSES)
    assert index.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert index.labels.dtype == np.int32
    order = {name: label for label, name in enumerate(CLASSES)}
    assert index.sizes.tolist() == [[20 + order[name], 10 + k] for name in sorted(CLASSES) for k in range(3)]
    assert index.folder.parent == cache / "distrib" / "index" == cache_dir() / "index"
    assert os.listdir(index.folder.parent) == [index.folder.name]  # nothing left over from building

    before = {file: file.stat().st_mtime_ns for file in index.folder.iterdir()}
    again, said = opened(root)
    assert said == []
    assert again.fingerprint == index.fingerprint
    assert {file: file.stat().st_mtime_ns for file in index.folder.iterdir()} == before
    assert isinstance(again.sizes, np.memmap)  # all processes share the pages


def test_paths_come_back_as_they_are(root: Path) -> None:
    index, _ = opened(root)
    expected = [root / "train" / name / f"bild_{k} ü.JPEG" for name in sorted(CLASSES) for k in range(3)]
    assert [index.path(k) for k in range(len(index))] == expected
    assert all(index.path(k).is_file() for k in range(len(index)))
    ids = np.array([11, 0, 5, 5])
    encoded = index.encoded_paths(ids)
    assert all(name.dtype == np.uint8 and name.ndim == 1 for name in encoded)
    assert [bytes(name).decode() for name in encoded] == [str(expected[k]) for k in ids]


def test_names_that_are_not_utf8(root: Path) -> None:
    odd = os.fsencode(root / "train" / "ant") + b"/\xff\xfe.jpg"
    with open(odd, "wb") as stream:
        Image.new("RGB", (3, 4)).save(stream, format="JPEG")
    for _ in range(2):  # built, then opened
        index, _ = opened(root)
        (sample,) = np.flatnonzero((index.sizes == [4, 3]).all(axis=1)).tolist()
        assert os.fsencode(index.path(sample)) == odd
        assert bytes(index.encoded_paths([sample])[0]) == odd


def test_a_relative_root_is_made_absolute(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, _ = opened(root)
    monkeypatch.chdir(root.parent)
    again, said = opened(Path(root.name))
    assert said == []
    assert again.root == index.root == root / "train"


@pytest.mark.parametrize("change", ["added", "removed", "class added"])
def test_rebuilds_when_files_come_or_go(root: Path, change: str) -> None:
    index, _ = opened(root)
    if change == "added":
        shutil.copy(root / "train/ant/bild_0 ü.JPEG", root / "train/ant/new.jpg")
    elif change == "removed":
        (root / "train/bee/bild_1 ü.JPEG").unlink()
    else:
        shutil.copytree(root / "train/bee", root / "train/cow")
    again, said = opened(root)
    assert len(said) == 1
    assert len(again) == {"added": 13, "removed": 11, "class added": 15}[change]
    assert len(again.sizes) == len(again.labels) == len(again)
    assert again.fingerprint != index.fingerprint
    assert all(again.path(k).is_file() for k in range(len(again)))
    assert again.folder != index.folder
    assert pickle.loads(pickle.dumps(index)).path(0) == index.path(0)  # a job that runs since before can go on
    assert len(index) == 12
    assert opened(root)[1] == []


@pytest.mark.parametrize("damage", ["meta.json", "paths.npy", "labels.npy", "torn meta", "old version"])
def test_rebuilds_a_damaged_index(root: Path, damage: str) -> None:
    index, _ = opened(root)
    meta = index.folder / "meta.json"
    if damage == "torn meta":
        meta.write_text(meta.read_text()[:40])
    elif damage == "old version":
        meta.write_text(json.dumps(json.loads(meta.read_text()) | {"version": 0}))
    else:
        (index.folder / damage).unlink()
    again, said = opened(root)
    assert len(said) == 1
    assert again.fingerprint == index.fingerprint
    assert [again.path(k) for k in range(12)] == [index.path(k) for k in range(12)]
    assert opened(root)[1] == []


def test_splits_and_roots_do_not_share_an_index(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "other")
    indexes = [opened(r, split)[0] for r in (root, tmp_path / "other") for split in ("train", "val")]
    assert len({index.folder for index in indexes}) == 4
    assert indexes[0].fingerprint == indexes[2].fingerprint != indexes[1].fingerprint  # of the files, not of the place


def test_the_fingerprint_follows_names_and_labels(root: Path) -> None:
    index, _ = opened(root)
    (root / "train/ant/bild_0 ü.JPEG").rename(root / "train/bee/moved.JPEG")
    assert opened(root)[0].fingerprint != index.fingerprint


def test_pickling_sends_the_folders_name_only(root: Path) -> None:
    index, _ = opened(root)
    sent = pickle.dumps(index)
    assert len(sent) < 300 + len(str(index.folder))
    assert b"bild" not in sent
    there = pickle.loads(sent)
    assert there.folder == index.folder
    assert there.path(7) == index.path(7)
    assert np.array_equal(there.sizes, index.sizes)


def test_unreadable_headers_get_size_zero(root: Path) -> None:
    folder = root / "train" / "ant"
    good = (folder / "bild_0 ü.JPEG").read_bytes()
    for name, data in (("empty", b""), ("garbage", bytes(range(256))), ("text", b"hello"), ("short", good[:20])):
        (folder / f"{name}.jpg").write_bytes(data)
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    index, _ = opened(root)
    assert len(index) == 17
    unreadable = np.flatnonzero((index.sizes == 0).all(axis=1))
    assert {index.path(k).stem for k in unreadable} == {"empty", "garbage", "text", "short", "gone"}
    assert (index.sizes.min(axis=1) == 0).sum() == 5


def test_index_dir_is_used_and_readable_by_others(root: Path, tmp_path: Path, cache: Path) -> None:
    index, _ = opened(root, index_dir=tmp_path / "here" / "deep")
    assert index.folder.parent == tmp_path / "here" / "deep"
    assert not cache.exists()
    mask = os.umask(0)
    os.umask(mask)
    assert index.folder.stat().st_mode & 0o777 == 0o777 & ~mask
    assert opened(root, index_dir=tmp_path / "here" / "deep")[1] == []


def test_index_dir_may_begin_with_a_tilde(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert opened(root, index_dir=Path("~/indexes"))[0].folder.parent == tmp_path / "home" / "indexes"


def _build(root: Path, gate: object, answers: object) -> None:
    try:
        gate.wait()  # type: ignore[attr-defined]
        index = open_index(root, "train")
        good = all(index.path(k).is_file() for k in range(len(index)))
        answers.put((len(index), good, index.fingerprint))  # type: ignore[attr-defined]
    except BaseException as error:
        answers.put(f"{type(error).__name__}: {error}")  # type: ignore[attr-defined]


@pytest.mark.parametrize("stale", [False, True])
def test_processes_that_build_at_once_all_get_a_good_index(root: Path, stale: bool) -> None:
    fork = multiprocessing.get_context("fork")
    for attempt in range(8):
        if stale:
            open_index(root, "train")
            shutil.copy(root / "train/ant/bild_0 ü.JPEG", root / f"train/ant/new{attempt}.jpg")
        else:
            shutil.rmtree(cache_dir(), ignore_errors=True)
        gate, answers = fork.Barrier(4), fork.SimpleQueue()
        processes = [fork.Process(target=_build, args=(root, gate, answers)) for _ in range(4)]
        for process in processes:
            process.start()
        found = [answers.get() for _ in processes]
        for process in processes:
            process.join()
        assert len(set(found)) == 1, found
        assert found[0][:2] == (13 + attempt if stale else 12, True), found
        index, said = opened(root)
        assert said == []
        assert all(name.startswith("train-") for name in os.listdir(index.folder.parent))


@pytest.mark.parametrize("theirs", ["same", "other", "broken"])
def test_another_index_appears_while_this_one_is_written(
    root: Path, theirs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The race of the test above at its worst moment, each time."""
    rename, raced = os.rename, []

    def racing(source: object, target: object) -> None:
        if not raced:
            raced.append(shutil.copytree(str(source), str(target)))
            meta = Path(raced[0]) / "meta.json"
            if theirs != "same":
                entry = json.loads(meta.read_text()) | {"stamps": []}
                meta.write_text(json.dumps(entry) if theirs == "other" else "{")
        rename(source, target)  # type: ignore[arg-type]

    monkeypatch.setattr(index_module.os, "rename", racing)
    index, _ = opened(root)
    monkeypatch.undo()
    assert raced == [str(index.folder)]
    assert len(index) == 12
    assert all(index.path(k).is_file() for k in range(12))
    assert json.loads((index.folder / "meta.json").read_text())["stamps"]
    assert os.listdir(index.folder.parent) == [index.folder.name]


# What the user is told.


def test_missing_root(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        open_data(config(tmp_path / "nothing"), 4)
    one_line(error, str(tmp_path / "nothing" / "train"), "IMAGENET_DIR", "quickstart")


def test_missing_val(root: Path) -> None:
    shutil.rmtree(root / "val")
    with pytest.raises(UserError) as error:
        open_data(config(root), 4)
    one_line(error, str(root / "val"))


def test_empty_split(root: Path) -> None:
    shutil.rmtree(root / "train")
    (root / "train").mkdir()
    (root / "train" / "loose.jpg").write_bytes(b"")
    with pytest.raises(UserError) as error:
        open_data(config(root), 4)
    one_line(error, str(root / "train"), "no class folders")


def test_split_that_is_a_file(root: Path) -> None:
    shutil.rmtree(root / "train")
    (root / "train").write_text("")
    with pytest.raises(UserError) as error:
        open_data(config(root), 4)
    one_line(error, str(root / "train"), "Not a directory")


@pytest.mark.parametrize("count", [1, 3])
def test_classes_without_images(root: Path, count: int) -> None:
    for k in range(count):
        (root / "train" / f"a{k}").mkdir()
        (root / "train" / f"a{k}" / "notes.txt").write_text("")
    with pytest.raises(UserError) as error:
        open_data(config(root), 4)
    one_line(error, str(root / "train" / "a0"), "no images", *(["2 more"] if count == 3 else []))


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("count", [1, 5])
def test_classes_that_only_one_split_has(root: Path, split: str, count: int) -> None:
    for k in range(count):
        shutil.copytree(root / split / "ant", root / split / f"extra{k}")
    with pytest.raises(UserError) as error:
        open_data(config(root), 4)
    one_line(error, "extra0", f"({count} in all) in {root / split} but not in", *([" …"] if count > 3 else []))


def test_same_classes_pass(root: Path) -> None:
    check_same_classes(opened(root)[0], opened(root, "val")[0])


def test_wrong_number_of_classes(root: Path) -> None:
    with pytest.raises(UserError) as error:
        open_data(config(root), 1000)
    one_line(error, "1000", str(root), "model.num_classes=4")


@pytest.mark.parametrize("variable", ["${IMAGENET_DIR}", "${IMAGENET_DIR}/raw", ""])
def test_unset_variable(variable: str) -> None:
    with pytest.raises(UserError) as error:
        open_data(config(variable), 4)
    one_line(error, repr(variable), "IMAGENET_DIR", "quickstart")


def test_index_dir_that_cannot_be_written(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as error:
        open_data(config(root, index_dir=str(tmp_path / "file" / "below")), 4)
    one_line(error, str(tmp_path / "file" / "below"), "Not a directory", "data.index_dir")


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def save(file: object, array: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(index_module.np, "save", save)
    yield
    monkeypatch.undo()


@pytest.mark.usefixtures("full_disk")
def test_full_disk_leaves_nothing_behind(root: Path, cache: Path) -> None:
    with pytest.raises(UserError) as error:
        open_data(config(root), 4)
    one_line(error, "No space left on device", "data.index_dir")
    assert os.listdir(cache / "distrib" / "index") == []


def test_open_data_returns_both_splits(root: Path) -> None:
    indexes = open_data(config(root), 4)
    assert indexes is not None
    assert [len(index) for index in indexes] == [12, 8]
    assert open_data(DataConfig(loader="synthetic"), 4) is None


def test_write_index_of_other_data(tmp_path: Path) -> None:
    labels, sizes = np.array([0, 0, 1], dtype=np.int32), np.array([[1, 2], [3, 4], [5, 6]], dtype=np.int32)
    index = write_index(tmp_path / "i", tmp_path / "r", ["x", "y"], ["x/a", "x/bb", "y/c"], labels, sizes)
    assert [index.path(k) for k in range(3)] == [tmp_path / "r" / name for name in ("x/a", "x/bb", "y/c")]
    assert index.sizes.tolist() == sizes.tolist()
