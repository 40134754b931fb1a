"""What only a GPU shows: kernels, decoding on the device, mixed precision, pinned copies, and that no step waits."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision
from PIL import Image
from test_step import CLASSES as FEW_CLASSES
from test_step import norm_net, run_ranks
from torch import nn
from torch.nn import functional as F

from distrib import checkpoint
from distrib.config import DataConfig, EmaConfig, ModelConfig, OptimConfig, TrainConfig
from distrib.data import Batch, TrainPlan, build_loader
from distrib.data.index import open_index
from distrib.data.order import EvalPlan
from distrib.engine.evaluate import Evaluator
from distrib.engine.prepare import DTYPES, Objective, set_up_device, warm_up, wrap
from distrib.engine.state import TrainState
from distrib.engine.step import TrainStep
from distrib.faults import Agreement
from distrib.layout.splits import Split
from distrib.models import build_model
from distrib.optim import Ema, build_optimizer
from distrib.runtime import Runtime
from distrib.tools.bench import photos

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and torch sees none here"),
]

ROOT = Path(__file__).resolve().parent.parent
DEVICE = torch.device("cuda", 0)
RUNTIME = Runtime(rank=0, world=1, local_rank=0, local_world=1, device=DEVICE)
BATCH, SIZE, CLASSES = 32, 64, 10
LR = 0.02


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    """Full fp32, the same start for every test, and no compiled code of the test before."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    kept, search = (matmul.allow_tf32, cudnn.allow_tf32), cudnn.benchmark
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    torch.manual_seed(0)
    torch.compiler.reset()
    yield
    (matmul.allow_tf32, cudnn.allow_tf32), cudnn.benchmark = kept, search


class Trainer:
    """The parts of a run on one GPU, as ``train.build`` puts them together."""

    def __init__(self, precision: str = "fp32", ema: bool = False, compiled: bool = False, **step: Any) -> None:
        torch.manual_seed(0)
        config = DataConfig()
        self.network = build_model(ModelConfig(name="resnet18", num_classes=CLASSES))
        self.network.to(memory_format=torch.channels_last).to(DEVICE)
        self.objective = Objective(self.network, config.mean, config.std, DTYPES[precision]).to(DEVICE)
        self.call, ddp = wrap(self.objective, TrainConfig(compile=compiled), RUNTIME)
        if compiled:
            warm_up(self.call, ddp, self.objective, (BATCH,), SIZE, DEVICE)
        self.optimizer = build_optimizer(self.network, OptimConfig(), LR)
        self.scaler = torch.amp.GradScaler(DEVICE.type, enabled=precision == "fp16")
        self.ema = Ema(self.network, EmaConfig(decay=0.9)) if ema else None
        self.state = TrainState(self.network, self.optimizer, self.scaler, self.ema, RUNTIME)
        self.step = TrainStep(
            self.call, ddp, self.optimizer, self.scaler, self.ema, world=1, global_batch=BATCH, **step
        )  # fmt: skip
        self.batch = a_batch()

    def train(self, steps: int, first: int = 0) -> list[float]:
        """Trains on the one batch; returns each step's mean loss."""
        losses = [self.step([self.batch], first + k, LR).loss for k in range(steps)]
        return [float(loss) / BATCH for loss in losses]


def a_batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    ids = TrainPlan(BATCH, BATCH, seed=0).slices(0)[0].ids
    labels = torch.randint(CLASSES, (BATCH,), generator=generator)
    return Batch(images.to(DEVICE, memory_format=torch.channels_last), labels.to(DEVICE), ids)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_network_equals_torchvisions(name: str, training: bool) -> None:
    theirs = torchvision.models.get_model(name, weights=None, num_classes=CLASSES).to(DEVICE).train(training)
    ours = build_model(ModelConfig(name=name, num_classes=CLASSES)).to(DEVICE).train(training)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(8, 3, SIZE, SIZE, device=DEVICE)
    labels = torch.arange(8, device=DEVICE) % CLASSES
    outputs, gradients = [], []
    for model in (ours, theirs):
        model.zero_grad()
        logits = model(images)
        F.cross_entropy(logits, labels).backward()
        outputs.append(logits.detach())
        gradients.append(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
    # Not to the bit: cuDNN may choose another algorithm, and some of its backward passes add in any order.
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-2, atol=0)


