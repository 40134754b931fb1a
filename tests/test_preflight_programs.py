"""The preflight as train.py, ``launch preflight`` and ``distrib preflight`` run it; two "nodes" are one machine."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import runs
import torch
from hosts import Hosts, available
from test_preflight import LINE

from distrib.preflight import is_wanted
from distrib.runtime import Runtime
from launch.__main__ import main as launch
from launch.command import TRAIN as TRAIN_PY
from launch.command import Rendezvous, build_torchrun
from launch.preflight import build


def two_nodes(folders: Sequence[Path], *words: str) -> list[subprocess.CompletedProcess[str]]:
    """A program as the one rank of each of two "nodes"; ``{folder}`` in its words is the node's run folder.

    Its parent is the node's home: so the same words may mean another folder there.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": port, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return together(
        [[word.format(folder=folder) for word in words] for folder in folders],
        [
            {**common, "RANK": str(rank), "SLURMD_NODENAME": f"node{rank}", "HOME": str(folder.parent)}
            for rank, folder in enumerate(folders)
        ],
    )


def together(
    commands: Sequence[Sequence[str]], environs: Sequence[Mapping[str, str]]
) -> list[subprocess.CompletedProcess[str]]:
    processes = [
        subprocess.Popen(
            [sys.executable, *words],
            cwd=runs.ROOT,
            env={**os.environ, **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for words, environ in zip(commands, environs, strict=True)
    ]
    try:
        said = [process.communicate(timeout=runs.TIMEOUT) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                runs.kill_group(process)
    return [subprocess.CompletedProcess(p.args, p.returncode, *s) for p, s in zip(processes, said, strict=True)]


SYNTHETIC = ("data.loader=synthetic", "data.synthetic.train=60", "data.synthetic.val=10", "model.num_classes=10")
TRAIN = ("train.py", *runs.SMALL, *SYNTHETIC, "train.steps=1", "run.dir=~/run")


def test_training_begins_with_it_on_two_nodes(tmp_path: Path) -> None:
    done = two_nodes([tmp_path / "run"] * 2, *TRAIN)
    assert [one.returncode for one in done] == [0, 0], done
    first = done[0].stdout.splitlines()[0]
    assert LINE.fullmatch(first), done[0].stdout
    assert "preflight" not in done[1].stdout + done[1].stderr
    assert runs.newest_checkpoint(tmp_path / "run").is_file()


def test_training_does_not_begin_where_the_run_folder_is_not_shared(tmp_path: Path) -> None:
    for home in ("a", "b"):
        (tmp_path / home).mkdir()
    done = two_nodes([tmp_path / "a/run", tmp_path / "b/run"], *TRAIN)
    assert [one.returncode for one in done] == [2, 2], done
    line = (
        f"error: preflight: run.dir {tmp_path}/a/run is another folder for rank 1 on node1 than for rank 0 on node0: "
    )
    assert done[0].stderr.startswith(line)
    assert done[0].stderr.count("\n") == 1
    assert done[1].stderr == ""
    assert not [*tmp_path.glob("*/run")]


def test_training_does_not_begin_on_a_bad_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DISTRIB_BAD_HOSTS_FILE", str(tmp_path / "hosts"))
    done = two_nodes([tmp_path / "run", tmp_path / "file/run"], *TRAIN)
    assert [one.returncode for one in done] == [1, 1], done
    line = f"rank 1 on node1 cannot write to {tmp_path}/run: Not a directory\n"
    assert [one.stderr for one in done] == [f"error: preflight: {line}", ""]
    assert (tmp_path / "hosts").read_text() == f"node1 {line}"
    assert not (tmp_path / "run").exists()


def test_one_process_may_ask_for_it(tmp_path: Path) -> None:
    (done,) = together([[*TRAIN, "launch.preflight=true"]], [{"CUDA_VISIBLE_DEVICES": "", "HOME": str(tmp_path)}])
    assert done.returncode == 0, done
    assert re.match(r"preflight: 1 rank on 1 node: [\d.,]+ GiB free for the run \([\d.]+ s\)\n", done.stdout)


@pytest.mark.parametrize(
    ("asked", "world", "local_world", "wanted"),
    [("auto", 4, 4, False), ("auto", 4, 2, True), (True, 1, 1, True), (False, 4, 2, False)],
)
def test_when_it_is_wanted(asked: bool | str, world: int, local_world: int, wanted: bool) -> None:
    runtime = Runtime(0, world, 0, local_world, torch.device("cpu"))
    assert is_wanted(asked, runtime) is wanted  # type: ignore[arg-type]


@pytest.mark.skipif(bool(available()), reason=available())
def test_launch_on_two_machines(tmp_path: Path) -> None:
    words = [*("-m", "launch", "preflight", "--procs", "2", "--run-dir", str(tmp_path / "run")), "--nnodes", "2"]
    environ = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    (tmp_path / "hosts").mkdir()
    with Hosts(2, tmp_path / "hosts") as hosts:
        processes = [
            hosts.begin(
                name,
                [sys.executable, *words, "--rdzv-endpoint", "h1"],
                cwd=runs.ROOT,
                env=environ,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for name in hosts.names
        ]
        said = [process.communicate(timeout=runs.TIMEOUT) for process in processes]
    done = [subprocess.CompletedProcess(p.args, p.returncode, *s) for p, s in zip(processes, said, strict=True)]
    assert [one.returncode for one in done] == [0, 0], done
    (table,) = [one.stdout for one in done if one.stdout]
    head, *ranks, versions = table.splitlines()
    assert head.split() == ["rank", "host", "GPU", "memory", "free", "GB/s", "clock"]
    assert [line.split()[0] for line in ranks] == ["0", "1", "2", "3"]
    assert f"torch {torch.__version__}" in versions
    (line,) = [line for one in done for line in one.stderr.splitlines() if line.startswith("preflight: ")]
    assert LINE.fullmatch(line)
    assert "4 ranks on 2 nodes" in line
    assert not (tmp_path / "run").exists()


def test_launch_alone_hands_on_the_exit_code(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    words = ["-m", "launch", "preflight", "--run-dir", str(tmp_path / "file/run")]
    (done,) = together([words], [{"CUDA_VISIBLE_DEVICES": ""}])
    assert done.returncode == 2
    assert done.stderr == f"error: cannot write to {tmp_path}/file/run: Not a directory: make room, or set run.dir\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nnodes", "2"], "--nnodes needs --procs, and --rdzv-endpoint HOST, which"),
        (["--nnodes", "2", "--procs", "2"], "--nnodes needs --procs, and --rdzv-endpoint HOST, which"),
        (["--procs", "2", "--rdzv-endpoint", "a:1"], "--rdzv-endpoint is for several machines"),
        (["--procs", "0"], "argument --procs: '0' is not a whole number of 1 or more"),
    ],
)
def test_launchs_words(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(["preflight", *words, "--dry-run"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_launchs_command() -> None:
    tool = ("-m", "distrib.tools.preflight", "--run-dir", "runs/a")
    alone = build(None, "runs/a", None, {}, 8)
    assert alone.argv == (sys.executable, *tool)
    # As training is started, which the preflight stands for.
    meeting = Rendezvous(2, "gpu01", 29400, "preflight", False, "gpu02")
    for where in (None, meeting):
        looks, trains = build(4, "runs/a", where, {}, 8), build_torchrun(4, "c.yaml", [], {}, 8, rendezvous=where)
        assert looks.env == trains.env
        assert looks.argv[: -len(tool)] == trains.argv[: trains.argv.index(str(TRAIN_PY))]
        assert looks.argv[-len(tool) :] == tool


def test_launchs_meeting(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(["preflight", "--procs", "2", "--nnodes", "3", "--rdzv-endpoint", "localhost", "--dry-run"]) == 0
    said = set(capsys.readouterr().out.split())
    assert {"--nnodes=3", "--rdzv-endpoint=localhost:29400", "--rdzv-conf=is_host=1", "--max-restarts=0"} <= said
    assert launch(["preflight", "--procs", "2", "--nnodes", "2", "--rdzv-endpoint", "no-such.invalid"]) == 2
    assert capsys.readouterr().err.startswith("error: --rdzv-endpoint no-such.invalid: ")
