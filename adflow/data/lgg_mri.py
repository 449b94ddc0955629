"""LGG-MRI: brain MRI slices of 110 patients with a lower-grade glioma, and our split of them into one class.

::

    kaggle_3m/TCGA_<institution>_<patient>_<date>/TCGA_..._<k>.tif        256 x 256, three sequences as RGB
    kaggle_3m/TCGA_<institution>_<patient>_<date>/TCGA_..._<k>_mask.tif   0 or 255
    lgg-mri-segmentation/kaggle_3m/...                                    the same again: ignored

No one-class split was ever published for these slices, so this one is ours, and results compare only with
results on it. Patients, not slices, are divided (neighbouring slices are near copies): a seeded fifth of
them is for testing. Training takes slices with an empty mask, at least ``MARGIN`` slices away from any
slice with tumour, since the swelling around a tumour is visible before its mask begins. Slices that show
nearly no brain are left out of both.

M. Buda et al., "Association of genomic subtypes of lower-grade gliomas with shape features automatically
extracted by a deep learning algorithm", Computers in Biology and Medicine 2019,
https://www.kaggle.com/datasets/mateuszbuda/lgg-mri-segmentation
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adflow.data import Dataset, Sample
from adflow.data._scan import folders_in
from adflow.errors import InputError
from adflow.imaging import read_image, read_mask, show

TEST_SHARE = 0.2  # of the patients
SEED = 0
MARGIN = 2  # slices; specs call the two next to a tumour contaminated
BRIGHT = 25  # of 255, in any sequence: brighter than the background's noise
BRAIN = 0.02  # share of bright pixels below which a slice shows nearly no brain

_INNER = "kaggle_3m"
_SLICE = re.compile(r"(TCGA_\w+)_(\d+)(_mask)?\.tif")


@dataclass(frozen=True, slots=True)
class _Slice:
    """One slice: its number along the head, its files, whether it shows tumour, what share is brain."""

    number: int
    image: Path
    mask: Path
    tumour: bool
    brain: float


def matches(folder: Path) -> bool:
    """Tell whether ``folder`` holds the patients' folders, directly or in ``kaggle_3m``."""
    return bool(_patients(folder))


def classes(folder: Path) -> list[str]:
    """Return the only class, "brain"."""
    return ["brain"] if matches(folder) else []


def read(
    folder: Path,
    class_: str = "brain",
    *,
    seed: int = SEED,
    test_share: float = TEST_SHARE,
    margin: int = MARGIN,
) -> Dataset:
    """Read the slices and divide the patients.

    Args:
        folder: the data set.
        class_: "brain".
        seed: which patients are for testing.
        test_share: share of them, in (0, 1).
        margin: training slices lie at least this many slices away from any slice with tumour; 0 or 1: no
            margin.

    Raises:
        InputError: a slice without mask or a mask without slice (named), or too few patients.
    """
    patients = _patients(folder)
    if len(patients) < 2:
        raise InputError(f"{show(folder)} holds {len(patients)} patients, expected at least 2 to split them")
    order = np.random.default_rng(seed).permutation(len(patients))
    count = min(len(patients) - 1, max(1, round(test_share * len(patients))))
    chosen = {patients[i] for i in order[:count]}
    with ThreadPoolExecutor(4, "adflow-slices") as pool:
        read_in = dict(zip(patients, pool.map(_read_patient, patients), strict=True))
    train, test = [], []
    empty = near = 0
    for patient in patients:
        slices = read_in[patient]
        tumours = [one.number for one in slices if one.tumour]
        for one in slices:
            if one.brain < BRAIN and not one.tumour:
                empty += 1
            elif patient in chosen:
                mask = one.mask if one.tumour else None
                defect = "tumour" if one.tumour else None
                test.append(Sample(one.image, "test", int(one.tumour), defect, mask))
            elif not one.tumour and all(abs(one.number - other) >= margin for other in tumours):
                train.append(Sample(one.image, "train", 0, None, None))
            else:
                near += not one.tumour
    if not train:
        raise InputError(f"{show(folder)}: no slice without tumour is left to fit on", hint="Give a smaller margin.")
    total = sum(map(len, read_in.values()))
    bad = sum(sample.label or 0 for sample in test)
    notes = [
        f"our own split by patient (seed {seed}): {len(patients) - count} to fit on, {count} to test on",
        f"{total} slices: {len(train)} to fit on; {len(test) - bad} good and {bad} with tumour to test on; "
        f"left out: {empty} with nearly no brain, {near} near a tumour, tumours of patients to fit on",
    ]
    ordered = sorted(test, key=lambda sample: (sample.label, sample.image))
    return Dataset("lgg-mri/brain", "lgg-mri", class_, folder, train, ordered, notes)


def _patients(folder: Path) -> list[Path]:
    """Return the patients' folders, sorted; the nested second copy of the data is never looked at."""
    root = folder / _INNER if (folder / _INNER).is_dir() else folder
    return [root / name for name in folders_in(root) if name.startswith("TCGA_")]


def _read_patient(patient: Path) -> Sequence[_Slice]:
    images: dict[int, Path] = {}
    masks: dict[int, Path] = {}
    for path in patient.iterdir():
        found = _SLICE.fullmatch(path.name)
        if found:
            (masks if found[3] else images)[int(found[2])] = path
    for number in sorted(images.keys() ^ masks.keys()):
        lone = images.get(number) or masks[number]
        what = "slice without a mask" if number in images else "mask without a slice"
        raise InputError(f"{show(lone)} is a {what}", hint="Get the data set again: `adflow download lgg-mri`.")
    return [_look(number, images[number], masks[number]) for number in sorted(images)]


def _look(number: int, image: Path, mask: Path) -> _Slice:
    bright = read_image(image).max(axis=2) > BRIGHT
    return _Slice(number, image, mask, bool(read_mask(mask).any()), float(bright.mean()))
