"""Samples that cannot be read: named once, replaced in the same way by every loader and in every run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from distrib.config import UserError
from distrib.data.order import Ids


class Quarantine:
    """The bad samples of one split, in a run folder's ``bad_samples.jsonl``.

    A bad sample is replaced by the next good one in the index's order. Which one that is depends on the files alone,
    not on when, where or by which rank they were found, so a resumed run sees the same batches.
    """

    def __init__(self, split: str, count: int, path: Path | None = None, notify: Callable[[str], None] = print) -> None:
        self.split, self.count = split, count
        self._path, self._notify = path, notify
        self._bad: set[int] = set()
        self._read()
        if path is not None and 0 < count <= len(self._bad):
            raise UserError(f"{path} calls all {count} images of {split}/ unreadable: mend them, then delete that file")

    def __len__(self) -> int:
        return len(self._bad)

    def __contains__(self, sample: int) -> bool:
        return sample in self._bad

    def known(self) -> set[int]:
        """The bad samples found so far."""
        return set(self._bad)

    def add(self, sample: int, file: Path, reason: str) -> None:
        """Notes a bad sample, once; the log and the console name it.

        Raises:
            UserError: every sample of the split is bad.
        """
        if sample in self._bad:
            return
        self._read()  # another rank may have named it since
        if sample in self._bad:
            return
        self._bad.add(sample)
        self._notify(f"unreadable image {file}: {reason}; {'replaced' if self.split == 'train' else 'not counted'}")
        if self._path is not None:
            entry = {"split": self.split, "id": sample, "file": str(file), "reason": reason}
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(entry) + "\n")
        if len(self._bad) == self.count:
            message = f"none of the {self.count} images in {file.parent.parent} can be read"
            self._notify(message)  # on any rank: the others may be fine still
            raise UserError(message)

    def replace(self, ids: Ids) -> Ids:
        """``ids`` with each bad one replaced; the same array where none is."""
        if not self._bad or not any(int(sample) in self._bad for sample in ids):
            return ids
        replaced = ids.copy()
        for k in range(len(ids)):
            while int(replaced[k]) in self._bad:
                replaced[k] = (replaced[k] + 1) % self.count
        return replaced

    def _read(self) -> None:
        if self._path is None or not self._path.exists():
            return
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # torn by a kill; the sample will be found again
                continue
            if entry["split"] == self.split:
                self._bad.add(entry["id"])
