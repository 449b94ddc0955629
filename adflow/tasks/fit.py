"""``fit`` and ``calibrate``: learn from good images, keep some back, write a run."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adflow import __version__, _ranks, methods
from adflow._files import write_text
from adflow._lock import claim
from adflow.calibration import Calibration
from adflow.data import Chosen, Dataset, Images, Sample
from adflow.detector import Detector, Progress, Resources
from adflow.detector_file import digest, load_detector, save_detector
from adflow.errors import InputError, UsageError
from adflow.imaging import Size
from adflow.nfa import null_health
from adflow.pipeline import Scored, run
from adflow.runs import DETECTOR, run_name, runs_folder
from adflow.tasks._bank import TrainFeatures, can_share, image_bytes
from adflow.tasks._device import choose_device
from adflow.tasks._proof import remember
from adflow.tasks._ray import Cluster

DEFAULT_SIZE: Size = (256, 256)
_MAP_BYTES = 64 << 20  # score maps held at once while calibrating
PROCESS = 1 << 30  # bytes a process takes with torch, a backbone and a learned method, before features and maps


@dataclass(frozen=True)
class FitOptions:
    """What ``fit`` does besides the data; the defaults are those of the command line.

    Attributes:
        method: name of a method.
        recipe: "fast" or "paper".
        backbone: name of a backbone; None = the recipe's.
        taps: its taps; None = the recipe's.
        weights: local weight file of the backbone.
        settings: constructor parameters of the method.
        size: (height, width) of the network input; None = the recipe's, else 256 x 256.
        keep_aspect: letterbox instead of stretching; None = the recipe's, else False.
        holdout: share of the training images that is kept for calibration, never fitted on.
        folds: K > 1 calibrates on out-of-fold scores instead and fits on every image.
        seed: of everything random.
        device: cpu, cuda, cuda:N, mps, auto.
        strict: an unreadable image is fatal.
        resources: memory, feature folder, storage type, checkpoint.
    """

    method: str = methods.DEFAULT
    recipe: str = "fast"
    backbone: str | None = None
    taps: tuple[str, ...] | None = None
    weights: Path | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    size: Size | None = None
    keep_aspect: bool | None = None
    holdout: float = 0.1
    folds: int = 0
    seed: int = 0
    device: str = "auto"
    strict: bool = False
    resources: Resources = field(default_factory=Resources)


def hold_out(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Split ``count`` images into those to fit on and those held out, both in order.

    At least 8 are held out where there are 40: fewer cannot carry a promise about false alarms. Below 10 images none
    are: the fit needs them more.
    """
    if not 0 <= share < 1:
        raise UsageError(f"--holdout is {share}, expected a share in [0, 1)")
    held = round(count * share)
    if share and count >= 10:
        held = max(held, 8 if count >= 40 else max(1, count // 5))
    elif count < 10:
        held = 0
    chosen = sorted(np.random.default_rng(seed).permutation(count)[:held].tolist())
    out = set(chosen)
    return [i for i in range(count) if i not in out], chosen


def split(count: int, options: FitOptions) -> tuple[list[int], list[int]]:
    """Split ``count`` images into those to fit on and those held out, as ``options`` ask for."""
    if options.folds > count:
        raise UsageError(f"--folds is {options.folds}, more than the {count} images")
    return hold_out(count, 0.0 if options.folds > 1 else options.holdout, options.seed)


def fit(
    data: Dataset,
    options: FitOptions | None = None,
    *,
    out: Path | None = None,
    runs: Path | None = None,
    resume: bool = False,
    command: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fit a detector on the good training images of ``data``, calibrate it, and write its run folder.

    No label and no test image is read. What is known of other images is learned here and saved.

    Args:
        data: one class.
        options: method and how to fit it.
        out: run folder; None = a name made of data, method, backbone and seed inside ``runs``.
        runs: folder of runs; None = ``ADFLOW_RUNS`` or ``./runs``.
        resume: go on from the checkpoint of an interrupted fit.
        command: what the user typed, for the provenance.
        progress: called with (done, total, message).

    Returns:
        A summary that JSON can hold: run, detector, counts, seconds, calibration health, digest, notes.

    Raises:
        InputError: too few or unreadable images.
        ResourceError: another process fits into the same folder.
        TrainingError: the training did not stay finite.
    """
    options = options or FitOptions()
    with _ranks.together(options.device) as device:
        return _fit(data, replace(options, device=device), out, runs, resume, command, progress)


def _fit(
    data: Dataset,
    options: FitOptions,
    out: Path | None,
    runs: Path | None,
    resume: bool,
    command: str | None,
    progress: Progress | None,
) -> dict[str, Any]:
    detector, size, keep_aspect = prepare(data, options)
    name = run_name(data.name, options.method, detector.backbone.name, options.seed)
    folder = out or runs_folder(runs) / name
    with claim(folder) if _ranks.rank() == 0 else nullcontext():
        checkpoint = folder / "fit.checkpoint"
        if not resume and _ranks.rank() == 0:
            checkpoint.unlink(missing_ok=True)
        _ranks.wait()
        options = replace(options, resources=replace(options.resources, checkpoint=checkpoint))
        fitted = fit_detector(detector, data.train, options, size, keep_aspect, progress)
        if _ranks.rank() > 0:
            return fitted
        summary = save_run(detector, data, options, fitted, folder, command)
        checkpoint.unlink(missing_ok=True)
    return summary


@dataclass(frozen=True)
class _Class:
    """One class to fit, with what a task needs to do it."""

    data: Dataset
    options: FitOptions
    runs: Path | None
    resume: bool
    command: str | None


def fit_on(
    cluster: Cluster,
    classes: Sequence[Dataset],
    options: FitOptions,
    *,
    runs: Path | None = None,
    resume: bool = False,
    command: str | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any] | Exception]:
    """Fit every class as :func:`fit`, each in a task of its own; return a summary or what went wrong for each."""
    options = replace(options, resources=replace(options.resources, workers=cluster.cpus))
    units = [[_Class(one, options, runs, resume, command)] for one in classes]
    found: list[dict[str, Any] | Exception] = [RuntimeError("not fitted")] * len(units)
    memory = []
    for one in classes:
        detector, size, _ = prepare(one, options)
        memory.append(PROCESS + min(options.resources.memory, image_bytes(detector, size) * len(one.train)))
    for done, (unit, _, result) in enumerate(cluster.units(fit_classes, units, memory)):
        found[unit] = result
        if progress:
            progress(done + 1, len(units), "classes")
    return found


def fit_classes(unit: Sequence[_Class]) -> Iterator[dict[str, Any] | Exception]:
    """Fit the classes of a unit; yield a summary or what went wrong for each."""
    for one in unit:
        try:
            yield fit(one.data, one.options, runs=one.runs, resume=one.resume, command=one.command)
        except Exception as error:
            yield error


def save_run(
    detector: Detector, data: Dataset, options: FitOptions, fitted: dict[str, Any], folder: Path, command: str | None
) -> dict[str, Any]:
    """Write the run folder of a fitted detector; return the summary that stands in its ``fit.json``."""
    _, held = split(len(data.train), options)
    calibrated = data.train if options.folds > 1 else Chosen(data.train, held)
    detector.provenance |= {
        "data": data.name,
        "fingerprint": data.fingerprint(),
        "command": command,
        "held_out_images": remember(calibrated, data.root),
    }
    path = save_detector(detector, folder / DETECTOR)
    summary = {"run": folder.name, "detector": str(path), "data": data.name, **fitted, "notes": data.notes}
    write_text(folder / "fit.json", json.dumps(summary, indent=2, default=str) + "\n")
    return summary


def prepare(data: Dataset, options: FitOptions) -> tuple[Detector, Size, bool]:
    """Create the unfitted detector that ``options`` ask for, with input size and aspect."""
    detector, reading = methods.build(
        options.method,
        recipe=options.recipe,
        class_=data.class_,
        backbone=options.backbone,
        taps=options.taps,
        weights=options.weights,
        settings=options.settings,
    )
    wanted = options.size or reading.get("size") or DEFAULT_SIZE
    size = (wanted, wanted) if isinstance(wanted, int) else (int(wanted[0]), int(wanted[1]))
    keep = reading.get("keep_aspect", False) if options.keep_aspect is None else options.keep_aspect
    return detector, size, bool(keep)


def fit_detector(
    detector: Detector,
    train: Sequence[Sample],
    options: FitOptions,
    size: Size,
    keep_aspect: bool,
    progress: Progress | None = None,
    features: TrainFeatures | None = None,
) -> dict[str, Any]:
    """Fit and calibrate ``detector`` in place; return counts and seconds.

    Every image passes the backbone once, for fit, folds and calibration; ``features`` brings what others have
    extracted. Neither changes any bit of the result.

    Raises:
        InputError: fewer than 2 images to fit on.
    """
    began = time.perf_counter()
    chosen, held = split(len(train), options)
    if len(chosen) < 2:
        raise InputError(
            f"{len(chosen)} good training images, expected at least 2 (better 40 or more)",
            hint="Put good images into the training folder.",
        )
    detector.to(choose_device(options.device))
    detector.keep_aspect = keep_aspect
    own = None
    if features is None and (held or options.folds > 1) and can_share(detector, options.settings):
        own = features = TrainFeatures(detector, train, size, keep_aspect, options.strict, options.resources, progress)
    try:
        learned, skipped, fit_scores = _learn(
            detector, train, chosen, held, options, size, keep_aspect, progress, features
        )
        done = time.perf_counter()
        gaussian = held and detector.has_null and _ranks.rank() == 0
        null = _null_health(detector, train, held, features) if gaussian else None
    finally:
        if own is not None:
            own.close()
    detector.provenance = {
        "adflow": __version__,
        "torch": torch.__version__,
        "seed": options.seed,
        "recipe": options.recipe,
        "device": str(detector.device()),
        "images": len(chosen),
        "held_out": len(held) or (len(train) if options.folds > 1 else 0),
        "folds": options.folds,
        "seconds": round(done - began, 3),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    return {
        "method": detector.method(),
        "recipe": options.recipe,
        "backbone": detector.backbone.name,
        "size": list(size),
        "keep_aspect": keep_aspect,
        "seed": options.seed,
        "images": len(chosen),
        "held_out": detector.provenance["held_out"],
        "skipped": skipped,
        "seconds": {"fit": round(learned - began, 3), "calibration": round(done - learned, 3)},
        "calibration": None if detector.calibration is None else detector.calibration.health(fit_scores),
        "null": null,
        "digest": digest({k: v.cpu() for k, v in detector.learned().items()}, {}),
    }


def _learn(
    detector: Detector,
    train: Sequence[Sample],
    chosen: Sequence[int],
    held: Sequence[int],
    options: FitOptions,
    size: Size,
    keep_aspect: bool,
    progress: Progress | None,
    features: TrainFeatures | None,
) -> tuple[float, list[str], np.ndarray | None]:
    """Fit on ``chosen`` and calibrate on ``held``, or out of fold.

    Returns:
        When it had learned, what was skipped, and the scores of about as many fit images as were held out.
    """
    skipped: list[str] = [] if features is None else list(features.skipped)

    def learn(indices: Sequence[int], message: str, checkpoint: Path | None = None) -> None:
        source = Images(Chosen(train, indices), size, keep_aspect=keep_aspect, strict=options.strict)
        resources = replace(options.resources, checkpoint=checkpoint)
        if features is not None:
            resources = replace(resources, bank=features.of(indices))
        detector.fit(source, seed=options.seed, resources=resources, progress=progress)
        skipped.extend(f"{path}: {reason}" for path, reason in source.skipped)
        if progress:
            progress(1, 1, message)

    def calibrated(indices: Sequence[int]) -> Calibration | None:
        if _ranks.rank() > 0:
            return None
        known = None if features is None else features.calibration(detector, indices)
        if known is not None:
            return known
        part = Chosen(train, indices)
        found, unreadable = _calibration(detector, part, options.strict, options.resources.workers)
        if features is None and options.folds <= 1:  # else they are named with those that are learned from
            skipped.extend(unreadable)
        return found

    def seen(indices: Sequence[int]) -> np.ndarray:
        known = None if features is None else features.scores(detector, indices)
        if known is not None:
            return known
        scored = run(detector, Chosen(train, indices), strict=options.strict, workers=options.resources.workers)
        return np.array([one.image for one in scored if one.error is None])

    out_of_fold: list[Calibration | None] = []
    if options.folds > 1:
        order = np.random.default_rng(options.seed).permutation(len(train))
        for fold, part in enumerate(np.array_split(order, options.folds)):
            rest = sorted(set(range(len(train))) - set(part.tolist()))
            learn(rest, f"fold {fold + 1} of {options.folds}")
            out_of_fold.append(calibrated(sorted(part.tolist())))
    # Of the last training alone: a fold would go on with the weights of the fold before, which saw its images.
    learn(chosen, "fitted", options.resources.checkpoint)
    learned = time.perf_counter()
    fit_scores = None
    if out_of_fold:
        parts = [part for part in out_of_fold if part is not None]
        detector.calibration = Calibration.merge(parts) if parts else None
    elif held:
        detector.calibration = calibrated(held)
        if _ranks.rank() == 0:
            fit_scores = seen(chosen[:: max(1, len(chosen) // len(held))])
    return learned, list(dict.fromkeys(skipped)), fit_scores


def _calibration(
    detector: Detector, good: Sequence[Sample], strict: bool, workers: int | None = None
) -> tuple[Calibration, list[str]]:
    """Calibrate on the files of good images; return what is wrong with those that cannot be read, too."""
    parts: list[Calibration] = []
    skipped: list[str] = []

    def readable() -> Iterator[Scored]:
        for scored in run(detector, good, strict=strict, workers=workers):
            if scored.error is None:
                yield scored
            else:
                skipped.append(scored.error)

    images = readable()
    while first := next(images, None):
        # Maps of many images are reduced part by part, so that memory does not grow with them.
        most = max(2, _MAP_BYTES // first.map.nbytes)
        part = [first, *islice(images, most - 1)]
        parts.append(Calibration.from_maps([s.map for s in part], np.array([s.image for s in part])))
    if not parts:
        raise InputError("none of the images held out for calibration could be read")
    return parts[0] if len(parts) == 1 else Calibration.merge(parts), skipped


def _null_health(
    detector: Detector, train: Sequence[Sample], held: Sequence[int], features: TrainFeatures | None, most: int = 32
) -> list[dict[str, Any]]:
    """Return per scale how the energies of held-out images compare with the Gaussian null model's chi-square."""
    assert detector.size is not None
    parts = None if features is None else features.energies(detector, held[:most])
    if parts is None:
        images = Images(Chosen(train, held[:most]), detector.size, keep_aspect=detector.keep_aspect)
        parts = [detector.energies(batch) for batch in images.batches(8)]
    energies = [
        (np.concatenate([part[k].chi2.cpu().numpy() for part in parts]), parts[0][k].dof) for k in range(len(parts[0]))
    ]
    return [{**scale._asdict(), "trusted": scale.trusted} for scale in null_health(energies)]


def calibrate(
    model: Path, good: Sequence[Sample], *, device: str = "auto", weights: Path | None = None, strict: bool = False
) -> dict[str, Any]:
    """Calibrate a fitted detector anew on good images it was not fitted on, and write it back.

    Args:
        model: detector file.
        good: the images.
        device: cpu, cuda, cuda:N, mps, auto.
        weights: local weight file of the backbone.
        strict: an unreadable image is fatal.

    Returns:
        {"detector", "images": how many were calibrated on, "calibration": its health, "skipped": errors of the others}.

    Raises:
        InputError: no readable image, or a bundle.
    """
    if model.is_dir():
        raise InputError(
            f"{model} is a bundle, which keeps the calibration it was exported with",
            hint="Calibrate the run it was exported from, and export that again.",
        )
    with claim(model.parent):
        detector = load_detector(model, device=choose_device(device), weights=weights)
        calibration, skipped = _calibration(detector, good, strict)
        detector.calibration = calibration
        folder = Path(os.path.commonpath([sample.image.absolute().parent for sample in good]))
        detector.provenance = detector.provenance | {
            "held_out": calibration.n,
            "recalibrated": True,
            "held_out_images": remember(good, folder),
        }
        save_detector(detector, model)
    return {
        "detector": str(model),
        "images": calibration.n,
        "calibration": calibration.health(),
        "skipped": skipped,
    }
