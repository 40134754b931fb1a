"""Writes a data set's pictures: beside their place first, so that nobody finds half of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from distrib.config import UserError
from distrib.faults import Interrupted
from distrib.program import bar

SCRATCH = ".distrib-dataset-"


def check_free(dest: Path) -> None:
    """Raises UserError where ``dest`` is neither a new name nor an empty folder."""
    try:
        if dest.is_symlink() or (dest.exists() and (not dest.is_dir() or any(dest.iterdir()))):
            raise UserError(f"{dest} is there already and not empty: choose another folder, or remove it")
    except OSError as error:
        raise UserError(f"cannot look at {dest}: {error.strerror}") from None


def write_pictures(
    dest: Path, pictures: Iterable[tuple[str, np.ndarray]], total: int, stop: Callable[[], bool] = lambda: False
) -> None:
    """Writes (path below ``dest``, uint8 RGB [height, width, 3]) as PNG files; ``total`` is for the progress bar.

    Raises:
        UserError: ``dest`` is not free, or the disk does not take them.
        Interrupted: ``stop`` says so; nothing is left.
    """
    from PIL import Image

    from distrib.data.staging import staged, sweep

    def taken() -> bool:
        check_free(dest)  # somebody else's, since we began
        return False

    check_free(dest)
    try:
        sweep(dest.parent, SCRATCH)
        with staged(dest, SCRATCH, taken) as work, bar(f"writing {dest}") as tell:
            for done, (name, pixels) in enumerate(pictures):
                if stop():
                    raise Interrupted
                file = work / name
                file.parent.mkdir(parents=True, exist_ok=True)
                with file.open("wb") as stream:  # Pillow alone would hide the system's words
                    Image.fromarray(pixels).save(stream, format="PNG")
                tell(done + 1, total)
    except OSError as error:
        raise UserError(f"cannot write {dest}: {error.strerror or error}") from None
