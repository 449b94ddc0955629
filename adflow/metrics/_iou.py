"""Metrics of an operating point: overlap of predicted and true defects, false alarms, thresholds.

Every function that takes ``predictions`` accepts boolean masks (what ``segment`` writes), or score maps with
a ``threshold``: then a pixel is called anomalous where score > threshold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from adflow.errors import InputError, unknown
from adflow.metrics._base import (
    Array,
    Bools,
    Floats,
    Maps,
    Masks,
    as_labels,
    as_map,
    as_mask,
    check_lengths,
    not_finite,
    pairs,
    regions,
)

_EPS = 2.2e-16  # U-Flow (2022, https://arxiv.org/abs/2211.12353), src/miou.py: empty against empty counts 1


@dataclass(frozen=True)
class Operating:
    """A threshold (score > threshold is anomalous) and the metric there; both NaN when not defined."""

    threshold: float
    value: float


@dataclass(frozen=True)
class Overlaps:
    """How much of each of the K true regions is found.

    Attributes:
        image: [K] index of the image.
        area: [K] pixels.
        overlap: [K] share of the region's pixels that are predicted, in [0, 1].
    """

    image: npt.NDArray[np.int64]
    area: npt.NDArray[np.int64]
    overlap: Floats


def iou_per_image(predictions: Maps, masks: Masks, threshold: float | None = None) -> Floats:
    """Return the intersection over union of each image [N], as U-Flow defines it.

    IoU = (|I| + eps) / (|U| + eps) with eps = 2.2e-16: a normal image counts 1 when nothing is predicted and
    practically 0 as soon as one pixel is.
    """
    values = [
        _iou(np.count_nonzero(p & m), np.count_nonzero(p | m)) for p, m in _predicted(predictions, masks, threshold)
    ]
    return np.array(values)


def mean_iou(predictions: Maps, masks: Masks, threshold: float | None = None) -> float:
    """Return the mean of ``iou_per_image``, the normal images included (U-Flow's mIoU).

    An empty prediction already scores the share of normal images: read low values with that floor in mind.
    """
    return float(iou_per_image(predictions, masks, threshold).mean())


def iou_anomalous_only(predictions: Maps, masks: Masks, threshold: float | None = None) -> float:
    """Return the mean of ``iou_per_image`` over the images with a defect; NaN when there is none."""
    chosen = [
        _iou(np.count_nonzero(p & m), np.count_nonzero(p | m))
        for p, m in _predicted(predictions, masks, threshold)
        if m.any()
    ]
    return float(np.mean(chosen)) if chosen else np.nan


def iou_micro(predictions: Maps, masks: Masks, threshold: float | None = None) -> float:
    """Return the IoU of all images' pixels pooled; NaN when nothing is predicted and nothing is there."""
    inter = union = 0
    for p, m in _predicted(predictions, masks, threshold):
        inter += int(np.count_nonzero(p & m))
        union += int(np.count_nonzero(p | m))
    return inter / union if union else np.nan


def iou_curve(maps: Maps, masks: Masks, thresholds: Array | Sequence[float], *, anomalous_only: bool = False) -> Floats:
    """Return the mean IoU at each of the thresholds [T]; all NaN when no image is left to average over.

    One sort for each image, however many thresholds.
    """
    grid = np.asarray(thresholds)
    total, count = np.zeros(grid.shape), 0
    for scores, mask in pairs(maps, masks):
        positive = np.sort(scores[mask])
        if anomalous_only and not positive.size:
            continue
        flat = _sorted_finite(scores)
        predicted = flat.size - np.searchsorted(flat, grid, side="right")
        inter = positive.size - np.searchsorted(positive, grid, side="right")
        total += _iou(inter, predicted + positive.size - inter)
        count += 1
    return total / count if count else np.full(grid.shape, np.nan)


def oracle_threshold(
    maps: Maps,
    masks: Masks,
    thresholds: Array | Sequence[float] | None = None,
    *,
    anomalous_only: bool = False,
) -> Operating:
    """Return the threshold with the best mean IoU on these masks: an upper limit, not an operating point.

    Args:
        maps: score maps.
        masks: their masks.
        thresholds: a grid to choose from (the lowest of equals). None: the exact maximum over all thresholds
            (the highest of equals), in one sort for each image and memory proportional to the positive
            pixels. The mean can only rise where a positive pixel is taken in, so only positive scores, and
            the empty prediction, need be compared.
        anomalous_only: average over images with a defect only.
    """
    if thresholds is not None:
        grid = np.asarray(thresholds)
        curve = iou_curve(maps, masks, grid, anomalous_only=anomalous_only)
        if not curve.size or np.isnan(curve[0]):
            return Operating(np.nan, np.nan)
        best = int(np.argmax(curve))
        return Operating(float(grid[best]), float(curve[best]))
    scores_on_masks = [scores[mask] for scores, mask in pairs(maps, masks)]
    candidates = np.unique(np.concatenate(scores_on_masks))
    rise = np.zeros(candidates.size + 1)  # change of the summed IoU when the threshold falls to below candidate j
    base, count, highest = 0.0, 0, -np.inf
    for one, positive in zip(maps, scores_on_masks, strict=True):
        flat = _sorted_finite(as_map(one))
        highest = max(highest, float(flat[-1]))
        if anomalous_only and not positive.size:
            continue
        count += 1
        base += 0.0 if positive.size else 1.0
        bins = np.searchsorted(candidates, flat, side="right") - 1  # predicted once the threshold is below this one
        touched, pixels = _runs(bins[bins >= 0])
        hits = np.zeros(touched.size, dtype=np.int64)
        on_mask, found = _runs(np.sort(np.searchsorted(candidates, positive)))
        hits[np.searchsorted(touched, on_mask)] = found
        inter, predicted = np.cumsum(hits[::-1]), np.cumsum(pixels[::-1])
        value = _iou(inter, predicted + positive.size - inter)
        rise[touched[::-1]] += np.diff(value, prepend=0.0 if positive.size else 1.0)
    if not count:
        return Operating(np.nan, np.nan)
    summed = base + np.cumsum(rise[::-1])  # first entry: nothing predicted
    best = int(np.argmax(summed))
    if best == 0:
        return Operating(highest, float(summed[0] / count))
    below = np.nextafter(candidates[candidates.size - best], candidates.dtype.type(-np.inf))
    return Operating(float(below), float(summed[best] / count))


def fair_threshold(
    normal_maps: Maps,
    pixels: float = 1.0,
    method: Literal["quantile", "interpolated", "original"] = "quantile",
) -> float:
    """Return the threshold at which normal images show ``pixels`` false pixels an image on average (U-Flow).

    Args:
        normal_maps: score maps of images without a defect.
        pixels: false pixels an image that are allowed.
        method: "quantile": the lowest score that at most so many pixels exceed. "interpolated": linear
            between the points (share at or above a score, score) around the target, inf when the highest
            score alone is too common. "original": as interpolated, on only those points that are corners of
            the curve. That is what U-Flow's code does through scikit-learn's ``roc_curve``; for normal pixels
            alone nearly every point is collinear, so the threshold lands near the maximum and far fewer
            pixels than wished exceed it.

    Raises:
        InputError: no maps, a negative number of pixels, NaN or infinite scores.
    """
    if method not in ("quantile", "interpolated", "original"):
        raise unknown("method", method, ("quantile", "interpolated", "original"))
    if len(normal_maps) == 0 or not pixels >= 0:
        raise InputError(f"got {len(normal_maps)} normal maps and pixels = {pixels}, expected a map and pixels >= 0")
    flats = [as_map(one).reshape(-1) for one in normal_maps]
    scores = np.sort(np.concatenate(flats))
    if not (np.isfinite(scores[0]) and np.isfinite(scores[-1])):
        raise not_finite("a map")
    wanted = pixels * len(flats)  # pixels in all images together
    if method == "quantile":
        allowed = min(int(wanted + 1e-9), scores.size - 1)  # 1e-9: 0.1 * 30 must allow 3
        return float(scores[scores.size - 1 - allowed])
    distinct, first = np.unique(scores, return_index=True)
    exceed = (scores.size - first)[::-1]  # pixels at or above each distinct score, scores descending
    levels = distinct[::-1].astype(np.float64)
    if method == "original" and exceed.size > 2:
        corner = np.concatenate([[True], np.diff(exceed, 2) != 0, [True]])
        exceed, levels = exceed[corner], levels[corner]
    if wanted < exceed[0]:
        return np.inf
    return float(np.interp(wanted, exceed, levels))


def fp_images(predictions: Maps, labels: Array | Sequence[int | bool], threshold: float | None = None) -> float:
    """Return the share of normal images with any detection; lower is better, NaN without normal images."""
    normal = ~as_labels(labels, len(predictions))
    flagged = [bool(_predict(predictions[i], threshold, i).any()) for i in np.flatnonzero(normal).tolist()]
    return float(np.mean(flagged)) if flagged else np.nan


def false_regions(
    predictions: Maps,
    labels: Array | Sequence[int | bool],
    threshold: float | None = None,
    *,
    connectivity: Literal[4, 8] = 4,
) -> float:
    """Return the mean number of detected regions on a normal image; lower is better, NaN without any.

    This is what ``--nfa EPS`` promises to keep at or below EPS. Detected regions are 4-connected by default,
    as in the a contrario literature; true regions of AUPRO are 8-connected.
    """
    from scipy import ndimage

    if connectivity not in (4, 8):
        raise InputError(f"connectivity is {connectivity}, expected 4 or 8")
    structure = ndimage.generate_binary_structure(2, 1 if connectivity == 4 else 2)
    normal = ~as_labels(labels, len(predictions))
    counts = [
        int(ndimage.label(_predict(predictions[i], threshold, i), structure=structure)[1])
        for i in np.flatnonzero(normal).tolist()
    ]
    return float(np.mean(counts)) if counts else np.nan


def hit_rate(maps: Maps, masks: Masks, tolerance: float = 0.0, margin: float = 0.0) -> float:
    """Return the share of defective images whose highest pixel lies on the mask; NaN when there is none.

    It tells whether an image is called defective for the right reason. When several pixels share the highest
    score, the share of them that lies on the mask counts, so a constant map is no hit.

    Args:
        maps: score maps.
        masks: their masks; images without a defect are left out.
        tolerance: pixels (Euclidean) by which the highest pixel may miss the mask.
        margin: share of each side that is left out of the search, as in the detectors' image scores.
    """
    from scipy import ndimage

    if not tolerance >= 0 or not 0 <= margin < 0.5:
        raise InputError(f"tolerance is {tolerance} and margin {margin}, expected >= 0 and a share in [0, 0.5)")
    hits = []
    for scores, mask in pairs(maps, masks):
        if not mask.any():
            continue
        h, w = scores.shape
        dy, dx = int(h * margin), int(w * margin)
        inner = scores[dy : h - dy, dx : w - dx]
        top = inner.max()
        if not np.isfinite(top):
            raise not_finite("a map")
        rows, columns = np.nonzero(inner == top)
        rows, columns = rows + dy, columns + dx
        if tolerance == 0 or mask[rows, columns].all():
            hits.append(float(mask[rows, columns].mean()))
        else:
            away = ndimage.distance_transform_edt(~mask)
            hits.append(float((away[rows, columns] <= tolerance).mean()))
    return float(np.mean(hits)) if hits else np.nan


def region_overlap(predictions: Maps, masks: Masks, threshold: float | None = None) -> Overlaps:
    """Return for each true region the share of its pixels that is predicted; empty without a region."""
    image, area, overlap = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0)]
    for i, (predicted, mask) in enumerate(_predicted(predictions, masks, threshold)):
        box, labels, count = regions(mask)
        sizes = np.bincount(labels.reshape(-1), minlength=count + 1)[1:]
        found = np.bincount(labels[predicted[box]], minlength=count + 1)[1:]
        image.append(np.full(len(sizes), i, dtype=np.int64))
        area.append(sizes)
        overlap.append(found / np.maximum(sizes, 1))
    return Overlaps(np.concatenate(image), np.concatenate(area), np.concatenate(overlap))


