"""Reading any picture, and one geometry for images, masks and maps."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

from adflow.errors import InputError, UsageError
from adflow.imaging import (
    Box,
    fit_to,
    fitted,
    mask_to,
    parse_size,
    read_image,
    read_mask,
    restore,
    show,
    upsample,
    upsample_matrices,
)


def scene(height: int = 24, width: int = 40) -> np.ndarray:
    """A colour picture without any symmetry."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y * 9 % 256, x * 6 % 256, (x * y) % 256], axis=-1).astype(np.uint8)


def save(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


# Sizes


def test_sizes_are_height_by_width() -> None:
    assert parse_size("256") == (256, 256)
    assert parse_size(256) == (256, 256)
    assert parse_size("320x512") == (320, 512)
    assert parse_size(" 320 X 512 ") == (320, 512)


@pytest.mark.parametrize(
    "text", ["", "x", "12x", "256x", "2.5", "-256", "0", "7", "256x7", "9000", "1x2x3", "256px", "٢٥٦"]
)
def test_what_is_no_size_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="size"):
        parse_size(text)


# Reading


@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        (".png", {}),
        (".bmp", {}),
        (".tif", {}),
        (".tiff", {"compression": "tiff_lzw"}),
        (".webp", {"lossless": True}),
        (".ppm", {}),
        (".jp2", {"irreversible": False}),
    ],
)
def test_lossless_formats_are_read_exactly(tmp_path: Path, suffix: str, options: dict[str, object]) -> None:
    path = save(tmp_path / f"a{suffix}", Image.fromarray(scene()), **options)
    image = read_image(path)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, scene())


def test_jpeg_is_read_closely_and_by_content_not_suffix(tmp_path: Path) -> None:
    smooth = np.repeat(np.linspace(20, 230, 64).astype(np.uint8)[None, :, None], 48, axis=0).repeat(3, axis=2)
    path = save(tmp_path / "a.png", Image.fromarray(smooth), format="JPEG", quality=95)
    # A smooth ramp at quality 95 comes back within its quantisation step, about 2 grey levels.
    assert np.abs(read_image(path).astype(int) - smooth).max() <= 3


@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_grey_bilevel_and_palette_become_rgb(tmp_path: Path, mode: str) -> None:
    original = Image.fromarray(scene()).convert(mode)
    image = read_image(save(tmp_path / "a.png", original))
    np.testing.assert_array_equal(image, np.asarray(original.convert("RGB")))


def test_transparent_pixels_are_white_whatever_colour_hides_below(tmp_path: Path) -> None:
    pixels = np.dstack([scene(), np.full((24, 40), 255, np.uint8)])
    pixels[:5, :, 3] = 0
    pixels[5:10, :, 3] = 51  # one fifth opaque
    image = read_image(save(tmp_path / "a.png", Image.fromarray(pixels)))
    assert (image[:5] == 255).all()
    # 0.2 c + 0.8 * 255, rounded somewhere between
    np.testing.assert_allclose(image[5:10], 0.2 * scene()[5:10] + 204, atol=1)
    np.testing.assert_array_equal(image[10:], scene()[10:])


def test_palette_and_grey_transparency(tmp_path: Path) -> None:
    palette = Image.new("P", (4, 2), 1)
    palette.putpalette([0, 0, 0, 200, 10, 10])
    palette.putpixel((0, 0), 0)
    image = read_image(save(tmp_path / "p.png", palette, transparency=0))
    assert image[0, 0].tolist() == [255, 255, 255]
    assert image[1, 1].tolist() == [200, 10, 10]
    image = read_image(save(tmp_path / "pb.png", palette, transparency=b"\x00\xff"))
    assert image[0, 0].tolist() == [255, 255, 255]
    grey = np.dstack([np.full((3, 3), 40, np.uint8), np.full((3, 3), 0, np.uint8)])
    image = read_image(save(tmp_path / "la.png", Image.fromarray(grey)))
    assert (image == 255).all()


