"""Nets cut after their last tap: how a classifier becomes a list of feature maps; plumbing of backbones."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adflow.errors import InputError, unknown


class Stages(nn.Module):
    """A convolutional net as a row of stages, of which some are tapped.

    Args:
        stem: everything before the first stage.
        stages: in order; nothing after the last one is needed.
        tapped: per stage, whether its output is in the result.
    """

    def __init__(self, stem: nn.Module, stages: Sequence[nn.Module], tapped: Sequence[bool]) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.tapped = tuple(tapped)
        self.rounded = False

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        pyramid: list[Tensor] = []
        for number, (stage, tapped) in enumerate(zip(self.stages, self.tapped, strict=True)):
            if number == 1 and self.rounded:
                x = x.to(torch.bfloat16)
            x = stage(x)
            if isinstance(x, tuple):
                x, inner = x
                pyramid.append(inner)
            elif tapped:
                pyramid.append(x)
        return pyramid


def rounded(net: nn.Module) -> nn.Module:
    """Return a copy of ``net`` that takes float32 images and computes in bfloat16.

    The first of several stages of a convolutional net stays in float32: its kernels span the widest range, all that
    follows sees their error, and they cost little. In lite0 that takes the error of the maps from 13 % to 3 %, and the
    rank correlation of CFLOW-AD's scores with those of float32 from 0.997 to 0.9996 (measured on screw).
    """
    copied = copy.deepcopy(net)
    if not isinstance(copied, Stages) or len(copied.stages) == 1:
        return _Cast(copied.to(torch.bfloat16))
    copied.stages[1:].to(torch.bfloat16)
    copied.rounded = True
    return copied


class _Cast(nn.Module):
    """A net in bfloat16 for float32 images."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> list[Tensor]:
        maps: list[Tensor] = self.net(x.to(torch.bfloat16))
        return maps


class OpenStage(nn.Module):
    """A stage of inverted residual blocks that also shows its last projection before normalisation and skip.

    CFLOW-AD taps its mobile nets there. Returns (output of the stage, output of the last projection).
    """

    def __init__(self, stage: nn.Sequential) -> None:
        super().__init__()
        self.first = nn.Sequential(*list(stage.children())[:-1])
        self.last = stage[-1]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        block: Any = self.last
        shortcut = x = self.first(x)
        x = block.bn2(block.conv_dw(block.bn1(block.conv_pw(x))))
        inner = block.conv_pwl(block.se(x))
        x = block.bn3(inner)
        return (x + shortcut if block.has_skip else x), inner


def mobile_stages(net: Any, taps: Sequence[str]) -> tuple[Stages, list[str]]:
    """Cut a timm EfficientNet or MobileNetV3; "b1" .. "b6" are stage outputs, "b2.conv" a last projection."""
    inverted = [hasattr(stage[-1], "conv_pwl") for stage in net.blocks]
    known = [f"b{i}{inner}" for i, projects in enumerate(inverted) for inner in ("", ".conv") if projects or not inner]
    order = _ordered(taps, known)
    last = max(int(tap[1:].removesuffix(".conv")) for tap in order)
    stages = []
    for i in range(last + 1):
        if f"b{i}" in order and f"b{i}.conv" in order:
            raise InputError(f"taps b{i} and b{i}.conv exclude each other, expected one of them")
        stages.append(OpenStage(net.blocks[i]) if f"b{i}.conv" in order else net.blocks[i])
    stem = nn.Sequential(net.conv_stem, net.bn1)
    return Stages(stem, stages, [f"b{i}" in order for i in range(last + 1)]), order


def resnet_stages(net: Any, taps: Sequence[str]) -> tuple[Stages, list[str]]:
    """Cut a timm ResNet; taps "layer1" .. "layer4" at strides 4, 8, 16, 32."""
    known = [f"layer{i}" for i in range(1, 5)]
    order = _ordered(taps, known)
    names = known[: known.index(order[-1]) + 1]
    stem = nn.Sequential(net.conv1, net.bn1, net.act1, net.maxpool)
    return Stages(stem, [getattr(net, name) for name in names], [name in order for name in names]), order


def alexnet_stages(net: Any, taps: Sequence[str]) -> tuple[Stages, list[str]]:
    """Return torchvision's AlexNet up to its last pooling, 256 channels; the one tap is "features"."""
    return Stages(nn.Identity(), [net.features], [True]), _ordered(taps, ["features"])


