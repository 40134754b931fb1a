"""distrib.cli and distrib.config: what is read, how it is merged, and that each mistake is one helpful line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from distrib.cli import ROOT, WANDB_NAMES, dump_config, load_config
from distrib.config import Config, DataConfig, EmaConfig, OptimConfig, RunConfig, TrainConfig, UserError
from distrib.follow import follow_names
from distrib.keys import describe, find_kind, valid_keys
from distrib.options import DEFAULT_CONFIG, parse_args

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a file into the test's own folder, which is the working directory, and returns its bare name."""
    monkeypatch.chdir(tmp_path)
    for name in ("IMAGENET_DIR", *WANDB_NAMES.values()):
        monkeypatch.delenv(name, raising=False)

    def write_file(text: str | bytes = "", name: str = "c.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return Path(name)

    return write_file


def refused(path: Path | str, *overrides: str) -> str:
    """The message of the UserError that loading must end in."""
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    assert "Traceback" not in message
    assert "pydantic" not in message
    return message


# What is read


def test_an_empty_file_is_the_defaults(write: Write) -> None:
    sizes, name = DataConfig(eval_size=224, eval_resize=256), "resnet50-imagenet"
    assert load_config(write("# nothing\n")) == Config(run=RunConfig(name=name, dir=f"runs/{name}"), data=sizes)


def test_later_words_win(write: Write) -> None:
    path = write("optim:\n  lr: 0.2\n  momentum: 0.8\ntrain: {epochs: 10}\n")
    config = load_config(path, ["optim.lr=0.3", "train.epochs=20", "optim.lr=0.4"])
    assert config.optim == OptimConfig(lr=0.4, momentum=0.8)
    assert config.train == TrainConfig(epochs=20)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E-3", 1e-3),
        ("5e2", 500),
        (".5e1", 5),
        ("1.5e+2", 150),
        ("+1e1", 10),
        ("3", 3),
        ("0.25", 0.25),
    ],
)
def test_numbers_as_people_write_them(write: Write, text: str, value: float) -> None:
    path = write(f"optim:\n  lr: {text}\n")
    assert load_config(path).optim.lr == value
    assert load_config(write(), [f"optim.lr={text}"]).optim.lr == value


@pytest.mark.parametrize("name", ["2026-03-01", "2026-02-30", "v1.2", "a+b", "1e", "e5"])
def test_names_that_look_like_something_else(write: Write, name: str) -> None:
    assert load_config(write(), [f"run.name={name}"]).run.name == name


def test_overrides_take_yaml(write: Write) -> None:
    config = load_config(
        write("ema: {decay: 0.9}\n"),
        [
            "data.scale=[0.2, 1]",
            "schedule.milestones=[10,20]",
            "optim.nesterov=true",
            "train.micro_batch=null",
            "ema=null",
            "data={flip: 0, workers: 2}",
            "run.name=123",
            "run.dir=a=b",
        ],
    )
    assert config.data.scale == (0.2, 1)
    assert config.schedule.milestones == (10, 20)
    assert config.optim.nesterov is True
    assert config.train.micro_batch is None
    assert config.ema is None
    assert (config.data.flip, config.data.workers) == (0, 2)
    assert config.run == RunConfig(name="123", dir="a=b")


def test_an_override_opens_an_optional_part(write: Write) -> None:
    assert load_config(write(), ["ema.decay=0.99"]).ema == EmaConfig(decay=0.99)


def test_values_never_change() -> None:
    config = Config()
    with pytest.raises(ValidationError, match="frozen"):
        config.optim.lr = 1.0  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.train = TrainConfig()  # type: ignore[misc]


def test_valid_keys_are_complete() -> None:
    keys = valid_keys()
    assert {"run", "run.name", "ema.decay", "data.synthetic.train", "trace"} <= set(keys)
    assert len(keys) == len(set(keys))
    assert all(key.partition(".")[0] in Config.model_fields for key in keys)


# extends


def test_extends_is_relative_to_its_file(write: Write) -> None:
    write("optim: {lr: 1, momentum: 0.5}\ntrain: {epochs: 7}\nschedule: {warmup_epochs: 1}\n", "base/far.yaml")
    write("extends: ../base/far.yaml\noptim: {lr: 2}\n", "mid/near.yaml")
    config = load_config(write("extends: mid/near.yaml\ntrain: {epochs: 9}\n"), ["schedule.warmup_epochs=2"])
    assert (config.optim.lr, config.optim.momentum) == (2, 0.5)
    assert config.train.epochs == 9
    assert config.schedule.warmup_epochs == 2


