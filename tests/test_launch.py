"""launch: what it builds and prints, and real runs of a stand-in for train.py through torchrun."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from distrib.options import parse_args
from launch.__main__ import main
from launch.command import (
    FAILED,
    FINISHED,
    STOPPED,
    TRAIN,
    USER_ERROR,
    Command,
    Report,
    build_torchrun,
    judge,
    read_reports,
)

ROOT = Path(__file__).resolve().parent.parent

# Does as train.py does at its end, and waits for a signal where PLAN says so. Each rank leaves notes in NOTES.
STAND_IN = """
import os, signal, sys, time
from pathlib import Path

notes, plan, rank = Path(os.environ["NOTES"]), os.environ["PLAN"], int(os.environ["RANK"])
got = []
for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"):
    signal.signal(getattr(signal, name), lambda number, frame: got.append(signal.Signals(number).name))

def leave(code, message=""):
    with open(os.environ["DISTRIB_EXIT_CODE_FILE"], "a") as file:
        file.write(f"{rank} {code} {message}\\n")
    (notes / f"got{rank}").write_text(" ".join(got))
    sys.exit(code)

(notes / f"argv{rank}").write_text("\\n".join(sys.argv[1:]))
(notes / f"pid{rank}").write_text(str(os.getpid()))
(notes / f"ready{rank}").touch()
while not all((notes / f"ready{k}").exists() for k in (0, 1)):  # torchrun ends the others where one fails
    time.sleep(0.02)
if plan == "wait" or (plan == "crash" and rank == 0):
    deadline = time.monotonic() + 60
    while not got and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(1.0)  # a save; a second signal would arrive meanwhile
    leave(75 if got else 1)
if plan == "crash":
    os.kill(os.getpid(), signal.SIGKILL)
if plan == "2" and rank == 0:
    print("error: data.root: no such folder", file=sys.stderr)
leave(int(plan), "data.root: no such folder" if plan == "2" else "")
"""

LAUNCH = (
    "import sys; from pathlib import Path; from launch.__main__ import main; "
    "sys.exit(main(sys.argv[2:], Path(sys.argv[1])))"
)
# Runs a stand-in for torchrun itself: how launch treats its one child does not depend on torch.
RUN = (
    "import os, sys; from launch.child import run; from launch.command import Command; "
    "outcome = run(Command((sys.executable, '-c', sys.argv[1]), {}), 1, os.environ); print(outcome.message); "
    "sys.exit(outcome.code)"
)


@contextmanager
def started(*words: str, **env: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process in a session of its own, as a shell's job is, that does not outlive the test."""
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=60)


