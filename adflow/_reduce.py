"""One score of an image from its map."""

from __future__ import annotations

import torch
from torch import Tensor

from adflow.imaging import Box


def reduce_map(score_map: Tensor, how: str, margin: float, box: Box | None = None) -> Tensor:
    """Reduce one map [H, W] to an image score, leaving out ``margin`` of each side of ``box``.

    ``how``: "max", or "top1", the mean of the highest 1 % of the pixels (at least one).
    """
    if box is not None and isinstance(box.top, Tensor):
        return _reduce_within(score_map, how, margin, box)
    if box is not None:
        score_map = score_map[box.top : box.top + box.height, box.left : box.left + box.width]
    h, w = score_map.shape
    dy, dx = int(h * margin), int(w * margin)
    inner = score_map[dy : h - dy, dx : w - dx].reshape(-1)
    if how == "max":
        return inner.max()
    return inner.topk(max(1, inner.numel() // 100)).values.mean()


def _reduce_within(score_map: Tensor, how: str, margin: float, box: Box) -> Tensor:
    """:func:`reduce_map` for a program that is being traced: the box depends on the image, shapes must not."""
    top, left, height, width = (torch.as_tensor(value) for value in (box.top, box.left, box.height, box.width))
    dy, dx = (height.double() * margin).long(), (width.double() * margin).long()
    y, x = torch.arange(score_map.shape[0])[:, None], torch.arange(score_map.shape[1])
    inner = (y >= top + dy) & (y < top + height - dy) & (x >= left + dx) & (x < left + width - dx)
    outside = torch.full_like(score_map, -torch.inf)
    highest = torch.where(inner, score_map, outside).reshape(-1).topk(max(1, score_map.numel() // 100)).values
    if how == "max":
        return highest[0]
    count = torch.div(inner.sum(), 100, rounding_mode="floor").clamp(min=1)
    taken = torch.arange(len(highest)) < count
    return torch.where(taken, highest, torch.zeros_like(highest)).sum() / count
