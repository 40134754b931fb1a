"""docs/reliability.md names tests, keys and commands that there are."""

from __future__ import annotations

import re
from pathlib import Path

from distrib.config import Config
from distrib.follow import flatten

PAGE = Path("docs/reliability.md")


def test_its_tests_are_there(repository: Path) -> None:
    named = re.findall(r"`(tests/[^`]+)`", (repository / PAGE).read_text())
    assert len(named) > 20
    assert [name for name in named if not list(repository.glob(name))] == []


def test_its_keys_are_there(repository: Path) -> None:
    keys = flatten(Config().model_dump())
    parts = {key.partition(".")[0] for key in keys}
    named = set(re.findall(r"`([a-z_]+\.[a-z_]+)(?:=[^`]*)?`", (repository / PAGE).read_text()))
    assert {"train.hang_minutes", "checkpoint.mirror"} <= named
    assert {key for key in named if key.partition(".")[0] in parts and not key.endswith(".py")} <= set(keys)
