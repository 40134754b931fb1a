"""The index: built once, found again, the same for every process; and what it says where the data is not right."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from distrib import layout
from distrib.config import DataConfig, UserError
from distrib.data import index as index_module
from distrib.data import open_data, staging
from distrib.data.index import Damaged, Index, open_index
from distrib.faults import Interrupted
from distrib.layout import cache_dir, folders
from distrib.layout.splits import Split

CLASSES = ("ant", "bee", "Çicada", "élan 蝶")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Both splits: in each class images, and one file that is none."""
    root = tmp_path / "data ö"
    for split, count in (("train", 3), ("val", 2)):
        for name in CLASSES:
            folder = root / split / name
            folder.mkdir(parents=True)
            for k in range(count):
                (folder / f"bild_{k} ü.JPEG").touch()  # nobody opens it
            (folder / "readme.txt").write_text("not an image")
            (folder / ".hidden.jpg").write_bytes(b"")
    return root


def opened(root: Path, split: str = "train", index_dir: Path | None = None) -> tuple[Index, list[str]]:
    said: list[str] = []
    return open_index(Split(split, root / split), str(index_dir) if index_dir else None, said.append), said


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
    assert index.folder.parent == cache / "distrib" / "index" == cache_dir() / "index"
    assert os.listdir(index.folder.parent) == [index.folder.name]  # nothing left over from building

    before = {file: file.stat().st_mtime_ns for file in index.folder.iterdir()}
    again, said = opened(root)
    assert said == []
    assert again.fingerprint == index.fingerprint
    assert {file: file.stat().st_mtime_ns for file in index.folder.iterdir()} == before
    assert isinstance(again.labels.base, np.memmap)  # all processes share the pages


def test_paths_come_back_as_they_are(root: Path) -> None:
    index, _ = opened(root)
    expected = [root / "train" / name / f"bild_{k} ü.JPEG" for name in sorted(CLASSES) for k in range(3)]
    assert [index.path(k) for k in range(len(index))] == expected
    assert all(index.path(k).is_file() for k in range(len(index)))
    assert [index.encoded_path(k).decode() for k in (11, 0, 5, 5)] == [str(expected[k]) for k in (11, 0, 5, 5)]


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
    assert len(again.labels) == len(again)
    assert again.fingerprint != index.fingerprint
    assert all(again.path(k).is_file() for k in range(len(again)))
    assert again.folder != index.folder
    assert pickle.loads(pickle.dumps(index)).path(0) == index.path(0)  # a job that runs since before can go on
    assert len(index) == 12
    assert opened(root)[1] == []


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 0x40
    file.write_bytes(data)


def edit(index: Index, **values: object) -> None:
    meta = index.folder / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | values))


def store(index: Index, name: str, array: np.ndarray) -> None:
    np.save(index.folder / f"{name}.npy", array)


ARRAYS = ("paths", "offsets", "labels")
DAMAGE: dict[str, Callable[[Index], object]] = {
    **{f"{name} missing": lambda i, name=name: (i.folder / f"{name}.npy").unlink() for name in ARRAYS},
    **{f"{name} empty": lambda i, name=name: (i.folder / f"{name}.npy").write_bytes(b"") for name in ARRAYS},
    **{f"{name} cut": lambda i, name=name: os.truncate(i.folder / f"{name}.npy", 130) for name in ARRAYS},
    **{f"{name} in its header": lambda i, name=name: os.truncate(i.folder / f"{name}.npy", 30) for name in ARRAYS},
    **{f"{name} zeros": lambda i, name=name: (i.folder / f"{name}.npy").write_bytes(bytes(300)) for name in ARRAYS},
    **{f"{name} a folder": lambda i, name=name: ((i.folder / f"{name}.npy").unlink(),
                                                 (i.folder / f"{name}.npy").mkdir()) for name in ARRAYS},
    **{f"{name} one short": lambda i, name=name: store(i, name, np.load(i.folder / f"{name}.npy")[:-1].copy())
       for name in ARRAYS},
    "labels of another type": lambda i: store(i, "labels", np.zeros(12, np.int64)),
    "labels in a table": lambda i: store(i, "labels", np.zeros((12, 1), np.int32)),
    "labels as objects": lambda i: np.save(i.folder / "labels.npy", np.array([None] * 12), allow_pickle=True),
    "no scalar": lambda i: store(i, "offsets", np.array(3, np.int64)),
    "meta missing": lambda i: (i.folder / "meta.json").unlink(),
    "meta empty": lambda i: (i.folder / "meta.json").write_bytes(b""),
    "meta torn": lambda i: os.truncate(i.folder / "meta.json", 40),
    "meta no text": lambda i: (i.folder / "meta.json").write_bytes(b"\xff\xfe\x00"),
    "meta nested deeply": lambda i: (i.folder / "meta.json").write_text("[" * 100_000),
    **{f"meta is {text}": lambda i, text=text: (i.folder / "meta.json").write_text(text)
       for text in ("null", "[]", "3", '"text"', "{}", '{"root": 3}')},
    "classes no list": lambda i: edit(i, classes="ant"),
    "no checksum": lambda i: edit(i, checksum=None),
}  # fmt: skip
# What only the checksum finds, or what is read for it.
HIDDEN: dict[str, Callable[[Index], object]] = {
    **{f"{name} flipped": lambda i, name=name: flip(i.folder / f"{name}.npy", 137) for name in ARRAYS},
    "offsets fall": lambda i: store(i, "offsets", np.load(i.folder / "offsets.npy")[[0, 2, 1, *range(3, 13)]]),
    "a label too many": lambda i: store(i, "labels", np.load(i.folder / "labels.npy") + np.int32(1)),
    "a label below": lambda i: store(i, "labels", np.load(i.folder / "labels.npy") - np.int32(1)),
    "classes edited": lambda i: edit(i, classes=["ant", "bee", "cow", "dog"]),
    "fingerprint edited": lambda i: edit(i, fingerprint="0" * 64),
    "nested edited": lambda i: edit(i, nested={"ant/more": 7}),
    "root edited": lambda i: edit(i, root="/elsewhere"),
}


