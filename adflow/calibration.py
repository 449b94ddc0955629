"""What held-out good images teach about scores: thresholds that keep a promise, NFA, p-values, drift.

No model of the scores is assumed, only that the next good image is exchangeable with the held-out ones. The
unit is the number of false regions of a good image: C_i(t) = the most 4-connected regions that {map_i > t'}
has at any t' >= t (:func:`adflow.nfa.count_curve`). From n held-out images

    NFA(t) = [sum_i C_i(t) + max(1, max_i C_i(t))] / (n + 1)

bounds the expected number of regions above t on the next good image, up to the cap: the last term stands for
the next image, which is taken to be no worse than the worst of the others. With counts capped at 1 the cap is
exact, and :meth:`Calibration.flag_threshold` is a theorem: conformal risk control (Angelopoulos, Bates,
Fisch, Lei, Schuster, "Conformal Risk Control", 2022, https://arxiv.org/abs/2208.02814, Theorem 1).

Domain of validity: exchangeable images. A shift of camera, light or product breaks the promise; :meth:`drift`
looks. Averages are over calibration sets: one set of 50 can realise 0.18 for 0.1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from adflow._health import drift, exchangeability, kept_promises
from adflow._regions import Curves, Region, add_curves, count_curve, lowest_level, outlined_regions
from adflow._threads import default_workers, ordered
from adflow.errors import InputError

Array = npt.NDArray[Any]
Map = npt.NDArray[np.floating[Any]]
Mask = npt.NDArray[np.bool_]

# Share of pixels of good images above the level that serves as unit for how strong a defect is.
_GROWTH_RATE = 1e-3
# No outline lies higher than this many times that level. See `Calibration.outline` for how it was chosen.
_HIGHEST_OUTLINE = 2.0
# Pixels kept while calibrations are merged, as a multiple of those above the growth level.
_SPARE = 10


@dataclass(frozen=True, eq=False)
class Calibration:
    """Scores of held-out good images, reduced to what promises need.

    Attributes:
        scores: [n] float64, image scores in the order given (file order).
        levels: [K] float32, count curves one image after the other, levels descending.
        counts: [K] int64, the region count reached just below each level.
        offsets: [n + 1] int64, where the curve of each image starts and ends.
        pixel_level: 0.1 % of the pixels of good images lie above it.
        pixel_median: median over the images of the median of their map; of merged parts, the median of theirs.
        max_count: curves end after the first count above this.
    """

    scores: npt.NDArray[np.float64]
    levels: npt.NDArray[np.float32]
    counts: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    pixel_level: float
    pixel_median: float
    max_count: int = 256
    _tail: npt.NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, dtype=np.float32), repr=False)
    _above: int = 0

    @classmethod
    def from_maps(cls, maps: Iterable[Map], image_scores: Array, *, max_count: int = 256) -> Calibration:
        """Calibrate on held-out good images, a few maps in memory at a time.

        Args:
            maps: [H, W] score maps at network input resolution, in file order; higher = more anomalous.
            image_scores: [n], one per map.
            max_count: counts above this are not told apart.

        Raises:
            InputError: no image, numbers that do not match, maps of different shapes, NaN or infinite scores.
        """
        scores = np.asarray(image_scores, dtype=np.float64)
        if scores.ndim != 1 or len(scores) == 0:
            raise InputError(f"image scores have shape {list(scores.shape)}, expected [n] with n >= 1")
        if not np.isfinite(scores).all():
            raise InputError("image scores hold NaN or infinite values, expected finite ones")
        levels, counts, medians = [], [], []
        tail = np.zeros(0, dtype=np.float32)
        shape: tuple[int, ...] | None = None
        above = 0

        def counted(score: Map) -> tuple[Array, Array, Array, float]:
            score = np.asarray(score, dtype=np.float32)
            return score, *count_curve(score, max_count), float(np.median(score))

        workers = default_workers()
        with ThreadPoolExecutor(workers, "adflow-count") as pool:
            for score, level, count, median in ordered(pool, counted, maps, ahead=2 * workers):
                shape = shape or score.shape
                if score.shape != shape:
                    raise InputError(f"a score map has shape {list(score.shape)}, expected {list(shape)} as before")
                levels.append(level)
                counts.append(count)
                medians.append(median)
                above = int(_GROWTH_RATE * len(scores) * score.size)
                tail = _highest(np.concatenate([tail, score.ravel()]), _SPARE * above + 1)
        if len(levels) != len(scores):
            raise InputError(f"there are {len(levels)} maps and {len(scores)} image scores, expected as many")
        return cls._build(scores, levels, counts, tail, above, float(np.median(medians)), max_count)

    @classmethod
    def _build(
        cls,
        scores: Array,
        levels: Sequence[Array],
        counts: Sequence[Array],
        tail: Array,
        above: int,
        median: float,
        max_count: int,
    ) -> Calibration:
        offsets = np.concatenate([[0], np.cumsum([len(level) for level in levels])]).astype(np.int64)
        pixel_level = float(_highest(tail, above + 1).min())
        return cls(
            scores,
            np.concatenate(levels),
            np.concatenate(counts),
            offsets,
            pixel_level,
            median,
            max_count,
            tail,
            above,
        )

    @classmethod
    def merge(cls, parts: Sequence[Calibration]) -> Calibration:
        """Return the calibration on the images of all parts, e.g. each scored by a model fitted without it.

        Raises:
            InputError: no part, or parts that were loaded from a file (their pixels are gone).
        """
        if not parts:
            raise InputError("there is no calibration to merge, expected at least one")
        if any(len(part._tail) == 0 for part in parts):
            raise InputError(
                "a calibration loaded from a file cannot be merged: it does not hold its pixels",
                hint="Merge calibrations made by Calibration.from_maps in the same process.",
            )
        return cls._build(
            np.concatenate([part.scores for part in parts]),
            [part.curve(i)[0] for part in parts for i in range(part.n)],
            [part.curve(i)[1] for part in parts for i in range(part.n)],
            np.concatenate([part._tail for part in parts]),
            sum(part._above for part in parts),
            float(np.median([part.pixel_median for part in parts])),
            min(part.max_count for part in parts),
        )

    @property
    def n(self) -> int:
        """Return the number of held-out images."""
        return len(self.scores)

    def curve(self, image: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Return the count curve of one image: levels descending, counts increasing."""
        part = slice(self.offsets[image], self.offsets[image + 1])
        return self.levels[part], self.counts[part]

    @functools.cached_property
    def _owner(self) -> Array:
        return np.repeat(np.arange(self.n), np.diff(self.offsets))

    @functools.cached_property
    def _curves(self) -> Curves:
        return add_curves(self.levels, self.counts, self._owner)

    def threshold(self, eps: float) -> float:
        """Return the level above which a good image shows at most ``eps`` regions on average.

        The smallest t such that NFA(t') <= eps for all t' >= t. Detect {map > t}. Measured on two data sets,
        the promise holds on average from n = 3 / eps to 5 / eps images; the cap is a heuristic, not a
        theorem.

        Raises:
            InputError: eps not above 0, not reachable with so few images, or so large that no level breaks
                it.
        """
        if not (math.isfinite(eps) and eps > 0):
            raise InputError(f"--nfa is {eps}, expected a number of false regions per image above 0")
        self._enough(f"--nfa {eps:g}", eps)
        curves = self._curves
        nfa = curves.nfa(self.n)
        level = lowest_level(curves, nfa, eps)
        # Where a curve was cut, the count of that image is not known any more.
        cut = self.levels[self.counts > self.max_count]
        if len(cut):
            return max(float(cut.max()), -math.inf if level is None else level)
        if level is None:
            most = nfa[-1]
            raise InputError(
                f"--nfa {eps:g} is more than maps of good images ever show ({most:.3g} regions per image)",
                hint=f"Ask for less than {most:.3g}.",
            )
        return level

    def flag_threshold(self, rate: float) -> float:
        """Return the level above which at most a share ``rate`` of good images shows any region.

        Holds on average over calibration sets for any exchangeable images (conformal risk control, counts
        capped at 1); n >= 1 / rate - 1 images are needed.

        Raises:
            InputError: rate not in (0, 1), or not reachable with so few images.
        """
        if not 0 < rate < 1:
            raise InputError(f"--flag-rate is {rate}, expected a share of good images in (0, 1)")
        self._enough(f"--flag-rate {rate:g}", rate)
        curves = self._curves
        level = lowest_level(curves, (curves.flagged + 1) / (self.n + 1), rate)
        # Never None: just below the last level every image shows a region, and (n + 1) / (n + 1) > rate.
        assert level is not None
        return level

    def _enough(self, wish: str, rate: float) -> None:
        needed = math.ceil(1 / rate - 1 - 1e-9)
        if self.n < needed:
            raise InputError(
                f"{wish} needs at least {needed} held-out good images, this calibration has {self.n}",
                hint=f"Hold out more, use --folds K, or ask for {_ceil(1 / (self.n + 1))} or more.",
            )

    def log10_nfa(self, peaks: Array) -> npt.NDArray[np.float64]:
        """Return log10 NFA of regions with these peak scores: regions as high expected on a good image.

        Never below log10(1 / (n + 1)). Detecting where NFA <= eps is detecting above ``threshold(eps)``.
        """
        nfa: npt.NDArray[np.float64] = np.log10(self._curves.at(peaks).nfa(self.n))
        return nfa

    def p_value(self, image_scores: Array) -> npt.NDArray[np.float64]:
        """Return conformal p-values of image scores: (1 + number of held-out scores as high) / (n + 1)."""
        ranked = np.sort(self.scores)
        as_high = self.n - np.searchsorted(ranked, np.asarray(image_scores, dtype=np.float64), side="left")
        return np.asarray((1 + as_high) / (self.n + 1), dtype=np.float64)

    def outline(self, peaks: Array) -> npt.NDArray[np.float64]:
        """Return the levels at which defects with these peaks are outlined.

        Heights count from the median normal pixel; with L that of the 0.1 % pixel level, a peak of height h is
        outlined at height (h^-2 + (2 L)^-2)^(-1/2): just below the peak of a faint defect, whose surroundings are not
        told from noise, and never above 2 L, so that a strong defect is shown as wide as it is.

        The form and the 2 were chosen on the test images of two data sets (screw, magnetic tile) and three methods
        (U-Flow, CFLOW-AD, PaDiM), three false-alarm rates each. Tried there, and no better: growing down to the 0.1 %
        pixel level (masks of strong defects bleed); a fixed share of the peak's height (0.7: 66 to 83 % of the oracle
        IoU on magnetic tile at one false region, where this has 95 to 97 %); shares that fall with a power or the
        logarithm of the height; one level for all that hangs together at the threshold; regions ranked by their volume
        above a level instead of their peak.
        """
        peaks = np.asarray(peaks, dtype=np.float64)
        height = np.maximum(peaks - self.pixel_median, 0)
        most = max(_HIGHEST_OUTLINE * (self.pixel_level - self.pixel_median), 1e-12)
        levels: npt.NDArray[np.float64] = peaks - height + height / np.hypot(1, height / most)
        return levels

    def segment(self, score: Map, threshold: float) -> tuple[Mask, list[Region]]:
        """Return the mask and regions of a map: the peaks above ``threshold``, each outlined by its own height.

        See :meth:`outline` and :func:`adflow._regions.outlined_regions`: outlines are never more than the regions that
        the promise counts.

        Args:
            score: [H, W], higher = more anomalous.
            threshold: from :meth:`threshold`, :meth:`flag_threshold`, or any level.

        Returns:
            mask [H, W] bool, and its regions, highest peak first.
        """
        return outlined_regions(score, threshold, self.outline, log10_nfa=self.log10_nfa)

    def observed(self, threshold: float) -> dict[str, float]:
        """Return what the held-out images show at a level: images, regions_per_image, flagged_share."""
        there = self._curves.at(np.array([threshold]))
        regions, flagged = int(there.total[0]), int(there.flagged[0])
        return {"images": self.n, "regions_per_image": regions / self.n, "flagged_share": flagged / self.n}

    def health(self, fit_scores: Array | None = None) -> dict[str, Any]:
        """Return what can be said about the promises from the held-out images themselves.

        Args:
            fit_scores: image scores of images the detector was fitted on, or None.

        Returns:
            "images"; "leave_one_out": {eps: false regions per image at the threshold of the other images};
            "flagged": {eps: share of images flagged there}; "variance_over_mean" of those counts (1 = Poisson, more =
            false regions come in clumps) and "max_count" at the largest eps; and what :meth:`exchangeability` says.
        """
        kept = kept_promises(self.levels, self.counts, self._owner, self._curves)
        return {"images": self.n, **kept, **self.exchangeability(fit_scores)}

    def drift(self, image_scores: Array) -> dict[str, Any] | None:
        """Compare incoming image scores with those of the held-out good images; None below 8 of them.

        Returns:
            "images"; "auc": P(incoming score > held-out score), 0.5 = alike; "p_value" of the two-sided rank
            test (Mann-Whitney); "below_median": share of incoming scores below the held-out median, 0.5 = alike;
            "warning": a sentence when p < 0.01 and the AUC is off by more than 0.15, else None.
            Many defective images look like a shift: judge the warning on images that should be good.
        """
        return drift(self.scores, np.asarray(image_scores, dtype=np.float64))

    def exchangeability(self, fit_scores: Array | None = None, blocks: int = 5) -> dict[str, Any]:
        """Check that held-out images are alike in file order, and like the fit images.

        Args:
            fit_scores: image scores of images the detector was fitted on, or None.
            blocks: contiguous blocks of held-out images in file order that are compared.

        Returns:
            "blocks_p" of the rank test between blocks (Kruskal-Wallis; None below 4 images a block); with
            ``fit_scores`` "fit_auc": P(held-out score > fit score), above 0.5 = fit images are scored too low, as by
            any method that remembers them, and "fit_p" (Mann-Whitney); "warnings": one sentence where blocks differ
            with p < 0.01 (capture sessions that differ mean that the next may differ too), one where the fit images
            score clearly *higher*: no method does that to images of one kind.
        """
        return exchangeability(self.scores, fit_scores, blocks)

    def tensors(self) -> dict[str, Array]:
        """Return the arrays to store; :meth:`from_tensors` restores the same answers bit for bit."""
        return {
            "scores": self.scores,
            "levels": self.levels,
            "counts": self.counts,
            "offsets": self.offsets,
            "pixels": np.array([self.pixel_level, self.pixel_median], dtype=np.float64),
            "max_count": np.array([self.max_count], dtype=np.int64),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Array]) -> Calibration:
        """Return the calibration stored by :meth:`tensors`.

        Raises:
            InputError: arrays are missing or do not fit together.
        """
        missing = {"scores", "levels", "counts", "offsets", "pixels", "max_count"} - set(tensors)
        if missing:
            raise InputError(f"a stored calibration lacks {', '.join(sorted(missing))}")
        offsets = np.asarray(tensors["offsets"], dtype=np.int64)
        levels = np.asarray(tensors["levels"], dtype=np.float32)
        counts = np.asarray(tensors["counts"], dtype=np.int64)
        scores = np.asarray(tensors["scores"], dtype=np.float64)
        pixels = np.asarray(tensors["pixels"], dtype=np.float64)
        fits = (
            len(offsets) == len(scores) + 1
            and len(scores) > 0
            and len(pixels) == 2
            and offsets[0] == 0
            and offsets[-1] == len(levels) == len(counts)
            and bool((np.diff(offsets) > 0).all())
        )
        if not fits:
            raise InputError("a stored calibration is damaged: its arrays do not fit together")
        limit = int(np.asarray(tensors["max_count"])[0])
        return cls(scores, levels, counts, offsets, float(pixels[0]), float(pixels[1]), limit)


def _ceil(rate: float) -> str:
    """Return ``rate`` in 3 digits, rounded up so that it can be asked for."""
    digits = 2 - math.floor(math.log10(rate))
    return f"{math.ceil(round(rate * 10**digits, 6)) / 10**digits:g}"


def _highest(values: Array, count: int) -> Array:
    """Return the ``count`` highest values, in no order."""
    return values if len(values) <= count else np.partition(values, len(values) - count)[len(values) - count :]
