"""What surrounds a process: variables, streams, limits, signals, other launchers; through the real train.py."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import runs

from distrib.surroundings import settle_environment

SHORT = [*runs.SMALL, "data.loader=synthetic", "data.synthetic.train=500", "data.synthetic.val=50", "train.steps=8"]
SHORT += ["schedule.warmup_epochs=0", "train.eval_every_epochs=1000", "log.every_steps=1"]
STARTED: list[subprocess.Popen[str]] = []
LONG = [*SHORT, "train.steps=100000", "data.synthetic.train=5000000"]


def start(
    folder: Path,
    words: list[str],
    environ: Mapping[str, str | None] = {},
    program: Sequence[str] = (sys.executable,),
    **popen: Any,
) -> subprocess.Popen[str]:
    """train.py in a session of its own; a variable that is None is unset."""
    settings: dict[str, str | None] = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environ}
    process = subprocess.Popen(
        [*program, str(runs.ROOT / "train.py"), *words, f"run.dir={folder}"],
        env={name: value for name, value in settings.items() if value is not None},
        **({"cwd": runs.ROOT, "text": True, "start_new_session": True, "stdin": subprocess.DEVNULL}
           | {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | popen),
    )  # fmt: skip
    STARTED.append(process)
    return process


def end(process: subprocess.Popen[str], code: int) -> tuple[str, str]:
    out, err = process.communicate(timeout=runs.TIMEOUT)
    assert process.returncode == code, f"{process.returncode}\n{out}\n{err}"
    assert "Traceback" not in (out or "") + (err or "")
    return out, err


@pytest.fixture(autouse=True)
def _no_orphans() -> Iterator[None]:
    """A test that fails must not leave a run that trains on."""
    yield
    for process in STARTED:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    STARTED.clear()


def finished(folder: Path, steps: int = 8) -> None:
    assert json.loads((folder / "summary.json").read_text())["status"] == "finished"
    assert (folder / "checkpoints" / f"step_{steps:08d}.pt").exists()


# Variables


def test_blank_variables_mean_unset() -> None:
    environ = {
        "RANK": "",
        "SLURM_NTASKS": " ",
        "WANDB_MODE": "",
        "HOME": "",
        "XDG_CACHE_HOME": "",
        "OMP_NUM_THREADS": "",
    }
    environ |= {"CUDA_VISIBLE_DEVICES": "", "MY_SLURM_X": "", "XDG_DATA_HOME": "relative/path", "WANDB_PROJECT": "p"}
    settle_environment(environ)
    assert environ.pop("HOME", "there is a home") != ""
    assert environ == {"CUDA_VISIBLE_DEVICES": "", "MY_SLURM_X": "", "WANDB_PROJECT": "p"}


@pytest.mark.parametrize("value", ["two", "0", "-1", "1.5", "1,", ","])
def test_a_number_of_threads_that_is_none(value: str) -> None:
    for given, kept in ((value, None), ("4", "4"), ("4,2", "4,2")):
        environ = {"OMP_NUM_THREADS": given}
        settle_environment(environ)
        assert environ.get("OMP_NUM_THREADS") == kept


@pytest.mark.parametrize(
    ("environ", "part"),
    [
        ({"RANK": "0"}, "RANK is set, but WORLD_SIZE"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE"),
        ({"SLURM_NTASKS": "2"}, "SLURM_NTASKS is 2, but this process was not started by srun"),
    ],
)
def test_variables_that_make_no_sense_end_in_one_line(tmp_path: Path, environ: dict[str, str], part: str) -> None:
    _, err = end(start(tmp_path / "run", SHORT, environ), 2)
    assert [part in line for line in err.splitlines()] == [True]
    assert not (tmp_path / "run").exists()


def test_empty_variables_and_no_home(tmp_path: Path) -> None:
    blank = dict.fromkeys(
        ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "HOME", "XDG_CACHE_HOME", "MASTER_PORT"), ""
    )
    process = start(
        tmp_path / "run", SHORT, {**blank, "WANDB_MODE": "", "WANDB_DIR": "", "TMPDIR": "", "OMP_NUM_THREADS": "many"}
    )
    end(process, 0)
    finished(tmp_path / "run")


@pytest.mark.skipif(os.getuid() != 0, reason="only root may become a user that does not exist")
def test_a_user_without_a_name_and_a_home(tmp_path: Path) -> None:
    words = [*SHORT, "wandb.mode=offline"]  # W&B asks for the user's name
    nobody = ["unshare", "--user", "--map-user=54321", "--map-group=54321"]
    environ = {"HOME": None, "XDG_CACHE_HOME": None, "WANDB_MODE": None, "USER": None, "LOGNAME": None}
    end(start(tmp_path / "run", words, environ, program=[*nobody, sys.executable]), 0)
    finished(tmp_path / "run")


# Ranks without torchrun


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_tasks_of_other_launchers_join_one_run(tmp_path: Path, launcher: str) -> None:
    def environ(rank: int) -> dict[str, str]:
        if launcher == "srun":
            own = {"SLURM_PROCID": str(rank), "SLURM_NTASKS": "2", "SLURM_LOCALID": str(rank), "SLURM_JOB_ID": "7"}
        else:
            own = {f"OMPI_COMM_WORLD_{n}": str(rank) for n in ("RANK", "LOCAL_RANK")}
            own |= {f"OMPI_COMM_WORLD_{n}": "2" for n in ("SIZE", "LOCAL_SIZE")}
        return {**own, "MASTER_PORT": port}

    port = str(free_port())
    processes = [start(tmp_path / "run", SHORT, environ(rank)) for rank in range(2)]
    printed = [end(process, 0)[0] for process in processes]
    assert "2 × cpu" in printed[0]
    assert printed[1] == ""
    finished(tmp_path / "run")
    assert len(runs.trace(tmp_path / "run", 2)[1]) == 8
    assert {len(batch) for batch in runs.global_batches(tmp_path / "run", 2).values()} == {50}


def test_a_missing_peer_is_told_and_the_wait_can_be_ended(tmp_path: Path) -> None:
    environ = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "MASTER_PORT": str(free_port())}
    process = start(tmp_path / "run", SHORT, environ)
    assert process.stderr is not None
    line = process.stderr.readline()  # after SLOW_SECONDS: now it waits in C code
    assert "rank 0 waits for all 2 ranks at 127.0.0.1:" in line
    process.send_signal(signal.SIGTERM)
    _, err = end(process, 75)
    assert "SIGTERM: stopped while waiting for all 2 ranks" in err
    assert not (tmp_path / "run").exists()


# Streams


def test_a_reader_that_leaves(tmp_path: Path) -> None:
    process = start(tmp_path / "run", SHORT)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()  # as `| head -1` does
    assert process.stderr is not None
    err = process.stderr.read()
    assert process.wait(runs.TIMEOUT) == 0, err
    assert err == ""
    finished(tmp_path / "run")


@pytest.mark.parametrize("closed", ["<&- >&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams(tmp_path: Path, closed: str) -> None:
    folder = tmp_path / "run"
    command = f'exec "$0" "$@" {closed}'
    words = [sys.executable, str(runs.ROOT / "train.py"), *SHORT, f"run.dir={folder}"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(["sh", "-c", command, *words], cwd=runs.ROOT, env=environ, timeout=runs.TIMEOUT, check=False)
    assert done.returncode == 0
    finished(folder)


def test_a_full_disk_under_the_output(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        process = start(tmp_path / "run", SHORT, stdout=full)
        _, err = end(process, 0)
    assert err == ""
    finished(tmp_path / "run")


def wait_for_steps(folder: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + runs.TIMEOUT
    while runs.steps_traced(folder) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_closed_terminal_saves(tmp_path: Path) -> None:
    """Its shell's jobs get SIGHUP, and whatever they print after that fails."""
    folder = tmp_path / "run"
    here, there = pty.openpty()
    process = start(folder, LONG, stdin=there, stdout=there, stderr=there, preexec_fn=_take_terminal)
    os.close(there)
    wait_for_steps(folder, process)
    os.close(here)
    assert process.wait(runs.TIMEOUT) == 75
    assert int(runs.newest_checkpoint(folder).stem[5:]) == runs.steps_traced(folder)
    assert json.loads((folder / "summary.json").read_text())["status"] == "stopped"


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.mark.parametrize("procs", [1, 2])
def test_sighup_saves_through_plain_python_and_plain_torchrun(tmp_path: Path, procs: int) -> None:
    folder, codes = tmp_path / "run", tmp_path / "codes"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr=localhost", f"--nproc-per-node={procs}"]
    process = start(
        folder, LONG, {"DISTRIB_EXIT_CODE_FILE": str(codes)}, program=[sys.executable, *torchrun[: 5 * (procs > 1)]]
    )
    wait_for_steps(folder, process)
    process.send_signal(signal.SIGHUP)
    out, err = process.communicate(timeout=runs.TIMEOUT)
    assert [line.split()[1] for line in codes.read_text().splitlines()] == ["75"] * procs, out + err
    assert int(runs.newest_checkpoint(folder).stem[5:]) == runs.steps_traced(folder)


def test_nohup_is_heeded(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(folder, [*LONG, "train.steps=60"], preexec_fn=_ignore_sighup)
    wait_for_steps(folder, process)
    process.send_signal(signal.SIGHUP)
    end(process, 0)
    finished(folder, 60)


def _ignore_sighup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


# Limits


def _limited(soft: int, hard: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_few_open_files_are_told(tmp_path: Path) -> None:
    _, err = end(start(tmp_path / "run", SHORT, preexec_fn=_limited(60, 60)), 2)
    assert err.splitlines() == ["error: only 60 files may be open at once: raise the limit (ulimit -n 4096)"]


def test_a_soft_limit_is_raised(tmp_path: Path) -> None:
    end(start(tmp_path / "run", SHORT, preexec_fn=_limited(60, 4096)), 0)
    finished(tmp_path / "run")
