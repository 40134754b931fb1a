"""distrib.checkpoint and distrib.folder: what is written is whole, damage is noticed, and nothing old is lost."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from torch import nn

from distrib import checkpoint
from distrib.checkpoint import Checkpointer, commit, load, newest_valid, path_for, steps_in, verify
from distrib.config import Config, UserError
from distrib.folder import PARTS, check_resumable

State = dict[str, Any]
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def make_state(seed: int = 0, width: int = 4) -> State:
    """A bit of everything that a checkpoint holds."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(4 * width, 2))
    model.to(memory_format=torch.channels_last)
    model(torch.randn(2, 3, 4, 4)).sum().backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.step()
    return {
        "progress": {"step": seed, "best_step": None, "best_top1": -1.0, "wandb_id": "ab", "result": {"top1": 12.5}},
        "config": {"data": {"mean": [1.0, 2.0]}, "trace": False},
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "statistics": torch.randn(2, 5, dtype=torch.float64),
        "scaler": {},
    }


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert type(a) is type(b)
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert type(a) is type(b)
        assert a == b


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def checkpointer(tmp_path: Path, notes: list[str]) -> Iterator[Checkpointer]:
    made = Checkpointer(tmp_path, keep=3, notify=notes.append)
    yield made
    made.wait()


# Links


def test_last_and_best_are_links_to_what_is_there(tmp_path: Path, notes: list[str]) -> None:
    made = Checkpointer(tmp_path, keep=1, notify=notes.append)
    for step, best in ((1, None), (2, 2), (3, 2), (4, 2), (5, 5)):
        made.save(make_state(step), step, best)
        made.wait()
        assert (tmp_path / "last.pt").readlink() == Path(f"step_{step:08d}.pt")
        assert_same(load(tmp_path / "last.pt"), make_state(step))
        if best is not None:
            assert_same(load(tmp_path / "best.pt"), make_state(best))
    assert sorted(files(tmp_path)) == ["best.pt", "last.pt", "step_00000005.pt"]
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert_same(load(moved / "best.pt"), make_state(5))
    assert notes == []


