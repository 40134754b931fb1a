"""torchrun without its own words about a failure: ``python -m launch.agent`` and torchrun's arguments.

Where a worker fails or a signal arrives torchrun ends in a traceback and a table, below the one line that says what is
wrong. This program runs torchrun's parser and agent as they are, and ends in an exit code; the launcher has the
workers' reports and says how it ended. ``LOGLEVEL=INFO`` brings torchrun's words back.

With ``--max-restarts`` torchrun starts workers again after any exit code but 0. Here a rank ends the run that stopped
on request, found a mistake of the user's or a bad machine, or diverged: another start here would change nothing. Why
workers are started again is written beside their reports.

With ``--nnodes=MIN:MAX`` nodes may come and go. All ranks stop for that, with everything saved, as on a request; the
nodes that stay then go on, and a node that was asked to stop is one that goes. That uses up no restart.

Slurm sends a job's signals to each of its processes, some twice: torchrun heeds the first one only.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from launch.command import (
    BAD_MACHINE,
    DIVERGED,
    EXIT_CODE_FILE,
    FAILED,
    FINISHED,
    SIGNALS,
    STOPPED,
    USER_ERROR,
    Report,
    read_reports,
)

LONGEST = 200  # characters of what a failed rank says
FINAL = (USER_ERROR, DIVERGED, BAD_MACHINE)  # what another start on this machine would end with again

_begun = False  # whether there are workers: until then a signal has nothing to save


class _Over(Exception):
    """The workers ended in a way that another start would not change."""


def main(argv: Sequence[str]) -> int:
    """Runs the workers to their end; returns 0 or 1, as torchrun does, or -N where signal N came before any began."""
    # During the slow import nothing has begun: a signal may end us, without a KeyboardInterrupt's traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Where the nodes' rendezvous ends before us, torch's C++ code would warn with a stack. It asks as it is loaded.
    quiet = not {"LOGLEVEL", "TORCH_CPP_LOG_LEVEL"} & set(os.environ)
    if quiet:
        os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if quiet:
        del os.environ["TORCH_CPP_LOG_LEVEL"]  # the workers may warn
    if "LOGLEVEL" not in os.environ:
        logging.disable(logging.ERROR)
    args = torchrun.parse_args(list(argv))
    least, most = torchrun.parse_min_max_nnodes(args.nnodes)
    _change_torchrun(elastic=least < most)
    try:
        torchrun.run(args)
    except SignalException as error:
        return FAILED if _begun else -error.sigval  # whether all is saved, the workers' reports say
    except _Over:
        return FAILED
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0 and rank not in _reports():
            _report(rank, f"rank {rank} was killed by {failure.signal_name()}")
        return FAILED
    except Exception as error:
        if not _over(STOPPED, *FINAL):  # else the node where the agents met has left before us
            print(f"error: torchrun: {type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return FAILED
    return FINISHED


def _change_torchrun(elastic: bool) -> None:
    """Has torchrun use our agent and heed one signal. It offers no way to choose either; a test says if they move."""
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import api
    from torch.distributed.launcher import api as launcher

    class Agent(LocalElasticAgent):
        """torchrun's, but it knows what the workers' exit codes mean."""

        def _restart_workers(self, worker_group: Any) -> None:
            if _over(*FINAL) or (not elastic and _all_stopped(len(worker_group.workers))):
                raise _Over
            if worker_group.state.name == "FAILED" and _all_stopped():
                self._remaining_restarts += 1  # torchrun has just counted one
            _tell_restart(worker_group)
            super()._restart_workers(worker_group)

        def _start_workers(self, worker_group: Any) -> dict[int, Any]:
            global _begun
            _begun = True
            _forget()  # not sooner: where the nodes do not meet again, these were the last words
            return dict(super()._start_workers(worker_group))

    handler = api._terminate_process_handler

    def once(number: int, frame: FrameType | None) -> None:
        for name in SIGNALS:  # a second one would cut the wait for the workers' save short
            signal.signal(getattr(signal, name), signal.SIG_IGN)
        handler(number, frame)

    setattr(launcher, "LocalElasticAgent", Agent)  # noqa: B010  as an assignment it is none that mypy knows
    setattr(api, "_terminate_process_handler", once)  # noqa: B010


def _over(*codes: int) -> bool:
    """Whether a worker of this node said one of these codes."""
    return any(report.code in codes for report in _reports().values())


def _all_stopped(least: int = 1) -> bool:
    """Whether all workers that said anything, and so many at least, stopped with everything saved."""
    reports = _reports()
    return len(reports) >= least and all(report.code == STOPPED for report in reports.values())


def _tell_restart(worker_group: Any) -> None:
    """Says on stderr, and in the file beside the reports, why workers are started again."""
    path, reports = os.environ.get(EXIT_CODE_FILE), _reports()
    killed = [w.global_rank for w in worker_group.workers if w.global_rank not in reports]  # the others have ended
    failed = [f"rank {rank}: {report.message}"[:LONGEST] for rank, report in sorted(reports.items()) if report.message]
    if worker_group.state.name == "HEALTHY":
        reason = "another node joins, or its workers are started again"
    elif _all_stopped():
        reason = "a node came or left; everything is saved"
    elif killed:
        reason = f"rank {', '.join(map(str, killed))} was killed"
    else:
        reason = "; ".join(failed) or "they failed"
    print(f"workers are started again: {reason}", file=sys.stderr, flush=True)
    if path:
        restarts = Path(f"{path}.restarts")
        with contextlib.suppress(OSError), restarts.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {reason}\n")


def _forget() -> None:
    """Forgets what the workers of the last start said, as they were stopped too."""
    if path := os.environ.get(EXIT_CODE_FILE):
        with contextlib.suppress(OSError):
            Path(path).unlink()


def _report(rank: int, message: str) -> None:
    """Says for a rank that could not do so itself how it ended."""
    with contextlib.suppress(OSError), open(os.environ.get(EXIT_CODE_FILE, ""), "a", encoding="utf-8") as file:
        file.write(f"{rank} {FAILED} {message}\n")


def _reports() -> dict[int, Report]:
    """What the workers of this node said of their end."""
    try:
        with open(os.environ.get(EXIT_CODE_FILE, ""), encoding="utf-8", errors="replace") as file:
            return read_reports(file.read())
    except OSError:
        return {}


if __name__ == "__main__":
    code = main(sys.argv[1:])
    if code < 0:  # as during the import: who started us takes that for a stop
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)
