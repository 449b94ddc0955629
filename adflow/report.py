"""Rows of an evaluation become tables that people read, files that programs read, and one page.

A row is one cell of the evaluation: one class, one method, one seed. Rows go into one pandas frame, and every
other form is taken from it. The order of averaging is fixed: over seeds inside a class first, then over
classes with equal weight (as the papers do; a class with more seeds or images counts no more). The deviation
is the sample standard deviation over seeds; for a mean over classes that of the seeds' own means. A value
that is undefined (no defective image, no mask, a failed cell) is missing, stays out of every mean, is
counted, and has its reason beside it.

Numbers are fractions in frames and files, per cent with one decimal in tables for people.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pandas as pd
from rich.console import Group

from adflow._page import Cell, ImageRecord, page, worst
from adflow._table import MISSING, TextTable, frame_to_csv, number, plain, show, widest

__all__ = ["Cell", "ImageRecord", "Report", "undefined", "worst"]

Row = Mapping[str, Any]

# What makes two rows the same experiment on another class or seed.
CONFIG = ("method", "backbone", "recipe")
KEYS = ("dataset", "class", *CONFIG, "size", "seed")

# name -> (heading, per cent?), most telling first: this is the order in which a narrow table keeps them.
METRICS: dict[str, tuple[str, bool]] = {
    "image_auroc": ("image AUROC", True),
    "pixel_auroc": ("pixel AUROC", True),
    "aupro": ("AUPRO", True),
    "image_f1": ("image F1", True),
    "hit": ("hit", True),
    "pixel_ap": ("pixel AP", True),
    "pixel_f1": ("pixel F1", True),
    "image_ap": ("image AP", True),
    "mean_iou": ("mean IoU", True),
    "mean_iou_oracle": ("mean IoU oracle", True),
    "iou_defective": ("defects' IoU", True),
    "iou_defective_oracle": ("defects' IoU oracle", True),
    "false_regions_per_normal": ("false regions", False),
    "flagged_share": ("flagged", True),
    "missed_share": ("missed", True),
}
COUNTS: dict[str, str] = {
    "n_test": "test",
    "n_defects": "defective",
    "n_train": "train",
    "fit_seconds": "fit s",
    "ms_per_image": "ms/image",
    "detector_mb": "MB",
}
PRINTED = "printed average"
MEANING = {
    "hit": "hit: share of defects whose highest pixel lies on the mask, or within 2.3 % of the shorter side of it",
    "false_regions_per_normal": "false regions: per normal image",
    "flagged_share": "flagged: share of normal images with an alarm",
    "missed_share": "missed: share of defective images without one",
    "fit_seconds": "fit s: what methods learn from a frozen backbone's features counts without these",
    "detector_mb": "MB: what was learned, without the backbone",
}


def split_dataset(row: Row) -> tuple[str, str]:
    """Return (data set, class) of a row; "mvtec/screw" in "dataset" is taken apart."""
    dataset = str(row.get("dataset") or "")
    class_ = row.get("class")
    if class_ is None or class_ == "":
        dataset, _, class_ = dataset.rpartition("/")
    elif dataset.endswith(f"/{class_}"):
        dataset = dataset.removesuffix(f"/{class_}")
    return dataset, str(class_)


def undefined(row: Row) -> dict[str, str]:
    """Return metric -> reason for every metric of the row that has no value.

    The reason is the row's own (``row["undefined"]``, metric -> words) where it has one.
    """
    given = row.get("undefined") or {}
    reasons = {}
    for metric in METRICS:
        if (metric not in row and metric not in given) or number(row.get(metric)) is not None:
            continue
        reason = given.get(metric) if isinstance(given, Mapping) else None
        if not reason and row.get("error"):
            reason = f"the cell failed: {row['error']}"
        if not reason and number(row.get("n_defects")) == 0:
            reason = "no defective image in the test set"
        reasons[metric] = str(reason or "not computed")
    return reasons


def _words(value: Any) -> str:
    """Return a key as text; missing is empty. A missing value elsewhere makes pandas turn 256 into 256.0."""
    if value is None or value != value:
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


class Gridded(Protocol):
    """What can be shown as a table."""

    def words(self) -> TextTable: ...


@dataclass(frozen=True)
class Report:
    """Rows, and where they come from.

    Args:
        rows: one mapping per class, method and seed. Known keys: those of `KEYS`, `METRICS` and `COUNTS`;
            ``<metric>_ci_low`` and ``<metric>_ci_high`` (confidence bounds); ``undefined`` (metric -> why it
            has no value); ``error`` (words, when the cell failed). Others are carried along.
        provenance: command, versions, device, dates: whatever is needed to repeat it.
    """

    rows: Sequence[Row]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def frame(self) -> pd.DataFrame:
        """Return all rows, known columns first; metrics are floats, fractions, missing where undefined."""
        lines = []
        for row in self.rows:
            dataset, class_ = split_dataset(row)
            line = {**row, "dataset": dataset, "class": class_}
            line.pop("undefined", None)
            for name in line:
                if name in METRICS or name in COUNTS or name.endswith(("_ci_low", "_ci_high")):
                    value = number(line[name])
                    line[name] = math.nan if value is None else value
            reasons = undefined(row)
            if reasons:
                line["undefined"] = "; ".join(f"{metric}: {reason}" for metric, reason in reasons.items())
            lines.append(line)
        found = list(dict.fromkeys(name for line in lines for name in line))
        wanted = [*KEYS]
        for metric in METRICS:
            wanted += [metric, f"{metric}_ci_low", f"{metric}_ci_high"]
        first = [name for name in [*wanted, *COUNTS] if name in found]
        last = [name for name in ("undefined", "error") if name in found]
        others = [name for name in found if name not in first and name not in last]
        return pd.DataFrame(lines, columns=pd.Index([*first, *others, *last], dtype=object))

    def metrics(self) -> list[str]:
        """Return the metrics with a value in some row, most telling first."""
        return [name for name in METRICS if any(number(row.get(name)) is not None for row in self.rows)]

    def by_class(self) -> pd.DataFrame:
        """Return one line per data set, class and configuration: means over seeds.

        Columns: `KEYS` without the seed, ``seeds`` (how many), for each metric ``<m>`` (mean), ``<m>_std``
        (sample deviation over seeds, missing below two), ``<m>_n`` (seeds with a value), bounds where there
        is one seed, `COUNTS` (means), ``failed`` (seeds that failed).
        """
        frame = self._complete()
        lines = []
        for keys, group in frame.groupby(["dataset", "class", *CONFIG], sort=False, dropna=False):
            line: dict[str, Any] = dict(zip(["dataset", "class", *CONFIG], keys, strict=True))
            sizes = [size for size in group["size"].drop_duplicates() if size]
            line["size"] = ", ".join(str(size) for size in sizes)
            line["seeds"] = len(group)
            for metric in self.metrics():
                values = group[metric].dropna()
                line[metric] = values.mean() if len(values) else math.nan
                line[f"{metric}_std"] = values.std(ddof=1) if len(values) > 1 else math.nan
                line[f"{metric}_n"] = len(values)
                for bound in ("ci_low", "ci_high"):
                    if f"{metric}_{bound}" in group and len(group) == 1:
                        line[f"{metric}_{bound}"] = group[f"{metric}_{bound}"].iloc[0]
            for count in COUNTS:
                line[count] = group[count].mean() if count in group else math.nan
            line["failed"] = int(group["error"].map(bool).sum())
            lines.append(line)
        return pd.DataFrame(lines)

    def means(self) -> pd.DataFrame:
        """Return one line per data set and configuration: means over classes, all counting the same.

        With more than one data set there are also lines whose data set is "all". Columns: ``dataset``,
        `CONFIG`, ``classes``, ``seeds``, for each metric ``<m>``, ``<m>_std`` (over the seeds' own means, of
        the seeds that have a value in every class that has one), ``<m>_undefined`` (classes without a value),
        ``failed`` (cells).
        """
        frame, lines = self._complete(), []
        frames = [(str(name), part) for name, part in frame.groupby("dataset", sort=False, dropna=False)]
        if len(frames) > 1:
            frames.append(("all", frame))
        for dataset, part in frames:
            for keys, group in part.groupby(list(CONFIG), sort=False, dropna=False):
                line: dict[str, Any] = {"dataset": dataset, **dict(zip(CONFIG, keys, strict=True))}
                cells = group.groupby(["dataset", "class"], sort=False, dropna=False)
                line["classes"], line["seeds"] = cells.ngroups, int(group["seed"].nunique(dropna=False))
                for metric in self.metrics():
                    of_class = cells[metric].mean()
                    line[metric] = of_class.mean()
                    line[f"{metric}_undefined"] = int(of_class.isna().sum())
                    table = group.pivot_table(
                        index="seed", columns=["dataset", "class"], values=metric, dropna=True, observed=True
                    ).dropna()
                    line[f"{metric}_std"] = table.mean(axis=1).std(ddof=1) if len(table) > 1 else math.nan
                line["failed"] = int(group["error"].map(bool).sum())
                lines.append(line)
        return pd.DataFrame(lines)

    def _complete(self) -> pd.DataFrame:
        """Return the frame with every key column, missing ones empty."""
        frame = self.frame()
        for name in KEYS:
            if name not in frame:
                frame[name] = ""
            if name != "seed":
                frame[name] = frame[name].map(_words)
        frame["seed"] = frame["seed"].map(lambda value: -1 if value in (None, "") or value != value else value)
        if "error" not in frame:
            frame["error"] = ""
        frame["error"] = frame["error"].map(_words)
        return frame

    def mean(self) -> dict[str, Any]:
        """Return the means over classes as in the JSON: metric -> fraction or None.

        One configuration: a flat mapping over all data sets, with ``<m>_std`` where there are several seeds.
        Several: "method", with "/backbone" and "/recipe" where these differ -> such a mapping.
        """
        means = self.means()
        if means.empty:
            return {}
        last = means[means["dataset"] == "all"] if (means["dataset"] == "all").any() else means
        if len(last) == 1:
            return self._mean(last.iloc[0])
        varying = [name for name in CONFIG if last[name].nunique() > 1 or name == "method"]
        return {"/".join(str(line[name]) for name in varying): self._mean(line) for _, line in last.iterrows()}

    def _mean(self, line: pd.Series[Any]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for metric in self.metrics():
            values[metric] = number(line[metric])
            if number(line[f"{metric}_std"]) is not None:
                values[f"{metric}_std"] = float(line[f"{metric}_std"])
        missing = {m: int(line[f"{m}_undefined"]) for m in self.metrics() if line[f"{m}_undefined"]}
        values |= {"classes": int(line["classes"]), "seeds": int(line["seeds"])}
        values |= {"undefined": missing} if missing else {}
        return values | ({"failed": int(line["failed"])} if line["failed"] else {})

    def json(self) -> str:
        """Return ``{"rows": [...], "mean": {...}, "provenance": {...}}``; undefined is null with a reason."""
        rows = []
        for row in self.rows:
            line = {key: plain(value) for key, value in row.items() if key != "undefined"}
            line["dataset"], line["class"] = split_dataset(row)
            reasons = undefined(row)
            rows.append(line | ({"undefined": reasons} if reasons else {}))
        whole = {"rows": rows, "mean": plain(self.mean()), "provenance": plain(self.provenance)}
        return json.dumps(whole, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def csv(self) -> str:
        """Return the frame as CSV: fractions in full precision, empty where undefined, spreadsheet-safe."""
        return frame_to_csv(self.frame())

    def markdown(self) -> str:
        """Return the table of classes as Markdown."""
        return self.words().markdown()

    def latex(self) -> str:
        """Return the table of classes as LaTeX (booktabs)."""
        return self.words().latex()

    def table(self, width: int = 80) -> Group:
        """Return the table of classes for a terminal of `width` columns: what does not fit is left out."""
        return self.words(width).rich()

    def html(self, cells: Sequence[Cell] = (), comparison: Gridded | None = None) -> str:
        """Return one self-contained page: tables, curves, histograms with a movable threshold, pictures.

        Args:
            cells: what is shown class by class; pictures only of the images that `worst` chooses.
            comparison: published numbers, or another evaluation, to stand beside ours.
        """
        by_class = self.by_class()
        links = [
            (line["dataset"], line["class"], line["method"], line["backbone"]) for line in by_class.to_dict("records")
        ]
        return page(self.words(), links, cells, self.provenance, comparison.words() if comparison else None)

    def words(self, width: int | None = None) -> TextTable:
        """Return the table of classes in words: means over seeds per class, then the means over classes.

        Args:
            width: as many columns as fit into so many letters, the most telling first; None: all.
        """
        return _table(self, width)


def _table(report: Report, width: int | None) -> TextTable:
    by_class, means = report.by_class(), report.means()
    if by_class.empty:
        return TextTable(["class"], 1, [], [], ["no rows"])
    means = means[means["classes"] > 1]  # the mean of one class says its line again
    many = {name: by_class[name].nunique() > 1 for name in ("dataset", *CONFIG)}
    names = ["class", *(name for name in CONFIG if many[name])]
    sets = by_class["dataset"] if many["dataset"] else pd.Series([""] * len(by_class))
    first = [
        f"{dataset}/{class_}" if dataset else class_ for dataset, class_ in zip(sets, by_class["class"], strict=True)
    ]
    columns: list[tuple[str, list[str]]] = []

    def closing(line: pd.Series[Any]) -> str:
        many_sets = many["dataset"] and line["dataset"] != "all"
        return f"mean of {line['classes']}" + (f", {line['dataset']}" if many_sets else "")

    columns.append(("class", [*first, *(closing(line) for _, line in means.iterrows())]))
    for name in names[1:]:
        columns.append((name, [*by_class[name], *means[name]]))
    total = len(by_class) + len(means)
    room = math.inf if width is None else width
    used = sum(widest([heading, *cells]) + 2 for heading, cells in columns)
    notes_for: list[str] = []
    for metric in report.metrics():
        heading, percent = METRICS[metric]
        cells = [
            show(line[metric], percent, line[f"{metric}_std"])
            for part in (by_class, means)
            for _, line in part.iterrows()
        ]
        for index, (_, line) in enumerate(by_class.iterrows()):
            low, high = (number(line.get(f"{metric}_{bound}")) for bound in ("ci_low", "ci_high"))
            if low is not None and high is not None and width is None:
                cells[index] += f" [{show(low, percent)}, {show(high, percent)}]"
            if line["failed"] == line["seeds"]:
                cells[index] = "failed"
        if width is not None:
            heading = heading.replace(" ", "\n")
        if used + widest([heading, *cells]) + 2 <= room:
            columns.append((heading, cells))
            used += widest([heading, *cells]) + 2
            notes_for.append(metric)
    for count, heading in COUNTS.items():
        cells = [MISSING if line[count] != line[count] else f"{line[count]:.4g}" for _, line in by_class.iterrows()]
        cells += [""] * len(means)
        if width is not None:
            heading = heading.replace(" ", "\n")
        if set(cells) - {MISSING, ""} and used + widest([heading, *cells]) + 2 <= room:
            columns.append((heading, cells))
            used += widest([heading, *cells]) + 2
            notes_for.append(count)
    lines = [[cells[index] for _, cells in columns] for index in range(total)]
    fixed = {name: by_class[name].iloc[0] for name in ("dataset", *CONFIG) if not many[name]}
    title = ", ".join(str(value) for value in fixed.values() if value)
    sizes = sorted({size for size in by_class["size"] if size})
    title += f", evaluated at {sizes[0]} px" if len(sizes) == 1 else ", size per class" if sizes else ""
    return TextTable(
        [heading for heading, _ in columns],
        len(names),
        lines[: len(by_class)],
        lines[len(by_class) :],
        _notes(report, by_class, means, notes_for, bounds=width is None),
        title.lstrip(", "),
    )


def _notes(
    report: Report, by_class: pd.DataFrame, means: pd.DataFrame, shown: Sequence[str], bounds: bool
) -> list[str]:
    """Return the lines under the table: units, seeds, what is undefined and why, what failed."""
    notes = ["per cent" + "".join(f"; {words}" for metric, words in MEANING.items() if metric in shown)]
    seeds = int(by_class["seeds"].max())
    if seeds > 1:
        notes[0] += f"; mean of {seeds} seeds ± standard deviation"
    if bounds and any(str(name).endswith("_ci_low") for name in by_class):
        notes[0] += "; [bounds] of the confidence interval"
    for metric in shown:
        reasons: dict[str, list[str]] = {}
        for row in report.rows:
            reason = undefined(row).get(metric)
            if reason and not row.get("error"):
                reasons.setdefault(reason, []).append(split_dataset(row)[1])
        for reason, classes in reasons.items():
            where = list(dict.fromkeys(classes))
            some = ", ".join(where[:4]) + (f" and {len(where) - 4} more" if len(where) > 4 else "")
            notes.append(f"{METRICS[metric][0]} undefined in {some}: {reason}; left out of the mean")
    for row in report.rows:
        if row.get("error"):
            cell = "/".join(str(part) for part in (*split_dataset(row), row.get("method")) if part)
            notes.append(f"failed: {cell}, seed {row.get('seed', MISSING)}: {row['error']}")
    return notes
