"""CIFAR-10: 60,000 pictures of 32×32 pixels in 10 classes (Krizhevsky 2009, Learning Multiple Layers of Features).

The archives, and what is in them: https://www.cs.toronto.edu/~kriz/cifar.html. Both forms hold the same pictures in the
same order, and become the same files.
"""

from __future__ import annotations

import io
import pickle
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distrib.config import UserError
from distrib.tools.dataset.pictures import check_free, write_pictures

SOURCE = "cifar-10-python.tar.gz or cifar-10-binary.tar.gz, or the folder that one of them unpacks to"
FOLDERS = ("cifar-10-batches-py", "cifar-10-batches-bin")
BATCHES = {**{f"data_batch_{k}": "train" for k in range(1, 6)}, "test_batch": "val"}  # and each one's split
ROWS = 10_000  # pictures in a batch
CLASSES = 10
SIDE = 32
PIXELS = 3 * SIDE * SIDE  # the red plane, the green one, the blue one; rows from the top
MOST = 1 << 28  # bytes in a file: more is none of theirs, whatever it claims


class Batch(NamedTuple):
    """uint8 pixels [n, 3072] and labels [n]."""

    pixels: np.ndarray
    labels: np.ndarray


def convert(source: Path, dest: Path, *, rows: int = ROWS, stop: Callable[[], bool] = lambda: False) -> str:
    """Writes ``dest``/train/CLASS/*.png and ``dest``/val/CLASS/*.png; returns what it did, for a person.

    Raises:
        UserError: ``source`` is not CIFAR-10, or damaged; ``dest`` is taken.
        Interrupted: ``stop`` says so.
    """
    check_free(dest)
    names, batches = read(source, rows)

    def pictures() -> Iterator[tuple[str, np.ndarray]]:
        for batch, (pixels, labels) in batches.items():
            images = pixels.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
            for row, (image, label) in enumerate(zip(images, labels, strict=True)):
                name = f"{BATCHES[batch]}/{names[label]}/{batch}_{row:05d}.png"
                yield name, np.ascontiguousarray(image)

    write_pictures(dest, pictures(), rows * len(batches), stop)
    told = [f"{dest}/{split}: {_counts(batches, split)}" for split in ("train", "val")]
    return "\n".join([*told, f"python train.py --config cifar10 --data {dest} trains on them"])


def _counts(batches: dict[str, Batch], split: str) -> str:
    labels = np.concatenate([batch.labels for name, batch in batches.items() if BATCHES[name] == split])
    each = np.bincount(labels, minlength=CLASSES)
    many = f"{each.min():,}" if each.min() == each.max() else f"{each.min():,} to {each.max():,}"
    return f"{len(labels):,} pictures, {many} in each of {CLASSES} classes"


def read(source: Path, rows: int = ROWS) -> tuple[list[str], dict[str, Batch]]:
    """The classes' names and the batches of ``rows`` pictures, of an archive or a folder.

    Raises:
        UserError: it is not CIFAR-10, or damaged.
    """
    files = _folder(source) if source.is_dir() else _archive(source)
    if "data_batch_1.bin" in files:
        missing = [name for name in ("batches.meta.txt", *(f"{b}.bin" for b in BATCHES)) if name not in files]
    elif "data_batch_1" in files:
        missing = [name for name in ("batches.meta", *BATCHES) if name not in files]
    else:
        raise UserError(f"{source} is not CIFAR-10: it holds neither data_batch_1 nor data_batch_1.bin; give {SOURCE}")
    if missing:
        raise UserError(f"{source} lacks {', '.join(missing)}: download it again")
    binary = "data_batch_1.bin" in files
    try:
        if binary:
            names = files["batches.meta.txt"].decode("ascii", "replace").split()
            batches = {name: _from_rows(files[f"{name}.bin"], f"{name}.bin") for name in BATCHES}
        else:
            names = _names(_unpickle(files["batches.meta"], "batches.meta"))
            batches = {name: _from_pickle(_unpickle(files[name], name), name) for name in BATCHES}
        for name, batch in batches.items():
            if len(batch.labels) != rows:
                raise ValueError(f"{name} has {len(batch.labels):,} pictures, not {rows:,}")
            if batch.labels.max(initial=0) >= CLASSES:
                raise ValueError(f"{name} has the label {batch.labels.max()}, there are 0 to {CLASSES - 1}")
        if len(set(names)) != CLASSES or not all(re.fullmatch(r"\w[\w.-]*", name) for name in names):
            raise ValueError(f"the classes' names are not {CLASSES} words: {' '.join(names)[:200]}")
    except ValueError as error:
        raise UserError(f"{source} is not CIFAR-10, or damaged: {error}") from None
    return names, batches


