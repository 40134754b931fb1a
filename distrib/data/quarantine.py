"""Samples without a picture: each named once, and what is remembered of them bound to the file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from distrib.config import UserError
from distrib.data.fetch import Bad, too_many
from distrib.data.files import DataUnavailable, first_line
from distrib.data.index import Index
from distrib.layout.folders import as_utf8, shown
from distrib.surroundings import same_command

SPLITS = ("train", "val")
FIELDS = {"split": str, "file": str, "bytes": int, "mtime_ns": int, "kind": str, "reason": str}


class Quarantine:
    """The bad samples of one split, in a run folder's ``bad_samples.jsonl``.

    A verdict holds for the file that it was given for: one that has changed since, or could only not be *read*, is
    tried again at the next start. ``once`` is told what every rank would say alike.
    """

    def __init__(
        self,
        split: str,
        index: Index,
        path: Path | None = None,
        notify: Callable[[str], None] = print,
        once: Callable[[str], None] | None = None,
    ) -> None:
        self.split = split
        self._index, self._path, self._notify = index, path, notify
        self._bad: set[int] = set()
        self._lost = 0  # of them, those that could not be read
        self._offset = 0  # of what was read of the file
        self._unsaved: list[bytes] = []
        self._failing = False
        passed_over = self._take_over()
        if passed_over:
            (once or notify)(f"{path}: {passed_over} lines are not of this version's kind and are passed over")
        if path is not None and 0 < len(index) <= len(self._bad):
            raise UserError(
                f"{path} calls all {len(index)} images of {split}/ unreadable: mend them, then delete that file"
            )

    def __len__(self) -> int:
        return len(self._bad)

    def known(self) -> set[int]:
        """The bad samples found so far."""
        return set(self._bad)

    def add(self, bad: Bad) -> None:
        """Notes a bad sample, once; the log and the console name it.

        Raises:
            UserError: every sample of the split is bad.
            DataUnavailable: so many could not be read that the rest is another data set.
        """
        if bad.sample not in self._bad:
            self._take_over()  # another rank may have named it since
        if bad.sample in self._bad:
            return
        self._bad.add(bad.sample)
        file = self._index.encoded_path(bad.sample)
        outcome = "replaced" if self.split == "train" else "not counted"
        if bad.kind == "read":
            self._lost += 1
            outcome += " in this start"
        self._notify(f"cannot {bad.kind} {shown(file)}: {bad.reason}; {outcome}")
        relative = as_utf8(os.path.relpath(file, os.fsencode(self._index.root)))
        entry = {"split": self.split, "file": relative, "bytes": bad.size, "mtime_ns": bad.mtime_ns}
        self._append({**entry, "kind": bad.kind, "reason": bad.reason})
        self._check(bad.reason)

    def _check(self, reason: str) -> None:
        count, root = len(self._index), shown(self._index.root)
        if too_many(self._lost, count):
            raise DataUnavailable(
                f"{self._lost} of {count} images in {root} cannot be read ({reason}). "
                f"Once they can, {same_command()} continues"
            )
        if len(self._bad) == count:
            message = f"none of the {count} images in {root} can be read"
            self._notify(message)  # on any rank: the others may be fine still
            raise UserError(message)

    def _append(self, entry: dict[str, object]) -> None:
        """Writes an entry, and those that could not be written before: the run does not end over this file."""
        if self._path is None:
            return
        self._unsaved.append(json.dumps(entry).encode() + b"\n")  # ASCII: a name that is no text survives too
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                while self._unsaved:
                    size = os.fstat(descriptor).st_size
                    torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
                    line = (b"\n" if torn else b"") + self._unsaved[0]
                    # One write a line: ranks append at once. Half of one, on a full disk, is passed over later.
                    if os.write(descriptor, line) != len(line):
                        raise OSError("no space left")
                    self._unsaved.pop(0)
            finally:
                os.close(descriptor)
            self._failing = False
        except OSError as error:
            if not self._failing:
                self._notify(f"cannot write {self._path}: {first_line(error)}; trying again with the next bad image")
            self._failing = True

    def _take_over(self) -> int:
        """Takes over the entries written since the last time; returns how many lines made no sense."""
        if self._path is None:
            return 0
        try:
            with self._path.open("rb") as stream:
                stream.seek(self._offset)
                lines = stream.read().splitlines(keepends=True)
        except OSError:  # none yet; or for the moment, and then its samples are found again
            return 0
        passed_over = 0
        for line in lines:
            if not line.endswith(b"\n"):  # being written, or torn by a kill
                break
            self._offset += len(line)
            try:
                entry = json.loads(line)
            except ValueError:
                entry = line.strip() or None
            split = entry.get("split") if isinstance(entry, dict) else None
            if entry is None or (split != self.split and (split in SPLITS or self.split != SPLITS[0])):
                continue  # the other split's; what is nobody's is counted once
            if not isinstance(entry, dict) or any(type(entry.get(name)) is not kind for name, kind in FIELDS.items()):
                passed_over += 1
            elif entry["kind"] == "decode":
                sample = find(self._index, entry["file"])
                if sample is not None and self._stamp(sample) == (entry["bytes"], entry["mtime_ns"]):
                    self._bad.add(sample)
        return passed_over

    def _stamp(self, sample: int) -> tuple[int, int] | None:
        try:
            status = os.stat(self._index.encoded_path(sample))
        except OSError:
            return None
        return status.st_size, status.st_mtime_ns


def find(index: Index, file: str) -> int | None:
    """The sample of a file named from the split's folder; None where the index has none of that name.

    It looks through the file's class alone.
    """
    name = file.partition("/")[0]
    if name not in index.classes:
        return None
    label = index.classes.index(name)
    path = os.fsencode(index.root) + b"/" + file.encode("utf-8", "surrogateescape")
    first, last = np.searchsorted(index.labels, [label, label + 1]).tolist()
    return next((sample for sample in range(first, last) if index.encoded_path(sample) == path), None)