@pytest.mark.parametrize("damage", [*DAMAGE, *HIDDEN])
def test_rebuilds_a_damaged_index(root: Path, damage: str) -> None:
    index, _ = opened(root)
    expected = [index.path(k) for k in range(12)]
    (DAMAGE | HIDDEN)[damage](index)
    if damage in DAMAGE:
        with pytest.raises(Damaged):
            Index(index.folder)
    else:
        Index(index.folder)
    again, said = opened(root)
    assert [text.partition(" ")[0] for text in said] == ["the", "indexing"]
    assert f"{index.folder} is damaged" in said[0]
    assert "\n" not in said[0]
    assert again.fingerprint == index.fingerprint
    assert [again.path(k) for k in range(12)] == expected
    assert os.listdir(index.folder.parent) == [again.folder.name]
    assert opened(root)[1] == []


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EMFILE])
def test_an_index_that_cannot_be_read_now_is_not_called_damaged(
    root: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, _ = opened(root)
    failures = [1, 1] if number != errno.EACCES else [1] * 100
    load = np.load

    def failing(file: Path, *args: object, **other: object) -> object:
        if failures:
            failures.pop()
            raise OSError(number, os.strerror(number), str(file))
        return load(file, *args, **other)

    monkeypatch.setattr(index_module.np, "load", failing)
    monkeypatch.setattr(folders, "WAITS", (0, 0, 0))
    if number == errno.EACCES:
        with pytest.raises(UserError) as error:
            opened(root)
        one_line(error, "cannot read the index", str(index.folder), "Permission denied")
    else:
        assert opened(root)[1] == []
        assert not failures
    assert index.folder.exists()


def test_an_older_versions_index_is_left_alone(root: Path) -> None:
    index, _ = opened(root)
    older = index.folder.with_name("train-0123456789abcdef")
    index.folder.rename(older)
    (older / "sizes.npy").write_bytes(b"")
    assert len(opened(root)[1]) == 1
    assert (older / "sizes.npy").exists()


def test_one_rank_of_a_machine_reads_all_of_it(root: Path) -> None:
    index, _ = opened(root)
    flip(index.folder / "paths.npy", 131)
    assert open_index(Split("train", root / "train"), verify=False).folder == index.folder
    said: list[str] = []
    indexes = open_data(config(root), 4, said.append, verify=True)
    assert "damaged" in said[0]
    assert indexes is not None
    assert indexes[0].path(0).is_file()


def test_what_a_killed_process_left_is_removed(root: Path) -> None:
    index, _ = opened(root)
    base = index.folder.parent
    for name, age in ((".index-old", 7200), (".index-new", 60), ("mine", 7200)):
        (base / name / "new").mkdir(parents=True)
        os.utime(base / name, (time.time() - age,) * 2)
    assert opened(root)[1] == []
    assert set(os.listdir(base)) == {index.folder.name, ".index-new", "mine"}


def nest(root: Path) -> Path:
    """Moves one class's training pictures into a folder below it, as Tiny ImageNet has them."""
    below = root / "train" / "ant" / "images" / "more"
    below.mkdir(parents=True)
    for file in (root / "train" / "ant").glob("*.JPEG"):
        file.rename(below / file.name)
    return below


@pytest.mark.parametrize("change", ["added", "removed", "renamed", "folder added", "folder removed"])
def test_changes_below_a_class_folder_are_noticed(root: Path, change: str) -> None:
    below = nest(root)
    index, _ = opened(root)
    assert len(index) == 12
    assert index.path(0) == below / "bild_0 ü.JPEG"
    assert opened(root)[1] == []
    if change == "added":
        shutil.copy(below / "bild_0 ü.JPEG", below / "new.jpg")
    elif change == "removed":
        (below / "bild_1 ü.JPEG").unlink()
    elif change == "renamed":
        (below / "bild_1 ü.JPEG").rename(below / "other.jpg")
    elif change == "folder added":
        shutil.copytree(below, below / "deeper")
    else:
        (root / "train/ant/still.jpg").write_bytes(b"")
        opened(root)
        shutil.rmtree(below)
    again, said = opened(root)
    assert len(said) == 1
    counts = {"added": 13, "removed": 11, "renamed": 12, "folder added": 15, "folder removed": 10}
    assert len(again) == counts[change]
    assert again.fingerprint != index.fingerprint
    assert again.folder != index.folder  # a job that reads the old one goes on
    assert pickle.loads(pickle.dumps(index)).path(0) == below / "bild_0 ü.JPEG"
    assert opened(root)[1] == []


def test_a_damaged_index_of_what_has_changed_since_is_told_once(root: Path) -> None:
    below = nest(root)
    index, _ = opened(root)
    os.truncate(index.folder / "labels.npy", 130)
    (below / "new.jpg").touch()
    again, said = opened(root)
    assert len(said) == 2
    assert os.listdir(again.folder.parent) == [again.folder.name] != [index.folder.name]
    assert opened(root)[1] == []


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("below", [False, True])
def test_a_change_in_the_very_tick_of_the_listing_is_noticed(
    root: Path, coarse: bool, below: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture that comes with the folder's time unchanged, as a disk with slow ticks has it."""
    folder = nest(root) if below else root / "train" / "ant"
    real = time.time()
    now = [int(real) + 0.5 if coarse else int(real) + 0.0005]
    stamp = int(real) * 10**9 if coarse else int(real) * 10**9 + 400_000
    os.utime(folder, ns=(stamp, stamp))
    late = folder / "late.jpg"

    def sleep(seconds: float) -> None:
        now[0] += seconds
        late.write_bytes(b"")
        os.utime(folder, ns=(stamp, stamp))

    monkeypatch.setattr(folders, "time", SimpleNamespace(time=lambda: now[0], sleep=sleep))
    index, _ = opened(root)
    assert late.exists(), "nobody waited for the tick to end"
    assert late in [index.path(k) for k in range(len(index))]
    assert now[0] > stamp / 1e9 + (1.9 if coarse else 0.015)


def test_nobody_waits_for_an_old_folder_or_one_of_another_clock(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for k, folder in enumerate(sorted((root / "train").iterdir())):
        os.utime(folder, (k % 2 * 4e9, k % 2 * 4e9))  # 1970 and 2096
    monkeypatch.setattr(folders, "time", SimpleNamespace(time=time.time))
    assert len(opened(root)[0]) == 12


def test_a_folder_that_changes_while_it_is_listed_is_listed_again_next_time(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan, done = folders.scan, []

    def changing(folder: bytes) -> object:
        found = scan(folder)
        if folder.endswith(b"ant") and not done:
            done.append(shutil.copy(root / "train/ant/bild_0 ü.JPEG", root / "train/ant/late.jpg"))
        return found

    monkeypatch.setattr(folders, "scan", changing)
    assert len(opened(root)[0]) == 12
    again, said = opened(root)
    assert len(again) == 13
    assert len(said) == 1


def test_a_request_to_stop_ends_the_listing(root: Path, cache: Path) -> None:
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > 6  # in val/

    with pytest.raises(Interrupted):
        open_data(config(root), 4, stop=stop)
    assert len(asked) == 7
    assert [name.partition("-")[0] for name in os.listdir(cache / "distrib" / "index")] == ["train"]
    assert open_data(config(root), 4) is not None


def test_progress_is_told(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "PROGRESS", -1)
    said = opened(root)[1]
    assert f"indexing {root / 'train'}: 2 of 4 classes, 6 images" in said


def test_open_data_says_what_it_found(root: Path) -> None:
    for _ in range(2):
        said: list[str] = []
        open_data(config(root), 4, said.append)
        assert said[-1] == "training: 12 images, validation: 8, 4 classes"
    assert len(said) == 1


def test_the_fingerprint_of_flat_class_folders(root: Path) -> None:
    """Checkpoints hold it: it is the same in every version."""
    names = [f"{name}/bild_{k} ü.JPEG" for name in sorted(CLASSES) for k in range(3)]
    labels = np.repeat(np.arange(4, dtype="<i4"), 3)
    assert opened(root)[0].fingerprint == hashlib.sha256("".join(names).encode() + labels.tobytes()).hexdigest()


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
    assert np.array_equal(there.labels, index.labels)


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
        index = open_index(Split("train", root / "train"))
        good = all(index.path(k).is_file() for k in range(len(index)))
        answers.put((len(index), good, index.fingerprint))  # type: ignore[attr-defined]
    except BaseException as error:
        answers.put(f"{type(error).__name__}: {error}")  # type: ignore[attr-defined]


@pytest.mark.parametrize("stale", [False, True])
def test_processes_that_build_at_once_all_get_a_good_index(root: Path, stale: bool) -> None:
    fork = multiprocessing.get_context("fork")
    for attempt in range(8):
        if stale:
            open_index(Split("train", root / "train"))
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
                entry = json.loads(meta.read_text()) | {"classes": []}
                meta.write_text(json.dumps(entry) if theirs == "other" else "{")
        rename(source, target)  # type: ignore[arg-type]

    monkeypatch.setattr(staging.os, "rename", racing)
    index, _ = opened(root)
    monkeypatch.undo()
    assert raced == [str(index.folder)]
    assert len(index) == 12
    assert all(index.path(k).is_file() for k in range(12))
    assert Index(index.folder, verify=True).classes == sorted(CLASSES)
    assert os.listdir(index.folder.parent) == [index.folder.name]


@pytest.mark.parametrize("count", [1, 3])
def test_classes_without_images(root: Path, count: int) -> None:
    for k in range(count):
        (root / "train" / f"a{k}").mkdir()
        (root / "train" / f"a{k}" / "notes.txt").write_text("")
    with pytest.raises(UserError) as error:
        opened(root)
    one_line(error, str(root / "train" / "a0"), "no images", *(["2 more"] if count == 3 else []))


@pytest.fixture
def many(root: Path) -> Path:
    """Enough files that an index of them is larger than a small disk."""
    for split in ("train", "val"):
        for k in range(2000):
            (root / split / "ant" / f"a name that is rather long {k:05d}.jpg").touch()
    return root


def nothing_left(base: Path) -> bool:
    return not base.exists() or os.listdir(base) == []


def test_full_disk_leaves_nothing_behind(many: Path, small_disk: Path) -> None:
    with pytest.raises(UserError) as error:
        open_data(config(many, index_dir=str(small_disk)), 4)
    one_line(error, "cannot write the index", "No space left on device", "data.index_dir")
    assert nothing_left(small_disk)


def test_a_disk_that_is_full_already_is_told_before_anything_is_listed(
    root: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.suppress(OSError), (small_disk / "others").open("wb", buffering=0) as stream:
        while stream.write(bytes(4096)):
            pass
    monkeypatch.setattr(index_module, "list_images", None)
    with pytest.raises(UserError) as error:
        open_data(config(root, index_dir=str(small_disk)), 4)
    one_line(error, str(small_disk), "No space left on device", "data.index_dir")
    assert os.listdir(small_disk) == ["others"]


@pytest.mark.parametrize("failure", ["limit", "disk", "ctrl-c"])
def test_a_write_that_fails_leaves_nothing_behind(
    many: Path, cache: Path, failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, words = (UserError, "No space left on device") if failure == "disk" else (UserError, "File too large")
    if failure == "ctrl-c":
        expected = KeyboardInterrupt
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if failure == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    else:

        def fsync(descriptor: int) -> None:
            if (cache / "distrib" / "index").exists() and list((cache / "distrib" / "index").glob(".index-*/new/l*")):
                raise KeyboardInterrupt if failure == "ctrl-c" else OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(staging.os, "fsync", fsync)
    try:
        with pytest.raises(expected) as error:
            open_data(config(many), 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    if expected is UserError:
        one_line(error, words, "data.index_dir")
    assert nothing_left(cache / "distrib" / "index")


def test_a_read_only_index_serves(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = str(tmp_path / "indexes")
    assert open_data(config(root, index_dir=place), 4) is not None
    monkeypatch.setattr(index_module, "check_writable", refuse)
    monkeypatch.setattr(layout, "check_writable", refuse)
    assert open_data(config(root, index_dir=place), 4) is not None
    shutil.copy(root / "train/ant/bild_0 ü.JPEG", root / "train/ant/new.jpg")
    monkeypatch.setattr(index_module, "list_images", None)  # not even begun
    with pytest.raises(UserError, match="read-only"):
        open_data(config(root, index_dir=place), 4)


def refuse(folder: Path, way_out: str) -> None:
    raise UserError(f"cannot write to {folder}: read-only")


def test_open_data_returns_both_splits(root: Path) -> None:
    indexes = open_data(config(root), 4)
    assert indexes is not None
    assert [len(index) for index in indexes] == [12, 8]
    assert open_data(DataConfig(loader="synthetic"), 4) is None
