"""Backbones: images to a pyramid of feature maps, by a frozen pretrained net with the normalisation inside.

    >>> from adflow.backbones import make_backbone
    >>> backbone = make_backbone("lite0")  # its weights come with adflow
    >>> list(zip(backbone.taps, backbone.channels, backbone.strides))
    [('b2', 40, 8), ('b3', 80, 16), ('b4', 112, 16)]

Names: ``lite0`` (default), ``lite1``, ``lite2``, ``resnet18``, ``resnet34``, ``resnet50``, ``wrn50``,
``mobilenetv3l``, ``efficientnet_b4``, ``efficientnet_b5``, ``cait-pair`` (U-Flow), ``vgg19-dfr`` (DFR),
``alexnet`` (DifferNet), and every name of timm. ``NAME@1,0.5,0.25`` feeds the image at several scales,
``NAME+NAME`` joins two pyramids. ``pixels`` is no net but the image itself, for methods that learn from nothing else
(Patch SVDD, CAVGA). A net without its weights is an error, never a random net.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adflow import _nets
from adflow._clock import stage
from adflow._lite import Lite
from adflow._streamline import streamline
from adflow._weights import find_weights, load_strictly, read_weights, rename_lite
from adflow.errors import InputError, UsageError, unknown
from adflow.zoo import File, Source

_Norm = tuple[tuple[float, ...], tuple[float, ...]]
IMAGENET: _Norm = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation of RGB in [0, 1]
HALF: _Norm = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
PRECISIONS = ("float32", "bf16")


class Backbone(nn.Module):
    """A frozen net that turns images into a feature pyramid. Always in evaluation mode; holds no state.

    Args:
        name: what :func:`make_backbone` makes it from.
        taps: which outputs, finest first.
        channels: channels per map.
        strides: input pixels per cell, per map.
        weights: sha256 of the weight file's bytes.
        net: normalised images [B, 3, H, W] to maps, finest first.
        mean: per channel, of RGB in [0, 1].
        std: per channel.
        channels_last: lay images out with channels last, which is faster for convolutions (measured on CPU).

    Attributes:
        precision: "float32" or "bf16".
        fixed_size: (height, width) of the only input the net takes, or None.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        name: str,
        taps: Sequence[str],
        channels: Sequence[int],
        strides: Sequence[int],
        weights: str,
        net: nn.Module,
        *,
        mean: Sequence[float] = IMAGENET[0],
        std: Sequence[float] = IMAGENET[1],
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.name = name
        self.taps = tuple(taps)
        self.channels = list(channels)
        self.strides = list(strides)
        self.weights = weights
        self.precision = "float32"
        self.fixed_size: tuple[int, int] | None = None
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        # Nets that already are backbones keep the layout they chose.
        self.net = net.to(memory_format=self.layout) if channels_last else net
        self.net_bf16: nn.Module | None = None
        centre, spread = (torch.tensor(value).view(1, 3, 1, 1) for value in (mean, std))
        self.register_buffer("scale", 1 / spread, persistent=False)
        self.register_buffer("shift", -centre / spread, persistent=False)
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> Self:
        """Do nothing: a frozen net has no training mode."""
        return self

    def to_precision(self, precision: str) -> Self:
        """Compute in "float32" (exact, default) or "bf16"; features stay float32.

        bf16: weights and maps behind the first stage are bfloat16, see :func:`adflow._nets.rounded`.

        Raises:
            UsageError: another precision.
        """
        if precision not in PRECISIONS:
            raise unknown("precision", precision, PRECISIONS)
        if precision == "bf16" and self.net_bf16 is None:
            self.net_bf16 = _nets.rounded(self.net)
        self.precision = precision
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the maps [B, C, h, w] float32, finest first, of RGB ``images`` [B, 3, H, W] in [0, 1].

        Raises:
            InputError: wrong shape.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise InputError(f"images have shape {list(images.shape)}, expected [B, 3, H, W]")
        if self.fixed_size and tuple(images.shape[2:]) != self.fixed_size:
            raise InputError(
                f"{self.name} takes images of {self.fixed_size[0]}x{self.fixed_size[1]}, "
                f"found {images.shape[2]}x{images.shape[3]}",
                hint=f"Fit with --size {self.fixed_size[0]}x{self.fixed_size[1]}, or use --backbone lite0.",
            )
        with stage("encoder"):
            return self.features((images * self.scale).add_(self.shift))

    def features(self, images: Tensor) -> list[Tensor]:
        """Return the maps of normalised ``images``; nets that prepare their input otherwise override this."""
        net = self.net_bf16 if self.precision == "bf16" and self.net_bf16 is not None else self.net
        pyramid = net(images.contiguous(memory_format=self.layout))
        return [level.float().contiguous() for level in pyramid]

    def grids(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Return (height, width) of every map for images of ``size``."""
        device = next(self.buffers()).device
        return [(m.shape[2], m.shape[3]) for m in self(torch.zeros(1, 3, *size, device=device))]


@dataclass(frozen=True, slots=True)
class _Net:
    """How to build one net.

    ``source`` is library and name there, ``size`` the side of the only input it takes, ``depths`` the blocks
    per stage by which the old tensor names of the lite nets are translated.
    """

    source: str
    cut: _nets.Cut
    taps: tuple[str, ...]
    norm: _Norm = IMAGENET
    size: int | None = None
    depths: tuple[int, ...] | None = None


_MIDDLE = ("b2", "b3", "b4")
_LAYERS = ("layer1", "layer2", "layer3")
_RELU4 = ("relu4_1", "relu4_2", "relu4_3", "relu4_4")
_LITE0 = (1, 2, 2, 3, 3, 4, 1)
_LITE12 = (1, 3, 3, 4, 4, 5, 1)
_NETS = {
    # Width of the stages; depths stand beside it.
    "lite0": _Net("lite:1.0", _nets.mobile_stages, _MIDDLE, HALF, depths=_LITE0),
    "lite1": _Net("lite:1.0", _nets.mobile_stages, _MIDDLE, HALF, depths=_LITE12),
    "lite2": _Net("lite:1.1", _nets.mobile_stages, _MIDDLE, HALF, depths=_LITE12),
    "resnet18": _Net("timm:resnet18.tv_in1k", _nets.resnet_stages, _LAYERS),
    "resnet34": _Net("timm:resnet34.tv_in1k", _nets.resnet_stages, _LAYERS),
    "resnet50": _Net("timm:resnet50.tv_in1k", _nets.resnet_stages, _LAYERS),
    "wrn50": _Net("timm:wide_resnet50_2.tv_in1k", _nets.resnet_stages, _LAYERS),
    # CFLOW-AD's taps: 40 channels at stride 8, 112 at 16, 160 at 32.
    "mobilenetv3l": _Net("timm:mobilenetv3_large_100.ra_in1k", _nets.mobile_stages, ("b2.conv", "b4.conv", "b5.conv")),
    "efficientnet_b4": _Net("timm:efficientnet_b4.ra2_in1k", _nets.mobile_stages, ("b2", "b4", "b5")),
    "efficientnet_b5": _Net("timm:tf_efficientnet_b5.ns_jft_in1k", _nets.mobile_stages, ("b2", "b4", "b5")),
    "cait_m48_448": _Net("timm:cait_m48_448.fb_dist_in1k", _nets.token_stages, ("block40",), size=448),
    "cait_s24_224": _Net("timm:cait_s24_224.fb_dist_in1k", _nets.token_stages, ("block20",), size=224),
    "vgg19-dfr": _Net("torchvision:vgg19", _nets.vgg_stages, _RELU4),
    "alexnet": _Net("torchvision:alexnet", _nets.alexnet_stages, ("features",)),
}


def names() -> list[str]:
    """Return the names of the backbones that adflow knows by itself."""
    return [*_NETS, "cait-pair", "pixels"]


def make_backbone(name: str = "lite0", taps: Sequence[str] | None = None, weights: Path | None = None) -> Backbone:
    """Build the frozen backbone ``name``.

    Args:
        name: see the head of this module.
        taps: which maps; None = the default of the net. "b1".."b6" are stages of mobile nets ("b2.conv" the
            last projection of a stage, before normalisation and skip), "layer1".."layer4" of ResNets,
            "block0".. blocks of transformers, "f0".. features of any other timm net. Joined nets take
            "net.tap".
        weights: a local weight file (.safetensors, or a torch file of tensors only); for joined nets and
            ``cait-pair`` a folder with one such file per net, named after it. None = where ``zoo.yaml`` says.

    Raises:
        UsageError: unknown name or tap; names the nearest.
        UnavailableError: the weights are not on this machine and cannot be fetched; names the offline choice.
        InputError: the weight file is damaged or belongs to another net.
    """
    base, at, scales = name.partition("@")
    if at:
        return PyramidBackbone(make_backbone(base, taps, weights), _parse_scales(name, scales))
    if name == "cait-pair":
        return CaitPair(taps, weights)
    if name == "pixels":
        return PixelBackbone(taps)
    if "+" in name:
        return JoinedBackbone(name.split("+"), taps, weights)
    return _known(name, taps, weights) if name in _NETS else _timm(name, taps, weights)


def _known(name: str, taps: Sequence[str] | None, weights: Path | None) -> Backbone:
    """Build a net of the table above."""
    recipe = _NETS[name]
    file = find_weights(name, weights)
    full = _skeleton(recipe.source, recipe.depths)
    wanted = recipe.taps if taps is None else taps
    state = read_weights(file.path)
    if recipe.depths and "_conv_stem.weight" in state:
        state = rename_lite(state, recipe.depths)
    load_strictly(full, state, file.path, name)
    net, order = recipe.cut(full.eval(), wanted)
    convolutional = recipe.size is None
    if convolutional:
        net = streamline(net)
    channels, strides = _nets.measure(net)
    mean, std = recipe.norm
    backbone = Backbone(
        name, order, channels, strides, file.sha256, net, mean=mean, std=std, channels_last=convolutional
    )
    backbone.fixed_size = (recipe.size, recipe.size) if recipe.size else None
    return backbone


def _skeleton(source: str, depths: Sequence[int] | None = None) -> nn.Module:
    """Return the whole classifier on the meta device: its tensors come from the weight file."""
    library, _, name = source.partition(":")
    with torch.device("meta"):
        if library == "lite":
            net: nn.Module = Lite(float(name), depths or ())
        elif library == "timm":
            import timm

            net = timm.create_model(name, pretrained=False)
        else:
            from torchvision.models import get_model

            net = get_model(name, weights=None)
    return net


def _timm(name: str, taps: Sequence[str] | None, weights: Path | None) -> Backbone:
    """Build any other net of timm, with timm's own translation of its weight file; never without weights."""
    import timm

    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise unknown("backbone", name, [*names(), *near])
    config: Any = timm.get_pretrained_cfg(name)
    with torch.device("meta"):
        shape: Any = timm.create_model(name, pretrained=False)
    transformer = hasattr(shape, "patch_embed") and hasattr(shape, "blocks")
    if config is None or not hasattr(shape, "prune_intermediate_layers"):
        raise UsageError(f"the timm net {name} does not hand out its features, expected another backbone")
    if taps is None and transformer:
        taps = [f"block{2 * len(shape.blocks) // 3 - 1}"]  # block 7 of 12, as FastFlow takes from DeiT
    elif taps is None:
        taps = [f"f{i}" for i, info in enumerate(shape.feature_info) if info["reduction"] in (4, 8, 16)]
    cut: _nets.Cut = _nets.token_stages if transformer else _nets.feature_stages
    channels, strides = _nets.measure(cut(shape, taps)[0])
    fallback = None
    if config.hf_hub_id:
        path = config.hf_hub_filename or "model.safetensors"
        fallback = File(path, (Source(hub=config.hf_hub_id, revision="main", path=path),))
    elif config.url:
        fallback = File(config.url.rpartition("/")[2], (Source(url=config.url),))
    file = find_weights(name, weights, fallback)
    try:
        full = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"state_dict": read_weights(file.path)})
    except (RuntimeError, KeyError) as error:
        raise InputError(f"{file.path} does not hold the weights of {name}: {str(error).splitlines()[0]}") from error
    net, order = cut(full.eval(), taps)
    backbone = Backbone(name, order, channels, strides, file.sha256, net, mean=config.mean, std=config.std)
    backbone.fixed_size = config.input_size[1:] if config.fixed_input_size or transformer else None
    return backbone


