"""`launch local --nnodes`: its words, and real runs on hosts of their own, which come, stop and die."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from hosts import Hosts, available

from distrib.config import UserError
from distrib.data.order import TrainPlan
from distrib.place import Place
from distrib.runtime import start
from launch.__main__ import main
from launch.command import FINISHED, STOPPED, USER_ERROR

needs_hosts = pytest.mark.skipif(bool(available()), reason=available())


def dry(capfd: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main(["local", "--procs", "2", "--dry-run", "--config", "configs/quickstart.yaml", *words]) == FINISHED
    return shlex.split(capfd.readouterr().out)


def test_the_words_of_the_host_and_of_another(capfd: pytest.CaptureFixture[str]) -> None:
    host = dry(capfd, "--nnodes", "2", "--rdzv-endpoint", "localhost:29999", "run.name=r")
    assert {"--nnodes=2", "--rdzv-endpoint=localhost:29999", "--rdzv-id=r", "--max-restarts=3"} <= set(host)
    assert {"--rdzv-conf=is_host=1", "--local-addr=localhost"} <= set(host)
    assert "--standalone" not in host
    # 192.0.2.0/24 is for documentation (RFC 5737): no machine has it.
    other = dry(capfd, "--nnodes=1:4", "--rdzv-endpoint", "192.0.2.1", "--max-restarts", "0")
    assert {"--nnodes=1:4", "--rdzv-endpoint=192.0.2.1:29400", "--max-restarts=0"} <= set(other)
    assert "--rdzv-conf=is_host=0,last_call_timeout=10" in other
    assert "--local-addr=192.0.2.1" not in other


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--nnodes", "2"], "--nnodes needs --rdzv-endpoint HOST"),
        (["--rdzv-endpoint", "localhost"], "--rdzv-endpoint is for a start on several nodes: say --nnodes too"),
        (["--max-restarts", "1"], "--max-restarts is for a start on several nodes: say --nnodes too"),
        (["--nnodes", "0", "--rdzv-endpoint", "localhost"], "takes a number of nodes, as in 2, or MIN:MAX"),
        (["--nnodes", "3:2", "--rdzv-endpoint", "localhost"], "takes a number of nodes, as in 2, or MIN:MAX"),
        (
            ["--nnodes", "2", "--rdzv-endpoint", "localhost:port"],
            "--rdzv-endpoint takes HOST or HOST:PORT, got 'localhost:port'",
        ),
        (["--nnodes", "2", "--rdzv-endpoint", "no-such-host.invalid"], "--rdzv-endpoint no-such-host.invalid: "),
        (["--nnodes", "2", "--rdzv-endpoint", "localhost", "--fresh"], "--fresh on several nodes needs --rdzv-id NAME"),
        (["--nnodes", "40", "--rdzv-endpoint", "localhost"], "train.global_batch 64 is smaller than the 80 processes"),
    ],
)
def test_mistakes(capfd: pytest.CaptureFixture[str], words: list[str], part: str) -> None:
    assert main(["local", "--procs", "2", "--config", "configs/quickstart.yaml", *words]) == USER_ERROR
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert part in err


def test_a_name_that_leads_to_the_loopback_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gloo's words are those that it had on two hosts with `127.0.1.1 h1` and `127.0.1.1 h2` in /etc/hosts."""

    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("Gloo connectFullMesh failed with [pair.cc:152] refused, remote=[127.0.1.1]:32640$1")

    monkeypatch.setattr(torch.distributed, "init_process_group", fail)
    with pytest.raises(UserError, match=r"rank 1 did not meet all 2 ranks at h1:29400: .*set GLOO_SOCKET_IFNAME"):
        start(Place(1, 2, 0, 1, ("h1", 29400)))
    with pytest.raises(UserError, match="start them all"):  # on one machine that is as it must be
        start(Place(1, 2, 0, 1, ("127.0.0.1", 29400)))


class Cluster:
    """Launchers of one run on hosts of their own; what each prints goes to a file."""

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self.hosts, self.folder, self.run = hosts, folder, folder / "run"

    def launch(self, host: str, nodes: str, *words: str) -> subprocess.Popen[Any]:
        launch = [
            sys.executable,
            "-m",
            "launch",
            "local",
            "--procs",
            "1",
            "--nnodes",
            nodes,
            "--rdzv-endpoint",
            "h1:29400",
        ]
        environ = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(self.folder)}
        with (self.folder / f"{host}.out").open("ab") as out:
            return self.hosts.begin(
                host,
                [*launch, *runs.SMALL, f"run.dir={self.run}", *words],
                cwd=runs.ROOT,
                env=environ,
                stdout=out,
                stderr=out,
            )

    def printed(self, host: str) -> str:
        return (self.folder / f"{host}.out").read_text()

    def wait(self, condition: Callable[[], Any], *processes: subprocess.Popen[Any]) -> None:
        deadline = time.monotonic() + runs.TIMEOUT
        while not condition():
            ended = [process.args for process in processes if process.poll() is not None]
            assert not ended, f"{ended}\n{self.told()}"
            assert time.monotonic() < deadline, self.told()
            time.sleep(0.05)

    def end(self, process: subprocess.Popen[Any]) -> int:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(runs.TIMEOUT)
        raise AssertionError(self.told())

    def told(self) -> str:
        return "\n".join(f"--- {file.name}\n{file.read_text()}" for file in sorted(self.folder.glob("*.out")))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Hosts(2, tmp_path) as hosts:
        yield Cluster(hosts, tmp_path)


