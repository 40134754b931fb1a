"""The image's entrypoint: what its words mean, and exit codes of real agents of torchrun with real workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from docker_scripts import DOCKER, load

from launch.command import STOPPED, USER_ERROR

ROOT = DOCKER.parent

entrypoint = load("entrypoint")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ([], ["distrib", "--help"]),
        (["train.py", "optim.lr=1"], [sys.executable, "train.py", "optim.lr=1"]),
        (["sh", "-c", "true"], ["sh", "-c", "true"]),
        (["evaluate", "runs/a"], ["distrib", "evaluate", "runs/a"]),
        (["--help"], ["distrib", "--help"]),
    ],
)
def test_what_words_mean(given: list[str], meant: list[str]) -> None:
    assert entrypoint.resolve(given) == meant


def test_codes_are_translated(capsys: pytest.CaptureFixture[str]) -> None:
    assert [entrypoint.translate(code, {"DISTRIB_EXIT_CODES": "75:143,1:129"}) for code in (0, 75, 1, 2)] == [
        0,
        143,
        129,
        2,
    ]
    assert entrypoint.translate(75, {}) == 75
    for wrong in ("75", "75:x", "75:1:2"):
        with pytest.raises(SystemExit) as ended:
            entrypoint.translate(0, {"DISTRIB_EXIT_CODES": wrong})
        assert ended.value.code == USER_ERROR
        assert capsys.readouterr().err == f"error: DISTRIB_EXIT_CODES is {wrong!r}: write it as 75:143\n"


# Ends as train.py does: PLAN says how, by rank and by how often torchrun has started the workers again.
STAND_IN = """
import os, signal, sys, time
from pathlib import Path

rank, start = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
notes, got = Path(os.environ["NOTES"]), []
for name in ("SIGTERM", "SIGUSR1"):
    signal.signal(getattr(signal, name), lambda number, frame: got.append(number))

def leave(code):
    with open(os.environ["DISTRIB_EXIT_CODE_FILE"], "a") as file:
        file.write(f"{rank} {code} words of rank {rank}\\n")
    sys.exit(code)

(notes / f"ready{rank}-{start}").touch()
while not all((notes / f"ready{k}-{start}").exists() for k in range(int(os.environ["WORLD_SIZE"]))):
    time.sleep(0.02)
plan = os.environ["PLAN"]
if plan == "mistake":
    time.sleep(rank * 0.2)
    leave(2)
if plan == "crash" and start == 0:
    while rank and not got:  # torchrun ends the others, which miss the one that crashed
        time.sleep(0.02)
    leave(1)
asked = notes / "asked"  # as the ranks tell each other that one of them was asked to stop
while not got and not asked.exists():
    time.sleep(0.02)
if os.environ.get("STOPPED"):
    asked.touch()
leave(75)
"""


class Node:
    """An agent that the entrypoint runs, of two workers."""

    def __init__(self, folder: Path, plan: str, *options: str, **environ: str) -> None:
        script = folder / "train.py"
        script.write_text(STAND_IN, encoding="utf-8")
        self.folder = folder
        words = ["torchrun", "--nproc-per-node=2", *options, str(script)]
        known = {name: value for name, value in os.environ.items() if not name.startswith(("PET_", "DISTRIB_"))}
        settings = {"NOTES": str(folder), "PLAN": plan, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environ}
        self.process = subprocess.Popen(
            [sys.executable, str(DOCKER / "entrypoint.py"), *words],
            env={**known, "CUDA_VISIBLE_DEVICES": "", **settings},
            cwd=folder,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait_for(self, *names: str) -> None:
        deadline = time.monotonic() + 90
        while not all((self.folder / name).exists() for name in names):
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline, f"{names} within 90 s"
            time.sleep(0.05)

    def end(self) -> tuple[int, str]:
        try:
            said = self.process.communicate(timeout=90)[0]
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise
        return self.process.returncode, said


def test_one_node_is_stopped(tmp_path: Path) -> None:
    """After workers that crashed were started again: their first ends do not count."""
    node = Node(tmp_path, "crash", "--standalone", "--max-restarts=1", STOPPED="1")
    node.wait_for("ready0-0", "ready1-1", "ready0-1")
    node.process.send_signal(signal.SIGUSR1)
    assert node.end()[0] == STOPPED


def test_a_crash_is_a_crash(tmp_path: Path) -> None:
    code, said = Node(tmp_path, "crash", "--standalone", STOPPED="1").end()
    assert code == 1
    assert said == "error: words of rank 0\n"


def test_two_nodes(tmp_path: Path) -> None:
    """One is asked to stop, the run's ranks agree: both say 75, and an orchestrator's code where it has its own."""
    port = 20000 + os.getpid() % 10000
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--local-addr=localhost"]
    first = Node(tmp_path, "wait", *rendezvous, PET_NNODES="2", STOPPED="1")
    second = Node(tmp_path, "wait", *rendezvous, PET_NNODES="2", DISTRIB_EXIT_CODES="75:143")
    first.wait_for(*(f"ready{rank}-0" for rank in range(4)))
    first.process.send_signal(signal.SIGTERM)
    assert first.end()[0] == STOPPED
    assert second.end()[0] == 143


def test_a_node_that_waits_is_stopped(tmp_path: Path) -> None:
    """Alone in the rendezvous nothing has begun: that is no failure."""
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--local-addr=localhost"]
    node = Node(tmp_path, "wait", *rendezvous, PET_NNODES="2", LOGLEVEL="INFO")
    assert node.process.stdout is not None
    for line in node.process.stdout:
        if "Rendezvous'ing worker group" in line:
            break
    time.sleep(0.5)  # into the waiting
    node.process.send_signal(signal.SIGTERM)
    assert node.end()[0] == STOPPED
    assert not list(tmp_path.glob("ready*"))


def test_a_mistake_of_the_user(tmp_path: Path) -> None:
    assert Node(tmp_path, "mistake", "--standalone").end()[0] == USER_ERROR
    code, said = Node(tmp_path, "mistake", "--nproc-per-node=gpu").end()
    assert (code, said) == (USER_ERROR, "error: torchrun --nproc-per-node: Cuda is not available.\n")
    code, said = Node(tmp_path, "mistake", DISTRIB_EXIT_CODES="x").end()
    assert (code, said) == (USER_ERROR, "error: DISTRIB_EXIT_CODES is 'x': write it as 75:143\n")
