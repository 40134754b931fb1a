"""Output that is coloured on a terminal and plain elsewhere."""

from __future__ import annotations

import io
import os
import sys

from rich.console import Console

from distrib.surroundings import ForgivingStream

# A state's colour.
COLOURS = {
    "queued": "yellow",
    "requeued": "yellow",
    "suspended": "yellow",
    "starting": "cyan",
    "running": "bold cyan",
    "stopping": "cyan",
    "stopped": "blue",
    "finished": "green",
    "diverged": "red",
    "failed": "red",
    "cancelled": "magenta",
    "lost": "red",
}

WIDE = 10_000  # columns where nobody looks: a file's lines are not folded


def console() -> Console:
    """stdout. Whether it is a terminal decides, not the environment: rich would colour a file where FORCE_COLOR is."""
    fancy = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    if isinstance(sys.stdout, io.TextIOWrapper | ForgivingStream):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may hold bytes that are no text
    return Console(
        force_terminal=fancy,
        no_color=not fancy,
        width=None if fancy else WIDE,
        markup=False,
        emoji=False,
        highlight=False,
    )
