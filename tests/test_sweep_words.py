"""launch sweep: what words mean, and the names of the runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from sweeps import QUICK

from distrib.cli import load_config
from distrib.config import UserError
from launch.sweep.plan import plan_sweep
from launch.sweep.values import read_settings


@pytest.mark.parametrize(
    ("word", "key", "values"),
    [
        ("optim.lr=0.5,1.0", "optim.lr", ["0.5", "1.0"]),
        ("optim.lr=0.5, 1e-3", "optim.lr", ["0.5", "1e-3"]),
        ("optim.lr=[0.5|1.0]", "optim.lr", ["0.5", "1.0"]),
        ("optim.lr=0.5", "optim.lr", ["0.5"]),
        ("seed=0..3", "run.seed", ["0", "1", "2", "3"]),
        ("run.seed=0..1,7", "run.seed", ["0", "1", "7"]),
        ("seed=3..3", "run.seed", ["3"]),
        ("optim.lr=0..3", "optim.lr", ["0..3"]),  # no whole number: told as none by the configuration's check
        ("data.scale=0.08,1.0", "data.scale", ["0.08,1.0"]),
        ("data.scale=[0.08,1.0]", "data.scale", ["[0.08,1.0]"]),
        ("data.scale=[0.08,1|0.25,1]", "data.scale", ["0.08,1", "0.25,1"]),
        ("data.classes=cat,dog", "data.classes", ["cat,dog"]),
        ("data.classes=[cat,dog|cat]", "data.classes", ["cat,dog", "cat"]),
        ("schedule.milestones=30,60", "schedule.milestones", ["30,60"]),
        ("schedule.warmup_epochs=auto,5", "schedule.warmup_epochs", ["auto", "5"]),
        ("schedule.name=cosine,step", "schedule.name", ["cosine", "step"]),
        ("train.compile=true,false", "train.compile", ["true", "false"]),
        ("train.micro_batch=null,16..18", "train.micro_batch", ["null", "16", "17", "18"]),
        ("ema=true,false", "ema", ["true", "false"]),
        ("ema={decay: 0.9, every: 2}", "ema", ["{decay: 0.9, every: 2}"]),
        ("ema=[{decay: 0.9, every: 2}|false]", "ema", ["{decay: 0.9, every: 2}", "false"]),
        ("model.name=resnet18,resnet34", "model.name", ["resnet18", "resnet34"]),
        ('data.root="/a,b",/c', "data.root", ["/a,b", "/c"]),
        ("data.root=[/a,b|/c]", "data.root", ["/a,b", "/c"]),
        ('data.root="/a,b"', "data.root", ["/a,b"]),
        ('data.root=/a"b', "data.root", ['/a"b']),
        ("wandb.notes=first, second", "wandb.notes", ["first, second"]),
        ("wandb.tags=a,b", "wandb.tags", ["a,b"]),
        ("run.name=a,b", "run.name", ["a,b"]),
        ("no.key=1,2", "no.key", ["1,2"]),
    ],
)
def test_what_a_word_means(word: str, key: str, values: list[str]) -> None:
    (setting,) = read_settings([word])
    assert (setting.key, list(setting.values)) == (key, values)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "nothing is varied"),
        (["optim.lr=0.5", "seed=1..1"], "nothing is varied"),
        (["foo"], "'foo' is not key=value"),
        (["lr=0.5,1.0"], "unknown key lr"),
        (["optim.lr=0.5,,1"], "optim.lr=0.5,,1 has an empty value"),
        (["seed=0,"], "seed=0, has an empty value"),
        (["optim.lr=[0.5|]"], "has an empty value"),
        (["optim.lr=1,1.0"], "has 1.0 twice"),
        (["train.micro_batch=null,none"], "has null twice"),
        (["seed=4..0"], "run.seed=4..0: a range goes up, 0..4"),
        (["seed=0..999999999"], "more than 100000"),
        (["seed=0..1000"], "1001 runs are more than 1000: leave values out, or consent with --yes"),
        (["seed=0..9", "train.steps=1..101"], "1010 runs are more than 1000"),
        (["optim.lr=1,2", "optim.lr=3"], "optim.lr is typed twice"),
        (["seed=0..2", "run.seed=3"], "run.seed is typed twice"),
        (["run.name=[a|b]"], "run.name cannot be varied"),
        (["wandb.notes=[a|b]"], "wandb.notes cannot be varied"),
        (["optim.lr=1,-2"], "optim.lr takes a number above 0, got -2"),
        (["data.scale=[0.1,1|0.5,0.2]"], "is not 0 < low <= high <= 1"),
        (["data.eval_size=auto,28"], "two runs would be the same, eval_size=28,seed=0"),
        (
            ["launch.preflight=true,false"],
            "would be the same, preflight=true,seed=0 and preflight=false,seed=0",
        ),
        (["data.root=/a/b,/a-b"], "two runs would be called root=a-b,seed=0"),
    ],
)
def test_mistakes_in_words(words: list[str], told: str) -> None:
    with pytest.raises(UserError) as error:
        plan_sweep(QUICK, words)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


# The plan


def names(*words: str) -> list[str]:
    return [element.name for element in plan_sweep(QUICK, words).elements]


def test_the_product_in_the_order_of_the_words() -> None:
    sweep = plan_sweep(QUICK, ["optim.lr=0.5,1", "train.epochs=3", "seed=0..1", "ema=true,false"])
    assert [element.name for element in sweep.elements] == [
        *("lr=0.5,ema=true,seed=0", "lr=0.5,ema=false,seed=0", "lr=0.5,ema=true,seed=1", "lr=0.5,ema=false,seed=1"),
        *("lr=1,ema=true,seed=0", "lr=1,ema=false,seed=0", "lr=1,ema=true,seed=1", "lr=1,ema=false,seed=1"),
    ]
    assert (sweep.name, sweep.folder, sweep.keys) == (
        "quickstart-sweep", Path("runs/quickstart-sweep"), ["optim.lr", "ema"],
    )  # fmt: skip
    one = sweep.elements[3]
    assert (one.config.optim.lr, one.config.ema, one.config.run.seed, one.config.train.epochs) == (0.5, None, 1, 3)
    assert (one.seed, one.settings) == (1, {"optim.lr": "0.5", "ema": "false"})
    assert one.config.run.name == "quickstart-sweep_lr-0.5_ema-false_seed-1"
    assert one.folder == Path("runs/quickstart-sweep/lr=0.5,ema=false,seed=1")
    assert one.config.wandb.group == "quickstart-sweep"
    assert one.config.wandb.tags == ("lr=0.5", "seed=1", "ema=false")
    # The words alone come to the configuration.
    assert load_config(QUICK, one.words) == one.config
    assert sweep.elements[0].config.ema is not None


def test_one_spelling_of_a_value() -> None:
    assert names("optim.lr=1,5e-1") == names("optim.lr=1.0,0.50") == ["lr=1,seed=0", "lr=0.5,seed=0"]
    assert names("optim.lr=1e-5,2") == ["lr=1e-05,seed=0", "lr=2,seed=0"]
    assert names("data.scale=[0.08,1|0.25,1]", "seed=3") == ["scale=0.08-1,seed=3", "scale=0.25-1,seed=3"]
    assert names("train.micro_batch=null,16") == ["micro_batch=null,seed=0", "micro_batch=16,seed=0"]
    assert names("optim.nesterov=yes,no") == ["nesterov=true,seed=0", "nesterov=false,seed=0"]
    assert names("data.root=/data/a,~/b") == ["root=data-a,seed=0", "root=b,seed=0"]
    # Two keys of one last name.
    assert names("model.name=resnet18,resnet34", "schedule.name=cosine,linear")[0] == (
        "model.name=resnet18,schedule.name=cosine,seed=0"
    )


def test_the_seed_always_stands_in_a_name() -> None:
    """So that more seeds, later, are more runs of the same sweep."""
    assert set(names("optim.lr=0.5,1")) < set(names("optim.lr=0.5,1,2", "seed=0..4"))


def test_long_names_are_cut_and_stay_apart() -> None:
    long = "x" * 300
    found = names(f"data.root=/{long}a,/{long}b")
    assert len(set(found)) == 2
    assert max(map(len, found)) < 140


def test_where_a_sweep_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    def folder(*words: str, name: str | None = None) -> str:
        sweep = plan_sweep(QUICK, ["seed=0,1", *words], name)
        assert sweep.elements[1].folder == sweep.folder / "seed=1"
        return f"{sweep.name} {sweep.folder}"

    assert folder("run.name=mine") == "mine-sweep runs/mine-sweep"
    assert folder(name="first") == "first runs/first"
    assert folder("run.dir=/big/x") == "quickstart-sweep /big/x"
    assert folder("run.dir=/big/x", name="first") == "first /big/x"
    assert folder("run.dir=/big/${run.name}") == "quickstart-sweep /big/quickstart"
    monkeypatch.setenv("WANDB_RUN_GROUP", "theirs")
    sweep = plan_sweep(QUICK, ["seed=0,1", "wandb.tags=own,two"])
    assert (sweep.elements[0].config.wandb.group, sweep.elements[0].config.wandb.tags) == ("theirs", ("own", "two"))


def test_a_configuration_that_needs_its_varied_values() -> None:
    """Without them micro_batch would exceed the batch of the file."""
    sweep = plan_sweep(QUICK, ["train.micro_batch=100", "train.global_batch=128,256"])
    assert [element.config.train.global_batch for element in sweep.elements] == [128, 256]


def test_consent_to_many_runs() -> None:
    assert len(plan_sweep(QUICK, ["seed=0..20"], most=None).elements) == 21
    with pytest.raises(UserError, match="21 runs are more than 20"):
        plan_sweep(QUICK, ["seed=0..20"], most=20)