def test_a_disk_without_links_only_has_none(tmp_path: Path, notes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "symlink_to", lambda *args: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    made = Checkpointer(tmp_path, keep=1, notify=notes.append)
    made.save(make_state(1), 1, 1)
    assert made.wait() == 1
    assert (sorted(files(tmp_path)), notes) == (["step_00000001.pt"], [])


# Round trip


def test_what_is_saved_is_loaded(checkpointer: Checkpointer, tmp_path: Path, notes: list[str]) -> None:
    state = make_state(7)
    checkpointer.save(state, step=7, best=None)
    assert checkpointer.wait() == 7
    assert {path.name for path in tmp_path.iterdir()} == {"step_00000007.pt", "last.pt"}
    path = newest_valid(tmp_path, notes.append)
    assert path == path_for(tmp_path, 7)
    assert_same(load(path), state)
    assert load(path)["model"]["0.weight"].is_contiguous(memory_format=torch.channels_last)
    assert notes == []


def test_torch_alone_reads_it(tmp_path: Path) -> None:
    commit(make_state(), tmp_path / "a.pt")
    assert_same(torch.load(tmp_path / "a.pt", weights_only=True), make_state())
    assert_same(torch.load(tmp_path / "a.pt", weights_only=True, mmap=True), make_state())


def test_a_large_one_verifies(tmp_path: Path) -> None:
    commit({"x": torch.randn(700_000)}, tmp_path / "a.pt")  # more than the part that is read at once
    assert verify(tmp_path / "a.pt") is None
    with (tmp_path / "a.pt").open("r+b") as file:
        file.seek(2_000_000)
        file.write(b"other")
    assert verify(tmp_path / "a.pt") is not None


def test_no_folder_and_an_empty_one_have_no_checkpoint(tmp_path: Path, notes: list[str]) -> None:
    assert newest_valid(tmp_path, notes.append) is None
    assert newest_valid(tmp_path / "missing", notes.append) is None
    assert notes == []


def test_only_its_own_names_count(tmp_path: Path) -> None:
    for name in ("step_00000005.pt.partial", "step_5.pt", "best.pt", ".probe.partial", "step_00000009.pt.new"):
        (tmp_path / name).write_bytes(b"")
    commit({}, path_for(tmp_path, 3))
    commit({}, path_for(tmp_path, 123_456_789))
    assert steps_in(tmp_path) == [123_456_789, 3]


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_loading_what_is_no_checkpoint(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"cannot load checkpoint .*a\.pt: "):
        load(tmp_path / "a.pt")
    with pytest.raises(UserError, match="No such file"):
        load(tmp_path / "b.pt")


def test_loading_runs_no_code(tmp_path: Path) -> None:
    torch.save({"config": Namespace(a=1)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="cannot load checkpoint") as caught:
        load(tmp_path / "a.pt")
    assert len(str(caught.value).splitlines()) == 1


# The copy


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Writing begins when it is set."""
    opened = threading.Event()

    def wait_and_commit(*args: Any) -> None:
        assert opened.wait(30)
        commit(*args)

    monkeypatch.setattr(checkpoint, "commit", wait_and_commit)
    yield opened
    opened.set()


def test_later_changes_do_not_show(checkpointer: Checkpointer, tmp_path: Path, gate: threading.Event) -> None:
    state = make_state(1)
    checkpointer.save(state, step=1, best=None)
    with torch.no_grad():
        for tensor in (*state["model"].values(), state["statistics"]):
            tensor.zero_()
        for moments in state["optimizer"]["state"].values():
            moments["momentum_buffer"].fill_(9)
    state["progress"]["step"] = 99
    state["optimizer"]["param_groups"][0]["lr"] = 99.0
    state["config"]["data"]["mean"].append(3.0)
    gate.set()
    assert checkpointer.wait() == 1
    assert_same(load(path_for(tmp_path, 1)), make_state(1))


def test_the_last_save_waits_for_the_one_before(
    checkpointer: Checkpointer, tmp_path: Path, gate: threading.Event
) -> None:
    checkpointer.save(make_state(1), step=1, best=None)
    threading.Timer(0.1, gate.set).start()
    checkpointer.save(make_state(2), step=2, best=None, last=True)
    assert path_for(tmp_path, 1).exists()
    assert checkpointer.wait() == 2


# Failing saves


def save_half_then_fail(error: Exception) -> Callable[[Any, BinaryIO], None]:
    def save(state: Any, file: BinaryIO) -> None:
        file.write(b"PK\x03\x04" + bytes(1000))
        raise error

    return save


def fail(error: Exception) -> Callable[..., None]:
    def call(*args: Any) -> None:
        raise error

    return call


@pytest.mark.parametrize(
    ("where", "what", "reason"),
    [
        ((torch, "save"), save_half_then_fail(FULL), "No space left on device"),
        ((torch, "save"), save_half_then_fail(RuntimeError("[enforce fail] . file write\nat x")), "[enforce fail] ."),
        ((checkpoint._Summed, "_put"), fail(FULL), "No space left on device"),
        ((os, "replace"), fail(FULL), "No space left on device"),
        ((os, "fsync"), fail(OSError(errno.EIO, "Input/output error")), "Input/output error"),
    ],
)
def test_a_failing_save_is_told_and_harms_nothing(
    checkpointer: Checkpointer,
    tmp_path: Path,
    notes: list[str],
    monkeypatch: pytest.MonkeyPatch,
    where: tuple[Any, str],
    what: Callable[..., None],
    reason: str,
) -> None:
    for step in (1, 2, 3):
        checkpointer.save(make_state(step), step, best=None)
        assert checkpointer.wait() == step
    before = files(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(*where, what)
        checkpointer.save(make_state(4), 4, best=None)
        assert checkpointer.wait() == 3
    assert files(tmp_path) == before
    (note,) = notes
    assert len(note.splitlines()) == 1
    assert str(path_for(tmp_path, 4)) in note
    assert reason in note

    checkpointer.save(make_state(5), 5, best=None)  # the run goes on
    assert checkpointer.wait() == 5
    assert steps_in(tmp_path) == [5, 3, 2]
    assert len(notes) == 1


def test_the_first_save_fails(checkpointer: Checkpointer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "save", fail(FULL))
    checkpointer.save(make_state(), 1, best=None)
    assert checkpointer.wait() is None
    assert files(tmp_path) == {}


def test_the_kernel_refuses_to_write_more(checkpointer: Checkpointer, tmp_path: Path, notes: list[str]) -> None:
    """A real failure in the middle of torch's own writing: files may not grow beyond a limit."""
    checkpointer.save(make_state(1), 1, best=None)
    assert checkpointer.wait() == 1
    before = files(tmp_path)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
        checkpointer.save({"x": torch.randn(1_000_000)}, 2, best=None)
        assert checkpointer.wait() == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert files(tmp_path) == before
    assert len(notes) == 1
    assert "was not saved: File too large" in notes[0]  # the disk's word, not torch's "unexpected pos"


@pytest.mark.parametrize("folder", ["file/checkpoints", "file"])
def test_a_folder_that_cannot_be_written(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"cannot write checkpoints to .*: set run\.dir"):
        Checkpointer(tmp_path / folder, keep=1, notify=fail(AssertionError()))
    assert files(tmp_path) == {"file": b"mine"}


def test_a_full_disk_is_noticed_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", fail(FULL))
    with pytest.raises(UserError, match="No space left on device"):
        Checkpointer(tmp_path / "new", keep=1, notify=fail(AssertionError()))
    assert not (tmp_path / "new").exists()


def test_a_disk_without_room_for_a_checkpoint_is_noticed_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has room for \d+ MB, and one checkpoint takes about \d+ MB: make room"):
        Checkpointer(tmp_path / "new", keep=1, notify=fail(AssertionError()), needed=1 << 62)
    assert not (tmp_path / "new").exists()


def test_leftovers_of_a_killed_save_are_removed(tmp_path: Path) -> None:
    (tmp_path / "step_00000004.pt.partial").write_bytes(b"half")
    (tmp_path / "notes.txt").write_bytes(b"mine")
    commit({}, path_for(tmp_path, 3))
    Checkpointer(tmp_path, keep=1, notify=fail(AssertionError()))
    assert sorted(files(tmp_path)) == ["notes.txt", "step_00000003.pt"]


# Damage


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "a.pt"
    commit(make_state(), path)
    assert verify(path) is None
    return path.read_bytes()


def assert_noticed(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    if verify(path) is None:
        assert_same(load(path), make_state())


def test_a_flipped_bit_anywhere_is_noticed_or_harmless(good: bytes, tmp_path: Path) -> None:
    draw = random.Random(0)
    for position in range(len(good)):
        damaged = bytearray(good)
        damaged[position] ^= 1 << draw.randrange(8)
        assert_noticed(tmp_path / "a.pt", bytes(damaged))


def test_other_bytes_anywhere_are_noticed_or_harmless(good: bytes, tmp_path: Path) -> None:
    draw = random.Random(0)
    for _ in range(300):
        start, length = draw.randrange(len(good)), draw.choice([2, 8, 64, 512])
        noise = bytes(length) if draw.random() < 0.5 else draw.randbytes(length)
        assert_noticed(tmp_path / "a.pt", (good[:start] + noise + good[start + length :])[: len(good)])


def test_a_file_cut_short_anywhere_is_noticed(good: bytes, tmp_path: Path) -> None:
    for length in {*range(0, len(good), 7), *range(len(good) - 100, len(good))}:
        (tmp_path / "a.pt").write_bytes(good[:length])
        assert verify(tmp_path / "a.pt") is not None, length


@pytest.mark.parametrize("content", [b"", bytes(4096), b"x"])
def test_files_of_a_power_cut_are_noticed(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    assert verify(tmp_path / "a.pt") is not None


def test_a_file_that_cannot_be_read_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step_00000001.pt").mkdir()
    assert verify(tmp_path / "step_00000001.pt") == "Is a directory"
    assert verify(tmp_path / "step_00000002.pt") == "No such file or directory"


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE])
@pytest.mark.parametrize("what", ["verify", "steps_in"])
def test_a_checkpoint_that_cannot_be_read_now_is_not_passed_over(
    tmp_path: Path, notes: list[str], monkeypatch: pytest.MonkeyPatch, what: str, number: int
) -> None:
    """To go on from an older one would lose what it holds."""
    for step in (1, 2):
        commit(make_state(step), path_for(tmp_path, step))

    def away(path: Path) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(checkpoint, what, away)
    monkeypatch.setattr("distrib.layout.folders.time.sleep", lambda seconds: None)
    with pytest.raises(UserError, match=rf"cannot read .*: {os.strerror(number)}: start again when it can be read"):
        newest_valid(tmp_path, notes.append)
    monkeypatch.undo()
    assert newest_valid(tmp_path, notes.append) == path_for(tmp_path, 2)
    assert notes == []


def test_a_folder_that_is_lost_during_a_save_gets_no_checkpoint(tmp_path: Path, notes: list[str]) -> None:
    """The save takes long enough for a successor to take over: nothing is committed, nothing older is deleted."""
    ours = [True]

    def owned() -> bool:
        return ours[0]

    checkpointer = Checkpointer(tmp_path, 1, notes.append, "me", owned)
    checkpointer.save(make_state(1), 1, best=None)
    assert checkpointer.wait() == 1
    write = torch.save

    def slow(*args: Any) -> None:
        write(*args)
        ours[0] = False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", slow)
        checkpointer.save(make_state(2), 2, best=None)
        assert checkpointer.wait() == 1
    assert sorted(files(tmp_path)) == ["last.pt", "step_00000001.pt"]
    assert "could not be shown to be this run's" in notes[0]


def test_the_newest_whole_one_is_taken_and_the_others_are_named(tmp_path: Path, notes: list[str]) -> None:
    for step in (1, 2, 3, 4):
        commit(make_state(step), path_for(tmp_path, step))
    whole = path_for(tmp_path, 3).read_bytes()
    path_for(tmp_path, 3).write_bytes(whole[:-100])
    path_for(tmp_path, 4).write_bytes(b"")
    assert newest_valid(tmp_path, notes.append) == path_for(tmp_path, 2)
    assert [str(path_for(tmp_path, step)) in note for step, note in zip((4, 3), notes, strict=True)] == [True, True]
    assert all("passed over" in note for note in notes)
    assert steps_in(tmp_path) == [4, 3, 2, 1]  # nothing is deleted: somebody may want to look

    path_for(tmp_path, 2).write_bytes(b"")
    path_for(tmp_path, 1).write_bytes(b"")
    assert newest_valid(tmp_path, notes.append) is None


# Retention


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (3, None, [60, 50, 40]),
        (3, 20, [60, 50, 40, 20]),
        (3, 50, [60, 50, 40]),
        (3, 60, [60, 50, 40]),
        (1, None, [60]),
        (1, 10, [60, 10]),
        (9, None, [60, 50, 40, 30, 20, 10]),
    ],
)
def test_the_last_ones_and_the_best_are_kept(tmp_path: Path, keep: int, best: int | None, left: list[int]) -> None:
    checkpointer = Checkpointer(tmp_path, keep, notify=fail(AssertionError()))
    for step in (10, 20, 30, 40, 50, 60):
        checkpointer.save({"step": step}, step, best if best is not None and best <= step else None, last=True)
    checkpointer.wait()
    assert steps_in(tmp_path) == left


