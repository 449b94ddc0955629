"""The parts of report.html that are not words: curves, histograms, pictures, and the data of the slider.

The page is one file: styles, script, pictures and data are inside, and its content security policy forbids
the browser any request. Everything that comes from outside goes through Jinja's autoescaping or its
``tojson``. Pictures are bounded in number and size, images beyond the first ones of a list become table rows
only when asked for: so a page of thousands of images opens at once.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
from PIL import Image

from adflow._table import TextTable, plain, show

BINS = 48
PICTURES_PER_CELL = 16
PICTURE_BYTES = 12_000_000  # of all pictures together, before base64 adds a third
PICTURE_SIDE = 720  # px, the longer one
CURVE_POINTS = 200  # more cannot be seen at the size of the plots
PRO_LIMIT = 0.3
# Headings of the pictures; the last three where there is no threshold, or no label.
MISSED, FALSE_ALARMS = "Worst misses", "Worst false alarms"
FOUND, PASSED = "Defects found, the closest calls first", "Good images, the closest calls first"
DEFECTS, GOOD, UNLABELLED = "Defects", "Good", "Images without a label"


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One scored image.

    Args:
        name: shown and searched; usually the path inside the data set.
        score: image score, higher = more anomalous.
        label: 0 good, 1 defective, None unknown.
        defect: kind of defect.
        picture: its overlay, for the images that are shown: a picture, or the path or bytes of an image file.
    """

    name: str
    score: float
    label: int | None = None
    defect: str | None = None
    picture: Image.Image | Path | bytes | None = None


@dataclass(frozen=True, slots=True)
class Cell:
    """One class under one method and seed, as the page shows it.

    Args:
        dataset: data set, for example "mvtec".
        class_: class.
        images: every scored test image.
        method: method.
        backbone: backbone.
        seed: seed; None where there is only one.
        threshold: automatic threshold; an image is defective when score >= threshold. None: there is none.
        promise: what the threshold promises, in words, for example "at most 1 false alarm in 10 good images".
        roc: (false positive rates, true positive rates) of the image scores, both rising.
        pro: (false positive rates, per-region overlaps) of the pixels, both rising; drawn up to 0.3.
        scores: metric in words -> value in words, for the headline of the cell.
    """

    dataset: str
    class_: str
    images: Sequence[ImageRecord]
    method: str = ""
    backbone: str = ""
    seed: int | None = None
    threshold: float | None = None
    promise: str | None = None
    roc: tuple[npt.ArrayLike, npt.ArrayLike] | None = None
    pro: tuple[npt.ArrayLike, npt.ArrayLike] | None = None
    scores: Mapping[str, str] | None = None


def worst(images: Sequence[ImageRecord], count: int = 6) -> list[int]:
    """Return which images are worth a picture: the worst misses and false alarms, then the closest calls.

    Args:
        images: every scored image of a cell; pictures are not looked at.
        count: at most so many defective and so many good images.

    Returns:
        Indices: defective images by rising score, then good ones by falling score.
    """
    # The order is the same for every threshold: misses are the defects with the lowest scores.
    order = sorted((i for i in range(len(images)) if math.isfinite(images[i].score)), key=lambda i: images[i].score)
    bad = [i for i in order if images[i].label == 1][:count]
    return bad + [i for i in reversed(order) if images[i].label == 0][:count]


