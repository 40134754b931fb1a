"""What a Slurm task does of its own accord, without Slurm: its reports and its exit code."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.slurm.task import Task, slurm_rendezvous

RUN = """
import sys
from launch.slurm.task import Task
Task(sys.argv[1], ("config.yaml",), ((),), nodes=int(sys.argv[3]), procs=1, form=sys.argv[2])()
"""


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    slurm = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "1", "SLURM_JOB_NODELIST": "localhost", "SLURM_NODEID": "0"}
    ours = {"DISTRIB_REPORTS": str(tmp_path), "DISTRIB_SUBMISSION": str(tmp_path), "SLURMD_NODENAME": "localhost"}
    return os.environ | slurm | ours


def begin(script: Path, form: str, nodes: int, environ: dict[str, str], repository: Path) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", RUN, str(script), form, str(nodes)]
    return subprocess.Popen(words, env=environ, cwd=repository, stderr=subprocess.PIPE, text=True)


def test_stopped_while_it_waits_for_other_nodes(tmp_path: Path, environ: dict[str, str], repository: Path) -> None:
    port = slurm_rendezvous(environ, 2, 0).port
    process = begin(tmp_path / "none.py", "node", 2, environ, repository)
    deadline = time.monotonic() + 120
    while True:  # until its torchrun keeps the meeting
        assert process.poll() is None
        assert time.monotonic() < deadline
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    process.send_signal(signal.SIGUSR2)
    process.communicate(timeout=120)
    assert process.returncode == 75
    assert (tmp_path / "localhost").read_text() == "none 75 stopped before it began\n"


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "import there_is_none"])
def test_a_rank_without_last_words(tmp_path: Path, environ: dict[str, str], repository: Path, end: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"import os\n{end}\n")
    process = begin(script, "gpu", 1, environ, repository)
    printed = process.communicate(timeout=120)[1]
    assert process.returncode == 1
    assert printed.endswith("error: rank 1 was killed, or could not begin\n")
    assert (tmp_path / "localhost.1").read_text() == "1 1 rank 1 was killed, or could not begin\n"


@pytest.mark.parametrize("code", [0, 75])
def test_a_task_for_each_rank_hears_its_own_rank_only(
    tmp_path: Path, environ: dict[str, str], repository: Path, code: int
) -> None:
    """A stop ends as a success: srun must not end the others, which may still save."""
    script = tmp_path / "script.py"
    line = f"1 {code} \\n"
    script.write_text(
        f"import os, sys\nopen(os.environ['DISTRIB_EXIT_CODE_FILE'], 'a').write('{line}')\nsys.exit({code})"
    )
    for _ in range(2):  # what another start said is there already
        process = begin(script, "gpu", 1, environ, repository)
        process.communicate(timeout=120)
        assert process.returncode == 0
    assert [path.name for path in tmp_path.glob("localhost*")] == ["localhost.1"]


def test_meetings_are_of_one_start_of_one_job(environ: dict[str, str]) -> None:
    task = Task("train.py", ("c.yaml",), ((),), nodes=2, procs=4, form="node", restarts=2)
    words = task.command(environ, cores=8).argv
    assert "--max-restarts=2" in words
    changes = [{}, {"SLURM_RESTART_COUNT": "1"}, {"SLURM_JOB_ID": "8"}, {"DISTRIB_SUBMISSION": "/another"}]
    ports = {slurm_rendezvous(environ | change, 2, 0).port for change in changes}
    assert len(ports) == 4
    assert all(20000 <= port < 30000 for port in ports)
    assert task.command({**environ, "SLURM_JOB_NODELIST": "n[07-09]"}, 8).env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "600"
