"""Runs one process to its end and hands on what asks it to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType

from distrib.jobs import end_with_us
from distrib.surroundings import same_command
from launch.command import EXIT_CODE_FILE, SIGNALS, Command, Outcome, judge, read_reports


def run(command: Command, procs: int, environ: Mapping[str, str], reports: Path | None = None) -> Outcome:
    """Runs ``command`` to its end, handing on what asks it to stop; never returns or dies before it has ended.

    ``reports``: the file to which its workers append how they ended; None: one that goes with it.
    """
    with stop_requests() as stop, tempfile.TemporaryDirectory(prefix="distrib-launch-") as folder:
        file = reports or Path(folder, "exit-codes")
        if stop.asked is not None:
            return judge(-stop.asked, {}, procs, stop.asked)
        # In a session of its own: a terminal's Ctrl-C would reach torchrun beside our copy of it, and at the
        # second signal torchrun forgets how long it was to wait; at the third it leaves the workers behind.
        process = subprocess.Popen(
            command.argv,
            env={**environ, **command.env, EXIT_CODE_FILE: str(file)},
            start_new_session=True,
            preexec_fn=end_with_us(),
        )
        stop.attach(process)
        returncode = process.wait()
        said = read_reports(file.read_text(encoding="utf-8", errors="replace")) if file.exists() else {}
        return judge(returncode, said, procs, stop.asked, same_command())


@contextlib.contextmanager
def stop_requests() -> Iterator[Stop]:
    """Until the block ends a request to stop is noted, and handed on to what is attached; it ends nothing here."""
    stop = Stop()
    before = {number: signal.signal(number, stop) for number in _stop_signals()}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Stop:
    """The signal handler: forwards the first request to stop and only acknowledges more."""

    def __init__(self) -> None:
        self.asked: int | None = None  # what was or will be forwarded
        self._process: subprocess.Popen[bytes] | None = None
        self._sent = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Takes one signal."""
        name = signal.Signals(number).name
        if self.asked is not None:
            _say(f"{name}: already stopping, waiting for the workers to save")
            return
        # torchrun is told to know SIGNALS; a closed terminal's SIGHUP and a SIGQUIT mean the same as SIGTERM.
        self.asked = number if name in SIGNALS else signal.SIGTERM
        if self._process is not None:
            self._send(self._process)
        _say(f"{name}: asking the workers to save and stop")

    def attach(self, process: subprocess.Popen[bytes]) -> None:
        """From now on signals go to ``process``; one that came while it started goes there now."""
        self._process = process
        if self.asked is not None and not self._sent:
            self._send(process)

    def _send(self, process: subprocess.Popen[bytes]) -> None:
        assert self.asked is not None
        self._sent = True
        process.send_signal(self.asked)


def _stop_signals() -> list[signal.Signals]:
    numbers = [signal.Signals[name] for name in SIGNALS]
    # Under nohup SIGHUP is ignored on purpose; the same goes for SIGQUIT in a script's background.
    return numbers + [n for n in (signal.SIGHUP, signal.SIGQUIT) if signal.getsignal(n) is not signal.SIG_IGN]


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # of a closed terminal
        os.write(2, f"{line}\n".encode())  # print is not safe in a signal handler
