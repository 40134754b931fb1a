"""What folders tell before anything is listed, and how a class's pictures are found."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from distrib import layout
from distrib.config import DataConfig, UserError
from distrib.data import index as index_module
from distrib.data import open_data
from distrib.data.index import Index, open_index
from distrib.layout import SAMPLE, cache_dir, count_classes, count_images, data_root, find_splits, folders, look
from distrib.layout.splits import Split

CLASSES = ("ant", "bee", "cow")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(folders, "WAITS", (0, 0))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for name in CLASSES:
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for k in range(3):
                (tmp_path / "data" / split / name / f"{k}.jpg").touch()
    return tmp_path / "data"


def config(root: Path | str, **other: object) -> DataConfig:
    return DataConfig(root=str(root), **other)


def refused(cfg: DataConfig, *parts: str, classes: int = 3) -> str:
    """The line that says what is wrong, from a look at the folders, and from opening the data before it is listed."""
    lines = []
    for call in (look, open_data):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(index_module, "list_images", None)
            with pytest.raises(UserError) as error:
                call(cfg, classes)
        lines.append(str(error.value))
    assert lines[0] == lines[1]
    assert lines[0].isprintable()  # and so it is one line
    for part in parts:
        assert part in lines[0], lines[0]
    return lines[0]


def names(index: Index) -> list[str]:
    return [str(index.path(k).relative_to(index.root)) for k in range(len(index))]


# What is wrong is told before anything is listed.


def test_what_is_right_passes(root: Path, cache: Path) -> None:
    look(config(root), 3)
    assert os.listdir(cache / "distrib" / "index") == []
    look(DataConfig(loader="synthetic"), 3)


def test_missing_root(tmp_path: Path) -> None:
    refused(config(tmp_path / "nothing"), f"no data at {tmp_path / 'nothing' / 'train'}", "IMAGENET_DIR", "quickstart")


def test_what_the_root_is_instead(root: Path, tmp_path: Path) -> None:
    refused(config(tmp_path / "gone"), f"there is no {tmp_path / 'gone'}")
    for k in range(2):
        (tmp_path / "flat" / f"{k}.jpg").parent.mkdir(exist_ok=True)
        (tmp_path / "flat" / f"{k}.jpg").touch()
    refused(config(tmp_path / "flat"), "2 pictures lie flat in it (0.jpg): make a folder of each class")


def test_missing_val(root: Path) -> None:
    shutil.rmtree(root / "val")
    refused(config(root, val_split=None), f"no data at {root / 'val'}")
    for name in CLASSES:  # ImageNet has a val/ of its own: without it something is amiss
        (root / "train" / name).rename(root / "train" / f"n0000000{CLASSES.index(name)}")
    refused(config(root), f"no data at {root / 'val'}", "data.val_split=0.1 would validate on a part of")
    assert count_classes(config(root, val_split=0.1)) == 3


@pytest.mark.parametrize("split", ["train", "val"])
def test_empty_split(root: Path, split: str) -> None:
    shutil.rmtree(root / split)
    (root / split).mkdir()
    refused(config(root), f"{root / split} has no class folders", "must hold train/ and val/")


@pytest.mark.parametrize("split", ["train", "val"])
def test_split_that_is_a_file(root: Path, split: str) -> None:
    shutil.rmtree(root / split)
    (root / split).write_text("")
    refused(config(root), str(root / split), "Not a directory")


def test_root_that_is_a_file(root: Path) -> None:
    refused(config(root / "train" / "ant" / "0.jpg"), "0.jpg", "Not a directory")


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("count", [1, 5])
def test_classes_that_only_one_split_has(root: Path, split: str, count: int) -> None:
    for k in range(count):
        shutil.copytree(root / split / "ant", root / split / f"extra{k}")
    parts = ("extra0", f"({count} in all) in {root / split} but not in", *([" …"] if count > 3 else []))
    refused(config(root), *parts, classes=3 + count)


def test_classes_that_only_one_split_has_and_that_are_empty(root: Path) -> None:
    for k in range(3):
        (root / "train" / f"a{k}").mkdir()
    refused(config(root), f"{root / 'train' / 'a0'} holds no images", "nor do 2 more")


def test_wrong_number_of_classes(root: Path) -> None:
    refused(config(root), "1000", str(root), "model.num_classes=3", classes=1000)


@pytest.mark.parametrize("variable", ["${IMAGENET_DIR}", "${IMAGENET_DIR}/raw"])
def test_unset_variable(variable: str) -> None:
    refused(config(variable), repr(variable), "IMAGENET_DIR", "quickstart")


def test_index_dir_that_cannot_be_written(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "below"
    refused(config(root, index_dir=str(place)), str(place), "Not a directory", "data.index_dir")


@pytest.mark.parametrize("split", ["train", "val"])
def test_flat_pictures(root: Path, split: str) -> None:
    for folder in (root / split).iterdir():
        shutil.rmtree(folder)
    for k in range(5):
        (root / split / f"{k}.JPEG").touch()
    refused(config(root), f"{root / split} has no class folders", "5 pictures lie flat", "0.JPEG")


def test_imagenets_val_as_downloaded(root: Path) -> None:
    shutil.rmtree(root / "val")
    (root / "val").mkdir()
    for k in range(1, 4):
        (root / "val" / f"ILSVRC2012_val_{k:08d}.JPEG").touch()
    refused(config(root), f"{root / 'val'} has no class folders", "ImageNet's as downloaded", "extract_ILSVRC.sh")


def test_a_half_sorted_val(root: Path) -> None:
    shutil.rmtree(root / "val" / "bee")
    (root / "val" / "x.jpg").touch()
    refused(config(root), "class folders differ: bee", "1 pictures lie flat (x.jpg)")


def test_tiny_imagenets_val_as_downloaded_and_the_way_out(root: Path) -> None:
    shutil.rmtree(root / "val")
    (root / "val" / "images").mkdir(parents=True)
    lines = []
    for k in range(6):
        (root / "val" / "images" / f"val_{k}.JPEG").touch()
        lines.append(f"val_{k}.JPEG\t{CLASSES[k % 3]}\t0\t0\t62\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    line = refused(config(root), "Tiny ImageNet's", str(root / "val"))
    subprocess.run(["sh", "-ec", line.split("`")[1]], cwd=root / "val", check=True)
    indexes = open_data(config(root), 3)
    assert indexes is not None
    assert names(indexes[1])[:2] == ["ant/val_0.JPEG", "ant/val_3.JPEG"]


def test_other_names_and_places(root: Path) -> None:
    before = root / "val"
    for name in ("validation", "Val", "test"):
        before = before.rename(root / name)
        assert [split.source for split in find_splits(config(root))] == [root / "train", root / name]
        refused(config(root / "train"), "no data at", "the folder above", f"data.root={root} ".replace(" ", "?"))
    (root / "train").rename(root / "pictures")
    refused(config(root), f"no data at {root / 'train'}")
    kaggle = root.parent / "kaggle"
    (kaggle / "ILSVRC/Data/CLS-LOC").mkdir(parents=True)
    refused(config(kaggle), f"set data.root={kaggle}/ILSVRC/Data/CLS-LOC")


@pytest.mark.parametrize("text", ["a\0b", "~nobody-of-this-name/data", "/line\nbreak", "/\udcff"])
def test_odd_roots(text: str) -> None:
    refused(config(text))
    refused(config("/nowhere", index_dir=text))


def test_odd_index_dirs(root: Path) -> None:
    for text in ("a\0b", "~nobody-of-this-name/index"):
        refused(config(root, index_dir=text), "data.index_dir")


def test_names_are_shown_on_one_line(root: Path) -> None:
    os.mkdir(os.fsencode(root / "val") + b"/a\nb\xff")
    os.mkdir(os.fsencode(root / "val") + b"/a\nb\xff/c")
    Path(os.fsdecode(os.fsencode(root / "val") + b"/a\nb\xff/c/1.jpg")).touch()
    refused(config(root), r"a\nb\xff")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
@pytest.mark.parametrize("place", ["train", "val"])
def test_a_split_that_cannot_be_read(root: Path, number: int, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, root / place, number, 10**6)
    refused(config(root), f"cannot read {root / place}", os.strerror(number))


def test_the_sample_is_known_before_it_is_unpacked(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look(config(SAMPLE), 10)
    assert not data_root(config(SAMPLE)).exists()
    assert count_images(config(SAMPLE), "train", 10**6) == 8000
    assert count_images(config(SAMPLE), "val", 10**6) == 2000
    assert count_images(config(SAMPLE), "val", 7) == 7
    line = refused(config(SAMPLE), "model.num_classes=10", classes=9)
    assert str(cache / "distrib") in line
    (cache / "distrib").rename(cache / "elsewhere")
    (cache / "distrib").write_text("")
    refused(config(SAMPLE), "cannot write to", "XDG_CACHE_HOME", classes=10)


def test_images_are_counted_up_to_a_limit(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "val" / "ant" / "below").mkdir()
    (root / "val" / "ant" / "below" / "x.png").touch()
    scan, scanned = folders.scan, []
    monkeypatch.setattr(folders, "scan", lambda folder: scanned.append(folder) or scan(folder))
    assert count_images(config(root), "val", 2) == 2
    assert [Path(os.fsdecode(folder)).name for folder in scanned] == ["ant"]
    assert count_images(config(root), "val", 4) == 4
    assert count_images(config(root), "val", 10) == 10
    assert count_images(config(root), "val", 11) == 10
    synthetic = DataConfig(loader="synthetic", synthetic={"train": 5, "val": 4})
    assert [count_images(synthetic, "train", 9), count_images(synthetic, "val", 3)] == [5, 3]


@pytest.mark.parametrize(("home", "base"), [("", ""), (None, None), ("relative", "relative"), ("", None)])
def test_a_cache_without_variables(home: str | None, base: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in (("HOME", home), ("XDG_CACHE_HOME", base)):
        monkeypatch.delenv(key, raising=False)
        if value is not None:
            monkeypatch.setenv(key, value)
    expected = layout.pwd.getpwuid(os.getuid()).pw_dir
    assert cache_dir() == Path(expected) / ".cache" / "distrib"

    def nobody(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(layout.pwd, "getpwuid", nobody)
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        cache_dir()


def test_it_needs_no_torch_and_no_numpy(root: Path, repository: Path) -> None:
    code = (
        "import sys; from distrib.config import DataConfig; from distrib import layout; "
        f"cfg = DataConfig(root={str(root)!r}); layout.look(cfg, 3); "
        "assert layout.count_images(cfg, 'train', 50) == 9; "
        "assert not {'torch', 'numpy', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=repository, check=True)


# How pictures are found.


def test_the_same_pictures_as_imagefolder(root: Path, tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder  # here, not above: a process that a test starts does without

    away = tmp_path / "away"
    (away / "inner").mkdir(parents=True)
    for name in ("a.JPG", "b.tiff", "c.Webp", "d.gif", "e.txt", "f.jpg.part", "inner/g.ppm", "inner/h.PGM"):
        (away / name).touch()
    ant = root / "train" / "ant"
    for name in ("a", "a-b", "a/c", "a/c/d", "Z", "ö", "a b"):
        (ant / name).mkdir()
        (ant / name / "2.jpg").touch()
        (ant / name / "10.png").touch()
    (ant / "link").symlink_to(away)
    (ant / "file.jpeg").symlink_to(away / "b.tiff")
    (root / "train" / "linked").symlink_to(away / "inner")
    (tmp_path / "data2").mkdir()
    (tmp_path / "data2" / "train").symlink_to(root / "train")
    index = open_index(Split("train", tmp_path / "data2" / "train"))
    theirs = ImageFolder(str(tmp_path / "data2" / "train"))
    assert [(str(index.path(k)), int(index.labels[k])) for k in range(len(index))] == theirs.samples
    assert index.classes == theirs.classes
    assert len(index) == 9 + 14 + 1 + 5 + 2


def test_hidden_ones_are_passed_over(root: Path) -> None:
    for folder in (root / "train" / ".cache", root / "train" / "ant" / ".thumbs"):
        folder.mkdir()
        (folder / "x.jpg").touch()
    (root / "train" / "ant" / "._1.jpg").touch()
    index = open_index(Split("train", root / "train"))
    assert len(index) == 9
    assert index.classes == list(CLASSES)


def test_what_is_no_file_is_passed_over_with_one_line(root: Path, tmp_path: Path) -> None:
    ant = root / "train" / "ant"
    os.mkfifo(ant / "fifo.jpg")
    (ant / "folder.png").mkdir()
    (ant / "device.jpg").symlink_to("/dev/zero")
    (ant / "to folder.jpg").symlink_to(tmp_path)
    (ant / "to fifo.jpg").symlink_to(ant / "fifo.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        before = os.getcwd()
        os.chdir(ant)  # a socket's name must be short
        try:
            server.bind("socket.jpg")
        finally:
            os.chdir(before)
    (ant / "gone.jpg").symlink_to(ant / "nowhere.jpg")
    (ant / "self.jpg").symlink_to("self.jpg")
    os.mkfifo(ant / "no picture")
    said: list[str] = []
    index = open_index(Split("train", root / "train"), notify=said.append)
    assert [name for name in names(index) if "/0" not in name and "/1" not in name and "/2" not in name] == [
        "ant/gone.jpg",  # the loader names them
        "ant/self.jpg",
    ]
    assert len(said) == 2
    assert "passed over 6" in said[1]
    assert said[1].endswith("ant/device.jpg")


def loop_to(target: str) -> Callable[[Path], None]:
    return lambda root: (root / "train" / "ant" / "loop").symlink_to(target)


def cross(root: Path) -> None:
    """Folders that all lead into each other: as many paths as there are orders of them."""
    ant = root / "train" / "ant"
    for k in range(9):
        (ant / f"d{k}").mkdir()
        for other in range(9):
            (ant / f"d{k}" / f"l{other}").symlink_to(f"../d{other}")


@pytest.mark.parametrize(
    "make", [loop_to("."), loop_to(".."), loop_to("../.."), loop_to("/"), loop_to("loop"), cross],
    ids=["itself", "split", "root", "everything", "no folder", "crosswise"],
)  # fmt: skip
def test_loops_end(root: Path, make: Callable[[Path], None]) -> None:
    make(root)
    assert names(open_index(Split("train", root / "train"))) == [
        f"{name}/{k}.jpg" for name in CLASSES for k in range(3)
    ]
    assert count_images(config(root), "train", 100) == 9


def failing(monkeypatch: pytest.MonkeyPatch, folder: Path, number: int, times: int) -> list[int]:
    """Lets the folder's listing fail so often."""
    scandir, left = os.scandir, [times]

    def scan(path: bytes) -> object:
        if path == os.fsencode(folder) and left[0] > 0:
            left[0] -= 1
            raise OSError(number, os.strerror(number), path)
        return scandir(path)

    monkeypatch.setattr(folders.os, "scandir", scan)
    return left


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.ETIMEDOUT])
@pytest.mark.parametrize("place", ["train", "train/bee", "train/bee/below"])
def test_a_disk_away_for_a_moment(root: Path, place: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "train/bee/below").mkdir()
    (root / "train/bee/below/4.jpg").touch()
    left = failing(monkeypatch, root / place, number, 2)
    assert len(open_index(Split("train", root / "train"))) == 10
    assert left == [0]


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ENOENT])
@pytest.mark.parametrize("place", ["train/bee", "train/bee/below"])
def test_a_class_that_cannot_be_read_is_not_an_empty_one(
    root: Path, cache: Path, place: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "train/bee/below").mkdir()
    failing(monkeypatch, root / place, number, 10**6)
    for call in (
        lambda root, split: open_index(Split(split, root / split)),
        lambda root, split: count_images(config(root), split, 100),
    ):
        with pytest.raises(UserError) as error:
            call(root, "train")
        assert str(error.value) == f"cannot read {root / place}: {os.strerror(number)} (data.root)"
    assert os.listdir(cache / "distrib" / "index") == []


