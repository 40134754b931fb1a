"""Compares settings over seeds: each variant is trained once a seed by train.py, and the accuracies stand side by side.

    python benchmarks/over_seeds.py --runs /tmp/zero --seeds 5 \
        --variant "zero: model.zero_init_residual=true" --variant "one: model.zero_init_residual=false" \
        -- --config configs/own_images.yaml --data DIR data.size=64

What follows ``--`` goes to every run. Stopped, the same command goes on; a run of other words is another run.
The p-value is a paired t-test's over the seeds, against the first variant.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import subprocess
import sys
import zlib
from pathlib import Path

TRAIN = Path(__file__).resolve().parent.parent / "train.py"


def main(argv: list[str]) -> int:
    """Trains what is missing and prints the table; the first run that fails ends it with its exit code."""
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--seeds", type=int, default=5, help="how many; default: %(default)s")
    parser.add_argument("--variant", action="append", required=True, metavar="'NAME: key=value …'")
    args = parser.parse_args(argv[:split])
    top1: dict[str, list[float]] = {}
    for seed in range(args.seeds):
        for variant in args.variant:
            name, _, own = variant.partition(":")
            words = [*argv[split + 1 :], *shlex.split(own), f"run.seed={seed}", "wandb.mode=disabled"]
            folder = args.runs / f"{name.strip()}-{seed}-{zlib.crc32(repr(words).encode()):08x}"
            done = subprocess.run(
                [sys.executable, str(TRAIN), *words, f"run.dir={folder}"], stdout=sys.stderr, check=False
            )
            if done.returncode:
                return done.returncode
            summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
            top1.setdefault(name.strip(), []).append(summary["top1"])
    print(table(top1))
    return 0


def table(top1: dict[str, list[float]]) -> str:
    """Mean and standard deviation of each variant, and how it differs from the first one, paired by seed."""
    first = next(iter(top1.values()))
    lines = ["| variant | top-1, % | standard deviation | seeds | difference | p |", "|---|---|---|---|---|---|"]
    for name, values in top1.items():
        spread = statistics.stdev(values) if len(values) > 1 else math.nan
        row = f"| {name} | {statistics.mean(values):.2f} | {spread:.2f} | {', '.join(f'{v:.2f}' for v in values)} "
        differences = [a - b for a, b in zip(values, first, strict=True)]
        if any(differences) and len(differences) > 1:
            row += f"| {statistics.mean(differences):+.2f} | {p_value(differences):.4f} |"
        else:
            row += "| | |"
        lines.append(row)
    return "\n".join(lines)


def p_value(differences: list[float]) -> float:
    """Two-sided p of a paired t-test, Student's distribution integrated numerically (Simpson's rule)."""
    n = len(differences)
    spread = statistics.stdev(differences)
    if spread == 0:
        return 0.0
    t, free = abs(statistics.mean(differences)) / (spread / math.sqrt(n)), n - 1
    scale = math.gamma((free + 1) / 2) / (math.sqrt(free * math.pi) * math.gamma(free / 2))
    steps = 10_000
    h = t / steps
    weights = (1 if k in (0, steps) else 4 if k % 2 else 2 for k in range(steps + 1))
    inside = sum(w * (1 + (k * h) ** 2 / free) ** (-(free + 1) / 2) for k, w in enumerate(weights)) * h / 3
    return max(0.0, 1 - 2 * scale * inside)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
