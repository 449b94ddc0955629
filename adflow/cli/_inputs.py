"""What the user points at: files, folders, or data sets by name."""

from __future__ import annotations

from pathlib import Path

from adflow.cli._console import Talk
from adflow.data import Sample, list_images, open_data
from adflow.detector import Detector
from adflow.errors import InputError, UsageError
from adflow.runs import find_detector


def gather(paths: list[str], root: Path | None, split: str = "test") -> list[Sample]:
    """Return the images that ``paths`` mean, in order, each once.

    A file is itself; a folder that is a data set gives its ``split`` with labels and masks; any other folder gives
    every image below it; anything else must be the name of a data set.

    Raises:
        InputError: nothing there, or no image in it.
    """
    found: dict[Path, Sample] = {}
    for text in paths:
        path = Path(text)
        if path.is_file():
            samples = [Sample(path, split, None, None, None)]
        elif path.is_dir() and not (path / "train").is_dir():
            samples = [Sample(image, split, None, None, None) for image in list_images(path)]
        elif path.is_dir() or "/" not in text.rstrip("/") or not path.parent.is_dir():
            samples = [s for data in open_data(text, root=root) for s in (data.test if split == "test" else data.train)]
        else:
            raise InputError(f"there is no file or folder {text}")
        if not samples:
            raise InputError(f"there is no image in {text}")
        found.update((sample.image, sample) for sample in samples)
    return list(found.values())


def open_detector(
    model: str | None, runs: Path | None, device: str, precision: str, weights: Path | None, talk: Talk
) -> tuple[Detector, Path]:
    """Load the detector that ``--model`` means; say which one when the user named none."""
    from adflow.detector_file import load_detector
    from adflow.tasks._device import choose_device, has_bf16

    path = find_detector(model, runs)
    if model is None:
        talk.say(f"model: {path.parent.name} (the run fitted last; choose with --model)")
    if precision not in ("float32", "bf16"):
        raise UsageError(f"unknown precision '{precision}', expected float32 or bf16")
    detector = load_detector(path, device=choose_device(device), weights=weights)
    if precision == "bf16":
        if has_bf16(detector.device()):
            detector.backbone.to_precision("bf16")
        else:
            talk.say("this processor has no bfloat16 arithmetic: float32 is used, which is faster here")
    return detector, path