def test_dali_decodes_on_the_gpu_what_torchvision_decodes(tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed here", exc_type=ImportError)
    root = photos.make(60, cache=tmp_path)
    train, val = (open_index(Split(split, root / split), str(tmp_path / "index")) for split in ("train", "val"))
    config = {"root": str(root), "size": 96, "eval_resize": 110, "eval_size": 96, "workers": 2}
    dali, workers = (
        build_loader(DataConfig.model_validate({**config, "loader": name}), (train, val), 10, DEVICE)
        for name in ("dali", "torchvision")
    )
    assert type(dali).__name__ == "DaliLoader"
    plan, eval_plan = TrainPlan(len(train), 20, seed=3), EvalPlan(len(val), 8)
    pairs = [
        *zip(dali.train(plan, 1, 5), workers.train(plan, 1, 5), strict=True),
        *zip(dali.evaluate(eval_plan), workers.evaluate(eval_plan), strict=True),
    ]
    assert len(pairs) == 4 + 2
    for ours, reference in pairs:
        assert ours.ids.tolist() == reference.ids.tolist()
        assert ours.labels.tolist() == reference.labels.tolist()
        for images in (ours.images, reference.images):
            assert images.device == DEVICE
            assert images.dtype == torch.uint8
            assert images.is_contiguous(memory_format=torch.channels_last)
        # Decoders round and smooth the colours' half resolution differently; another crop or flip differs by 30.
        difference = (ours.images.float() - reference.images.float()).abs().mean(dim=(1, 2, 3))
        assert difference.max() < 5, difference


def test_the_gpus_decoder_makes_chroma_as_libjpeg_does(tmp_path: Path) -> None:
    """Without its fancy upsampling, edges of colour are off by tens."""
    pixels = torch.zeros(240, 240, 3, dtype=torch.uint8)
    pixels[:, 121:, 0] = pixels[121:, :, 2] = 255  # edges inside a chroma sample
    for split in ("train", "val"):
        (tmp_path / split / "squares").mkdir(parents=True)
        file = tmp_path / split / "squares" / "0.jpg"
        Image.fromarray(pixels.numpy()).save(file, quality=95, subsampling=2)
    config = {"root": str(tmp_path), "eval_resize": 240, "eval_size": 240, "eval_batch": 1, "workers": 1}
    indexes = (
        open_index(Split("train", tmp_path / "train"), str(tmp_path)),
        open_index(Split("val", tmp_path / "val"), str(tmp_path)),
    )
    batches = []
    for name in ("dali", "torchvision"):
        loader = build_loader(DataConfig.model_validate({**config, "loader": name}), indexes, 1, DEVICE)
        batches += list(loader.evaluate(EvalPlan(1, 1)))
    difference = (batches[0].images.int() - batches[1].images.int()).abs()
    assert difference.max() <= 8, difference.max()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_three_steps_in_16_bits_follow_fp32(precision: str) -> None:
    expected = Trainer("fp32").train(3)
    trainer = Trainer(precision)
    before = [p.detach().clone() for p in trainer.network.parameters()]
    found = trainer.train(3)
    assert all(map(math.isfinite, found))
    assert found == pytest.approx(expected, rel=0.05)
    assert all(p.dtype == torch.float32 for p in trainer.network.parameters())
    assert any(not torch.equal(p, old) for p, old in zip(trainer.network.parameters(), before, strict=True))
    if precision == "fp16":
        assert trainer.scaler.get_scale() == 2.0**16  # torch's first scale: no step overflowed


def test_fp16_skips_a_step_that_overflows() -> None:
    trainer = Trainer("fp16")
    trainer.train(1)
    before = [p.detach().clone() for p in trainer.network.parameters()]
    trainer.scaler.update(2.0**40)
    trainer.train(1)
    assert trainer.scaler.get_scale() == 2.0**39
    assert all(torch.equal(p, old) for p, old in zip(trainer.network.parameters(), before, strict=True))
    assert all(p.isfinite().all() for p in trainer.network.parameters())


def test_fp16_may_overflow_in_the_very_first_step() -> None:
    """The fused optimizer's momentum must not be what lay in memory."""
    junk = [torch.full((1 << 22,), 1e4, device=DEVICE) for _ in range(16)]
    trainer, other = Trainer("fp16"), Trainer("fp16")
    del junk  # the allocator gives these tensors out again
    trainer.scaler.update(2.0**40)
    trainer.train(1)
    assert trainer.scaler.get_scale() == 2.0**39
    trainer.scaler.update(2.0**10)
    other.scaler.update(2.0**10)
    trainer.train(1, first=1)
    other.train(1)
    for ours, undisturbed in zip(trainer.network.parameters(), other.network.parameters(), strict=True):
        torch.testing.assert_close(ours, undisturbed, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("compiled", [False, True])
def test_deterministic_runs_are_the_same_to_the_bit(compiled: bool) -> None:
    """In a fresh process each: cuBLAS asks once, and kernels must not be chosen by what ran before."""
    code = (
        "import sys; sys.path.insert(0, 'tests'); import torch, test_gpu as t\n"
        "t.set_up_device(t.DEVICE, 'bf16', True)\n"
        f"trainer = t.Trainer('bf16', compiled={compiled})\n"
        "print([loss.hex() for loss in trainer.train(5)], *[p.detach().double().sum().item().hex() for p in "
        "trainer.network.parameters()])"
    )
    command = [sys.executable, "-c", code]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(2)]
    (first, errors), (second, _) = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert first
    assert first == second


def test_fp32_and_tf32_are_two_things() -> None:
    torch.manual_seed(0)
    images = torch.randn(8, 64, 32, 32, device=DEVICE)
    weights = torch.randn(64, 64, 3, 3, device=DEVICE)
    a, b = torch.randn(2, 512, 512, device=DEVICE)
    exact = F.conv2d(images.double(), weights.double()), a.double() @ b.double()
    errors = {}
    for precision in ("tf32", "fp32"):
        set_up_device(DEVICE, precision, deterministic=False)
        found = F.conv2d(images, weights), a @ b
        errors[precision] = [float((f - e).abs().max() / e.abs().max()) for f, e in zip(found, exact, strict=True)]
    assert max(errors["fp32"]) < 1e-5
    if torch.cuda.get_device_capability(DEVICE) >= (8, 0):
        assert min(errors["tf32"]) > 3e-5


def one_of_two(runtime: Runtime, compiled: bool) -> dict[str, Any]:
    """Three steps of half the batch, on the one GPU that both ranks share; gloo carries the gradients."""
    runtime = replace(runtime, device=DEVICE)
    set_up_device(DEVICE, "fp32", deterministic=False)
    network = norm_net()
    for module in network.modules():  # else each rank's own statistics would set it apart from one process
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    network.to(memory_format=torch.channels_last)
    objective = Objective(network, (120.0, 120.0, 120.0), (60.0, 60.0, 60.0), torch.float32).to(DEVICE)
    call, ddp = wrap(objective, TrainConfig(compile=compiled), runtime)
    warm_up(call, ddp, objective, (BATCH // runtime.world,), SIZE, DEVICE)
    optimizer = build_optimizer(network, OptimConfig(), LR)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=False)
    step = TrainStep(call, ddp, optimizer, scaler, None, world=runtime.world, global_batch=BATCH)
    batch = a_batch()
    mine = slice(runtime.rank, None, runtime.world)
    images = batch.images[mine].contiguous(memory_format=torch.channels_last)
    share = Batch(images, batch.labels[mine] % FEW_CLASSES, batch.ids[mine])
    losses = [float(step([share], i, LR).loss) for i in range(3)]
    return {"losses": losses, "weights": [p.detach().cpu() for p in network.parameters()]}


@pytest.mark.parametrize("compiled", [False, True])
def test_two_ranks_on_one_gpu_train_as_one(compiled: bool, tmp_path: Path) -> None:
    """NCCL refuses two ranks on one device, gloo does not: DDP's hooks and the compiled graph are those of two GPUs."""
    alone = one_of_two(RUNTIME, compiled)
    ranks = run_ranks(tmp_path, 2, one_of_two, compiled)
    for ours, theirs, one in zip(*(r["weights"] for r in ranks), alone["weights"], strict=True):
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(ours, one, rtol=1e-3, atol=1e-4)
    sums = [sum(losses) for losses in zip(*(r["losses"] for r in ranks), strict=True)]
    assert sums == pytest.approx(alone["losses"], rel=1e-3)


def test_a_compiled_evaluation_is_the_eager_one() -> None:
    trainer, plan, stop = Trainer("bf16"), EvalPlan(BATCH, BATCH), SimpleNamespace(received=None)
    results = []
    for compiled in (False, True):
        evaluator = Evaluator(trainer.objective, ["model"], compile_=compiled)
        result = evaluator(trainer.state.weights(), iter([a_batch()]), plan, RUNTIME, Agreement(), stop)
        assert result is not None
        results.append(result)
    assert results[0]["images"] == results[1]["images"] == BATCH
    assert results[1]["loss"] == pytest.approx(results[0]["loss"], rel=0.02)


def test_state_goes_through_pinned_memory_to_a_file_and_back(tmp_path: Path) -> None:
    trainer = Trainer("fp16", ema=True)
    trainer.train(2)
    expected = {key: value.clone() for key, value in trainer.network.state_dict().items()}
    scale = trainer.scaler.get_scale()

    on_host = checkpoint._to_host(trainer.state.capture())
    torch.cuda.synchronize()
    for key, value in on_host["model"].items():
        assert value.is_pinned(), key
        assert torch.equal(value, expected[key].cpu()), key

    checkpointer = checkpoint.Checkpointer(tmp_path, keep=2, notify=pytest.fail)
    checkpointer.save(trainer.state.capture(), step=2, best=None)
    trainer.train(3, first=2)  # goes on at once: the copy must be of the weights as they were
    assert checkpointer.wait() == 2
    assert not torch.equal(trainer.network.state_dict()["fc.weight"], expected["fc.weight"])

    resumed, other = Trainer("fp16", ema=True), Trainer("fp16", ema=True)
    resumed.train(1)
    for each in (resumed, other):
        each.state.restore(checkpoint.load(checkpoint.path_for(tmp_path, 2)))
    for key, value in resumed.network.state_dict().items():
        assert torch.equal(value, expected[key]), key
    assert resumed.scaler.get_scale() == scale
    momenta = [resumed.optimizer.state[p]["momentum_buffer"] for p in resumed.network.parameters()]
    assert all(m.device == DEVICE for m in momenta)
    assert resumed.train(3, first=2) == pytest.approx(other.train(3, first=2), rel=1e-2)


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_no_step_waits_for_the_device(precision: str, clip: float | None) -> None:
    trainer = Trainer(precision, ema=True, clip_grad_norm=clip)
    trainer.train(2)  # cuDNN's choice, the optimizer's and the scaler's first tensors
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [trainer.step([trainer.batch], 2 + k, LR, measure_norm=k > 0) for k in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(result.loss.isfinite() for result in results)
    assert [result.gradient_norm is not None for result in results] == [clip is not None, True, True]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_compiled_steps_follow_eager_ones(precision: str) -> None:
    eager = Trainer(precision).train(3)
    trainer = Trainer(precision, compiled=True)
    assert all(p.grad is None for p in trainer.network.parameters())  # warming up left nothing behind
    assert trainer.network.bn1.num_batches_tracked == 0
    assert trainer.train(3) == pytest.approx(eager, rel=0.05)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step([trainer.batch], 3, LR)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_run_stops_on_sigterm_and_continues(tmp_path: Path) -> None:
    def command(steps: int) -> list[str]:
        config = {
            "run": {"name": "stopped", "dir": str(tmp_path / "run")},
            "model": {"name": "resnet18", "num_classes": CLASSES},
            "data": {"loader": "synthetic", "size": SIZE, "eval_resize": SIZE, "eval_size": SIZE, "eval_batch": 32,
                     "synthetic": {"train": 6400, "val": 40}},
            "train": {"steps": steps, "global_batch": 64, "compile": False, "eval_every_epochs": 1e6},
            "schedule": {"warmup_epochs": 0},
            "checkpoint": {"every_steps": None, "every_minutes": None},
            "log": {"every_steps": 5},
            "wandb": {"mode": "disabled"},
        }  # fmt: skip
        file = tmp_path / "config.yaml"
        file.write_text(json.dumps(config), encoding="utf-8")
        return [sys.executable, str(ROOT / "train.py"), "--config", str(file)]

    metrics = tmp_path / "run" / "metrics.jsonl"
    with subprocess.Popen(command(1_000_000), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text()):
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    stopped = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert stopped["status"] == "stopped"
    assert stopped["step"] >= 5

    last = stopped["step"] + 10
    done = subprocess.run(command(last), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"step {stopped['step']} of {last}" in done.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["step"], summary["images"]) == ("finished", last, 40)
    steps = [record["step"] for record in map(json.loads, metrics.read_text().splitlines())]
    assert steps == sorted(steps)
    assert len(steps) - len(set(steps)) <= 1  # an evaluation stands beside its step's training record