def page(
    table: TextTable,
    links: Sequence[tuple[str, str, str, str]],
    cells: Sequence[Cell],
    provenance: Mapping[str, Any],
    comparison: TextTable | None,
) -> str:
    """Return the page.

    Args:
        table: the table of classes.
        links: (data set, class, method, backbone) of each line of its body, to link lines with cells.
        cells: what is shown class by class.
        provenance: shown as it is; "command" gets a place of its own.
        comparison: published numbers beside ours.
    """
    room = PICTURE_BYTES
    parts: list[dict[str, Any]] = []
    for index, cell in enumerate(cells):
        part, used = _cell(cell, index, room // max(1, len(cells) - index))
        room -= used
        parts.append(part)
    targets: dict[tuple[str, str, str, str], str] = {}
    for cell, part in zip(cells, parts, strict=True):
        targets.setdefault((cell.dataset, cell.class_, cell.method, cell.backbone), part["id"])
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(resources.files("adflow").joinpath("report.html.j2").read_text(encoding="utf-8"))
    facts = {str(key): plain(value) for key, value in provenance.items()}
    command = facts.pop("command", None)
    return template.render(
        table=table,
        targets=[targets.get(link) for link in links],
        cells=parts,
        command=" ".join(command) if isinstance(command, list) else command,
        facts=facts,
        comparison=comparison,
        today=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )


def _cell(cell: Cell, index: int, room: int) -> tuple[dict[str, Any], int]:
    """Return what the template needs for one cell, and how many bytes its pictures took."""
    kept = [image for image in cell.images if math.isfinite(image.score)]
    scores = np.array([image.score for image in kept], dtype=np.float64)
    labels = np.array([-1 if image.label is None else image.label for image in kept], dtype=np.int64)
    histogram = _histogram(scores, labels, cell.threshold)
    galleries, used = _galleries(cell, room)
    kinds = sorted({image.defect for image in kept if image.defect})
    names = [cell.dataset, cell.class_, cell.method, cell.backbone]
    title = " / ".join(part for part in names if part) + ("" if cell.seed is None else f", seed {cell.seed}")
    return {
        "id": f"cell-{index}",
        "title": title,
        "promise": cell.promise,
        "scores": dict(cell.scores or {}),
        "good": int((labels == 0).sum()),
        "bad": int((labels == 1).sum()),
        "unknown": int((labels == -1).sum()),
        "no_number": len(cell.images) - len(kept),
        "threshold": cell.threshold,
        "histogram": histogram,
        "curves": [
            curve
            for curve in (
                _curve("ROC of the images", "good images stopped", "defects found", cell.roc, 1.0),
                _curve("PRO of the pixels", "good pixels marked", "of a defect marked", cell.pro, PRO_LIMIT),
            )
            if curve
        ],
        "galleries": galleries,
        "data": {
            "scores": scores.tolist(),  # every digit: thresholds lie just above the score of some image
            "labels": labels.tolist(),
            "names": [image.name for image in kept],
            "defects": [kinds.index(image.defect) if image.defect else -1 for image in kept],
            "kinds": kinds,
            "threshold": cell.threshold,
        },
    }, used  # fmt: skip


def _histogram(
    scores: npt.NDArray[np.float64], labels: npt.NDArray[np.int64], threshold: float | None
) -> dict[str, Any] | None:
    """Return bars as shares of the plot: good images upwards, defective ones downwards.

    Far outliers are put into the last bin, or they would squeeze all others into the first.
    """
    if scores.size == 0:
        return None
    marks = [*scores, *([] if threshold is None else [threshold])]
    low, high = float(min(marks)), float(max(marks))
    typical = max(float(np.quantile(scores, 0.9)), -math.inf if threshold is None else threshold)
    cut = typical + (typical - low)
    clipped = high > cut > low
    high = cut if clipped else high
    if high <= low:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, BINS + 1)
    bars = []
    for label in (0, 1):
        counts = np.histogram(np.clip(scores[labels == label], low, high), edges)[0]
        bars.append((counts, counts / max(1, counts.max())))
    ticks = [low + (high - low) * step / 5 for step in range(6)]
    return {
        "low": low,
        "high": high,
        "clipped": clipped,
        "beyond": int((scores > high).sum()),
        "bars": [
            {
                "x": i / BINS,
                "width": 1 / BINS,
                "good": round(float(bars[0][1][i]), 4),
                "bad": round(float(bars[1][1][i]), 4),
                "words": f"{edges[i]:.4g} to {edges[i + 1]:.4g}: "
                f"{bars[0][0][i]} good, {bars[1][0][i]} defective",
            }
            for i in range(BINS)
            if bars[0][0][i] or bars[1][0][i]
        ],
        "ticks": [{"x": step / 5, "words": f"{tick:.3g}"} for step, tick in enumerate(ticks)],
    }  # fmt: skip