@contextmanager
def launched(folder: Path, plan: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    """``python -m launch local --procs 2`` with the stand-in for train.py."""
    script, config = folder / "train.py", folder / "config.yaml"
    script.write_text(STAND_IN)
    config.write_text("run: {name: stand-in}\ndata: {loader: synthetic}\n")
    try:
        with started(
            *("-c", LAUNCH, str(script), "local", "--procs", "2", "--config", str(config), *words),
            PLAN=plan,
            NOTES=str(folder),
            TMPDIR=str(folder),  # torchrun leaves an empty folder behind
        ) as process:
            yield process
    finally:
        for file in folder.glob("pid*"):
            if alive(int(file.read_text()), script):
                os.kill(int(file.read_text()), signal.SIGKILL)


def alive(pid: int, script: Path) -> bool:
    try:
        return str(script) in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False


def wait_for(*files: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline, f"still missing: {[str(file) for file in files if not file.exists()]}"
        time.sleep(0.05)


def test_builds_torchrun() -> None:
    command = build_torchrun(4, "c.yaml", ["train.epochs=3"], {}, cores=10)
    assert command.argv == (
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=4", "--standalone"),
        *("--local-addr=localhost", "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1,SIGUSR2"),
        *(str(ROOT / "train.py"), "--config", "c.yaml", "train.epochs=3"),
    )
    assert command.env == {
        "OMP_NUM_THREADS": "2",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600",
    }
    assert TRAIN == ROOT / "train.py"


def test_at_least_one_thread_each() -> None:
    assert build_torchrun(8, "c.yaml", [], {}, cores=2).env["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    "name", ["OMP_NUM_THREADS", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]
)
def test_the_users_environment_stands(name: str) -> None:
    env = build_torchrun(1, "c.yaml", [], {name: "7"}, cores=1).env
    assert name not in env
    assert len(env) == 2


def test_prints_what_a_shell_reads_back() -> None:
    command = Command(("py", "a b", "run.dir=${run.name}/it's"), {"A": "1", "B": "x y"})
    assert shlex.split(str(command)) == ["A=1", "B=x y", "py", "a b", "run.dir=${run.name}/it's"]


def test_reads_reports() -> None:
    text = "0 1 lost the others\n1 75\n0 2 data.root: no such folder\n\nnonsense\n3\n4 x\n-1 2\n"
    assert read_reports(text) == {0: Report(2, "data.root: no such folder"), 1: Report(75)}


@pytest.mark.parametrize(
    ("returncode", "codes", "forwarded", "expected"),
    [
        (0, {}, None, FINISHED),
        (0, {0: 0, 1: 0}, signal.SIGTERM, FINISHED),  # finished before the signal came
        (1, {0: 75, 1: 75}, signal.SIGTERM, STOPPED),
        (1, {0: 75, 1: 75}, None, STOPPED),  # somebody signalled the workers or torchrun directly
        (1, {0: 0, 1: 75}, signal.SIGTERM, STOPPED),
        (1, {0: 75}, signal.SIGTERM, FAILED),  # rank 1 died without a word: was it saved?
        (1, {0: 75, 1: 1}, None, FAILED),  # rank 1 failed, and torchrun's SIGTERM stopped rank 0
        (1, {0: 2, 1: 1}, None, USER_ERROR),
        (1, {0: 2, 1: 75}, None, USER_ERROR),
        (1, {1: 2}, None, USER_ERROR),
        (1, {0: 3, 1: 3}, None, FAILED),
        (1, {0: 4, 1: 75}, None, FAILED),
        (1, {0: 0, 1: 0}, None, FAILED),
        (1, {}, None, FAILED),
        (1, {}, signal.SIGTERM, FAILED),
        (-15, {}, signal.SIGTERM, STOPPED),  # before torchrun had started a worker
        (-15, {}, None, FAILED),
        (-9, {}, signal.SIGTERM, FAILED),
        (-15, {0: 1}, signal.SIGTERM, FAILED),
    ],
)
def test_judges(returncode: int, codes: dict[int, int], forwarded: int | None, expected: int) -> None:
    outcome = judge(returncode, {rank: Report(code) for rank, code in codes.items()}, 2, forwarded)
    assert outcome.code == expected
    assert "\n" not in outcome.message
    told = expected in (STOPPED, USER_ERROR) and codes.get(0) == expected  # by rank 0
    assert bool(outcome.message) == (expected != FINISHED and not told)


def test_says_what_continues_where_rank_0_did_not() -> None:
    reports = {0: Report(FINISHED), 1: Report(STOPPED)}
    assert judge(1, reports, 2).message == "stopped on request; the same command continues"
    fresh = judge(1, reports, 2, again="the same command without --fresh").message
    assert fresh == "stopped on request; the same command without --fresh continues"


def test_repeats_the_workers_own_message() -> None:
    assert judge(1, {0: Report(1), 1: Report(2, "no images")}, 2).message == "error: no images"
    for code in (1, 3, 4):
        assert judge(1, {0: Report(code, "loss is nan")}, 2).message == "error: loss is nan"


def test_dry_run_only_prints(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def popen(*args: object, **kwargs: object) -> None:
        raise AssertionError("started something")

    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    config = tmp_path / "my config.yaml"
    config.write_text("run: {name: x}\n")
    # Options and overrides in any order, as train.py takes them.
    argv = ["local", "train.epochs=7", "--procs", "2", "--dry-run", "--config", str(config), "optim.lr=1e-3"]
    assert main(argv) == 0
    out, err = capfd.readouterr()
    words = shlex.split(out)
    assert err == ""
    assert out.count("\n") == 1
    assert words[0].startswith("OMP_NUM_THREADS=")
    assert words[-5:] == [str(TRAIN), "--config", str(config), "train.epochs=7", "optim.lr=1e-3"]


@pytest.mark.parametrize(
    ("words", "handed_on"),
    [
        (["--fresh", "--data", "/a b"], ["--fresh", "data.root=/a b"]),
        (
            ["--data=/x", "train.epochs=3", "--init-from", "w.pt"],
            ["data.root=/x", "train.epochs=3", "model.weights=w.pt"],
        ),
        (["--resume", "must", "--ema"], ["--resume", "must", "ema=true"]),
        (["--resume=must"], ["--resume", "must"]),
        (["--resume", "auto", "--optim.lr", "0.5"], ["optim.lr=0.5"]),
    ],
)
def test_train_pys_options_are_handed_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], words: list[str], handed_on: list[str]
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("")
    assert main(["local", *words, "--procs", "2", "--dry-run", "--config", str(config)]) == 0
    typed = shlex.split(capfd.readouterr().out)
    assert typed[typed.index(str(TRAIN)) :] == [str(TRAIN), "--config", str(config), *handed_on]
    read = parse_args(typed[typed.index(str(TRAIN)) + 1 :])  # train.py takes them as they were meant
    assert read.fresh == ("--fresh" in words)
    assert (read.resume == "must") == any("must" in word for word in words)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["train.global_batch=1"], "train.global_batch 1 is smaller than the 2 processes: raise it, or start fewer"),
        (["--fresh", "--resume", "must"], "leave one of them out"),
        (["--resume", "x.pt"], "takes auto or must"),
        (["--lr", "0.1"], "--lr is no option; write optim.lr=0.1"),
        (["--proc", "3"], "did you mean --procs?"),
        (["model=resnet18"], "model.name=resnet18"),
        (["train.epoch=3"], "did you mean train.epochs?"),
        (["train.epochs=many"], "train.epochs"),
        (["--config", "no/such.yaml"], "no/such.yaml"),
        (["run.dir=${SURELY_UNSET_VARIABLE}"], "SURELY_UNSET_VARIABLE"),
    ],
)
def test_a_wrong_configuration_starts_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], words: list[str], part: str
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("")
    assert main(["local", "--procs", "2", "--config", str(config), *words], tmp_path / "train.py") == USER_ERROR
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert part in err


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["data.root=/nope"], "no data at /nope/train"),
        (["model.num_classes=7"], "model.num_classes is 7, but"),
        (["train.global_batch=1"], "train.global_batch 1 is smaller than the 2 processes"),
        (["data.loader=synthetic", "data.synthetic.train=1"], "the 2 processes are more than the 1 training images"),
    ],
)
def test_wrong_data_or_batch_starts_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], words: list[str], part: str
) -> None:
    argv = ["local", "--procs", "2", "--config", str(ROOT / "configs" / "quickstart.yaml"), *words]
    assert main(argv, tmp_path / "no train.py") == USER_ERROR
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert part in err


