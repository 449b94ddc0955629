"""Data sets: which images there are, what is known of each, and batches of them.

A data set is a folder in one of the layouts of this package. Each layout is a module with three functions, whose
head shows the folders::

    matches(folder: Path) -> bool                  # a class folder, or a folder of such
    classes(folder: Path) -> list[str]             # [folder.name] for a class folder
    read(folder: Path, class_: str) -> Dataset
    prepare(folder: Path, classes: list[str] | None, progress) -> list[str]    # if there: once, after a download

A new module in this package is found without any registration; ``folder`` takes what no other layout
claims. Labels come from the structure of folders below the one that was named, never from a word somewhere
in the path.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pkgutil
import textwrap
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, overload

import numpy as np

from adflow._files import expanded
from adflow._system import cores
from adflow._threads import T, ordered
from adflow._video import is_frame
from adflow.data._scan import list_images
from adflow.errors import InputError, UnavailableError, UsageError, unknown
from adflow.imaging import Box, Size, fit_to, read_image, show
from adflow.zoo import home

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Chosen", "Dataset", "Frame", "Images", "Sample", "layouts", "list_images", "open_data"]

# Names that the archives of the data sets unpack to.
_ALIASES = {
    "mvtec": ("mvtec_anomaly_detection", "mvtec_ad", "mvtec-ad", "MVTec"),
    "btad": ("BTech_Dataset_transformed", "BTAD"),
    "stc": ("shanghaitech", "ShanghaiTech"),
    "lgg-mri": ("lgg-mri-segmentation", "kaggle_3m", "lgg_mri"),
}


@dataclass(frozen=True, slots=True)
class Sample:
    """One image and what is known of it.

    Attributes:
        image: the file.
        split: "train" or "test".
        label: 0 good, 1 defective, None unknown.
        defect: name of the kind of defect; None for good or unknown.
        mask: file of the ground truth, where there is one.
        mask_index: frame of ``mask`` when that is an array [T, H, W].
    """

    image: Path
    split: str
    label: int | None
    defect: str | None
    mask: Path | None
    mask_index: int | None = None


class Chosen(Sequence[Sample]):
    """Some samples of a sequence, made when they are asked for: 8 bytes each, however many there are."""

    def __init__(self, samples: Sequence[Sample], places: Sequence[int] | np.ndarray[Any, Any]) -> None:
        self._samples = samples
        self._places = np.asarray(places, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Chosen: ...
    def __getitem__(self, index: int | slice) -> Sample | Chosen:
        """Return the sample at ``index``, or some of the chosen ones."""
        if isinstance(index, slice):
            return Chosen(self._samples, self._places[index])
        return self._samples[int(self._places[index])]


@dataclass(frozen=True)
class Dataset:
    """One class of a data set.

    Attributes:
        name: what a user types, such as "mvtec/screw"; for a folder its own name.
        family: "mvtec", "demo", ..., or "folder" for a user's own images.
        class_: "screw".
        root: the folder it was read from.
        train: good images to fit on, sorted by defect and name.
        test: images to evaluate on, sorted likewise; may be empty.
        notes: what the user should know: splits that were made, things left out.
    """

    name: str
    family: str
    class_: str
    root: Path
    train: Sequence[Sample]
    test: Sequence[Sample]
    notes: list[str] = field(default_factory=list)

    def fingerprint(self) -> str:
        """Return the sha256 over split, relative name and byte count of every image and mask.

        It tells whether two runs saw the same files; an edit that keeps names and sizes is not noticed.
        """
        lines: set[bytes] = set()
        for sample in (*self.train, *self.test):
            for kind, path in (("image", sample.image), ("mask", sample.mask)):
                if path is not None:
                    relative = Path(os.path.relpath(path, self.root)).as_posix()
                    file = path.parent if is_frame(path) else path
                    size = file.stat().st_size if file.exists() else -1
                    lines.add(f"{sample.split}\0{kind}\0{size}\0".encode() + os.fsencode(relative))
        return hashlib.sha256(b"\n".join(sorted(lines))).hexdigest()


class Layout(Protocol):
    """What a layout module offers."""

    def matches(self, folder: Path) -> bool: ...
    def classes(self, folder: Path) -> list[str]: ...
    def read(self, folder: Path, class_: str) -> Dataset: ...


def open_data(spec: str | Path, *, root: Path | None = None) -> list[Dataset]:
    """Find a data set by name or folder; one :class:`Dataset` per class, sorted.

    A path that exists is taken as it is. ``demo`` and ``demo/brick`` are made on first use. Other names
    (``mvtec``, ``mvtec/cable``) are looked for in ``root``, in the folder that ``ADFLOW_DATA`` names, and
    in the cache, where ``adflow download`` puts them.

    Args:
        spec: "mvtec/cable", "mvtec" (every class that is present), "demo/brick", or a folder.
        root: folder that holds data sets.

    Raises:
        UsageError: no such name.
        UnavailableError: a known data set that is not on this machine.
        InputError: a folder that is missing, empty, or whose structure contradicts itself.
    """
    if spec == "":  # as a path it would be the current folder
        raise unknown("data set", spec, families())
    path = expanded(spec)
    if path.exists():
        # Made absolute by text: a link keeps the name that the user sees.
        return _read_all(Path(os.path.normpath(path.absolute())))
    if isinstance(spec, Path):
        raise InputError(f"there is no folder {show(spec)}")
    family, _, class_ = spec.strip().rstrip("/").partition("/")
    if family == "demo":
        from adflow.data import demo

        return [demo.open_texture(texture) for texture in ([class_] if class_ else demo.TEXTURES)]
    if family not in families() or "/" in class_:
        if "/" in spec or "\\" in spec or path.suffix:
            raise InputError(f"there is no folder {show(spec)}, and no data set of that name")
        raise unknown("data set", spec, families())
    bases = [root] if root else []
    bases += [expanded(value) for value in [os.environ.get("ADFLOW_DATA")] if value]
    bases.append(home() / "data")
    for base in bases:
        found = _find(base, family, class_)
        if found:
            return [dataclasses.replace(one, family=family, name=f"{family}/{one.class_}") for one in found]
    raise UnavailableError(
        f"data set {spec} is not here; looked in {', '.join(show(base) for base in bases)}",
        hint=f"Run `adflow download {spec}`, or name its folder: --data-root FOLDER, or ADFLOW_DATA=FOLDER.",
    )


def families() -> list[str]:
    """Return the names of data sets that :func:`open_data` knows, sorted."""
    return sorted(["demo", *(name.replace("_", "-") for name in _layout_names() if name != "folder")])


def layouts() -> dict[str, str]:
    """Return the folders of every layout as the head of its module shows them, by name."""
    found = {}
    for name in _layout_names():
        drawn = (_layout(name).__doc__ or "").partition("::\n\n")[2]
        lines = takewhile(lambda line: not line or line.startswith(" "), drawn.splitlines())
        found[name.replace("_", "-")] = textwrap.dedent("\n".join(lines)).strip("\n")
    return found


@dataclass(frozen=True, slots=True)
class Frame:
    """One image as the network sees it.

    Attributes:
        index: place in the list it came from.
        path: the file.
        array: [3, H, W] float32 in [0, 1].
        box: where the image itself lies inside ``array``.
        original: (height, width) of the image as read.
    """

    index: int
    path: Path
    array: np.ndarray[Any, np.dtype[np.float32]]
    box: Box
    original: Size


class Images:
    """Images brought to one size, read in the background, handed out in the order they were given.

    At most a few images per worker are decoded ahead, whatever the length of the list. A file that cannot
    be read is left out and recorded in ``skipped``; later passes do not try it again.

    Args:
        items: samples or paths.
        size: (height, width) of the network input.
        keep_aspect: letterbox instead of stretching; see :func:`adflow.imaging.fit_to`.
        strict: raise at the first file that cannot be read.
        workers: decoding threads; None = the cores of this process, at most 4; 0 = decode where it is asked
            for.

    Attributes:
        skipped: (path, reason) of every file that could not be read.
    """

    def __init__(
        self,
        items: Sequence[Sample | Path | str],
        size: Size,
        keep_aspect: bool = False,
        strict: bool = False,
        workers: int | None = None,
    ) -> None:
        self.items = items
        self.size = size
        self.keep_aspect = keep_aspect
        self.strict = strict
        self.workers = min(4, cores()) if workers is None else workers
        self.skipped: list[tuple[Path, str]] = []
        self._bad: set[int] = set()
        self._whole = True

    def path(self, index: int) -> Path:
        """Return the file at a place in the list."""
        item = self.items[index]
        return item.image if isinstance(item, Sample) else Path(item)

    def part(self, start: int, stop: int) -> Images:
        """Return the readable images at places ``start`` to ``stop``; those that prove unreadable are recorded here."""
        items = self.items[start:stop]
        if self._bad:
            items = [self.items[i] for i in self._readable()[start:stop]]
        found = Images(items, self.size, self.keep_aspect, self.strict, self.workers)
        found.skipped, found._whole = self.skipped, False
        return found

    def _readable(self) -> list[int]:
        return [index for index in range(len(self.items)) if index not in self._bad]

    def leave_out(self, skipped: Sequence[tuple[Path, str]]) -> None:
        """Record files that could not be read elsewhere."""
        self.skipped[:] = sorted(skipped)
        paths = {path for path, _ in skipped}
        self._bad |= {index for index in range(len(self.items)) if self.path(index) in paths} if paths else set()

    def __len__(self) -> int:
        """Return how many images there are, without those found unreadable so far."""
        return len(self.items) - len(self._bad)

    def frames(self) -> Iterator[Frame]:
        """Yield every readable image in order.

        Raises:
            InputError: a file cannot be read and ``strict`` is set, or none of them can be read.
        """
        return self._each(lambda frame: frame, self.workers)

    def each(self, work: Callable[[Tensor], T], workers: int) -> Iterator[T]:
        """Yield what ``work`` makes of every readable image [1, 3, H, W], in order; it runs where the image is decoded.

        Raises:
            InputError: as :meth:`frames`.
        """
        import torch

        return self._each(lambda frame: work(torch.from_numpy(frame.array).unsqueeze(0)), workers)

    def _each(self, work: Callable[[Frame], T], workers: int) -> Iterator[T]:
        def from_file(index: int) -> T | InputError:
            frame = self._decode(index)
            return frame if isinstance(frame, InputError) else work(frame)

        wanted = self._readable()
        count = 0
        for index, found in zip(wanted, _side_by_side(from_file, wanted, workers), strict=True):
            if not isinstance(found, InputError):
                count += 1
                yield found
                continue
            if self.strict:
                raise found
            self._bad.add(index)
            path = self.path(index)
            self.skipped.append((path, _reason(found, path)))
        if count == 0 and len(self.items) and self._whole:
            path, reason = self.skipped[0]
            raise InputError(f"none of {len(self.items)} images could be read; the first, {show(path)}: {reason}")

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Yield float32 tensors [B, 3, H, W] in [0, 1] in file order; only the last may be smaller.

        Raises:
            InputError: as :meth:`frames`.
        """
        import torch

        if batch_size < 1:
            raise UsageError(f"batch size {batch_size}: expected at least 1")
        batch: list[np.ndarray[Any, np.dtype[np.float32]]] = []
        for frame in self.frames():
            batch.append(frame.array)
            if len(batch) == batch_size:
                yield torch.from_numpy(np.stack(batch))  # [B, 3, H, W]
                batch.clear()
        if batch:
            yield torch.from_numpy(np.stack(batch))

    def _decode(self, index: int) -> Frame | InputError:
        path = self.path(index)
        try:
            picture = read_image(path)
        except InputError as error:
            return error
        array, box = fit_to(picture, self.size, self.keep_aspect)
        return Frame(index, path, array, box, (picture.shape[0], picture.shape[1]))


