"""PEFM: two views of a patch by frozen nets, each predicted from the other and the position; surprise is anomaly.

Source: Q. Wan, L. Gao, X. Li, L. Wen, Position Encoding Enhanced Feature Mapping for Image Anomaly Detection, IEEE
CASE 2022; code https://github.com/smiler96/PFM-and-PEFM-for-Image-Anomaly-Detection-and-Segmentation. Without the
position code it is PFM (Unsupervised Image Anomaly Detection and Segmentation Based on Pre-trained Feature Mapping,
IEEE Transactions on Industrial Informatics, 2023).

At each scale a source map S and a target map T, both of unit length over channels, are mapped to each other by 1x1
convolutions; both maps are trained on good images. Score of a cell: (|T - T'|^2 + |S - S'|^2) / 2, mean over scales;
higher = more anomalous.

Two recipes:

* ``paper``: ResNet-34 (source) and ResNet-50 (target), the code's mappings with a shared bottleneck, the position's
  sine/cosine code added to their inputs.
* ``fast``: one net, whose neighbouring depths stand for the two nets (the upper tap is brought to the lower one's
  grid), and *linear* maps of every position, solved in closed form (:class:`LinearMaps`): the position is not a code
  but the owner of its maps, drawn to those of all positions by ``shrinkage``. Errors are measured in deviations of
  good images (``error="whitened"``): the code has such an option too, unused and with a division that is wrong.
  Features are not brought to unit length, which costs a small net its contrast. None of this is in the paper.

Decisions where paper and code differ: the published table takes for each class the image size that is best on its
test images (128, 256 or 512 px); the recipe takes 256 for all. Widths of the bottleneck are the command line's
defaults 200, 400, 900 (the published logs show 800 for the last). Scales are averaged ("add"), the code's other
option multiplies them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adflow._encoding import positional_encoding
from adflow.detector import FeatureDetector, Progress
from adflow.errors import InputError, UsageError
from adflow.imaging import upsample
from adflow.methods._checks import above_0, at_least, fraction, one_of
from adflow.methods._memory import to_grid
from adflow.methods._train import train
from adflow.methods._whiten import Moments, deviations

if TYPE_CHECKING:
    from adflow.backbones import Backbone
    from adflow.features import FeatureBank

_TAPS = ("layer1", "layer2", "layer3")


class PEFM(FeatureDetector):
    """Error of predicting two feature maps from each other; higher = more anomalous.

    Args:
        backbone: images to feature pyramid.
        pairs: "halves" = the first half of the taps are sources, the second their targets (paper: two nets);
            "neighbours" = each tap and the next deeper one.
        net: "linear" (closed form) or "deep" (the paper's).
        position: whether the deep net's inputs carry the position's code (False = PFM), and the linear maps are
            those of the position.
        latent: width of the deep net's bottleneck, one per pair; the last one holds for further pairs.
        unit_length: bring source and target to length 1 over channels (paper).
        ridge: added to the linear maps' covariance, whose channels have variance 1.
        error: of the linear net: "whitened" = in deviations of good images' errors, by position and direction;
            "plain" = in deviations of the channels. The deep net's errors are in feature units (paper).
        shrinkage: weight of all positions' covariance in that of each position, more than 0 and at most 1.
        join: "add" = mean over pairs (paper), "multiply" = product.
        epochs: passes of the deep net over the training images.
        batch: images a step.
        lr: Adam's learning rate.
        weight_decay: Adam's L2 term.
        base: options of every feature detector (smooth, image_score, margin).
    """

    paper: ClassVar[str] = (
        "Position Encoding Enhanced Feature Mapping for Image Anomaly Detection, "
        "https://doi.org/10.1109/CASE49997.2022.9926547"
    )
    year: ClassVar[int] = 2022
    learns: ClassVar[str] = "maps between two feature maps"
    has_null: ClassVar[bool] = False
    fit_cost: ClassVar[str] = "linear: time O(n P C^2), memory O(P C^2); deep: O(n P C^2) per pass, memory: the bank"
    score_cost: ClassVar[str] = "time and memory O(P C^2)"
    recipes: ClassVar[dict[str, dict[str, Any]]] = {
        "fast": {"backbone": "lite0", "taps": ("b2", "b3", "b4"), "size": 256},
        "paper": {
            "backbone": "resnet34+resnet50",
            "taps": tuple(f"{net}.{tap}" for net in ("resnet34", "resnet50") for tap in _TAPS),
            "size": 256,
            "pairs": "halves",
            "net": "deep",
            "unit_length": True,
            "error": "plain",
            "epochs": 200,
            "smooth": 0.0,
            "image_score": "max",
            "margin": 0.0,
        },
    }

    def __init__(
        self,
        backbone: Backbone,
        *,
        pairs: str = "neighbours",
        net: str = "linear",
        position: bool = True,
        latent: tuple[int, ...] = (200, 400, 900),
        unit_length: bool = False,
        ridge: float = 0.01,
        error: str = "whitened",
        shrinkage: float = 0.3,
        join: str = "add",
        epochs: int = 20,
        batch: int = 16,
        lr: float = 3e-4,
        weight_decay: float = 1e-5,
        **base: Any,
    ) -> None:
        super().__init__(backbone, **base)
        one_of("pairs", pairs, ("neighbours", "halves"))
        one_of("net", net, ("linear", "deep"))
        one_of("error", error, ("whitened", "plain"))
        one_of("join", join, ("add", "multiply"))
        if not latent or min(latent) < 1:
            raise UsageError(f"latent is {latent}, expected widths of at least 1")
        at_least(0, epochs=epochs)
        at_least(1, batch=batch)
        above_0(ridge=ridge)
        fraction(shrinkage=shrinkage)
        self.pairs, self.net, self.position, self.latent = pairs, net, position, tuple(latent)
        self.unit_length, self.ridge, self.error = unit_length, ridge, error
        self.shrinkage, self.join = shrinkage, join
        self.epochs, self.batch, self.lr, self.weight_decay = epochs, batch, lr, weight_decay

    def prepare(
        self,
        channels: list[int],
        grids: list[tuple[int, int]],
        size: tuple[int, int],
        generator: torch.Generator,
    ) -> None:
        """Create the maps of every pair."""
        count = len(channels)
        if count < 2 or (self.pairs == "halves" and count % 2):
            raise InputError(
                f"the backbone has {count} taps, expected an even number (pairs=halves) or at least 2 (neighbours)"
            )
        halves = [(k, k + count // 2) for k in range(count // 2)]
        self.taps = halves if self.pairs == "halves" else list(itertools.pairwise(range(count)))
        # Where both nets have one stride nothing is resampled; else the finer map is averaged onto the coarser grid.
        self.grids = [min(grids[s], grids[t], key=math.prod) for s, t in self.taps]
        maps: list[nn.Module] = []
        for k, (s, t) in enumerate(self.taps):
            if self.net == "linear":
                positions = math.prod(self.grids[k]) if self.position else 1
                maps.append(LinearMaps(channels[s], channels[t], positions))
                continue
            width = self.latent[min(k, len(self.latent) - 1)]
            maps.append(DualProjection(channels[s], channels[t], width, self.grids[k] if self.position else None))
        self.maps = nn.ModuleList(maps)

    def views(self, pyramid: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return source and target [B, C, h, w] of every pair on one grid."""
        found = []
        for (s, t), grid in zip(self.taps, self.grids, strict=True):
            source, target = to_grid(pyramid[s], grid), to_grid(pyramid[t], grid)
            if self.unit_length:
                source, target = F.normalize(source, dim=1, eps=1e-12), F.normalize(target, dim=1, eps=1e-12)
            found.append((source, target))
        return found

    def fit_features(
        self,
        bank: FeatureBank,
        *,
        generator: torch.Generator,
        progress: Progress | None = None,
        checkpoint: Path | None = None,
    ) -> None:
        """Solve the linear maps, or train the deep ones, all pairs in one loop."""
        if self.net == "linear":
            for k, maps in enumerate(self.maps):
                assert isinstance(maps, LinearMaps)
                pairs = (self.views(pyramid)[k] for pyramid in bank.batches(16))
                maps.solve(pairs, self.shrinkage, self.ridge, self.error == "whitened")
                if progress:
                    progress(k + 1, len(self.maps), "maps")
            return

        def batches() -> Iterator[list[Tensor]]:
            while True:
                yield from bank.batches(min(self.batch, len(bank)), shuffle=True, generator=generator)

        def loss(pyramid: list[Tensor]) -> Tensor:
            # One Adam per scale in the code: the sum has the same gradients, and Adam works parameter by parameter.
            return torch.stack(
                [mapping_loss(maps, *pair) for maps, pair in zip(self.maps, self.views(pyramid), strict=True)]
            ).sum()

        train(
            self,
            loss,
            batches(),
            steps=self.epochs * math.ceil(len(bank) / min(self.batch, len(bank))),
            lr=self.lr,
            weight_decay=self.weight_decay,
            generator=generator,
            progress=progress,
            checkpoint=checkpoint,
        )

    # --- score ----------------------------------------------------------------------------------------------

    def scale_grids(self, pyramid: Sequence[Tensor]) -> list[Tensor]:
        """Return the map [B, h, w] of every pair: half the summed squared errors of both directions."""
        found = []
        for maps, (source, target) in zip(self.maps, self.views(pyramid), strict=True):
            if isinstance(maps, LinearMaps):
                found.append(maps(source, target))
                continue
            to_source, to_target = maps(source, target)
            error = (to_target - target).square().sum(1) + (to_source - source).square().sum(1)
            found.append(0.5 * error)
        return found

    def score_maps(self, pyramid: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Return maps [B, H, W]: every pair enlarged bilinearly, joined, smoothed."""
        maps = torch.stack([upsample(grid, size, 0.0) for grid in self.scale_grids(pyramid)])
        joined = maps.mean(0) if self.join == "add" else maps.prod(0)
        # Smoothing last: it and a mean can change places, it and a product cannot.
        return upsample(joined, size, self.sigma(size)) if self.smooth else joined

    def score_features(self, pyramid: list[Tensor]) -> Tensor:
        """Return the map [B, h, w] on the finest grid of a pair."""
        return self.score_maps(pyramid, max(self.grids, key=math.prod))


class DualProjection(nn.Module):
    """The paper's two mappings of one scale; names follow the code's, so that its checkpoints load.

    Encoder: channels -> channels/2 + latent -> 2 latent, each with batch norm and ReLU; then a projection 2 latent ->
    latent that both directions share; decoder: latent -> 2 latent -> channels/2 + latent -> channels.

    Args:
        source: channels of S.
        target: channels of T.
        latent: width of the bottleneck.
        grid: cells, when the position's code is added to the inputs; None = PFM.
    """

    code_source: Tensor
    code_target: Tensor

    def __init__(self, source: int, target: int, latent: int, grid: tuple[int, int] | None) -> None:
        super().__init__()
        self.encoder1 = nn.Sequential(_Layer(source, source // 2 + latent), _Layer(source // 2 + latent, 2 * latent))
        self.shared_coder = _Layer(2 * latent, latent, plain=True)
        self.decoder1 = _decoder(latent, target)
        self.encoder2 = nn.Sequential(_Layer(target, target // 2 + latent), _Layer(target // 2 + latent, 2 * latent))
        self.decoder2 = _decoder(latent, source)
        for name, channels in (("code_source", source), ("code_target", target)):
            code = torch.zeros(1) if grid is None else positional_encoding(channels, *grid)
            self.register_buffer(name, code, persistent=False)

    def forward(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return S' predicted from T, and T' predicted from S."""
        to_target: Tensor = self.decoder1(self.shared_coder(self.encoder1(source + self.code_source)))
        to_source: Tensor = self.decoder2(self.shared_coder(self.encoder2(target + self.code_target)))
        return to_source, to_target


class _Layer(nn.Module):
    """A 1x1 convolution, with batch norm and ReLU unless ``plain``."""

    def __init__(self, inputs: int, outputs: int, plain: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, 1)]
        self.conv = nn.Sequential(*layers if plain else [*layers, nn.BatchNorm2d(outputs), nn.ReLU()])

    def forward(self, x: Tensor) -> Tensor:
        mapped: Tensor = self.conv(x)
        return mapped


def _decoder(latent: int, outputs: int) -> nn.Sequential:
    middle = outputs // 2 + latent
    return nn.Sequential(_Layer(latent, 2 * latent), _Layer(2 * latent, middle), _Layer(middle, outputs, plain=True))


def mapping_loss(maps: nn.Module, source: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of both directions, added."""
    to_source, to_target = maps(source, target)
    return F.mse_loss(to_target, target) + F.mse_loss(to_source, source)


class LinearMaps(nn.Module):
    """The linear maps of one pair, at every position: those of the Gaussian that source and target have together.

    With joint covariance C of (s, t), K = C^-1 and its Cholesky factor K_tt = L L^T, the best linear prediction of t
    is -K_tt^-1 K_ts s, and its error whitened to unit covariance is L^T t + L^-1 K_ts s (C. M. Bishop, Pattern
    Recognition and Machine Learning, 2006, eq. 2.73-2.75); the same with s and t exchanged. So each direction is one
    matrix on (s, t).

    Args:
        source: channels of S.
        target: channels of T.
        positions: cells with maps of their own; 1 = the same maps everywhere.
    """

    mean: Tensor
    to_target: Tensor
    to_source: Tensor

    def __init__(self, source: int, target: int, positions: int) -> None:
        super().__init__()
        both = source + target
        self.source = source
        self.register_buffer("mean", torch.zeros(positions, both))
        self.register_buffer("to_target", torch.zeros(positions, target, both))
        self.register_buffer("to_source", torch.zeros(positions, source, both))

    def solve(self, pairs: Iterator[tuple[Tensor, Tensor]], shrinkage: float, ridge: float, whitened: bool) -> None:
        """Learn from batches of source and target [B, C, h, w]."""
        positions, both = self.mean.shape
        moments = Moments(positions, both)
        for pair in pairs:
            rows = torch.cat(pair, 1).flatten(2).transpose(1, 2)  # [B, P, S + T]
            moments.add(rows if positions > 1 else rows.reshape(-1, 1, both))
        # One image has no spread: what is left is the distance to it.
        spread = moments.covariance() if moments.count > 1 else torch.zeros(positions, both, both).double()
        everywhere = spread.mean(0)
        unit = deviations(everywhere)
        joint = ((1 - shrinkage) * spread + shrinkage * everywhere) / unit / unit[:, None]
        joint.diagonal(dim1=1, dim2=2).add_(ridge)
        precision = torch.linalg.inv(joint)
        order = torch.arange(both)
        for name, of in (("to_target", order >= self.source), ("to_source", order < self.source)):
            block = precision[:, of]  # [P, predicted, S + T]
            factor = torch.linalg.cholesky(block[:, :, of])
            # L^-1 (K_ts, K_tt) = (L^-1 K_ts, L^T); in deviations of the channels K_tt^-1 (K_ts, K_tt) = (-W, I).
            matrix = torch.linalg.solve_triangular(factor, block, upper=False)
            if not whitened:
                matrix = torch.linalg.solve_triangular(factor.mT, matrix, upper=True)
            setattr(self, name, (matrix / unit).float().contiguous())
        self.mean = moments.mean.float()

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Return half the summed squared errors of both directions [B, h, w]."""
        rows = torch.cat([source, target], 1).flatten(2).transpose(1, 2) - self.mean  # [B, P, S + T]
        energy = torch.zeros_like(rows[:, :, 0])
        for matrix in (self.to_target, self.to_source):
            error = rows @ matrix[0].T if len(matrix) == 1 else torch.einsum("bpc,pdc->bpd", rows, matrix)
            energy = energy + 0.5 * error.square().sum(2)
        return energy.reshape(len(rows), *source.shape[2:])