def _parse_scales(name: str, text: str) -> list[float]:
    try:
        scales = [float(part) for part in text.split(",")]
    except ValueError:
        scales = []
    if not scales or any(not 0 < scale <= 1 for scale in scales) or sorted(scales, reverse=True) != scales:
        raise UsageError(f"'{name}' names no image scales, expected falling shares like NAME@1,0.5,0.25")
    return scales


class PyramidBackbone(Backbone):
    """One net over several scales of the image, made by nearest-neighbour sampling (CS-Flow, DifferNet).

    CS-Flow (Rudolph et al. 2022, https://arxiv.org/abs/2110.02855) takes EfficientNet-B5 at 768, 384 and 192
    px, DifferNet (Rudolph et al. 2021, https://arxiv.org/abs/2008.12577) AlexNet at 448, 224 and 112 px: both
    are scales 1, 0.5, 0.25.

    Args:
        base: the net.
        scales: shares of the input size, falling; all taps of the first scale come first.
    """

    def __init__(self, base: Backbone, scales: Sequence[float]) -> None:
        name = f"{base.name}@{','.join(f'{scale:g}' for scale in scales)}"
        channels = [c for _ in scales for c in base.channels]
        strides = [round(s / scale) for scale in scales for s in base.strides]
        super().__init__(name, base.taps, channels, strides, base.weights, base)
        self.scales = tuple(scales)

    def to_precision(self, precision: str) -> Self:
        """Pass the choice on to the net."""
        _set_precision([self.net], precision)
        self.precision = precision
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the maps of the first scale, then of the second, and so on."""
        height, width = images.shape[2:]
        pyramid: list[Tensor] = []
        for scale in self.scales:
            size = (max(1, round(height * scale)), max(1, round(width * scale)))
            seen = images if size == (height, width) else F.interpolate(images, size=size, mode="nearest")
            pyramid.extend(self.net(seen))
        return pyramid


class JoinedBackbone(Backbone):
    """Several nets on one image (PEFM): the maps of the first, then of the second. Taps are "net.tap".

    Args:
        nets: names of the nets.
        taps: None = the defaults of each.
        weights: folder with one weight file per net, or None.
    """

    def __init__(self, nets: Sequence[str], taps: Sequence[str] | None, weights: Path | None) -> None:
        for tap in taps or ():
            if not any(tap.startswith(f"{net}.") for net in nets):
                raise UsageError(f"tap '{tap}' names no net of {'+'.join(nets)}", hint="Write NET.TAP.")
        parts = []
        for net in nets:
            mine = None if taps is None else [tap.removeprefix(f"{net}.") for tap in taps if tap.startswith(f"{net}.")]
            parts.append(make_backbone(net, mine, _part(weights, net)))
        super().__init__(
            "+".join(nets),
            [f"{part.name}.{tap}" for part in parts for tap in part.taps],
            [c for part in parts for c in part.channels],
            [s for part in parts for s in part.strides],
            _joined_hash(parts),
            nn.ModuleList(parts),
        )

    def to_precision(self, precision: str) -> Self:
        """Pass the choice on to every net."""
        _set_precision(list(self.net.children()), precision)
        self.precision = precision
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the maps of every net in turn."""
        return [level for part in self.net.children() for level in part(images)]


