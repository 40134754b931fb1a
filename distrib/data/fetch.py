"""From samples to files: the same stand-in for a bad sample in every loader, process and thread."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Literal, NamedTuple, Protocol

from distrib.data import files
from distrib.data.files import Encoded, first_line
from distrib.data.index import Index

FEW, SHARE = 10, 0.01  # images of a split that may be out of reach in one start: so many, or this part of it


def too_many(lost: int, count: int) -> bool:
    """Whether without ``lost`` of ``count`` images, which could not be read, the rest is another data set."""
    return lost > max(FEW, SHARE * count)


class Bad(NamedTuple):
    """A sample without a picture: "read", the file could not be read in this start; "decode", it holds none.

    size, mtime_ns: of the file that the verdict is about (zeros for one that was not read).
    """

    sample: int
    kind: Literal["read", "decode"]
    reason: str
    size: int = 0
    mtime_ns: int = 0


class Found(Protocol):
    """Where bad samples are put: a list, or what several threads may append to."""

    def append(self, bad: Bad, /) -> object:
        """Adds one."""


class Fetcher:
    """Reads a split's samples, and remembers which of them are bad.

    A bad sample is replaced by the next good one in the index's order. Which one that is depends on the files alone,
    not on when, where or by which rank they were found, so a resumed run sees the same batches. Threads may share it.
    """

    def __init__(self, index: Index, bad: Iterable[int]) -> None:
        self.index, self._bad, self._lost = index, set(bad), set[int]()
        self._retry = files.RETRY  # kept, since a worker process may import the module anew

    def fetch(self, wanted: Mapping[int, int], found: Found) -> list[tuple[int, int, Encoded]]:
        """Reads the sample of each row of ``wanted`` (row: sample), or the next good one.

        Returns:
            (row, sample that was read, its file), in no fixed order; nothing once every sample of the split is bad, or
            too many could not be read.

        Raises:
            Outage: the disk is away; nothing is held against a file.
        """
        fetched, todo, retry = [], dict(wanted), self._retry
        while todo:
            if len(self._bad) >= len(self.index) or too_many(len(self._lost), len(self.index)):
                return []  # the quarantine ends the run when it hears of them
            todo = {row: self._good(sample) for row, sample in todo.items()}
            failed = {}
            for row, result in files.read_all(self.index, todo, retry):
                if isinstance(result, Encoded):
                    fetched.append((row, todo[row], result))
                else:
                    self._lost.add(todo[row])
                    self._note(Bad(todo[row], "read", first_line(result)), found)
                    failed[row] = todo[row]
            # The disk has had its time: a folder of lost files must not cost a wait for each of them.
            todo, retry = failed, replace(retry, bound=0.0)
        return fetched

    def refuse(self, sample: int, encoded: Encoded, reason: Exception, found: Found) -> None:
        """Notes that a file which was read holds no picture: ``fetch`` replaces it from now on."""
        self._note(Bad(sample, "decode", first_line(reason), encoded.size, encoded.mtime_ns), found)

    def _note(self, bad: Bad, found: Found) -> None:
        self._bad.add(bad.sample)
        found.append(bad)

    def _good(self, sample: int) -> int:
        for _ in range(len(self.index)):
            if sample not in self._bad:
                break
            sample = (sample + 1) % len(self.index)
        return sample
