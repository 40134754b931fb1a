"""``python -m launch COMMAND …``: finds the command's module and runs it; no other is imported."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from launch.command import FAILED, TRAIN, USER_ERROR

# Each is a module of this package with ``main(argv, train)``, which returns the exit code.
COMMANDS = {
    "local": "train on this machine, one process a GPU",
    "slurm": "train as a Slurm job",
    "sweep": "train each combination of several values, and make one table",
    "preflight": "look at the machines as training does before its first step",
    "list": "the runs below a folder, and how they are",
    "status": "all that is known of one run",
    "logs": "what a rank of a job prints; -f follows it",
    "stop": "ask a run to save and to end",
}


def main(argv: Sequence[str] | None = None, train: Path = TRAIN) -> int:
    """Runs one command; returns 0 finished, 75 stopped with all saved, 2 the user's fault, 1 failed."""
    words = list(sys.argv[1:] if argv is None else argv)
    listed = "\n".join(f"  {name:<9} {what}" for name, what in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m launch",
        description="Train here, on several machines or as Slurm jobs, and see how runs are. "
        "`python -m launch COMMAND --help` shows a command's options.",
        epilog=f"commands:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", metavar="COMMAND", help="one of the commands below")
    if not words:
        parser.print_help(sys.stderr)
        return USER_ERROR
    command = parser.parse_args(words[:1]).command
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        print(f"error: there is no command {command}; {hint}", file=sys.stderr)
        return USER_ERROR
    from distrib.config import UserError  # pydantic takes 0.15 s, which --help need not wait for

    try:
        return int(import_module(f"launch.{command}").main(words[1:], train))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:  # while one looks: what starts something has taken the signal over
        return FAILED


if __name__ == "__main__":
    if sys.argv[1:2] not in ([], ["-h"], ["--help"]):
        from distrib.surroundings import settle

        settle()
    sys.exit(main())
