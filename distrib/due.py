"""What is due after which step: a pure function of the settings, the plan and the step."""

from __future__ import annotations

from distrib.config import Config
from distrib.data import TrainPlan

SAVE_STEPS = 10  # between saves at the ends of epochs: with a batch as large as the data each step is one


class Due:
    """Durations in steps, for a run of ``total`` steps. A signal, a best result or ``every_minutes`` may add to it."""

    def __init__(self, config: Config, plan: TrainPlan, total: int) -> None:
        self._total = total
        self._record = config.log.every_steps
        self._evaluation = plan.steps_in(config.train.eval_every_epochs)
        saves = config.checkpoint
        each_epoch = plan.steps_in(saves.every_epochs) if saves.every_epochs is not None else None
        if each_epoch is not None:
            each_epoch *= -(-SAVE_STEPS // each_epoch)  # a whole number of them
        self._saves = [steps for steps in (saves.every_steps, each_epoch) if steps is not None]

    def interval(self, step: int) -> bool:
        """Whether an interval of ``log.every_steps`` ends with this step."""
        return step % self._record == 0

    def record(self, step: int) -> bool:
        """Whether a training record is to end with this step; a stop or another save may end one earlier."""
        return self.interval(step) or self.evaluation(step) or self.save(step)

    def evaluation(self, step: int) -> bool:
        """Whether the weights are to be evaluated after so many steps."""
        return self.to_evaluation(step) == 0

    def to_evaluation(self, step: int) -> int:
        """How many steps are left before the next evaluation; 0 where it is due now."""
        return min(-step % self._evaluation, self._total - step)

    def save(self, step: int) -> bool:
        """Whether there is one of the regular saves after so many steps."""
        return step == self._total or any(step % steps == 0 for steps in self._saves)
