"""SPADE: distance to the pixels of the most similar normal images.

Cohen & Hoshen, "Sub-Image Anomaly Detection with Deep Pyramid Correspondences", 2020,
https://arxiv.org/abs/2005.02357. There is no code by the authors.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from adflow.detector import FeatureDetector, ImageSource, Progress, Resources
from adflow.imaging import Box, upsample
from adflow.methods._checks import at_least, one_of
from adflow.methods._memory import common_grid, concatenate, keep_within, nearest, parse_bytes, pyramid_shapes

if TYPE_CHECKING:
    from adflow.backbones import Backbone
    from adflow.features import FeatureBank

_BATCH = 32  # images whose features are read together


class SPADE(FeatureDetector):
    """Mean distance to the kappa nearest vectors among the pixels of the K most similar training images.

    Stage 1 (section 3.2): the last tap, averaged over the image, finds the K nearest training images; their
    mean Euclidean distance can be the image score. Stage 2 (section 3.3): the pixels of those K images are
    the gallery of every pixel of the new one. Higher = more anomalous, in units of the features. All gallery
    vectors are compared (the repository most numbers were made with drops up to 99 of them). Nothing is
    thinned: what is kept grows with the number of training images. Images are not cropped.

    Args:
        backbone: images to feature pyramid; its last tap is for finding images only, the others for pixels.
        images: K (paper: 50 for MVTec, 1 for STC; repository: 5).
        kappa: gallery vectors a pixel is compared with (paper: 1).
        levels: "joined": taps side by side on one grid (paper); "separate": every tap searched by itself, the maps
            resized bilinearly and averaged (repository).
        grid: where joined taps meet: "finest" (paper: coarser taps are repeated) or "coarsest".
        retrieval_score: image score from stage 1 (paper) instead of the map.
        max_memory: bytes the process may hold while fitting, such as "2GiB"; refuses before it starts when the
            features of all images do not fit. None = no limit.
        base: options of every feature detector (smooth, image_score, margin).
    """

    paper: ClassVar[str] = (
        "Sub-Image Anomaly Detection with Deep Pyramid Correspondences, https://arxiv.org/abs/2005.02357"
    )
    year: ClassVar[int] = 2020
    learns: ClassVar[str] = "nothing; keeps the features of all training images"
    has_null: ClassVar[bool] = False
    fit_cost: ClassVar[str] = "time O(n), memory O(n P C)"
    score_cost: ClassVar[str] = "time O(n + K P^2 C), memory O(n P C): grows with n"
    recipes: ClassVar[dict[str, dict[str, Any]]] = {
        "fast": {"backbone": "lite0", "taps": ("b2", "b3", "b4", "b6"), "size": 256},
        "paper": {
            "backbone": "wrn50",
            "taps": ("layer1", "layer2", "layer3", "layer4"),
            "size": 256,
            "grid": "finest",
            "retrieval_score": True,
        },
        "code": {
            "backbone": "wrn50",
            "taps": ("layer1", "layer2", "layer3", "layer4"),
            "size": 256,
            "images": 5,
            "levels": "separate",
            "retrieval_score": True,
        },
    }

    pooled_: Tensor

    def __init__(
        self,
        backbone: Backbone,
        *,
        images: int = 50,
        kappa: int = 1,
        levels: str = "joined",
        grid: str = "coarsest",
        retrieval_score: bool = False,
        max_memory: str | None = None,
        **base: Any,
    ) -> None:
        super().__init__(backbone, **base)
        at_least(1, images=images, kappa=kappa)
        one_of("levels", levels, ("joined", "separate"))
        common_grid([(1, 1)], grid)
        parse_bytes(max_memory)
        self.images = images
        self.kappa = kappa
        self.levels = levels
        self.grid = grid
        self.retrieval_score = retrieval_score
        self.max_memory = max_memory

    def allow(self, images: ImageSource, resources: Resources) -> Resources:
        """Refuse a fit whose ``max_memory`` cannot be kept."""
        if self.max_memory is not None:
            channels, grids = pyramid_shapes(self.backbone, images)
            # Twice: once in the bank of features, once in the detector.
            self._check_memory(2 * len(images), channels, grids)
        return resources

    def _check_memory(self, images: int, channels: list[int], grids: list[tuple[int, int]]) -> None:
        shapes = zip(self._pixel(channels), self._pixel(grids), strict=True)
        numbers = sum(c * h * w for c, (h, w) in shapes)
        keep_within(
            parse_bytes(self.max_memory),
            4 * images * (numbers + channels[-1]),
            f"SPADE with {images} sets of features",
            "Use fewer training images, a smaller size or finer taps with fewer channels.",
        )

    @staticmethod
    def _pixel(taps: list[Any]) -> list[Any]:
        """Return the entries of the taps pixels are compared by: all but the last, if there are more."""
        return taps[:-1] or taps

    def prepare(
        self,
        channels: list[int],
        grids: list[tuple[int, int]],
        size: tuple[int, int],
        generator: torch.Generator,
    ) -> None:
        """Create the tensors (see :meth:`FeatureDetector.prepare`)."""
        self.register_buffer("pooled_", torch.zeros(0, channels[-1]))
        shapes = list(zip(self._pixel(channels), self._pixel(grids), strict=True))
        for i, (c, (h, w)) in enumerate(shapes):
            self.register_buffer(f"level{i}_", torch.zeros(0, c, h, w))
        self.levels_ = len(shapes)
        self.grids_ = [grid for _, grid in shapes]
        # Separate levels meet on the finest grid at least; their maps are resized to it bilinearly.
        self.grid_ = common_grid(self.grids_, self.grid if self.levels == "joined" else "finest")

    def fit_features(
        self,
        bank: FeatureBank,
        *,
        generator: torch.Generator,
        progress: Progress | None = None,
        checkpoint: Path | None = None,
    ) -> None:
        """Keep the features."""
        self._check_memory(len(bank), list(bank.channels), list(bank.grids))
        self.pooled_ = torch.empty(len(bank), bank.channels[-1])
        levels = [torch.empty(len(bank), *self.get_buffer(f"level{i}_").shape[1:]) for i in range(self.levels_)]
        # Batch by batch into its place: a list of batches, to be joined, would hold everything twice.
        for start, pyramid in zip(range(0, len(bank), _BATCH), bank.batches(_BATCH), strict=True):
            rows = slice(start, start + _BATCH)
            self.pooled_[rows] = pyramid[-1].mean(dim=(2, 3))
            for level, feature in zip(levels, self._pixel(pyramid), strict=True):
                level[rows] = feature
        for i, level in enumerate(levels):
            setattr(self, f"level{i}_", level)
        if progress:
            progress(len(bank), len(bank), "features kept")

    def retrieve(self, pyramid: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return distances [B, K] (Euclidean, ascending) and numbers [B, K] of the nearest images."""
        squared, index = nearest(pyramid[-1].mean(dim=(2, 3)), self.pooled_, self.images)
        return squared.sqrt(), index

    def level_distances(self, pyramid: list[Tensor], chosen: Tensor) -> list[Tensor]:
        """Return per level (one when joined) the mean distance to the kappa nearest vectors [B, h, w].

        Args:
            pyramid: features of B images.
            chosen: [B, K] numbers of the training images whose pixels are the gallery.
        """
        results: list[list[Tensor]] = []
        for b, numbers in enumerate(chosen):
            query = [feature[b : b + 1] for feature in self._pixel(pyramid)]
            gallery = [getattr(self, f"level{i}_")[numbers] for i in range(self.levels_)]
            if self.levels == "joined":
                query, gallery = [concatenate(query, self.grid_)], [concatenate(gallery, self.grid_)]
            results.append([self._distance(q, g) for q, g in zip(query, gallery, strict=True)])
        return [torch.stack(level) for level in zip(*results, strict=True)]

    def _distance(self, query: Tensor, gallery: Tensor) -> Tensor:
        """Return the map [h, w] of one image [1, C, h, w] against the pixels of a gallery [K, C, h, w]."""
        channels, (h, w) = query.shape[1], query.shape[2:]
        rows = gallery.permute(0, 2, 3, 1).reshape(-1, channels)
        squared, _ = nearest(query[0].flatten(1).T, rows, self.kappa)
        return squared.sqrt().mean(dim=1).reshape(h, w)

    def _level_maps(self, pyramid: list[Tensor]) -> list[Tensor]:
        return self.level_distances(pyramid, self.retrieve(pyramid)[1])

    def score_features(self, pyramid: list[Tensor]) -> Tensor:
        """Return the map [B, h, w]: the mean over levels on the finest of their grids."""
        return self._mean(self._level_maps(pyramid), self.grid_)

    def score_maps(self, pyramid: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Return maps [B, H, W]; separate levels are each resized to the input before they are averaged."""
        if self.levels == "joined":
            return super().score_maps(pyramid, size)
        return upsample(self._mean(self._level_maps(pyramid), size), size, self.sigma(size))

    @staticmethod
    def _mean(maps: list[Tensor], size: tuple[int, int]) -> Tensor:
        resized = [
            F.interpolate(m.unsqueeze(1), size=size, mode="bilinear", align_corners=False).squeeze(1) for m in maps
        ]
        return torch.stack(resized).mean(dim=0)

    def score_images(self, pyramid: list[Tensor], maps: Tensor, boxes: Sequence[Box] | None) -> Tensor:
        """Return image scores [B]: mean distance to the K images with ``retrieval_score``, else the map's."""
        if self.retrieval_score:
            return self.retrieve(pyramid)[0].mean(dim=1)
        return super().score_images(pyramid, maps, boxes)
