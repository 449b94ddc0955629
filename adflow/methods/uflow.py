"""U-Flow: one flow over all scales, shaped like a U, whose latents carry an a contrario test.

Source: M. Tailanian, Á. Pardo, P. Musé, U-Flow: A U-shaped Normalizing Flow for Anomaly Detection with Unsupervised
Threshold, Journal of Mathematical Imaging and Vision, 2024, https://doi.org/10.1007/s10851-024-01193-y.

The flow starts at the coarsest scale. Each stage maps its input; half of the result is that scale's latent, the other
half is rearranged to twice the resolution and joined to the next finer features::

    h = f_L;   for l = L..1:   h = stage_l(h);   if l > 1:  u, z_l = split(h),  h = [f_{l-1}, up(u)];   z_1 = h

Trained by maximum likelihood, every latent entry is about N(0, 1) where the image is normal: the sum of squares over
C channels is the energy that the test of :mod:`adflow.nfa` reads.

Decisions where paper, code and statistics differ:

* Normalisation in front of the flow. The original's is a LayerNorm with trainable scale and shift, which can raise
  the likelihood by shrinking the features, as its Jacobian is not in the loss: ``norm="affine"`` reproduces it.
  ``"layer"`` has no trainable part. ``"position"`` whitens each position by the Gaussian of the training features:
  a fixed affine flow layer with its log-determinant, so that training starts from the Gaussian model.
* Score. ``"likelihood"`` is the paper's 1 - mean_l exp(-mean_c z_l^2 / 2): bounded, and flat where z is large.
  ``"density"`` is the mean over scales of (sum_c z_l^2 / 2 - logdet) / C, the negative log-density per channel.
* Learning rate: the paper's linear fall to 0.4 over 25,000 steps; the original's code steps it once an epoch, which
  leaves it constant in practice.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from FrEIA.framework import GraphINN, InputNode, Node, OutputNode
from FrEIA.modules import Concat, Split
from torch import Tensor, nn

from adflow.detector import Energy, FeatureDetector, Progress
from adflow.errors import InputError
from adflow.features import FeatureBank
from adflow.flows import AllInOneBlock, PixelShuffle, conv_subnet, load_original
from adflow.methods._checks import at_least, one_of, within
from adflow.methods._flow_maps import SCORES, brought_to, density_maps, likelihood_maps
from adflow.methods._spatial import NORMS, PositionWhitening, coupling_pass, normaliser
from adflow.methods._train import train

if TYPE_CHECKING:
    from adflow.backbones import Backbone

# Class: (epochs, batch size, learning rate) of the original's per-class configurations, published with its code
# (https://github.com/mtailanian/uflow). The odd digits suggest a search; on which data is not said.
PAPER_CLASSES: dict[str, tuple[int, int, float]] = {
    "carpet": (200, 13, 3.163419554150971e-05),
    "grid": (500, 12, 3.6224837438852e-05),
    "leather": (500, 15, 0.0006124723659154866),
    "tile": (200, 30, 0.006045754779719109),
    "wood": (500, 22, 0.0002466546120460351),
    "bottle": (200, 23, 0.00011289990475381853),
    "cable": (200, 14, 0.001616039111268198),
    "capsule": (200, 14, 0.0012118892498142058),
    "hazelnut": (500, 21, 0.0013268898640895934),
    "metal_nut": (200, 11, 0.0008148858311570219),
    "pill": (200, 11, 0.0010756100354690954),
    "screw": (500, 11, 0.0004155987052838602),
    "toothbrush": (200, 21, 0.0001287312814913699),
    "transistor": (400, 20, 0.00112129043027424),
    "zipper": (200, 24, 4.55246818236177e-05),
}


class UFlow(FeatureDetector):
    """U-Flow on any feature pyramid.

    Args:
        backbone: images to feature pyramid; taps on one grid are joined to one scale.
        flow_steps: couplings per stage; kernel 3 in even steps, 1 in odd ones.
        hidden: hidden channels of a coupling's network as a multiple of its input channels.
        clamp: bound of the log-scale of a coupling.
        norm: what stands in front of the flow: "none", "layer", "affine" or "position".
        shrinkage: of a position's covariance towards that of all positions (``norm="position"``).
        zero_init: start every coupling as the identity.
        epochs: passes over the training features.
        batch: images per step.
        lr: Adam's learning rate.
        weight_decay: Adam's L2 term.
        score_by: "likelihood" (the paper's map) or "density".
        base: options of every feature detector (smooth, image_score, margin).
    """

    paper: ClassVar[str] = (
        "U-Flow: A U-shaped Normalizing Flow for Anomaly Detection with Unsupervised Threshold, 2024, "
        "https://doi.org/10.1007/s10851-024-01193-y"
    )
    year: ClassVar[int] = 2024
    learns: ClassVar[str] = "one multi-scale normalizing flow"
    has_null: ClassVar[bool] = True
    fit_cost: ClassVar[str] = "O(n) per pass; memory: the feature bank"
    score_cost: ClassVar[str] = "O(1); a few convolutions per scale"
    recipes: ClassVar[dict[str, dict[str, Any]]] = {
        "fast": {},
        "paper": {
            "backbone": "cait-pair",
            "size": 448,
            "norm": "none",
            "zero_init": False,
            "epochs": 200,
            "batch": 8,
            "lr": 1e-4,
            "score_by": "likelihood",
            "smooth": 0.0,
            "image_score": "max",
            "margin": 0.0,
        },
        "tiny": {"epochs": 3, "batch": 4},
    }

    def __init__(
        self,
        backbone: Backbone,
        *,
        flow_steps: int = 4,
        hidden: float = 1.0,
        clamp: float = 2.0,
        norm: str = "position",
        shrinkage: float = 0.3,
        zero_init: bool = True,
        epochs: int = 4,
        batch: int = 16,
        lr: float = 1e-3,
        weight_decay: float = 1e-5,
        score_by: str = "density",
        **base: Any,
    ) -> None:
        super().__init__(backbone, **base)
        one_of("norm", norm, NORMS)
        one_of("score_by", score_by, SCORES)
        at_least(0, epochs=epochs)
        at_least(1, flow_steps=flow_steps, batch=batch)
        within(0, 1, shrinkage=shrinkage)
        within(0, 100, hidden=hidden)
        self.flow_steps, self.hidden, self.clamp = flow_steps, hidden, clamp
        self.norm, self.shrinkage, self.zero_init = norm, shrinkage, zero_init
        self.epochs, self.batch, self.lr, self.weight_decay = epochs, batch, lr, weight_decay
        self.score_by = score_by

    @classmethod
    def recipe_for(cls, recipe: str, class_: str | None = None) -> dict[str, Any]:
        """Return the recipe; "paper" has epochs, batch size and learning rate per MVTec class."""
        chosen = super().recipe_for(recipe, class_)
        if recipe == "paper" and class_ in PAPER_CLASSES:
            chosen["epochs"], chosen["batch"], chosen["lr"] = PAPER_CLASSES[class_]
        return chosen

    def prepare(
        self,
        channels: list[int],
        grids: list[tuple[int, int]],
        size: tuple[int, int],
        generator: torch.Generator,
    ) -> None:
        """Build the graph for these shapes."""
        self.scales = _scales(channels, grids)
        self.normalise = nn.ModuleList(normaliser(self.norm, width, grid) for width, grid, _ in self.scales)
        self.flow = u_graph(
            [(width, *grid) for width, grid, _ in self.scales],
            flow_steps=self.flow_steps,
            hidden=self.hidden,
            clamp=self.clamp,
            zero_init=self.zero_init,
            generator=generator,
        )

    def inputs(self, pyramid: list[Tensor]) -> list[Tensor]:
        """Return the flow's inputs before normalisation, finest first: taps of one grid joined, grids halving."""
        joined = []
        for _, grid, members in self.scales:
            parts = [pyramid[i] for i in members]
            # Odd input sizes give grids that do not halve exactly: those are resampled, the others left alone.
            joined.append(torch.cat([brought_to(part, grid) for part in parts], 1))
        return joined

    def latents(self, inputs: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Return latents [B, C_l, h_l, w_l], finest first, and the log-determinant [B] of everything but "affine"."""
        normalised = [layer(x) for layer, x in zip(self.normalise, inputs, strict=True)]
        z, logdet = self.flow(normalised)
        latents = list(z) if isinstance(z, tuple | list) else [z]
        return latents, logdet + sum(getattr(layer, "logdet", 0.0) for layer in self.normalise)

    def local_densities(self, inputs: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return per scale, finest first, latents and the log-determinant [B, h, w] at each position.

        The same pass as :meth:`latents`, written out, because FrEIA sums log-determinants over positions. What a
        stage does to the half that moves on to the finer scale is booked at the stage's own scale.
        """
        blocks = [node.module for node in self.flow.node_list if isinstance(node.module, AllInOneBlock)]
        normalised = [layer(x) for layer, x in zip(self.normalise, inputs, strict=True)]
        found: list[tuple[Tensor, Tensor]] = []
        h = normalised[-1]
        for stage, level in enumerate(reversed(range(len(normalised)))):
            logdet = h.new_zeros(h.shape[0], *h.shape[2:])
            layer = self.normalise[level]
            if isinstance(layer, PositionWhitening):
                logdet = logdet + layer.position_logdet()
            h, gained = coupling_pass(blocks[stage * self.flow_steps : (stage + 1) * self.flow_steps], h)
            logdet = logdet + gained
            if level:
                moving = _moving(h.shape[1])
                up, z = h[:, :moving], h[:, moving:]
                h = torch.cat([normalised[level - 1], F.pixel_shuffle(up, 2)], 1)
            else:
                z = h
            found.append((z, logdet))
        return found[::-1]

    def fit_features(
        self,
        bank: FeatureBank,
        *,
        generator: torch.Generator,
        progress: Progress | None = None,
        checkpoint: Path | None = None,
    ) -> None:
        """Whiten, then train the flow by maximum likelihood."""
        for level, layer in enumerate(self.normalise):
            if isinstance(layer, PositionWhitening):
                layer.learn((self.inputs(p)[level] for p in bank.batches(32)), self.shrinkage)
        per_epoch = max(1, len(bank) // self.batch)
        entries = sum(width * grid[0] * grid[1] for width, grid, _ in self.scales)

        def batches() -> Iterator[list[Tensor]]:
            while True:
                yield from bank.batches(
                    min(self.batch, len(bank)), shuffle=True, generator=generator, drop_last=len(bank) > self.batch
                )

        def loss(pyramid: list[Tensor]) -> Tensor:
            latents, logdet = self.latents(self.inputs(pyramid))
            energy = sum(0.5 * z.square().flatten(1).sum(1) for z in latents)
            # The original does not divide its loss. Divided with L2 term and epsilon, it gives Adam the same steps.
            return (energy - logdet).mean() / entries

        train(
            self,
            loss,
            batches(),
            steps=self.epochs * per_epoch,
            lr=self.lr,
            weight_decay=self.weight_decay / entries,
            eps=1e-8 / entries,
            schedule=lambda step: 1.0 - 0.6 * min(step, 25_000) / 25_000,
            generator=generator,
            progress=progress,
            checkpoint=checkpoint,
        )

    def score_maps(self, pyramid: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Return maps [B, H, W]: every scale brought to ``size``, mean over scales, smoothed."""
        inputs = self.inputs(pyramid)
        if self.score_by == "likelihood":
            return 1.0 + likelihood_maps(self.latents(inputs)[0], size, self.sigma(size))
        return density_maps(self.local_densities(inputs), size, self.sigma(size))

    def score_features(self, pyramid: list[Tensor]) -> Tensor:
        """Return the map on the finest grid."""
        return self.score_maps(pyramid, self.scales[0][1])

    def energy_features(self, pyramid: list[Tensor]) -> list[Energy]:
        """Return the sums of squared latents; chi-square with C degrees of freedom under the null model."""
        latents, _ = self.latents(self.inputs(pyramid))
        return [Energy(z.square().sum(1), float(z.shape[1])) for z in latents]

    def load_original(self, state: dict[str, Tensor]) -> None:
        """Load a released checkpoint of the original (keys ``model.flow.*``) into a prepared detector.

        Raises:
            InputError: names or shapes do not fit.
        """
        load_graph(self.flow, state)
        for i, layer in enumerate(self.normalise):
            prefix = f"model.feature_extractor.feature_normalizations.{i}."
            if any(key.startswith(prefix) for key in state):
                load_original(layer, state, prefix=prefix)


def _moving(channels: int) -> int:
    """Return how many channels move on to the finer scale: about half, a multiple of 4 as up-sampling needs."""
    return channels // 8 * 4


def _scales(channels: list[int], grids: list[tuple[int, int]]) -> list[tuple[int, tuple[int, int], list[int]]]:
    """Join taps of one grid; return (channels, grid, taps) finest first, every grid twice the next."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, grid in enumerate(grids):
        groups.setdefault(grid, []).append(i)
    order = sorted(groups, key=lambda g: g[0] * g[1], reverse=True)
    coarsest = order[-1]
    found = []
    for i, grid in enumerate(order):
        times = 2 ** (len(order) - 1 - i)
        width = sum(channels[k] for k in groups[grid])
        found.append((width, (coarsest[0] * times, coarsest[1] * times), groups[grid]))
    if len(found) > 1 and found[-1][0] < 8:
        raise InputError(f"the coarsest scale has {found[-1][0]} channels, U-Flow needs at least 8")
    return found


def u_graph(
    shapes: list[tuple[int, int, int]],
    *,
    flow_steps: int,
    hidden: float = 1.0,
    clamp: float = 2.0,
    zero_init: bool = False,
    generator: torch.Generator | None = None,
) -> GraphINN:
    """Return the U-shaped graph on inputs [C_l, h_l, w_l], finest first; outputs are finest first too."""
    inputs = [InputNode(*shape, name=f"input_{i}") for i, shape in enumerate(shapes)]
    nodes: list[Any] = []
    outputs: list[Any] = []
    h: Any = inputs[-1].out0
    width = shapes[-1][0]
    for level in reversed(range(len(shapes))):
        for step in range(flow_steps):
            subnet = conv_subnet(1 if step % 2 else 3, generator=generator, ratio=hidden, zero_init=zero_init)
            block = Node(
                h,
                AllInOneBlock,
                {"subnet": subnet, "clamp": clamp, "permutation": "hard", "generator": generator},
                name=f"stage_{level}_step_{step}",
            )
            nodes.append(block)
            h = block.out0
        if level:
            moving = _moving(width)
            split = Node(h, Split, {"section_sizes": [moving, width - moving], "dim": 0}, name=f"split_{level}")
            up = Node(split.out0, PixelShuffle, {}, name=f"up_{level}")
            join = Node([inputs[level - 1].out0, up.out0], Concat, {"dim": 0}, name=f"join_{level}")
            outputs.append(OutputNode(split.out1, name=f"latent_{level}"))
            nodes += [split, up, join]
            h, width = join.out0, shapes[level - 1][0] + moving // 4
    outputs.append(OutputNode(h, name="latent_0"))
    return GraphINN(inputs + nodes + outputs[::-1])


def load_graph(flow: GraphINN, state: dict[str, Tensor], prefix: str = "model.flow.module_list.") -> None:
    """Load the original's couplings into ``flow``.

    The original numbers its nodes in the order it made them, splits and joins included; ours are numbered in FrEIA's
    topological order. The couplings follow each other in both, so the n-th of one is the n-th of the other.
    """
    blocks = [module for module in flow.module_list if isinstance(module, AllInOneBlock)]
    couplings = [key for key in state if key.startswith(prefix) and key.endswith("global_scale")]
    numbers = sorted({int(key[len(prefix) :].split(".")[0]) for key in couplings})
    if len(numbers) != len(blocks):
        raise InputError(
            f"the checkpoint has {len(numbers)} couplings, this flow {len(blocks)}",
            hint="Use the checkpoint's flow_steps and backbone.",
        )
    for block, number in zip(blocks, numbers, strict=True):
        load_original(block, state, prefix=f"{prefix}{number}.")
