"""A data set's files as a few memory-mapped arrays, built once.

1.28 million path strings in a Python list cost every rank 150 MB and a walk over the disk; here all ranks of a
machine share the pages of one blob. An index is a listing and no more: no picture is opened for it, so that nothing
about one is remembered here.

On disk, a folder holds ``paths.npy`` (uint8, the relative paths one after the other), ``offsets.npy`` (int64 [n + 1],
where each begins), ``labels.npy`` (int32 [n]) and ``meta.json``, with a checksum of it all.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distrib.config import UserError
from distrib.data.staging import discard, staged, sweep, write_file
from distrib.faults import Interrupted
from distrib.layout import check_writable, class_names, index_base
from distrib.layout.folders import as_utf8, patiently, reason, shown, unreadable, walk, without_images
from distrib.layout.splits import Split

VERSION = 2
SCRATCH = ".index-"
WAY_OUT = "set data.index_dir"
PROGRESS = 10.0  # seconds between words while a large data set is listed
ARRAYS: dict[str, type[np.generic]] = {"paths": np.uint8, "offsets": np.int64, "labels": np.int32}
META = {"root": str, "classes": list, "nested": dict, "fingerprint": str, "checksum": str}

Notify = Callable[[str], None]


class Damaged(Exception):
    """What lies on the disk is not an index: why, in a few words."""


class Index:
    """One split of a data set; cheap to open, and to send to a worker process (it travels as its folder's name).

    Attributes:
        root: the split's folder, absolute.
        classes: names of the classes in the order of the labels, decoded as UTF-8 in every locale.
        labels: int32 [n], mapped from the disk.
        fingerprint: SHA-256 of the relative paths and the labels.
    """

    def __init__(self, folder: Path, verify: bool = False) -> None:
        """Opens an index. ``verify`` reads all of it and checks its sum; else the lengths must do.

        Raises:
            Damaged: its files are not what was written.
            OSError: they cannot be read now.
        """
        self.folder = folder
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            self._paths, self._offsets, self.labels = (  # as plain arrays: np.memmap's own slices cost 5 µs each
                np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)) for name in ARRAYS
            )
            self._check_shape(meta)
            self._prefix = _as_bytes(meta["root"]).rstrip(b"/") + b"/"
            self.root = Path(os.fsdecode(_as_bytes(meta["root"])))
            self.classes: list[str] = meta["classes"]
            self.nested: dict[str, int] = meta["nested"]
            self.fingerprint: str = meta["fingerprint"]
            if verify:
                self._check_sum(meta)
        except Damaged:
            raise
        except OSError as error:
            if error.errno not in (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
                raise
            raise Damaged(f"{Path(error.filename).name} is missing" if error.filename else str(error)) from None
        except Exception as error:  # numpy and json raise whatever broken bytes make them stumble over
            raise Damaged(" ".join(str(error).split()) or type(error).__name__) from error

    def __len__(self) -> int:
        return len(self.labels)

    def __reduce__(self) -> tuple[type[Index], tuple[Path]]:
        return Index, (self.folder,)

    def path(self, sample: int) -> Path:
        """The file of a sample."""
        return Path(os.fsdecode(self.encoded_path(sample)))

    def encoded_path(self, sample: int) -> bytes:
        """The absolute file name of a sample as the disk has it, whatever its encoding."""
        return self._prefix + self._paths[self._offsets[sample] : self._offsets[sample + 1]].tobytes()

    def is_fresh(self) -> bool:
        """Whether the folders below class folders are as they were; those of the classes are in the index's name."""
        try:
            return all(_stamp(self._prefix + _as_bytes(path)) == stamp for path, stamp in self.nested.items())
        except OSError:
            return False

    def _check_shape(self, meta: Any) -> None:
        if not isinstance(meta, dict) or not all(isinstance(meta.get(key), kind) for key, kind in META.items()):
            raise Damaged("meta.json is not what was written")
        arrays = {"paths": self._paths, "offsets": self._offsets, "labels": self.labels}
        for name, array in arrays.items():
            if array.ndim != 1 or array.dtype != ARRAYS[name]:
                raise Damaged(f"{name}.npy holds {array.dtype} {list(array.shape)}")
        lengths = f"{len(self._paths)} bytes of paths, {len(self._offsets)} offsets, {len(self.labels)} labels"
        if len(self._offsets) != len(self.labels) + 1:
            raise Damaged(lengths)
        if self._offsets[0] != 0 or self._offsets[-1] != len(self._paths):
            raise Damaged(f"{lengths}, from {self._offsets[0]} to {self._offsets[-1]}")

    def _check_sum(self, meta: dict[str, Any]) -> None:
        if not (self._offsets[1:] > self._offsets[:-1]).all():
            raise Damaged("the offsets do not rise")
        if len(self) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.classes):
            raise Damaged("there are labels without a class")
        if _sums(self._paths, self._offsets, self.labels, meta) != (meta["fingerprint"], meta["checksum"]):
            raise Damaged("its checksum differs")


@dataclass(frozen=True)
class Listing:
    """A split's pictures. Stamps are the modification times of folders, in ns."""

    split: Split
    classes: list[bytes]
    stamps: list[int]  # of the class folders
    nested: dict[str, int]  # of the folders below them
    paths: list[bytes]  # relative to the split's folder
    labels: npt.NDArray[np.int32]  # [n]


