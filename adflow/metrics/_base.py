"""What every metric shares: checked maps and masks, their regions, an order-keeping integer code of floats.

Vocabulary of all metric modules: a *map* [H, W] holds one score per pixel, higher = more anomalous; a *mask*
[H, W] is true on defective pixels; a pixel is *positive* on the mask and *negative* off it; a *region* is an
8-connected component of a mask, labelled at the size at which it is compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from adflow.errors import InputError

Array: TypeAlias = npt.NDArray[Any]
Floats: TypeAlias = npt.NDArray[np.float64]
Bools: TypeAlias = npt.NDArray[np.bool_]
Maps: TypeAlias = Array | Sequence[Array]
"""One array [N, H, W], or a sequence of N arrays [H, W] whose sizes may differ from image to image."""
Masks: TypeAlias = Array | Sequence[Array | None]
"""As ``Maps``, of bool or of 0 and 1; ``None`` stands for the mask of a normal image."""

_EIGHT = np.ones((3, 3), dtype=np.int8)


@dataclass(frozen=True)
class Curve:
    """Points exactly on a curve, x ascending.

    Attributes:
        x: [N] false-positive rate.
        y: [N] true-positive rate (ROC), or mean overlap of the regions (PRO).
        threshold: [N] scores at or above this are called anomalous; inf at the start, NaN where interpolated.
    """

    x: Floats
    y: Floats
    threshold: Floats


@dataclass(frozen=True)
class Regions:
    """The K regions of all masks, in the order of the images.

    Attributes:
        image: [K] index of the image.
        area: [K] pixels.
        aupro: [K] AUPRO of this region alone; their mean is the AUPRO. NaN without a normal pixel.
    """

    image: npt.NDArray[np.int64]
    area: npt.NDArray[np.int64]
    aupro: Floats


@dataclass(frozen=True)
class PixelMetrics:
    """Pixel metrics of one class; higher is better.

    Attributes:
        auroc: area under the ROC curve of all pixels, in [0, 1].
        ap: average precision of all pixels, in [0, 1].
        f1_max: the best F1 over all thresholds (chosen on these very masks), in [0, 1].
        f1_threshold: the threshold that gives it, ``score >= f1_threshold``; the lowest of equals.
        aupro: mean overlap of the regions up to the false-positive rate ``limit``, in [0, 1].
        limit: the highest false-positive rate that AUPRO looks at.
        n_images: number of images.
        n_pixels: number of pixels.
        n_positive: number of pixels on a mask.
        n_regions: number of regions K.
        size: (height, width) of all maps, None when they differ.
        regions: the regions one by one; None from ``StreamingPixelMetrics``.
        roc: thinned ROC curve, when asked for.
        pro: thinned PRO curve up to ``limit``, when asked for.
        bounds: for each metric how far it can lie from the exact one; empty when the metrics are exact.
        reasons: for each metric that is NaN, why.
    """

    auroc: float
    ap: float
    f1_max: float
    f1_threshold: float
    aupro: float
    limit: float
    n_images: int
    n_pixels: int
    n_positive: int
    n_regions: int
    size: tuple[int, int] | None
    regions: Regions | None = None
    roc: Curve | None = None
    pro: Curve | None = None
    bounds: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ImageMetrics:
    """Image metrics of one class, attributes as in ``PixelMetrics`` with images in place of pixels."""

    auroc: float
    ap: float
    f1_max: float
    f1_threshold: float
    n_images: int
    n_anomalous: int
    reasons: dict[str, str] = field(default_factory=dict)


def as_map(array: Array, name: str = "map") -> Array:
    """Return ``array`` as a real-valued [H, W] array.

    float32, float64 and bool stay as they are; half precision and small integers become float32 and wider
    integers float64, which keeps the order of the values.

    Raises:
        InputError: not two-dimensional, empty, or not of real numbers.
    """
    array = np.asarray(array)
    if array.ndim != 2 or array.size == 0:
        raise InputError(f"{name} has shape {array.shape}, expected [height, width] with at least one pixel")
    if array.dtype == np.bool_ or array.dtype in (np.float32, np.float64):
        return array
    if array.dtype.kind not in "iuf":
        raise InputError(f"{name} is of type {array.dtype}, expected real numbers")
    small = array.dtype == np.float16 or (array.dtype.kind in "iu" and array.dtype.itemsize <= 2)
    return array.astype(np.float32 if small else np.float64)


def as_mask(array: Array | None, shape: tuple[int, ...], name: str = "mask") -> Bools:
    """Return ``array`` as bool of ``shape``; ``None`` is a mask without a defect.

    Raises:
        InputError: another shape, or values other than 0 and 1.
    """
    if array is None:
        return np.zeros(shape, dtype=np.bool_)
    array = np.asarray(array)
    if array.shape != shape:
        raise InputError(
            f"{name} has shape {array.shape}, its map has {shape}",
            hint="resize the masks to the maps' size first",
        )
    if array.dtype == np.bool_:
        return array
    if array.dtype.kind not in "iuf" or not np.all((array == 0) | (array == 1)):
        raise InputError(f"{name} of type {array.dtype} holds values other than 0 and 1", hint="pass mask > 0")
    return array.astype(np.bool_)


def check_lengths(maps: Maps, masks: Masks) -> int:
    """Return how many images there are.

    Raises:
        InputError: none at all, or not one mask for each map.
    """
    if len(maps) != len(masks):
        raise InputError(f"{len(maps)} maps but {len(masks)} masks, expected one mask (or None) for each map")
    if len(maps) == 0:
        raise InputError("no maps at all, expected at least one")
    return len(maps)


def pairs(maps: Maps, masks: Masks) -> Iterator[tuple[Array, Bools]]:
    """Yield each map with its mask, both checked; one image is held at a time."""
    check_lengths(maps, masks)
    for i, (one, mask) in enumerate(zip(maps, masks, strict=True)):
        scores = as_map(one, f"map {i}")
        yield scores, as_mask(mask, scores.shape, f"mask {i}")


def not_finite(name: str) -> InputError:
    """Return the error for scores that hold NaN or infinity."""
    return InputError(
        f"{name} holds NaN or infinite scores, expected finite numbers",
        hint="find the image with numpy.isfinite(map).all(); fit a detector that gives NaN again",
    )


def as_scores(scores: Array | Sequence[float], name: str = "scores") -> Array:
    """Return finite scores [N] as float32 or float64.

    Raises:
        InputError: not one-dimensional, empty, not real, NaN or infinite.
    """
    array = np.asarray(scores)
    if array.ndim != 1 or array.size == 0:
        raise InputError(f"{name} have shape {array.shape}, expected one number for each image")
    if array.dtype.kind not in "biuf":
        raise InputError(f"{name} are of type {array.dtype}, expected real numbers")
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise not_finite(name)
    return array


def as_labels(labels: Array | Sequence[int | bool], n: int) -> Bools:
    """Return ``n`` labels as bool, true = anomalous.

    Raises:
        InputError: another number of labels, or values other than 0 and 1.
    """
    array = np.asarray(labels)
    if array.shape != (n,):
        raise InputError(f"labels have shape {array.shape}, expected ({n},): one for each image")
    if array.dtype.kind not in "biuf" or not np.all((array == 0) | (array == 1)):
        raise InputError(
            "labels hold values other than 0 (normal) and 1 (anomalous)",
            hint="leave out the images without a label",
        )
    return array.astype(np.bool_)


def regions(mask: Bools) -> tuple[tuple[slice, slice], npt.NDArray[np.int32], int]:
    """Label the 8-connected regions of ``mask`` [H, W].

    Returns:
        the bounding box of all regions; the labels inside it [h, w], 0 = normal, 1..K; and K. Only the box is
        labelled because defects are small and labelling the whole image would cost more than sorting it.
    """
    from scipy import ndimage

    rows = np.flatnonzero(mask.any(axis=1))
    if rows.size == 0:
        return (slice(0, 0), slice(0, 0)), np.zeros((0, 0), np.int32), 0
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    columns = np.flatnonzero(mask[top:bottom].any(axis=0))
    box = slice(top, bottom), slice(int(columns[0]), int(columns[-1]) + 1)
    labels, count = ndimage.label(mask[box], structure=_EIGHT)
    return box, labels, int(count)


def ordered_code(scores: Array) -> npt.NDArray[np.uint32]:
    """Return the uint32 code of float32 ``scores`` that sorts as the scores do; -0.0 and 0.0 share one code.

    IEEE 754 floats sort as sign-and-magnitude integers: set the sign bit of the positive, flip all bits of
    the negative (Herf, "Radix Tricks", 2001, http://stereopsis.com/radix.html).
    """
    bits = (scores + np.float32(0)).view(np.uint32)  # adding zero turns -0.0 into 0.0, which must tie
    sign = bits >> np.uint32(31)
    bits ^= np.uint32(0) - sign | np.uint32(0x80000000)
    return bits


def decoded(code: npt.NDArray[np.uint32]) -> npt.NDArray[np.float32]:
    """Return the float32 scores of ``ordered_code``."""
    sign = code >> np.uint32(31)
    bits: npt.NDArray[np.uint32] = code ^ (sign - np.uint32(1) | np.uint32(0x80000000))
    return bits.view(np.float32)


def ramp_area(before: Array, after: Array, limit: float) -> Floats:
    """Area over [0, limit] under steps that rise linearly from 0 at ``before`` to 1 at ``after``.

    Every ranking area is a mean of such steps, one for each positive pixel: ``before`` is the false-positive
    rate just above the pixel's score, ``after`` the one with the negatives of the same score counted in. With
    limit 1 this is 1 - (before + after) / 2, the pixel's share of the AUROC; a tie that straddles the limit
    is cut there, which is the linear interpolation of the official AUPRO.
    """
    a = np.minimum(before, limit)
    b = np.minimum(after, limit)
    width = np.asarray(after - before, dtype=np.float64)
    height = np.divide(b - a, width, out=np.ones_like(width), where=width > 0)  # reached at the limit
    area: Floats = (limit - b) + (b - a) * height / 2
    return area


def why_undefined(positive: int, negative: int, n_regions: int, what: str) -> dict[str, str]:
    """Return for each metric without a value why, given the counts of positives and negatives."""
    reasons = {}
    if not positive:
        name = "anomalous image" if what == "image" else "pixel on a mask"
        reasons = dict.fromkeys(("auroc", "ap", "f1_max", "aupro"), f"no {name}")
    elif not negative:
        name = "normal image" if what == "image" else "pixel off the masks"
        reasons = dict.fromkeys(("auroc", "aupro"), f"no {name}")
    elif not n_regions:
        reasons = {"aupro": "no region on the masks"}
    return reasons


def check_limit(limit: float) -> None:
    """Raise InputError unless ``limit`` is a false-positive rate in (0, 1]."""
    if not 0 < limit <= 1:
        raise InputError(f"limit is {limit}, expected a false-positive rate in (0, 1]")
