"""distrib.options: what is typed, in the forms that people write, and what --help says about every key."""

from __future__ import annotations

import re

import pytest

from distrib.config import Config, UserError
from distrib.keys import find_kind, valid_keys
from distrib.options import DEFAULT_CONFIG, parse_args, settings_help

LEAVES = [key for key in valid_keys() if (kind := find_kind(key)) and not kind.part]
PARTS = [name for name in Config.model_fields if (kind := find_kind(name)) and kind.part]


def keys_of(text: str) -> list[str]:
    """The keys that stand at the beginning of the lines of a help text."""
    return re.findall(r"^  ([a-z][\w.]*)=", text, flags=re.MULTILINE)


def test_arguments_in_any_order() -> None:
    args = parse_args(["a=1", "--config", "c.yaml", "b=2", "--print-config", "c=3"])
    assert args.config == "c.yaml"
    assert args.print_config
    assert args.overrides == ["a=1", "b=2", "c=3"]
    assert parse_args([]).config == DEFAULT_CONFIG


@pytest.mark.parametrize(
    ("argv", "overrides"),
    [
        (["--optim.lr=0.1"], ["optim.lr=0.1"]),
        (["--optim.lr", "0.1", "a=1"], ["optim.lr=0.1", "a=1"]),
        (["--train.global-batch", "8"], ["train.global_batch=8"]),
        (["--optim.lr", "-1"], ["optim.lr=-1"]),
        (["--trace", "--config", "c.yaml"], ["trace=true"]),
        (["--train.compile", "no", "--trace"], ["train.compile=no", "trace=true"]),
        (["--run.dir=", "--run.name=a=b"], ["run.dir=", "run.name=a=b"]),
        (["--ema"], ["ema=true"]),
        (["--ema", "false", "a=1"], ["ema=false", "a=1"]),
        (["--ema=true", "--trace"], ["ema=true", "trace=true"]),
        (["--ema", "--trace"], ["ema=true", "trace=true"]),
        (["--ema.decay", "auto"], ["ema.decay=auto"]),
        (["--data", "/x y", "a=1"], ["data.root=/x y", "a=1"]),
        (["--data=/x", "--init-from=w.pt"], ["data.root=/x", "model.weights=w.pt"]),
        (["--config", "--optim.lr"], []),  # argparse's own word for it
    ],
)
def test_keys_behind_dashes(argv: list[str], overrides: list[str]) -> None:
    if overrides:
        assert parse_args(argv).overrides == overrides
    else:
        with pytest.raises(UserError, match="--config: expected one argument"):
            parse_args(argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lr", "0.1"], "--lr is no option; write optim.lr=0.1"),
        (["--lr=0.1"], "--lr is no option; write optim.lr=0.1"),
        (["--epochs=90"], "--epochs is no option; write train.epochs=90"),
        (["-b", "256"], "-b is no option; write train.global_batch=256 (the whole step's, over all processes)"),
        (["--batch-size"], "--batch-size is no option; write train.global_batch=1024 (the whole step's, over all"),
        (["--model", "resnet18"], "--model: model takes keys of its own: model.name=resnet18"),
        (["-a", "resnet18"], "-a is no option; write model.name=resnet18"),
        (["--data"], "--data stands without a value: data.root takes text that is not empty"),
        (["--data-path", "/x"], "--data-path is no option; write data.root=/x"),
        (["--workers", "4"], "--workers is no option; write data.workers=4"),
        (["-j", "4"], "-j is no option; write data.workers=4"),
        (["--wd", "1e-4"], "--wd is no option; write optim.weight_decay=1e-4"),
        (["--weight-decay", "1e-4"], "--weight-decay is no option; write optim.weight_decay=1e-4"),
        (["--resume", "x.pt"], "argument --resume: takes auto or must, got 'x.pt'; the same command continues the run"),
        (["--resume"], "argument --resume: expected one argument"),
        (["--fresh", "--resume", "must"], "--fresh starts anew and --resume must continues: leave one of them out"),
        (["--fresh=yes"], "argument --fresh: ignored explicit argument 'yes'"),
        (["--start-epoch", "3"], "--start-epoch is no option: the same command continues the run by itself"),
        (
            ["--nproc_per_node=2"],
            "--nproc_per_node is no option: torchrun's options stand before train.py; launch has --procs",
        ),
        (["--confg", "c.yaml"], "--confg is no option; did you mean --config?"),
        (["--print_config"], "--print_config is no option; did you mean --print-config?"),
        (["--zzz"], "--zzz is no option; settings are written key=value"),
        (["--optim.lr"], "--optim.lr stands without a value: optim.lr takes a number above 0"),
        (["--optim.lr", "--trace"], "--optim.lr stands without a value: optim.lr takes a number above 0"),
        (["--config"], "argument --config: expected one argument"),
    ],
)
def test_options_of_other_trainers(argv: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_args(argv)
    assert str(caught.value).startswith(message)
    assert len(str(caught.value).splitlines()) == 1


# --help


def test_every_key_is_explained_once() -> None:
    told = keys_of(settings_help(width=100))
    assert sorted(told) == sorted(LEAVES)
    assert len(told) > 60


@pytest.mark.parametrize("part", PARTS)
def test_one_part_alone(part: str) -> None:
    said = settings_help(part, width=100)
    assert sorted(keys_of(said)) == sorted(key for key in LEAVES if key.startswith(f"{part}."))
    assert said.startswith(f"{part}: ")
    assert said in settings_help(width=100)


@pytest.mark.parametrize("width", [80, 120])
def test_help_keeps_to_the_width(width: int) -> None:
    long = [line for line in settings_help(width=width).splitlines() if len(line) > width]
    assert all(re.match(r"  [a-z][\w.]*=", line) for line in long)  # a default that is longer than the line


@pytest.mark.parametrize("key", LEAVES)
def test_a_key_has_its_default_and_what_it_takes(key: str) -> None:
    part = key.partition(".")[0]
    said = " ".join(settings_help(part if part in PARTS else None, width=100).split())
    kind = find_kind(key)
    assert kind is not None
    entry = said[said.index(f"{key}=") :]
    default = entry.partition("=")[2].partition(" ")[0]
    words = entry[: entry.index("]", len(f"{key}={default}")) + 1]
    assert re.search(r"\w.* \[.+\]$", words.removeprefix(f"{key}={default}"))
    if isinstance(kind.default, str | int | float | None):
        told = "null" if kind.default is None else str(kind.default)
        assert default == (told.lower() if isinstance(kind.default, bool) else told)


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_ends_the_program(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_args(["optim.lr=nonsense", flag])
    assert stop.value.code == 0
    options, _, settings = capsys.readouterr().out.partition("\nsettings:\n")
    assert options.startswith("usage: train.py")
    names = ("--config", "--data", "--init-from", "--fresh", "--resume", "--print-config")
    assert all(f"\n  {name}" in options for name in names)
    assert sorted(keys_of(settings)) == sorted(LEAVES)


def test_help_of_a_part(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_args(["--help", "optim"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.rstrip("\n") == settings_help("optim")


@pytest.mark.parametrize(
    ("part", "hint"),
    [
        ("optm", "did you mean optim?"),
        ("optim.lr", "did you mean optim?"),
        ("zzz", "there are run, model"),
    ],
)
def test_help_of_no_part(part: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_args(["--help", part])
    assert str(caught.value).startswith(f"--help {part}: there is no such part; ")
    assert hint in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
