"""Runs as jobs of a real Slurm cluster: each fault, alone and after others, against the bits of an undisturbed run."""

from __future__ import annotations

from pathlib import Path

import pytest
import runs
from slurm_cluster import Cluster, available, cluster
from slurm_jobs import AGENT, RANK, TASK, Job, preempted, slow, submit

if reason := available():
    pytest.skip(reason, allow_module_level=True)

__all__ = ["cluster"]  # the fixture
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The bits of a run of two ranks."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    runs.train(2, folder)
    return runs.digest(folder)


@pytest.fixture(scope="module")
def undisturbed_of_4(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The bits of a run of four ranks under torchrun."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    runs.train(4, folder)
    return runs.digest(folder)


def finished(job: Job, undisturbed: dict[str, str]) -> None:
    """Waits for the end of a run that is to finish, with the bits of the undisturbed one and each step once."""
    assert job.until_over() == "COMPLETED", job.tell()
    assert job.ends()[-1] == (0, "over")
    assert runs.digest(job.folder) == undisturbed
    world = int(job.events("submitted")[0]["nodes"]) * int(job.events("submitted")[0]["procs"])
    for lines in runs.trace(job.folder, world):
        assert [line["step"] for line in lines] == list(range(1, 61))


@pytest.mark.parametrize("tasks", ["node", "gpu"])
def test_two_nodes_of_two_ranks_end_with_torchruns_bits(
    cluster: Cluster, tmp_path: Path, undisturbed_of_4: dict[str, str], tasks: str
) -> None:
    job = submit(cluster, tmp_path / "run", "--procs-per-node=2", f"--tasks={tasks}")
    finished(job, undisturbed_of_4)
    assert [(event["event"], event.get("restart")) for event in job.events()] == [
        ("submitted", None),
        ("began", 0),
        ("ended", 0),
    ]
    assert job.starts(3) == 1


@pytest.mark.parametrize("tasks", ["node", "gpu"])
def test_asked_to_stop_in_every_way(cluster: Cluster, tmp_path: Path, undisturbed: dict[str, str], tasks: str) -> None:
    """Each ends with a save, and the same job goes on."""
    job = submit(cluster, tmp_path / "run", slow(tmp_path), f"--tasks={tasks}", "--failures=1")
    job.until_trains()
    job.signal("USR2")  # the time is up, or submitit would say so
    job.until_started(1)
    job.until_trains()
    job.send("USR2", RANK, job.nodes()[1])  # one rank only
    job.until_started(2)
    job.until_trains()
    for name in ("USR2", "TERM", "USR2", "TERM"):
        job.signal(name)
    job.until_started(3)
    job.until_trains()
    job.signal("TERM")
    job.until_started(4)
    job.until_trains()
    with preempted(job):
        job.until(lambda: job.restarts() == 5)
    job.until_started(5)
    finished(job, undisturbed)
    assert job.ends() == [(75, "requeued")] * 5 + [(0, "over")]
    steps = [event["step"] for event in job.events("ended")]
    assert steps == sorted(set(steps))
    assert [event["restart"] for event in job.events("began")] == list(range(6))
    assert job.starts(0) == job.starts(1) == 6
    assert job.output().count("train.py") == 6


@pytest.mark.parametrize("tasks", ["node", "gpu"])
def test_killed_in_every_way(cluster: Cluster, tmp_path: Path, undisturbed: dict[str, str], tasks: str) -> None:
    """Each costs the steps since the last save at most. With torchrun a lost rank does not cost the allocation."""
    job = submit(cluster, tmp_path / "run", f"--tasks={tasks}")
    job.until_trains(steps=11)
    for word, index in [(RANK, 0), (AGENT, 1)] if tasks == "node" else [(RANK, 0)]:
        within = (tasks, word) == ("node", RANK)  # torchrun starts the ranks again in the same allocation
        restarts = job.restarts()
        job.send("KILL", word, job.nodes()[index])
        if not within:
            job.until_started(restarts + 1)
        job.until_trains()
        assert job.restarts() == restarts + (not within)
    restarts = job.restarts()
    job.cluster.run("scontrol", "requeue", job.number)
    job.until_started(restarts + 1)
    job.until_trains()
    # Last, as Slurm may then send SIGTERM to the next start too, where that comes within half a minute.
    job.send("KILL", TASK, job.nodes()[0])
    job.until_started(restarts + 2)
    finished(job, undisturbed)
    if tasks == "node":
        (file,) = job.record.reports.glob(f"{job.number}.0/n1.restarts")
        assert file.read_text().endswith(" rank 0 was killed\n")