def test_extends_takes_an_absolute_path(write: Write, tmp_path: Path) -> None:
    write("train: {epochs: 7}\n", "base.yaml")
    assert load_config(write(f"extends: {tmp_path / 'base.yaml'}\n", "sub/c.yaml")).train.epochs == 7


def test_extends_can_switch_a_part_off(write: Write) -> None:
    write("ema: {decay: 0.9}\n", "base.yaml")
    assert load_config(write("extends: base.yaml\nema: null\n")).ema is None


@pytest.mark.parametrize(
    "files",
    [
        {"c.yaml": "extends: c.yaml\n"},
        {"c.yaml": "extends: a.yaml\n", "a.yaml": "extends: ./c.yaml\n"},
        {"c.yaml": "extends: a.yaml\n", "a.yaml": "extends: sub/b.yaml\n", "sub/b.yaml": "extends: ../a.yaml\n"},
    ],
)
def test_extends_in_a_circle(write: Write, files: dict[str, str]) -> None:
    for name, text in files.items():
        write(text, name)
    assert "extends itself, by way of" in refused("c.yaml")


def test_extends_a_missing_file(write: Write) -> None:
    message = refused(write("extends: sub/no.yaml\n"))
    assert "sub/no.yaml" in message
    assert "(extended by c.yaml)" in message


@pytest.mark.parametrize("value", ["[a.yaml, b.yaml]", "3", "{a: b}"])
def test_extends_takes_one_name(write: Write, value: str) -> None:
    message = refused(write(f"trace: true\nextends: {value}\n"))
    assert message.startswith("extends: takes one file name, got ")
    assert message.endswith("(c.yaml:2)")


def test_a_mistake_is_placed_in_the_file_that_holds_it(write: Write) -> None:
    write("train:\n  epochs: 7\n  epoch: 8\n", "base.yaml")
    assert "(base.yaml:3)" in refused(write("extends: base.yaml\n"))
    write("optim:\n  lr: 1\n", "base.yaml")
    assert "(c.yaml:3)" in refused(write("extends: base.yaml\noptim:\n  lr: -1\n"))
    assert "(command line)" in refused(write("extends: base.yaml\n"), "optim.lr=-1")


# Mistakes


@pytest.mark.parametrize(
    ("text", "key", "line", "hint"),
    [
        ("optim:\n  learning_rate: 1\n", "optim.learning_rate", 2, ""),
        ("optim:\n  momentm: 1\n", "optim.momentm", 2, "did you mean optim.momentum?"),
        ("\n\nlr: 1\n", "lr", 3, "did you mean optim.lr?"),
        ("train:\n  lr: 1\n", "train.lr", 2, "did you mean optim.lr?"),
        ("run:\n  name: a\noptimm:\n  lr: 1\n", "optimm", 3, "did you mean optim?"),
        ("data:\n  synthetic:\n    trainn: 3\n", "data.synthetic.trainn", 3, "did you mean data.synthetic.train?"),
        ("ema: {deccay: 0.9}\n", "ema.deccay", 1, "did you mean ema.decay?"),
        ("qqq: 1\n", "qqq", 1, "--help"),
        ("1: 2\n", "1", 1, "--help"),
        ("train:\n  batch_size: 3\n", "train.batch_size", 2, "did you mean train.global_batch?"),
    ],
)
def test_unknown_keys(write: Write, text: str, key: str, line: int, hint: str) -> None:
    message = refused(write(text))
    assert message.startswith(f"unknown key {key} (c.yaml:{line})")
    assert hint in message


def test_unknown_override(write: Write) -> None:
    message = refused(write(), "train.epoch=3")
    assert message == "unknown key train.epoch (command line); did you mean train.epochs?"


