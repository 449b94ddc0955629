"""FeatureBank: every training image passes the backbone once; its features are then read as often as needed.

On a CPU each image passes the net alone, with one thread, several images side by side: that is how scoring
runs too, so a feature in the bank is bit for bit the feature seen at scoring. Features lie in RAM, or in
nameless files that vanish with the bank, even when the process is killed. Whatever the number of images,
building and reading a bank on disk needs RAM for a few images only.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from adflow._bytes import in_units
from adflow._clock import Progress
from adflow._extract import DTYPES, Augment, Divisible, Extraction, ImageSource, as_source, extract, finite
from adflow._files import make_folder
from adflow._rows import DiskStore, RamStore, Store, SubsetStore
from adflow._system import free_memory
from adflow.backbones import Backbone
from adflow.errors import InputError, ResourceError, UsageError, unknown

__all__ = [
    "DTYPES",
    "PART",
    "Augment",
    "Divisible",
    "FeatureBank",
    "ImageSource",
    "Mergeable",
    "Resources",
    "T",
    "as_source",
    "extract",
]

_GIB = 1 << 30
# Images whose features are learned from together, before what is known of them is merged with that of others. Part of
# the result, by the grouping of its sums: the same number wherever the work is done.
PART = 1024

T = TypeVar("T")


class Mergeable(Protocol):
    """What is known of some images, such as sums."""

    def merge(self, other: Self, /) -> None:
        """Take in what is known of further images."""
        ...


State = TypeVar("State", bound=Mergeable)


class FeatureBank:
    """The features of N rows at every level of a pyramid; a row is an image, or one of its views.

    Made by :meth:`build`, best in a ``with`` statement: closing gives RAM and disk back.

    Attributes:
        channels: channels per level.
        grids: (height, width) per level.
        size: (height, width) of the images.
        views: rows per image; row r belongs to image r // views.
        note: one line that says where the features lie and why.
        on_disk: whether they lie in files.
        first: number of its first image in the bank that this is a part of (see :meth:`parts`), else 0.
    """

    def __init__(self, stores: Sequence[Store], size: tuple[int, int], views: int, note: str, on_disk: bool) -> None:
        self._stores = list(stores)
        self.channels = [store.shape[0] for store in stores]
        self.grids = [(store.shape[1], store.shape[2]) for store in stores]
        self.size = size
        self.views = views
        self.note = note
        self.on_disk = on_disk
        self.first = 0

    @classmethod
    def build(
        cls,
        backbone: Backbone,
        images: ImageSource,
        *,
        memory: int = 4 * _GIB,
        folder: Path | None = None,
        dtype: str = "float32",
        views: int = 1,
        augment: Augment | None = None,
        generator: torch.Generator | None = None,
        workers: int | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Pass every image through ``backbone`` once per view and keep the features.

        Args:
            backbone: images to pyramid; its device does the work.
            images: see :class:`ImageSource`.
            memory: bytes of RAM the features may take; above that they go to disk.
            folder: where; None = the system's temporary folder.
            dtype: how to store them: "float32" (exact), "float16" or "bfloat16" (half the room).
            views: how many augmented views to keep of each image.
            augment: one image [1, 3, H, W] and a generator to a view of the same shape; called for every
                view.
            generator: seeds the generators that ``augment`` gets, one per row; required with ``augment``.
            workers: threads on a CPU; None = the cores of this process, at most 8. Does not change any bit.
            progress: called with (rows done, rows expected, "features").

        Raises:
            InputError: no image, images of different sizes, or features that are not finite (names the
                image).
            ResourceError: not enough room in RAM or on disk.
            UsageError: an unknown dtype, or views without a way to make them.
        """
        if dtype not in DTYPES:
            raise unknown("feature dtype", dtype, DTYPES)
        if views < 1 or (views > 1 and augment is None):
            raise UsageError(f"views is {views}, expected 1, or more together with augment")
        if augment is not None and generator is None:
            raise UsageError("augment needs a generator", hint="Pass generator=torch.Generator().manual_seed(seed).")
        rows = len(images) * views
        extraction = Extraction(backbone, augment, generator, views, workers)
        stores: list[Store] = []
        size, note, on_disk, done = (0, 0), "", False, 0
        try:
            for row, (seen, pyramid) in enumerate(extraction.together(images)):
                if not stores:
                    size = seen
                    stores, note, on_disk = _plan(pyramid, rows, memory, folder, DTYPES[dtype])
                if seen != size:
                    raise InputError(
                        f"image {row // views} is {seen[0]}x{seen[1]}, the ones before {size[0]}x{size[1]}",
                        hint="Bring all images to one size (--size).",
                    )
                for store, level in zip(stores, pyramid, strict=True):
                    store.append(finite(level, DTYPES[dtype], row // views))
                done = row + 1
                if progress:
                    progress(done, rows, "features")
            if done == 0:
                raise InputError("there is no image to take features from, expected at least 1")
            for store in stores:
                store.finish()
        except BaseException:
            for store in stores:
                store.close()
            raise
        logging.getLogger("adflow").info(note)
        return cls(stores, size, views, note, on_disk)

    def __len__(self) -> int:
        """Return the number of rows: images times views."""
        return len(self._stores[0])

    def subset(self, images: Sequence[int]) -> FeatureBank:
        """Return a bank of some images, with all their views, in the order given.

        It reads from this bank, which must stay open; features are not copied, except by :meth:`level`.
        Methods, seeds and folds can so share one pass through the backbone.

        Raises:
            InputError: there is no such image.
        """
        count = len(self) // self.views
        wrong = [image for image in images if not 0 <= image < count]
        if wrong:
            raise InputError(f"image {wrong[0]} does not exist, expected 0 to {count - 1}")
        rows = [image * self.views + view for image in images for view in range(self.views)]
        stores = [SubsetStore(store, rows) for store in self._stores]
        return FeatureBank(stores, self.size, self.views, self.note, self.on_disk)

    def parts(self, work: Callable[[FeatureBank], T]) -> Iterator[T]:
        """Yield what ``work`` makes of every :data:`PART` images, in order.

        Here that happens in this process; a bank that lies elsewhere sends ``work`` there, which so must be picklable.
        """
        for images in self._in_parts():
            part = self.subset(images)
            part.first = images.start
            yield work(part)

    def _in_parts(self) -> Iterator[range]:
        count = len(self) // self.views
        return (range(first, min(first + PART, count)) for first in range(0, count, PART))

    def merged(self, work: Callable[[FeatureBank], State]) -> State:
        """Return what ``work`` knows of all images: what it knows of every part, merged in order."""
        parts = self.parts(work)
        whole = next(parts)
        for part in parts:
            whole.merge(part)
        return whole

    def level(self, index: int) -> Tensor:
        """Return all features of one level [N, C, h, w] in the stored dtype; mapped into memory when on disk.

        Writing to it never reaches the files of a bank on disk, but does change a bank in RAM: treat it as
        read-only.
        """
        return self._stores[index].whole()

    def pyramid(self, indices: Sequence[int] | Tensor) -> list[Tensor]:
        """Return the features [n, C, h, w] float32 of the rows ``indices``, one copy per level."""
        rows = [int(i) for i in indices]
        wrong = [row for row in rows if not 0 <= row < len(self)]
        if wrong:
            raise InputError(f"row {wrong[0]} does not exist, expected 0 to {len(self) - 1}")
        return [store.rows(rows).float() for store in self._stores]

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool = False,
        generator: torch.Generator | None = None,
        drop_last: bool = False,
    ) -> Iterator[list[Tensor]]:
        """Yield pyramids [B, C, h, w] float32 over all rows, in order or shuffled by ``generator``.

        Raises:
            UsageError: ``shuffle`` without a generator, or a batch size below 1.
        """
        if batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}, expected at least 1")
        if shuffle and generator is None:
            raise UsageError("shuffle needs a generator", hint="Pass generator=torch.Generator().manual_seed(seed).")
        count = len(self)
        order = torch.randperm(count, generator=generator).tolist() if shuffle else list(range(count))
        return self._batches(order, batch_size, drop_last)

    def _batches(self, order: list[int], batch_size: int, drop_last: bool) -> Iterator[list[Tensor]]:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            if len(rows) == batch_size or not drop_last:
                yield self.pyramid(rows)

    def close(self) -> None:
        """Give RAM and disk back; the bank is empty afterwards."""
        for store in self._stores:
            store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _plan(
    pyramid: list[Tensor], rows: int, memory: int, folder: Path | None, dtype: torch.dtype
) -> tuple[list[Store], str, bool]:
    """Choose RAM or disk for ``rows`` rows like ``pyramid``; return stores, note, and whether on disk."""
    shapes = [(level.shape[1], level.shape[2], level.shape[3]) for level in pyramid]
    needed = rows * sum(c * h * w for c, h, w in shapes) * dtype.itemsize
    what = f"features of {rows} images, {in_units(needed)} as {str(dtype).removeprefix('torch.')}"
    limit = f"the limit for RAM is {in_units(memory)}"
    if needed <= memory:
        left = free_memory()
        try:
            # Half of it: methods copy parts of the features while they learn.
            if left is None or needed <= left // 2:
                note = f"{what}: kept in RAM, below the limit of {in_units(memory)}"
                return [RamStore(shape, dtype, rows) for shape in shapes], note, False
            limit = f"only {in_units(left)} of RAM are free"
        except ResourceError:
            limit = "the system gives no more RAM"
        logging.getLogger("adflow").warning(f"{what} go to disk, as {limit}; the result is the same")
    place = make_folder(Path(folder) if folder else Path(tempfile.gettempdir()))
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ResourceError(
            f"{what}: more than the {in_units(free)} free in {place}, and {limit}",
            hint="Free some space, point TMPDIR to another disk, or use --feature-dtype bfloat16 or a smaller --size.",
        )
    note = f"{what}: on disk in {place}, as {limit}"
    return [DiskStore(shape, dtype, place) for shape in shapes], note, True


