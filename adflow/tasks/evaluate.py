"""``evaluate``: how good a fitted detector is on labelled images; one row a class."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from adflow import metrics
from adflow.calibration import plain_regions
from adflow.data import Dataset, Sample
from adflow.detector import Detector, Progress
from adflow.errors import InputError
from adflow.imaging import fitted, mask_to, read_mask
from adflow.pipeline import Scored, run
from adflow.tasks._point import OperatingPoint


@dataclass
class Evaluation:
    """One class, one detector.

    Attributes:
        row: metrics as fractions, counts, times, with ``undefined`` for what has no value.
        records: per image: path, label, defect, score, peak, regions, hit.
        curves: "roc" (images) and "pro" (pixels) as :class:`adflow.metrics.Curve`.
    """

    row: dict[str, Any]
    records: list[dict[str, Any]]
    curves: dict[str, metrics.Curve] = field(default_factory=dict)


@dataclass
class _Image:
    """What ``after`` computes in the worker for one image."""

    truth: np.ndarray
    intersection: int
    union: int
    regions: int
    hit: bool | None


def evaluate_detector(
    detector: Detector,
    data: Dataset,
    *,
    point: OperatingPoint | None = None,
    strict: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Score the test images of ``data`` and compare with their masks, at the size of the network input.

    Args:
        detector: fitted.
        data: one class with test images of known label.
        point: operating point of the automatic threshold; None leaves its columns out.
        strict: an unreadable image is fatal.
        workers: images at once.
        progress: called with (done, total, message).

    Raises:
        InputError: there is no labelled test image.
    """
    labelled = [sample for sample in data.test if sample.label is not None]
    if not labelled:
        raise InputError(
            f"{data.name} has no test image with a known label",
            hint="Put good and defective test images in folders as `adflow list datasets` shows.",
        )
    assert detector.size is not None
    size, keep = detector.size, detector.keep_aspect
    tolerance = round(6 * min(size) / 256)

    def compare(scored: Scored) -> _Image:
        truth = truth_of(scored.sample, scored.map.shape, size, keep)
        predicted, regions = np.zeros_like(truth), 0
        if point is not None:
            if detector.calibration is not None:
                predicted, found = detector.calibration.segment(scored.map, point.threshold)
            else:
                predicted, found = plain_regions(scored.map, point.threshold)
            regions = len(found)
        hit = peak_on_mask(scored.map, truth, tolerance) if truth.any() else None
        return _Image(truth, int((predicted & truth).sum()), int((predicted | truth).sum()), regions, hit)

    maps, masks, records = [], [], []
    began = time.perf_counter()
    for scored in run(detector, labelled, after=compare, strict=strict, workers=workers):
        sample = scored.sample
        record: dict[str, Any] = {
            "image": str(sample.image),
            "label": sample.label,
            "defect": sample.defect,
            "score": scored.image,
            "error": scored.error,
        }
        if scored.error is None:
            image: _Image = scored.result
            maps.append(scored.map)
            masks.append(image.truth)
            record |= {
                "peak": float(scored.map.max()),
                "intersection": image.intersection,
                "union": image.union,
                "regions": image.regions,
                "hit": image.hit,
            }
        records.append(record)
        if progress:
            progress(len(records), len(labelled), "evaluating")
    seconds = time.perf_counter() - began
    good = [record for record in records if record["error"] is None]
    if not good:
        raise InputError(f"none of the {len(records)} test images of {data.name} could be read")
    row = _row(detector, data, maps, masks, good, point)
    row |= {"ms_per_image": 1e3 * seconds / len(records), "unreadable": len(records) - len(good)}
    labels = [record["label"] for record in good]
    curves = {"roc": metrics.roc_curve([record["score"] for record in good], labels)} if len(set(labels)) == 2 else {}
    if any(mask.any() for mask in masks):
        curves["pro"] = metrics.pro_curve(maps, masks)
    return Evaluation(row, records, curves)


def truth_of(sample: Sample, shape: tuple[int, ...], size: tuple[int, int], keep_aspect: bool) -> np.ndarray:
    """Return the truth [h, w] bool on the grid of the score map; all false for a good image."""
    if sample.mask is None:
        return np.zeros(shape, bool)
    mask = read_mask(sample.mask, sample.mask_index)
    fitted_mask = mask_to(mask, size, keep_aspect)
    if keep_aspect:
        box = fitted(mask.shape, size, keep_aspect)
        fitted_mask = fitted_mask[box.top : box.top + box.height, box.left : box.left + box.width]
    return fitted_mask


