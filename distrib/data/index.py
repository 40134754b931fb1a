"""A data set's files as a few memory-mapped arrays, built once.

1.28 million path strings in a Python list cost every rank 150 MB and a walk over the disk; here all ranks of a
machine share the pages of one blob.

On disk, a folder holds ``paths.npy`` (uint8, the relative paths one after the other), ``offsets.npy`` (int64 [n + 1],
where each begins), ``labels.npy`` (int32 [n]), ``sizes.npy`` (int32 [n, 2], height and width in pixels; zeros where
the file's header cannot be read) and ``meta.json``, written last.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from distrib.config import UserError

VERSION = 1
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
READERS = 32  # threads that read headers: on a network disk they wait, they do not compute

Listing = list[tuple[str, list[str]]]  # each class with its files, both sorted


def cache_dir() -> Path:
    """Where indexes and the built-in sample are kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "distrib"


class Index:
    """One split of a data set; cheap to open, and to send to a worker process (it travels as its folder's name)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.root = Path(meta["root"])
        self.classes: list[str] = meta["classes"]
        self.fingerprint: str = meta["fingerprint"]
        self._paths, self._offsets, self.labels, self.sizes = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("paths", "offsets", "labels", "sizes")
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __reduce__(self) -> tuple[type[Index], tuple[Path]]:
        return Index, (self.folder,)

    def path(self, sample: int) -> Path:
        """The file of a sample."""
        return self.root / os.fsdecode(bytes(self._paths[self._offsets[sample] : self._offsets[sample + 1]]))

    def encoded_path(self, sample: int) -> bytes:
        """The absolute file name of a sample as the disk has it, whatever its encoding."""
        name = bytes(self._paths[self._offsets[sample] : self._offsets[sample + 1]])
        return os.fsencode(self.root) + b"/" + name

    def encoded_paths(self, samples: Iterable[int]) -> list[npt.NDArray[np.uint8]]:
        """Absolute file names as uint8 arrays: what DALI's file reader is fed with, without a string each."""
        prefix = np.frombuffer(os.fsencode(f"{self.root}/"), dtype=np.uint8)
        return [
            np.concatenate([prefix, self._paths[self._offsets[sample] : self._offsets[sample + 1]]])
            for sample in samples
        ]


def open_index(
    root: Path, split: str, index_dir: str | None = None, notify: Callable[[str], None] = lambda text: None
) -> Index:
    """Opens the index of ``root/split``, building it first where there is none or class folders have changed since.

    Raises:
        UserError: the folder is missing, has no class folders, or one of them holds no image.
    """
    source = root.absolute() / split
    folders = _class_folders(source)
    # Adding or removing a file changes its folder's time: one stat a class tells, not one a file.
    stamps = [os.stat(source / name).st_mtime_ns for name in folders]
    expected = {"version": VERSION, "root": str(source), "classes": folders, "stamps": stamps}
    # All that is in the name, so that an index is never replaced under a process that reads it: changed data get
    # another one. Old ones may be deleted.
    base = Path(index_dir).expanduser() if index_dir else cache_dir() / "index"
    folder = base / f"{split}-{hashlib.sha256(json.dumps(expected).encode()).hexdigest()[:16]}"
    if expected.items() <= _meta(folder).items():
        return Index(folder)
    notify(f"indexing {source}: {len(folders)} classes, once")
    listing = [(name, _images(source / name)) for name in folders]
    empty = [name for name, files in listing if not files]
    if empty:
        raise UserError(
            f"{source / empty[0]} holds no images ({', '.join(EXTENSIONS)})"
            + (f", nor do {len(empty) - 1} more class folders" if empty[1:] else "")
            + ": fill or remove it"
        )
    relative = [f"{name}/{file}" for name, files in listing for file in files]
    with ThreadPoolExecutor(READERS) as pool:
        sizes = np.array(list(pool.map(_size, (str(source / path) for path in relative))), dtype=np.int32)
    labels = np.repeat(np.arange(len(listing), dtype=np.int32), [len(files) for _, files in listing])
    return write_index(folder, source, folders, relative, labels, sizes, {"stamps": stamps})


def write_index(
    folder: Path,
    root: Path,
    classes: list[str],
    paths: list[str],
    labels: npt.NDArray[np.int32],
    sizes: npt.NDArray[np.int32],
    extra: dict[str, Any] | None = None,
) -> Index:
    """Writes an index beside ``folder`` and renames it into place, so that a reader never sees half of one.

    Several processes may do so at once, such as two jobs with a shared home: the first one's index stays.

    Raises:
        UserError: the folder cannot be written.
    """
    encoded = [os.fsencode(path) for path in paths]  # names that are not UTF-8 too
    offsets = np.zeros(len(paths) + 1, dtype=np.int64)
    np.cumsum([len(path) for path in encoded], out=offsets[1:])
    blob = b"".join(encoded)
    digest = hashlib.sha256(blob + labels.astype("<i4").tobytes()).hexdigest()
    meta = {"version": VERSION, "root": str(root), "classes": classes, "fingerprint": digest, **(extra or {})}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".index-", dir=folder.parent) as scratch:
            work = Path(scratch) / "index"
            work.mkdir()  # for all who may read here; the scratch folder is for its owner alone
            arrays: dict[str, npt.NDArray[Any]] = {
                "paths": np.frombuffer(blob, dtype=np.uint8),
                "offsets": offsets,
                "labels": labels,
                "sizes": sizes,
            }
            for name, array in arrays.items():
                np.save(work / f"{name}.npy", array)
            (work / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
            while not _renamed(work, folder) and _meta(folder) != meta:
                # A damaged one. It leaves in one step, because another process may be putting its own here.
                with contextlib.suppress(FileNotFoundError):
                    os.rename(folder, tempfile.mkdtemp(prefix="old-", dir=scratch))
            return Index(folder)
    except OSError as error:
        raise UserError(f"cannot write the index to {folder.parent}: {error.strerror}: set data.index_dir") from None


def _renamed(work: Path, folder: Path) -> bool:
    """Renames ``work`` to ``folder``, unless there is one already."""
    try:
        os.rename(work, folder)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def _meta(folder: Path) -> dict[str, Any]:
    """What ``folder``'s index says of itself; nothing where there is none that can be opened."""
    try:
        Index(folder)
        meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError):
        return {}
    return meta


def check_same_classes(train: Index, val: Index) -> None:
    """Labels are positions in the sorted class folders, so both splits must hold the same ones.

    Raises:
        UserError: naming the folders that only one split has.
    """
    only_train, only_val = set(train.classes) - set(val.classes), set(val.classes) - set(train.classes)
    for here, there, names in ((train, val, only_train), (val, train, only_val)):
        if names:
            raise UserError(
                f"class folders differ: {', '.join(sorted(names)[:3])}{' …' if len(names) > 3 else ''} "
                f"({len(names)} in all) in {here.root} but not in {there.root}"
            )


def _class_folders(source: Path) -> list[str]:
    try:
        with os.scandir(source) as entries:
            names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    except FileNotFoundError:
        raise UserError(
            f"no data at {source}: data.root must hold train/ and val/ with a folder a class "
            "(set IMAGENET_DIR or data.root, or try the built-in sample: --config configs/quickstart.yaml)"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror} (data.root)") from None
    if not names:
        raise UserError(f"{source} has no class folders: data.root must hold train/ and val/ with a folder a class")
    return names


def _images(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.name.lower().endswith(EXTENSIONS) and not e.name.startswith("."))


def _size(path: str) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except Exception:  # whatever a broken file makes PIL raise: the loaders name and replace it when they meet it
        return 0, 0
