"""CFLOW-AD: the density of patch features given their position, by a conditional normalizing flow.

Source: D. Gudovskiy, S. Ishizaka, K. Kozuka, CFLOW-AD: Real-Time Unsupervised Anomaly Detection with
Localization via Conditional Normalizing Flows, WACV 2022, https://arxiv.org/abs/2107.12571; code
https://github.com/gudovskiy/cflow-ad.

A chain of affine couplings maps the feature vector x of a patch to z, given a code c of its position; the
log-density is log p(x | c) = log N(z; 0, I) + log |det dz/dx| (section 4, eq. 3). Score of a patch: -log p
/ C, natural log, C the number of channels; higher = more anomalous.

Three recipes:

* ``paper``: one decoder per tap on raw features, 8 blocks, the code's loss, schedule and order of steps; but four
  turned views of each image, drawn once, stand for the new one that the code draws in every pass. The map is
  the sum over taps of exp(log p / C - maximum), upsampled. The original takes that maximum from the *test set*, so
  that an image's score depends on the images beside it; here it is the maximum over the *training* images.
* ``fast``: the first layer of a flow over all taps on the coarsest grid, solved in closed form: a Gaussian conditioned
  on the position and on what the image looks like as a whole (:mod:`adflow.methods._context`). No couplings: on the
  data it was compared on they raised the likelihood of held-out good images, but not the ranking of images.
* ``trained``: the same, with couplings behind it. They start as the identity, so that training starts from that
  Gaussian, and are trained on features that this layer did not see: every image is whitened by statistics of the other
  images (cross-fitting). In-sample whitening hides its own error: training vectors come out shorter than new ones, and
  a flow trained on them learns that error: held-out likelihood falls while the training's rises.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adflow._encoding import log_likelihood, positional_encoding
from adflow._fused import FusedChains
from adflow.detector import Energy, FeatureDetector, ImageSource, Progress, Resources, as_source
from adflow.errors import UsageError
from adflow.imaging import upsample
from adflow.methods import _cflow_paper as original
from adflow.methods._checks import at_least, fraction, one_of, within
from adflow.methods._context import TOGETHER, ContextWhitening, cross_fitted
from adflow.methods._memory import common_grid, concatenate, keep_within, parse_bytes
from adflow.methods._train import one_cycle, train
from adflow.methods._whiten import chi_square_fit

if TYPE_CHECKING:
    from adflow.backbones import Backbone
    from adflow.features import FeatureBank

# Float32 bytes of cross-fitted features kept for training; above, a random part of the images is used.
POOL_BYTES = 512 << 20
MOST_PASSES = 10  # times that an optimiser sees a feature vector, at most, when batches are random

Batch = tuple[int, Tensor, Tensor | None]  # number of a decoder, its vectors, their codes
Course = tuple[Iterator[Batch], int, Callable[[int], float]]  # of a training: batches, steps, schedule

# The image score is the paper's, the maximum of the map.
_LITE: dict[str, Any] = {"backbone": "lite0", "taps": ("b2", "b3", "b4"), "size": 256, "image_score": "max"}


class CFlow(FeatureDetector):
    """Negative log-density of patch features given their position, by a conditional flow.

    Args:
        backbone: images to feature pyramid.
        joint: one decoder for all taps side by side on the coarsest grid, instead of one per tap.
        whiten: "context" = the first layer is the Gaussian given position and image, see the module; "none" = raw
            features.
        context: components of the image context in that layer; 0 = the Gaussian of the position alone.
        shrinkage: weight, in each position's covariance, of the mean covariance of all positions, in (0, 1].
        folds: parts of the training images that are whitened by the others for training; 1 = no cross-fitting.
        position: channels of the positional code, a multiple of 4; 0 = unconditional couplings.
        blocks: couplings per decoder; 0 = the first layer alone.
        width: hidden units as a multiple of a coupling's input.
        clamp: bound of the couplings' log-scale.
        permutation: "soft" = random rotations between couplings, "hard" = random orders.
        loss: "nll" or "logsigmoid", see :func:`adflow.methods._cflow_paper.fiber_loss`.
        passes: > 0 = the original's loop with so many passes over the images; 0 = ``steps`` random batches.
        steps: optimiser steps per decoder when ``passes`` is 0; fewer where they would be more than ten passes.
        fibers: feature vectors per step.
        images: images per batch of the original's loop.
        lr: Adam's learning rate.
        clip: largest gradient norm; 0 = no limit.
        average: decay of the moving average of weights that is kept; 0 = the last weights.
        normaliser: "train" = scores are sums of exp(log p / C - training maximum) over taps, as in the paper;
            "none" = sums of -log p / C.
        rotate: training images are turned by up to so many degrees, uniformly (the original: 5).
        views: turned views kept of each training image.
        max_memory: bytes the process may hold while fitting, such as "2GiB": fewer features are kept for training, and
            a fit that cannot keep it is refused before it starts. None = no limit.
        base: options of every feature detector (smooth, image_score, margin).
    """

    paper: ClassVar[str] = (
        "CFLOW-AD: Real-Time Unsupervised Anomaly Detection with Localization via Conditional Normalizing "
        "Flows, https://arxiv.org/abs/2107.12571"
    )
    year: ClassVar[int] = 2022
    learns: ClassVar[str] = "a normalizing flow of patch features, given position and image context"
    has_null: ClassVar[bool] = True
    fit_cost: ClassVar[str] = "time O(n P C^2 + steps N C^2), memory O(P C^2)"
    score_cost: ClassVar[str] = "time and memory O(P C^2)"
    recipes: ClassVar[dict[str, dict[str, Any]]] = {
        "fast": {**_LITE, "blocks": 0},
        "trained": {**_LITE, "blocks": 4, "permutation": "hard", "steps": 200, "lr": 2e-3},
        "paper": {
            "backbone": "wrn50",
            "taps": ("layer2", "layer3", "layer4"),
            "size": 256,
            "joint": False,
            "whiten": "none",
            "position": 128,
            "blocks": 8,
            "width": 2.0,
            "loss": "logsigmoid",
            "passes": original.META_EPOCHS * original.SUB_EPOCHS,
            "fibers": original.FIBERS,
            "lr": original.RATE,
            "clip": 0.0,
            "average": 0.0,
            "normaliser": "train",
            "rotate": 5.0,
            "views": 4,
            "smooth": 0.0,
            "image_score": "max",
            "margin": 0.0,
        },
    }

    log_top_: Tensor
    scale_: Tensor
    dof_: Tensor

    def __init__(
        self,
        backbone: Backbone,
        *,
        joint: bool = True,
        whiten: str = "context",
        context: int = 48,
        shrinkage: float = 0.5,
        folds: int = 5,
        position: int = 32,
        blocks: int = 4,
        width: float = 2.0,
        clamp: float = original.CLAMP,
        permutation: str = "soft",
        loss: str = "nll",
        passes: int = 0,
        steps: int = 300,
        fibers: int = 1024,
        images: int = original.IMAGES,
        lr: float = 1e-3,
        clip: float = 1.0,
        average: float = 0.0,
        normaliser: str = "none",
        rotate: float = 0.0,
        views: int = 1,
        max_memory: str | None = None,
        **base: Any,
    ) -> None:
        super().__init__(backbone, **base)
        one_of("whiten", whiten, ("context", "none"))
        one_of("loss", loss, ("nll", "logsigmoid"))
        one_of("permutation", permutation, ("soft", "hard"))
        one_of("normaliser", normaliser, ("train", "none"))
        fraction(shrinkage=shrinkage)
        at_least(0, blocks=blocks, context=context, steps=steps, passes=passes)
        at_least(1, folds=folds, fibers=fibers, images=images, views=views)
        within(0, 100, width=width)
        if position < 0 or position % 4:
            raise UsageError(f"position is {position}, expected a multiple of 4, or 0 for an unconditional flow")
        parse_bytes(max_memory)
        if views > 1 and not rotate:
            raise UsageError(f"views is {views} but rotate is 0", hint="Add --set rotate=5, or leave views out.")
        self.joint, self.whiten, self.context, self.shrinkage, self.folds = joint, whiten, context, shrinkage, folds
        self.position, self.blocks, self.width, self.clamp = position, blocks, width, clamp
        self.permutation, self.loss = permutation, loss
        self.passes, self.steps, self.fibers, self.images = passes, steps, fibers, images
        self.lr, self.clip, self.average, self.normaliser = lr, clip, average, normaliser
        self.rotate, self.views, self.max_memory = rotate, views, max_memory
        # Everything after the first layer goes image by image.
        self.at_once = TOGETHER if joint and whiten == "context" and normaliser == "none" else 1

    @property
    def learns_from_bank(self) -> bool:
        """Return whether features of the images are of use: not where the images are turned."""
        return not self.rotate

    @classmethod
    def recipe_for(cls, recipe: str, class_: str | None = None) -> dict[str, Any]:
        """Return the settings of ``recipe``; "paper" has the original's input size per class."""
        found = super().recipe_for(recipe, class_)
        if recipe == "paper" and class_ in original.SIZES:
            found["size"] = original.SIZES[class_]
        return found

    def prepare(
        self,
        channels: list[int],
        grids: list[tuple[int, int]],
        size: tuple[int, int],
        generator: torch.Generator,
    ) -> None:
        """Create first layers and decoders, one or one per tap."""
        widths, self.grids = self._seen(channels, grids)
        self.first = nn.ModuleList()
        self.decoders = nn.ModuleList()
        for width, grid in zip(widths, self.grids, strict=True):
            if self.whiten == "context":
                self.first.append(ContextWhitening(width, grid, self.context, self.shrinkage))
            self.decoders.append(self._couplings(width, generator) if self.blocks else nn.Identity())
        self.register_buffer("log_top_", torch.zeros(len(widths)))
        self.register_buffer("scale_", torch.ones(len(widths)))
        self.register_buffer("dof_", torch.tensor([float(width) for width in widths]))
        self._fused = FusedChains()

    def _couplings(self, width: int, generator: torch.Generator) -> nn.Module:
        # Needed for couplings only, and FrEIA takes a second to import.
        from adflow.flows import chain, linear_subnet

        # After a first layer that is right already, couplings start as the identity.
        subnet = linear_subnet(generator=generator, width=self.width, zero_init=self.whiten == "context")
        flow: nn.Module = chain(
            width,
            self.blocks,
            condition=self.position,
            subnet=subnet,
            clamp=self.clamp,
            permutation="soft" if self.permutation == "soft" else "hard",
            generator=generator,
        )
        return flow

    def fit(
        self,
        images: ImageSource | Tensor,
        *,
        seed: int = 0,
        resources: Resources | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Pass every view of every image through the backbone once, then learn from the features."""
        if not self.rotate:
            return super().fit(images, seed=seed, resources=resources, progress=progress)
        resources = resources or Resources()
        with resources.build(
            self.backbone,
            as_source(images),
            progress,
            views=self.views,
            augment=lambda image, generator: original.turned(image, self.rotate, generator),
            generator=torch.Generator().manual_seed(seed),
        ) as bank:
            return self.fit_bank(bank, seed=seed, progress=progress, checkpoint=resources.checkpoint)

    def fit_bank(self, bank: FeatureBank, **options: Any) -> Self:
        """Learn from features that are there; refused where the work of a first layer exceeds ``max_memory``."""
        widths, grids = self._seen(bank.channels, bank.grids)
        cells = [math.prod(grid) for grid in grids]
        # Moments, covariances and factors, in float64.
        work = max(48 * p * (c + self.context) ** 2 for p, c in zip(cells, widths, strict=True))
        keep_within(
            parse_bytes(self.max_memory),
            work if self.whiten == "context" else 0,
            f"CFLOW-AD with {max(widths)} channels at {max(cells)} positions",
            "Use a smaller size (--size), fewer taps (--taps), or a larger limit.",
        )
        return super().fit_bank(bank, **options)

    def _seen(self, channels: list[int], grids: list[tuple[int, int]]) -> tuple[list[int], list[tuple[int, int]]]:
        """Return channels and grid of what each decoder sees: all taps on one grid, or each tap by itself."""
        if self.joint:
            return [sum(channels)], [common_grid(grids, "coarsest")]
        return list(channels), list(grids)

    def inputs(self, pyramid: Sequence[Tensor]) -> list[Tensor]:
        """Return what each decoder sees, [B, C, h, w]."""
        return [concatenate(pyramid, self.grids[0])] if self.joint else list(pyramid)

    def codes(self) -> list[Tensor | None]:
        """Return the positional codes [h w, D] of each decoder, None where couplings have no condition."""
        if not self.position:
            return [None] * len(self.grids)
        device = self.log_top_.device
        return [positional_encoding(self.position, *grid).flatten(1).T.to(device) for grid in self.grids]

    def fit_features(
        self,
        bank: FeatureBank,
        *,
        generator: torch.Generator,
        progress: Progress | None = None,
        checkpoint: Path | None = None,
    ) -> None:
        """Solve the first layers, train the couplings, learn what scoring must know of other images."""
        pools = [self._learn_first(bank, k, generator) for k in range(len(self.first))]

        def loss(batch: Batch) -> Tensor:
            head, vectors, code = batch
            z, logdet = self.decoders[head](vectors, None if code is None else [code])
            return original.fiber_loss(log_likelihood(z, logdet), vectors.shape[1], self.loss)

        if self.blocks and (self.passes or self.steps):
            batches, steps, schedule = (
                self._original_batches(bank, generator) if self.passes else self._random_batches(bank, pools, generator)
            )
            train(
                self.decoders,
                loss,
                batches,
                steps=steps,
                lr=self.lr,
                schedule=schedule,
                clip=self.clip or None,
                average=self.average or None,
                generator=generator,
                progress=progress,
                checkpoint=checkpoint,
            )
            del batches  # and the vectors it draws from
        self._learn_scale(bank, pools)

    def _rows(self, bank: FeatureBank, head: int) -> Callable[[Sequence[int]], Tensor]:
        return lambda which: self.inputs(bank.pyramid(which))[head]

    def _learn_first(self, bank: FeatureBank, head: int, generator: torch.Generator) -> Tensor:
        """Solve one first layer; return cross-fitted z [n, P, C] of (a part of) the images."""
        layer, rows = self.first[head], self._rows(bank, head)
        assert isinstance(layer, ContextWhitening)
        layer.learn(rows, range(len(bank)))
        images = len(bank) // bank.views
        order = torch.randperm(images, generator=generator)
        keep = max(2, min(images, self._pool_bytes() // (layer.mean.numel() * 4 * bank.views)))
        # Without couplings one part is enough: it only says how large the energies of new images are.
        parts = self.folds if self.blocks else 1
        return cross_fitted(layer, rows, order, views=bank.views, folds=self.folds, keep=keep, parts=parts)

    def _random_batches(self, bank: FeatureBank, pools: list[Tensor], generator: torch.Generator) -> Course:
        """Random vectors of random images, decoder after decoder."""
        pools = pools or [self._vectors(bank, head) for head in range(len(self.grids))]
        codes = self.codes()

        def batches() -> Iterator[Batch]:
            for head in itertools.cycle(range(len(pools))):
                pool, code = pools[head], codes[head]
                chosen = torch.randint(pool.shape[0] * pool.shape[1], (self.fibers,), generator=generator)
                vectors = pool.flatten(0, 1).index_select(0, chosen)
                yield head, vectors, None if code is None else code[chosen % pool.shape[1]]

        vectors = max(pool.shape[0] * pool.shape[1] for pool in pools)
        # The same vectors again and again only teach them by heart: small data sets get fewer steps.
        steps = max(1, min(self.steps, MOST_PASSES * vectors // self.fibers)) * len(pools)
        return batches(), steps, one_cycle(steps)

    def _vectors(self, bank: FeatureBank, head: int) -> Tensor:
        width = int(self.decoders[head].dims_in[0][0])  # type: ignore[index]  # FrEIA is untyped
        per_image = 4 * self.grids[head][0] * self.grids[head][1] * width
        step = -(-len(bank) * per_image // self._pool_bytes())
        rows = self._rows(bank, head)
        return torch.cat([rows([row]) for row in range(0, len(bank), step)]).flatten(2).transpose(1, 2)

    def _pool_bytes(self) -> int:
        # Twice while its parts are joined, beside the features that are read.
        return min(POOL_BYTES, (parse_bytes(self.max_memory) or 8 * POOL_BYTES) // 8)

    def _original_batches(self, bank: FeatureBank, generator: torch.Generator) -> Course:
        """The original's loop: shuffled batches of images, all steps of one tap before the next."""
        images = len(bank) // bank.views
        batch = min(self.images, images)
        codes = [
            torch.empty(grid[0] * grid[1], 0) if c is None else c
            for grid, c in zip(self.grids, self.codes(), strict=True)
        ]

        def batches() -> Iterator[Batch]:
            for rows in original.image_batches(images, bank.views, batch, generator):
                pyramid = self.inputs(bank.pyramid(rows))
                if self.first:
                    pyramid = [
                        layer(x).transpose(1, 2).unflatten(2, grid)
                        for layer, x, grid in zip(self.first, pyramid, self.grids, strict=True)
                    ]
                for head, vectors, code in original.fiber_steps(
                    pyramid, codes, self.fibers, lambda n: torch.randperm(n, generator=generator)
                ):
                    yield head, vectors, code if self.position else None

        per_batch = max(1, sum(batch * grid[0] * grid[1] // self.fibers for grid in self.grids))
        schedule = original.paper_schedule(self.passes, images // batch, per_batch)
        return batches(), max(1, self.passes * (images // batch) * per_batch), schedule

    @torch.no_grad()
    def _learn_scale(self, bank: FeatureBank, pools: list[Tensor]) -> None:
        """Learn the largest likelihoods, and how far energies are from chi-square, on the training images."""
        for head in range(len(self.grids)):
            energies, top = [], -math.inf
            rows = self._rows(bank, head)
            source: Iterable[Tensor] = (
                torch.split(pools[head], 1) if pools else (self._first(rows([row]), head) for row in range(len(bank)))
            )
            for z in source:
                likelihood, energy = self._through(z, head)
                energies.append(energy)
                top = max(top, float(likelihood.max()))
            scale, dof = chi_square_fit(torch.cat(energies).flatten().unsqueeze(1))
            self.log_top_[head] = top
            self.scale_[head], self.dof_[head] = scale[0], dof

    def _first(self, features: Tensor, head: int) -> Tensor:
        if self.first:
            z: Tensor = self.first[head](features)
            return z
        return features.flatten(2).transpose(1, 2)

    def _through(self, z: Tensor, head: int) -> tuple[Tensor, Tensor]:
        """Return log p / C [B, P] and the squared length of the latent [B, P] of decoder inputs [B, P, C]."""
        layer = self.first[head] if self.first else None
        start = layer.logdet if isinstance(layer, ContextWhitening) else z.new_zeros(z.shape[1])
        chain = None
        if self.blocks:
            dtype = torch.bfloat16 if self.backbone.precision == "bf16" else None
            chain = self._fused.get(head, self.decoders[head], lambda: self.codes()[head], dtype)
        found = []
        for one in z:
            one = one.clone()  # on an allocator boundary: matrix kernels may choose their path by the address
            latent, logdet = chain(one) if chain else (one, torch.zeros_like(start))
            energy = latent.square().sum(1)
            likelihood = logdet + start - 0.5 * (z.shape[2] * math.log(2 * math.pi) + energy)
            found.append((likelihood / z.shape[2], energy))
        return torch.stack([f[0] for f in found]), torch.stack([f[1] for f in found])

    def likelihoods(self, pyramid: Sequence[Tensor]) -> list[Tensor]:
        """Return log p / C [B, h, w] of each decoder."""
        return [
            self._through(self._first(x, k), k)[0].reshape(len(x), *self.grids[k])
            for k, x in enumerate(self.inputs(pyramid))
        ]

    def score_features(self, pyramid: list[Tensor]) -> Tensor:
        """Return the sum over decoders of -log p / C, on the finest of their grids."""
        finest = common_grid(self.grids, "finest")
        maps = [-values for values in self.likelihoods(pyramid)]
        return sum(
            (
                m if m.shape[1:] == finest else F.interpolate(m.unsqueeze(1), finest, mode="bilinear").squeeze(1)
                for m in maps
            ),
            start=torch.zeros(()),
        )

    def score_maps(self, pyramid: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Return maps [B, H, W]; with the "train" normaliser, the number of taps minus the paper's sum."""
        if self.normaliser == "none":
            return super().score_maps(pyramid, size)
        likelihoods = self.likelihoods(pyramid)
        maps = len(likelihoods) - original.probability_map(likelihoods, size, list(self.log_top_))
        return upsample(maps, size, self.sigma(size)) if self.smooth else maps

    def energy_features(self, pyramid: list[Tensor]) -> list[Energy]:
        """Return the scaled squared lengths of the latents of each decoder, finest grid first."""
        found = []
        for k, x in enumerate(self.inputs(pyramid)):
            energy = self._through(self._first(x, k), k)[1].reshape(len(x), *self.grids[k])
            found.append(Energy(energy * self.scale_[k], float(self.dof_[k])))
        return sorted(found, key=lambda e: -e.chi2[0].numel())
