"""Ranks whose weights differ are found by a checksum of bits, and named; what they hold is not saved."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from test_step import run_ranks, small_run

from distrib import checkpoint
from distrib.engine import replicas
from distrib.engine.replicas import Replicas, checksum, told
from distrib.faults import Failure

pytestmark = pytest.mark.usefixtures("one_thread")


def tensors() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(4, 3, 3, 3, generator=generator).contiguous(memory_format=torch.channels_last)
    return [weights, torch.zeros(40), torch.ones(40), torch.tensor(7), torch.randn(5, generator=generator)]


def total(values: list[torch.Tensor]) -> int:
    return int(checksum(values))


def test_any_one_bit_shows() -> None:
    expected, seen = total(tensors()), set()
    assert total(tensors()) == expected
    for k, tensor in enumerate(tensors()):
        words = tensor.contiguous().view(-1).view(torch.int32)
        for place in range(words.numel()):
            for bit in range(32):
                changed = tensors()
                flipped = words.clone()
                flipped[place] ^= 1 << bit if bit < 31 else -(1 << 31)
                changed[k] = flipped.view(tensor.dtype).view(tensor.shape)
                seen.add(total(changed))
    assert expected not in seen
    assert len(seen) == 32 * sum(t.numel() * t.element_size() // 4 for t in tensors())  # each another


def test_values_that_have_changed_places_show() -> None:
    values = torch.tensor([0.0, 1.0, 2.0, 0.5, math.pi, -1.0] * 60)
    sums = set()
    for shift in range(1, 6):  # each a permutation of all
        sums.add(total([values.roll(shift)]))
    for i in range(0, 360, 7):
        for j in range(i + 1, 360):
            if values[i] != values[j]:
                swapped = values.clone()
                swapped[i], swapped[j] = values[j], values[i]
                sums.add(total([swapped]))
    assert total([values]) not in sums


def test_a_sum_leaves_the_tensors_alone_and_knows_no_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    given = tensors()
    expected = total(given)
    assert all(torch.equal(a, b) for a, b in zip(given, tensors(), strict=True))
    for size in (1, 50, 100):
        monkeypatch.setattr(replicas, "CHUNK", size)
        assert total(given) == expected
    assert total([]) == 0


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[1, 5], [1, 5], [2, 5]], "the weights of rank 2 on c differ from the other 2:"),
        ([[2, 6], [1, 5], [1, 5]], "the weights and momentum of rank 0 on a differ from the other 2:"),
        ([[1, 5], [1, 6]], "the momentum of rank 0 on a, rank 1 on b differ from each other, and nobody can say"),
        ([[1, 5], [1, 5], [1, 6], [1, 7]], "rank 0 on a, rank 1 on b, rank 2 on c, rank 3 on d differ from each"),
        ([[1, 5], [1, 5], [1, 5], [1, 6], [1, 7]], "the momentum of rank 3 on d, rank 4 on e differ from the other 3"),
    ],
)
def test_the_minority_is_named(rows: list[list[int]], expected: str) -> None:
    assert expected in told(40, ["weights", "momentum"], rows, ["a", "b", "c", "d", "e"])


def on_rank(runtime: Any) -> dict[str, Any]:
    """What three ranks find while the last of them goes wrong in one part after the other."""
    found: dict[str, Any] = {}
    for part in ("nothing", "statistics", "weights", "momentum", "average (EMA)"):
        run = small_run(runtime)
        ours = Replicas(run.net, run.optimizer, run.ema, runtime, 2)
        run.train(0, 1)
        ours.after(1)
        if runtime.rank == 2:
            touched = {
                "nothing": torch.zeros(1),
                "statistics": run.net.get_buffer("bn1.running_mean"),
                "weights": run.net.get_parameter("fc.bias").detach(),
                "momentum": run.optimizer.state[run.net.get_parameter("fc.bias")]["momentum_buffer"],
                "average (EMA)": run.ema.average["fc.bias"],
            }[part]
            touched.view(torch.int32)[0] ^= 1
        try:
            ours.after(2)  # posted
            ours.after(3)  # read
            found[part] = None
        except Failure as error:
            found[part] = (str(error), error.everywhere)
        if part == "weights":
            ours = Replicas(run.net, run.optimizer, run.ema, runtime, 1000)
            with pytest.raises(Failure, match=r"after step 3 the weights"):
                ours.compare(3)
            Replicas(run.net, run.optimizer, run.ema, runtime, None).compare(3)
    return found


def test_ranks_find_what_one_of_them_has_wrong(tmp_path: Path) -> None:
    ranks = run_ranks(tmp_path, 3, on_rank)
    assert ranks[0] == ranks[1] == ranks[2]
    found = ranks[0]
    assert found["nothing"] is None
    assert found["statistics"] is None  # are each rank's own
    for part in ("weights", "momentum", "average (EMA)"):
        line, everywhere = found[part]
        assert f"after step 2 the {part} of rank 2 on " in line
        assert "differ from the other 2" in line
        assert everywhere


FLIP = """
import os
from pathlib import Path
import torch
from distrib.engine.step import TrainStep

call, done = TrainStep.__call__, Path({done!r})

def flip(self, batches, step, lr, measure_norm=False):
    if os.environ.get("RANK") == "1" and step == 11 and not done.exists():
        done.touch()
        with torch.no_grad():
            self._parameters[-1].view(torch.int32)[0] ^= 1 << 20
    return call(self, batches, step, lr, measure_norm)

TrainStep.__call__ = flip
"""


def test_a_flipped_bit_ends_the_run_before_it_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.change(tmp_path, monkeypatch, FLIP.format(done=str(tmp_path / "done")))
    folder = tmp_path / "run"
    words = ["data.loader=synthetic", "data.synthetic.train=500", "data.synthetic.val=50", "train.steps=20"]
    words += ["train.check_replicas=4", "checkpoint.every_steps=5", "train.eval_every_epochs=100"]
    process = runs.begin(2, folder, *words)
    printed = runs.finish(process)
    assert process.returncode == 1, printed
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert "after step 12 the weights" in line
    assert "rank 0 on" in line
    assert "rank 1 on" in line
    assert runs.exit_codes(folder) == [1, 1]
    assert checkpoint.steps_in(folder / "checkpoints")[0] == 10
    assert "step 10 of 20" in runs.train(2, folder, *words)
