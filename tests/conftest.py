from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from distrib.config import DataConfig


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The built-in sample and the indexes of tests live in a folder of their own, one for the whole session."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    patch.setenv("WANDB_MODE", "disabled")
    patch.delenv("IMAGENET_DIR", raising=False)


@pytest.fixture(scope="session")
def repository() -> Path:
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For small nets in several processes: threads that wait for each other would only get in the way."""
    import torch  # here, not above: the launcher's and the configuration's tests do without

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB."""
    place = tmp_path / "small disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"only root may mount a small disk: {error}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders 444 and 420 of ``loading.write_photographs``; not to be changed."""
    import loading

    return loading.write_photographs(tmp_path_factory.mktemp("photographs"))


@pytest.fixture(scope="session")
def small(photographs: Path) -> DataConfig:
    """Small crops of the photographs: for tests in which the pixels' quality plays no part."""
    import loading

    return loading.config(photographs / "444", size=64, eval_resize=72, eval_size=64)
