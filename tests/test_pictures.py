"""Files without classes, as the loaders take them; and ImageNet's names."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models._meta import _IMAGENET_CATEGORIES

from distrib.config import DataConfig, UserError
from distrib.data import EvalPlan, build_loader
from distrib.data.pictures import find_pictures, index_pictures
from distrib.layout import imagenet


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Pictures in a folder, one below it, and one elsewhere with an odd name."""
    random = np.random.default_rng(0)
    for name in ("many/a.png", "many/c.png", "many/below/b.png", "other/no suffix"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (24, 24, 3)).astype(np.uint8)).save(file, format="PNG")
    (tmp_path / "many" / "notes.txt").write_text("no picture")
    (tmp_path / "many" / ".hidden.png").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    return tmp_path


def test_files_and_folders_are_found(tree: Path) -> None:
    odd = tree / "other" / "no suffix"
    found, missing = find_pictures([str(odd), str(tree / "many"), "not there"])
    assert found == [odd, *(tree / "many" / name for name in ("a.png", "c.png", "below/b.png"))]
    assert missing == ["not there"]
    with pytest.raises(UserError, match="empty holds no pictures"):
        find_pictures([str(tree / "empty")])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("loader", ["torchvision", "dali"])
def test_the_loaders_take_them(tree: Path, tmp_path: Path, loader: str, workers: int) -> None:
    found, _ = find_pictures([str(tree / "other" / "no suffix"), str(tree / "many")])
    index = index_pictures(found, tmp_path / "lists")
    assert [index.path(k) for k in range(len(index))] == found
    cfg = DataConfig(loader=loader, eval_size=24, eval_resize=24, workers=workers)
    made = build_loader(cfg, (index, index), 1, torch.device("cpu"))
    (batch,) = made.evaluate(EvalPlan(len(index), 4))
    for row, file in enumerate(found):
        assert torch.equal(batch.images[row].permute(1, 2, 0), torch.from_numpy(np.array(Image.open(file))))


def test_from_the_root_of_the_disk(tree: Path, tmp_path: Path) -> None:
    there = Path("/etc/passwd")
    index = index_pictures([tree / "many" / "a.png", there], tmp_path / "lists")
    assert os.fspath(index.path(1)) == "/etc/passwd"


def test_the_folder_above_a_link(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``link/..`` is the folder above the one that the link leads to."""
    (tmp_path / "link").symlink_to(tree / "many" / "below")
    monkeypatch.chdir(tmp_path)
    index = index_pictures([Path("link/../a.png"), tree / "many" / "c.png"], tmp_path / "lists")
    assert [index.path(k) for k in range(2)] == [tree / "many" / "a.png", tree / "many" / "c.png"]
    found, _ = find_pictures(["link/.."])
    assert [os.fspath(file) for file in found] == [f"link/../{name}" for name in ("a.png", "c.png", "below/b.png")]
    with pytest.raises(UserError, match="/ is the whole disk"):
        find_pictures(["/"])


def test_imagenets_classes() -> None:
    names = imagenet.wnids()
    assert len(set(names)) == 1000
    assert list(names) == sorted(names)
    assert [imagenet.title(name) for name in names] == [
        f"{title} ({name})" for title, name in zip(_IMAGENET_CATEGORIES, names, strict=True)
    ]
    assert imagenet.title("ant") == "ant"


def test_folders_mean_outputs() -> None:
    assert imagenet.outputs(["n01443537", "n01440764"]) == [1, 0]
    assert imagenet.outputs(["0", "10", "2"]) == [0, 10, 2]
    assert imagenet.outputs(["n01440764", "2"]) is None
    assert imagenet.outputs(["1", "1000"]) is None
    assert imagenet.outputs(["1", "01"]) is None