class CaitPair(Backbone):
    """U-Flow's MS-CaiT: CaiT-M48 at 448 px (768 x 28 x 28) and CaiT-S24 at 224 px (384 x 14 x 14).

    U-Flow: a U-shaped normalizing flow (Tailanian et al. 2024, https://doi.org/10.1007/s10851-024-01193-y).
    Tokens after blocks 40 and 20 and the nets' own final norms; the small net sees the normalised image
    resized bicubically with aligned corners.
    """

    def __init__(self, taps: Sequence[str] | None, weights: Path | None) -> None:
        wanted = ("block40", "block20") if taps is None else tuple(taps)
        if len(wanted) != 2:
            raise InputError(f"taps are {list(wanted)}, expected two: a block of cait_m48_448 and one of cait_s24_224")
        parts = [
            make_backbone(net, [tap], _part(weights, net))
            for net, tap in zip(("cait_m48_448", "cait_s24_224"), wanted, strict=True)
        ]
        channels = [part.channels[0] for part in parts]
        super().__init__("cait-pair", wanted, channels, [16, 32], _joined_hash(parts), nn.ModuleList(parts))
        self.fixed_size = parts[0].fixed_size

    def to_precision(self, precision: str) -> Self:
        """Pass the choice on to both nets."""
        _set_precision(list(self.net.children()), precision)
        self.precision = precision
        return self

    def features(self, images: Tensor) -> list[Tensor]:
        """Return the two maps of normalised ``images`` [B, 3, 448, 448]."""
        large, small = (part for part in self.net.children() if isinstance(part, Backbone))
        half = F.interpolate(images, size=small.fixed_size, mode="bicubic", align_corners=True)
        return [*large.features(images), *small.features(half)]


