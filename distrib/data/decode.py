"""Decoding: the one decoder behind both loaders, and which files DALI may decode in its place.

A loader's pixels and verdicts must not depend on which loader it is. So DALI gets only what every decoder reads in the
same way; all else is decoded here, for both.
"""

from __future__ import annotations

import functools
import io
import zlib
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from distrib.data.files import first_line
from distrib.data.vision import ImageReadMode, decode_image

MOST_PIXELS = 1 << 29  # a damaged header may claim any size: what is beyond is refused before memory is asked for
Image.MAX_IMAGE_PIXELS = None  # Pillow's own, lower limit is no fault of a picture

# EPS would start Ghostscript; the others are no photographs' formats, or stubs.
FORMATS = (
    "JPEG", "PNG", "GIF", "BMP", "DIB", "WEBP", "AVIF", "TIFF", "MPO", "JPEG2000", "PPM", "ICO", "ICNS", "PCX", "SGI",
    "DDS", "TGA",
)  # fmt: skip
SIXTEEN_BITS = ("PNG", "PPM")  # whose "I" is 16-bit grey; elsewhere it is 32-bit

SOF = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive: the Huffman-coded lossy kinds
PLAIN_IDS = (b"\x01\x02\x03", b"\x00\x01\x02")  # Y, Cb, Cr; "RGB" says what it means
BETWEEN_SCANS = b"\xc4\xda\xdb\xdd\xfe"  # of a progressive JPEG: tables, the next scan, comments
PNG = b"\x89PNG\r\n\x1a\n"


class ContentError(Exception):
    """A file was read and holds no picture that can be decoded."""


def decode(encoded: bytes) -> torch.Tensor:
    """Decodes a picture to uint8 RGB [3, height, width], contiguous or channels-last.

    Without applying its EXIF rotation, as ImageNet's labels assume; otherwise as torchvision's ImageFolder reads it,
    but for 16-bit grey, of which the upper byte is taken where Pillow would cut off at 255.

    Raises:
        ContentError: it holds no picture, or one whose numbers have no agreed range (32-bit integers, floats).
    """
    if jpeg_shape(encoded):
        try:
            # A copy: torch warns of memory that must not be written.
            return decode_image(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), mode=ImageReadMode.RGB)
        except RuntimeError:  # PIL has the last word
            pass
    return torch.from_numpy(_decode_with_pil(encoded)).permute(2, 0, 1)


def to_ppm(image: torch.Tensor) -> np.ndarray:
    """A decoded picture [3, height, width] as a file that every decoder reads at once and without loss: uint8 [n]."""
    header = b"P6\n%d %d\n255\n" % (image.shape[2], image.shape[1])
    return np.concatenate([np.frombuffer(header, np.uint8), image.permute(1, 2, 0).numpy().reshape(-1)])


def plain_shape(encoded: bytes) -> tuple[int, int] | None:
    """Height and width of a picture that all decoders read alike; None for every other. About 30 µs for a JPEG."""
    header = _jpeg_header(encoded)
    if header is None:
        return png_shape(encoded)
    return header.shape if _clean_scans(encoded, header) else None