def test_the_best_of_before_goes_when_there_is_a_better_one(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=2, notify=fail(AssertionError()))
    for step, best in ((1, 1), (2, 1), (3, 1), (4, 4), (5, 4), (6, 4), (7, 4)):
        checkpointer.save({}, step, best, last=True)
    checkpointer.wait()
    assert steps_in(tmp_path) == [7, 6, 4]


def test_the_one_to_go_back_to_stays_where_a_later_good_one_was_passed_over(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=1, notify=fail(AssertionError()))
    for step, good in ((1, 1), (2, 2), (4, 3), (5, 3), (6, 6)):  # the save of step 3 was passed over
        checkpointer.save({}, step, None, good=good)
        checkpointer.wait()
        assert steps_in(tmp_path) == {1: [1], 2: [2], 4: [4, 2], 5: [5, 2], 6: [6]}[step]


def test_another_start_counts_what_is_there(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        commit({}, path_for(tmp_path, step))
    checkpointer = Checkpointer(tmp_path, keep=2, notify=fail(AssertionError()))
    assert steps_in(tmp_path) == [3, 2, 1]
    checkpointer.save({}, 4, best=1)
    checkpointer.wait()
    assert steps_in(tmp_path) == [4, 3, 1]


# What may be continued


def config(**changes: Any) -> Config:
    values = Config().model_dump(mode="json")
    for dotted, value in changes.items():
        inner = values
        *parts, key = dotted.split("__")
        for part in parts:
            inner = inner[part]
        inner[key] = value
    return Config.model_validate(values)


def check(new: Config, data: str = "images") -> list[str]:
    notes: list[str] = []
    saved = dict.fromkeys(PARTS) | {"config": Config().model_dump(mode="json"), "data": "images"}
    check_resumable(saved, new, data, Path("runs/a/checkpoints/step_00000001.pt"), notes.append)
    return notes


def test_the_same_again_says_nothing() -> None:
    assert check(config()) == []


@pytest.mark.parametrize(
    ("key", "value", "old"),
    [
        ("model.name", "resnet18", "resnet50"),
        ("model.num_classes", 10, "auto"),
        ("model.plain", True, False),
        ("model.stem", "small", None),
        ("run.seed", 1, 0),
        ("train.global_batch", 512, 1024),
        ("data.size", 160, 224),
    ],
)
def test_another_run_is_refused(key: str, value: Any, old: Any) -> None:
    with pytest.raises(UserError) as caught:
        check(config(**{key.replace(".", "__"): value}))
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for part in (key, str(value), str(old), "step_00000001.pt", "choose another run.name"):
        assert part in message


def test_other_images_are_refused() -> None:
    with pytest.raises(UserError, match=r"images under data\.root are not those .*step_00000001\.pt"):
        check(config(), data="others")


def test_other_changes_are_told() -> None:
    (note,) = check(config(optim__lr=0.5, train__epochs=100.0, data__root="/elsewhere", ema={"decay": 0.9, "every": 1}))
    assert note.startswith("changed since step_00000001.pt: ")
    for part in ("optim.lr 0.4 → 0.5", "train.epochs 90.0 → 100.0", "data.root ${IMAGENET_DIR} → /elsewhere"):
        assert part in note
    assert "ema.decay null → 0.9" in note


def test_the_folder_and_the_log_are_nobodys_business() -> None:
    assert check(config(run__name="moved", run__dir="elsewhere", log__every_steps=7)) == []
