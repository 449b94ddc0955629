"""The one sort behind the exact metrics, and the sums over positive pixels that it makes possible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from adflow.metrics._base import (
    Array,
    Curve,
    Floats,
    Maps,
    Masks,
    as_labels,
    as_map,
    as_scores,
    check_lengths,
    decoded,
    not_finite,
    ordered_code,
    pairs,
    ramp_area,
    regions,
)

_BLOCK = 1 << 16  # positives looked up at a time: temporary arrays stay in the cache and below a few MB


class Positives:
    """Scores of the positive pixels, ascending, each with the index of its region.

    float32 scores are kept as one uint64 a pixel, score code above region index: sorting that in place is
    several times faster than an argsort and takes half the memory. float64 scores take the argsort.
    """

    def __init__(self, scores: list[Array], region: list[npt.NDArray[np.int32]], wide: bool) -> None:
        self._keys: npt.NDArray[np.uint64] | None = None
        if wide:
            values = np.concatenate([np.zeros(0), *scores])
            order = np.argsort(values)
            self._values = values[order]
            self._region = np.concatenate([np.zeros(0, np.int32), *region])[order]
            self.size = values.size
        else:
            self._keys = np.empty(sum(len(s) for s in scores), dtype=np.uint64)
            start = 0
            while scores:  # each chunk is dropped once packed
                s, r = scores.pop(), region.pop()
                part = self._keys[start : start + s.size]
                part[:] = ordered_code(s.astype(np.float32, copy=False))
                part <<= np.uint64(32)
                part |= r.astype(np.uint64)
                start += s.size
            self._keys.sort()
            self.size = self._keys.size

    def block(self, start: int, stop: int) -> tuple[Array, npt.NDArray[np.int64]]:
        """Return scores and region indices of the positives ``start`` to ``stop``."""
        if self._keys is None:
            return self._values[start:stop], self._region[start:stop].astype(np.int64)
        keys = self._keys[start:stop]
        region = (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
        return decoded((keys >> np.uint64(32)).astype(np.uint32)), region

    def rank(self, score: Array, side: Literal["left", "right"]) -> npt.NDArray[np.int64]:
        """Return how many positives lie below (left), or at or below (right), each of the scores."""
        if self._keys is None:
            return np.searchsorted(self._values, score, side=side)
        code = ordered_code(np.atleast_1d(score).astype(np.float32)).astype(np.uint64)
        if side == "right":
            code += np.uint64(1)  # no overflow: the highest code belongs to a NaN
        return np.searchsorted(self._keys, code << np.uint64(32)).reshape(np.shape(score))


class Ranked:
    """All scores sorted, and the positive ones sorted with the region each belongs to.

    Attributes:
        everything: [N] all scores, ascending.
        positives: the scores on the masks.
        n_positive: number of positive scores P.
        n_negative: number of the others.
        n_images: number of maps.
        size: (height, width) of all maps, None when they differ.
        area: [K] pixels of each region.
        image: [K] image of each region.
    """

    def __init__(self, maps: Maps, masks: Masks) -> None:
        self.n_images = check_lengths(maps, masks)
        wide = any(as_map(one[:1, :1] if np.ndim(one) == 2 else one).dtype == np.float64 for one in maps)
        scores: list[Array] = []
        region: list[npt.NDArray[np.int32]] = []
        areas, images, shapes, n_regions = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [], 0
        for i, (one, mask) in enumerate(pairs(maps, masks)):
            shapes.append((one.shape[0], one.shape[1]))
            box, labels, count = regions(mask)
            if count:
                label = labels[mask[box]]
                scores.append(one[box][mask[box]])
                region.append(label + np.int32(n_regions - 1))
                areas.append(np.bincount(label, minlength=count + 1)[1:])
                images.append(np.full(count, i, dtype=np.int64))
                n_regions += count
        self.size = shapes[0] if len(set(shapes)) == 1 else None
        self.area = np.concatenate(areas)
        self.image = np.concatenate(images)
        self.positives = Positives(scores, region, wide)  # before the big copy: the peak is then its own memory
        everything = np.empty(sum(h * w for h, w in shapes), dtype=np.float64 if wide else np.float32)
        start = 0
        for one in maps:
            flat = np.asarray(one).reshape(-1)
            everything[start : start + flat.size] = flat
            start += flat.size
        self._finish(everything, "a map")

    @classmethod
    def of_scores(cls, scores: Array | Sequence[float], labels: Array | Sequence[int | bool]) -> Ranked:
        """Rank image scores [N] with labels [N]; the anomalous ones count as one region."""
        self = cls.__new__(cls)
        everything = as_scores(scores).copy()
        positive = as_labels(labels, everything.size)
        count = int(np.count_nonzero(positive))
        self.n_images, self.size = everything.size, None
        self.area = np.full(min(count, 1), count, dtype=np.int64)
        self.image = np.zeros(len(self.area), dtype=np.int64)
        wide = everything.dtype == np.float64
        self.positives = Positives([everything[positive]], [np.zeros(count, np.int32)], wide)
        self._finish(everything, "scores")
        return self

    def _finish(self, everything: Array, name: str) -> None:
        everything.sort()
        if not (np.isfinite(everything[0]) and np.isfinite(everything[-1])):  # NaN sorts to the end
            raise not_finite(name)
        self.everything = everything
        self.n_positive = self.positives.size
        self.n_negative = everything.size - self.n_positive

    def groups(self, start: int, stop: int) -> Groups:
        """Return the distinct scores among the positives ``start`` to ``stop`` with their ranks."""
        values, region = self.positives.block(start, stop)
        first = np.concatenate([[0], np.flatnonzero(values[1:] != values[:-1]) + 1])
        distinct = values[first]
        low = int(np.searchsorted(self.everything, distinct[0], side="left"))
        high = int(np.searchsorted(self.everything, distinct[-1], side="right"))
        # Only the first and the last group can go on outside of this block.
        positive_below = start + first
        positive_below[0] = self.positives.rank(distinct[:1], "left")[0]
        positive_upto = np.append(start + first[1:], self.positives.rank(distinct[-1:], "right")[0])
        near = self.everything[low:high]
        below = low + np.searchsorted(near, distinct, side="left")
        # A second search is needed only where a negative has the score too; the positives are counted.
        upto = below + (positive_upto - positive_below)
        more = upto < self.everything.size
        more[more] = self.everything[upto[more]] == distinct[more]
        upto[more] = low + np.searchsorted(near, distinct[more], side="right")
        return Groups(
            score=distinct,
            n=np.diff(np.append(first, stop - start)),
            region=region,
            true=self.n_positive - positive_below,
            false=(self.everything.size - below) - (self.n_positive - positive_below),
            false_above=(self.everything.size - upto) - (self.n_positive - positive_upto),
        )


class Groups(NamedTuple):
    """Distinct scores [G] among a stretch of the positives, ascending.

    Attributes:
        score: [G] the scores.
        n: [G] positives of the stretch that have it.
        region: [positives of the stretch] region of each.
        true: [G] positives at or above it.
        false: [G] negatives at or above it.
        false_above: [G] negatives above it.
    """

    score: Array
    n: npt.NDArray[np.int64]
    region: npt.NDArray[np.int64]
    true: npt.NDArray[np.int64]
    false: npt.NDArray[np.int64]
    false_above: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sums:
    """AUROC, AP, best F1 with its threshold, and the area up to the limit of each region [K]."""

    auroc: float
    ap: float
    f1: float
    threshold: float
    region: Floats


def accumulate(ranked: Ranked, limit: float) -> Sums:
    """Sum over the positives all that the metrics need; undefined entries are meaningless numbers."""
    positive, negative = ranked.n_positive, max(ranked.n_negative, 1)
    wins2 = 0  # twice the number of pairs that are ranked right, a tie counting half: exact in integers
    precision_sum, best, best_at = 0.0, -1.0, np.nan
    area = np.zeros(len(ranked.area))
    for start in range(0, positive, _BLOCK):
        g = ranked.groups(start, min(start + _BLOCK, positive))
        wins2 += int(np.sum(g.n * (2 * ranked.n_negative - g.false - g.false_above)))
        precision, recall = g.true / (g.true + g.false), g.true / positive
        precision_sum += float(np.sum(g.n * precision))
        f1 = 2 * precision * recall / (precision + recall)
        top = int(np.argmax(f1))
        if f1[top] > best:
            best, best_at = float(f1[top]), float(g.score[top])
        under = ramp_area(g.false_above / negative, g.false / negative, limit)
        area += np.bincount(g.region, weights=np.repeat(under, g.n), minlength=len(area))
    return Sums(
        auroc=wins2 / (2 * positive * negative) if positive else np.nan,
        ap=precision_sum / max(positive, 1),
        f1=best,
        threshold=best_at,
        region=area / np.maximum(ranked.area, 1),
    )


def curves(ranked: Ranked, points: int, limit: float) -> tuple[Curve, Curve]:
    """Return the ROC curve and the PRO curve up to ``limit``, each of at most ``points`` exact points.

    A third of the thresholds are spread evenly over the positives' ranks, which follows the steep part of the
    curves; a third evenly over all ranks up to ``limit``; a third evenly in the logarithm of the rank from
    the top, which shows the low false-positive rates.
    """
    points = max(points, 8)
    n, third = ranked.everything.size, max((points - 4) // 3, 1)
    share = (np.arange(third) + 0.5) / third
    ranks = np.concatenate([n - n**share, n * (1 - limit * share)])
    at = (share * ranked.n_positive).astype(np.int64)
    picks = np.concatenate([ranked.positives.block(int(i), int(i) + 1)[0] for i in at])
    scores = ranked.everything[np.clip(ranks.astype(np.int64), 0, n - 1)]
    thresholds = np.unique(np.concatenate([scores, picks, ranked.everything[[0, -1]]]))  # ascending, distinct
    below = np.searchsorted(ranked.everything, thresholds, side="left")
    positive_below = ranked.positives.rank(thresholds, "left")
    true = ranked.n_positive - positive_below
    false_rate = (n - below - true) / ranked.n_negative
    overlap = _overlap(ranked, positive_below)

    def descending(values: Array, start: float) -> Floats:
        return np.concatenate([[start], values[::-1]]).astype(np.float64)

    x, t = descending(false_rate, 0.0), descending(thresholds, np.inf)
    roc = Curve(x, descending(true / ranked.n_positive, 0.0), t)
    return roc, _cut(Curve(x, descending(overlap, 0.0), t), ranked, limit)


def _overlap(ranked: Ranked, positive_below: npt.NDArray[np.int64]) -> Floats:
    """Return the mean overlap of the regions [T], the lowest ``positive_below`` [T] positives left out."""
    weight = 1 / (ranked.area * len(ranked.area))
    sums = np.zeros(len(positive_below) + 1)  # sums[j]: weight of the positives that the first j thresholds include
    for start in range(0, ranked.n_positive, _BLOCK):
        stop = min(start + _BLOCK, ranked.n_positive)
        _, region = ranked.positives.block(start, stop)
        included = np.searchsorted(positive_below, np.arange(start, stop), side="right")
        sums += np.bincount(included, weights=weight[region], minlength=len(sums))
    total: Floats = np.cumsum(sums[::-1])[::-1][1:]
    return np.minimum(total, 1.0)


def _cut(curve: Curve, ranked: Ranked, limit: float) -> Curve:
    """Cut a PRO curve at ``limit``, ending on the exact point there."""
    keep = int(np.searchsorted(curve.x, limit, side="right"))
    if keep == len(curve.x) or curve.x[keep - 1] == limit:
        return Curve(curve.x[:keep], curve.y[:keep], curve.threshold[:keep])
    # The thinned points beside the limit need not be neighbours on the curve; find the two that are.
    around = _neighbours(ranked, limit)
    below = ranked.everything.searchsorted(around, side="left")
    positive_below = ranked.positives.rank(around, "left")
    x = (ranked.everything.size - below - ranked.n_positive + positive_below) / ranked.n_negative
    y = _overlap(ranked, positive_below)
    if len(around) == 1:  # everything at or above the only threshold: the segment starts at (0, 0)
        x, y = np.append(x, 0.0), np.append(y, 0.0)
    end = max(y[1] + (y[0] - y[1]) * (limit - x[1]) / (x[0] - x[1]), float(curve.y[keep - 1]))  # rounding
    return Curve(
        np.append(curve.x[:keep], limit),
        np.append(curve.y[:keep], end),
        np.append(curve.threshold[:keep], np.nan),
    )


def _neighbours(ranked: Ranked, limit: float) -> Array:
    """Return the highest score whose false-positive rate is above ``limit``, and the next one if any."""
    n = ranked.everything.size
    low, high = 0, n  # the rate falls as the rank grows; bisect on ranks moved to the start of their tie
    while high - low > 1:
        middle = (low + high) // 2
        score = ranked.everything[middle : middle + 1]
        below = int(ranked.everything.searchsorted(score, side="left")[0])
        positive_below = int(ranked.positives.rank(score, "left")[0])
        if (n - below - ranked.n_positive + positive_below) / ranked.n_negative > limit:
            low = middle
        else:
            high = middle
    score = ranked.everything[low]
    above = int(ranked.everything.searchsorted(score, side="right"))
    return ranked.everything[[low, above]] if above < n else ranked.everything[[low]]
