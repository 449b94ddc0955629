"""Regions of a score map, and how their number grows as the threshold falls."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from adflow._maxtree import count_records, own_peaks
from adflow.errors import InputError

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Region:
    """One detected region of a map.

    Attributes:
        top: first row.
        left: first column.
        crop: [height, width] bool, the region inside its bounding box.
        shape: (H, W) of the map.
        area: number of pixels.
        peak: highest score inside.
        log10_nfa: log10 of its number of false alarms, below 0 = less than one expected per good image; None
            when nothing is known about good images.
    """

    top: int
    left: int
    crop: npt.NDArray[np.bool_]
    shape: tuple[int, int]
    area: int
    peak: float
    log10_nfa: float | None

    @property
    def bbox(self) -> tuple[int, int, int, int]:
        """Return (top, left, bottom, right) in pixels; bottom and right lie just outside."""
        return self.top, self.left, self.top + self.crop.shape[0], self.left + self.crop.shape[1]

    @property
    def mask(self) -> npt.NDArray[np.bool_]:
        """Return the region on the whole map, [H, W] bool."""
        full = np.zeros(self.shape, dtype=bool)
        top, left, bottom, right = self.bbox
        full[top:bottom, left:right] = self.crop
        return full

    def contours(self) -> list[npt.NDArray[np.float64]]:
        """Return closed outlines [K, 2] as (y, x), longest first, holes included.

        Pixel centres are whole numbers.
        """
        from skimage import measure

        find: Any = measure.find_contours
        padded = np.pad(self.crop.astype(np.float64), 1)
        outlines = [outline + np.array([self.top - 1, self.left - 1]) for outline in find(padded, 0.5)]
        return sorted(outlines, key=len, reverse=True)

    @property
    def contour(self) -> npt.NDArray[np.float64]:
        """Return the longest outline, [K, 2] as (y, x)."""
        return self.contours()[0]


def find_regions(
    score: Array, mask: npt.NDArray[np.bool_], log10_nfa: Callable[[Array], Array] | None = None
) -> list[Region]:
    """Return the 4-connected regions of ``mask``, highest peak first.

    Args:
        score: [H, W], higher = more anomalous.
        mask: [H, W] bool.
        log10_nfa: peaks [K] to log10 NFA [K], or None.
    """
    from scipy import ndimage

    labels, count = ndimage.label(mask)
    if count == 0:
        return []
    peaks = np.asarray(ndimage.maximum(score, labels, np.arange(1, count + 1)), dtype=np.float64)
    known = [None] * count if log10_nfa is None else [float(v) for v in log10_nfa(peaks)]
    found = []
    for index, (rows, columns) in enumerate(ndimage.find_objects(labels)):
        crop = labels[rows, columns] == index + 1
        peak = float(peaks[index])
        found.append(Region(rows.start, columns.start, crop, mask.shape, int(crop.sum()), peak, known[index]))
    return sorted(found, key=lambda region: -region.peak)


def plain_regions(
    score: Array, threshold: float, *, log10_nfa: Callable[[Array], Array] | None = None
) -> tuple[npt.NDArray[np.bool_], list[Region]]:
    """Return mask [H, W] and regions of {score > threshold}.

    Args:
        score: [H, W], higher = more anomalous.
        threshold: a level of the map.
        log10_nfa: peaks to log10 NFA, or None.

    Raises:
        InputError: not a map, NaN scores, or a threshold that is NaN.
    """
    score = _checked(score, threshold)
    mask: npt.NDArray[np.bool_] = score > threshold
    return mask, find_regions(score, mask, log10_nfa)


def outlined_regions(
    score: Array,
    threshold: float,
    outline: Callable[[Array], Array],
    *,
    log10_nfa: Callable[[Array], Array] | None = None,
) -> tuple[npt.NDArray[np.bool_], list[Region]]:
    """Return mask [H, W] and regions: every peak above ``threshold`` inside the outline that its height gives it.

    The outline of a peak is the component of {score >= outline(peak)} around it; where that runs into a higher peak,
    it ends above the saddle between the two. There are never more outlines than {score > t} has components at some
    t >= threshold: surplus ones, the lowest, are dropped. So what was promised of the number of components holds for
    the outlines.

    Args:
        score: [H, W], higher = more anomalous.
        threshold: peaks must be higher.
        outline: peaks to levels: not above the peak, rising with it.
        log10_nfa: peaks to log10 NFA, or None.

    Raises:
        InputError: not a map, NaN scores, or a threshold that is NaN.
    """
    from scipy import ndimage

    score = _checked(score, threshold)
    mask = np.zeros(score.shape, dtype=bool)
    if not (score > threshold).any():
        return mask, []
    flat, levels, peaks, counts = own_peaks(score, float(outline(np.array([threshold]))[0]))
    mask.ravel()[flat[levels >= outline(peaks.astype(np.float64))]] = True
    last = np.append(levels[1:] != levels[:-1], True) & (levels > threshold)
    labels, count = ndimage.label(mask)
    highest = ndimage.maximum(score, labels, np.arange(1, count + 1))
    kept = np.argsort(-highest, kind="stable")[: min(int((highest > threshold).sum()), int(counts[last].max()))]
    mask = np.isin(labels, kept + 1)
    return mask, find_regions(score, mask, log10_nfa)


def _checked(score: Array, threshold: float) -> Array:
    score = np.asarray(score)
    if score.ndim != 2 or score.size == 0 or np.isnan(score).any():
        raise InputError(f"a score map of shape {list(score.shape)} cannot be cut, expected [H, W] without NaN")
    if math.isnan(threshold):
        raise InputError("the threshold is NaN, expected a score level")
    return score


def count_curve(score: Array, max_count: int = 256) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Return the monotone region count of a map as (levels descending, counts increasing).

    C(t) = max over t' >= t of the number of 4-connected components of {score > t'}: the last count whose
    level is above t, 0 when there is none. (Components merge as t falls, so the plain count is not monotone.)

    Args:
        score: [H, W] float32, finite.
        max_count: the list ends after the first count above this.

    Raises:
        InputError: not a map, or NaN or infinite scores.
    """
    score = np.asarray(score, dtype=np.float32)
    if score.ndim != 2 or score.size == 0:
        raise InputError(f"a score map has shape {list(score.shape)}, expected [H, W]")
    if not np.isfinite(score).all():
        raise InputError("a score map holds NaN or infinite values, expected finite ones")
    levels, counts = count_records(score, max_count)
    return levels.astype(np.float32), counts.astype(np.int64)


