"""distrib.mirror: a second place for checkpoints, in a folder, in fsspec's memory, and on an S3 of this machine."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import pytest
import runs
import torch

from distrib.checkpoint import Checkpointer, commit, path_for, steps_in, verify
from distrib.config import CheckpointConfig, Config, OptimConfig, RunConfig, UserError
from distrib.mirror import CURRENT, Mirror, newest_of_both, run_of, settings_sum
from distrib.store import FolderStore, Store, open_store

SYNTHETIC = ["data.loader=synthetic", "data.synthetic.train=5000", "data.synthetic.val=50", "run.name=mirrored"]
KINDS = ["folder", "memory", "s3"]
ID, OTHER = "0a1b2c3d", "ffffffff"


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The URL of an empty bucket of a server on this machine."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    patch = pytest.MonkeyPatch()
    patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        patch.setenv(name, "testing")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    fsspec.filesystem("s3").mkdir("bucket")
    yield "s3://bucket"
    patch.undo()
    server.stop()


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    name = tmp_path.name
    if request.param == "s3":
        return f"{request.getfixturevalue('s3')}/{name}"
    return str(tmp_path / "mirror") if request.param == "folder" else f"memory://{name}"


def config(url: str, **other: Any) -> Config:
    values = {"run": RunConfig(name="a"), "checkpoint": CheckpointConfig(mirror=url, keep=2)}
    return Config(**{**values, **other})


def a_state(step: int, run: str = ID) -> dict[str, Any]:
    torch.manual_seed(step)
    return {"progress": {"step": step, "wandb_id": run}, "model": {"w": torch.randn(3000)}}


@dataclass
class Begun:
    """A start of a run: its folder, its mirror and what they said."""

    url: str
    folder: Path
    run: str = ID
    config: Config | None = None
    job: str | None = None
    fresh: bool = False
    best: int | None = None
    notes: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        store = open_store(self.url)
        assert store is not None
        self.store: Store = store
        self.mirror = Mirror(store, self.config or config(self.url), self.notes.append, self.said.append)
        self.found = None if self.fresh else newest_of_both(self.mirror, self.folder, self.notes.append)
        self.checkpointer = Checkpointer(self.folder, 2, self.notes.append, "me", second=self.mirror)
        self.mirror.begin(self.run, self.job, self.folder, self.best)
        self.mirror.wait()

    def save(self, *steps: int, best: int | None = None) -> None:
        for step in steps:
            self.checkpointer.save(a_state(step, self.run), step, best)
            self.checkpointer.close()

    @property
    def home(self) -> str:
        return f"a/{settings_sum(self.config or config(self.url))}"

    def mirrored(self, run: str = ID) -> list[str]:
        return self.store.names(f"{self.home}/{run}")


def names(*steps: int) -> list[str]:
    return [path_for(Path(), step).name for step in steps]


def damage(begun: Begun, step: int, content: bytes) -> None:
    """What the mirror holds of ``step`` becomes ``content``."""
    begun.store._fs.pipe_file(begun.store._at(f"{begun.home}/{ID}/{names(step)[0]}"), content)


# What is where


def test_each_save_is_copied_and_as_many_are_kept_as_here(url: str, tmp_path: Path) -> None:
    begun = Begun(url, tmp_path / "run")
    begun.save(1, 2, best=1)
    begun.save(3, 4, best=1)
    assert begun.mirrored() == names(1, 3, 4)
    assert steps_in(begun.folder) == [4, 3, 1]
    assert (begun.notes, begun.said) == ([], [])
    for name in names(1, 3, 4):
        begun.store.get(f"{begun.home}/{ID}/{name}", tmp_path / name)
        assert (tmp_path / name).read_bytes() == (begun.folder / name).read_bytes()


def test_a_folder_that_is_lost_comes_back_with_the_best(url: str, tmp_path: Path) -> None:
    begun = Begun(url, tmp_path / "run")
    begun.save(1, 2, 3, best=1)
    shutil.rmtree(begun.folder)
    again = Begun(url, begun.folder, best=1)
    assert again.found == path_for(begun.folder, 3)
    assert run_of(again.found) == ID
    assert [verify(path_for(begun.folder, step)) for step in (1, 3)] == [None, None]
    (line,) = again.said
    assert f"{names(3)[0]} to {begun.folder}" in line
    assert again.notes == []
    again.save(4, best=1)
    assert again.mirrored() == names(1, 3, 4)
    assert not list(begun.folder.glob("*.partial"))


def test_the_newest_of_both_places_is_taken(url: str, tmp_path: Path) -> None:
    begun = Begun(url, tmp_path / "run")
    begun.save(1, 2)
    path_for(begun.folder, 2).unlink()
    assert Begun(url, begun.folder).found == path_for(begun.folder, 2)
    commit(a_state(3), path_for(begun.folder, 3))
    last = Begun(url, begun.folder)
    assert (last.found, last.said) == (path_for(begun.folder, 3), [])
    assert last.mirrored() == names(2, 3)  # what the mirror lacked

    path_for(begun.folder, 3).write_bytes(b"half")
    mended = Begun(url, begun.folder)
    assert mended.found == path_for(begun.folder, 3)
    assert verify(mended.found) is None
    assert "damaged and passed over" in mended.notes[0]


@pytest.mark.parametrize("content", [b"", bytes(9000), b"cut"])
def test_what_is_damaged_in_the_mirror_is_passed_over(url: str, tmp_path: Path, content: bytes) -> None:
    begun = Begun(url, tmp_path / "run")
    begun.save(1, 2)
    damage(begun, 2, content)
    shutil.rmtree(begun.folder)
    again = Begun(url, begun.folder)
    assert again.found == path_for(begun.folder, 1)
    (note,) = again.notes
    assert f"{names(2)[0]} is damaged and passed over" in note
    assert steps_in(begun.folder) == [1]
    assert not list(begun.folder.glob("*.partial"))


# Whose they are


def test_another_runs_checkpoints_are_never_taken(url: str, tmp_path: Path) -> None:
    """Of other settings, begun anew, and of a folder that has checkpoints of its own."""
    Begun(url, tmp_path / "run").save(5, 6)
    settings = config(url, optim=OptimConfig(lr=0.1))
    other = Begun(url, tmp_path / "other", OTHER, settings)
    assert other.found is None
    assert "holds checkpoints of other settings only" in other.said[0]
    other.save(1)

    fresh = Begun(url, tmp_path / "fresh", OTHER, fresh=True)
    fresh.save(1)
    assert (fresh.mirrored(), fresh.mirrored(OTHER)) == (names(5, 6), names(1))
    shutil.rmtree(fresh.folder)
    assert Begun(url, fresh.folder).found == path_for(fresh.folder, 1)  # the newest run's, not the newest step
    assert run_of(path_for(fresh.folder, 1)) == OTHER

    mine = tmp_path / "mine"
    mine.mkdir()
    commit(a_state(2, "mine"), path_for(mine, 2))
    assert Begun(url, mine, "mine").found == path_for(mine, 2)


def test_a_run_that_is_begun_anew_with_the_same_id_has_a_folder_of_its_own(tmp_path: Path) -> None:
    """As with WANDB_RUN_ID set."""
    url = str(tmp_path / "mirror")
    first = Begun(url, tmp_path / "run")
    first.save(5)
    fresh = Begun(url, tmp_path / "fresh", fresh=True)
    fresh.save(1)
    assert (first.mirrored(), first.mirrored(f"{ID}.2")) == (names(5), names(1))
    again = Begun(url, fresh.folder)
    assert again.found == path_for(fresh.folder, 1)


def test_a_job_that_began_anew_goes_on_after_its_folder_is_lost(tmp_path: Path) -> None:
    begun = Begun(str(tmp_path / "mirror"), tmp_path / "run", fresh=True, job="job 7")
    store = open_store(begun.url)
    assert store is not None
    mirror = Mirror(store, config(begun.url), pytest.fail)
    assert [mirror.is_begun_by(job) for job in ("job 7", "job 8", None)] == [True, False, False]


def test_settings_that_decide_make_another_sum() -> None:
    base = settings_sum(config("here"))
    same = [config("there"), config("here", run=RunConfig(name="b", dir="elsewhere")), config("here", trace=True)]
    assert {settings_sum(each) for each in same} == {base}
    others = [config("here", optim=OptimConfig(lr=0.1)), config("here", run=RunConfig(name="a", seed=1))]
    assert base not in {settings_sum(each) for each in others}


# Trouble


def failing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route")

    for name in ("put_file", "ls", "cat_file", "pipe_file", "info", "get_file"):
        monkeypatch.setattr(store._fs, name, away, raising=False)


def test_an_outage_is_told_once_and_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = Begun(f"memory://{tmp_path.name}", tmp_path / "run")
    begun.save(1)
    with monkeypatch.context() as patch:
        failing(begun.store, patch)
        begun.save(2, 3)
        (note,) = begun.notes
        assert "cannot copy checkpoints to memory://" in note
        assert "no route" in note
        # A start meanwhile: with checkpoints of its own it goes on, without any it does not begin anew in silence.
        notes: list[str] = []
        mirror = Mirror(begun.store, config(begun.url), notes.append)
        assert newest_of_both(mirror, begun.folder, notes.append) == path_for(begun.folder, 3)
        assert len(notes) == 1
        with pytest.raises(UserError, match=r"cannot read checkpoints from memory://.* set checkpoint\.mirror=null"):
            newest_of_both(mirror, tmp_path / "empty", notes.append)
    begun.save(4)
    assert begun.mirrored() == names(1, 4)
    assert "are copied to" in begun.notes[1]


@pytest.mark.skipif(os.getuid() != 0, reason="only root may mount a small disk")
def test_a_full_mirror_is_told_and_keeps_what_it_has(small_disk: Path, tmp_path: Path) -> None:
    begun = Begun(str(small_disk), tmp_path / "run")
    begun.save(1)
    (small_disk / "filler").write_bytes(bytes(36_000))
    begun.save(2)
    (note,) = begun.notes
    assert "No space left on device" in note
    assert begun.mirrored() == names(1)
    (small_disk / "filler").unlink()
    begun.save(3)
    assert begun.mirrored() == names(1, 3)


def test_what_arrives_otherwise_than_it_was_sent_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = Begun(str(tmp_path / "mirror"), tmp_path / "run")
    send = FolderStore._send

    def cut(self: FolderStore, file: Path, target: str) -> None:
        send(self, file, target)
        os.truncate(target, 100)

    monkeypatch.setattr(FolderStore, "_send", cut)
    begun.save(1)
    assert begun.mirrored() == []
    assert "100 bytes arrived of" in begun.notes[0]


def test_a_slow_mirror_gets_the_newest_and_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two saves while one is copied: the older of them is never sent, and what is being sent stays here so long."""
    begun = Begun(str(tmp_path / "mirror"), tmp_path / "run")
    entered, opened, sent = threading.Event(), threading.Event(), []
    send = FolderStore._send

    def slow(self: FolderStore, file: Path, target: str) -> None:
        sent.append(file.name)
        entered.set()
        assert opened.wait(60)
        send(self, file, target)

    monkeypatch.setattr(FolderStore, "_send", slow)
    for step in (1, 2, 3, 4):
        begun.checkpointer.save(a_state(step), step, None)
        assert begun.checkpointer.wait() == step
        assert entered.wait(60)
    assert steps_in(begun.folder) == [4, 3, 1]  # keep is 2
    opened.set()
    begun.checkpointer.close()
    assert sent == names(1, 4)
    assert begun.mirrored() == names(1, 4)
    assert begun.notes == []


