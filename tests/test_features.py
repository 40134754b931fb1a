"""``distrib features``: a stage's vectors, the same bits after a stop, and nothing but whole outputs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import runs
import torch
from PIL import Image

from distrib.config import ModelConfig, UserError
from distrib.engine.inference import Classifier
from distrib.faults import Failure, Interrupted
from distrib.models import build_model
from distrib.tools.features import __main__ as tool
from distrib.tools.features.work import Work, folder_of
from distrib.trained import begin_use, open_trained

COUNT = 50
SIZES = ["data.eval_size=32", "data.eval_resize=32", "data.loader=torchvision", "data.workers=0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifty pictures of the size that is looked at, and weights."""
    place, random = tmp_path_factory.mktemp("features"), np.random.default_rng(5)
    (place / "pictures").mkdir()
    for k in range(COUNT):
        Image.fromarray(random.integers(0, 256, (32, 32, 3)).astype(np.uint8)).save(place / f"pictures/{k:02d}.png")
    torch.manual_seed(2)
    config = {"model": {"name": "resnet20", "num_classes": 7}}
    state = build_model(ModelConfig(name="resnet20", num_classes=7)).state_dict()
    torch.save({"model": state, "config": config, "classes": list("abcdefg")}, place / "w.pt")
    torch.manual_seed(3)
    state = build_model(ModelConfig(name="resnet20", num_classes=7)).state_dict()
    torch.save({"model": state, "config": config, "classes": list("abcdefg")}, place / "other.pt")
    return place


class Stop:
    """Somebody who asks to stop when asked for the ``at``-th time."""

    received = "SIGTERM"

    def __init__(self, at: int | None = None) -> None:
        self.left = at

    def requested(self) -> bool:
        if self.left is not None:
            self.left -= 1
        return self.left is not None and self.left < 0


def extract(folder: Path, output: Path, *words: object, stop: Any = None, weights: str = "w.pt") -> None:
    given = [folder / "pictures", "--weights", folder / weights, "--output", output, *SIZES, *words]
    tool.extract(tool.parse(list(map(str, given))), stop or Stop())


def by_hand(folder: Path, stage: str, exact: bool, batch: int) -> np.ndarray[Any, Any]:
    classifier, _ = begin_use(open_trained(str(folder / "w.pt"), None, [], print), exact, lambda text: None)
    files = sorted((folder / "pictures").glob("*.png"))
    images = torch.from_numpy(np.stack([np.asarray(Image.open(file)) for file in files])).permute(0, 3, 1, 2)
    with torch.inference_mode():
        return torch.cat([classifier.features(part, stage) for part in images.split(batch)]).numpy()


@pytest.mark.parametrize(
    ("stage", "columns", "exact"), [(None, 64, True), ("layer2", 32, False), ("conv1", 16, True), ("fc", 7, False)]
)
def test_the_stages_vectors(folder: Path, tmp_path: Path, stage: str | None, columns: int, exact: bool) -> None:
    words = [*(["--stage", stage] if stage else []), *["--exact"] * exact]
    extract(folder, tmp_path / "f.npy", "--batch=16", *words)
    found = np.load(tmp_path / "f.npy")
    assert (found.shape, found.dtype) == ((COUNT, columns), np.float32)
    np.testing.assert_array_equal(found, by_hand(folder, stage or "layer3", exact, 16))
    names = (tmp_path / "f.txt").read_text().splitlines()
    assert names == [str(folder / "pictures" / f"{k:02d}.png") for k in range(COUNT)]
    assert sorted(os.listdir(tmp_path)) == ["f.npy", "f.txt"]


def test_parquet(folder: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "bad.png").write_bytes(b"rubbish")
    with pytest.raises(Failure, match=r"1 of 51 pictures could not be read: .* has the others"):
        extract(folder, tmp_path / "f.parquet", tmp_path / "bad.png", "--batch=16", "--exact")
    table = parquet.read_table(tmp_path / "f.parquet")
    assert str(table.schema.field("embedding").type) == "fixed_size_list<element: float>[64]"
    assert table["file"].to_pylist() == [str(folder / "pictures" / f"{k:02d}.png") for k in range(COUNT)]
    np.testing.assert_array_equal(
        np.array(table["embedding"].to_pylist(), np.float32)[:48], by_hand(folder, "layer3", True, 16)[:48]
    )
    about = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    assert (about["stage"], about["model"]) == ("layer3", "resnet20")
    assert str(folder / "w.pt") in about["weights"]
    assert sorted(os.listdir(tmp_path)) == ["bad.png", "f.parquet"]