def jpeg_shape(encoded: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG whose kind all decoders read alike, from its header, else None. About 3 µs.

    That is: Huffman-coded, not lossless, 8 bits, grey or YCbCr, nothing odd between its segments, and an end of image
    behind the first scan (a truncated one has none).
    """
    header = _jpeg_header(encoded)
    return header.shape if header else None


class _Header(NamedTuple):
    shape: tuple[int, int]
    progressive: bool
    scan: int  # where the first scan begins


def _jpeg_header(encoded: bytes) -> _Header | None:
    if encoded[:2] != b"\xff\xd8":
        return None
    at, frame, shape, components, adobe = 2, 0, (0, 0), b"", 1
    try:
        while (marker := encoded[at + 1]) != 0xDA:
            length = encoded[at + 2] << 8 | encoded[at + 3]
            if encoded[at] != 0xFF or marker < 0xC0 or length < 2:
                return None
            if marker in SOF:
                if frame or encoded[at + 4] != 8:
                    return None
                frame = marker
                shape = encoded[at + 5] << 8 | encoded[at + 6], encoded[at + 7] << 8 | encoded[at + 8]
                components = encoded[at + 10 : at + 2 + length : 3]
            elif marker == 0xEE and encoded[at + 4 : at + 9] == b"Adobe":
                adobe = encoded[at + 15]
            elif 0xC5 <= marker < 0xDA or marker == 0xC3:  # another process, or a marker without a segment
                return None
            at += 2 + length
    except IndexError:
        return None
    colours = len(components) == 1 or (components in PLAIN_IDS and adobe == 1)
    whole = encoded[at] == 0xFF and encoded.rfind(b"\xff\xd9", at) >= 0
    return _Header(shape, frame == 0xC2, at) if colours and whole and 0 < shape[0] * shape[1] <= MOST_PIXELS else None


def _clean_scans(encoded: bytes, header: _Header) -> bool:
    """Whether no marker stands in a JPEG's scans that does not belong there: at one, not all decoders give up.

    What else is wrong with a scan is a warning to all of them.
    """
    data = np.frombuffer(encoded, dtype=np.uint8)[header.scan + 2 :]
    kinds = data[1:][data[:-1] == 0xFF]
    markers = kinds[(kinds != 0) & (kinds != 0xFF) & ((kinds < 0xD0) | (kinds > 0xD7))].tobytes()  # no restarts
    return not markers.partition(b"\xd9")[0].strip(BETWEEN_SCANS if header.progressive else b"")


def png_shape(encoded: bytes) -> tuple[int, int] | None:
    """Height and width of an 8-bit grey or RGB PNG, not interlaced, not transparent and whole, else None.

    All its checksums are compared, for decoders differ in which they look at. That costs a thirtieth of decoding it.
    """
    if encoded[:8] != PNG or encoded[12:16] != b"IHDR" or encoded[24:29] not in (b"\x08\0\0\0\0", b"\x08\2\0\0\0"):
        return None
    view, at, kind = memoryview(encoded), 8, b""
    while kind != b"IEND":
        length, kind = int.from_bytes(encoded[at : at + 4], "big"), encoded[at + 4 : at + 8]
        end = at + 8 + length
        if end + 4 > len(encoded) or kind == b"tRNS":
            return None
        if zlib.crc32(view[at + 4 : end]) != int.from_bytes(encoded[end : end + 4], "big"):
            return None
        at = end + 4
    width, height = int.from_bytes(encoded[16:20], "big"), int.from_bytes(encoded[20:24], "big")
    return (height, width) if 0 < height * width <= MOST_PIXELS else None


def _decode_with_pil(encoded: bytes) -> np.ndarray:
    if not encoded:
        raise ContentError("it is empty")
    try:
        with Image.open(io.BytesIO(encoded), formats=_formats()) as picture:
            if picture.width * picture.height > MOST_PIXELS:
                raise ContentError(f"{picture.width}×{picture.height} pixels are more than it could hold")
            if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in SIXTEEN_BITS):
                return (np.asarray(picture) >> 8).astype(np.uint8)[..., None].repeat(3, axis=2)
            if picture.mode in ("I", "F"):
                raise ContentError(f"{picture.format} of {'integers' if picture.mode == 'I' else 'floats'}: which is "
                                   "its white?")  # fmt: skip
            return np.array(picture.convert("RGB"))
    except (ContentError, MemoryError):  # no memory is no verdict about the file
        raise
    except Image.UnidentifiedImageError:
        raise ContentError("no picture in a known format") from None
    except Exception as error:  # a broken file makes PIL raise almost anything: SyntaxError, OSError, struct.error …
        raise ContentError(first_line(error)) from error


@functools.cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]  # AVIF is not in every Pillow
