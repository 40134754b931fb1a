"""What the training process does while its images do not come: it says so, heeds a request to stop, and has a bound."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

from distrib.data import files
from distrib.data.files import DataUnavailable, Outage, shown
from distrib.data.index import Index
from distrib.faults import Interrupted

LOOK = 0.5  # seconds between two looks at a request to stop
SHORT = 2.0  # seconds that a batch may take without being a wait: a request to stop does not cut these short
LONG = 60.0  # seconds after which a wait is told
PROBE_EVERY = 5.0  # seconds between two looks at a disk that is away for long


class Waiting:
    """The waits of one split's loader, on the main thread."""

    def __init__(self, index: Index, minutes: float, stop: Callable[[], bool], notify: Callable[[str], None]) -> None:
        self._index, self._minutes, self._stop, self._notify = index, minutes, stop, notify

    def watch(self) -> Callable[[], None]:
        """Begins a wait for a batch. The result is to be called now and then while it lasts.

        It raises Interrupted where somebody asked to stop and the batch is late.
        """
        began, told = time.monotonic(), False

        def look() -> None:
            nonlocal told
            waited = time.monotonic() - began
            if waited > SHORT:
                self._check()
            if waited > LONG and not told:
                told = True
                self._notify(f"no batch for {LONG:g} s: reading {shown(self._index.root)} takes long, or hangs")

        return look

    def outlast(self, outage: Outage) -> None:
        """Returns when files can be read again.

        Raises:
            DataUnavailable: not within the minutes that the run may wait.
            Interrupted: somebody asked to stop.
        """
        root, reason = shown(self._index.root), str(outage)
        deadline = time.monotonic() + 60 * self._minutes
        delay = files.RETRY.first
        if self._minutes:
            self._notify(f"cannot read {root}: {reason}; waiting, up to {self._minutes:g} minutes")
        while time.monotonic() < deadline:
            self._sleep(min(delay, deadline - time.monotonic()))
            delay = min(2 * delay, PROBE_EVERY)
            probed = self._probe(deadline)
            if probed is None:
                self._notify(f"{root} can be read again; going on")
                return
            reason = probed or reason
        raise DataUnavailable(
            f"cannot read {root}: {reason}; waited {self._minutes:g} minutes (data.wait_minutes). "
            "Once it is back, the same command continues from the newest checkpoint"
        )

    def _probe(self, deadline: float) -> str | None:
        # On a thread that is left behind where need be: a read from a dead network disk may never return.
        answer: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=lambda: answer.put(files.probe(self._index)), daemon=True).start()
        while time.monotonic() < deadline:
            try:
                return answer.get(timeout=LOOK)
            except queue.Empty:
                self._check()
        return ""

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        self._check()
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, LOOK))
            self._check()

    def _check(self) -> None:
        if self._stop():
            raise Interrupted(f"asked to stop while waiting for {shown(self._index.root)}")