def test_without_pyarrow(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'distrib\[parquet\]'"):
        extract(folder, tmp_path / "f.parquet")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_a_stopped_one_goes_on(
    folder: Path, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    seen: list[int] = []
    features = Classifier.features

    def counted(self: Classifier, images: torch.Tensor, stage: str) -> torch.Tensor:
        seen.append(len(images) if images.abs().sum() else 0)  # the look at the number of columns is black
        return features(self, images, stage)

    monkeypatch.setattr(Classifier, "features", counted)
    (tmp_path / "bad.png").write_bytes(b"rubbish")
    words = [tmp_path / "bad.png", "--batch=8"]
    with pytest.raises(Failure):
        extract(folder, tmp_path / f"whole{suffix}", *words)
    assert sum(seen) == COUNT + 1
    seen.clear()
    for _ in range(3):
        with pytest.raises(Interrupted):
            extract(folder, tmp_path / f"f{suffix}", *words, stop=Stop(1))  # after two batches each time
        assert "the same command goes on from there" in capsys.readouterr().err
        assert not (tmp_path / f"f{suffix}").exists()
    with pytest.raises(Failure, match="1 of 51"):
        extract(folder, tmp_path / f"f{suffix}", *words)
    assert "48 of 51 pictures are done; going on" in capsys.readouterr().err
    assert sum(seen) == COUNT + 1  # none twice
    assert (tmp_path / f"f{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
    if suffix == ".npy":
        assert (tmp_path / "f.txt").read_bytes() == (tmp_path / "whole.txt").read_bytes()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


CHANGES: list[list[object]] = [["--stage=layer2"], ["--exact"], ["--batch=4"], ["data.mean=[1,2,3]"]]


@pytest.mark.parametrize("words", [*CHANGES, ["picture"], ["weights"], ["weights", "no batch"]])
def test_the_leftover_of_another_command(
    folder: Path,
    tmp_path: Path,
    words: list[object],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changed = folder / "pictures" / "07.png"
    with pytest.raises(Interrupted):
        extract(folder, tmp_path / "f.npy", "--batch=8", stop=Stop(1))
    options: dict[str, Any] = {"weights": "other.pt"} if "weights" in words else {}
    if words == ["picture"]:
        os.utime(changed)
    given = [word for word in words if str(word).partition("=")[2]] + ["--exact"] * ("--exact" in words)
    if "no batch" not in words:
        given.insert(0, "--batch=8")
    capsys.readouterr()
    seen, features = set[int](), Classifier.features

    def counted(self: Classifier, images: torch.Tensor, stage: str) -> torch.Tensor:
        seen.add(len(images))
        return features(self, images, stage)

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "features", counted)
        extract(folder, tmp_path / "f.npy", *given, **options)
    assert max(seen) == {"--batch=4": 4, "no batch": tool.CPU_BATCH}.get(str(words[-1]), 8)
    assert "going on" not in capsys.readouterr().err
    extract(folder, tmp_path / "anew.npy", *given, **options)
    assert (tmp_path / "f.npy").read_bytes() == (tmp_path / "anew.npy").read_bytes()


def test_too_little_memory(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    features, most = Classifier.features, [5]

    def small(self: Classifier, images: torch.Tensor, stage: str) -> torch.Tensor:
        if len(images) > most[0]:
            raise torch.OutOfMemoryError
        return features(self, images, stage)

    monkeypatch.setattr(Classifier, "features", small)
    with pytest.raises(Interrupted):
        extract(folder, tmp_path / "f.npy", stop=Stop(2))
    assert "too little memory for 8 pictures at once: beginning with 4" in capsys.readouterr().err
    extract(folder, tmp_path / "f.npy")  # goes on with the batch that it had found
    said = capsys.readouterr().err
    assert "12 of 50 pictures are done; going on" in said
    assert "too little memory" not in said
    extract(folder, tmp_path / "four.npy", "--batch=4")
    assert (tmp_path / "f.npy").read_bytes() == (tmp_path / "four.npy").read_bytes()


def test_outputs_appear_together(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename

    def killed(source: Any, target: Any) -> None:
        if str(target).endswith("f.npy"):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(UserError, match="No space left on device"):
        extract(folder, tmp_path / "f.npy")
    assert os.listdir(tmp_path) == [".f.npy.work"]
    monkeypatch.setattr(os, "rename", rename)
    # As a kill between the two names leaves it: the names are ours, and so is what is half written.
    (folder_of(tmp_path / "f.npy") / "new-1.npy").write_bytes(b"half")
    (tmp_path / "f.txt").write_text("".join(f"{folder}/pictures/{k:02d}.png\n" for k in range(COUNT)))
    extract(folder, tmp_path / "f.npy")
    assert sorted(os.listdir(tmp_path)) == ["f.npy", "f.txt"]


def test_another_one_begins_while_outputs_appear(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename, refused = os.rename, []

    def watched(source: Any, target: Any) -> None:
        if str(target).endswith("f.npy"):
            assert (tmp_path / "f.txt").exists()
            assert sorted(os.listdir(tmp_path)) == [".f.npy.work", "f.txt"]  # nothing half written beside it
            with pytest.raises(UserError, match="another process is writing") as error:
                extract(folder, tmp_path / "f.npy")
            refused.append(error)
        rename(source, target)

    monkeypatch.setattr(os, "rename", watched)
    extract(folder, tmp_path / "f.npy")
    assert len(refused) == 1
    assert sorted(os.listdir(tmp_path)) == ["f.npy", "f.txt"]
    assert len((tmp_path / "f.txt").read_text().splitlines()) == len(np.load(tmp_path / "f.npy")) == COUNT


def test_a_name_as_long_as_the_disk_takes(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / ("f" * 251 + ".npy")
    with pytest.raises(Interrupted):
        extract(folder, output, "--batch=8", stop=Stop(1))
    extract(folder, output, "--batch=8")
    assert sorted(os.listdir(tmp_path)) == [output.name, output.with_suffix(".txt").name]


def test_a_torn_line_is_done_again(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        extract(folder, tmp_path / "f.npy", "--batch=8", stop=Stop(1))
    work = folder_of(tmp_path / "f.npy")
    with (work / "progress").open("ab") as file:
        file.write(b"[24, [")
    extract(folder, tmp_path / "f.npy", "--batch=8")
    np.testing.assert_array_equal(np.load(tmp_path / "f.npy"), by_hand(folder, "layer3", False, 8))


def test_one_process_at_a_time(tmp_path: Path) -> None:
    first = Work(tmp_path / "f.npy", {}, 3, None, 8)
    with pytest.raises(UserError, match="another process is writing"):
        Work(tmp_path / "f.npy", {}, 3, None, 8)
    first.close()
    Work(tmp_path / "f.npy", {}, 3, None, 8).remove()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--output={place}/f.txt"], "its name must end in .npy or .parquet"),
        (["--output={place}/there.npy"], "there.npy exists"),
        (["--output={place}/names.npy"], "names.txt exists"),
        (["--output={place}/none/f.npy"], "there is no folder"),
        (["--output=~nobody-of-that-name/f.npy"], "there is no folder ~nobody-of-that-name"),
        (["--output={place}/f.npy", "--stage=layer4"], "resnet20 has conv1, layer1, layer2, layer3, fc"),
        (["--output={place}/f.npy", "--batch=0"], "--batch 0"),
        (["--output={place}/f.npy", "{place}/line\nbreak.png"], "has a line break in its name"),
    ],
)
def test_one_line_for_what_does_not_fit(words: list[str], part: str, folder: Path, tmp_path: Path) -> None:
    for name in ("there.npy", "names.txt", "line\nbreak.png"):
        (tmp_path / name).write_bytes(b"mine")
    before = sorted(os.listdir(tmp_path))
    given = [str(folder / "pictures"), "--weights", str(folder / "w.pt"), *SIZES]
    with pytest.raises(UserError) as error:
        tool.extract(tool.parse([*given, *(word.format(place=tmp_path) for word in words)]), Stop())  # type: ignore[arg-type]
    assert part in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(os.listdir(tmp_path)) == before


def test_all_bad(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    given = [str(tmp_path / "a.png"), "--weights", str(folder / "w.pt"), "--output", str(tmp_path / "f.npy"), *SIZES]
    with pytest.raises(Failure, match="1 of 1 pictures could not be read: nothing is written"):
        tool.extract(tool.parse(given), SimpleNamespace(requested=lambda: False, received=None))  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == ["a.png"]


def test_a_real_process_is_stopped_and_killed(folder: Path, tmp_path: Path) -> None:
    """SIGTERM, then kill -9, then to the end: the same bytes as of one start."""
    words = [str(folder / "pictures"), "--weights", str(folder / "w.pt"), *SIZES, "--batch=1", "--output"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(runs.ROOT)}
    slow = (
        "import sys, time, distrib.engine.inference as i\n"
        "from distrib.tools.features.__main__ import main\n"
        "f = i.Classifier.features\n"
        "def features(*args):\n    time.sleep(0.25)\n    return f(*args)\n"
        "i.Classifier.features = features\n"
        "sys.exit(main(sys.argv[1:]))"
    )

    def begin() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", slow, *words, str(tmp_path / "f.npy")]
        return subprocess.Popen(command, env=environment, text=True, stderr=subprocess.PIPE)

    def done() -> int:
        path = folder_of(tmp_path / "f.npy") / "progress"
        lines = path.read_text().splitlines() if path.exists() else []
        return json.loads(lines[-1])[0] if lines else 0

    for number, code, least in ((signal.SIGTERM, 75, 3), (signal.SIGKILL, -9, 12)):
        process = begin()
        deadline = time.monotonic() + 400
        while done() < least and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        _, said = process.communicate(timeout=200)
        assert process.returncode == code, said
        assert "Traceback" not in said
        assert not (tmp_path / "f.npy").exists()
        assert done() >= least
    extract(folder, tmp_path / "f.npy", "--batch=1")
    extract(folder, tmp_path / "whole.npy", "--batch=1")
    assert (tmp_path / "f.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
    assert (tmp_path / "f.txt").read_bytes() == (tmp_path / "whole.txt").read_bytes()
