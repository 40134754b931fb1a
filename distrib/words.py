"""What a run says in sentences as it begins and ends. Texts only: who says them, and when, is the caller's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from distrib.config import TOP5_CLASSES, Config, settled
from distrib.data import TrainPlan
from distrib.follow import told
from distrib.runtime import Runtime

REMEDY = "lower optim.lr or raise schedule.warmup_epochs, and start under another run.name or run.dir"
FEW_STEPS = 3  # in an epoch; less is worth a word


def resolved(
    asked: Config, config: Config, runtime: Runtime, plan: TrainPlan, precision: str, lr: float, network: nn.Module
) -> list[str]:
    """What follows from the configuration ``asked``, in a few lines; ``precision``: the effective one."""
    parameters = sum(p.numel() for p in network.parameters())
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    train, data = config.train, config.data
    followed = told(asked, config)
    return [
        f"run folder: {config.run.dir}",
        f"{config.model.name}, {parameters / 1e6:.2f} M parameters"
        + (f", {trained / 1e6:.2f} M of them trained" if trained < parameters else "")
        + f"; {runtime.world} × {runtime.device.type}, {precision}"
        + (f" ({train.precision} is not for this processor)" if precision != train.precision else "")
        + f", channels-last{', compiled' if settled(train.compile) else ''}"
        + (", deterministic" if train.deterministic else ""),
        f"global batch {plan.global_batch}: {runtime.world} × {plan.accumulation} forwards of at most "
        f"{plan.largest_slice}; learning rate {lr:g}; {plan.steps_per_epoch} steps an epoch, "
        f"{plan.length(train.epochs, train.steps)} in all; crops of {data.size} px, evaluated at {data.eval_size} of "
        f"{data.eval_resize}",
        *([f"settled, where nothing was said: {', '.join(followed)}"] if followed else []),
        *_doubts(config, plan),
    ]


def _doubts(config: Config, plan: TrainPlan) -> list[str]:
    """What is likely a mistake, though it can be trained."""
    doubts = []
    if config.model.num_classes == 1:
        doubts.append("there is one class only: nothing is to be told apart")
    if plan.steps_per_epoch < FEW_STEPS:
        doubts.append(
            f"an epoch has {plan.steps_per_epoch} steps only: a smaller train.global_batch learns more from it "
            "(configs/own_images.yaml is made for small data)"
        )
    return doubts


def lengthened(total_steps: int, lr: float, newest: Path) -> str:
    """For a run that had come to its end and now gets more steps, which begin at the learning rate ``lr``."""
    return (
        f"it had ended there and goes on with the schedule of a run of {total_steps} steps, at a learning rate of "
        f"{lr:.3g}. For a schedule from its beginning: --init-from {newest} under another run.name"
    )


def mean_alone(world: int) -> str:
    """For a run of so many ranks that their own batch-norm statistics are not saved."""
    return (
        f"{world} ranks are too many to save each one's batch-norm statistics: checkpoints hold their mean alone, so a "
        "run that is continued differs in the last digits from one that was not stopped"
    )


def not_finite(loss: object, step: object) -> str:
    """For the first logged loss that is no number."""
    return f"the loss is {loss} at step {step}: nothing is learnt any more; {REMEDY}"


def skipped(count: int, step: object) -> str:
    """For the first steps that were passed over."""
    return (
        f"{count} {'step' if count == 1 else 'steps'} up to step {step} had a gradient or a loss that is no number and "
        "left nothing behind: weights, momentum, average and statistics are those of before"
    )


def finished(
    result: Mapping[str, float],
    step: int,
    classes: int,
    best: tuple[int, float, Path] | None,
    folder: Path,
    already: bool,
) -> str:
    """For a run that has come to its end.

    Args:
        result: of the last evaluation, in percent.
        best: step, top-1 in percent, and file of the best evaluation; None where there was none.
        already: whether it had come to its end before this start.
    """
    ema = f" (EMA {result['ema_top1']:.2f} %)" if "ema_top1" in result else ""
    top5 = f", top-5 {result['top5']:.2f} %" if classes >= TOP5_CLASSES else ""
    return (
        f"finished{' already' if already else ''}: top-1 {result['top1']:.2f} %{ema}{top5} on {result['images']:,} "
        f"images after {step} steps\n"
        + (f"best: {'EMA ' if ema else ''}top-1 {best[1]:.2f} % at step {best[0]}, {best[2]}\n" if best else "")
        + f"run folder: {folder}"
    )
