"""A job of a real Slurm cluster whose time is up: noticed in time, and overrun."""

from __future__ import annotations

from pathlib import Path

import pytest
import runs
from slurm_cluster import Cluster, available, cluster
from slurm_jobs import Job, planted, submit

if reason := available():
    pytest.skip(reason, allow_module_level=True)

__all__ = ["cluster"]  # the fixture
pytestmark = pytest.mark.timeout(900)

# In the first start a rank hangs and heeds nothing; in the second a step takes half a second.
FAULTS = "time.sleep(1000 if (start, done) == (0, 13) else 0.5 if start == 1 else 0)"


def test_the_time_limit_is_no_end(cluster: Cluster, tmp_path: Path) -> None:
    """Slurm counts in minutes, and sends the signal 30 s early or more: the limit is set while the job runs."""
    undisturbed = tmp_path / "undisturbed"
    runs.train(1, undisturbed)

    job = submit(cluster, tmp_path / "run", planted(tmp_path, FAULTS), "--nodes=1", "--signal-seconds=90")
    job.until_trains(steps=13)
    limit(job, job.minutes() + 1)
    job.until(lambda: job.restarts() == 1)  # Slurm finds the job over its time, and takes it back all the same
    limit(job, 60)
    job.until_started(1)
    job.until_trains()
    limit(job, job.minutes() + 2)  # the signal is due, and there is time to save
    job.until(lambda: job.restarts() == 2)
    limit(job, 60)
    job.until_started(2)
    assert job.until_over() == "COMPLETED"
    assert job.ends()[-2:] == [(75, "requeued"), (0, "over")]
    assert [event["restart"] for event in job.events("began")] == [0, 1, 2]
    assert 10 < job.events("ended")[-2]["step"] < 60
    assert runs.digest(job.folder) == runs.digest(undisturbed)
    (attempts,) = job.record.reports.glob("*.attempts")
    assert "failed 10 1\n" in attempts.read_text()


def limit(job: Job, minutes: int) -> None:
    job.cluster.run("scontrol", "update", f"JobId={job.number}", f"TimeLimit={minutes}")