def test_the_default_configuration_stands_beside_the_code(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["local", "--procs", "2", "--dry-run"]) == 0
    assert main(["local", "--procs", "2", "--dry-run", "--config", "configs/none.yaml"]) == USER_ERROR
    err = capfd.readouterr().err
    assert err == f"error: cannot read configuration configs/none.yaml: neither {tmp_path} nor {ROOT} has it\n"


def test_bytes_that_are_no_text_are_handed_on(tmp_path: Path) -> None:
    word = b"data.root=/d\xff #2"
    done = subprocess.run(
        [sys.executable, "-m", "launch", "local", "--procs", "2", "--dry-run", "--optim.lr", "0.5", word],
        cwd=ROOT,
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.endswith(b"train.py --config configs/resnet50.yaml optim.lr=0.5 'data.root=/d\xff #2'\n")


def test_the_agent_takes_torchruns_words() -> None:
    command = build_torchrun(2, "c.yaml", ["run.name=x"], {}, cores=2)
    plain, quiet = command.argv, command.through_agent().argv
    assert [(a, b) for a, b in zip(plain, quiet, strict=True) if a != b] == [("torch.distributed.run", "launch.agent")]
    assert command.through_agent().env == command.env


def test_what_torchrun_refuses_is_one_line() -> None:
    environ = {name: value for name, value in os.environ.items() if name != "LOGLEVEL"}
    done = subprocess.run(
        [sys.executable, "-m", "launch.agent", "--nproc-per-node=none", "train.py"],
        cwd=ROOT,
        env=environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == FAILED
    assert done.stderr == "error: torchrun: ValueError: Unsupported nproc_per_node value: none\n"


def test_a_missing_train_py_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("data: {loader: synthetic}")
    assert main(["local", "--procs", "1", "--config", str(config)], tmp_path / "train.py") == USER_ERROR
    assert "train.py is missing" in capfd.readouterr().err


@pytest.mark.parametrize("procs", ["0", "-1", "two", "1.5", ""])
def test_procs_is_a_positive_number(procs: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["local", f"--procs={procs}"]) == USER_ERROR
    assert "not a whole number of 1 or more" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "usage: python -m launch"),
        (["--procs", "2"], "usage: python -m launch"),
        (["locale"], "error: there is no command locale; did you mean local?\n"),
    ],
)
def test_without_a_sub_command(words: list[str], told: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch", *words], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == USER_ERROR
    assert done.stderr.startswith(told)
    assert "Traceback" not in done.stderr


def test_help_names_the_commands(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "  local " in capfd.readouterr().out


def test_imports_no_torch() -> None:
    code = (
        "import sys, launch.__main__, launch.command, launch.sweep, distrib.cli, distrib.config; "
        "print([name for name in sys.modules if name.partition('.')[0] in ('torch', 'torchvision', 'numpy')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("plan", "expected"), [("0", FINISHED), ("1", FAILED), ("2", USER_ERROR)])
def test_exit_codes_through_torchrun(tmp_path: Path, plan: str, expected: int) -> None:
    with launched(tmp_path, plan, "train.epochs=7") as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == expected, err
    assert "torch.distributed.run" in out
    for rank in (0, 1):
        assert (tmp_path / f"argv{rank}").read_text().split("\n") == [
            *("--config", str(tmp_path / "config.yaml"), "train.epochs=7")
        ]
    if plan == "2":
        assert err == "error: data.root: no such folder\n"
    if plan == "1":
        assert err.startswith("error: torchrun exited with 1 (rank 0: 1, rank 1: 1)")
        assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"])
def test_a_signal_reaches_each_worker_once(tmp_path: Path, name: str) -> None:
    with launched(tmp_path, "wait") as process:
        wait_for(tmp_path / "ready0", tmp_path / "ready1")
        process.send_signal(signal.Signals[name])
        _, err = process.communicate(timeout=120)
    assert process.returncode == STOPPED, err
    assert [(tmp_path / f"got{rank}").read_text() for rank in (0, 1)] == [name, name]
    assert err == f"{name}: asking the workers to save and stop\n"  # the rest is rank 0's to say


def test_ctrl_c_twice_still_saves(tmp_path: Path) -> None:
    with launched(tmp_path, "wait") as process:
        wait_for(tmp_path / "ready0", tmp_path / "ready1")
        os.killpg(process.pid, signal.SIGINT)  # a terminal signals the whole group: torchrun must not be in it
        time.sleep(0.4)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode == STOPPED, err
    assert [(tmp_path / f"got{rank}").read_text() for rank in (0, 1)] == ["SIGINT", "SIGINT"]
    assert err.splitlines() == [
        "SIGINT: asking the workers to save and stop",
        "SIGINT: already stopping, waiting for the workers to save",
    ]


def test_a_killed_worker_is_a_failure_though_the_other_stopped(tmp_path: Path) -> None:
    with launched(tmp_path, "crash") as process:
        _, err = process.communicate(timeout=120)
    assert (tmp_path / "got0").read_text() == "SIGTERM"
    assert process.returncode == FAILED, err
    assert err.splitlines() == ["error: rank 1 was killed by SIGKILL"]
    assert "Traceback" not in err


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for it")
def test_workers_save_though_launch_was_killed(tmp_path: Path) -> None:
    with launched(tmp_path, "wait") as process:
        wait_for(tmp_path / "ready0", tmp_path / "ready1")
        process.kill()
        wait_for(tmp_path / "got0", tmp_path / "got1")
    assert [(tmp_path / f"got{rank}").read_text() for rank in (0, 1)] == ["SIGTERM", "SIGTERM"]


@pytest.mark.parametrize("name", ["SIGHUP", "SIGQUIT"])
def test_a_closed_terminal_becomes_sigterm(tmp_path: Path, name: str) -> None:
    child = """if True:
        import os, signal, sys, time
        def stop(number, frame):
            with open(os.environ["DISTRIB_EXIT_CODE_FILE"], "a") as file:
                file.write("0 75")
            sys.exit(1)
        signal.signal(signal.SIGTERM, stop)
        open(os.environ["READY"], "w").close()
        time.sleep(60)
    """
    # A test runner in a script's background hands an ignored SIGQUIT on.
    code = f"import signal; signal.signal(signal.{name}, signal.SIG_DFL); {RUN}"
    with started("-c", code, child, READY=str(tmp_path / "ready")) as process:
        wait_for(tmp_path / "ready")
        process.send_signal(signal.Signals[name])
        _, err = process.communicate(timeout=60)
    assert process.returncode == STOPPED, err
    assert err == f"{name}: asking the workers to save and stop\n"


def test_a_terminal_that_takes_no_words_any_more(tmp_path: Path) -> None:
    """The request reaches the workers all the same, and their word counts."""
    child = """if True:
        import os, signal, sys, time
        def stop(number, frame):
            with open(os.environ["DISTRIB_EXIT_CODE_FILE"], "a") as file:
                file.write("0 75")
            sys.exit(1)
        signal.signal(signal.SIGHUP, stop)
        signal.signal(signal.SIGTERM, stop)
        open(os.environ["READY"], "w").close()
        time.sleep(60)
    """
    broken = "import os; ends = os.pipe(); os.close(ends[0]); os.dup2(ends[1], 2)"
    code = f"{broken}; import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL); {RUN}"
    with started("-c", code, child, READY=str(tmp_path / "ready")) as process:
        wait_for(tmp_path / "ready")
        process.send_signal(signal.SIGHUP)
        process.communicate(timeout=60)
    assert process.returncode == STOPPED


def test_nohup_is_left_alone(tmp_path: Path) -> None:
    child = "import os, time; open(os.environ['READY'], 'w').close(); time.sleep(1)"
    code = f"import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); {RUN}"
    with started("-c", code, child, READY=str(tmp_path / "ready")) as process:
        wait_for(tmp_path / "ready")
        process.send_signal(signal.SIGHUP)
        _, err = process.communicate(timeout=60)
    assert process.returncode == FINISHED, err
    assert err == ""


def test_a_signal_before_any_worker_is_a_stop(tmp_path: Path) -> None:
    child = "import os, time; open(os.environ['READY'], 'w').close(); time.sleep(60)"
    with started("-c", RUN, child, READY=str(tmp_path / "ready")) as process:
        wait_for(tmp_path / "ready")
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == STOPPED, err
    assert out == "stopped on request before anything began; the same command starts it\n"