def _iou(inter: Any, union: Any) -> Any:
    return (inter + _EPS) / (union + _EPS)


def _runs(values: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the distinct entries of sorted ``values`` and how often each occurs."""
    first = np.flatnonzero(np.diff(values, prepend=-1))
    return values[first], np.diff(np.append(first, values.size))


def _sorted_finite(scores: Array) -> Array:
    flat = np.sort(scores, axis=None)
    if not (np.isfinite(flat[0]) and np.isfinite(flat[-1])):
        raise not_finite("a map")
    return flat


def _predict(one: Array, threshold: float | None, index: int) -> Bools:
    scores = as_map(one, f"prediction {index}")
    if threshold is None:
        return as_mask(scores, scores.shape, f"prediction {index}")
    if np.isnan(threshold) or np.isnan(scores).any():
        raise not_finite("a map, or the threshold,")
    predicted: Bools = scores > threshold
    return predicted


def _predicted(predictions: Maps, masks: Masks, threshold: float | None) -> Iterator[tuple[Bools, Bools]]:
    check_lengths(predictions, masks)
    for i, (one, mask) in enumerate(zip(predictions, masks, strict=True)):
        predicted = _predict(one, threshold, i)
        yield predicted, as_mask(mask, predicted.shape, f"mask {i}")
