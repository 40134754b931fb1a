"""launch slurm without a cluster: the batch script and what its tasks run, on a login node too; and its mistakes."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from launch.command import FINISHED, USER_ERROR

ROOT = Path(__file__).resolve().parent.parent
# What launch needs of what is installed: no torch, numpy, DALI.
NEEDED = (
    "annotated_types", "cloudpickle", "pydantic", "pydantic_core", "rich", "pygments", "markdown_it", "mdurl",
    "submitit", "typing_extensions.py", "typing_inspection", "yaml",
)  # fmt: skip
SINFO = "gpu*|200|96|gpu:h100:8|2-00:00:00|up\ncpu|4|64|(null)|infinite|up\n"


@pytest.fixture(scope="module")
def login(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a login node: a Python that finds what launch needs and no more."""
    packages = tmp_path_factory.mktemp("login")
    for name in NEEDED:
        (packages / name).symlink_to(Path(sysconfig.get_paths()["purelib"]) / name)
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(packages),
        "PYTHONPATH": f"{packages}:{ROOT}",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


@pytest.fixture
def slurm(tmp_path: Path) -> Path:
    """A folder for PATH with commands that answer as a cluster's do; ``sbatch`` notes that it was called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {
        "sinfo": f"printf '{SINFO}'",
        "squeue": "true",
        "srun": "false",
        "sbatch": f"touch {tmp_path}/submitted; echo 'sbatch: error: Invalid account or account/partition' >&2; exit 1",
    }.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    return folder


def launch(
    environ: dict[str, str], cwd: Path, *words: str, path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """``launch slurm`` on that login node; -S: without the packages of this environment."""
    environ = environ | ({"PATH": f"{path}:{environ['PATH']}"} if path else {"PATH": "/usr/bin/none"})
    command = [sys.executable, "-S", "-m", "launch", "slurm", *words]
    return subprocess.run(command, env=environ, cwd=cwd, capture_output=True, text=True, timeout=60)


def flags(script: str) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script, re.MULTILINE))


def test_the_login_node_has_no_torch(login: dict[str, str]) -> None:
    for name in ("torch", "numpy"):
        tried = subprocess.run(
            [sys.executable, "-S", "-c", f"import {name}"], env=login, capture_output=True, text=True
        )
        assert "ModuleNotFoundError" in tried.stderr


def test_a_job_of_128_nodes(login: dict[str, str], slurm: Path, tmp_path: Path) -> None:
    (tmp_path / "launch.yaml").write_text(
        "{account: vision, time: 2-00:00:00, mem: '0', signal_seconds: 300, failures: 5, exclude_failed: true, "
        "modules: [cuda/13.0], setup: [ulimit -n 65536], nccl: {ib_hca: mlx5}, slurm: {nice: 5, exclusive: true}, "
        "srun: {mpi: none}}"
    )
    words = ["--nodes", "128", "--config", "configs/resnet50.yaml", "run.dir=runs/r 50", "data.root=data", "--comment"]
    done = launch(login, tmp_path, *words, "it's", "--dry-run", "--fresh", path=slurm)
    assert (done.returncode, done.stderr) == (FINISHED, "")
    script, rest = done.stdout.split("# variables of the ranks", 1)
    folder = next(line.split("=", 1)[1] for line in rest.splitlines() if line.startswith("DISTRIB_SUBMISSION="))
    assert folder.startswith(str(tmp_path / "runs/r 50/launch/"))
    assert flags(script) == {
        "account": "vision", "comment": "'it'\"'\"'s'", "cpus-per-task": "96", "exclusive": "", "gpus-per-node": "8",
        "job-name": "resnet50-data", "mem": "0", "nice": "5", "nodes": "128", "ntasks-per-node": "1",
        "open-mode": "append", "output": f"'{folder}/%j_0_log.out'", "requeue": "", "signal": "USR2@300",
        "time": "2-00:00:00",
    }  # fmt: skip
    lines = script.splitlines()
    for line in (
        f"export DISTRIB_SUBMISSION='{folder}'", "export DISTRIB_WORLD=1024", "export DISTRIB_FAILURES=5",
        "export DISTRIB_EXCLUDE=true", "export NCCL_IB_HCA=mlx5", f"cd {ROOT}", f". {ROOT}/launch/slurm/job.sh",
        "module load cuda/13.0", "ulimit -n 65536", "begin", "finish $?",
    ):  # fmt: skip
        assert lines.count(line) == 1, line
    assert lines.index("module load cuda/13.0") < lines.index("begin") < lines.index("finish $?")
    srun = shlex.split(next(line for line in lines if line.startswith("srun")))
    assert srun[:2] == ["srun", "--unbuffered"]
    assert srun[-5:] == [sys.executable, "-u", "-m", "submitit.core._submit", folder]
    assert {"--kill-on-bad-exit=1", "--wait=0", "--cpus-per-task=96", "--mpi=none"} <= set(srun)
    command = shlex.split(rest.splitlines()[-1])
    assert command[:2] == ["OMP_NUM_THREADS=12", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"]
    assert {"--nnodes=128", "--nproc-per-node=8", "--rdzv-backend=c10d", "--max-restarts=3"} <= set(command)
    assert command[-4:] == [str(ROOT / "train.py"), "--config", f"{folder}/config_0.yaml", "--fresh"]
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "submitted").exists()


def test_one_task_a_rank_in_a_container(login: dict[str, str], slurm: Path, tmp_path: Path) -> None:
    (tmp_path / "launch.yaml").write_text(
        f"{{tasks: gpu, partition: gpu, container: {{image: r#distrib:1, mounts: ['{tmp_path}/scratch:/scratch']}}}}"
    )
    (tmp_path / "data").mkdir()
    words = ["--nodes", "2", "--gpus-per-node", "4", "--config", "configs/resnet50.yaml", "data.root=data"]
    done = launch(login, tmp_path, *words, "--dry-run", path=slurm)
    assert (done.returncode, done.stderr) == (FINISHED, "")
    found = flags(done.stdout)
    assert (found["ntasks-per-node"], found["cpus-per-task"], found["gpus-per-node"]) == ("4", "12", "4")
    srun = shlex.split(next(line for line in done.stdout.splitlines() if line.startswith("srun")))
    mounts = next(word for word in srun if word.startswith("--container-mounts=")).split("=", 1)[1].split(",")
    run = tmp_path / "runs/resnet50-data"
    assert "--container-image=r#distrib:1" in srun
    assert sorted(mounts[:2]) == sorted([f"{run}:{run}", f"{ROOT}:{ROOT}"])
    assert mounts[2] == f"{tmp_path}/data:{tmp_path}/data:ro"
    assert mounts[-1] == f"{tmp_path}/scratch:/scratch"
    assert srun[-5:-1] == ["python3", "-u", "-m", "submitit.core._submit"]
    assert "torch" not in done.stdout.splitlines()[-1].split(str(ROOT))[0]


def test_without_slurm_a_dry_run_needs_the_number_of_gpus(login: dict[str, str], tmp_path: Path) -> None:
    words = ["--nodes", "2", "--config", "configs/resnet50.yaml", "--dry-run"]
    done = launch(login, tmp_path, *words)
    assert (done.returncode, done.stdout) == (USER_ERROR, "")
    assert done.stderr.startswith("error: --gpus-per-node is needed: sinfo does not tell")
    assert launch(login, tmp_path, *words, "--gpus-per-node", "8").returncode == FINISHED


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--partition", "gpus"], "--partition gpus: the cluster has no such partition; did you mean gpu?"),
        (["--nodes", "201"], "--nodes 201: partition gpu has 200;"),
        (["--time", "2h"], "--time '2h' is no time limit"),
        (["--profile", "bad.yaml"], "bad.yaml: unknown key partion; did you mean partition?"),
        (["--nodes", "200"], "train.global_batch 1024 is smaller than the 1600 processes: raise it, or start fewer"),
        (["data.root=none"], "no data at "),
        (["optim.lr=x"], "optim.lr"),
        (["--simulate"], "--simulate goes with --dry-run"),
        (["--data-on-nodes", "--resume", "must"], "holds no checkpoint: see run.dir and run.name"),
        (["--procs-per-node", "9"], "--procs-per-node 9 is more than the 8 GPUs of a node"),
        (["--data-on-nodes", "run.dir=/proc/none"], "cannot write to /proc/none: "),
    ],
)
def test_mistakes_submit_nothing(
    words: list[str], expected: str, login: dict[str, str], slurm: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.yaml").write_text("partion: gpu")
    done = launch(login, tmp_path, "--config", "configs/resnet50.yaml", *words, path=slurm)
    assert done.returncode == USER_ERROR, done.stderr
    assert done.stderr.startswith("error: ")
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "submitted").exists()
    assert not (tmp_path / "runs").exists()


def test_gpus_are_asked_for_wherever_there_are_some(login: dict[str, str], slurm: Path, tmp_path: Path) -> None:
    (slurm / "sinfo").write_text("#!/bin/sh\nprintf 'mix*|8|96|gpu:8|60|up\\nmix*|2|64|(null)|60|up\\n'\n")
    for words, tasks in (([], 8), (["--procs-per-node", "4"], 4)):
        done = launch(login, tmp_path, "--config", "configs/resnet50.yaml", "--dry-run", *words, path=slurm)
        assert flags(done.stdout)["gpus-per-node"] == "8"
        assert f"--nproc-per-node={tasks}" in done.stdout


def test_sbatch_reads_the_script_alone(login: dict[str, str], slurm: Path, tmp_path: Path) -> None:
    (slurm / "sbatch").write_text(f"#!/bin/sh\nenv | grep -E '^(SBATCH|SLURM)_' > {tmp_path}/saw\nexit 1\n")
    set_ = {"SBATCH_SIGNAL": "TERM@5", "SLURM_ARRAY_TASK_ID": "5", "SLURM_CONF": "/c", "SLURM_JOB_ID": "1"}
    words = ["--config", "configs/resnet50.yaml", "--data-on-nodes", "data.root=/data"]
    assert launch(login | set_, tmp_path, *words, path=slurm).returncode == USER_ERROR
    assert (tmp_path / "saw").read_text() == "SLURM_CONF=/c\n"


def test_a_container_takes_no_comma_in_a_path(login: dict[str, str], slurm: Path, tmp_path: Path) -> None:
    (tmp_path / "launch.yaml").write_text("container: {image: a}")
    words = ["--config", "configs/resnet50.yaml", "run.dir=a,b", "--dry-run"]
    done = launch(login, tmp_path, *words, path=slurm)
    assert done.returncode == USER_ERROR
    assert done.stderr.endswith("a,b: --container-mounts takes no ':' and no ',' in a path: use another folder\n")


def test_no_slurm_on_this_machine(login: dict[str, str], tmp_path: Path) -> None:
    done = launch(login, tmp_path, "--nodes", "2", "--config", "configs/quickstart.yaml")
    assert done.returncode == USER_ERROR
    assert done.stderr == (
        "error: no Slurm on this machine: sbatch and srun cannot be found; submit on a login node, or use "
        "`python -m launch local`\n"
    )


def test_what_sbatch_says_is_told(login: dict[str, str], slurm: Path, tmp_path: Path) -> None:
    words = ["--config", "configs/resnet50.yaml", "--data-on-nodes", "data.root=/data"]
    done = launch(login, tmp_path, *words, path=slurm)
    assert done.returncode == USER_ERROR
    assert done.stderr == "error: sbatch refused the job: Invalid account or account/partition\n"
    assert (tmp_path / "submitted").exists()
    assert not (tmp_path / "runs/resnet50-data").exists()


def test_a_job_that_cannot_be_noted_is_cancelled(login: dict[str, str], slurm: Path, tmp_path: Path) -> None:
    record = tmp_path / "runs/resnet50-data/launch"
    (record / "events.jsonl").mkdir(parents=True)  # a file cannot be written there
    (slurm / "sbatch").write_text("#!/bin/sh\necho Submitted batch job 7\n")
    (slurm / "scancel").write_text(f"#!/bin/sh\necho $* > {tmp_path}/cancelled\n")
    (slurm / "scancel").chmod(0o755)
    done = launch(
        login, tmp_path, "--config", "configs/resnet50.yaml", "--data-on-nodes", "data.root=/data", path=slurm
    )
    assert done.returncode == USER_ERROR
    assert done.stderr.startswith(f"error: cannot write to {tmp_path}/runs/resnet50-data: Is a directory")
    assert done.stderr.endswith("job 7 was cancelled\n")
    assert (tmp_path / "cancelled").read_text() == "7\n"


def begun(folder: Path, cwd: Path, login: dict[str, str], *words: str) -> None:
    """A run's folder with a checkpoint and the configuration that these words mean."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints/step_00000010.pt").touch()
    shown = launch(login, cwd, "--config", "configs/resnet50.yaml", *words, "--print-config")
    (folder / "config.yaml").write_text(shown.stdout)


