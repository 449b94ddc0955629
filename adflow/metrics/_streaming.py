"""Pixel metrics of any number of maps in fixed memory, with a bound on their error."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from adflow.errors import InputError
from adflow.metrics._base import (
    Array,
    Floats,
    PixelMetrics,
    as_map,
    as_mask,
    check_limit,
    decoded,
    not_finite,
    ordered_code,
    ramp_area,
    regions,
    why_undefined,
)

_PREFIXES = 1 << 16  # coarse bins: the top 16 bits of a float32 are sign, exponent and 7 bits of the mantissa
_SUB_BITS = 6  # a page splits one of them into 64, a relative width of 2^-13
_SUB = 1 << _SUB_BITS
_PAGES = 16384  # 128 octaves of scores at full resolution
_SLOTS = _PREFIXES + _PAGES * _SUB
_UNSEEN = -1
_ROUNDING = 1e-12  # of the closing sums; far above their n eps, far below anything reported


class StreamingPixelMetrics:
    """Pixel AUROC, AP, F1-max and AUPRO of a stream of maps.

    Scores are counted in bins that keep their order: the leading 22 bits of the float32 (relative width
    2^-13), or the leading 16 for scores outside of the first 128 octaves that are met. Equal-width bins would
    not do, as a single outlier widens them all. The result is that of maps rounded to the bins, and
    ``bounds`` says for each metric how far the exact value can lie away, whatever the order of the scores
    inside of each bin:

    - AUROC: half of the pairs of a positive and a negative pixel that share a bin;
    - AUPRO: PRO is a weighted count, a positive pixel of region k weighing 1 / (K |C_k|), so one weighted
      histogram serves all regions; every pixel's share moves at most between the false-positive rates at the
      two ends of its bin;
    - AP and F1: precision between that of "all negatives of the bin above" and "none above".

    Memory is the same before the first map and after the last, whatever their number: 26 MiB of counters, and
    at most 200 MiB while ``result`` runs. float64 scores are rounded to float32, which the bounds cover.

    Args:
        limit: the highest false-positive rate for AUPRO, in (0, 1].

    Example:
        >>> import numpy as np
        >>> stream = StreamingPixelMetrics()
        >>> stream.add(np.array([[0.1, 0.2], [0.3, 0.9]]), np.array([[0, 0], [0, 1]]))
        >>> stream.result().auroc
        1.0
    """

    def __init__(self, limit: float = 0.3) -> None:
        check_limit(limit)
        self.limit = limit
        self._all: npt.NDArray[np.int64] = np.zeros(_SLOTS, dtype=np.int64)
        self._positive: npt.NDArray[np.int64] = np.zeros(_SLOTS, dtype=np.int64)
        self._weight: Floats = np.zeros(_SLOTS)  # sum of 1 / |C_k| over the positive pixels of the bin
        # First slot of each prefix: its page, or its one coarse bin when the pages are used up.
        self._start: npt.NDArray[np.int32] = np.full(_PREFIXES, _UNSEEN, dtype=np.int32)
        self._pages = 0
        self._n_images = self._n_regions = 0
        self._size: tuple[int, int] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the counters."""
        return sum(a.nbytes for a in (self._all, self._positive, self._weight, self._start))

    def add(self, score_map: Array, mask: Array | None) -> None:
        """Count one map [H, W] with its mask [H, W] (None: a normal image).

        Raises:
            InputError: shapes that do not fit, NaN or infinite scores (or beyond float32), a mask not of 0
                and 1. The counters are then as they were.
        """
        scores = as_map(score_map)
        checked = as_mask(mask, scores.shape)
        with np.errstate(over="ignore"):  # caught below
            scores = scores.astype(np.float32, copy=False)
        flat = np.sort(scores, axis=None)
        if not (np.isfinite(flat[0]) and np.isfinite(flat[-1])):  # NaN sorts to the end
            raise not_finite("the map")
        # Runs of equal leading bits lie in one bin; only their first scores need to be looked up.
        leading = flat.view(np.uint32) >> np.uint32(16 - _SUB_BITS)
        first = np.append(0, np.flatnonzero(leading[1:] != leading[:-1]) + 1)
        np.add.at(self._all, self._slots(ordered_code(flat[first])), np.diff(first, append=flat.size))
        box, labels, count = regions(checked)
        if count:
            inside = checked[box]
            label = labels[inside]
            weight = 1 / np.bincount(label, minlength=count + 1)[1:]
            found = self._slots(ordered_code(scores[box][inside]))
            np.add.at(self._positive, found, 1)
            np.add.at(self._weight, found, weight[label - 1])
        size = (scores.shape[0], scores.shape[1])
        self._size = size if self._n_images == 0 or self._size == size else None
        self._n_images += 1
        self._n_regions += count

    def merge(self, other: StreamingPixelMetrics) -> StreamingPixelMetrics:
        """Add what ``other`` has counted, as if its maps had been added here; returns ``self``.

        Counts add up exactly. The bins are those of one stream unless the two together meet more than 128
        octaves.

        Raises:
            InputError: the limits differ.
        """
        if other.limit != self.limit:
            raise InputError(f"limits differ: {self.limit} and {other.limit}; merge streams of one limit")
        used = np.flatnonzero(other._all)
        if used.size:
            code = other._codes()[used]
            coarse = used < _PREFIXES
            for prefix in np.unique(code[coarse] >> np.uint32(16)).tolist():
                self._make_coarse(prefix)
            slots = self._slots(code)
            for mine, theirs in self._counters(other):
                np.add.at(mine, slots, theirs[used])
        if other._n_images:
            self._size = other._size if self._n_images == 0 or self._size == other._size else None
        self._n_images += other._n_images
        self._n_regions += other._n_regions
        return self

    def result(self) -> PixelMetrics:
        """Return the metrics of all maps so far, with ``bounds``; more maps can be added afterwards."""
        used = np.flatnonzero(self._all)
        code = self._codes()[used]
        order = np.argsort(code)[::-1]  # from the highest score down
        used, code = used[order], code[order]
        here, there = self._positive[used], self._all[used]
        n_positive, n_pixels = int(here.sum()), int(there.sum())
        n_negative = n_pixels - n_positive
        reasons = why_undefined(n_positive, n_negative, self._n_regions, "pixel")
        nan = float("nan")
        values = dict.fromkeys(("auroc", "ap", "f1_max", "aupro"), (nan, nan))
        at = nan
        if n_positive:
            keep = here > 0  # only bins with a positive pixel contribute
            false = np.cumsum(there - here)[keep]
            true = np.cumsum(here)[keep]
            negative = (there - here)[keep]
            n, weight, code = here[keep], self._weight[used[keep]], code[keep]
            values["ap"] = _average_precision(n, negative, true, false)
            values["f1_max"], best = _best_f1(n, negative, true, false)
            at = float(decoded(code[best : best + 1])[0])
            if n_negative:
                before, after = (false - negative) / n_negative, false / n_negative
                values["auroc"] = _area(n / n_positive, before, after, 1.0)
                area, bound = _area(weight / max(self._n_regions, 1), before, after, self.limit)
                # Each of the weights is a running sum of up to n_positive terms.
                values["aupro"] = area / self.limit, bound / self.limit + n_positive * 2.0**-53
        return PixelMetrics(
            auroc=values["auroc"][0],
            ap=values["ap"][0],
            f1_max=values["f1_max"][0],
            f1_threshold=at,
            aupro=values["aupro"][0],
            limit=self.limit,
            n_images=self._n_images,
            n_pixels=n_pixels,
            n_positive=n_positive,
            n_regions=self._n_regions,
            size=self._size,
            bounds={name: bound + _ROUNDING for name, (_, bound) in values.items() if name not in reasons},
            reasons=reasons,
        )

    def _counters(self, other: StreamingPixelMetrics) -> list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
        return [(self._all, other._all), (self._positive, other._positive), (self._weight, other._weight)]

    def _slots(self, code: npt.NDArray[np.uint32]) -> npt.NDArray[np.int64]:
        """Return the slot of each score code, giving new prefixes a page while there are any."""
        prefix = code >> np.uint32(16)
        start = self._start[prefix]
        if start.min() == _UNSEEN:
            for new in np.unique(prefix[start == _UNSEEN]).tolist():
                paged = self._pages < _PAGES
                self._start[new] = _PREFIXES + self._pages * _SUB if paged else new
                self._pages += paged
            start = self._start[prefix]
        sub = (code >> np.uint32(16 - _SUB_BITS)) & np.uint32(_SUB - 1)
        sub[start < _PREFIXES] = 0  # a coarse bin
        slots: npt.NDArray[np.int64] = start.astype(np.int64) + sub
        return slots

    def _codes(self) -> npt.NDArray[np.uint32]:
        """Return the lowest score code of each slot."""
        codes = np.zeros(_SLOTS, dtype=np.uint32)
        codes[:_PREFIXES] = np.arange(_PREFIXES, dtype=np.uint32) << np.uint32(16)
        paged = np.flatnonzero(self._start >= _PREFIXES)
        pages = codes[_PREFIXES:].reshape(_PAGES, _SUB)
        sub = np.arange(_SUB, dtype=np.uint32) << np.uint32(16 - _SUB_BITS)
        page = (self._start[paged] - _PREFIXES) >> _SUB_BITS
        pages[page] = (paged.astype(np.uint32) << np.uint32(16))[:, None] + sub
        return codes

    def _make_coarse(self, prefix: int) -> None:
        """Count ``prefix`` in one bin from now on; its page, if it has one, is emptied but not given back."""
        start = int(self._start[prefix])
        if start >= _PREFIXES:
            for counter in (self._all, self._positive, self._weight):
                page = counter[start : start + _SUB]
                counter[prefix] += page.sum()
                page[:] = 0
        self._start[prefix] = prefix


