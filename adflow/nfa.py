"""A contrario detection: energies to a map of -log10 NFA, and to regions.

The number of false alarms (NFA) of a region is the number of tests times the probability of the region under
the null model: the expected number of regions that good under pure noise. A region with NFA below eps is
detected. The null model: at a position where the image is normal, the energy (a sum of squares of latents) is
chi-square with ``dof`` degrees of freedom, independently of the other positions.

Everything here works on numpy arrays, without files, learning or state. All scores: higher = more anomalous;
-log10 NFA above 0 means an NFA below 1.

Source: Tailanian, Pardo, Muse, "U-Flow: A U-shaped Normalizing Flow for Anomaly Detection with Unsupervised
Threshold", JMIV 2024, https://doi.org/10.1007/s10851-024-01193-y (called U-Flow below).

Domain of validity: real energies are over-dispersed, correlated between positions and lighter-tailed in the
model than in the world. Take an NFA of this module as an order of magnitude; :mod:`adflow.calibration` gives
one that holds.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from adflow._maxtree import best_regions
from adflow._nfa_block import block, block_log_probability, check_size
from adflow._regions import Region, count_curve, find_regions
from adflow.errors import InputError, unknown

__all__ = [
    "Clusters",
    "NullHealth",
    "Region",
    "block",
    "block_log_probability",
    "clusters",
    "count_curve",
    "detect",
    "find_regions",
    "latent_energies",
    "log10_tests",
    "null_health",
    "tree",
]

Array = npt.NDArray[Any]
Bound = Literal["one-sided", "reference"]
Tail = Literal["chernoff", "gamma"]
Tests = Literal["image", "area"]

# Number of 4-connected polyominoes of area r, asymptotically alpha * beta**r / r: Jensen and Guttmann,
# "Statistics of lattice animals (polyominoes) and polygons", 2000, https://arxiv.org/abs/cond-mat/0007238;
# the constants of U-Flow.
_ALPHA, _BETA = 0.316915, 4.062570
# Evidence of a constant-zero region under the unguarded bound is infinite; scores stay finite in float32.
_LARGEST = float(np.finfo(np.float32).max) * (1 - 1e-6)


class Clusters(NamedTuple):
    """The best disjoint regions of energy maps, painted on their pixels.

    Attributes:
        log10_p: [B, h, w] float64, log10 probability (with ``tests="area"``: log10 NFA) of the region a pixel
            belongs to; NaN in no region.
        level: [B, h, w] float64, lowest chi2 / dof in that region; NaN in no region.
        area: [B, h, w] int64, its pixels; 0 in no region.
    """

    log10_p: npt.NDArray[np.float64]
    level: npt.NDArray[np.float64]
    area: npt.NDArray[np.int64]


class NullHealth(NamedTuple):
    """How far the energies of one scale are from chi-square(dof).

    Attributes:
        dof: degrees of freedom the method claims.
        dispersion: mean of chi2 / dof; 1 under the null.
        effective_dof: 2 mean^2 / variance; equals dof under the null, less = heavier tail.
        tail: how many times more often than claimed the energy exceeds its 1e-3 quantile; 1 under the null.
    """

    dof: float
    dispersion: float
    effective_dof: float
    tail: float

    @property
    def trusted(self) -> bool:
        """Whether the null holds: dispersion within 10 %, dof within a factor 1.5, tail within a factor 3."""
        return 0.9 <= self.dispersion <= 1.1 and self.effective_dof >= self.dof / 1.5 and self.tail <= 3


def latent_energies(latents: Sequence[Array]) -> list[tuple[Array, float]]:
    """Return (chi2 [B, h, w] float64, dof = C) of latents [B, C, h, w] that are N(0, 1) under the null.

    Squares are summed in float32 over blocks of 64 channels and in float64 over the blocks (relative error
    1e-6).
    """
    energies = []
    for z in latents:
        z = np.asarray(z)
        if z.ndim != 4 or 0 in z.shape:
            raise InputError(f"latents have shape {list(z.shape)}, expected [B, C, h, w] with no empty side")
        batch, channels, h, w = z.shape
        flat = np.ascontiguousarray(z).reshape(batch, channels, h * w)
        chi2 = np.zeros((batch, h * w))
        for image, total in zip(flat, chi2, strict=True):
            for start in range(0, channels, 64):
                part = image[start : start + 64]
                total += np.einsum("cp,cp->p", part, part)
        energies.append((chi2.reshape(batch, h, w), float(channels)))
    return energies


@functools.lru_cache(maxsize=64)
def log10_tests(sizes: tuple[int, ...]) -> float:
    """Return log10 of U-Flow's number of tests for maps of ``sizes`` pixels: every region of every scale.

    N = sum over scales of n * sum_{r=1}^{n} alpha beta^r / r, in log space (U-Flow, number of tests).
    """
    parts = []
    for n in sizes:
        terms = _log10_shapes(n)[1:]
        top = terms.max()
        parts.append(np.log10(n) + top + np.log10(np.sum(10.0 ** (terms - top))))
    top = max(parts)
    return float(top + np.log10(np.sum(10.0 ** (np.array(parts) - top))))


def _log10_shapes(n: int) -> Array:
    """Return log10 of the number of shapes of area r = 0..n (entry 0 is 0 and means nothing)."""
    r = np.arange(n + 1, dtype=np.float64)
    r[0] = 1
    shapes: Array = np.log10(_ALPHA) + r * np.log10(_BETA) - np.log10(r)
    shapes[0] = 0
    return shapes


@functools.lru_cache(maxsize=64)
def _charges(sizes: tuple[int, ...], n: int, tests: Tests) -> tuple[Array, float]:
    """Return log10 tests by area for a map of n pixels, and the log10 NFA of "no evidence"."""
    if tests == "image":
        # The same charge for every region: added at the end, as it cannot change which region is best.
        return np.zeros(n + 1), 0.0
    # Regions of area r form a family of their own, sum(sizes) places x shapes; Bonferroni over the possible areas.
    charge = _log10_shapes(n) + np.log10(sum(sizes)) + np.log10(max(sizes))
    return charge, float(charge[1])


def _evidence(level: Array, dof: float, tail: Tail) -> Array:
    """Return -log10 of the probability that one pixel reaches ``level`` = chi2 / dof."""
    if tail == "gamma":
        exact: Array = -_chi2_log_sf(level * dof, dof) / np.log(10)
        return exact
    # Chernoff's bound of the chi-square tail, exp(-dof/2 (t - 1 - ln t)) for t >= 1 (U-Flow, Proposition on the NFA).
    x = level - 1
    with np.errstate(divide="ignore"):
        evidence: Array = (dof / (2 * np.log(10))) * np.maximum(x - np.log1p(x), 0)
    return evidence


def _chi2_log_sf(x: Array, dof: float) -> Array:
    """Return ln P(chi2_dof >= x), also where the probability itself is below the smallest float64."""
    from scipy.special import gammaincc, gammaln

    a, half = dof / 2, np.asarray(x, dtype=np.float64) / 2
    q = gammaincc(a, half)
    with np.errstate(divide="ignore"):
        log_q: Array = np.log(q)
    deep = q < 1e-280
    if deep.any():
        # Legendre's continued fraction of the upper incomplete gamma function by modified Lentz (DLMF 8.9.2,
        # https://dlmf.nist.gov/8.9); so far in the tail it converges in a few dozen terms.
        y = half[deep]
        b = y + 1 - a
        c = np.full_like(y, 1e300)
        d = 1 / b
        fraction = d.copy()
        for i in range(1, 300):
            term = -i * (i - a)
            b = b + 2
            d = 1 / (term * d + b)
            c = b + term / c
            fraction *= c * d
            if np.all(np.abs(c * d - 1) < 1e-15):
                break
        log_q[deep] = a * np.log(y) - y - gammaln(a) + np.log(fraction)
    return log_q


def _check(bound: str, tail: str, tests: str) -> None:
    for kind, found, known in (
        ("bound", bound, ("one-sided", "reference")),
        ("tail", tail, ("chernoff", "gamma")),
        ("tests", tests, ("image", "area")),
    ):
        if found not in known:
            raise unknown(kind, found, known)


def _levels(chi2: Array, dof: float) -> Array:
    """Return chi2 / dof [B, h, w] float64 after checking both."""
    chi2 = np.asarray(chi2, dtype=np.float64)
    if chi2.ndim != 3 or 0 in chi2.shape:
        raise InputError(f"energies have shape {list(chi2.shape)}, expected [B, h, w] with no empty side")
    if not (np.isfinite(dof) and dof > 0):
        raise InputError(f"energies have {dof} degrees of freedom, expected a finite number above 0")
    if not np.isfinite(chi2).all():
        bad = int(chi2.size - np.isfinite(chi2).sum())
        raise InputError(
            f"{bad} of {chi2.size} energies are NaN or infinite, expected finite values",
            hint="Look for broken pixels in the image, or fit the detector again.",
        )
    if chi2.min() < 0:
        raise InputError(f"an energy is {chi2.min():.4g}, expected sums of squares >= 0")
    return chi2 / dof


def _best(
    level: Array, dof: float, charge: Array, bound: Bound, tail: Tail
) -> Iterator[tuple[Array, Array, Array, Array]]:
    """Yield the best disjoint regions of each image of chi2 / dof [B, h, w], as :func:`best_regions` gives them."""
    unit = _evidence(level, dof, tail)
    floor = 1.0 if bound == "one-sided" else -np.inf
    for one, evidence in zip(level, unit, strict=True):
        yield best_regions(one, evidence, charge, floor)


def clusters(
    chi2: Array,
    dof: float,
    *,
    bound: Bound = "one-sided",
    tail: Tail = "chernoff",
    charge: Array | None = None,
) -> Clusters:
    """Return the best disjoint regions of one scale (U-Flow, Procedures 1 and 2, at their fix-point).

    Args:
        chi2: [B, h, w] energies.
        dof: degrees of freedom.
        bound: "one-sided": a region whose level is at or below the mean of the null is no evidence.
            "reference": the original, which takes energies below their mean as evidence too.
        tail: "chernoff" bound of the tail, or the exact "gamma" one.
        charge: [h * w + 1] log10 tests by area to add to log10 P, or None.

    Raises:
        InputError: wrong shape, NaN, infinite or negative energies, dof not positive.
    """
    _check(bound, tail, "image")
    level = _levels(chi2, dof)
    shape, n = level.shape, level[0].size
    by_area = np.zeros(n + 1) if charge is None else charge
    log10_p, low, area = np.full(shape, np.nan), np.full(shape, np.nan), np.zeros(shape, dtype=np.int64)
    for b, (ranks, value, areas, flat) in enumerate(_best(level, dof, by_area, bound, tail)):
        inside = ranks >= 0
        chosen = ranks[inside]
        log10_p[b][inside] = value[chosen]
        area[b][inside] = areas[chosen]
        low[b][inside] = level[b].ravel()[flat[chosen]]
    return Clusters(log10_p, low, area)


def tree(
    energies: Sequence[tuple[Array, float]],
    size: tuple[int, int],
    *,
    bound: Bound = "one-sided",
    tail: Tail = "chernoff",
    tests: Tests = "image",
) -> npt.NDArray[np.float32]:
    """Return -log10 NFA [B, H, W] of the best region at each pixel; above 0 = NFA below 1.

    Per scale, the max-tree of the energy gives candidate regions and :func:`clusters` the best disjoint ones;
    maps are up-sampled (bilinear, half-pixel centres) and the lowest NFA over the scales is taken. An image's
    result depends on that image alone. Costs one sort per scale, and is linear otherwise.

    Args:
        energies: per scale (chi2 [B, h, w], dof); see :func:`latent_energies`.
        size: (H, W) of the result.
        bound: see :func:`clusters`.
        tail: see :func:`clusters`.
        tests: "image": every region is charged for all regions of all scales (the original; small regions
            need very strong evidence). "area": a region of area r is charged for regions of area r, times the
            number of areas.

    Raises:
        InputError: wrong shapes, NaN, infinite or negative energies.
    """
    _check(bound, tail, tests)
    check_size(size)
    if not energies:
        raise InputError("there are no energies, expected at least one scale")
    batches = {len(chi2) for chi2, _ in energies}
    if len(batches) > 1:
        raise InputError(f"the scales hold {sorted(batches)} images, expected the same number in each")
    sizes = tuple(int(np.prod(np.shape(chi2)[1:])) for chi2, _ in energies)
    lowest: Array | None = None
    for chi2, dof in energies:
        level = _levels(chi2, dof)
        charge, nothing = _charges(sizes, level[0].size, tests)
        grid = np.empty(level.shape, dtype=np.float32)
        for b, (ranks, value, _, _) in enumerate(_best(level, dof, charge, bound, tail)):
            # The last entry serves rank -1: no region, no evidence.
            grid[b] = np.maximum(np.append(np.minimum(value, nothing), nothing), -_LARGEST)[ranks]
        h, w = level.shape[1:]
        up = _linear(h, size[0]) @ grid @ _linear(w, size[1]).T
        lowest = up if lowest is None else np.minimum(lowest, up, out=lowest)
    assert lowest is not None
    if tests == "image":
        lowest += np.float32(log10_tests(sizes))
    return np.negative(lowest, out=lowest)


@functools.lru_cache(maxsize=64)
def _linear(n: int, out: int) -> npt.NDArray[np.float32]:
    """Return the [out, n] matrix of bilinear resizing: half-pixel centres, clamped borders, no filter."""
    x = np.clip((np.arange(out) + 0.5) * (n / out) - 0.5, 0, n - 1)
    low = np.minimum(x.astype(np.int64), max(n - 2, 0))
    matrix = np.zeros((out, n))
    rows = np.arange(out)
    matrix[rows, np.minimum(low + 1, n - 1)] = x - low
    matrix[rows, low] += 1 - (x - low)
    return matrix.astype(np.float32)


def detect(score: Array, eps: float = 1.0) -> tuple[npt.NDArray[np.bool_], list[Region]]:
    """Return the mask [H, W] and the regions where NFA < eps in a map of -log10 NFA."""
    if not eps > 0:
        raise InputError(f"eps is {eps}, expected a number of false alarms above 0")
    mask = np.asarray(score) > -np.log10(eps)
    return mask, find_regions(np.asarray(score), mask, np.negative)


def null_health(energies: Sequence[tuple[Array, float]]) -> list[NullHealth]:
    """Return, per scale, how the energies of normal images compare with chi-square(dof)."""
    from scipy.stats import chi2 as chi_square

    health = []
    for values, dof in energies:
        level = _levels(values, dof)
        mean, variance = float(level.mean()), float(level.var())
        limit = float(chi_square.isf(1e-3, dof)) / dof
        effective = 2 * mean**2 / variance if variance > 0 else np.inf
        health.append(NullHealth(float(dof), mean, float(effective), float((level > limit).mean() / 1e-3)))
    return health