def open_index(
    split: Split,
    index_dir: str | None = None,
    notify: Notify = lambda text: None,
    stop: Callable[[], bool] = lambda: False,
    verify: bool = True,
) -> Index:
    """Opens a split's index, building it first where there is none or folders have changed since.

    Args:
        verify: whether to check the whole index, which reads it: for one process of each machine.

    Raises:
        UserError: the folder is missing, has no class folders, or one of them holds no image.
        Interrupted: ``stop()`` while the folders were listed.
    """
    split = replace(split, source=split.source.absolute())
    source, classes = split.source, class_names(split)
    base = index_base(index_dir)
    sweep(base, SCRATCH)
    # Adding or removing a file changes its folder's time: one stat a folder tells, not one a file.
    try:
        prefix = os.fsencode(source) + b"/"
        key = _key(split, classes, [_stamp(prefix + name) for name in classes])
    except OSError as error:
        raise unreadable(source, error) from None
    for folder in sorted(base.glob(f"{split.name}-{key}-*")):
        try:
            index = patiently(Index, folder, verify)
        except Damaged as error:
            with contextlib.suppress(OSError):  # if it must stay, the new one will not get its place
                discard(folder, SCRATCH)
            notify(f"the index {shown(folder)} is damaged ({error}): building it anew")
            continue
        except OSError as error:
            raise UserError(f"cannot read the index {shown(folder)}: {reason(error)}: {WAY_OUT}") from None
        if index.root == source and index.is_fresh():
            return index
    check_writable(base, WAY_OUT)  # before a million files are listed
    return write_index(base, list_images(split, classes, notify, stop))


def list_images(
    split: Split,
    classes: list[bytes],
    notify: Notify = lambda text: None,
    stop: Callable[[], bool] = lambda: False,
) -> Listing:
    """Lists the pictures of a split in ImageFolder's order: by class, folder and name.

    Raises:
        UserError: a folder cannot be read, or a class has no picture, or too few for the split.
        Interrupted: ``stop()`` between two folders.
    """
    source = split.source
    notify(f"indexing {shown(source)}: {len(classes)} classes, once")
    stamps: list[int] = []
    nested: dict[str, int] = {}
    paths: list[bytes] = []
    odd: list[bytes] = []
    counts: list[int] = []
    told = time.monotonic()
    for k, name in enumerate(classes):
        folders = []
        for folder in walk(source, name):
            if stop():
                raise Interrupted(f"asked to stop while {shown(source)} was indexed")
            folders.append(folder)
        stamps.append(folders[0].stamp)
        nested.update({as_utf8(folder.path): folder.stamp for folder in folders[1:]})
        pictures: list[bytes] = []
        for folder in sorted(folders, key=lambda folder: as_utf8(folder.path)):
            pictures += [folder.path + b"/" + file for file in folder.pictures]
            odd += [folder.path + b"/" + file for file in folder.odd]
        if pictures:
            pictures = split.choose(pictures, name)
        paths += pictures
        counts.append(len(pictures))
        if time.monotonic() - told > PROGRESS:
            told = time.monotonic()
            notify(f"indexing {shown(source)}: {k + 1} of {len(classes)} classes, {len(paths):,} images")
    empty = [name for name, count in zip(classes, counts, strict=True) if not count]
    if empty:
        raise without_images(source, empty)
    if odd:
        notify(
            f"{shown(source)}: passed over {len(odd)} (FIFOs, devices and folders with an image's name, folders linked "
            f"twice); the first: {shown(odd[0])}"
        )
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), counts)
    return Listing(split, classes, stamps, nested, paths, labels)


def write_index(base: Path, listing: Listing) -> Index:
    """Writes an index below ``base``.

    All that it was made from is in its folder's name, so that an index is never replaced under a process that reads
    it: changed data get another one. Old ones may be deleted.

    Raises:
        UserError: the folder cannot be written.
    """
    offsets = np.zeros(len(listing.paths) + 1, dtype=np.int64)
    np.cumsum([len(path) for path in listing.paths], out=offsets[1:])
    paths = np.frombuffer(b"".join(listing.paths), dtype=np.uint8)
    split = listing.split
    root, classes = as_utf8(os.fsencode(split.source)), [as_utf8(name) for name in listing.classes]
    meta = {"version": VERSION, "root": root, "classes": classes, "nested": listing.nested}
    meta["fingerprint"], _ = _sums(paths, offsets, listing.labels, meta)
    _, meta["checksum"] = _sums(paths, offsets, listing.labels, meta)
    key = _key(split, listing.classes, listing.stamps)
    folder = base / f"{split.name}-{key}-{_short(listing.nested, meta['fingerprint'])}"

    def sound() -> bool:
        try:
            Index(folder, verify=True)
        except Damaged:
            return False
        return True

    try:
        with staged(folder, SCRATCH, sound) as work:
            for name, array in (("paths", paths), ("offsets", offsets), ("labels", listing.labels)):
                file = io.BytesIO()
                np.save(file, array)
                write_file(work / f"{name}.npy", file.getbuffer())
            write_file(work / "meta.json", json.dumps(meta).encode())
        return Index(folder)
    except OSError as error:
        raise UserError(f"cannot write the index to {shown(base)}: {reason(error)}: {WAY_OUT}") from None


def _stamp(folder: bytes) -> int:
    return patiently(os.stat, folder).st_mtime_ns


def _key(split: Split, classes: list[bytes], stamps: list[int]) -> str:
    names = [as_utf8(name) for name in classes]
    return _short(VERSION, as_utf8(os.fsencode(split.source)), names, stamps, *split.key())


def _short(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _sums(paths: Any, offsets: Any, labels: Any, meta: Mapping[str, Any]) -> tuple[str, str]:
    """The fingerprint, of paths and labels, and the checksum, of everything but itself; one pass for both."""
    sha = hashlib.sha256(paths)
    sha.update(labels.astype("<i4", copy=False))
    fingerprint = sha.hexdigest()
    sha.update(offsets)
    sha.update(json.dumps({key: value for key, value in meta.items() if key != "checksum"}, sort_keys=True).encode())
    return fingerprint, sha.hexdigest()


def _as_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
