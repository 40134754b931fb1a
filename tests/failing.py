"""Fails or kills the thread that saves at any of its system calls, counted where Python makes them.

A file's own writes are counted as the operating system gets them, below Python's buffer; what fails there is half done.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

CALLS = ("open", "fsync", "close", "replace", "symlink", "unlink", "listdir")
THREAD = "checkpoint"
KILL = "SIGKILL"


class Strike:
    """At the ``at``-th call, of those named ``name`` or of all, counted from 1: fails with ``how``, or kills.

    ``times``: how many calls in a row fail; none after them.
    """

    def __init__(self, at: int, how: str, name: str | None = None, times: int = 1) -> None:
        self.at, self.how, self.name, self.times = at, how, name, times
        self.calls: list[str] = []  # that were made so far

    def __call__(self, name: str, half: Callable[[], object] = lambda: None) -> None:
        """Counts a call of the saving thread; ``half`` does what a call that fails has done all the same."""
        if threading.current_thread().name != THREAD:
            return
        self.calls.append(name)
        if self.name not in (None, name):
            return
        number = sum(self.name in (None, call) for call in self.calls)
        if self.at <= number < self.at + self.times:
            half()
            if self.how == KILL:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(getattr(errno, self.how), os.strerror(getattr(errno, self.how)))


def install(strike: Strike) -> None:
    """From now on, for the rest of this process."""
    opened = io.open

    class Counted(io.FileIO):
        def write(self, data: Any) -> int:
            strike("write", lambda: super(Counted, self).write(memoryview(data)[: len(data) // 2]))
            return super().write(data)

        def close(self) -> None:
            if not self.closed:
                strike("close", super().close)  # as Linux does: the file is closed all the same
            super().close()

    def open_counted(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode != "xb":
            return opened(file, mode, *args, **kwargs)
        strike("open")
        return io.BufferedWriter(Counted(file, "x"))

    io.open = open_counted  # type: ignore[assignment]  # what pathlib calls
    for name in CALLS:
        setattr(os, name, _counted(strike, name, getattr(os, name)))


def _counted(strike: Strike, name: str, ordinary: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        strike(name, (lambda: ordinary(*args)) if name == "close" else lambda: None)
        return ordinary(*args, **kwargs)

    return call
