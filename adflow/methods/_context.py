"""Conditional Gaussian of patch features given their position and the image they come from, in closed form.

A screw lies at any angle: at one position of the grid the features of good images are then many-valued, and a
Gaussian per position has to cover all of it. What the image looks like as a whole (its ``context`` u, a few
principal components of its pooled features) says which of the values is due. The model is::

    x | p, u  ~  N( c_p + B_p u,  S_p )          z = S_p^(-1/2) (x - c_p - B_p u)

and ``z`` with its log-determinant is one conditional affine layer of a normalizing flow: ``z`` is standard
normal where the image is. A defect is small: it moves u little, and cannot explain itself away.

Everything is a streamed sum; no gradient, no randomness.

Scoring is bound by memory: a matrix a position is tens of megabytes, read for every image. Therefore the whitening that
all positions share comes first, as one small matrix; what is left to a position is triangular, and its blocks above
the diagonal are neither stored nor read; and images that are there together share one reading.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adflow._nets import exporting
from adflow.errors import InputError
from adflow.methods._memory import to_grid
from adflow.methods._whiten import Moments, deviations, inverse_factor, whitening

Rows = Callable[[Sequence[int]], Tensor]

_BATCH = 32  # images whose features are converted to float64 at once
_BASIS_ROWS = 1024  # images the context's principal components are taken from
_CELLS = 8  # the context sees the image on at most 8 x 8 cells
# Images that pull every slope towards 0: a ridge in the units of the standardised context.
_SLOPE_PRIOR = 10.0
# Images per reading of the factors. Fewer are filled up with zeros: products of one shape give an image the same bits
# whatever is beside it.
TOGETHER = 8
_BLOCKS = 4  # columns of blocks a triangle is cut into: 62 % of the square are read; more blocks cost more calls
_FLOOR = 0.02  # weight of the identity, the covariance of all patches, in what positions share


class ContextWhitening(nn.Module):
    """Maps features x [B, C, h, w] of images to z [B, P, C], standard normal where the image is normal.

    Args:
        channels: C.
        grid: (h, w), P = h w positions.
        context: number of context components K; 0 = the Gaussian of the position alone.
        shrinkage: weight, in each position's covariance, of the mean covariance of all positions, in (0, 1].
        ridge: added to the eigenvalues of the global correlation.

    Attributes:
        mean: [P, C], c_p.
        world: [C, C], whitens the patches of all positions: y = (x - mean) @ world, rows as vectors.
        factor0, factor1, ...: [P, end, width] each, the blocks of columns of an upper triangular matrix
            [P, C, C] down to its diagonal: z = y @ triangle - u @ slope.
        slope: [K, P * C].
        logdet: [P], log |det dz/dx| at each position.
        centre, basis: [D] and [D, K]: context u = (pooled features - centre) @ basis.
    """

    mean: Tensor
    world: Tensor
    slope: Tensor
    logdet: Tensor
    centre: Tensor
    basis: Tensor

    def __init__(
        self, channels: int, grid: tuple[int, int], context: int, shrinkage: float = 0.5, ridge: float = 0.01
    ) -> None:
        super().__init__()
        positions = grid[0] * grid[1]
        cells = min(_CELLS, grid[0]) * min(_CELLS, grid[1])
        self.grid = grid
        self.context, self.shrinkage, self.ridge = context, shrinkage, ridge
        self.edges = [channels * k // _BLOCKS for k in range(_BLOCKS + 1)]
        self.register_buffer("mean", torch.zeros(positions, channels))
        self.register_buffer("world", torch.eye(channels))
        for name, block in zip(self._names(), self._cut(torch.eye(channels)), strict=True):
            self.register_buffer(name, block.repeat(positions, 1, 1))
        self.register_buffer("slope", torch.zeros(context, positions * channels))
        self.register_buffer("logdet", torch.zeros(positions))
        self.register_buffer("centre", torch.zeros(channels * cells))
        self.register_buffer("basis", torch.zeros(channels * cells, context))

    def _names(self) -> list[str]:
        return [f"factor{k}" for k in range(_BLOCKS)]

    def _cut(self, triangle: Tensor) -> list[Tensor]:
        """Return the blocks of columns of upper triangular matrices [..., C, C], each down to its diagonal."""
        return [triangle[..., :end, start:end] for start, end in pairwise(self.edges)]

    def pooled(self, features: Tensor) -> Tensor:
        """Return the features of [B, C, h, w] on at most 8 x 8 cells, flat: [B, D]."""
        cells = (min(_CELLS, features.shape[2]), min(_CELLS, features.shape[3]))
        return to_grid(features, cells).flatten(1)

    def describe(self, features: Tensor) -> Tensor:
        """Return the context u [B, K] of features [B, C, h, w], about unit variance per component."""
        return (self.pooled(features) - self.centre) @ self.basis

    def forward(self, features: Tensor) -> Tensor:
        """Return z [B, P, C] of features [B, C, h, w]; on a CPU the bits of an image do not depend on the others."""
        if exporting() or features.device.type != "cpu":
            return self._together(features, 0)
        parts = torch.split(features, TOGETHER)
        return torch.cat([self._together(part, TOGETHER - len(part)) for part in parts])

    def _together(self, features: Tensor, missing: int) -> Tensor:
        """Return z [B, P, C] of images that share one reading, computed as if ``missing`` more were with them."""
        y = torch.stack([(one.flatten(1).T - self.mean) @ self.world for one in features], 1)  # [P, B, C]
        y = F.pad(y, (0, 0, 0, missing)) if missing else y
        blocks = [self.get_buffer(name) for name in self._names()]
        z = torch.cat([torch.bmm(y[..., : block.shape[1]], block) for block in blocks], 2).transpose(0, 1)
        if self.context:
            seen = self.pooled(features) - self.centre
            seen = F.pad(seen, (0, 0, 0, missing)) if missing else seen
            shift = (seen @ self.basis @ self.slope).reshape(-1, *self.mean.shape)
            z = torch.rsub(shift, z)  # z - shift, laid out like shift: one image after the other
        return z[: len(features)].contiguous()

    def learn(self, rows: Rows, which: Sequence[int]) -> None:
        """Take mean, slopes and covariances from the images ``which``; ``rows`` gives features [n, C, h, w].

        Raises:
            InputError: fewer than two images, or features that are not finite.
        """
        which = list(which)
        if len(which) < 2:
            raise InputError(f"{len(which)} training image gives no covariance, expected at least 2")
        channels = self.mean.shape[1]
        kept = min(self.context, len(which) - 1)
        whole = Moments(1, channels)
        for features in _batches(rows, which):
            whole.add(features.permute(0, 2, 3, 1).reshape(-1, 1, channels))
        world = whitening(whole, self.ridge)
        self._learn_context(rows, which, world.mean, deviations(whole.covariance()[0]), kept)
        matrix = world.matrix()  # z = (x - world.mean) @ matrix
        moments = Moments(self.mean.shape[0], channels + kept)
        for features in _batches(rows, which):
            z = (features.flatten(2).transpose(1, 2).double() - world.mean) @ matrix  # [n, P, C]
            u = self.describe(features)[:, :kept].double()
            moments.add(torch.cat([z, u.unsqueeze(1).expand(-1, z.shape[1], -1)], 2))
        self._solve(moments, world.mean, matrix, kept)

    def _learn_context(self, rows: Rows, which: list[int], mean: Tensor, deviation: Tensor, kept: int) -> None:
        self.basis.zero_()
        self.centre.zero_()
        if kept == 0:
            return
        step = -(-len(which) // _BASIS_ROWS)
        seen = torch.cat([self.pooled(f) for f in _batches(rows, which[::step])]).double()  # [n, D]
        cells = seen.shape[1] // len(mean)
        # Every channel counts alike, as in the correlation that the whitening is taken from.
        weight = (1 / deviation).repeat_interleave(cells)
        centre = seen.mean(0)
        centred = (seen - centre) * weight
        values, vectors = torch.linalg.eigh(centred @ centred.T)  # principal components through the n x n Gram matrix
        kept = min(kept, len(seen) - 1)
        values, vectors = values[-kept:].flip(0), vectors[:, -kept:].flip(1)
        good = values > values[0] * 1e-9
        # Component k of an image is vectors[:, k] * sqrt(values[k]); it is divided by its deviation over the images.
        scale = torch.where(good, (len(seen) - 1) ** 0.5 / values.clamp(min=1e-30), torch.zeros(()).double())
        self.centre.copy_(centre)
        self.basis[:, :kept] = (weight.unsqueeze(1) * (centred.T @ vectors) * scale).to(self.basis.dtype)

    def _solve(self, moments: Moments, world: Tensor, matrix: Tensor, kept: int) -> None:
        channels, count = self.mean.shape[1], moments.count
        covariance = moments.covariance()
        own, cross = covariance[:, :channels, :channels], covariance[:, :channels, channels:]  # [P, C, C], [P, C, K]
        slope = torch.zeros(len(own), channels, self.context, dtype=torch.float64)
        if kept:
            context = covariance[0, channels:, channels:]  # the same at every position
            ridge = torch.linalg.inv(context + _SLOPE_PRIOR / count * torch.eye(kept, dtype=torch.float64))
            b = cross @ ridge
            slope[..., :kept] = b
            # Degrees of freedom that the slopes have used up make residuals too small by that share.
            share = (count - 1) / max(1.0, count - 1 - float((ridge @ context).diagonal().sum()))
            # S - B cross^T - cross B^T + B context B^T with B = cross ridge: one product a position.
            explained = 2 * cross - b @ context
            own = torch.baddbmm(own, b, explained.transpose(1, 2), beta=share, alpha=-share)
        # A position borrows from what all positions have in common once mean and context are taken away. A part of
        # the identity keeps that invertible where there are few images.
        common = _FLOOR * torch.eye(channels, dtype=torch.float64) + (1 - _FLOOR) * own.mean(0)
        factor, log_det = inverse_factor(torch.lerp(own, common, self.shrinkage))
        # The context has mean 0 over the images of the basis, which may be a part of all.
        centre = moments.mean[:, :channels] - (slope[..., :kept] @ moments.mean[:, channels:, None]).squeeze(2)
        back = torch.linalg.inv(matrix)
        self.mean.copy_(world + centre @ back)
        self.world.copy_(matrix)
        for name, block in zip(self._names(), self._cut(factor.transpose(1, 2)), strict=True):
            self.get_buffer(name).copy_(block)
        self.slope.copy_((factor @ slope).flatten(0, 1).T)
        self.logdet.copy_(torch.linalg.slogdet(matrix)[1] - 0.5 * log_det)


def _batches(rows: Rows, which: Sequence[int]) -> Iterator[Tensor]:
    for start in range(0, len(which), _BATCH):
        yield rows(which[start : start + _BATCH])


def cross_fitted(
    layer: ContextWhitening, rows: Rows, order: Tensor, *, views: int, folds: int, keep: int, parts: int
) -> Tensor:
    """Return z [n, P, C] of images, each whitened by a layer that learned from the other folds.

    Args:
        layer: learned from all images; the others are made like it, and it serves where there are too few for folds.
        rows: features of the rows of a bank.
        order: the images, in the order in which they are dealt to folds.
        views: rows per image.
        folds: into how many parts the images are cut, at least two images each.
        keep: images of all folds together that are returned, about.
        parts: folds that are whitened; 1 = the first only.
    """
    images = len(order)
    folds = max(1, min(folds, images // 2))
    pool: list[Tensor] = []
    for fold in range(min(parts, folds)):
        part, other = order, layer
        if folds > 1:
            part = order[fold::folds]
            other = ContextWhitening(layer.mean.shape[1], layer.grid, layer.context, layer.shrinkage, layer.ridge)
            other.learn(rows, _with_views(order[~torch.isin(order, part)], views))
        kept = _with_views(part[: -(-keep * len(part) // images)], views)
        pool.extend(other(rows(kept[i : i + TOGETHER])) for i in range(0, len(kept), TOGETHER))
    return torch.cat(pool)


def _with_views(images: Tensor, views: int) -> list[int]:
    """Return the rows of images."""
    return [int(i) * views + v for i in images for v in range(views)]
