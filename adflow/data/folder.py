"""A user's own folder of images.

Without structure, every image below the folder is good, whatever the nesting. With a folder ``good`` (or
``ok``, ``normal``) directly inside, the others hold defects, one kind each, and ``masks`` (or ``mask``,
``ground_truth``) their ground truth, either flat or in a folder per kind::

    parts/good/*.jpg    parts/bad/*.jpg    parts/masks/bad/*_mask.png

With ``train`` and ``test`` inside, ``train`` holds good images and ``test`` is read as above. A folder
whose folders have such structure is a folder of classes. What lies in ``good`` beside defects is split: the
last fifth in the order of names is kept for testing, because neighbours in that order are often neighbours
in time.
"""

from __future__ import annotations

from pathlib import Path

from adflow.data import Dataset, Sample
from adflow.data._scan import folders_in, list_images, no_stray_masks, pair_masks
from adflow.errors import InputError
from adflow.imaging import show

GOOD = frozenset({"good", "ok", "normal"})
MASKS = frozenset({"mask", "masks", "ground_truth"})
BAD = frozenset({"bad", "ko", "nok", "ng", "defect", "defects", "defective", "anomaly", "anomalous", "abnormal"})


def matches(folder: Path) -> bool:
    """Every folder can be read as a folder of images."""
    return folder.is_dir()


def classes(folder: Path) -> list[str]:
    """Return the classes in ``folder``: its own name, or its folders if only they have structure."""
    return _inner(folder) or [folder.name]


def read(folder: Path, class_: str) -> Dataset:
    """Read one class.

    Raises:
        InputError: no image; defects without good images; a defective image without its mask, or the reverse.
    """
    own = not _inner(folder)
    root = folder if own else folder / class_
    name = class_ if own else f"{folder.name}/{class_}"
    notes: list[str] = []
    train: list[Sample] = []
    test: list[Sample] = []
    if not _structured(root):
        train = _only_good(root)
    elif learn_from := _pick(root, {"train"}):
        inside, tested = root / learn_from, root / (_pick(root, {"test"}) or "test")
        good = _pick(inside, GOOD)
        train = _only_good(inside / good if good else inside)
        test = _read_kinds(tested, _truth(root) or _truth(tested), notes)
    else:
        every = _read_kinds(root, _truth(root), notes)
        good_images = [sample.image for sample in every if sample.label == 0]
        kept = len(good_images) // 5 if len(every) > len(good_images) else 0
        learn = len(good_images) - kept
        train = [Sample(image, "train", 0, None, None) for image in good_images[:learn]]
        test = every[learn:]
        if kept:
            notes.append(f"the last {kept} of {len(good_images)} good images are kept for testing")
    if not train:
        raise InputError(
            f"there is no {'good ' if _structured(root) else ''}image in {show(root)}",
            hint="Expected PNG, JPEG, BMP, TIFF or WEBP files, at any depth.",
        )
    return Dataset(name, "folder", class_, root, train, test, notes)


def _structured(folder: Path) -> bool:
    names = {name.lower() for name in folders_in(folder)}
    return bool(names & GOOD) or {"train", "test"} <= names


def _pick(folder: Path, names: set[str] | frozenset[str]) -> str | None:
    """Return the folder directly in ``folder`` that has one of these names, in any case."""
    return next((name for name in folders_in(folder) if name.lower() in names), None)


def _truth(folder: Path) -> Path | None:
    name = _pick(folder, MASKS)
    return folder / name if name else None


def _inner(folder: Path) -> list[str]:
    """Return the class folders directly in ``folder``; none where it is a class itself."""
    if _structured(folder):
        return []
    return [name for name in folders_in(folder) if _structured(folder / name)]


def _only_good(folder: Path) -> list[Sample]:
    """Return every image below ``folder`` as a good one to fit on."""
    images = list_images(folder)
    for image in images:
        odd = {part.lower() for part in image.relative_to(folder).parts[:-1]} & (BAD | MASKS)
        if odd:
            raise InputError(
                f"{show(image)} lies in a folder named '{odd.pop()}', but {show(folder)} has no folder 'good'",
                hint="Put the good images into a folder named good, and folders of defects beside it.",
            )
    return [Sample(image, "train", 0, None, None) for image in images]


def _read_kinds(folder: Path, truth: Path | None, notes: list[str]) -> list[Sample]:
    """Read good images and each kind of defect in ``folder``; good ones first, then kinds by name."""
    good: list[Sample] = []
    bad: list[Sample] = []
    kinds = [name for name in folders_in(folder) if name.lower() not in MASKS]
    bad_kinds = [name for name in kinds if name.lower() not in GOOD]
    # Flat masks serve the only kind there is; with several kinds a name could mean two images.
    flat = truth is not None and len(bad_kinds) == 1 and not (truth / bad_kinds[0]).is_dir()
    for kind in kinds:
        images = list_images(folder / kind)
        if kind.lower() in GOOD:
            good += [Sample(image, "test", 0, None, None) for image in images]
        elif truth is None:
            bad += [Sample(image, "test", 1, kind, None) for image in images]
        else:
            masks = pair_masks(images, folder / kind, truth if flat else truth / kind)
            bad += [Sample(image, "test", 1, kind, mask) for image, mask in zip(images, masks, strict=True)]
    if truth and not flat:
        no_stray_masks(truth, folder, kinds)
    if bad and truth is None:
        notes.append("no masks: pixel metrics are not available")
    loose = [path for path in list_images(folder) if path.parent == folder]
    if loose:
        first = show(loose[0].name)
        notes.append(f"left out: {len(loose)} images directly in {show(folder)}, such as {first}")
    return good + bad
