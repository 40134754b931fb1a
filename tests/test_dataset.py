"""distrib dataset: small archives of both of CIFAR-10's forms become the same pictures; what is damaged, or no data."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from distrib.config import UserError
from distrib.faults import Interrupted
from distrib.tools.dataset.cifar10 import BATCHES, convert

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
ROWS = 7
TRAIN = [name for name in BATCHES if name != "test_batch"]


def pixels_of(batch: str) -> np.ndarray:
    """uint8 [ROWS, 32, 32, 3]: each picture's own."""
    return np.random.default_rng(list(BATCHES).index(batch)).integers(0, 256, (ROWS, 32, 32, 3), dtype=np.uint8)


def labels_of(batch: str) -> list[int]:
    return [(3 * row + list(BATCHES).index(batch)) % 10 for row in range(ROWS)]


def row_of(picture: np.ndarray) -> list[int]:
    """The 1024 red values from the top row on, the green ones, the blue ones: written out as the format's page says."""
    return [int(picture[y, x, channel]) for channel in range(3) for y in range(32) for x in range(32)]


def binary_files() -> dict[str, bytes]:
    files = {"batches.meta.txt": ("\n".join(NAMES) + "\n\n").encode(), "readme.html": b"<html>"}
    for batch in BATCHES:
        rows = zip(labels_of(batch), pixels_of(batch), strict=True)
        files[f"{batch}.bin"] = b"".join(bytes([label, *row_of(picture)]) for label, picture in rows)
    return files


def as_python_2(value: Any) -> bytes:
    """The pickle that Python 2 makes, as the archive's are: its texts are bytes here. Written out, opcode by opcode."""

    def emit(part: Any) -> bytes:
        if isinstance(part, bytes):
            return b"T" + len(part).to_bytes(4, "little") + part
        if isinstance(part, int):
            return b"J" + part.to_bytes(4, "little", signed=True)
        if isinstance(part, list):
            return b"](" + b"".join(map(emit, part)) + b"e"
        if isinstance(part, dict):
            return b"}(" + b"".join(emit(key) + emit(inner) for key, inner in part.items()) + b"u"
        kind = f"{part.dtype.kind}{part.dtype.itemsize}".encode()
        empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + emit(b"b") + b"tR"
        dtype = (
            b"cnumpy\ndtype\n(" + emit(kind) + b"K\x00K\x01tR(K\x03" + emit(b"|") + b"NNN" + emit(-1) * 2 + b"K\x00tb"
        )
        shape = b"(" + b"".join(map(emit, part.shape)) + b"t"
        return empty + b"(K\x01" + shape + dtype + b"I00\n" + emit(part.tobytes()) + b"tb"

    return b"\x80\x02" + emit(value) + b"."


def pickle_files() -> dict[str, bytes]:
    files = {"batches.meta": as_python_2({b"label_names": [name.encode() for name in NAMES], b"num_vis": 3072})}
    for batch in BATCHES:
        data = np.array([row_of(picture) for picture in pixels_of(batch)], np.uint8)
        names = [f"{batch}_{row}.png".encode() for row in range(ROWS)]
        value = {b"batch_label": b"a batch", b"labels": labels_of(batch), b"data": data, b"filenames": names}
        files[batch] = as_python_2(value)
    return files


FORMS: dict[str, tuple[str, Callable[[], dict[str, bytes]]]] = {
    "binary": ("cifar-10-batches-bin", binary_files),
    "python": ("cifar-10-batches-py", pickle_files),
}


def archive(path: Path, folder: str, files: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as file:
        for name, data in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return path


def unpack(path: Path, folder: str, files: Mapping[str, bytes]) -> Path:
    (path / folder).mkdir(parents=True)
    for name, data in files.items():
        (path / folder / name).write_bytes(data)
    return path


def check(dest: Path) -> None:
    """``dest`` holds each picture where it belongs, and nothing else."""
    expected = {}
    for batch, split in BATCHES.items():
        for row, (label, picture) in enumerate(zip(labels_of(batch), pixels_of(batch), strict=True)):
            expected[Path(split, NAMES[label], f"{batch}_{row:05d}.png")] = picture
    found = {path.relative_to(dest): path for path in dest.rglob("*") if path.is_file()}
    assert sorted(found) == sorted(expected)
    for name, path in found.items():
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (32, 32))
            assert np.array_equal(np.asarray(image), expected[name])


