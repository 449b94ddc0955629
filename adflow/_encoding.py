"""What flows and maps of positions share: the code of a position, and the density of a latent."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adflow.errors import UsageError


def positional_encoding(channels: int, height: int, width: int) -> Tensor:
    """Return the 2-D sine/cosine code [D, h, w] of integer grid positions counted from 0.

    First half of the channels: column x, second half: row y; even ones sin(position * f_j), odd ones
    cos(position * f_j), f_j = 10000^(-2j / (D/2)).

    Source: Z. Wang, J.-C. Liu, Translating math formula images to LaTeX sequences, 2019,
    https://arxiv.org/abs/1908.11415; used by CFLOW-AD (WACV 2022, section 4) and PEFM.
    """
    if channels % 4 or channels <= 0:
        raise UsageError(f"the positional encoding has {channels} channels; expected a positive multiple of 4")
    half = channels // 2
    rates = torch.exp(torch.arange(0, half, 2, dtype=torch.float64) * (-math.log(10000.0) / half))
    code = torch.empty(channels, height, width, dtype=torch.float64)
    across = torch.arange(width, dtype=torch.float64) * rates[:, None]  # [D/4, w]
    down = torch.arange(height, dtype=torch.float64) * rates[:, None]  # [D/4, h]
    code[0:half:2] = across.sin()[:, None, :]
    code[1:half:2] = across.cos()[:, None, :]
    code[half::2] = down.sin()[:, :, None]
    code[half + 1 :: 2] = down.cos()[:, :, None]
    return code.float()


def log_likelihood(z: Tensor, logdet: Tensor) -> Tensor:
    """Return log p(x) = -d/2 ln(2 pi) - |z|^2 / 2 + logdet per sample [B] of d entries, natural log."""
    flat = z.flatten(1)
    return -0.5 * (flat.shape[1] * math.log(2.0 * math.pi) + flat.square().sum(1)) + logdet
