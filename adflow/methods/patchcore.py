"""PatchCore: the distance of each patch to a coreset of all normal patches.

Roth, Pemula, Zepeda, Schölkopf, Brox & Gehler, "Towards Total Recall in Industrial Anomaly Detection", CVPR
2022, https://arxiv.org/abs/2106.08265; official code by the authors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from adflow._clock import stage
from adflow._reduce import reduce_map
from adflow._system import resident_bytes
from adflow.detector import FeatureDetector, ImageSource, Progress, Resources, Scores
from adflow.errors import UsageError
from adflow.features import PART
from adflow.imaging import Box, upsample
from adflow.methods._checks import at_least
from adflow.methods._gaussian import global_whitening
from adflow.methods._memory import (
    StreamingCoreset,
    common_grid,
    coreset_size,
    half_norms,
    keep_within,
    nearest,
    parse_bytes,
    pyramid_shapes,
    random_projection,
    to_grid,
)

if TYPE_CHECKING:
    from adflow.backbones import Backbone
    from adflow.features import FeatureBank

_RIDGE = 0.01  # added to the eigenvalues of the correlation: below it lies noise of the arithmetic
_HELD = 2 << 30  # bytes of rows held at once while choosing, when no limit is set
_UNDER_WAY = 128 << 20  # bytes left for the features of a batch when one is set


class PatchCore(FeatureDetector):
    """Squared distance of a patch vector to the nearest row of a coreset; needs no alignment.

    A patch vector describes a cell and its neighbourhood at several depths. All vectors of the training
    images are thinned by a greedy choice that leaves none far away (see ``_memory.greedy_coreset``); higher =
    more anomalous.

    Where paper and official code differ, both are here: the paper scores by distance and re-weights the image
    score by the density around the match (eq. 7), the code scores by *squared* distance without it. Images
    are not cropped.

    Args:
        backbone: images to feature pyramid.
        coreset: share of all patches to keep ("10%"), or a number of rows.
        neighbourhood: side of the window of cells around a patch (paper: 3); 1 = the cell alone.
        layer_width: length each layer's window is pooled to (code: 1024, by adaptive averaging over neighbouring
            channels and window cells, in that order); 0 = average the window, keep the channels.
        width: length of the patch vector after pooling all layers together (code: 1024); 0 = as long as
            they are.
        grid: "finest" (paper: deeper layers are resized bilinearly) or "coarsest" (finer ones are averaged).
        whiten: degree to which directions are made to count alike before distances are taken, 0 to 1; None = the
            features as they are (paper). Not part of PatchCore: with a small net the raw channels differ in unit, and
            half-whitening (0.5) is what makes a bank work (screw: image AUROC 57 without, 96 with).
        projection: length of the seeded random projection the coreset is chosen on (code: 128).
        neighbours: b of the paper's eq. 7, at least 2; 0 = no re-weighting (code). The paper does not print b; 9 is
            what a well-known library uses.
        squared: score by squared distance (code) or distance (paper).
        patch_score: image score from the highest patch (paper) instead of the smoothed map.
        max_memory: bytes the process may hold while fitting, such as "2GiB"; what does not fit is chosen from in parts
            (a coreset of coresets), and where that cannot work the fit refuses before it starts.
        base: options of every feature detector (smooth, image_score, margin).
    """

    paper: ClassVar[str] = "Towards Total Recall in Industrial Anomaly Detection, https://arxiv.org/abs/2106.08265"
    year: ClassVar[int] = 2022
    learns: ClassVar[str] = "a coreset of normal patch features"
    has_null: ClassVar[bool] = False
    fit_cost: ClassVar[str] = "time O(n P m d) for m kept rows, memory O(n P d) or max_memory"
    score_cost: ClassVar[str] = "time O(P m d), memory O(m d): grows with the coreset"
    recipes: ClassVar[dict[str, dict[str, Any]]] = {
        "fast": {"backbone": "lite0", "taps": ("b2", "b3", "b4"), "size": 256},
        "paper": {
            "backbone": "wrn50",
            "taps": ("layer2", "layer3"),
            "size": 256,
            "neighbourhood": 3,
            "layer_width": 1024,
            "width": 1024,
            "grid": "finest",
            "whiten": None,
            "neighbours": 9,
            "squared": False,
            "patch_score": True,
            "margin": 0.0,
        },
        "code": {
            "backbone": "wrn50",
            "taps": ("layer2", "layer3"),
            "size": 256,
            "neighbourhood": 3,
            "layer_width": 1024,
            "width": 1024,
            "grid": "finest",
            "whiten": None,
            "patch_score": True,
            "margin": 0.0,
        },
    }

    bank_: Tensor
    halves_: Tensor
    mean_: Tensor
    basis_: Tensor

    def __init__(
        self,
        backbone: Backbone,
        *,
        coreset: str = "10%",
        neighbourhood: int = 1,
        layer_width: int = 0,
        width: int = 0,
        grid: str = "coarsest",
        whiten: float | None = 0.5,
        projection: int = 128,
        neighbours: int = 0,
        squared: bool = True,
        patch_score: bool = False,
        max_memory: str | None = None,
        **base: Any,
    ) -> None:
        super().__init__(backbone, **base)
        coreset_size(coreset, 1)
        parse_bytes(max_memory)
        common_grid([(1, 1)], grid)
        if neighbourhood < 1 or neighbourhood % 2 == 0:
            raise UsageError(f"neighbourhood is {neighbourhood}, expected an odd number such as 1 or 3")
        at_least(0, layer_width=layer_width, width=width, neighbours=neighbours)
        at_least(1, projection=projection)
        if neighbours == 1:
            raise UsageError("neighbours is 1, expected 0 or at least 2: by itself a row weighs every score with 0")
        if whiten is not None and not 0 <= float(whiten) <= 1:
            raise UsageError(f"whiten is {whiten}, expected 0 to 1, or none")
        self.coreset = coreset
        self.neighbourhood = neighbourhood
        self.layer_width = layer_width
        self.width = width
        self.grid = grid
        self.whiten = None if whiten is None else float(whiten)
        self.projection = projection
        self.neighbours = neighbours
        self.squared = squared
        self.patch_score = patch_score
        self.max_memory = max_memory

    # --- patch vectors --------------------------------------------------------------------------------------

    def embed(self, pyramid: list[Tensor]) -> Tensor:
        """Return patch vectors [B, P, D] of a pyramid, rows of the grid one after another."""
        layers = [self._layer(feature) for feature in pyramid]  # [B, D_l, h_l, w_l]
        grid = common_grid([(f.shape[2], f.shape[3]) for f in layers], self.grid)
        resized = [
            F.interpolate(f, size=grid, mode="bilinear", align_corners=False)
            if f.shape[2] < grid[0] or f.shape[3] < grid[1]
            else to_grid(f, grid)
            for f in layers
        ]
        joined = torch.cat([f.flatten(2) for f in resized], dim=1).transpose(1, 2)  # [B, P, sum D_l]
        if self.width and self.width != joined.shape[2]:
            joined = F.adaptive_avg_pool1d(joined, self.width)
        return joined

    def _layer(self, feature: Tensor) -> Tensor:
        """Return what one layer contributes at every one of its cells: [B, D_l, h, w]."""
        k = self.neighbourhood
        if not self.layer_width:
            return feature if k == 1 else F.avg_pool2d(feature, k, 1, k // 2)
        b, _, h, w = feature.shape
        windows = F.unfold(feature, k, padding=k // 2)  # [B, C k k, h w]: channel, row, column
        # The code resizes all windows first and pools after; both are linear and act on different axes.
        pooled = F.adaptive_avg_pool1d(windows.transpose(1, 2), self.layer_width)
        return pooled.transpose(1, 2).reshape(b, self.layer_width, h, w)

    def vectors(self, pyramid: list[Tensor]) -> Tensor:
        """Return the vectors [B, P, D] distances are taken between: patch vectors, whitened when asked."""
        embedded = self.embed(pyramid)
        return embedded if self.whiten is None else (embedded - self.mean_) @ self.basis_

    def _vector_length(self, channels: list[int]) -> int:
        return self.width or (self.layer_width * len(channels) if self.layer_width else sum(channels))

    # --- fit ------------------------------------------------------------------------------------------------

    def _row_bytes(self, length: int, parts: bool) -> int:
        """Bytes a row takes while the coreset is chosen: itself, its projection twice, and bookkeeping.

        With ``parts`` two more rows are held: those of the parts before, and a copy.
        """
        return 4 * (length + 2 * min(self.projection, length) + 6 + 2 * parts * length)

    def _capacity(self, size: int, images: int, rows: int, length: int) -> int:
        """Return how many rows to hold at once, or refuse.

        Raises:
            ResourceError: not even the coreset and as many candidates fit under ``max_memory``.
        """
        limit = parse_bytes(self.max_memory)
        parts = images > PART or rows < 4 * size
        least = min(rows, 2 * size)
        keep_within(
            limit,
            least * self._row_bytes(length, parts) + 4 * size * length,
            f"PatchCore with a coreset of {size} rows of {length} numbers",
            "Keep fewer rows (--set coreset=1% or a number), use a smaller size, or raise max_memory.",
        )
        left = _HELD
        if limit is not None:
            left = limit - resident_bytes() - 4 * size * length - _UNDER_WAY
        return max(least, min(rows, left // self._row_bytes(length, parts)))

    def allow(self, images: ImageSource, resources: Resources) -> Resources:
        """Refuse a fit whose ``max_memory`` cannot be kept."""
        if self.max_memory is not None:
            channels, grids = pyramid_shapes(self.backbone, images)
            rows = len(images) * math.prod(common_grid(grids, self.grid))
            size, length = coreset_size(self.coreset, rows), self._vector_length(channels)
            self._capacity(size, len(images), rows, length)
        return resources

    def prepare(
        self,
        channels: list[int],
        grids: list[tuple[int, int]],
        size: tuple[int, int],
        generator: torch.Generator,
    ) -> None:
        """Create the tensors (see :meth:`FeatureDetector.prepare`)."""
        self.grid_ = common_grid(grids, self.grid)
        length = self._vector_length(channels)
        self.register_buffer("bank_", torch.zeros(0, length))
        self.register_buffer("halves_", torch.zeros(0))
        side = length if self.whiten is not None else 0
        self.register_buffer("mean_", torch.zeros(side))
        self.register_buffer("basis_", torch.zeros(side, side))

    def fit_features(
        self,
        bank: FeatureBank,
        *,
        generator: torch.Generator,
        progress: Progress | None = None,
        checkpoint: Path | None = None,
    ) -> None:
        """Choose the coreset; in parts when memory asks for it."""
        length = self.bank_.shape[1]
        rows = len(bank) * math.prod(self.grid_)
        size = coreset_size(self.coreset, rows)
        capacity = self._capacity(size, len(bank), rows, length)
        if self.whiten is not None:
            white = global_whitening(bank, self.embed, length, _RIDGE)
            self.mean_.copy_(white.mean)
            self.basis_.copy_(white.matrix(self.whiten))
        projection = random_projection(length, self.projection, generator)
        coreset = StreamingCoreset(size, capacity, projection, generator)
        for done, kept in enumerate(bank.parts(partial(self.chosen, coreset.fresh())), start=1):
            coreset.add(kept)
            if progress:
                progress(min(done * PART, len(bank)), len(bank), "coreset")
        self.bank_ = coreset.rows()
        self.halves_ = half_norms(self.bank_)

    def chosen(self, like: StreamingCoreset, part: FeatureBank) -> Tensor:
        """Return a coreset ``like`` that of all images, of some of them."""
        coreset = like.fresh()
        for pyramid in part.batches(8):
            coreset.add(self.vectors(pyramid).flatten(0, 1))
        return coreset.of_part()

    # --- score ----------------------------------------------------------------------------------------------

    def _nearest(self, pyramid: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return vectors [B, P, D], squared distances [B, h, w] and the matched rows [B, P]."""
        vectors = self.vectors(pyramid)
        squared, index = nearest(vectors.flatten(0, 1), self.bank_, 1, self.halves_)
        return vectors, squared.reshape(-1, *self.grid_), index.reshape(len(vectors), -1)

    def score_features(self, pyramid: list[Tensor]) -> Tensor:
        """Return the map [B, h, w]: (squared) distance to the nearest row."""
        squared = self._nearest(pyramid)[1]
        return squared if self.squared else squared.sqrt()

    def score_images(self, pyramid: list[Tensor], maps: Tensor, boxes: Sequence[Box] | None) -> Tensor:
        """Return image scores [B]: of the map, or of the highest patch with ``patch_score``."""
        if not self.patch_score:
            return super().score_images(pyramid, maps, boxes)
        return self._patch_scores(*self._nearest(pyramid), boxes)

    def _score(self, images: Tensor, boxes: Sequence[Box] | None) -> Scores:
        if not self.patch_score:
            return super()._score(images, boxes)
        # Map and image score share one search.
        size = (images.shape[2], images.shape[3])
        vectors, squared, index = self._nearest(self.backbone(images))
        maps = upsample(squared if self.squared else squared.sqrt(), size, self.sigma(size))
        with stage("image score"):
            return Scores(maps, self._patch_scores(vectors, squared, index, boxes))

    def _patch_scores(self, vectors: Tensor, squared: Tensor, index: Tensor, boxes: Sequence[Box] | None) -> Tensor:
        """Return the score of each image's highest patch [B], re-weighted when ``neighbours`` is set."""
        scores = squared if self.squared else squared.sqrt()
        inside = [self._to_cells(boxes[i]) if boxes else None for i in range(len(scores))]
        best = torch.stack([reduce_map(s, "max", self.margin, inside[i]) for i, s in enumerate(scores)])
        if not self.neighbours:
            return best
        weights = []
        for i, top in enumerate(best):
            cell = (scores[i].reshape(-1) == top).float().argmax().reshape(1)
            weights.append(self._weight(vectors[i].index_select(0, cell)[0], index[i].index_select(0, cell)[0]))
        return best * torch.stack(weights)

    def _weight(self, vector: Tensor, match: Tensor) -> Tensor:
        """Return 1 - exp|x - m*| / sum over the b nearest rows m of m* of exp|x - m| (eq. 7), in [0, 1).

        A match in a crowded part of the bank is worth less surprise than one that is itself rare. The b rows
        include m*, so that the fraction is a softmax.
        """
        _, around = nearest(self.bank_[match].reshape(1, -1), self.bank_, self.neighbours, self.halves_)
        distances = (self.bank_[around[0]] - vector).square().sum(dim=1).sqrt()
        own = (self.bank_[match] - vector).square().sum().sqrt()
        return 1 - torch.exp(own - torch.logsumexp(distances, dim=0))

    def _to_cells(self, box: Box) -> Box:
        """Return the cells that lie in ``box`` of the input at least in part."""
        height, width = self.size or (1, 1)
        rows, columns = self.grid_
        top, left = box.top * rows // height, box.left * columns // width
        bottom = ((box.top + box.height) * rows + height - 1) // height
        right = ((box.left + box.width) * columns + width - 1) // width
        return Box(top, left, bottom - top, right - left)
