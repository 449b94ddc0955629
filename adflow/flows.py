"""Normalizing-flow blocks on FrEIA's graph API, with their sub-networks and key maps of original checkpoints.

Every block is a :class:`FrEIA.modules.InvertibleModule`, so that chains (``SequenceINN``) and graphs
(``GraphINN``) give the forward pass, the inverse and the log-determinant. FrEIA's ``AllInOneBlock`` is not
used: it draws from global random generators, multiplies by a C x C matrix even where the mixing is a
permutation, and its clamp changed between versions (see ``clamp_mode``).

Convention: ``z, logdet = flow(x)``; ``logdet`` = log |det dz/dx| per sample, natural log.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from FrEIA.framework import SequenceINN
from FrEIA.modules import InvertibleModule
from torch import Tensor, nn

from adflow._encoding import log_likelihood, positional_encoding
from adflow._originals import load_original
from adflow._subnets import SUBNET_GAIN, Subnet, conv_layer, conv_subnet, linear_layer, linear_subnet
from adflow.errors import UsageError

__all__ = [
    "SUBNET_GAIN",
    "UNIT_SCALE",
    "AllInOneBlock",
    "ClampMode",
    "FixedPermutation",
    "GlowCoupling",
    "Permutation",
    "PixelShuffle",
    "Subnet",
    "chain",
    "conv_layer",
    "conv_subnet",
    "linear_layer",
    "linear_subnet",
    "load_original",
    "log_likelihood",
    "positional_encoding",
    "random_rotation",
    "soft_clamp",
]

ClampMode = Literal["tanh", "tanh_scaled"]
Permutation = Literal["hard", "soft"]
Dims = Sequence[Sequence[int]]

# Raw global scale whose activation 0.1 * softplus_{beta=0.5} is exactly 1: w = 2 ln(e^5 - 1).
UNIT_SCALE = 2.0 * math.log(math.expm1(5.0))


def random_rotation(channels: int, generator: torch.Generator | None = None) -> Tensor:
    """Return a Haar-distributed rotation [C, C] (determinant +1): QR of a Gaussian matrix, signs fixed.

    Source: F. Mezzadri, How to generate random matrices from the classical compact groups, 2007,
    https://arxiv.org/abs/math-ph/0609050.
    """
    q, r = torch.linalg.qr(torch.randn(channels, channels, generator=generator, dtype=torch.float64))
    rotation: Tensor = q * r.diagonal().sign()
    if torch.linalg.det(rotation) < 0:
        rotation[:, 0] = -rotation[:, 0]
    return rotation.float()


def soft_clamp(raw: Tensor, clamp: float) -> Tensor:
    """Return clamp * 0.636 * atan(raw / clamp), the log-scale of GLOW-style couplings, within +-clamp.

    0.636 is 2/pi rounded as in FrEIA's ``GLOWCouplingBlock`` (DifferNet, CS-Flow); trained weights need it.
    """
    return clamp * 0.636 * torch.atan(raw / clamp)


class _SameShape(InvertibleModule):  # type: ignore[misc]  # FrEIA carries no types
    def output_dims(self, input_dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Return the shapes unchanged."""
        return input_dims


