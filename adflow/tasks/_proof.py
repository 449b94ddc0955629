"""The images that prove an export: given ones, the held-out images of the fit, or the demo's."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adflow._files import sha256_of
from adflow._video import is_frame
from adflow.data import Dataset, Sample, open_data
from adflow.errors import AdflowError, InputError
from adflow.imaging import read_image

MOST = 32  # images whose hashes a detector carries


def remember(samples: Sequence[Sample], folder: Path) -> dict[str, Any]:
    """Return name below ``folder`` and sha256 of at most 32 images, evenly chosen; frames of videos have neither."""
    files = {}
    for sample in evenly([sample for sample in samples if not is_frame(sample.image)], MOST):
        try:
            files[Path(os.path.relpath(sample.image, folder)).as_posix()] = sha256_of(sample.image)
        except OSError:  # likewise left out of fit and calibration
            continue
    return {"folder": str(folder), "files": files}


def recall(known: Mapping[str, Any], folders: Sequence[Path]) -> list[Sample]:
    """Return the images of :func:`remember` that lie unchanged below the first of ``folders`` that has any."""
    files: Mapping[str, str] = known.get("files") or {}
    for folder in folders:
        paths = [(folder / name, sha256) for name, sha256 in files.items()]
        found = [path for path, sha256 in paths if path.is_file() and sha256_of(path) == sha256 and _is_image(path)]
        if found:
            return [Sample(path, "train", 0, None, None) for path in found]
    return []


def _is_image(path: Path) -> bool:
    """Return whether an image can be read; one that cannot was left out of fit and calibration, too."""
    try:
        read_image(path)
    except InputError:
        return False
    return True


def default_samples(
    count: int, provenance: Mapping[str, Any] | None = None, root: Path | None = None
) -> tuple[list[Sample], str]:
    """Choose images to prove an export on: good and defective in turn, where there are both.

    Good are the images held out in the fit, where they are still there, else test images of the fit's data set, else
    of the demo. Defective ones are test images always: verdicts and masks that are all empty prove little.

    Args:
        count: how many, at most.
        provenance: of the detector; None = the demo.
        root: folder that holds data sets.

    Returns:
        The images, and where they come from, in words.
    """
    known = (provenance or {}).get("held_out_images") or {}
    data = _data(provenance or {}, root)
    folders = [Path(known["folder"])] if "folder" in known else []
    good = recall(known, [*folders, data.root] if data else folders)
    source = "good images held out in the fit, found again by their sha256"
    if good and data and any(sample.label for sample in data.test):
        source += f", and defective test images of {data.name}"
    if not good:
        note = "" if data else ", as neither the images held out in the fit nor its data set are here"
        data = data or open_data("demo/brick")[0]
        source = f"test images of {data.name}{note}"
        good = [sample for sample in data.test if sample.label == 0] or list(data.train)
    bad = [sample for sample in data.test if sample.label] if data else []
    bad = evenly(bad, min(count // 2, len(good)))
    good = evenly(good, count - len(bad))
    paired = [sample for pair in zip(good, bad, strict=False) for sample in pair]
    return [*paired, *good[len(bad) :]], source


def _data(provenance: Mapping[str, Any], root: Path | None) -> Dataset | None:
    """Return the data set of a fit where it is here: in the folder it was in, or by its name."""
    name = str(provenance.get("data") or "")
    folder = (provenance.get("held_out_images") or {}).get("folder")
    for place in (folder and Path(folder), name):
        try:
            found = open_data(place, root=root) if place else []
        except AdflowError:
            continue
        if found:
            return next((one for one in found if one.class_ == name.rpartition("/")[2]), found[0])
    return None


def evenly(samples: Sequence[Sample], count: int) -> list[Sample]:
    """Return at most ``count`` of ``samples``, evenly chosen."""
    chosen = min(count, len(samples))
    return [samples[i * len(samples) // chosen] for i in range(chosen)]
