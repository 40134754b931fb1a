"""The functions on pictures against torchvision's, bit by bit; and the compiler, which stays where it is."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch
from torchvision.transforms.v2 import functional as theirs

from distrib.data import vision

SHAPES = [(40, 60), (61, 37), (8, 8), (9, 100), (100, 9), (1, 5), (33, 33)]


def pictures() -> list[torch.Tensor]:
    """Of each shape one contiguous and one channels-last, as the decoders give them."""
    random = np.random.default_rng(0)
    arrays = [random.integers(0, 256, (height, width, 3)).astype(np.uint8) for height, width in SHAPES]
    last = [torch.from_numpy(array).permute(2, 0, 1) for array in arrays]
    return last + [image.contiguous() for image in last]


@pytest.mark.parametrize("native", [True, False])
def test_the_same_bits(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "DEFAULT")
        monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for image in pictures():
        for size in ([32], [33], [7], [64], [20, 30], [8, 8]):
            wanted = theirs.resize(image, size, antialias=True)
            found = vision.resize(image, size, antialias=True)
            assert torch.equal(found, wanted)
            assert found.stride() == wanted.stride()
        for crop in ([8, 8], [32, 32], [5, 9], [64, 41]):
            assert torch.equal(vision.center_crop(image, crop), theirs.center_crop(image, crop))
        height, width = image.shape[1:]
        for box in ((0, 0, height, width), (0, 1, 1, 3), (height // 2, width // 3, (height + 1) // 2, width // 2)):
            wanted = theirs.resized_crop(image, *box, [16, 24], antialias=True)
            assert torch.equal(vision.resized_crop(image, *box, [16, 24], antialias=True), wanted)
        assert torch.equal(vision.horizontal_flip(image), theirs.horizontal_flip(image))


WITHOUT = """
import sys
from distrib.data import vision
assert "torchvision" in sys.modules and "torch._dynamo" not in sys.modules
import torch
supported = sys.modules["torchvision.ops.roi_align"].is_compile_supported("cpu")
from torch._dynamo.utils import is_compile_supported
assert supported == is_compile_supported("cpu") and torch._dynamo.__file__
"""


def test_the_compiler_comes_when_it_is_asked_for() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT], cwd=runs.ROOT, check=True, timeout=300)


def test_what_else_is_asked_of_the_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "slow_compiler"
    package.mkdir()
    (package / "__init__.py").write_text("from slow_compiler import utils\n")
    (package / "utils.py").write_text("def is_compile_supported(device):\n    return device == 'cpu'\nCOUNT = 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(vision, "COMPILER", "slow_compiler")

    def stand_in() -> Any:
        for name in ("slow_compiler", "slow_compiler.utils"):
            monkeypatch.setitem(sys.modules, name, vision._Later(name))
        return importlib.import_module("slow_compiler.utils")

    asked = stand_in().is_compile_supported  # asked for, not called
    assert isinstance(sys.modules["slow_compiler.utils"], vision._Later)
    assert asked("cpu")
    assert not asked("cuda")
    assert sys.modules["slow_compiler"].__file__ == str(package / "__init__.py")
    assert stand_in().COUNT == 3  # as a torchvision to come may
    assert sys.modules["slow_compiler.utils"].COUNT == 3
