"""What FastFlow and CS-Flow share: which taps stand on which grid, the fit, maps from latents, a measured null."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adflow.detector import Energy, FeatureDetector, Progress
from adflow.errors import unknown
from adflow.imaging import Size, upsample
from adflow.methods._memory import common_grid, concatenate
from adflow.methods._spatial import PositionWhitening, normaliser
from adflow.methods._train import one_cycle, train
from adflow.methods._whiten import chi_square_fit, leave_one_out

if TYPE_CHECKING:
    from adflow.features import FeatureBank

JOINS = ("own", "scale", "coarsest", "finest")
SCORES = ("likelihood", "density")


@dataclass(frozen=True)
class Scale:
    """One input of a flow.

    Attributes:
        channels: of the taps together.
        grid: (height, width).
        taps: which levels of the pyramid are joined here.
    """

    channels: int
    grid: tuple[int, int]
    taps: tuple[int, ...]

    def of(self, pyramid: Sequence[Tensor]) -> Tensor:
        """Return the features [B, channels, h, w] of this scale; taps of other grids are brought to it."""
        return concatenate([pyramid[tap] for tap in self.taps], self.grid)


def scales(join: str, channels: Sequence[int], grids: Sequence[tuple[int, int]]) -> list[Scale]:
    """Return the inputs of a flow over some taps, finest first.

    Args:
        join: "own" = every tap by itself; "scale" = taps of one grid together; "coarsest" or "finest" = all taps
            together on that grid.
        channels: per tap.
        grids: per tap.
    """
    taps = range(len(grids))
    groups: list[tuple[int, ...]]
    if join == "own":
        groups = [(tap,) for tap in taps]
    elif join == "scale":
        order = sorted(taps, key=lambda tap: (-grids[tap][0] * grids[tap][1], grids[tap]))
        groups = [tuple(members) for _, members in groupby(order, key=lambda tap: grids[tap])]
    elif join in JOINS:
        return [Scale(sum(channels), common_grid(grids, join), tuple(taps))]
    else:
        raise unknown("join", join, JOINS)
    return [Scale(sum(channels[tap] for tap in group), grids[group[0]], group) for group in groups]


def likelihood_maps(latents: Sequence[Tensor], size: Size, sigma: float) -> Tensor:
    """Return the mean over scales of -exp(-mean_c z^2 / 2) at ``size`` [B, H, W]: in [-1, 0], flat where z is large."""
    grids = [-(-0.5 * z.square().mean(1)).exp() for z in latents]
    return torch.stack([upsample(grid, size, sigma) for grid in grids]).mean(0)


def density_maps(found: Sequence[tuple[Tensor, Tensor]], size: Size, sigma: float) -> Tensor:
    """Return the mean over scales of (sum_c z^2 / 2 - logdet) / C at ``size`` [B, H, W], in nats per channel."""
    grids = [(0.5 * z.square().sum(1) - logdet) / z.shape[1] for z, logdet in found]
    return torch.stack([upsample(grid, size, sigma) for grid in grids]).mean(0)


def as_left_out(x: Tensor, count: int, shrinkage: float) -> Tensor:
    """Return whitened training features [B, C, h, w] about as long as if the whitening had not seen their image.

    With fewer images than C^2 a whitening fits its own images closer than new ones. A flow trained on them learns to
    stretch that away and then stretches new images too far. The length is exact (see ``leave_one_out``), the direction
    is kept.
    """
    energy = x.square().sum(1, keepdim=True).clamp(min=1e-12)
    return x * (leave_one_out(energy, count, 1 - shrinkage) / energy).sqrt()


class MeasuredNull(nn.Module):
    """Scale per position and degrees of freedom that make energies of left-out good images about chi-square.

    The flow promises chi-square with C degrees. With fewer images than C^2 a whitening fits its own images closer than
    new ones, so what new ones would have is computed by leaving each image out of it (see ``leave_one_out``).
    """

    def __init__(self, channels: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.scale: Tensor
        self.dof: Tensor
        self.register_buffer("scale", torch.ones(grid[0] * grid[1]))
        self.register_buffer("dof", torch.tensor(float(channels)))

    def learn(self, pairs: Iterable[tuple[Tensor, Tensor]], shrinkage: float) -> None:
        """Learn from energies [B, h, w] of the training images, before and after the flow.

        Args:
            pairs: batches of (energies of the whitened inputs, energies of the latents).
            shrinkage: of the whitening.
        """
        before, after = (torch.cat([e.flatten(1) for e in part]) for part in zip(*pairs, strict=True))
        # The flow is small beside the whitening: what leaving out does to its input, it does to its output.
        grown = leave_one_out(before, len(before), 1 - shrinkage) / before.clamp(min=1e-12)
        scale, dof = chi_square_fit(after * grown)
        self.scale.copy_(scale)
        self.dof.fill_(dof)

    def energy(self, z: Tensor) -> Energy:
        """Return the energy of latents [B, C, h, w]."""
        return Energy(z.square().sum(1) * self.scale.reshape(self.grid), float(self.dof))


class MapFlow(FeatureDetector):
    """A flow on feature maps: whitened per position or not, trained by maximum likelihood, its null model measured.

    A method's ``prepare`` calls ``make_layers`` and creates the flow; its constructor sets the options that are read
    here.
    """

    has_null: ClassVar[bool] = True
    scales: list[Scale]
    norms: nn.ModuleList
    nulls: nn.ModuleList
    norm: str
    shrinkage: float
    epochs: int
    batch: int
    lr: float
    warm: bool
    weight_decay: float

    @abstractmethod
    def through(self, xs: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Map the flow's inputs to latents [B, C, h, w] with log-determinants [B, h, w] at each position, per scale."""

    @abstractmethod
    def loss(self, latents: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Return the negative log-likelihood that is minimised."""

    def training_options(self) -> dict[str, Any]:
        """Return further options of :func:`adflow.methods._train.train`."""
        return {}

    def make_layers(self, scales: list[Scale]) -> None:
        """Create what stands in front of the flow and its null model, for each scale."""
        self.scales = scales
        self.norms = nn.ModuleList(normaliser(self.norm, scale.channels, scale.grid) for scale in scales)
        self.nulls = nn.ModuleList(MeasuredNull(scale.channels, scale.grid) for scale in scales)

    def normalised(self, pyramid: list[Tensor]) -> list[Tensor]:
        """Return the flow's inputs [B, C, h, w]."""
        return [norm(scale.of(pyramid)) for scale, norm in zip(self.scales, self.norms, strict=True)]

    def latents(self, pyramid: list[Tensor], left_out_of: int = 0) -> list[tuple[Tensor, Tensor]]:
        """Return per scale latents [B, C, h, w] and the log-determinant [B, h, w] of each position's own entries.

        The log-determinants, that of the whitening included, add up to that of the image.

        Args:
            pyramid: features.
            left_out_of: how many images the whitening learned from, when these are among them and shall look like new.
        """
        xs = self.normalised(pyramid)
        if left_out_of and self.norm == "position":
            xs = [as_left_out(x, left_out_of, self.shrinkage) for x in xs]
        return [
            (z, logdet + norm.position_logdet() if isinstance(norm, PositionWhitening) else logdet)
            for (z, logdet), norm in zip(self.through(xs), self.norms, strict=True)
        ]

    def fit_features(
        self,
        bank: FeatureBank,
        *,
        generator: torch.Generator,
        progress: Progress | None = None,
        checkpoint: Path | None = None,
    ) -> None:
        """Whiten, train the flow by maximum likelihood, and measure the null model."""
        for scale, norm in zip(self.scales, self.norms, strict=True):
            if isinstance(norm, PositionWhitening):
                norm.learn((scale.of(pyramid) for pyramid in bank.batches(32)), self.shrinkage)
        size = min(self.batch, len(bank))

        def batches() -> Iterator[list[Tensor]]:
            while True:
                yield from bank.batches(size, shuffle=True, generator=generator, drop_last=True)

        steps = self.epochs * (len(bank) // size)
        train(
            self,
            lambda pyramid: self.loss(self.latents(pyramid, left_out_of=len(bank))),
            batches(),
            steps=steps,
            lr=self.lr,
            schedule=one_cycle(steps) if self.warm else None,
            weight_decay=self.weight_decay,
            generator=generator,
            progress=progress,
            checkpoint=checkpoint,
            **self.training_options(),
        )
        if self.norm == "position":
            with torch.no_grad():
                self._measure_null(bank)

    def _measure_null(self, bank: FeatureBank) -> None:
        pairs: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.scales]
        for pyramid in bank.batches(32):
            xs = self.normalised(pyramid)
            for found, x, (z, _) in zip(pairs, xs, self.through(xs), strict=True):
                found.append((x.square().sum(1), z.square().sum(1)))
        for null, found in zip(self.nulls, pairs, strict=True):
            assert isinstance(null, MeasuredNull)
            null.learn(found, self.shrinkage)

    def energy_features(self, pyramid: list[Tensor]) -> list[Energy]:
        """Return squared latents summed over channels, about chi-square on good images that are new to the model.

        With ``norm="position"`` scale and degrees are measured in ``fit``, otherwise they are the flow's promise: 1 and
        C. Tails are the model's, not measured.
        """
        found = []
        for null, (z, _) in zip(self.nulls, self.latents(pyramid), strict=True):
            assert isinstance(null, MeasuredNull)
            found.append(null.energy(z))
        return found


def brought_to(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return x [B, C, h, w] bilinearly on ``grid``, unchanged when it is there already."""
    return x if tuple(x.shape[2:]) == grid else F.interpolate(x, grid, mode="bilinear", align_corners=False)
