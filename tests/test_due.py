"""What is due after which step."""

from __future__ import annotations

import pytest

from distrib.config import Config
from distrib.data import TrainPlan
from distrib.due import Due


def due_of(total: int, **parts: dict[str, object]) -> Due:
    """For 100 images in batches of 4: 25 steps an epoch."""
    return Due(Config.model_validate(parts), TrainPlan(100, 4, seed=0), total)


def test_each_is_due_at_its_steps() -> None:
    due = due_of(
        60,
        train={"eval_every_epochs": 0.4},
        log={"every_steps": 8},
        checkpoint={"every_steps": 7, "every_epochs": None},
    )
    steps = range(1, 61)
    assert [step for step in steps if due.interval(step)] == [8, 16, 24, 32, 40, 48, 56]
    assert [step for step in steps if due.evaluation(step)] == [10, 20, 30, 40, 50, 60]
    assert [step for step in steps if due.save(step)] == [7, 14, 21, 28, 35, 42, 49, 56, 60]
    assert [step for step in steps if due.record(step)] == sorted(
        {8, 16, 24, 32, 40, 48, 56, 10, 20, 30, 50, 60, 7, 14, 21, 28, 35, 42, 49}
    )


def test_the_end_is_evaluated_and_saved_wherever_it_lies() -> None:
    due = due_of(33, checkpoint={"every_steps": None, "every_epochs": None})
    assert [step for step in range(1, 34) if due.evaluation(step)] == [25, 33]
    assert [step for step in range(1, 34) if due.save(step)] == [33]
    assert [due.to_evaluation(step) for step in (1, 25, 26, 33)] == [24, 0, 7, 0]


@pytest.mark.parametrize(
    ("epochs", "saved"),
    [
        (1, [25, 50, 75, 100]),
        (0.5, [12, 24, 36, 48, 60, 72, 84, 96, 100]),  # 12 steps, and not the half step more
        (0.04, [10, 20, 30, 40, 50, 60, 70, 80, 90, 100]),  # each step would be an epoch's part: ten apart
        (0.16, [12, 24, 36, 48, 60, 72, 84, 96, 100]),  # a whole number of 4 steps
    ],
)
def test_saves_of_epochs_are_ten_steps_apart_at_least(epochs: float, saved: list[int]) -> None:
    due = due_of(100, checkpoint={"every_steps": None, "every_epochs": epochs})
    assert [step for step in range(1, 101) if due.save(step)] == saved
