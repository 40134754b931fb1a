"""``distrib trace``: where two runs part, in runs of the real train.py and in files made up; and what is hashed."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import runs
import torch

from distrib.checkpoint import Checkpointer, commit, path_for
from distrib.config import UserError
from distrib.digest import digest
from distrib.faults import Interrupted
from distrib.tools.trace.__main__ import diff, print_hashes

STEPS = 30
SHORT = [f"train.steps={STEPS}"]


def distrib_trace(*words: str | Path) -> tuple[int, str, str]:
    """Exit code, and what was printed to stdout and stderr."""
    command = [sys.executable, "-m", "distrib", "trace", *map(str, words)]
    done = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True, timeout=runs.TIMEOUT, check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


# Runs of the real train.py


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Trains once for each name; returns the folder, which is not to be changed."""
    place = tmp_path_factory.mktemp("trained")

    def train(name: str, procs: int = 1, *words: str) -> Path:
        if not (place / name).exists():
            runs.train(procs, place / name, *SHORT, *words)
        return place / name

    return train


def test_equal_runs_are_alike(trained: Callable[..., Path]) -> None:
    code, printed, _ = distrib_trace("diff", trained("one"), trained("same"))
    assert code == 0, printed
    assert f"alike in {STEPS} steps (1 to {STEPS}): ids, draws, losses and gradient norms; on 1 rank each" in printed
    assert f"state after step {STEPS}: weights, buffers, optimizer, ema alike" in printed


def test_another_seed_parts_at_once(trained: Callable[..., Path]) -> None:
    code, printed, _ = distrib_trace("diff", trained("one"), trained("seed", 1, "run.seed=1"))
    assert code == 1
    assert "they part at step 1, rank 0, in ids, draws, loss, gradient norm" in printed
    assert "no step before it is in both" in printed
    assert f"state after step {STEPS}: weights, buffers, optimizer, ema differ" in printed


def test_other_numbers_of_ranks_see_the_same_batches(trained: Callable[..., Path]) -> None:
    code, printed, _ = distrib_trace("diff", trained("one"), trained("two", 2))
    assert code == 0, printed
    assert f"alike in {STEPS} steps (1 to {STEPS}): ids and draws of the global batch; A on 1, B on 2 ranks" in printed
    assert "loss of the global batch: relative difference of at most " in printed
    assert "gradient norm of the global batch: relative difference of at most " in printed
    assert "differ, as they do on other numbers of ranks" in printed


def test_every_step_has_the_norm_and_all_ranks_the_same(trained: Callable[..., Path]) -> None:
    first, second = runs.trace(trained("two", 2), 2)
    norms = [float.fromhex(line["gradient_norm"]) for line in first]
    assert len(set(norms)) == STEPS
    assert [line["gradient_norm"] for line in second] == [norm.hex() for norm in norms]
    logged = {record["step"]: record["gradient_norm"] for record in runs.records(trained("two", 2), "train")}
    assert {step: norms[step - 1] for step in logged} == pytest.approx(logged, rel=1e-12)


