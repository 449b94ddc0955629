"""U-Flow's block test (2023): windows of fixed size instead of a tree, kept for reproduction."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from adflow.errors import InputError, unknown

Array = npt.NDArray[Any]

# chi2.ppf(0.9, df=1): an entry of a normal latent squares above it with probability 0.1.
_TAU = 2.705543454095404


@functools.lru_cache(maxsize=64)
def _cubic(n: int, out: int) -> npt.NDArray[np.float64]:
    """Return the [out, n] matrix of bicubic resizing (a = -0.75), corners aligned, borders repeated."""
    x = np.arange(out) * ((n - 1) / (out - 1)) if out > 1 else np.zeros(1)
    low = np.floor(x).astype(np.int64)
    matrix = np.zeros((out, n))
    a = -0.75  # Keys, "Cubic convolution interpolation", 1981; the constant torch uses
    for offset in (-1, 0, 1, 2):
        d = np.abs(x - (low + offset))
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        np.add.at(matrix, (np.arange(out), np.clip(low + offset, 0, n - 1)), np.where(d <= 1, near, far))
    return matrix


@functools.lru_cache(maxsize=64)
def _block_table(n: int, channels: int, precision: Literal["low", "high"]) -> npt.NDArray[np.float64]:
    """Return log10 P for k = 0..n * channels hits in a window of n positions, x = k / channels a channel.

    "low": P(X > floor(x)) of a binomial(n, 0.1). "high": the integral from x to n of the binomial density
    continued to real arguments. Both are 0 at x = n in the original, here the last finite value is kept
    (log10 P of n hits for "low").
    """
    from scipy.special import gammaln
    from scipy.stats import binom

    p = 0.1
    hits = np.arange(n * channels + 1)
    if precision == "low":
        with np.errstate(divide="ignore"):
            log_p = np.asarray(binom.logsf(hits / channels, n, p)) / np.log(10)
        return np.append(log_p[:-1], n * np.log10(p))
    parts = max(1, -(-16 // channels))  # 16 intervals per unit and more: Gauss-Legendre is then exact to 1e-13
    nodes, gauss = np.polynomial.legendre.leggauss(4)
    step = 1 / (channels * parts)
    t = (np.arange(n * channels * parts)[:, None] + (nodes + 1) / 2) * step
    log_density = gammaln(n + 1) - gammaln(t + 1) - gammaln(n - t + 1)
    log_density += t * np.log(p) + (n - t) * np.log(1 - p)
    pieces = (np.exp(log_density) @ gauss * step / 2).reshape(-1, parts).sum(axis=1)
    log_p = np.log10(np.cumsum(pieces[::-1])[::-1])
    table: npt.NDArray[np.float64] = np.append(log_p, log_p[-1])
    return table


def block_log_probability(z: Array, scale: int, precision: Literal["low", "high"] = "high") -> Array:
    """Return log10 P [B, h, w] of U-Flow's block test at scale index ``scale`` (0 = finest).

    Entries with z^2 above the 90 % quantile of chi-square(1) are counted over all channels in a window of 5 x
    5 positions (3 x 3 from the second scale), reflected at the borders; their mean per channel is tested as
    binomial(n, 0.1). The mean over channels is the original's heuristic: there are n * C trials, not n.

    Raises:
        InputError: latents that are not [B, C, h, w] or not finite.
    """
    if precision not in ("low", "high"):
        raise unknown("precision", precision, ("low", "high"))
    z = np.asarray(z)
    if z.ndim != 4 or 0 in z.shape:
        raise InputError(f"latents have shape {list(z.shape)}, expected [B, C, h, w] with no empty side")
    if not np.isfinite(z).all():
        raise InputError("latents hold NaN or infinite values, expected finite ones")
    half = max(int(5 / 2**scale // 2), 1)
    width = 2 * half + 1
    hits = (z * z >= _TAU).sum(axis=1, dtype=np.int64)
    padded = np.pad(hits, ((0, 0), (half, half), (half, half)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (width, width), axis=(1, 2))
    table = _block_table(width * width, z.shape[1], precision)
    log_p: Array = table[windows.sum(axis=(3, 4))]
    return log_p


def block(
    latents: Sequence[Array], size: tuple[int, int], *, precision: Literal["low", "high"] = "high"
) -> npt.NDArray[np.float64]:
    """Return -log10 NFA [B, H, W] of U-Flow's block test; above 0 = less than one false alarm expected.

    log10 P of the scales, up-sampled bicubically with aligned corners, is summed; tests = all positions.

    Args:
        latents: per scale [B, C, h, w], N(0, 1) under the null, finest first.
        size: (H, W) of the result.
        precision: "low" (binomial tail, stepped) or "high" (continuous in the mean count, used in the paper).

    Raises:
        InputError: wrong shapes, or latents that are not finite.
    """
    check_size(size)
    if not latents:
        raise InputError("there are no latents, expected at least one scale")
    total: Array = np.zeros((len(latents[0]), *size))
    positions = 0
    for scale, z in enumerate(latents):
        log_p = block_log_probability(z, scale, precision)
        positions += log_p[0].size
        total += _cubic(log_p.shape[1], size[0]) @ log_p @ _cubic(log_p.shape[2], size[1]).T
    # The original rounds the number of tests to float32; kept so that scores agree to the last digits.
    return -(float(np.float32(np.log10(positions))) + total)


def check_size(size: tuple[int, int]) -> None:
    """Raise InputError unless ``size`` is the (height, width) of a map."""
    if len(size) != 2 or min(size) < 1:
        raise InputError(f"the size of the map is {size}, expected (height, width) >= 1")
