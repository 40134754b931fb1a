"""The command line of ``distrib export``."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distrib.faults import FINISHED, Interrupted, StopSignals
from distrib.layout.folders import shown
from distrib.program import Output, run, say
from distrib.tools.export.forms import FORMS, look_at

EXAMPLES = """examples:
  distrib export runs/resnet18-pets --to onnx --output pets.onnx
  distrib export runs/resnet18-pets --to timm --output pets.safetensors
  distrib export IMAGENET1K_V2 --model resnet50 --to torch.export --output r50.pt2 data.eval_resize=232
forms:
  torchvision     a bare state dict (.pth, .pt) for torchvision.models
  timm            the same, for timm.create_model(…, checkpoint_path=FILE) (.safetensors, .pth, .pt)
  safetensors     for this program: with the network's name, the classes, mean, std and sizes
  onnx            one file for onnxruntime and others; any batch, height and width
  torch.export    for torch.export.load (.pt2); any batch; any size above 32, else that of evaluation
"""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments.

    Raises:
        UserError: they are wrong.
        SystemExit: ``--help`` was asked for.
    """
    from distrib.options import weights_parser

    parser = weights_parser(
        "export",
        "Writes a network in another form. The file is loaded again and its logits are compared with the "
        "network's, in fp32, before it gets its name.",
        EXAMPLES,
    )
    parser.add_argument("weights", help="a run's folder, a file of weights, or torchvision's name for them")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of data that go into the file")
    parser.add_argument("--to", required=True, choices=FORMS, metavar="FORM", help=", ".join(FORMS))
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="must not be there yet")
    parser.add_argument("--json", action="store_true", help="print an object, not sentences")
    return parser.parse_words(argv)


def export(args: argparse.Namespace, stop: StopSignals) -> dict[str, Any]:
    """Writes the file; returns what it is and what was compared.

    Raises:
        UserError: the file or the weights are not what they should be.
        Failure: the file does not give what the network gives.
        Interrupted: between two of the parts of the work.
    """
    form, out = look_at(args.to, args.output), Output(args.output)
    from distrib.tools.export import graphs, states  # here: they take torch's seconds, and a mistake none
    from distrib.tools.export.compare import compare
    from distrib.trained import open_trained

    maker: Any = graphs if form.graph else states
    trained = open_trained(args.weights, args.model, args.overrides, say)
    maker.check(args.to, trained)
    with out.writing() as path:
        _look_for(stop)
        path.write_bytes(maker.write(args.to, trained, path.suffix))
        _look_for(stop)
        found = compare(trained, maker.reload(args.to, trained, path), maker.any_size(args.to, trained), form.tolerance)
        _look_for(stop)
        size = path.stat().st_size
    about = {"file": str(out.path), "form": args.to, "bytes": size, "weights": trained.source}
    data, network = trained.config.data, {"model": trained.config.model.name, "classes": trained.outputs}
    pixels = {"mean": data.mean, "std": data.std, "eval_size": data.eval_size, "eval_resize": data.eval_resize}
    opset = {"opset": graphs.OPSET} if args.to == "onnx" else {}
    return about | opset | network | pixels | {"compared": asdict(found) | {"relative": found.relative}}


def _look_for(stop: StopSignals) -> None:
    if stop.requested():
        raise Interrupted


def sentences(result: dict[str, Any]) -> str:
    """The result for a person."""
    compared, file = result["compared"], result["file"]
    sizes = " and ".join(dict.fromkeys(f"{height}×{width}" for _, height, width in compared["shapes"]))
    far = f"within {compared['relative']:.1e} of the largest" if compared["difference"] else "equal to the bit"
    load = FORMS[result["form"]].load.format(
        name=result["model"],
        classes=result["classes"],
        file=json.dumps(file, ensure_ascii=False),
        path=shlex.quote(file),
    )
    form = result["form"] + (f", opset {result['opset']}" if "opset" in result else "")
    mean, std = (", ".join(f"{value:g}" for value in result[key]) for key in ("mean", "std"))
    return shown_lines(
        f"{file} ({form}, {result['bytes'] / 1e6:.1f} MB): {result['model']}, {result['classes']} classes, of "
        f"{result['weights']}",
        f"loaded again, it gives the network's logits of {sum(shape[0] for shape in compared['shapes'])} random images "
        f"of {sizes}, {far}",
        f"images: RGB of {result['eval_size']}×{result['eval_size']}, (pixel - mean) / std with mean {mean} and std "
        f"{std} on a scale of 0 to 255",
        f"load it with {load}",
    )


def shown_lines(*lines: str) -> str:
    """Lines that a terminal can print, whatever bytes a file's name has."""
    return "\n".join(map(shown, lines))


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0, 75 stopped on request, 2 the user's to mend, 1 failed."""

    def work(stop: StopSignals) -> int:
        args = parse(argv)
        result = export(args, stop)
        print(json.dumps(result, indent=2) if args.json else sentences(result))
        return FINISHED

    return run(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
