"""The fast scoring pass of a chain of flow blocks: the same function as FrEIA's pass with less work."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from adflow._subnets import SUBNET_GAIN
from adflow.errors import UsageError

if TYPE_CHECKING:
    from FrEIA.framework import SequenceINN

    from adflow.flows import AllInOneBlock


class FusedChain:
    """The scoring pass of a :func:`adflow.flows.chain`, the same function with less work; gradients are not kept.

    What differs from the FrEIA pass: the product of the condition with each first layer is done once (it is
    the same for every image), the factor 0.1 lies in the last layers, global scale, offset and rotation are
    one affine map, and the last mixing is left out: lengths do not change under it, ``z`` is equal up to it.

    Args:
        flow: chain of :class:`adflow.flows.AllInOneBlock` with :func:`adflow.flows.linear_subnet` networks.
        condition: [P, D], row p belongs to position p of every image; None for unconditional chains.
        dtype: of the matrix products; everything else stays in the weights' own precision.
    """

    def __init__(self, flow: SequenceINN, condition: Tensor | None = None, dtype: torch.dtype | None = None) -> None:
        self._steps: list[tuple[AllInOneBlock, list[Tensor]]] = []
        self._constant = 0.0  # sum of the logs of all global scales
        with torch.no_grad():
            for number, block in enumerate(flow):
                first, last = _linear_layers(block)
                bias: Tensor = first.bias
                if condition is not None:
                    bias = torch.addmm(bias, condition.to(bias.dtype), first.weight[:, block.kept :].T)
                mixing, offset = block.scale().flatten(), block.global_offset.flatten()
                self._constant += float(mixing.double().log().sum())
                if not block.hard and number < len(flow) - 1:
                    mixing = (block.rotation * mixing).T.contiguous().to(dtype or mixing.dtype)
                    offset = block.rotation @ offset
                inner = first.weight[:, : block.kept].T.contiguous().to(dtype or bias.dtype)
                outer = last.weight.mul(SUBNET_GAIN).T.contiguous().to(dtype or bias.dtype)
                self._steps.append((block, [inner, bias, outer, last.bias * SUBNET_GAIN, mixing, offset]))

    @torch.no_grad()
    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map x [P, C] of one image, rows in the condition's order; return z [P, C] and logdet [P]."""
        logdet = x.new_full((x.shape[0],), self._constant)
        for block, (inner, bias, outer, outer_bias, mixing, offset) in self._steps:
            kept, changed = torch.split(x, [block.kept, block.changed], 1)
            hidden = torch.relu(_product(kept, inner) + bias)
            raw, shift = (_product(hidden, outer) + outer_bias).chunk(2, 1)
            s = block.log_scale(raw)
            logdet = logdet + s.sum(1)
            x = torch.cat([kept, changed * s.exp() + shift], 1)
            x = (_product(x, mixing) if mixing.dim() == 2 else x * mixing) + offset
            if block.hard and block is not self._steps[-1][0]:
                x = x.index_select(1, block.permutation)
        return x, logdet


class FusedChains:
    """Fused chains by number, each made once for as long as its weights, their device and the precision stay."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[object, FusedChain]] = {}

    def get(
        self, number: int, flow: SequenceINN, condition: Callable[[], Tensor | None], dtype: torch.dtype | None
    ) -> FusedChain:
        """Return the chain of ``flow``; the rest as for :class:`FusedChain`, the condition made when it is needed."""
        if torch.compiler.is_compiling():
            return FusedChain(flow, condition(), dtype)
        key = dtype, tuple((p.data_ptr(), p._version, p.device) for p in flow.parameters())
        known = self._made.get(number)
        if known is None or known[0] != key:
            known = self._made[number] = key, FusedChain(flow, condition(), dtype)
        return known[1]


def _linear_layers(block: object) -> tuple[nn.Linear, nn.Linear]:
    from adflow.flows import AllInOneBlock  # whoever has such a block has loaded it

    if isinstance(block, AllInOneBlock) and isinstance(block.subnet, nn.Sequential):
        first, last = block.subnet[0], block.subnet[-1]
        if isinstance(first, nn.Linear) and isinstance(last, nn.Linear):
            return first, last
    raise UsageError("only chains of AllInOneBlock with linear sub-networks can be fused")


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return (x.to(weight.dtype) @ weight).to(x.dtype)
