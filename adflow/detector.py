"""What a detector is: fit on good images, score any image, one file on disk.

A method subclasses :class:`Detector`, or :class:`FeatureDetector` when it works on the features of a frozen backbone
(most do). The constructor's signature is the configuration: the same names in Python, in zoo.yaml and as
``--set name=value``. Learned tensors are registered buffers and parameters, so saving and loading need no code.
"""

from __future__ import annotations

import contextlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from adflow._clock import Progress, stage
from adflow._reduce import reduce_map
from adflow.errors import InputError, UsageError, unknown
from adflow.features import FeatureBank, ImageSource, Resources, as_source
from adflow.imaging import Box, upsample

if TYPE_CHECKING:
    from adflow.backbones import Backbone
    from adflow.calibration import Calibration

__all__ = [
    "Detector",
    "Energy",
    "FeatureDetector",
    "FeatureShapes",
    "ImageSource",
    "Progress",
    "Resources",
    "Scores",
    "as_source",
]


@dataclass
class Scores:
    """Anomaly scores of a batch; higher = more anomalous.

    Attributes:
        map: [B, H, W] float32, one score per pixel of the network input.
        image: [B] float32, one score per image.
    """

    map: Tensor
    image: Tensor


@dataclass
class Energy:
    """What the a contrario test needs: ``chi2`` is about chi-square with ``dof`` degrees where the image is normal.

    Attributes:
        chi2: [B, h, w] non-negative.
        dof: degrees of freedom, > 0.
    """

    chi2: Tensor
    dof: float


