"""The cluster that other tests stand on: that its faults are real ones and that it leaves nothing."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import Cluster, available, cluster

if reason := available(accounting=True):
    pytest.skip(reason, allow_module_level=True)

__all__ = ["cluster"]  # the fixture


@pytest.fixture(scope="module")
def switched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm"), accounting=True, namespaces=True, user_signal=False) as cluster:
        yield cluster


def sleeper(cluster: Cluster, *words: str) -> int:
    """A job of two nodes that runs until something happens to it. Returns when both of its tasks have begun."""
    job = cluster.submit("--open-mode=append", "--nodes=2", *words, "--wrap", "srun sh -c 'echo begun; sleep 1000'")
    begun_again(cluster, job, 0)
    return job


def begun_again(cluster: Cluster, job: int, restarts: int) -> None:
    """Waits until the job was requeued so often and runs on two nodes."""
    cluster.wait(lambda: cluster.job(job)["Restarts"] == str(restarts))
    if restarts:
        cluster.wait(lambda: cluster.job(job)["JobState"] == "PENDING")
        cluster.hurry(job)
    cluster.wait(lambda: cluster.job(job)["JobState"] == "RUNNING")
    cluster.wait(lambda: cluster.output(job).count("begun") == 2 * (restarts + 1))


def cancel(cluster: Cluster, *jobs: int) -> None:
    """Cancels jobs and waits until their nodes are free."""
    cluster.run("scancel", *map(str, jobs))
    cluster.wait(lambda: set(cluster.states().values()) == {"idle"})


def processes_with(text: str) -> list[str]:
    """The command lines of all processes on this machine, in whatever namespace, that have a text among their words or
    in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words, environ = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
        except OSError:
            continue
        if text.encode() in words + environ:
            found.append(words.decode().replace("\0", " "))
    return found


@pytest.mark.parametrize("kind", ["cluster", "switched"])
def test_a_job_on_two_nodes_finds_them_by_name_and_has_their_gpus(kind: str, request: pytest.FixtureRequest) -> None:
    cluster: Cluster = request.getfixturevalue(kind)
    rendezvous = (
        "import os, socket\n"
        "address = (os.environ['FIRST'], 29500)\n"
        "if os.environ['SLURM_PROCID'] == '0':\n"
        "    with socket.create_server(address) as server:\n"
        "        peer, sender = server.accept()\n"
        "        print(socket.gethostname(), 'heard', peer.recv(100).decode(), 'of', sender[0], flush=True)\n"
        "else:\n"
        "    while True:\n"
        "        try:\n"
        "            peer = socket.create_connection(address)\n"
        "            break\n"
        "        except ConnectionRefusedError:\n"
        "            pass\n"
        "    peer.sendall(f'{socket.gethostname()} {os.environ[\"CUDA_VISIBLE_DEVICES\"]}'.encode())\n"
    )
    file = cluster.folder / "rendezvous.py"
    file.write_text(rendezvous)
    start = f"export FIRST=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1); srun {sys.executable} {file}"
    job = cluster.submit("--nodes=2", "--gpus-per-node=8", "--wrap", start)
    cluster.wait(lambda: cluster.job(job)["JobState"] == "COMPLETED")
    # On a shared loopback all that leaves without a bind comes from 127.0.0.1.
    sender = cluster.addresses["n2"] if cluster.namespaces else "127.0.0.1"
    assert cluster.output(job) == f"n1 heard n2 0,1,2,3,4,5,6,7 of {sender}\n"


def test_gpus_are_counted(cluster: Cluster) -> None:
    jobs = [cluster.submit("--gpus-per-node=5", "--nodelist=n1", "--wrap", "sleep 1000") for _ in range(2)]
    cluster.wait(lambda: cluster.job(jobs[0])["JobState"] == "RUNNING")
    cluster.wait(lambda: cluster.job(jobs[1])["Reason"] == "Resources")
    assert "Requested node configuration is not available" in cluster.run(
        "sbatch", "--gpus-per-node=9", "--wrap", "true", check=False
    )
    cancel(cluster, *jobs)


def test_the_small_partition_refuses(cluster: Cluster) -> None:
    for words in (["--time=11"], ["--nodes=2"]):
        job = cluster.submit("--partition=small", *words, "--wrap", "true")
        cluster.wait(lambda job=job: cluster.job(job)["Reason"] in ("PartitionTimeLimit", "PartitionNodeLimit"))
        cancel(cluster, job)


def test_a_requeued_job_runs_again_under_its_id(cluster: Cluster) -> None:
    job = sleeper(cluster)
    cluster.run("scontrol", "requeue", str(job))
    begun_again(cluster, job, 1)
    cancel(cluster, job)


