"""benchmarks/neighbours.py: the nearest by cosine, the share in the same folder, and the sheet."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import runs
from PIL import Image

sys.path.insert(0, str(runs.ROOT / "benchmarks"))
import neighbours


def test_the_nearest_by_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = np.random.default_rng(0).normal(size=(23, 5)).astype(np.float32)
    monkeypatch.setattr(neighbours, "CHUNK", 7)
    found = neighbours.nearest(vectors, 3)
    for k, row in enumerate(found):
        cosines = {
            j: float(v @ vectors[k] / np.linalg.norm(v) / np.linalg.norm(vectors[k]))
            for j, v in enumerate(vectors)
            if j != k
        }
        assert row.tolist() == sorted(cosines, key=cosines.__getitem__, reverse=True)[:3]


def test_sheet_and_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    colours = {"red": (255, 0, 0), "blue": (0, 0, 255)}
    names, vectors = [], []
    for name, colour in colours.items():
        (tmp_path / name).mkdir()
        for k in range(3):
            file = tmp_path / name / f"{k}\r\u2028.png"  # not the end of a line
            Image.new("RGB", (10 + k, 20), colour).save(file)
            names.append(str(file))
            vectors.append([*colour, 10 * k])
    vectors[2] = vectors[3]  # one red picture looks blue
    np.save(tmp_path / "f.npy", np.array(vectors, np.float32))
    (tmp_path / "f.txt").write_bytes("".join(f"{name}\n" for name in names).encode())
    words = [str(tmp_path / "f.npy"), str(tmp_path / "s.png"), "--rows=2", "--columns=2", "--tile=8"]
    assert neighbours.main(words) == 0
    # Chance: of five others, two are in the same folder.
    assert "for 66.7 % of 6 pictures in 2 folders; chance: 40.0 %" in capsys.readouterr().out
    with Image.open(tmp_path / "s.png") as file:
        sheet = file.convert("RGB")
        assert sheet.size == (3 * 10 + 6, 2 * 10 - 2)
        assert [sheet.getpixel((x, 4)) for x in (4, 22, 32)] == [(255, 0, 0)] * 3  # the last looks blue, as others do
        assert [sheet.getpixel((x, 14)) for x in (4, 22, 32)] == [(0, 0, 255), (0, 0, 255), (255, 0, 0)]
        assert sheet.getpixel((11, 4)) == (255, 255, 255)
    assert neighbours.main(words) == 2  # it is there
    assert capsys.readouterr().err.startswith("error: ")
    assert neighbours.main([*words[:1], str(tmp_path / "t.png"), "--columns=6"]) == 2
