"""CutPaste: learn to tell good images from ones with a pasted piece, then ask how far an image is from good ones.

Source: C.-L. Li, K. Sohn, J. Yoon, T. Pfister, CutPaste: Self-Supervised Learning for Anomaly Detection and
Localization, CVPR 2021, https://arxiv.org/abs/2104.04015. There is no official code.

A classifier is trained on three classes made from good images: unchanged, with a rectangle pasted elsewhere, with a
thin turned strip ("scar") pasted elsewhere (section 2.4). What it has learned to look at is its embedding; the score
is the Mahalanobis distance of the embedding from those of good images (section 2.3). Higher = more anomalous.

Two recipes:

* ``paper``: the whole net is trained, image by image: ImageNet ResNet-18, its last map pooled to 512 numbers, a
  multilayer head on top. The image score is the distance of the pooled embedding, from one Gaussian with
  Ledoit-Wolf covariance. The paper trains a second net on crops for maps; its details could not be verified, so
  **the map is our reading**: the distance of each cell of the last map from the Gaussian of its position.
* ``fast``: the backbone stays frozen, and a small head is trained on its features, *cell by cell*: the pasted area is
  known, so every cell has its own class. Features are whitened by position first, and the map is the distance
  of the head's embedding from the Gaussian of its position. Not in the paper, which
  trains a net for hours.

Decisions: Adam instead of SGD with momentum (the project has one training loop), at a rate for fine-tuning. The
backbone's batch norms are folded into its convolutions, and so are trained as part of them. A public
re-implementation makes 256 *updates* where it speaks of 256 epochs of 256 updates; the recipe makes what the paper
says. Another cuts its 32-pixel windows with ``unfold(...).reshape(-1, 3, 32, 32)``, which scrambles them; here no
window is cut. Embeddings are not brought to unit length (one re-implementation does).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adflow.detector import FeatureDetector, ImageSource, Progress, Resources, Scores, _TensorImages
from adflow.errors import InputError, UsageError, unknown
from adflow.features import FeatureBank
from adflow.imaging import Box
from adflow.methods._memory import common_grid, concatenate
from adflow.methods._spatial import PositionWhitening
from adflow.methods._train import one_cycle, train

if TYPE_CHECKING:
    from adflow.backbones import Backbone

# Section 2.2 and appendix: a patch takes 2 to 15 % of the image, with sides in a ratio of up to 1 : 3.3; a scar is 2
# to 16 pixels wide, 10 to 25 long, turned by up to 45 degrees; colours change by up to a tenth.
AREA = (0.02, 0.15)
ASPECT = (0.3, 1 / 0.3)
SCAR_WIDTH, SCAR_LENGTH, SCAR_ANGLE = (2, 16), (10, 25), 45.0
JITTER = 0.1
_AT = 256  # image side that scar sizes refer to

_CLASSES = 3  # good, pasted, scar
# Cells less covered than the first share count as good, those between the two as neither.
_CLEAN, _COVERED = 0.01, 0.1


class CutPaste(FeatureDetector):
    """Distance of what a classifier of synthetic defects sees from what it sees in good images.

    Args:
        backbone: images to feature pyramid.
        level: "cell" = train a head on cells of the frozen backbone's features; "image" = train a copy of the whole
            backbone on images (paper).
        width: hidden units of the head ("cell").
        embedding: numbers per cell that the Gaussian is fitted on ("cell").
        shrinkage: of a position's covariance towards that of all positions.
        views: changed views of each kind per training image ("cell").
        steps: optimiser steps.
        batch: images a step, good and changed ones together.
        lr: Adam's largest learning rate; one cosine cycle.
        weight_decay: Adam's L2 term.
        base: options of every feature detector (smooth, image_score, margin).
    """

    paper: ClassVar[str] = (
        "CutPaste: Self-Supervised Learning for Anomaly Detection and Localization, https://arxiv.org/abs/2104.04015"
    )
    year: ClassVar[int] = 2021
    learns: ClassVar[str] = "an embedding that tells pasted pieces apart, and its Gaussian"
    has_null: ClassVar[bool] = False
    fit_cost: ClassVar[str] = "cell: features of 3 views per image, then O(steps); image: O(steps) passes of the net"
    score_cost: ClassVar[str] = "time and memory O(P C^2)"
    recipes: ClassVar[dict[str, dict[str, Any]]] = {
        "fast": {"backbone": "lite0", "taps": ("b2", "b3", "b4"), "size": 256},
        "paper": {
            "backbone": "resnet18",
            "taps": ("layer4",),
            "size": 256,
            "level": "image",
            "steps": 256 * 256,
            "batch": 96,
            "lr": 1e-4,
            "weight_decay": 3e-5,
            "margin": 0.0,
        },
        "tiny": {"steps": 20, "batch": 6, "width": 16, "embedding": 8},
    }

    mean_: Tensor
    factor_: Tensor

    def __init__(
        self,
        backbone: Backbone,
        *,
        level: str = "cell",
        width: int = 128,
        embedding: int = 64,
        shrinkage: float = 0.3,
        views: int = 1,
        steps: int = 300,
        batch: int = 24,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        **base: Any,
    ) -> None:
        super().__init__(backbone, **base)
        if level not in ("cell", "image"):
            raise unknown("level", level, ["cell", "image"])
        if not 0 < shrinkage <= 1:
            raise UsageError(f"shrinkage is {shrinkage}, expected more than 0 and at most 1")
        for name, number, lowest in (
            ("width", width, 1), ("embedding", embedding, 1), ("views", views, 1), ("steps", steps, 0),
            ("batch", batch, 3),
        ):  # fmt: skip
            if number < lowest:
                raise UsageError(f"{name} is {number}, expected at least {lowest}")
        self.level, self.width, self.embedding, self.shrinkage = level, width, embedding, shrinkage
        self.views, self.steps, self.batch, self.lr, self.weight_decay = views, steps, batch, lr, weight_decay
        self._where: list[Tensor] = []

    def prepare(
        self,
        channels: list[int],
        grids: list[tuple[int, int]],
        size: tuple[int, int],
        generator: torch.Generator,
    ) -> None:
        """Create head and Gaussians; for "image" also the net that is trained, a copy of the backbone's."""
        whole = self.level == "image"
        self.grid = grids[-1] if whole else common_grid(grids, "coarsest")
        length = channels[-1] if whole else sum(channels)
        self.net = copy.deepcopy(self.backbone) if whole else None
        self.whiten = None if whole else PositionWhitening(length, self.grid)
        width, inner = (512, 128) if whole else (self.width, self.embedding)
        layers: list[nn.Module] = [nn.Linear(length, width), nn.LeakyReLU(0.1), nn.Linear(width, inner)]
        self.head = nn.Sequential(*layers)
        self.classify = nn.Sequential(nn.LeakyReLU(0.1), nn.Linear(inner, _CLASSES))
        self.gauss = PositionWhitening(length if whole else inner, self.grid)
        self.register_buffer("mean_", torch.zeros(length if whole else 0))
        self.register_buffer("factor_", torch.zeros(length if whole else 0, length if whole else 0))

    # --- fit ------------------------------------------------------------------------------------------------

    def fit(
        self,
        images: ImageSource | Tensor,
        *,
        seed: int = 0,
        resources: Resources | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Learn from images: a bank of features of unchanged ones is not enough, so ``resources.bank`` is not used."""
        resources = resources or Resources()
        source = _TensorImages(images) if isinstance(images, Tensor) else images
        if len(source) == 0:
            raise InputError("there is no image to fit on, expected at least 1")
        generator = torch.Generator().manual_seed(seed)
        views = _Views(source, 0 if self.level == "image" else self.views, generator)
        with FeatureBank.build(
            self.backbone,
            views,
            memory=resources.memory,
            folder=resources.folder,
            dtype=resources.dtype,
            workers=resources.workers,
            progress=progress,
        ) as bank:
            self._where = views.where
            self._images = views.images
            try:
                return self.fit_bank(bank, seed=seed, progress=progress, checkpoint=resources.checkpoint)
            finally:
                self._where, self._images = [], []

    def fit_features(
        self,
        bank: FeatureBank,
        *,
        generator: torch.Generator,
        progress: Progress | None = None,
        checkpoint: Path | None = None,
    ) -> None:
        """Train the classifier, then fit Gaussians to what it makes of unchanged images."""
        if not self._where and not self._images:
            raise InputError("CutPaste learns from images, found features only", hint="Call fit() with the images.")
        options: dict[str, Any] = {
            "steps": self.steps, "lr": self.lr, "schedule": one_cycle(self.steps), "clip": 1.0,
            "weight_decay": self.weight_decay, "generator": generator, "progress": progress, "checkpoint": checkpoint,
        }  # fmt: skip
        if self.net is None:
            self._fit_cells(bank, generator, options)
        else:
            self._fit_images(generator, options)

    def _fit_cells(self, bank: FeatureBank, generator: torch.Generator, options: dict[str, Any]) -> None:
        assert self.whiten is not None
        kinds = 1 + 2 * self.views  # rows of an image: unchanged, then pairs of pasted and scar

        def good() -> Iterator[Tensor]:
            rows = range(0, len(bank), kinds)
            return (self._joined(bank.pyramid(rows[i : i + 32])) for i in range(0, len(rows), 32))

        self.whiten.learn(good(), self.shrinkage)
        labels = torch.stack([_labels(where, self.grid, row % kinds) for row, where in enumerate(self._where)])
        # Rare classes weigh more: a scar covers a hundredth of an image.
        counts = torch.stack([(labels == k).sum() for k in range(_CLASSES)]).double().clamp(min=1)
        weight = (counts.sum() / counts).sqrt().float()

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            while True:
                for rows in torch.split(torch.randperm(len(bank), generator=generator), min(self.batch, len(bank))):
                    yield self._joined(bank.pyramid(rows)), labels[rows]

        def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
            logits = self.classify(self._embed(batch[0]))
            return F.cross_entropy(logits.flatten(0, 1), batch[1].flatten(), weight=weight, ignore_index=-1)

        train(self, loss, batches(), **options)
        with torch.no_grad():
            self.gauss.learn((self._as_map(self._embed(x)) for x in good()), self.shrinkage)

    def _fit_images(self, generator: torch.Generator, options: dict[str, Any]) -> None:
        net = self.net
        assert net is not None
        net.requires_grad_(True)
        count = max(1, self.batch // 3)

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            while True:
                chosen = torch.randint(len(self._images), (count,), generator=generator).tolist()
                good = [self._images[i].float() / 255 for i in chosen]
                made = [change(image, generator)[0] for change in (cut_paste, scar) for image in good]
                yield torch.stack(good + made), torch.arange(_CLASSES).repeat_interleave(count)

        def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
            return F.cross_entropy(self.classify(self.head(net(batch[0])[-1].mean((2, 3)))), batch[1])

        train(self, loss, batches(), **options)
        net.requires_grad_(False)
        with torch.no_grad():
            maps = torch.cat([net(image[None].float() / 255)[-1] for image in self._images])  # [n, C, h, w]
        self.gauss.learn(iter(torch.split(maps, 32)), self.shrinkage)
        mean, covariance = ledoit_wolf(maps.mean((2, 3)))
        factor = torch.linalg.cholesky(covariance)
        self.mean_ = mean.float()
        self.factor_ = torch.linalg.solve_triangular(factor, torch.eye(len(mean)).double(), upper=False).float()

    # --- score ----------------------------------------------------------------------------------------------

    def _joined(self, pyramid: Sequence[Tensor]) -> Tensor:
        return concatenate(pyramid, self.grid)

    def _embed(self, joined: Tensor) -> Tensor:
        """Return the embedding [B, P, E] of joined features [B, C, h, w]."""
        assert self.whiten is not None
        embedded: Tensor = self.head(self.whiten(joined).flatten(2).transpose(1, 2))
        return embedded

    def _as_map(self, rows: Tensor) -> Tensor:
        return rows.transpose(1, 2).reshape(len(rows), rows.shape[2], *self.grid)

    def score_features(self, pyramid: list[Tensor]) -> Tensor:
        """Return the map [B, h, w]: squared distance of each cell from the Gaussian of its position, per channel."""
        x = pyramid[-1] if self.net is not None else self._as_map(self._embed(self._joined(pyramid)))
        whitened: Tensor = self.gauss(x)
        return whitened.square().mean(1)

    def score_images(self, pyramid: list[Tensor], maps: Tensor, boxes: Sequence[Box] | None) -> Tensor:
        """Return image scores [B]: of the map, or for "image" the distance of the pooled embedding."""
        if self.net is None:
            return super().score_images(pyramid, maps, boxes)
        pooled = pyramid[-1].mean((2, 3)) - self.mean_
        return (pooled @ self.factor_.T).square().sum(1).sqrt()

    def _score(self, images: Tensor, boxes: Sequence[Box] | None) -> Scores:
        pyramid = (self.backbone if self.net is None else self.net)(images)
        maps = self.score_maps(pyramid, (images.shape[2], images.shape[3]))
        return Scores(maps, self.score_images(pyramid, maps, boxes))


class _Views:
    """Every image followed by its changed views, pasted and scar in turn; remembers where something was pasted.

    With ``views`` 0 only the images come, and are kept as bytes for training on them.
    """

    def __init__(self, source: ImageSource, views: int, generator: torch.Generator) -> None:
        self.source, self.views, self.generator = source, views, generator
        self.where: list[Tensor] = []
        self.images: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.source) * (1 + 2 * self.views)

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Yield one image with its views at a time."""
        for batch in self.source.batches(batch_size):
            for image in batch:
                if not self.views:
                    self.images.append((image * 255).round().to(torch.uint8))
                    yield image[None]
                    continue
                made = [(image, torch.zeros(image.shape[1:], dtype=torch.bool))]
                for _ in range(self.views):
                    made += [cut_paste(image, self.generator), scar(image, self.generator)]
                self.where += [where for _, where in made]
                yield torch.stack([view for view, _ in made])


def _labels(where: Tensor, grid: tuple[int, int], row: int) -> Tensor:
    """Return the class of each cell [P] of a view: 0 good, 1 pasted, 2 scar, -1 where it is neither."""
    covered = F.adaptive_avg_pool2d(where[None, None].float(), grid).flatten()
    kind = 1 + (row - 1) % 2
    return torch.where(covered >= _COVERED, kind, torch.where(covered <= _CLEAN, 0, -1))


def ledoit_wolf(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean [D] and covariance [D, D] float64 of rows [n, D], shrunk towards a multiple of the identity.

    O. Ledoit, M. Wolf, A well-conditioned estimator for large-dimensional covariance matrices, Journal of
    Multivariate Analysis, 2004, section 3.2; the weight is the one that is best on average for normal rows.
    """
    count, width = rows.shape
    mean = rows.double().mean(0)
    x = rows.double() - mean
    sample = x.T @ x / count
    level = sample.diagonal().mean()
    distance = sample.square().sum() / width - level.square()  # |S - level I|^2 / D
    noise = (x.square().sum(1).square().sum() / count - sample.square().sum()) / count / width
    share = float((torch.minimum(noise, distance) / distance.clamp(min=1e-30)).clamp(0, 1))
    eye = torch.eye(width, dtype=torch.float64)
    # The tiny last term keeps one image, which has no spread at all, invertible.
    return mean, (1 - share) * sample + (share * level + 1e-12) * eye


def uniform(low: float, high: float, generator: torch.Generator) -> float:
    """Return one number from [low, high)."""
    return low + (high - low) * float(torch.rand((), generator=generator))


def integer(below: int, generator: torch.Generator) -> int:
    """Return one of 0 .. below - 1."""
    return int(torch.randint(max(1, below), (), generator=generator))


def jitter(patch: Tensor, generator: torch.Generator, amount: float = JITTER) -> Tensor:
    """Change brightness, contrast and saturation by up to ``amount``, hue by a turn of up to ``amount``."""
    from torchvision.transforms import functional as TF

    factors = [uniform(1 - amount, 1 + amount, generator) for _ in range(3)]
    patch = TF.adjust_brightness(patch, factors[0])
    patch = TF.adjust_contrast(patch, factors[1])
    patch = TF.adjust_saturation(patch, factors[2])
    shifted: Tensor = TF.adjust_hue(patch, uniform(-amount, amount, generator))
    return shifted


def cut_paste(image: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the image [3, H, W] with a rectangle of its own pasted elsewhere, and where, bool [H, W]."""
    height, width = image.shape[1:]
    area = uniform(*AREA, generator) * height * width
    aspect = math.exp(uniform(math.log(ASPECT[0]), math.log(ASPECT[1]), generator))
    h = min(max(1, round(math.sqrt(area / aspect))), height)
    w = min(max(1, round(math.sqrt(area * aspect))), width)
    patch = jitter(_cut(image, h, w, generator), generator)
    return _paste(image, patch, torch.ones(h, w, dtype=torch.bool), generator)


def scar(image: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the image with a thin, turned strip of its own pasted elsewhere, and where, bool [H, W]."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as TF

    height, width = image.shape[1:]
    scale = min(height, width) / _AT
    w = max(1, round(uniform(*SCAR_WIDTH, generator) * scale))
    h = max(2, round(uniform(*SCAR_LENGTH, generator) * scale))
    patch = jitter(_cut(image, min(h, height), min(w, width), generator), generator)
    angle = uniform(-SCAR_ANGLE, SCAR_ANGLE, generator)
    inside = torch.ones(1, *patch.shape[1:])
    turned, mask = (TF.rotate(x, angle, InterpolationMode.NEAREST, expand=True) for x in (patch, inside))
    return _paste(image, turned[:, :height, :width], mask[0, :height, :width] > 0.5, generator)


def _cut(image: Tensor, h: int, w: int, generator: torch.Generator) -> Tensor:
    top, left = integer(image.shape[1] - h + 1, generator), integer(image.shape[2] - w + 1, generator)
    return image[:, top : top + h, left : left + w]


def _paste(image: Tensor, patch: Tensor, inside: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    h, w = inside.shape
    top, left = integer(image.shape[1] - h + 1, generator), integer(image.shape[2] - w + 1, generator)
    changed, where = image.clone(), torch.zeros(image.shape[1:], dtype=torch.bool)
    changed[:, top : top + h, left : left + w] = torch.where(inside, patch, image[:, top : top + h, left : left + w])
    where[top : top + h, left : left + w] = inside
    return changed, where
