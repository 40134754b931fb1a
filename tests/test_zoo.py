"""Pictures and non-pictures of every kind: both loaders give the same verdict, and the same pixels, for each."""

from __future__ import annotations

import functools
import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from loading import DEPRECATED, Opened, config, encoded, needs_dali, photograph
from PIL import Image, features

from distrib.config import DataConfig
from distrib.data.decode import ContentError, decode, jpeg_shape, plain_shape

pytestmark = [DEPRECATED, pytest.mark.usefixtures("one_thread")]

FAIR, GREY, BIG = "fair", "grey", "big"  # what a picture shows: the photograph, its grey version, anything


def marker(kind: int, payload: bytes) -> bytes:
    return b"\xff" + bytes([kind]) + struct.pack(">H", len(payload) + 2) + payload


def chunk(kind: bytes, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", zlib.crc32(kind + payload))


def interlaced(image: Image.Image) -> bytes:
    """An Adam7 PNG, which PIL does not write."""
    pixels = np.asarray(image)
    raw = b""
    for top, left, down, right in ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2),
                                   (1, 0, 2, 1)):  # fmt: skip
        raw += b"".join(b"\0" + row.tobytes() for row in pixels[top::down, left::right])
    header = struct.pack(">IIBBBBB", image.width, image.height, 8, 2, 0, 0, 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def without_app14(data: bytes) -> bytes:
    at = data.index(b"\xff\xee")
    return data[:at] + data[at + 2 + struct.unpack(">H", data[at + 2 : at + 4])[0] :]


def arithmetic(data: bytes) -> bytes:
    """The header of an arithmetic-coded JPEG; what its scan holds is not."""
    return data.replace(b"\xff\xc0", b"\xff\xc9", 1)


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x112] = 6  # orientation: by 90°
    return exif


