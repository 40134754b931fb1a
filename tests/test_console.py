"""The command ``distrib``: from the checkout, and from a wheel that is installed away from it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
import runs
import yaml

from distrib.__main__ import first_line, programs
from distrib.root import INSTALLED, ROOT, TRAIN

HEAVY = ("torch", "torchvision", "numpy", "wandb", "nvidia")
TINY = [
    *("--config", "configs/quickstart.yaml", "data.size=16", "data.eval_resize=16", "data.workers=0"),
    *("train.steps=3", "train.global_batch=8", "train.eval_every_epochs=1000", "data.loader=torchvision"),
    *("data.fraction=0.01", "data.eval_batch=500"),
]


def python(*words: str, cwd: Path = runs.ROOT, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A Python process to its end; ``path`` is all that stands in PYTHONPATH."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "120"}
    environ |= {"PYTHONPATH": str(path)} if path else {}
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env=environ,
        capture_output=True,
        text=True,
        timeout=runs.TIMEOUT,
        check=False,
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel is installed, which is built from a copy of what git knows of."""
    base = tmp_path_factory.mktemp("wheel")
    source, target = base / "source", base / "installed"
    kept = shutil.ignore_patterns(".*", "runs", "build", "*.egg-info", "__pycache__")
    shutil.copytree(runs.ROOT, source, ignore=kept)
    pip = ("-m", "pip", "--disable-pip-version-check", "--no-input")
    built = python(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(base), str(source))
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = base.glob("distrib-*.whl")
    put = python(*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel))
    assert put.returncode == 0, put.stdout + put.stderr
    shutil.rmtree(source)  # nothing may lean on it
    return target


# From the checkout


def test_a_checkout_uses_its_own_files() -> None:
    assert not INSTALLED
    assert runs.ROOT == ROOT
    assert runs.ROOT / "train.py" == TRAIN


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_the_commands_are_listed_with_their_first_lines(words: list[str]) -> None:
    done = python("-m", "distrib", *words)
    assert (done.returncode, done.stderr) == (0, "")
    tools = {p.stem for p in (runs.ROOT / "distrib/tools").iterdir() if not p.name.startswith("_")}
    told = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line.startswith("  "))
    assert set(told) == {"train", "launch", *tools}
    assert told["train"] == first_line(runs.ROOT / "train.py")
    assert all(told.values())