@needs_hosts
def test_two_nodes_end_as_one_machine_does(cluster: Cluster, tmp_path: Path) -> None:
    """A stop on one node stops both; the same commands go on; a node that dies comes back; the bits are the same."""
    nodes = [cluster.launch(host, "2") for host in cluster.hosts.names]
    cluster.wait(lambda: runs.steps_traced(cluster.run) >= 13, *nodes)
    cluster.hosts.signal(nodes[1], signal.SIGTERM)
    assert [cluster.end(node) for node in nodes] == [STOPPED, STOPPED], cluster.told()
    assert "workers are started again" not in cluster.told()
    other = "h1" if _main_is("h2", cluster) else "h2"
    assert "stopped on request; the same command continues" in cluster.printed(other)

    first, second = (cluster.launch(host, "2") for host in cluster.hosts.names)
    cluster.wait(lambda: runs.steps_traced(cluster.run) >= 25, first, second)
    cluster.hosts.crash("h2")
    second.wait()
    cluster.hosts.boot("h2")
    second = cluster.launch("h2", "2")
    assert [cluster.end(first), cluster.end(second)] == [FINISHED, FINISHED], cluster.told()
    assert "workers are started again: rank " in cluster.printed("h1")

    runs.train(2, tmp_path / "undisturbed")
    assert runs.digest(cluster.run) == runs.digest(tmp_path / "undisturbed")
    assert runs.global_batches(cluster.run, 2) == runs.global_batches(tmp_path / "undisturbed", 2)


def _main_is(host: str, cluster: Cluster) -> bool:
    return "run folder: " in cluster.printed(host)


@needs_hosts
def test_a_node_joins_and_another_dies(cluster: Cluster) -> None:
    """One node begins alone; a second joins without a lost step, and dies; the first goes on from the newest save."""
    words = ("train.steps=2000", "train.eval_every_epochs=50")
    first = cluster.launch("h1", "1:4", *words)
    cluster.wait(lambda: runs.steps_traced(cluster.run) >= 5, first)
    second = cluster.launch("h2", "1:4", *words)
    cluster.wait(lambda: "continuing" in cluster.told(), first, second)
    stopped = re.findall(r"stopped at step (\d+), everything is saved", cluster.told())
    continued = re.findall(r"continuing .*: step (\d+) of", cluster.told())
    assert stopped == continued
    assert "workers are started again: another node joins" in cluster.printed("h1")

    joined = int(continued[0])
    cluster.wait(lambda: runs.steps_traced(cluster.run) >= joined + 25, first, second)
    assert _main_is("h2", cluster)  # so that the dead one is a writer on another machine
    newest = runs.newest_checkpoint(cluster.run)
    died_at = runs.steps_traced(cluster.run)
    cluster.hosts.crash("h2")
    second.wait()
    cluster.wait(lambda: len(re.findall("continuing .*step_", cluster.printed("h1"))) == 1, first)
    went_on = int(re.findall(r"continuing .*: step (\d+) of", cluster.printed("h1"))[0])
    assert int(newest.stem.removeprefix("step_")) <= went_on
    assert died_at - went_on <= 20  # checkpoint.every_steps, and one save that was under way
    assert "has left" in cluster.printed("h1")
    cluster.wait(lambda: runs.steps_traced(cluster.run) >= went_on + 5, first)
    cluster.hosts.signal(first, signal.SIGTERM)
    assert cluster.end(first) == STOPPED

    # Each step stands there once, with the batch that it has at every world size.
    batches = runs.global_batches(cluster.run, 2)
    assert sorted(batches) == list(range(1, max(batches) + 1))
    plan = TrainPlan(8000, 50, seed=0)
    expected = {step: [i for part in plan.slices(step - 1) for i in part.ids.tolist()] for step in batches}
    assert {step: [sample for sample, _ in batch] for step, batch in batches.items()} == expected
    worlds = [len(lines) for lines in runs.trace(cluster.run, 2)]
    assert worlds[1] == went_on - joined  # two ranks did these


@needs_hosts
def test_a_node_that_is_asked_to_stop_leaves_the_others(cluster: Cluster) -> None:
    """It ends with 75 and they go on where it left; when the host of the meeting stops, all end with 75."""
    words = ("train.steps=2000", "train.eval_every_epochs=50")
    first, second = (cluster.launch(host, "1:2", *words) for host in cluster.hosts.names)
    cluster.wait(lambda: runs.steps_traced(cluster.run) >= 5, first, second)
    cluster.hosts.signal(second, signal.SIGTERM)
    assert cluster.end(second) == STOPPED, cluster.told()
    cluster.wait(lambda: "continuing" in cluster.printed("h1"), first)
    left = re.findall(r"stopped at step (\d+), everything is saved", cluster.told())
    assert left == re.findall(r"continuing .*: step (\d+) of", cluster.printed("h1"))
    assert "workers are started again: a node came or left; everything is saved" in cluster.printed("h1")

    cluster.wait(lambda: runs.steps_traced(cluster.run) >= int(left[0]) + 5, first)
    second = cluster.launch("h2", "1:2", *words)
    cluster.wait(lambda: len(re.findall("continuing", cluster.told())) == 2, first, second)
    cluster.wait(lambda: len(runs.trace(cluster.run, 2)[1]) > int(left[0]), first, second)
    cluster.hosts.signal(first, signal.SIGTERM)
    assert [cluster.end(first), cluster.end(second)] == [STOPPED, STOPPED], cluster.told()
    assert "Exception raised" not in cluster.told()  # torch's, about the host that left
    steps = sorted(runs.global_batches(cluster.run, 2))
    assert steps == list(range(1, len(steps) + 1))
