"""Read any image as RGB, bring it to the network's input and bring maps back.

Sizes are ``(height, width)``. Pixel (0, 0) is the corner cell ``[0, 1) x [0, 1)``: every resize here uses
half-pixel centres (``align_corners=False``), so that images, masks and maps stay on one grid. torch is loaded
only by :func:`upsample` and :func:`upsample_matrices`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from adflow._clock import stage
from adflow._video import is_frame
from adflow._video import read as read_frame
from adflow.errors import InputError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

Size = tuple[int, int]  # (height, width)
Array = npt.NDArray[Any]
T = TypeVar("T")

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm", ".pbm", ".jp2"}
)
# Only formats that are decoded in this process and hold pictures: PostScript, for one, would start a program.
_FORMATS = ("PNG", "JPEG", "BMP", "DIB", "TIFF", "WEBP", "GIF", "PPM", "JPEG2000")
# Pillow's own hard limit, 2 x Image.MAX_IMAGE_PIXELS: 179 megapixels, about 0.5 GB decoded.
MAX_PIXELS = 178_956_970
_SMALLEST, _LARGEST = 8, 8192


@dataclass(frozen=True, slots=True)
class Box:
    """Where the image itself lies inside the network input, in pixels of that input."""

    top: int
    left: int
    height: int
    width: int


def parse_size(text: str | int) -> Size:
    """Read a size typed by a user.

    >>> parse_size("256"), parse_size("320x512")
    ((256, 256), (320, 512))

    Args:
        text: one number for a square, or ``HEIGHTxWIDTH``, in pixels.

    Raises:
        UsageError: anything else, or a side outside 8..8192.
    """
    match = re.fullmatch(r"\s*([0-9]{1,6})\s*(?:[xX×]\s*([0-9]{1,6})\s*)?", str(text))
    if match is None:
        raise UsageError(f"size '{text}' is not a size", hint="Write 256, or HEIGHTxWIDTH such as 320x512.")
    height = int(match[1])
    width = int(match[2] or match[1])
    if not all(_SMALLEST <= side <= _LARGEST for side in (height, width)):
        raise UsageError(f"size '{text}' is out of range: each side must be {_SMALLEST} to {_LARGEST} pixels")
    return height, width


def read_image(path: Path | str, max_pixels: int = MAX_PIXELS) -> Array:
    """Read the first frame of an image as RGB, upright.

    Grey becomes three equal channels. Transparent pixels are composited on white, because the colour stored
    under them is undefined. EXIF rotation is applied, colour profiles are not. Grey images deeper than 8 bit
    keep their depth: 16-bit values are divided by 65535 whatever their content, so that the scale is the same
    for every image (a 12-bit camera should write left-aligned values); floating-point images must lie in
    [0, 1]. Colour images with 16 bits a channel are read at 8 bits.

    Args:
        path: the file; PNG, JPEG, BMP, TIFF, WEBP, GIF, PPM or JPEG 2000, told by content, not by suffix; or a
            frame of a video (see :mod:`adflow._video`).
        max_pixels: refuse larger images before decoding them (a small file can declare a huge picture).

    Returns:
        [H, W, 3] uint8, or float32 in [0, 1] for images deeper than 8 bit. Of grey images the channels are one
        plane seen three times, read-only: a third of the memory, and :func:`fit_to` resizes it once.

    Raises:
        InputError: missing, empty, truncated, too large, or not an image; the message names the file.
    """
    path = Path(path)
    if is_frame(path):
        return read_frame(path)
    return _decode(path, _rgb, max_pixels)


def read_mask(path: Path | str, index: int | None = None, max_pixels: int = MAX_PIXELS) -> npt.NDArray[np.bool_]:
    """Read a ground-truth mask: True where the defect is.

    An image is turned to grey (transparent = not a defect) and thresholded at > 127 / 255 of the range of its type.
    A losslessly stored one that holds only 0 and 1, in 8 bits or more, is taken as already binary. In a NumPy array
    every non-zero entry is defect.

    Args:
        path: an image, or a ``.npy`` array [H, W] or [T, H, W], which is memory-mapped.
        index: the frame of a [T, H, W] array, counted from 0.
        max_pixels: refuse larger images.

    Returns:
        [H, W] bool.

    Raises:
        InputError: unreadable, or no such frame; the message names the file.
    """
    path = Path(path)
    if path.suffix.lower() == ".npy":
        return _npy_mask(path, index)
    if index is not None:
        raise InputError(f"{show(path)} is a single picture: frame {index} of it cannot be read as a mask")
    return _decode(path, _binary, max_pixels)


def fit_to(image: Array, size: Size, keep_aspect: bool = False) -> tuple[npt.NDArray[np.float32], Box]:
    """Bring an image to the network's input size by antialiased bilinear resampling.

    Args:
        image: [H, W, 3] uint8, or float in [0, 1], as :func:`read_image` gives it.
        size: (height, width) wanted.
        keep_aspect: keep the aspect ratio: the image is centred, and its edge pixels fill the rest.

    Returns:
        [3, height, width] float32 in [0, 1], and the box in which the image itself lies.
    """
    box = fitted(image.shape[:2], size, keep_aspect)
    inner = (box.width, box.height)  # Pillow counts width first
    grey = image.strides[2] == 0
    if image.dtype == np.uint8:
        picture = Image.fromarray(image[..., 0] if grey else image)
        small = np.asarray(_resized(picture, inner)).reshape(box.height, box.width, -1)
        planes = np.ascontiguousarray(small.transpose(2, 0, 1), dtype=np.float32)
        planes /= np.float32(255)
    else:
        channels = [Image.fromarray(np.ascontiguousarray(image[..., c], dtype=np.float32)) for c in range(3 - 2 * grey)]
        planes = np.stack([np.asarray(_resized(c, inner)) for c in channels])
        planes = np.clip(planes, 0, 1, out=planes)
    if (box.height, box.width) != tuple(size):
        planes = np.pad(planes, [(0, 0), *_borders(box, size)], mode="edge")
    return np.ascontiguousarray(np.broadcast_to(planes, (3, *size)) if grey else planes), box


def _resized(image: Image.Image, size: Size) -> Image.Image:
    """Resize to (width, height), columns first: Pillow 13 orders them by the shape, and each order rounds anew."""
    columns = image.resize((size[0], image.height), Image.Resampling.BILINEAR)
    return columns.resize(size, Image.Resampling.BILINEAR)


def mask_to(mask: Array, size: Size, keep_aspect: bool = False) -> npt.NDArray[np.bool_]:
    """Bring a mask to the network's input size, with the geometry of :func:`fit_to`.

    The mask is averaged over the area of each new pixel and set where at least half of that area is defect. A
    defect that fills no new pixel by half disappears: compare ``mask.any()`` before and after.

    Args:
        mask: [H, W] bool.
        size: (height, width) wanted.
        keep_aspect: as in :func:`fit_to`; the border around the image is not defect.

    Returns:
        [height, width] bool.
    """
    box = fitted(mask.shape[:2], size, keep_aspect)
    area = Image.fromarray(np.asarray(mask, dtype=np.float32)).resize((box.width, box.height), Image.Resampling.BOX)
    # Weights such as 1/6 are rounded to float32: an exact half may come out a few 1e-7 below 0.5.
    inside = np.asarray(area) >= 0.5 - 1e-5
    return np.pad(inside, _borders(box, size), mode="constant", constant_values=False)


def restore(array: Array, box: Box, original: Size, order: int = 1) -> Array:
    """Bring a map or mask from the network's input back onto the original image.

    Args:
        array: [H, W] at network input size.
        box: what :func:`fit_to` returned.
        original: (height, width) of the image as read.
        order: 1 for bilinear (maps; float32 out), 0 for nearest (masks and labels; type kept).

    Returns:
        [original height, original width].
    """
    inside = array[box.top : box.top + box.height, box.left : box.left + box.width]
    if order == 0:
        rows, columns = (
            np.minimum((np.arange(to) + 0.5) * have / to, have - 1).astype(np.intp)
            for to, have in zip(original, inside.shape, strict=True)
        )
        return np.asarray(inside[rows[:, None], columns[None, :]])
    plane = Image.fromarray(np.ascontiguousarray(inside, dtype=np.float32))
    return np.array(plane.resize((original[1], original[0]), Image.Resampling.BILINEAR))


def fitted(have: Size | tuple[int, ...], size: Size, keep_aspect: bool) -> Box:
    """Return where an image of size ``have`` lies inside an input of size ``size``."""
    height, width = size
    if not keep_aspect:
        return Box(0, 0, height, width)
    scale = min(height / have[0], width / have[1])
    inner_height = min(height, max(1, round(have[0] * scale)))
    inner_width = min(width, max(1, round(have[1] * scale)))
    return Box((height - inner_height) // 2, (width - inner_width) // 2, inner_height, inner_width)


def upsample(maps: Tensor, size: Size, sigma: float, matrices: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Enlarge maps bilinearly, then smooth them with a Gaussian: two matrix products a map.

    Both steps are linear and separable, so ``out = R @ map @ C.T`` with ``R = G_H U_H`` and ``C = G_W U_W``.
    On the CPU each map is multiplied on its own: a batched product may be blocked differently, and the last
    bit of a map would depend on its neighbours. While a graph is being exported the batched product is used.

    Args:
        maps: [B, h, w].
        size: (H, W) wanted.
        sigma: standard deviation of the Gaussian in pixels of the output; 0 for none. The kernel reaches
            ``int(4 sigma + 0.5)`` pixels; borders are reflected, the edge pixel repeated (as scipy does).
        matrices: what :func:`upsample_matrices` gives for this grid, to build them once instead of a call.

    Returns:
        [B, H, W] float32 (float64 for float64 maps).
    """
    import torch

    from adflow._nets import exporting

    with stage("upsample"):
        if maps.dtype != torch.float64:
            maps = maps.float()
        if matrices is None:
            matrices = upsample_matrices((maps.shape[-2], maps.shape[-1]), size, sigma, like=maps)
        rows, columns = (matrix.to(maps) for matrix in matrices)
        if exporting() or maps.device.type != "cpu" or not len(maps):
            return torch.matmul(torch.matmul(rows, maps), columns.mT)
        # A fresh copy starts on an allocator boundary: matrix kernels may choose their path by the address.
        return torch.stack([rows @ one.clone(memory_format=torch.contiguous_format) @ columns.mT for one in maps])


