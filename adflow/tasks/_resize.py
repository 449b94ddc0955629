"""Bring an image of any size to the network's input inside an exported program, as :func:`adflow.imaging.fit_to` does.

Bilinear with antialiasing: output cell j of n takes input pixel p of N with a weight that falls linearly to 0 over
max(N, n) / n input pixels around the cell's centre. In units of 1 / 2n of an input pixel that weight is an integer::

    w(j, p) = max(0, 2 max(N, n) - |(2p + 1) n - (2j + 1) N|)        divided by its sum over p

For 8-bit images Pillow rounds the weights to 22 bits and the result to 8 bits after each of two passes, columns first
(https://github.com/python-pillow/Pillow, src/libImaging/Resample.c). So does this, in integers and in float32 products
that are exact, whatever runtime computes them: sizes are read from the image, so a traced program takes any.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adflow.imaging import Box, Size

# A weight of 22 bits is split into two of 11: sums of 11 + 8 bits over 32 pixels are exact in float32.
_HALF = 1 << 11


def fit_inside(images: Tensor, size: Size, keep_aspect: bool) -> tuple[Tensor, Box]:
    """Return the network's input and where the image lies in it.

    Args:
        images: [1, H, W, 3], uint8, or float32 in [0, 1].
        size: (height, width) of the input.
        keep_aspect: letterbox: keep the shape, and repeat the border around the image.

    Returns:
        [1, 3, height, width] float32 in [0, 1], and a box whose numbers are int64 tensors where they depend on H and W.
    """
    image = images[0]
    if keep_aspect:
        height, width = _length(image, 0), _length(image, 1)
        scale = torch.minimum(size[0] / height.double(), size[1] / width.double())
        inner = [(have * scale).round().clamp(1, most).long() for have, most in zip((height, width), size, strict=True)]
        before = [torch.div(most - n, 2, rounding_mode="floor") for n, most in zip(inner, size, strict=True)]
        box = Box(before[0], before[1], inner[0], inner[1])  # type: ignore[arg-type]  # numbers of a traced program
    else:
        box = Box(0, 0, *size)
    image = _along_rows(image.transpose(0, 1), size[1], box.width, box.left).transpose(0, 1)  # [H, width, 3]
    image = _along_rows(image, size[0], box.height, box.top)  # [height, width, 3]
    image = image.float() / 255 if images.dtype == torch.uint8 else image.clamp(0, 1)
    # The shape in numbers: what follows computes kernel sizes from it, which must not depend on the image.
    return image.permute(2, 0, 1).reshape(1, 3, *size), box


def _length(image: Tensor, axis: int) -> Tensor:
    """Return a length as a tensor: a tracer follows it."""
    return torch.arange(image.shape[axis])[-1] + 1


def _along_rows(image: Tensor, to: int, inner: int | Tensor, before: int | Tensor) -> Tensor:
    """Resize the first axis of [N, M, 3] to ``inner`` cells that begin at ``before`` of ``to``; keeps the type."""
    have, inner = _length(image, 0), torch.as_tensor(inner)
    pixel = torch.arange(image.shape[0])
    # Cells outside repeat the first or the last one.
    cell = torch.minimum((torch.arange(to) - before).clamp(min=0), inner - 1)
    reach = 2 * torch.maximum(have, inner)
    weight = (reach - ((2 * pixel + 1) * inner - ((2 * cell + 1) * have)[:, None]).abs()).clamp(min=0)  # [to, N]
    total = weight.sum(1, keepdim=True)
    flat = image.flatten(1).float()  # [N, M * 3]
    if image.dtype == torch.uint8:
        # weight / total in 22 bits by long division, 8, 7 and 7 bits at a time: no number has more than 24.
        first, rest = _divide(weight * 256, total)
        second, rest = _divide(rest * 128, total)
        third, _ = _divide(rest * 256 + total, 2 * total)
        upper, lower = _divide(second, 16)
        sums = (torch.cat([first * 8 + upper, lower * 128 + third]).float() @ flat).long()
        carried, _ = _divide(sums[to:] + _HALF * _HALF // 2, _HALF)
        flat = _divide(sums[:to] + carried, _HALF)[0].to(torch.uint8)
    else:
        flat = (weight.float() / total) @ flat
    return flat.reshape(to, -1, 3)


def _divide(value: Tensor, by: Tensor | int) -> tuple[Tensor, Tensor]:
    """Return quotient and rest of non-negative integers."""
    quotient = torch.div(value, by, rounding_mode="floor")
    return quotient, value - quotient * by


def within(box: Box, size: Size) -> Tensor:
    """Return [height, width] bool: the pixels of an input of ``size`` that lie in ``box``."""
    rows, columns = torch.arange(size[0]), torch.arange(size[1])
    inside_rows = (rows >= box.top) & (rows < box.top + box.height)
    inside_columns = (columns >= box.left) & (columns < box.left + box.width)
    return inside_rows[:, None] & inside_columns
