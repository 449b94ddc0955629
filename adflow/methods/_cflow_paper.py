"""What CFLOW-AD's authors do, piece by piece: constants, schedule, order of steps, loss, score map.

Source: the code of D. Gudovskiy, S. Ishizaka, K. Kozuka, CFLOW-AD, WACV 2022, https://arxiv.org/abs/2107.12571,
https://github.com/gudovskiy/cflow-ad; file names below are its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from adflow.errors import InputError

# The code's clamp of every coupling's log-scale (freia_cflow_head) and its training constants (config.py,
# train.py).
CLAMP = 1.9
META_EPOCHS, SUB_EPOCHS, IMAGES, FIBERS = 25, 8, 32, 256
RATE, LOWEST_RATE, WARM_UP_EPOCHS, WARM_UP_START = 2e-4, 1e-3, 2, 0.1
# Input sizes by class, from the table in the README of the original; 256 for others.
SIZES = dict.fromkeys(("bottle", "carpet", "grid", "leather", "screw", "tile", "toothbrush", "wood", "zipper"), 512) | {
    "transistor": 128
}


def paper_rate(batch: int, per_epoch: int) -> float:
    """Return the factor of the learning rate for an image batch, counted over the whole training.

    Cosine over meta-epochs from 1 to ``LOWEST_RATE``, constant within one; in the first two a linear ramp per
    batch from a tenth to the cosine's value at the third (utils.py).

    Args:
        batch: number of the image batch, from 0.
        per_epoch: image batches per meta-epoch, that is per ``SUB_EPOCHS`` passes.
    """

    def cosine(epoch: float) -> float:
        return LOWEST_RATE + (1 - LOWEST_RATE) * 0.5 * (1 + math.cos(math.pi * epoch / META_EPOCHS))

    epoch = batch // per_epoch
    if epoch >= WARM_UP_EPOCHS:
        return cosine(epoch)
    share = batch / (WARM_UP_EPOCHS * per_epoch)
    return WARM_UP_START + share * (cosine(WARM_UP_EPOCHS) - WARM_UP_START)


def paper_schedule(passes: int, batches: int, steps: int) -> Callable[[int], float]:
    """Return the factor of the learning rate for every optimiser step of a training of ``passes`` passes.

    Other numbers of passes than the original's stretch or squeeze its schedule. It moves once a meta-epoch: fewer
    passes than it has meta-epochs cannot follow it and train at the whole rate throughout (squeezed into two passes it
    left the likelihood far from where the whole rate takes it: screw's pixel AUROC 93.2 instead of 94.7).

    Args:
        passes: over the training images.
        batches: image batches per pass.
        steps: optimiser steps per image batch.
    """
    if passes < META_EPOCHS:
        return lambda step: 1.0
    stretch = META_EPOCHS * SUB_EPOCHS / passes
    return lambda step: paper_rate(int(step // steps * stretch), SUB_EPOCHS * batches)


def image_batches(images: int, views: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield the rows [batch] of a bank that each batch of images takes, pass after pass without end.

    A pass has the images in a new order, one of its views of each; what fills no batch is dropped.

    Args:
        images: how many there are.
        views: rows per image.
        batch: images a batch.
        generator: draws order and views.
    """
    while True:
        order = torch.randperm(images, generator=generator)
        for k in range(images // batch):
            view = torch.randint(views, (batch,), generator=generator)
            yield order[k * batch : (k + 1) * batch] * views + view


def fiber_steps(
    pyramid: Sequence[Tensor],
    codes: Sequence[Tensor],
    fibers: int,
    shuffle: Callable[[int], Tensor],
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield what each optimiser step sees of a batch of images: tap number, vectors [N, C], codes [N, D].

    Tap after tap, all its vectors are shuffled and cut into groups of ``fibers``; what is left over is
    dropped.

    Args:
        pyramid: features [B, C, h, w] per tap.
        codes: positional codes [h w, D] per tap.
        fibers: N.
        shuffle: number of vectors to their order, int64.

    Raises:
        InputError: a tap has fewer than N vectors.
    """
    for tap, (features, code) in enumerate(zip(pyramid, codes, strict=True)):
        vectors = features.flatten(2).transpose(1, 2).flatten(0, 1)  # [B h w, C], image > position
        steps = len(vectors) // fibers
        if steps == 0:
            raise InputError(
                f"tap {tap} gives {len(vectors)} vectors per batch of images, fewer than one step's {fibers}",
                hint="Use more images per batch, larger images, or fewer fibers (--set fibers=...).",
            )
        order = shuffle(len(vectors))
        for k in range(steps):
            chosen = order[k * fibers : (k + 1) * fibers]
            yield tap, vectors[chosen], code[chosen % len(code)]


def fiber_loss(likelihood: Tensor, channels: int, loss: str = "logsigmoid") -> Tensor:
    """Return the training loss of log-likelihoods [N].

    "logsigmoid": mean of -log sigmoid(log p / C), the code's, which bounds what a single outlier can pull;
    "nll": mean of -log p / C, the paper's (eq. 5).
    """
    scaled = likelihood / channels
    return -F.logsigmoid(scaled).mean() if loss == "logsigmoid" else -scaled.mean()


def probability_map(
    likelihoods: Sequence[Tensor], size: tuple[int, int], maxima: Sequence[Tensor] | None = None
) -> Tensor:
    """Return A [B, H, W], the sum over taps of exp(log p / C - maximum), upsampled; higher = more *normal*.

    Args:
        likelihoods: log p / C per tap, [B, h, w].
        size: (H, W).
        maxima: one number per tap; None = the maximum over the given images, as the original does with its
            whole test set: the result for an image then depends on the others.
    """
    total = torch.zeros(())
    for number, values in enumerate(likelihoods):
        top = values.max() if maxima is None else maxima[number]
        probability = torch.exp(values - top).unsqueeze(1)
        total = total + F.interpolate(probability, size, mode="bilinear", align_corners=True).squeeze(1)
    return total


def turned(image: Tensor, degrees: float, generator: torch.Generator) -> Tensor:
    """Return the image [1, 3, H, W] turned about its centre, uniformly within +-degrees; corners are 0."""
    angle = math.radians(degrees) * (2 * float(torch.rand((), generator=generator)) - 1)
    height, width = image.shape[2:]
    # affine_grid works in units of half the image: rows and columns scale differently where they differ.
    row = [
        [math.cos(angle), -math.sin(angle) * height / width, 0.0],
        [math.sin(angle) * width / height, math.cos(angle), 0.0],
    ]
    grid = F.affine_grid(torch.tensor([row]), list(image.shape), align_corners=False)
    return F.grid_sample(image, grid, mode="nearest", align_corners=False)
