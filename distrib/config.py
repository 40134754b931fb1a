"""The configuration: frozen pydantic models, one for each part of the trainer.

The line below a key is what ``--help`` says about it. This module and ``distrib.cli`` import no torch: a cluster's
login node has none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

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


@dataclass(frozen=True)
class Words:
    """What a key takes, where its type does not say it: the end of "data.root takes …"."""

    text: str


TOP5_CLASSES = 6  # from so many classes on five guesses say something

T = TypeVar("T")

Auto = Literal["auto"]  # follows from other settings, the data or the machine: distrib.follow says how
# Not by min_length: with that pydantic refuses the names of files that are not UTF-8.
Text = Annotated[str, AfterValidator(_not_empty), Words("text that is not empty")]
Name = Annotated[str, Field(pattern=r"^[\w.+-]+$"), Words("a name of letters, digits, '_', '.', '+' and '-'")]
Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Pair = Annotated[tuple[float, float], Field(strict=False)]
Size = Annotated[tuple[PositiveInt, PositiveInt], Field(strict=False)]
Triple = Annotated[tuple[float, float, float], Field(strict=False)]
Names = Annotated[
    tuple[Text, ...],
    Field(strict=False, min_length=1),
    Words("names with commas between them (in a file: numbers in quotes)"),
]


def settled(value: T | Auto) -> T:
    """``value``, which must have followed from the rest by now."""
    assert value != "auto"
    return value


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

    name: Name = "auto"
    """The run's name; auto: from the network, the data's folder, and whether it begins with weights."""
    dir: Text = "runs/${run.name}"
    """The run's folder. The same folder again continues the run."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Decides the first weights, the order of the images and their crops."""


class ModelConfig(Part):
    """The network."""

    name: str = "resnet50"
    """resnet18 to 152, resnext50_32x4d, wide_resnet50_2 …; resnet20 to 110 for small images."""
    num_classes: PositiveInt | Auto = "auto"
    """Outputs; auto: the data's class folders."""
    weights: Text | None = None
    """Begin with these weights: a file, a run's folder, or torchvision's name (IMAGENET1K_V2)."""
    zero_init_residual: bool = True
    """Each block begins as its shortcut (Goyal et al. 2017, section 5.1)."""
    stem: Literal["imagenet", "small"] | None = None
    """imagenet: 7×7 at stride 2 and pool; small: 3×3; null: the network's own."""
    plain: bool = False
    """Without shortcuts: the degradation experiment of He et al. 2015, section 4.1."""


class SyntheticConfig(Part):
    """How many images the synthetic loader pretends to hold; ImageNet's numbers."""

    train: PositiveInt = 1_281_167
    """Training images."""
    val: PositiveInt = 50_000
    """Validation images."""


class DataConfig(Part):
    """The images: where they are, which of them, and how they are cropped."""

    root: Text = "${IMAGENET_DIR}"
    """Folder with train/ and val/, or with class folders alone; `--data DIR` is the same."""
    val_split: Share | Auto | None = "auto"
    """Share of each class of train/ to validate on; auto: 0.1 where there is no val/; null: val/ must be there."""
    classes: Names | None = None
    """Only these class folders."""
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of each class to train on: the same pictures each time, more of them for a larger share."""
    loader: Literal["dali", "torchvision", "synthetic"] = "dali"
    """dali, torchvision (worker processes, anywhere), or synthetic (random images, for timing)."""
    size: PositiveInt = 224
    """Training crop, pixels a side."""
    eval_resize: PositiveInt | Auto = "auto"
    """Shorter side before the evaluation crop, pixels; auto: 8/7 of data.eval_size."""
    eval_size: PositiveInt | Auto = "auto"
    """Evaluation crop, pixels a side; auto: data.size."""
    eval_batch: PositiveInt = 256
    """Images that one rank evaluates at once; part of what makes results repeat."""
    workers: NonNegativeInt | Auto | None = "auto"
    """Decoding threads (DALI) or processes (torchvision; 0: none) a rank; auto or null: its share of the cores."""
    prefetch: PositiveInt = 3
    """Batches decoded ahead."""
    wait_minutes: NonNegativeFloat = 10
    """How long to wait for images that cannot be read for the moment, before the run ends."""
    decoder: Literal["auto", "cpu", "mixed"] = "auto"
    """DALI: mixed decodes JPEGs on the GPU."""
    hw_decoder_load: Fraction = 0.65
    """DALI, mixed: the part of the JPEGs that the GPU's own decoder circuit gets."""
    preallocate: Size | None = None
    """DALI, mixed: [width,height] of the largest JPEGs, to reserve memory for them."""
    scale: Pair = (0.08, 1.0)
    """Part of the picture's area in a training crop, from and to."""
    ratio: Pair = (3 / 4, 4 / 3)
    """Width to height of a training crop, from and to."""
    flip: Fraction = 0.5
    """How often a training crop is mirrored."""
    mean: Triple = (123.675, 116.28, 103.53)
    """Mean of red, green and blue, on a scale of 0 to 255."""
    std: Triple = (58.395, 57.12, 57.375)
    """Standard deviation of red, green and blue, on the same scale."""
    index_dir: Text | None = None
    """Where lists of the files are kept; null: ~/.cache/distrib/index."""
    synthetic: SyntheticConfig = SyntheticConfig()

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        if self.eval_size != "auto" and self.eval_resize != "auto" and self.eval_size > self.eval_resize:
            raise ValueError(f"data.eval_size {self.eval_size} is larger than data.eval_resize {self.eval_resize}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"data.scale {list(self.scale)} is not 0 < low <= high <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"data.ratio {list(self.ratio)} is not 0 < low <= high")
        if min(self.std) <= 0:
            raise ValueError(f"data.std {list(self.std)} must be positive")
        if max(self.std) <= 1:  # as torchvision and timm write it
            raise ValueError(
                f"data.std {list(self.std)} is on a scale of 0 to 1; here, as in data.mean, it is 0 to 255"
            )
        return self