def test_a_new_program_is_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in ("__init__.py", "report.py", "_shared.py", "many/__init__.py", "many/__main__.py", "_own/__init__.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text('"""One.\n\nTwo."""\nraise AssertionError("imported")\n')
    monkeypatch.setattr("distrib.__main__.TOOLS", tmp_path)
    found = programs()
    assert list(found) == ["launch", "many", "report"]
    assert first_line(found["report"]) == first_line(found["many"]) == "One."


@pytest.mark.parametrize(
    ("word", "hint"), [("trian", "; did you mean train?"), ("lauch", "; did you mean launch?"), ("zzz", "")]
)
def test_an_unknown_command(word: str, hint: str) -> None:
    done = python("-m", "distrib", word, "train.epochs=3")
    assert done.returncode == 2
    assert done.stderr == f"error: there is no command {word}{hint} (distrib --help lists them)\n"
    assert done.stdout == ""


def test_train_becomes_train_py(tmp_path: Path) -> None:
    """The same process, so that signals and exit codes are train.py's; Python keeps its options."""
    long = [*TINY, "train.steps=100000", f"run.dir={tmp_path / 'run'}", "trace=true"]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-um", "distrib", "train", *long],
        cwd=runs.ROOT,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        runs.wait_until(lambda: runs.steps_traced(tmp_path / "run") > 0, process)
        words = Path(f"/proc/{process.pid}/cmdline").read_text().split("\0")
        process.send_signal(signal.SIGTERM)
        printed = runs.finish(process)
    finally:
        if process.poll() is None:
            runs.kill_group(process)
    assert words[1:5] == ["-W", "ignore", "-u", str(runs.ROOT / "train.py")]
    assert words[5:-1] == long
    assert process.returncode == 75, printed
    assert printed.splitlines()[-1] == f"the same command continues {tmp_path / 'run'}"


def test_a_mistake_behind_train_is_train_pys() -> None:
    done = python("-m", "distrib", "train", "--lr", "0.1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --lr is no option; write optim.lr=0.1\n"


def test_torchrun_starts_it(tmp_path: Path) -> None:
    done = python(
        *("-m", "torch.distributed.run", "--standalone", "--local-addr=localhost", "--nproc-per-node=2"),
        *("-m", "distrib", "train", *TINY, f"run.dir={tmp_path / 'run'}"),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/summary.json").read_text())["step"] == 3
    assert "global batch 8: 2 × 1 forwards of at most 4" in done.stdout


@pytest.mark.parametrize(
    "words",
    [
        ("train.py", "--help"),
        ("train.py", "--print-config"),
        ("train.py", "--help", "optim"),
        ("-m", "distrib", "--help"),
        ("-m", "distrib", "train", "--print-config"),
        ("-m", "distrib", "launch", "local", "--help"),
        ("-m", "launch", "local", "--procs", "2", "--print-config"),
        ("-m", "launch", "local", "--procs", "2", "--dry-run"),
    ],
)
def test_answers_come_before_the_slow_imports(words: tuple[str, ...]) -> None:
    done = python("-X", "importtime", *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "distrib" in imported
    assert not imported & set(HEAVY)


def test_both_print_the_same_configuration() -> None:
    words = ("--print-config", "--config", "configs/quickstart.yaml", "train.epochs=2")
    by_train = python("train.py", *words)
    by_launch = python("-m", "distrib", "launch", "local", "--procs", "2", *words)
    assert by_train.stdout == by_launch.stdout
    assert yaml.safe_load(by_train.stdout)["model"]["num_classes"] == 10  # which the data tells


# From a wheel


def test_the_wheel_is_whole(installed: Path, tmp_path: Path) -> None:
    done = python(
        "-c", "import distrib, launch; print(distrib.__file__, launch.__file__)", cwd=tmp_path, path=installed
    )
    assert done.stdout.split() == [str(installed / "distrib/__init__.py"), str(installed / "launch/__init__.py")]
    carried = installed / "distrib/carried"
    files = ["train.py", *(str(file.relative_to(runs.ROOT)) for file in runs.ROOT.glob("configs/**/*.yaml"))]
    assert len(files) > 5
    assert {name: (carried / name).read_bytes() for name in files} == {
        name: (runs.ROOT / name).read_bytes() for name in files
    }
    top = {path.name.partition("-")[0] for path in installed.iterdir()}
    assert top - {"bin", "__pycache__"} == {"distrib", "launch"}


def test_an_editable_wheel_carries_nothing(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(runs.ROOT, source, ignore=shutil.ignore_patterns(".*", "runs", "build", "*.egg-info"))
    code = "import sys; from setuptools.build_meta import build_editable; build_editable(sys.argv[1])"
    done = python("-c", code, str(tmp_path), cwd=source)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = ZipFile(wheel).namelist()
    assert any(name.startswith("__editable__") for name in names)
    assert not [name for name in names if "carried" in name or name.endswith("train.py")]
    assert not (source / "distrib/carried").exists()


@pytest.mark.parametrize(
    ("words", "name"), [((), "resnet50"), (("--config", "configs/resnet101.yaml"), "resnet101")], ids=["", "extends"]
)
def test_its_configurations_are_found_from_anywhere(
    installed: Path, tmp_path: Path, words: tuple[str, ...], name: str
) -> None:
    done = python("-m", "distrib", "train", "--print-config", *words, cwd=tmp_path, path=installed)
    assert (done.returncode, done.stderr) == (0, "")
    assert yaml.safe_load(done.stdout)["model"]["name"] == name


def test_a_file_that_is_nowhere(installed: Path, tmp_path: Path) -> None:
    done = python("-m", "distrib", "train", "--config", "configs/none.yaml", cwd=tmp_path, path=installed)
    assert (done.returncode, done.stdout) == (2, "")
    place = f"neither {tmp_path} nor {installed}/distrib/carried has it"
    assert done.stderr == f"error: cannot read configuration configs/none.yaml: {place}\n"


def test_it_trains(installed: Path, tmp_path: Path) -> None:
    done = python("-m", "distrib", "train", *TINY, cwd=tmp_path, path=installed)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "runs/quickstart"
    assert json.loads((folder / "summary.json").read_text())["step"] == 3
    assert f"{installed}/distrib/carried/train.py" in (folder / "config.yaml").read_text().splitlines()[0]


def test_an_installed_copy_names_no_revision(installed: Path, tmp_path: Path) -> None:
    """A repository around it, as of a project with an environment in it, is not ours."""
    inside = tmp_path / "project"
    shutil.copytree(installed, inside / "env")
    git = ["git", "-C", str(inside), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message=theirs"]):
        subprocess.run([*git, *words], check=True, timeout=60)
    code = "from distrib.folder import _git_revision; print(_git_revision())"
    assert python("-c", code, cwd=tmp_path, path=inside / "env").stdout == "unknown\n"
    (inside / "env/distrib/carried/REVISION").write_text("0123456789ab\n+changes\n")  # as an image has it
    assert python("-c", code, cwd=tmp_path, path=inside / "env").stdout == "0123456789ab +changes\n"


def test_a_copy_of_the_checkout_names_the_revision_it_was_made_of(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(runs.ROOT / "distrib", copy / "distrib", ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "REVISION").write_text("0123456789ab+changes\n")
    code = "from distrib.folder import _git_revision; print(_git_revision())"
    assert python("-c", code, cwd=tmp_path, path=copy).stdout == "0123456789ab+changes\n"


def test_it_launches(installed: Path, tmp_path: Path) -> None:
    command = [str(installed / "bin/distrib"), "launch", "local", "--procs", "2", *TINY]
    dry = python(*command, "--dry-run", cwd=tmp_path, path=installed)
    assert (dry.returncode, dry.stderr) == (0, "")
    words = shlex.split(dry.stdout)
    assert words[words.index("--config") - 1] == f"{installed}/distrib/carried/train.py"
    done = python(*command, cwd=tmp_path, path=installed)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "runs/quickstart/summary.json").read_text())["step"] == 3


def test_its_command_is_on_the_path(installed: Path, tmp_path: Path) -> None:
    environ = os.environ | {"PYTHONPATH": str(installed)}
    for words, code, start in (["--help"], 0, "usage: distrib COMMAND"), (["benhc"], 2, "error: there is no command"):
        done = subprocess.run(
            [installed / "bin/distrib", *words], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == code
        assert (done.stdout + done.stderr).startswith(start)
