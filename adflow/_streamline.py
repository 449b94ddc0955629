"""Convolutional nets rewritten so that a CPU computes the same faster: oneDNN's fused kernels, called directly.

Such kernels are compiled for a shape once, write the activation and add the shortcut where the convolution writes, and
read their weights in the layout they like best. Where they cannot serve (another device or type, a gradient, an export)
the plain modules do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from adflow._nets import OpenStage, exporting

_OPERATOR = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)  # not in every build of torch
_ALONE: Any = getattr(_OPERATOR, "default", None)
_ADDED: Any = getattr(_OPERATOR, "binary", None)
_SUM: tuple[Any, ...] = ("add", 1.0, None, [], None)


def streamline(net: nn.Module) -> nn.Module:
    """Rewrite a frozen convolutional net in place, so that it computes the same faster on a CPU; return it.

    Batch norms are folded into convolutions, activations are computed where the convolution writes, kernels are laid
    out for the processor once, "same" padding loses its copy, rows of blocks become rows of operators. Equal to the
    original up to rounding.
    """
    followed: dict[int, nn.Module] = {}  # what a batch norm did behind its convolution
    shown = {id(stage.last.conv_pwl) for stage in net.modules() if isinstance(stage, OpenStage)}
    for module in list(net.modules()):
        before: tuple[str, nn.Module] | None = None
        # For the nets cut here registration order is execution order.
        for name, child in list(module.named_children()):
            conv = before[1] if before else None
            if isinstance(child, nn.BatchNorm2d) and isinstance(conv, nn.Conv2d) and id(conv) not in shown:
                # The scale is multiplied into the kernel in float64, so that only one rounding is added.
                setattr(
                    module,
                    before[0] if before else "",
                    fuse_conv_bn_eval(conv.double(), child.double()).float(),
                )
                setattr(module, name, nn.Identity())
                followed[id(getattr(module, before[0] if before else ""))] = getattr(child, "act", nn.Identity())
            before = (name, child)
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Conv2d):
                setattr(module, name, Fused(child, followed.get(id(child), nn.Identity())))
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Sequential) and len(child) and all(hasattr(b, "convolutions") for b in child):
                setattr(module, name, Row(*child))
    return net


class Row(nn.Sequential):
    """Blocks that are nothing but convolutions and shortcuts, as one row of operators without modules around them.

    In a small net the modules take a tenth of the time of one thread, and more of several, which wait for each other
    to call them.

    Args:
        blocks: each with ``convolutions()``, a list of :class:`Fused` in order, and ``has_skip``, whether its input is
            added to its output.
    """

    def __init__(self, *blocks: Any) -> None:
        super().__init__(*blocks)
        self.steps: list[tuple[Fused, bool, bool]] = []  # convolution, whether a shortcut begins and ends there
        for block in blocks:
            convs = block.convolutions()
            self.steps += [
                (conv, block.has_skip and conv is convs[0], block.has_skip and conv is convs[-1]) for conv in convs
            ]

    def forward(self, x: Tensor) -> Tensor:
        # Who watches the blocks (the comparison of an export, stage by stage) shall see them.
        if torch.is_grad_enabled() or self[0]._forward_hooks or not _onednn(x):
            for block in self:
                x = block(x)
            return x
        shortcut = None
        for conv, begins, ends in self.steps:
            if begins:
                shortcut = x
            x = conv.at_once(x, shortcut if ends else None)
        return x


def _plain(conv: nn.Conv2d) -> nn.Conv2d | Pointwise | SameConv:
    side = conv.kernel_size[0]
    if conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.groups == 1 and conv.padding == (0, 0):
        return Pointwise(conv)
    same = type(conv).__name__ == "Conv2dSame"  # ours and timm's name of TensorFlow's padding
    if same and conv.stride == (2, 2) and conv.dilation == (1, 1) and conv.kernel_size == (side, side) and side % 2:
        return SameConv(conv)
    return conv


class Fused(nn.Module):
    """A convolution and its activation as one oneDNN kernel.

    The operator is the one that torch's own compiler puts there.
    """

    plain: nn.Conv2d | Pointwise | SameConv

    def __init__(self, conv: nn.Conv2d, act: nn.Module) -> None:
        super().__init__()
        self.plain, self.act = _plain(conv), act
        self.even = isinstance(self.plain, SameConv)  # its wide kernel is right for even sides only
        half = conv.kernel_size[0] // 2
        padding = [half, half] if self.even else conv.padding
        self.how = [padding, conv.stride, conv.dilation, conv.groups]
        self.fusible = not isinstance(padding, str) and (self.even or type(conv) is nn.Conv2d)
        self.after: tuple[str, list[float]] = ("none", [])
        match act:
            case nn.ReLU6():
                self.after = ("hardtanh", [0.0, 6.0])
            case nn.ReLU():
                self.after = ("relu", [])
            case nn.Hardswish():
                self.after = ("hardswish", [])
            case nn.SiLU():
                self.after = ("swish", [])
            case _:
                self.fusible &= isinstance(act, nn.Identity)
        self._laid: dict[torch.dtype, tuple[Any, ...]] = {}

    def forward(self, x: Tensor) -> Tensor:
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in self.plain.parameters())
        if trained:  # the operator passes no gradient on to the kernel, which will change besides
            self._laid.clear()
        if trained or not _onednn(x):
            plain: Tensor = self.act(self.plain(x))
            return plain
        return self.at_once(x)

    def at_once(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """Return what :meth:`forward` does, plus ``shortcut``, of an ``x`` that oneDNN takes."""
        if not self.fusible or (self.even and (x.shape[2] % 2 or x.shape[3] % 2)):
            plain: Tensor = self.act(self.plain(x))
            return plain if shortcut is None else plain + shortcut
        laid = self._laid.get(x.dtype) or self._lay(x)
        y: Tensor = _ALONE(x, *laid, *self.after, "") if shortcut is None else _ADDED(x, shortcut, *laid, *_SUM)
        return y

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the kernels laid out for this processor: they can be neither copied nor saved."""
        return self.__dict__ | {"_laid": {}}

    def _lay(self, x: Tensor) -> tuple[Any, ...]:
        weight = self.plain.wide if isinstance(self.plain, SameConv) else self.plain.weight
        weight = weight.detach().contiguous(memory_format=torch.channels_last)
        kernel = torch.ops.mkldnn._reorder_convolution_weight(weight, *self.how, list(x.shape))
        # All that the operator takes, looked up once: in a module that costs as much as a small convolution.
        laid = self._laid[x.dtype] = (kernel, self.plain.bias, *self.how)
        return laid