class TrainConfig(Part):
    """Length, batch and precision."""

    epochs: PositiveFloat = 90
    """Passes over the training images."""
    steps: PositiveInt | None = None
    """Stop after so many steps instead of train.epochs."""
    global_batch: PositiveInt = 1024
    """Images in one step, over all processes; no more than there are to train on."""
    micro_batch: PositiveInt | None = None
    """Most images in one forward on one GPU; accumulation follows from it."""
    precision: Literal["bf16", "fp16", "tf32", "fp32"] = "bf16"
    """bf16, fp16 (with a loss scaler), fp32 (IEEE), or tf32: stored as fp32, multiplied with 10 bits."""
    compile: bool | Auto = "auto"
    """torch.compile; auto: on a GPU."""
    deterministic: bool = False
    """GPU: only kernels that give the same bits each time; slower."""
    label_smoothing: Decay = 0.0
    """Part of the target that is spread over all classes."""
    clip_grad_norm: PositiveFloat | None = None
    """Largest norm of the gradient."""
    skip_limit: NonNegativeInt = 10
    """Steps in a row without a number for a gradient, that are passed over; after more, back to a checkpoint."""
    rollback_limit: NonNegativeInt = 3
    """How often to go back, without a good checkpoint between, before the run ends as diverged."""
    check_replicas: PositiveInt | None = None
    """Compare all ranks' weights bit by bit after so many steps, and before each save; null: never."""
    eval_every_epochs: PositiveFloat = 1
    """How often to evaluate."""
    hang_minutes: PositiveFloat | Auto | None = "auto"
    """End a rank that does not get on for so long; auto: by data.wait_minutes and its longest step; null: never."""
    max_minutes: PositiveFloat | None = None
    """Stop, with everything saved, before a start has taken so long."""


class OptimConfig(Part):
    """SGD. ``lr`` belongs to ``reference_batch`` images a step and follows another batch (Goyal et al. 2017)."""

    name: Literal["sgd"] = "sgd"
    """The optimizer."""
    lr: PositiveFloat = 0.4
    """Learning rate after warm-up, at optim.reference_batch images a step."""
    reference_batch: PositiveInt = 1024
    """The batch that optim.lr was chosen for; each file in configs/ has its own train.global_batch here."""
    scaling: Literal["linear", "sqrt", "none"] = "linear"
    """How optim.lr follows train.global_batch where that is not optim.reference_batch."""
    head_lr: PositiveFloat = 1.0
    """Factor by which the last layer (fc) learns faster than optim.lr."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on the learning rate from each block to the one before it; the last layer has 1."""
    freeze: Text | None = None
    """Train only what comes behind this stage: conv1, layer1 … layer4; backbone: the last layer (fc) alone."""
    momentum: Decay = 0.9
    """Momentum."""
    nesterov: bool = False
    """Nesterov's momentum."""
    weight_decay: NonNegativeFloat = 1e-4
    """Weight decay; never on norms and biases."""

    @model_validator(mode="after")
    def _consistent(self) -> OptimConfig:
        if self.nesterov and self.momentum == 0:
            raise ValueError("optim.nesterov needs optim.momentum > 0")
        return self


