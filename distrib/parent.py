"""The torchrun that started this process: who is left behind by it stops, and who knows better ends it. No torch.

torchrun passes its own death on to nobody: a worker whose agent was killed would train on, unseen, and hold the GPU and
the run folder. And it starts workers again after any exit code but 0, whatever the worker has said.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

BEGAN = time.time()  # when this process did, or a tenth of a second later; seconds since 1970
LOOK_SECONDS = 1.0

_PDEATHSIG = 1  # linux/prctl.h: the kernel's signal to a process whose parent has ended


def end_with_parent(environ: Mapping[str, str]) -> None:
    """Has a worker of torchrun's get SIGTERM, by which it saves and stops, should its torchrun be killed.

    Others are left as they are: who types ``nohup python train.py`` means it to outlive the shell. Linux counts the
    thread that started us as the parent, which is torchrun's main one.
    """
    if not _is_worker(environ):
        return
    request = death_request()
    if request is None:
        threading.Thread(target=_watch, args=(os.getppid(),), name="parent", daemon=True).start()
        return
    request()
    if os.getppid() == 1 and not _is_torchrun(1):  # it was killed while Python began; in a container it may be 1
        os.kill(os.getpid(), signal.SIGTERM)


def death_request() -> Callable[[], None] | None:
    """A call by which Linux sends the process that makes it SIGTERM when its parent ends; None elsewhere."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)  # here: after a fork there is no time for it

    def ask() -> None:
        libc.prctl(_PDEATHSIG, int(signal.SIGTERM))

    return ask


def end_parent_too(environ: Mapping[str, str], local_rank: int) -> None:
    """As this process ends torchrun gets SIGTERM, so that it starts no worker again. One rank a node does it."""
    if local_rank == 0 and _is_worker(environ):
        atexit.register(_end, os.getppid())


def restarts(environ: Mapping[str, str]) -> tuple[int, int]:
    """How often torchrun has started this worker again, and how often it may; (0, 0) where no torchrun did."""
    counts = (environ.get(f"TORCHELASTIC_{name}", "") for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    done, most = (int(count) if count.isdecimal() else 0 for count in counts)
    return done, most


def _is_worker(environ: Mapping[str, str]) -> bool:
    return "TORCHELASTIC_RUN_ID" in environ


def _is_torchrun(pid: int) -> bool:
    """Whether a process looks like one; a process that cannot be looked at is another user's, and so is none."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return not sys.platform.startswith("linux") and pid > 1
    return any(name in words for name in (b"torchrun", b"torch.distributed", b"launch"))


def _end(pid: int) -> None:
    if os.getppid() == pid and _is_torchrun(pid):
        os.kill(pid, signal.SIGTERM)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