def test_todays_pickles_are_read_too(tmp_path: Path) -> None:
    files = {name: pickle.dumps(pickle.loads(data, encoding="bytes"), 2) for name, data in pickle_files().items()}
    assert b"_codecs" in files["test_batch"]
    convert(archive(tmp_path / "a.tar", "x", files), tmp_path / "out", rows=ROWS)
    check(tmp_path / "out")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("source", ["archive", "folder", "folder above"])
def test_both_forms_become_the_same_pictures(form: str, source: str, tmp_path: Path) -> None:
    folder, files = FORMS[form][0], FORMS[form][1]()
    if source == "archive":
        given = archive(tmp_path / "cifar.tar.gz", folder, files)
    else:
        given = unpack(tmp_path / "unpacked", folder, files)
        given = given if source == "folder above" else given / folder
    told = convert(given, tmp_path / "deep" / "out", rows=ROWS)
    check(tmp_path / "deep" / "out")
    assert "train: 35 pictures, 3 to 4 in each of 10 classes" in told
    assert "val: 7 pictures, 0 to 1 in each of 10 classes" in told
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_an_empty_folder_may_be_there(tmp_path: Path) -> None:
    given = archive(tmp_path / "a.tar.gz", *(FORMS["binary"][0], binary_files()))
    (tmp_path / "out").mkdir()
    convert(given, tmp_path / "out", rows=ROWS)
    check(tmp_path / "out")


def refused(given: Path, tmp_path: Path, **settings: Any) -> str:
    """The words of the refusal, after which nothing may be there."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError) as caught:
        convert(given, tmp_path / "out", **{"rows": ROWS, **settings})
    assert sorted(tmp_path.iterdir()) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Malicious:
    """Would make a folder where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["data_batch_3", "batches.meta"])
