"""Thousands of damaged and hostile pictures: each is read, or refused in one line, within ten seconds.

Seeds of every kind are damaged by bytes that hypothesis chooses.
"""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from adflow.data import Sample
from adflow.detector import Detector
from adflow.imaging import fit_to, read_image, read_mask
from adflow.pipeline import run

from .fuzz import DAMAGE, damage, quick, survives
from .stage import Count

pytestmark = pytest.mark.usefixtures("little_memory")


# ---- images


def pictures() -> dict[str, bytes]:
    """One of each kind that cameras, scanners and editors write."""
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 255, (20, 30), dtype=np.uint8)
    rgb = rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)
    deep = rng.integers(0, 65535, (20, 30), dtype=np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6
    colour, plain = Image.fromarray(rgb), Image.fromarray(grey)
    palette = colour.quantize(8)
    kinds: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "grey.png": (plain, {}),
        "rgb.png": (colour, {}),
        "rgba.png": (colour.convert("RGBA"), {}),
        "la.png": (plain.convert("LA"), {}),
        "bit.png": (plain.convert("1"), {}),
        "deep.png": (Image.fromarray(deep), {}),
        "palette.png": (palette, {"transparency": 3}),
        "interlaced.png": (colour, {"interlace": 1}),
        "animated.png": (colour, {"save_all": True, "append_images": [colour.rotate(90)]}),
        "rgb.jpg": (colour, {}),
        "grey.jpg": (plain, {}),
        "cmyk.jpg": (colour.convert("CMYK"), {}),
        "turned.jpg": (colour, {"exif": exif}),
        "progressive.jpg": (colour, {"progressive": True}),
        "rgb.bmp": (colour, {}),
        "palette.bmp": (palette, {}),
        "bit.bmp": (plain.convert("1"), {}),
        "rgb.tif": (colour, {}),
        "lzw.tif": (colour, {"compression": "tiff_lzw"}),
        "zip.tif": (plain, {"compression": "tiff_adobe_deflate"}),
        "jpeg.tif": (colour, {"compression": "jpeg"}),
        "deep.tif": (Image.fromarray(deep), {}),
        "float.tif": (Image.fromarray(grey.astype(np.float32) / 255), {}),
        "int.tif": (Image.fromarray(deep.astype(np.int32)), {}),
        "cmyk.tif": (colour.convert("CMYK"), {}),
        "pages.tif": (colour, {"save_all": True, "append_images": [plain]}),
        "rgb.webp": (colour, {}),
        "lossless.webp": (colour.convert("RGBA"), {"lossless": True}),
        "animated.webp": (colour, {"save_all": True, "append_images": [colour.rotate(90)]}),
        "palette.gif": (palette, {"transparency": 1}),
        "animated.gif": (palette, {"save_all": True, "append_images": [palette.rotate(180)]}),
        "rgb.ppm": (colour, {}),
        "grey.pgm": (plain, {}),
        "deep.pgm": (Image.fromarray(deep), {}),
        "bit.pbm": (plain.convert("1"), {}),
        "rgb.jp2": (colour, {}),
        "one.png": (colour.resize((1, 1)), {}),
        "row.png": (colour.resize((10000, 1)), {}),
        "column.png": (colour.resize((1, 10000)), {}),
    }
    found = {}
    for name, (picture, options) in kinds.items():
        stream = io.BytesIO()
        form = {"jpg": "JPEG", "tif": "TIFF", "jp2": "JPEG2000", "pgm": "PPM", "pbm": "PPM"}
        suffix = name.rpartition(".")[2]
        picture.save(stream, form.get(suffix, suffix.upper()), **options)
        found[name] = stream.getvalue()
    return found


def bombs() -> dict[str, bytes]:
    """Small files that declare, or hold, huge pictures."""

    def png(width: int, height: int, data: bytes) -> bytes:
        import zlib

        def chunk(kind: bytes, body: bytes) -> bytes:
            return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

        head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
        return b"\x89PNG\r\n\x1a\n" + body

    def bmp(width: int, height: int) -> bytes:
        head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
        return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + head

    found = {}
    for width, height in ((2**31 - 1, 2**31 - 1), (60000, 60000), (13000, 13000), (0, 0), (0, 5), (1, 2**31 - 1)):
        found[f"{width}x{height}.png"] = png(width, height, bytes(1000))
        found[f"{width}x{height}.bmp"] = bmp(width, height)
        found[f"{width}x{height}.pgm"] = f"P5 {width} {height} 255\n".encode()
        found[f"{width}x{height}.txt.ppm"] = f"P3 {width} {height} 255\n1 2".encode()
        gif = b"GIF89a" + struct.pack("<HHBBB", width & 65535, height & 65535, 0x80, 0, 0) + bytes(6)
        found[f"{width}x{height}.gif"] = gif + b"," + struct.pack("<HHHHB", 0, 0, width & 65535, height & 65535, 0)
    found["negative.bmp"] = bmp(-5, -5)
    found["whole.png"] = png(8000, 8000, bytes(8000 * 24001))
    return found


def look(path: Path) -> None:
    """Everything that is done with a picture; sizes must agree."""
    picture = read_image(path)
    for keep in (False, True):
        planes, _ = fit_to(picture, (32, 48), keep)
        assert planes.shape == (3, 32, 48) and np.isfinite(planes).all() and planes.min() >= 0 and planes.max() <= 1
    mask = read_mask(path)
    assert mask.shape == picture.shape[:2] and mask.dtype == bool


def test_pictures_of_every_kind(tmp_path: Path, count: Count) -> None:
    for name, content in pictures().items():
        (tmp_path / name).write_bytes(content)
        found = survives("pictures, whole", lambda name=name: look(tmp_path / name), count, name)  # type: ignore[misc]
        assert found is None, (name, found)
        for cut in range(0, len(content), max(1, len(content) // 12)):
            (tmp_path / name).write_bytes(content[:cut])
            survives("pictures, cut", lambda name=name: look(tmp_path / name), count, (name, cut))  # type: ignore[misc]


def test_pictures_that_declare_too_much(tmp_path: Path, count: Count) -> None:
    for name, content in bombs().items():
        (tmp_path / name).write_bytes(content)
        survives("pictures that declare too much", lambda name=name: look(tmp_path / name), count, name)  # type: ignore[misc]


def test_damaged_pictures(tmp_path: Path, count: Count) -> None:
    seeds = pictures()

    @quick(3000)
    @given(st.sampled_from(sorted(seeds)), DAMAGE)
    def check(name: str, steps: list[tuple[str, float, int]]) -> None:
        path = tmp_path / name
        path.write_bytes(damage(seeds[name], steps))
        survives("pictures, damaged", lambda: look(path), count, (name, steps))

    check()


def test_a_folder_of_damaged_pictures_is_scored_to_its_end(detector: Detector, tmp_path: Path, count: Count) -> None:
    rng = np.random.default_rng(1)
    paths = []
    for round_ in range(6):
        for name, content in pictures().items():
            steps = [("flip", float(rng.random()), int(rng.integers(2**31))) for _ in range(round_)]
            paths.append(tmp_path / f"{round_}-{name}")
            paths[-1].write_bytes(damage(content, steps))
    results = list(run(detector, [Sample(path, "test", None, None, None) for path in paths], keep_picture=True))
    assert [scored.sample.image for scored in results] == paths
    for scored in results:
        good = scored.error is not None or (np.isfinite(scored.map).all() and np.isfinite(scored.image))
        count("pictures in one folder, scored", bool(good))
        assert good, scored.sample
