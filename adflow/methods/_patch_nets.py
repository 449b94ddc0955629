"""The nets of Patch SVDD's paper: encoders of pixel patches at two sizes, the classifier of directions, their map.

Source: J. Yi, S. Yoon, Patch SVDD: Patch-level SVDD for Anomaly Detection and Segmentation, ACCV 2020,
https://arxiv.org/abs/2006.16067; code https://github.com/nuclearboy95/Anomaly-Detection-PatchSVDD-PyTorch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adflow.methods._patch_pairs import DIRECTIONS


def covering(distance: Tensor, k: int, stride: int, size: tuple[int, int]) -> Tensor:
    """Return for each pixel [B, *size] the mean over the patches that cover it; borders repeat where none does.

    ``distance`` [B, 1, rows, columns] holds one number per patch of ``k`` pixels, every ``stride`` pixels.
    """
    kernel = distance.new_ones(1, 1, k, k)
    total = F.conv_transpose2d(distance, kernel, stride=stride)
    count = F.conv_transpose2d(torch.ones_like(distance), kernel, stride=stride)
    mean = total / count
    rest = (0, size[1] - mean.shape[3], 0, size[0] - mean.shape[2])
    return F.pad(mean, rest, mode="replicate")[:, 0]


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
        self.body = nn.Sequential(nn.Linear(dimension, 128), nn.LeakyReLU(0.1), nn.Linear(128, 128), nn.LeakyReLU(0.1))
        self.last = nn.Linear(128, len(DIRECTIONS), bias=False)

    def forward(self, difference: Tensor) -> Tensor:
        """Return logits [n, 8]."""
        return F.linear(self.body(difference), F.normalize(self.last.weight, dim=1))