def test_cmyk_jpeg(tmp_path: Path) -> None:
    image = read_image(save(tmp_path / "a.jpg", Image.new("CMYK", (16, 16), (0, 255, 255, 0)), quality=95))
    # cyan 0, magenta and yellow full: red, within JPEG's rounding
    assert np.abs(image.astype(int) - [255, 0, 0]).max() <= 4


@pytest.mark.parametrize("keep_aspect", [False, True])
@pytest.mark.parametrize("values", [np.uint8(255), np.uint16(65535)])
def test_grey_is_resized_once_to_the_bits_of_three_channels(
    tmp_path: Path, values: np.integer, keep_aspect: bool
) -> None:
    plane = (scene(37, 53)[..., 0] / 255 * values).astype(values.dtype)
    image = read_image(save(tmp_path / "a.png", Image.fromarray(plane)))
    assert image.strides[2] == 0 and not image.flags.writeable
    array, box = fit_to(image, (32, 48), keep_aspect)
    expected, same = fit_to(np.array(image, order="C"), (32, 48), keep_aspect)
    assert box == same and np.array_equal(array, expected)
    assert array.flags.c_contiguous and array.flags.writeable


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_keep_their_depth_on_one_scale(tmp_path: Path, suffix: str) -> None:
    values = (np.arange(24 * 40).reshape(24, 40) * 68).astype(np.uint16)
    image = read_image(save(tmp_path / f"a{suffix}", Image.fromarray(values)))
    assert image.dtype == np.float32
    assert image.shape == (24, 40, 3)
    np.testing.assert_array_equal(image[..., 1], (values / 65535).astype(np.float32))
    dark = read_image(save(tmp_path / f"dark{suffix}", Image.fromarray(values // 16)))
    assert dark.max() < 1 / 15  # a dark picture stays dark: nothing is stretched to the picture's own range


def test_big_endian_sixteen_bits(tmp_path: Path) -> None:
    header = struct.pack(">2sHI", b"MM", 42, 8)
    values = (np.arange(12).reshape(3, 4) * 5000).astype(">u2")
    tags = [
        (256, 4, 4),
        (257, 4, 3),
        (258, 3, 16),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 0),
        (278, 4, 3),
        (279, 4, 24),
    ]
    offset = 8 + 2 + 12 * len(tags) + 4
    body = struct.pack(">H", len(tags))
    for tag, kind, value in tags:
        value = offset if tag == 273 else value
        body += struct.pack(">HHI", tag, kind, 1) + (
            struct.pack(">I", value) if kind == 4 else struct.pack(">HH", value, 0)
        )
    path = tmp_path / "big.tif"
    path.write_bytes(header + body + struct.pack(">I", 0) + values.tobytes())
    np.testing.assert_array_equal(read_image(path)[..., 0], (values / 65535).astype(np.float32))


def test_floating_point_images_must_lie_in_zero_to_one(tmp_path: Path) -> None:
    values = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.tif", Image.fromarray(values)))[..., 0], values)
    for name, bad in (("high", values * 300), ("low", values - 0.5), ("nan", values * np.nan)):
        path = save(tmp_path / f"{name}.tif", Image.fromarray(bad.astype(np.float32)))
        with pytest.raises(InputError, match=rf"{name}\.tif: floating-point values from .* expected 0 to 1"):
            read_image(path)


def test_integers_beyond_sixteen_bits_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "deep.tif", Image.fromarray(np.full((3, 4), 70000, np.int32)))
    with pytest.raises(InputError, match=r"deep\.tif: integer values from 70000 to 70000, expected 0 to 65535"):
        read_image(path)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_exif_rotation_is_applied_to_image_and_mask(tmp_path: Path, orientation: int, suffix: str) -> None:
    upright = scene()
    # How each orientation stores an upright picture (EXIF 2.32, tag 0x0112): what readers apply, inverted.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / f"a{suffix}", Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    np.testing.assert_array_equal(read_image(path), upright)
    np.testing.assert_array_equal(read_mask(path), np.asarray(Image.fromarray(upright).convert("L")) > 127)


def test_animations_and_pages_give_their_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("#102030", "#ffffff")]
    for suffix in (".gif", ".tif", ".png", ".webp"):
        lossless = {"lossless": True} if suffix == ".webp" else {}
        path = save(tmp_path / f"a{suffix}", frames[0], save_all=True, append_images=frames[1:], **lossless)
        assert read_image(path)[0, 0].tolist() == [0x10, 0x20, 0x30], suffix


