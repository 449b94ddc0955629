"""Is a difference real? Bootstrap over images, and DeLong's test for AUROC.

Images are what is drawn again, never pixels: the pixels of an image are not independent, and an interval from
them would be far too narrow. Where images are not independent either (frames of a video), pass ``groups``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from adflow.errors import InputError
from adflow.metrics._base import (
    Array,
    Bools,
    Floats,
    Maps,
    Masks,
    as_labels,
    as_scores,
    check_limit,
    not_finite,
    pairs,
    ramp_area,
    regions,
)

Statistic: TypeAlias = Callable[[Floats], Floats]
"""From weights [D, N], how often each of N images occurs in D draws, to the metric of each draw [D]."""

_SAMPLE = 1 << 20  # scores from which the bin edges are taken
_DRAWS = 64  # draws computed at a time


@dataclass(frozen=True)
class Interval:
    """A value with its confidence interval; NaN with a reason where it is not defined."""

    value: float
    low: float
    high: float
    level: float
    reason: str | None = None


@dataclass(frozen=True)
class Difference:
    """The metric of A less that of B on the same images.

    Attributes:
        value: the difference.
        low: lower end of its confidence interval.
        high: upper end.
        level: of the interval.
        p_value: two-sided, of "no difference".
        reason: why the numbers are NaN, or None.
    """

    value: float
    low: float
    high: float
    level: float
    p_value: float
    reason: str | None = None


@dataclass(frozen=True)
class DeLong:
    """Two correlated AUROCs and the test of their difference.

    Attributes:
        auroc_a: AUROC of A.
        auroc_b: AUROC of B.
        difference: A less B, with interval and two-sided p value.
        standard_error: of the difference.
    """

    auroc_a: float
    auroc_b: float
    difference: Difference
    standard_error: float


def bootstrap_ci(
    statistic: Statistic,
    labels: Array | Sequence[int | bool],
    *,
    groups: Array | Sequence[int] | None = None,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """Return the percentile bootstrap interval of a statistic over images.

    Anomalous and normal images are drawn apart, so that each draw has as many of both as the data.

    Args:
        statistic: from ``mean_statistic``, ``auroc_statistic`` or ``pixel_statistics``.
        labels: [N] 1 = anomalous.
        groups: [N] images of one group (a video) are drawn together; groups with an anomalous image are drawn
            apart from the others.
        level: of the interval, in (0, 1).
        draws: number of draws.
        seed: the same seed gives the same interval.
    """
    _check(level, draws)
    strata = as_labels(labels, len(labels))
    value = float(statistic(np.ones((1, strata.size)))[0])
    sample = _resample([statistic], strata, groups, draws, seed)[0]
    return _interval(value, sample, level)


def paired_bootstrap(
    statistic_a: Statistic,
    statistic_b: Statistic,
    labels: Array | Sequence[int | bool],
    *,
    groups: Array | Sequence[int] | None = None,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Difference:
    """Return the difference of two statistics of the same images with a percentile bootstrap interval.

    Both see the same images in every draw. The p value is twice the share of draws on the other side of zero
    (ties on both sides), with one draw added so that it is never 0. Draws in which a statistic is not defined do not
    count. Arguments as for ``bootstrap_ci``.
    """
    _check(level, draws)
    strata = as_labels(labels, len(labels))
    ones = np.ones((1, strata.size))
    value = float(statistic_a(ones)[0] - statistic_b(ones)[0])
    a, b = _resample([statistic_a, statistic_b], strata, groups, draws, seed)
    sample = a - b
    found = _interval(value, sample, level)
    if found.reason:
        return Difference(found.value, found.low, found.high, level, np.nan, found.reason)
    beyond = min(np.count_nonzero(sample <= 0), np.count_nonzero(sample >= 0))
    p_value = min(1.0, 2 * (beyond + 1) / (np.count_nonzero(~np.isnan(sample)) + 1))
    return Difference(found.value, found.low, found.high, level, p_value)


def mean_statistic(rows: Array | Sequence[float]) -> Statistic:
    """Return the mean over images of ``rows`` [N] (an IoU each, say); NaN rows are left out."""
    values = np.asarray(rows, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise InputError(f"rows have shape {values.shape}, expected one number for each image")
    known = ~np.isnan(values)
    filled = np.where(known, values, 0.0)

    def mean(weights: Floats) -> Floats:
        return _ratio(weights @ filled, weights @ known.astype(np.float64))

    return mean


def auroc_statistic(scores: Array | Sequence[float], labels: Array | Sequence[int | bool]) -> Statistic:
    """Return the image AUROC of ``scores`` [N] with ``labels`` [N], exact in every draw."""
    values = as_scores(scores)
    positive = as_labels(labels, values.size)
    _, bins = np.unique(values, return_inverse=True)
    order = np.argsort(bins, kind="stable")
    first = np.flatnonzero(np.diff(bins[order], prepend=-1))

    def auroc(weights: Floats) -> Floats:
        sorted_weights = weights[:, order]
        here = np.add.reduceat(sorted_weights * positive[order], first, axis=1)
        there = np.add.reduceat(sorted_weights * ~positive[order], first, axis=1)
        below = np.cumsum(there, axis=1) - there / 2
        return _ratio((here * below).sum(axis=1), here.sum(axis=1) * there.sum(axis=1))

    return auroc


@dataclass(frozen=True)
class PixelHistograms:
    """What is left of N maps and masks for statistics over images: counts in B bins, the highest scores first.

    The bins follow the quantiles of the scores, half of them those of the positives: values computed from them
    lie within about 1e-3 of the exact ones (tested), far inside of any interval. Memory: 24 bytes x N x B.

    Attributes:
        negative: [N, B] negative pixels.
        positive: [N, B] positive pixels.
        weighted: [N, B] positive pixels, each weighing 1 / |C_k| of its region.
        regions: [N] number of regions.
    """

    negative: Floats
    positive: Floats
    weighted: Floats
    regions: Floats

    @classmethod
    def of(cls, maps: Maps, masks: Masks, bins: int = 2048) -> PixelHistograms:
        """Reduce each image once to its histograms over common bins."""
        edges = _edges(maps, masks, bins)
        rows = []
        for scores, mask in pairs(maps, masks):
            if not np.isfinite(scores).all():
                raise not_finite("a map")
            slot = np.searchsorted(edges, scores.reshape(-1), side="right").reshape(scores.shape)
            box, labels, count = regions(mask)
            label = labels[mask[box]]
            found = slot[box][mask[box]]
            here = np.bincount(found, minlength=edges.size + 1).astype(np.float64)
            inverse = 1 / np.bincount(label, minlength=count + 1)[1:]
            weight = np.bincount(found, weights=inverse[label - 1], minlength=edges.size + 1)
            there = np.bincount(slot.reshape(-1), minlength=edges.size + 1) - here
            rows.append((there[::-1], here[::-1], weight[::-1], count))  # from the highest score down
        return cls(*(np.array(column, dtype=np.float64) for column in zip(*rows, strict=True)))

    def statistics(self, limit: float = 0.3) -> dict[str, Statistic]:
        """Return the pixel statistics "auroc", "ap" and "aupro"; AUPRO draws images with all of their regions."""
        check_limit(limit)

        def auroc(weights: Floats) -> Floats:
            before, after = _rates(weights @ self.negative)
            here = weights @ self.positive
            return _ratio((here * ramp_area(before, after, 1.0)).sum(axis=1), here.sum(axis=1))

        def ap(weights: Floats) -> Floats:
            here = weights @ self.positive
            true, false = np.cumsum(here, axis=1), np.cumsum(weights @ self.negative, axis=1)
            precision = np.divide(true, true + false, out=np.zeros_like(true), where=true > 0)
            return _ratio((here * precision).sum(axis=1), here.sum(axis=1))

        def aupro(weights: Floats) -> Floats:
            before, after = _rates(weights @ self.negative)
            area = ((weights @ self.weighted) * ramp_area(before, after, limit)).sum(axis=1)
            return _ratio(area, weights @ self.regions) / limit

        return {"auroc": auroc, "ap": ap, "aupro": aupro}


def pixel_statistics(maps: Maps, masks: Masks, limit: float = 0.3, bins: int = 2048) -> dict[str, Statistic]:
    """Return the pixel statistics "auroc", "ap" and "aupro" of maps and masks; see :class:`PixelHistograms`."""
    check_limit(limit)
    return PixelHistograms.of(maps, masks, bins).statistics(limit)


def delong(
    scores_a: Array | Sequence[float],
    scores_b: Array | Sequence[float],
    labels: Array | Sequence[int | bool],
    *,
    level: float = 0.95,
) -> DeLong:
    """Test the difference of two AUROCs on the same images.

    DeLong, DeLong and Clarke-Pearson, "Comparing the areas under two or more correlated receiver operating
    characteristic curves", Biometrics 1988, https://doi.org/10.2307/2531595, with the midrank form of Sun and
    Xu, 2014, https://doi.org/10.1109/LSP.2014.2337313. The normal approximation wants some ten images of each
    kind.

    Args:
        scores_a: [N] image scores of A.
        scores_b: [N] image scores of B on the same images.
        labels: [N] 1 = anomalous.
        level: of the interval.
    """
    _check(level, 1)
    a, b = as_scores(scores_a, "scores of A"), as_scores(scores_b, "scores of B")
    positive = as_labels(labels, a.size)
    if b.size != a.size:
        raise InputError(f"{a.size} scores of A but {b.size} of B, expected the same images in the same order")
    parts = [_placements(scores, positive) for scores in (a, b)]
    m, n = int(positive.sum()), int(np.count_nonzero(~positive))
    if m < 2 or n < 2:
        reason = f"{m} anomalous and {n} normal images, at least 2 of each are needed"
        nothing = Difference(np.nan, np.nan, np.nan, level, np.nan, reason)
        return DeLong(np.nan, np.nan, nothing, np.nan)
    auroc_a, auroc_b = (float(hits.mean()) for hits, _ in parts)
    spread = np.var(parts[0][0] - parts[1][0], ddof=1) / m + np.var(parts[0][1] - parts[1][1], ddof=1) / n
    error = math.sqrt(max(float(spread), 0.0))
    value = auroc_a - auroc_b
    reach = NormalDist().inv_cdf((1 + level) / 2) * error
    p_value = float(value == 0) if error == 0 else math.erfc(abs(value) / error / math.sqrt(2))
    return DeLong(auroc_a, auroc_b, Difference(value, value - reach, value + reach, level, p_value), error)


def _check(level: float, draws: int) -> None:
    if not 0 < level < 1 or draws < 1:
        raise InputError(f"level is {level} and draws {draws}, expected a level in (0, 1) and at least one draw")


def _ratio(above: Floats, below: Floats) -> Floats:
    ratio: Floats = np.divide(above, below, out=np.full(np.shape(above), np.nan), where=below != 0)
    return ratio


def _rates(negative: Floats) -> tuple[Floats, Floats]:
    """Return the false-positive rates above and down to each bin [D, B], NaN without negatives."""
    after = np.cumsum(negative, axis=1)
    total = np.where(after[:, -1:] > 0, after[:, -1:], np.nan)
    return (after - negative) / total, after / total


def _resample(
    statistics: list[Statistic],
    strata: Bools,
    groups: Array | Sequence[int] | None,
    draws: int,
    seed: int,
) -> list[Floats]:
    """Return for each statistic its values [draws] on the same draws of images."""
    if groups is None:
        member = np.arange(strata.size)
    else:
        _, member = np.unique(np.asarray(groups), return_inverse=True)
        if member.shape != strata.shape:
            raise InputError(f"{member.size} groups for {strata.size} images, expected one for each")
    anomalous = np.bincount(member, weights=strata) > 0
    generator = np.random.default_rng(seed)
    values: list[list[Floats]] = [[] for _ in statistics]
    for start in range(0, draws, _DRAWS):
        size = min(_DRAWS, draws - start)
        times = np.zeros((size, anomalous.size))
        for stratum in (anomalous, ~anomalous):
            n = int(np.count_nonzero(stratum))
            if n:
                times[:, stratum] = generator.multinomial(n, np.full(n, 1 / n), size=size)
        weights = times[:, member]
        for found, statistic in zip(values, statistics, strict=True):
            found.append(statistic(weights))
    return [np.concatenate(found) for found in values]


def _interval(value: float, sample: Floats, level: float) -> Interval:
    if math.isnan(value):
        return Interval(np.nan, np.nan, np.nan, level, "the statistic is not defined on these images")
    sample = sample[~np.isnan(sample)]
    low, high = np.quantile(sample, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), level)


def _edges(maps: Maps, masks: Masks, bins: int) -> Array:
    """Return distinct bin edges at the quantiles of the scores, half of them of the positives'."""
    positive, everything = [], []
    stride = max(1, sum(int(np.size(one)) for one in maps) // _SAMPLE)
    for scores, mask in pairs(maps, masks):
        positive.append(scores[mask])
        everything.append(scores.reshape(-1)[::stride])
    inside, outside = np.sort(np.concatenate(positive)), np.sort(np.concatenate(everything))
    share = (np.arange(bins // 2) + 0.5) / (bins // 2)
    # Half of the negatives' bins lie above their 90 % quantile, where AUPRO and AP are decided.
    tail = np.where(share < 0.5, share * 1.8, 0.9 + (share - 0.5) * 0.2)
    picked = [outside[(tail * outside.size).astype(np.int64)]]
    if inside.size:
        picked.append(inside[(share * inside.size).astype(np.int64)])
    return np.unique(np.concatenate(picked))


def _placements(scores: Array, positive: Bools) -> tuple[Floats, Floats]:
    """Return for each anomalous image the share of normal ones below, for each normal the share above."""

    def midrank(values: Array) -> npt.NDArray[np.float64]:
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        rank: npt.NDArray[np.float64] = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
        return rank

    m, n = int(positive.sum()), int(np.count_nonzero(~positive))
    ranks = midrank(scores)
    hits = (ranks[positive] - midrank(scores[positive])) / max(n, 1)
    beaten = 1 - (ranks[~positive] - midrank(scores[~positive])) / max(m, 1)
    return hits, beaten
