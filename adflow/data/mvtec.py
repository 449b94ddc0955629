"""The layout of MVTec AD, which many data sets share.

::

    <class>/train/good/000.png
    <class>/test/good/000.png
    <class>/test/<defect>/000.png
    <class>/ground_truth/<defect>/000_mask.png

P. Bergmann et al., "MVTec AD: a comprehensive real-world dataset for unsupervised anomaly detection", CVPR
2019, https://www.mvtec.com/company/research/datasets/mvtec-ad
"""

from __future__ import annotations

from pathlib import Path

from adflow.data import Dataset, Sample
from adflow.data._scan import class_folders, folders_in, list_images, no_stray_masks, pair_masks
from adflow.errors import InputError
from adflow.imaging import show

CLASSES = (
    "bottle", "cable", "capsule", "carpet", "grid", "hazelnut", "leather", "metal_nut",
    "pill", "screw", "tile", "toothbrush", "transistor", "wood", "zipper",
)  # fmt: skip
_GOOD = "train/good"  # by which a class is known


def matches(folder: Path) -> bool:
    """Tell whether ``folder`` is a class in this layout, or directly holds one."""
    return bool(classes(folder))


def classes(folder: Path) -> list[str]:
    """Return the classes in ``folder``, sorted; its own name when it is a class folder."""
    return class_folders(folder, _GOOD)


def read(folder: Path, class_: str) -> Dataset:
    """Read one class.

    Raises:
        InputError: no training image; or, where there is ground truth, a defective image
            without mask or the reverse.
    """
    own = (folder / _GOOD).is_dir()
    root = folder if own else folder / class_
    notes: list[str] = []
    train = [Sample(path, "train", 0, None, None) for path in list_images(root / _GOOD)]
    if not train:
        raise InputError(f"there is no image in {show(root / _GOOD)}", hint="Put good images there.")
    others = [name for name in folders_in(root / "train") if name != "good"]
    if others:
        notes.append(f"left out of training: {', '.join(show(f'train/{name}') for name in others)}")
    parent = root.parent.name
    official = class_ in CLASSES and parent.lower().startswith("mvtec")
    family = "mvtec" if official else "folder"
    name = f"mvtec/{class_}" if official else class_ if own else f"{folder.name}/{class_}"
    return Dataset(name, family, class_, root, train, _read_test(root, notes), notes)


def _read_test(root: Path, notes: list[str]) -> list[Sample]:
    test: list[Sample] = []
    truth = root / "ground_truth"
    kinds = folders_in(root / "test")
    for kind in sorted(kinds, key=lambda name: (name != "good", name)):
        images = list_images(root / "test" / kind)
        if kind == "good":
            test += [Sample(path, "test", 0, None, None) for path in images]
        elif truth.is_dir():
            masks = pair_masks(images, root / "test" / kind, truth / kind)
            test += [Sample(image, "test", 1, kind, mask) for image, mask in zip(images, masks, strict=True)]
        else:
            test += [Sample(image, "test", 1, kind, None) for image in images]
    if not truth.is_dir() and any(sample.label for sample in test):
        notes.append("no ground_truth folder: pixel metrics are not available")
    # Some sets carry empty masks for good images; the label already says what they say.
    no_stray_masks(truth, root / "test", [*kinds, "good"])
    if not test:
        notes.append("no test images: it can be fitted on, not evaluated on")
    return test
