"""The layout of BTAD (beanTech anomaly detection).

::

    <class>/train/ok/0000.bmp
    <class>/test/{ok,ko}/0000.png
    <class>/ground_truth/ko/0000.png     (same stem as the image, no _mask; 03 has .bmp)

Images and masks mix .bmp and .png from class to class and within one, so masks are found by their stem.
Class 03 is 800 x 600, not square. Masks may hold values between 0 and 255; `adflow.imaging.read_mask`
draws the line.

P. Mishra et al., "VT-ADL: a vision transformer network for image anomaly detection and localization",
ISIE 2021, http://avires.dimi.uniud.it/papers/btad/
"""

from __future__ import annotations

from pathlib import Path

from adflow.data import Dataset, Sample
from adflow.data._scan import class_folders, list_images, pair_masks
from adflow.errors import InputError
from adflow.imaging import show

CLASSES = ("01", "02", "03")
_GOOD = "train/ok"  # by which a class is known


def matches(folder: Path) -> bool:
    """Tell whether ``folder`` is a class in this layout, or directly holds one."""
    return bool(classes(folder))


def classes(folder: Path) -> list[str]:
    """Return the classes in ``folder``, sorted; its own name when it is a class folder."""
    return class_folders(folder, _GOOD)


def read(folder: Path, class_: str) -> Dataset:
    """Read one class.

    Raises:
        InputError: no training image, or a defective image without its mask, or the reverse; names it.
    """
    own = (folder / _GOOD).is_dir()
    root = folder if own else folder / class_
    train = [Sample(path, "train", 0, None, None) for path in list_images(root / _GOOD)]
    if not train:
        raise InputError(f"there is no image in {show(root / _GOOD)}", hint="Put good images there.")
    notes: list[str] = []
    good = list_images(root / "test" / "ok") if (root / "test" / "ok").is_dir() else []
    bad = list_images(root / "test" / "ko") if (root / "test" / "ko").is_dir() else []
    truth = root / "ground_truth" / "ko"
    masks: list[Path] | list[None] = [None] * len(bad)
    if truth.is_dir():
        masks = pair_masks(bad, root / "test" / "ko", truth)
    elif bad:
        notes.append("no ground_truth folder: pixel metrics are not available")
    test = [Sample(path, "test", 0, None, None) for path in good]
    test += [Sample(image, "test", 1, "ko", mask) for image, mask in zip(bad, masks, strict=True)]
    if not test:
        notes.append("no test images: it can be fitted on, not evaluated on")
    official = class_ in CLASSES
    name = f"btad/{class_}" if official else class_ if own else f"{folder.name}/{class_}"
    return Dataset(name, "btad" if official else "folder", class_, root, train, test, notes)
