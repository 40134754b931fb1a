"""The configuration: frozen pydantic models, one for each part of the trainer.

This module and ``distrib.cli`` import no torch: a cluster's login node has none.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from pydantic_core import PydanticCustomError


def _not_empty(text: str) -> str:
    if not text:
        raise PydanticCustomError("empty", "is empty")
    return text


# Not by min_length: with that pydantic refuses the names of files that are not UTF-8.
Text = Annotated[str, AfterValidator(_not_empty), Field(description="text that is not empty")]
Fraction = Annotated[float, Field(ge=0, le=1)]
Pair = Annotated[tuple[float, float], Field(strict=False)]
Size = Annotated[tuple[PositiveInt, PositiveInt], Field(strict=False)]
Triple = Annotated[tuple[float, float, float], Field(strict=False)]


class UserError(Exception):
    """The user's configuration or data is wrong: one line that says what, where, and the way out. Exit code 2.

    ``everywhere``: all ranks of the run meet it, so that rank 0 alone tells it.
    """

    def __init__(self, message: str, everywhere: bool = True) -> None:
        super().__init__(message)
        self.everywhere = everywhere


class Part(BaseModel):
    """What all parts share: values never change after loading, and a key that nothing reads is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class RunConfig(Part):
    """Who the run is. A run is its directory; the same directory again continues it."""

    name: Annotated[
        str, Field(pattern=r"^[\w.+-]+$", description="a name of letters, digits, '_', '.', '+' and '-'")
    ] = "resnet50"
    dir: Text = "runs/${run.name}"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


class ModelConfig(Part):
    """Architecture. ``stem`` null means the network's own: 7×7 and pool for ImageNet nets, 3×3 for small-image nets."""

    name: str = "resnet50"
    num_classes: PositiveInt = 1000
    zero_init_residual: bool = True
    stem: Literal["imagenet", "small"] | None = None
    plain: bool = False  # without shortcuts: the degradation experiment of He et al. 2015, section 4.1


class SyntheticConfig(Part):
    """How many images the synthetic loader pretends to hold; ImageNet's numbers."""

    train: PositiveInt = 1_281_167
    val: PositiveInt = 50_000


class DataConfig(Part):
    """Where the images are and how they are cropped. Sizes are pixels, ``mean`` and ``std`` on a scale of 0–255."""

    root: Text = "${IMAGENET_DIR}"
    loader: Literal["dali", "torchvision", "synthetic"] = "dali"
    size: PositiveInt = 224
    eval_resize: PositiveInt = 256
    eval_size: PositiveInt = 224
    eval_batch: PositiveInt = 256  # images that one rank evaluates at once; part of what makes results repeat
    # Decoding threads (DALI) or processes (torchvision; 0: none), for each rank; null: its share of the cores.
    workers: NonNegativeInt | None = None
    prefetch: PositiveInt = 3  # batches decoded ahead
    wait_minutes: NonNegativeFloat = 10  # for images that cannot be read for the moment; then the run ends
    decoder: Literal["auto", "cpu", "mixed"] = "auto"  # DALI only: mixed decodes JPEGs on the GPU
    hw_decoder_load: Fraction = 0.65  # mixed only: the part of the JPEGs that the GPU's own decoder circuit gets
    preallocate: Size | None = None  # mixed only: [width, height] of the largest JPEGs, to reserve memory for them
    scale: Pair = (0.08, 1.0)
    ratio: Pair = (3 / 4, 4 / 3)
    flip: Fraction = 0.5
    mean: Triple = (123.675, 116.28, 103.53)
    std: Triple = (58.395, 57.12, 57.375)
    index_dir: Text | None = None  # null: ~/.cache/distrib/index
    synthetic: SyntheticConfig = SyntheticConfig()

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        if self.eval_size > self.eval_resize:
            raise ValueError(f"data.eval_size {self.eval_size} is larger than data.eval_resize {self.eval_resize}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"data.scale {list(self.scale)} is not 0 < low <= high <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"data.ratio {list(self.ratio)} is not 0 < low <= high")
        if min(self.std) <= 0:
            raise ValueError(f"data.std {list(self.std)} must be positive")
        return self


