"""``score``: one number and a verdict for every image."""

from __future__ import annotations

import csv
import heapq
import json
import math
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from adflow._files import atomic_write, make_folder
from adflow._table import csv_cell
from adflow._threads import default_workers
from adflow.calibration import Calibration
from adflow.data import Sample
from adflow.detector import Detector, Progress
from adflow.pipeline import Scored, run

# Images flagged by chance when the user names no rate: the smallest of these that the held-out images can carry.
DEFAULT_RATES = (0.01, 0.05, 0.1)

_ROOM = 1 + 1e-9  # rates such as 1/9 are not exact in binary


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


def image_level(calibration: Calibration, rate: float) -> float:
    """Return the score above which, and only there, an image has a p-value of at most ``rate`` and is called defective.

    p = (1 + held-out scores at least as high) / (n + 1): so many of them may be as high, the next one is the level.
    """
    allowed = math.floor(rate * _ROOM * (calibration.n + 1)) - 1
    if allowed >= calibration.n:
        return -math.inf
    return float(np.sort(calibration.scores)[::-1][max(allowed, 0)])


def score(
    detector: Detector,
    samples: Sequence[Sample],
    *,
    rate: float | None = None,
    out: Path | None = None,
    strict: bool = False,
    workers: int | None = None,
    keep: int | None = None,
    through: Callable[..., Iterator[Scored]] = run,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score every image; rows are written as they come.

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
        keep: how many rows to return, those of the highest scores; None = all, whatever memory they take.
        through: how images become scores: here, or on a cluster (:meth:`adflow.tasks._ray.Cluster.images`).
        progress: called with (done, total, message).

    Returns:
        {"rows": [{"image", "score", "p_value", "verdict", "error"}], "rate", "drift", "profile": {"images", "workers",
        "seconds", "stages"}, "failed", "flagged"}: seconds on the clock, and of all workers together in each stage;
        errors of images that could not be read, and how many were called defective.
    """
    began = time.perf_counter()
    limit = verdict_rate(detector, rate)
    rows: list[tuple[float, int, dict[str, Any]]] = []  # with ``keep`` a heap, the lowest score first
    values = array("d")
    failed: list[str] = []
    done = flagged = 0
    seconds: dict[str, float] = {"write": 0.0}
    with written(make_folder(out), "scores") if out is not None else nullcontext(lambda row: None) as write:
        for scored in through(detector, samples, keep_map=False, strict=strict, workers=workers):
            row = row_of(scored, detector, limit)
            writing = time.perf_counter()
            write(row)
            seconds["write"] += time.perf_counter() - writing
            entry = (scored.image if scored.error is None else -math.inf, -done, row)
            if keep is None:
                rows.append(entry)
            elif len(rows) < keep:
                heapq.heappush(rows, entry)
            else:
                heapq.heappushpop(rows, entry)
            if scored.error is None:
                values.append(scored.image)
            else:
                failed.append(scored.error)
            flagged += row["verdict"] == "defect"
            for stage, took in scored.seconds.items():
                seconds[stage] = seconds.get(stage, 0.0) + took
            done += 1
            if progress:
                progress(done, len(samples), "scoring")
    profile = {
        "images": done,
        "workers": workers or default_workers(),
        "seconds": round(time.perf_counter() - began, 4),
        "stages": {name: round(took, 4) for name, took in seconds.items()},
    }
    return {
        "rows": [row for _, _, row in (rows if keep is None else sorted(rows, reverse=True))],
        "rate": limit,
        "drift": None if detector.calibration is None else detector.calibration.drift(np.array(values)),
        "profile": profile,
        "failed": failed,
        "flagged": flagged,
    }


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
        row |= {"p_value": p_value, "verdict": "defect" if p_value <= limit * _ROOM else "good"}
    return row


@contextmanager
def written(folder: Path, name: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield what writes a row to ``name``.csv (safe to open in a spreadsheet) and ``name``.jsonl.

    The files get their names at the end: until then, and where it comes to an error, those before stay.
    """
    with (
        atomic_write(folder / f"{name}.csv") as table_file,
        atomic_write(folder / f"{name}.jsonl") as lines_file,
        table_file.open("w", encoding="utf-8", errors="backslashreplace", newline="") as table,
        lines_file.open("w", encoding="utf-8", errors="backslashreplace") as lines,
    ):
        cells = csv.writer(table, lineterminator="\n")
        head: list[str] = []

        def write(row: dict[str, Any]) -> None:
            row = finite(row)
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
            if not head:
                head.extend(row)
                cells.writerow(head)
            cells.writerow(map(csv_cell, row.values()))

        yield write


def finite(row: dict[str, Any]) -> dict[str, Any]:
    """Return ``row`` with NaN and infinities as null: JSON has no other word for them."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
