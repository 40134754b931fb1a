"""``distrib evaluate`` with mirror images, other sizes, in fast arithmetic, by both loaders, on anybody's weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from evaluating import (
    PLAIN,
    WNIDS,
    Set,
    close,
    figures,
    logits_of,
    save,
    score,
    sized,
    stop,
    varied,
)
from loading import DEPRECATED, needs_dali

from distrib.config import UserError
from distrib.data import EvalPlan, build_loader
from distrib.data.index import open_index
from distrib.engine.inference import fold
from distrib.engine.prepare import effective_precision
from distrib.layout import find_split
from distrib.place import Place
from distrib.tools.evaluate.__main__ import parse
from distrib.tools.evaluate.report import sentence
from distrib.tools.evaluate.scoring import evaluate
from distrib.trained import for_use, open_trained

pytestmark = [DEPRECATED, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Set:
    return Set(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def by_wnid(made: Set, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.lay_out(tmp_path_factory.mktemp("wnids"), list(WNIDS))


def test_mirror_images(made: Set, by_wnid: Path) -> None:
    found = score(made.weights, "--data", by_wnid, "--flip", *sized())
    both = (made.logits + logits_of(made.network, made.images.flip(3))) / 2
    assert close(found, figures(both, made.labels))
    assert found["flip"] is True
    assert sentence(found).endswith("(crop 32 of 32 px, fp32, mirror images too)")
    assert found["loss"] != pytest.approx(figures(made.logits, made.labels)["loss"], rel=1e-3)


def test_fast_is_the_folded_network(made: Set, by_wnid: Path) -> None:
    args = parse([str(made.weights), "--data", str(by_wnid), "--fast", *sized(), *PLAIN[1:]])
    found = evaluate(args, Place(), stop())
    assert found is not None
    precision = effective_precision("bf16", torch.device("cpu"))
    assert found["arithmetic"] == f"{precision}, batch norms folded"
    order = made.labels.argsort(stable=True)  # one batch of all images, as evaluated: bf16 needs the same neighbours
    with torch.inference_mode():
        images = made.images[order].contiguous(memory_format=torch.channels_last)
        logits = for_use(open_trained(str(made.weights), None, []), torch.device("cpu")).logits(images)
    assert close(found, figures(logits, made.labels[order]))
    if precision == "fp32":
        assert torch.allclose(logits, logits_of(fold(made.network), made.images)[order], rtol=1e-3, atol=1e-3)


def test_fast_beside_a_precision(made: Set, by_wnid: Path) -> None:
    with pytest.raises(UserError, match=r"leave it or train\.precision out"):
        score(made.weights, "--data", by_wnid, "--fast")


def test_sizes(made: Set, by_wnid: Path) -> None:
    both = score(made.weights, "--data", by_wnid, "--size=28", "--resize=30")
    assert (both["size"], both["resize"]) == (28, 30)
    keys = score(made.weights, "--data", by_wnid, "data.eval_size=28", "data.eval_resize=30")
    assert (both["top1"], both["loss"]) == (keys["top1"], keys["loss"])
    alone = score(made.weights, "--data", by_wnid, "--size=28")
    assert (alone["size"], alone["resize"]) == (28, 32)
    assert alone["loss"] != both["loss"]
    with pytest.raises(UserError, match=r"--size 28 is data\.eval_size=28: leave one of them out"):
        score(made.weights, "--data", by_wnid, "--size=28", "data.eval_size=30")
    with pytest.raises(UserError, match=r"data\.eval_size 64 is larger than data\.eval_resize 32"):
        score(made.weights, "--data", by_wnid, "--size=64", "--resize=32")


def test_timms_weights(by_wnid: Path, made: Set, tmp_path: Path) -> None:
    network = varied(1000, lambda num_classes: timm.create_model("resnet18", num_classes=num_classes))
    file = tmp_path / "timm.pth"
    torch.save(network.state_dict(), file)
    found = score(file, "--data", by_wnid, *sized())
    assert close(found, figures(logits_of(network, made.images), made.labels))


# Loaders.


@needs_dali
def test_both_loaders_count_the_same_by_id_and_by_number(photographs: Path, tmp_path: Path) -> None:
    """They differ by a fifth of a level a pixel: where their guesses differ at all, the two best must be that close."""
    network = varied(1000)
    weights, columns = save(network, tmp_path / "r18.pth"), (207, 281, 340, 817)
    for k, column in enumerate(columns):
        for root, name in (("ids", WNIDS[column]), ("numbers", str(column))):
            (tmp_path / root).mkdir(exist_ok=True)
            (tmp_path / root / name).symlink_to(photographs / "444" / "val" / f"class{k}")
    words = ["--size=64", "--resize=73", "train.precision=fp32", "data.eval_batch=32"]
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for loader in ("dali", "torchvision"):
        for root in ("ids", "numbers"):
            given = [str(weights), "--data", str(tmp_path / root), f"data.loader={loader}", "data.workers=2", *words]
            result = evaluate(parse(given), Place(), stop())
            assert result is not None
            assert (result["loader"], result["images"], result["outputs"]) == (loader, 64, 1000)
            found[loader, root] = result
        ids, numbers = found[loader, "ids"], found[loader, "numbers"]
        assert (ids["top1"], ids["top5"]) == (numbers["top1"], numbers["top5"])
        assert ids["loss"] == pytest.approx(numbers["loss"], rel=1e-6)  # the order of the sum differs

    def logits(loader: str) -> torch.Tensor:
        cfg = open_trained(str(weights), None, [f"data.root={tmp_path}/ids", f"data.loader={loader}", *words[2:],
                                                "data.eval_size=64", "data.eval_resize=73"]).config.data  # fmt: skip
        index = open_index(find_split(cfg, "val", whole=True))
        batches = build_loader(cfg, (index, index), 1000, torch.device("cpu")).evaluate(EvalPlan(64, 32))
        return torch.cat([logits_of(network, batch.images) for batch in batches])

    ours, theirs = logits("dali"), logits("torchvision")
    assert len(set(theirs.argmax(1).tolist())) > 5  # or equal guesses would say little
    for a, b in zip(ours, theirs, strict=True):
        if a.argmax() != b.argmax():
            margin = (b.max() - b[a.argmax()]).item()
            assert margin <= 2 * (a - b).abs().max()
            assert margin < 0.02 * b.std()
    differ = int((ours.argmax(1) != theirs.argmax(1)).sum())
    apart = abs(found["dali", "ids"]["top1"] - found["torchvision", "ids"]["top1"]) * 64 / 100
    assert round(apart) <= differ <= 2
    assert found["dali", "ids"]["loss"] == pytest.approx(found["torchvision", "ids"]["loss"], rel=0.01)


def test_a_machine_without_dali(made: Set, by_wnid: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Weights that were trained with DALI, which is the default, are evaluated anywhere."""
    monkeypatch.delitem(sys.modules, "distrib.data.dali", raising=False)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    args = parse([str(made.weights), "--data", str(by_wnid), *sized(), "data.workers=0", "train.precision=fp32"])
    found = evaluate(args, Place(), stop())
    assert found is not None
    assert found["loader"] == "torchvision"
    assert close(found, figures(made.logits, made.labels))
    assert "nvidia.dali cannot be imported" in capsys.readouterr().err


def test_a_request_to_stop_leaves_no_result(made: Set, by_wnid: Path) -> None:
    args = parse([str(made.weights), "--data", str(by_wnid), *sized(), "data.eval_batch=8", *PLAIN])
    assert evaluate(args, Place(), stop("SIGTERM")) is None