class PixelBackbone(Backbone):
    """No net: a pyramid of one map, the image [B, 3, H, W] in [0, 1]; always float32."""

    def __init__(self, taps: Sequence[str] | None = None) -> None:
        for tap in taps or ():
            if tap != "rgb":
                raise unknown("tap of pixels", tap, ["rgb"])
        weights = hashlib.sha256(b"").hexdigest()
        super().__init__("pixels", ("rgb",), [3], [1], weights, nn.Identity(), mean=(0, 0, 0), std=(1, 1, 1))

    def features(self, images: Tensor) -> list[Tensor]:
        """Return the images."""
        return [images.contiguous()]


def _set_precision(parts: Sequence[nn.Module], precision: str) -> None:
    for part in parts:
        if isinstance(part, Backbone):
            part.to_precision(precision)


def _joined_hash(parts: Sequence[Backbone]) -> str:
    """Return one sha256 for several weight files: that of their hashes in a row."""
    return hashlib.sha256(" ".join(part.weights for part in parts).encode()).hexdigest()


def _part(folder: Path | None, net: str) -> Path | None:
    if folder is None:
        return None
    found = [
        path for path in sorted(Path(folder).glob(f"{net}*")) if path.suffix in (".safetensors", ".pth", ".pt", ".bin")
    ]
    if not found:
        raise InputError(
            f"{folder} holds no file {net}.safetensors", hint="Give a folder with one weight file per net."
        )
    return found[0]
