"""Prints what pyproject.toml requires, a line each, so that packages can be installed before the code is there.

requirements.py PYPROJECT EXTRA,… [PROVIDED…]: with those extras, without the packages that are PROVIDED otherwise.
Needs nothing but Python 3.11.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection
from pathlib import Path

import tomllib


def requirements(project: dict, extras: Collection[str], provided: Collection[str] = ()) -> list[str]:
    """The requirements of a ``[project]`` table and of some of its extras, without the ``provided`` packages.

    Raises:
        SystemExit: there is no such extra, or nothing requires what is provided.
    """
    optional = project["optional-dependencies"]
    if unknown := sorted(set(extras) - set(optional)):
        sys.exit(f"EXTRAS: there is no extra {', '.join(unknown)}; there are {', '.join(optional)}")
    wanted = project["dependencies"] + [line for extra in extras for line in optional[extra]]
    without = {_name(word) for word in provided}
    if unknown := sorted(without - set(map(_name, wanted))):
        sys.exit(f"PROVIDED: nothing requires {', '.join(unknown)}")
    return [line for line in wanted if _name(line) not in without]


def _name(requirement: str) -> str:
    """The package's name in the form in which names are compared (PEP 503)."""
    match = re.match(r"[\w.-]+", requirement)
    return re.sub(r"[-_.]+", "-", match[0]).lower() if match else requirement


if __name__ == "__main__":
    file, extras, *provided = sys.argv[1:]
    table = tomllib.loads(Path(file).read_text(encoding="utf-8"))["project"]
    print("\n".join(requirements(table, [extra for extra in extras.split(",") if extra], provided)))
