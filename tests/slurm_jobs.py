"""Runs as jobs of a test cluster: submitted as a user does, disturbed, and looked at."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import runs
from slurm_cluster import Cluster

from launch.record import Record

SECONDS = 240  # for anything that a job does: a start takes 10 s on a machine of two cores that has nothing else to do
RANK, AGENT, TASK, SCRIPT = "train.py", "launch.agent", "submitit.core", "slurm_script"  # in their commands
HEADER = "--- "  # before what a rank prints in one start
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # the nodes share this machine's cores
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")


class Job:
    """A run as a Slurm job."""

    def __init__(self, cluster: Cluster, folder: Path, number: str) -> None:
        self.cluster, self.folder, self.number = cluster, folder, number
        self.record = Record(folder)
        self._seen = 0

    def state(self) -> str:
        return self.cluster.job(self.number)["JobState"]

    def minutes(self) -> int:
        """How long the newest start has run, in whole minutes."""
        hours, minutes, _ = self.cluster.job(self.number)["RunTime"].split(":")
        return 60 * int(hours) + int(minutes)

    def restarts(self) -> int:
        return int(self.cluster.job(self.number)["Restarts"])

    def steps(self) -> int:
        """Steps that rank 0 has traced, over all starts."""
        return runs.steps_traced(self.folder)

    def until_step(self, step: int) -> None:
        """Waits until so many steps are done."""
        deadline = time.monotonic() + SECONDS
        while self.steps() < step:
            assert time.monotonic() < deadline, f"step {self.steps()} of {step}\n{self.tell()}"
            time.sleep(0.01)  # a step takes 50 ms

    def until_trains(self, steps: int = 2) -> None:
        """Waits until rank 0 was started again since the last call, and has then done so many steps."""
        self.until(lambda: self.starts() > self._seen)
        first = "continuing " if list(self.folder.glob("checkpoints/step_*.pt")) else "settled, "
        self.until(lambda: first in self.log().rpartition(HEADER)[2])
        self._seen = self.starts()
        begun = re.search(r"^continuing .*: step (\d+) of", self.log().rpartition(HEADER)[2], re.MULTILINE)
        self.until_step((int(begun[1]) if begun else 0) + steps)

    def until_started(self, restarts: int) -> None:
        """Waits until the job was queued again so often and has begun; Slurm's wait before that is cut short."""
        self.until(lambda: self.restarts() == restarts)
        self.until(lambda: self.state() in ("PENDING", "RUNNING"))
        if self.state() == "PENDING":
            self.cluster.hurry(self.number)
        self.until(lambda: [e["restart"] for e in self.events("began")][-1:] == [restarts])

    def until_over(self) -> str:
        """Waits for the job's end, and through starts before it that are stopped; returns Slurm's state of it."""

        def over() -> bool:
            facts = self.cluster.job(self.number)
            if (facts["JobState"], facts["Reason"]) == ("PENDING", "BeginTime"):
                self.cluster.hurry(self.number)
            return facts["JobState"] in OVER

        self.until(over)
        self.until(lambda: not self.processes())
        return self.state()

    def until(self, condition: Any) -> Any:
        try:
            return self.cluster.wait(condition, SECONDS)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.tell()}") from None

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        """The record's events of this job."""
        of_job = [event for event in self.record.read() if event["job"] == self.number]
        return [event for event in of_job if kind in (None, event["event"])]

    def log(self, rank: int = 0) -> str:
        """What a rank has printed, over all starts."""
        file = self.record.log_of(rank)
        return file.read_text(errors="replace") if file.exists() else ""

    def starts(self, rank: int = 0) -> int:
        """How often a rank was started."""
        return self.log(rank).count(HEADER)

    def ends(self) -> list[tuple[int, str]]:
        """Code and consequence of each start that could say how it ended."""
        return [(event["code"], event["then"]) for event in self.events("ended")]

    def signal(self, name: str) -> None:
        """Sends all ranks a signal, as Slurm would."""
        self.cluster.run("scancel", "-s", name, self.number)

    def processes(self, word: str = "", node: str = "") -> list[int]:
        """This job's processes on all nodes, or on one, that have ``word`` in their command; parents first."""
        found: dict[int, int] = {}
        wanted = {f"SLURM_CONF={self.cluster.environ['SLURM_CONF']}", f"SLURM_JOB_ID={self.number}"}
        if node:
            wanted.add(f"SLURMD_NODENAME={node}")
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                environ = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                command = (folder / "cmdline").read_bytes().decode(errors="replace")
                around = AGENT if word == RANK else "/srun" if word else None  # has the same words, and is another
                if wanted <= {*environ} and word in command and (around is None or around not in command):
                    found[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        return sorted(found, key=lambda pid: (found[pid] in found, pid))

    def send(self, name: str, word: str, node: str) -> None:
        """Sends a signal to one process alone: the first on a node that has ``word`` in its command."""
        os.kill(self.processes(word, node)[0], signal.Signals[f"SIG{name}"])

    def nodes(self) -> list[str]:
        """The nodes of the newest start."""
        listed = self.events("began")[-1]["nodes"]
        return self.cluster.run("scontrol", "show", "hostnames", listed).split()

    def output(self) -> str:
        """What the batch script and the first task wrote."""
        files = sorted(self.record.path.glob(f"*/{self.number}_0_log.out"))
        return "\n".join(file.read_text(errors="replace") for file in files)

    def tell(self) -> str:
        return f"{self.record.read()}\n{self.output()[-3000:]}\n{self.log()[-3000:]}"


def submit(cluster: Cluster, folder: Path, *words: str, **environ: str) -> Job:
    """``launch slurm`` on two nodes of one rank each, unless ``words`` say otherwise."""
    command = [sys.executable, "-m", "launch", "slurm", "--nodes=2", "--procs-per-node=1", "--gpus-per-node=0"]
    done = subprocess.run(
        [*command, "--cpus-per-node=2", *words, *runs.SMALL, f"run.dir={folder}"],
        cwd=runs.ROOT,
        env={**cluster.environ, **ONE_THREAD, **environ},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    match = re.match(r"job (\d+):", done.stdout)
    assert match, done.stdout
    return Job(cluster, folder, match[1])


PLANT = """
import os, signal, sys, threading, time

start = int(os.environ.get("SLURM_RESTART_COUNT", 0))
node = os.environ.get("SLURMD_NODENAME")

def fault(done):
    {fault}

def plant():
    while not hasattr(sys.modules.get("distrib.engine.step"), "TrainStep"):
        time.sleep(0.01)
    kind = sys.modules["distrib.engine.step"].TrainStep
    call = kind.__call__

    def step(self, batches, done, *words, **more):
        fault(done)
        return call(self, batches, done, *words, **more)

    kind.__call__ = step

if any(word.endswith("train.py") for word in sys.orig_argv) and "launch.agent" not in sys.orig_argv:
    {early}
    threading.Thread(target=plant, daemon=True).start()
"""


def planted(folder: Path, fault: str = "pass", early: str = "pass") -> str:
    """A profile under which the ranks do ``fault`` before each step, of which ``done`` tells the number, and ``early``
    before anything else: ``sitecustomize`` is the one module that Python imports unasked."""
    (folder / "plant").mkdir()
    (folder / "plant" / "sitecustomize.py").write_text(PLANT.format(fault=fault, early=early))
    profile = folder / "plant.yaml"
    profile.write_text(f"environment: {{PYTHONPATH: '{folder / 'plant'}'}}\n")
    return f"--profile={profile}"


def slow(folder: Path) -> str:
    """A profile under which a step takes 0.2 s at least, so that a run is not over before Slurm has preempted it."""
    return planted(folder, "time.sleep(0.2)")


@contextlib.contextmanager
def preempted(job: Job) -> Iterator[None]:
    """A job of the higher partition wants all nodes, until the block is left."""
    cluster = job.cluster
    other = cluster.submit(
        "--partition=high", f"--nodes={len(cluster.nodes)}", "--exclusive", "--wrap", "srun sleep 1000"
    )
    try:
        yield
    finally:
        cluster.run("scancel", str(other))
        job.until(lambda: cluster.job(other)["JobState"] == "CANCELLED")
