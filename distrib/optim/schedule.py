"""Learning rate as a pure function of the step: nothing to save, nothing to wind forward."""

from __future__ import annotations

import math
from collections.abc import Callable

from distrib.config import ScheduleConfig, settled


def build_schedule(cfg: ScheduleConfig, peak: float, steps_per_epoch: int, total_steps: int) -> Callable[[int], float]:
    """Returns lr(step) for steps 0 … total_steps - 1.

    Warm-up rises linearly from ``warmup_start`` to 1 (times ``peak``) over ``warmup_epochs``, where the schedule
    proper begins. Cosine is Loshchilov and Hutter 2016 (arXiv 1608.03983, without restarts), step is Goyal et al.
    2017: milestones count from the run's first step. All but step end at ``final`` times ``peak``.
    """
    warmup = round(settled(cfg.warmup_epochs) * steps_per_epoch)
    milestones = [round(epoch * steps_per_epoch) for epoch in cfg.milestones]

    def lr(step: int) -> float:
        if step < warmup:
            return peak * (cfg.warmup_start + (1 - cfg.warmup_start) * step / warmup)
        if cfg.name == "step":
            return peak * cfg.gamma ** sum(step >= milestone for milestone in milestones)
        done = (step - warmup) / max(1, total_steps - warmup)
        shape = {
            "cosine": lambda: (1 + math.cos(math.pi * done)) / 2,
            "polynomial": lambda: (1 - done) ** cfg.power,
            "linear": lambda: 1 - done,
        }[cfg.name]()
        return peak * (cfg.final + (1 - cfg.final) * shape)

    return lr
