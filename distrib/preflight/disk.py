"""Whether the run folder is one folder for all nodes, and can be written from each."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from distrib.config import UserError
from distrib.layout.folders import reason, shown
from distrib.preflight.facts import Bad, Rank
from distrib.preflight.watch import Watch
from distrib.runtime import Runtime

# For a file of another node to be seen. NFS asks its server at once for a name that is new to it, but for a folder that
# it knew as missing perhaps some seconds later (nfs(5), acdirmin).
PATIENCE = 5.0
PAUSE = 0.1


@dataclass(frozen=True)
class Tried:
    """What one node met. ``error``: why it cannot write; ``unseen``: nodes whose files it did not find.

    ``free``: bytes that this user may still write there.
    """

    error: str = ""
    unseen: tuple[int, ...] = ()
    free: int = 0


def try_folder(runtime: Runtime, nodes: Sequence[Sequence[Rank]], folder: Path, watch: Watch) -> list[Tried]:
    """Has the first rank of each node write a file that the others read; all ranks must call it.

    The first node reads the files of all, the others that of the first. Returns what each node met, on all ranks.
    """
    firsts = [node[0].rank for node in nodes]
    mine = firsts.index(runtime.rank) if runtime.rank in firsts else None
    watch("a wait for the other ranks")
    token = runtime.on_main(lambda: secrets.token_hex(8))
    made: list[Path] = []
    tried = Tried()

    def name(node: int) -> Path:
        return folder / f".preflight-{token}-{node}"

    def write() -> Tried:
        watch(f"writing to {shown(folder)}", alone=True)
        try:
            # From the folder upward. To make it again is what tells NFS that it is there by now.
            made.extend(path for path in (folder, *folder.parents) if not path.exists())
            folder.mkdir(parents=True, exist_ok=True)
            with name(mine or 0).open("xb") as file:
                file.write(f"{token} {mine}".encode())
                file.flush()
                os.fsync(file.fileno())
            status = os.statvfs(folder)
        except OSError as problem:
            return Tried(error=reason(problem))
        return Tried(free=status.f_bavail * status.f_frsize)

    def meet() -> list[Tried]:
        """What each node has met by now."""
        watch("a wait for the other ranks")
        by_rank = runtime.gather_objects(tried)
        return [by_rank[first] for first in firsts]

    try:
        if mine == 0:  # first: the others would make the folder at the same time
            tried = write()
        meet()
        if mine is not None and mine > 0:
            tried = write()
        failed = any(node.error for node in meet())
        if mine is not None and not failed:
            watch(f"reading in {shown(folder)}", alone=True)
            wanted = range(1, len(nodes)) if mine == 0 else range(1)
            unseen = _unseen({node: name(node) for node in wanted}, token)
            tried = replace(tried, unseen=tuple(unseen))
        results = meet()
    finally:
        if mine is not None:
            with contextlib.suppress(OSError):
                name(mine).unlink()
    meet()
    for path in made:  # empty ones only: another start may use them by now
        with contextlib.suppress(OSError):
            path.rmdir()
    return results


def check(tried: Sequence[Tried], nodes: Sequence[Sequence[Rank]], folder: Path) -> list[Bad]:
    """The nodes that cannot write.

    Raises:
        UserError: none can, or the folder is not the same for all.
    """
    failed = [k for k, node in enumerate(tried) if node.error]
    if len(failed) == len(tried):
        where = "" if len(tried) == 1 else f" from any node, such as {nodes[0][0].host}"
        raise UserError(f"cannot write to {shown(folder)}{where}: {tried[0].error}: make room, or set run.dir")
    bad = [Bad(nodes[k][0], f"cannot write to {shown(folder)}: {tried[k].error}") for k in failed]
    if bad:
        return bad
    apart = next((k for k, node in enumerate(tried) if k > 0 and (node.unseen or k in tried[0].unseen)), None)
    if apart is not None:
        raise UserError(
            f"preflight: run.dir {shown(folder)} is another folder for {nodes[apart][0]} than for {nodes[0][0]}: "
            "set it to one on a disk that all nodes share"
        )
    return []


def _unseen(files: dict[int, Path], token: str) -> list[int]:
    """The nodes whose file is not there, or not with its content, also after some time."""
    deadline = time.monotonic() + PATIENCE
    while True:
        files = {node: file for node, file in files.items() if not _holds(file, f"{token} {node}")}
        if not files or time.monotonic() > deadline:
            return list(files)
        time.sleep(PAUSE)


def _holds(file: Path, content: str) -> bool:
    try:
        return file.read_bytes() == content.encode()
    except OSError:
        return False
