"""Disks that fail for a while, files that come and go, and loaders that end in time."""

from __future__ import annotations

import ast
import contextlib
import errno
import gc
import itertools
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from loading import DEPRECATED, IMAGES, LOADERS, Opened, corruptions, entries, files, needs_dali, reference, same

from distrib.config import DataConfig, UserError
from distrib.data import Batch, EvalPlan, Index, TrainPlan, ahead, fetch, waiting, workers
from distrib.data import files as files_module
from distrib.data.fetch import Bad
from distrib.data.files import DataUnavailable, Encoded, Outage, Retry, probe, read, read_all
from distrib.data.quarantine import Quarantine, find
from distrib.faults import Interrupted

pytestmark = [DEPRECATED, pytest.mark.usefixtures("one_thread")]

SHORT = Retry(first=0.01, longest=0.05, bound=0.1)


@pytest.fixture
def own(photographs: Path, small: DataConfig, tmp_path: Path) -> DataConfig:
    """The photographs in a folder that the test may change."""
    shutil.copytree(photographs / "444", tmp_path / "own")
    return small.model_copy(update={"root": str(tmp_path / "own")})


def stream(opened: Opened, split: str) -> Iterator[Batch]:
    if split == "train":
        return opened.loader.train(TrainPlan(IMAGES, 8, 3), 0, 16)
    return opened.loader.evaluate(EvalPlan(IMAGES, 8))


@contextlib.contextmanager
def away(folder: Path, seconds: float) -> Iterator[None]:
    """Takes a folder away and brings it back."""
    hidden = folder.with_name("away")
    folder.rename(hidden)
    timer = threading.Timer(seconds, hidden.rename, [folder])
    timer.start()
    yield
    timer.join()


# Outages.


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("kind", LOADERS)
def test_half_a_second_without_the_folder(own: DataConfig, tmp_path: Path, kind: str, split: str) -> None:
    undisturbed = list(stream(Opened(kind, own), split))
    opened = Opened(kind, own, bad=tmp_path / "bad.jsonl", workers=1)
    batches = stream(opened, split)
    first = next(batches)
    with away(opened.index.root.with_name(split), 0.5):
        assert same([first, *batches], undisturbed)
    assert opened.said == []
    assert not (tmp_path / "bad.jsonl").exists()


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("kind", LOADERS)
def test_an_outage_is_waited_for(
    own: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, split: str
) -> None:
    undisturbed = list(stream(Opened(kind, own), split))
    monkeypatch.setattr(files_module, "RETRY", SHORT)
    opened = Opened(kind, own, bad=tmp_path / "bad.jsonl", workers=1)
    batches = stream(opened, split)
    first = next(batches)
    root = opened.index.root.with_name(split)
    with away(root, 1.0):
        assert same([first, *batches], undisturbed)
    assert opened.said[0] == f"cannot read {root}: No such file or directory; waiting, up to 10 minutes"
    assert opened.said[1] == f"{root} can be read again; going on"
    assert not (tmp_path / "bad.jsonl").exists()


@pytest.mark.parametrize("minutes", [0, 0.005])
@pytest.mark.parametrize("kind", LOADERS)
def test_an_outage_that_lasts_ends_the_run(
    own: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, minutes: float
) -> None:
    monkeypatch.setattr(files_module, "RETRY", SHORT)
    cfg = own.model_copy(update={"wait_minutes": minutes})
    opened = Opened(kind, cfg, bad=tmp_path / "bad.jsonl", workers=1)
    opened.index.root.rename(tmp_path / "gone")
    with pytest.raises(DataUnavailable, match=r"own/train: No such file .* the same command continues") as caught:
        list(stream(opened, "train"))
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, UserError)
    assert len(opened.said) == (minutes > 0)
    assert not (tmp_path / "bad.jsonl").exists()