@pytest.mark.parametrize("place", ["train/dog", "train/bee/images"])
def test_a_link_to_a_folder_that_is_away(root: Path, place: str) -> None:
    (root / place).symlink_to("/mnt/away/folder")
    with pytest.raises(UserError) as error:
        open_index(Split("train", root / "train"))
    assert str(error.value) == f"cannot read {root / place}: No such file or directory (data.root)"


def described(root: Path, index_dir: Path) -> tuple[int, list[object]]:
    """How often building was told, and all that a process makes of names."""
    said: list[str] = []
    index = open_index(Split("train", root / "train"), str(index_dir), said.append)
    paths = [os.fsencode(index.path(k)) for k in range(len(index))]
    assert paths == [index.encoded_path(k) for k in range(len(index))]
    assert all(os.path.isfile(index.path(k)) for k in range(len(index)))
    return len(said), [index.fingerprint, ascii(index.classes), index.labels.tolist(), [path.hex() for path in paths]]


def test_names_in_any_bytes_and_any_locale(tmp_path: Path, repository: Path) -> None:
    root = os.fsencode(tmp_path) + "/dätä 蝶".encode() + b"\xff"
    # As text the last two stand in this order, as bytes or as an ASCII locale's text in the other.
    classes = [b"new\nline", b"z", "é".encode(), "蝶".encode(), b"\xf8", "ﬁ".encode()]
    files = [b"1.jpg", b"\xff\xfe.jpg", "ü.jpg".encode(), b"\xfc.jpg", b"a\nb.jpg", b"#[*].JPG", b"below\xe9/9.jpg"]
    for name in classes:
        os.makedirs(root + b"/train/" + name + b"/below\xe9")
        for file in files:
            os.close(os.open(root + b"/train/" + name + b"/" + file, os.O_CREAT))
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code = (
        "import json, os, sys; sys.path.insert(0, 'tests'); from test_layout import Path, described; "
        "print(json.dumps([sys.getfilesystemencoding(), *described(Path(sys.argv[1]), Path(sys.argv[2]))]))"
    )
    command = [sys.executable, "-c", code, root, str(tmp_path / "index")]
    done = subprocess.run(command, env=environment, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    encoding, built, theirs = json.loads(done.stdout)
    assert (encoding, built) == ("ascii", 1)
    assert described(Path(os.fsdecode(root)), tmp_path / "index") == (0, theirs)
    assert described(Path(os.fsdecode(root)), tmp_path / "other") == (1, theirs)
    assert theirs[1] == ascii([name.decode("utf-8", "surrogateescape") for name in classes])
    assert theirs[2] == [k for k in range(6) for _ in range(7)]
