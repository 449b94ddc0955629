"""Intervals of one evaluation, and tests of the difference between two, from what their cells keep.

Images are what is drawn again (see :mod:`adflow.metrics._resampling`); both sides see the same images in every draw.
With several seeds the statistic is its mean over the seeds. DeLong's test is used for the image AUROC of one seed
each. P values are corrected for the number of tests (Holm, "A Simple Sequentially Rejective Multiple Test
Procedure", Scandinavian Journal of Statistics 1979, https://www.jstor.org/stable/4615733).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from adflow import metrics
from adflow._table import MISSING, TextTable, number, show
from adflow.errors import InputError
from adflow.report import METRICS
from adflow.tasks._cells import unpack
from adflow.tasks._measure import iou_of

Cell = Mapping[str, Any]
LEVEL = 0.95
# Lower is better; of all others higher is.
LOWER = ("false_regions_per_normal", "flagged_share", "missed_share")
# What a difference is tested for: one figure of each kind, as every further test takes power from the others.
TESTED = ("image_auroc", "pixel_auroc", "aupro", "hit", "mean_iou", "flagged_share")
_BINNED = ("pixel_auroc", "pixel_ap", "aupro")


@dataclass(frozen=True)
class Difference:
    """One figure of two evaluations of one class.

    Attributes:
        dataset: data set.
        class_: class.
        run: configurations, in words.
        metric: name.
        ours: value of the first evaluation.
        other: value of the second.
        value: ours - other.
        low: lower end of its confidence interval.
        high: upper end.
        p_value: two-sided, corrected for the number of tests; NaN where there is no test.
        reason: why there is no test.
    """

    dataset: str
    class_: str
    run: str
    metric: str
    ours: float
    other: float
    value: float
    low: float
    high: float
    p_value: float
    reason: str | None = None

    @property
    def verdict(self) -> str:
        """Return "better", "worse" or "not shown" (no difference beyond chance was shown)."""
        if not self.p_value < 1 - LEVEL or self.value == 0:
            return "not shown"
        return "better" if (self.value > 0) != (self.metric in LOWER) else "worse"


@dataclass(frozen=True)
class Differences:
    """All tests of two evaluations.

    Attributes:
        lines: one per class, configuration and metric.
        other: name of the second evaluation.
        notes: what could not be compared.
    """

    lines: Sequence[Difference]
    other: str
    notes: Sequence[str]

    def regressions(self) -> list[Difference]:
        """Return the figures that got worse beyond chance."""
        return [line for line in self.lines if line.verdict == "worse"]

    def words(self) -> TextTable:
        """Return the tests as a table."""
        many = len({line.dataset for line in self.lines}) > 1
        body = []
        for line in self.lines:
            percent = METRICS[line.metric][1]
            interval = MISSING
            if not math.isnan(line.low):
                interval = f"[{show(line.low, percent)}, {show(line.high, percent)}]"
            sign = "+" if line.value > 0 else ""
            p = MISSING if math.isnan(line.p_value) else f"{line.p_value:.3f}" if line.p_value >= 0.001 else "<0.001"
            body.append([
                f"{line.dataset}/{line.class_}" if many else line.class_,
                line.run,
                METRICS[line.metric][0],
                show(line.ours, percent),
                show(line.other, percent),
                sign + show(line.value, percent),
                interval,
                p,
                line.verdict,
            ])  # fmt: skip
        headings = ["class", "run", "figure", "ours", "other", "diff.", f"{LEVEL:.0%} interval", "p", "verdict"]
        reasons = dict.fromkeys(f"{METRICS[x.metric][0]} of {x.class_}: {x.reason}" for x in self.lines if x.reason)
        notes = [
            "paired bootstrap over images (DeLong's test for image AUROC of one seed); p corrected for "
            f"{sum(not math.isnan(x.p_value) for x in self.lines)} tests (Holm); not shown: none beyond chance",
            *reasons,
            *self.notes,
        ]
        return TextTable(headings, 3, body, [], notes, f"ours against {self.other}")

    def rows(self) -> list[dict[str, Any]]:
        """Return one mapping per test, for JSON and CSV."""
        return [
            {
                "dataset": line.dataset,
                "class": line.class_,
                "run": line.run,
                "metric": line.metric,
                "ours": line.ours,
                "other": line.other,
                "difference": line.value,
                "low": line.low,
                "high": line.high,
                "p_value": line.p_value,
                "verdict": line.verdict,
                "reason": line.reason,
            }
            for line in self.lines
        ]


def intervals(cell: Cell, draws: int = 2000) -> dict[str, float]:
    """Return ``<metric>_ci_low`` and ``<metric>_ci_high`` of a cell by bootstrap over images; the same each time.

    Pixel figures are drawn from histograms; the interval is moved by the little that these are off the exact value.
    """
    names = [record["image"] for record in cell["records"] if record["error"] is None]
    labels, groups = _strata([cell], names)
    found: dict[str, float] = {}
    for name, statistic in _statistics(cell, names).items():
        interval = metrics.bootstrap_ci(statistic, labels, groups=groups, level=LEVEL, draws=draws)
        exact = number(cell["row"].get(name))
        if interval.reason is None and exact is not None:
            shift = exact - interval.value if name in _BINNED else 0.0
            limit = math.inf if name == "false_regions_per_normal" else 1.0
            found[f"{name}_ci_low"] = min(max(interval.low + shift, 0.0), limit)
            found[f"{name}_ci_high"] = min(max(interval.high + shift, 0.0), limit)
    return found


def difference(ours: Sequence[Cell], others: Sequence[Cell], other: str) -> Differences:
    """Test the differences of two evaluations, class by class and configuration by configuration.

    A configuration (method, backbone, recipe) is held against its like; where the other evaluation has one
    configuration only, against that.

    Raises:
        InputError: they share no class and no image.
    """
    pairs, notes = _pairs(ours, others)
    if not pairs:
        raise InputError(
            f"nothing to compare: {other} has {_list(others)}, this evaluation has {_list(ours)}",
            hint="Evaluate the same classes.",
        )
    # The smallest p value that so many draws can give must stay significant after the correction.
    tests = len(pairs) * len(TESTED)
    draws = max(2000, math.ceil(4 * tests / (1 - LEVEL)))
    lines: list[Difference] = []
    for run, mine, theirs in pairs:
        found, note = _tests(run, mine, theirs, draws)
        lines += found
        notes += [note] if note else []
    return Differences(_holm(lines), other, notes)


def _config(cell: Cell) -> tuple[str, str, str]:
    row = cell["row"]
    return str(row.get("method")), str(row.get("backbone")), str(row.get("recipe"))


def _class(cell: Cell) -> tuple[str, str]:
    return str(cell["row"].get("dataset")), str(cell["row"].get("class"))


def _list(cells: Sequence[Cell]) -> str:
    return ", ".join(dict.fromkeys("/".join(_class(cell)) for cell in cells)) or "nothing"


def _pairs(ours: Sequence[Cell], others: Sequence[Cell]) -> tuple[list[tuple[str, list[Cell], list[Cell]]], list[str]]:
    notes: list[str] = []
    pairs = []
    for class_ in dict.fromkeys(_class(cell) for cell in ours):
        mine, theirs = (
            {
                config: [cell for cell in cells if _class(cell) == class_ and _config(cell) == config]
                for config in dict.fromkeys(_config(cell) for cell in cells if _class(cell) == class_)
            }
            for cells in (ours, others)
        )
        for config, group in mine.items():
            against = config if config in theirs else next(iter(theirs)) if len(theirs) == 1 else None
            if against is None:
                notes.append(f"{'/'.join(class_)} with {config[0]} on {config[1]}: not in the other evaluation")
                continue
            run = config[0] if config == against else f"{'/'.join(config)} against {'/'.join(against)}"
            pairs.append((run, group, theirs[against]))
    return pairs, notes


def _tests(run: str, mine: list[Cell], theirs: list[Cell], draws: int) -> tuple[list[Difference], str | None]:
    cells = [*mine, *theirs]
    known = [{r["image"]: r["label"] for r in cell["records"] if r["error"] is None} for cell in cells]
    names = [name for name in known[0] if all(k.get(name) == known[0][name] for k in known)]
    dataset, class_ = _class(mine[0])
    if not names:
        raise InputError(f"the evaluations of {class_} share no image", hint="Evaluate the same data set.")
    note = None
    most = max(map(len, known))
    if len(names) < most:
        note = f"{class_}: compared on the {len(names)} images that both have, of {most}"
    labels, groups = _strata(cells, names)
    ours, others = ([_statistics(cell, names) for cell in side] for side in (mine, theirs))
    lines = []
    for metric in TESTED:
        if not all(metric in found for found in (*ours, *others)):
            if any(metric in found for found in (*ours, *others)):
                reason = "one side does not have what is needed (streamed, or no operating point)"
                nan = math.nan
                lines.append(Difference(dataset, class_, run, metric, nan, nan, nan, nan, nan, nan, reason))
            continue
        a, b = (_average([found[metric] for found in side]) for side in (ours, others))
        tested = metrics.paired_bootstrap(a, b, labels, groups=groups, level=LEVEL, draws=draws)
        if metric == "image_auroc" and len(mine) == len(theirs) == 1 and groups is None:
            scores = [_by_name(side[0], names, "score") for side in (mine, theirs)]
            exact = metrics.delong(scores[0], scores[1], labels, level=LEVEL).difference
            tested = exact if exact.reason is None else tested
        ones = np.ones((1, len(names)))
        values = float(a(ones)[0]), float(b(ones)[0])
        p_value = 1.0 if values[0] == values[1] and tested.reason is None else tested.p_value
        lines.append(
            Difference(
                dataset, class_, run, metric, *values, tested.value, tested.low, tested.high, p_value, tested.reason
            )
        )
    return lines, note


def _holm(lines: Sequence[Difference]) -> list[Difference]:
    """Return the lines with corrected p values: sorted, times the number of tests left, never falling."""
    order = sorted((i for i, line in enumerate(lines) if not math.isnan(line.p_value)), key=lambda i: lines[i].p_value)
    corrected = [line.p_value for line in lines]
    running = 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(order) - rank) * lines[i].p_value))
        corrected[i] = running
    return [replace(line, p_value=p) for line, p in zip(lines, corrected, strict=True)]


def _by_name(cell: Cell, names: Sequence[str], key: str) -> list[Any]:
    found = {record["image"]: record.get(key) for record in cell["records"]}
    return [found[name] for name in names]


def _strata(cells: Sequence[Cell], names: Sequence[str]) -> tuple[list[int], list[int] | None]:
    """Return labels, and groups of images that are not independent (frames of a video) where there are some."""
    labels = [int(label) for label in _by_name(cells[0], names, "label")]
    videos = _by_name(cells[0], names, "group")
    if all(video is None for video in videos):
        return labels, None
    numbers = {key: i for i, key in enumerate(dict.fromkeys(v or n for v, n in zip(videos, names, strict=True)))}
    return labels, [numbers[v or n] for v, n in zip(videos, names, strict=True)]


def _average(parts: Sequence[metrics.Statistic]) -> metrics.Statistic:
    return lambda weights: np.mean([part(weights) for part in parts], axis=0)


def _statistics(cell: Cell, names: Sequence[str]) -> dict[str, metrics.Statistic]:
    """Return the statistics of a cell over the images ``names``, in this order, as far as it keeps what they need."""
    records = {record["image"]: record for record in cell["records"]}
    rows = [records[name] for name in names]
    labels = [int(record["label"]) for record in rows]
    found: dict[str, metrics.Statistic] = {}
    if len(set(labels)) == 2:
        found["image_auroc"] = metrics.auroc_statistic([record["score"] for record in rows], labels)
    place = {cell["records"][i]["image"]: k for k, i in enumerate(cell["in_pixels"])}
    columns = [i for i, name in enumerate(names) if name in place]
    histograms = unpack(cell["histograms"])
    if histograms is not None and columns:
        picked = [place[names[i]] for i in columns]
        part = metrics.PixelHistograms(
            histograms.negative[picked],
            histograms.positive[picked],
            histograms.weighted[picked],
            histograms.regions[picked],
        )
        for name, statistic in part.statistics().items():
            if part.positive.any():
                found[name if name == "aupro" else f"pixel_{name}"] = _on(columns, statistic)
    per_image: dict[str, list[float]] = {"hit": [_or_nan(record.get("hit")) for record in rows]}
    if cell["point"] is not None:
        known = [name in place for name in names]
        iou = [iou_of(r) if k else math.nan for r, k in zip(rows, known, strict=True)]
        regions = [float(record["regions"]) for record in rows]
        normal = [label == 0 for label in labels]
        per_image |= {
            "mean_iou": iou,
            "iou_defective": [v if r["hit"] is not None else math.nan for v, r in zip(iou, rows, strict=True)],
            "false_regions_per_normal": [r if n else math.nan for r, n in zip(regions, normal, strict=True)],
            "flagged_share": [float(r > 0) if n else math.nan for r, n in zip(regions, normal, strict=True)],
            "missed_share": [math.nan if n else float(r == 0) for r, n in zip(regions, normal, strict=True)],
        }
    for name, values in per_image.items():
        if not all(map(math.isnan, values)):
            found[name] = metrics.mean_statistic(values)
    return found


def _on(columns: Sequence[int], statistic: metrics.Statistic) -> metrics.Statistic:
    return lambda weights: statistic(np.ascontiguousarray(weights[:, columns]))


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else float(value)
