"""What each Slurm task runs: submitit unpickles a Task on the node and calls it.

Stopping, saving and being queued again are not left to submitit's handlers: it would call a checkpoint method within a
signal handler, on one rank, and counts each signal in a job of ten minutes or less as a time-out. Here a signal goes
to the ranks, which agree, save and say so in their reports; what follows from these the batch script decides (job.sh).
"""

from __future__ import annotations

import contextlib
import os
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from distrib.place import first_host
from distrib.surroundings import settle, usable_cores
from launch.child import run
from launch.command import FAILED, STOPPED, USER_ERROR, Command, Outcome, Rendezvous, build_torchrun


@dataclass(frozen=True)
class Task:
    """One task of a job. ``words``: for each element of an array (alone: one), what train.py gets."""

    train: str
    configs: tuple[str, ...]
    words: tuple[tuple[str, ...], ...]
    nodes: int
    procs: int  # ranks of a node
    form: str  # "node": this task runs torchrun; "gpu": it is one rank
    restarts: int = 0
    numa: bool = False

    def command(self, environ: Mapping[str, str], cores: int) -> Command:
        """The process to start, from Slurm's variables."""
        element = int(environ.get("SLURM_ARRAY_TASK_ID", 0))
        config, words = self.configs[element], self.words[element]
        if self.form == "gpu":  # train.py finds its place by Slurm's variables
            threads = {} if "OMP_NUM_THREADS" in environ else {"OMP_NUM_THREADS": str(max(1, cores))}
            return Command((sys.executable, self.train, "--config", config, *words), threads)
        rendezvous = slurm_rendezvous(environ, self.nodes, self.restarts)
        made = build_torchrun(self.procs, config, words, environ, cores, Path(self.train), rendezvous, self.numa)
        return made.through_agent()

    def __call__(self) -> None:
        """Runs the ranks of this task to their end.

        Raises:
            SystemExit: with the exit code of a failure. A requested stop ends as a success does: srun would end the
                other tasks at the first failure, perhaps in the middle of their save. One before this task had ranks
                ends them at once: they would wait for this node.
        """
        settle()
        share = os.environ.get("SLURM_CPUS_PER_TASK", "")
        cores = min(usable_cores(), int(share)) if share.isdecimal() and int(share) else usable_cores()
        reports, name = os.environ.get("DISTRIB_REPORTS"), os.environ.get("SLURMD_NODENAME", "node")
        if self.form == "gpu":  # the other ranks' words must not be taken for this one's
            name += f".{os.environ['SLURM_PROCID']}"
        file = Path(reports, name) if reports else None
        made = self.command(os.environ, cores)
        print(made, flush=True)
        outcome = run(made, self.procs if self.form == "node" else 1, os.environ, file)
        silent = file is not None and not file.exists()
        if silent and outcome.code == STOPPED:
            _report(file, "none", STOPPED, "stopped before it began")
            sys.exit(STOPPED)
        if silent and outcome.code == FAILED and self.form == "gpu":
            line = f"rank {os.environ['SLURM_PROCID']} was killed, or could not begin"
            _report(file, os.environ["SLURM_PROCID"], FAILED, line)
            outcome = Outcome(FAILED, f"error: {line}")
        if outcome.message and outcome.code != STOPPED:
            print(outcome.message, file=sys.stderr, flush=True)
        if outcome.code in (FAILED, USER_ERROR):
            sys.exit(outcome.code)


def _report(file: Path | None, rank: str, code: int, message: str) -> None:
    """Says for ranks that could not do so themselves how they ended."""
    if file is not None:
        with contextlib.suppress(OSError), file.open("a", encoding="utf-8") as stream:
            stream.write(f"{rank} {code} {message}\n")


def slurm_rendezvous(environ: Mapping[str, str], nodes: int, restarts: int) -> Rendezvous:
    """Where this node's torchrun meets those of the others, from Slurm's variables.

    The port and the name are of one start of one job: several may share a node, and a requeued one may come back
    before the network has forgotten it. Ephemeral ports begin at 32768. Where another program has the port, the next
    start has another one.
    """
    start = f"{environ['SLURM_JOB_ID']}.{environ.get('SLURM_RESTART_COUNT', 0)}"
    place = f"{environ.get('DISTRIB_SUBMISSION', '')}.{start}"  # nodes may serve two clusters, which count alike
    host = first_host(environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"])
    return Rendezvous(
        nodes=nodes,
        host=host,
        port=20000 + zlib.crc32(place.encode(errors="surrogateescape")) % 10000,
        name=start,
        is_host=environ.get("SLURM_NODEID", "0") == "0",
        address=environ.get("SLURMD_NODENAME", host),
        restarts=restarts,
    )
