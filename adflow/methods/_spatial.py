"""What flows on feature maps share: the layer in front of them, and the density at each position."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from adflow.errors import InputError
from adflow.methods._whiten import Moments, inverse_factor, shrink, whitening

if TYPE_CHECKING:
    from adflow.flows import AllInOneBlock

# What can stand in front of a flow; see `normaliser`.
NORMS = ("none", "layer", "affine", "position")


def normaliser(norm: str, channels: int, grid: tuple[int, int]) -> nn.Module:
    """Return the layer in front of a flow on [B, C, h, w].

    "none"; "layer" = LayerNorm over [C, h, w] without trainable part; "affine" = the originals' trainable one, which
    can raise the likelihood by shrinking features, as its Jacobian is in no loss; "position" = whitening per position.
    """
    if norm == "position":
        return PositionWhitening(channels, grid)
    if norm == "none":
        return nn.Identity()
    return nn.LayerNorm([channels, *grid], elementwise_affine=norm == "affine")


def coupling_pass(blocks: Iterable[AllInOneBlock], x: Tensor) -> tuple[Tensor, Tensor]:
    """Map x [B, C, h, w] through couplings; return it with the log-determinant [B, h, w] at each position.

    The same map as the FrEIA graph's, written out, because FrEIA sums log-determinants over positions.
    """
    logdet = x.new_zeros(x.shape[0], *x.shape[2:])
    for block in blocks:
        kept, changed = torch.split(x, [block.kept, block.changed], 1)
        s, t = block.coefficients(kept, ())
        scale = block.scale()
        x = block.mix(torch.cat([kept, changed * s.exp() + t], 1) * scale + block.global_offset)
        logdet = logdet + s.sum(1) + scale.log().sum()
    return x, logdet


class PositionWhitening(nn.Module):
    """Fixed affine map per position, z = A_p (x - m_p), from the Gaussian of the training features there.

    Its log-determinant is that of the matrices A_p; ``learn`` sets them.
    """

    def __init__(self, channels: int, grid: tuple[int, int]) -> None:
        super().__init__()
        positions = grid[0] * grid[1]
        self.grid = grid
        self.mean: Tensor
        self.factor: Tensor
        self.log_scale: Tensor
        self.register_buffer("mean", torch.zeros(positions, channels))
        self.register_buffer("factor", torch.eye(channels).repeat(positions, 1, 1))
        self.register_buffer("log_scale", torch.zeros(positions))

    @property
    def logdet(self) -> Tensor:
        """Return the log-determinant of one image, a scalar."""
        return self.log_scale.sum()

    def position_logdet(self) -> Tensor:
        """Return the log-determinant [h, w] at each position."""
        return self.log_scale.reshape(self.grid)

    def learn(self, batches: Iterator[Tensor], shrinkage: float) -> None:
        """Learn from batches [B, C, h, w]; a position's covariance is shrunk to that of all by ``shrinkage``."""
        everywhere: Moments | None = None
        here: Moments | None = None
        for batch in batches:
            rows = batch.permute(0, 2, 3, 1).flatten(1, 2)  # [B, P, C]
            if everywhere is None or here is None:
                everywhere, here = Moments(1, rows.shape[2]), Moments(rows.shape[1], rows.shape[2])
            everywhere.add(rows.reshape(-1, 1, rows.shape[2]))
            here.add(rows)
        if everywhere is None or here is None:
            raise InputError("there is no feature to learn from")
        whole = whitening(everywhere)
        # x - m_p in whitened space, with the covariance there shrunk to the identity: (1 - l) Cov_p + l I.
        matrix = whole.matrix()
        covariance = matrix.T @ here.covariance() @ matrix
        inverse, log_cov = inverse_factor(shrink(covariance, shrinkage))
        factor = inverse @ matrix.T
        self.mean = here.mean.float()
        self.factor = factor.float()
        self.log_scale = (-0.5 * log_cov + torch.linalg.slogdet(matrix).logabsdet).float()

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, h, w] to whitened [B, C, h, w]."""
        rows = x.flatten(2).permute(2, 1, 0) - self.mean.unsqueeze(2)  # [P, C, B]
        return torch.bmm(self.factor, rows).permute(2, 1, 0).reshape(x.shape)
