"""Two writers, full disks, losses that are no numbers: nothing is mixed, nothing hidden. Through the real train.py."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import runs

from distrib.faults import DIVERGED

SYNTHETIC = ["data.loader=synthetic", "data.synthetic.train=5000", "data.synthetic.val=50", "log.every_steps=1"]
LONG = [*SYNTHETIC, "data.synthetic.train=5000000", "train.steps=100000", "schedule.warmup_epochs=0"]


def holder(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "writer.json").read_text())


def elsewhere(folder: Path, seconds_ago: float) -> None:
    """Makes the folder's holder a process of another machine that was last heard so long ago."""
    file = folder / "writer.json"
    file.write_text(
        json.dumps(holder(folder) | {"host": "node17", "machine": "another boot", "token": "0123456789abcdef"})
    )
    then = time.time() - seconds_ago
    os.utime(file, (then, then))


def steps_logged(folder: Path) -> list[int]:
    return [record["step"] for record in runs.records(folder, "train")]


def test_a_second_run_in_a_folder_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = runs.begin(1, folder, *LONG)
    runs.wait_until(lambda: runs.steps_traced(folder) >= 3, first)
    for procs in (1, 2):
        second = runs.begin(procs, folder, *LONG)
        printed = runs.finish(second)
        (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert f"{folder} is being written by process {first.pid} on {platform.node()}, since 20" in line
        assert "run.name" in line
        assert procs == 2 or second.returncode == 2
    assert set(runs.exit_codes(folder)) == {2}
    first.send_signal(signal.SIGTERM)
    printed = runs.finish(first)
    assert first.returncode == 75, printed
    steps = runs.steps_traced(folder)
    assert steps_logged(folder) == list(range(1, steps + 1))
    assert int(runs.newest_checkpoint(folder).stem[5:]) == steps
    assert not (folder / "writer.json").exists()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    runs.train(1, folder, *SYNTHETIC)
    return folder


@pytest.mark.parametrize("where", ["here", "elsewhere", "elsewhere and heard a moment ago"])
def test_a_killed_holders_folder_is_taken_over(tmp_path: Path, undisturbed: Path, where: str) -> None:
    folder = tmp_path / "run"
    process = runs.begin(1, folder, *SYNTHETIC)
    runs.wait_until(lambda: runs.steps_traced(folder) >= 13, process)
    runs.kill_group(process)
    assert holder(folder)["pid"] == process.pid
    if where != "here":
        elsewhere(folder, 10 if "moment" in where else 3600)
    printed = runs.train(1, folder, *SYNTHETIC)
    name = platform.node() if where == "here" else "node17"
    assert f"process {process.pid} on {name}, since 20" in printed
    assert "taking over" in printed
    assert ("looking whether it lives" in printed) == ("moment" in where)
    assert steps_logged(folder) == list(range(1, 61))
    assert runs.digest(folder) == runs.digest(undisturbed)


def contents(folder: Path) -> dict[Path, bytes]:
    """Of a run's files, but for those that each start has its own of: traces, and the watchdog's, which it removes."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.parent.name not in ("trace", "faults"))
    return {path: path.read_bytes() for path in files}


def test_a_holder_that_comes_back_after_it_was_replaced_writes_nothing_more(tmp_path: Path) -> None:
    """As on a node that was cut off while its job was queued again."""
    folder = tmp_path / "run"
    process = runs.begin(1, folder, *LONG, "checkpoint.every_steps=3")
    runs.wait_until(lambda: runs.steps_traced(folder) >= 3, process)
    process.send_signal(signal.SIGSTOP)
    elsewhere(folder, 0)
    before = contents(folder)
    process.send_signal(signal.SIGCONT)
    printed = runs.finish(process)
    assert process.returncode == 1, printed
    assert f"error: {folder} was taken over by process {process.pid} on node17" in printed
    assert "Traceback" not in printed
    after = contents(folder)
    # What was on its way to the disk when the process stood still: nobody can look and write in one.
    left = {path for path in after if path.name.endswith(".partial")}
    metrics = folder / "metrics.jsonl"
    more = after[metrics].removeprefix(before[metrics])
    assert after[metrics] == before[metrics] + more
    assert more.count(b"\n") <= 1
    after[metrics] = before[metrics]
    assert {path: after[path] for path in after if path not in left} == {
        path: content for path, content in before.items() if not path.name.endswith(".partial")
    }


def test_the_same_step_saved_by_two_writers_is_never_a_mixture(tmp_path: Path) -> None:
    import torch

    from distrib.checkpoint import commit, load, verify

    path = tmp_path / "step_00000001.pt"
    begun = [tmp_path / f"begun{k}" for k in range(2)]
    code = (
        "import sys, torch; from pathlib import Path; from distrib.checkpoint import commit\n"
        "k = int(sys.argv[1]); Path(sys.argv[3]).touch()\n"
        "while not Path(sys.argv[4]).exists(): pass\n"
        "for _ in range(40): commit({'x': torch.full((50_000,), float(k)), 'k': k}, Path(sys.argv[2]), f'writer{k}')"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(k), str(path), str(begun[k]), str(begun[1 - k])])
        for k in range(2)
    ]
    commit({"x": torch.zeros(50_000), "k": 0}, path)
    read = 0
    while any(writer.poll() is None for writer in writers):
        if verify(path) is None:
            saved, read = load(path), read + 1
            assert set(saved["x"].tolist()) == {float(saved["k"])}
    assert [writer.returncode for writer in writers] == [0, 0]
    assert read > 0
    assert os.listdir(tmp_path).count("step_00000001.pt") == 1
    assert not list(tmp_path.glob("*.partial"))


# Disks


@pytest.mark.skipif(os.getuid() != 0, reason="only root may mount a small disk")
@pytest.mark.parametrize(
    ("size", "filled", "part"),
    [
        ("256k", True, "No space left on device"),
        ("1m", False, "has room for 1 MB, and one checkpoint takes about 4 MB"),
    ],
)
def test_a_full_disk_at_the_start_is_told(tmp_path: Path, size: str, filled: bool, part: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = f"mount -t tmpfs -o size={size} none {disk} && mkdir {disk}/runs && {{ [ {int(filled)} = 0 ] || "
    command += f'dd if=/dev/zero of={disk}/filler bs=4k 2> {tmp_path}/dd; }}; "$0" "$@"; code=$?; '
    command += f"ls -A {disk} {disk}/runs > {tmp_path}/left; exit $code"
    words = runs.command(1, *runs.SMALL, *SYNTHETIC, f"run.dir={disk}/runs/a")
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", command, *words],
        cwd=runs.ROOT, capture_output=True, text=True, timeout=runs.TIMEOUT, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert part in line
    assert "run.dir" in line
    assert "Traceback" not in done.stdout
    left = (tmp_path / "left").read_text().split()
    assert [name for name in left if not name.endswith(":")] == ["filler"] * filled + ["runs"]


# Numbers that are none


def test_a_run_that_ends_without_a_number_fails(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = [*SYNTHETIC, "train.steps=12", "optim.lr=1e30", "schedule.warmup_epochs=0"]

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    for start in range(2):  # the second has nothing left to train, and its end is the same
        process = runs.begin(1, folder, *words)
        printed = runs.finish(process)
        assert process.returncode == 1, printed
        assert printed.count("warning: the loss is nan at step") == 1 - start
        assert printed.count("error: the run ends with a loss that is no number") == 1
        assert "Traceback" not in printed
        summary = json.loads((folder / "summary.json").read_text(), parse_constant=no_constant)
        assert summary["status"] == "diverged"
        assert runs.exit_codes(folder) == [DIVERGED] * (start + 1)
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            json.loads(line, parse_constant=no_constant)
