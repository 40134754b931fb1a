"""The copy of the code that a job runs: what is in it, what it says it is, and when there is another one."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from distrib.config import UserError
from launch.slurm import snapshot
from launch.slurm.snapshot import take


def git(root: Path, *words: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(root), *who, *words], check=True, capture_output=True)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository with a tracked, a changed, a deleted, an untracked and an ignored file."""
    root = tmp_path / "tree"
    (root / "distrib").mkdir(parents=True)
    for name in ("train.py", "distrib/a.py", "distrib/gone.py", ".gitignore"):
        (root / name).write_text(f"{name}\n")
    (root / ".gitignore").write_text("runs/\n")
    (root / "run.sh").write_text("#!/bin/sh\n")
    (root / "run.sh").chmod(0o755)
    (root / "link").symlink_to("train.py")
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "one")
    (root / "distrib/a.py").write_text("changed\n")
    (root / "distrib/gone.py").unlink()
    (root / "distrib/new ä.py").write_text("new\n")
    (root / "runs").mkdir()
    (root / "runs/metrics.jsonl").write_text("{}\n")
    return root


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()}


def test_copies_what_stands_there_now(tree: Path, tmp_path: Path) -> None:
    copy, about = take(tree, tmp_path / "code")
    files = {".gitignore", "train.py", "run.sh", "link", "distrib/a.py", "distrib/new ä.py"}
    assert names(copy) == files | {"REVISION"}
    assert (copy / "distrib/a.py").read_text() == "changed\n"
    assert os.access(copy / "run.sh", os.X_OK)
    assert (copy / "link").readlink() == Path("train.py")
    head = subprocess.run(["git", "-C", str(tree), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert (about.commit, about.changed) == (head.stdout.strip(), True)
    assert (copy / "REVISION").read_text() == f"{about.commit[:12]}+changes\n"
    assert about.untracked == ("distrib/new ä.py",)
    told = json.loads((tmp_path / "code" / f"{copy.name}.revision.json").read_text())
    assert told["commit"] == about.commit
    assert told["sha256"].startswith(copy.name)


def test_the_diff_makes_the_tree_of_the_commit(tree: Path, tmp_path: Path) -> None:
    copy, _ = take(tree, tmp_path / "code")
    again = tmp_path / "again"
    subprocess.run(["git", "clone", "-q", str(tree), str(again)], check=True)
    git(again, "apply", str(tmp_path / "code" / f"{copy.name}.changes.diff"))
    assert (again / "distrib/a.py").read_text() == "changed\n"
    assert not (again / "distrib/gone.py").exists()


def test_the_same_tree_is_copied_once(tree: Path, tmp_path: Path) -> None:
    first, _ = take(tree, tmp_path / "code")
    (first / "mark").touch()
    second, _ = take(tree, tmp_path / "code")
    assert second == first
    assert (second / "mark").exists()
    (tree / "train.py").write_text("other\n")
    third, _ = take(tree, tmp_path / "code")
    assert third != first
    assert (first / "train.py").read_text() == "train.py\n"


@pytest.mark.parametrize("change", ["mode", "name", "link"])
def test_another_tree_is_another_copy(change: str, tree: Path, tmp_path: Path) -> None:
    first, _ = take(tree, tmp_path / "code")
    if change == "mode":
        (tree / "train.py").chmod(0o755)
    elif change == "name":
        (tree / "distrib/a.py").rename(tree / "distrib/b.py")
    else:
        (tree / "link").unlink()
        (tree / "link").symlink_to("run.sh")
    assert take(tree, tmp_path / "code")[0] != first


def test_a_large_file_that_is_not_tracked_is_left_out(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "MOST", 10)
    (tree / "data.bin").write_bytes(b"x" * 11)
    copy, about = take(tree, tmp_path / "code")
    assert about.left_out == ("data.bin",)
    assert "data.bin" not in names(copy)


def test_a_tree_that_git_does_not_know(tree: Path, tmp_path: Path) -> None:
    (tree / ".git").rename(tmp_path / "git")
    (tree / "distrib/__pycache__").mkdir()
    (tree / "distrib/__pycache__/a.pyc").write_bytes(b"1")
    copy, about = take(tree, tmp_path / "code")
    assert names(copy) == {"train.py", "distrib/a.py", "distrib/new ä.py"}
    assert (about.commit, about.changed) == ("", False)


def test_packages_within_another_repository_are_not_its_files(tree: Path, tmp_path: Path) -> None:
    inner = tree / "env/site-packages"
    (inner / "distrib").mkdir(parents=True)
    (inner / "distrib/a.py").write_text("installed\n")
    (inner / "other.py").write_text("somebody else's\n")
    copy, about = take(inner, tmp_path / "code")
    assert names(copy) == {"distrib/a.py"}
    assert about.commit == ""


def test_a_tree_that_git_cannot_list_is_not_copied_in_part(tree: Path, tmp_path: Path) -> None:
    (tree / ".git/index").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"cannot read the code in .*: git ls-files: "):
        take(tree, tmp_path / "code")
    assert not (tmp_path / "code").exists()


def test_a_folder_that_cannot_be_written(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "code").write_text("a file")
    with pytest.raises(UserError, match=r"cannot copy the code from .* to .*: ") as error:
        take(tree, tmp_path / "code")
    assert "\n" not in str(error.value)
