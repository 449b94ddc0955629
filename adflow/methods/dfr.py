"""DFR: an autoencoder of what deep features of several depths say about a region; what it cannot rebuild is new.

Source: J. Yang, Y. Shi, Z. Qi, DFR: Deep Feature Reconstruction for Unsupervised Anomaly Segmentation, 2020,
https://arxiv.org/abs/2012.07122; code https://github.com/YoungGod/DFR.

Every tap is brought to one grid and all are joined to a vector f of C channels per cell. An autoencoder of 1x1
convolutions, C -> (C + 2d)/2 -> 2d -> d and back, learns to rebuild f (mean squared error); d is the number of
principal components that hold 90 % of the variance. Score of a cell: |f - f'|^2 / C; higher = more anomalous.

Two recipes:

* ``paper``: 12 ReLU maps of VGG19, the net above, Adam 1e-4, 4 images a step.
* ``fast``: a *linear* autoencoder, whose optimum is known in closed form: projection on the principal components
  (P. Baldi, K. Hornik, Neural networks and principal component analysis, 1989), no pass of training at all. What a
  linear net cannot say, that features mean something else elsewhere in an aligned image, is put back by one net per
  position, each drawn to that of all positions by ``shrinkage``, as 300 images do not determine 232 x 232 numbers.
  Channels count in units of their deviation: those of a small net differ by orders of magnitude. Not in the paper.

Decisions where paper and code differ:

* Image resize: the code's is NEAREST; here images are resized with antialiasing, as for every method.
* Padding: the code's VGG pads by reflection and hands out 8 of its 12 maps padded; the backbone ``vgg19-dfr``
  does so too, because a checkpoint or a figure of the original can be compared in no other way.
* Taps: the code's default is relu4_1 to relu4_4, its main program and the paper's best table take all 12; so do we.
* Epochs: 700 in the paper, 150 in the code. The recipe follows the paper.
* PCA: d comes from all cells of 10 training images in the code; the recipe follows it (``pca_images``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from adflow.detector import FeatureDetector, Progress
from adflow.errors import UsageError
from adflow.imaging import upsample
from adflow.methods._checks import at_least, fraction, one_of
from adflow.methods._memory import common_grid, concatenate
from adflow.methods._rebuild import PositionCodes, components
from adflow.methods._train import train
from adflow.methods._whiten import Moments

if TYPE_CHECKING:
    from adflow.backbones import Backbone
    from adflow.features import FeatureBank

_LAYERS = 6  # convolutions of the paper's autoencoder
_VGG = ("relu1_1", "relu1_2", "relu2_1", "relu2_2", *(f"relu{b}_{i}" for b in (3, 4) for i in (1, 2, 3, 4)))


class DFR(FeatureDetector):
    """Error of rebuilding joined features of several depths; higher = more anomalous.

    Args:
        backbone: images to feature pyramid.
        net: "linear" (closed form) or "deep" (the paper's).
        latent: width d of the code; 0 = components that hold ``variance``.
        variance: share of the features' variance that the code must be able to hold.
        pca_images: images that d is found on, the first ones in a seeded order; 0 = all.
        grid: "coarsest" or "finest" tap, or "window": taps are enlarged to the image (corners aligned) and averaged
            over ``window`` pixels every ``stride`` pixels, as in the paper.
        window: side of that window in pixels; a border repeats the outermost pixel.
        stride: of that window.
        local: a linear net per position instead of one for all.
        shrinkage: weight of all positions' covariance in that of each position, more than 0 and at most 1.
        epochs: passes of the deep net over the training images.
        batch: images a step.
        lr: Adam's learning rate.
        aligned: enlarge the map with aligned corners (code), before ``smooth``.
        base: options of every feature detector (smooth, image_score, margin).
    """

    paper: ClassVar[str] = (
        "DFR: Deep Feature Reconstruction for Unsupervised Anomaly Segmentation, https://arxiv.org/abs/2012.07122"
    )
    year: ClassVar[int] = 2020
    learns: ClassVar[str] = "an autoencoder of joined patch features"
    has_null: ClassVar[bool] = False
    fit_cost: ClassVar[str] = "linear: time O((n + C) P C^2), memory O(P C^2); deep: time O(n P C^2) per pass"
    score_cost: ClassVar[str] = "linear: time and memory O(P C d); deep: time O(P C^2), memory O(C^2)"
    recipes: ClassVar[dict[str, dict[str, Any]]] = {
        "fast": {"backbone": "lite0", "taps": ("b2", "b3", "b4"), "size": 256, "variance": 0.95},
        "paper": {
            "backbone": "vgg19-dfr",
            "taps": _VGG,
            "size": 256,
            "net": "deep",
            "pca_images": 10,
            "grid": "window",
            "epochs": 700,
            "aligned": True,
            "smooth": 0.0,
            "image_score": "max",
            "margin": 0.0,
        },
    }

    def __init__(
        self,
        backbone: Backbone,
        *,
        net: str = "linear",
        latent: int = 0,
        variance: float = 0.9,
        pca_images: int = 0,
        grid: str = "coarsest",
        window: int = 4,
        stride: int = 4,
        local: bool = True,
        shrinkage: float = 0.3,
        epochs: int = 20,
        batch: int = 4,
        lr: float = 1e-4,
        aligned: bool = False,
        **base: Any,
    ) -> None:
        super().__init__(backbone, **base)
        one_of("net", net, ("linear", "deep"))
        one_of("grid", grid, ("coarsest", "finest", "window"))
        if not 0 <= variance < 1:
            raise UsageError(f"variance is {variance}, expected a share of at least 0 and less than 1")
        fraction(shrinkage=shrinkage)
        at_least(0, latent=latent, pca_images=pca_images, epochs=epochs)
        at_least(1, stride=stride, batch=batch)
        at_least(stride, window=window)
        self.net, self.latent, self.variance, self.pca_images = net, latent, variance, pca_images
        self.grid, self.window, self.stride = grid, window, stride
        self.local, self.shrinkage, self.aligned = local, shrinkage, aligned
        self.epochs, self.batch, self.lr = epochs, batch, lr

    def prepare(
        self,
        channels: list[int],
        grids: list[tuple[int, int]],
        size: tuple[int, int],
        generator: torch.Generator,
    ) -> None:
        """Create the tensors; those that depend on the number of components are still empty."""
        width = sum(channels)
        if self.grid == "window":
            joined = [joining(grids, n, axis, self.window, self.stride) for axis, n in enumerate(size)]
            self.joining: list[tuple[Tensor, Tensor]] = list(zip(*joined, strict=True))
            self.cells = (joined[0][0].shape[0], joined[1][0].shape[0])
        else:
            self.cells = common_grid(grids, self.grid)
        positions = self.cells[0] * self.cells[1] if self.local else 1
        linear = self.net == "linear"
        self.code = PositionCodes(positions if linear else 0, width)
        # The deep net's width is known after PCA only. Its batch norms are folded into the convolutions after
        # training, so that what scoring needs are six matrices.
        for k in range(0 if linear else _LAYERS):
            self.register_buffer(f"weight_{k}", torch.zeros(0, 0))
            self.register_buffer(f"bias_{k}", torch.zeros(0))

    def features(self, pyramid: list[Tensor]) -> Tensor:
        """Return the joined features [B, C, h, w]."""
        if self.grid != "window":
            return concatenate(pyramid, self.cells)
        return torch.cat([r.to(x) @ x @ c.to(x).T for x, (r, c) in zip(pyramid, self.joining, strict=True)], dim=1)

    # --- fit ------------------------------------------------------------------------------------------------

    def fit_features(
        self,
        bank: FeatureBank,
        *,
        generator: torch.Generator,
        progress: Progress | None = None,
        checkpoint: Path | None = None,
    ) -> None:
        """Find the code's width, then solve or train the autoencoder."""
        if self.net == "linear":
            rows = (self.features(pyramid).flatten(2).transpose(1, 2) for pyramid in bank.batches(16))
            self.code.learn(rows, self.shrinkage, self.latent, self.variance)
            return
        width = self.features(bank.pyramid([0])).shape[1]
        net = Autoencoder(width, self.latent or self._components(bank, generator))

        def batches() -> Iterator[Tensor]:
            while True:
                # The code drops no rest of a pass; a rest of one image still has many cells for batch norm.
                for pyramid in bank.batches(min(self.batch, len(bank)), shuffle=True, generator=generator):
                    yield self.features(pyramid)

        train(
            net,
            lambda x: (net(x) - x).square().mean(),
            batches(),
            steps=self.epochs * math.ceil(len(bank) / min(self.batch, len(bank))),
            lr=self.lr,
            generator=generator,
            progress=progress,
            checkpoint=checkpoint,
        )
        for k, (weight, bias) in enumerate(net.folded()):
            setattr(self, f"weight_{k}", weight)
            setattr(self, f"bias_{k}", bias)

    def _components(self, bank: FeatureBank, generator: torch.Generator) -> int:
        """Return how many principal components hold ``variance`` on ``pca_images`` images."""
        rows = torch.randperm(len(bank), generator=generator)[: self.pca_images or len(bank)].tolist()
        moments: Moments | None = None
        for row in sorted(rows):
            x = self.features(bank.pyramid([row])).flatten(2).transpose(1, 2)  # [1, P, C]
            moments = moments or Moments(1, x.shape[2])
            moments.add(x.transpose(0, 1))
        assert moments is not None
        return components(torch.linalg.eigvalsh(moments.covariance()[0]).flip(0), self.variance)

    # --- score ----------------------------------------------------------------------------------------------

    def score_features(self, pyramid: list[Tensor]) -> Tensor:
        """Return the map [B, h, w]: squared error of rebuilding, mean over channels."""
        x = self.features(pyramid)
        rows = x.flatten(2).transpose(1, 2)  # [B, P, C]
        if self.net == "linear":
            error: Tensor = self.code(rows)
            energy = error.square().mean(2)
        else:
            h = rows
            for k in range(_LAYERS):
                h = h @ getattr(self, f"weight_{k}").T + getattr(self, f"bias_{k}")
                # Ends of encoder and decoder have neither batch norm nor ReLU.
                h = h if k in (2, 5) else h.relu()
            energy = (rows - h).square().mean(2)
        return energy.reshape(len(x), *self.cells)

    def score_maps(self, pyramid: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Return maps [B, H, W]; with ``aligned`` the corner cells lie on the corner pixels."""
        if not self.aligned:
            return super().score_maps(pyramid, size)
        grid = self.score_features(pyramid)
        rows, columns = (aligned_matrix(to, have).to(grid) for to, have in zip(size, self.cells, strict=True))
        enlarged = torch.stack([rows @ one @ columns.T for one in grid])
        return enlarged if not self.smooth else upsample(enlarged, size, self.sigma(size))


class Autoencoder(nn.Module):
    """The paper's net on [B, C, h, w]: 1x1 convolutions, batch norm and ReLU between (section 3.2).

    Names follow the code's, so that its checkpoints load.
    """

    def __init__(self, width: int, latent: int) -> None:
        super().__init__()
        middle = (width + 2 * latent) // 2
        self.encoder = _stack([width, middle, 2 * latent, latent])
        self.decoder = _stack([latent, 2 * latent, middle, width])

    def forward(self, x: Tensor) -> Tensor:
        """Return the rebuilt features."""
        rebuilt: Tensor = self.decoder(self.encoder(x))
        return rebuilt

    @torch.no_grad()
    def folded(self) -> list[tuple[Tensor, Tensor]]:
        """Return weight [out, in] and bias [out] per convolution, with batch norm in evaluation mode inside."""
        found = []
        for part in (self.encoder, self.decoder):
            layers = list(part)
            for i in range(0, len(layers), 3):
                convolution = layers[i]
                assert isinstance(convolution, nn.Conv2d) and convolution.bias is not None
                weight, bias = convolution.weight[:, :, 0, 0].double(), convolution.bias.double()
                if i + 1 < len(layers):
                    norm = layers[i + 1]
                    assert isinstance(norm, nn.BatchNorm2d)
                    assert norm.running_var is not None and norm.running_mean is not None
                    gain = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
                    weight, bias = weight * gain[:, None], (bias - norm.running_mean) * gain + norm.bias
                found.append((weight.float().contiguous(), bias.float()))
        return found


def _stack(widths: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        layers.append(nn.Conv2d(a, b, 1))
        if i < len(widths) - 2:
            layers += [nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*layers)


def aligned_matrix(to: int, have: int) -> Tensor:
    """Return the matrix [to, have] of linear interpolation with aligned ends (``align_corners=True``)."""
    where = torch.linspace(0, have - 1, to, dtype=torch.float64) if to > 1 else torch.zeros(1, dtype=torch.float64)
    low = where.floor().clamp(max=max(0, have - 2)).long()
    share = where - low
    matrix = torch.zeros(to, have, dtype=torch.float64)
    rows = torch.arange(to)
    matrix[rows, low] = 1 - share
    matrix[rows, (low + 1).clamp(max=have - 1)] += share
    return matrix.float()


def joining(grids: list[tuple[int, int]], pixels: int, axis: int, window: int, stride: int) -> list[Tensor]:
    """Return, for each tap, the matrix [cells, tap cells] of one axis: enlarge to ``pixels``, average windows.

    Enlarging and averaging are linear and act on each axis by itself, so the enlarged map is never made. Cell i
    averages the pixels from i stride - (window - stride) // 2 on; beyond the border the outermost pixel is repeated,
    also where ``pixels`` is not a multiple of ``stride``.
    """
    cells = -(-pixels // stride)
    mean = torch.zeros(cells, pixels)
    for offset in range(window):
        at = torch.arange(cells) * stride - (window - stride) // 2 + offset
        mean[torch.arange(cells), at.clamp(0, pixels - 1)] += 1 / window
    return [mean @ aligned_matrix(pixels, grid[axis]) for grid in grids]