# Unreadable


def lying_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header declares any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"hello, world" * 20, "not an image"),
        (b"\x89PNG\r\n\x1a\n", "not an image"),
        (lying_png(60000, 60000), "more pixels|declares 60000"),
        (lying_png(400, 400), "cannot read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "odd name.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match=said) as caught:
        read_image(path)
    assert "odd name.png" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"odd name\.png"):
        read_mask(path)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*none\.png: No such file"):
        read_image(tmp_path / "none.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError, match=r"cannot read .*folder\.png"):
        read_image(tmp_path / "folder.png")
    with pytest.raises(InputError, match=r"none\.npy"):
        read_mask(tmp_path / "none.npy", 0)


def test_the_pixel_limit_is_checked_before_decoding(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", Image.new("L", (100, 90)))
    assert read_image(path, max_pixels=9000).shape == (90, 100, 3)
    with pytest.raises(InputError, match="declares 100 x 90 pixels, more than the limit"):
        read_image(path, max_pixels=8999)
    with pytest.raises(InputError, match="more than the limit"):
        read_mask(path, max_pixels=8999)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tif", ".webp", ".gif"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_files_are_refused(tmp_path: Path, suffix: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = save(tmp_path / f"a{suffix}", Image.fromarray(noise))
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match=f"a{suffix}"):
        read_image(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_give_a_picture_or_one_clear_error(tmp_path: Path, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "PPM", "JPEG2000"]))
    stream = io.BytesIO()
    Image.fromarray(scene(12, 16)).save(stream, format=kind)
    content = bytearray(stream.getvalue())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=6)):
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path / "a.png"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    try:
        # The limit keeps headers that lie from costing memory here.
        image = read_image(path, max_pixels=1_000_000)
    except InputError as error:
        assert "a.png" in str(error)
    else:
        assert image.ndim == 3
        assert image.shape[2] == 3
        assert image.dtype in (np.uint8, np.float32)


def test_names_stay_in_one_line() -> None:
    assert show(Path("a b's ü.png")) == "a b's ü.png"
    assert show("new\nline") == "'new\\nline'"


# Masks


def test_masks_are_cut_in_the_middle(tmp_path: Path) -> None:
    ramp = np.array([[0, 1, 127, 128, 255]], np.uint8)
    wanted = [[False, False, False, True, True]]
    for suffix in (".png", ".bmp", ".tif"):
        assert read_mask(save(tmp_path / f"a{suffix}", Image.fromarray(ramp))).tolist() == wanted
    deep = save(tmp_path / "deep.png", Image.fromarray(ramp.astype(np.uint16) * 257))
    assert read_mask(deep).tolist() == wanted
    palette = Image.new("P", (3, 1))
    palette.putpalette([0, 0, 0, 255, 255, 255])
    palette.putpixel((1, 0), 1)
    assert read_mask(save(tmp_path / "b.png", palette.convert("1"))).tolist() == [[False, True, False]]
    clear = Image.new("RGBA", (2, 1), (255, 255, 255, 0))
    clear.putpixel((0, 0), (255, 255, 255, 255))
    assert read_mask(save(tmp_path / "c.png", clear)).tolist() == [[True, False]]


def test_black_and_white_bitmaps_of_any_depth(tmp_path: Path) -> None:
    palette = Image.new("P", (9, 5))
    palette.putpalette([0, 0, 0, 255, 255, 255])
    for x in (1, 2, 6, 8):
        palette.putpixel((x, 3), 1)
    wanted = np.asarray(palette) == 1
    eight = save(tmp_path / "eight.bmp", palette)
    one = save(tmp_path / "one.bmp", palette.convert("1"))
    # Four bits a pixel, two colours, rows of 9 pixels padded to 8 bytes, bottom row first.
    rows = b"".join(
        bytes(a << 4 | b for a, b in zip(row[::2], [*row[1::2], 0], strict=True)) + b"\0\0\0"
        for row in wanted[::-1].astype(int).tolist()
    )
    head = struct.pack("<IiiHHIIiiII", 40, 9, 5, 1, 4, 0, len(rows), 0, 0, 2, 2) + b"\0\0\0\0\xff\xff\xff\0"
    four = tmp_path / "four.bmp"
    four.write_bytes(struct.pack("<2sIHHI", b"BM", 14 + len(head) + len(rows), 0, 0, 14 + len(head)) + head + rows)
    for path in (eight, one, four):
        np.testing.assert_array_equal(read_mask(path), wanted, err_msg=path.name)
        np.testing.assert_array_equal(read_image(path), np.where(wanted, 255, 0)[..., None].repeat(3, 2))


