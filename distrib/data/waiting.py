"""What the training process does while its images do not come: it says so, heeds a request to stop, and has a bound."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

from distrib.data import files
from distrib.data.files import DataUnavailable, Outage
from distrib.data.index import Index
from distrib.faults import Interrupted
from distrib.layout.folders import shown
from distrib.surroundings import same_command

LOOK = 0.5  # seconds between two looks at a request to stop
# Seconds that a batch may take without being a wait: a request to stop does not cut these short. A run of several ranks
# that is cut short cannot save, as the others wait for this one: there a slow disk gets its time.
ALONE, TOGETHER = 2.0, 60.0
LONG = 60.0  # seconds after which a wait is told
PROBE_EVERY = 5.0  # seconds between two looks at a disk that is away for long


class Waiting:
    """The waits of one split's loader, on the main thread.

    From the first file that an outage takes until a batch has come it is one outage, told once and with one deadline,
    however often the disk seemed to be back in between. ``patience``: seconds that a batch may take before a request
    to stop is heeded.
    """

    def __init__(
        self,
        index: Index,
        minutes: float,
        stop: Callable[[], bool],
        notify: Callable[[str], None],
        patience: float = ALONE,
    ) -> None:
        self._index, self._minutes, self._stop, self._notify = index, minutes, stop, notify
        self._patience = patience
        self._deadline: float | None = None  # of the outage that lasts
        self._told = False

    def watch(self) -> Callable[[], None]:
        """Begins a wait for a batch. The result is to be called now and then while it lasts.

        It raises Interrupted where somebody asked to stop and the batch is late.
        """
        began, told = time.monotonic(), False

        def look() -> None:
            nonlocal told
            waited = time.monotonic() - began
            if waited > self._patience:
                self._check()
            if waited > LONG and not told:
                told = True
                self._notify(f"no batch for {LONG:g} s: reading {shown(self._index.root)} takes long, or hangs")

        return look

    def outlast(self, outage: Outage) -> None:
        """Returns when the files of an outage, or most others, can be read again.

        Raises:
            DataUnavailable: not within the minutes that the run may wait.
            Interrupted: somebody asked to stop.
        """
        if self._deadline is None:
            self._deadline = time.monotonic() + 60 * self._minutes
        reason, delay = outage.reason, files.RETRY.first
        while time.monotonic() < self._deadline:
            # First of all, and in silence: of what was read ahead, more may have failed in an outage that is over.
            probed = self._probe(outage, reason, self._deadline)
            if probed is None:
                return
            reason = probed or reason
            self._tell(reason)
            self._sleep(min(delay, max(0.0, self._deadline - time.monotonic())))
            delay = min(2 * delay, PROBE_EVERY)
        raise DataUnavailable(
            f"cannot read {shown(self._index.root)}: {reason}; waited {self._minutes:g} minutes (data.wait_minutes). "
            f"Once it is back, {same_command()} continues"
        )

    def arrived(self) -> None:
        """A batch has come: this, and nothing less, ends an outage."""
        if self._told:
            self._notify(f"{shown(self._index.root)} can be read again; going on")
        self._deadline, self._told = None, False

    def _tell(self, reason: str) -> None:
        if not self._told:
            self._told = True
            root = shown(self._index.root)
            self._notify(f"cannot read {root}: {reason}; waiting, up to {self._minutes:g} minutes")

    def _probe(self, outage: Outage, reason: str, deadline: float) -> str | None:
        # On a thread that is left behind where need be: a read from a dead network disk may never return.
        answer: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=lambda: answer.put(files.lasts(self._index, outage)), daemon=True).start()
        while (left := deadline - time.monotonic()) > 0:
            try:
                return answer.get(timeout=min(LOOK, left))
            except queue.Empty:
                self._tell(reason)
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