@pytest.mark.parametrize("kind", LOADERS)
def test_a_request_to_stop_ends_the_wait(
    own: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(files_module, "RETRY", SHORT)
    stopping = threading.Event()
    opened = Opened(kind, own, workers=1, stop=stopping.is_set)
    opened.index.root.rename(tmp_path / "gone")
    timer = threading.Timer(0.5, stopping.set)
    timer.start()
    with pytest.raises(Interrupted):
        list(stream(opened, "train"))
    timer.join()


@pytest.mark.parametrize("kind", LOADERS)
def test_a_read_that_hangs_is_told_and_ends_with_a_request(
    own: DataConfig, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A dead network disk neither answers nor fails. Nobody who hangs in it keeps the process from going on."""
    hangs = os.fsencode(files(Path(own.root))[40])
    monkeypatch.setattr(files_module, "read", lambda path: time.sleep(3600) if path == hangs else read(path))
    monkeypatch.setattr(waiting, "LONG", 0.1)
    monkeypatch.setattr(waiting, "ALONE", 0.1)
    monkeypatch.setattr(waiting, "LOOK", 0.05)
    monkeypatch.setattr(workers, "GRACE", 0.1)
    opened = Opened(kind, own, workers=1, stop=lambda: len(opened.said) > 0)
    with pytest.raises(Interrupted):
        list(stream(opened, "train"))
    assert "reading" in opened.said[0]
    gc.collect()
    deadline = time.monotonic() + 20
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("kind", LOADERS)
def test_a_request_to_stop_cuts_no_short_wait(own: DataConfig, kind: str) -> None:
    """It is the loop's to heed, which saves."""
    opened = Opened(kind, own, workers=1, stop=lambda: True)
    assert len(list(stream(opened, "val"))) == 8


def test_too_many_open_files_is_no_files_fault(own: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    index = Opened("torchvision", own).index
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) // 4, hard))
    try:
        with pytest.raises(Outage, match="Too many open files"):
            list(read_all(index, {0: 3}, SHORT))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_probe_weighs_half_of_the_others(own: DataConfig) -> None:
    index = Opened("torchvision", own).index
    assert probe(index) is None
    names = files(index.root.parent)
    for name in names[: IMAGES // 3]:
        name.unlink()
    assert probe(index) is None
    for name in names[IMAGES // 3 : IMAGES * 2 // 3]:
        name.unlink()
    assert probe(index) == "No such file or directory"
    assert probe(index, set(range(IMAGES))) == ""  # nobody else to ask


def test_reading_waits_for_nothing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "sparse").touch()
    os.truncate(tmp_path / "sparse", 1 << 40)
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("fifo", "zero", "sparse", "."):
        assert read(os.fsencode(tmp_path / name)).problem, name
    (tmp_path / "file").write_bytes(b"abc")
    assert read(os.fsencode(tmp_path / "file"))[:2] == (b"abc", 3)
    with pytest.raises(FileNotFoundError):
        read(os.fsencode(tmp_path / "dangling"))


# Outages of a part of a split.

PARTS = 10


@pytest.fixture
def parted(photographs: Path, small: DataConfig, tmp_path: Path) -> DataConfig:
    """Ten classes of six photographs."""
    for split in ("train", "val"):
        for k, file in enumerate(files(photographs / "444", split)[: 6 * PARTS]):
            folder = tmp_path / "parted" / split / f"class{k // 6}"
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, folder)
    return small.model_copy(update={"root": str(tmp_path / "parted")})


@contextlib.contextmanager
def partly_away(root: Path, share: float, end: str, seconds: float = 0) -> Iterator[None]:
    """Takes the class folders at one end of a split away, for so long or for the block."""
    count = round(share * PARTS)
    folders = sorted(root.iterdir())[:count] if end == "first" else sorted(root.iterdir())[-count:]
    hidden = [root.parent / f"away{folder.name}" for folder in folders]

    def back() -> None:
        for there, here in zip(hidden, folders, strict=True):
            there.rename(here)

    for there, here in zip(hidden, folders, strict=True):
        here.rename(there)
    timer = threading.Timer(seconds, back)
    if seconds:
        timer.start()
    try:
        yield
    finally:
        timer.join() if seconds else back()


def parts(opened: Opened) -> Iterator[Batch]:
    return opened.loader.train(TrainPlan(6 * PARTS, 12, 3), 0, 5)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("end", ["first", "last"])
@pytest.mark.parametrize("kind", LOADERS)
def test_a_part_that_stays_away_ends_the_run(
    parted: DataConfig, monkeypatch: pytest.MonkeyPatch, kind: str, end: str, share: float
) -> None:
    """Less than half of a split is that many lost files; more is an outage, which has a bound."""
    monkeypatch.setattr(files_module, "RETRY", Retry(first=0.005, longest=0.01, bound=0.01))
    cfg = parted.model_copy(update={"wait_minutes": 0.01})
    opened = Opened(kind, cfg, classes=PARTS, workers=0, stop=lambda: False)
    lost = r"waited 0\.01 minutes" if share > 0.5 else "11 of 60 images"
    with partly_away(opened.index.root, share, end), pytest.raises(DataUnavailable, match=lost):
        list(parts(opened))
    outage = f"cannot read {opened.index.root}: No such file or directory; waiting, up to 0.01 minutes"
    assert opened.said.count(outage) == (share > 0.5)
    assert len(opened.said) == (1 if share > 0.5 else 11)


@pytest.mark.parametrize("share", [0.6, 0.9])
@pytest.mark.parametrize("end", ["first", "last"])
@pytest.mark.parametrize("kind", LOADERS)
def test_a_part_that_comes_back_leaves_no_trace(
    parted: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, end: str, share: float
) -> None:
    undisturbed = list(parts(Opened(kind, parted, classes=PARTS)))
    monkeypatch.setattr(files_module, "RETRY", Retry(first=0.005, longest=0.01, bound=0.01))
    opened = Opened(kind, parted, bad=tmp_path / "bad.jsonl", classes=PARTS, workers=0)
    root = opened.index.root
    with partly_away(root, share, end, seconds=0.4):
        assert same(list(parts(opened)), undisturbed)
    assert opened.said == [
        f"cannot read {root}: No such file or directory; waiting, up to 10 minutes",
        f"{root} can be read again; going on",
    ]
    assert not (tmp_path / "bad.jsonl").exists()


@pytest.mark.parametrize("kind", LOADERS)
def test_a_small_part_may_be_away_for_a_moment(parted: DataConfig, kind: str) -> None:
    undisturbed = list(parts(Opened(kind, parted, classes=PARTS)))
    opened = Opened(kind, parted, classes=PARTS, workers=0)
    with partly_away(opened.index.root, 0.3, "first", seconds=0.2):
        assert same(list(parts(opened)), undisturbed)
    assert opened.said == []


@pytest.mark.parametrize("end", ["first", "last"])
def test_a_probe_is_spread_whatever_is_apart(parted: DataConfig, end: str) -> None:
    index = Opened("torchvision", parted, classes=PARTS).index
    for share in (0.3, 0.7):
        with partly_away(index.root, share, end):
            gone = [k for k in range(6 * PARTS) if not index.path(k).exists()]
            for count in (0, 1, 5, 15):
                assert (probe(index, gone[:count]) is None) == (share < 0.5)


@pytest.mark.parametrize("kind", LOADERS)
def test_a_disk_that_only_seems_to_be_back_has_one_deadline(
    parted: DataConfig, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """It answers whenever it is looked at, and fails whenever it is needed."""
    monkeypatch.setattr(files_module, "RETRY", Retry(first=0.005, longest=0.01, bound=0.01))
    answers = itertools.cycle(["", None])
    monkeypatch.setattr(files_module, "lasts", lambda *_: next(answers))
    cfg = parted.model_copy(update={"wait_minutes": 0.01})
    opened = Opened(kind, cfg, classes=PARTS, workers=0)
    with partly_away(opened.index.root, 0.9, "first"), pytest.raises(DataUnavailable, match="waited"):
        list(parts(opened))
    assert len(opened.said) == 1  # nobody was told that it is back


def test_what_is_deleted_in_an_outage_is_lost_and_not_waited_for(
    parted: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = Opened("torchvision", parted, classes=PARTS).index
    with partly_away(index.root, 0.9, "first"):
        with pytest.raises(Outage, match="No such file") as caught:
            list(read_all(index, {0: 3, 1: 9, 2: 59}, SHORT))
        outage = pickle.loads(pickle.dumps(caught.value))  # as a worker sends it
        assert (str(outage), outage.samples) == ("No such file or directory", {3, 9})
        assert files_module.lasts(index, outage) == "No such file or directory"
        assert files_module.lasts(index, Outage("why", frozenset({59}))) is None  # what was wanted is there again
    index.path(9).unlink()
    assert files_module.lasts(index, outage) is None
    assert isinstance(dict(read_all(index, {0: 3, 1: 9}, SHORT))[1], OSError)


def test_no_class_is_more_than_python_3_10_allows() -> None:
    """There a NamedTuple has no other base."""
    sources = Path(files_module.__file__).parents[1].rglob("*.py")
    classes = [
        node for path in sources for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)
    ]
    bases = [[ast.unparse(base) for base in node.bases] for node in classes]
    assert sum("NamedTuple" in names for names in bases) > 5
    assert all(names == ["NamedTuple"] for names in bases if "NamedTuple" in names)


# Batches that are late.


class Late(ahead.Future):  # type: ignore[type-arg]
    """The call ends in the moment in which the wait for it does."""

    def result(self, timeout: float | None = None) -> object:
        result = super().result()
        if timeout is not None:
            raise TimeoutError
        return result


@needs_dali
def test_an_answer_at_the_last_moment_is_one(parted: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = list(parts(Opened("dali", parted, classes=PARTS)))
    monkeypatch.setattr(ahead, "Future", Late)
    assert same(list(parts(Opened("dali", parted, classes=PARTS))), undisturbed)


@needs_dali
def test_a_time_out_of_the_call_is_its_own(parted: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> None:
        raise TimeoutError("the call's own")

    monkeypatch.setattr(ahead, "_read", fails)
    with pytest.raises(Exception, match="the call's own"):
        list(parts(Opened("dali", parted, classes=PARTS)))


@pytest.mark.parametrize("kind", LOADERS)
def test_ranks_of_many_are_patient_with_a_late_batch(
    parted: DataConfig, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Where one leaves, the others cannot save."""
    late = os.fsencode(files(Path(parted.root))[7])
    monkeypatch.setattr(files_module, "read", lambda path: time.sleep(0.5 * (path == late)) or read(path))
    monkeypatch.setattr(waiting, "ALONE", 0.1)
    monkeypatch.setattr(waiting, "LOOK", 0.05)
    monkeypatch.setattr(workers, "TIME_OUT", 0.05)
    many = Opened(kind, parted, classes=PARTS, workers=1, ranks=2, stop=lambda: True)
    assert len(list(parts(many))) == 5
    alone = Opened(kind, parted, classes=PARTS, workers=1, stop=lambda: True)
    with pytest.raises(Interrupted):
        list(parts(alone))


def test_a_rank_of_many_leaves_an_outage_at_once(parted: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "RETRY", SHORT)
    opened = Opened("torchvision", parted, classes=PARTS, ranks=2, stop=lambda: True)
    with partly_away(opened.index.root, 0.9, "last"), pytest.raises(Interrupted):
        list(parts(opened))


# Single files that come, go and change.


@pytest.mark.parametrize("kind", LOADERS)
def test_one_deleted_file_is_lost_for_this_start(
    own: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(files_module, "RETRY", SHORT)
    path = tmp_path / "bad.jsonl"
    whole = Opened(kind, own).train(0, 4)
    opened = Opened(kind, own, bad=path, workers=1)
    file = opened.index.path(9)
    file.rename(tmp_path / "aside")
    batches = opened.train(0, 4)
    assert sorted(int(k) for batch in batches for k in batch.ids) == list(range(IMAGES))
    assert opened.said == [f"cannot read {file}: No such file or directory; replaced in this start"]
    (entry,) = entries(path, "train")
    assert (entry["file"], entry["kind"]) == (str(file.relative_to(opened.index.root)), "read")
    (tmp_path / "aside").rename(file)
    again = Opened(kind, own, bad=path)
    assert same(again.train(0, 4), whole)
    assert again.said == []


@pytest.mark.parametrize("kind", LOADERS)
def test_many_deleted_files_end_the_run(own: DataConfig, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(files_module, "RETRY", SHORT)
    opened = Opened(kind, own, workers=1)
    for file in files(Path(own.root))[:12]:
        file.unlink()
    with pytest.raises(
        DataUnavailable, match=r"11 of 64 images in .*own/train cannot be read .*the same command continues"
    ):
        opened.train(0, 4)


@pytest.mark.parametrize("kind", LOADERS)
def test_a_file_replaced_in_place(own: DataConfig, photographs: Path, kind: str) -> None:
    opened = Opened(kind, own)
    files(Path(own.root))[9].write_bytes(files(photographs / "420")[20].read_bytes())  # of another size
    for part, batch in zip(TrainPlan(IMAGES, 16, 3).stream(0, 4), opened.train(0, 4), strict=True):
        for position, sample, image in zip(part.positions, part.ids.tolist(), batch.images, strict=True):
            if sample == 9:
                expected = reference(opened.index, 9, own, 3, 0, position)
                assert (image.int() - expected.int()).abs().float().mean() < 0.5
    assert opened.said == []


@pytest.mark.parametrize("kind", LOADERS)
def test_a_file_mended_between_two_starts(own: DataConfig, tmp_path: Path, kind: str) -> None:
    path, file = tmp_path / "bad.jsonl", files(Path(own.root))[9]
    whole, good = Opened(kind, own).train(0, 4), file.read_bytes()
    file.write_bytes(corruptions()["truncated"])
    first = Opened(kind, own, bad=path)
    first.train(0, 4)
    assert len(first.said) == 1
    file.write_bytes(good)
    again = Opened(kind, own, bad=path)
    assert same(again.train(0, 4), whole)
    assert again.said == []


# What is remembered.


def test_the_quarantine_is_shared_by_ranks_and_bound_to_files(own: DataConfig, tmp_path: Path) -> None:
    index, path, said = Opened("torchvision", own).index, tmp_path / "bad.jsonl", list[str]()

    def verdict(sample: int) -> Bad:
        status = index.path(sample).stat()
        return Bad(sample, "decode", "why", status.st_size, status.st_mtime_ns)

    first, second = (Quarantine("train", index, path, said.append) for _ in range(2))
    first.add(verdict(3))
    second.add(verdict(3))
    second.add(Bad(5, "read", "Input/output error"))
    Quarantine("val", index, path, said.append).add(verdict(4))
    assert [first.known(), second.known()] == [{3}, {3, 5}]
    assert len(said) == 3
    with path.open("a") as lines:
        lines.write('{"split": "train", "i')  # torn by a kill
    first.add(verdict(7))
    assert Quarantine("train", index, path).known() == {3, 7}
    os.utime(index.path(3), (1, 1))
    index.path(7).unlink()
    said.clear()
    once: list[str] = []
    assert Quarantine("train", index, path, said.append, once.append).known() == set()
    assert said == []
    assert once == [f"{path}: 1 lines are not of this version's kind and are passed over"]


def test_a_list_that_somebody_edited(own: DataConfig, tmp_path: Path) -> None:
    index, path = Opened("torchvision", own).index, tmp_path / "bad.jsonl"
    status = index.path(3).stat()
    name = str(index.path(3).relative_to(index.root))
    good = {"split": "train", "file": name, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns,
            "kind": "decode", "reason": "why"}  # fmt: skip
    strange = [
        {"split": "train", "id": 3, "file": name, "reason": "of an earlier version"},
        {**good, "file": 3}, {**good, "bytes": "many"}, [], 7, None, {"split": ["train"]},
    ]  # fmt: skip
    unknown = [{**good, "file": name} for name in ("class0", "../../etc/passwd", "", "\0", "\ud800", "class9/x.jpg")]
    lines = [json.dumps(entry) for entry in (*strange, *unknown, good)] + ["", "no JSON", "\x80"]
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape") + b"\n\xff\xfe\n")
    said: list[str] = []
    assert Quarantine("train", index, path, said.append).known() == {3}
    assert said == [f"{path}: {len(strange) + 3 - 1} lines are not of this version's kind and are passed over"]


def test_a_name_that_is_no_text(own: DataConfig, tmp_path: Path) -> None:
    name = os.fsencode(Path(own.root)) + b"/train/class0/\xff\xfe.jpg"
    Path(os.fsdecode(name)).write_bytes(b"")
    opened = Opened("torchvision", own, bad=tmp_path / "bad.jsonl")
    opened.train(0, 4)
    (said,) = opened.said
    assert "class0/\\xff\\xfe.jpg: it is empty" in said
    said.encode()
    again = Quarantine("train", opened.index, tmp_path / "bad.jsonl")
    (sample,) = again.known()
    assert opened.index.encoded_path(sample) == name
    assert find(opened.index, "class0/\udcff\udcfe.jpg") == sample


@pytest.mark.parametrize("kind", LOADERS)
def test_a_name_cannot_forge_a_line(own: DataConfig, kind: str) -> None:
    (Path(own.root) / "train/class0/a\nb\x1b[2J.jpg").write_bytes(b"")
    opened = Opened(kind, own)
    opened.train(0, 4)
    (said,) = opened.said
    assert "class0/a\\nb\\x1b[2J.jpg: it is empty" in said


def test_a_disk_without_room_for_the_list(own: DataConfig, tmp_path: Path) -> None:
    index, said, path = Opened("torchvision", own).index, list[str](), tmp_path / "run" / "bad.jsonl"
    quarantine = Quarantine("train", index, path, said.append)
    for sample in (1, 2):
        quarantine.add(Bad(sample, "read", "why"))
    assert sum("cannot write" in line for line in said) == 1
    path.parent.mkdir()
    quarantine.add(Bad(3, "read", "why"))
    assert [row["file"] for row in entries(path, "train")] == [
        str(index.path(k).relative_to(index.root)) for k in (1, 2, 3)
    ]


# Processes and threads.


def test_a_killed_worker_is_an_error(own: DataConfig) -> None:
    batches = stream(Opened("torchvision", own, workers=1), "train")
    next(batches)
    for child in multiprocessing.active_children():
        os.kill(child.pid or 0, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"killed by signal|exited unexpectedly"):
        list(batches)


@pytest.mark.parametrize("kind", LOADERS)
def test_threads_and_processes_end_with_their_iterator(own: DataConfig, kind: str) -> None:
    before = threading.active_count()
    batches = stream(Opened(kind, own, workers=2), "train")
    next(batches)
    del batches
    gc.collect()
    deadline = time.monotonic() + 10
    while (threading.active_count() > before or multiprocessing.active_children()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert threading.active_count() <= before
    assert not multiprocessing.active_children()


SMALL_MEMORY = """
import sys, warnings
warnings.filterwarnings("ignore")
import torch
from distrib.config import DataConfig
from distrib.data import TrainPlan, build_loader, open_data
torch.set_num_threads(1)
cfg = DataConfig(root=sys.argv[1], loader="torchvision", size=224, workers=1, prefetch=2)
said, batches = [], {}
indexes = open_data(cfg, 4)
for workers in (1, 0):
    now = cfg.model_copy(update={"workers": workers})
    loader = build_loader(now, indexes, 4, torch.device("cpu"), None, said.append)
    batches[workers] = list(loader.train(TrainPlan(64, 64, 3), 0, 3))
assert len(batches[1]) == 3
for ours, theirs in zip(batches[1], batches[0]):
    assert torch.equal(ours.images, theirs.images) and torch.equal(ours.labels, theirs.labels)
    assert ours.images.is_contiguous(memory_format=torch.channels_last)
print(said)
"""


def test_dockers_small_shared_memory(own: DataConfig, repository: Path) -> None:
    """A batch of 9 MB, and 4 MB of /dev/shm."""
    alone = ["unshare", "--mount", "--map-root-user"] if os.getuid() else ["unshare", "--mount"]
    mount = "mount -t tmpfs -o size=4m tmpfs /dev/shm"
    if subprocess.run([*alone, "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("needs a mount namespace of its own, which this system does not give")
    done = subprocess.run(
        [*alone, "sh", "-c", f'{mount} && exec "$0" "$@"', sys.executable, "-c", SMALL_MEMORY, own.root],
        env=os.environ | {"PYTHONPATH": str(repository)}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("/dev/shm is full") == 1
    assert "--shm-size=1g" in done.stdout


def test_errors_of_the_system_are_told_in_its_words() -> None:
    error = OSError(errno.EIO, os.strerror(errno.EIO), "/a/file")
    assert files_module.first_line(error) == "Input/output error"
    assert files_module.first_line(ValueError("\n\n one\ntwo")) == "one"
    assert files_module.first_line(ValueError()) == "ValueError"


def test_a_folder_of_lost_files_costs_one_wait_and_ends_the_search(
    small: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each stand-in is the next lost file: they are not waited for one by one, nor all of them looked at."""
    index = Opened("torchvision", small).index
    lost = list(range(len(index) // 2, len(index)))
    waits: list[float] = []
    looked_at: list[int] = []
    read_one = files_module._try

    def try_one(index: Index, sample: int) -> Encoded | OSError:
        looked_at.append(sample)
        return OSError(errno.EIO, "Input/output error") if sample in lost else read_one(index, sample)

    monkeypatch.setattr(fetch, "FEW", 5)
    monkeypatch.setattr(files_module, "_try", try_one)
    monkeypatch.setattr(files_module, "probe", lambda *args: None)  # the other files are well
    monkeypatch.setattr(files_module, "RETRY", Retry(0.01, 0.01, 0.05))
    monkeypatch.setattr(files_module.time, "sleep", waits.append)
    times = itertools.count(0.0, 0.01)
    monkeypatch.setattr(files_module.time, "monotonic", lambda: next(times))
    found: list[Bad] = []
    assert fetch.Fetcher(index, ()).fetch({0: lost[0]}, found) == []
    assert [bad.sample for bad in found] == lost[:6]
    first = looked_at.count(lost[0])
    assert first > 1
    assert looked_at == [lost[0]] * first + lost[1:6]
    assert len(waits) == first - 1
