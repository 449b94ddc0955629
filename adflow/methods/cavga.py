"""CAVGA: an autoencoder whose attention is made to cover good images; where it does not look is anomalous.

Source: S. Venkataramanan, K.-C. Peng, R. V. Singh, A. Mahalanobis, Attention Guided Anomaly Localization in Images,
ECCV 2020, https://arxiv.org/abs/1911.08616. There is no official code.

**re-interpretation.** The paper's text leaves out what a program needs: size, optimiser, epochs, augmentation, width
of the latent, the layer and the formula of the attention. All of these are OUR reading; figures of this method are
ours, not the paper's.

The unsupervised variant: a convolutional variational autoencoder with a spatial latent z [C, h, w], a discriminator of
images and rebuilt images, and an attention map A by Grad-CAM from z. Loss on good images (section 3.1)::

    L = w_r (reconstruction + KL) + w_adv L_adv + w_ae mean(1 - A)        w_r = w_adv = 1, w_ae = 0.01

Attention, our reading: a_k = mean over cells of d(sum of mu) / dF_k, F the encoder's last map; A = ReLU(sum_k a_k F_k)
divided by its maximum, or by the largest that training images gave at scoring, so that a defect cannot raise the
rest. The map is 1 - A, joined to the error |x - x'| that the paper's image score is made of: "attention" is the map
of the paper, "error" that of the autoencoder, "both" the sum of the two in deviations of the training images.
Higher = more anomalous.

The attention is a gradient, and its part of the loss would need second derivatives; with mu a 1x1 convolution of F it
has a closed form (:func:`attention_map`). Discriminator and autoencoder are trained in turn by one loop: in odd steps
only the one gets gradients, in even ones only the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adflow.detector import (
    FeatureDetector,
    FeatureShapes,
    ImageSource,
    Progress,
    Resources,
    Scores,
    _TensorImages,
)
from adflow.errors import InputError, UsageError, unknown
from adflow.imaging import Box, upsample
from adflow.methods._train import train

if TYPE_CHECKING:
    from adflow.backbones import Backbone
    from adflow.features import FeatureBank


class CAVGA(FeatureDetector):
    """What an attentive autoencoder does not look at or cannot rebuild. Settings are our re-interpretation.

    Args:
        backbone: not used.
        side: images are brought to a shorter side of so many pixels; 0 = as they come.
        depth: halvings of the image up to the latent.
        width: channels of the first layer; they double with every halving, up to 8 times.
        latent: channels of z.
        show: "attention" (1 - A, the paper's map), "error" or "both".
        attention: weight of the loss mean(1 - A).
        adversarial: weight of the adversarial loss; 0 = no discriminator.
        kl: weight of the divergence of z from N(0, I), per number of the image.
        steps: optimiser steps, those of the discriminator included.
        batch: images a step.
        lr: Adam's learning rate.
        base: options of every feature detector (smooth, image_score, margin).
    """

    paper: ClassVar[str] = (
        "Attention Guided Anomaly Localization in Images, https://arxiv.org/abs/1911.08616 (re-interpretation: "
        "settings are ours, the paper leaves them out)"
    )
    year: ClassVar[int] = 2020
    learns: ClassVar[str] = "an autoencoder whose attention covers good images (settings: our re-interpretation)"
    has_null: ClassVar[bool] = False
    fit_cost: ClassVar[str] = "time O(steps), memory: the images at the net's size"
    score_cost: ClassVar[str] = "one pass through a small net"
    recipes: ClassVar[dict[str, dict[str, Any]]] = {
        "fast": {"backbone": "lite0", "size": 256},
        "paper": {
            "backbone": "lite0",
            "size": 256,
            "side": 0,
            "depth": 4,
            "width": 64,
            "latent": 128,
            "show": "attention",
            "attention": 0.01,
            "adversarial": 1.0,
            "kl": 1.0,
            "steps": 2 * 150 * 20,
            "lr": 1e-4,
            "margin": 0.0,
        },
        "tiny": {"side": 0, "depth": 3, "width": 4, "latent": 8, "steps": 20, "batch": 4, "adversarial": 0.1},
    }

    level_: Tensor
    spread_: Tensor
    largest_: Tensor

    def __init__(
        self,
        backbone: Backbone,
        *,
        side: int = 96,
        depth: int = 4,
        width: int = 16,
        latent: int = 32,
        show: str = "both",
        attention: float = 0.01,
        adversarial: float = 0.0,
        kl: float = 1e-3,
        steps: int = 600,
        batch: int = 16,
        lr: float = 1e-3,
        **base: Any,
    ) -> None:
        super().__init__(backbone, **base)
        if show not in ("attention", "error", "both"):
            raise unknown("show", show, ["attention", "error", "both"])
        for name, number, lowest in (
            ("side", side, 0), ("depth", depth, 1), ("width", width, 1), ("latent", latent, 1), ("steps", steps, 0),
            ("batch", batch, 1), ("attention", attention, 0), ("adversarial", adversarial, 0), ("kl", kl, 0),
        ):  # fmt: skip
            if number < lowest:
                raise UsageError(f"{name} is {number}, expected at least {lowest}")
        self.side, self.depth, self.width, self.latent, self.show = side, depth, width, latent, show
        self.attention, self.adversarial, self.kl = attention, adversarial, kl
        self.steps, self.batch, self.lr = steps, batch, lr

    def prepare(
        self,
        channels: list[int],
        grids: list[tuple[int, int]],
        size: tuple[int, int],
        generator: torch.Generator,
    ) -> None:
        """Create autoencoder, discriminator and the statistics of maps."""
        scale = self.side / min(size) if self.side else 1.0
        step = 2**self.depth
        # The nearest size that halves exactly.
        self.seen = (max(1, round(size[0] * scale / step)) * step, max(1, round(size[1] * scale / step)) * step)
        self.encoder = _encoder(self.depth, self.width)
        last = self.width * min(8, 2 ** (self.depth - 1))
        self.to_mean, self.to_log_variance = nn.Conv2d(last, self.latent, 1), nn.Conv2d(last, self.latent, 1)
        self.decoder = _decoder(self.depth, self.width, self.latent)
        narrow = max(1, self.width // 2)
        verdict = nn.Conv2d(narrow * min(8, 2 ** (self.depth - 1)), 1, 1)
        self.judge = nn.Sequential(_encoder(self.depth, narrow), verdict) if self.adversarial else None
        self.register_buffer("largest_", torch.ones(()))
        for name in ("level_", "spread_"):
            self.register_buffer(name, torch.ones(2, *self.seen))

    # --- fit ------------------------------------------------------------------------------------------------

    def fit(
        self,
        images: ImageSource | Tensor,
        *,
        seed: int = 0,
        resources: Resources | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Learn from the pixels; the backbone and a bank of its features are not used."""
        source = _TensorImages(images) if isinstance(images, Tensor) else images
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pixels: list[Tensor] = []
            for batch in source.batches(16):
                if not pixels:
                    size = (batch.shape[2], batch.shape[3])
                    self._prepare(FeatureShapes([], [], size), generator)
                    self.prepare([], [], size, generator)
                pixels += list((self._shrink(batch) * 255).round().to(torch.uint8))
            if not pixels:
                raise InputError("there is no image to fit on, expected at least 1")
            self.train()
            self._learn(torch.stack(pixels), generator, progress, resources.checkpoint if resources else None)
        self.eval()
        self._settle()
        return self

    def fit_features(
        self,
        bank: FeatureBank,
        *,
        generator: torch.Generator,
        progress: Progress | None = None,
        checkpoint: Path | None = None,
    ) -> None:
        """Refuse: features of a backbone are not what this method learns from.

        Raises:
            InputError: always.
        """
        raise InputError("CAVGA learns from images, found features only", hint="Call fit() with the images.")

    def _shrink(self, images: Tensor) -> Tensor:
        """Return images [B, 3, *seen]."""
        if tuple(images.shape[2:]) == self.seen:
            return images
        return F.interpolate(images, self.seen, mode="bilinear", align_corners=False, antialias=True).clamp(0, 1)

    def _learn(
        self, pixels: Tensor, generator: torch.Generator, progress: Progress | None, checkpoint: Path | None
    ) -> None:
        cells = (self.seen[0] >> self.depth, self.seen[1] >> self.depth)

        def batches() -> Iterator[tuple[Tensor, Tensor, bool]]:
            judging = False
            while True:
                rows = torch.randint(len(pixels), (min(self.batch, len(pixels)),), generator=generator)
                noise = torch.randn(len(rows), self.latent, *cells, generator=generator)
                yield pixels[rows].float() / 255, noise, judging
                judging = self.judge is not None and not judging

        train(
            self,
            lambda batch: self._loss(*batch),
            batches(),
            steps=self.steps,
            lr=self.lr,
            betas=(0.5, 0.999),
            clip=1.0,
            generator=generator,
            progress=progress,
            checkpoint=checkpoint,
        )
        self._learn_scale(pixels)

    def _loss(self, images: Tensor, noise: Tensor, judging: bool) -> Tensor:
        """Return the loss of one step: the discriminator's, or the autoencoder's."""
        features = self.encoder(images)
        mean, log_variance = self.to_mean(features), self.to_log_variance(features).clamp(-10, 10)
        rebuilt = self.decoder(mean + noise * (0.5 * log_variance).exp())
        if judging and self.judge is not None:
            real, made = self.judge(images), self.judge(rebuilt.detach())
            return F.softplus(-real).mean() + F.softplus(made).mean()
        loss = F.mse_loss(rebuilt, images) * 10
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum() / images.numel()
        loss = loss + self.kl * divergence
        if self.adversarial and self.judge is not None:
            # The discriminator's weights get no gradient from here: only its inputs matter.
            frozen = {name: p.detach() for name, p in self.judge.named_parameters()}
            verdict = torch.func.functional_call(self.judge, frozen, (rebuilt,))
            loss = loss + self.adversarial * F.softplus(-verdict).mean()
        if self.attention:
            shown = attention_map(features, self.to_mean)
            # Divided by its own maximum here, as no other scale is known yet.
            top = shown.flatten(1).amax(1).clamp(min=1e-6)[:, None, None]
            loss = loss + self.attention * (1 - shown / top).mean()
        total: Tensor = loss
        return total

    @torch.no_grad()
    def _learn_scale(self, pixels: Tensor) -> None:
        """Learn the largest attention, and mean and deviation of both maps at every pixel."""
        nn.Module.train(self, False)
        attention = [self._raw(image[None].float() / 255) for image in pixels]
        # The mean of maxima, not their maximum: one odd training image must not decide.
        self.largest_.copy_(torch.stack([a.amax() for a, _ in attention]).mean().clamp(min=1e-6))
        for k in range(2):
            maps = torch.stack([self._kinds(*pair)[k][0] for pair in attention]).double()
            self.level_[k] = maps.mean(0)
            spread = maps.std(0, unbiased=False)
            # A pixel that never changed in training is as sure as the typical one, no more.
            self.spread_[k] = spread + 0.5 * spread.mean() + 1e-6

    # --- score ----------------------------------------------------------------------------------------------

    def _raw(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return attention [1, h, w] before division, and the error |x - x'| [1, *seen] of one image."""
        features = self.encoder(images)
        error = (self.decoder(self.to_mean(features)) - images).abs().mean(1)
        return attention_map(features, self.to_mean), error

    def _kinds(self, attention: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        """Return 1 - A and the error, both [1, *seen]."""
        shown = upsample(attention / self.largest_, self.seen, 0.0).clamp(0, 1)
        return 1 - shown, error

    def score_features(self, pyramid: list[Tensor]) -> Tensor:
        """Return the map [B, *seen] of images [B, 3, H, W], the only level of ``pyramid``."""
        found = []
        for image in self._shrink(pyramid[0]):
            kinds = torch.cat(self._kinds(*self._raw(image[None])))
            if self.show == "attention":
                found.append(kinds[0])
                continue
            apart = (kinds - self.level_) / self.spread_
            found.append(apart[1] if self.show == "error" else apart.sum(0))
        return torch.stack(found)

    def _score(self, images: Tensor, boxes: Sequence[Box] | None) -> Scores:
        size = (images.shape[2], images.shape[3])
        maps = upsample(self.score_features([images]), size, self.sigma(size))
        return Scores(maps, self.score_images([], maps, boxes))


def attention_map(features: Tensor, to_mean: nn.Conv2d) -> Tensor:
    """Return ReLU(sum_k a_k F_k) [B, h, w], a_k the mean gradient of the sum of mu in channel k (Grad-CAM).

    mu is a 1x1 convolution of F, so that gradient is the sum of its weights, the same in every cell: no gradient has
    to be computed, in training no second one, and scoring needs no graph.
    """
    weight = to_mean.weight.sum(0)[None]  # [1, K, 1, 1]
    return (weight * features).sum(1).relu()


def _encoder(depth: int, width: int) -> nn.Sequential:
    """Return ``depth`` halving convolutions, 3 channels to width 2^(depth - 1), at most 8 width."""
    layers: list[nn.Module] = []
    inputs = 3
    for i in range(depth):
        outputs = width * min(8, 2**i)
        layers += [nn.Conv2d(inputs, outputs, 4, 2, 1), nn.GroupNorm(1, outputs), nn.LeakyReLU(0.2)]
        inputs = outputs
    return nn.Sequential(*layers)


def _decoder(depth: int, width: int, latent: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    inputs = latent
    for i in reversed(range(depth)):
        outputs = width * min(8, 2 ** max(0, i - 1)) if i else 3
        layers.append(nn.ConvTranspose2d(inputs, outputs, 4, 2, 1))
        layers += [nn.GroupNorm(1, outputs), nn.LeakyReLU(0.2)] if i else [nn.Sigmoid()]
        inputs = outputs
    return nn.Sequential(*layers)
