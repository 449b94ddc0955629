"""Gaussian statistics of features: streamed, mergeable, factored without a loop over positions.

One class of sufficient statistics serves both uses: *global* whitening is the case of one position that all
patches share, the *per-position* Gaussian (PaDiM, Defard et al., 2021, arXiv:2011.08785, section III-B) is
the case of one position per grid cell. Everything is summed in float64; only what scoring needs is cast to
float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from adflow.errors import InputError


def by_position(vectors: Tensor) -> Tensor:
    """Return vectors [n, P, C] as [P, n, C], contiguous.

    Vectors of maps lie as [n, C, P]: for these it is one transposition of a matrix, which torch does block by block.
    """
    maps = vectors.transpose(1, 2)
    count, width, positions = maps.shape
    if maps.is_contiguous():
        return maps.reshape(count * width, positions).T.contiguous().view(positions, count, width)
    return vectors.transpose(0, 1).contiguous()


class Moments:
    """Count, mean and scatter of vectors at P positions, independently of each other.

    Batches are folded in by their own mean (Chan, Golub & LeVeque, Updating formulae and a pairwise algorithm
    for computing sample variances, 1979, eq. 2.1), so that nothing cancels, and parts merged in any grouping
    agree with the whole to float64 rounding.

    Args:
        positions: P.
        width: number of channels C; the scatter takes P * C * C * 8 bytes.

    Attributes:
        count: vectors seen at each position.
        mean: [P, C] float64.
        scatter: [P, C, C] float64, sum of (x - mean)(x - mean)^T.
    """

    def __init__(self, positions: int, width: int) -> None:
        self.count = 0
        self.mean = torch.zeros(positions, width, dtype=torch.float64)
        self.scatter = torch.zeros(positions, width, width, dtype=torch.float64)

    def add(self, vectors: Tensor) -> None:
        """Fold in vectors [n, P, C] of any float type.

        Raises:
            InputError: a value is not finite.
        """
        if len(vectors) == 0:
            return
        count, positions, width = vectors.shape
        # One row more than vectors, for the step between the means: the scatter is read and written once.
        rows = self.mean.new_empty(positions, count + 1, width)
        values = rows[:, :count]
        values.copy_(by_position(vectors))  # laid out for the product before it is widened: half the bytes are moved
        mean = values.mean(dim=1)
        if not bool(torch.isfinite(mean).all()):
            raise InputError("features are not finite", hint="Check the images and the backbone's weights.")
        values -= mean.unsqueeze(1)
        rows[:, count] = self._step(mean, count)
        self.scatter.baddbmm_(rows.transpose(1, 2), rows)

    def at(self, positions: slice) -> Moments:
        """Return the moments at some positions; they share this one's tensors."""
        part = Moments(0, 0)
        part.count, part.mean, part.scatter = self.count, self.mean[positions], self.scatter[positions]
        return part

    def merge(self, other: Moments) -> None:
        """Fold in the statistics of other vectors at the same positions."""
        if other.count == 0:
            return
        step = self._step(other.mean, other.count)
        self.scatter.baddbmm_(step.unsqueeze(2), step.unsqueeze(1))
        self.scatter += other.scatter

    def _step(self, mean: Tensor, count: int) -> Tensor:
        """Take ``count`` further vectors into count and mean; return s [P, C], of which s s^T is due to the scatter."""
        total = self.count + count
        step = mean - self.mean
        weight = self.count * count / total
        self.mean += step * (count / total)
        self.count = total
        return step * math.sqrt(weight)

    def pooled(self) -> Moments:
        """Return the moments of the vectors of all positions together, as if seen at one."""
        positions, width = self.mean.shape
        whole = Moments(1, width)
        whole.count = self.count * positions
        whole.mean = self.mean.mean(dim=0, keepdim=True)
        off = self.mean - whole.mean
        whole.scatter = (self.scatter.sum(dim=0) + self.count * (off.T @ off)).unsqueeze(0)
        return whole

    def covariance(self) -> Tensor:
        """Return the unbiased covariance [P, C, C] float64.

        Raises:
            InputError: fewer than two vectors a position.
        """
        if self.count < 2:
            raise InputError(f"{self.count} training image gives no covariance, expected at least 2")
        return self.scatter / (self.count - 1)