def test_zero_and_one_are_a_mask_where_nothing_was_lost(tmp_path: Path) -> None:
    mask = np.zeros((16, 16), np.uint8)
    mask[3:6, 3:6] = 1
    np.testing.assert_array_equal(read_mask(save(tmp_path / "a.png", Image.fromarray(mask))), mask == 1)
    assert not read_mask(save(tmp_path / "a.jpg", Image.fromarray(mask), quality=100)).any()
    assert not read_mask(save(tmp_path / "zero.png", Image.fromarray(mask * 0))).any()
    for name, deep in (("sixteen.png", mask.astype(np.uint16)), ("whole.tif", mask.astype(np.int32))):
        np.testing.assert_array_equal(read_mask(save(tmp_path / name, Image.fromarray(deep))), mask == 1, name)
    soft = Image.fromarray(np.array([[0.2, 0.6, 1.0]], np.float32))
    assert read_mask(save(tmp_path / "soft.tif", soft)).tolist() == [[False, True, True]]


def test_masks_from_array_stacks(tmp_path: Path) -> None:
    stack = np.zeros((3, 4, 5), np.uint8)
    stack[1, 2, 3] = 1
    np.save(tmp_path / "a.npy", stack)
    np.testing.assert_array_equal(read_mask(tmp_path / "a.npy", 1), stack[1] == 1)
    assert read_mask(tmp_path / "a.npy", 0).dtype == bool
    for index in (3, -1, None):
        with pytest.raises(InputError, match=r"a\.npy is an array of shape \(3, 4, 5\)"):
            read_mask(tmp_path / "a.npy", index)
    np.save(tmp_path / "flat.npy", stack[1] * 255)
    assert read_mask(tmp_path / "flat.npy").sum() == 1
    (tmp_path / "bad.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(InputError, match=r"bad\.npy"):
        read_mask(tmp_path / "bad.npy", 0)
    np.savez(tmp_path / "archive.npz", stack)
    (tmp_path / "archive.npz").rename(tmp_path / "archive.npy")
    with pytest.raises(InputError, match=r"archive\.npy"):
        read_mask(tmp_path / "archive.npy", 0)
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"objects\.npy"):
        read_mask(tmp_path / "objects.npy", 0)
    with pytest.raises(InputError, match="frame 2 of it"):
        read_mask(save(tmp_path / "a.png", Image.new("L", (2, 2))), 2)


# Geometry


def test_an_image_of_the_right_size_is_only_scaled() -> None:
    array, box = fit_to(scene(), (24, 40))
    assert box == Box(0, 0, 24, 40)
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, scene().transpose(2, 0, 1).astype(np.float32) / np.float32(255))


def test_shrinking_is_antialiased_and_deep_images_take_the_same_way() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    array, _ = fit_to(stripes, (16, 16))
    # A stripe of one pixel is far above the new resolution: what is left is grey, within the filter's ripple.
    assert np.abs(array - 0.5).max() < 0.05
    smooth = scene(60, 80)
    eight, _ = fit_to(smooth, (30, 50))
    deep, _ = fit_to(smooth.astype(np.float32) / 255, (30, 50))
    # Pillow rounds 8-bit images after each of two passes: at most one grey level.
    assert np.abs(eight - deep).max() <= 1.01 / 255
    assert 0 <= deep.min() <= deep.max() <= 1


