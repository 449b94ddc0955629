"""What an evaluation leaves behind: tables in every form, the report page, and gates that a build can fail on."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from adflow import __version__
from adflow._files import write_text
from adflow._table import TextTable, frame_to_csv, number, plain, show, widest
from adflow.comparison import Comparison
from adflow.errors import UsageError, unknown
from adflow.report import METRICS, Gridded, ImageRecord, Report
from adflow.report import Cell as Shown
from adflow.tasks._difference import LOWER, Differences
from adflow.tasks.evaluate import Outcome

# Columns of the per-defect table: name -> heading, in per cent but for the counts.
DEFECT_COLUMNS = {
    "image_auroc": "image\nAUROC",
    "pixel_auroc": "pixel\nAUROC",
    "aupro": "AUPRO",
    "hit": "hit",
    "iou": "IoU",
    "missed_share": "missed",
    "without_image_auroc": "image\nAUROC\nwithout",
    "without_pixel_auroc": "pixel\nAUROC\nwithout",
    "without_aupro": "AUPRO\nwithout",
}
_HEADLINE = ("image_auroc", "pixel_auroc", "aupro", "hit", "mean_iou", "false_regions_per_normal")


@dataclass(frozen=True)
class Gate:
    """A figure that must not be passed.

    Attributes:
        metric: name, as in the rows.
        limit: fraction.
        mean: hold it against the mean over classes, not against every cell.
        under: fail below the limit (else above it).
    """

    metric: str
    limit: float
    mean: bool
    under: bool


def gates(under: Sequence[str], over: Sequence[str] = ()) -> list[Gate]:
    """Read ``metric=value`` and ``mean:metric=value``.

    Raises:
        UsageError: no such metric, no number, or a limit on the wrong side.

    >>> gates(["pixel_auroc=0.97"])
    [Gate(metric='pixel_auroc', limit=0.97, mean=False, under=True)]
    """
    found = []
    for texts, is_under in ((under, True), (over, False)):
        option = "--fail-under" if is_under else "--fail-over"
        for text in texts:
            name, separator, value = text.partition("=")
            mean, _, metric = name.strip().rpartition(":")
            if not separator or mean not in ("", "mean"):
                raise UsageError(f"{option} takes metric=value or mean:metric=value, found '{text}'")
            if metric not in METRICS:
                raise unknown("metric", metric, METRICS)
            if (metric in LOWER) == is_under:
                other = "--fail-over" if is_under else "--fail-under"
                better = "lower" if metric in LOWER else "higher"
                raise UsageError(f"{metric} is better when {better}, so {option} makes no sense; use {other}")
            try:
                limit = float(value)
            except ValueError:
                raise UsageError(f"{option} {metric} needs a number such as 0.97, found '{value}'") from None
            if METRICS[metric][1] and not 0 <= limit <= 1:
                raise UsageError(f"{option} {metric}={value}: figures are fractions, expected one in [0, 1]")
            found.append(Gate(metric, limit, bool(mean), is_under))
    return found


def broken(rows: Sequence[Mapping[str, Any]], mean: Mapping[str, Any], wanted: Sequence[Gate]) -> list[str]:
    """Return one sentence for every figure that misses its gate; an undefined figure misses it."""
    found = []
    for gate in wanted:
        if gate.mean:
            several = {name: value for name, value in mean.items() if isinstance(value, Mapping)}
            several.pop("undefined", None)
            lines = [(f"the mean of {name}", value) for name, value in several.items()]
            cells: list[tuple[str, Mapping[str, Any]]] = lines or [("the mean over classes", mean)]
        else:
            cells = [(cell_name(row), row) for row in rows]
        for name, values in cells:
            value = number(values.get(gate.metric))
            side = "below" if gate.under else "above"
            if value is None:
                undefined = values.get("undefined")
                reason = values.get("error") or (undefined or {}).get(gate.metric)
                reason = f"in {reason} classes" if gate.mean and reason else reason
                found.append(f"{gate.metric} of {name} is undefined" + (f" ({reason})" if reason else ""))
            elif value < gate.limit if gate.under else value > gate.limit:
                found.append(f"{gate.metric} of {name} is {value:.4f}, {side} {gate.limit:g}")
    return found


def cell_name(row: Mapping[str, Any]) -> str:
    """Return a cell in words: data set, class, method, seed."""
    name = "/".join(str(row[key]) for key in ("dataset", "class", "method") if row.get(key))
    return f"{name}, seed {row['seed']}" if row.get("seed") is not None else name


def provenance(outcome: Outcome, command: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return where the numbers come from: all that is needed to get them again."""
    devices = dict.fromkeys(cell["provenance"]["device"] for cell in outcome.cells)
    threads = dict.fromkeys(cell["provenance"]["threads"] for cell in outcome.cells)
    points = dict.fromkeys(cell["row"].get("setting") for cell in outcome.cells)
    return {
        "command": command,
        "adflow": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(terse=True),
        "device": ", ".join(devices),
        "threads": ", ".join(map(str, threads)),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "operating point": ", ".join(str(point) for point in points if point) or None,
        "data": {cell["data"]: cell["provenance"]["fingerprint"] for cell in outcome.cells},
        "detectors": {cell["name"]: cell["detector"] for cell in outcome.cells},
        **facts,
        "cells": [cell["name"] for cell in outcome.cells],
    }