@pytest.mark.parametrize("key", ["ids", "draws", "loss", "gradient_norm"])
def test_a_planted_difference_is_found(key: str, trained: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "planted"
    shutil.copytree(trained("two", 2), folder, symlinks=True)
    file = folder / "trace" / "rank_00001.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    value = lines[19][key]
    before = value[3] if isinstance(value, list) else value
    if isinstance(value, list):
        value[3] = after = before + 1
    else:
        lines[19][key] = after = (float.fromhex(value) * 2).hex()
    lines[24]["draws"][0] += 1  # what comes later is not what they part in
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    code, printed, _ = distrib_trace("diff", trained("two", 2), folder)
    assert code == 1
    assert f"they part at step 20, rank 1, in {key.replace('_', ' ')} (on 2 ranks each)" in printed
    assert f"A {before}" in printed
    assert f"B {after}" in printed
    assert "before, alike in 19 steps (1 to 19)" in printed
    assert "weights, buffers, optimizer, ema alike" in printed


def test_kill_9_and_a_restart_leave_no_difference(trained: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    process = runs.begin(1, folder, *SHORT)
    runs.wait_until(lambda: runs.steps_traced(folder) >= 13, process)
    runs.kill_group(process)
    done = runs.steps_traced(folder)
    assert done < STEPS
    code, printed, _ = distrib_trace("diff", trained("one"), folder)
    assert code == 0, printed
    assert f"alike in {done} steps (1 to {done})" in printed
    alone = f"{done + 1} to {STEPS}" if done + 1 < STEPS else str(STEPS)
    assert f"not compared, as A ({trained('one')}) alone has them: steps {alone}" in printed
    assert f"final states were not compared: B ({folder}) has no sha256 in a summary.json" in printed

    runs.train(1, folder, *SHORT)
    code, printed, _ = distrib_trace("diff", trained("one"), folder)
    assert code == 0, printed
    assert f"alike in {STEPS} steps (1 to {STEPS})" in printed
    assert f"state after step {STEPS}: weights, buffers, optimizer, ema alike" in printed


def test_hashes_are_those_of_the_summary(
    trained: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = json.loads((trained("one") / "summary.json").read_text())["sha256"]
    file = runs.newest_checkpoint(trained("one"))
    code, printed, told = distrib_trace("hash", trained("one"))
    assert (code, dict(line.split() for line in printed.splitlines()), told) == (0, summary, f"{file}\n")
    damaged = tmp_path / "damaged.pt"
    saved = torch.load(file, weights_only=True)
    saved["model"]["fc.weight"][0, 0] += 1
    torch.save(saved, damaged)
    for path, other, remark in (
        (file, [], ""),
        (damaged, ["weights"], f"warning: {damaged}: it does not match its checksum\n"),
    ):
        print_hashes(path)
        printed, told = capsys.readouterr()
        found = dict(line.split() for line in printed.splitlines())
        assert [part for part in summary if found[part] != summary[part]] == other
        assert told == f"{remark}{path}\n"


# What is hashed


@pytest.fixture
def saved(trained: Callable[..., Path]) -> dict[str, Any]:
    return torch.load(runs.newest_checkpoint(trained("two", 2)), weights_only=True)


def tensors(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys that lead to each tensor of nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        yield path
    elif isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors(inner, (*path, key))


def place(state: dict[str, Any], path: Sequence[Any]) -> dict[Any, Any]:
    """What holds the tensor at ``path``."""
    for key in path[:-1]:
        state = state[key]
    return state


def flipped(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with its very last bit of memory turned over."""
    flat = tensor.contiguous().reshape(-1).clone().view(torch.uint8)
    flat[-1] ^= 0x80
    return flat.view(tensor.dtype).reshape(tensor.shape)


def test_one_bit_of_any_tensor_changes_its_part_alone(saved: dict[str, Any]) -> None:
    before, met = digest(saved), set()
    for path in tensors(saved):
        holder, key = place(saved, path), path[-1]
        value = holder[key]
        holder[key] = flipped(value)
        after = digest(saved)
        holder[key] = value
        (part,) = [part for part in before if after[part] != before[part]]  # exactly one
        met.add((path[0], part))
    assert met == {
        ("model", "weights"),
        ("model", "buffers"),
        ("model_ema", "ema"),
        ("optimizer", "optimizer"),
        ("statistics", "buffers"),
    }
    assert digest(saved) == before


def test_memory_format_order_of_keys_and_options_do_not_count(saved: dict[str, Any]) -> None:
    def turned(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if value.ndim != 4:
                return value
            last = value.is_contiguous(memory_format=torch.channels_last)
            made = value.contiguous(memory_format=torch.contiguous_format if last else torch.channels_last)
            changed.append(made.stride() != value.stride())
            return made
        return {key: turned(value[key]) for key in reversed(value)} if isinstance(value, dict) else value

    changed: list[bool] = []
    other = turned(saved)
    assert sum(changed) > 10
    other["optimizer"]["param_groups"][0] |= {"lr": 7.0, "fused": True}
    assert digest(other) == digest(saved)


def test_the_loss_scaler_counts(saved: dict[str, Any]) -> None:
    before = digest(saved)
    scales = [digest(saved | {"scaler": {"scale": scale, "_growth_tracker": 0}}) for scale in (65536.0, 32768.0)]
    assert {part for part in before if len({each[part] for each in (before, *scales)}) == 3} == {"optimizer"}


def test_another_program_can_do_the_same() -> None:
    """By hand, as the module's docstring says."""
    state = {
        "model": {
            "fc.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]).T,
            "bn.weight": torch.tensor([0.5, 9.0], dtype=torch.bfloat16)[::2],
            "bn.running_mean": torch.tensor([-0.0]),
            "bn.num_batches_tracked": torch.tensor(3),
        },
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(1)}}, "param_groups": []},
        "scaler": {"scale": 65536.0, "_growth_tracker": 7},
        "statistics": torch.empty(0, 1),
    }

    def sha(*parts: bytes) -> str:
        return hashlib.sha256(b"".join(parts)).hexdigest()

    assert digest(state) == {
        "weights": sha(
            b"bn.weight bfloat16 [1]\n\x00\x3f",
            b"fc.weight float32 [2, 2]\n", struct.pack("<4f", 1, 3, 2, 4),
        ),
        "buffers": sha(
            b"bn.num_batches_tracked int64 []\n", struct.pack("<q", 3),
            b"bn.running_mean float32 [1]\n", struct.pack("<f", -0.0),
        ),
        "optimizer": sha(
            b"0.momentum_buffer float32 [1]\n", struct.pack("<f", 1),
            b"scaler._growth_tracker 7\n", b"scaler.scale 0x1.0000000000000p+16\n",
        ),
    }  # fmt: skip


def test_the_last_save_is_hashed_from_memory_and_any_other_from_its_file(tmp_path: Path, saved: dict[str, Any]) -> None:
    other = copy.deepcopy(saved)
    other["model"]["fc.weight"] += 1
    kept = Checkpointer(tmp_path, keep=9, notify=pytest.fail)
    assert kept.sha256(1) is None
    kept.save(saved, 1, None)
    kept.save(saved, 2, None, last=True)
    kept.wait()
    for step in (1, 2):
        commit(other, path_for(tmp_path, step))
    assert (kept.sha256(1), kept.sha256(2)) == (digest(other), digest(saved))
    assert Checkpointer(tmp_path, keep=9, notify=pytest.fail).sha256(2) == digest(other)  # of an earlier start


# Files made up


def write(folder: Path, ranks: dict[int, list[dict[str, Any]]]) -> Path:
    (folder / "trace").mkdir(parents=True)
    for rank, lines in ranks.items():
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        (folder / "trace" / f"rank_{rank:05d}.jsonl").write_text(text)
    return folder


def line(step: int, ids: list[int], loss: float = 1.0, norm: float | None = 2.0) -> dict[str, Any]:
    made: dict[str, Any] = {"step": step, "ids": ids, "draws": [10 * n for n in ids], "loss": float(loss).hex()}
    return made if norm is None else made | {"gradient_norm": float(norm).hex()}


def whole(first: int, last: int, **values: Any) -> list[dict[str, Any]]:
    """Lines of one rank that sees all four images."""
    return [line(step, [step, 7, 8, 9], **values) for step in range(first, last + 1)]


def halves(first: int, last: int) -> dict[int, list[dict[str, Any]]]:
    """The same on two ranks."""
    steps = range(first, last + 1)
    return {0: [line(step, [step, 7], 0.25) for step in steps], 1: [line(step, [8, 9], 0.5) for step in steps]}


def compared(a: Path, b: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    return diff(a, b, lambda: False), capsys.readouterr().out


def test_losses_of_other_worlds_are_set_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a", {0: whole(1, 2) + whole(3, 3, norm=4.0)})
    b = write(tmp_path / "b", halves(1, 3))
    code, printed = compared(a, b, capsys)
    assert code == 0
    assert "\nloss of the global batch: relative difference of at most 0.25 (step 1)\n" in printed
    assert "\ngradient norm of the global batch: relative difference of at most 0.5 (step 3)\n" in printed


def test_a_batch_of_another_order_parts_at_any_world(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranks = halves(1, 3)
    ranks[1][1]["ids"].reverse()
    code, printed = compared(write(tmp_path / "a", {0: whole(1, 3)}), write(tmp_path / "b", ranks), capsys)
    assert code == 1
    assert "they part at step 2, in ids (A on 1, B on 2 ranks)\n  ids: A 8, B 9 at place 3 of 4; 2 differ\n" in printed


def test_ranks_may_come_and_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One rank, two, one again; afterwards losses are not compared to the bit, as the weights are others."""
    two, late = halves(4, 6), whole(7, 9, loss=3.0)
    b = write(tmp_path / "b", {0: whole(1, 3) + two[0] + late, 1: two[1]})
    code, printed = compared(write(tmp_path / "a", {0: whole(1, 9)}), b, capsys)
    assert code == 0, printed
    assert "alike in 9 steps (1 to 9): ids and draws of the global batch; A on 1, B on 1 or 2 ranks" in printed
    assert "loss of the global batch: relative difference of at most 0.667 (step 7)" in printed


def test_a_killed_run_is_compared_as_far_as_all_its_ranks_go(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks = halves(1, 5)
    ranks[1].pop()
    b = write(tmp_path / "b", ranks)
    with (b / "trace" / "rank_00001.jsonl").open("a") as file:
        file.write('{"step": 5, "ids": [8')  # torn
    code, printed = compared(write(tmp_path / "a", halves(1, 5)), b, capsys)
    assert code == 0, printed
    assert "alike in 4 steps (1 to 4)" in printed
    assert f"not compared, as A ({tmp_path / 'a'}) alone has them: steps 5" in printed


def test_steps_that_one_run_alone_has_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a", {0: whole(1, 3) + whole(6, 6)})
    b = write(tmp_path / "b", {0: whole(2, 8)})
    code, printed = compared(a, b, capsys)
    assert code == 0
    assert "alike in 3 steps (2 to 3, 6)" in printed
    assert f"not compared, as A ({a}) alone has them: steps 1\n" in printed
    assert f"not compared, as B ({b}) alone has them: steps 4 to 5, 7 to 8\n" in printed


def test_all_ranks_that_part_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranks = halves(1, 3)
    for rank, lines in ranks.items():
        lines[1]["gradient_norm"] = "nan"
        if rank:
            lines[1]["loss"] = "inf"
    code, printed = compared(write(tmp_path / "a", halves(1, 3)), write(tmp_path / "b", ranks), capsys)
    assert code == 1
    assert "they part at step 2, rank 0, in gradient norm" in printed
    assert f"gradient norm: A {(2.0).hex()} (2), B nan (nan), relative inf\n" in printed
    assert "so do 1 more ranks: 1\n" in printed


def test_numbers_that_are_none_are_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [write(tmp_path / name, {0: whole(1, 2, loss=float("nan"))}) for name in "ab"]
    assert compared(*folders, capsys)[0] == 0


def test_older_traces_have_no_norms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write(tmp_path / "a", {0: whole(1, 3, norm=None)}), write(tmp_path / "b", {0: whole(1, 3)})
    for other in (a, b):
        code, printed = compared(a, other, capsys)
        assert code == 0
        assert "alike in 3 steps (1 to 3): ids, draws and losses; on 1 rank each" in printed
        assert "gradient norms were not compared: a trace has none" in printed


def test_final_states_alone_may_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [write(tmp_path / name, {0: whole(1, 2)}) for name in "ab"]
    for step, weights, code, said in (
        (2, "c", 1, "state after step 2: weights differ; buffers alike"),
        (2, "d", 0, "state after step 2: weights, buffers alike"),
        (3, "d", 0, "final states were not compared: A's is of step 2, B's of step 3"),
    ):
        for folder, its, own in zip(folders, (2, step), ("d", weights), strict=True):
            summary = {"step": its, "sha256": {"weights": own, "buffers": "e"}}
            (folder / "summary.json").write_text(json.dumps(summary))
        found, printed = compared(*folders, capsys)
        assert (found, printed.splitlines()[-1]) == (code, said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"step": 2, "ids": [1, 7, 8, 9]}\n', "line 2: this is no line of a trace"),
        ('{"step": 2, "ids": [1], "draws": [1], "loss": 1.0}\n', "line 2: this is no line of a trace"),
        ("[]\n", "line 2: this is no line of a trace"),
        ("\x00\n", "line 2: this is no line of a trace"),
        (f"{json.dumps(line(1, [1, 7, 8, 9]))}\n", "line 2: step 1 comes after step 1"),
    ],
)
def test_a_file_that_is_no_trace_is_named(text: str, said: str, tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", {0: whole(1, 2)}), write(tmp_path / "b", {0: whole(1, 1)})
    with (b / "trace" / "rank_00000.jsonl").open("a") as file:
        file.write(text)
    with pytest.raises(UserError, match=f"rank_00000.jsonl, {said}"):
        diff(a, b, lambda: False)


def test_a_stop_ends_a_comparison(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", {0: whole(1, 2)})
    with pytest.raises(Interrupted):
        diff(folder, folder, lambda: True)


def test_mistakes_are_one_line_and_code_2(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", {0: whole(1, 3)}), write(tmp_path / "b", {0: whole(4, 4)})
    untraced = tmp_path / "untraced"
    untraced.mkdir()
    for words, said in (
        (("diff", a, untraced), f"{untraced} has no trace: train with trace=true"),
        (("diff", tmp_path / "none", a), f"there is no run folder {tmp_path / 'none'}"),
        (("diff", a, b), f"the runs have no traced step in common: A ({a}) has steps 1 to 3, B ({b}) has steps 4"),
        (("diff", a), "the following arguments are required: RUN_B (distrib trace diff --help shows the options)"),
    ):
        assert distrib_trace(*words) == (2, "", f"error: {said}\n")


def test_what_is_no_checkpoint_is_not_hashed(tmp_path: Path) -> None:
    foreign = tmp_path / "weights.pth"
    torch.save({"fc.weight": torch.ones(1)}, foreign)
    for source, said in (
        (tmp_path, f"{tmp_path / 'checkpoints'} holds no checkpoint"),
        (tmp_path / "none", f"there is no {tmp_path / 'none'}"),
        (foreign, f"{foreign} is no checkpoint of this trainer"),
    ):
        with pytest.raises(UserError) as raised:
            print_hashes(source)
        assert str(raised.value) == said
