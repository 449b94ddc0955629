"""``score``: one number and a verdict for every image."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from adflow._files import make_folder, write_text
from adflow._grid import frame_to_csv
from adflow.data import Sample
from adflow.detector import Detector, Progress
from adflow.pipeline import Scored, default_workers, run

# Images flagged by chance when the user names no rate: the smallest of these that the held-out images can carry.
DEFAULT_RATES = (0.01, 0.05, 0.1)

DRIFT_IMAGES = 8  # fewer say nothing about a shift


def verdict_rate(detector: Detector, rate: float | None) -> float | None:
    """Return the share of good images that may be called defective, or None without calibration.

    A conformal p-value of n held-out images is at least 1 / (n + 1): smaller rates would call nothing defective.
    """
    if detector.calibration is None:
        return None
    if rate is not None:
        # Raises when the held-out images cannot carry the rate.
        detector.calibration.flag_threshold(rate)
        return rate
    reachable = [r for r in DEFAULT_RATES if detector.calibration.n + 1 >= 1 / r]
    return reachable[0] if reachable else 1 / (detector.calibration.n + 1)


def score(
    detector: Detector,
    samples: Sequence[Sample],
    *,
    rate: float | None = None,
    out: Path | None = None,
    strict: bool = False,
    workers: int | None = None,
    through: Callable[..., Iterator[Scored]] = run,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score every image.

    The p-value of an image is (1 + held-out good images scoring at least as high) / (1 + all held-out good images):
    a good image falls at or below ``rate`` with probability at most ``rate``, whatever the distribution of scores
    (conformal prediction; Vovk, Gammerman, Shafer, Algorithmic Learning in a Random World, 2005).

    Args:
        detector: fitted.
        samples: images.
        rate: share of good images that may be called defective; None = the smallest usual one that can be kept.
        out: folder for scores.csv and scores.jsonl, or None.
        strict: an unreadable image is fatal.
        workers: images at once.
        through: how images become scores: here, or on a cluster (:meth:`adflow.tasks._ray.Cluster.images`).
        progress: called with (done, total, message).

    Returns:
        {"rows": [{"image", "score", "p_value", "verdict", "error"}], "rate", "drift", "profile": {"images", "workers",
        "seconds", "stages"}}: seconds on the clock, and of all workers together in each stage.
    """
    began = time.perf_counter()
    limit = verdict_rate(detector, rate)
    rows: list[dict[str, Any]] = []
    seconds: dict[str, float] = {}
    for scored in through(detector, samples, keep_map=False, strict=strict, workers=workers):
        rows.append(row_of(scored, detector, limit))
        for stage, took in scored.seconds.items():
            seconds[stage] = seconds.get(stage, 0.0) + took
        if progress:
            progress(len(rows), len(samples), "scoring")
    values = np.array([row["score"] for row in rows if row["error"] is None])
    known = detector.calibration if len(values) >= DRIFT_IMAGES else None
    drift = None if known is None else known.drift(values)
    if out is not None:
        writing = time.perf_counter()
        write_rows(rows, make_folder(out), "scores")
        seconds["write"] = time.perf_counter() - writing
    profile = {
        "images": len(rows),
        "workers": workers or default_workers(),
        "seconds": round(time.perf_counter() - began, 4),
        "stages": {name: round(took, 4) for name, took in seconds.items()},
    }
    return {"rows": rows, "rate": limit, "drift": drift, "profile": profile}


def row_of(scored: Scored, detector: Detector, limit: float | None) -> dict[str, Any]:
    """Return the table row of one scored image."""
    row: dict[str, Any] = {
        "image": str(scored.sample.image),
        "score": scored.image,
        "p_value": None,
        "verdict": None,
        "error": scored.error,
    }
    if scored.error is not None:
        row["score"] = None
    elif detector.calibration is not None and limit is not None:
        p_value = float(detector.calibration.p_value(np.array([scored.image]))[0])
        # A hair of room: rates such as 1/9 are not exact in binary.
        row |= {"p_value": p_value, "verdict": "defect" if p_value <= limit * (1 + 1e-9) else "good"}
    return row


def write_rows(rows: list[dict[str, Any]], folder: Path, name: str) -> None:
    """Write ``rows`` as ``name``.csv (safe to open in a spreadsheet) and ``name``.jsonl."""
    write_text(folder / f"{name}.csv", frame_to_csv(pd.DataFrame(rows)))
    lines = (json.dumps(finite(row), ensure_ascii=False) for row in rows)
    write_text(folder / f"{name}.jsonl", "".join(line + "\n" for line in lines))


def finite(row: dict[str, Any]) -> dict[str, Any]:
    """Return ``row`` with NaN and infinities as null: JSON has no other word for them."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