def test_a_begun_run_is_looked_at_before_a_job_waits_for_hours(
    login: dict[str, str], slurm: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "runs/resnet50-data"
    words = ["--data-on-nodes", "data.root=/data", "--config", "configs/resnet50.yaml"]
    begun(folder, tmp_path, login, "data.root=/data")
    done = launch(login, tmp_path, *words, "train.global_batch=512", path=slurm)
    assert done.returncode == USER_ERROR
    assert done.stderr.startswith(f"error: train.global_batch is 512, but {folder} was trained with 1024: set it back,")
    assert not (tmp_path / "submitted").exists()
    launch(login, tmp_path, *words, "train.epochs=100", path=slurm)
    assert (tmp_path / "submitted").exists()

    (tmp_path / "submitted").unlink()
    (folder / "summary.json").write_text('{"status": "finished", "step": 10}')
    done = launch(login, tmp_path, *words, path=slurm)
    assert (done.returncode, done.stderr) == (FINISHED, "")
    assert done.stdout == f"{folder} is finished already: raise train.epochs, or begin anew with --fresh\n"
    assert not (tmp_path / "submitted").exists()
    launch(login, tmp_path, *words, "train.epochs=100", path=slurm)
    assert (tmp_path / "submitted").exists()


def test_a_stop_that_was_asked_for_stands_where_nothing_is_submitted(
    login: dict[str, str], slurm: Path, tmp_path: Path
) -> None:
    stop = tmp_path / "runs/resnet50-data/launch/stop"
    stop.parent.mkdir(parents=True)
    stop.touch()
    words = ["--config", "configs/resnet50.yaml", "--data-on-nodes", "data.root=/data"]
    assert launch(login, tmp_path, *words, path=slurm).returncode == USER_ERROR
    assert stop.exists()
