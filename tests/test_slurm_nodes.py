"""Jobs that lose their nodes, on a real Slurm cluster whose nodes have networks of their own."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import runs
from slurm_cluster import Cluster, available
from slurm_jobs import RANK, preempted, slow, submit

if reason := available():
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def switched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Who is preempted here hears SIGTERM only."""
    with Cluster(tmp_path_factory.mktemp("slurm"), namespaces=True, user_signal=False, grace=60) as cluster:
        yield cluster


def test_a_run_outlives_preemption_a_dead_node_and_one_that_is_cut_off(switched: Cluster, tmp_path: Path) -> None:
    undisturbed = tmp_path / "undisturbed"
    runs.train(2, undisturbed)

    job = submit(switched, tmp_path / "run", slow(tmp_path))
    job.until_trains()
    with preempted(job):
        job.until(lambda: job.restarts() == 1)
        job.until(lambda: job.state() == "PENDING")
    job.until_started(1)
    job.until_trains()
    assert job.ends() == [(75, "requeued")]  # the SIGTERM was enough

    dead = job.nodes()[0]  # that of the batch script
    switched.crash(dead)
    job.until_started(2)
    job.until_trains()
    assert dead not in job.nodes()
    switched.up(dead)

    # The orphans live on, and would write into the run: the disk is still there for them.
    cut = job.nodes()[0]
    orphans = job.processes(RANK, cut)
    stop_and_go(job.processes("", cut), signal.SIGSTOP)  # so that they have something to write when all is over
    switched.cut(cut)
    job.until_started(3)
    stop_and_go(job.processes("", cut), signal.SIGCONT)
    job.until_trains()
    assert orphans[0] in job.processes(RANK, cut)
    job.until(lambda: job.state() == "COMPLETED")
    before = times(job.folder)
    switched.join(cut)
    job.until(lambda: not job.processes())
    assert times(job.folder) == before

    assert job.ends() == [(75, "requeued"), (0, "over")]  # who lost its node cannot say so
    assert [event["restart"] for event in job.events("began")] == [0, 1, 2, 3]
    assert runs.digest(job.folder) == runs.digest(undisturbed)
    for lines in runs.trace(job.folder, 2):
        assert [line["step"] for line in lines] == list(range(1, 61))


def times(folder: Path) -> dict[Path, int]:
    """When each of a run's files was last written, but for what the launcher appends to."""
    files = [path for path in folder.rglob("*") if path.relative_to(folder).parts[0] != "launch"]
    return {path: path.stat().st_mtime_ns for path in files}


def stop_and_go(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        os.kill(pid, number)