def test_a_pickle_may_call_nothing(name: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    files = pickle_files() | {name: pickle.dumps({b"data": Malicious(tmp_path / "in" / "owned")}, protocol=2)}
    given = archive(tmp_path / "in" / "a.tar.gz", "cifar-10-batches-py", files)
    assert f"{name}: asks for posix.mkdir, which no batch of CIFAR-10 does" in refused(given, tmp_path)
    assert not (tmp_path / "in" / "owned").exists()


@pytest.mark.parametrize(
    "words",
    [
        b"cnumpy\nload\n(S'x'\ntR.",
        b"c_codecs\nencode\n(Vabc\nVzlib_codec\ntR.",
        b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I1000000000000\ntS'b'\ntR.",
        b"cos\nsystem\n(S'true'\ntR.",
    ],
)
def test_nothing_but_arrays_is_made(words: bytes, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    given = archive(tmp_path / "in" / "a.tgz", "cifar-10-batches-py", pickle_files() | {"test_batch": words})
    assert "which no batch of CIFAR-10 does" in refused(given, tmp_path)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("part", [0.2, 0.9])
def test_an_archive_cut_short_is_told(form: str, part: float, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    given = archive(tmp_path / "in" / "a.tar.gz", FORMS[form][0], FORMS[form][1]())
    given.write_bytes(given.read_bytes()[: int(part * given.stat().st_size)])
    assert "download it again" in refused(given, tmp_path)


@pytest.mark.parametrize(
    ("form", "name", "change", "told"),
    [
        ("binary", "data_batch_2.bin", lambda data: data[:-1], "no whole number of rows of 3,073"),
        ("binary", "data_batch_2.bin", lambda data: data[3073:], "data_batch_2 has 6 pictures, not 7"),
        ("binary", "test_batch.bin", lambda data: b"\n" + data[1:], "test_batch has the label 10, there are 0 to 9"),
        ("binary", "batches.meta.txt", lambda data: data.replace(b"dog", b"cat"), "names are not 10 words"),
        ("binary", "batches.meta.txt", lambda data: data.replace(b"dog", b"../dog"), "names are not 10 words"),
        ("python", "batches.meta", lambda data: as_python_2({b"label_names": [b".."] * 10}), "names are not 10 words"),
        ("python", "test_batch", lambda data: data[:200], "test_batch is not a pickle of plain values"),
        ("python", "test_batch", lambda data: as_python_2({}), "no bytes [n, 3072] called data"),
        (
            "python",
            "test_batch",
            lambda data: as_python_2({b"data": np.zeros((7, 3072), np.uint8), b"labels": [0] * 6}),
            "6 labels for 7 pictures",
        ),
        (
            "python",
            "test_batch",
            lambda data: as_python_2({b"data": np.zeros((7, 3072), np.uint8), b"labels": [-1] * 7}),
            "no list of small whole numbers called labels",
        ),
        ("python", "test_batch", lambda data: as_python_2({b"data": np.zeros((7, 3072), np.int8)}), "called data"),
    ],
)
def test_what_is_damaged_is_told(
    form: str, name: str, change: Callable[[bytes], bytes], told: str, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    files = FORMS[form][1]()
    given = archive(tmp_path / "in" / "a.tar.gz", FORMS[form][0], files | {name: change(files[name])})
    assert told in refused(given, tmp_path)


def test_what_is_missing_or_something_else_is_told(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    files = binary_files()
    del files["data_batch_4.bin"]
    given = archive(tmp_path / "in" / "a.tar.gz", "x", files)
    assert "lacks data_batch_4.bin: download it again" in refused(given, tmp_path)
    given = archive(tmp_path / "in" / "b.tar.gz", "cifar-100-python", {"train": b"", "test": b"", "meta": b""})
    assert "is not CIFAR-10: it holds neither data_batch_1 nor data_batch_1.bin" in refused(given, tmp_path)
    given.write_bytes(gzip.compress(b"no archive"))
    assert "is no tar archive" in refused(given, tmp_path)
    assert "cannot read" in refused(tmp_path / "in" / "nowhere", tmp_path)
    assert "holds neither" in refused(tmp_path / "in", tmp_path)


def test_what_is_there_stays(tmp_path: Path) -> None:
    given = archive(tmp_path / "a.tar.gz", "x", binary_files())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    assert "out is there already and not empty" in refused(given, tmp_path)
    assert (tmp_path / "out" / "mine").read_text() == "kept"


def test_who_stops_it_leaves_nothing(tmp_path: Path) -> None:
    given = archive(tmp_path / "a.tar.gz", "x", binary_files())
    answers = iter([False] * 20 + [True])
    with pytest.raises(Interrupted):
        convert(given, tmp_path / "out", rows=ROWS, stop=lambda: next(answers))
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar.gz"]


def test_somebody_elses_folder_is_not_replaced(tmp_path: Path) -> None:
    given = archive(tmp_path / "a.tar.gz", "x", binary_files())

    def somebody_else() -> bool:
        (tmp_path / "out" / "theirs").mkdir(parents=True, exist_ok=True)
        return False

    with pytest.raises(UserError, match="not empty"):
        convert(given, tmp_path / "out", rows=ROWS, stop=somebody_else)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tar.gz", "out", "theirs"]


def test_a_full_disk_is_one_line(small_disk: Path, tmp_path: Path) -> None:
    given = archive(tmp_path / "a.tar.gz", "x", binary_files())
    with pytest.raises(UserError, match="No space left on device"):
        convert(given, small_disk / "out", rows=ROWS)
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "error: the following arguments are required"),
        (["mnist", "a", "b"], "error: argument cifar10: invalid choice: 'mnist'"),
        (["cifar10", "a"], "error: the following arguments are required: DEST"),
        (["cifar10", "/nowhere", "out"], "error: cannot read /nowhere: No such file or directory"),
    ],
)
def test_mistakes_on_the_command_line(words: list[str], told: str, tmp_path: Path) -> None:
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    command = [sys.executable, "-m", "distrib", "dataset", *words]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(told)
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
