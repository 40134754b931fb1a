"""``distrib evaluate``: the run's own figures again, anybody's weights, and one line for what does not fit."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
import torchvision
from evaluating import close, figures, logits_of, noise, save, score, sized, varied, write

from distrib.checkpoint import commit
from distrib.config import Config, UserError
from distrib.data import EvalPlan, build_loader
from distrib.data.index import open_index
from distrib.engine.prepare import DTYPES, Objective, effective_precision
from distrib.layout import find_split
from distrib.models import build_model
from distrib.tools.evaluate.__main__ import parse
from distrib.trained import open_trained, output_of

SMALL = ["data.size=16", "data.eval_resize=16", "data.workers=1", "train.global_batch=50", "data.eval_batch=100"]


def evaluate(*words: str, procs: int = 1, code: int = 0, codes: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`distrib evaluate` in processes of its own, which write their exit codes to ``codes``."""
    command = [sys.executable, "-m", "distrib", "evaluate", *words]
    if procs > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={procs}"]
        command = [*torchrun, "--local-addr=localhost", "-m", "distrib.tools.evaluate", *words]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(runs.ROOT)}
    environ |= {} if codes is None else {"DISTRIB_EXIT_CODE_FILE": str(codes)}
    done = subprocess.run(command, cwd=runs.ROOT, env=environ, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert f'File "{runs.ROOT}/distrib' not in done.stderr  # of a traceback of ours; torchrun has its own
    return done


def result(*words: str, procs: int = 1) -> dict[str, Any]:
    return json.loads(evaluate(*words, "--json", procs=procs).stdout)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on three classes of the sample, with an EMA."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    kinds = "data.classes=[1-trouser,8-bag,9-ankle-boot]"
    words = ["--config=configs/quickstart.yaml", *SMALL, kinds, "data.fraction=0.2", "train.epochs=2", "ema.decay=0.5"]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(runs.command(1, *words, f"run.dir={folder}"), cwd=runs.ROOT, env=environ, check=True, timeout=180)
    return folder


def guesses_on_the_sample(run: Path, images: int) -> list[int]:
    """The run's own network on its validation images, in their order, one batch after the other."""
    trained = open_trained(str(run), None, [])
    index = open_index(find_split(trained.config.data, "val", whole=False))
    assert len(index) == images
    cfg = trained.config.data
    precision = effective_precision(trained.config.train.precision, torch.device("cpu"))
    objective = Objective(trained.network, cfg.mean, cfg.std, DTYPES[precision])
    batches = build_loader(cfg, (index, index), 3, torch.device("cpu")).evaluate(EvalPlan(images, cfg.eval_batch))
    with torch.inference_mode():
        return torch.cat([objective.logits(batch.images).argmax(1) for batch in batches]).tolist()


@pytest.mark.parametrize("procs", [1, 2])
def test_the_runs_own_figures(run: Path, procs: int) -> None:
    summary = json.loads((run / "summary.json").read_text())
    logged = next(r for r in runs.records(run, "eval") if r["step"] == summary["best"]["step"])
    found = result(str(run), procs=procs)
    assert (found["top1"], found["top5"], found["images"]) == (logged["ema_top1"], logged["ema_top5"], logged["images"])
    assert found["loss"] == pytest.approx(logged["ema_loss"], rel=1e-12)
    assert f"step {summary['best']['step']}" in str(found["weights"])
    rows, classes = found["per_class"], ["1-trouser", "8-bag", "9-ankle-boot"]
    assert [row["class"] for row in rows] == classes
    assert sum(row["top1"] * row["images"] for row in rows) == pytest.approx(found["top1"] * found["images"])
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor([row["images"] for row in rows]))
    guesses = guesses_on_the_sample(run, found["images"])
    wrong = Counter((classes[a], classes[b]) for a, b in zip(labels, guesses, strict=True) if a != b)
    assert {(row["class"], row["as"]): row["images"] for row in found["confused"]} == wrong


def test_the_sentence_and_the_training_images(run: Path) -> None:
    said, *table = evaluate(str(run), "--split", "train", "--per-class").stdout.splitlines()
    assert said.startswith(f"{run}/checkpoints/best.pt (EMA, step ")
    trained_on = torch.load(run / "checkpoints" / "last.pt", weights_only=True)
    assert trained_on["classes"] == ["1-trouser", "8-bag", "9-ankle-boot"]
    assert "top-5" not in said  # of three classes
    assert " on 490 images of " in said  # a fifth of each class
    assert table[1].startswith("worst classes ")
    assert {line.split()[0] for line in table[2:5]} == {"1-trouser", "8-bag", "9-ankle-boot"}