class Detector(nn.Module, ABC):
    """A method with its parameters, and after ``fit`` with what it learned.

    Class attributes tell users what the method is; ``adflow list methods`` prints them.

    Attributes:
        size: (height, width) of the network input, set by ``fit``.
        keep_aspect: whether images are letterboxed instead of stretched to ``size``.
        at_once: images that :meth:`_score` may take together on a CPU; more than 1 only where an image's bits do not
            depend on the others.
        calibration: what held-out good images taught about the scores, or None.
        provenance: where this detector comes from (data, seed, version, duration, ...).
    """

    paper: ClassVar[str] = ""
    year: ClassVar[int] = 0
    learns: ClassVar[str] = ""
    has_null: ClassVar[bool] = False
    fit_cost: ClassVar[str] = ""
    score_cost: ClassVar[str] = ""
    recipes: ClassVar[dict[str, dict[str, Any]]] = {"fast": {}}

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.size: tuple[int, int] | None = None
        self.keep_aspect = False
        self.at_once = 1
        self.calibration: Calibration | None = None
        self.provenance: dict[str, Any] = {}

    @classmethod
    def method(cls) -> str:
        """Return the name users type: the file the class lives in, or the entry point of its package."""
        for point in entry_points(group="adflow.methods"):
            if point.value == cls.__module__:
                return point.name
        return cls.__module__.rpartition(".")[2]

    @classmethod
    def parameters_of(cls) -> dict[str, Any]:
        """Return every constructor parameter with its default, base classes included."""
        found: dict[str, Any] = {}
        for owner in cls.__mro__:
            if "__init__" not in vars(owner):
                continue
            signature = inspect.signature(vars(owner)["__init__"])
            for name, parameter in signature.parameters.items():
                if name not in ("self", "backbone") and parameter.kind is not parameter.VAR_KEYWORD:
                    found.setdefault(name, parameter.default)
            if not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
                break
        return found

    @classmethod
    def recipe_for(cls, recipe: str, class_: str | None = None) -> dict[str, Any]:
        """Return the settings of ``recipe``; methods with per-class constants override this.

        Besides constructor parameters a recipe may hold "backbone", "taps", "size" and "keep_aspect".
        """
        if recipe not in cls.recipes:
            raise unknown(f"recipe of {cls.method()}", recipe, set(cls.recipes) - {"tiny"})  # that one is for tests
        return dict(cls.recipes[recipe])

    def params(self) -> dict[str, Any]:
        """Return the constructor parameters of this detector."""
        return {name: getattr(self, name) for name in self.parameters_of()}

    @abstractmethod
    def fit(
        self,
        images: ImageSource | Tensor,
        *,
        seed: int = 0,
        resources: Resources | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Learn from good images [N, 3, H, W] in [0, 1]; fitting again starts from nothing.

        Raises:
            InputError: too few images, or features that are not finite.
            TrainingError: the loss stopped being finite and could not be recovered.
        """

    @abstractmethod
    def _score(self, images: Tensor, boxes: Sequence[Box] | None) -> Scores:
        """Score [B, 3, H, W]; called with at most ``at_once`` images on a CPU."""

    def _energies(self, images: Tensor) -> list[Energy]:
        raise InputError(
            f"{self.method()} has no Gaussian null model",
            hint="Use --null calibrated (the default), which works with every method.",
        )

    @torch.inference_mode()
    def score(self, images: Tensor, boxes: Sequence[Box] | None = None) -> Scores:
        """Score images; the score of an image depends on that image alone.

        On a CPU images are scored one by one, or as many as the method says it can take without that being seen:
        convolution and matrix kernels may round differently for other batch sizes, and a verdict must not depend on
        its neighbours. On a GPU the batch goes through at once.

        Args:
            images: [B, 3, H, W] float in [0, 1].
            boxes: where each image lies inside its input (letterboxing); what is outside is left out of image scores.
        """
        self._check(images)
        if self.training:
            self.eval()
        images = images.to(self.device())
        if images.device.type != "cpu" or len(images) == 1:
            return self._score(images, boxes)
        step = self.at_once
        parts = [
            self._score(images[i : i + step], None if boxes is None else boxes[i : i + step])
            for i in range(0, len(images), step)
        ]
        return Scores(torch.cat([s.map for s in parts]), torch.cat([s.image for s in parts]))

    @torch.inference_mode()
    def energies(self, images: Tensor) -> list[Energy]:
        """Return one :class:`Energy` per scale, finest first.

        Raises:
            InputError: the method has no null model.
        """
        self._check(images)
        if self.training:
            self.eval()
        images = images.to(self.device())
        if images.device.type != "cpu" or len(images) == 1:
            return self._energies(images)
        single = [self._energies(images[i : i + 1]) for i in range(len(images))]
        return [Energy(torch.cat([s[k].chi2 for s in single]), single[0][k].dof) for k in range(len(single[0]))]

    def device(self) -> torch.device:
        """Return where the tensors of this detector live."""
        for tensor in chain(self.parameters(), self.buffers()):
            return tensor.device
        return torch.device("cpu")

    def fitted_size(self) -> tuple[int, int]:
        """Return (height, width) of the network input.

        Raises:
            InputError: the detector has not been fitted.
        """
        if self.size is None:
            raise InputError(f"this {self.method()} detector has not been fitted", hint="Call fit() first.")
        return self.size

    def _check(self, images: Tensor) -> None:
        size = self.fitted_size()
        if not images.is_floating_point():
            raise InputError(f"images are {images.dtype}, expected float in [0, 1]", hint="Divide them by 255.")
        if images.ndim != 4 or images.shape[1] != 3 or tuple(images.shape[2:]) != size:
            raise InputError(
                f"images have shape {list(images.shape)}, expected [B, 3, {size[0]}, {size[1]}]",
                hint="Resize them to the detector's size (adflow.imaging.fit_to).",
            )

    def learned(self) -> dict[str, Tensor]:
        """Return the learned tensors by name, without those of the frozen backbone."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("backbone.")}

    def train(self, mode: bool = True) -> Self:
        """Switch training mode; the backbone stays frozen in evaluation mode."""
        super().train(mode)
        self.backbone.eval()
        return self


@dataclass(frozen=True)
class FeatureShapes:
    """Shapes a method needs to create its tensors: channels and grids per tap, and the input size."""

    channels: list[int]
    grids: list[tuple[int, int]]
    size: tuple[int, int]


class FeatureDetector(Detector):
    """A detector that learns from, and scores, the features of a frozen backbone.

    A method implements :meth:`prepare`, :meth:`fit_features` and :meth:`score_features`.

    Args:
        backbone: images to feature pyramid.
        smooth: Gaussian sigma of the score map in pixels at 256 px input; grows with the input's shorter side.
            4 is the constant of PaDiM, SPADE and PatchCore, tuned there at 224-256 px.
        image_score: "max" of the map, or "top1", the mean of its highest 1 % of pixels.
        margin: share of each side that is left out of the image score. Zero padding makes the outermost cells
            react to the background's brightness: on some data sets they alone rank images.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        smooth: float = 4.0,
        image_score: str = "top1",
        margin: float = 0.03,
    ) -> None:
        super().__init__(backbone)
        if image_score not in ("max", "top1"):
            raise unknown("image_score", str(image_score), ["max", "top1"])
        if not 0 <= margin < 0.5:
            raise UsageError(f"margin is {margin}, expected a share in [0, 0.5)")
        if not 0 <= smooth <= 256:
            raise UsageError(f"smooth is {smooth}, expected a sigma of 0 to 256 pixels")
        self.smooth = smooth
        self.image_score = image_score
        self.margin = margin
        self.shapes: FeatureShapes | None = None

    @property
    def learns_from_bank(self) -> bool:
        """Return whether ``fit`` makes use of features that are there already (``Resources.bank``)."""
        return True

    @abstractmethod
    def prepare(
        self,
        channels: list[int],
        grids: list[tuple[int, int]],
        size: tuple[int, int],
        generator: torch.Generator,
    ) -> None:
        """Create every learned tensor anew; ``fit`` fills them, ``load_detector`` loads over them."""

    def allow(self, images: ImageSource, resources: Resources) -> Resources:
        """Return the resources that a fit on ``images`` may use; methods with a limit of memory override this.

        Called before any feature is taken: what cannot be kept is refused here.

        Raises:
            ResourceError: the method's limit is too low for these images.
        """
        return resources

    @abstractmethod
    def fit_features(
        self,
        bank: FeatureBank,
        *,
        generator: torch.Generator,
        progress: Progress | None = None,
        checkpoint: Path | None = None,
    ) -> None:
        """Learn from the features of all training images."""

    @abstractmethod
    def score_features(self, pyramid: list[Tensor]) -> Tensor:
        """Return one score map [B, h, w] on the finest useful grid; higher = more anomalous."""

    def score_maps(self, pyramid: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Return score maps [B, H, W]: the grid's map, bilinear to ``size``, then smoothed."""
        return upsample(self.score_features(pyramid), size, self.sigma(size))

    def score_images(self, pyramid: list[Tensor], maps: Tensor, boxes: Sequence[Box] | None) -> Tensor:
        """Return image scores [B] from the maps, by ``image_score`` and ``margin``."""
        return torch.stack(
            [reduce_map(m, self.image_score, self.margin, boxes[i] if boxes else None) for i, m in enumerate(maps)]
        )

    def energy_features(self, pyramid: list[Tensor]) -> list[Energy]:
        """Return the energies of a pyramid, finest scale first; methods with a null model override this."""
        return super()._energies(torch.empty(0))

    def sigma(self, size: tuple[int, int]) -> float:
        """Return the smoothing sigma in pixels at input ``size``."""
        return self.smooth * min(size) / 256

    def fit(
        self,
        images: ImageSource | Tensor,
        *,
        seed: int = 0,
        resources: Resources | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Pass every image through the backbone once, then learn from the features."""
        source = as_source(images)
        resources = self.allow(source, resources or Resources())
        if resources.bank is not None:
            return self.fit_bank(resources.bank, seed=seed, progress=progress, checkpoint=resources.checkpoint)
        with resources.build(self.backbone, source, progress) as bank:
            return self.fit_bank(bank, seed=seed, progress=progress, checkpoint=resources.checkpoint)

    def fit_bank(
        self,
        bank: FeatureBank,
        *,
        seed: int = 0,
        progress: Progress | None = None,
        checkpoint: Path | None = None,
    ) -> Self:
        """Learn from features that are already there; methods and seeds can share one bank."""
        self.calibration = None
        self.train()
        with self._created(FeatureShapes(list(bank.channels), list(bank.grids), bank.size), seed) as generator:
            self.fit_features(bank, generator=generator, progress=progress, checkpoint=checkpoint)
        self.eval()
        self._settle()
        return self

    def _settle(self) -> None:
        """Freeze what was learned, laid out as a file would give it back.

        A transposed view and its contiguous copy take different matrix kernels, which round differently: scores must
        be the same bits before and after saving.
        """
        self.requires_grad_(False)
        for owner in self.modules():
            for name, buffer in owner.named_buffers(recurse=False):
                if not buffer.is_contiguous():
                    setattr(owner, name, buffer.contiguous())

    def empty(self, shapes: FeatureShapes) -> Self:
        """Create every learned tensor with nothing learned, for a file or a checkpoint to be loaded over."""
        with self._created(shapes, 0):
            pass
        self.requires_grad_(False)
        return self.eval()

    @contextlib.contextmanager
    def _created(self, shapes: FeatureShapes, seed: int) -> Iterator[torch.Generator]:
        """Create the learned tensors; inside, all random numbers are those of ``seed``."""
        self.shapes, self.size = shapes, shapes.size
        generator = torch.Generator().manual_seed(seed)
        # FrEIA and torch.nn draw initial weights from the global generator: seed a private copy of it.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.prepare(shapes.channels, shapes.grids, shapes.size, generator)
            yield generator

    def _score(self, images: Tensor, boxes: Sequence[Box] | None) -> Scores:
        if images.device.type == "cpu" and len(images) > 1:
            pyramids = [self.backbone(one) for one in torch.split(images, 1)]
            pyramid = [torch.cat(levels) for levels in zip(*pyramids, strict=True)]
        else:
            pyramid = self.backbone(images)
        maps = self.score_maps(pyramid, (images.shape[2], images.shape[3]))
        with stage("image score"):
            return Scores(maps, self.score_images(pyramid, maps, boxes))

    def _energies(self, images: Tensor) -> list[Energy]:
        return self.energy_features(self.backbone(images))
