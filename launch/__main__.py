"""``python -m launch local --procs N …``: checks the configuration, then trains through torchrun on this machine."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import io
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType

from distrib.cli import load_config
from distrib.config import Config, UserError
from distrib.entry import print_config
from distrib.layout import SPLITS, count_images, look
from distrib.options import Parser, parse_start
from distrib.surroundings import ForgivingStream, same_command, settle, usable_cores
from launch.command import (
    EXIT_CODE_FILE,
    FINISHED,
    SIGNALS,
    TRAIN,
    USER_ERROR,
    Command,
    Outcome,
    build_torchrun,
    judge,
    read_reports,
)


def main(argv: Sequence[str] | None = None, train: Path = TRAIN) -> int:
    """Runs one sub-command; returns 0 finished, 75 stopped with all saved, 2 the user's fault, 1 failed."""
    words = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Callable[[list[str], Path], int]] = {"local": local}
    parser = argparse.ArgumentParser(
        prog="python -m launch",
        description="Start training. `python -m launch COMMAND --help` shows a command's options.",
        epilog="commands:\n  local   on this machine, one process a GPU",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=commands, metavar="COMMAND", help="one of the commands below")
    if not words:
        parser.print_help(sys.stderr)
        return USER_ERROR
    command = parser.parse_args(words[:1]).command
    try:
        return commands[command](words[1:], train)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR


def local(argv: list[str], train: Path) -> int:
    """Trains with torchrun on this machine."""
    # The command is printed as it is read back: a file name may hold bytes that are no text.
    if isinstance(sys.stdout, io.TextIOWrapper | ForgivingStream):
        sys.stdout.reconfigure(errors="surrogateescape")
    parser = Parser(
        prog="python -m launch local",
        description="Train on this machine. The same command again continues the run.",
    )
    parser.add_argument("--procs", type=_positive, required=True, metavar="N", help="processes: one for each GPU")
    parser.add_argument("--dry-run", action="store_true", help="print the command and start nothing")
    args = parse_start(parser, argv)

    config = load_config(args.config, args.overrides)
    if args.print_config:
        print_config(config)
        return FINISHED
    check_batch(config, args.procs)
    asked = [*(["--fresh"] if args.fresh else []), *(["--resume", "must"] if args.resume == "must" else [])]
    words = [*asked, *args.overrides]
    command = build_torchrun(args.procs, args.config, words, os.environ, usable_cores(), train)
    if args.dry_run:  # perhaps on a machine that has not the data
        print(command)
        return FINISHED
    check_data(config, args.procs)
    print(command, flush=True)
    if not train.is_file():
        raise UserError(f"{train} is missing: install distrib again, or restore it in the checkout")
    outcome = run(command.through_agent(), args.procs, os.environ)
    if outcome.message:
        print(outcome.message, file=sys.stderr)
    return outcome.code


def check_batch(config: Config, procs: int) -> None:
    """Says what the workers would, in their words, before any of them starts.

    Raises:
        UserError: more processes than images in a batch.
    """
    batch = config.train.global_batch
    if procs > batch:
        raise UserError(f"train.global_batch {batch} is smaller than the {procs} processes: raise it, or start fewer")


def check_data(config: Config, procs: int) -> None:
    """Looks at the data's folders, and counts images until each process has one.

    Raises:
        UserError: the data is not there or does not fit together, or there are fewer images than processes.
    """
    look(config.data, config.model.num_classes)
    images = count_images(config.data, SPLITS[0], procs)
    if procs > images:
        raise UserError(f"the {procs} processes are more than the {images} training images: start fewer")


def run(command: Command, procs: int, environ: Mapping[str, str]) -> Outcome:
    """Runs ``command`` to its end, handing on what asks it to stop; never returns or dies before it has ended."""
    stop = _Stop()
    before = {number: signal.signal(number, stop) for number in _stop_signals()}
    try:
        with tempfile.TemporaryDirectory(prefix="distrib-launch-") as folder:
            file = Path(folder, "exit-codes")
            if stop.asked is not None:
                return judge(-stop.asked, {}, procs, stop.asked)
            # In a session of its own: a terminal's Ctrl-C would reach torchrun beside our copy of it, and at the
            # second signal torchrun forgets how long it was to wait; at the third it leaves the workers behind.
            process = subprocess.Popen(
                command.argv,
                env={**environ, **command.env, EXIT_CODE_FILE: str(file)},
                start_new_session=True,
                preexec_fn=_end_with_us(),
            )
            stop.attach(process)
            returncode = process.wait()
            reports = read_reports(file.read_text(encoding="utf-8", errors="replace")) if file.exists() else {}
            return judge(returncode, reports, procs, stop.asked, same_command())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Stop:
    """The signal handler: forwards the first request to stop and only acknowledges more."""

    def __init__(self) -> None:
        self.asked: int | None = None  # what was or will be forwarded
        self._process: subprocess.Popen[bytes] | None = None
        self._sent = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
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


def _end_with_us() -> Callable[[], None] | None:
    """Has Linux send torchrun SIGTERM should we be killed: in its own session it would train on unseen."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)

    def ask() -> None:
        libc.prctl(1, int(signal.SIGTERM))  # PR_SET_PDEATHSIG

    return ask


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # of a closed terminal
        os.write(2, f"{line}\n".encode())  # print is not safe in a signal handler


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


if __name__ == "__main__":
    settle()
    sys.exit(main())
