"""How good maps and image scores are: exact on arrays, streaming with a stated error, with intervals.

Pure functions of numpy arrays. Scores: higher = more anomalous, any unit, only their order counts (except for
a threshold, which has the scores' unit). All results are fractions, not percent. A value that is not defined
(no anomaly, no mask, no region) is NaN and ``reasons`` says why; invalid input is an ``InputError``.

Definitions. All pixels of all images of a class, the normal ones included, are pooled into one list. AUROC,
AP (average precision, the step-wise sum that scikit-learn uses) and F1-max are those of that list. AUPRO
(Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 2021,
https://doi.org/10.1007/s11263-020-01400-4, section 5.3) is the area under the mean overlap of the regions,
PRO(t) = mean_k |C_k and {S >= t}| / |C_k|, against the false-positive rate, from 0 to ``limit``, divided by
``limit``; equal scores make one point of the curve and the end at ``limit`` is interpolated. Regions are
8-connected, labelled at the size of the maps, so tiny defects that vanish when masks are made smaller are not
counted: ``n_regions`` is reported for that reason.

Why one sort is enough: each of these numbers is a mean over *positive* pixels of a function of two ranks, the
pixel's rank among all pixels and among the positive ones. So all pixels are sorted once, in place in one
copy, the few positive ones are looked up in it, and the areas are closed sums (``ramp_area``) without ever
building a curve.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from adflow.errors import unknown
from adflow.metrics._base import (
    Array,
    Curve,
    ImageMetrics,
    Maps,
    Masks,
    PixelMetrics,
    Regions,
    check_limit,
    why_undefined,
)
from adflow.metrics._iou import (
    Operating,
    Overlaps,
    fair_threshold,
    false_regions,
    fp_images,
    hit_rate,
    iou_anomalous_only,
    iou_curve,
    iou_micro,
    iou_per_image,
    mean_iou,
    oracle_threshold,
    region_overlap,
)
from adflow.metrics._rank import Ranked, accumulate, curves
from adflow.metrics._resampling import (
    DeLong,
    Difference,
    Interval,
    PixelHistograms,
    Statistic,
    auroc_statistic,
    bootstrap_ci,
    delong,
    mean_statistic,
    paired_bootstrap,
    pixel_statistics,
)
from adflow.metrics._streaming import StreamingPixelMetrics
from adflow.metrics._variants import aupro_cflow, aupro_uflow, cflow_curve

__all__ = [
    "Curve",
    "DeLong",
    "Difference",
    "ImageMetrics",
    "Interval",
    "Operating",
    "Overlaps",
    "PixelHistograms",
    "PixelMetrics",
    "Regions",
    "Statistic",
    "StreamingPixelMetrics",
    "aupro",
    "auroc_statistic",
    "bootstrap_ci",
    "cflow_curve",
    "delong",
    "fair_threshold",
    "false_regions",
    "fp_images",
    "hit_rate",
    "image_metrics",
    "iou_anomalous_only",
    "iou_curve",
    "iou_micro",
    "iou_per_image",
    "mean_iou",
    "mean_statistic",
    "oracle_threshold",
    "paired_bootstrap",
    "pixel_metrics",
    "pixel_statistics",
    "pro_curve",
    "region_overlap",
    "roc_curve",
]


def pixel_metrics(maps: Maps, masks: Masks, limit: float = 0.3, *, points: int = 0) -> PixelMetrics:
    """Return exact pixel AUROC, AP, F1-max and AUPRO from one sort.

    Memory over the data: one copy of the maps and 8 bytes for each positive pixel (20 for float64 maps), so
    about 4.2 bytes a pixel for float32 maps with few defects.

    Args:
        maps: [N, H, W], or N arrays [H, W] of any sizes.
        masks: as the maps, bool or 0 and 1; None for a normal image.
        limit: the highest false-positive rate for AUPRO, in (0, 1].
        points: when not 0, also return ROC and PRO curves of at most so many points.

    Raises:
        InputError: shapes that do not fit, NaN or infinite scores, masks that are not 0 and 1.
    """
    check_limit(limit)
    ranked = Ranked(maps, masks)
    summed = accumulate(ranked, limit)
    reasons = why_undefined(ranked.n_positive, ranked.n_negative, len(ranked.area), "pixel")
    aupro = float(np.mean(summed.region)) / limit if "aupro" not in reasons else np.nan
    of_regions = summed.region / limit if ranked.n_negative else np.full(len(ranked.area), np.nan)
    roc = pro = None
    if points and "auroc" not in reasons:
        roc, pro = curves(ranked, points, limit)
    return PixelMetrics(
        auroc=summed.auroc if "auroc" not in reasons else np.nan,
        ap=summed.ap if "ap" not in reasons else np.nan,
        f1_max=summed.f1 if "f1_max" not in reasons else np.nan,
        f1_threshold=summed.threshold if "f1_max" not in reasons else np.nan,
        aupro=aupro,
        limit=limit,
        n_images=ranked.n_images,
        n_pixels=ranked.everything.size,
        n_positive=ranked.n_positive,
        n_regions=len(ranked.area),
        size=ranked.size,
        regions=Regions(ranked.image, ranked.area, of_regions),
        roc=roc,
        pro=pro,
        reasons=reasons,
    )


def image_metrics(scores: Array | Sequence[float], labels: Array | Sequence[int | bool]) -> ImageMetrics:
    """Return exact image AUROC, AP and F1-max.

    Args:
        scores: [N] image scores, higher = more anomalous.
        labels: [N] 1 or True for an anomalous image, 0 or False for a normal one.

    Raises:
        InputError: shapes that do not fit, NaN or infinite scores, labels that are not 0 and 1.
    """
    ranked = Ranked.of_scores(scores, labels)
    summed = accumulate(ranked, 1.0)
    reasons = why_undefined(ranked.n_positive, ranked.n_negative, 1, "image")
    return ImageMetrics(
        auroc=summed.auroc if "auroc" not in reasons else np.nan,
        ap=summed.ap if "ap" not in reasons else np.nan,
        f1_max=summed.f1 if "f1_max" not in reasons else np.nan,
        f1_threshold=summed.threshold if "f1_max" not in reasons else np.nan,
        n_images=ranked.everything.size,
        n_anomalous=ranked.n_positive,
        reasons={name: why for name, why in reasons.items() if name != "aupro"},
    )


def aupro(
    maps: Maps, masks: Masks, limit: float = 0.3, method: Literal["official", "cflow", "uflow"] = "official"
) -> float:
    """Return the area under the per-region overlap curve up to ``limit``, divided by ``limit``.

    Args:
        maps: score maps.
        masks: their masks.
        limit: the highest false-positive rate.
        method: "official" (MVTec; defined wherever there is a region and a normal pixel), or the value that
            the code of "cflow" or "uflow" would print, for comparison with their tables only: both are NaN on
            some maps and the first can exceed 1.

    Raises:
        UsageError: an unknown method.
    """
    check_limit(limit)
    if method == "official":
        return pixel_metrics(maps, masks, limit).aupro
    variants = {"cflow": aupro_cflow, "uflow": aupro_uflow}
    if method not in variants:
        raise unknown("AUPRO method", method, ["official", *variants])
    return variants[method](maps, masks, limit)


def roc_curve(scores: Array | Sequence[float], labels: Array | Sequence[int | bool], points: int = 400) -> Curve:
    """Return at most ``points`` points of the ROC curve of image scores, each exactly on it, with both ends.

    Without an anomalous or without a normal image the curve is empty.
    """
    ranked = Ranked.of_scores(scores, labels)
    if not ranked.n_positive or not ranked.n_negative:
        return Curve(np.zeros(0), np.zeros(0), np.zeros(0))
    return curves(ranked, points, 1.0)[0]


def pro_curve(maps: Maps, masks: Masks, limit: float = 0.3, points: int = 400) -> Curve:
    """Return at most ``points`` points of the PRO curve up to ``limit``, each exactly on it, with both ends.

    Without a region or without a normal pixel the curve is empty.
    """
    check_limit(limit)
    ranked = Ranked(maps, masks)
    if not ranked.n_positive or not ranked.n_negative:
        return Curve(np.zeros(0), np.zeros(0), np.zeros(0))
    return curves(ranked, points, limit)[1]
