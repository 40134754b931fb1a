"""Ranks that were started with other settings than rank 0 end the run before its first step."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import runs


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("optim.lr=0.5",), "rank 1 was started with optim.lr=0.5, rank 0 with 0.1: type the same settings"),
        (("data.workers=3", "data.index_dir={folder}"), None),  # a machine's own
    ],
)
def test_other_settings_on_another_node(words: tuple[str, ...], told: str | None, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in (0, 1):
        place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
        environ = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MASTER_ADDR": "127.0.0.1"}
        own = [word.format(folder=tmp_path / "index") for word in words] if rank else []
        ranks.append(
            subprocess.Popen(
                [sys.executable, "train.py", *runs.SMALL, "train.steps=2", f"run.dir={tmp_path}/run", *own],
                cwd=runs.ROOT,
                env=environ | {name: str(value) for name, value in place.items()},
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
    printed = [rank.communicate(timeout=runs.TIMEOUT) for rank in ranks]
    if told is None:
        assert [rank.returncode for rank in ranks] == [0, 0], printed
        return
    assert [rank.returncode for rank in ranks] == [2, 2], printed
    assert printed[0][1].startswith("error: on ")
    assert told in printed[0][1]
    assert printed[0][1].count("\n") == 1
    assert not (tmp_path / "run").exists()