@pytest.mark.parametrize("kind", ["cluster", "switched"])
def test_preemption_sends_the_users_signal_only_where_slurm_is_told_to(
    kind: str, request: pytest.FixtureRequest
) -> None:
    cluster: Cluster = request.getfixturevalue(kind)
    # Without the user's signal the steps alone hear SIGTERM; the batch script goes on to the end of the grace.
    script = cluster.folder / "preempted.sh"
    script.write_text("trap 'echo usr2' USR2; trap 'echo term' TERM; echo begun; while true; do sleep 0.1; done")
    start = f"srun --nodes=1 --ntasks=1 sh {script}"
    job = cluster.submit("--nodes=4", "--exclusive", "--signal=USR2@60", "--wrap", start)
    cluster.wait(lambda: "begun" in cluster.output(job))
    urgent = cluster.submit("--partition=high", "--nodes=4", "--exclusive", "--wrap", "true")
    expected = "usr2" if kind == "cluster" else "term"
    cluster.wait(lambda: expected in cluster.output(job))
    heard = [line for line in cluster.output(job).splitlines() if line in ("begun", "usr2", "term")]
    assert heard[:2] == ["begun", expected]
    cluster.run("scontrol", "requeue", str(job))
    cluster.wait(lambda: cluster.job(urgent)["JobState"] == "COMPLETED")
    assert cluster.job(job)["Restarts"] == "1"
    cancel(cluster, job)


def test_a_crashed_node_leaves_no_process_and_its_job_is_requeued(cluster: Cluster) -> None:
    mark = uuid.uuid4().hex
    job = sleeper(cluster, "--exclude=n1")
    # A daemon that a job leaves, of which Slurm knows nothing.
    cluster.enter("n2", "sh", "-c", f"env -i setsid sh -c 'sleep 1000; : {mark}' >/dev/null 2>&1 &")
    assert processes_with(mark)
    cluster.crash("n2")
    assert not processes_with(mark)
    begun_again(cluster, job, 1)
    assert cluster.job(job)["NodeList"] == "n[3-4]"
    assert cluster.states()["n2"] == "down*"
    cluster.up("n2")
    assert cluster.states()["n2"] == "idle"
    cancel(cluster, job)


def test_a_node_that_is_cut_off_runs_on_alone_while_its_job_is_requeued(switched: Cluster) -> None:
    job = sleeper(switched, "--exclude=n1")
    switched.cut("n2")
    begun_again(switched, job, 1)
    assert switched.job(job)["NodeList"] == "n[3-4]"
    assert "sleep 1000" in switched.enter("n2", "ps", "ax")
    switched.join("n2")
    switched.wait(lambda: switched.states()["n2"] == "idle")
    switched.wait(lambda: "sleep 1000" not in switched.enter("n2", "ps", "ax"))
    assert switched.job(job)["JobState"] == "RUNNING"
    cancel(switched, job)


def test_a_node_of_a_network_comes_back_after_a_crash(switched: Cluster) -> None:
    switched.crash("n4")
    switched.wait(lambda: switched.states()["n4"] == "down*")
    switched.up("n4")
    job = switched.submit("--nodelist=n4", "--wrap", "srun hostname -i")
    switched.wait(lambda: switched.job(job)["JobState"] == "COMPLETED")
    assert switched.output(job) == f"{switched.addresses['n4']}\n"


def test_accounting_answers(switched: Cluster) -> None:
    job = switched.submit("--wrap", "exit 3")
    ask = ("sacct", "-n", "-X", "-P", "-j", str(job), "-o", "state,exitcode,partition")
    switched.wait(lambda: switched.run(*ask) == "FAILED|3:0|debug\n")


@pytest.mark.parametrize("namespaces", [False, True])
def test_nothing_is_left(tmp_path: Path, namespaces: bool) -> None:
    def links() -> set[str]:
        return {path.name for path in Path("/sys/class/net").iterdir()}

    def failing_test() -> None:
        with Cluster(tmp_path / "a", nodes=2, namespaces=namespaces) as cluster:
            sleeper(cluster)
            assert len([line for line in processes_with(str(tmp_path)) if "sleep 1000" in line]) >= 2
            assert (links() > before) == namespaces
            cluster.wait(lambda: False, 1)

    before = links()
    with pytest.raises(AssertionError, match="not within 1 s"):
        failing_test()
    assert not processes_with(str(tmp_path))
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
    assert links() == before


def test_nothing_is_left_of_a_cluster_whose_owner_is_killed(tmp_path: Path, repository: Path) -> None:
    command = [sys.executable, str(repository / "tests/slurm_cluster.py"), "--folder", str(tmp_path / "a")]
    owner = subprocess.Popen([*command, "--nodes=1", "--namespaces"], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    lines = [owner.stdout.readline() for _ in range(2)]
    assert lines[1] == f"export SLURM_CONF={tmp_path}/a/slurm.conf\n"
    assert processes_with(str(tmp_path))
    owner.kill()
    owner.communicate()
    probe = Cluster(tmp_path / "b")
    probe.wait(lambda: not processes_with(str(tmp_path)))
    probe.wait(lambda: not [path for path in Path("/sys/class/net").iterdir() if f"slurm{owner.pid}" in path.name])
