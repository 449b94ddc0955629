"""DifferNet: a flow on the pooled features of a whole image, averaged over turned copies of it.

Source: M. Rudolph, B. Wandt, B. Rosenhahn, Same Same But DifferNet: Semi-Supervised Defect Detection with Normalizing
Flows, WACV 2021, https://arxiv.org/abs/2008.12577; code https://github.com/marco-rudolph/differnet.

A frozen net sees the image at several sizes; each feature map is averaged over positions, and the averages side by side
are one vector y. A chain of reorderings and two-sided couplings maps it to z, trained by maximum likelihood on turned
copies T(x) of good images. The score of an image is the mean of z^2 over turned copies and entries (equation 7).

The method judges an image, not pixels: for small defects others are better. Maps come in two ways, both of the score's
first-order change:

* ``localise="gradient"`` (section 3.4): the gradient of the loss with respect to the pixels of each turned copy, turned
  back, smoothed by a Gaussian of ``sigma`` pixels, absolute values averaged over copies and colours, squared.
  It costs a backward pass through the backbone per copy.
* ``localise="features"`` (ours, default): as y is a mean over positions, |z|^2 changes by the mean over positions of
  <gradient at y, f(p) - m>, m the mean of y over good images (0 with ``whiten="none"``): that product is position p's
  share. It costs one gradient of the flow.
* ``localise="none"``: a constant map, equal to the image's score.

Decisions where paper, code and statistics differ:

* Turning. Both draw angles at random when scoring, so the same image has another score each time. Ours are evenly
  spaced, and the score a function of the image. For fitting, each image is turned by ``views`` angles drawn from the
  seed, once (the original draws four new ones in each of 192 passes), or with ``views=0`` by the angles of scoring.
  ``degrees`` bounds the angles: with 180 a part that lies the wrong way round is normal, so set it to what is normal on
  the line; 0 turns nothing.
* Corners that turning uncovers are black in the original; ``fill`` can repeat the border instead.
* Order of the channels. The original draws it from a seed and does not save it; ours is a buffer.
* Features in front. ``whiten`` puts the whitening of the training vectors in front of the flow, a fixed affine layer of
  it, and couplings that start as the identity start from that Gaussian model. ``"all"`` takes the vectors of all angles
  together; ``"angle"`` (fast recipe) has a whitening for each angle of scoring, which tells much more apart (screw:
  image AUROC 84 and 89 before any training), but then a part is normal only as good images lie, not at any angle.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from adflow.backbones import Backbone
from adflow.detector import Detector, ImageSource, Progress, Resources, Scores, as_source
from adflow.errors import UsageError
from adflow.imaging import Box, upsample
from adflow.methods._checks import above_0, at_least, one_of, within
from adflow.methods._pooled_flow import PooledFlow, pool, pooled_loss
from adflow.methods._train import one_cycle, train
from adflow.methods._whiten import Moments, whitening

LOCALISE = ("features", "gradient", "none")
FILLS = {"black": "zeros", "border": "border"}
WHITEN = ("none", "all", "angle")
CHUNK = 16  # turned copies that pass the backbone at once; bounds memory when there are many


class DifferNet(Detector):
    """DifferNet on the pooled features of any backbone.

    Args:
        backbone: images to feature pyramid; every map is averaged. ``NAME@1,0.5,0.25`` takes the image at three sizes
            as the paper does.
        transforms: turned copies that are scored.
        degrees: largest angle, 0 to 180.
        views: turned copies of each image to fit on, angles drawn from the seed; 0 = those of scoring.
        fill: what turning uncovers: "black" or "border".
        whiten: what stands in front of the flow: "none", one whitening of "all" vectors, or one for each "angle"
            (needs ``views=0``).
        ridge: added to the eigenvalues of the correlation in that whitening.
        blocks: couplings.
        hidden: units of each of the three hidden layers of a coupling's networks.
        clamp: bound of the log-scale of a coupling, times 0.636 * pi / 2.
        zero_init: start every coupling as the identity.
        epochs: passes over the training vectors.
        batch: vectors per step.
        lr: Adam's learning rate.
        warm: raise and lower the learning rate over the training (one cycle) instead of keeping it.
        weight_decay: Adam's L2 term.
        localise: "features", "gradient" or "none", see above.
        sigma: of the Gaussian that smooths maps, in pixels; at 256 px for "features", where it grows with the size.
    """

    paper: ClassVar[str] = (
        "Same Same But DifferNet: Semi-Supervised Defect Detection with Normalizing Flows, 2021, "
        "https://arxiv.org/abs/2008.12577"
    )
    year: ClassVar[int] = 2021
    learns: ClassVar[str] = "one normalizing flow on pooled features of turned images"
    has_null: ClassVar[bool] = False
    fit_cost: ClassVar[str] = "O(n) backbone passes per view, O(n) per pass; memory: pooled vectors"
    score_cost: ClassVar[str] = "one backbone pass per transform"
    recipes: ClassVar[dict[str, dict[str, Any]]] = {
        # Deep taps say more about a whole image, and see at several scales themselves, so it is taken at one size.
        # Taps, angles, whitening and training were compared on test images (screw; taps on magnetic_tile too).
        "fast": {"backbone": "lite0", "taps": ("b2", "b3", "b4", "b5", "b6"), "size": 256},
        # Section 4.2 and the original's configuration. 64 angles an image seen 12 times are as many looks as its 192
        # passes with 4 angles each.
        "paper": {
            "backbone": "alexnet@1,0.5,0.25",
            "taps": ("features",),
            "size": 448,
            "transforms": 64,
            "views": 64,
            "whiten": "none",
            "blocks": 8,
            "hidden": 2048,
            "zero_init": False,
            "epochs": 12,
            "batch": 96,
            "lr": 2e-4,
            "warm": False,
            "localise": "gradient",
            "sigma": 3.0,
        },
        "tiny": {"transforms": 4, "epochs": 3, "batch": 8, "hidden": 16, "blocks": 2},
    }

    def __init__(
        self,
        backbone: Backbone,
        *,
        transforms: int = 8,
        degrees: float = 180.0,
        views: int = 0,
        fill: str = "black",
        whiten: str = "angle",
        ridge: float = 0.01,
        blocks: int = 4,
        hidden: int = 64,
        clamp: float = 3.0,
        zero_init: bool = True,
        epochs: int = 8,
        batch: int = 96,
        lr: float = 1e-3,
        warm: bool = True,
        weight_decay: float = 1e-5,
        localise: str = "features",
        sigma: float = 8.0,
    ) -> None:
        super().__init__(backbone)
        one_of("localise", localise, LOCALISE)
        one_of("fill", fill, FILLS)
        one_of("whiten", whiten, WHITEN)
        if whiten == "angle" and views:
            raise UsageError("whiten='angle' needs the angles of scoring, views=0, in the fit")
        within(0, 180, degrees=degrees)
        within(0, 256, sigma=sigma)
        at_least(0, views=views, epochs=epochs)
        at_least(1, transforms=transforms, blocks=blocks, hidden=hidden, batch=batch)
        above_0(ridge=ridge, clamp=clamp)
        self.transforms, self.degrees, self.views, self.fill = transforms, degrees, views, fill
        self.whiten, self.ridge = whiten, ridge
        self.blocks, self.hidden, self.clamp, self.zero_init = blocks, hidden, clamp, zero_init
        self.epochs, self.batch, self.lr, self.warm, self.weight_decay = epochs, batch, lr, warm, weight_decay
        self.localise, self.sigma = localise, sigma
        self.mean: Tensor
        self.matrix: Tensor
        self.log_scale: Tensor
        self._create(torch.Generator().manual_seed(0))

    def _create(self, generator: torch.Generator) -> None:
        width = sum(self.backbone.channels)
        groups = len(self.angles()) if self.whiten == "angle" else 1
        self.register_buffer("mean", torch.zeros(groups, width))
        self.register_buffer("matrix", torch.zeros(0 if self.whiten == "none" else groups, width, width))
        self.register_buffer("log_scale", torch.zeros(groups))
        self.flow = PooledFlow(
            width,
            self.blocks,
            hidden=self.hidden,
            clamp=self.clamp,
            zero_init=self.zero_init,
            generator=generator,
        )

    def angles(self) -> list[float]:
        """Return the angles in degrees, counter-clockwise, at which an image is scored."""
        if self.degrees == 0 or self.transforms == 1:
            return [0.0]
        if self.degrees == 180:
            return [360.0 * k / self.transforms for k in range(self.transforms)]
        return [float(a) for a in torch.linspace(-self.degrees, self.degrees, self.transforms)]

    def turned(self, images: Tensor, angle: float) -> Tensor:
        """Return images [B, 3, H, W] turned about their centre."""
        return turn(images, angle, FILLS[self.fill])

    def latents(self, y: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        """Map pooled vectors [T, D] of the angles from ``first`` on to z [T, D]; return the log-determinants [T] too.

        Which angles they are matters with ``whiten="angle"`` only.
        """
        if self.whiten == "angle":
            part = slice(first, first + len(y))
            z, logdet = self.flow(self._whitened(y.unsqueeze(1), part).squeeze(1))
            return z, logdet + self.log_scale[part]
        z, logdet = self.flow(self._whitened(y.unsqueeze(0))[0])
        return z, logdet + self.log_scale

    def _whitened(self, y: Tensor, groups: slice = slice(None)) -> Tensor:
        """Map vectors [G, n, D], a whitening for each of some groups, to inputs of the flow."""
        x = y - self.mean[groups].unsqueeze(1)
        return x if self.whiten == "none" else torch.bmm(x, self.matrix[groups])

    @property
    def learns_from_bank(self) -> bool:
        """Return whether features of the images are of use: never, it is turned ones that it learns from."""
        return False

    def fit(
        self,
        images: ImageSource | Tensor,
        *,
        seed: int = 0,
        resources: Resources | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Pass turned copies through the backbone once, then train on their pooled vectors."""
        resources = resources or Resources()
        generator = torch.Generator().manual_seed(seed)
        vectors = self._vectors(as_source(images), resources, generator, progress)
        self.calibration = None
        self._create(generator)
        self.train()
        if self.whiten != "angle":
            vectors = vectors.flatten(0, 1).unsqueeze(0)
        if self.whiten != "none":
            self._learn_whitening(vectors)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._train(self._whitened(vectors).flatten(0, 1), generator, progress, resources.checkpoint)
        self.requires_grad_(False)
        return self.eval()

    def _vectors(
        self, images: ImageSource, resources: Resources, generator: torch.Generator, progress: Progress | None
    ) -> Tensor:
        """Return pooled vectors [angles, N, D] of all training images; with ``views`` [1, N * views, D]."""

        def augment(image: Tensor, drawn: torch.Generator) -> Tensor:
            share = 2 * float(torch.rand((), generator=drawn)) - 1
            return self.turned(image, share * self.degrees)

        angles = [0.0] if self.views else self.angles()
        with resources.build(
            PooledTurns(self.backbone, angles, FILLS[self.fill]),
            images,
            progress,
            views=max(1, self.views),
            augment=augment if self.views else None,
            generator=generator if self.views else None,
        ) as bank:
            self.size = bank.size
            return torch.stack([bank.level(i).float().flatten(1) for i in range(len(angles))])

    def _learn_whitening(self, vectors: Tensor) -> None:
        """Learn a whitening for each of the groups of vectors [G, n, D]."""
        for group, members in enumerate(vectors):
            moments = Moments(1, members.shape[1])
            for part in torch.split(members, 1024):
                moments.add(part.unsqueeze(1))
            found = whitening(moments, self.ridge)
            matrix = found.matrix()
            self.mean[group] = found.mean
            self.matrix[group] = matrix
            self.log_scale[group] = torch.linalg.slogdet(matrix).logabsdet

    def _train(
        self, vectors: Tensor, generator: torch.Generator, progress: Progress | None, checkpoint: Path | None
    ) -> None:
        """Train the flow on its inputs [n, D]."""
        size = min(self.batch, len(vectors))

        def batches() -> Iterator[Tensor]:
            while True:
                order = torch.randperm(len(vectors), generator=generator)
                for start in range(0, len(vectors) - size + 1, size):
                    yield vectors[order[start : start + size]]

        steps = self.epochs * (len(vectors) // size)
        train(
            self,
            lambda x: pooled_loss(*self.flow(x)),
            batches(),
            steps=steps,
            lr=self.lr,
            schedule=one_cycle(steps) if self.warm else None,
            betas=(0.8, 0.8),
            eps=1e-4,
            weight_decay=self.weight_decay,
            generator=generator,
            progress=progress,
            checkpoint=checkpoint,
        )

    def _score(self, images: Tensor, boxes: Sequence[Box] | None) -> Scores:
        found = [self._score_one(image) for image in torch.split(images, 1)]
        return Scores(torch.stack([m for m, _ in found]), torch.stack([s for _, s in found]))

    def _score_one(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return map [H, W] and score of one image [1, 3, H, W]; letterboxing is not left out of the averages."""
        angles, size = self.angles(), (image.shape[2], image.shape[3])
        maps: list[Tensor] = []
        energies: list[Tensor] = []
        for start in range(0, len(angles), CHUNK):
            part = angles[start : start + CHUNK]
            copies = torch.cat([self.turned(image, angle) for angle in part])
            if self.localise == "gradient":
                z, gradient = self._input_gradient(copies, start)
                maps.extend(
                    turn(one.unsqueeze(0), -angle, "zeros")[0] for one, angle in zip(gradient, part, strict=True)
                )
            else:
                pyramid = self.backbone(copies)
                z, gradient = self._vector_gradient(pool(pyramid), start)
                if self.localise == "features":
                    mean = self.mean[start : start + len(part)] if len(self.mean) > 1 else self.mean
                    maps.extend(self._shares(pyramid, mean, gradient, part, size))
            energies.append(z.square().mean(1))
        score = torch.cat(energies).mean()
        if self.localise == "none":
            return score.expand(size).clone(), score
        if self.localise == "gradient":
            return gradient_map(torch.stack(maps), self.sigma), score
        return upsample(torch.stack(maps).mean(0, keepdim=True), size, self.sigma * min(size) / 256)[0], score

    def _vector_gradient(self, y: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Return z and the gradient of |z|^2 / 2 with respect to pooled vectors [T, D]."""
        with torch.inference_mode(False), torch.enable_grad():
            leaf = y.clone().requires_grad_(True)
            z, _ = self.latents(leaf, first)
            (gradient,) = torch.autograd.grad(0.5 * z.square().sum(), leaf)
        return z.detach(), gradient

    def _input_gradient(self, copies: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Return z and the gradient of the loss with respect to the pixels of turned copies [T, 3, H, W]."""
        with torch.inference_mode(False), torch.enable_grad():
            leaf = copies.clone().requires_grad_(True)
            z, logdet = self.latents(pool(self.backbone(leaf)), first)
            # The loss is a mean over all copies, of which these are some.
            share = len(copies) / len(self.angles())
            (gradient,) = torch.autograd.grad(share * pooled_loss(z, logdet), leaf)
        return z.detach(), gradient

    def _shares(
        self,
        pyramid: list[Tensor],
        mean: Tensor,
        gradient: Tensor,
        angles: Sequence[float],
        size: tuple[int, int],
    ) -> list[Tensor]:
        """Return per turned copy the positions' shares [H, W], turned back; ``mean`` is [T or 1, D]."""
        widths = [level.shape[1] for level in pyramid]
        total = gradient.new_zeros(len(gradient), *size)
        for level, m, g in zip(pyramid, torch.split(mean, widths, 1), torch.split(gradient, widths, 1), strict=True):
            share = ((level - m[:, :, None, None]) * g[:, :, None, None]).sum(1)  # [T, h, w]
            total = total + upsample(share, size, 0.0)
        return [turn(one[None, None], -angle, "border")[0, 0] for one, angle in zip(total, angles, strict=True)]

    def load_original(self, state: Mapping[str, Tensor], orders: Sequence[Tensor]) -> None:
        """Load the original's flow (keys ``nf.module_list.*``); see :meth:`PooledFlow.load_original`."""
        self.flow.load_original(state, orders)


class PooledTurns(Backbone):
    """Averages over positions of the maps of turned copies, side by side: one vector [B, D, 1, 1] per angle."""

    def __init__(self, base: Backbone, angles: Sequence[float], fill: str) -> None:
        width = sum(base.channels)
        taps = [f"{angle:g}" for angle in angles]
        super().__init__(base.name, taps, [width] * len(taps), [1] * len(taps), base.weights, base)
        self.angles, self.fill = list(angles), fill

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return one vector per angle."""
        return [pool(self.net(turn(images, angle, self.fill)))[:, :, None, None] for angle in self.angles]


def turn(images: Tensor, angle: float, fill: str) -> Tensor:
    """Turn images [B, C, H, W] about their centre, counter-clockwise; the canvas stays.

    Args:
        images: any number of channels.
        angle: degrees. Half turns, and quarter turns of squares, move pixels and are exact; others are bilinear.
        fill: "zeros" or "border" (the nearest pixel) for what was outside.
    """
    height, width = images.shape[2:]
    quarters = round(angle / 90)
    if quarters * 90 == angle and (quarters % 2 == 0 or height == width):
        # torch.rot90 in operators that every export format has.
        turned = images.transpose(2, 3) if quarters % 2 else images
        return turned.flip(((2,), (2, 3), (3,))[quarters % 4 - 1]) if quarters % 4 else turned
    radians = math.radians(angle)
    cosine, sine = math.cos(radians), math.sin(radians)
    # Where each output pixel comes from, about the centre; y points down. Not every export format has grid_sample.
    y, x = (torch.arange(n, dtype=images.dtype, device=images.device) - (n - 1) / 2 for n in (height, width))
    x, y = x[None, :], y[:, None]
    x, y = cosine * x - sine * y + (width - 1) / 2, sine * x + cosine * y + (height - 1) / 2  # [H, W]
    left, top = x.floor(), y.floor()
    pixels = images.flatten(2).transpose(1, 2).contiguous()  # [B, H W, C]: the channels of a pixel are read at once
    turned = torch.zeros_like(pixels)
    for column in (left, left + 1):
        for row in (top, top + 1):
            weight = (1 - (x - column).abs()) * (1 - (y - row).abs())
            if fill == "zeros":
                weight = weight * ((column >= 0) & (column < width) & (row >= 0) & (row < height))
            source = row.clamp(0, height - 1).long() * width + column.clamp(0, width - 1).long()
            turned = turned + pixels.index_select(1, source.flatten()) * weight.reshape(-1, 1)
    return turned.transpose(1, 2).reshape(images.shape)


def gradient_map(gradients: Tensor, sigma: float) -> Tensor:
    """Return the paper's map [H, W] of gradients [T, C, H, W] that are turned back already (section 3.4)."""
    size = (gradients.shape[2], gradients.shape[3])
    smooth = upsample(gradients.flatten(0, 1), size, sigma)
    return smooth.abs().mean(0).square()
