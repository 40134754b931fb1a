"""launch sweep: what words mean, names, folders of other settings, the table, and real sweeps."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distrib.cli import dump_config, load_config
from distrib.compare import p_value
from distrib.config import UserError
from distrib.lease import Lease
from launch.__main__ import main
from launch.sweep import here, state, table
from launch.sweep.plan import Sweep, plan_sweep
from launch.sweep.state import Found, look_at
from launch.sweep.values import read_settings

ROOT = Path(__file__).resolve().parent.parent
QUICK = "configs/quickstart.yaml"

# In place of train.py: does what its learning rate says, and leaves what a run leaves, by a formula.
STAND_IN = """
import json, os, pathlib, signal, sys, time
sys.path.insert(0, os.environ["ROOT"])
from distrib.cli import dump_config, load_config
words = sys.argv[3:]
config = load_config(sys.argv[2], words)
folder, lr, seed = pathlib.Path(config.run.dir), config.optim.lr, config.run.seed
folder.mkdir(parents=True, exist_ok=True)
(folder / "config.yaml").write_text(dump_config(config))
with (folder / "starts").open("a") as file:
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    file.write(f"{os.getpid()} {os.environ.get('OMP_NUM_THREADS')} {gpus} {os.environ.get('WANDB_RUN_ID')}\\n")

def end(status, code):
    (folder / "summary.json").write_text(json.dumps({"status": status, "top1": 10 * lr + seed, "loss": lr}))
    sys.exit(code)

if lr == 3 and not (folder / "mended").exists():
    sys.exit("error: no such data")
if lr == 4:
    end("diverged", 1)
if lr == 5:
    signal.signal(signal.SIGTERM, lambda *_: end("stopped", 75))
    (folder / "ready").touch()
    time.sleep(60)
