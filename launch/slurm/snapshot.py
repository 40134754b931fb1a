"""The code that runs is the code that was submitted: a copy of the tree, and what it is a copy of."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from distrib.config import UserError
from distrib.root import REVISION

PARTS = ("train.py", "distrib", "launch", "configs")  # of a tree that git does not know
MOST = 20_000_000  # bytes of a file that is not tracked: a data set that nobody told .gitignore of
GIT_SECONDS = 300  # a shared disk may take long to list a tree
DIFF, ABOUT = "changes.diff", "revision.json"


@dataclass(frozen=True)
class Revision:
    """What was copied. ``commit`` is empty where git does not know the tree; ``left_out`` files were too large."""

    commit: str
    changed: bool
    untracked: tuple[str, ...]
    left_out: tuple[str, ...]
    sha256: str  # of all names, modes and contents


def take(root: Path, into: Path) -> tuple[Path, Revision]:
    """Copies the tree at ``root`` to a folder in ``into`` named after its contents; the same tree is copied once.

    With git: what is tracked, as it stands now, and what is neither tracked nor ignored. Beside the copy lie
    revision.json and, where files have changed since the commit, changes.diff.

    Raises:
        UserError: the tree cannot be read or the copy not be written.
    """
    commit = _commit(root)
    if commit:
        tracked = _names(_git(root, "ls-files", "-z"))
        others = _names(_git(root, "ls-files", "-z", "--others", "--exclude-standard"))
        diff = _git(root, "diff", "--binary", "HEAD", "--", ".")
    else:
        tracked, others, diff = _walk(root), [], ""
    part = into / f".part.{os.getpid()}"
    try:
        large = tuple(name for name in others if _size(root / name) > MOST)
        names = sorted(name for name in {*tracked, *others} - {*large} if os.path.lexists(root / name))
        shutil.rmtree(part, ignore_errors=True)
        _copy(root, names, part)
        digest = _digest(part, names)  # of the copy: somebody may write to the tree meanwhile
        if commit:
            (part / REVISION.name).write_text(f"{commit[:12]}{'+changes' if diff else ''}\n", encoding="utf-8")
        about = Revision(commit, bool(diff), tuple(n for n in others if n not in large), large, digest)
        target = into / digest[:12]
        with contextlib.suppress(OSError):  # the same is there already
            part.rename(target)
        if not target.is_dir():
            raise UserError(f"cannot write {target}: set run.dir")
        (into / f"{target.name}.{ABOUT}").write_text(json.dumps(asdict(about), indent=2) + "\n", encoding="utf-8")
        if diff:
            (into / f"{target.name}.{DIFF}").write_text(diff, encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise UserError(f"cannot copy the code from {root} to {into}: {error.strerror} ({error.filename})") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target, about


def _copy(root: Path, names: Sequence[str], target: Path) -> None:
    for name in names:
        to = target / name
        to.parent.mkdir(parents=True, exist_ok=True)
        if (root / name).is_dir() and not (root / name).is_symlink():  # a repository within this one
            continue
        shutil.copy2(root / name, to, follow_symlinks=False)
    target.mkdir(parents=True, exist_ok=True)


def _digest(root: Path, names: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        path = root / name
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            content = os.readlink(path).encode("utf-8", "surrogateescape")
        elif stat.S_ISREG(mode):
            content = path.read_bytes()
        else:
            continue
        digest.update(f"{name}\0{mode & 0o111:o}\0{len(content)}\0".encode("utf-8", "surrogateescape"))
        digest.update(content)
    return digest.hexdigest()


def _walk(root: Path) -> list[str]:
    files = [path for part in PARTS for path in ((root / part).rglob("*") if (root / part).is_dir() else [root / part])]
    return [str(p.relative_to(root)) for p in files if p.is_file() and "__pycache__" not in p.parts]


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0


def _names(printed: str) -> list[str]:
    return [name for name in printed.split("\0") if name]


def _commit(root: Path) -> str:
    """The commit that is checked out; empty where there is no git, or no repository of which ``root`` is the top."""
    try:
        if Path(_git(root, "rev-parse", "--show-toplevel").rstrip("\n")).resolve() != root.resolve():
            return ""
        return _git(root, "rev-parse", "--verify", "HEAD").strip()
    except UserError:
        return ""


def _git(root: Path, *words: str) -> str:
    """What git prints.

    Raises:
        UserError: it fails.
    """
    command = ["git", "-C", str(root), *words]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="surrogateescape", check=True, timeout=GIT_SECONDS
        )
    except (OSError, subprocess.SubprocessError) as error:
        said = " ".join(str(getattr(error, "stderr", None) or error).split())
        raise UserError(f"cannot read the code in {root}: git {words[0]}: {said}") from None
    return done.stdout
