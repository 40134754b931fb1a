"""The command line: ``distrib evaluate``, also under torchrun as ``-m distrib.tools.evaluate``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from distrib.faults import FINISHED, Interrupted, StopSignals
from distrib.program import run

EXAMPLES = """examples:
  distrib evaluate runs/resnet18-pets                     # the run's best, on its own validation images
  distrib evaluate runs/resnet18-pets --split train --per-class
  distrib evaluate IMAGENET1K_V2 --model resnet50 --data /data/imagenet
  distrib evaluate IMAGENET1K_V2 --model resnet50 --data /data/imagenet --real real.json    # ReaL labels, too
  distrib evaluate IMAGENET1K_V2 --model resnet50 --data imagenetv2-matched-frequency-format-val
  distrib evaluate IMAGENET1K_V2 --model resnet50 --data imagenet-a --classes subset        # and ImageNet-R
  distrib evaluate resnet18.pth --data pets/test --size 288 --flip --json
  torchrun --nproc_per_node=8 -m distrib evaluate runs/resnet50-imagenet
"""
WORST = 10  # classes, and pairs of classes, where --per-class stands without a number


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments.

    Raises:
        UserError: they are wrong.
        SystemExit: ``--help`` was asked for.
    """
    from distrib.options import positive, weights_parser

    parser = weights_parser(
        "evaluate",
        "Top-1 and top-5 accuracy, in percent, and the loss of weights on folders of pictures.",
        EXAMPLES,
    )
    parser.add_argument("weights", help="a run's folder, a file of weights, or torchvision's name for them")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings of data and train.precision, as of train.py"
    )
    parser.add_argument("--data", metavar="DIR", help="the same as data.root=DIR; default: the run's")
    parser.add_argument("--split", choices=("train", "val"), default="val", help="default: %(default)s")
    parser.add_argument(
        "--classes",
        choices=("all", "subset"),
        default="all",
        help="subset: guess among the classes of these folders only, as is usual for ImageNet-A and -R; "
        "default: %(default)s that the network knows",
    )
    parser.add_argument("--real", metavar="FILE", help="ReaL labels too: real.json of Beyer et al. 2020")
    parser.add_argument("--size", type=positive, metavar="N", help="the crop, pixels: data.eval_size=N")
    parser.add_argument(
        "--resize",
        type=positive,
        metavar="N",
        help="shorter side before it: data.eval_resize=N; default: 8/7 of --size",
    )
    parser.add_argument("--flip", action="store_true", help="mean of the logits of a picture and its mirror image")
    parser.add_argument(
        "--fast",
        action="store_true",
        help="batch norms folded in, 16 bits where the processor has them; default: the arithmetic of the run",
    )
    parser.add_argument(
        "--per-class",
        nargs="?",
        type=positive,
        const=WORST,
        metavar="N",
        help=f"the N worst classes and the N most confused pairs, too; N is {WORST} where it is left out",
    )
    parser.add_argument(
        "--json", action="store_true", help="print an object, not a sentence: with each class and the confused pairs"
    )
    return parser.parse_words(_with_numbers(argv))


def main(argv: Sequence[str], stop: StopSignals) -> int:
    """Evaluates and prints; returns the exit code.

    Raises:
        UserError: the arguments, the weights or the data are wrong.
        Interrupted: asked to stop.
    """
    args = parse(argv)
    from distrib.jsonl import dumps
    from distrib.place import find_place, publish
    from distrib.tools.evaluate.report import sentence, tables
    from distrib.tools.evaluate.scoring import evaluate

    place = find_place(os.environ)
    publish(place, os.environ)
    result = evaluate(args, place, stop)
    if result is None:
        raise Interrupted
    if place.rank == 0:
        print(dumps(result, indent=2) if args.json else "\n".join([sentence(result), *tables(result, args.per_class)]))
    return FINISHED


def _with_numbers(argv: Sequence[str]) -> list[str]:
    """Gives ``--per-class`` its number where none follows: else it would take the weights for one."""
    follows = zip(argv, [*argv, ""][1:], strict=True)
    return [f"{word}={WORST}" if word == "--per-class" and not after.isdecimal() else word for word, after in follows]


if __name__ == "__main__":
    sys.exit(run(lambda stop: main(sys.argv[1:], stop)))
