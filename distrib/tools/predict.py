"""Classifies pictures: ``distrib predict cat.jpg --weights runs/resnet18-pets``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from distrib.faults import Failure, Interrupted, StopSignals
from distrib.jsonl import dumps
from distrib.program import bar, run, say

if TYPE_CHECKING:
    import torch

EXAMPLES = """examples:
  distrib predict cat.jpg photos/ --weights runs/resnet18-pets
  distrib predict cat.jpg --weights IMAGENET1K_V2 --model resnet50
  find . -name '*.jpg' | distrib predict - --weights resnet50.pth --top 1
  distrib predict photos/ --weights runs/resnet18-pets --json | jq -r '[.file, .top[0].class] | @tsv'

With --json each picture is a line: {"file": …, "top": [{"class": …, "title": …, "probability": 0 to 1}, …]}.
"""
BATCHES = {"cuda": 128, "cpu": 32}  # pictures at once


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments.

    Raises:
        UserError: they are wrong.
        SystemExit: ``--help`` was asked for.
    """
    from distrib.config import UserError
    from distrib.options import settings_among, weights_parser

    parser = weights_parser(
        "predict",
        "The classes that weights see in pictures, the likeliest first, in percent.",
        EXAMPLES,
    )
    parser.add_argument(
        "words", nargs="+", metavar="IMAGE|DIR|-", help="pictures; - reads paths from stdin, one a line"
    )
    parser.add_argument("--weights", required=True, help="a run's folder, a file of weights, or torchvision's name")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="classes a picture; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="an object a line for each picture")
    parser.add_argument("--exact", action="store_true", help="in fp32 with batch norms, as trained; slower")
    args = parser.parse_words(argv)
    args.pictures, args.overrides = settings_among(args.words)
    if args.top < 1:
        raise UserError(f"--top {args.top}: one class a picture is the least")
    return args


def paths(words: Iterable[str]) -> Iterator[str]:
    """``words``, with the lines of stdin in the place of each ``-``."""
    for word in words:
        if word == "-":
            yield from (os.fsdecode(line) for line in sys.stdin.buffer.read().split(b"\n") if line)
        else:
            yield word


def predict(args: argparse.Namespace, stop: StopSignals) -> None:
    """Prints what the arguments ask for.

    Raises:
        UserError: the weights are not there or fit no network, or no picture is named.
        Failure: some pictures could not be read; the others are printed. Or there is not memory enough for one.
        Interrupted: ``stop`` came first.
    """
    import torch

    from distrib.data.pictures import find_readable, load_pictures
    from distrib.layout.folders import shown
    from distrib.trained import begin_use, open_trained

    files, unread = find_readable(paths(args.pictures), say)
    asked = len(files) + unread
    if files:
        trained = open_trained(args.weights, args.model, args.overrides, say)
        classifier, device = begin_use(trained, args.exact, say)
        names, titles = trained.labels(), trained.titles()
        top, batch = min(args.top, trained.outputs), BATCHES[device.type]
        batches = load_pictures(files, trained.config.data, device, batch, say, stop.requested)
        rest = iter(files)
        with bar("predicting", wanted=len(files) > batch and not sys.stdout.isatty()) as tell, torch.inference_mode():
            done, fits = 0, batch
            for images, good in batches:
                logits, fits = in_parts(classifier, images, fits)
                shares, order = logits.softmax(1).sort(dim=1, descending=True, stable=True)
                rows = zip(shares[:, :top].tolist(), order[:, :top].tolist(), good, strict=True)
                for share, classes, is_picture in rows:
                    name = os.fspath(next(rest))
                    if not is_picture:
                        unread += 1
                    elif args.json:
                        found = [
                            {"class": names[c], "title": titles[c], "probability": p}
                            for c, p in zip(classes, share, strict=True)
                        ]
                        print(dumps({"file": name, "top": found}))
                    else:
                        print(block(shown(name), [(shown(titles[c]), p) for c, p in zip(classes, share, strict=True)]))
                sys.stdout.flush()
                done += len(good)
                tell(done, len(files))
                if stop.requested() and done < len(files):
                    raise Interrupted
    if unread:
        raise Failure(f"{unread} of {asked} pictures could not be read")


def in_parts(classifier: Any, images: torch.Tensor, fits: int) -> tuple[torch.Tensor, int]:
    """The logits of ``images``, ``fits`` at a time, or half as many until the memory takes them; and how many it took.

    Raises:
        Failure: there is not memory enough for one.
    """
    import torch

    while True:
        try:
            return torch.cat([classifier.logits(part) for part in images.split(fits)]), fits
        except torch.OutOfMemoryError:
            if fits == 1:
                raise Failure(f"{images.device} has too little memory for one of {images.shape[-1]} pixels") from None
            fits = max(1, min(fits, len(images)) // 2)
        torch.cuda.empty_cache()


def block(name: str, top: Sequence[tuple[str, float]]) -> str:
    """A picture for a person: a line where one class is asked for, else one each below its name."""
    if len(top) == 1:
        title, share = top[0]
        return f"{name}: {title} {100 * share:.1f} %"
    return "\n".join([name, *(f"  {100 * share:5.1f} %  {title}" for title, share in top)])


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0, 75 stopped on request, 2 the user's to mend, 1 some pictures could not be read."""
    return run(lambda stop: predict(parse(argv), stop))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
