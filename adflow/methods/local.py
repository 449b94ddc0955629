"""Local density: what is normal at this place, by a Gaussian and by nearest patches. adflow's own method.

No training loop, and no randomness but a rotation of coordinates and where a choice of patches starts: three passes
over the features and it is fitted.

**What is learned.** Three estimates of the density of normal patches at every cell of the feature grid:

- a *Gaussian* p_G with mean m and covariance S of the cell's vectors in whitened space. Few images say little about S,
  so it is shrunk towards the covariance of all cells together, which whitening makes the identity:
  S <- (1 - l) S + l I. How strong the deviations of one image are as a whole is not known beforehand; with the
  scale-free prior 1/t on a common factor t of S the factor integrates out, and with D^2 = (z - m)^T S^-1 (z - m)

      -log p_G(z) = C/2 * log(D^2 * det(S)^(1/C)) + const;

- a *nearest-neighbour density* p_L of the place (Loftsgaarden & Quesenberry, 1965): among n vectors of the cell and the
  8 cells around it, over all training images, the ball that reaches the nearest one, of radius r, has one of n in it,
  so p_L = 1 / (n V r^C) with V the volume of the unit ball, and

      -log p_L(z) = C/2 * log(r^2) + const.

  The neighbouring cells are there because objects move by a few pixels; a patch that is normal elsewhere in the image
  only is not normal here. Distances are taken in *half-whitened* space (a direction with variance v keeps sqrt(v)):
  full whitening lets directions of mere noise decide who is near, none lets the loudest channels;

- the same density p_A of *anywhere*: R is the distance to the nearest row of a greedy coreset of all patches, wherever
  they lie, as in PatchCore. It adds what the whole image knows about a place that has few examples. Rows chosen to
  cover are no sample, so this is a density in its falling off only.

**Why they are combined so.** The Gaussian knows directions and extrapolates from few images, but has one mode; the
neighbours follow any shape, but know nothing between samples. None is right, their errors differ, and all speak in the
same unit, C/2 nats per log. Two questions are asked: is the patch normal *here*, and would it be normal *anywhere*? The
first has two answers, which share its weight. The logarithmic opinion pool p ~ (p_G p_L)^(1/4) p_A^(1/2) (Genest &
Zidek, 1986) keeps what all find unlikely. Its negative log is C/2 * log(score) with

    score = (D^2 det(S)^(1/C) * r^2)^(1/4) R / (the mean of the same on left-out training images),

a geometric mean of squared distances. So a score is a factor: 1 = an average normal patch that was not learned from,
4 = twice as far away. ``gaussian=False`` and ``coreset=None`` leave a member out; its weight goes to the others of its
question, or to the other question. The ``quality`` recipe pools the two neighbour densities at 384 px, where a Gaussian
has the same images for 2.25 times as many, smaller cells.

**What it is not.** It assumes that images are aligned about as well as PaDiM does. The density is a pool of crude ones,
not calibrated by itself: thresholds come from held-out normals. Degrees of whitening, shrinkage, rank, the stride-16
grid, the radius of one cell, widths, samples, rows, the members of the pool and those of ``quality`` were compared on
*test* images of screw and magnetic_tile, the members' weights on the demo textures too, so figures on those are
somewhat optimistic.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from adflow._system import resident_bytes
from adflow.detector import Energy, FeatureDetector, ImageSource, Progress, Resources
from adflow.errors import UsageError
from adflow.features import PART
from adflow.methods._checks import at_least, some_or_all
from adflow.methods._gaussian import BATCH, WORK, PositionGaussians, global_whitening
from adflow.methods._local_bank import LocalBank
from adflow.methods._memory import (
    StreamingCoreset,
    common_grid,
    concatenate,
    coreset_size,
    half_norms,
    keep_within,
    nearest,
    parse_bytes,
    pyramid_shapes,
    random_projection,
)
from adflow.methods._whiten import Whitening, chi_square_fit, leave_one_out

if TYPE_CHECKING:
    from adflow.backbones import Backbone
    from adflow.features import FeatureBank

_LEFT_OUT = 128  # training images whose left-out scores are measured: enough for a mean and a variance
_HELD = 1 << 30  # bytes of rows, copies included, among which a coreset is chosen at once
_RIDGE = 0.01  # added to the eigenvalues of the correlation: below it lies noise of the arithmetic
_FLOOR = 1e-12  # a patch that is in the bank has distance 0, and no logarithm


class Local(FeatureDetector):
    """Pool of a Gaussian and a nearest-neighbour density at every place; see the module for the derivation.

    Args:
        backbone: images to feature pyramid; its taps are averaged onto the coarsest of their grids.
        gaussian: whether the Gaussian is a member of the pool.
        shrinkage: l, weight of the global covariance in a cell's, in [0, 1).
        rank: principal axes a cell's Gaussian keeps, with one variance for all others; None = the full
            covariance.
        whiten: degree of whitening for distances, 0 (standardised) to 1 (full).
        width: coordinates kept for distances, by a seeded random rotation; None = all.
        radius: neighbouring cells on each side whose vectors count as normal here.
        samples: vectors a cell keeps at most; with more training images a greedy choice (farthest first) keeps those
            that cover the others. Bounds memory and time of scoring whatever the number of images.
        coreset: rows of the global bank, a share such as "10%" or a number; None = no such member of the pool.
        max_memory: bytes the process may hold while fitting, such as "2GiB"; refuses before it starts when it cannot
            be kept. None = no limit.
        base: options of every feature detector (smooth, image_score, margin).
    """

    paper: ClassVar[str] = "adflow's own; see adflow/methods/local.py"
    year: ClassVar[int] = 2026
    learns: ClassVar[str] = "at every position a Gaussian and a bank of normal patches, and a coreset of all"
    has_null: ClassVar[bool] = True
    fit_cost: ClassVar[str] = "time O(n P (d^2 + s w + m w)), memory O(P (d^2 + s w)) for s <= samples kept a cell"
    score_cost: ClassVar[str] = "time O(P (r d + 9 s w + m w)), memory O(P (r d + s w)): grows with n up to samples"
    recipes: ClassVar[dict[str, dict[str, Any]]] = {
        "fast": {"backbone": "lite0", "taps": ("b2", "b3", "b4"), "size": 256},
        "quality": {
            "backbone": "lite0",
            "taps": ("b2", "b3", "b4"),
            "size": 384,
            "gaussian": False,
            "samples": 512,
        },
    }

    scale_: Tensor
    dof_: Tensor
    unit_: Tensor
    near_: Tensor
    centre_: Tensor
    bank_: Tensor
    halves_: Tensor

    def __init__(
        self,
        backbone: Backbone,
        *,
        gaussian: bool = True,
        shrinkage: float = 0.3,
        rank: int | None = 64,
        whiten: float = 0.5,
        width: int | None = 128,
        radius: int = 1,
        samples: int = 192,
        coreset: str | None = "4500",
        max_memory: str | None = None,
        **base: Any,
    ) -> None:
        super().__init__(backbone, **base)
        if not 0 <= shrinkage < 1 or not 0 <= whiten <= 1:
            raise UsageError(f"shrinkage is {shrinkage}, whiten {whiten}; expected [0, 1) and [0, 1]")
        at_least(0, radius=radius)
        at_least(1, samples=samples)
        some_or_all(rank=rank, width=width)
        if coreset is not None:
            coreset_size(coreset, 1)
        parse_bytes(max_memory)
        self.gaussian = gaussian
        self.shrinkage = shrinkage
        self.rank = None if rank is None else int(rank)
        self.whiten = whiten
        self.width = None if width is None else int(width)
        self.radius = radius
        self.samples = samples
        self.coreset = coreset
        self.max_memory = max_memory

    def needs(self, images: int, channels: list[int], grids: list[tuple[int, int]]) -> int:
        """Return the bytes a fit of ``images`` takes at least beside their features."""
        positions, d = math.prod(common_grid(grids, "coarsest")), sum(channels)
        width = min(self.width or d, d)
        # Up to twice the samples are held while the bank is filled, and once more while it is packed.
        bank = 4 * positions * 2 * min(2 * self.samples, images) * width
        rows = 0
        if self.coreset is not None:
            rows = 4 * 2 * width * coreset_size(self.coreset, images * positions)
        return PositionGaussians.needs(positions if self.gaussian else 0, d, self.rank) + bank + rows

    def _check_memory(self, images: int, channels: list[int], grids: list[tuple[int, int]]) -> None:
        keep_within(
            parse_bytes(self.max_memory),
            self.needs(images, channels, grids),
            f"a local model of {images} images at {math.prod(common_grid(grids, 'coarsest'))} positions",
            "Keep fewer samples a cell (--set samples=128), a smaller width, or use a smaller size.",
        )

    def allow(self, images: ImageSource, resources: Resources) -> Resources:
        """Refuse a fit whose ``max_memory`` cannot be kept."""
        if self.max_memory is not None:
            self._check_memory(len(images), *pyramid_shapes(self.backbone, images))
        return resources

    def prepare(
        self,
        channels: list[int],
        grids: list[tuple[int, int]],
        size: tuple[int, int],
        generator: torch.Generator,
    ) -> None:
        """Create the tensors (see :meth:`FeatureDetector.prepare`)."""
        self.grid_ = common_grid(grids, "coarsest")
        positions, d = math.prod(self.grid_), sum(channels)
        width = min(self.width or d, d)
        self.gaussians = PositionGaussians(positions if self.gaussian else 0, d, self.rank)
        self.neighbours = LocalBank(self.grid_, width, self.radius)
        self.register_buffer("centre_", torch.zeros(d))
        self.register_buffer("near_", torch.zeros(d, width))
        self.register_buffer("bank_", torch.zeros(0, width))
        self.register_buffer("halves_", torch.zeros(0))
        self.register_buffer("unit_", torch.tensor(1.0))
        self.register_buffer("scale_", torch.ones(positions))
        self.register_buffer("dof_", torch.tensor(1.0))

    def vectors(self, pyramid: list[Tensor]) -> Tensor:
        """Return the vectors [B, P, d] of a pyramid: taps side by side, averaged onto the coarsest grid."""
        return concatenate(pyramid, self.grid_).flatten(2).transpose(1, 2)

    def fit_features(
        self,
        bank: FeatureBank,
        *,
        generator: torch.Generator,
        progress: Progress | None = None,
        checkpoint: Path | None = None,
    ) -> None:
        """Learn Gaussians and banks in passes over the features, then the scores of left-out images."""
        self._check_memory(len(bank), list(bank.channels), list(bank.grids))
        d, width = self.near_.shape
        white = self._fit_gaussians(bank, d, progress)
        self.centre_.copy_(white.mean)
        # A rotation changes no distance; its first coordinates hold a fair share of every direction.
        rotation = torch.linalg.qr(torch.randn(d, width, generator=generator, dtype=torch.float64)).Q
        self.near_.copy_(white.matrix(self.whiten) @ rotation * math.sqrt(d / width))
        rows = len(bank) * math.prod(self.grid_)
        coreset = None
        if self.coreset is not None:
            size = coreset_size(self.coreset, rows)
            limit = parse_bytes(self.max_memory)
            held = _HELD if limit is None else min(_HELD, (limit - resident_bytes()) // 4)
            capacity = min(rows, max(2 * size, held // (12 * width)))
            coreset = StreamingCoreset(size, capacity, random_projection(width, width, generator), generator)
        self.neighbours.start(self.samples)
        work = partial(self.patches, None if coreset is None else coreset.fresh())
        for done, (patches, numbers, rows_kept) in enumerate(bank.parts(work), start=1):
            self.neighbours.take(patches, numbers)
            if coreset is not None and rows_kept is not None:
                coreset.add(rows_kept)
            if progress:
                progress(min(done * PART, len(bank)), len(bank), "bank of patches")
        self.neighbours.finish()
        if coreset is not None:
            self.bank_ = coreset.rows()
            self.halves_ = half_norms(self.bank_)
        self._measure(bank)

    def _fit_gaussians(self, bank: FeatureBank, d: int, progress: Progress | None) -> Whitening:
        """Learn the Gaussians, when they are wanted, and return the whitening distances need in any case."""
        vectors = self.vectors
        if not self.gaussian:
            return global_whitening(bank, vectors, d, _RIDGE)
        limit = parse_bytes(self.max_memory)
        white = self.gaussians.fit(
            bank,
            vectors,
            whiten=True,
            ridge=_RIDGE,
            shrinkage=self.shrinkage,
            work=WORK if limit is None else min(WORK, limit // 8),
            progress=progress,
        )
        assert white is not None  # it was asked for
        return white

    def patches(self, like: StreamingCoreset | None, part: FeatureBank) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return what the banks keep of some images: that of every place (:meth:`LocalBank.kept`), and a coreset."""
        here = LocalBank(self.grid_, self.near_.shape[1], self.radius)
        here.start(self.samples, part.first)
        coreset = None if like is None else like.fresh()
        for pyramid in part.batches(BATCH):
            near = self._near(self.vectors(pyramid))
            here.add(near)
            if coreset is not None:
                coreset.add(near.flatten(0, 1))
        return *here.kept(), None if coreset is None else coreset.of_part()

    def _near(self, vectors: Tensor) -> Tensor:
        return (vectors - self.centre_) @ self.near_

    def _measure(self, bank: FeatureBank) -> None:
        """Learn the unit of the score, and how left-out scores are spread at every position."""
        work = partial(self.left_out, max(1, len(bank) // _LEFT_OUT), len(bank))
        scores = torch.cat(list(bank.parts(work)))  # [n, P]
        self.unit_.copy_(scores.mean())
        scale, dof = chi_square_fit(scores / self.unit_)
        self.scale_.copy_(scale)
        self.dof_.fill_(dof)

    def left_out(self, step: int, images: int, part: FeatureBank) -> Tensor:
        """Return the pooled distances [n, P] of every ``step``-th of all ``images`` that is in a part, left out."""
        rows = range(-part.first % step, len(part), step)
        found = [self._pool(self.vectors(part.pyramid([i])), part.first + i, images) for i in rows]
        return torch.cat(found) if found else torch.zeros(0, math.prod(self.grid_))

    def _pool(self, vectors: Tensor, own: int | None = None, images: int = 0) -> Tensor:
        """Return the geometric mean of the squared distances [B, P], weighted as the module says.

        Args:
            vectors: [B, P, d].
            own: number of the training image these are from (B = 1), to be left out; None = a new image.
            images: how many there were.
        """
        near = self._near(vectors)
        pooled: Tensor = self.neighbours(near, own).clamp(min=_FLOOR).log()
        if self.gaussian:
            squared = self.gaussians(vectors)
            if own is not None:
                squared = leave_one_out(squared, images, 1 - self.shrinkage)
            here = squared.clamp(min=_FLOOR).log() + self.gaussians.log_det_ / vectors.shape[2]
            pooled = (pooled + here) / 2
        if len(self.bank_):
            pooled = (pooled + self._anywhere(near, own).clamp(min=_FLOOR).log()) / 2
        return pooled.exp()

    def _anywhere(self, near: Tensor, own: int | None) -> Tensor:
        """Return squared distances [B, P] to the global bank, which may hold the image's own patches."""
        queries = near.flatten(0, 1)
        squared, _ = nearest(queries, self.bank_, 1 if own is None else 2, self.halves_)
        if own is not None and squared.shape[1] > 1:
            # A patch at distance 0 is the image's own; the next one stands for the left-out distance.
            itself = squared[:, 0] < 1e-6 * half_norms(queries)
            squared = torch.where(itself, squared[:, 1], squared[:, 0])
        return squared.reshape(near.shape[:2])

    def score_features(self, pyramid: list[Tensor]) -> Tensor:
        """Return the map [B, h, w]: 1 = an average normal patch that was not learned from."""
        return (self._pool(self.vectors(pyramid)) / self.unit_).reshape(-1, *self.grid_)

    def energy_features(self, pyramid: list[Tensor]) -> list[Energy]:
        """Return scores with mean and variance of chi-square(dof) on left-out normal images, by position.

        The score is a geometric mean of squared distances, so a scaled chi-square is its natural null model;
        scale and degrees are measured in ``fit``. The tails beyond the training images are the model's, not
        measured.
        """
        scores = self._pool(self.vectors(pyramid)) / self.unit_ * self.scale_
        return [Energy(scores.reshape(-1, *self.grid_), float(self.dof_))]
