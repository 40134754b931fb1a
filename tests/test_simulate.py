"""distrib simulate: any rank's plan is the trainer's, sizes are those of the real tensors, a mistake is one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch
import torch.distributed as dist
from PIL import Image

from distrib.cli import load_config
from distrib.config import Config
from distrib.data import make_plans
from distrib.data.order import permute
from distrib.engine.state import ROWS_UP_TO, TrainState, statistics_of
from distrib.faults import exchange_interval, ring_seconds
from distrib.models import build_model
from distrib.optim import Ema, build_optimizer, freeze
from distrib.runtime import Runtime
from distrib.tools.simulate import rank as simulated
from distrib.tools.simulate.__main__ import main
from distrib.tools.simulate.rank import Assumed, place_of, simulate
from distrib.tools.simulate.sizes import Sizes, measure
from launch.__main__ import main as launch

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ["model.name=resnet20", "data.size=32", "data.loader=synthetic", "data.synthetic.train=1013"]
SMALL += ["data.synthetic.val=300", "data.eval_batch=16", "train.global_batch=50", "train.micro_batch=3"]
ASSUMED = Assumed(step=0.03, write=1e9)


def config(*words: str) -> Config:
    return load_config(runs.ROOT / "configs" / "resnet50.yaml", [*SMALL, *words])


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], words: Sequence[str]) -> str:
    assert main(words) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ")
    assert told.err.count("\n") == 1
    return told.err


@pytest.mark.parametrize(("world", "local"), [(1, 1), (7, 7), (12, 4), (50, 10)])
def test_all_ranks_together_are_the_batch_and_the_evaluation(world: int, local: int) -> None:
    """Each rank's plan is train.py's own."""
    asked = config()
    positions, ids, evaluated = [], [], []
    for rank in range(world):
        found = simulate(asked, place_of(rank, world, local), ASSUMED)
        plan, eval_plan = make_plans(asked.train, asked.run.seed, (1013, 300), 16, rank, world)
        assert found["plan"] | {"warmup_epochs": 0} == {
            "global_batch": 50,
            "share": sum(plan_slice.ids.size for plan_slice in plan.slices(0)),
            "accumulation": plan.accumulation,
            "slice_sizes": list(plan.slice_sizes),
            "largest_slice": plan.largest_slice,
            "steps_per_epoch": 20,
            "total_steps": 1800,
            "learning_rate": pytest.approx(0.4 * 50 / 1024),
            "warmup_epochs": 0,
        }
        assert found["place"] == {
            "rank": rank, "world": world, "local_rank": rank % local, "local_world": local,
            "node": rank // local, "nodes": world // local,
        }  # fmt: skip
        for part, expected in zip(found["first_step"], plan.slices(0), strict=True):
            assert range(*part["positions"]) == expected.positions
            assert part["ids"] == expected.ids.tolist()
            assert len(part["ids"]) <= 3
            positions += range(*part["positions"])
            ids += part["ids"]
        assert found["evaluation"]["rounds"] == eval_plan.rounds
        own = [image for part in found["evaluation"]["own"] for image in range(*part)]
        assert len(own) == found["evaluation"]["own_images"]
        evaluated += own
    assert positions == list(range(50))
    assert ids == permute(np.arange(50), 1013, 0, 0).tolist()
    assert sorted(evaluated) == list(range(300))


def test_the_last_of_1024(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IMAGENET_DIR", raising=False)
    found = printed(capsys, "--world", "1024")
    assert set(found) == {
        "place", "data", "resolved", "plan", "first_step", "evaluation", "rendezvous", "memory", "checkpoint", "cost",
    }  # fmt: skip
    assert found["place"]["rank"] == 1023
    assert (found["place"]["node"], found["place"]["nodes"]) == (127, 128)
    assert found["data"] == {
        "source": "data.synthetic", "root": None, "train": 1_281_167, "val": 50_000, "classes": 1000,
    }  # fmt: skip
    assert (found["plan"]["share"], found["plan"]["steps_per_epoch"], found["plan"]["total_steps"]) == (1, 1251, 112590)
    assert (found["plan"]["learning_rate"], found["plan"]["warmup_epochs"]) == (0.4, 5)
    assert found["first_step"][0]["positions"] == [1023, 1024]
    assert (found["evaluation"]["batches"], found["evaluation"]["rounds"], found["evaluation"]["own"]) == (196, 1, [])
    assert found["rendezvous"]["environment"]["RANK"] == "1023"
    assert found["rendezvous"]["torchrun"][:2] == ["--nnodes=128", "--nproc-per-node=8"]
    assert (found["rendezvous"]["exchange_every"], found["rendezvous"]["stop_known_within"]) == (16, 31)
    assert (found["rendezvous"]["step_timeout"], found["rendezvous"]["control_timeout"]) == (1800, 7200)
    memory = found["memory"]["device"]
    assert memory["parameters"] == memory["gradients"] == memory["momentum"] == 4 * 25_557_032
    assert memory["ema"] == 0
    assert memory["total"] == sum(value for name, value in memory.items() if name != "total")
    assert found["cost"]["step"]["reduced_bytes"] == 4 * 25_557_032
    assert found["cost"]["save"]["summed_bytes"] == 8 * 53_120
    assert found["cost"]["save"]["gathered_bytes"] == found["checkpoint"]["statistics"] == 0
    assert found["checkpoint"]["exact_resume"] is False
    assert found["checkpoint"]["bytes"] == found["memory"]["host_of_a_save"]["rank_0"]
    assert found["cost"]["exchange"]["ring"] == list(ring_seconds(1024))
    assert found["cost"]["exchange"]["share_of_step"] == [0, 0]


def test_an_exchange_that_steps_are_too_short_for(capsys: pytest.CaptureFixture[str]) -> None:
    """Below 6.4 ms a step."""
    found = printed(capsys, "--world", "1024", "--step", "5", *SMALL[:3])
    low, high = ring_seconds(1024)
    assert low < 16 * 0.005 < high
    assert found["cost"]["exchange"]["waited_a_step"] == [0, pytest.approx((high - 16 * 0.005) / 16)]
    assert found["cost"]["exchange"]["share_of_step"][1] == pytest.approx((high - 0.08) / 16 / 0.005)


@pytest.mark.parametrize(
    ("world", "ema", "rows"), [(256, "", 54_394_880), (256, "ema=true", 108_789_760), (264, "", 0)]
)
def test_statistics_are_kept_up_to_256_ranks(
    world: int, ema: str, rows: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ROWS_UP_TO == 256
    found = printed(capsys, "--world", str(world), *filter(None, [ema]))
    assert found["checkpoint"]["statistics"] == found["cost"]["save"]["gathered_bytes"] == rows
    assert found["checkpoint"]["exact_resume"] == bool(rows)
    assert found["rendezvous"]["exchange_every"] == exchange_interval(world)


def bytes_of(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(bytes_of, value.values()))
    return sum(map(bytes_of, value)) if isinstance(value, list | tuple) else 0


@pytest.mark.parametrize(
    "words", [(), ("ema.decay=0.9",), ("optim.momentum=0",), ("optim.freeze=layer1", "ema.decay=0.9")], ids=str
)
def test_sizes_are_those_of_the_real_tensors(words: tuple[str, ...]) -> None:
    cfg = config("model.num_classes=10", *words)
    network = build_model(cfg.model)
    if cfg.optim.freeze is not None:
        freeze(network, cfg.optim.freeze)
    optimizer = build_optimizer(network, cfg.optim, 0.1)
    ema = Ema(network, cfg.ema) if cfg.ema else None
    alone = Runtime(0, 1, 0, 1, torch.device("cpu"))
    saved = TrainState(network, optimizer, torch.amp.GradScaler("cpu", enabled=False), ema, alone).capture()
    network(torch.zeros(2, 3, 32, 32)).sum().backward()
    sizes = measure(network, 1, ema=cfg.ema is not None, momentum=cfg.optim.momentum > 0)
    assert sizes == Sizes(
        parameters=bytes_of(list(network.parameters())),
        gradients=bytes_of([p.grad for p in network.parameters() if p.grad is not None]),
        momentum=bytes_of(saved["optimizer"]["state"]),
        ema=bytes_of(ema.average) if ema else 0,
        buffers=bytes_of(list(network.buffers())),
        statistics=bytes_of(saved["statistics"]),
        rows=bytes_of(saved["statistics"]),
        checkpoint=bytes_of(saved),
    )
    assert bytes_of(saved["statistics"]) == sizes.mean // 2
    assert 0 < len(statistics_of(network)) < len(network.state_dict())


def test_ddp_is_put_around_the_network_in_a_group_of_that_size(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    wrap = simulated.wrap

    def watched(*args: Any) -> Any:
        call, ddp = wrap(*args)
        seen.append((type(ddp).__name__, dist.get_rank(), dist.get_world_size(), dist.get_backend()))
        return call, ddp

    monkeypatch.setattr(simulated, "wrap", watched)
    found = simulate(config(), place_of(31, 40, 8), ASSUMED)
    assert seen == [("DistributedDataParallel", 31, 40, "fake")]
    assert not dist.is_initialized()
    assert found["cost"]["step"]["reduced_bytes"] == found["memory"]["device"]["gradients"]


def test_images_that_are_here_are_counted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for split, images in (("train", 5), ("val", 2)):
        for name in ("cat", "dog", "owl"):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for k in range(images):
                Image.new("RGB", (8, 8), (k, 0, 0)).save(folder / f"{k}.png")
    words = ["--world", "4", "--data", str(tmp_path / "data"), f"data.index_dir={tmp_path / 'index'}"]
    words += ["model.name=resnet20", "data.size=32"]
    found = printed(capsys, *words)
    assert found["data"] == {
        "source": "index", "root": str(tmp_path / "data" / "train"), "train": 15, "val": 6, "classes": 3,
    }  # fmt: skip
    assert found["plan"]["global_batch"] == 15
    assert main(words) == 0
    assert "training: 15 images, validation: 6, 3 classes (the index of" in capsys.readouterr().out


def test_the_lines_say_what_is_assumed_and_what_is_left_out(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--world", "1024", "--data", str(tmp_path / "nowhere"), "--step", "40", "--write", "500"]) == 0
    told = capsys.readouterr().out
    for words in (
        "rank 1023 of 1024: machine 127 of 128, local rank 7 of 8 (all counted from 0); nothing is trained",
        "ImageNet's numbers, data.synthetic: data.root is not on this machine",
        "positions 1023 to 1023",
        "this rank: none of them",
        "flags every 16 steps; a stop is known to all 31 steps later at the latest",
        "activations, batches",
        "are not computed",
        "the mean of the batch-norm statistics alone, as there are more than 256 ranks",
        "with steps of 40 ms and a disk that takes 500 MB/s (both assumed)",
    ):
        assert words in told
    assert main(["--world", "1304", "--data", str(tmp_path / "nowhere"), "train.global_batch=2048"]) == 0
    assert "ranks exchange their flags every 21 steps; a stop" in capsys.readouterr().out
    assert main(["--world", "8", "--rank", "0", *SMALL]) == 0
    told = capsys.readouterr().out
    assert "every step; a stop is known to all 1 step later" in told
    assert "goes on to the bit" in told
    assert "(synthetic, data.synthetic)" in told


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", "--world"),
        ("--world 0", "'0' is not a whole number of 1 or more"),
        ("--world 2048", "train.global_batch 1024 is smaller than the 2048 processes: raise it, or start fewer"),
        ("--world 16 data.loader=synthetic data.synthetic.train=8", "16 processes are more than the 8 training images"),
        ("--world 8 --rank 8", "--rank 8 is not below --world 8"),
        ("--world 8 --rank -1", "--rank"),
        ("--world 12", "--world 12 is no multiple of --local-world 8"),
        ("--world 8 model.name=resnet51", "did you mean 'resnet"),
        ("--world 8 optim.freeze=layer9", "optim.freeze"),
        ("--world 8 --config /nowhere.yaml", "/nowhere.yaml"),
        ("--world 8 --lr 0.1", "write optim.lr=0.1"),
        ("--world 1024 data.size=32", "no variance"),
    ],
)
def test_a_mistake_is_one_line(words: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in refused(capsys, words.split())
    assert not dist.is_initialized()


def test_as_the_launcher_calls_it(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "IMAGENET_DIR"}
    command = [sys.executable, "-m", "distrib.tools.simulate", "--world", "16", "--local-world", "4", "--rank", "5"]
    command += ["--no-rendezvous", "--config", str(runs.ROOT / "configs" / "resnet50.yaml"), "--json"]
    done = subprocess.run(
        command, env=environment | {"PYTHONPATH": str(runs.ROOT)}, cwd=tmp_path, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["place"]["local_rank"] == 1
    assert set(found["rendezvous"]) == {"step_timeout", "control_timeout", "exchange_every", "stop_known_within"}
    assert list(tmp_path.iterdir()) == []


def test_the_launcher_says_once_where_the_nodes_meet(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(runs.ROOT))
    words = ["slurm", "--nodes", "4", "--gpus-per-node", "2", "--dry-run", "--simulate"]
    assert launch([*words, "--config", str(runs.ROOT / "configs" / "resnet50.yaml"), *SMALL]) == 0
    told = capfd.readouterr().out
    assert told.count("--rdzv-endpoint=") == told.count("--nnodes=") == 1
    assert "\nrank 7 of 8: machine 3 of 4" in told
    assert "\nranks exchange their flags every step" in told
    assert "FIRST_NODE" not in told


def test_the_compiler_is_not_imported_and_comes_where_it_is_asked_for() -> None:
    """It would be most of the time that a simulation takes."""
    program = (
        "import sys\nfrom distrib.tools.simulate.__main__ import main\n"
        f"code = main(['--world', '12', '--local-world', '4', *{SMALL!r}])\n"
        "assert code == 0 and not {'sympy', 'torch._dynamo'} & set(sys.modules), code\n"
        "import torch\nassert torch._dynamo.utils.get_optimize_ddp_mode() == 'ddp_optimizer'\n"
        "assert main(['--world', '2', *sys.argv[1:]]) == 0\n"
    )
    environment = os.environ | {"PYTHONPATH": str(runs.ROOT)}
    command = [sys.executable, "-c", program, *SMALL]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
