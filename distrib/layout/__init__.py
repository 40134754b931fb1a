"""What a data set's folders tell by themselves: no picture is opened, nothing is imported that a login node lacks.

``python -m launch`` looks before it starts a process, ``distrib.data`` looks again where the processes run.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import tempfile
from pathlib import Path
from typing import Literal

from distrib.config import Auto, DataConfig, UserError
from distrib.layout.folders import as_utf8, patiently, reason, scan, shown, unreadable, walk, without_images
from distrib.layout.splits import FOLDERS, HELD_OUT, WNID, Split, check_classes, folders_of
from distrib.root import ROOT

SPLITS = ("train", "val")

SYNTHETIC_CLASSES = 1000  # ImageNet's

SAMPLE = "sample:fashion-mnist"  # what data.root says for the built-in sample
SAMPLE_IMAGES = {"train": 8_000, "val": 2_000}
SAMPLE_COUNTS = {  # of each class, so that parts of it are counted before it is unpacked
    "train": (747, 860, 809, 807, 763, 795, 807, 818, 792, 802),
    "val": (195, 167, 207, 212, 211, 194, 214, 204, 198, 198),
}
# Numbered, so that the folders sort in the order of Debian, Kaggle and everyone's label tables.
SAMPLE_CLASSES = (
    "0-t-shirt", "1-trouser", "2-pullover", "3-dress", "4-coat",
    "5-sandal", "6-shirt", "7-sneaker", "8-bag", "9-ankle-boot",
)  # fmt: skip

FEW = 10  # class folders that are looked into to explain a mistake

_LAYOUT = "data.root must hold train/ and val/ with a folder a class, or class folders alone"
_SORT_TINY = "while read f c _; do mkdir -p $c; mv images/$f $c; done < val_annotations.txt; rmdir images"


def cache_dir() -> Path:
    """Where indexes and the built-in sample are kept between runs.

    Raises:
        UserError: there is neither an absolute XDG_CACHE_HOME nor a home.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # its standard: a relative one is to be ignored
        return Path(base) / "distrib"
    home = os.environ.get("HOME", "")
    if not os.path.isabs(home):
        try:
            home = pwd.getpwuid(os.getuid()).pw_dir
        except KeyError:
            raise UserError("this user has no home to keep the index in: set XDG_CACHE_HOME to a folder") from None
    return Path(home) / ".cache" / "distrib"


def index_base(index_dir: str | None) -> Path:
    """The folder that holds the indexes: ``data.index_dir``, else one in the cache."""
    return _expand(index_dir, "data.index_dir") if index_dir else cache_dir() / "index"


def data_root(cfg: DataConfig) -> Path:
    """The folder that holds the splits; where ``cfg.root`` names the built-in sample, once it is unpacked.

    Raises:
        UserError: ``cfg.root`` names no folder.
    """
    if "${" in cfg.root:
        raise UserError(
            f"data.root is {cfg.root!r} and that variable is not set: set IMAGENET_DIR to the folder that holds "
            "train/ and val/, give one's own pictures (--data DIR), or train the built-in sample: --config "
            "configs/quickstart.yaml"
        )
    if cfg.root == SAMPLE:
        return cache_dir() / "fashion-mnist-10k"
    root = _expand(cfg.root, "data.root")
    # As configurations are: from any working directory.
    return root if root.is_absolute() or os.path.lexists(root) or not os.path.lexists(ROOT / root) else ROOT / root


def find_splits(cfg: DataConfig) -> tuple[Split, Split]:
    """The training and the validation split below ``data.root``; where there is no val/, shares of train/'s classes.

    Raises:
        UserError: there are none, or ``data.classes`` names one that is not there.
    """
    root = data_root(cfg).absolute()
    found: dict[str, Path | None] = (
        {split: root / split for split in SPLITS} if cfg.root == SAMPLE else folders_of(root)
    )
    train, val = found["train"], found["val"]
    if train is None:
        raise UserError(_missing(root / "train"))
    share = cfg.val_split
    if share == "auto":
        share = HELD_OUT if val is None else None
        if val is None and all(WNID.fullmatch(name) for name in class_folders(train)):
            raise UserError(
                f"data.val_split={HELD_OUT:g} would validate on a part of {shown(train)}; {_missing(root / 'val')}"
            )
    if share is not None:
        val = train
    if val is None:
        raise UserError(_missing(root / "val"))
    if cfg.classes is not None and cfg.root != SAMPLE:
        check_classes(cfg.classes, class_folders(train), train)
    elif cfg.classes is not None:
        check_classes(cfg.classes, [name.encode() for name in SAMPLE_CLASSES], train)
    return (
        Split("train", train, cfg.classes, share, cfg.fraction),
        Split("val", val, cfg.classes, share),
    )