@dataclass(frozen=True)
class Curves:
    """Count curves of all images as one list of steps, highest level first.

    Attributes:
        level: [K] float64, distinct, descending.
        total: [K] sum over the images of C_i(t) for t just below the level.
        largest: [K] maximum over the images.
        flagged: [K] number of images with any region.
    """

    level: Array
    total: Array
    largest: Array
    flagged: Array

    def at(self, t: Array) -> Curves:
        """Return the curves at thresholds t, in their order."""
        t = np.asarray(t, dtype=np.float64)
        k = np.searchsorted(-self.level, -t, side="left")
        total, largest, flagged = (np.append(0, part)[k] for part in (self.total, self.largest, self.flagged))
        return Curves(t, total, largest, flagged)

    def nfa(self, n: int) -> Array:
        """Return the NFA [K] that the curves of ``n`` held-out images give: see :mod:`adflow.calibration`."""
        nfa: Array = (self.total + np.maximum(1, self.largest)) / (n + 1)
        return nfa


def add_curves(levels: Array, counts: Array, owner: Array) -> Curves:
    """Add up count curves given as steps (level, count, image) sorted within each image."""
    first = np.ones(len(owner), dtype=bool)
    first[1:] = owner[1:] != owner[:-1]
    gain = np.diff(counts, prepend=0)
    gain[first] = counts[first]
    order = np.argsort(-levels.astype(np.float64), kind="stable")
    level = levels[order].astype(np.float64)
    last = np.append(level[1:] != level[:-1], True) if len(level) else np.zeros(0, dtype=bool)
    total, largest = np.cumsum(gain[order]), np.maximum.accumulate(counts[order])
    return Curves(level[last], total[last], largest[last], np.cumsum(first[order])[last])


def lowest_level(curves: Curves, risk: Array, wish: float) -> float | None:
    """Return the smallest level at which, and above which, ``risk`` (just below each level) keeps the wish.

    ``risk[k]`` holds for t in [level[k + 1], level[k]), so the answer is level[k] of the first k that breaks it.
    None: it is never broken.
    """
    broken = np.flatnonzero(risk > wish * (1 + 1e-12))
    return float(curves.level[broken[0]]) if len(broken) else None
