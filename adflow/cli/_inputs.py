"""What the user points at: files, folders, or data sets by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from adflow._video import SUFFIXES, count, frame
from adflow.cli._console import Talk
from adflow.data import Dataset, Sample, list_images, open_data
from adflow.detector import Detector
from adflow.errors import InputError
from adflow.imaging import IMAGE_SUFFIXES
from adflow.runs import find_detector


def gather(paths: list[str], root: Path | None, split: str = "test", stride: int = 1) -> list[Sample]:
    """Return the images that ``paths`` mean, in order, each once.

    A file is itself, or the frames of a video; a folder that is a data set gives its ``split`` with labels and masks;
    any other folder gives every image below it, and the frames of every video; anything else must be the name of a
    data set. Of frames and data sets every ``stride``-th is taken.

    Raises:
        InputError: nothing there, or no image in it.
    """
    found: dict[Path, Sample] = {}
    for text in paths:
        path = Path(text)
        if path.is_file():
            samples = _file(path, split, stride)
        elif path.is_dir() and not _is_data(path):
            files = list_images(path, (*IMAGE_SUFFIXES, *SUFFIXES))
            samples = [sample for file in files for sample in _file(file, split, stride)]
        elif path.is_dir() or "/" not in text.rstrip("/") or not path.parent.is_dir():
            parts = [data.test if split == "test" else data.train for data in open_data(text, root=root)]
            samples = [part[i] for part in parts for i in range(0, len(part), stride)]
        else:
            raise InputError(f"there is no file or folder {text}", hint="Name images, a folder of them, or a data set.")
        if not samples:
            hint = "Images end in .png, .jpg, .tif, .bmp, .webp and the like."
            raise InputError(f"there is no image in {text}", hint=hint)
        found.update((sample.image, sample) for sample in samples)
    return list(found.values())


def open_strided(specs: list[str], root: Path | None, stride: int) -> list[Dataset]:
    """Return the classes of data sets; of training and test images every ``stride``-th."""
    found = [one for spec in specs for one in open_data(spec, root=root)]
    if stride == 1:
        return found
    note = f"only every {stride}. image is used (--stride)"
    return [replace(one, train=one.train[::stride], test=one.test[::stride], notes=[*one.notes, note]) for one in found]


def _is_data(path: Path) -> bool:
    return any((path / name).is_dir() for name in ("train", "training"))


def _file(path: Path, split: str, stride: int) -> list[Sample]:
    if path.suffix.lower() not in SUFFIXES:
        return [Sample(path, split, None, None, None)]
    return [Sample(frame(path, i), split, None, None, None) for i in range(0, count(path), stride)]


def open_detector(
    model: str | None, runs: Path | None, device: str, precision: str, weights: Path | None, talk: Talk
) -> tuple[Detector, Path]:
    """Load the detector that ``--model`` means; say which one when the user named none."""
    from adflow.detector_file import load_detector
    from adflow.tasks._device import choose_device, set_precision

    path = find_detector(model, runs)
    if model is None:
        talk.say(f"model: {path.parent.name} (the run fitted last; choose with --model)")
    detector = load_detector(path, device=choose_device(device), weights=weights)
    note = set_precision(detector, precision)
    if note:
        talk.say(note)
    return detector, path
