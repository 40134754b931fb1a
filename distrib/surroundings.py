"""What a process finds around it: its words, environment variables, standard streams, limits.

Imports no torch, and runs before torch does: libraries read the same variables, some while they are imported.
"""

from __future__ import annotations

import errno
import os
import platform
import pwd
import re
import resource
import sys
import tempfile
import time
from collections.abc import Mapping, MutableMapping
from typing import IO, Any

from distrib.config import UserError

# Variables that mean nothing when they are empty, though libraries would take "" for a number, a folder or a name.
# Not CUDA_VISIBLE_DEVICES, whose empty value means no GPU.
NEVER_EMPTY = re.compile(
    r"(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT|OMP_NUM_THREADS|HOME|USER|LOGNAME|TMPDIR"
    r"|(XDG|SLURM|OMPI|PMI|MPI|WANDB|TORCH|TORCHELASTIC|TORCHINDUCTOR|NCCL|DALI)_.*)"
)
OPEN_FILES = 256  # what a run with worker processes needs, with room


def settle() -> None:
    """Puts right what can be put right without asking. First thing in a process; raises nothing."""
    _open_standard_streams()
    for name in ("stdout", "stderr"):
        setattr(sys, name, ForgivingStream(getattr(sys, name)))
    settle_environment(os.environ)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < hard:
        wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def settle_environment(environ: MutableMapping[str, str]) -> None:
    """Unsets variables whose value is blank or cannot be meant; finds a home where there is none."""
    for name in [name for name, value in environ.items() if not value.strip() and NEVER_EMPTY.fullmatch(name)]:
        del environ[name]
    for name in [name for name in environ if re.fullmatch(r"XDG_\w+_(HOME|DIR)", name)]:
        if not os.path.isabs(environ[name]):  # "the path must be absolute, else ignore it": XDG base directories 0.8
            del environ[name]
    if not re.fullmatch(r"\s*[1-9][0-9]*\s*(,\s*[1-9][0-9]*\s*)*", environ.get("OMP_NUM_THREADS", "1")):
        del environ["OMP_NUM_THREADS"]  # OpenMP would complain in every process, and do as if it were unset
    try:
        user = pwd.getpwuid(os.getuid())
    except KeyError:  # a container's made-up user
        user = None
    if user is None:
        # Libraries ask for the user's name too, and raise where neither a variable nor a password entry tells.
        environ.setdefault("USER", f"uid{os.getuid()}")
        environ.setdefault("LOGNAME", environ["USER"])
    if "HOME" not in environ and user is None:
        environ["HOME"] = os.path.join(tempfile.gettempdir(), f"distrib-home-{os.getuid()}")


def check_limits() -> None:
    """Refuses what no run can live with.

    Raises:
        UserError: too few files may be open.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < OPEN_FILES:
        raise UserError(f"only {soft} files may be open at once: raise the limit (ulimit -n 4096)", everywhere=False)


def usable_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def same_command() -> str:
    """How our words name what continues this run: ``--fresh`` would begin it anew."""
    return "the same command" + (" without --fresh" if "--fresh" in sys.argv[1:] else "")


def keep_output(rank: int, environ: Mapping[str, str]) -> None:
    """Appends what this rank prints to its own file, where a launcher has named a folder for such files.

    By the descriptors, so that what C code prints goes there too. Raises nothing: without the file the output stays
    where it is.
    """
    folder = environ.get("DISTRIB_RANK_LOGS")
    if not folder:
        return
    try:
        os.makedirs(folder, exist_ok=True)
        file = os.open(os.path.join(folder, f"rank_{rank:05d}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError as error:
        print(f"warning: no log in {folder}: {error.strerror}", file=sys.stderr)
        return
    sys.stdout.flush()
    for number in (1, 2):
        os.dup2(file, number)
    os.close(file)
    print(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} on {platform.node()}, process {os.getpid()}", flush=True)


class ForgivingStream:
    """A standard stream whose end may go away: a closed terminal, ``| head``. Training goes on in silence.

    Other faults, such as a full disk under a log, cost what was to be written then, and no more.
    """

    GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO)

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a locale without "×" must not cost the line

    def write(self, text: str) -> int:
        """Writes where that is possible."""
        try:
            return self._stream.write(text)
        except (OSError, ValueError) as error:
            return self._failed(error, len(text))

    def flush(self) -> None:
        """Flushes where that is possible."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._failed(error)

    def _failed(self, error: Exception, done: int = 0) -> int:
        if isinstance(error, OSError) and error.errno in self.GONE:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # what is buffered must go somewhere, or Python fails at exit
            os.close(nowhere)
        return done

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _open_standard_streams() -> None:
    """Opens what was closed (``>&-``): else the next file, a checkpoint perhaps, gets that number and C's output."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115