def _wanted(name: str) -> bool:
    return name.removesuffix(".bin") in BATCHES or name in ("batches.meta", "batches.meta.txt")


def _folder(source: Path) -> dict[str, bytes]:
    inner = next((source / name for name in FOLDERS if (source / name).is_dir()), source)
    try:
        return {file.name: file.read_bytes() for file in inner.iterdir() if _wanted(file.name) and file.is_file()}
    except OSError as error:
        raise UserError(f"cannot read {inner}: {error.strerror}") from None


def _archive(source: Path) -> dict[str, bytes]:
    """Nothing is unpacked: the members' names choose no place on the disk."""
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(source) as archive:
            for member in archive:
                name = member.name.rpartition("/")[2]
                if not (_wanted(name) and member.isfile()):
                    continue
                stream = archive.extractfile(member)
                assert stream is not None  # it is a file
                files[name] = stream.read(MOST)
                if len(files[name]) != member.size:
                    raise tarfile.ReadError("unexpected end of data")
    except (tarfile.TarError, EOFError, zlib.error) as error:
        words = str(error).partition("\n")[0].rstrip(" :-(")
        raise UserError(f"{source} is no tar archive, or incomplete ({words}): download it again") from None
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror or error}") from None
    return files


def _from_rows(data: bytes, name: str) -> Batch:
    """Rows of a label's byte and the pixels' 3072."""
    if len(data) % (1 + PIXELS):
        raise ValueError(f"{name} has {len(data):,} bytes, no whole number of rows of {1 + PIXELS:,}")
    table = np.frombuffer(data, np.uint8).reshape(-1, 1 + PIXELS)
    return Batch(table[:, 1:], table[:, 0])


def _from_pickle(value: Any, name: str) -> Batch:
    value = value if isinstance(value, dict) else {}
    pixels, labels = value.get(b"data"), value.get(b"labels")
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (PIXELS,):
        raise ValueError(f"{name} has no bytes [n, {PIXELS}] called data")
    if not isinstance(labels, list) or not all(isinstance(label, int) and 0 <= label < 256 for label in labels):
        raise ValueError(f"{name} has no list of small whole numbers called labels")
    if len(labels) != len(pixels):
        raise ValueError(f"{name} has {len(labels):,} labels for {len(pixels):,} pictures")
    return Batch(pixels, np.array(labels, np.uint8))


def _names(value: Any) -> list[str]:
    names = value.get(b"label_names") if isinstance(value, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, bytes) for name in names):
        raise ValueError("batches.meta has no list called label_names")
    return [name.decode("ascii", "replace") for name in names]


class _Refused(Exception):
    """A pickle asks for more than the data needs."""


class _Unpickler(pickle.Unpickler):
    """Makes plain values and numpy arrays. A pickle may name any function to be called: it gets no other."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _empty_array
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
            return _encode
        raise _Refused(f"asks for {module}.{name}")


def _empty_array(kind: type, shape: tuple[int, ...], code: bytes) -> np.ndarray:
    """What numpy's own makes: an array without elements, whose state follows."""
    if kind is not np.ndarray or shape != (0,):
        raise _Refused("asks for an array of another kind")
    return np.ndarray((0,), np.dtype("b"))


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", b"latin1"):
        raise _Refused(f"asks for the encoding {encoding!r}")
    return text.encode("latin1")


def _unpickle(data: bytes, name: str) -> Any:
    try:
        return _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except _Refused as error:
        raise ValueError(f"{name}: {error}, which no batch of CIFAR-10 does") from None
    except Exception as error:  # a damaged pickle ends in any of them
        raise ValueError(f"{name} is not a pickle of plain values ({type(error).__name__})") from None
