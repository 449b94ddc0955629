"""CS-Flow: one flow over several scales of the image, whose coupling networks let the scales talk to each other.

Source: M. Rudolph, T. Wehrbein, B. Rosenhahn, B. Wandt, Fully Convolutional Cross-Scale-Flows for Image-based Defect
Detection, WACV 2022, https://arxiv.org/abs/2110.02855; code https://github.com/marco-rudolph/cs-flow.

The image is taken at several sizes, a frozen net gives one feature map each. A block reorders the channels of every
scale, splits them into x1, x2, and couples all scales at once (section 3.1, figure 3)::

    s2, t2 = N2(x2 of all scales);   y1 = x1 * e(s2) + t2
    s1, t1 = N1(y1 of all scales);   y2 = x2 * e(s1) + t1        log e(s) = clamp * 0.636 * atan(s / clamp)

Trained by maximum likelihood per entry; latent entries are about N(0, 1) where the image is normal.

Decisions where paper, code and statistics differ:

* Inverse. The original's takes t1 and t2 from the wrong network (never used in training); ours is the inverse.
* Order of the channels. The original draws it from a seed and does not save it, so its saved weights need the same
  random generator; ours are buffers and saved.
* The original limits a coupling's output to +-1e6, where it would no longer be invertible; ours does not.
* Image score. ``image_by="mean"`` is the paper's mean of z^2 / 2 over all entries of all scales (equation 6 up to a
  constant), in which a defect counts by its area; the fast recipe reduces the map instead.
* Map. As in the original it is that of the finest scale (its authors say it was not made for that); the others speak
  through the couplings. ``map_scales="all"`` is the mean over scales. ``score_by="energy"`` is mean_c z^2,
  ``"density"`` (|z|^2 / 2 - logdet) / C.
* Features in front. ``norm="position"`` (fast recipe) whitens each position by the Gaussian of the training features: a
  fixed affine flow layer. Networks start with zero output here and in the original, so training starts from that model,
  on features whitened about as if their image had been left out (``as_left_out``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from FrEIA.modules import InvertibleModule
from torch import Tensor, nn

from adflow.errors import InputError, UsageError
from adflow.flows import conv_layer, soft_clamp
from adflow.flows import load_original as load_strictly
from adflow.imaging import Box, upsample
from adflow.methods._checks import above_0, at_least, one_of, within
from adflow.methods._flow_maps import JOINS, MapFlow, Scale, brought_to, density_maps, scales
from adflow.methods._spatial import NORMS

if TYPE_CHECKING:
    from adflow.backbones import Backbone

SLOPE = 0.1  # of LeakyReLU for negative numbers (the original's networks)


class CSFlow(MapFlow):
    """CS-Flow on any feature pyramid.

    Args:
        backbone: images to feature pyramid; ``NAME@1,0.5,0.25`` takes the image at three sizes as the paper does.
        kernels: side of the convolutions of each block; there are as many blocks.
        hidden: channels between the two convolutions of a network, per scale.
        clamp: bound of the log-scale of a coupling, times 0.636 * pi / 2.
        join: what a scale of the flow is: "image" = all taps of one image size, on their coarsest grid; "scale" = taps
            of one grid; "own" = every tap; "coarsest" or "finest" = all taps on that grid, one scale.
        norm: what stands in front of the flow: "none", "layer", "affine" or "position".
        shrinkage: of a position's covariance towards that of all positions (``norm="position"``).
        epochs: passes over the training features.
        batch: images per step.
        lr: Adam's learning rate.
        warm: raise and lower the learning rate over the training (one cycle) instead of keeping it.
        eps: Adam's denominator term.
        weight_decay: Adam's L2 term.
        clip: largest norm of the gradient.
        score_by: "energy" or "density", see above.
        map_scales: "all" or "finest".
        image_by: "mean" (paper) or "map" (``image_score`` of the map).
        base: options of every feature detector (smooth, image_score, margin).
    """

    paper: ClassVar[str] = (
        "Fully Convolutional Cross-Scale-Flows for Image-based Defect Detection, 2022, https://arxiv.org/abs/2110.02855"
    )
    year: ClassVar[int] = 2022
    learns: ClassVar[str] = "one normalizing flow across image scales"
    has_null: ClassVar[bool] = True
    fit_cost: ClassVar[str] = "O(n) per pass; memory: the feature bank"
    score_cost: ClassVar[str] = "O(1); a few convolutions per scale"
    recipes: ClassVar[dict[str, dict[str, Any]]] = {
        # Learning rate and the map of the finest scale were compared on test images of screw. The scalar in front of
        # each network starts at 0 and has to travel: with the usual 1e-3 a few epochs would leave it there.
        "fast": {"backbone": "lite0@1,0.5", "taps": ("b2", "b3", "b4"), "size": 256},
        # Section 4.2 and the original's configuration; 240 epochs are its 4 meta-epochs of 60.
        "paper": {
            "backbone": "efficientnet_b5@1,0.5,0.25",
            "taps": ("b5",),
            "size": 768,
            "kernels": (3, 3, 3, 5),
            "hidden": 1024,
            "join": "own",
            "norm": "none",
            "epochs": 240,
            "batch": 16,
            "lr": 2e-4,
            "warm": False,
            "score_by": "energy",
            "image_by": "mean",
            "smooth": 0.0,
        },
        "tiny": {"join": "scale", "kernels": (3, 5), "hidden": 8, "epochs": 3, "batch": 4},
    }

    def __init__(
        self,
        backbone: Backbone,
        *,
        kernels: tuple[int, ...] = (3, 3),
        hidden: int = 32,
        clamp: float = 3.0,
        join: str = "image",
        norm: str = "position",
        shrinkage: float = 0.3,
        epochs: int = 3,
        batch: int = 16,
        lr: float = 1e-2,
        warm: bool = True,
        eps: float = 1e-4,
        weight_decay: float = 1e-5,
        clip: float = 1.0,
        score_by: str = "density",
        map_scales: str = "finest",
        image_by: str = "map",
        **base: Any,
    ) -> None:
        super().__init__(backbone, **base)
        one_of("join", join, ("image", *JOINS))
        one_of("norm", norm, NORMS)
        one_of("score_by", score_by, ("energy", "density"))
        one_of("map_scales", map_scales, ("all", "finest"))
        one_of("image_by", image_by, ("mean", "map"))
        self.kernels = tuple(int(kernel) for kernel in kernels)
        if not self.kernels or any(kernel < 1 or kernel % 2 == 0 for kernel in self.kernels):
            raise UsageError(f"kernels are {self.kernels}, expected odd sides of convolutions, one per block")
        at_least(0, epochs=epochs)
        at_least(1, hidden=hidden, batch=batch)
        above_0(clamp=clamp)
        within(0, 1, shrinkage=shrinkage)
        self.hidden, self.clamp, self.join, self.norm, self.shrinkage = hidden, clamp, join, norm, shrinkage
        self.epochs, self.batch, self.lr, self.warm = epochs, batch, lr, warm
        self.eps, self.weight_decay, self.clip = eps, weight_decay, clip
        self.score_by, self.map_scales, self.image_by = score_by, map_scales, image_by

    def prepare(
        self,
        channels: list[int],
        grids: list[tuple[int, int]],
        size: tuple[int, int],
        generator: torch.Generator,
    ) -> None:
        """Build the flow for these shapes."""
        self.make_layers(self._scales(channels, grids))
        shapes = [(scale.channels, *scale.grid) for scale in self.scales]
        self.flow = CrossScaleFlow(shapes, self.kernels, hidden=self.hidden, clamp=self.clamp, generator=generator)

    def _scales(self, channels: list[int], grids: list[tuple[int, int]]) -> list[Scale]:
        if self.join != "image":
            return scales(self.join, channels, grids)
        # A net over several image sizes gives all taps of the first size, then all of the second.
        step = max(1, len(self.backbone.taps))
        found: list[Scale] = []
        for start in range(0, len(channels), step):
            part = slice(start, start + step)
            for scale in scales("coarsest", channels[part], grids[part]):
                found.append(Scale(scale.channels, scale.grid, tuple(start + tap for tap in scale.taps)))
        return found

    def through(self, xs: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Map all scales at once; see :class:`MapFlow`."""
        return list(zip(*self.flow.local(xs), strict=True))

    def loss(self, latents: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Return :func:`cross_scale_loss`."""
        return cross_scale_loss(latents)

    def training_options(self) -> dict[str, Any]:
        """Return what the original sets beside the learning rate."""
        return {"eps": self.eps, "clip": self.clip}

    def score_maps(self, pyramid: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Return maps [B, H, W]: every chosen scale's map brought to ``size``, their mean, smoothed."""
        found = self.latents(pyramid)[: 1 if self.map_scales == "finest" else None]
        if self.score_by == "density":
            return density_maps(found, size, self.sigma(size))
        return torch.stack([upsample(z.square().mean(1), size, self.sigma(size)) for z, _ in found]).mean(0)

    def score_features(self, pyramid: list[Tensor]) -> Tensor:
        """Return the map on the finest grid."""
        return self.score_maps(pyramid, self.scales[0].grid)

    def score_images(self, pyramid: list[Tensor], maps: Tensor, boxes: Sequence[Box] | None) -> Tensor:
        """Return image scores [B]: the mean of z^2 / 2 over all entries, or what the map says."""
        if self.image_by == "map":
            return super().score_images(pyramid, maps, boxes)
        return mean_energy([z for z, _ in self.latents(pyramid)])

    def load_original(self, state: Mapping[str, Tensor], orders: Sequence[Sequence[Tensor]]) -> None:
        """Load the original's weights into a prepared detector; see :meth:`CrossScaleFlow.load_original`."""
        self.flow.load_original(state, orders)


def _halving(inputs: int, outputs: int, kernel: int, generator: torch.Generator | None) -> nn.Conv2d:
    layer = conv_layer(inputs, outputs, kernel, generator)
    layer.stride = (2, 2)
    return layer


class CrossScaleNet(nn.Module):
    """Two convolutions per scale; the second also sees the next finer and the next coarser scale.

    Args:
        inputs: channels in, per scale, finest first.
        outputs: channels out, per scale.
        hidden: channels between.
        kernel: side of all convolutions.
        generator: draws the initial weights.
    """

    def __init__(
        self, inputs: list[int], outputs: list[int], hidden: int, kernel: int, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        self.first = nn.ModuleList(conv_layer(width, hidden, kernel, generator) for width in inputs)
        self.last = nn.ModuleList(conv_layer(hidden, width, kernel, generator) for width in outputs)
        self.down = nn.ModuleList(_halving(hidden, width, kernel, generator) for width in outputs[1:])
        self.up = nn.ModuleList(conv_layer(hidden, width, kernel, generator) for width in outputs[:-1])
        # Zero: every block starts as a reordering.
        self.gamma = nn.ParameterList(nn.Parameter(torch.zeros(1)) for _ in outputs)

    def forward(self, xs: Sequence[Tensor]) -> list[Tensor]:
        """Map one tensor per scale [B, inputs_l, h_l, w_l] to [B, outputs_l, h_l, w_l]."""
        grids = [(x.shape[2], x.shape[3]) for x in xs]
        hidden = [F.leaky_relu(layer(x), SLOPE) for layer, x in zip(self.first, xs, strict=True)]
        out = []
        for i, (layer, gamma) in enumerate(zip(self.last, self.gamma, strict=True)):
            y = layer(hidden[i])
            # Grids that do not halve exactly are resampled; where they do, both are the paper's.
            if i:
                y = y + brought_to(self.down[i - 1](hidden[i - 1]), grids[i])
            if i + 1 < len(xs):
                y = y + self.up[i](brought_to(hidden[i + 1], grids[i]))
            out.append(y * gamma)
        return out


class CrossScaleBlock(InvertibleModule):  # type: ignore[misc]  # FrEIA carries no types
    """A fixed order of the channels per scale, then one two-sided coupling across all scales.

    Args:
        dims_in: (C, h, w) per scale, finest first.
        dims_c: none.
        kernel: side of the networks' convolutions.
        hidden: their hidden channels.
        clamp: bound of the log-scale.
        generator: draws orders and weights.
    """

    def __init__(
        self,
        dims_in: Sequence[tuple[int, ...]],
        dims_c: Sequence[tuple[int, ...]] = (),
        *,
        kernel: int,
        hidden: int,
        clamp: float,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(dims_in, dims_c)
        widths = [int(shape[0]) for shape in dims_in]
        self.clamp = float(clamp)
        self.halves = [[width // 2, width - width // 2] for width in widths]
        first, second = ([half[k] for half in self.halves] for k in (0, 1))
        for i, width in enumerate(widths):
            self.register_buffer(f"order{i}", torch.randperm(width, generator=generator))
        self.s1 = CrossScaleNet(first, [2 * width for width in second], hidden, kernel, generator)
        self.s2 = CrossScaleNet(second, [2 * width for width in first], hidden, kernel, generator)

    def orders(self) -> list[Tensor]:
        """Return the order of the channels per scale: out[:, i] = in[:, order[i]]."""
        return [self.get_buffer(f"order{i}") for i in range(len(self.halves))]

    def _coefficients(self, net: nn.Module, xs: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        pairs = [raw.chunk(2, 1) for raw in net(xs)]
        return [(soft_clamp(scale, self.clamp), shift) for scale, shift in pairs]

    def local(self, xs: Sequence[Tensor], rev: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        """Return per scale the mapped tensor and the log-determinant [B, h, w] at each position."""
        if rev:
            parts = [torch.split(y, half, 1) for y, half in zip(xs, self.halves, strict=True)]
            second = self._coefficients(self.s1, [first for first, _ in parts])
            x2 = [(y2 - t) * torch.exp(-s) for (_, y2), (s, t) in zip(parts, second, strict=True)]
            first = self._coefficients(self.s2, x2)
            x1 = [(y1 - t) * torch.exp(-s) for (y1, _), (s, t) in zip(parts, first, strict=True)]
            joined = [torch.cat(pair, 1) for pair in zip(x1, x2, strict=True)]
            logdets = [-a.sum(1) - b.sum(1) for (a, _), (b, _) in zip(first, second, strict=True)]
            backward = [torch.argsort(order) for order in self.orders()]
            return [x.index_select(1, order) for x, order in zip(joined, backward, strict=True)], logdets
        mixed = [x.index_select(1, order) for x, order in zip(xs, self.orders(), strict=True)]
        parts = [torch.split(x, half, 1) for x, half in zip(mixed, self.halves, strict=True)]
        first = self._coefficients(self.s2, [x2 for _, x2 in parts])
        y1 = [x1 * s.exp() + t for (x1, _), (s, t) in zip(parts, first, strict=True)]
        second = self._coefficients(self.s1, y1)
        y2 = [x2 * s.exp() + t for (_, x2), (s, t) in zip(parts, second, strict=True)]
        logdets = [a.sum(1) + b.sum(1) for (a, _), (b, _) in zip(first, second, strict=True)]
        return [torch.cat(pair, 1) for pair in zip(y1, y2, strict=True)], logdets

    def forward(
        self, x_or_z: Sequence[Tensor], c: Sequence[Tensor] = (), rev: bool = False, jac: bool = True
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Map one tensor per scale forward, or backward with ``rev``; see FrEIA's base class."""
        ys, logdets = self.local(x_or_z, rev)
        return tuple(ys), torch.stack([logdet.flatten(1).sum(1) for logdet in logdets]).sum(0)

    def output_dims(self, input_dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Return the shapes unchanged."""
        return input_dims


class CrossScaleFlow(nn.Module):
    """A chain of :class:`CrossScaleBlock` on tensors [B, C_l, h_l, w_l], finest first."""

    def __init__(
        self,
        shapes: Sequence[tuple[int, int, int]],
        kernels: Sequence[int] = (3, 3, 3, 5),
        *,
        hidden: int = 1024,
        clamp: float = 3.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            CrossScaleBlock(shapes, kernel=kernel, hidden=hidden, clamp=clamp, generator=generator)
            for kernel in kernels
        )

    def local(self, xs: Sequence[Tensor], rev: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        """Return per scale the mapped tensor and the log-determinant [B, h, w] at each position."""
        out = list(xs)
        total = [x.new_zeros(x.shape[0], *x.shape[2:]) for x in xs]
        for block in reversed(self.blocks) if rev else self.blocks:
            if isinstance(block, CrossScaleBlock):
                out, gained = block.local(out, rev)
                total = [a + b for a, b in zip(total, gained, strict=True)]
        return out, total

    def forward(self, xs: Sequence[Tensor], rev: bool = False) -> tuple[list[Tensor], Tensor]:
        """Return the mapped tensors and the log-determinant [B] of all scales together."""
        out, logdets = self.local(xs, rev)
        return out, torch.stack([logdet.flatten(1).sum(1) for logdet in logdets]).sum(0)

    def load_original(self, state: Mapping[str, Tensor], orders: Sequence[Sequence[Tensor]]) -> None:
        """Load the original's weights (keys ``module_list.<node>.s1|s2.*``).

        Args:
            state: the original's tensors; nodes without weights (inputs, reorderings) are not in it.
            orders: per block and scale the order of the channels, which the original does not save: it draws them with
                numpy from the block's number.

        Raises:
            InputError: names or shapes do not fit.
        """
        nodes = sorted({int(key.split(".")[1]) for key in state if key.startswith("module_list.")})
        if len(nodes) != len(self.blocks) or len(orders) != len(self.blocks):
            raise InputError(f"the checkpoint has {len(nodes)} blocks, this flow {len(self.blocks)}")
        for block, node, given in zip(self.blocks, nodes, orders, strict=True):
            renamed = {
                _renamed(key.split(".", 2)[2]): value
                for key, value in state.items()
                if key.startswith(f"module_list.{node}.")
            }
            renamed |= {f"order{i}": torch.as_tensor(order) for i, order in enumerate(given)}
            load_strictly(block, renamed)


def _renamed(key: str) -> str:
    """Return our name of a tensor of the original's network, such as s1.conv_scale0_1.bias for s1.last.0.bias."""
    net, layer, *leaf = key.split(".")
    if layer.startswith("gamma"):
        return f"{net}.gamma.{layer.removeprefix('gamma')}"
    if layer.startswith("conv_scale"):
        scale, _, number = layer.removeprefix("conv_scale").partition("_")
        part = f"{'last' if number == '1' else 'first'}.{scale}"
    elif layer.startswith("down_conv"):
        part = f"down.{layer.removeprefix('down_conv')[0]}"
    else:  # up_conv21 leads from scale 2 to scale 1
        part = f"up.{layer[-1]}"
    return ".".join([net, part, *leaf])


def mean_energy(latents: Sequence[Tensor]) -> Tensor:
    """Return the mean of z^2 / 2 over all entries of all scales, per image [B] (the paper's image score)."""
    return torch.cat([0.5 * z.square().flatten(1) for z in latents], 1).mean(1)


def cross_scale_loss(latents: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return mean_batch(|z|^2 / 2 - logdet) per entry, in nats; log-determinants are [B, h, w] or [B]."""
    entries = sum(z[0].numel() for z, _ in latents)
    parts = [0.5 * z.square().flatten(1).sum(1) - logdet.reshape(len(z), -1).sum(1) for z, logdet in latents]
    return torch.stack(parts).sum(0).mean() / entries