def peak_on_mask(score_map: np.ndarray, truth: np.ndarray, tolerance: int, margin: float = 0.03) -> bool:
    """Return whether the highest pixel, outer ``margin`` left out, lies within ``tolerance`` pixels of the mask.

    An image can be ranked as defective for the wrong place; this tells such luck from detection.
    """
    h, w = score_map.shape
    dy, dx = int(h * margin), int(w * margin)
    inner = score_map[dy : h - dy, dx : w - dx]
    y, x = np.unravel_index(int(inner.argmax()), inner.shape)
    y, x = int(y) + dy, int(x) + dx
    near = truth[max(0, y - tolerance) : y + tolerance + 1, max(0, x - tolerance) : x + tolerance + 1]
    return bool(near.any())


def _row(
    detector: Detector,
    data: Dataset,
    maps: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    records: Sequence[dict[str, Any]],
    point: OperatingPoint | None,
) -> dict[str, Any]:
    labels = np.array([record["label"] for record in records])
    scores = np.array([record["score"] for record in records])
    pixel = metrics.pixel_metrics(maps, masks)
    image = metrics.image_metrics(scores, labels)
    provenance = detector.provenance
    hits = [record["hit"] for record in records if record["hit"] is not None]
    undefined = {f"image_{k}": v for k, v in image.reasons.items()}
    undefined |= {k if k == "aupro" else f"pixel_{k}": v for k, v in pixel.reasons.items()}
    row: dict[str, Any] = {
        "dataset": data.family,
        "class": data.class_,
        "method": detector.method(),
        "backbone": detector.backbone.name,
        "recipe": provenance.get("recipe"),
        "seed": provenance.get("seed"),
        "size": list(detector.size or ()),
        "image_auroc": image.auroc,
        "image_ap": image.ap,
        "image_f1": image.f1_max,
        "pixel_auroc": pixel.auroc,
        "pixel_ap": pixel.ap,
        "pixel_f1": pixel.f1_max,
        "aupro": pixel.aupro,
        "hit": float(np.mean(hits)) if hits else float("nan"),
        "n_train": provenance.get("images"),
        "n_test": len(labels),
        "n_defects": int((labels == 1).sum()),
        "n_regions": pixel.n_regions,
        "fit_seconds": provenance.get("seconds"),
        "undefined": undefined,
        "defects": per_defect(maps, masks, records),
    }
    if point is not None:
        # Intersection over union as in U-Flow: per image, both empty counts 1, normal images included.
        iou = np.array([(r["intersection"] / r["union"]) if r["union"] else 1.0 for r in records])
        normal, defective = labels == 0, labels == 1
        regions = np.array([record["regions"] for record in records])
        row |= {
            "setting": f"{point.kind} {point.value:g}",
            "mean_iou": float(iou.mean()),
            "iou_defective": float(iou[defective].mean()) if defective.any() else float("nan"),
            "false_regions_per_normal": float(regions[normal].mean()) if normal.any() else float("nan"),
            "flagged_share": float((regions[normal] > 0).mean()) if normal.any() else float("nan"),
            "missed_share": float((regions[defective] == 0).mean()) if defective.any() else float("nan"),
        }
    return row


def per_defect(
    maps: Sequence[np.ndarray], masks: Sequence[np.ndarray], records: Sequence[dict[str, Any]]
) -> dict[str, dict[str, float]]:
    """Return the metrics of each kind of defect against all good images, the other kinds left out."""
    kinds = sorted({record["defect"] for record in records if record["label"] == 1 and record["defect"]})
    if len(kinds) < 2:
        return {}
    found: dict[str, dict[str, float]] = {}
    for kind in kinds:
        chosen = [i for i, record in enumerate(records) if record["label"] == 0 or record["defect"] == kind]
        image = metrics.image_metrics([records[i]["score"] for i in chosen], [records[i]["label"] for i in chosen])
        pixel = metrics.pixel_metrics([maps[i] for i in chosen], [masks[i] for i in chosen])
        found[kind] = {
            "n": sum(record["defect"] == kind for record in records),
            "image_auroc": image.auroc,
            "pixel_auroc": pixel.auroc,
            "aupro": pixel.aupro,
        }
    return found
