"""``fit --estimate``: time and memory of a fit before it starts, measured on a few of its images.

Decoding and backbone are timed on some images. The method then learns from 32, 64, 128, ... images, made of these
few, until that takes a few seconds, and the course is extended to all of them; of a training a few steps are timed. It
is a forecast for this machine as it is now: other programs and other disks change it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from adflow._system import forget_peak, peak_bytes, resident_bytes
from adflow.calibration import Calibration
from adflow.data import Chosen, Dataset, Images
from adflow.detector import FeatureDetector
from adflow.errors import InputError
from adflow.features import DTYPES, FeatureBank
from adflow.imaging import Size
from adflow.pipeline import run
from adflow.tasks._bank import can_share
from adflow.tasks._device import choose_device
from adflow.tasks.fit import FitOptions, prepare, split

_IMAGES = 32  # that are read
_LONG = 3.0  # seconds: a probe that takes longer is the last
_STEPS, _STEP_SECONDS = 20, 2.0  # of a training that are timed; whichever comes first
_SCORED = 8  # images that are scored after a probe


class _Probe(NamedTuple):
    """A fit on ``images``: seconds of learning, seconds to score and calibrate one image, bytes beside the bank."""

    images: int
    learn: float
    score: float
    extra: int


def estimate(data: Dataset, options: FitOptions, *, start: float = 0.0) -> dict[str, Any]:
    """Return what fitting ``data`` will take; nothing is written.

    Args:
        data: one class.
        options: how it would be fitted.
        start: seconds that a process takes before it begins, libraries most of them; part of the total, as is what the
            first images pay for loading more.

    Returns:
        images, held_out, seconds {"start", "features", "fit", "calibration", "total"}, milliseconds an image
        {"features", "score"}, memory and disk in bytes (memory None where the system does not tell), images of the
        largest probe.

    Raises:
        InputError: fewer than 4 images that can be read.
    """
    detector, size, keep_aspect = prepare(data, options)
    device = str(choose_device(options.device))
    chosen, held = split(len(data.train), options)
    few = Chosen(data.train, np.linspace(0, len(data.train) - 1, min(_IMAGES, len(data.train))).round().astype(int))
    if len(few) < 4:
        raise InputError(
            f"{len(few)} training images, expected at least 4 to estimate from",
            hint="Fit at once: so few take seconds.",
        )
    detector.to(device)
    images = Images(few, size, keep_aspect=keep_aspect, strict=options.strict)

    def build(source: Images) -> FeatureBank:
        return FeatureBank.build(detector.backbone, source, workers=options.resources.workers)

    began = time.perf_counter()
    build(images.part(0, 4)).close()
    warm = time.perf_counter() - began
    forget_peak()
    began = time.perf_counter()
    bank = build(images)
    per_image = (time.perf_counter() - began) / len(images)
    loading = max(0.0, warm - 4 * per_image)  # the first images pay for loading libraries
    stage = peak_bytes()
    row = sum(c * h * w for c, (h, w) in zip(bank.channels, bank.grids, strict=True))
    row *= DTYPES[options.resources.dtype].itemsize
    own = not isinstance(detector, FeatureDetector) or not detector.learns_from_bank
    probes: list[_Probe] = []
    wanted, most, took = 32, len(chosen), 0.0
    while not probes or (probes[-1].images < most and (took < _LONG or len(probes) < 2)):
        began = time.perf_counter()
        probes.append(_probe(data, options, size, keep_aspect, few, None if own else bank, min(wanted, most)))
        took = time.perf_counter() - began
        wanted *= 2
    bank.close()
    learn = max(0.0, _extended([(p.images, p.learn) for p in probes], most))
    score = max(probes[-1].score, _extended([(p.images, p.score) for p in probes], most))
    extra = max(probes[-1].extra, _extended([(p.images, float(p.extra)) for p in probes], most))
    times = options.folds + 1 if options.folds > 1 else 1
    shared = not own and bool(held or options.folds > 1) and can_share(detector, options.settings)
    if shared:  # calibration scores from the features of the fit
        score = max(0.0, score - per_image)
    count = len(data.train) if shared else most
    scored = len(data.train) if options.folds > 1 else len(held)
    if options.folds <= 1 and held:
        scored += len(range(0, most, max(1, most // len(held))))  # images of the fit that are scored beside them
    features = 0.0 if own else per_image * count
    in_ram = 0 if own else row * count
    disk = in_ram if in_ram > options.resources.memory else 0
    held_in_ram = in_ram - disk
    now = resident_bytes()
    few_bytes = row * len(few)
    memory = None if not now or not stage else int(max(stage, now - few_bytes + extra) + held_in_ram)
    # So do the first maps that are counted.
    loading += max(0.0, probes[0].score - probes[-1].score) * min(_SCORED, len(few))
    seconds = {"start": start + loading, "features": features, "fit": learn * times, "calibration": score * scored}
    return {
        "data": data.name,
        "method": detector.method(),
        "size": list(size),
        "images": len(chosen),
        "held_out": len(data.train) if options.folds > 1 else len(held),
        "seconds": {k: round(v, 2) for k, v in (seconds | {"total": sum(seconds.values())}).items()},
        "ms_per_image": {"features": round(1e3 * per_image, 2), "score": round(1e3 * score, 2)},
        "memory": memory,
        "disk": disk,
        "probed_with": probes[-1].images,
    }


def _probe(
    data: Dataset,
    options: FitOptions,
    size: Size,
    keep_aspect: bool,
    few: Chosen,
    bank: FeatureBank | None,
    count: int,
) -> _Probe:
    """Fit on ``count`` images made of the few, from their features in ``bank`` where there is one."""
    detector, _, _ = prepare(data, options)
    detector.to(choose_device(options.device))
    detector.keep_aspect = keep_aspect
    training = _Training()
    before = resident_bytes()
    forget_peak()
    began = time.perf_counter()
    source = Images(Chosen(few, [i % len(few) for i in range(count)]), size, keep_aspect)
    features = None if bank is None else bank.subset([i % len(bank) for i in range(count)])
    resources = replace(options.resources, checkpoint=None, bank=features)
    detector.fit(source, seed=options.seed, resources=resources, progress=training)
    learn = time.perf_counter() - began + training.left()
    peak = peak_bytes()
    scored = few[: min(_SCORED, len(few))]
    began = time.perf_counter()
    found = [s for s in run(detector, scored, workers=options.resources.workers) if s.error is None]
    if options.holdout or options.folds > 1:
        Calibration.from_maps([s.map for s in found], np.array([s.image for s in found]))
    score = (time.perf_counter() - began) / len(scored)
    return _Probe(count, learn, score, max(0, peak - before))


class _Training:
    """Lets a training run for a few steps, and knows what the others will take."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.first = 0.0
        self.per_step = 0.0
        self.missing = 0

    def __call__(self, done: int, total: int, message: str) -> bool:
        if message != "training":
            return False
        now = time.perf_counter()
        if done == 1:
            self.first = now  # the first step pays for allocating
            return False
        self.per_step = (now - self.first) / (done - 1)
        enough = done >= _STEPS or now - self.first > _STEP_SECONDS
        if enough:
            self.missing += total - done
        return enough

    def left(self) -> float:
        return self.missing * self.per_step


def _extended(points: Sequence[tuple[int, float]], to: int) -> float:
    """Return the value at ``to``: along the line of the last two points, or the power where they grow like one.

    >>> _extended([(32, 3.0), (64, 5.0)], 128), _extended([(16, 1.0), (32, 4.0), (64, 16.0)], 128)
    (9.0, 64.0)
    """
    (x, y) = points[-1]
    if to <= x or len(points) == 1 or y <= 0:
        return y * to / x if len(points) == 1 else y
    x0, y0 = points[-2]
    power = math.log(y / y0) / math.log(x / x0) if 0 < y0 < y else 0.0
    if power > 1.4 and x0 < x:  # a line would fall short
        return float(y * (to / x) ** min(power, 2.0))
    return float(y + max(0.0, y - y0) * (to - x) / (x - x0))