@pytest.mark.parametrize(("have", "box"), [((100, 50), Box(0, 16, 64, 32)), ((50, 100), Box(16, 0, 32, 64))])
def test_letterbox_keeps_the_aspect_and_repeats_the_edge(have: tuple[int, int], box: Box) -> None:
    image = np.full((*have, 3), 100, np.uint8)
    image[:, :2] = image[:2] = 200
    array, found = fit_to(image, (64, 64), keep_aspect=True)
    assert found == box
    assert array.shape == (3, 64, 64)
    inner = array[:, box.top : box.top + box.height, box.left : box.left + box.width]
    np.testing.assert_array_equal(inner, fit_to(image, (box.height, box.width))[0])
    if box.left:
        np.testing.assert_array_equal(array[:, :, 0], inner[:, :, 0])
    else:
        np.testing.assert_array_equal(array[:, 0], inner[:, 0])
    mask = mask_to(np.ones(have, bool), (64, 64), keep_aspect=True)
    assert mask.sum() == box.height * box.width
    assert mask[box.top : box.top + box.height, box.left : box.left + box.width].all()


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(8, 512), st.integers(8, 512))
def test_the_box_always_lies_inside_and_fills_one_side(h: int, w: int, height: int, width: int) -> None:
    box = fitted((h, w), (height, width), True)
    assert box.height >= 1
    assert box.width >= 1
    assert 0 <= box.top <= height - box.height
    assert 0 <= box.left <= width - box.width
    assert box.height == height or box.width == width


def test_masks_shrink_by_area_at_least_half() -> None:
    mask = np.zeros((12, 12), bool)
    mask[:6, :3] = True  # half of the upper left cell of 6 x 6
    mask[6:, 6:8] = True  # a third of the lower right one
    mask[0, 6:] = True
    assert mask_to(mask, (2, 2)).tolist() == [[True, False], [False, False]]
    assert mask_to(mask, (12, 12)).tolist() == mask.tolist()
    np.testing.assert_array_equal(mask_to(mask, (24, 24)), np.kron(mask, np.ones((2, 2), bool)))


@given(st.integers(2, 12), st.data())
@settings(deadline=None, max_examples=60)
def test_exactly_half_counts_whatever_the_cell(cell: int, data: st.DataObject) -> None:
    half = cell * cell // 2
    filled = np.zeros(cell * cell, bool)
    filled[data.draw(st.permutations(range(cell * cell)))[:half]] = True
    kept = mask_to(filled.reshape(cell, cell), (1, 1)).item()
    assert kept == (half * 2 == cell * cell)


def test_restore_is_bilinear_on_half_pixel_centres() -> None:
    rng = np.random.default_rng(0)
    small = rng.random((13, 17), dtype=np.float32)
    ours = restore(small, Box(0, 0, 13, 17), (40, 61))
    theirs = F.interpolate(torch.from_numpy(small)[None, None], (40, 61), mode="bilinear", align_corners=False)
    np.testing.assert_allclose(ours, theirs[0, 0].numpy(), atol=1e-6)  # a few roundings of numbers below 1
    assert ours.dtype == np.float32


def test_restore_cuts_the_box_and_keeps_labels() -> None:
    labels = np.zeros((10, 10), np.int32)
    labels[2:6, 3:7] = np.arange(16).reshape(4, 4)
    back = restore(labels, Box(2, 3, 4, 4), (8, 12), order=0)
    assert back.dtype == np.int32
    np.testing.assert_array_equal(back, np.kron(np.arange(16).reshape(4, 4), np.ones((2, 3), int)))
    np.testing.assert_array_equal(restore(back, Box(0, 0, 8, 12), (4, 4), order=0), np.arange(16).reshape(4, 4))


@pytest.mark.parametrize("have", [(100, 50), (33, 90), (64, 64)])
def test_a_mask_survives_there_and_back(have: tuple[int, int]) -> None:
    y, x = np.mgrid[: have[0], : have[1]]
    mask = np.hypot(y - have[0] / 2, x - have[1] / 2) < min(have) / 4
    _, box = fit_to(np.zeros((*have, 3), np.uint8), (128, 128), keep_aspect=True)
    back = restore(mask_to(mask, (128, 128), keep_aspect=True), box, have, order=0)
    # Only pixels on the rim may flip: a disk of radius r has about 2 pi r of them.
    assert (back != mask).sum() <= 0.5 * np.pi * min(have) / 2


