"""The linear autoencoder of every position, in closed form."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from adflow.methods._whiten import Moments, deviations


class PositionCodes(nn.Module):
    """Projection of vectors at each of P positions on their first principal components there.

    That is the best linear autoencoder of a given width (P. Baldi, K. Hornik, Neural networks and principal component
    analysis, 1989), and the optimum of a linear *variational* one for any weight of its divergence below the variance
    of the last component (J. Lucas et al., Don't Blame the ELBO!, NeurIPS 2019). Channels count in units of their
    deviation.

    Args:
        positions: P; 1 = one net for all positions.
        width: channels C.
    """

    mean_: Tensor
    unit_: Tensor
    basis_: Tensor

    def __init__(self, positions: int, width: int) -> None:
        super().__init__()
        self.register_buffer("mean_", torch.zeros(positions, width))
        self.register_buffer("unit_", torch.ones(width))
        self.register_buffer("basis_", torch.zeros(positions, width, 0))

    def learn(self, batches: Iterable[Tensor], shrinkage: float, latent: int, variance: float = 0.0) -> None:
        """Learn from vectors [B, P', C] at the P' cells of each image.

        Args:
            batches: the training vectors.
            shrinkage: weight of all positions' covariance in that of each position.
            latent: width d of the code; 0 = as many components as hold ``variance``.
            variance: a share of the vectors' variance.
        """
        positions, width = self.mean_.shape
        moments = Moments(positions, width)
        for x in batches:
            moments.add(x if positions > 1 else x.reshape(-1, 1, width))
        # One image has no spread: then a code of nothing is learned, the error is the distance to that image.
        alone = moments.count == 1
        spread = torch.zeros(positions, width, width).double() if alone else moments.covariance()
        everywhere = spread.mean(0)
        unit = deviations(everywhere)
        covariance = (1 - shrinkage) * spread + shrinkage * everywhere
        values, vectors = torch.linalg.eigh(covariance / unit / unit[:, None])
        kept = 0 if alone else min(latent, width - 1) or components(values.flip(1).mean(0), variance)
        self.mean_ = moments.mean.float()
        self.unit_ = unit.float()
        self.basis_ = vectors.flip(2)[:, :, :kept].float().contiguous()  # [P, C, d]

    def forward(self, rows: Tensor) -> Tensor:
        """Return what the code leaves of vectors [B, P, C], in deviations: their error of rebuilding [B, P, C]."""
        error = (rows - self.mean_) / self.unit_
        if len(self.basis_) == 1:
            return error - (error @ self.basis_[0]) @ self.basis_[0].T
        code = torch.einsum("bpc,pcd->bpd", error, self.basis_)
        return error - torch.einsum("bpd,pcd->bpc", code, self.basis_)


def components(values: Tensor, variance: float) -> int:
    """Return how many of the falling eigenvalues ``values`` it takes to hold the share ``variance``; at least 1.

    Never all of them: a code as wide as the features rebuilds everything.
    """
    share = values.clamp(min=0).cumsum(0) / values.clamp(min=0).sum().clamp(min=1e-30)
    return max(1, min(int((share < variance).sum()) + 1, len(values) - 1))