def upsample_matrices(grid: Size, size: Size, sigma: float, like: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return R [H, h] and C [W, w] of :func:`upsample`, on the device and in the type of ``like``."""
    import torch

    pair = [torch.from_numpy(_way(int(have), int(to), sigma)) for have, to in zip(grid, size, strict=True)]
    rows, columns = (matrix.float() if like is None else matrix.to(like) for matrix in pair)
    return rows, columns


def _decode(path: Path, convert: Callable[[Image.Image], T], max_pixels: int) -> T:
    """Open ``path`` and return ``convert(image)``; whatever goes wrong is one InputError naming the file."""
    try:
        if path.stat().st_size == 0:
            raise InputError(f"{show(path)} is empty (0 bytes), expected an image")
        with Image.open(path, formats=_FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise InputError(
                    f"{show(path)} declares {image.width} x {image.height} pixels, more than the limit of "
                    f"{max_pixels / 1e6:.0f} megapixels",
                    hint="Make it smaller first, or cut it into parts.",
                )
            if image.format == "BMP" and image.mode == "1":
                return convert(_two_colours(path, image))
            ImageOps.exif_transpose(image, in_place=True)  # a copy would forget the format
            return convert(image)
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"{show(path)} declares more pixels than can be read safely: {error}") from error
    except MemoryError as error:
        raise InputError(
            f"{show(path)} is larger than the free memory holds", hint="Scale it down, or try --workers 1."
        ) from error
    except OSError as error:
        reason = error.strerror or (
            "not an image of a kind that can be read" if "cannot identify" in str(error) else str(error)
        )
        raise InputError(f"cannot read {show(path)}: {reason}") from error
    except Exception as error:
        # Pillow's decoders let through whatever their parsers met: struct.error, SyntaxError, zlib.error...
        raise InputError(f"cannot read {show(path)}: damaged image ({type(error).__name__}: {error})") from error


def _two_colours(path: Path, image: Image.Image) -> Image.Image:
    """Return a BMP that Pillow takes for one bit a pixel, decoded with the bits it really has.

    A palette of black and white alone makes Pillow (seen in 13.0) unpack 4- and 8-bit pixels as single bits:
    a mask saved that way comes out empty. With a palette that is not quite white it goes the right way.
    """
    content = bytearray(path.read_bytes())
    header, bits = int.from_bytes(content[14:18], "little"), int.from_bytes(content[28:30], "little")
    if header < 40 or bits == 1:
        return image
    content[14 + header + 4] = 254  # blue of the second colour
    mended = Image.open(io.BytesIO(content), formats=("BMP",))
    indices = np.asarray(mended.convert("RGB"))[..., 0]
    return Image.fromarray(indices)


def _rgb(image: Image.Image) -> Array:
    """Return [H, W, 3] uint8, or float32 in [0, 1] for deep grey images."""
    if image.mode.startswith("I") or image.mode == "F":
        return _thrice(_deep(image))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return _thrice(np.array(image)) if image.mode == "L" else np.array(image.convert("RGB"))


def _thrice(grey: Array) -> Array:
    """Return [H, W] as [H, W, 3] without copying it; stride 0 is how :func:`fit_to` knows grey."""
    return np.broadcast_to(grey[:, :, None], (*grey.shape, 3))


def _deep(image: Image.Image) -> npt.NDArray[np.float32]:
    """Return a grey image of 16 or 32 bits as float32 in [0, 1]."""
    values = np.asarray(image)
    if image.mode == "F":
        low, high, top, what = values.min(), values.max(), 1.0, "floating-point"
    else:
        low, high, top, what = values.min(), values.max(), 65535.0, "integer"
    if not (low >= 0 and high <= top):  # false for NaN too
        raise InputError(
            f"{show(_path_of(image))}: {what} values from {low} to {high}, expected 0 to {top:g}",
            hint="Rescale the images in one way for the whole data set, and save them as 8- or 16-bit.",
        )
    return (values / top).astype(np.float32)


def _binary(image: Image.Image) -> npt.NDArray[np.bool_]:
    """Return [H, W] bool from a mask picture."""
    if image.mode.startswith("I") or image.mode == "F":
        deep = _deep(image)
        binary = image.mode != "F" and np.asarray(image).max() == 1
        return np.asarray(deep > (0 if binary else 127 / 255))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "black"), layer)
    grey = np.asarray(image.convert("L"))
    # JPEG is left out: its noise around black also has a maximum of 1.
    if grey.max(initial=0) == 1 and image.format not in ("JPEG", "MPO"):
        return np.asarray(grey == 1)
    return np.asarray(grey > 127)


def _npy_mask(path: Path, index: int | None) -> npt.NDArray[np.bool_]:
    try:
        stack = np.lib.format.open_memmap(path, mode="r")  # not np.load: that opens archives, too
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot read {show(path)}: {reason}") from error
    if stack.ndim == 3 and index is not None and 0 <= index < len(stack):
        return np.asarray(stack[index] != 0)
    if stack.ndim == 2 and index is None:
        return np.asarray(stack != 0)
    asked = "no frame number" if index is None else f"frame {index}"
    raise InputError(f"{show(path)} is an array of shape {stack.shape}: {asked} given, expected [T, H, W] and 0..T-1")


def _borders(box: Box, size: Size) -> list[tuple[int, int]]:
    return [(box.top, size[0] - box.top - box.height), (box.left, size[1] - box.left - box.width)]


@lru_cache(maxsize=16)
def _way(have: int, to: int, sigma: float) -> npt.NDArray[np.float64]:
    """Return enlarging and smoothing as one matrix [to, have]; kept, because every image takes the same."""
    return _smooth(to, sigma) @ _enlarge(have, to)


def _enlarge(have: int, to: int) -> npt.NDArray[np.float64]:
    """Bilinear interpolation as a matrix [to, have], half-pixel centres, clamped at the ends."""
    centre = np.clip((np.arange(to) + 0.5) * have / to - 0.5, 0, have - 1)
    low = np.minimum(centre.astype(np.intp), max(have - 2, 0))
    weight = centre - low
    matrix = np.zeros((to, have))
    rows = np.arange(to)
    matrix[rows, low] = 1 - weight
    matrix[rows, np.minimum(low + 1, have - 1)] += weight
    return matrix


def _smooth(length: int, sigma: float) -> npt.NDArray[np.float64]:
    """Gaussian smoothing as a matrix [length, length], borders reflected."""
    if sigma <= 0:
        return np.eye(length)
    reach = int(4 * sigma + 0.5)  # the tail beyond 4 sigma weighs 6e-5
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    source = np.pad(np.arange(length), reach, mode="symmetric") if length > 1 else np.zeros(2 * reach + 1, np.intp)
    matrix = np.zeros((length, length))
    for offset, weight in enumerate(kernel):
        np.add.at(matrix, (np.arange(length), source[offset : offset + length]), weight)
    return matrix


def _path_of(image: Image.Image) -> str:
    return str(getattr(image, "filename", "") or "image")


def show(path: Path | str) -> str:
    r"""Name a file in one line, whatever characters its name holds.

    >>> show("a b.png"), show("new\nline.png")
    ('a b.png', "'new\\nline.png'")
    """
    text = str(path)
    return text if text.isprintable() else ascii(text)