class ScheduleConfig(Part):
    """Learning rate over time."""

    name: Literal["cosine", "step", "polynomial", "linear"] = "cosine"
    """How the learning rate falls after warm-up."""
    warmup_epochs: NonNegativeFloat | Auto = "auto"
    """Epochs in which the learning rate rises to its peak; auto: a tenth of the run, at most 5."""
    warmup_start: Fraction = 0.01
    """Where the rise begins, as a part of the peak."""
    final: Fraction = 0.0
    """Where the learning rate ends, as a part of the peak."""
    milestones: Annotated[tuple[PositiveFloat, ...], Field(strict=False)] = (30, 60, 80)
    """step: epochs after which the learning rate falls."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    """step: factor at each milestone."""
    power: PositiveFloat = 2.0
    """polynomial: the power."""

    @model_validator(mode="after")
    def _consistent(self) -> ScheduleConfig:
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"schedule.milestones {list(self.milestones)} must rise")
        return self


class EmaConfig(Part):
    """Exponential moving average of weights and batch-norm statistics; ``ema=true`` switches it on."""

    decay: Decay | Auto = "auto"
    """How much of the average stays at an update; auto: it spans a tenth of the run, at most 10,000 steps."""
    every: PositiveInt = 1
    """Steps between updates."""


class CheckpointConfig(Part):
    """When to save, whichever comes first, and how many files to keep besides the best one."""

    every_steps: PositiveInt | None = 1000
    """Save after so many steps."""
    every_epochs: PositiveFloat | None = 1
    """Save after so many epochs, at least ten steps apart."""
    every_minutes: PositiveFloat | None = 15
    """Save after so many minutes."""
    keep: PositiveInt = 3
    """Checkpoints to keep, besides the best."""
    mirror: Text | None = None
    """A second place to copy each one to: a folder, or a URL that fsspec opens (s3://bucket/…)."""


class LaunchConfig(Part):
    """How a run begins on its machines."""

    preflight: bool | Auto = "auto"
    """Look at all nodes before the first step; auto: where there are several."""


class LogConfig(Part):
    """How often there are numbers."""

    every_steps: PositiveInt = 50
    """Steps from one line in the console, metrics.jsonl and W&B to the next."""
    layers: bool = False
    """Also write the norm of each parameter's gradient, in metrics.jsonl and W&B."""


class WandbConfig(Part):
    """Weights & Biases. Online without a key becomes offline, said once."""

    mode: Literal["online", "offline", "disabled"] = "online"
    """online, offline or disabled; WANDB_MODE wins."""
    project: Text = "distrib"
    """Project; WANDB_PROJECT."""
    entity: Text | None = None
    """User or team; WANDB_ENTITY."""
    name: Text | None = None
    """The run's name in W&B; WANDB_NAME; null: run.name."""
    group: Text | None = None
    """Group of runs; WANDB_RUN_GROUP."""
    tags: Names | None = None
    """Tags; WANDB_TAGS."""
    notes: Text | None = None
    """Notes; WANDB_NOTES."""
    dir: Text | None = None
    """Where W&B writes; WANDB_DIR; null: the run's folder."""


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
    launch: LaunchConfig = LaunchConfig()
    log: LogConfig = LogConfig()
    wandb: WandbConfig = WandbConfig()
    trace: bool = False
    """Write what each step saw, for comparing runs bit by bit (distrib trace); each step waits for the device."""

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        train, schedule = self.train, self.schedule
        if train.micro_batch is not None and train.micro_batch > train.global_batch:
            raise ValueError(f"train.micro_batch {train.micro_batch} exceeds train.global_batch {train.global_batch}")
        if isinstance(train.hang_minutes, float) and train.hang_minutes <= self.data.wait_minutes:
            raise ValueError(
                f"train.hang_minutes {train.hang_minutes:g} is not above data.wait_minutes {self.data.wait_minutes:g}, "
                "for which a rank may wait for its images"
            )
        if train.steps is not None:  # a run cut short keeps its schedule's epochs as they are
            return self
        if schedule.warmup_epochs != "auto" and schedule.warmup_epochs > train.epochs:
            raise ValueError(
                f"schedule.warmup_epochs {schedule.warmup_epochs:g} exceeds train.epochs {train.epochs:g}; "
                "schedule.warmup_epochs=auto takes a tenth of the run"
            )
        late = [m for m in schedule.milestones if m >= train.epochs]
        if schedule.name == "step" and late:
            raise ValueError(f"schedule.milestones {late} lie beyond train.epochs {train.epochs:g}")
        return self