# Maps


def reference(maps: torch.Tensor, size: tuple[int, int], sigma: float) -> torch.Tensor:
    """The same by interpolation and convolution, in the maps' precision."""
    large = F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)
    reach = int(4 * sigma + 0.5)
    at = torch.arange(-reach, reach + 1, dtype=maps.dtype)
    kernel = torch.exp(-0.5 * (at / sigma) ** 2)
    kernel /= kernel.sum()
    edges = ((0, 0), (0, 0), (reach, reach), (reach, reach))
    padded = torch.from_numpy(np.pad(large.numpy(), edges, mode="symmetric"))
    return F.conv2d(F.conv2d(padded, kernel[None, None, :, None]), kernel[None, None, None, :])[:, 0]


@pytest.mark.parametrize(
    ("grid", "size", "sigma"),
    [
        ((8, 8), (64, 64), 4.0),
        ((13, 17), (96, 128), 2.5),
        ((64, 64), (64, 64), 1.0),
        ((31, 7), (40, 33), 0.6),
    ],
)
def test_upsample_equals_interpolation_and_gaussian(grid: tuple[int, int], size: tuple[int, int], sigma: float) -> None:
    maps = torch.rand(3, *grid, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = reference(maps, size, sigma)
    # In double precision only roundings of 1e-16 remain; in single, of 6e-8 over sums of some 60 terms.
    torch.testing.assert_close(upsample(maps, size, sigma), exact, atol=1e-13, rtol=0)
    single = upsample(maps.float(), size, sigma)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, exact.float(), atol=2e-6, rtol=0)


def test_upsample_without_smoothing_and_of_tiny_grids() -> None:
    maps = torch.rand(2, 5, 6, generator=torch.Generator().manual_seed(0))
    plain = F.interpolate(maps[:, None], (20, 30), mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(upsample(maps, (20, 30), 0.0), plain, atol=1e-6, rtol=0)
    # Weights sum to 1 even where the kernel is wider than the picture and reflects more than once.
    for grid, size in (((1, 1), (9, 9)), ((2, 1), (8, 11)), ((3, 3), (1, 1))):
        ones = upsample(torch.ones(1, *grid), size, 6.0)
        torch.testing.assert_close(ones, torch.ones(1, *size), atol=1e-5, rtol=0)
    assert upsample(torch.zeros(0, 4, 4), (8, 8), 1.0).shape == (0, 8, 8)
    half = upsample(maps.bfloat16(), (20, 30), 1.0)
    assert half.dtype == torch.float32


def test_a_map_does_not_depend_on_its_batch() -> None:
    maps = torch.rand(7, 15, 13, generator=torch.Generator().manual_seed(0))
    together = upsample(maps, (61, 67), 3.0)
    given_matrices = upsample(maps, (61, 67), 3.0, upsample_matrices((15, 13), (61, 67), 3.0))
    assert torch.equal(together, given_matrices)
    for i in range(7):
        assert torch.equal(upsample(maps[i : i + 1], (61, 67), 3.0)[0], together[i])
    turned = upsample(maps.flip(0), (61, 67), 3.0)
    assert torch.equal(turned.flip(0), together)


def test_reading_needs_no_torch() -> None:
    code = "import sys, adflow.imaging, adflow.data, adflow.data.folder; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("shape", [(64, 64), (20, 50), (50, 20)])
def test_an_input_can_be_written_to_and_columns_are_resized_first(shape: tuple[int, int]) -> None:
    """torch takes no read-only array; and rows first, as Pillow 13 has it for tall images, would round otherwise."""
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    found, _ = fit_to(image, (16, 16))
    assert found.flags.writeable
    columns = np.asarray(Image.fromarray(image).resize((16, shape[0]), Image.Resampling.BILINEAR))
    rows = np.asarray(Image.fromarray(columns).resize((16, 16), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(found, rows.transpose(2, 0, 1).astype(np.float32) / 255)