def _curve(
    title: str, across: str, up: str, points: tuple[npt.ArrayLike, npt.ArrayLike] | None, limit: float
) -> dict[str, Any] | None:
    """Return a curve as points of a unit square, thinned out, cut and interpolated at `limit`."""
    if points is None:
        return None
    x, y = (np.asarray(values, dtype=np.float64).ravel() for values in points)
    if x.size < 2 or x.size != y.size or not (np.isfinite(x).all() and np.isfinite(y).all()):
        return None
    x, y = _cut(x, y, limit)
    area = float(np.trapezoid(y, x) / limit)
    if x.size > CURVE_POINTS:
        # Equal steps along the curve, not along x: a good detector's curve is all in its first corner.
        path = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(x)) / limit + np.abs(np.diff(y)))])
        at = np.unique(np.searchsorted(path, np.linspace(0, path[-1], CURVE_POINTS)).clip(0, x.size - 1))
        x, y = x[at], y[at]
    line = " ".join(f"{a / limit:.4f},{1 - b:.4f}" for a, b in zip(x, y, strict=True))
    ticks = [{"at": step / 2, "words": f"{limit * step / 2:.3g}"} for step in range(3)]
    return {"title": title, "across": across, "up": up, "points": line, "area": show(area), "ticks": ticks}


def _cut(x: npt.NDArray[Any], y: npt.NDArray[Any], limit: float) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return the curve up to `limit`, interpolated there; one that ends before goes on flat."""
    inside = x <= limit
    end = float(np.interp(limit, x, y))
    return np.append(x[inside], limit), np.append(y[inside], end)


def _galleries(cell: Cell, room: int) -> tuple[list[dict[str, Any]], int]:
    """Return the pictures in groups, the worst first, and how many bytes they take."""
    threshold = math.inf if cell.threshold is None else cell.threshold
    groups: dict[str, list[ImageRecord]] = {}
    judged = cell.threshold is not None
    for image in cell.images:
        if image.picture is not None:
            alarm = image.score >= threshold
            if image.label == 1:
                name = (FOUND if alarm else MISSED) if judged else DEFECTS
            elif image.label == 0:
                name = (FALSE_ALARMS if alarm else PASSED) if judged else GOOD
            else:
                name = UNLABELLED
            groups.setdefault(name, []).append(image)
    order = [MISSED, FALSE_ALARMS, FOUND, PASSED, DEFECTS, GOOD, UNLABELLED]
    shown, used, left = [], 0, PICTURES_PER_CELL
    for name in order:
        pictures, found = [], groups.get(name, [])
        found.sort(key=lambda image: image.score if image.label == 1 else -image.score)
        for image in found[:left]:
            data, kind, size = _embed(image.picture)
            if used + len(data) > room:
                break
            used, left = used + len(data), left - 1
            source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
            pictures.append({"name": image.name, "defect": image.defect, "score": f"{image.score:.4g}",
                             "source": source, "width": size[0], "height": size[1]})  # fmt: skip
        if found:
            shown.append({"title": name, "pictures": pictures, "of": len(found)})
    return shown, used


def _embed(picture: Image.Image | Path | bytes | None) -> tuple[bytes, str, tuple[int, int]]:
    """Return the picture as WebP of bounded size."""
    if isinstance(picture, Image.Image):
        image = picture.convert("RGB")
    else:
        with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else Path(picture or "")) as opened:
            image = opened.convert("RGB")
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    try:
        image.save(stream, "WEBP", quality=78, method=2)
        return stream.getvalue(), "webp", image.size
    except (KeyError, OSError):  # a Pillow built without WebP
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=82)
        return stream.getvalue(), "jpeg", image.size