NAMES = ("ant", "bee", "cat", "dog")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes of three pictures, at the size that is evaluated, without train/ and val/."""
    place = tmp_path_factory.mktemp("pictures")
    for k, image in enumerate(noise(12)):
        write(image, place / NAMES[k // 3] / f"{k % 3}.png")
    return place


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of torchvision's network of four outputs."""
    return save(varied(4), tmp_path_factory.mktemp("four") / "r18.pth")


def test_torchvisions_weights_score_as_torchvision_does(four: Path, pictures: Path) -> None:
    found = score(four, "--data", pictures, *sized())
    assert found["images"] == 12
    assert close(found, figures(logits_of(varied(4), noise(12)), torch.arange(12) // 3))


def test_class_folders_are_the_outputs_of_their_names(run: Path, tmp_path: Path) -> None:
    trained = open_trained(str(run), None, [], print)
    assert output_of(["9-ankle-boot", "1-trouser"], trained) == [2, 0]
    one = [score(run, "--data", "sample:fashion-mnist", f"data.classes=[{name}]") for name in trained.classes or ()]
    own = score(run)
    assert [part["images"] for part in one] == [167, 198, 198]
    assert sum(part["top1"] * part["images"] for part in one) == pytest.approx(own["top1"] * own["images"])


MISTAKES = [
    (["/nope", "--data", "{pictures}"], "cannot read"),
    (["{four}", "--data", "{pictures}/nope"], "no data at"),
    (["{four}", "--data", "{tmp}/nothing"], "no data at"),
    (["{four}", "--data", "{tmp}/hollow"], "fill or remove it"),
    (["{four}", "--data", "{pictures}", "data.classes=[emu]"], "has no class folder 'emu'"),
    (["{four}", "--data", "{pictures}", "--model", "resnet50"], "are of resnet18, not resnet50"),
    (["{five}", "--data", "{pictures}"], "tells 5 classes apart and knows no names, but there are 4"),
    (["{tmp}/ours.pt", "--data", "{pictures}"], "does not know the class ant nor 3 more; it knows 1-trouser, 8-bag"),
    (["{tmp}/rubbish.pt", "--data", "{pictures}"], "is damaged, or no file of weights"),
    (["{tmp}/half.pt", "--data", "{pictures}"], "is damaged, or no file of weights"),
    (["{tmp}/half-of-ours.pt", "--data", "{pictures}"], "is damaged, or no file of weights"),
    (["{tmp}/code.pt", "--data", "{pictures}"], "to load those may run code"),
    (["{four}", "--data", "{pictures}", "data.eval_sise=32"], "did you mean data.eval_size?"),
    (["{four}", "--data", "{pictures}", "--split", "test"], "invalid choice"),
    (["{four}", "--data", "{pictures}", "--classes", "ant"], "invalid choice"),
    (["{four}", "--data", "{pictures}", "--size", "0"], "argument --size: '0' is not a whole number of 1 or more"),
    (["{four}", "--data", "{pictures}", "--per-class=many"], "'many' is not a whole number of 1 or more"),
    (["{four}", "--data", "{pictures}", "--fats"], "--fats is no option; did you mean --fast?"),
]


class Code:
    """What runs code when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("should not be there",)


@pytest.fixture(scope="module")
def files(pictures: Path, four: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    tmp = tmp_path_factory.mktemp("mistakes")
    config = Config.model_validate({"model": {"name": "resnet20", "num_classes": 3}})
    content = {"model": build_model(config.model).state_dict(), "config": config.model_dump(mode="json")}
    commit(content | {"classes": ["1-trouser", "8-bag", "9-ankle-boot"]}, tmp / "ours.pt")
    (tmp / "rubbish.pt").write_bytes(b"rubbish" * 99)
    (tmp / "half.pt").write_bytes(four.read_bytes()[:20_000_000])
    ours = (tmp / "ours.pt").read_bytes()
    (tmp / "half-of-ours.pt").write_bytes(ours[: len(ours) // 2])
    torch.save({"state_dict": Code()}, tmp / "code.pt")
    (tmp / "nothing").mkdir()
    (tmp / "hollow" / "bee").mkdir(parents=True)
    write(noise(1)[0], tmp / "hollow" / "ant" / "a.png")
    return {"pictures": pictures, "tmp": tmp, "four": four, "five": save(varied(5), tmp / "five.pth")}


@pytest.mark.parametrize(("words", "part"), MISTAKES)
def test_one_line_for_what_does_not_fit(
    words: list[str], part: str, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        score(*(word.format(**files) for word in words))
    assert part in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("procs", [1, 2])
def test_a_mistake_is_told_once_and_ends_with_2(procs: int, files: dict[str, Path], tmp_path: Path) -> None:
    words = (word.format(**files) for word in MISTAKES[7][0])
    done = evaluate(*words, procs=procs, code=2 if procs == 1 else 1, codes=tmp_path / "codes")  # torchrun says 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert MISTAKES[7][1] in line
    assert done.stdout == ""
    codes = [line.split()[:2] for line in (tmp_path / "codes").read_text().splitlines()]
    assert sorted(codes) == [[str(rank), "2"] for rank in range(procs)]


def test_options_in_any_order() -> None:
    args = parse(["--per-class", "runs/x", "--json", "data.eval_batch=8"])
    assert (args.weights, args.per_class, args.json, args.overrides) == ("runs/x", 10, True, ["data.eval_batch=8"])
    assert parse(["runs/x", "--per-class", "3"]).per_class == 3
    assert parse(["runs/x", "--per-class"]).per_class == 10
    assert parse(["runs/x", "--per-class", "--data", "d"]).overrides == ["data.root=d"]
    assert parse(["runs/x"]).per_class is None
    with pytest.raises(UserError, match="the following arguments are required: weights"):
        parse(["--json"])


def test_help_has_a_line_for_each_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    assert text.count("\n  distrib evaluate ") >= 5
    for option in ("data", "split", "model", "classes", "real", "size", "resize", "flip", "fast", "per-class", "json"):
        assert f"\n  --{option} " in text


def test_a_checkpoint_of_another_version(tmp_path: Path) -> None:
    config = Config.model_validate({"model": {"name": "resnet20", "num_classes": 4}, "ema": {"decay": 0.5}})
    torch.manual_seed(0)
    file, values = tmp_path / "a.pt", config.model_dump(mode="json")
    state = build_model(config.model).state_dict()
    values["ema"]["older"], values["gone"] = 1, {"key": 2}  # keys that are no more are passed over
    torch.save({"model": state, "config": values, "classes": None}, file)
    assert open_trained(str(file), None, [], print).config.ema == config.ema
    torch.save({"model": state, "config": values | {"data": {"size": "big"}}}, file)
    with pytest.raises(UserError, match=r"of another version: data\.size is not what it takes here"):
        open_trained(str(file), None, [], print)
    torch.save({k: v for k, v in state.items() if not k.startswith("fc.")}, file)
    with pytest.raises(UserError, match="have no last layer"):
        open_trained(str(file), None, [], print)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("net.onnx", b"\x08\x08\x12\x07pytorch", "is a network for other programs, not weights"),
        ("net.pt2", b"PK\x03\x04", "is a network for other programs, not weights"),
        ("evil.pt", pickle.dumps({"a": os.system}), "another program's pickle, which may run code"),
        ("old.pt", b"\x80\x02\x8a", "is damaged, or no file of weights but another program's pickle"),
    ],
)
def test_what_is_no_weights_is_called_what_it_is(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        open_trained(str(tmp_path / name), None, [], print)


def test_names_that_tell_no_network(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="for several networks: add --model"):
        open_trained("IMAGENET1K_V1", None, [], print)
    with pytest.raises(UserError, match="did you mean 'resnet50'"):
        open_trained("IMAGENET1K_V1", "resnet-50", [], print)
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="are of a network that is not here"):
        open_trained(str(tmp_path / "other.pt"), None, [], print)


def test_settings_do_not_make_another_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18(num_classes=4).state_dict(), tmp_path / "r18.pth")
    for word, known in (
        ("model.num_classes=5", "4"),
        ("model.name=resnet34", "resnet18"),
        ("model.plain=true", "False"),
    ):
        with pytest.raises(UserError) as raised:
            open_trained(str(tmp_path / "r18.pth"), None, [word], print)
        key, _, asked = word.partition("=")
        assert f"are of {key}={known}, not {asked.capitalize() if asked == 'true' else asked}: leave" in str(
            raised.value
        )


@pytest.mark.parametrize("config", [{1: 2}, {"model": "resnet18", "data": [1]}, {"optimizer": {"lr": 1}}])
def test_another_programs_configuration_is_none(config: dict[object, object], tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = torchvision.models.resnet18(num_classes=4).state_dict()
    torch.save({"state_dict": state, "config": config}, tmp_path / "theirs.pth")
    trained = open_trained(str(tmp_path / "theirs.pth"), None, [], print)
    assert (trained.config.model.name, trained.outputs) == ("resnet18", 4)
    assert trained.config.data == Config().data.model_copy(update={"eval_size": 224, "eval_resize": 256})
