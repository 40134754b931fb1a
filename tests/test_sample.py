"""The built-in sample: unpacked whole or not at all, and mended where it is not whole."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distrib.config import DataConfig, UserError
from distrib.data import open_data, sample, staging
from distrib.layout import SAMPLE, SAMPLE_CLASSES, SAMPLE_COUNTS, SAMPLE_IMAGES, data_root, look

FEW = 60  # of its images, where the number does not matter


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "distrib"


@pytest.fixture
def few(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A smaller archive, for a cache of its own."""
    with np.load(sample.ARCHIVE) as archive:
        images, labels = archive["images"][-FEW:], archive["labels"][-FEW:]
    np.savez(tmp_path / "few.npz", images=images, labels=labels)
    monkeypatch.setattr(sample, "ARCHIVE", tmp_path / "few.npz")
    monkeypatch.setitem(SAMPLE_IMAGES, "train", FEW - 20)


def unpacked() -> tuple[Path, list[str]]:
    said: list[str] = []
    return sample.unpack(data_root(DataConfig(root=SAMPLE)), said.append), said


def files(root: Path) -> list[str]:
    return sorted(str(file.relative_to(root)) for file in root.rglob("*") if file.is_file())


def test_it_is_what_the_layout_says() -> None:
    """In the cache of all tests: to unpack it whole takes seconds."""
    said: list[str] = []
    look(DataConfig(root=SAMPLE), 10)
    indexes = open_data(DataConfig(root=SAMPLE), 10, said.append)
    assert indexes is not None
    for index, split in zip(indexes, ("train", "val"), strict=True):
        assert len(index) == SAMPLE_IMAGES[split]
        assert np.bincount(index.labels).tolist() == list(SAMPLE_COUNTS[split])
        assert index.classes == list(SAMPLE_CLASSES)
        assert index.path(0).is_file()
    # As it always was: checkpoints hold it.
    assert indexes[0].fingerprint == "c462a5b6c8f123d0ca2657b1ccad1f507813ff81777d9f1ab9cf2cccc818e026"
    with Image.open(indexes[0].path(0)) as picture:
        assert (picture.size, picture.format) == ((28, 28), "JPEG")
    assert unpacked()[1] == []


@pytest.mark.usefixtures("few")
def test_others_may_read_it(cache: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    assert unpacked()[0].stat().st_mode & 0o777 == 0o777 & ~mask
    assert os.listdir(cache) == ["fashion-mnist-10k"]


DAMAGE: dict[str, Callable[[Path], object]] = {
    "file missing": lambda root: (root / files(root)[3]).unlink(),
    "file empty": lambda root: (root / files(root)[3]).write_bytes(b""),
    "split missing": lambda root: shutil.rmtree(root / "val"),
    "folder empty": lambda root: [file.unlink() for file in next((root / "train").iterdir()).iterdir()],
    "file too many": lambda root: shutil.copy(root / files(root)[3], (root / files(root)[3]).with_name("new.jpg")),
    "no folder": lambda root: (shutil.rmtree(root), root.mkdir()),
}


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("damage", DAMAGE)
def test_it_is_unpacked_anew_where_it_is_not_whole(cache: Path, damage: str) -> None:
    root, said = unpacked()
    assert len(said) == 1
    before = files(root)
    assert len(before) == FEW
    DAMAGE[damage](root)
    assert sample.unpack(root, said.append, verify=False) == root  # who does not look leaves it to another
    assert len(said) == 1
    said = unpacked()[1]
    assert len(said) == 1
    assert f"{root} is not whole" in said[0]
    assert files(root) == before
    assert all((root / name).stat().st_size for name in before)
    assert os.listdir(cache) == [root.name]
    assert unpacked()[1] == []


@pytest.mark.usefixtures("few")
def test_a_desktops_hidden_file_does_no_harm() -> None:
    root, _ = unpacked()
    (root / "train" / ".DS_Store").write_bytes(b"x")
    assert unpacked()[1] == []


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError()])
@pytest.mark.usefixtures("few")
def test_a_failure_leaves_nothing_behind(cache: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    write, left = Path.write_bytes, list(range(30))

    def failing(path: Path, data: bytes) -> int:
        if not left:
            raise error
        left.pop()
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", failing)
    with pytest.raises(UserError if isinstance(error, OSError) else type(error)) as raised:
        unpacked()
    assert left == []
    assert os.listdir(cache) == []
    if isinstance(error, OSError):
        assert str(raised.value) == (
            f"cannot unpack the sample to {cache}: No space left on device: set XDG_CACHE_HOME"
        )
    monkeypatch.undo()


def test_a_full_disk(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(small_disk))
    for _ in range(2):
        with pytest.raises(UserError) as error:
            open_data(DataConfig(root=SAMPLE), 10)
        assert "No space left on device" in str(error.value)
        assert os.listdir(small_disk / "distrib") in ([], ["index"])
    with contextlib.suppress(OSError), (small_disk / "others").open("wb", buffering=0) as stream:
        while stream.write(bytes(4096)):
            pass
    monkeypatch.setattr(sample, "unpack", None)
    with pytest.raises(UserError, match=r"cannot write to .*No space left on device: set XDG_CACHE_HOME"):
        open_data(DataConfig(root=SAMPLE), 10)


@pytest.mark.usefixtures("few")
def test_what_a_killed_unpacking_left_is_removed(cache: Path) -> None:
    unpacked()
    for name, age in ((".sample-old", 7200), (".sample-new", 60), (".photos-old", 7200)):
        (cache / name / "new").mkdir(parents=True)
        os.utime(cache / name, (time.time() - age,) * 2)
    assert unpacked()[1] == []
    assert set(os.listdir(cache)) == {"fashion-mnist-10k", ".sample-new", ".photos-old"}


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("whole", [False, True])
def test_another_process_is_first(cache: Path, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rename, theirs = os.rename, []

    def racing(source: object, target: object) -> None:
        if not theirs:
            theirs.append(shutil.copytree(str(source), str(target)))
            if not whole:
                shutil.rmtree(Path(theirs[0]) / "val")
            os.utime(theirs[0], (0, 0))
        rename(source, target)  # type: ignore[arg-type]

    monkeypatch.setattr(staging.os, "rename", racing)
    root, _ = unpacked()
    monkeypatch.undo()
    assert theirs == [str(root)]
    assert (root.stat().st_mtime == 0) == whole  # theirs stays, if it is whole
    assert len(files(root)) == FEW
    assert os.listdir(cache) == [root.name]