def test_at_the_end_a_mirror_that_takes_nothing_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, opened = Begun(str(tmp_path / "mirror"), tmp_path / "run"), threading.Event()
    monkeypatch.setattr(FolderStore, "_send", lambda *args: opened.wait(60))
    monkeypatch.setattr("distrib.mirror.PATIENCE", 0.3)
    begun.save(1)
    opened.set()
    assert "takes nothing any more" in begun.notes[-1]


@pytest.mark.parametrize(
    ("place", "part"),
    [
        ("bogus://bucket/x", "Protocol not known: bogus"),
        ("sftp://host/x", "the package for sftp:// is not installed"),
        ("/proc/nowhere", "cannot be written: No such file or directory"),
        ("{tmp}/file", "cannot be written: "),
    ],
)
def test_a_place_that_is_none_is_told(tmp_path: Path, place: str, part: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError) as caught:
        open_store(place.format(tmp=tmp_path))
    assert part in str(caught.value)
    assert str(caught.value).startswith("checkpoint.mirror ")
    assert len(str(caught.value).splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.usefixtures("s3")
def test_a_bucket_that_is_not_there_is_told() -> None:
    with pytest.raises(UserError, match=r"checkpoint\.mirror s3://nowhere/x cannot be written: "):
        open_store("s3://nowhere/x")
    assert not fsspec.filesystem("s3", skip_instance_cache=True).exists("nowhere")


# The real train.py


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    runs.train(1, folder, *SYNTHETIC)
    return folder


def stopped_at(folder: Path, procs: int, *words: str) -> int:
    """The step at which a run is stopped; it has mirrored that."""
    process = runs.begin(procs, folder, *SYNTHETIC, *words)
    runs.wait_until(lambda: runs.steps_traced(folder) >= 25, process)
    process.send_signal(signal.SIGTERM)
    printed = runs.finish(process)
    assert set(runs.exit_codes(folder)) == {75}, printed
    return int(runs.newest_checkpoint(folder).stem[5:])


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_a_run_whose_folder_is_lost_ends_as_if_nothing_had_been(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, undisturbed: Path
) -> None:
    place = f"{request.getfixturevalue('s3')}/run" if kind == "s3" else str(tmp_path / "mirror")
    folder, mirror = tmp_path / "run", f"checkpoint.mirror={place}"
    step = stopped_at(folder, 1, mirror)
    shutil.rmtree(folder)
    printed = runs.train(1, folder, *SYNTHETIC, mirror)
    assert printed.count(f"copied {place}/mirrored/") == 1
    assert f"step {step} of 60" in printed
    assert runs.digest(folder) == runs.digest(undisturbed)
    if kind == "s3":
        return
    process = runs.begin(1, folder, *SYNTHETIC, mirror, "train.steps=61", "--fresh")
    printed = runs.finish(process)
    assert process.returncode == 0, printed
    assert "continuing" not in printed
    assert "copied" not in printed


def test_two_ranks_go_on_from_the_mirror(tmp_path: Path) -> None:
    folder, mirror = tmp_path / "run", f"checkpoint.mirror={tmp_path / 'mirror'}"
    step = stopped_at(folder, 2, mirror)
    shutil.rmtree(folder)
    printed = runs.train(2, folder, *SYNTHETIC, mirror)
    assert printed.count(f"copied {tmp_path}/mirror/mirrored/") == 1
    assert f"step {step} of 60" in printed
    (current,) = (tmp_path / "mirror").glob(f"mirrored/*/{CURRENT}")
    assert names(60)[0] in {path.name for path in current.parent.glob("*/step_*.pt")}


def test_a_wrong_place_is_exit_code_2_before_anything_is_written(tmp_path: Path) -> None:
    words = [*runs.SMALL, *SYNTHETIC, f"run.dir={tmp_path}/run", "checkpoint.mirror=bogus://x"]
    done = subprocess.run(
        [sys.executable, "train.py", *words], cwd=runs.ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: checkpoint.mirror bogus://x cannot be opened: ")
    assert list(tmp_path.iterdir()) == []
