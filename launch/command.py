"""What to run and what its end means, as pure functions: torchrun's argv and environment, the workers' exit codes."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from distrib.root import TRAIN

FINISHED, FAILED, USER_ERROR = 0, 1, 2
STOPPED = 75  # EX_TEMPFAIL: stopped on request with everything saved, start me again

# The file to which each worker appends `RANK CODE MESSAGE` as it ends; torchrun tells a failure only as 1.
# Two codes stand in it alone, of processes that end with 1: the run diverged, or the preflight found a bad machine.
DIVERGED, BAD_MACHINE = 3, 4
FAILURES = (FAILED, DIVERGED, BAD_MACHINE)
EXIT_CODE_FILE = "DISTRIB_EXIT_CODE_FILE"

TORCHRUN, AGENT = "torch.distributed.run", "launch.agent"

# What torchrun hands on to the workers. By itself it dies of SIGUSR1 and SIGUSR2 and leaves the workers as orphans.
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")


LAST_CALL = 10  # seconds that agents wait for more nodes, once there are enough


@dataclass(frozen=True)
class Command:
    """One process to start: its words, and what its environment has more than ours."""

    argv: tuple[str, ...]
    env: Mapping[str, str]

    def __str__(self) -> str:
        """One line for a shell."""
        return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in self.env.items()), shlex.join(self.argv)])

    def through_agent(self) -> Command:
        """The same words for ``launch.agent``, which leaves it to us to say how the run ended."""
        return replace(self, argv=tuple(AGENT if word == TORCHRUN else word for word in self.argv))


@dataclass(frozen=True)
class Report:
    """What one worker said as it ended."""

    code: int
    message: str = ""


@dataclass(frozen=True)
class Outcome:
    """How the run ended: our exit code, and a line for the user."""

    code: int
    message: str = ""


@dataclass(frozen=True)
class Rendezvous:
    """Where the agents of several nodes meet, as one of them sees it.

    ``least`` below ``nodes``: nodes may come and go, as long as there are so many.
    """

    nodes: int
    host: str
    port: int
    name: str  # of this start, and no other: an agent that is late must not join the next one
    is_host: bool  # whether this node keeps the rendezvous
    address: str  # of this node, for the others
    restarts: int = 0  # how often workers may be started again
    least: int | None = None

    def words(self) -> list[str]:
        """torchrun's options."""
        elastic = self.least is not None and self.least < self.nodes
        # torchrun would wait 30 s for more nodes at each start; who comes later than this is taken in as it comes.
        last_call = f",last_call_timeout={LAST_CALL}" if elastic else ""
        return [
            f"--nnodes={f'{self.least}:' if elastic else ''}{self.nodes}",
            *("--rdzv-backend=c10d", f"--rdzv-endpoint={self.host}:{self.port}"),
            # Said, not left to torchrun: it compares names and addresses, which containers and aliases change.
            *(f"--rdzv-id={self.name}", f"--rdzv-conf=is_host={int(self.is_host)}{last_call}"),
            *(f"--local-addr={self.address}", f"--max-restarts={self.restarts}"),
        ]


# Else the workers meet at the machine's own name, which a laptop may not resolve.
ALONE = ("--standalone", "--local-addr=localhost")


def build_torchrun(
    procs: int,
    config: str,
    overrides: Sequence[str],
    environ: Mapping[str, str],
    cores: int,
    train: Path = TRAIN,
    rendezvous: Rendezvous | None = None,
    numa: bool = False,
) -> Command:
    """Training through torchrun; as ``through_torchrun``."""
    return through_torchrun((str(train), "--config", config, *overrides), procs, environ, cores, rendezvous, numa)


def through_torchrun(
    program: Sequence[str],
    procs: int,
    environ: Mapping[str, str],
    cores: int,
    rendezvous: Rendezvous | None = None,
    numa: bool = False,
) -> Command:
    """torchrun for ``procs`` workers on this machine, alone or among others; ``numa``: each beside its GPU.

    ``program``: a file of Python's or -m and a module, and its words. What ``environ`` already says about torchrun is
    kept.
    """
    ours = {
        "OMP_NUM_THREADS": str(max(1, cores // procs)),  # torchrun would say 1
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # or restarted workers meet the old store: pytorch #135712
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600",  # seconds from a signal to SIGKILL; a save must fit
    }
    argv = [sys.executable, "-m", TORCHRUN, f"--nproc-per-node={procs}", *(rendezvous.words() if rendezvous else ALONE)]
    argv += ["--numa-binding=node"] if numa else []
    argv += [f"--signals-to-handle={','.join(SIGNALS)}", *program]
    return Command(tuple(argv), {name: value for name, value in ours.items() if name not in environ})


def read_reports(text: str) -> dict[int, Report]:
    """The last report of each rank; lines of another form are passed over."""
    reports = {}
    for line in text.splitlines():
        rank, _, rest = line.partition(" ")
        code, _, message = rest.partition(" ")
        if rank.isdecimal() and code.isdecimal():
            reports[int(rank)] = Report(int(code), message.strip())
    return reports


def judge(
    returncode: int,
    reports: Mapping[int, Report],
    procs: int,
    forwarded: int | None = None,
    again: str = "the same command",
) -> Outcome:
    """Our exit code, from torchrun's, the workers' reports and the number of the signal that was ``forwarded``.

    Where rank 0 has said how the run ended there is no line of ours; ``again`` names what continues it elsewhere.
    When one rank fails torchrun ends the others by SIGTERM, and those may well say 75: only all ranks together can.
    """
    codes = [report.code for report in reports.values()]
    if returncode == 0:
        return Outcome(FINISHED)
    if USER_ERROR in codes:
        if 0 in reports and reports[0].code == USER_ERROR:  # it printed its line
            return Outcome(USER_ERROR)
        said = next((report.message for report in reports.values() if report.code == USER_ERROR and report.message), "")
        return Outcome(USER_ERROR, f"error: {said or 'the configuration or the data is wrong, see above'}")
    if len(codes) == procs and STOPPED in codes and set(codes) <= {FINISHED, STOPPED}:
        told = 0 in reports and reports[0].code == STOPPED
        return Outcome(STOPPED, "" if told else f"stopped on request; {again} continues")
    # torchrun takes its signals over before it starts a worker: where one killed it, nothing had begun.
    if forwarded is not None and returncode == -forwarded and not codes:
        return Outcome(STOPPED, "stopped on request before anything began; the same command starts it")
    which = ", ".join(f"rank {rank}: {report.code}" for rank, report in sorted(reports.items()) if report.code)
    said = next((report.message for report in reports.values() if report.code in FAILURES and report.message), "")
    reason = said or f"torchrun exited with {returncode}{f' ({which})' if which else ''}, the first error stands above"
    return Outcome(FAILED, f"error: {reason}")
