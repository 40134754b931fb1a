"""``distrib evaluate`` on ImageNet's relatives and other ways to score, each against a count by hand."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from evaluating import (
    IMAGES,
    SIDE,
    WNIDS,
    Set,
    close,
    figures,
    logits_of,
    noise,
    save,
    score,
    sized,
    varied,
    write,
)
from loading import DEPRECATED

from distrib.config import Config, UserError
from distrib.engine.prepare import Objective
from distrib.faults import Failure
from distrib.layout import imagenet
from distrib.models import build_model
from distrib.tools.evaluate.report import sentence, tables

pytestmark = [DEPRECATED, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Set:
    return Set(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def by_wnid(made: Set, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.lay_out(tmp_path_factory.mktemp("wnids"), list(WNIDS))


def test_folders_by_id_and_by_number_over_all_outputs(made: Set, by_wnid: Path, tmp_path: Path) -> None:
    """As ImageNet-R's 200 folders lie, and ImageNet-V2's, whose "10" stands before "2"."""
    ids = score(made.weights, "--data", by_wnid, *sized())
    numbers = score(made.weights, "--data", made.lay_out(tmp_path / "v2", list(map(str, range(1000)))), *sized())
    expected = figures(made.logits, made.labels)
    assert 0 < expected["top1"] < expected["top5"] < 100
    for found in (ids, numbers):
        assert close(found, expected)
        assert (found["images"], found["classes"], found["outputs"]) == (IMAGES, len(made.classes), 1000)
        assert {"arithmetic": "fp32", "flip": False, "resize": SIDE, "size": SIDE, "loader": "torchvision"}.items() <= (
            found.items()
        )
    right = made.logits.argmax(1) == made.labels
    for found, names in ((ids, WNIDS), (numbers, tuple(map(str, range(1000))))):
        rows = {row["class"]: row for row in found["per_class"]}
        assert list(rows) == sorted(names[label] for label in made.classes)
        for label in made.classes:
            own = made.labels == label
            share = 100 * right[own].double().mean().item()
            assert rows[names[label]]["images"] == own.sum()
            assert rows[names[label]]["top1"] == pytest.approx(share)
            assert rows[names[label]]["title"] == imagenet.title(WNIDS[label])
        wrong = [(names[a], names[b]) for a, b in zip(made.labels[~right], made.logits.argmax(1)[~right], strict=True)]
        assert {(row["class"], row["as"]): row["images"] for row in found["confused"]} == Counter(wrong)
        assert [row["images"] for row in found["confused"]] == sorted(Counter(wrong).values(), reverse=True)


def test_the_subset_alone_is_guessed_from(made: Set, by_wnid: Path) -> None:
    """ImageNet-A's and -R's usual scoring; the loss too is over the subset."""
    found = score(made.weights, "--data", by_wnid, "--classes", "subset", *sized())
    position = {label: k for k, label in enumerate(made.classes)}
    labels = torch.tensor([position[label] for label in made.labels.tolist()])
    expected = figures(made.logits[:, made.classes], labels)
    assert close(found, expected)
    assert found["outputs"] == len(made.classes)
    assert expected["top1"] > figures(made.logits, made.labels)["top1"]
    assert {row["as"] for row in found["confused"]} <= {WNIDS[label] for label in made.classes}


def test_a_subset_of_fewer_than_five(made: Set, tmp_path: Path) -> None:
    for k, label in ((0, 3), (1, 3), (2, 950)):
        write(made.images[k], tmp_path / WNIDS[label] / f"{k}.png")
    found = score(made.weights, "--data", tmp_path, "--classes=subset", *sized())
    expected = figures(made.logits[:3][:, [3, 950]], torch.tensor([0, 0, 1]))
    assert found["top1"] == pytest.approx(expected["top1"])
    assert (found["top5"], found["outputs"]) == (100, 2)
    assert "top-5" not in sentence(found)
    assert f"(crop {SIDE} of {SIDE} px, fp32, guessed among these classes alone)" in sentence(found)


@pytest.mark.parametrize("names", [WNIDS, tuple(map(str, range(1000)))], ids=["sketch", "v2"])
def test_all_thousand_folders(made: Set, tmp_path: Path, names: tuple[str, ...]) -> None:
    """As ImageNet-Sketch and ImageNet-V2 have them; with all classes there the subset is the whole."""
    write(made.images[0], tmp_path / "one.png")
    for name in names:
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "a.png").hardlink_to(tmp_path / "one.png")
    found = score(made.weights, "--data", tmp_path / "set", "--classes=subset", *sized())
    logits = made.logits[:1].expand(1000, -1)
    assert close(found, figures(logits, torch.arange(1000)))
    assert (found["images"], found["classes"], found["outputs"], found["top1"]) == (1000, 1000, 1000, 0.1)
    best = int(made.logits[0].argmax())
    assert [row["class"] for row in found["per_class"] if row["top1"]] == [names[best]]


def test_ones_own_classes(tmp_path: Path) -> None:
    """Of a network of ant, bee, cat and dog two folders are there."""
    config = Config.model_validate(
        {"model": {"name": "resnet18", "num_classes": 4}, "data": {"size": SIDE, "eval_resize": 64, "eval_size": 64}}
    )
    network = varied(4)
    ours = build_model(config.model)
    ours.load_state_dict(network.state_dict())
    names = ["ant", "bee", "cat", "dog"]
    torch.save({"model": ours.state_dict(), "config": config.model_dump(mode="json"), "classes": names}, tmp_path / "a")
    images, labels = noise(20), torch.tensor([3, 1] * 10)
    for k, label in enumerate(labels.tolist()):
        write(images[k], tmp_path / "set" / names[label] / f"{k:02d}.png")
    logits = logits_of(network, images)
    every = score(tmp_path / "a", "--data", tmp_path / "set", *sized())
    assert close(every, figures(logits, labels))
    assert [(row["class"], row["title"], row["images"]) for row in every["per_class"]] == [
        ("bee", "bee", 10),
        ("dog", "dog", 10),
    ]
    wrong = Counter((names[a], names[b]) for a, b in zip(labels, logits.argmax(1), strict=True) if a != b)
    assert {(row["class"], row["as"]): row["images"] for row in every["confused"]} == wrong
    subset = score(tmp_path / "a", "--data", tmp_path / "set", "--classes=subset", *sized())
    assert close(subset, figures(logits[:, [1, 3]], labels // 2))
    write(images[0], tmp_path / "set" / "emu" / "a.png")
    with pytest.raises(UserError, match="does not know the class emu; it knows ant, bee, cat, dog"):
        score(tmp_path / "a", "--data", tmp_path / "set")


def test_what_cannot_be_read_is_not_counted(made: Set, tmp_path: Path) -> None:
    for k, label in ((0, 5), (1, 5), (2, 7)):
        write(made.images[k], tmp_path / WNIDS[label] / f"{k}.png")
    (tmp_path / WNIDS[7] / "2.png").write_bytes(b"no picture")
    found = score(made.weights, "--data", tmp_path, *sized())
    assert found["images"] == 2
    assert [(row["images"], row["top1"] is None) for row in found["per_class"]] == [(2, False), (0, True)]
    assert sum(row["images"] for row in found["confused"]) + found["top1"] / 50 == 2
    assert WNIDS[7] not in "\n".join(tables(found, 10))


def test_tables_for_a_person(made: Set, by_wnid: Path) -> None:
    found = score(made.weights, "--data", by_wnid, *sized())
    lines = tables(found, 3)
    assert tables(found, None) == []
    blank, head, *worst = lines[:5]
    assert (blank, lines[5], len(lines)) == ("", "", 10)
    assert head.split() == ["worst", "classes", "top-1", "images"]
    assert len({len(line) for line in lines[1:5]}) == 1  # aligned
    assert lines[6].split() == ["most", "often", "confused", "images"]
    lowest = sorted(row["top1"] for row in found["per_class"])[:3]
    assert [float(line.rpartition(" %")[0].split()[-1]) for line in worst] == pytest.approx(lowest)
    first = found["confused"][0]
    assert lines[7].startswith(f"{imagenet.title(first['class'])} as {imagenet.title(first['as'])} ")
    assert lines[7].endswith(f" {first['images']}")


def test_folders_that_are_none_of_imagenets(made: Set, by_wnid: Path, tmp_path: Path) -> None:
    for name in (WNIDS[3], "labels", "tenches"):
        write(made.images[0], tmp_path / name / "a.png")
    with pytest.raises(UserError, match="the class folder labels is none of ImageNet's 1,000, nor are 1 more"):
        score(made.weights, "--data", tmp_path)
    with pytest.raises(UserError, match="has no class folder 'n01440765'"):
        score(made.weights, "--data", by_wnid, "data.classes=[n01440765]")


# ReaL labels.


@pytest.fixture(scope="module")
def validation(made: Set, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ImageNet's validation pictures lie, of which the third is number 3."""
    root = tmp_path_factory.mktemp("validation")
    for k, (image, label) in enumerate(zip(made.images, made.labels.tolist(), strict=True)):
        write(image, root / WNIDS[label] / f"ILSVRC2012_val_{k + 1:08d}.JPEG")
    return root


