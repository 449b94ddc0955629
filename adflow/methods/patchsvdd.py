"""Patch SVDD: encoders of patches that put neighbours close together; far from all good patches is anomalous.

Source: J. Yi, S. Yoon, Patch SVDD: Patch-level SVDD for Anomaly Detection and Segmentation, ACCV 2020,
https://arxiv.org/abs/2006.16067; code https://github.com/nuclearboy95/Anomaly-Detection-PatchSVDD-PyTorch.

Two encoders, of patches of 64 and of 32 pixels, the second inside the first, are trained from nothing on good images:
embeddings of jittered patches shall be close (SVDD, eq. 3), and from those of two neighbouring patches a classifier
shall tell in which of 8 directions the second lies (eq. 5). The score of a patch is the distance of its embedding to
the nearest one of the training images, the score of a pixel the mean over the patches that cover it, and the map the
product of the maps of both sizes (section 3.4). Higher = more anomalous.

Two recipes:

* ``paper``: the code's encoders and constants.
* ``fast``: patches of 32 and 16 pixels on images of 128, narrower encoders, a few hundred steps at a tenfold rate, and
  a bank thinned to ``bank`` rows by PatchCore's greedy choice. Not in the paper.

Neither needs a backbone; the one that is passed is used for nothing and stays in the detector's file as a name.

Decisions where paper and code differ, and what is not repeated:

* The classifier's last layer has weights of unit length; the code computes them without gradient, so that the layer
  **never trains**. Here it does.
* Weight of the SVDD loss: one per class in the paper, chosen on the test set; 1e-3 in the code's README, 1 as its
  default. The recipes take 1e-3: a large one collapses all embeddings to a point.
* Nearest neighbours are exact; the code's are approximate.
* The code subtracts the mean image of the training set, pixel by pixel; so do we.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adflow.detector import (
    FeatureDetector,
    FeatureShapes,
    ImageSource,
    Progress,
    Resources,
    Scores,
    _TensorImages,
)
from adflow.errors import InputError, UsageError
from adflow.imaging import Box, upsample
from adflow.methods._memory import choose_rows, half_norms, nearest, random_projection
from adflow.methods._train import train

if TYPE_CHECKING:
    from adflow.backbones import Backbone
    from adflow.features import FeatureBank

# (row, column) of the second patch's direction, as the classifier numbers them.
_DIRECTIONS = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))
_RGB_SHIFT, _NOISE = 0.02, 0.02  # of images in [0, 1]: code, position task
_HELD = 60_000  # embeddings a bank is chosen from


class PatchSVDD(FeatureDetector):
    """Distance of patch embeddings to those of good images, at two patch sizes.

    Args:
        backbone: not used.
        patch: side of the larger patches in pixels (paper: 64); the smaller ones are half as large. A multiple of 16.
        side: images are brought to a shorter side of so many pixels; 0 = as they come.
        channels: channels of the encoder in front of its output, as a share of the paper's.
        dimension: length of an embedding (paper: 64).
        strides: pixels between patches at scoring, large and small (paper: 16, 4).
        svdd: weight of the SVDD loss (lambda).
        bank: rows kept per patch size, chosen greedily; 0 = all (paper).
        steps: optimiser steps.
        batch: pairs of patches per loss and step.
        lr: Adam's learning rate.
        base: options of every feature detector (smooth, image_score, margin).
    """

    paper: ClassVar[str] = (
        "Patch SVDD: Patch-level SVDD for Anomaly Detection and Segmentation, https://arxiv.org/abs/2006.16067"
    )
    year: ClassVar[int] = 2020
    learns: ClassVar[str] = "two encoders of patches, and the embeddings of good ones"
    has_null: ClassVar[bool] = False
    fit_cost: ClassVar[str] = "time O(steps + n P D bank), memory: the images and O(n P D)"
    score_cost: ClassVar[str] = "time O(P bank D), memory O(bank D)"
    recipes: ClassVar[dict[str, dict[str, Any]]] = {
        "fast": {"backbone": "lite0", "size": 256},
        "paper": {
            "backbone": "lite0",
            "size": 256,
            "patch": 64,
            "side": 0,
            "channels": 1.0,
            "strides": (16, 4),
            "bank": 0,
            "steps": 300 * 100,
            "batch": 64,
            "lr": 1e-4,
            "smooth": 0.0,
            "image_score": "max",
            "margin": 0.0,
        },
        "tiny": {"patch": 16, "side": 0, "channels": 0.25, "steps": 12, "batch": 8, "strides": (8, 4), "bank": 100},
    }

    average_: Tensor

    def __init__(
        self,
        backbone: Backbone,
        *,
        patch: int = 32,
        side: int = 128,
        channels: float = 0.5,
        dimension: int = 64,
        strides: tuple[int, ...] = (8, 4),
        svdd: float = 1e-3,
        bank: int = 4000,
        steps: int = 400,
        batch: int = 64,
        lr: float = 1e-3,
        **base: Any,
    ) -> None:
        super().__init__(backbone, **base)
        if patch < 16 or patch % 16:
            raise UsageError(f"patch is {patch}, expected a multiple of 16")
        if len(strides) != 2 or min(strides) < 1:
            raise UsageError(f"strides are {strides}, expected two numbers of at least 1")
        for name, number, lowest in (
            ("side", side, 0), ("dimension", dimension, 1), ("bank", bank, 0), ("steps", steps, 0), ("batch", batch, 1),
        ):  # fmt: skip
            if number < lowest:
                raise UsageError(f"{name} is {number}, expected at least {lowest}")
        self.patch, self.side, self.channels, self.dimension = patch, side, channels, dimension
        self.strides, self.svdd, self.bank = tuple(strides), svdd, bank
        self.steps, self.batch, self.lr = steps, batch, lr

    def prepare(
        self,
        channels: list[int],
        grids: list[tuple[int, int]],
        size: tuple[int, int],
        generator: torch.Generator,
    ) -> None:
        """Create encoders, classifiers and empty banks."""
        scale = self.side / min(size) if self.side else 1.0
        self.seen = (round(size[0] * scale), round(size[1] * scale))
        if min(self.seen) < 2 * self.patch:
            raise InputError(
                f"images of {self.seen[0]}x{self.seen[1]} pixels hold no two patches of {self.patch}",
                hint="Use larger images (--size), a larger side or a smaller patch.",
            )
        # The smaller encoder is the one inside the larger (code: hierarchical), trained by both losses.
        self.large = LargeEncoder(Encoder(self.patch // 2, self.dimension, self.channels), self.dimension)
        self.tell_large, self.tell_small = Direction(self.dimension), Direction(self.dimension)
        self.register_buffer("average_", torch.zeros(3, *self.seen))
        for name in ("large", "small"):
            self.register_buffer(f"bank_{name}", torch.zeros(0, self.dimension))
            self.register_buffer(f"halves_{name}", torch.zeros(0))

    # --- fit ------------------------------------------------------------------------------------------------

    def fit(
        self,
        images: ImageSource | Tensor,
        *,
        seed: int = 0,
        resources: Resources | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Learn from the pixels; the backbone and a bank of its features are not used."""
        source = _TensorImages(images) if isinstance(images, Tensor) else images
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pixels: list[Tensor] = []
            for batch in source.batches(16):
                if not pixels:
                    size = (batch.shape[2], batch.shape[3])
                    self._prepare(FeatureShapes([], [], size), generator)
                    self.prepare([], [], size, generator)
                pixels += list((self._shrink(batch) * 255).round().to(torch.uint8))
            if not pixels:
                raise InputError("there is no image to fit on, expected at least 1")
            self.train()
            self._learn(torch.stack(pixels), generator, progress, resources.checkpoint if resources else None)
        self.eval()
        self._settle()
        return self

    def fit_features(
        self,
        bank: FeatureBank,
        *,
        generator: torch.Generator,
        progress: Progress | None = None,
        checkpoint: Path | None = None,
    ) -> None:
        """Refuse: features of a backbone are not what this method learns from.

        Raises:
            InputError: always.
        """
        raise InputError("Patch SVDD learns from images, found features only", hint="Call fit() with the images.")

    def _shrink(self, images: Tensor) -> Tensor:
        """Return images [B, 3, *seen]."""
        if tuple(images.shape[2:]) == self.seen:
            return images
        return F.interpolate(images, self.seen, mode="bilinear", align_corners=False, antialias=True).clamp(0, 1)

    def _learn(
        self, pixels: Tensor, generator: torch.Generator, progress: Progress | None, checkpoint: Path | None
    ) -> None:
        total = torch.zeros(3, *self.seen, dtype=torch.float64)
        for image in pixels:
            total += image.double() / 255
        self.average_.copy_(total / len(pixels))
        kinds = ((self.patch, self.large, self.tell_large), (self.patch // 2, self.large.small, self.tell_small))

        def batches() -> Iterator[list[tuple[Tensor, ...]]]:
            while True:
                sides = [k for k, _, _ in kinds]
                yield [(*self._neighbours(pixels, k, generator), *self._jittered(pixels, k, generator)) for k in sides]

        def loss(batch: list[tuple[Tensor, ...]]) -> Tensor:
            total = torch.zeros(())
            for (_, encode, tell), (first, second, direction, one, other) in zip(kinds, batch, strict=True):
                total = total + F.cross_entropy(tell(encode(first) - encode(second)), direction)
                # The root is not differentiable at 0, where two patches are the same.
                apart = (encode(one) - encode(other)).square().sum(1).add(1e-12).sqrt()
                total = total + self.svdd * apart.mean()
            return total

        train(
            self,
            loss,
            batches(),
            steps=self.steps,
            lr=self.lr,
            clip=10.0,
            generator=generator,
            progress=progress,
            checkpoint=checkpoint,
        )
        for name, stride in zip(("large", "small"), self.strides, strict=True):
            rows = self._all_rows(pixels, name, stride, generator)
            if self.bank and len(rows) > self.bank:
                projection = random_projection(rows.shape[1], rows.shape[1], generator)
                rows = rows[choose_rows(rows, self.bank, projection, generator)]
            setattr(self, f"bank_{name}", rows.contiguous())
            setattr(self, f"halves_{name}", half_norms(rows))

    @torch.no_grad()
    def _all_rows(self, pixels: Tensor, name: str, stride: int, generator: torch.Generator) -> Tensor:
        """Return the embeddings of all training patches, or of as many as a thinned bank is chosen from."""
        found = []
        for image in pixels:
            rows = self.embeddings(image[None].float() / 255 - self.average_, name, stride)[0].flatten(1).T
            if self.bank:
                keep = max(1, _HELD // len(pixels))
                rows = rows[torch.randperm(len(rows), generator=generator)[:keep]]
            found.append(rows)
        return torch.cat(found)

    def _crop(self, pixels: Tensor, which: Tensor, top: Tensor, left: Tensor, k: int) -> Tensor:
        """Return patches [n, 3, k, k] less the mean image."""
        span = torch.arange(k)
        rows, columns = (top[:, None] + span)[:, :, None], (left[:, None] + span)[:, None, :]
        colours = torch.arange(3)[None, :, None, None]
        picked = pixels[which[:, None, None, None], colours, rows[:, None], columns[:, None]].float() / 255
        return picked - self.average_[colours, rows[:, None], columns[:, None]]

    def _neighbours(self, pixels: Tensor, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Draw pairs of patches, the second at 3k/4 to k from the first in one of 8 directions: pair and direction."""
        n = self.batch
        which = torch.randint(len(pixels), (n,), generator=generator)
        direction = torch.randint(len(_DIRECTIONS), (n,), generator=generator)
        step = torch.tensor(_DIRECTIONS)[direction]  # [n, 2]
        # A step of 0 is jittered too, by up to a quarter of the patch either way.
        far = 3 * k // 4 + torch.randint(max(1, k // 4), (n, 2), generator=generator)
        near = torch.randint(-(k // 4), k // 4 + 1, (n, 2), generator=generator)
        offset = torch.where(step == 0, near, step * far)
        room = torch.tensor(self.seen) - k
        low, high = (-offset).clamp(min=0), room - offset.clamp(min=0)
        share = torch.rand(n, 2, generator=generator)
        first = low + (share * (high - low + 1)).long()
        first = torch.minimum(torch.maximum(first, torch.zeros_like(first)), room)
        second = torch.minimum(torch.maximum(first + offset, torch.zeros_like(first)), room)
        pair = []
        for at in (first, second):
            patch = self._crop(pixels, which, at[:, 0], at[:, 1], k)
            # Colours of the two must not give the direction away (chromatic aberration, shading).
            patch = patch + _RGB_SHIFT * torch.randn(n, 3, 1, 1, generator=generator)
            pair.append(patch + _NOISE * torch.randn(patch.shape, generator=generator))
        return pair[0], pair[1], direction

    def _jittered(self, pixels: Tensor, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw pairs of patches that lie up to a few pixels (k/32, at least 1) apart each way."""
        n, reach = self.batch, max(1, k // 32)
        which = torch.randint(len(pixels), (n,), generator=generator)
        room = torch.tensor(self.seen) - k
        first = (torch.rand(n, 2, generator=generator) * (room + 1)).long()
        offset = torch.randint(-reach, reach + 1, (n, 2), generator=generator)
        second = torch.minimum((first + offset).clamp(min=0), room)
        one, other = (self._crop(pixels, which, at[:, 0], at[:, 1], k) for at in (first, second))
        return one, other

    # --- score ----------------------------------------------------------------------------------------------

    def embeddings(self, images: Tensor, name: str, stride: int) -> Tensor:
        """Return embeddings [B, D, rows, columns] of all patches of ``images`` less the mean, every ``stride``."""
        k = self.patch if name == "large" else self.patch // 2
        encode = self.large if name == "large" else self.large.small
        patches = images.unfold(2, k, stride).unfold(3, k, stride)  # [B, 3, r, c, k, k]
        b, _, r, c = patches.shape[:4]
        flat = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, k, k)
        embedded = torch.cat([encode(part) for part in torch.split(flat, 512)])
        return embedded.reshape(b, r, c, -1).permute(0, 3, 1, 2)

    def score_features(self, pyramid: list[Tensor]) -> Tensor:
        """Return the map [B, *seen] of images [B, 3, H, W], the only level of ``pyramid``."""
        images = self._shrink(pyramid[0]) - self.average_
        product = torch.ones(len(images), *self.seen)
        for name, stride in zip(("large", "small"), self.strides, strict=True):
            embedded = self.embeddings(images, name, stride)
            rows = embedded.permute(0, 2, 3, 1).flatten(0, 2)
            bank, halves = getattr(self, f"bank_{name}"), getattr(self, f"halves_{name}")
            distance = nearest(rows, bank, 1, halves)[0].sqrt().reshape(len(images), 1, *embedded.shape[2:])
            product = product * self._covering(distance, self.patch if name == "large" else self.patch // 2, stride)
        return product

    def _covering(self, distance: Tensor, k: int, stride: int) -> Tensor:
        """Return for each pixel the mean over the patches that cover it; borders repeat where none does."""
        kernel = torch.ones(1, 1, k, k)
        total = F.conv_transpose2d(distance, kernel, stride=stride)
        count = F.conv_transpose2d(torch.ones_like(distance), kernel, stride=stride)
        mean = total / count
        rest = (0, self.seen[1] - mean.shape[3], 0, self.seen[0] - mean.shape[2])
        return F.pad(mean, rest, mode="replicate")[:, 0]

    def _score(self, images: Tensor, boxes: Sequence[Box] | None) -> Scores:
        size = (images.shape[2], images.shape[3])
        maps = upsample(self.score_features([images]), size, self.sigma(size))
        return Scores(maps, self.score_images([], maps, boxes))


class Encoder(nn.Module):
    """Patches [n, 3, k, k] to embeddings [n, D] in (-1, 1): the code's 8 convolutions for k = 32.

    3x3 convolutions without padding, the first of stride 2: 32 pixels shrink to 1 in eight of them; patches of 16 or 8
    pixels need fewer. LeakyReLU 0.1 between, tanh at the end.
    """

    def __init__(self, k: int, dimension: int, channels: float) -> None:
        super().__init__()
        left = (k - 3) // 2 + 1
        depth = 1 + max(1, math.ceil((left - 1) / 2)) if left > 1 else 1
        widths = [max(4, round(c * channels)) for c in (32, 64, 128, 128, 64, 32, 32)]
        # The widest layers stay when the net is shorter.
        chosen = [*widths[: max(1, depth - 1)]] if depth - 1 <= 7 else [*widths, *[widths[-1]] * (depth - 8)]
        layers: list[nn.Module] = []
        inputs = 3
        for i in range(depth):
            last = i == depth - 1
            outputs = dimension if last else chosen[i]
            side = min(3, left) if i else 3
            layers.append(nn.Conv2d(inputs, outputs, side, stride=1 if i else 2))
            left = left if i == 0 else left - side + 1
            layers.append(nn.Tanh() if last else nn.LeakyReLU(0.1))
            inputs = outputs
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return the embeddings."""
        embedded: Tensor = self.layers(x)
        return embedded.flatten(1)


class LargeEncoder(nn.Module):
    """Patches [n, 3, 2k, 2k] to embeddings: the four quarters through an :class:`Encoder`, joined by a 2x2 layer."""

    def __init__(self, small: Encoder, dimension: int) -> None:
        super().__init__()
        self.small = small
        self.join = nn.Conv2d(dimension, 128, 2)
        self.last = nn.Conv2d(128, dimension, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the embeddings."""
        n, _, side, _ = x.shape
        k = side // 2
        quarters = x.reshape(n, 3, 2, k, 2, k).permute(0, 2, 4, 1, 3, 5).reshape(4 * n, 3, k, k)
        embedded = self.small(quarters).reshape(n, 2, 2, -1).permute(0, 3, 1, 2)
        joined: Tensor = self.last(F.leaky_relu(self.join(embedded), 0.1)).tanh()
        return joined.flatten(1)


class Direction(nn.Module):
    """The classifier of 8 directions on a difference of embeddings: D -> 128 -> 128 -> 8.

    Rows of the last layer have unit length and do train; the original's do not.
    """

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(dimension, 128), nn.LeakyReLU(0.1), nn.Linear(128, 128), nn.LeakyReLU(0.1)
        )
        self.last = nn.Linear(128, len(_DIRECTIONS), bias=False)

    def forward(self, difference: Tensor) -> Tensor:
        """Return logits [n, 8]."""
        return F.linear(self.body(difference), F.normalize(self.last.weight, dim=1))
