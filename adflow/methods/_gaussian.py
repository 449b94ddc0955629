"""A Gaussian at every position of a grid: fitted from parts of the images, scored by one product a position.

Used by PaDiM and by our own method. See ``_whiten`` for the statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from adflow.features import FeatureBank
from adflow.methods._whiten import Moments, Whitening, by_position, inverse_factor, shrink, whitening

Vectors = Callable[[list[Tensor]], Tensor]
"""From a pyramid to vectors [B, P, d]; picklable, see :meth:`FeatureBank.parts`."""

BATCH = 32  # images whose vectors are made together
WORK = 256 << 20  # bytes of float64 statistics held at once when no limit is set


def moments_of(vectors: Vectors, width: int, positions: slice | None, part: FeatureBank) -> Moments:
    """Return the moments of some images at some ``positions``, or with None of all positions as if they were one."""
    moments: Moments | None = None
    for pyramid in part.batches(BATCH):
        found = vectors(pyramid)
        found = found.reshape(-1, 1, width) if positions is None else found[:, positions]
        moments = moments or Moments(found.shape[1], width)
        moments.add(found)
    assert moments is not None  # a part has at least one image
    return moments


def global_whitening(bank: FeatureBank, vectors: Vectors, width: int, ridge: float) -> Whitening:
    """Return the whitening of all vectors of all positions, in one pass."""
    return whitening(bank.merged(partial(moments_of, vectors, width, None)), ridge)


class PositionGaussians(nn.Module):
    """Mean and covariance of vectors [n, P, d] at each of P positions, ready for Mahalanobis distances.

    ``inverse_`` [P, d, d or rank] is the transposed factor: |(x - mean) @ inverse_|^2 is squared distance.

    Args:
        positions: P.
        width: d.
        rank: keep that many principal axes a position, and one variance for all others (probabilistic PCA,
            Tipping & Bishop, 1999): d / rank times less memory and time. None = the full covariance.
    """

    mean_: Tensor
    inverse_: Tensor
    log_det_: Tensor
    basis_: Tensor
    tail_: Tensor

    def __init__(self, positions: int, width: int, rank: int | None = None) -> None:
        super().__init__()
        self.rank = None if rank is None or rank >= width else rank
        kept = self.rank or width
        side = width if self.rank else 0
        self.register_buffer("mean_", torch.zeros(positions, width))
        self.register_buffer("inverse_", torch.zeros(positions, width, kept))
        self.register_buffer("log_det_", torch.zeros(positions))
        self.register_buffer("basis_", torch.zeros(side, side))
        self.register_buffer("tail_", torch.ones(positions if self.rank else 0))

    @staticmethod
    def needs(positions: int, width: int, rank: int | None = None) -> int:
        """Return the bytes a fit takes at least: what is learned, and float64 work for one position."""
        kept = min(rank or width, width)
        return 4 * positions * width * (kept + 2) + PositionGaussians._work(width) + 4 * 8 * width * width

    @staticmethod
    def _work(width: int) -> int:
        # Scatter, covariance, its factor, the inverse, and room for two products.
        return 6 * 8 * width * width

    def fit(
        self,
        bank: FeatureBank,
        vectors: Vectors,
        *,
        whiten: bool,
        ridge: float,
        shrinkage: float = 0.0,
        work: int = WORK,
        progress: Callable[[int, int, str], object] | None = None,
    ) -> Whitening | None:
        """Learn all positions, as many at a time as ``work`` bytes of statistics allow (at least one).

        Args:
            bank: of the training images.
            vectors: of a pyramid.
            whiten: model in the whitened space of all vectors of all positions.
            ridge: added to the covariances' diagonal; with ``whiten`` to the eigenvalues of the global
                correlation.
            shrinkage: weight of the identity in whitened space.
            work: bytes.
            progress: called with (positions done, positions, what).

        Returns:
            The whitening, when there is one.

        Raises:
            InputError: fewer than two images, or features that are not finite.
        """
        positions, width = self.mean_.shape
        # A pass over the data costs more than what is learned from it: half of the room holds as many scatters as it
        # can, the other half those of a further part, and then the work. Where all are held at once, they say what all
        # positions share as well.
        held = max(1, work // 2 // (8 * width * width))
        white = global_whitening(bank, vectors, width, ridge) if whiten and held < positions else None
        step = max(1, work // 2 // self._work(width))
        for first in range(0, positions, held):
            last = min(first + held, positions)
            moments = bank.merged(partial(moments_of, vectors, width, slice(first, last)))
            if whiten and white is None:
                white = whitening(moments.pooled(), ridge)
            for start in range(first, last, step):
                part = slice(start, min(start + step, last))
                here = moments.at(slice(part.start - first, part.stop - first))
                self.learn(here, white, part, ridge=ridge, shrinkage=shrinkage)
                if progress:
                    progress(part.stop, positions, "position Gaussians")
        return white

    def learn(
        self, moments: Moments, white: Whitening | None, positions: slice, *, ridge: float, shrinkage: float
    ) -> None:
        """Turn the moments of some ``positions`` into the model there."""
        covariance = moments.covariance()
        self.mean_[positions] = moments.mean.float()
        if self.rank:
            basis = torch.eye(covariance.shape[-1], dtype=torch.float64) if white is None else white.matrix()
            if white is None:
                covariance.diagonal(dim1=1, dim2=2).add_(ridge)
            else:
                covariance = shrink(basis.T @ covariance @ basis, shrinkage)
            values, axes = torch.linalg.eigh(covariance)  # ascending
            tail, top = values[:, : -self.rank].mean(dim=1, keepdim=True), values[:, -self.rank :]
            # |x|^2 / tail - sum_j (1 / tail - 1 / value_j) (axis_j . x)^2: one product with [d, rank].
            weights = (1 / tail - 1 / top).clamp(min=0).sqrt()
            leading = axes[:, :, -self.rank :] * weights.unsqueeze(1)  # [P, d, rank]
            self.inverse_[positions] = leading.float()
            self.tail_[positions] = tail.squeeze(1).float()
            self.basis_.copy_(basis)
            others = values.shape[1] - self.rank
            spread = top.log().sum(dim=1) + others * tail.squeeze(1).log()
        elif white is None:
            covariance.diagonal(dim1=1, dim2=2).add_(ridge)
            inverse, spread = inverse_factor(covariance)
            self.inverse_[positions].copy_(inverse.transpose(1, 2))
        else:
            # With z = x W the model is (1 - l) W^T S W + l I, and |z - m|^2 under it is |x - m|^2 under
            # (1 - l) S + l (W W^T)^-1: no product per position. log det differs by that of (W W^T)^-1.
            back = torch.linalg.inv(white.matrix())
            world = back.T @ back
            inverse, spread = inverse_factor(covariance.lerp_(world, shrinkage))
            self.inverse_[positions].copy_(inverse.transpose(1, 2))
            spread = spread - torch.linalg.slogdet(world).logabsdet
        self.log_det_[positions] = spread.float()

    def forward(self, vectors: Tensor) -> Tensor:
        """Return squared Mahalanobis distances [B, P] of vectors [B, P, d]."""
        # The matrices are read from memory once and in order.
        centred = by_position(vectors) - self.mean_.unsqueeze(1)  # [P, B, d]
        if self.rank:
            centred = centred @ self.basis_
        along = torch.bmm(centred, self.inverse_).square_().sum(dim=2)  # [P, B]
        if self.rank:
            along = (centred.square_().sum(dim=2) / self.tail_.unsqueeze(1) - along).clamp(min=0)
        return along.T
