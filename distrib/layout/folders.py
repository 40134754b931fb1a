"""Reading folders of pictures: as ImageFolder does, in any locale, and patiently where the disk is away for a moment.

A name is bytes here, as the disk has it, and is put in order and shown as UTF-8: labels must not depend on a locale.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from distrib.config import UserError

T = TypeVar("T")
Inode = tuple[int, int]  # device and number

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's ImageFolder's

# Of the surroundings, and gone a moment later: a network disk's hiccup, too many open files.
TRANSIENT = frozenset(
    getattr(errno, name)
    for name in (
        "EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "EBUSY", "EMFILE", "ENFILE", "ENOMEM", "ENOBUFS", "ENOTCONN",
        "ECONNRESET", "ECONNREFUSED", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "EREMOTEIO",
    )
    if hasattr(errno, name)
)  # fmt: skip
WAITS = (0.1, 0.2, 0.4, 0.8, 1.5)  # seconds between tries, 3 in all
TICK, COARSE_TICK = 0.02, 2.0  # seconds in which a folder may change and keep its time; the second one: FAT, HFS+, NFS

_SUFFIXES = tuple(suffix.encode() for suffix in EXTENSIONS)


@dataclass(frozen=True)
class Folder:
    """A folder of a class, or below one. ``pictures`` and ``odd`` are names in it, in order.

    ``odd`` are entries that are passed over: no file though named as a picture, or a folder that was read already.
    """

    path: bytes  # relative to the split, with / between names
    stamp: int  # its modification time, ns, taken before it was read
    pictures: list[bytes]
    odd: list[bytes]


def walk(source: Path, name: bytes) -> Iterator[Folder]:
    """The class folder ``source/name``, then those below it, each one once however many links lead to it.

    Raises:
        UserError: a folder cannot be read, also when tried again.
    """
    base, seen, waiting = os.fsencode(source), _ancestors(source), [name]
    while waiting:
        path = waiting.pop()
        try:
            status = patiently(os.stat, base + b"/" + path)
            inode = status.st_dev, status.st_ino
            if inode in seen:  # a link to it or to a folder above it, perhaps in a loop
                yield Folder(path, status.st_mtime_ns, [], [b"."])
                continue
            seen.add(inode)
            _outlast(status.st_mtime_ns)
            folders, pictures, odd = patiently(scan, base + b"/" + path)
        except OSError as error:
            raise unreadable(source / os.fsdecode(path), error) from None
        yield Folder(path, status.st_mtime_ns, pictures, odd)
        waiting += [path + b"/" + folder for folder in reversed(folders)]


def as_utf8(name: bytes) -> str:
    """A name as text by which to sort and store it: the same in every locale. Bytes that are no UTF-8 survive."""
    return name.decode("utf-8", "surrogateescape")


def shown(path: bytes | str | Path) -> str:
    """A path for a message: one line, and printable, whatever bytes it has."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def patiently(call: Callable[..., T], *args: Any) -> T:
    """Calls again, a few times within three seconds, while the disk fails as it does when it is away for a moment."""
    waits = iter(WAITS)
    while True:
        seconds = next(waits, None)
        try:
            return call(*args)
        except OSError as error:
            if seconds is None or error.errno not in TRANSIENT:
                raise
            time.sleep(seconds)


def reason(error: OSError) -> str:
    """The system's words; some libraries raise an OSError without."""
    return error.strerror or str(error) or type(error).__name__


def unreadable(folder: Path, error: OSError) -> UserError:
    """What to raise where ``folder``, or what ``error`` names in it, cannot be read."""
    where = error.filename if isinstance(error.filename, bytes | str) else folder
    return UserError(f"cannot read {shown(where)}: {reason(error)} (data.root)")


def without_images(source: Path, names: list[bytes]) -> UserError:
    """What to raise where these class folders of ``source`` hold no picture."""
    more = f", nor do {len(names) - 1} more class folders" if names[1:] else ""
    first = shown(source / os.fsdecode(names[0]))
    return UserError(f"{first} holds no images ({', '.join(EXTENSIONS)}){more}: fill or remove it")


def scan(folder: bytes) -> tuple[list[bytes], list[bytes], list[bytes]]:
    """Names of the folders, of the pictures, and of what is named as a picture and is none; hidden ones passed over."""
    folders: list[bytes] = []
    pictures: list[bytes] = []
    odd: list[bytes] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(b"."):
                continue
            if entry.name.lower().endswith(_SUFFIXES):
                (pictures if _is_file(entry) else odd).append(entry.name)
            elif _is_folder(entry):
                folders.append(entry.name)
    return sorted(folders, key=as_utf8), sorted(pictures, key=as_utf8), sorted(odd, key=as_utf8)


def _is_file(entry: os.DirEntry[bytes]) -> bool:
    if not entry.is_symlink():
        return entry.is_file(follow_symlinks=False)  # most disks tell with the name: no call for each file
    try:
        return stat.S_ISREG(entry.stat().st_mode)
    except OSError:  # it leads nowhere, now: the loader names it when it meets it
        return True


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    if not entry.is_symlink():
        return entry.is_dir(follow_symlinks=False)
    try:
        return stat.S_ISDIR(entry.stat().st_mode)
    except OSError as error:
        if error.errno == errno.ELOOP or (error.errno in (errno.ENOENT, errno.ENOTDIR) and b"." in entry.name):
            return False
        raise  # as it has no suffix, it may be a folder of pictures whose disk is away: that is not an empty one


def _outlast(stamp: int) -> None:
    """Waits until a change made from now on shows in a folder's time, where ``stamp`` is from this very moment.

    Without it a picture that is added in the tick in which the folder was read would go unnoticed for ever.
    """
    tick = COARSE_TICK if stamp % 1_000_000_000 == 0 else TICK
    left = stamp / 1e9 + tick - time.time()
    if 0 < left <= tick:  # else it is old, or from another clock
        time.sleep(left)


def _ancestors(source: Path) -> set[Inode]:
    """The folders above a class folder: a link to one of them leads out of the class."""
    seen = set()
    real = Path(os.path.realpath(source))
    for folder in (real, *real.parents):
        with contextlib.suppress(OSError):
            status = os.stat(folder)
            seen.add((status.st_dev, status.st_ino))
    return seen
