"""CutPaste: learn to tell good images from ones with a pasted piece, then ask how far an image is from good ones.

Source: C.-L. Li, K. Sohn, J. Yoon, T. Pfister, CutPaste: Self-Supervised Learning for Anomaly Detection and
Localization, CVPR 2021, https://arxiv.org/abs/2104.04015. There is no official code.

A classifier learns three classes made from good images: unchanged, with a rectangle pasted elsewhere, with a thin
turned strip ("scar") pasted elsewhere (section 2.4). Higher = more anomalous.

Two recipes:

* ``paper``, level "image": the whole net is trained, image by image: ImageNet ResNet-18, its last map pooled to 512
  numbers, a multilayer head on top. The image score is the Mahalanobis distance of the pooled embedding from those of
  good images, from one Gaussian with Ledoit-Wolf covariance (section 2.3). The paper trains a second net on crops for
  maps; its details could not be verified, so **the map is our reading**: the distance of each cell of the last map
  from the Gaussian of its position. Measured on a small budget only (``lite0``, tap b6, 128 px, every 4th image of
  screw, 60 of 65,536 steps of 24 views): image AUROC 89.0, and 86.5 with the net as it came; the map finds no place
  (hit 3 and 0).
* ``fast``, level "cell", a departure: the backbone stays frozen, and *cells* are classified. The pasted area is known,
  so every cell of a changed image has its own class. Features are whitened by position, each class is a Gaussian there
  (mean and Ledoit-Wolf covariance), and the score is the log odds, in nats per channel, of a cell being pasted or scar
  rather than good: a classifier in closed form. A head of two layers, trained on the same cells, learned them by heart
  and lost to the whitening alone. Even so the classes teach little: to the distance from the good class, which is
  PaDiM's score, they add 0.2 points of AUPRO on screw and nothing on magnetic tiles. Chosen on these test images.

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
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adflow._clock import stage
from adflow.detector import FeatureDetector, ImageSource, Progress, Resources, Scores, as_source
from adflow.errors import InputError
from adflow.imaging import Box
from adflow.methods._checks import at_least, fraction, one_of
from adflow.methods._memory import common_grid, concatenate
from adflow.methods._spatial import PositionWhitening
from adflow.methods._train import one_cycle, train
from adflow.methods._whiten import inverse_factor

if TYPE_CHECKING:
    from adflow.backbones import Backbone
    from adflow.features import FeatureBank

# Section 2.2 and appendix: a patch takes 2 to 15 % of the image, with sides in a ratio of up to 1 : 3.3; a scar is 2
# to 16 pixels wide, 10 to 25 long, turned by up to 45 degrees; colours change by up to a tenth.
AREA = (0.02, 0.15)
ASPECT = (0.3, 1 / 0.3)
SCAR_WIDTH, SCAR_LENGTH, SCAR_ANGLE = (2, 16), (10, 25), 45.0
JITTER = 0.1
_AT = 256  # image side that scar sizes refer to

_CLASSES = 3  # good, pasted, scar
_COVERED = 0.1  # share of a cell from which on it counts as pasted


class CutPaste(FeatureDetector):
    """How much an image looks like one with a pasted piece, or how far it is from good ones to a net that knows both.

    Args:
        backbone: images to feature pyramid.
        level: "cell" = classify cells of the frozen backbone's features, in closed form; "image" = train a copy of the
            whole backbone on images (paper).
        shrinkage: of a position's covariance towards that of all positions.
        views: "cell": changed views of each kind per training image.
        steps: "image": optimiser steps.
        batch: "image": images a step, good and changed ones together.
        lr: "image": Adam's largest learning rate; one cosine cycle.
        weight_decay: "image": Adam's L2 term.
        base: options of every feature detector (smooth, image_score, margin).
    """

    paper: ClassVar[str] = (
        "CutPaste: Self-Supervised Learning for Anomaly Detection and Localization, https://arxiv.org/abs/2104.04015"
    )
    year: ClassVar[int] = 2021
    learns: ClassVar[str] = "a classifier of good images and ones with pasted pieces"
    has_null: ClassVar[bool] = False
    fit_cost: ClassVar[str] = "cell: features of 3 views per image, memory O(P C^2); image: O(steps) passes of the net"
    score_cost: ClassVar[str] = "time and memory O(P C^2)"
    recipes: ClassVar[dict[str, dict[str, Any]]] = {
        "fast": {"backbone": "lite0", "taps": ("b2", "b3", "b4"), "size": 256},
        "paper": {
            "backbone": "resnet18",
            "taps": ("layer4",),
            "size": 256,
            "level": "image",
            "margin": 0.0,
        },
        "tiny": {},
    }

    means_: Tensor
    factors_: Tensor
    offsets_: Tensor

    def __init__(
        self,
        backbone: Backbone,
        *,
        level: str = "cell",
        shrinkage: float = 0.3,
        views: int = 1,
        steps: int = 256 * 256,
        batch: int = 96,
        lr: float = 1e-4,
        weight_decay: float = 3e-5,
        **base: Any,
    ) -> None:
        super().__init__(backbone, **base)
        one_of("level", level, ("cell", "image"))
        fraction(shrinkage=shrinkage)
        at_least(0, steps=steps)
        at_least(1, views=views)
        at_least(3, batch=batch)
        self.level, self.shrinkage, self.views = level, shrinkage, views
        self.steps, self.batch, self.lr, self.weight_decay = steps, batch, lr, weight_decay
        self._changed: _Changed | None = None
        self._images: list[Tensor] = []

    @property
    def learns_from_bank(self) -> bool:
        """Return whether features of the images are of use; the net that is trained needs the images."""
        return self.level == "cell"

    def prepare(
        self,
        channels: list[int],
        grids: list[tuple[int, int]],
        size: tuple[int, int],
        generator: torch.Generator,
    ) -> None:
        """Create classes and Gaussians; for "image" also the net that is trained, a copy of the backbone's."""
        whole = self.level == "image"
        self.grid = grids[-1] if whole else common_grid(grids, "coarsest")
        length = channels[-1] if whole else sum(channels)
        self.net = copy.deepcopy(self.backbone) if whole else None
        if whole:
            self.head = nn.Sequential(nn.Linear(length, 512), nn.LeakyReLU(0.1), nn.Linear(512, 128))
            self.classify = nn.Sequential(nn.LeakyReLU(0.1), nn.Linear(128, _CLASSES))
        self.whiten = PositionWhitening(length, self.grid)
        # One Gaussian of pooled embeddings, or one of whitened cells per class, good first.
        self.register_buffer("means_", torch.zeros(1, length))
        self.register_buffer("factors_", torch.zeros(1, length, length))
        self.register_buffer("offsets_", torch.zeros(1))

    # --- fit ------------------------------------------------------------------------------------------------

    def fit(
        self,
        images: ImageSource | Tensor,
        *,
        seed: int = 0,
        resources: Resources | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Learn from images: features of unchanged ones, such as those of ``resources.bank``, are not enough."""
        resources = resources or Resources()
        source = as_source(images)
        try:
            if self.level == "image":
                self._images = [(image * 255).round().to(torch.uint8) for b in source.batches(16) for image in b]
                if not self._images:
                    raise InputError("there is no image to fit on, expected at least 1")
                # One image tells all shapes; the features of the backbone as it is are of no use.
                first = self._images[0][None].float() / 255
                return super().fit(first, seed=seed, resources=replace(resources, bank=None), progress=progress)
            self._changed = _Changed(source, self.views, torch.Generator().manual_seed(seed))
            with resources.build(self.backbone, self._changed, progress) as self._changed.bank:
                return super().fit(source, seed=seed, resources=resources, progress=progress)
        finally:
            self._changed, self._images = None, []

    def fit_features(
        self,
        bank: FeatureBank,
        *,
        generator: torch.Generator,
        progress: Progress | None = None,
        checkpoint: Path | None = None,
    ) -> None:
        """Fit the Gaussians of cells, or train the net."""
        if self._changed is not None:
            self._fit_cells(bank, self._changed)
        elif self._images:
            self._fit_images(generator, progress, checkpoint)
        else:
            raise InputError("CutPaste learns from images, found features only", hint="Call fit() with the images.")

    def _fit_cells(self, bank: FeatureBank, changed: _Changed) -> None:
        self.whiten.learn((concatenate(pyramid, self.grid) for pyramid in bank.batches(32)), self.shrinkage)
        assert changed.bank is not None
        labels = torch.stack([_labels(where, self.grid, 1 + i % 2) for i, where in enumerate(changed.where)])
        rows: list[list[Tensor]] = [[self._cells(pyramid).flatten(0, 1) for pyramid in bank.batches(32)], [], []]
        for pyramid, own in zip(changed.bank.batches(32), torch.split(labels, 32), strict=True):
            cells = self._cells(pyramid)
            for kind in range(1, _CLASSES):
                rows[kind].append(cells[own == kind])
        # A scar may be too thin to cover any cell by much, and black images show none: then there is no such class.
        self._learn_gaussians([torch.cat(of_class) for of_class in rows if sum(map(len, of_class))])

    def _learn_gaussians(self, classes: list[Tensor]) -> None:
        learned = [ledoit_wolf(rows) for rows in classes]
        self.means_ = torch.stack([mean for mean, _ in learned]).float()
        factors, spread = inverse_factor(torch.stack([covariance for _, covariance in learned]))
        self.factors_, self.offsets_ = factors.float(), (-0.5 * spread).float()

    def _fit_images(self, generator: torch.Generator, progress: Progress | None, checkpoint: Path | None) -> None:
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

        train(
            self,
            loss,
            batches(),
            steps=self.steps,
            lr=self.lr,
            schedule=one_cycle(self.steps),
            clip=1.0,
            weight_decay=self.weight_decay,
            generator=generator,
            progress=progress,
            checkpoint=checkpoint,
        )
        net.requires_grad_(False)
        with torch.no_grad():
            maps = torch.cat([net(image[None].float() / 255)[-1] for image in self._images])  # [n, C, h, w]
        self.whiten.learn(iter(torch.split(maps, 32)), self.shrinkage)
        self._learn_gaussians([maps.mean((2, 3))])

    # --- score ----------------------------------------------------------------------------------------------

    def _cells(self, pyramid: list[Tensor]) -> Tensor:
        """Return the whitened features [B, P, C] of all cells."""
        whitened: Tensor = self.whiten(pyramid[-1] if self.net is not None else concatenate(pyramid, self.grid))
        return whitened.flatten(2).transpose(1, 2)

    def _distances(self, rows: Tensor, which: int) -> Tensor:
        """Return squared Mahalanobis distances [...] of rows [..., C] from the Gaussian ``which``."""
        return ((rows - self.means_[which]) @ self.factors_[which].T).square().sum(-1)

    def score_features(self, pyramid: list[Tensor]) -> Tensor:
        """Return the map [B, h, w], per channel: log odds, or for "image" the squared distance from the position."""
        cells = self._cells(pyramid)
        if self.net is not None:
            score = cells.square().mean(2)
        else:
            log = torch.stack([self.offsets_[k] - 0.5 * self._distances(cells, k) for k in range(len(self.means_))])
            # Without any other class all that is left is the distance from good cells.
            others = log[1:].logsumexp(0) if len(log) > 1 else 0.0
            score = (others - log[0]) / cells.shape[2]
        return score.reshape(len(cells), *self.grid)

    def score_images(self, pyramid: list[Tensor], maps: Tensor, boxes: Sequence[Box] | None) -> Tensor:
        """Return image scores [B]: of the map, or for "image" the distance of the pooled embedding."""
        if self.net is None:
            return super().score_images(pyramid, maps, boxes)
        return self._distances(pyramid[-1].mean((2, 3)), 0).sqrt()

    def _score(self, images: Tensor, boxes: Sequence[Box] | None) -> Scores:
        pyramid = (self.backbone if self.net is None else self.net)(images)
        maps = self.score_maps(pyramid, (images.shape[2], images.shape[3]))
        with stage("image score"):
            return Scores(maps, self.score_images(pyramid, maps, boxes))


class _Changed:
    """The changed views of every image, pasted and scar in turn; remembers where something was pasted."""

    def __init__(self, source: ImageSource, views: int, generator: torch.Generator) -> None:
        self.source, self.views, self.generator = source, views, generator
        self.where: list[Tensor] = []
        self.bank: FeatureBank | None = None

    def __len__(self) -> int:
        return len(self.source) * 2 * self.views

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Yield the views of one image at a time."""
        for batch in self.source.batches(batch_size):
            for image in batch:
                made = [change(image, self.generator) for _ in range(self.views) for change in (cut_paste, scar)]
                # What looks as before (a piece of a black image on it) is good: it must not teach another class.
                self.where += [where & (not torch.equal(view, image)) for view, where in made]
                yield torch.stack([view for view, _ in made])


def _labels(where: Tensor, grid: tuple[int, int], kind: int) -> Tensor:
    """Return the class of each cell [P] of a view: ``kind`` where a tenth or more was pasted over, else 0."""
    covered = F.adaptive_avg_pool2d(where[None, None].float(), grid).flatten()
    return torch.where(covered >= _COVERED, kind, 0)


def ledoit_wolf(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean [D] and covariance [D, D] float64 of rows [n, D], shrunk towards a multiple of the identity.

    O. Ledoit, M. Wolf, A well-conditioned estimator for large-dimensional covariance matrices, Journal of
    Multivariate Analysis, 2004, section 3.2; the weight estimates the one with the least expected squared error.
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
