"""Ends a process whose preflight hangs: collectives may wait for ever, in C code that no signal interrupts."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable

from distrib.faults import BAD_MACHINE, report_exit

SECONDS = 30.0  # for the whole preflight


class Watch:
    """While open, lets this process live for so many seconds; then says in which test it hangs and ends it with 1.

    Called with each test's name. Ranks that wait for another say so: the one that does not is the bad one.
    ``note`` is told of a test that hangs with no other rank in it.
    """

    def __init__(self, who: str, seconds: float, note: Callable[[str], None] = lambda reason: None) -> None:
        self.test = "the preflight"
        self._alone = False
        self._who, self._seconds, self._note = who, seconds, note
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True

    def __call__(self, test: str, alone: bool = False) -> None:
        """Notes that ``test`` begins; ``alone``: no other rank takes part in it."""
        self.test, self._alone = test, alone

    def __enter__(self) -> Watch:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def _end(self) -> None:
        reason = f"hangs: {self.test} did not end within {self._seconds:g} s"
        line = f"preflight: {self._who} {reason}"
        with contextlib.suppress(OSError):
            os.write(2, f"error: {line}\n".encode())
        if self._alone:
            self._note(reason)
        os._exit(report_exit(BAD_MACHINE, line))
