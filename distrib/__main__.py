"""The command ``distrib``, also ``python -m distrib``: train, launch, and each program of distrib/tools.

What it lists is read from the folder and the sources; nothing is imported for it.
"""

from __future__ import annotations

import ast
import difflib
import os
import re
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

from distrib.faults import FINISHED, USER_ERROR
from distrib.root import TRAIN

TOOLS = Path(__file__).resolve().parent / "tools"


def main() -> int:
    """Runs one command in this process; returns the exit code where the command itself does not end the program."""
    words = sys.argv[1:]
    name = words[0] if words else "--help"
    if name in ("-h", "--help"):
        print(overview())
        return FINISHED
    if name == "train":
        train(words[1:])
    sources = programs()
    if name not in sources:
        near = difflib.get_close_matches(name, ["train", *sources], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        print(f"error: there is no command {name}{hint} (distrib --help lists them)", file=sys.stderr)
        return USER_ERROR
    sys.argv = [f"distrib {name}", *words[1:]]
    runpy.run_module(module_of(name), run_name="__main__", alter_sys=True)
    return FINISHED


def train(words: list[str]) -> None:
    """Becomes train.py: the same process, so that signals, torchrun's environment and exit codes are train.py's."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *interpreter_options(), str(TRAIN), *words])


def interpreter_options() -> list[str]:
    """What Python itself was given, such as torchrun's ``-u``, without the ``-m`` that named this module."""
    options = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv)]
    if options and re.fullmatch("-[a-zA-Z]*m", options[-1]):
        last = options.pop()[:-1]  # -um is -u -m
        options += [last] if last != "-" else []
    return options


def programs() -> dict[str, Path]:
    """The source that describes each command but train, by the command's name."""
    spec = find_spec("launch")
    assert spec is not None  # it is in the same wheel
    assert spec.origin is not None
    files = [*TOOLS.glob("[!_]*.py"), *TOOLS.glob("[!_]*/__init__.py")]
    tools = {file.parent.name if file.name == "__init__.py" else file.stem: file for file in files}
    return {"launch": Path(spec.origin)} | dict(sorted(tools.items()))


def module_of(name: str) -> str:
    """What ``python -m`` takes for a command of ``programs``."""
    return "launch" if name == "launch" else f"distrib.tools.{name}"


def overview() -> str:
    """Every command with the first line of its source's docstring."""
    sources = {"train": TRAIN} | programs()
    width = max(map(len, sources))
    lines = [f"  {name:<{width}}   {first_line(file)}" for name, file in sources.items()]
    return "\n".join(["usage: distrib COMMAND …, and distrib COMMAND --help for its options", "", *lines])


def first_line(source: Path) -> str:
    """Of a module's docstring."""
    return (ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or "").partition("\n")[0]


if __name__ == "__main__":
    sys.exit(main())
