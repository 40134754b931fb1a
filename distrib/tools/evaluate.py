"""Evaluates weights, ours or anybody's ResNet: ``distrib evaluate runs/resnet18-pets``.

The run's own loader, arithmetic and evaluator are used, so that the figures are those of its log.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from distrib.faults import FAILED, FINISHED, STOPPED, USER_ERROR, Failure, Interrupted, StopSignals
from distrib.surroundings import settle

EXAMPLES = """examples:
  distrib evaluate runs/resnet18-pets                     # the run's best, on its own validation images
  distrib evaluate runs/resnet18-pets --split train
  distrib evaluate IMAGENET1K_V2 --model resnet50 --data /data/imagenet
  distrib evaluate resnet18.pth --data pets/test data.eval_size=288 data.eval_resize=330 --json
"""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments.

    Raises:
        UserError: they are wrong.
        SystemExit: ``--help`` was asked for.
    """
    from distrib.options import Parser

    parser = Parser(
        parts=["data"],
        prog="distrib evaluate",
        description="Top-1 and top-5 accuracy, in percent, and the loss of weights on folders of pictures.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("weights", help="a run's folder, a file of weights, or torchvision's name for them")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings of data and train.precision, as of train.py"
    )
    parser.add_argument("--data", metavar="DIR", help="the same as data.root=DIR; default: the run's")
    parser.add_argument("--split", choices=("train", "val"), default="val", help="default: %(default)s")
    parser.add_argument("--model", metavar="NAME", help="network; default: what the weights fit")
    parser.add_argument("--json", action="store_true", help="print an object, not a sentence")
    return parser.parse_words(argv)


def evaluate(args: argparse.Namespace, stop: StopSignals) -> dict[str, object] | None:
    """What the arguments ask for: top1, top5 (percent), loss, images and seconds; None where it was stopped.

    Raises:
        UserError: weights or data are not there, or do not fit each other.
    """
    import torch

    from distrib.data import EvalPlan, build_loader
    from distrib.data.index import open_index
    from distrib.engine.evaluate import Evaluator
    from distrib.engine.prepare import DTYPES, Objective, effective_precision, set_up_device
    from distrib.faults import Agreement
    from distrib.layout import find_split
    from distrib.place import find_place, publish
    from distrib.runtime import leave, start
    from distrib.trained import open_trained, output_of

    say = partial(print, file=sys.stderr, flush=True)
    place = find_place(os.environ)
    publish(place, os.environ)
    trained = open_trained(args.weights, args.model, args.overrides, say)
    cfg, outputs = trained.config.data, trained.outputs
    elsewhere = any(word.startswith("data.root=") for word in args.overrides)  # nothing there was trained on
    if elsewhere and not any(word.startswith("data.classes=") for word in args.overrides):
        cfg = cfg.model_copy(update={"classes": None})  # the run's choice was among its own
    split = find_split(cfg, args.split, whole=elsewhere)
    runtime = start(place, stop, cfg.wait_minutes)
    index = runtime.main_first(lambda: open_index(split, cfg.index_dir, say, stop.requested))
    columns = torch.tensor(output_of(index.classes, trained), device=runtime.device)
    precision = effective_precision(trained.config.train.precision, runtime.device)
    set_up_device(runtime.device, precision, trained.config.train.deterministic)
    loader = build_loader(cfg, (index, index), outputs, runtime.device, notify=say, stop=stop.requested,
                          ranks=runtime.world, local_ranks=runtime.local_world)  # fmt: skip
    network = trained.network.to(memory_format=torch.channels_last).to(runtime.device)
    objective = Objective(network, cfg.mean, cfg.std, DTYPES[precision]).to(runtime.device)
    plan = EvalPlan(len(index), cfg.eval_batch, runtime.rank, runtime.world)
    batches = (b._replace(labels=torch.where(b.labels < 0, -1, columns[b.labels])) for b in loader.evaluate(plan))
    with _bar(runtime.is_main) as tell:
        evaluator, agreement = Evaluator(objective, ["model"], compile_=False), Agreement(runtime.control)
        result = evaluator({"model": network.state_dict()}, batches, plan, runtime, agreement, stop, tell)
        agreement.close()
    leave()
    about = {"weights": trained.source, "data": str(index.root), "classes": len(index.classes)}
    return None if result is None else {**result, **about} if runtime.is_main else {}


@contextlib.contextmanager
def _bar(shown: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal's stderr; a function that is told (batches done, all)."""
    if not (shown and sys.stderr.isatty()):
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("evaluating", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def sentence(result: dict[str, object]) -> str:
    """The result for a person."""
    from distrib.config import TOP5_CLASSES

    top5 = f"top-5 {result['top5']:.2f} %, " if int(str(result["classes"])) >= TOP5_CLASSES else ""
    return (
        f"{result['weights']}: top-1 {result['top1']:.2f} %, {top5}loss {result['loss']:.4f} on {result['images']:,} "
        f"images of {result['data']}"
    )


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0, 75 stopped on request, 2 the user's to mend, 1 failed."""
    from distrib.config import UserError

    stop = StopSignals()
    settle()
    try:
        args = parse(argv)
        result = evaluate(args, stop)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except Failure as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except Interrupted:
        result = None
    if result is None:
        print("stopped: nothing was counted to its end", file=sys.stderr)
        return STOPPED
    if result:
        print(json.dumps(result, indent=2) if args.json else sentence(result))
    return FINISHED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