class ReflectVGG(nn.Module):
    """VGG19's ReLU maps as DFR uses them (Yang et al. 2020; specifications: the reference code).

    Every convolution sees its input padded by reflection instead of zeros. DFR's code hands out 8 of its 12
    maps after that padding, so relu1_1, relu2_1, relu3_1-3 and relu4_1-3 are two cells larger each way.
    """

    def __init__(self, features: nn.Sequential, last: int, keep: Sequence[bool]) -> None:
        super().__init__()
        layers = list(features.children())
        convs = [i for i, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)]
        used = [layer for layer in layers if isinstance(layer, nn.Conv2d)][: last + 1]
        for conv in used:
            conv.padding = (0, 0)
        self.convs = nn.ModuleList(used)
        # Followed by another convolution of the same size, or by pooling (whose input is not padded).
        self.pooled = tuple(isinstance(layers[i + 2], nn.MaxPool2d) for i in convs[: last + 1])
        self.keep = tuple(keep)

    def forward(self, x: Tensor) -> list[Tensor]:
        pyramid: list[Tensor] = []
        x = _reflect(x)
        for conv, pooled, keep in zip(self.convs, self.pooled, self.keep, strict=True):
            x = F.relu(conv(x))
            if not pooled:
                x = _reflect(x)
            if keep:
                pyramid.append(x)
            if pooled:
                x = _reflect(F.max_pool2d(x, 2))
        return pyramid


def _reflect(x: Tensor) -> Tensor:
    return F.pad(x, (1, 1, 1, 1), mode="reflect")


def vgg_stages(net: Any, taps: Sequence[str]) -> tuple[ReflectVGG, list[str]]:
    """Cut torchvision's VGG19 for DFR; taps "relu1_1" .. "relu4_4" (and on to "relu5_4")."""
    known = [f"relu{block}_{i}" for block, depth in enumerate((2, 2, 4, 4, 4), 1) for i in range(1, depth + 1)]
    order = _ordered(taps, known)
    last = known.index(order[-1])
    return ReflectVGG(net.features, last, [name in order for name in known[: last + 1]]), order


class Intermediates(nn.Module):
    """The maps of some blocks or stages of any timm net that offers its intermediate results.

    Args:
        net: pretrained; what lies behind the last of ``indices`` is removed.
        indices: blocks of a transformer, or feature stages of a convolutional net.
        norm: apply the transformer's own final norm. Without it CaiT features do not train a flow (FastFlow's
            issue tracker). Special tokens are dropped.
    """

    def __init__(self, net: Any, indices: Sequence[int], norm: bool) -> None:
        super().__init__()
        if norm:
            self.channels = [int(net.embed_dim)] * len(indices)
            self.strides = [int(net.patch_embed.patch_size[0])] * len(indices)
        else:
            self.channels = [int(net.feature_info[i]["num_chs"]) for i in indices]
            self.strides = [int(net.feature_info[i]["reduction"]) for i in indices]
        net.prune_intermediate_layers(list(indices), prune_norm=not norm, prune_head=True)
        self.net = net
        self.indices = list(indices)
        self.norm = norm

    def forward(self, x: Tensor) -> list[Tensor]:
        maps: list[Tensor] = self.net.forward_intermediates(
            x, indices=self.indices, norm=self.norm, stop_early=True, intermediates_only=True
        )
        return maps


def token_stages(net: Any, taps: Sequence[str]) -> tuple[Intermediates, list[str]]:
    """Cut a timm transformer (CaiT, DeiT, ViT); taps "block0", "block1", ... after the final norm."""
    order = _ordered(taps, [f"block{i}" for i in range(len(net.blocks))])
    return Intermediates(net, [int(tap.removeprefix("block")) for tap in order], norm=True), order


def feature_stages(net: Any, taps: Sequence[str]) -> tuple[Intermediates, list[str]]:
    """Cut any other timm net; taps "f0", "f1", ... as timm counts the features of that net."""
    order = _ordered(taps, [f"f{i}" for i in range(len(net.feature_info))])
    return Intermediates(net, [int(tap.removeprefix("f")) for tap in order], norm=False), order


def _ordered(taps: Sequence[str], known: Sequence[str]) -> list[str]:
    """Return ``taps`` in the order of the net, finest first.

    Raises:
        UsageError: a tap does not exist.
        InputError: there is none, or one is given twice.
    """
    for tap in taps:
        if tap not in known:
            raise unknown("tap", tap, known)
    if not taps or len(set(taps)) != len(taps):
        raise InputError(f"taps are {list(taps)}, expected at least one and each once")
    return sorted(taps, key=list(known).index)


def exporting() -> bool:
    """Return whether a program is being recorded (TorchScript, ONNX, ``torch.export``, ``make_fx``) instead of run."""
    recording = torch.onnx.is_in_onnx_export() or torch.compiler.is_compiling()
    recording |= torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
    return recording or torch._C._get_tracing_state() is not None


Cut = Callable[[Any, Sequence[str]], tuple[nn.Module, list[str]]]


def measure(net: nn.Module) -> tuple[list[int], list[int]]:
    """Return channels and strides of the maps of ``net``, from what it says of itself or by a small input."""
    if isinstance(net, Intermediates):
        return net.channels, net.strides
    side = 128
    tensor = next(net.parameters())
    with torch.no_grad():
        maps: list[Tensor] = net(torch.zeros(1, 3, side, side, device=tensor.device, dtype=tensor.dtype))
    # Nets that do not pad, or pad too much, miss the power of two by a cell or two.
    return [m.shape[1] for m in maps], [2 ** round(math.log2(side / m.shape[2])) for m in maps]
