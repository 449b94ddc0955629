"""FeatureBank: every training image passes the backbone once; its features are then read as often as needed.

On a CPU each image passes the net alone, with one thread, several images side by side: that is how scoring
runs too, so a feature in the bank is bit for bit the feature seen at scoring. Features lie in RAM, or in
nameless files that vanish with the bank, even when the process is killed. Whatever the number of images,
building and reading a bank on disk needs RAM for a few images only.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar, runtime_checkable

import torch
from torch import Tensor

from adflow import _ranks
from adflow._bytes import in_units
from adflow._files import make_folder
from adflow._rows import DiskStore, RamStore, Store, SubsetStore
from adflow._system import cores, free_memory
from adflow.backbones import Backbone
from adflow.errors import InputError, ResourceError, UsageError, unknown

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_GIB = 1 << 30
_GPU_BATCH = 16  # images per pass on a GPU
_EXCHANGED = 16  # images a process takes before features are exchanged, where several fit one detector
# Images whose features are learned from together, before what is known of them is merged with that of others. Part of
# the result, by the grouping of its sums: the same number wherever the work is done.
PART = 1024

T = TypeVar("T")
Progress = Callable[[int, int, str], object]
Augment = Callable[[Tensor, torch.Generator], Tensor]


class ImageSource(Protocol):
    """What a bank is built from: images in a fixed order; fewer may come than announced (bad files)."""

    def __len__(self) -> int:
        """Return how many images to expect."""
        ...

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Yield float32 tensors [B, 3, H, W] in [0, 1]."""
        ...


@runtime_checkable
class Divisible(ImageSource, Protocol):
    """Images that several processes can divide among themselves."""

    skipped: list[tuple[Path, str]]

    def part(self, start: int, stop: int) -> ImageSource:
        """Return the images at places ``start`` to ``stop``, those that are there."""
        ...

    def leave_out(self, skipped: Sequence[tuple[Path, str]]) -> None:
        """Take over what other processes could not read."""
        ...


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
        extraction = _Extraction(backbone, augment, generator, views, workers)
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
                    store.append(_finite(level, DTYPES[dtype], row // views))
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


def _finite(level: Tensor, dtype: torch.dtype, image: int) -> Tensor:
    """Return one level [1, C, h, w] in ``dtype``; raise InputError when it is not finite."""
    stored = level.to("cpu", dtype).contiguous()
    if bool(torch.isfinite(stored).all()):
        return stored
    if bool(torch.isfinite(level).all()):
        raise InputError(
            f"features of image {image} reach {float(level.abs().max()):.3g}, too large for {dtype}",
            hint="Store features as bfloat16 or float32.",
        )
    raise InputError(
        f"features of image {image} are not finite (NaN or infinite)",
        hint="Look at that image, and whether the weights fit the backbone.",
    )


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
    rows = list(_Extraction(backbone, None, None, 1, workers).run(images)) if len(images) else []
    levels = [
        torch.cat([_finite(level, DTYPES[dtype], first + i) for i, level in enumerate(level_rows)])
        for level_rows in zip(*(pyramid for _, pyramid in rows), strict=True)
    ]
    return (rows[0][0] if rows else (0, 0)), levels


class _Extraction:
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
        self.workers = workers or min(cores(), 8)

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
            yield from self._together(images)
            return
        rows = self._rows(images, 2 * self.workers)
        with one_thread(), ThreadPoolExecutor(self.workers, "adflow-features") as pool:
            waiting: deque[Future[tuple[tuple[int, int], list[Tensor]]]] = deque()
            try:
                for image, seed in rows:
                    waiting.append(pool.submit(self._alone, image, seed))
                    if len(waiting) >= 2 * self.workers:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

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

    def _together(self, images: ImageSource) -> Iterator[tuple[tuple[int, int], list[Tensor]]]:
        rows = self._rows(images, _GPU_BATCH)
        while group := list(islice(rows, _GPU_BATCH)):
            views = torch.cat([self._view(image, seed) for image, seed in group])
            for levels in in_halves(self._pass, views):
                for i in range(len(levels[0])):
                    yield (views.shape[2], views.shape[3]), [level[i : i + 1] for level in levels]

    def _pass(self, views: Tensor) -> list[Tensor]:
        with torch.inference_mode():
            return [level.cpu() for level in self.backbone(views.to(self.device))]


def in_halves(call: Callable[..., T], *batches: Any) -> list[T]:
    """Return ``[call(*batches)]``; where that does not fit into a GPU's memory, what it gives for parts, in order.

    Args:
        call: takes some images, and what belongs to them.
        batches: all of it, each with one row per image.
    """
    count = len(batches[0])
    try:
        return [call(*batches)]
    except torch.OutOfMemoryError:
        if count == 1:
            raise
    half = count // 2
    logging.getLogger("adflow").warning(f"{count} images at once are too many for the GPU: {half} are tried")
    parts = (slice(half), slice(half, None))
    return [found for part in parts for found in in_halves(call, *(batch[part] for batch in batches))]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Give torch one thread per operation for as long as this lasts; threads started meanwhile inherit it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
