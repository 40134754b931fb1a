"""The program: pictures, through the network up to a stage, to vectors in a file."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distrib.faults import Failure, Interrupted, StopSignals
from distrib.program import bar, run, say

if TYPE_CHECKING:
    from distrib.tools.features.work import Work

EXAMPLES = """examples:
  distrib features photos/ --weights runs/resnet18-pets --output photos.npy        # and photos.txt: the files' names
  distrib features photos/ --weights IMAGENET1K_V2 --model resnet50 --output photos.parquet

A command that was stopped or killed goes on where it was when it is typed again.
"""
CPU_BATCH = 32  # images; on a GPU it is data.eval_batch, or half of it until it fits


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments.

    Raises:
        UserError: they are wrong.
        SystemExit: ``--help`` was asked for.
    """
    from distrib.config import UserError
    from distrib.options import settings_among, weights_parser

    parser = weights_parser(
        "features",
        "A vector of fp32 numbers for each picture: the mean over the pixels of what a stage gives.",
        EXAMPLES,
    )
    parser.add_argument("words", nargs="+", metavar="IMAGE|DIR", help="pictures; and settings as key=value")
    parser.add_argument("--weights", required=True, help="a run's folder, a file of weights, or torchvision's name")
    parser.add_argument("--output", required=True, metavar="FILE", help="a .npy (with a .txt beside it) or .parquet")
    parser.add_argument("--stage", metavar="NAME", help="conv1, layer1 …, fc; default: what the last layer sees")
    parser.add_argument("--exact", action="store_true", help="in fp32 with batch norms, as trained; slower")
    parser.add_argument("--batch", type=int, metavar="N", help="pictures at once; default: as the device likes it")
    args = parser.parse_words(argv)
    args.pictures, args.overrides = settings_among(args.words)
    if args.batch is not None and args.batch < 1:
        raise UserError(f"--batch {args.batch}: one picture is the least")
    return args


def extract(args: argparse.Namespace, stop: StopSignals) -> None:
    """Writes what the arguments ask for.

    Raises:
        UserError: weights, pictures or output are not as they must be.
        Failure: some pictures could not be read; the output has the others.
        Interrupted: ``stop`` came first; the same command goes on.
    """
    from distrib.config import UserError
    from distrib.data.pictures import find_readable
    from distrib.engine.inference import stages
    from distrib.tools.features.files import Files
    from distrib.trained import begin_use, open_trained
    from distrib.weights import checksum

    output = Files(args.output)
    files, unread = find_readable(args.pictures, say)
    names = list(map(os.fspath, files))
    output.check(names)
    asked = len(files) + unread
    if not files:
        raise Failure(f"{unread} of {asked} pictures could not be read: nothing is written")
    trained = open_trained(args.weights, args.model, args.overrides, say)
    known = stages(trained.network)
    stage = args.stage or known[-2]
    if stage not in known:
        raise UserError(f"--stage {stage}: {trained.config.model.name} has {', '.join(known)}")
    weights = checksum(trained.network)
    classifier, device = begin_use(trained, args.exact, say)
    cfg = trained.config.data
    purpose = {
        "version": 1, "weights": weights, "stage": stage, "exact": args.exact, "dtype": str(classifier.dtype),
        "device": device.type, "files": _fingerprint(files), "loader": cfg.loader, "decoder": cfg.decoder,
        "sizes": [cfg.eval_resize, cfg.eval_size], "mean": list(cfg.mean), "std": list(cfg.std),
    }  # fmt: skip
    work = compute(classifier, device, cfg, stage, files, output.path, purpose, args.batch, stop)
    unread += len(work.bad)
    try:
        if len(work.good()):
            about = {"weights": trained.source, "stage": stage, "model": trained.config.model.name}
            output.write(work, names, about)
    except UserError:
        work.close()  # its rows stay for a second try
        raise
    work.remove()
    if unread:
        left = f"{args.output} has the others" if unread < asked else "nothing is written"
        raise Failure(f"{unread} of {asked} pictures could not be read: {left}")
    say(f"{args.output}: {len(files)} × {work.columns}, {stage} of {trained.config.model.name}")


def compute(
    classifier: Any,
    device: Any,
    cfg: Any,
    stage: str,
    files: Sequence[Path],
    output: Path,
    purpose: dict[str, Any],
    batch: int | None,
    stop: StopSignals,
) -> Work:
    """All rows, of which those that an earlier start has done are not done again.

    Batches have fixed borders, as the last bits depend on how many pictures go through the network at once. Who has
    too little memory for them begins anew with half as many.

    Raises:
        Failure: there is not memory enough for a single picture.
        Interrupted: ``stop`` came first.
    """
    import torch

    from distrib.data.pictures import load_pictures
    from distrib.tools.features.work import Work

    with torch.inference_mode():
        columns = classifier.features(torch.zeros(1, 3, 32, 32, dtype=torch.uint8, device=device), stage).shape[1]
    while True:
        default = CPU_BATCH if device.type == "cpu" else cfg.eval_batch
        work = Work(output, purpose, columns, batch, default)
        if work.done:
            say(f"{work.done} of {len(files)} pictures are done; going on")
        pictures = load_pictures(files[work.done :], cfg, device, work.batch, say, stop.requested, of=len(files))
        try:
            with bar("features") as tell, torch.inference_mode():
                for images, good in pictures:
                    work.add(classifier.features(images, stage).cpu().numpy(), good)
                    tell(work.done, len(files))
                    if stop.requested() and work.done < len(files):
                        raise Interrupted
            return work
        except torch.OutOfMemoryError:
            batch = work.batch // 2
            work.close()
            if not batch:
                raise Failure(f"{device} has too little memory for one picture of {cfg.eval_size} pixels") from None
            say(f"too little memory for {work.batch} pictures at once: beginning with {batch} (--batch)")
        except Interrupted:
            work.save()
            work.close()
            say(f"{work.done} of {len(files)} pictures are done: the same command goes on from there")
            raise
        except BaseException:
            work.close()
            raise
        pictures.close()
        torch.cuda.empty_cache()


def _fingerprint(files: Sequence[Path]) -> str:
    """Of names, sizes and times: a picture that has changed is another one."""
    sha = hashlib.sha256()
    for file in files:
        try:
            status = os.stat(file)
            stamp = [status.st_size, status.st_mtime_ns]
        except OSError:  # gone since it was found
            stamp = []
        about = [os.fspath(file), os.path.abspath(file), *stamp]
        sha.update(json.dumps(about).encode())
    return sha.hexdigest()


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0, 75 stopped on request, 2 the user's to mend, 1 some pictures could not be read."""
    return run(lambda stop: extract(parse(argv), stop))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
