"""The image's first program: finds what the words of ``docker run`` mean, and becomes it.

    train.py …              what is a file of Python's is run by Python
    distrib …, bash …       any program
    train …, evaluate …     what is no program is a command of distrib
    torchrun …              torchrun, with the exit code of the run

torchrun itself says 1, whatever its workers ended with. Here the code is made of what this node's workers report: 75
when they were stopped and have saved, 2 when the user has something to mend. ``DISTRIB_EXIT_CODES=75:143`` says
143 for 75, to an orchestrator that starts again only from 128 on.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType

from launch import agent
from launch.command import EXIT_CODE_FILE, FINISHED, SIGNALS, STOPPED, USER_ERROR, judge, read_reports

HOME = "/home/distrib"  # takes files from every user
STOP = (*SIGNALS, "SIGHUP")


def resolve(words: Sequence[str]) -> list[str]:
    """The program that ``words`` mean, and its words. Not for torchrun."""
    if not words:
        return ["distrib", "--help"]
    if words[0].endswith(".py"):
        return [sys.executable, *words]
    return list(words) if shutil.which(words[0]) else ["distrib", *words]


def torchrun(words: Sequence[str]) -> int:
    """Runs torchrun with ``words`` in this process; returns the run's exit code, as this node's workers tell it.

    It takes torchrun's variables (``PET_NNODES`` and the like), which Kubeflow sets, as torchrun does.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing has begun: no KeyboardInterrupt's traceback
    from torch.distributed.run import determine_local_world_size, parse_args

    words = [f"--signals-to-handle={','.join(STOP)}", *words]
    asked = parse_args(words)
    if asked.standalone or asked.nnodes in ("1", "1:1"):
        # Else the workers meet at the container's own name, which not every runtime lets it resolve.
        words.insert(0, "--local-addr=localhost")
    try:
        procs = determine_local_world_size(asked.nproc_per_node)
    except ValueError as error:  # "gpu" where there is none
        print(f"error: torchrun --nproc-per-node: {error}", file=sys.stderr)
        return USER_ERROR
    with tempfile.TemporaryDirectory(prefix="distrib-torchrun-") as folder:
        file = Path(folder, "exit-codes")
        os.environ[EXIT_CODE_FILE] = str(file)
        returncode, asked_to_stop = watch(lambda: agent.main(words))
        text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    reports = read_reports(text)  # of the last start: the agent forgets those before it
    if returncode != FINISHED and asked_to_stop and {report.code for report in reports.values()} <= {FINISHED, STOPPED}:
        return STOPPED  # perhaps while this node waited for others, or before a worker listened: nothing had begun
    outcome = judge(returncode, reports, procs)
    if outcome.message:
        print(outcome.message, file=sys.stderr)
    return outcome.code


def watch(run: Callable[[], int]) -> tuple[int, bool]:
    """What torchrun's ``run`` returns, and whether it was asked to stop meanwhile.

    torchrun handles signals only once it has workers; until then ours ends it as its own would.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException

    def end(number: int, frame: FrameType | None) -> None:
        raise SignalException("asked to stop", signal.Signals(number))

    for name in STOP:
        signal.signal(signal.Signals[name], end)
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    # Python writes the number of each signal to it for which there is a handler.
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        code = run()
    finally:
        signal.set_wakeup_fd(-1)
        os.close(writer)
    with open(reader, "rb") as pipe:
        return code, bool(pipe.read())


def translate(code: int, environ: Mapping[str, str]) -> int:
    """What ``DISTRIB_EXIT_CODES`` says for ``code``: pairs of numbers, with commas; otherwise ``code`` itself.

    Raises:
        SystemExit: it is of another form.
    """
    text = environ.get("DISTRIB_EXIT_CODES", "")
    try:
        pairs = dict(tuple(map(int, pair.split(":"))) for pair in text.split(",") if pair.strip())
    except ValueError:
        print(f"error: DISTRIB_EXIT_CODES is {text!r}: write it as 75:143", file=sys.stderr)
        sys.exit(USER_ERROR)
    return pairs.get(code, code)


def main(words: Sequence[str]) -> int:
    """Becomes the program that is meant; torchrun alone is run here, and returns its exit code."""
    if os.access(HOME, os.W_OK) and not os.access(os.environ.get("HOME", ""), os.W_OK):
        os.environ["HOME"] = HOME  # it is "/" for a user that the image does not know
    if words[:1] != ["torchrun"]:
        program = resolve(words)
        os.execvp(program[0], program)
    translate(0, os.environ)  # a mistake in it is told before hours have gone by
    return translate(torchrun(words[1:]), os.environ)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