@functools.cache
def zoo() -> dict[str, bytes]:
    photo = photograph(np.random.default_rng(8)).resize((151, 117))
    grey = photo.convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    jpeg, png = encoded(photo), encoded(photo, "PNG")
    cmyk = encoded(photo.convert("CMYK"))
    gone = photo.copy()
    scan = jpeg.index(b"\xff\xda") + 14
    animals = {
        "jpeg": jpeg,
        "jpeg 420": encoded(photo, subsampling=2),
        "jpeg 411": encoded(photo, subsampling="4:1:1"),
        "jpeg progressive": encoded(photo, progressive=True),
        "jpeg restarts": encoded(photo, restart_marker_blocks=4),
        "jpeg grey": encoded(grey),
        "jpeg rgb": encoded(photo, keep_rgb=True),
        "jpeg rgb adobe": jpeg[:2] + marker(0xEE, b"Adobe\0\x64\0\0\0\0\0") + encoded(photo, keep_rgb=True)[2:],
        "jpeg exif": encoded(photo, exif=turned()),
        "jpeg thumbnail": jpeg[:2] + marker(0xE1, b"Exif\0\0" + encoded(photo.resize((40, 30)))) + jpeg[2:],
        "jpeg comment": jpeg[:2] + marker(0xFE, b"\xff\xda\xff\xd9") + jpeg[2:],
        "jpeg cmyk adobe": cmyk,
        "jpeg cmyk": without_app14(cmyk),
        "jpeg ycck": cmyk.replace(b"Adobe\0\x64\0\0\0\0\0", b"Adobe\0\x64\0\0\0\0\x02"),
        "jpeg arithmetic": arithmetic(jpeg),
        "jpeg 12 bits": jpeg.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"),
        "jpeg lossless": jpeg.replace(b"\xff\xc0", b"\xff\xc3", 1),
        "jpeg height 0": jpeg.replace(struct.pack(">HH", 117, 151), struct.pack(">HH", 0, 151)),
        "jpeg huge header": jpeg.replace(struct.pack(">HH", 117, 151), struct.pack(">HH", 65535, 65535)),
        "jpeg garbage in scan": jpeg[: scan + 900] + bytes(range(60, 160)) + jpeg[scan + 1000 :],
        "jpeg marker in scan": jpeg[: scan + 900] + b"\xff\x9f" + jpeg[scan + 902 :],
        "jpeg frame in scan": jpeg[: scan + 900] + b"\xff\xc1" + jpeg[scan + 902 :],
        "jpeg end in scan": jpeg[: scan + 2000] + b"\xff\xd9" + jpeg[scan + 2002 :],
        "jpeg junk behind": jpeg + b"junk" * 5000,
        "jpeg cut, with end": jpeg[: scan + 3000] + b"\xff\xd9",
        "jpeg and another cut": jpeg + jpeg[: len(jpeg) // 2],
        **{f"jpeg cut at {part}/9": jpeg[: len(jpeg) * part // 9] for part in range(1, 9)},
        "jpeg without end": jpeg[:-2],
        "jpeg first bytes": jpeg[:2],
        "gif": encoded(photo, "GIF"),
        "webp": encoded(photo, "WEBP", quality=95),
        "webp lossless": encoded(photo, "WEBP", lossless=True),
        "webp lossless exif": encoded(photo, "WEBP", lossless=True, exif=turned()),
        "tiff": encoded(photo, "TIFF"),
        "tiff lzw": encoded(photo, "TIFF", compression="tiff_lzw"),
        "tiff 1 bit": encoded(photo.convert("1"), "TIFF"),
        "tiff grey": encoded(grey, "TIFF"),
        "tiff 16 bits": encoded(deep, "TIFF"),
        "tiff 32 bits": encoded(grey.convert("I"), "TIFF"),
        "tiff float": encoded(grey.convert("F"), "TIFF"),
        "tiff turned": encoded(photo, "TIFF", exif=turned()),
        "ico": encoded(photo.resize((64, 64)), "ICO", sizes=[(64, 64)]),
        "tga": encoded(photo, "TGA"),
        "bmp": encoded(photo, "BMP"),
        "bmp palette": encoded(photo.quantize(64), "BMP"),
        "png": png,
        "png grey": encoded(grey, "PNG"),
        "png palette": encoded(photo.quantize(64), "PNG"),
        "png palette transparent": encoded(photo.quantize(64), "PNG", transparency=3),
        "png transparent colour": encoded(photo, "PNG", transparency=(1, 2, 3)),
        "png alpha": encoded(Image.merge("RGBA", (*photo.split(), grey)), "PNG"),
        "png grey alpha": encoded(Image.merge("LA", (grey, grey)), "PNG"),
        "png 16-bit grey": encoded(deep, "PNG"),
        "png 16-bit rgb": png_16_bits(photo),
        "png 1 bit": encoded(photo.convert("1"), "PNG"),
        "png interlaced": interlaced(photo),
        "png gamma": png[:33] + chunk(b"gAMA", struct.pack(">I", 200000)) + png[33:],
        "png without end": png[:-12],
        "png cut": png[: len(png) // 2],
        "png wrong checksum": png[:-1] + b"\0",
        "png zeros inside": png[:3000] + b"\0" * 200 + png[3200:],
        "png huge header": png[:16] + struct.pack(">II", 99999, 99999) + png[24:],
        "ppm": encoded(photo, "PPM"),
        "pgm": encoded(grey, "PPM"),
        "pgm 16 bits": b"P5 151 117 65535\n" + (np.asarray(grey).astype(">u2") * 257).tobytes(),
        "jpeg 2000": encoded(photo, "JPEG2000"),
        "mpo": encoded(photo, "MPO", save_all=True, append_images=[gone.rotate(180)]),
        "1×1": encoded(photo.crop((50, 20, 51, 21))),
        "1×1 png": encoded(photo.crop((50, 20, 51, 21)), "PNG"),
        "10,000×1": encoded(photo.resize((10000, 1))),
        "1×10,000 tiff": encoded(photo.resize((1, 10000)), "TIFF"),
        "beyond Pillow's limit": encoded(Image.new("1", (20000, 9000), 1), "PNG"),
        "eps": encoded(photo, "EPS"),  # would start Ghostscript
        "empty": b"",
        "one byte": b"\xff",
        "zeros": bytes(5000),
        "noise": np.random.default_rng(1).bytes(5000),
        "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    }
    if features.check("avif"):
        animals["avif"] = encoded(photo, "AVIF", quality=95)
    return animals


def png_16_bits(image: Image.Image) -> bytes:
    rows = np.asarray(image).astype(">u2") * 257
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", image.width, image.height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def no_files() -> dict[str, Callable[[Path], object]]:
    """What else may lie in a class folder."""
    return {
        "fifo": os.mkfifo,
        "device": lambda path: path.symlink_to("/dev/zero"),
        "sparse": lambda path: path.touch() or os.truncate(path, 1 << 40),
    }


REFUSED = {
    "jpeg 12 bits", "jpeg lossless", "jpeg height 0", "jpeg huge header", "jpeg marker in scan", "jpeg frame in scan",
    "jpeg without end", "jpeg first bytes", "tiff 32 bits", "tiff float", "png cut", "png zeros inside",
    "png huge header", "eps", "empty", "one byte", "zeros", "noise", "html",
    *(f"jpeg cut at {k}/9" for k in range(1, 9)), *no_files(),
}  # fmt: skip
EITHER = {"jpeg arithmetic"}  # as the noise happens to be read


@pytest.fixture(scope="module")
def menagerie(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataConfig, list[str]]:
    """All of them in one class, named .jpg, beside a few photographs in another; half their names are no text."""
    root = tmp_path_factory.mktemp("zoo")
    photo = encoded(photograph(np.random.default_rng(9)).resize((140, 120)))
    names = [*zoo(), *no_files()]
    for split in ("train", "val"):
        for folder in ("animals", "plants"):
            (root / split / folder).mkdir(parents=True)
        for k, name in enumerate(names):
            path = root / split / "animals" / os.fsdecode(b"%03d%s.jpg" % (k, b"\xff" if k % 2 else b"\xc3\xa9"))
            if name in no_files():
                no_files()[name](path)
            else:
                path.write_bytes(zoo()[name])
        for k in range(4):
            (root / split / "plants" / f"{k}.jpg").write_bytes(photo)
    size = {"size": 64, "eval_resize": 72, "eval_size": 64, "eval_batch": 16}
    return config(root, index_dir=str(root / "index"), **size), names


@needs_dali
def test_verdicts_and_pixels_agree(
    menagerie: tuple[DataConfig, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, all_names = menagerie
    paths = [tmp_path / kind for kind in ("dali", "torchvision")]
    both = [Opened(path.name, cfg, bad=path, classes=2) for path in paths]
    index = both[0].val
    animals = [path for path in map(index.encoded_path, range(len(index))) if b"/animals/" in path]
    names = [all_names[int(os.path.basename(path)[:3])] for path in animals]  # FIFOs may not be listed
    count = len(index)
    scores = [opened.evaluate() for opened in both]
    verdicts = []
    for opened, batches in zip(both, scores, strict=True):
        good = torch.cat([batch.labels for batch in batches])[: len(names)] >= 0
        verdicts.append({name for name, read in zip(names, good.tolist(), strict=True) if not read})
        assert len(opened.said) == len(verdicts[-1])
    assert verdicts[0] == verdicts[1]
    assert verdicts[0] - EITHER == REFUSED & set(names)
    assert set(names) >= set(zoo())

    trained = [opened.train(0, 1, batch=count) for opened in both]
    for what, (ours, theirs) in {"evaluation": scores, "training": trained}.items():
        ids = np.concatenate([batch.ids for batch in ours])
        labels, images = ([torch.cat([batch[k] for batch in side]) for side in (ours, theirs)] for k in (1, 0))
        assert torch.equal(*labels)
        apart = (images[0].int() - images[1].int()).abs().float().mean((1, 2, 3))
        for sample, label, distance in zip(ids.tolist(), labels[0].tolist(), apart.tolist(), strict=True):
            name = names[sample] if sample < len(names) else "a plant"
            assert label < 0 or distance < 0.5, (what, name, distance)
    lines = [sorted(path.read_bytes().splitlines()) for path in paths]
    assert lines[0] == lines[1]
    # The verdicts hold for the files, whatever their names are.
    for kind, path in zip(("dali", "torchvision"), paths, strict=True):
        again = Opened(kind, cfg, bad=path, classes=2)
        again.evaluate()
        assert again.said == []


def test_plain_is_what_all_decoders_read_alike() -> None:
    plain = {name for name, data in zoo().items() if plain_shape(data)}
    assert plain == {
        "jpeg", "jpeg 420", "jpeg 411", "jpeg progressive", "jpeg restarts", "jpeg grey", "jpeg exif",
        "jpeg thumbnail", "jpeg comment", "jpeg garbage in scan", "jpeg end in scan", "jpeg junk behind",
        "jpeg cut, with end", "jpeg and another cut", "mpo", "1×1", "10,000×1", "png", "png grey", "png gamma",
        "1×1 png",
    }  # fmt: skip
    for name in plain:
        assert plain_shape(zoo()[name]) == decode(zoo()[name]).shape[1:], name
    for data in (zoo()["jpeg"], zoo()["png"]):
        for end in range(0, len(data) - 1, 7):
            assert plain_shape(data[:end]) is None


@pytest.mark.parametrize(
    ("name", "like", "bound"),
    [
        ("jpeg exif", "jpeg", 0),  # the same pixels, not turned
        ("jpeg junk behind", "jpeg", 0),
        ("jpeg thumbnail", "jpeg", 0),
        ("jpeg progressive", "jpeg", 0),
        ("jpeg rgb", "png", 2),
        ("jpeg rgb adobe", "png", 2),
        ("jpeg cmyk adobe", "png", 3),
        ("webp lossless exif", "png", 0),
        ("webp", "png", 6),
        ("tiff lzw", "png", 0),
        ("tga", "png", 0),
        ("bmp", "png", 0),
        ("png alpha", "png", 0),  # without its transparency
        ("png palette transparent", "png palette", 0),
        ("png palette", "png", 12),
        ("png interlaced", "png", 0),
        ("png gamma", "png", 0),
        ("png 16-bit rgb", "png", 0),
        ("png 16-bit grey", "png grey", 0),
        ("png grey alpha", "png grey", 0),
        ("tiff 16 bits", "png grey", 0),
        ("pgm 16 bits", "png grey", 0),
        ("pgm", "png grey", 0),
        ("jpeg grey", "png grey", 2),
        ("jpeg 2000", "png", 0),
        ("png 1 bit", "tiff 1 bit", 0),
    ],
)
def test_what_they_show(name: str, like: str, bound: float) -> None:
    shown, expected = decode(zoo()[name]), decode(zoo()[like])
    assert shown.dtype == torch.uint8
    assert (shown.int() - expected.int()).abs().float().mean() <= bound


def test_whatever_pil_raises_is_one_kind_of_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(error: Exception) -> Callable[..., None]:
        def load(*args: object, **kwargs: object) -> None:
            raise error

        return load

    for error in (SyntaxError("broken PNG"), ValueError(), OSError("truncated"), struct.error("x"), OverflowError()):
        monkeypatch.setattr(Image, "open", fails(error))
        with pytest.raises(ContentError):
            decode(b"no JPEG")
    monkeypatch.setattr(Image, "open", fails(MemoryError()))
    with pytest.raises(MemoryError):  # no verdict about the file
        decode(b"no JPEG")


def test_a_header_may_lie_about_lengths() -> None:
    jpeg = zoo()["jpeg"]
    for at in range(2, jpeg.index(b"\xff\xda")):
        for value in (0, 1, 255):
            jpeg_shape(jpeg[:at] + bytes([value]) + jpeg[at + 1 :])  # ends, and raises nothing
    assert jpeg_shape(io.BytesIO(jpeg).read()) == (117, 151)
