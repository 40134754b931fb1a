"""torchrun without its own words about a failure: ``python -m launch.agent`` and torchrun's arguments.

Where a worker fails or a signal arrives torchrun ends in a traceback and a table, below the one line that says what is
wrong. This program runs torchrun's parser and agent as they are, and ends in an exit code; the launcher has the
workers' reports and says how it ended. ``LOGLEVEL=INFO`` brings torchrun's words back.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence

from launch.command import EXIT_CODE_FILE, FAILED, FINISHED, read_reports


def main(argv: Sequence[str]) -> int:
    """Runs the workers to their end; returns 0 or 1, as torchrun does."""
    # During the slow import nothing has begun: a signal may end us, without a KeyboardInterrupt's traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if "LOGLEVEL" not in os.environ:
        logging.disable(logging.ERROR)
    try:
        torchrun.run(torchrun.parse_args(list(argv)))
    except SignalException:
        return FAILED  # whether all is saved, the workers' reports say
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0 and rank not in _reported():
            print(f"rank {rank} was killed by {failure.signal_name()}", file=sys.stderr)
        return FAILED
    except Exception as error:
        print(f"error: torchrun: {type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return FAILED
    return FINISHED


def _reported() -> set[int]:
    """The ranks that said themselves how they ended."""
    try:
        with open(os.environ.get(EXIT_CODE_FILE, ""), encoding="utf-8", errors="replace") as file:
            return set(read_reports(file.read()))
    except OSError:
        return set()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
