"""Looks at every node before the first step: what is wrong there would cost hours later, or be seen by nobody.

What is found, and how the run ends:

    found                                                             end
    other versions of Python, torch, torchvision, CUDA, NCCL,         2, the user's to mend
      DALI or distrib, or other sources of distrib
    a node that does not see the run folder's files of another        2
    no node can write to the run folder                               2
    more processes than GPUs (``runtime.start`` finds it)             2
    some nodes cannot write to the run folder                         1, a bad machine
    no GPU on a rank where others have one                            1
    a GPU of which other processes hold memory                        1
    a wrong part of the sum, or a wrong sum                           1
    a node slower than half of the others, of three or more           1
    a test that does not end, or fails                                1
    clocks apart by more than 5 s, as only logs depend on them        a warning
    other GPUs, drivers or numbers of GPUs                            a warning
    one slow link between nodes that are fast with others             a warning

Each error names rank and host. All ranks have the same table of what each found, judge it alike, and so end together;
but a test that fails or does not end is told by each rank that meets it. A bad machine's name is appended to the file
that DISTRIB_BAD_HOSTS_FILE names, as a line "HOST REASON", for a launcher that starts again without it. The ranks
report BAD_MACHINE (``distrib.faults``), so that nobody starts them again on the same machines.

What is not looked at: the list of images, which train.py compares where it is made; room for a checkpoint, whose size
is known later; a rank that never comes, for which the ranks wait where they meet.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from distrib.config import Auto
from distrib.faults import BAD_MACHINE, Failure
from distrib.preflight import disk, links, sums
from distrib.preflight.clocks import LARGEST_SKEW, Clock, compare_clocks
from distrib.preflight.facts import Bad, Rank, check_gpus, check_versions, differences, group, host, look
from distrib.preflight.watch import SECONDS, Watch
from distrib.runtime import Runtime

BAD_HOSTS_FILE = "DISTRIB_BAD_HOSTS_FILE"
TOLD = 3  # bad machines in a line; the rest are counted


@dataclass(frozen=True)
class Report:
    """What a preflight found that passed; the same on all ranks.

    ``ranks``, ``clocks`` and ``link_speeds`` (GB/s of the rank's node, one way; None: one node) are in rank order.
    ``bus``: the all-reduce's bus bandwidth in GB/s, None for one rank. ``free``: bytes free where the run folder is.
    """

    ranks: Sequence[Rank]
    nodes: int
    clocks: Sequence[Clock]
    link_speeds: Sequence[float | None]
    bus: float | None
    free: int
    warnings: Sequence[str]
    seconds: float

    def __str__(self) -> str:
        """One line."""
        count = len(self.ranks)
        said = [f"{self.free / 2**30:,.1f} GiB free for the run"]
        if self.bus is not None:
            apart = max(abs(clock.skew) + clock.accuracy for clock in self.clocks)
            warned = len(self.warnings)
            alike = f"{warned} warning{'s' * (warned > 1)}, see above" if warned else "alike"
            said = [alike, "all-reduce right", f"{self.bus:.3g} GB/s", f"clocks within {seconds_text(apart)}"]
        where = f"{count} rank{'s' * (count > 1)} on {self.nodes} node{'s' * (self.nodes > 1)}"
        return f"preflight: {where}: {', '.join(said)} ({self.seconds:.1f} s)"


def is_wanted(asked: bool | Auto, runtime: Runtime) -> bool:
    """Whether ``launch.preflight`` asks for one: auto means where there are several nodes."""
    return runtime.world > runtime.local_world if asked == "auto" else asked


def preflight(runtime: Runtime, folder: Path, notify: Callable[[str], None]) -> Report:
    """Looks at all nodes; all ranks must call it. Rank 0's ``notify`` hears the warnings and the last line.

    It ends within 30 s of the call, whatever happens. What it writes in ``folder`` is gone afterwards, the folder too
    where it was not there before.

    Raises:
        UserError: versions differ, or ``folder`` is not one folder for all nodes that can be written.
        Failure: a machine is bad.
    """
    began = time.monotonic()
    here = host()
    who = f"rank {runtime.rank} on {here}"

    def note(reason: str) -> None:
        _note_hosts({here: f"{who} {reason}"}, notify)

    with Watch(who, SECONDS, note) as watch:
        try:
            report = _look_at_all(runtime, folder, notify, watch, began)
        except (torch.AcceleratorError, torch.OutOfMemoryError) as error:  # this rank's own device
            reason = f"has a GPU that fails in {watch.test}: {_first_line(error)}"
            note(reason)
            raise Failure(f"preflight: {who} {reason}", code=BAD_MACHINE) from None
        except RuntimeError as error:  # torch's kinds for connections and for NCCL are RuntimeErrors
            line = f"preflight: {who} fails in {watch.test}: {_first_line(error)}"
            raise Failure(line, code=BAD_MACHINE) from None
    if runtime.is_main:
        for warning in report.warnings:
            notify(f"preflight: {warning}")
        notify(str(report))
    return report


def _look_at_all(runtime: Runtime, folder: Path, notify: Callable[[str], None], watch: Watch, began: float) -> Report:
    def stop_at(bad: Sequence[Bad]) -> None:
        if bad:
            if runtime.is_main:
                _note_hosts({one.rank.host: str(one) for one in reversed(bad)}, notify)
            _fail(bad)

    watch("a look at the machine", alone=True)
    me = look(runtime)
    watch("the exchange of versions")
    ranks = runtime.gather_objects(me)
    check_versions(ranks)
    stop_at(check_gpus(ranks))
    warnings = differences(ranks)
    nodes = group(ranks)

    tried = disk.try_folder(runtime, nodes, folder, watch)
    stop_at(disk.check(tried, nodes, folder))

    watch("the comparison of clocks")
    clocks = compare_clocks(runtime)
    warnings += [
        f"the clock of {rank} is {seconds_text(abs(clock.skew))} {'ahead' if clock.skew > 0 else 'behind'} "
        f"(± {seconds_text(clock.accuracy)}): the logs' times will not fit together; mend its time service"
        for rank, clock in zip(ranks, clocks, strict=True)
        if rank.local_rank == 0 and abs(clock.skew) - clock.accuracy > LARGEST_SKEW
    ]

    bus: float | None = None
    speeds: list[float | None] = [None] * len(nodes)
    if runtime.world > 1:
        watch("the all-reduce")
        stop_at([Bad(ranks[rank], reason) for rank, reason in sums.wrong_ranks(sums.wrong_parts(runtime, watch))])
        watch("the all-reduce's timing")
        bus = sums.bus_bandwidth(runtime)
        result = links.measure(runtime, [node[0].rank for node in nodes], watch)
        stop_at([Bad(nodes[node][0], reason) for node, reason in result.slow_nodes()])
        warnings += [
            f"the link between {nodes[a][0].host} and {nodes[b][0].host} carries {speed:.3g} GB/s, half of the nodes "
            f"have one of {result.median:.3g} or more"
            for (a, b), speed in result.slow_links()
        ]
        speeds = result.by_node()
    node_of = {rank.rank: k for k, node in enumerate(nodes) for rank in node}
    return Report(
        ranks=ranks,
        nodes=len(nodes),
        clocks=clocks,
        link_speeds=[speeds[node_of[rank.rank]] for rank in ranks],
        bus=bus,
        free=min(node.free for node in tried),
        warnings=warnings,
        seconds=time.monotonic() - began,
    )


def _fail(bad: Sequence[Bad]) -> NoReturn:
    """Ends all ranks with one line; they agree on ``bad``."""
    more = f"; and {len(bad) - TOLD} more ranks" if len(bad) > TOLD else ""
    raise Failure(f"preflight: {'; '.join(map(str, bad[:TOLD]))}{more}", everywhere=True, code=BAD_MACHINE)


def _note_hosts(reasons: Mapping[str, str], notify: Callable[[str], None]) -> None:
    """Appends the bad hosts, by their names, where a launcher asked for that."""
    path = os.environ.get(BAD_HOSTS_FILE)
    if not path:
        return
    lines = "".join(f"{name} {' '.join(reason.split())}\n" for name, reason in reasons.items())
    try:
        with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(lines)
    except OSError as error:
        with contextlib.suppress(OSError):
            notify(f"preflight: cannot write to {path} ({BAD_HOSTS_FILE}): {error.strerror}")


def seconds_text(seconds: float) -> str:
    """A short time for a person, never rounded to none."""
    if seconds >= 1:
        return f"{seconds:.1f} s"
    if seconds >= 0.01:
        return f"{seconds * 1e3:.0f} ms"
    return f"{max(seconds * 1e3, 0.1):.2g} ms"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