@pytest.mark.parametrize(
    ("text", "start", "line"),
    [
        ("train:\n  epochs: many\n", "train.epochs takes a number above 0, got 'many'", 2),
        ("train:\n  epochs: '90'\n", "train.epochs takes a number above 0, got '90'", 2),
        ("train:\n  global_batch: 2.5\n", "train.global_batch takes a whole number above 0, got 2.5", 2),
        ("train:\n  global_batch: 1e3\n", "train.global_batch takes ", 2),
        ("train:\n  compile: 1\n", "train.compile takes true, false or auto, got 1", 2),
        ("train:\n  precision: int8\n", "train.precision takes bf16, fp16, tf32 or fp32, got 'int8'", 2),
        ("train:\n  label_smoothing: 1\n", "train.label_smoothing takes a number of at least 0 and below 1, got 1", 2),
        ("optim:\n  lr: .nan\n", "optim.lr takes a number above 0, got nan, which is not finite", 2),
        ("optim:\n  lr: .inf\n", "optim.lr takes a number above 0, got inf, which is not finite", 2),
        ("optim:\n  lr: 0\n", "optim.lr takes a number above 0, got 0", 2),
        ("run:\n  name: 12\n", "run.name takes a name of letters, digits, '_', '.', '+' and '-', got 12", 2),
        ("run:\n  name: a/b\n", "run.name takes a name of letters", 2),
        ("run:\n  name:\n", "run.name takes a name of letters, digits, '_', '.', '+' and '-', got None", 2),
        ("run:\n  dir: ''\n", "run.dir takes text that is not empty, got ''", 2),
        ("run:\n  seed: -1\n", "run.seed takes a whole number of at least 0 and below 9223372036854775808, got -1", 2),
        ("data:\n  scale: [1]\n", "data.scale takes two numbers: data.scale=[0.08,1.0], got [1]", 2),
        ("data:\n  scale:\n  - 0.1\n  - x\n", "data.scale takes two numbers: data.scale=[0.08,1.0], got [0.1, 'x']", 2),
        (
            "data:\n  mean: [1, 2, 3, 4]\n",
            "data.mean takes three numbers: data.mean=[123.675,116.28,103.53], got [1, 2, 3, 4]",
            2,
        ),
        ("model: resnet18\n", "model takes keys of its own: model.name=resnet18", 1),
        ("trace: true\ndata:\n", "data takes keys of its own: data.root=${IMAGENET_DIR}", 2),
        ("ema: 0.9\n", "ema takes true, false, keys of its own or null: ema.decay=0.9", 1),
    ],
)
def test_wrong_values(write: Write, text: str, start: str, line: int) -> None:
    message = refused(write(text))
    assert message.startswith(start)
    assert message.endswith(f"(c.yaml:{line})")


def test_more_mistakes_are_counted(write: Write) -> None:
    assert refused(write("train: {epochs: x}\noptim: {lr: x, momentum: x}\n")).endswith("(and 2 more)")


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["data.eval_size=300", "data.eval_resize=256"], "data.eval_size 300 is larger than data.eval_resize 256"),
        (["data.scale=0.5,0.1"], "data.scale [0.5, 0.1] is not"),
        (["data.scale=[0.5, 0.1]"], "data.scale [0.5, 0.1] is not"),
        (["data.scale=[0, 1]"], "data.scale"),
        (["data.scale=[0.5, 1.1]"], "data.scale"),
        (["data.ratio=[2, 1]"], "data.ratio [2.0, 1.0] is not"),
        (["data.std=[1, 0, 1]"], "data.std"),
        (["optim.nesterov=true", "optim.momentum=0"], "optim.nesterov needs optim.momentum > 0"),
        (["schedule.milestones=[30, 20]"], "schedule.milestones [30.0, 20.0] must rise"),
        (["schedule.milestones=[20, 20]"], "must rise"),
        (["train.micro_batch=2048"], "train.micro_batch 2048 exceeds train.global_batch 1024"),
        (["train.epochs=3", "schedule.warmup_epochs=5"], "schedule.warmup_epochs 5 exceeds train.epochs 3"),
        (["schedule.name=step", "train.epochs=60"], "schedule.milestones [60, 80] lie beyond train.epochs 60"),
    ],
)
def test_values_that_contradict(write: Write, overrides: list[str], part: str) -> None:
    message = refused(write(), *overrides)
    assert part in message
    assert "(command line)" in message


def test_a_contradiction_is_placed_where_its_key_stands(write: Write) -> None:
    path = write("train:\n  global_batch: 64\n  micro_batch: 128\n")
    assert refused(path) == "train.micro_batch 128 exceeds train.global_batch 64 (c.yaml:3)"


def test_a_run_of_few_steps_keeps_its_schedule(write: Write) -> None:
    words = ["train.steps=10", "train.epochs=1", "schedule.name=step", "schedule.warmup_epochs=5"]
    config = load_config(write(), words)
    assert config.schedule.warmup_epochs == 5


