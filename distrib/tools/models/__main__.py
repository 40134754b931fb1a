"""The command line of ``distrib models``."""

from __future__ import annotations

import argparse
import difflib
import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distrib.config import UserError
from distrib.faults import FINISHED, StopSignals
from distrib.layout.folders import shown
from distrib.options import PlainParser, positive
from distrib.program import run, say
from distrib.tools.models.cost import IMAGES, REPORTS, Speed, read_speeds
from distrib.tools.models.table import table

EXAMPLES = """examples:
  distrib models                              # all networks
  distrib models resnet50 --size 160 --classes 37
  distrib models --cost --epochs 18           # and the GPU hours of a training on ImageNet
"""
EPOCHS = 90.0
WIDEST = 120  # columns of running text
LARGEST = 65_536  # pixels a side; above, torch cannot number what a network puts out


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments.

    Raises:
        UserError: they are wrong.
        SystemExit: ``--help`` was asked for.
    """
    parser = PlainParser(
        prog="distrib models",
        description="What the networks are made of, beside torchvision's, counted in the same way.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="networks; default: all")
    parser.add_argument(
        "--size", type=positive, metavar="PX", help="of the images; default: 224, of small-image networks 32"
    )
    parser.add_argument("--classes", type=positive, metavar="N", help="default: 1000, of small-image networks 10")
    parser.add_argument("--cost", action="store_true", help="GPU hours of a training on ImageNet, at measured speeds")
    parser.add_argument("--epochs", type=float, metavar="N", help=f"of --cost; default: {EPOCHS:g}")
    parser.add_argument(
        "--reports", type=Path, metavar="DIR", help="of --cost: reports of distrib bench; default: benchmarks/results"
    )
    parser.add_argument("--json", action="store_true", help="print an object, not tables")
    args = parser.parse_intermixed_args(argv)
    if args.size is not None and args.size > LARGEST:
        raise UserError(f"--size {args.size}: pictures of more than {LARGEST} pixels a side are not counted")
    if not args.cost and (args.epochs is not None or args.reports is not None):
        raise UserError(f"{'--reports' if args.epochs is None else '--epochs'} says nothing without --cost: add it")
    if args.epochs is not None and not 0 < args.epochs < float("inf"):
        raise UserError(f"--epochs {args.epochs:g}: a number above 0 is wanted")
    if args.reports is not None and not args.reports.is_dir():
        raise UserError(f"--reports {shown(args.reports)}: there is no such folder")
    return args


def look_up(args: argparse.Namespace) -> dict[str, Any]:
    """What the arguments ask for: "networks", and "cost" where that was asked.

    Raises:
        UserError: there is no such network.
    """
    from distrib.models import MODEL_NAMES  # here: torch takes seconds
    from distrib.tools.models.count import row

    for name in args.names:
        if name not in MODEL_NAMES:
            near = difflib.get_close_matches(name.lower(), MODEL_NAMES, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(MODEL_NAMES)}"
            raise UserError(f"there is no network {shown(name)}; {hint}")
    names = list(dict.fromkeys(args.names)) or list(MODEL_NAMES)
    result: dict[str, Any] = {"networks": [row(name, args.size, args.classes) for name in names]}
    if args.cost:
        epochs = EPOCHS if args.epochs is None else args.epochs
        speeds = read_speeds(args.reports or REPORTS, say)
        result["cost"] = [
            {"epochs": epochs, "gpu_hours": speed.hours(epochs), **asdict(speed)}
            for speed in sorted((s for s in speeds if s.model in names), key=lambda s: names.index(s.model))
        ]
    return result


def networks(rows: Sequence[dict[str, Any]], width: int) -> str:
    """The table of networks, and below it what was counted."""
    from distrib.tools.models.count import agreement, differences

    lines: list[tuple[str, ...]] = [("network", "layers", "px", "parameters", "M MACs", "activations", "torchvision's")]
    for found in rows:
        peer = "" if not found["torchvision"] else ", ".join(differences(found)) or "the same"
        lines.append(
            (
                found["name"], str(found["layers"]), str(found["size"]), f"{found['parameters']:,}",
                f"{found['macs'] / 1e6:,.1f}", f"{found['activations']:,}", peer,
            )
        )  # fmt: skip
    kinds = dict.fromkeys((found["size"], found["classes"]) for found in rows)
    made = " or ".join(f"{size}×{size} ({classes:,} classes)" for size, classes in kinds)
    said = (
        f"For one image of {made}. MACs are multiply-adds of "
        "convolutions and the last layer; activations are the elements that these put out (Radosavovic et al. 2020, "
        "arXiv 2003.13678); a projection on a shortcut counts, but is no layer."
    )
    texts = [said, " ".join(agreement(rows))]
    return "\n".join([table(lines, (0, 6), width), "", *(paragraph(text, width) for text in texts if text)])


def costs(entries: Sequence[dict[str, Any]], names: Sequence[str], where: Path, width: int) -> str:
    """The table of GPU hours, or what would fill it."""
    if not entries:
        model = names[0] if len(names) == 1 else "resnet50"
        return paragraph(
            f"No training speed of {'these networks' if len(names) > 1 else model} on a GPU is on file in "
            f"{shown(where)}. On a machine with one, `distrib bench train --model {model} --size 224 --batch 256 "
            "--compile --json FOLDER/NAME.json` makes a report, and `distrib models --cost --reports FOLDER` reads it.",
            width,
        )
    lines: list[tuple[str, ...]] = [("network", "px", "precision", "images/s", "GPU hours", "measured")]
    for entry in entries:
        speed = Speed(**{key: value for key, value in entry.items() if key not in ("epochs", "gpu_hours")})
        measured = f"{speed.what}, batch {speed.batch}, {speed.gpu}, {speed.date[:10]}"
        lines.append(
            (
                speed.model,
                str(speed.size),
                speed.precision,
                f"{speed.rate:,.0f}",
                f"{entry['gpu_hours']:,.1f}",
                measured,
            )
        )
    said = (
        f"GPU hours: {entries[0]['epochs']:g} epochs of {IMAGES:,} images at the speed of one GPU. Evaluations and "
        "saves come on top, and with more GPUs what they lose by waiting for each other."
    )
    return "\n".join([table(lines, (0, 2, 5), width), "", paragraph(said, width)])


def paragraph(text: str, width: int) -> str:
    """Running text in lines."""
    return textwrap.fill(text, min(width, WIDEST), break_on_hyphens=False, break_long_words=False)


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0, 2 the user's to mend."""

    def work(stop: StopSignals) -> int:
        args = parse(argv)
        result = look_up(args)
        if args.json:
            print(json.dumps(result, indent=2))
            return FINISHED
        width = shutil.get_terminal_size().columns
        print(networks(result["networks"], width))
        if args.cost:
            names = [found["name"] for found in result["networks"]]
            print("\n" + costs(result["cost"], names, args.reports or REPORTS, width))
        return FINISHED

    return run(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