def _side_by_side(task: Callable[[int], T], items: Sequence[int], workers: int) -> Iterator[T]:
    if workers < 1:
        yield from map(task, items)
        return
    with ThreadPoolExecutor(workers, "adflow-images") as pool:
        yield from ordered(pool, task, items, ahead=2 * workers)


def _reason(error: InputError, path: Path) -> str:
    """Return the message without the file's name, which stands beside it."""
    text = str(error)
    for start in (f"cannot read {show(path)}: ", f"{show(path)}: ", f"{show(path)} "):
        text = text.removeprefix(start)
    return text


def _layout_names() -> list[str]:
    """Return the layout modules of this package: sorted, ``folder`` last."""
    names = [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]
    return [*sorted(set(names) - {"demo", "folder"}), "folder"]


def _layout(name: str) -> Layout:
    return cast(Layout, import_module(f"adflow.data.{name}"))


def _read_all(folder: Path) -> list[Dataset]:
    if not folder.is_dir():
        raise InputError(f"{show(folder)} is a file, expected a folder of images or a data set")
    layout = next(layout for layout in map(_layout, _layout_names()) if layout.matches(folder))
    return [layout.read(folder, class_) for class_ in layout.classes(folder)]


def _find(base: Path, family: str, class_: str) -> list[Dataset]:
    """Return the classes asked for that lie below ``base``; empty where the data set is not there."""
    layout = _layout(family.replace("-", "_"))
    for folder in (*(base / name for name in (family, *_ALIASES.get(family, ()))), base):
        if not folder.is_dir() or not layout.matches(folder):
            continue
        here = layout.classes(folder)
        if not class_:
            return [layout.read(folder, one) for one in here]
        if class_ in here:
            return [layout.read(folder, class_)]
    return []
