"""Overlays of an evaluation: all images, or only the worst misses and false alarms that the report shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adflow._drawing import Verdict
from adflow.data import Dataset, Sample
from adflow.detector import Detector
from adflow.imaging import Box, read_mask, restore
from adflow.overlays import Scale, write_overlay
from adflow.pipeline import Scored, run
from adflow.report import ImageRecord, worst
from adflow.tasks._cells import Measuring
from adflow.tasks._measure import Evaluation, image_threshold
from adflow.tasks._point import OperatingPoint, regions_at
from adflow.tasks.segment import output_names, overlay_scale

SUFFIX = ".jpg"  # an eighth of a PNG's bytes; these are for people


class Drawer:
    """Draws overlays of one cell on one colour scale; safe to call from many threads.

    Args:
        detector: fitted.
        data: the class.
        point: operating point, or None.
        folder: where the pictures go.
        size: longer side of each picture in pixels; None = the original size.
        scale: colour scale; None = that of the operating point.
    """

    def __init__(
        self,
        detector: Detector,
        data: Dataset,
        point: OperatingPoint | None,
        folder: Path,
        size: int | None,
        scale: Scale | None = None,
    ) -> None:
        self.detector, self.point, self.folder, self.size = detector, point, folder, size
        self.scale = scale or (overlay_scale(detector, point) if point is not None else None)
        # The verdict is that of the page around the picture: of the image score, not of the regions.
        self.level = image_threshold(detector, point)[0]
        self.names = output_names([sample.image for sample in data.test])

    def path(self, sample: Sample) -> Path:
        """Return where the picture of an image goes."""
        return self.folder / (self.names[sample.image] + SUFFIX)

    def __call__(self, scored: Scored) -> None:
        assert scored.picture is not None and self.scale is not None
        box = Box(0, 0, *scored.map.shape)
        mask = None
        verdict: Verdict | None = None
        score = self.scale.label(float(scored.map.max()))
        if self.point is not None:
            small, regions = regions_at(self.detector, scored.map, self.point)
            mask = restore(small.astype(np.float32), box, scored.original) >= 0.5
            verdict = "defect" if regions else "good"
        if self.level is not None:
            score = scored.image
            verdict = "defect" if score >= self.level else "good"
        sample = scored.sample
        truth = None if sample.mask is None else read_mask(sample.mask, sample.mask_index)
        write_overlay(
            self.path(sample),
            scored.picture,
            restore(scored.map, box, scored.original),
            mask=mask,
            truth=truth,
            scale=self.scale,
            title=sample.image.name if sample.defect is None else f"{sample.defect}/{sample.image.name}",
            score=score,
            threshold=self.level,
            verdict=verdict,
            overlay_size=self.size,
        )


def scale_of(found: Evaluation) -> Scale:
    """Return a colour scale from the scores of the images themselves, for detectors without a calibration."""
    peaks = sorted(r["peak"] for r in found.records if r["error"] is None)
    good = sorted(r["peak"] for r in found.records if r["error"] is None and r["label"] == 0) or peaks
    low, high = good[len(good) // 2], max(peaks[-1], good[-1])
    return Scale(low, high if high > low else low + max(abs(low), 1e-6))


def chosen(found: Evaluation, count: int) -> list[int]:
    """Return the numbers of the records worth a picture: the lowest defects and the highest good images."""
    records = [
        ImageRecord(r["image"], math.nan if r["score"] is None else r["score"], r["label"]) for r in found.records
    ]
    return worst(records, count)


def draw(
    detector: Detector,
    data: Dataset,
    found: Evaluation,
    point: OperatingPoint | None,
    measuring: Measuring,
    folder: Path,
    drawn: Drawer | None,
) -> dict[str, str]:
    """Draw the chosen images of a cell, or all when asked for and not yet ``drawn``.

    Only these are scored a second time: keeping the pictures of all images would take memory without bound.

    Returns:
        Image (as in its record) -> path of its picture relative to ``folder``'s parent.
    """
    labelled = [sample for sample in data.test if sample.label is not None]
    readable = [i for i, record in enumerate(found.records) if record["error"] is None]
    wanted = readable if measuring.overlays else chosen(found, measuring.pictures)
    drawer = drawn
    if drawer is None and wanted:
        scale = None if point is not None else scale_of(found)
        drawer = Drawer(detector, data, point, folder, measuring.overlay_size, scale)
        samples: Sequence[Any] = [labelled[i] for i in wanted]
        for _ in run(detector, samples, after=drawer, keep_picture=True, keep_map=False, workers=measuring.workers):
            pass
    if drawer is None:
        return {}
    root = folder.parent
    return {
        found.records[i]["image"]: drawer.path(labelled[i]).relative_to(root).as_posix()
        for i in chosen(found, measuring.pictures)
    }
