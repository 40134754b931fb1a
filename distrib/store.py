"""A second place for files: a folder, or a URL that fsspec opens. What is put there appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from pathlib import Path
from typing import Any

from distrib.config import UserError
from distrib.jsonl import replace_file
from distrib.layout.folders import reason

KEY = "checkpoint.mirror"
PARTIAL = ".partial"
TAIL = 8  # bytes at a file's end that are read back: a checkpoint's checksum
BLOCK = 1 << 20
# Their objects appear whole when all of them has arrived, and a rename would be a copy: they get the name at once.
OBJECT_STORES = frozenset(
    ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "ocilake", "oss", "tos", "tosfs", "hf"),
)
# An OSError that is one of these is the user's to mend, and told before anything is written; others may be an outage.
WRONG = (FileNotFoundError, NotADirectoryError, FileExistsError, PermissionError)
AWAY = re.compile("connect|timeout|unavailable", re.IGNORECASE)  # in the name of an error that is no OSError


class Store:
    """Files by name below a URL. Every call may raise what the store's library raises: any Exception."""

    def __init__(self, fs: Any, root: str, url: str) -> None:
        """``fs``: an fsspec filesystem; ``root``: the place within it; ``url``: what people call that."""
        self._fs, self._root, self._url = fs, root.rstrip("/"), url.rstrip("/")
        protocol = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
        self._whole = protocol in OBJECT_STORES
        self.moved = 0  # bytes so far, of all files: who waits sees whether they still move

    def shown(self, name: str) -> str:
        """The whole name of a file, for a message."""
        return f"{self._url}/{name}"

    def probe(self) -> None:
        """Looks whether it can be written."""
        name = f".probe.{secrets.token_hex(8)}"
        self.write(name, b"probe")
        self.remove(name)

    def names(self, folder: str) -> list[str]:
        """What lies in ``folder``, without the path; nothing where there is none."""
        try:
            found = self._fs.ls(self._at(folder), detail=False)
        except FileNotFoundError:
            return []
        return sorted(path.rstrip("/").rpartition("/")[2] for path in found)

    def read(self, name: str) -> bytes | None:
        """A small file; None where there is none."""
        try:
            data: bytes = self._fs.cat_file(self._at(name))
        except FileNotFoundError:
            return None
        return data

    def write(self, name: str, data: bytes) -> None:
        """A small file anew: the old one or the new one is there."""
        target = self._at(name)
        partial = target if self._whole else target + PARTIAL
        if not self._whole:
            self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        self._fs.pipe_file(partial, data)
        if partial != target:
            self._rename(partial, target)

    def put(self, file: Path, name: str) -> None:
        """Copies ``file`` there, and looks at its size and its end before it has its name, where the store can rename.

        Raises:
            OSError: what arrived is not what was sent; it is removed.
        """
        target = self._at(name)
        partial = target if self._whole else target + PARTIAL
        sent = False
        try:
            self._send(file, partial)
            sent = True
            with file.open("rb") as source:
                size = source.seek(0, os.SEEK_END)
                source.seek(max(0, size - TAIL))
                end = source.read()
            arrived = self._fs.info(partial)["size"]
            if arrived != size or self._fs.cat_file(partial, start=max(0, size - TAIL), end=size) != end:
                raise OSError(f"{arrived} bytes arrived of {size}, or with another end")
            if partial != target:
                self._rename(partial, target)
        except Exception:
            if sent or not self._whole:  # else what has this name is of an earlier start, and whole
                with contextlib.suppress(Exception):
                    self._fs.rm_file(partial)
            raise

    def get(self, name: str, file: Path) -> None:
        """Copies one to ``file``."""
        self._fs.get_file(self._at(name), str(file))

    def remove(self, name: str) -> None:
        """Removes a file; it need not be there."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._at(name))

    def _rename(self, old: str, new: str) -> None:
        self._fs.mv(old, new)

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/")

    def _send(self, file: Path, target: str) -> None:
        from fsspec.callbacks import Callback

        store = self

        class Moving(Callback):
            def relative_update(self, inc: int = 1) -> None:
                store.moved += inc

            def branched(self, *args: Any, **kwargs: Any) -> Callback:
                return self

        if not self._whole:
            self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        self._fs.put_file(str(file), target, callback=Moving())


class FolderStore(Store):
    """A folder: another disk of this machine, or one that several share. Written durably."""

    def probe(self) -> None:
        """As ``Store.probe``; leaves no folder behind."""
        root = Path(self._root)
        made = [path for path in (root, *root.parents) if not path.exists()]
        try:
            super().probe()
        finally:
            for path in made:  # the deepest first
                with contextlib.suppress(OSError):
                    path.rmdir()

    def write(self, name: str, data: bytes) -> None:
        """As ``Store.write``, also after a power cut."""
        path = Path(self._at(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, data)

    def put(self, file: Path, name: str) -> None:
        """As ``Store.put``, also after a power cut."""
        super().put(file, name)
        folder = os.open(Path(self._at(name)).parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)

    def _rename(self, old: str, new: str) -> None:
        os.replace(old, new)

    def _send(self, file: Path, target: str) -> None:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        with file.open("rb") as source, open(target, "wb") as copy:
            while part := source.read(BLOCK):
                copy.write(part)
                self.moved += len(part)
            copy.flush()
            os.fsync(copy.fileno())


def open_store(place: str | None) -> Store | None:
    """What ``checkpoint.mirror`` names, looked at; None for none. A store that is away for the moment is one, too.

    Raises:
        UserError: there is no such protocol, its package is missing, or the place is not there or not to be written.
    """
    if place is None:
        return None
    import fsspec
    import fsspec.core

    protocol = found[1] if (found := re.match(r"([A-Za-z][\w+.-]*)(?:://|::)", place)) else "file"
    try:
        if protocol in ("file", "local"):
            path = place.partition("://")[2] if "://" in place else place
            folder = Path(os.path.expanduser(path)).absolute()
            store: Store = FolderStore(fsspec.filesystem("file"), str(folder), str(folder))
        else:
            # No listing is remembered: another start may have written since.
            fs, root = fsspec.core.url_to_fs(place, skip_instance_cache=True, use_listings_cache=False)
            store = Store(fs, root, place)
    except ImportError as error:
        extra = "pip install 'distrib[s3]' brings it" if protocol in ("s3", "s3a") else f"install it ({brief(error)})"
        raise UserError(f"{KEY} {place}: the package for {protocol}:// is not installed: {extra}") from None
    except Exception as error:
        raise UserError(f"{KEY} {place} cannot be opened: {brief(error)}: name another place, or null") from None
    try:
        store.probe()
    except Exception as error:
        connecting = isinstance(error, OSError) and not isinstance(error, WRONG) and not isinstance(store, FolderStore)
        if not connecting and not AWAY.search(type(error).__name__):
            raise UserError(f"{KEY} {place} cannot be written: {brief(error)}: name another place, or null") from None
    return store


def brief(error: BaseException) -> str:
    """An error in a line."""
    told = reason(error) if isinstance(error, OSError) else str(error)
    return (told.splitlines() or [""])[0] or type(error).__name__