end("finished", 0)
"""
SWEEP = (
    "import sys; from pathlib import Path; from launch.__main__ import main; "
    "sys.exit(main(sys.argv[2:], Path(sys.argv[1])))"
)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ROOT", str(ROOT))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "train.py").write_text(STAND_IN)
    return tmp_path / "train.py"


# Words


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


# States


def trained(folder: Path, sweep: Sweep, *words: str, **summary: Any) -> None:
    """What a run of the first element, with ``words`` behind its own, leaves."""
    folder.mkdir(parents=True, exist_ok=True)
    config = load_config(QUICK, [*sweep.elements[0].words, *words])
    (folder / "config.yaml").write_text(dump_config(config))
    if summary:
        (folder / "summary.json").write_text(json.dumps(summary))


def test_states(tmp_path: Path) -> None:
    sweep = plan_sweep(QUICK, ["seed=0,1", f"run.dir={tmp_path}"])
    one = sweep.elements[0]
    assert look_at(one) == Found(state.WAITING)
    trained(one.folder, sweep)
    assert look_at(one).state == state.UNFINISHED
    for status, expected in (("stopped", state.UNFINISHED), ("finished", "finished"), ("diverged", "diverged")):
        trained(one.folder, sweep, status=status, top1=3.0)
        assert look_at(one) == Found(expected, {"status": status, "top1": 3.0})
    lease = Lease(one.folder).acquire()
    assert look_at(one).state == state.RUNNING
    # Its process is gone; and one elsewhere, whose heart stands still.
    written = json.loads((one.folder / "writer.json").read_text())
    (one.folder / "writer.json").write_text(json.dumps(written | {"born": "1"}))
    assert look_at(one).state == state.DIVERGED
    (one.folder / "writer.json").write_text(json.dumps(written | {"machine": "another"}))
    assert look_at(one).state == state.RUNNING
    os.utime(one.folder / "writer.json", (time.time() - 60,) * 2)
    assert look_at(one).state == state.DIVERGED
    lease.release()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train.epochs=9"], "train.epochs 9.0, and now it is 8.0: set it back"),
        (["optim.momentum=0.8", "train.epochs=9"], r"optim.momentum 0.8, and now it is 0.9 \(and 1 more\)"),
        (["ema.decay=0.9"], "ema.decay 0.9, and now it is null"),
        (["run.seed=5"], "run.seed 5, and now it is 0"),
        (["log.every_steps=3", "data.workers=7", "wandb.project=x", "run.name=y", "checkpoint.keep=1"], None),
        (["model.num_classes=10", "train.compile=false"], None),  # settled by the run
    ],
)
def test_a_folder_of_other_settings(tmp_path: Path, words: list[str], told: str | None) -> None:
    sweep = plan_sweep(QUICK, ["seed=0,1", f"run.dir={tmp_path}"])
    trained(sweep.elements[0].folder, sweep, *words, status="finished")
    if told is None:
        assert look_at(sweep.elements[0]).state == "finished"
    else:
        with pytest.raises(UserError, match=told):
            look_at(sweep.elements[0])


def test_a_batch_that_became_the_images(tmp_path: Path) -> None:
    """The built-in sample has 8,000: a larger batch became so many, and any other batch is another setting."""
    words = ["seed=0,1", f"run.dir={tmp_path}", "train.global_batch=9000", "train.micro_batch=9000"]
    sweep = plan_sweep(QUICK, words)
    one = sweep.elements[0]
    trained(one.folder, sweep, "train.global_batch=8000", "train.micro_batch=8000")
    assert look_at(one).state == state.UNFINISHED
    trained(one.folder, sweep, "train.global_batch=7000", "train.micro_batch=7000")
    with pytest.raises(UserError, match=r"train\.global_batch 7000, and now it is 9000"):
        look_at(one)


# The table


def results(sweep: Sweep, top1: Callable[[int], float], **more: float) -> dict[str, Found]:
    return {
        element.name: Found("finished", {"top1": top1(k), "loss": 1.0, **more})
        for k, element in enumerate(sweep.elements)
    }


def test_rows_by_hand() -> None:
    sweep = plan_sweep(QUICK, ["optim.lr=1,2,3", "seed=0..2"])
    top1 = [50.0, 52.0, 57.0, 60.0, 61.0, 68.0, 10.0, 11.0, 12.0]
    found = results(sweep, top1.__getitem__, top5=90.0, images_per_second=1234.0)
    found["lr=3,seed=0"] = replace(found["lr=3,seed=0"], state="diverged")
    found["lr=3,seed=1"] = Found("running")
    rows = table.rows_of(sweep, found)
    assert [(row.settings["optim.lr"], row.n, row.best) for row in rows] == [
        ("1", 3, False),
        ("2", 3, True),
        ("3", 1, False),
    ]
    # Differences 10, 9, 11 of mean 10 and deviation 1.
    assert rows[0].p == pytest.approx(p_value([10.0, 9.0, 11.0]))
    assert (rows[1].p, rows[2].p) == (None, None)
    lines = table.as_markdown(sweep, rows).splitlines()
    # 53 and the root of (9 + 1 + 16) / 2; 63 and the root of (9 + 4 + 25) / 2.
    assert lines[:6] == [
        "# quickstart-sweep",
        "",
        "| optim.lr | n | top-1, % | best | top-5, % | loss | images/s | p | runs |",
        "|---|---|---|---|---|---|---|---|---|",
        "| 1 | 3 | 53.00 ± 3.61 | 57.00 | 90.00 ± 0.00 | 1.0000 ± 0.0000 | 1,234 | 0.0033 | 3 finished |",
        "| 2 | 3 | **63.00 ± 4.36** | 68.00 | 90.00 ± 0.00 | 1.0000 ± 0.0000 | 1,234 |  | 3 finished |",
    ]
    assert lines[6] == "| 3 | 1 | 12.00 | 12.00 | 90.00 | 1.0000 | 1,234 |  | 1 finished, 1 diverged, 1 running |"
    assert "paired t-test" in lines[-1]
    values = table.as_json(sweep, rows, found)
    assert values["rows"][0]["top1"] == {"mean": 53.0, "standard_deviation": pytest.approx(13**0.5), "max": 57.0}
    assert values["rows"][2]["top1"] == {"mean": 12.0, "standard_deviation": None, "max": 12.0}
    assert [run["state"] for run in values["rows"][2]["runs"]] == ["diverged", "running", "finished"]
    assert [run["top1"] for run in values["rows"][2]["runs"]] == [None, None, 12.0]


def test_seeds_are_paired_by_their_number() -> None:
    sweep = plan_sweep(QUICK, ["optim.lr=1,2", "seed=0..3"])
    top1 = [1.0, 2.0, 3.0, 4.0, 11.0, 13.0, 12.0, 99.0]
    found = results(sweep, top1.__getitem__)
    found["lr=1,seed=0"] = found["lr=2,seed=3"] = Found("waiting")
    rows = table.rows_of(sweep, found)
    assert rows[0].p == pytest.approx(p_value([2.0 - 13.0, 3.0 - 12.0]))


def test_an_averages_figures_count_where_there_is_one() -> None:
    sweep = plan_sweep(QUICK, ["seed=0,1"])
    rows = table.rows_of(sweep, results(sweep, lambda k: 1.0, ema_top1=7.0, ema_loss=0.5))
    assert (rows[0].of("top1"), rows[0].of("loss")) == ([7.0, 7.0], [0.5, 0.5])


def test_a_table_of_one_seed_and_one_of_nothing() -> None:
    sweep = plan_sweep(QUICK, ["optim.lr=1,2"])
    lines = table.as_markdown(sweep, table.rows_of(sweep, results(sweep, float))).splitlines()
    assert lines[2] == "| optim.lr | n | top-1, % | best | loss | runs |"
    assert lines[5] == "| 2 | 1 | **1.00** | 1.00 | 1.0000 | 1 finished |"
    nothing = {element.name: Found("waiting") for element in sweep.elements}
    lines = table.as_markdown(sweep, table.rows_of(sweep, nothing)).splitlines()
    assert lines[2:5] == ["| optim.lr | n | runs |", "|---|---|---|", "| 1 | 0 | 1 waiting |"]
    seeds = plan_sweep(QUICK, ["seed=0,1"])
    lines = table.as_markdown(seeds, table.rows_of(seeds, results(seeds, lambda k: 3.0 + 2 * k))).splitlines()
    assert lines[4] == f"| {QUICK} | 2 | 4.00 ± 1.41 | 5.00 | 1.0000 ± 0.0000 | 2 finished |"


# On this machine


def test_cores_are_shared_and_gpus_dealt_out(tmp_path: Path) -> None:
    environ = {"A": "1", "WANDB_RUN_ID": "x", "DISTRIB_EXIT_CODE_FILE": "y", "OMP_NUM_THREADS": "9"}
    assert here.make_slots(1, 2, environ, 8, ["0"]) == [{"A": "1", "OMP_NUM_THREADS": "9"}]

    def dealt(at_once: int, procs: int, gpus: list[str]) -> list[str | None]:
        slots = here.make_slots(at_once, procs, environ, 8, gpus)
        assert {slot["OMP_NUM_THREADS"] for slot in slots} == {str(max(1, 8 // (at_once * procs)))}
        return [slot.get("CUDA_VISIBLE_DEVICES") for slot in slots]

    assert dealt(2, 1, []) == [None, None]
    assert dealt(2, 2, ["0", "1", "2", "3"]) == ["0,1", "2,3"]
    assert dealt(3, 1, ["4", "7"]) == ["4", "7", "4"]
    assert dealt(2, 4, ["0", "1"]) == [None, None]  # launch tells that they are too few
    for name in ("nvidia0", "nvidia3", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    assert here.visible_gpus({}, tmp_path) == ["0", "1"]
    assert here.visible_gpus({"CUDA_VISIBLE_DEVICES": "GPU-a,3"}, tmp_path) == ["GPU-a", "3"]
    assert here.visible_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == []


def test_one_process_is_train_py_and_several_are_launch_local(tmp_path: Path) -> None:
    element = plan_sweep(QUICK, ["seed=0,1"]).elements[1]
    train = tmp_path / "train.py"
    assert here.command_of(QUICK, element, 1, train) == (
        sys.executable, str(train), "--config", QUICK, *element.words,
    )  # fmt: skip
    assert here.command_of(QUICK, element, 4, train) == (
        *(sys.executable, "-m", "launch", "local", "--procs", "4", "--config", QUICK), *element.words,
    )  # fmt: skip


def starts(folder: Path) -> dict[str, int]:
    """How often each run was started."""
    return {file.parent.name: len(file.read_text().splitlines()) for file in sorted(folder.glob("*/starts"))}


def test_a_sweep_and_again(
    stand_in: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "runs"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setenv("WANDB_RUN_ID", "of-the-sweep")
    words = ["sweep", "--config", QUICK, f"run.dir={runs}", "--at-once", "2", "optim.lr=0.5,1"]
    assert main([*words, "seed=0,1"], stand_in) == 0
    out, err = capfd.readouterr()
    assert err.splitlines()[0] == f"quickstart-sweep: 4 runs in {runs}: 4 waiting"
    assert sorted(line.partition(" ")[0] for line in err.splitlines()[1:]) == ["1/4", "2/4", "3/4", "4/4"]
    assert out == (runs / "table.md").read_text()
    assert "| 0.5 | 2 | 5.50 ± 0.71 | 6.00 | 0.5000 ± 0.0000 | " in out
    values = json.loads((runs / "table.json").read_text())
    assert [row["top1"]["mean"] for row in values["rows"]] == [5.5, 10.5]
    assert set(starts(runs).values()) == {1}
    found = [file.read_text().split() for file in runs.glob("*/starts")]
    assert {gpus for _, _, gpus, _ in found} == {"4", "7"}
    assert {wandb_id for _, _, _, wandb_id in found} == {"None"}

    # Again, nothing is started; with more values, those alone.
    assert main([*words, "seed=0,1"], stand_in) == 0
    again, err = capfd.readouterr()
    assert (again, err) == (out, f"quickstart-sweep: 4 runs in {runs}: 4 finished\n")
    assert main([*words[:-1], "optim.lr=0.5,1,2", "seed=0..2"], stand_in) == 0
    assert starts(runs) == {f"lr={lr},seed={seed}": 1 for lr in ("0.5", "1", "2") for seed in (0, 1, 2)}
    capfd.readouterr()

    # Other settings under the same names are refused, and nothing is touched.
    assert main([*words, "seed=0,1", "train.epochs=3"], stand_in) == 2
    err = capfd.readouterr().err
    assert "lr=0.5,seed=0 was trained with train.epochs 8.0, and now it is 3.0" in err
    assert err.count("\n") == 1


def test_a_run_that_fails_or_diverges_leaves_the_others(
    stand_in: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    words = ["sweep", "--config", QUICK, f"run.dir={runs}", "optim.lr=3,4,1"]
    assert main(words, stand_in) == 1
    out, err = capfd.readouterr()
    assert "lr=3,seed=0: error: no such data\nit ended with 1; " in err
    assert "lr=4,seed=0: diverged: its loss is no number\n" in err
    assert err.endswith("error: 1 of 3 runs failed: lr=3,seed=0\n")
    assert [line.split("|")[-2].strip() for line in out.splitlines()[4:7]] == ["1 failed", "1 diverged", "1 finished"]
    # What failed is tried again, what diverged is not.
    (runs / "lr=3,seed=0" / "mended").touch()
    assert main(words, stand_in) == 0
    assert starts(runs) == {"lr=1,seed=0": 1, "lr=3,seed=0": 2, "lr=4,seed=0": 1}


@contextmanager
def sweeping(stand_in: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """``launch sweep`` in a process group of its own, as a shell's job is; all of it has ended after the block."""
    process = subprocess.Popen(
        [sys.executable, "-c", SWEEP, str(stand_in), "sweep", "--config", QUICK, *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=60)


def wait_for(*files: Path) -> None:
    deadline = time.monotonic() + 120
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_ctrl_c_saves_what_runs(stand_in: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    with sweeping(stand_in, f"run.dir={runs}", "optim.lr=5,1", "seed=0,1") as process:
        wait_for(runs / "lr=5,seed=0" / "ready")
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "SIGINT: asking the workers to save and stop\n" in err
    assert "lr=5,seed=0: stopped, everything is saved\n" in err
    assert err.endswith("stopped; the same command goes on\n")
    assert "| 5 | 0 | 1 unfinished, 1 waiting |" in out
    assert starts(runs) == {"lr=5,seed=0": 1}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for it")
def test_runs_save_though_the_sweep_was_killed(stand_in: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    with sweeping(stand_in, f"run.dir={runs}", "optim.lr=5,1") as process:
        wait_for(runs / "lr=5,seed=0" / "ready")
        process.kill()
        wait_for(runs / "lr=5,seed=0" / "summary.json")
    assert json.loads((runs / "lr=5,seed=0" / "summary.json").read_text())["status"] == "stopped"


def test_a_run_that_somebody_else_trains_is_left_alone(
    stand_in: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    words = ["optim.lr=0.5,1", f"run.dir={runs}"]
    sweep = plan_sweep(QUICK, words)
    trained(sweep.elements[0].folder, sweep)
    lease = Lease(sweep.elements[0].folder).acquire()
    assert main(["sweep", "--config", QUICK, *words], stand_in) == 0
    lease.release()
    out, err = capfd.readouterr()
    assert starts(runs) == {"lr=1,seed=0": 1}
    assert "| 0.5 | 0 |  |  |  | 1 running |" in out
    assert err.endswith("1 of 2 runs are trained elsewhere: left alone\n")


def test_listing_and_the_table_start_nothing(stand_in: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    words = ["sweep", "--config", QUICK, f"run.dir={runs}", "optim.lr=1,2", "data.root=/nowhere"]
    assert main([*words, "--dry-run"], stand_in) == 0
    listed = capfd.readouterr().out.splitlines()
    assert [line.split() for line in listed[::2]] == [["waiting", "lr=1,seed=0"], ["waiting", "lr=2,seed=0"]]
    assert f"{stand_in} --config {QUICK} data.root=/nowhere optim.lr=1 " in listed[1]
    assert main([*words, "--table"], stand_in) == 0
    assert "| 1 | 0 | 1 waiting |" in capfd.readouterr().out
    assert not runs.exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["seed=0,1", "data.root=/nowhere"], "no data at /nowhere/train"),
        (["data.root=[sample:fashion-mnist|/nowhere]"], "no data at /nowhere/train"),
        (["train.global_batch=64,2", "--procs", "4"], "train.global_batch 2 is smaller than the 4 processes"),
        (["seed=0,1", "--name", "a/b"], "--name a/b: a name is made of"),
        (["seed=0,1", "--fresh"], "leave it out, or give another --name"),
        (["seed=0,1", "--slurm"], "--slurm: a sweep runs on this machine only"),
        (["seed=0,1", "--at-once", "0"], "'0' is not a whole number of 1 or more"),
        (["seed=0,1", "--procs=two"], "'two' is not a whole number of 1 or more"),
        (["--seed", "0..1"], "write run.seed=0..1"),
        (["seed=0,1", "run.dir=/proc/x"], "cannot make /proc/x"),
    ],
)
def test_mistakes_before_anything_starts(
    words: list[str], told: str, stand_in: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", "--config", QUICK, f"run.dir={tmp_path / 'runs'}", *words], stand_in) == 2
    out, err = capfd.readouterr()
    assert told in err
    assert err.startswith("error: ") or "cannot make" in told
    assert err.count("error: ") == 1
    assert out == ""
    assert not (tmp_path / "runs").exists()


def test_folders_of_others_are_left_as_they_are(
    stand_in: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["sweep", "--config", QUICK, "seed=0,1", f"run.dir={tmp_path}"]
    (tmp_path / "table.md").write_text("mine")
    assert main(words, stand_in) == 2
    assert "table.md is not a sweep's" in capfd.readouterr().err
    (tmp_path / "table.md").unlink()
    (tmp_path / "config.yaml").write_text("")
    assert main(words, stand_in) == 2
    assert "is the folder of a run" in capfd.readouterr().err
    assert starts(tmp_path) == {}


# Real training

SHORT = (
    "--config", QUICK, "data.loader=torchvision", "data.fraction=0.02", "data.size=16", "data.eval_resize=16",
    "data.workers=1", "train.global_batch=20", "train.epochs=2", "schedule.warmup_epochs=0.5", "log.every_steps=2",
    "optim.lr=0.05,0.1,0.2", "seed=0,1", "--at-once", "2",
)  # fmt: skip


def test_three_by_two_interrupted_and_resumed(tmp_path: Path) -> None:
    runs = tmp_path / "runs" / "short"
    environ = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "launch", "sweep", *SHORT, "--name", "short"]

    def sweep() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=500, check=False
        )

    process = subprocess.Popen(
        command, cwd=tmp_path, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(runs / "lr=0.05,seed=0" / "metrics.jsonl")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 75, err
    assert len(list(runs.glob("lr=*"))) < 6
    assert "waiting" in out

    done = sweep()
    assert done.returncode == 0, done.stderr
    assert done.stdout == (runs / "table.md").read_text()
    summaries = {file.parent.name: json.loads(file.read_text()) for file in runs.glob("*/summary.json")}
    assert sorted(summaries) == [f"lr={lr},seed={seed}" for lr in ("0.05", "0.1", "0.2") for seed in (0, 1)]
    rows = json.loads((runs / "table.json").read_text())["rows"]
    for row, lr in zip(rows, ("0.05", "0.1", "0.2"), strict=True):
        own = [summaries[f"lr={lr},seed={seed}"] for seed in (0, 1)]
        assert all(summary["status"] == "finished" and summary["step"] == 14 for summary in own)
        a, b = (summary["top1"] for summary in own)
        assert row["settings"] == {"optim.lr": lr}
        assert row["top1"]["mean"] == pytest.approx((a + b) / 2)
        assert row["top1"]["standard_deviation"] == pytest.approx(abs(a - b) / 2**0.5)
        assert row["loss"]["mean"] == pytest.approx(statistics.mean(summary["loss"] for summary in own))
        assert f"| {lr} | 2 | " in done.stdout
        config = load_config(runs / f"lr={lr},seed=1" / "config.yaml")
        assert (config.optim.lr, config.run.seed, config.wandb.group) == (float(lr), 1, "short")
    assert sum(row["best"] for row in rows) == 1

    # Each run wrote one line a step that it logged, in spite of the stop.
    for name in summaries:
        lines = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
        steps = [line["step"] for line in lines if line["kind"] == "train"]
        assert steps == sorted(set(steps))
        assert steps[-1] == 14

    before = {file: file.stat().st_mtime_ns for file in runs.glob("*/summary.json")}
    again = sweep()
    assert (again.returncode, again.stdout) == (0, done.stdout)
    assert again.stderr == "short: 6 runs in runs/short: 6 finished\n"
    assert {file: file.stat().st_mtime_ns for file in runs.glob("*/summary.json")} == before