class TrainConfig(Part):
    """Length, batch and precision. ``global_batch`` is the whole step's, over all ranks and micro-batches."""

    epochs: PositiveFloat = 90
    steps: PositiveInt | None = None  # stop after so many steps instead of `epochs`
    global_batch: PositiveInt = 1024
    micro_batch: PositiveInt | None = None  # most images in one forward on one rank; accumulation follows from it
    precision: Literal["bf16", "fp16", "tf32", "fp32"] = "bf16"  # tf32: stored as fp32, multiplied with 10 bits
    compile: bool = True
    deterministic: bool = False  # on a GPU: only kernels that give the same bits each time; slower
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    clip_grad_norm: PositiveFloat | None = None
    eval_every_epochs: PositiveFloat = 1


class OptimConfig(Part):
    """``lr`` belongs to ``reference_batch``; ``scaling`` says how it follows the global batch (Goyal et al. 2017)."""

    name: Literal["sgd"] = "sgd"
    lr: PositiveFloat = 0.1
    reference_batch: PositiveInt = 256
    scaling: Literal["linear", "sqrt", "none"] = "linear"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    weight_decay: NonNegativeFloat = 1e-4  # never on norms and biases

    @model_validator(mode="after")
    def _consistent(self) -> OptimConfig:
        if self.nesterov and self.momentum == 0:
            raise ValueError("optim.nesterov needs optim.momentum > 0")
        return self


class ScheduleConfig(Part):
    """Learning rate over time. ``warmup_start`` and ``final`` are fractions of the peak learning rate."""

    name: Literal["cosine", "step", "polynomial", "linear"] = "cosine"
    warmup_epochs: NonNegativeFloat = 5
    warmup_start: Fraction = 0.01
    final: Fraction = 0.0
    milestones: Annotated[tuple[PositiveFloat, ...], Field(strict=False)] = (30, 60, 80)  # step: epochs
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1  # step: factor at each milestone
    power: PositiveFloat = 2.0  # polynomial

    @model_validator(mode="after")
    def _consistent(self) -> ScheduleConfig:
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"schedule.milestones {list(self.milestones)} must rise")
        return self


class EmaConfig(Part):
    """Exponential moving average of weights and batch-norm statistics, updated each ``every`` steps."""

    decay: Annotated[float, Field(ge=0, lt=1)] = 0.9999
    every: PositiveInt = 1


class CheckpointConfig(Part):
    """When to save (whichever comes first) and how many files to keep besides the best one."""

    every_steps: PositiveInt | None = 1000
    every_minutes: PositiveFloat | None = 15
    keep: PositiveInt = 3


class LogConfig(Part):
    """How often the console, ``metrics.jsonl`` and W&B get a line."""

    every_steps: PositiveInt = 50


class WandbConfig(Part):
    """Weights & Biases. Online without a key becomes offline, said once."""

    mode: Literal["online", "offline", "disabled"] = "online"
    project: Text = "distrib"
    entity: Text | None = None


class Config(Part):
    """The whole run. Parts are handed on one by one; no part sees its siblings."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    ema: EmaConfig | None = None
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    wandb: WandbConfig = WandbConfig()
    trace: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        train, schedule = self.train, self.schedule
        if train.micro_batch is not None and train.micro_batch > train.global_batch:
            raise ValueError(f"train.micro_batch {train.micro_batch} exceeds train.global_batch {train.global_batch}")
        if train.steps is not None:  # a run cut short keeps its schedule's epochs as they are
            return self
        if schedule.warmup_epochs > train.epochs:
            raise ValueError(f"schedule.warmup_epochs {schedule.warmup_epochs:g} exceeds train.epochs {train.epochs:g}")
        late = [m for m in schedule.milestones if m >= train.epochs]
        if schedule.name == "step" and late:
            raise ValueError(f"schedule.milestones {late} lie beyond train.epochs {train.epochs:g}")
        return self