def _area(weight: Floats, before: Floats, after: Floats, limit: float) -> tuple[float, float]:
    """Return the summed area of weighted steps in [before, after], and how far it can be off."""
    area = ramp_area(before, after, limit)
    most = np.maximum(limit - before, 0) - area  # never less than how far it can be too high
    return float(weight @ area), float(weight @ most)


def _average_precision(
    n: npt.NDArray[np.int64],
    negative: npt.NDArray[np.int64],
    true: npt.NDArray[np.int64],
    false: npt.NDArray[np.int64],
) -> tuple[float, float]:
    """Return AP with each bin as one tie, and how far it can be off.

    ``n`` positives and ``negative`` negatives in each bin [G], ``true`` and ``false`` the running counts, the
    bin included. At best all positives of the bin share the precision of "no negative of the bin above". At
    worst all negatives are above and the positives follow one by one; the mean of the concave x / (x + false)
    over them is at least that of its two ends.
    """
    first = true - n + 1
    tied = true / (true + false)
    best = true / (true + false - negative)
    worst = (first / (first + false) + tied) / 2
    share = n / true[-1]
    return float(share @ tied), float(max(share @ (best - tied), share @ (tied - worst)))


def _best_f1(
    n: npt.NDArray[np.int64],
    negative: npt.NDArray[np.int64],
    true: npt.NDArray[np.int64],
    false: npt.NDArray[np.int64],
) -> tuple[tuple[float, float], int]:
    """Return the best F1 at the bins' lower edges, how much better one inside of a bin can be, its bin."""
    total = true[-1]
    edge = 2 * true / (total + true + false)
    inside = 2 * true / (total + true + false - negative)
    best = len(edge) - 1 - int(np.argmax(edge[::-1]))
    return (float(edge[best]), float(inside.max() - edge[best])), best
