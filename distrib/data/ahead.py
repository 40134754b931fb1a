"""Reading batches ahead on threads, in the slices' order."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from distrib.data.decode import ContentError
from distrib.data.fetch import Bad, Fetcher
from distrib.data.files import Encoded, Outage
from distrib.data.order import Ids, Slice
from distrib.data.waiting import LOOK, Waiting

T = TypeVar("T")
Prepare = Callable[[int, Encoded], T]

CHUNK = 32  # rows that a thread reads at a time: a hand-over for each image would cost more than reading it


@dataclass(frozen=True, slots=True)
class Rows(Generic[T]):
    """A slice with what was read for it: ``items`` row by row, of the samples ``ids`` (stand-ins among them)."""

    part: Slice
    ids: Ids
    items: list[T]


class Threads:
    """Threads that make calls in the order in which they came.

    They are daemons, unlike those of concurrent.futures: a read from a dead disk may never return, and would keep the
    process from ending.
    """

    def __init__(self, count: int) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._count = count
        for _ in range(count):
            threading.Thread(target=_work, args=(self._calls,), name="distrib-read", daemon=True).start()

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Queues a call; the future has its result or its exception."""
        future: Future[T] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:
                    future.set_exception(error)

        self._calls.put(run)
        return future

    def close(self) -> None:
        """Ends the threads behind what they are doing; nobody waits for them."""
        while not self._calls.empty():
            self._calls.get()
        for _ in range(self._count):
            self._calls.put(None)


def _work(calls: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while call := calls.get():
        call()
        del call  # its result is the caller's alone


@dataclass(frozen=True, slots=True)
class _Reading(Generic[T]):
    part: Slice
    chunks: list[tuple[range, Future[list[tuple[int, T]]]]]


class ReadAhead(Generic[T]):
    """Yields the slices with their files read and prepared, ``depth`` slices ahead of the one that is asked for.

    found: the bad samples that were met, in no fixed order; to be emptied by who names them.
    """

    def __init__(
        self,
        slices: Iterator[Slice],
        fetcher: Fetcher,
        prepare: Prepare[T],
        waiting: Waiting,
        threads: int,
        depth: int,
    ) -> None:
        self.found: deque[Bad] = deque()
        self._slices, self._fetcher, self._prepare, self._waiting = slices, fetcher, prepare, waiting
        self._threads, self._depth = Threads(threads), depth
        self._again: deque[Slice] = deque()  # before ``slices``
        self._reading: deque[_Reading[T]] = deque()

    def next(self) -> Rows[T] | None:
        """The next slice; None behind the last. Its rows are missing once no sample of the split is good.

        Raises:
            Interrupted, DataUnavailable: as ``Waiting`` says.
        """
        while len(self._reading) <= self._depth:
            part = self._again.popleft() if self._again else next(self._slices, None)
            if part is None:
                break
            self._begin(part)
        if not self._reading:
            return None
        reading = self._reading.popleft()
        part = reading.part
        rows = [pair for chunk, future in reading.chunks for pair in self._result(part, chunk, future)]
        self._waiting.arrived()
        return Rows(part, np.array([sample for sample, _ in rows], dtype=np.int64), [item for _, item in rows])

    def rewind(self, parts: list[Slice]) -> None:
        """Goes back: ``parts`` come next, then what is being read, all of it read anew."""
        self._again = deque([*parts, *(reading.part for reading in self._reading), *self._again])
        for reading in self._reading:
            for _, future in reading.chunks:
                future.cancel()
        self._reading.clear()

    def close(self) -> None:
        """Ends the threads."""
        self._threads.close()

    def _begin(self, part: Slice) -> None:
        chunks = [range(k, min(k + CHUNK, len(part.ids))) for k in range(0, len(part.ids), CHUNK)]
        self._reading.append(_Reading(part, [(chunk, self._submit(part, chunk)) for chunk in chunks]))

    def _submit(self, part: Slice, chunk: range) -> Future[list[tuple[int, T]]]:
        wanted = part.ids[chunk.start : chunk.stop].tolist()
        fetcher, prepare, found = self._fetcher, self._prepare, self.found
        return self._threads.submit(lambda: _read(wanted, fetcher, prepare, found))

    def _result(self, part: Slice, chunk: range, future: Future[list[tuple[int, T]]]) -> list[tuple[int, T]]:
        while True:
            look = self._waiting.watch()
            # Not by the time-out of ``result``: its error could be the call's own.
            while not wait([future], timeout=LOOK).done:
                look()
            try:
                return future.result()
            except Outage as outage:
                self._waiting.outlast(outage)
                future = self._submit(part, chunk)


def _read(wanted: list[int], fetcher: Fetcher, prepare: Prepare[T], found: deque[Bad]) -> list[tuple[int, T]]:
    """(sample that was read, item) for each of the samples ``wanted``; nothing once none is good."""
    rows: dict[int, tuple[int, T]] = {}
    todo = dict(enumerate(wanted))
    while todo:
        fetched, todo = fetcher.fetch(todo, found), {}
        for row, sample, encoded in fetched:
            try:
                rows[row] = sample, prepare(sample, encoded)
            except ContentError as error:
                fetcher.refuse(sample, encoded, error, found)
                todo[row] = sample
    return [rows[row] for row in sorted(rows)]