@pytest.mark.parametrize("word", ["train.epochs", "=3", "configs/other.yaml", "--", ""])
def test_words_that_are_no_override(write: Write, word: str) -> None:
    assert "is not key=value (a configuration file goes behind --config)" in refused(write(), word)


@pytest.mark.parametrize("word", ["ema={decay: 0.9", "ema=a: b: c", "ema=!!python/name:os.system", "ema={decay: 0x_}"])
def test_mappings_that_are_no_yaml(write: Write, word: str) -> None:
    message = refused(write(), word)
    assert message.startswith("command line")
    assert "not valid YAML" in message


def test_a_mapping_has_no_comment(write: Write) -> None:
    assert "as a comment" in refused(write(), "run={dir: /x} #2")
    assert load_config(write(), ["run={dir: '/x #2'}"]).run.dir == "/x #2"


TYPED = [
    *(
        "/run #2",
        "#2",
        "a: b",
        "*a",
        "&a",
        "!a",
        "%a",
        "@a",
        "`a`",
        "{a}",
        "[a]",
        "[a, b",
        "{a: b}",
        "'a'",
        '"a"',
        "'a",
    ),
    *(" a ", "a b", "a=b", "=", "-", "- a", "? a", "|", ">", "null", "~", "None", "yes", "007", "1.0", "1e3", "0x_"),
    *(
        "12:30:45",
        "2026-03-01",
        "---",
        "\t",
        "a\tb",
        "\x01",
        "\x7f",
        "\u2028",
        "\ufeff",
        "läufe/日本",
        "/d\udcff\udcfe",
    ),
]


@pytest.mark.parametrize("text", [text for text in TYPED if text.strip()])
def test_text_is_what_was_typed(write: Write, text: str) -> None:
    config = load_config(write(), [f"run.dir={text}", f"data.root={text}", f"wandb.project={text}"])
    assert (config.run.dir, config.data.root, config.wandb.project) == (text, text, text)
    assert load_config(write(dump_config(config))) == config
    if "--" not in text:  # of a parser's own
        assert parse_args([f"--run.dir={text}"]).overrides == [f"run.dir={text}"]


@pytest.mark.parametrize("name", ["null", "yes", "007", "1.0", "1e-3", "12", "true", "~"])
def test_a_name_is_text(write: Write, name: str) -> None:
    if name == "~":
        assert "run.name takes a name of letters" in refused(write(), f"run.name={name}")
    else:
        assert load_config(write(), [f"run.name={name}"]).run.name == name


@pytest.mark.parametrize("null", ["null", "~", "None", "NULL"])
def test_null_where_a_key_takes_it(write: Write, null: str) -> None:
    words = ["model.stem", "ema", "checkpoint.every_minutes", "train.micro_batch", "data.index_dir", "wandb.entity"]
    path = write("model: {stem: small}\nema: {decay: 0.9}\ndata: {index_dir: x}\nwandb: {entity: y}\n")
    config = load_config(path, [f"{word}={null}" for word in words])
    assert (config.model.stem, config.ema, config.checkpoint.every_minutes) == (None, None, None)
    assert (config.train.micro_batch, config.data.index_dir, config.wandb.entity) == (None, None, None)
    assert "optim.lr takes a number above 0, got" in refused(write(), f"optim.lr={null}")


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("true", True),
        ("Yes", True),
        ("ON", True),
        ("1", True),
        ("False", False),
        ("no", False),
        ("off", False),
        ("0", False),
    ],
)
def test_booleans_in_any_form(write: Write, word: str, value: bool) -> None:
    assert load_config(write(), [f"trace={word}", f"train.compile={word}"]).trace is value


@pytest.mark.parametrize(
    ("words", "ema"),
    [
        (["ema=true"], EmaConfig()),
        (["ema=Yes"], EmaConfig()),
        (["ema=false"], None),
        (["ema.decay=0.9", "ema=off"], None),
        (["ema=true", "ema.decay=0.9"], EmaConfig(decay=0.9)),
        (["ema.decay=auto"], EmaConfig(decay="auto")),
    ],
)
def test_ema_is_a_switch(write: Write, words: list[str], ema: EmaConfig | None) -> None:
    assert load_config(write(), words).ema == ema


