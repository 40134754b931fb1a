"""Aligned columns for a person."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], left: Sequence[int], width: int) -> str:
    """Columns with two blanks between them; those of ``left`` begin, the others end, at one place.

    The last column is broken into lines where a row is wider than ``width``.
    """
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = []
    for row in rows:
        *cells, last = (
            cell.ljust(size) if k in left else cell.rjust(size)
            for k, (cell, size) in enumerate(zip(row, widths, strict=True))
        )
        head = "  ".join(cells) + "  "
        room = max(20, width - len(head))
        parts = [last] if len(last) <= room else textwrap.wrap(last, room) or [""]
        lines += [(head if k == 0 else " " * len(head)) + part for k, part in enumerate(parts)]
    return "\n".join(line.rstrip() for line in lines)
