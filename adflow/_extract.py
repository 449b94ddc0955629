"""Images to features: each passes the backbone alone on a CPU, in batches on a GPU, in order everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from adflow import _ranks
from adflow._threads import T, default_workers, in_halves, one_thread, ordered
from adflow.backbones import Backbone
from adflow.errors import InputError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_GPU_BATCH = 16  # images per pass on a GPU
_EXCHANGED = 16  # images a process takes before features are exchanged, where several fit one detector

Augment = Callable[[Tensor, torch.Generator], Tensor]


class ImageSource(Protocol):
    """What ``fit`` reads: images in a fixed order, as often as it wants (see :class:`adflow.data.Images`).

    Fewer may come than announced (bad files).
    """

    def __len__(self) -> int:
        """Return how many images to expect."""
        ...

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Yield float32 tensors [B, 3, H, W] in [0, 1]."""
        ...


@runtime_checkable
class Divisible(ImageSource, Protocol):
    """Images that several processes or threads can divide among themselves."""

    skipped: list[tuple[Path, str]]

    def each(self, work: Callable[[Tensor], T], workers: int) -> Iterator[T]:
        """Yield what ``work`` makes of every image [1, 3, H, W], in order; so many at once."""
        ...

    def part(self, start: int, stop: int) -> ImageSource:
        """Return the images at places ``start`` to ``stop``, those that are there."""
        ...

    def leave_out(self, skipped: Sequence[tuple[Path, str]]) -> None:
        """Take over what other processes could not read."""
        ...


class _TensorImages:
    """A tensor of images as an :class:`ImageSource`."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        yield from torch.split(self.images, batch_size)


def as_source(images: ImageSource | Tensor) -> ImageSource:
    """Return what a fit reads its images from, a tensor [N, 3, H, W] among them.

    Raises:
        InputError: there is no image.
    """
    source = _TensorImages(images) if isinstance(images, Tensor) else images
    if len(source) == 0:
        raise InputError("there is no image to fit on, expected at least 1")
    return source


def finite(level: Tensor, dtype: torch.dtype, image: int) -> Tensor:
    """Return one level [1, C, h, w] in ``dtype``; raise InputError when it is not finite."""
    stored = level.to("cpu", dtype).contiguous()
    if _all_finite(stored):
        return stored
    if _all_finite(level):
        raise InputError(
            f"features of image {image} reach {float(level.abs().max()):.3g}, too large for {dtype}",
            hint="Store features as float32 or bfloat16 (--feature-dtype).",
        )
    raise InputError(
        f"features of image {image} are not finite (NaN or infinite)",
        hint="Look at that image, and whether the weights fit the backbone.",
    )


def _all_finite(level: Tensor) -> bool:
    low, high = torch.aminmax(level)  # one pass; NaN comes through
    return math.isfinite(low) and math.isfinite(high)


def extract(
    backbone: Backbone, images: ImageSource, *, dtype: str = "float32", workers: int | None = None, first: int = 0
) -> tuple[tuple[int, int], list[Tensor]]:
    """Return the size of some images and their features [n, C, h, w], a tensor per level; none of no readable image.

    Args:
        backbone: as in :meth:`FeatureBank.build`, of which this is one piece.
        images: likewise.
        dtype: likewise.
        workers: likewise.
        first: number of the first image, for messages.
    """
    rows = list(Extraction(backbone, None, None, 1, workers).run(images)) if len(images) else []
    levels = [
        torch.cat([finite(level, DTYPES[dtype], first + i) for i, level in enumerate(level_rows)])
        for level_rows in zip(*(pyramid for _, pyramid in rows), strict=True)
    ]
    return (rows[0][0] if rows else (0, 0)), levels


class Extraction:
    """Passes images through the backbone; yields (image size, pyramid of one row) in order."""

    def __init__(
        self,
        backbone: Backbone,
        augment: Augment | None,
        generator: torch.Generator | None,
        views: int,
        workers: int | None,
    ) -> None:
        self.backbone = backbone
        self.augment, self.generator, self.views = augment, generator, views
        self.device = next(backbone.buffers()).device
        self.workers = workers or default_workers()

    def together(self, images: ImageSource) -> Iterator[tuple[tuple[int, int], list[Tensor]]]:
        """As :meth:`run`; of several processes each takes some images, and all get all rows."""
        world, rank = _ranks.world(), _ranks.rank()
        if world == 1 or self.augment is not None or not isinstance(images, Divisible):
            yield from self.run(images)
            return
        for start in range(0, len(images), _EXCHANGED * world):
            mine = images.part(start + rank * _EXCHANGED, start + (rank + 1) * _EXCHANGED)
            rows = list(self.run(mine)) if len(mine) else []
            sizes = [size for size in _ranks.gathered([size for size, _ in rows]) for size in size]
            yield from zip(sizes, _ranks.all_rows([row for _, row in rows]), strict=True)
        images.leave_out([path for part in _ranks.gathered(images.skipped) for path in part])

    def run(self, images: ImageSource) -> Iterator[tuple[tuple[int, int], list[Tensor]]]:
        """Yield (image size, pyramid of one row) in order."""
        if self.device.type != "cpu":
            yield from self._in_batches(images)
            return
        with one_thread():
            if self.augment is None and isinstance(images, Divisible):
                # One thread takes an image from its file to its features: none waits for another.
                yield from images.each(lambda image: self._alone(image, 0), self.workers)
                return
            rows = self._rows(images, 2 * self.workers)
            with ThreadPoolExecutor(self.workers, "adflow-features") as pool:
                yield from ordered(pool, lambda row: self._alone(*row), rows, ahead=2 * self.workers)

    def _rows(self, images: ImageSource, batch_size: int) -> Iterator[tuple[Tensor, int]]:
        """Yield every image [1, 3, H, W] once per view, with the seed of that view."""
        for batch in images.batches(batch_size):
            for image in batch.unsqueeze(1):  # [1, 3, H, W]
                for _ in range(self.views):
                    yield image, self._draw()

    def _draw(self) -> int:
        if self.generator is None:
            return 0
        return int(torch.randint(2**62, (), generator=self.generator))

    def _view(self, image: Tensor, seed: int) -> Tensor:
        if self.augment is None:
            return image
        return self.augment(image, torch.Generator().manual_seed(seed))

    def _alone(self, image: Tensor, seed: int) -> tuple[tuple[int, int], list[Tensor]]:
        with torch.inference_mode():
            view = self._view(image, seed)
            return (view.shape[2], view.shape[3]), self.backbone(view)

    def _in_batches(self, images: ImageSource) -> Iterator[tuple[tuple[int, int], list[Tensor]]]:
        rows = self._rows(images, _GPU_BATCH)
        while group := list(islice(rows, _GPU_BATCH)):
            views = torch.cat([self._view(image, seed) for image, seed in group])
            for levels in in_halves(self._pass, views):
                for i in range(len(levels[0])):
                    yield (views.shape[2], views.shape[3]), [level[i : i + 1] for level in levels]

    def _pass(self, views: Tensor) -> list[Tensor]:
        with torch.inference_mode():
            return [level.cpu() for level in self.backbone(views.to(self.device))]