def test_real_labels(made: Set, validation: Path, tmp_path: Path) -> None:
    guesses = made.logits.argmax(1).tolist()
    real = []
    for k, guess in enumerate(guesses):
        other = (guess + 1) % 1000
        real.append([[guess], [other, guess], [other], [], [other, (guess + 2) % 1000]][k % 5])
    (tmp_path / "real.json").write_text(json.dumps(real))
    found = score(made.weights, "--data", validation, "--real", tmp_path / "real.json", *sized())
    assert found["real_images"] == sum(bool(labels) for labels in real) == 48
    assert found["real_top1"] == pytest.approx(100 * 24 / 48)
    assert close(found, figures(made.logits, made.labels))
    assert "; ReaL top-1 50.00 % on the 48 that have such labels" in sentence(found)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "cannot read"),
        ("[[1], [2]", "is not JSON: --real takes real.json of github.com"),
        ("[" * 100_000, "is not JSON"),
        ('{"a": [1]}', 'holds {"a": [1]}: --real takes a list of lists of labels from 0 to 999'),
        ("[]", "holds []"),
        ("[[1], 2]", "has 2 as entry 1"),
        ("[[1], [1000]]", "has [1000] as entry 1"),
        ("[[true]]", "has [true] as entry 0"),
        ("[[0.5]]", "has [0.5] as entry 0"),
        ("[[1], [2]]", "has labels for the pictures 1 to 2, none for "),
    ],
)
def test_what_is_no_real_json(content: str | None, part: str, made: Set, validation: Path, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "real.json").write_text(content)
    with pytest.raises(UserError) as error:
        score(made.weights, "--data", validation, "--real", tmp_path / "real.json", *sized())
    assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_real_labels_of_other_pictures_or_classes(made: Set, by_wnid: Path, tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("[[1]]")
    with pytest.raises(UserError, match=r"--real: .*\.png is not named as ImageNet's validation pictures are"):
        score(made.weights, "--data", by_wnid, "--real", tmp_path / "real.json")
    file = save(varied(4), tmp_path / "four.pth")
    with pytest.raises(UserError, match="ImageNet's 1,000 classes, which are not the 4 of"):
        score(file, "--data", by_wnid, "--real", tmp_path / "real.json")
    with pytest.raises(UserError, match=r"cannot read ~nobody-of-that-name/real\.json"):
        score(made.weights, "--data", by_wnid, "--real", "~nobody-of-that-name/real.json", *sized())


def test_too_little_memory(made: Set, validation: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def small(self: Objective, images: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Objective, "logits", small)
    with pytest.raises(Failure, match=r"cpu has too little memory for 12 .* at once: set data\.eval_batch=6 or less"):
        score(made.weights, "--data", validation, "data.eval_batch=12", *sized())