def find_split(cfg: DataConfig, name: Literal["train", "val"], whole: bool) -> Split:
    """The split to evaluate: as in training, or, where ``whole``, the folder of that name with all that is in it.

    Raises:
        UserError: there is none.
    """
    if not whole or cfg.root == SAMPLE:
        return find_splits(cfg)[SPLITS.index(name)]
    root = data_root(cfg).absolute()
    found = folders_of(root)
    source = found[name] or (root if found["train"] == root else None)
    if source is None:
        raise UserError(_missing(root / name))
    if cfg.classes is not None:
        check_classes(cfg.classes, class_folders(source), source)
    return Split(name, source, cfg.classes)


def look(cfg: DataConfig, classes: int | Auto = "auto") -> None:
    """Finds what is wrong with the data before anything is listed, from the two splits' own folders alone.

    Raises:
        UserError: the data is not there or does not fit together, ``classes`` is not what it holds, or there is neither
            an index nor a place to write one.
    """
    count_classes(cfg, classes)
    if cfg.loader == "synthetic":
        return
    root = data_root(cfg).absolute()
    if cfg.root == SAMPLE and not root.exists():
        check_writable(root.parent, "set XDG_CACHE_HOME")
    base = index_base(cfg.index_dir)
    if not all(any(base.glob(f"{split}-*")) for split in SPLITS):  # a read-only one serves, too
        check_writable(base, "set data.index_dir")


def count_classes(cfg: DataConfig, classes: int | Auto = "auto") -> int:
    """How many classes there are, which the folders alone tell; nothing is written.

    Raises:
        UserError: the data is not there or does not fit together, or ``classes`` is not what it holds.
    """
    if cfg.loader == "synthetic":
        return SYNTHETIC_CLASSES if classes == "auto" else classes
    root = data_root(cfg).absolute()
    train, val = find_splits(cfg)
    if cfg.root == SAMPLE:
        found = len(set(cfg.classes or SAMPLE_CLASSES))
    else:
        names = class_names(train)
        if val.source != train.source:
            _check_same(train.source, val.source, names, class_names(val))
        found = len(names)
    if classes not in ("auto", found):
        raise UserError(
            f"model.num_classes is {classes}, but {shown(root)} has {found} class folders: set "
            f"model.num_classes={found}, or leave it out: it follows"
        )
    return found


def count_images(cfg: DataConfig, split: str, limit: int) -> int:
    """How many images ``split`` ("train" or "val") has, counted up to ``limit``: enough to judge a batch by.

    Raises:
        UserError: a folder cannot be read.
    """
    if cfg.loader == "synthetic":
        return min(limit, cfg.synthetic.train if split == "train" else cfg.synthetic.val)
    chosen = find_splits(cfg)[SPLITS.index(split)]
    if cfg.root == SAMPLE:
        each = dict(zip(SAMPLE_CLASSES, SAMPLE_COUNTS[chosen.source.name], strict=True))
        names = set(chosen.classes or SAMPLE_CLASSES)
        return min(limit, sum(chosen.count(each[name], name.encode()) for name in names))
    count = 0
    for name in class_names(chosen):
        pictures = 0
        for folder in walk(chosen.source, name):
            pictures += len(folder.pictures)
            if chosen.is_whole and count + pictures >= limit:
                return limit
        count += chosen.count(pictures, name)
        if count >= limit:
            return limit
    return count