class AllInOneBlock(_SameShape):
    """One-sided affine coupling, global affine map and channel mixing, as in CFLOW-AD, FastFlow and U-Flow.

    With x1 the first C - C//2 channels and x2 the rest::

        [a_s, a_t] = 0.1 * subnet([x1, condition])
        s = clamp * tanh(a_s)                  ("tanh")         or  clamp * tanh(a_s / clamp)  ("tanh_scaled")
        y = P( [x1, x2 * exp(s) + a_t] * g + o ),   g = 0.1 * softplus_{beta=0.5}(global_scale)
        logdet = sum(s) + positions * sum(log g)

    Source: L. Ardizzone et al., FrEIA, 2018-2022, https://github.com/vislearn/FrEIA, AllInOneBlock. "tanh" is
    PyPI 0.2 and the commits that CFLOW-AD, FastFlow and U-Flow pin, "tanh_scaled" FrEIA's development branch
    since August 2023.

    Args:
        dims_in: one shape, (C,) for vectors or (C, H, W) for images; H and W are not fixed by it.
        dims_c: shapes of the conditions, concatenated on channels to the sub-network's input.
        subnet: called with (inputs, outputs), returns the sub-network.
        clamp: bound of the log-scale s.
        clamp_mode: see above.
        permutation: P. "hard" = random order of the channels, an index vector; "soft" = random rotation.
        generator: draws P.
    """

    def __init__(
        self,
        dims_in: Dims,
        dims_c: Dims = (),
        *,
        subnet: Subnet,
        clamp: float = 2.0,
        clamp_mode: ClampMode = "tanh",
        permutation: Permutation = "hard",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(dims_in, dims_c)
        if clamp_mode not in ("tanh", "tanh_scaled"):
            raise UsageError(f"clamp_mode is '{clamp_mode}'; expected 'tanh' or 'tanh_scaled'")
        channels = int(dims_in[0][0])
        if channels < 2:
            raise UsageError(f"a coupling needs at least 2 channels, found {channels}")
        self.kept = channels - channels // 2
        self.changed = channels // 2
        self.clamp = float(clamp)
        self.clamp_mode = clamp_mode
        self.hard = permutation == "hard"
        ones = [1] * (len(dims_in[0]) - 1)
        self.global_scale = nn.Parameter(torch.full((1, channels, *ones), UNIT_SCALE))
        self.global_offset = nn.Parameter(torch.zeros(1, channels, *ones))
        if permutation == "hard":
            self.register_buffer("permutation", torch.randperm(channels, generator=generator))
        elif permutation == "soft":
            self.register_buffer("rotation", random_rotation(channels, generator))
        else:
            raise UsageError(f"permutation is '{permutation}'; expected 'hard' or 'soft'")
        self.permutation: Tensor  # [C] int64: y[i] = v[permutation[i]]
        self.rotation: Tensor  # [C, C]: y = rotation @ v
        self.subnet = subnet(self.kept + sum(int(shape[0]) for shape in dims_c), 2 * self.changed)

    def scale(self) -> Tensor:
        """Return g, the positive global scale, in the shape of ``global_scale``."""
        return F.softplus(self.global_scale, beta=0.5).mul(0.1)

    def coefficients(self, kept: Tensor, condition: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return log-scale s and shift t for the changed half, both [B, C//2, ...]."""
        inputs = torch.cat([kept, *condition], 1) if condition else kept
        raw_scale, shift = (SUBNET_GAIN * self.subnet(inputs)).chunk(2, 1)
        return self.log_scale(raw_scale), shift

    def log_scale(self, raw: Tensor) -> Tensor:
        """Return s from the sub-network's (already reduced) output."""
        if self.clamp_mode == "tanh":
            return self.clamp * torch.tanh(raw)
        return self.clamp * torch.tanh(raw / self.clamp)

    def mix(self, x: Tensor) -> Tensor:
        """Return P x on the channel axis."""
        if self.hard:
            return x.index_select(1, self.permutation)
        if x.dim() == 2:
            return F.linear(x, self.rotation)
        return F.conv2d(x, self.rotation[:, :, None, None])

    def unmix(self, y: Tensor) -> Tensor:
        """Return P^-1 y on the channel axis."""
        if self.hard:
            return y.index_select(1, torch.argsort(self.permutation))
        if y.dim() == 2:
            return F.linear(y, self.rotation.T)
        return F.conv2d(y, self.rotation.T[:, :, None, None])

    def forward(
        self,
        x_or_z: Sequence[Tensor],
        c: Sequence[Tensor] = (),
        rev: bool = False,
        jac: bool = True,
    ) -> tuple[tuple[Tensor], Tensor]:
        """Map one tensor [B, C, ...] forward, or backward with ``rev``; see FrEIA's base class."""
        (x,) = x_or_z
        axes = list(range(1, x.dim()))
        scale = self.scale()
        positions = x[0, 0].numel()
        if rev:
            v = (self.unmix(x) - self.global_offset) / scale
            kept, changed = torch.split(v, [self.kept, self.changed], 1)
            s, t = self.coefficients(kept, c)
            out = torch.cat([kept, (changed - t) * torch.exp(-s)], 1)
            return (out,), -s.sum(axes) - positions * scale.log().sum()
        kept, changed = torch.split(x, [self.kept, self.changed], 1)
        s, t = self.coefficients(kept, c)
        v = torch.cat([kept, changed * torch.exp(s) + t], 1)
        return (self.mix(v * scale + self.global_offset),), s.sum(axes) + positions * scale.log().sum()


class FixedPermutation(_SameShape):
    """Random, then fixed, order of the channels: y[:, i] = x[:, permutation[i]]; logdet 0.

    Unlike FrEIA's ``PermuteRandom`` the order is a buffer, so it is saved with the weights.
    """

    def __init__(self, dims_in: Dims, dims_c: Dims = (), *, generator: torch.Generator | None = None) -> None:
        super().__init__(dims_in, dims_c)
        self.permutation: Tensor
        self.register_buffer("permutation", torch.randperm(int(dims_in[0][0]), generator=generator))

    def forward(
        self, x_or_z: Sequence[Tensor], c: Sequence[Tensor] = (), rev: bool = False, jac: bool = True
    ) -> tuple[tuple[Tensor], float]:
        """Reorder the channels of one tensor [B, C, ...]."""
        index = torch.argsort(self.permutation) if rev else self.permutation
        return (x_or_z[0].index_select(1, index),), 0.0


class GlowCoupling(_SameShape):
    """Two-sided affine coupling with the arctangent clamp (DifferNet; one scale of CS-Flow).

    With x1 the first C//2 channels and e(s) = exp(:func:`soft_clamp`)::

        s2, t2 = subnet s2 (x2);   y1 = x1 * e(s2) + t2
        s1, t1 = subnet s1 (y1);   y2 = x2 * e(s1) + t1

    Source: D. P. Kingma, P. Dhariwal, Glow, 2018, https://arxiv.org/abs/1807.03039; M. Rudolph et al., Same
    Same But DifferNet, WACV 2021, https://arxiv.org/abs/2008.12577.
    """

    def __init__(self, dims_in: Dims, dims_c: Dims = (), *, subnet: Subnet, clamp: float = 3.0) -> None:
        super().__init__(dims_in, dims_c)
        channels = int(dims_in[0][0])
        extra = sum(int(shape[0]) for shape in dims_c)
        self.halves = [channels // 2, channels - channels // 2]
        self.clamp = float(clamp)
        self.s1 = subnet(self.halves[0] + extra, 2 * self.halves[1])
        self.s2 = subnet(self.halves[1] + extra, 2 * self.halves[0])

    def _coefficients(self, net: nn.Module, x: Tensor, c: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        raw, shift = net(torch.cat([x, *c], 1) if c else x).chunk(2, 1)
        return soft_clamp(raw, self.clamp), shift

    def forward(
        self, x_or_z: Sequence[Tensor], c: Sequence[Tensor] = (), rev: bool = False, jac: bool = True
    ) -> tuple[tuple[Tensor], Tensor]:
        """Map one tensor [B, C, ...] forward, or backward with ``rev``; see FrEIA's base class."""
        first, second = torch.split(x_or_z[0], self.halves, 1)
        axes = list(range(1, x_or_z[0].dim()))
        if rev:
            s1, t1 = self._coefficients(self.s1, first, c)
            second = (second - t1) * torch.exp(-s1)
            s2, t2 = self._coefficients(self.s2, second, c)
            first = (first - t2) * torch.exp(-s2)
            return (torch.cat([first, second], 1),), -s1.sum(axes) - s2.sum(axes)
        s2, t2 = self._coefficients(self.s2, second, c)
        first = first * torch.exp(s2) + t2
        s1, t1 = self._coefficients(self.s1, first, c)
        second = second * torch.exp(s1) + t1
        return (torch.cat([first, second], 1),), s1.sum(axes) + s2.sum(axes)


class PixelShuffle(InvertibleModule):  # type: ignore[misc]  # FrEIA carries no types
    """Invertible up-sampling [B, 4C, H, W] -> [B, C, 2H, 2W], a rearrangement; logdet 0.

    Each group of four consecutive channels fills a 2 x 2 cell row by row: i-RevNet's up-sampling (Jacobsen et
    al., 2018, https://arxiv.org/abs/1802.07088) in the channel order that U-Flow uses.
    """

    def forward(
        self, x_or_z: Sequence[Tensor], c: Sequence[Tensor] = (), rev: bool = False, jac: bool = True
    ) -> tuple[tuple[Tensor], float]:
        """Shuffle channels into pixels, or back with ``rev``."""
        x = x_or_z[0]
        return (F.pixel_unshuffle(x, 2) if rev else F.pixel_shuffle(x, 2),), 0.0

    def output_dims(self, input_dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Return (C/4, 2H, 2W) for (C, H, W)."""
        channels, height, width = input_dims[0]
        if channels % 4:
            raise UsageError(f"up-sampling needs a multiple of 4 channels, found {channels}")
        return [(channels // 4, 2 * height, 2 * width)]


def chain(
    channels: int,
    blocks: int,
    *,
    condition: int = 0,
    subnet: Subnet,
    clamp: float = 2.0,
    clamp_mode: ClampMode = "tanh",
    permutation: Permutation = "hard",
    generator: torch.Generator | None = None,
) -> SequenceINN:
    """Return a chain of :class:`AllInOneBlock` on vectors; ``condition`` is the condition's width or 0.

    Call as ``z, logdet = chain(x, [c])`` with x [N, C] and c [N, condition].
    """
    flow = SequenceINN(channels)
    where = {"cond": 0, "cond_shape": (condition,)} if condition else {}
    for _ in range(blocks):
        flow.append(
            AllInOneBlock,
            **where,
            subnet=subnet,
            clamp=clamp,
            clamp_mode=clamp_mode,
            permutation=permutation,
            generator=generator,
        )
    return flow