def _onednn(x: Tensor) -> bool:
    """Return whether oneDNN's fused kernels take ``x``."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and not x.requires_grad
        and _OPERATOR is not None
        and not exporting()
    )


class Pointwise(nn.Module):
    """A 1x1 convolution as one matrix product over all positions; free of copies when channels lie last."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight = conv.weight
        self.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        if exporting():  # exports keep the plain operator
            return F.conv2d(x, self.weight, self.bias)
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class SameConv(nn.Module):
    """A convolution of stride 2 under TensorFlow's "same" padding, without padding by a copy.

    For an even side and an odd kernel k that padding is k//2 - 1 before and k//2 after. Symmetric padding of
    k//2 gives the same when the kernel gets one leading row and column of zeros. For an odd side it is k//2 on
    both sides anyway.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight = conv.weight
        self.wide = nn.Parameter(F.pad(conv.weight, (1, 0, 1, 0)))
        self.bias = conv.bias
        self.groups = conv.groups

    def forward(self, x: Tensor) -> Tensor:
        half = self.weight.shape[-1] // 2
        even_height, even_width = x.shape[2] % 2 == 0, x.shape[3] % 2 == 0
        if even_height and even_width:
            return F.conv2d(x, self.wide, self.bias, stride=2, padding=half, groups=self.groups)
        x = F.pad(x, (half - even_width, half, half - even_height, half))
        return F.conv2d(x, self.weight, self.bias, stride=2, groups=self.groups)