def class_names(split: Split) -> list[bytes]:
    """The class folders of a split that count, in the order of the labels.

    Raises:
        UserError: they cannot be read, or there are none.
    """
    names = class_folders(split.source)
    return names if split.classes is None else [name for name in names if as_utf8(name) in split.classes]


def class_folders(source: Path) -> list[bytes]:
    """The names of a split's class folders, in the order of the labels.

    Raises:
        UserError: ``source`` cannot be read or has no class folders; in known layouts, with how to sort the pictures.
    """
    try:
        folders, pictures, _ = patiently(scan, os.fsencode(source))
    except FileNotFoundError as error:
        if error.filename == os.fsencode(source):
            raise UserError(_missing(source)) from None
        raise unreadable(source, error) from None
    except OSError as error:
        raise unreadable(source, error) from None
    if folders == [b"images"] and (source / "val_annotations.txt").exists():
        raise UserError(
            f"{shown(source)} is Tiny ImageNet's as downloaded, with no folder a class: sort it, in that folder with "
            f"`{_SORT_TINY}`"
        )
    if folders:
        return folders
    if any(name.startswith(b"ILSVRC2012_val_") for name in pictures):
        what = "it is ImageNet's as downloaded: sort it, as extract_ILSVRC.sh of github.com/pytorch/examples does"
    elif pictures:
        what = f"{len(pictures)} pictures lie flat in it ({shown(pictures[0])}): move each to its class's folder"
    else:
        what = _LAYOUT
    raise UserError(f"{shown(source)} has no class folders: {what}")


def check_writable(folder: Path, way_out: str) -> None:
    """Makes ``folder`` and writes some bytes there, which leave no trace.

    Raises:
        UserError: that fails.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())  # some disks say only now that they are full
    except OSError as error:
        raise UserError(f"cannot write to {shown(folder)}: {reason(error)}: {way_out}") from None


def _expand(path: str, key: str) -> Path:
    if "\0" in path:
        raise UserError(f"{key} holds a NUL character, which no path has")
    try:
        os.fsencode(path)
    except UnicodeEncodeError:  # from a file, which is UTF-8 in every locale; the disk's names are, too
        path = os.fsdecode(path.encode("utf-8", "surrogateescape"))
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{key} is {shown(path)}, and there is no such home: write the folder out") from None


def _check_same(here: Path, there: Path, train: list[bytes], val: list[bytes]) -> None:
    """Labels are positions in the sorted class folders, so both splits must hold the same ones."""
    sides = ((here, there, train, val), (there, here, val, train))
    for here, there, names, others in sides:
        only = sorted(set(names) - set(others), key=as_utf8)
        if only:
            empty = [name for name in only[:FEW] if not any(folder.pictures for folder in walk(here, name))]
            if empty:
                raise without_images(here, empty)
            loose = patiently(scan, os.fsencode(there))[1]
            raise UserError(
                f"class folders differ: {', '.join(map(shown, only[:3]))}{' …' if only[3:] else ''} "
                f"({len(only)} in all) in {shown(here)} but not in {shown(there)}"
                + (f", where {len(loose)} pictures lie flat ({shown(loose[0])})" if loose else "")
            )


def _missing(source: Path) -> str:
    root, split = source.parent, source.name
    hint = ""
    with contextlib.suppress(OSError):
        if (root / "ILSVRC" / "Data" / "CLS-LOC").is_dir():
            hint = f"; there is ILSVRC/Data/CLS-LOC: set data.root={shown(root / 'ILSVRC' / 'Data' / 'CLS-LOC')}"
        elif root.name.lower() in FOLDERS[split]:
            hint = f"; did you mean the folder above, data.root={shown(root.parent)}?"
        elif not root.exists():
            hint = f"; there is no {shown(root)}"
        elif pictures := patiently(scan, os.fsencode(root))[1]:
            hint = f"; {len(pictures)} pictures lie flat in it ({shown(pictures[0])}): make a folder of each class"
    return (
        f"no data at {shown(source)}: {_LAYOUT}{hint} "
        "(set IMAGENET_DIR or data.root, or try the built-in sample: --config configs/quickstart.yaml)"
    )
