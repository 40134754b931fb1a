"""Single pictures and folders of them, without classes: found, put into an index that the loaders take, and loaded."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from distrib.config import DataConfig, UserError
from distrib.data import EvalPlan, build_loader
from distrib.data.files import FLAGS, first_line
from distrib.data.index import Index, Listing, write_index
from distrib.layout.folders import reason, shown, walk
from distrib.layout.splits import Split


def find_pictures(paths: Iterable[str]) -> tuple[list[Path], list[str]]:
    """The files that ``paths`` name, of folders all pictures in and below them; and those that are not there.

    A file is taken whatever its name. Hidden files, and other files in a folder, are passed over.

    Raises:
        UserError: a folder cannot be read, holds no picture, or is the root.
    """
    found: list[Path] = []
    missing: list[str] = []
    for text in paths:
        path = Path(os.path.expanduser(text))
        inside: list[Path] = []
        if os.path.isdir(path):
            above, own = os.path.split(os.fsencode(os.path.realpath(path)))
            if not own:
                raise UserError(f"{shown(path)} is the whole disk: name folders in it")
            for folder in walk(Path(os.fsdecode(above)), own):
                here = path / os.fsdecode(os.path.relpath(folder.path, own))
                inside += [here / os.fsdecode(name) for name in folder.pictures]
            if not inside:
                raise UserError(f"{shown(path)} holds no pictures")
            found += inside
        elif os.path.lexists(path):
            found.append(path)
        else:
            missing.append(text)
    return found, missing


def index_pictures(files: Sequence[Path], folder: Path) -> Index:
    """An index of ``files`` in their order, all with label 0, kept below ``folder``: a temporary one.

    Raises:
        UserError: ``folder`` cannot be written.
    """
    absolute = [os.fsencode(_absolute(file)) for file in files]
    root = os.path.commonpath([os.path.dirname(path) for path in absolute])
    names = [os.path.relpath(path, root) for path in absolute]
    split = Split("val", Path(os.fsdecode(root)))
    return write_index(folder, Listing(split, [b"."], [0], {}, names, np.zeros(len(names), dtype=np.int32)))


def _absolute(file: Path) -> str:
    """A name without ``..`` that opens the same file: what a link's ``..`` is, only the disk knows."""
    if ".." in file.parts:
        return os.path.join(os.path.realpath(file.parent), file.name)
    return os.path.abspath(file)


def find_readable(paths: Iterable[str], notify: Callable[[str], None]) -> tuple[list[Path], int]:
    """The files that ``paths`` name and that can be opened, in order; and how many cannot, of which ``notify`` hears.

    Raises:
        UserError: a folder cannot be read, or holds no picture; or nothing is named at all.
    """
    found, missing = find_pictures(paths)
    if not found and not missing:
        raise UserError("no picture is named: give files or folders, or - for a list of them on stdin")
    readable: list[Path] = []
    for path in [*map(Path, missing), *found]:
        try:
            os.close(os.open(os.path.expanduser(path), FLAGS))  # Path's own raises where there is no such user
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            notify(f"cannot read {shown(path)}: {first_line(error)}")
        else:
            readable.append(path)
    return readable, len(missing) + len(found) - len(readable)


def load_pictures(
    files: Sequence[Path],
    cfg: DataConfig,
    device: torch.device,
    batch: int,
    notify: Callable[[str], None],
    stop: Callable[[], bool] = lambda: False,
    *,
    of: int | None = None,
) -> Generator[tuple[torch.Tensor, npt.NDArray[np.bool_]], None, None]:
    """Loads ``files`` in order, ``batch`` at a time, with the run's loader; ``notify`` hears which are no pictures.

    Args:
        of: how many the command is about, where ``files`` are the rest of them. No more than a batch are decoded in
            this process, with torchvision: to start threads or processes would take longer.

    Yields:
        uint8 [n, 3, size, size] on ``device``, and bool [n]: which of them are pictures.

    Raises:
        DataUnavailable: many could be read before and cannot now, or the disk stayed away.
        Interrupted: ``stop()`` while pictures did not come.
        UserError: there is no room for temporary files.
    """

    def tell(text: str) -> None:  # of evaluation, which counts
        notify(text.removesuffix(" in this start").removesuffix("; not counted"))

    if not files:
        return
    if (len(files) if of is None else of) <= batch:
        cfg = cfg.model_copy(update={"loader": "torchvision", "workers": 0})
    try:
        scratch = tempfile.TemporaryDirectory(prefix="distrib-pictures-")
    except OSError as error:
        raise UserError(f"cannot write temporary files: {reason(error)} (TMPDIR names another place)") from None
    with scratch as name:
        # A bad sample is replaced by the next good one, and there must be one, or the loader ends with an error.
        stand_in = Path(name, "black.png")
        Image.new("RGB", (1, 1)).save(stand_in)
        index = index_pictures([*files, stand_in], Path(name))
        loader = build_loader(cfg, (index, index), 1, device, notify=tell, stop=stop)
        for each in loader.evaluate(EvalPlan(len(files), batch)):
            yield each.images, (each.labels >= 0).cpu().numpy()
