"""What the launcher makes of a real Slurm's words: its queue, its accounts, requeues and cancellations."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import Cluster, available

from launch.__main__ import main
from launch.record import Record

if reason := available(accounting=True):
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(scope="module")
def accounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm"), nodes=2, accounting=True) as cluster:
        yield cluster


@pytest.fixture
def here(accounted: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The cluster, for commands of this process in a folder that is empty."""
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, accounted.environ[name])
    monkeypatch.chdir(tmp_path)
    return accounted


def submit(cluster: Cluster, *words: str, job: str = "{}", name: str = "a") -> Record:
    """A job that sleeps, noted as that of a run."""
    number = cluster.submit(*words, "--wrap", "srun sleep 1000")
    record = Record(Path("runs", name))
    record.add("submitted", {"job": job.format(number), "submission": "s"})
    return record


def told(command: str, capfd: pytest.CaptureFixture[str], word: str = "") -> Any:
    capfd.readouterr()
    assert main([command, "--json", *([word] if word else [])]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    return json.loads(out)


def states(capfd: pytest.CaptureFixture[str]) -> dict[str, tuple[str, str]]:
    """State and reason of each run."""
    return {run["name"]: (run["state"], run["reason"] or "") for run in told("list", capfd)}


def test_a_job_from_the_queue_to_its_end(here: Cluster, capfd: pytest.CaptureFixture[str]) -> None:
    record = submit(here, "--begin=now+1hour", "--nodes=2")
    (job,) = record.jobs()
    assert states(capfd) == {"a": ("queued", "BeginTime")}
    assert told("list", capfd)[0]["expected_start"] > "2026"
    here.hurry(job)
    here.wait(lambda: states(capfd)["a"][0] == "starting")
    (run,) = told("list", capfd)
    assert (run["job"], run["nodes"]) == (job, "n[1-2]")

    record.add("began", {"job": job, "restart": 0, "nodes": "n[1-2]"})
    here.run("scontrol", "requeue", job)
    here.wait(lambda: here.job(job)["JobState"] == "PENDING")
    assert states(capfd) == {"a": ("requeued", "BeginTime")}
    here.wait(lambda: told("status", capfd, job)["starts"][0]["how"].endswith("Slurm says REQUEUED"))
    here.hurry(job)
    here.wait(lambda: states(capfd)["a"][0] == "starting")
    record.add("began", {"job": job, "restart": 1, "nodes": "n[1-2]"})
    assert [start["how"] for start in told("status", capfd, "a")["starts"]][1] == "goes on"

    here.run("scancel", job)
    here.wait(lambda: states(capfd)["a"][0] == "cancelled")
    assert told("status", capfd, "a")["starts"][1]["how"].endswith("Slurm says CANCELLED")


def test_an_array_and_stop(here: Cluster, capfd: pytest.CaptureFixture[str]) -> None:
    first = submit(here, "--array=0-2%1", job="{}_0", name="sweep/0")
    number = first.jobs()[0].partition("_")[0]
    for k in (1, 2):
        Record(Path("runs", "sweep", str(k))).add("submitted", {"job": f"{number}_{k}", "submission": "s"})
    here.wait(lambda: states(capfd)["sweep/0"][0] == "starting")
    assert [states(capfd)[f"sweep/{k}"] for k in (1, 2)] == [("queued", "JobArrayTaskLimit")] * 2
    assert main(["stop", f"{number}_1"]) == 0
    here.wait(lambda: states(capfd)["sweep/1"][0] == "stopped")
    assert states(capfd)["sweep/2"][0] == "queued"  # elements do not touch one another
    assert main(["stop", "sweep/0"]) == 0
    here.wait(lambda: here.job(f"{number}_0")["JobState"] == "FAILED")  # of USR2, which sleep does not know
    here.run("scancel", number)


def test_a_job_that_waits_is_taken_out_and_one_that_has_begun_is_not(
    here: Cluster, capfd: pytest.CaptureFixture[str]
) -> None:
    (waits,) = submit(here, "--begin=now+1hour").jobs()
    (begins,) = submit(here, name="b").jobs()
    here.wait(lambda: states(capfd)["b"][0] == "starting")
    here.run("scancel", "--state=PENDING", begins)  # as `launch stop` does, if it began in the meantime
    assert main(["stop", waits]) == 0
    here.wait(lambda: states(capfd)["a"] == ("stopped", "launch stop: it was taken out of Slurm's queue"))
    assert here.job(begins)["JobState"] == "RUNNING"
    here.run("scancel", begins)


def test_a_job_id_that_is_gone(here: Cluster, capfd: pytest.CaptureFixture[str]) -> None:
    Record(Path("runs", "a")).add("submitted", {"job": "987654", "submission": "s"})
    assert states(capfd)["a"] == ("cancelled", "before it began: Slurm does not have job 987654 any more")
    assert main(["stop", "987655"]) == 2
    assert "no run below runs knows a job 987655" in capfd.readouterr().err