@dataclass(frozen=True)
class Resources:
    """What a fit may use; never part of the configuration. Nothing but ``dtype`` changes the result.

    Attributes:
        memory: bytes the feature bank may hold in RAM before it moves to a file.
        folder: where that file goes; None = the system's temporary folder.
        dtype: storage type of features: "float32" (exact), "float16" or "bfloat16" (rounded).
        workers: images that pass the backbone at once on a CPU; None = the cores, at most 8.
        checkpoint: file for the state of an interrupted fit, or None.
        spread: makes a bank of images whose features lie elsewhere, such as on the nodes of a cluster, from a backbone,
            images, storage type and progress; None = here.
        bank: the features of the very images that are fitted on, where they have been extracted before.
    """

    memory: int = 4 << 30
    folder: Path | None = None
    dtype: str = "float32"
    workers: int | None = None
    checkpoint: Path | None = None
    spread: Callable[[Backbone, ImageSource, str, Progress | None], FeatureBank] | None = None
    bank: FeatureBank | None = None

    def build(
        self,
        backbone: Backbone,
        images: ImageSource,
        progress: Progress | None = None,
        *,
        views: int = 1,
        augment: Augment | None = None,
        generator: torch.Generator | None = None,
    ) -> FeatureBank:
        """Return the features of all images, which the caller closes; arguments as in :meth:`FeatureBank.build`.

        Views, and images that cannot be divided among processes, are made here even where ``spread`` is set.
        """
        if self.spread is not None and augment is None and isinstance(images, Divisible):
            return self.spread(backbone, images, self.dtype, progress)
        return FeatureBank.build(
            backbone,
            images,
            memory=self.memory,
            folder=self.folder,
            dtype=self.dtype,
            views=views,
            augment=augment,
            generator=generator,
            workers=self.workers,
            progress=progress,
        )