@pytest.mark.parametrize(("word", "ema"), [("true", EmaConfig()), ("false", None)])
def test_ema_is_a_switch_in_a_file(write: Write, word: str, ema: EmaConfig | None) -> None:
    assert load_config(write(f"ema: {word}\n")).ema == ema
    write("ema: {decay: 0.9}\n", "base.yaml")
    over = load_config(write(f"extends: base.yaml\nema: {word}\n")).ema
    assert over == (EmaConfig(decay=0.9) if ema else None)  # what is on already keeps its keys


AUTO = [key for key in valid_keys() if (kind := find_kind(key)) and kind.auto]


@pytest.mark.parametrize("key", AUTO)
def test_auto_where_a_key_takes_it(write: Write, key: str) -> None:
    part, _, name = key.partition(".")
    typed = load_config(write(), [f"{key}=auto"])
    assert typed == load_config(write(f"{part}: {{{name}: auto}}\n"))
    value = getattr(getattr(typed, part), name)
    assert value == "auto" or key in ("data.eval_size", "data.eval_resize")  # which the configuration alone tells
    assert " or auto" in describe(key) or ", auto or null" in describe(key)


def test_auto_is_refused_elsewhere(write: Write) -> None:
    assert len(AUTO) > 5
    assert refused(write(), "optim.lr=auto") == "optim.lr takes a number above 0, got 'auto' (command line)"


# W&B's variables


@pytest.mark.parametrize(("key", "variable"), WANDB_NAMES.items())
def test_wandbs_variables_win_over_defaults_alone(
    write: Write, monkeypatch: pytest.MonkeyPatch, key: str, variable: str
) -> None:
    lists, name = key.endswith("tags"), key.partition(".")[2]

    def found(path: Path, *words: str) -> object:
        return getattr(load_config(path, words).wandb, name)

    default = found(write())
    monkeypatch.setenv(variable, "a,b")
    assert found(write()) == (("a", "b") if lists else "a,b") != default
    mine = ("mine",) if lists else "mine"
    assert found(write(), f"{key}=mine") == mine
    assert found(write(f"wandb: {{{name}: {'[mine]' if lists else 'mine'}}}\n")) == mine
    monkeypatch.setenv(variable, "")
    assert found(write()) == default


def test_every_key_has_its_own_variable() -> None:
    assert set(WANDB_NAMES) < set(valid_keys())
    assert len(set(WANDB_NAMES.values())) == len(WANDB_NAMES)


@pytest.mark.parametrize("text", ["[0.2, 1.0]", "0.2,1.0", "0.2, 1", "(0.2,1)", " [2e-1,1e0,] "])
def test_lists_in_any_form(write: Write, text: str) -> None:
    assert load_config(write(), [f"data.scale={text}"]).data.scale == (0.2, 1)


def test_lists_of_any_length(write: Write) -> None:
    assert load_config(write(), ["schedule.milestones=30"]).schedule.milestones == (30,)
    assert load_config(write(), ["schedule.milestones=[]"]).schedule.milestones == ()


