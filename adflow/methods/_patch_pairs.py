"""The pairs that Patch SVDD learns from: neighbours whose direction is to be told, and patches that shall lie close.

Source: J. Yi, S. Yoon, Patch SVDD: Patch-level SVDD for Anomaly Detection and Segmentation, ACCV 2020,
https://arxiv.org/abs/2006.16067; code https://github.com/nuclearboy95/Anomaly-Detection-PatchSVDD-PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

# (row, column) of the second patch's direction, as the classifier numbers them.
DIRECTIONS = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))
_RGB_SHIFT, _NOISE = 0.02, 0.02  # of images in [0, 1]: code, position task

# First and second patch of the position task, the direction, and the two patches of the SVDD loss.
Pairs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def cell_pairs(cells: Tensor, count: int, generator: torch.Generator) -> Pairs:
    """Draw pairs of neighbouring cells of embeddings [n, D, rows, columns]; they serve both losses."""
    which = torch.arange(count) % len(cells)
    direction = torch.randint(len(DIRECTIONS), (count,), generator=generator)
    step = torch.tensor(DIRECTIONS)[direction]  # [count, 2]
    # Where the first cell may lie so that the second lies on the grid.
    low, room = (-step).clamp(min=0), torch.tensor(cells.shape[2:]) - step.abs()
    a = low + (torch.rand(count, 2, generator=generator) * room).long()
    first, second = (cells[which, :, at[:, 0], at[:, 1]] for at in (a, a + step))
    return first, second, direction, first, second


def patch_pairs(pixels: Tensor, average: Tensor, k: int, count: int, generator: torch.Generator) -> Pairs:
    """Draw pairs of patches of ``k`` pixels for both losses from images [N, 3, H, W] less their mean image."""
    return (*neighbours(pixels, average, k, count, generator), *_jittered(pixels, average, k, count, generator))


def neighbours(
    pixels: Tensor, average: Tensor, k: int, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw pairs of patches, the second at 3k/4 to k from the first in one of 8 directions: pair and direction."""
    which = torch.randint(len(pixels), (count,), generator=generator)
    direction = torch.randint(len(DIRECTIONS), (count,), generator=generator)
    step = torch.tensor(DIRECTIONS)[direction]  # [count, 2]
    # A step of 0 is jittered too, by up to a quarter of the patch either way.
    far = 3 * k // 4 + torch.randint(max(1, k // 4), (count, 2), generator=generator)
    near = torch.randint(-(k // 4), k // 4 + 1, (count, 2), generator=generator)
    offset = torch.where(step == 0, near, step * far)
    room = torch.tensor(pixels.shape[2:]) - k
    low, high = (-offset).clamp(min=0), room - offset.clamp(min=0)
    share = torch.rand(count, 2, generator=generator)
    first = low + (share * (high - low + 1)).long()
    first = torch.minimum(first.clamp(min=0), room)
    second = torch.minimum((first + offset).clamp(min=0), room)
    pair = []
    for at in (first, second):
        patch = _crop(pixels, average, which, at, k)
        # Colours of the two must not give the direction away (chromatic aberration, shading).
        patch = patch + _RGB_SHIFT * torch.randn(count, 3, 1, 1, generator=generator)
        pair.append(patch + _NOISE * torch.randn(patch.shape, generator=generator))
    return pair[0], pair[1], direction


def _jittered(pixels: Tensor, average: Tensor, k: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw pairs of patches that lie up to a few pixels (k/32, at least 1) apart each way."""
    reach = max(1, k // 32)
    which = torch.randint(len(pixels), (count,), generator=generator)
    room = torch.tensor(pixels.shape[2:]) - k
    first = (torch.rand(count, 2, generator=generator) * (room + 1)).long()
    offset = torch.randint(-reach, reach + 1, (count, 2), generator=generator)
    second = torch.minimum((first + offset).clamp(min=0), room)
    return _crop(pixels, average, which, first, k), _crop(pixels, average, which, second, k)


def _crop(pixels: Tensor, average: Tensor, which: Tensor, at: Tensor, k: int) -> Tensor:
    """Return patches [n, 3, k, k] less the mean image, upper left corners ``at`` [n, 2]."""
    span = torch.arange(k)
    rows, columns = (at[:, :1] + span)[:, None, :, None], (at[:, 1:] + span)[:, None, None, :]
    colours = torch.arange(3)[None, :, None, None]
    patches = pixels[which[:, None, None, None], colours, rows, columns].float()
    return patches - average[colours, rows, columns]
