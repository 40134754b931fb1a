"""Jobs of a real Slurm cluster that end, and those beside them that do not: what is queued again and what is not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from slurm_cluster import Cluster, available, cluster
from slurm_jobs import ONE_THREAD, RANK, SCRIPT, Job, planted, submit

from launch.record import Record

if reason := available():
    pytest.skip(reason, allow_module_level=True)

__all__ = ["cluster"]  # the fixture
pytestmark = pytest.mark.timeout(900)


def test_cancelled_stays_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    """Even where the ranks have saved in time: Slurm would queue a cancelled job again were it asked to."""
    job = submit(cluster, tmp_path / "run", "--nodes=1", "--tasks=gpu")
    job.until_trains()
    cluster.run("scancel", job.number)
    assert job.until_over() == "CANCELLED"
    assert job.restarts() == 0
    assert job.ends() in ([], [(75, "over")], [(1, "over")])  # within KillWait, or not


def test_cancelled_before_it_began(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path / "run", "--slurm", "hold")
    cluster.run("scancel", job.number)
    assert job.until_over() == "CANCELLED"
    assert [event["event"] for event in job.events()] == ["submitted"]


def test_launch_stop(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path / "run", "--nodes=1")
    job.until_trains()
    job.record.stop.touch()
    job.signal("USR2")
    assert job.until_over() == "FAILED"  # 75: it is not finished
    assert cluster.job(job.number)["ExitCode"] == "75:0"
    assert job.ends() == [(75, "over")]
    assert job.events("ended")[0]["reason"] == "launch stop"
    assert job.folder.joinpath("checkpoints/last.pt").exists()


def test_launch_stop_of_a_job_that_waits_for_its_next_start(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path / "run", "--slurm", "hold")
    job.record.stop.touch()
    cluster.run("scontrol", "release", job.number)
    assert job.until_over() == "FAILED"
    assert job.ends() == [(75, "over")]
    assert job.starts() == 0


def test_a_mistake_of_the_users_is_told_once(cluster: Cluster, photographs: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(photographs / "444", data)
    job = submit(cluster, tmp_path / "run", "--slurm", "hold", f"data.root={data}")
    data.rename(tmp_path / "moved")
    cluster.run("scontrol", "release", job.number)
    assert job.until_over() == "FAILED"
    assert cluster.job(job.number)["ExitCode"] == "2:0"
    assert job.ends() == [(2, "over")]
    assert str(data) in job.events("ended")[0]["reason"]
    assert job.restarts() == 0


def test_a_crash_loop_ends_and_says_at_which_step(cluster: Cluster, tmp_path: Path) -> None:
    fault = planted(tmp_path, "done == 13 and os.kill(os.getpid(), signal.SIGKILL)")
    job = submit(cluster, tmp_path / "run", fault, "--nodes=1", "--failures=2", "--restarts=1")
    job.until_started(1)
    assert job.until_over() == "FAILED"
    assert job.ends() == [(1, "requeued"), (1, "over")]
    reason = "failed 2 times at step 10 without a newer checkpoint: rank 0 was killed by SIGKILL"
    assert [event["step"] for event in job.events("ended")] == [10, 10]
    assert job.events("ended")[1]["reason"] == reason
    assert job.starts() == 4  # torchrun's within each start of the job


def test_failures_with_progress_between_them_are_forgotten(cluster: Cluster, tmp_path: Path) -> None:
    fault = planted(tmp_path, "done == 24 + 20 * start and os.kill(os.getpid(), signal.SIGKILL)")
    job = submit(cluster, tmp_path / "run", fault, "--nodes=1", "--tasks=gpu", "--failures=2")
    job.until_started(1)
    job.until_started(2)
    assert job.until_over() == "COMPLETED"
    assert [(event["code"], event["step"]) for event in job.events("ended")] == [(1, 20), (1, 40), (0, 60)]


def test_a_bad_node_is_left_out(cluster: Cluster, tmp_path: Path) -> None:
    early = "print(node, 'its disk is full', file=open(os.environ['DISTRIB_BAD_HOSTS_FILE'], 'a')) or os._exit(1)"
    fault = planted(tmp_path, early=f"node == 'n2' and ({early})")
    with Path(tmp_path, "plant.yaml").open("a") as file:
        file.write("exclude_failed: true\nexclude: n1\n")
    job = submit(cluster, tmp_path / "run", fault, "--nodes=1", "--tasks=gpu", "--slurm", "nodelist=n2", "--failures=2")
    job.until(lambda: job.restarts() == 1)
    job.until(lambda: job.state() == "PENDING")
    assert cluster.job(job.number)["ExcNodeList"] in ("n[1-2]", "n1,n2")  # n1 as before
    assert job.events("ended")[0]["reason"] == "n2 its disk is full"
    cluster.run("scontrol", "update", f"JobId={job.number}", "ReqNodeList=")
    job.until_started(1)
    assert job.nodes() in (["n3"], ["n4"])
    cluster.run("scancel", job.number)
    job.until_over()


def test_elements_of_an_array_do_not_touch_one_another(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runs import SMALL

    from distrib.cli import load_config
    from launch.slurm.options import parse, read_request
    from launch.slurm.submit import Element
    from launch.slurm.submit import submit as submit_elements

    for name, value in {**cluster.environ, **ONE_THREAD}.items():
        monkeypatch.setenv(name, value)
    words = ["--nodes=1", "--procs-per-node=1", "--gpus-per-node=0", "--cpus-per-node=2", "--tasks=gpu"]
    folders = [tmp_path / name for name in ("left alone", "disturbed")]
    elements = [Element(load_config(SMALL[1], [*SMALL[2:], f"run.dir={folder}"])) for folder in folders]
    numbers = submit_elements(elements, read_request(parse([*words, *SMALL])), Record(tmp_path / "array"), "two")
    alone, disturbed = (Job(cluster, folder, number) for folder, number in zip(folders, numbers, strict=True))
    disturbed.until_trains()
    disturbed.signal("USR2")
    disturbed.until(lambda: disturbed.ends() == [(75, "requeued")])
    disturbed.until_started(1)
    disturbed.until_trains()
    cluster.run("scancel", disturbed.number)
    alone.until(lambda: alone.state() == "COMPLETED")
    disturbed.until(lambda: disturbed.state() == "CANCELLED")
    assert alone.ends() == [(0, "over")]
    assert (alone.restarts(), disturbed.restarts()) == (0, 1)
    assert alone.starts() == 1


def test_ranks_may_have_a_path_without_slurm(cluster: Cluster, tmp_path: Path) -> None:
    """In a container there is no scontrol, and need not be."""
    profile = tmp_path / "launch.yaml"
    profile.write_text(f"environment: {{PATH: '{tmp_path}'}}\n")
    job = submit(cluster, tmp_path / "run", f"--profile={profile}", "--nodes=1", "--tasks=gpu")
    job.until_trains()
    assert f"PATH={tmp_path}" in Path("/proc", str(job.processes(RANK)[0]), "environ").read_text().split("\0")
    job.signal("USR2")
    job.until_started(1)
    assert job.ends() == [(75, "requeued")]
    cluster.run("scancel", job.number)
    job.until_over()


def test_without_its_batch_script_slurm_gives_a_job_up(cluster: Cluster, tmp_path: Path) -> None:
    """The one death that nothing of ours can answer: the same command goes on from the newest checkpoint."""
    job = submit(cluster, tmp_path / "run", "--nodes=1", "--tasks=gpu")
    job.until_trains(steps=11)
    job.send("KILL", SCRIPT, job.nodes()[0])
    assert job.until_over() == "FAILED"
    assert job.ends() == []
    assert cluster.job(job.number)["Reason"] == "JobLaunchFailure"
