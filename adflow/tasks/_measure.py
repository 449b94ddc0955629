"""One detector on one class: every figure of a table row, what each image did, and what is needed to compare later."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from adflow import metrics
from adflow._bytes import in_units
from adflow.data import Chosen, Dataset, Sample
from adflow.detector import Detector, Progress
from adflow.errors import InputError
from adflow.imaging import fitted, mask_to, read_mask
from adflow.pipeline import Scored, run
from adflow.tasks._pixels import CURVE_POINTS, Exact, Streamed
from adflow.tasks._point import OperatingPoint, regions_at
from adflow.tasks.score import image_level, verdict_rate

MAP_MEMORY = 2 << 30
# Per pixel: map (float32) and mask while they are collected, one sorted copy, and half a byte for the few positives.
_BYTES_PER_PIXEL = 4 + 1 + 4 + 0.5
_NO_MASKS = "no defective image has a mask"
_STREAMED = "not computed when pixels are streamed"


@dataclass
class Evaluation:
    """One class, one detector.

    Attributes:
        row: metrics as fractions, counts, with ``undefined`` for what has no value.
        records: per image: image (path below the data set's folder), label, defect, group, score, and when it could
            be read peak, intersection, union, regions, hit.
        curves: "roc" (images) and "pro" (pixels), each {"x": [...], "y": [...]}.
        histograms: of the images that count for pixel metrics, for bootstrap and comparison; None when streamed.
        in_pixels: which of the records those are.
        image_threshold: image score from which an image is called defective, or None.
        image_promise: what that threshold promises, in words.
        cost: seconds an image took; not a result, it differs from run to run.
        notes: what the user should be told.
    """

    row: dict[str, Any]
    records: list[dict[str, Any]]
    curves: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    histograms: metrics.PixelHistograms | None = None
    in_pixels: list[int] = field(default_factory=list)
    image_threshold: float | None = None
    image_promise: str | None = None
    cost: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class _Seen:
    """What the worker finds out about one image."""

    truth: np.ndarray
    has_truth: bool
    intersection: int = 0
    union: int = 0
    regions: int = 0
    hit: float | None = None


def streams(count: int, size: tuple[int, int], memory: int) -> bool:
    """Return whether exact pixel metrics of ``count`` maps of ``size`` would need more than ``memory`` bytes."""
    return map_bytes(count, size) > memory


def map_bytes(count: int, size: tuple[int, int]) -> int:
    """Return the bytes that exact pixel metrics of ``count`` maps of ``size`` take."""
    return int(count * size[0] * size[1] * _BYTES_PER_PIXEL)


def streaming_note(count: int, size: tuple[int, int], memory: int) -> str:
    """Return the sentence that says why pixel metrics are streamed."""
    return (
        f"exact pixel metrics of {count} maps of {size[0]}x{size[1]} would take {in_units(map_bytes(count, size))}, "
        f"the limit is {in_units(memory)}: they are streamed in fixed memory, with error bounds in the row "
        "(--map-memory changes the limit)"
    )


def evaluate_detector(
    detector: Detector,
    data: Dataset,
    *,
    point: OperatingPoint | None = None,
    strict: bool = False,
    workers: int | None = None,
    memory: int = MAP_MEMORY,
    after: Callable[[Scored], Any] | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Score the test images of ``data`` and compare with their masks, at the size of the network input.

    Pixels of defective images without a mask are unknown: such images count for image metrics only.

    Args:
        detector: fitted.
        data: one class with test images of known label.
        point: operating point of the automatic threshold; None leaves its columns out.
        strict: an unreadable image is fatal.
        workers: images at once.
        memory: bytes that maps and exact pixel metrics may take; beyond that they are streamed.
        after: called in the worker with each scored image and its picture (overlays).
        progress: called with (done, total, message).

    Raises:
        InputError: there is no labelled test image, or none can be read.
    """
    labelled = Chosen(data.test, [i for i, sample in enumerate(data.test) if sample.label is not None])
    if not len(labelled):
        raise InputError(
            f"{data.name} has no test image with a known label",
            hint="Put good and defective test images in folders as `adflow list datasets` shows.",
        )
    assert detector.size is not None
    look = _Look(detector, point, after)
    streaming = streams(len(labelled), detector.size, memory)
    pixels: Exact | Streamed = Streamed() if streaming else Exact()
    records: list[dict[str, Any]] = []
    seconds: dict[str, float] = {}
    began = time.perf_counter()
    source = run(detector, labelled, after=look, keep_picture=after is not None, strict=strict, workers=workers)
    for scored in source:
        record = _record(scored, data.root, point)
        record["in_pixels"] = scored.error is None and scored.result.has_truth
        if record["in_pixels"]:
            pixels.add(scored.map, scored.result.truth, _kind(record))
        records.append(record)
        for stage, took in scored.seconds.items():
            seconds[stage] = seconds.get(stage, 0.0) + took
        if progress:
            progress(len(records), len(labelled), "evaluating")
    elapsed = time.perf_counter() - began
    good = [record for record in records if record["error"] is None]
    if not good:
        first = records[0]["error"]
        raise InputError(f"none of the {len(records)} test images of {data.name} could be read; the first: {first}")
    found = _rows(detector, data, pixels, records, point)
    found.cost = {"ms_per_image": 1e3 * elapsed / len(records)}
    found.cost |= {f"{stage}_ms": 1e3 * took / len(good) for stage, took in seconds.items()}
    found.image_threshold, found.image_promise = image_threshold(detector, point)
    for record in records:
        if record["error"] is not None:
            found.notes.append(f"skipped {record['error']}")
        record.pop("in_pixels")
    return found


class _Look:
    """What is found out about each image, in the worker that scored it."""

    def __init__(self, detector: Detector, point: OperatingPoint | None, after: Callable[[Scored], Any] | None) -> None:
        assert detector.size is not None
        self.size: tuple[int, int] = detector.size
        self.detector, self.point, self.after = detector, point, after
        # The network's grid, not the pixel, limits how exactly a peak can be placed.
        self.tolerance = round(6 * min(self.size) / 256)

    def __call__(self, scored: Scored) -> _Seen:
        sample = scored.sample
        truth = truth_of(sample, scored.map.shape, self.size, self.detector.keep_aspect)
        seen = _Seen(truth, sample.mask is not None or sample.label == 0)
        if truth.any():
            seen.hit = metrics.hit_rate([scored.map], [truth], self.tolerance, getattr(self.detector, "margin", 0.0))
        if self.point is not None:
            predicted, regions = regions_at(self.detector, scored.map, self.point)
            seen.intersection = int(np.count_nonzero(predicted & truth))
            seen.union = int(np.count_nonzero(predicted | truth))
            seen.regions = len(regions)
        if self.after is not None:
            self.after(scored)
        return seen


def truth_of(sample: Sample, shape: tuple[int, ...], size: tuple[int, int], keep_aspect: bool) -> np.ndarray:
    """Return the truth [h, w] bool on the grid of the score map; all false without a mask."""
    if sample.mask is None:
        return np.zeros(shape, bool)
    mask = read_mask(sample.mask, sample.mask_index)
    fitted_mask = mask_to(mask, size, keep_aspect)
    if keep_aspect:
        box = fitted(mask.shape, size, keep_aspect)
        fitted_mask = fitted_mask[box.top : box.top + box.height, box.left : box.left + box.width]
    return fitted_mask


def image_threshold(detector: Detector, point: OperatingPoint | None) -> tuple[float | None, str | None]:
    """Return the image score from which an image is called defective, and its promise, as ``adflow score`` does."""
    calibration = detector.calibration
    if calibration is None:
        return None, None
    rate = verdict_rate(detector, point.value if point is not None and point.kind == "flag-rate" else None)
    assert rate is not None
    level = float(np.nextafter(image_level(calibration, rate), np.inf))
    return level, f"at most {100 * rate:.3g} % of good images are stopped, on average"


def _record(scored: Scored, root: Path, point: OperatingPoint | None) -> dict[str, Any]:
    sample = scored.sample
    record: dict[str, Any] = {
        "image": Path(os.path.relpath(sample.image, root)).as_posix(),
        "label": sample.label,
        "defect": sample.defect,
        # Frames of one video are not independent: they are drawn together.
        "group": str(sample.mask) if sample.mask_index is not None else None,
        "score": None if scored.error else scored.image,
        "error": scored.error,
    }
    if scored.error is None:
        seen: _Seen = scored.result
        record |= {"peak": float(scored.map.max()), "hit": seen.hit}
        if point is not None:
            record |= {"intersection": seen.intersection, "union": seen.union, "regions": seen.regions}
    return record


def _kind(record: Mapping[str, Any]) -> str | None:
    """Return the kind of defect, "" where it has no name, None for a good image."""
    return (record["defect"] or "") if record["label"] == 1 else None


def _rows(
    detector: Detector,
    data: Dataset,
    pixels: Exact | Streamed,
    every: Sequence[dict[str, Any]],
    point: OperatingPoint | None,
) -> Evaluation:
    records = [record for record in every if record["error"] is None]
    labels = np.array([record["label"] for record in records])
    scores = [record["score"] for record in records]
    image = metrics.image_metrics(scores, labels)
    undefined = {f"image_{k.removesuffix('_max')}": v for k, v in image.reasons.items()}
    unknown = sum(not record["in_pixels"] for record in records)
    hits = [record["hit"] for record in records if record["hit"] is not None]
    provenance = detector.provenance
    height, width = detector.size or (0, 0)
    row: dict[str, Any] = {
        "dataset": data.family,
        "class": data.class_,
        "method": detector.method(),
        "backbone": detector.backbone.name,
        "recipe": provenance.get("recipe"),
        "seed": provenance.get("seed"),
        "size": f"{height}x{width}",
        "image_auroc": image.auroc,
        "image_ap": image.ap,
        "image_f1": image.f1_max,
    }
    curves: dict[str, dict[str, list[float]]] = {}
    if len(set(labels.tolist())) == 2:
        curves["roc"] = _points(metrics.roc_curve(scores, labels, CURVE_POINTS))
    if len(pixels) and any(record["in_pixels"] and record["label"] == 1 for record in records):
        pixel = pixels.whole()
        undefined |= {_pixel_name(k): v for k, v in pixel.reasons.items()}
        row |= {
            "pixel_auroc": pixel.auroc,
            "pixel_ap": pixel.ap,
            "pixel_f1": pixel.f1_max,
            "aupro": pixel.aupro,
            "n_regions": pixel.n_regions,
        }
        if pixel.bounds:
            row["bounds"] = {_pixel_name(k): v for k, v in pixel.bounds.items()}
        if pixel.pro is not None:
            curves["pro"] = _points(pixel.pro)
    else:
        names = ("pixel_auroc", "pixel_ap", "pixel_f1", "aupro")
        reason = _NO_MASKS if (labels == 1).any() else "no defective image in the test set"
        row |= dict.fromkeys(names, math.nan) | {"n_regions": 0}
        undefined |= dict.fromkeys(names, reason)
    row["hit"] = float(np.mean(hits)) if hits else math.nan
    if not hits:
        undefined["hit"] = undefined.get("pixel_auroc", _NO_MASKS)
    row |= {
        "n_train": provenance.get("images"),
        "n_test": len(labels),
        "n_defects": int((labels == 1).sum()),
        "n_without_mask": unknown,
        "unreadable": len(every) - len(records),
        "streaming": pixels.streaming,
    }
    if point is not None:
        row |= _at_point(point, records, labels)
        row |= _oracle(pixels, undefined, bool(hits))
        if not (labels == 0).any():
            undefined |= dict.fromkeys(("false_regions_per_normal", "flagged_share"), "no good image in the test set")
        if not hits:
            undefined |= dict.fromkeys(("iou_defective", "iou_defective_oracle"), undefined["hit"])
    histograms = None
    if isinstance(pixels, Exact) and len(pixels):
        histograms = pixels.histograms()
    in_pixels = [i for i, record in enumerate(every) if record["in_pixels"]]
    row["undefined"] = undefined
    row["defects"] = per_defect(records, pixels, histograms)
    return Evaluation(row, list(every), curves, histograms, in_pixels)


def _pixel_name(name: str) -> str:
    return name if name == "aupro" else f"pixel_{name.removesuffix('_max')}"


def _points(curve: metrics.Curve) -> dict[str, list[float]]:
    return {"x": [round(v, 7) for v in curve.x.tolist()], "y": [round(v, 7) for v in curve.y.tolist()]}


def iou_of(record: Mapping[str, Any]) -> float:
    """Return intersection over union of one image as U-Flow counts it: both empty gives 1."""
    return float(record["intersection"] / record["union"]) if record["union"] else 1.0


def _at_point(point: OperatingPoint, records: Sequence[dict[str, Any]], labels: np.ndarray) -> dict[str, Any]:
    """Return the figures of the automatic threshold; IoU per image, normal images included (U-Flow's mIoU)."""
    known = [record for record in records if record["in_pixels"]]
    iou = np.array([iou_of(record) for record in known])
    marked = np.array([record["hit"] is not None for record in known], dtype=bool)
    normal, defective = labels == 0, labels == 1
    regions = np.array([record["regions"] for record in records])
    return {
        "setting": f"{point.kind} {point.value:g}",
        "threshold": point.threshold,
        "mean_iou": _mean(iou),
        "iou_defective": _mean(iou[marked]),
        "false_regions_per_normal": _mean(regions[normal]),
        "flagged_share": _mean(regions[normal] > 0),
        "missed_share": _mean(regions[defective] == 0),
    }


def _oracle(pixels: Exact | Streamed, undefined: dict[str, str], marked: bool) -> dict[str, Any]:
    """Return the best mean IoU any threshold gives on these masks: an upper limit, not an operating point."""
    names = ("mean_iou_oracle", "iou_defective_oracle")
    if isinstance(pixels, Streamed) or not len(pixels):
        undefined |= dict.fromkeys(names, _STREAMED if pixels.streaming else _NO_MASKS)
        return dict.fromkeys(names, math.nan)
    every = pixels.oracle(anomalous_only=False)
    found: dict[str, Any] = {"mean_iou_oracle": every.value, "oracle_threshold": every.threshold}
    if marked:
        only = pixels.oracle(anomalous_only=True)
        found |= {"iou_defective_oracle": only.value, "oracle_threshold_defective": only.threshold}
    return found


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else math.nan


def per_defect(
    records: Sequence[dict[str, Any]],
    pixels: Exact | Streamed,
    histograms: metrics.PixelHistograms | None,
) -> dict[str, dict[str, float]]:
    """Return the figures of each kind of defect against all good images, and of all the others without it.

    Pixel figures come from the histograms (within 1e-3 of the exact ones, usually 1e-5) or the streamed counters:
    sorting all pixels anew for every kind would take longer than all the rest.
    """
    kinds = sorted({record["defect"] for record in records if record["label"] == 1 and record["defect"]})
    if len(kinds) < 2:
        return {}
    good = [record["label"] == 0 for record in records]
    known = [record for record in records if record["in_pixels"]]
    found: dict[str, dict[str, float]] = {}
    for kind in kinds:
        mine = [record for record in records if record["defect"] == kind and record["label"] == 1]
        line: dict[str, float] = {"n": len(mine)}
        hits = [record["hit"] for record in mine if record["hit"] is not None]
        line["hit"] = float(np.mean(hits)) if hits else math.nan
        if "regions" in mine[0]:
            line["iou"] = _mean(np.array([iou_of(r) for r in mine if r["hit"] is not None]))
            line["missed_share"] = float(np.mean([r["regions"] == 0 for r in mine]))
        for prefix, chosen in (
            ("", [g or r["defect"] == kind for g, r in zip(good, records, strict=True)]),
            ("without_", [g or r["defect"] != kind for g, r in zip(good, records, strict=True)]),
        ):
            picked = [record for record, keep in zip(records, chosen, strict=True) if keep]
            image = metrics.image_metrics([r["score"] for r in picked], [r["label"] for r in picked])
            line[f"{prefix}image_auroc"] = image.auroc
            names = {r["image"] for r in picked}
            if histograms is not None:
                weights = np.array([[float(r["image"] in names) for r in known]])
                values = {k: float(s(weights)[0]) for k, s in histograms.statistics().items()}
            elif isinstance(pixels, Streamed):
                wanted = [k for k in pixels.streams if k is None or (k == kind) == (prefix == "")]
                result = pixels.of(wanted).result()
                values = {"auroc": result.auroc, "ap": result.ap, "aupro": result.aupro}
            else:
                values = {}
            for name, value in values.items():
                line[f"{prefix}{_pixel_name(name)}"] = value
        found[kind] = line
    return found