def for_page(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the provenance as the page shows it: long hashes cut, the list of cells left out."""
    shown = {key: value for key, value in found.items() if key != "cells" and value not in (None, "", {})}
    for key in ("data", "detectors"):
        if key in shown:
            shown[key] = ", ".join(f"{name} {value[:12]}" for name, value in shown[key].items())
    return shown


def publish(
    outcome: Outcome,
    found: Mapping[str, Any],
    out: Path,
    *,
    page: bool = True,
    beside: Sequence[Gridded] = (),
) -> Report:
    """Write table.csv, .json, .md and .tex, defects.csv, compare.csv and .md, and report.html; return the report.

    The page shows the first of ``beside``.
    """
    report = Report(outcome.rows, found)
    write_text(out / "table.csv", report.csv())
    write_text(out / "table.md", report.markdown())
    write_text(out / "table.tex", report.latex())
    lines = defect_rows(outcome.rows)
    if lines:
        write_text(out / "defects.csv", frame_to_csv(pd.DataFrame(lines)))
    for count, one in enumerate(beside, start=1):
        stem = "compare" if count == 1 else f"compare-{count}"
        if isinstance(one, Comparison):
            write_text(out / f"{stem}.csv", one.csv())
        elif isinstance(one, Differences):
            write_text(out / f"{stem}.csv", frame_to_csv(pd.DataFrame(one.rows())))
        write_text(out / f"{stem}.md", one.words().markdown())
    if page:
        cells = [to_show(cell, out) for cell in outcome.cells]
        shown = Report(outcome.rows, for_page(found)).html(cells, next(iter(beside), None))
        write_text(out / "report.html", shown)
    # Last: whoever finds it finds the rest as well.
    write_text(out / "table.json", report.json())
    return report


def to_show(cell: Mapping[str, Any], out: Path) -> Shown:
    """Return a cell as the page shows it."""
    row = cell["row"]
    pictures = {name: out / "overlays" / path for name, path in cell["pictures"].items()}
    pictures = {name: path for name, path in pictures.items() if path.exists()}
    headline = [name for name in _HEADLINE if number(row.get(name)) is not None]
    images = [
        ImageRecord(
            record["image"],
            float("nan") if record["score"] is None else record["score"],
            record["label"],
            record["defect"],
            pictures.get(record["image"]),
        )
        for record in cell["records"]
    ]
    curves = {name: (curve["x"], curve["y"]) for name, curve in cell["curves"].items()}
    return Shown(
        row["dataset"],
        row["class"],
        images,
        row["method"],
        row["backbone"],
        row["seed"],
        cell["image_threshold"],
        cell["image_promise"],
        curves.get("roc"),
        curves.get("pro"),
        {METRICS[name][0]: show(row[name], METRICS[name][1]) for name in headline},
    )


def defect_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one mapping per cell and kind of defect."""
    keys = ("dataset", "class", "method", "backbone", "recipe", "seed")
    return [
        {key: row.get(key) for key in keys} | {"defect": kind, **figures}
        for row in rows
        for kind, figures in (row.get("defects") or {}).items()
    ]


def defect_table(rows: Sequence[Mapping[str, Any]], width: int | None = None) -> TextTable:
    """Return the per-defect table: means over seeds, each kind against all good images, and all others without it.

    Args:
        rows: rows of an evaluation.
        width: as many columns as fit into so many letters, the most telling first; None: all.
    """
    lines = defect_rows(rows)
    title = "kinds of defects"
    if not lines:
        return TextTable(["class", "defect"], 2, [], [], ["no class has two or more kinds of defects"], title)
    frame = pd.DataFrame([{key: _float(key, value) for key, value in line.items()} for line in lines])
    names = ["class", *(["method"] if frame["method"].nunique() > 1 else []), "defect"]
    columns = [name for name in DEFECT_COLUMNS if name in frame and frame[name].notna().any()]
    by = ["dataset", "class", "method", "backbone", "recipe", "defect"]
    groups = [(dict(zip(by, keys, strict=True)), group) for keys, group in frame.groupby(by, sort=False, dropna=False)]
    table = {name: [str(at[name]) for at, _ in groups] for name in names}
    table["images"] = [f"{group['n'].iloc[0]:.0f}" for _, group in groups]
    for name in columns:
        values = [group[name].dropna() for _, group in groups]
        cells = [show(v.mean() if len(v) else None, True, v.std() if len(v) > 1 else None) for v in values]
        used = sum(widest([heading, *column]) + 2 for heading, column in table.items())
        if width is None or used + widest([DEFECT_COLUMNS[name], *cells]) <= width:
            table[DEFECT_COLUMNS[name]] = cells
    body = [list(line) for line in zip(*table.values(), strict=True)]
    notes = ["per cent; each kind against all good images; without: all defects but this kind"]
    if "IoU" in table or "missed" in table:
        notes.append("IoU and missed at the automatic threshold")
    if len(table) < len(names) + 1 + len(columns):
        notes.append("defects.csv has all columns")
    return TextTable(list(table), len(names), body, [], notes, title)


def interval_table(rows: Sequence[Mapping[str, Any]]) -> TextTable:
    """Return the confidence intervals of each cell, one line per figure: a terminal has no room for them beside it."""
    body = []
    for row in rows:
        for name, (heading, percent) in METRICS.items():
            low, high = (number(row.get(f"{name}_ci_{end}")) for end in ("low", "high"))
            if low is not None and high is not None:
                interval = f"[{show(low, percent)}, {show(high, percent)}]"
                seed = "" if row.get("seed") is None else str(row["seed"])
                body.append([str(row["class"]), str(row["method"]), seed, heading, show(row[name], percent), interval])
    headings = ["class", "method", "seed", "figure", "value", "95% interval"]
    return TextTable(headings, 4, body, [], ["bootstrap over images, defective and good ones drawn apart"], "intervals")


def _float(key: str, value: Any) -> Any:
    if key in DEFECT_COLUMNS or key == "n":
        found = number(value)
        return float("nan") if found is None else found
    return value


def whole(report: Report, beside: Sequence[Gridded], out: Path) -> dict[str, Any]:
    """Return what ``--json`` prints: rows, mean and provenance, with the comparison and the folder."""
    found: dict[str, Any] = json.loads(report.json())
    lines: list[Any] = []
    for one in beside:
        if isinstance(one, Differences):
            lines += one.rows()
        elif isinstance(one, Comparison):
            lines += one.frame.to_dict("records")
    if beside:
        found["comparison"] = plain(lines)
    return found | {"out": str(out)}
