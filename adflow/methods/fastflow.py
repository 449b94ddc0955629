"""FastFlow: an independent fully convolutional flow on each feature map, so that a position sees its neighbours.

Source: J. Yu, Y. Zheng, X. Wang, W. Li, Y. Wu, R. Zhao, L. Wu, FastFlow: Unsupervised Anomaly Detection and
Localization via 2D Normalizing Flows, 2021, https://arxiv.org/abs/2111.07677. The authors published no code; constants
and key names are those of the implementation that most others use (https://github.com/gathierry/FastFlow).

For each tap, z = f_K(...f_1(x)), f_k an affine coupling whose network is conv - ReLU - conv, trained to minimise
sum_taps mean_batch(|z|^2 / 2 - log |det dz/dx|): every latent entry is about N(0, 1) where the image is normal.

Decisions where paper, code and statistics differ:

* Coupling. The paper's parameter counts fit neither a two-sided coupling nor the implementation's one-sided one, which
  changes half of the channels in a step (its issue #2). Ours is the implementation's: its weights are the known ones.
* Normalisation in front of the flow. ``norm="affine"`` is the implementation's trainable LayerNorm; its Jacobian is in
  no loss, so that shrinking the features raises the likelihood. ``"position"`` (fast recipe) whitens each position by
  the Gaussian of the training features: a fixed affine layer of the flow with its log-determinant. Couplings that start
  as the identity then start from that Gaussian model instead of from noise, and train on features whitened about as
  if their image had been left out (``as_left_out``): without that, training makes the model worse.
* Taps. The paper gives each tap a flow of its own (``join="own"``); the fast recipe models all taps together on the
  coarsest grid (``join="coarsest"``), because taps at one place are correlated.
* Score. ``"likelihood"`` is the implementation's mean over taps of -exp(-mean_c z^2 / 2): in [-1, 0], flat where z is
  large. ``"density"`` is (|z|^2 / 2 - logdet) / C at each position, the negative log-density per channel in nats.
* Augmentation. The paper speaks of it without naming it; there is none here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from FrEIA.framework import SequenceINN
from torch import Tensor, nn

from adflow.flows import AllInOneBlock, conv_subnet, load_original
from adflow.methods._checks import at_least, one_of, within
from adflow.methods._flow_maps import JOINS, SCORES, MapFlow, density_maps, likelihood_maps, scales
from adflow.methods._memory import common_grid
from adflow.methods._spatial import NORMS, coupling_pass

if TYPE_CHECKING:
    from adflow.backbones import Backbone

# Section 4.1 and the implementation's configurations: everything but backbone, taps, steps, kernels and hidden ratio.
_PAPER: dict[str, Any] = {
    "join": "own",
    "zero_init": False,
    "epochs": 500,
    "batch": 32,
    "lr": 1e-3,
    "warm": False,
    "score_by": "likelihood",
    "smooth": 0.0,
    "image_score": "max",
    "margin": 0.0,
}
_LAYERS = ("layer1", "layer2", "layer3")


class FastFlow(MapFlow):
    """FastFlow on any feature pyramid.

    Args:
        backbone: images to feature pyramid.
        flow_steps: couplings per chain.
        kernels: "3" = 3x3 convolutions in every step, "31" = 3x3 and 1x1 in turn.
        hidden: hidden channels of a coupling's network as a multiple of its input channels.
        clamp: bound of the log-scale of a coupling.
        join: which taps share a chain: "own" = none, "scale" = those of one grid, "coarsest" or "finest" = all, on that
            grid.
        norm: what stands in front of a chain: "none", "layer", "affine" or "position".
        shrinkage: of a position's covariance towards that of all positions (``norm="position"``).
        zero_init: start every coupling as the identity.
        epochs: passes over the training features.
        batch: images per step.
        lr: Adam's learning rate.
        warm: raise and lower the learning rate over the training (one cycle) instead of keeping it.
        weight_decay: Adam's L2 term.
        score_by: "likelihood" or "density", see above.
        base: options of every feature detector (smooth, image_score, margin).
    """

    paper: ClassVar[str] = (
        "FastFlow: Unsupervised Anomaly Detection and Localization via 2D Normalizing Flows, 2021, "
        "https://arxiv.org/abs/2111.07677"
    )
    year: ClassVar[int] = 2021
    learns: ClassVar[str] = "one convolutional normalizing flow per feature map"
    has_null: ClassVar[bool] = True
    fit_cost: ClassVar[str] = "O(n) per pass; memory: the feature bank"
    score_cost: ClassVar[str] = "O(1); a few convolutions per map"
    recipes: ClassVar[dict[str, dict[str, Any]]] = {
        "fast": {"backbone": "lite0", "taps": ("b2", "b3", "b4"), "size": 256, "image_score": "max"},
        "paper": {
            **_PAPER, "backbone": "wrn50", "taps": _LAYERS, "size": 256,
            "norm": "affine", "flow_steps": 8, "kernels": "31", "hidden": 1.0,
        },
        "paper-resnet18": {
            **_PAPER, "backbone": "resnet18", "taps": _LAYERS, "size": 256,
            "norm": "affine", "flow_steps": 8, "kernels": "3", "hidden": 1.0,
        },
        "paper-cait": {
            **_PAPER, "backbone": "cait_m48_448", "taps": ("block40",), "size": 448,
            "norm": "none", "flow_steps": 20, "kernels": "31", "hidden": 0.16,
        },
        "paper-deit": {
            **_PAPER, "backbone": "deit_base_distilled_patch16_384", "taps": ("block7",), "size": 384,
            "norm": "none", "flow_steps": 20, "kernels": "31", "hidden": 0.16,
        },
        "tiny": {"epochs": 3, "batch": 4},
    }  # fmt: skip

    def __init__(
        self,
        backbone: Backbone,
        *,
        flow_steps: int = 4,
        kernels: str = "31",
        hidden: float = 0.16,
        clamp: float = 2.0,
        join: str = "coarsest",
        norm: str = "position",
        shrinkage: float = 0.3,
        zero_init: bool = True,
        epochs: int = 2,
        batch: int = 16,
        lr: float = 1e-3,
        warm: bool = True,
        weight_decay: float = 1e-5,
        score_by: str = "density",
        **base: Any,
    ) -> None:
        super().__init__(backbone, **base)
        one_of("kernels", str(kernels), ("3", "31"))
        one_of("join", join, JOINS)
        one_of("norm", norm, NORMS)
        one_of("score_by", score_by, SCORES)
        at_least(0, epochs=epochs)
        at_least(1, flow_steps=flow_steps, batch=batch)
        within(0, 1, shrinkage=shrinkage)
        within(0, 100, hidden=hidden)
        self.flow_steps, self.kernels, self.hidden, self.clamp = flow_steps, str(kernels), hidden, clamp
        self.join, self.norm, self.shrinkage, self.zero_init = join, norm, shrinkage, zero_init
        self.epochs, self.batch, self.lr, self.warm, self.weight_decay = epochs, batch, lr, warm, weight_decay
        self.score_by = score_by

    def prepare(
        self,
        channels: list[int],
        grids: list[tuple[int, int]],
        size: tuple[int, int],
        generator: torch.Generator,
    ) -> None:
        """Build a chain per map for these shapes."""
        self.make_layers(scales(self.join, channels, grids))
        self.flows = nn.ModuleList(
            conv_chain(
                (scale.channels, *scale.grid),
                self.flow_steps,
                kernels=self.kernels,
                hidden=self.hidden,
                clamp=self.clamp,
                zero_init=self.zero_init,
                generator=generator,
            )
            for scale in self.scales
        )

    def through(self, xs: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Map each chain's input; see :class:`MapFlow`."""
        chains = [[block for block in flow.modules() if isinstance(block, AllInOneBlock)] for flow in self.flows]
        return [coupling_pass(blocks, x) for blocks, x in zip(chains, xs, strict=True)]

    def loss(self, latents: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Return the paper's loss, :func:`flow_loss`."""
        return flow_loss(latents)

    def score_maps(self, pyramid: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Return maps [B, H, W]: every chain's map brought to ``size``, mean over chains, smoothed."""
        if self.score_by == "likelihood":
            return likelihood_maps([z for z, _ in self.latents(pyramid)], size, self.sigma(size))
        return density_maps(self.latents(pyramid), size, self.sigma(size))

    def score_features(self, pyramid: list[Tensor]) -> Tensor:
        """Return the map on the finest grid of a chain."""
        return self.score_maps(pyramid, common_grid([scale.grid for scale in self.scales], "finest"))

    def load_original(self, state: Mapping[str, Tensor]) -> None:
        """Load a checkpoint of the implementation (keys ``norms.*``, ``nf_flows.*``) into a prepared detector.

        Raises:
            InputError: names or shapes do not fit.
        """
        for i, (norm, flow) in enumerate(zip(self.norms, self.flows, strict=True)):
            if self.norm == "affine":
                load_original(norm, state, prefix=f"norms.{i}.")
            load_original(flow, state, prefix=f"nf_flows.{i}.")


def conv_chain(
    shape: tuple[int, int, int],
    steps: int,
    *,
    kernels: str = "31",
    hidden: float = 1.0,
    clamp: float = 2.0,
    zero_init: bool = False,
    generator: torch.Generator | None = None,
) -> SequenceINN:
    """Return a chain of ``steps`` couplings on maps [C, h, w]; see :class:`FastFlow` for the rest."""
    flow = SequenceINN(*shape)
    for step in range(steps):
        kernel = 1 if step % 2 and kernels == "31" else 3
        flow.append(
            AllInOneBlock,
            subnet=conv_subnet(kernel, generator=generator, ratio=hidden, zero_init=zero_init),
            clamp=clamp,
            permutation="hard",
            generator=generator,
        )
    return flow


def flow_loss(latents: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the sum over chains of mean_batch(|z|^2 / 2 - logdet) in nats; logdets are [B, h, w] or [B]."""
    parts = [(0.5 * z.square().flatten(1).sum(1) - logdet.reshape(len(z), -1).sum(1)).mean() for z, logdet in latents]
    return torch.stack(parts).sum()
