"""The forms of the output: F.npy with F.txt beside it, and F.parquet."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import ModuleType

import numpy as np

from distrib.config import UserError
from distrib.layout.folders import shown
from distrib.program import Output, writing
from distrib.tools.features.work import Work, finished, folder_of

SUFFIXES = (".npy", ".parquet")


class Files:
    """Where the vectors go, looked at before the work begins."""

    def __init__(self, path: str) -> None:
        """Looks at the place.

        Raises:
            UserError: the suffix is none of ours, something is there already or another process at it, or pyarrow is
                missing.
        """
        self.path = Path(os.path.expanduser(path))
        if self.path.suffix not in SUFFIXES:
            raise UserError(f"--output {shown(self.path)}: its name must end in {' or '.join(SUFFIXES)}")
        self._arrow = _pyarrow() if self.path.suffix == ".parquet" else None
        names = self.path.with_suffix(".txt")
        with finished(self.path) as mark:  # of a command that was killed while its outputs appeared
            if mark is not None and os.path.lexists(self.path):
                shutil.rmtree(folder_of(self.path), ignore_errors=True)
            elif mark is not None and self._arrow is None and _sha_of(names) == mark:
                with contextlib.suppress(OSError):
                    names.unlink()
        vectors = Output(self.path)  # the first to be complained of, as its name was given
        self._outputs = [vectors] if self._arrow else [Output(names), vectors]

    def check(self, files: Sequence[str]) -> None:
        """Looks at the files' names.

        Raises:
            UserError: one cannot stand in the output.
        """
        for name in files:
            if self._arrow is None and "\n" in name:
                raise UserError(f"{shown(name)} has a line break in its name: rename it, or write a .parquet")
            if self._arrow is not None and not os.fsencode(name).decode("utf-8", "replace") == name:
                raise UserError(f"{shown(name)} is not UTF-8, as a .parquet must be: rename it, or write a .npy")

    def write(self, work: Work, files: Sequence[str], about: Mapping[str, str]) -> None:
        """Writes the rows of pictures with the names that ``files`` has for them; all appears at the end, or nothing.

        Raises:
            UserError: the disk does not take it.
        """
        names = [files[k] for k in work.good().tolist()]
        with writing(*self._outputs, folder=work.folder) as places:
            if self._arrow is not None:
                _write_parquet(self._arrow, places[0], work, names, about)
                mark = ""
            else:
                text = b"".join(os.fsencode(name) + b"\n" for name in names)
                places[0].write_bytes(text)
                mark = _sha(text)
                _write_npy(places[1], work, len(names))
            work.finishing(mark)


def _write_npy(place: Path, work: Work, rows: int) -> None:
    with place.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (rows, work.columns)}
        np.lib.format.write_array_header_1_0(file, header)
        for chunk in work.chunks():
            file.write(chunk.astype("<f4", copy=False).tobytes())


def _write_parquet(
    pyarrow: ModuleType, place: Path, work: Work, names: Sequence[str], about: Mapping[str, str]
) -> None:
    embedding = pyarrow.list_(pyarrow.float32(), work.columns)
    schema = pyarrow.schema([("file", pyarrow.string()), ("embedding", embedding)], metadata=dict(about))
    rest = iter(names)
    with pyarrow.parquet.ParquetWriter(place, schema) as writer:
        for chunk in work.chunks():
            values = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(chunk.reshape(-1)), work.columns)
            files = pyarrow.array(list(islice(rest, len(chunk))), pyarrow.string())
            writer.write_table(pyarrow.Table.from_arrays([files, values], schema=schema))


def _pyarrow() -> ModuleType:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"a .parquet needs pyarrow ({error}): pip install 'distrib[parquet]', or write a .npy"
        ) from None
    return pyarrow


def _sha_of(file: Path) -> str | None:
    """None where there is no file to be read."""
    try:
        return _sha(file.read_bytes()) if file.is_file() else None
    except OSError:
        return None


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