@dataclass(frozen=True)
class Whitening:
    """The eigenbasis of the correlation of all patches: y = (x - mean) @ basis has variances ``spectrum``.

    Attributes:
        mean: [C] float64.
        basis: [C, C] float64; column j is eigenvector j of the correlation, divided by the channels'
            deviations.
        spectrum: [C] float64 eigenvalues of the correlation plus the ridge, descending; all > 0.
    """

    mean: Tensor
    basis: Tensor
    spectrum: Tensor

    def matrix(self, alpha: float = 1.0) -> Tensor:
        """Return [C, C] float64 so that z = (x - mean) @ matrix is whitened to the degree ``alpha``.

        0 leaves standardised channels (rotated), 1 makes all directions count alike, 0.5 stands half way:
        direction j keeps the variance spectrum_j^(1 - alpha).
        """
        return self.basis * self.spectrum.pow(-alpha / 2)


def whitening(moments: Moments, ridge: float = 0.01) -> Whitening:
    """Return the whitening of the vectors seen at one position.

    Args:
        moments: statistics with P = 1.
        ridge: added to the eigenvalues of the correlation: directions with less variance than that are noise of the
            arithmetic and must not be blown up.
    """
    covariance = moments.covariance()[0]
    deviation = deviations(covariance)
    correlation = covariance / deviation / deviation.unsqueeze(1)
    values, vectors = torch.linalg.eigh(correlation)
    spectrum = values.flip(0).clamp(min=0) + ridge
    return Whitening(moments.mean[0].clone(), vectors.flip(1) / deviation.unsqueeze(1), spectrum)


def deviations(covariance: Tensor) -> Tensor:
    """Return the deviations [C] of a covariance [C, C].

    A channel that (nearly) never changes carries nothing, and dividing by its deviation would make noise of it: a floor
    lies below all of them.
    """
    deviation = covariance.diagonal().clamp(min=0).sqrt()
    return deviation.clamp(min=float(deviation.mean()) * 1e-3 + 1e-12)


def shrink(covariance: Tensor, shrinkage: float) -> Tensor:
    """Return (1 - shrinkage) * covariance + shrinkage * I, batched over leading axes.

    In whitened space the identity is the covariance of all patches: a position borrows from the whole.
    """
    eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype)
    return (1 - shrinkage) * covariance + shrinkage * eye


def inverse_factor(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Return A with A^T A = covariance^-1, and log det covariance, from one batched Cholesky decomposition.

    The squared Mahalanobis distance is |A (x - mean)|^2. A is lower triangular.

    Args:
        covariance: [P, C, C] float64, positive definite.

    Returns:
        A [P, C, C] and log det [P], both float64.

    Raises:
        InputError: a covariance is not positive definite.
    """
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if bool((failed != 0).any()):
        bad = int((failed != 0).sum())
        raise InputError(
            f"the covariance at {bad} of {failed.numel()} positions is not positive definite",
            hint="Use more shrinkage or a larger ridge, or check the training images.",
        )
    eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype).expand_as(covariance)
    inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
    return inverse, 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)


def leave_one_out(distances: Tensor, count: int, weight: float) -> Tensor:
    """Return what squared Mahalanobis distances of training vectors would be, had each been left out.

    A training vector pulls mean and covariance towards itself, the more the fewer there are; a new one does
    not. With n vectors, h = d^T S^-1 d and S = weight * covariance + (a part that does not depend on the
    data), the rank-one update (Sherman & Morrison, 1950) of mean and covariance gives (n / (n - 1))^2 h / (1
    - c h), c = weight n / ((n - 1)(n - 2)), up to the factor (n - 1) / (n - 2) of the covariance of the
    others.

    Args:
        distances: squared distances of any shape.
        count: n, at least 3; below, ``distances`` come back as they are.
        weight: share of the data in the covariance (1 - shrinkage).
    """
    if count < 3:
        return distances
    c = weight * count / ((count - 1) * (count - 2))
    return (count / (count - 1)) ** 2 * distances / (1 - c * distances).clamp(min=1e-3)


def chi_square_fit(energies: Tensor) -> tuple[Tensor, float]:
    """Fit a scaled chi-square: energies times ``scale`` have mean and variance of chi-square(dof).

    The Gaussian model says chi-square with as many degrees as channels, which real features do not follow:
    they are fewer in effect and heavier in their tails. Matching two moments (Box, 1954, Some theorems on
    quadratic forms) keeps the null model honest in its bulk; it says nothing about tails beyond the training
    images.

    Args:
        energies: [n, P] non-negative, of normal images that the model does not know (left out).

    Returns:
        scale [P] by position, and dof in [1, 1e4] for all of them.
    """
    mean = energies.mean(dim=0).clamp(min=1e-12)
    variance = (energies / mean).double().var(unbiased=False) if len(energies) > 1 else torch.tensor(2.0)
    dof = float((2 / variance.clamp(min=2e-4)).clamp(min=1.0))
    return dof / mean, dof