def test_numbers_are_decimal(write: Write) -> None:
    assert load_config(write(), ["run.seed=010"]).run.seed == 10  # YAML 1.1: 8
    assert "got '1:30'" in refused(write(), "train.epochs=1:30")  # YAML 1.1: 90


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("model=resnet18", "model takes keys of its own: model.name=resnet18"),
        ("schedule=step", "schedule takes keys of its own: schedule.name=step"),
        ("data=/x", "data takes keys of its own: data.root=/x"),
        ("train=12", "train takes keys of its own: train.epochs=12"),
        ("ema=maybe", "ema takes true, false, keys of its own or null: ema.decay=auto"),
        ("wandb=false", "wandb takes keys of its own: wandb.mode=online"),
        ("data.scale=0.5", "data.scale takes two numbers: data.scale=[0.08,1.0], got [0.5]"),
        ("data.scale=[a,b]", "data.scale takes two numbers: data.scale=[0.08,1.0], got ['a', 'b']"),
        (
            "schedule.milestones=null",
            "schedule.milestones takes a list of numbers: schedule.milestones=[30,60,80], got ",
        ),
        ("trace=maybe", "trace takes true or false, got 'maybe'"),
        ("train.precision=FP8", "train.precision takes bf16, fp16, tf32 or fp32, got 'FP8'"),
        ("model.stem=big", "model.stem takes imagenet, small or null, got 'big'"),
        ("optim.name=adamw", "optim.name takes sgd, got 'adamw'"),
        ("train.steps=0", "train.steps takes a whole number above 0 or null, got 0"),
        ("train.steps=true", "train.steps takes a whole number above 0 or null, got 'true'"),
        ("data.flip=2", "data.flip takes a number of at least 0 and of at most 1, got 2"),
        ("optim.lr=inf", "optim.lr takes a number above 0, got inf, which is not finite"),
        ("data.root=", "data.root= stands without a value: data.root takes text that is not empty"),
        ("data.root= ", "data.root= stands without a value: data.root takes text that is not empty"),
        (
            "checkpoint.every_minutes=",
            "checkpoint.every_minutes= stands without a value: checkpoint.every_minutes takes",
        ),
        ("ema=", "ema= stands without a value: ema takes true, false, keys of its own or null: ema.decay=auto"),
        ("run.name.x=1", "run.name takes a name of letters, digits, '_', '.', '+' and '-', got {'x': '1'}"),
        ("run.dir=a\nb", "run.dir: a value is one line, got 'a\\nb'"),
        ("run.dir=a\0b", "run.dir: a value is one line, got 'a\\x00b'"),
        ("lr=0.1", "unknown key lr (command line); did you mean optim.lr?"),
        ("batch_size=8", "unknown key batch_size (command line); did you mean train.global_batch?"),
    ],
)
def test_the_right_form_is_shown(write: Write, word: str, message: str) -> None:
    said = refused(write(), word)
    assert said.startswith(message)
    assert said.endswith("(command line)") or "unknown key" in said


def test_every_key_says_what_it_takes(write: Write) -> None:
    for key in valid_keys():
        said = refused(write(f"{'.'.join(key.split('.'))!r}: 1\n"))  # a dotted key in a file is no key
        assert said.startswith(f"unknown key {key}") or "." not in key
        words = describe(key)
        assert words.startswith(f"{key} takes ")
        assert "typing" not in words
        assert "<" not in words


@pytest.mark.parametrize("word", [".=1", "train.=1", ".train=1", "train..epochs=1", "run.name.x=1", "train=1", "1=2"])
def test_overrides_of_odd_keys(write: Write, word: str) -> None:
    assert "(command line)" in refused(write(), word)


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("run: {name: a}\ntrace: true\nrun: {seed: 1}\n", ("run", 1, 3)),
        ("optim:\n  lr: 1\n  momentum: 0.5\n  lr: 2\n", ("optim.lr", 2, 4)),
    ],
)
def test_duplicate_keys(write: Write, text: str, places: tuple[str, int, int]) -> None:
    key, first, second = places
    assert refused(write(text)) == f"{key} stands twice: c.yaml:{first} and c.yaml:{second}"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("run:\n\tname: a\n", ":2"),
        ("run: {name: a\n", ":2"),
        ("run: *nothing\n", ":1"),
        ("run: 'a\n", ":2"),
        ("trace: true\nrun: {name: !!python/object:os.system x}\n", ":2"),
        ("a: 1\n---\nb: 2\n", ":2"),
        ("? [a, b]\n: 1\n", ":1"),
        ("run:\n  name: \x01\n", ""),
        ("run: {name: 0x_}\n", ""),
    ],
)
def test_bad_yaml(write: Write, text: str, line: str) -> None:
    assert refused(write(text)).startswith(f"c.yaml{line}: not valid YAML: ")


@pytest.mark.parametrize("text", ["run: &x {name: *x}\n", "[" * 3000])
def test_bottomless_yaml(write: Write, text: str) -> None:
    assert "nested too deeply" in refused(write(text))


@pytest.mark.parametrize("text", ["- run\n- model\n", "just words\n", "3\n", "true\n"])
def test_not_a_mapping(write: Write, text: str) -> None:
    assert refused(write(text)).startswith("c.yaml: a configuration is a mapping of parts")


def test_files_that_cannot_be_read(write: Write, tmp_path: Path) -> None:
    assert refused(write(b"run: \xff\xfe\n")) == "c.yaml: not a UTF-8 text file"
    assert refused("none.yaml") == f"cannot read configuration none.yaml: neither {tmp_path} nor {ROOT} has it"
    assert refused(tmp_path / "none.yaml").endswith("none.yaml: No such file or directory")
    assert refused(tmp_path).endswith("Is a directory")
    assert "cannot read configuration" in refused(write('extends: "a\\0b"\n'))


