"""AUPRO as two published codes compute it, to compare with their tables only.

Both differ from the official definition (see ``adflow.metrics``) and are not defined on some maps, where they
are NaN as in the originals. Written from the formulas that the codes implement.
"""

from __future__ import annotations

import numpy as np

from adflow.metrics._base import Array, Curve, Floats, Maps, Masks, not_finite, pairs, regions


def cflow_curve(maps: Maps, masks: Masks, steps: int = 1000) -> Curve:
    """Return the curve of CFLOW-AD and DFR at ``steps`` thresholds, linear from the highest score down.

    Calls score > threshold anomalous. The overlap of a region counts hits inside of its holes too but divides
    by its area without them, so a ring can exceed 1. (CFLOW-AD, 2021, https://arxiv.org/abs/2107.12571; DFR,
    2020, https://arxiv.org/abs/2012.07122.)

    Returns:
        false-positive rate and mean overlap at each threshold, in the order of the thresholds; empty without
        a region or a normal pixel.
    """
    from scipy import ndimage

    checked = list(pairs(maps, masks))
    dtype = np.result_type(*{scores.dtype for scores, _ in checked}, np.float32)
    high = max(scores.max() for scores, _ in checked).astype(dtype)
    low = min(scores.min() for scores, _ in checked).astype(dtype)
    if not (np.isfinite(high) and np.isfinite(low)):
        raise not_finite("a map")
    step = (high - low) / dtype.type(steps)
    thresholds = high - np.arange(steps).astype(dtype) * step  # in the maps' precision, as the original
    overlap, n_regions = np.zeros(steps), 0
    normal = []
    for scores, mask in checked:
        normal.append(scores[~mask])
        box, labels, count = regions(mask)
        inside = scores[box]
        for k in range(1, count + 1):
            area = labels == k
            overlap += _above(inside[ndimage.binary_fill_holes(area)], thresholds) / np.count_nonzero(area)
        n_regions += count
    negative = np.concatenate(normal)
    if not n_regions or not negative.size:
        return Curve(np.zeros(0), np.zeros(0), np.zeros(0))
    return Curve(_above(negative, thresholds) / negative.size, overlap / n_regions, thresholds.astype(np.float64))


def aupro_cflow(maps: Maps, masks: Masks, limit: float = 0.3) -> float:
    """Return AUPRO as CFLOW-AD and DFR compute it.

    The points with a rate up to ``limit`` are kept, their rates are stretched to [0, 1], and the trapezoids under them
    are summed: no interpolation at the limit. NaN when all kept points have one rate.
    """
    curve = cflow_curve(maps, masks)
    keep = curve.x <= limit
    x, y = curve.x[keep], curve.y[keep]
    if x.size < 2 or x[-1] == x[0]:
        return np.nan
    return float(np.trapezoid(y, (x - x[0]) / (x[-1] - x[0])))


def aupro_uflow(maps: Maps, masks: Masks, limit: float = 0.3) -> float:
    """Return AUPRO as U-Flow and anomalib compute it.

    Each region has its own ROC curve against the background. The curves are cut at ``limit`` and resampled by
    the *position* of their points to the number of points of the pooled curve below the limit, then rates and
    overlaps are averaged, and the area is divided by the last averaged rate. Scores outside of [0, 1] pass a
    float32 sigmoid first, as in torchmetrics, which makes ties of large ones. (U-Flow, 2022,
    https://arxiv.org/abs/2211.12353, src/aupro.py; anomalib, https://github.com/openvinotoolkit/anomalib,
    metrics/aupro.py.)
    """
    checked = list(pairs(maps, masks))
    if any(scores.min() < 0 or scores.max() > 1 for scores, _ in checked):
        checked = [(_sigmoid(scores), mask) for scores, mask in checked]
    if not all(np.isfinite(scores).all() for scores, _ in checked):
        raise not_finite("a map")
    background = np.sort(np.concatenate([scores[~mask] for scores, mask in checked]))
    defects = []
    for scores, mask in checked:
        box, labels, count = regions(mask)
        defects += [np.sort(scores[box][labels == k]) for k in range(1, count + 1)]
    if not defects or not background.size:
        return np.nan
    pooled, _ = _roc(np.sort(np.concatenate(defects)), background)
    n_points = int(np.count_nonzero(pooled <= limit))
    if n_points < 2:  # one tie group crosses the limit: the original divides 0 by 0
        return np.nan
    x, y = np.zeros(n_points), np.zeros(n_points)
    for scores in defects:
        rate, overlap = _resampled(*_roc(scores, background), n_points, limit)
        x += rate
        y += overlap
    return float(np.trapezoid(y / len(defects), x) / x[-1])


def _above(scores: Array, thresholds: Array) -> Floats:
    """Count the scores above each threshold [T]."""
    return scores.size - np.searchsorted(np.sort(scores), thresholds, side="right").astype(np.float64)


def _sigmoid(scores: Array) -> Array:
    with np.errstate(over="ignore"):
        return (np.float32(1) / (np.float32(1) + np.exp(-scores.astype(np.float32)))).astype(np.float32)


def _roc(positive: Array, negative: Array) -> tuple[Floats, Floats]:
    """Return the rates (false, true) at every distinct score, from (0, 0) on; both arguments ascending."""
    levels = np.unique(np.concatenate([positive, negative]))[::-1]
    false = negative.size - np.searchsorted(negative, levels)
    true = positive.size - np.searchsorted(positive, levels)
    return np.append(0.0, false / negative.size), np.append(0.0, true / positive.size)


def _resampled(x: Floats, y: Floats, n_points: int, limit: float) -> tuple[Floats, Floats]:
    """Cut a ROC curve at ``limit`` and resample it to ``n_points``, evenly by position along the curve."""
    kept = int(np.count_nonzero(x <= limit))
    if x[kept - 1] == 0:  # no rate between 0 and the limit: go on to the next higher one
        kept = int(np.count_nonzero(x <= x[kept]))
    last = float(n_points - 1)
    target = np.arange(n_points, dtype=np.float64)
    if np.isclose(x[kept - 1], limit) or kept == x.size:
        position = np.arange(kept) * (last / max(kept - 1, 1))
    else:  # one more point, and the last target lies between it and the one before, at the limit
        position = np.arange(kept + 1) * (last / kept)
        fraction = (limit - x[kept - 1]) / (x[kept] - x[kept - 1])
        target[-1] = position[-2] + (position[-1] - position[-2]) * fraction
        kept += 1
    return np.interp(target, position, x[:kept]), np.interp(target, position, y[:kept])
