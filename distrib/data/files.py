"""Reading files: what the disk refuses for a while is not what a file's content is to blame for.

Two kinds of failure, never mixed. An ``OSError`` is of the surroundings: the file *could not be read*, now. Everything
else is of the content: it *could not be decoded*, and will not be until somebody changes the file.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from distrib.data.index import Index
from distrib.faults import Failure

LARGEST = 1 << 30  # bytes of a file; what is larger is no picture, and would fill the memory
FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC  # does not wait for a FIFO's other end
PROBES = 8  # files, spread over the split, that tell a file's trouble from the disk's


class Encoded(NamedTuple):
    """A file's bytes, with the size and the time that it had when they were read.

    problem: why it cannot be a picture, whatever its bytes are; "" for a regular file.
    """

    data: bytes
    size: int
    mtime_ns: int
    problem: str = ""


class Outage(Exception):
    """Files all over a split cannot be read: the disk's trouble, not theirs.

    reason: the system's words. samples: those that were wanted and could not be read.
    """

    def __init__(self, reason: str, samples: frozenset[int]) -> None:
        super().__init__(reason, samples)  # both, since it is sent from worker processes
        self.reason, self.samples = reason, samples

    def __str__(self) -> str:
        return self.reason


class DataUnavailable(Failure):
    """The images stayed away for longer than the run may wait. Nothing is lost: the same command continues."""


@dataclass(frozen=True)
class Retry:
    """How a read that fails is tried again: after ``first`` seconds, then twice as late, up to ``bound`` in all."""

    first: float = 0.05
    longest: float = 1.0
    bound: float = 3.0


RETRY = Retry()


def read(path: bytes) -> Encoded:
    """Reads a file without ever waiting for one that is none: a FIFO, a device, a folder.

    Raises:
        OSError: it could not be read; it may be readable later.
    """
    descriptor = os.open(path, FLAGS)
    try:
        status = os.fstat(descriptor)
        stamp = status.st_size, status.st_mtime_ns
        if not stat.S_ISREG(status.st_mode):
            return Encoded(b"", *stamp, "it is no regular file")
        if status.st_size > LARGEST:
            return Encoded(b"", *stamp, f"its {status.st_size} bytes are more than a picture's")
        data = os.read(descriptor, status.st_size)
        while len(data) < status.st_size and (more := os.read(descriptor, status.st_size - len(data))):
            data += more
        return Encoded(data, *stamp)
    finally:
        os.close(descriptor)


def read_all(index: Index, wanted: Mapping[int, int], retry: Retry) -> Iterator[tuple[int, Encoded | OSError]]:
    """Yields each row of ``wanted`` (row: sample) with its sample's file: first what can be read at once.

    The others are tried again together, so that a slice waits once and not for each of them. Which still fail then
    come last, with the error.

    Raises:
        Outage: some failed throughout, and so do half or more of other files.
    """
    failed: dict[int, OSError] = {}
    for row, sample in wanted.items():
        result = _try(index, sample)
        if isinstance(result, OSError):
            failed[row] = result
        else:
            yield row, result
    began, delay = time.monotonic(), retry.first
    while failed and time.monotonic() - began < retry.bound:
        time.sleep(delay)
        delay = min(2 * delay, retry.longest)
        for row in list(failed):
            result = _try(index, wanted[row])
            if isinstance(result, OSError):
                failed[row] = result
            else:
                del failed[row]
                yield row, result
    if failed:
        samples = frozenset(wanted[row] for row in failed)
        reason = probe(index, samples)
        if reason is not None:
            raise Outage(reason or first_line(next(iter(failed.values()))), samples)
    yield from failed.items()


def lasts(index: Index, outage: Outage) -> str | None:
    """Reads the samples of an outage again; None where ``read_all`` would not raise it now.

    Returns:
        Why they, and half or more of other files, cannot be read; "" where there are no others.
    """
    failed = [sample for sample in outage.samples if isinstance(_try(index, sample), OSError)]
    return probe(index, failed) if failed else None


def probe(index: Index, apart: Collection[int] = ()) -> str | None:
    """Reads the first byte of ``PROBES`` files, spread over those that are not ``apart``; None where most can be read.

    Returns:
        Why they cannot be read; "" where there are no others.
    """
    others = np.delete(np.arange(len(index)), list(apart))
    others = others[np.linspace(0, len(others) - 1, min(PROBES, len(others))).astype(np.int64)]
    reasons = []
    for sample in others.tolist():
        try:
            descriptor = os.open(index.encoded_path(sample), FLAGS)
            try:
                if stat.S_ISREG(os.fstat(descriptor).st_mode):
                    os.read(descriptor, 1)
            finally:
                os.close(descriptor)
        except OSError as error:
            reasons.append(first_line(error))
    if 2 * len(reasons) < len(others):
        return None
    return reasons[0] if reasons else ""


def first_line(error: BaseException) -> str:
    """Why something failed, in a line: the system's words without number and file name, where it is the system's."""
    words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return next((line.strip() for line in words.splitlines() if line.strip()), type(error).__name__)[:300]


def _try(index: Index, sample: int) -> Encoded | OSError:
    try:
        return read(index.encoded_path(sample))
    except OSError as error:
        return error