# References


def test_references(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("IMAGENET_DIR", "/data/imagenet")
    path = write("run: {name: first, dir: '${SCRATCH}/${run.name}-${data.size}'}\n")
    config = load_config(path, ["run.name=second", "data.index_dir=${data.root}/index"])
    assert config.run.dir == "/scratch/me/second-224"
    assert config.data.root == "/data/imagenet"
    assert config.data.index_dir == "/data/imagenet/index"


def test_the_default_run_directory_follows_the_name(write: Write) -> None:
    assert load_config(write(), ["run.name=mine"]).run.dir == "runs/mine"


def test_an_unset_variable_is_an_error_but_for_the_data(write: Write) -> None:
    assert load_config(write()).data.root == "${IMAGENET_DIR}"
    message = refused(write(), "run.dir=${UNSET_HERE}/x")
    assert message.startswith("run.dir: cannot resolve ${UNSET_HERE} in '${UNSET_HERE}/x'")
    assert "set the environment variable UNSET_HERE" in message
    assert "set the environment variable IMAGENET_DIR" in refused(write(), "data.index_dir=${data.root}/index")


def test_an_empty_variable_is_unset(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "")
    assert "set the environment variable SCRATCH" in refused(write(), "run.dir=${SCRATCH}/x")


@pytest.mark.parametrize("reference", ["run.nothing", "run.name.x", "train.micro_batch", "data.synthetic", "a.b"])
def test_references_to_nothing(write: Write, reference: str) -> None:
    assert "no such key with a value" in refused(write(), f"run.dir=${{{reference}}}")


def test_references_in_a_circle(write: Write) -> None:
    assert "run.dir: refers to itself" in refused(write(), "run.dir=${run.dir}/x")
    assert "refers to itself" in refused(write(), "run.dir=${data.index_dir}", "data.index_dir=${run.dir}")


# Writing it down


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(run=RunConfig(name="1e3", dir="a: b # c", seed=2**63 - 1), ema=EmaConfig(decay=1e-5), trace=True),
        Config(run=RunConfig(name="2026-03-01", dir="~/läufe/null")),
        Config(run=RunConfig(name="0123", dir="1_000")),
        Config(optim=OptimConfig(lr=1e-12, weight_decay=0), data=DataConfig(scale=(0.25, 1.0), index_dir="yes")),
    ],
)
def test_what_is_dumped_loads_as_it_was(write: Write, config: Config) -> None:
    resolved, expected = load_config(write(dump_config(config), "first.yaml")), follow_names(config)
    assert resolved.run.name == expected.run.name
    assert resolved.ema == config.ema
    assert resolved.optim == config.optim
    assert resolved.data == expected.data
    assert load_config(write(dump_config(resolved), "second.yaml")) == resolved


# Where files are


def test_configurations_go_by_their_names(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = load_config("configs/own_images.yaml")
    assert load_config("own_images") == load_config("own_images.yaml") == own
    write("extends: own_images.yaml\ntrain: {epochs: 3}", "mine.yaml")
    mine = load_config("mine.yaml")
    assert (mine.train.epochs, mine.train.global_batch) == (3, own.train.global_batch)


def test_a_scale_of_0_to_1_is_told(write: Write) -> None:
    with pytest.raises(
        UserError, match=r"data\.std .* is on a scale of 0 to 1; here, as in data\.mean, it is 0 to 255"
    ):
        load_config(write(""), ["data.mean=[0.485,0.456,0.406]", "data.std=[0.229,0.224,0.225]"])


def test_configurations_are_found_beside_the_code(write: Write, tmp_path: Path) -> None:
    here = load_config(DEFAULT_CONFIG)
    assert here.model.name == "resnet50"
    write("run: {name: mine}\n", "configs/resnet50.yaml")
    assert load_config(DEFAULT_CONFIG).run.name == "mine"  # the working directory's goes first
    assert load_config("configs/resnet101.yaml").run.name == "resnet101-imagenet"  # its extends: is beside it, not here
    (tmp_path / "configs/resnet50.yaml").unlink()
    (tmp_path / "configs/resnet50.yaml").mkdir()
    assert refused(DEFAULT_CONFIG).endswith("Is a directory")


def test_imports_no_torch() -> None:
    code = "import sys, distrib.cli; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["False", "False"]
