"""Published numbers and ours side by side: what reproduces, what does not, and what was chosen on the test set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from rich.console import Group

from adflow import published
from adflow._table import MISSING, TextTable, frame_to_csv, show
from adflow.errors import UsageError
from adflow.report import CONFIG, METRICS, PRINTED, Report, Row


@dataclass(frozen=True)
class Comparison:
    """Measured numbers beside published ones.

    Attributes:
        block: the published results.
        frame: one line per run, data set, class and metric that both sides have: ``run``, ``dataset``, ``class``,
            ``metric``, ``published``, ``ours``, ``difference`` (ours - published; fractions), ``selected_on_test``.
            Lines of class "mean of N" average both sides over the same N classes; lines of class "printed average"
            have the source's own, beside ours only where ours covers the whole data set.
    """

    block: published.Block
    frame: pd.DataFrame

    def words(self) -> TextTable:
        """Return published, ours and difference, three columns a metric; * = selected on the test set."""
        found: dict[tuple[str, str, str], dict[str, Any]] = {}
        for line in self.frame.to_dict("records"):
            found.setdefault((line["run"], line["dataset"], line["class"]), {})[line["metric"]] = line
        metrics = [name for name in METRICS if any(name in lines for lines in found.values())]
        runs = list(dict.fromkeys(run for run, _, _ in found))
        datasets = {dataset for _, dataset, _ in found}
        headings = ["class", *(["run"] if len(runs) > 1 else [])]
        names = len(headings)
        for metric in metrics:
            headings += [METRICS[metric][0].replace(" ", "\n") + "\npubl.", "ours", "diff."]
        body: list[list[str]] = []
        means: list[list[str]] = []
        for (run, dataset, class_), lines in found.items():
            cells = [
                f"{dataset}/{class_}" if len(datasets) > 1 else class_,
                *([run] if len(runs) > 1 else []),
            ]
            for metric in metrics:
                if metric not in lines:
                    cells += [MISSING] * 3
                    continue
                line, percent = lines[metric], METRICS[metric][1]
                mark = "*" if line["selected_on_test"] else ""
                difference = show(line["difference"], percent)
                sign = "" if difference[0] in f"-{MISSING}" else "+"
                cells += [show(line["published"], percent) + mark, show(line["ours"], percent)]
                cells.append(sign + difference)
            (means if class_ == PRINTED or class_.startswith("mean of ") else body).append(cells)
        notes = [f"per cent; published: {self.block.source}"]
        if not self.block.official:
            notes.append("the published numbers are quoted or re-run by somebody other than the authors")
        chosen = {metric: how for metric, how in self.block.selected_on_test.items() if metric in metrics}
        for how in dict.fromkeys(chosen.values()):
            which = ", ".join(METRICS[metric][0] for metric in chosen if chosen[metric] == how)
            notes.append(f"* {which}: selected on the test set ({how}); ours are not")
        notes += [self.block.note] if self.block.note else []
        title = f"{self.block.name}: {self.block.title}; ours: {', '.join(runs)}"
        return TextTable(headings, names, body, means, notes, title)

    def table(self) -> Group:
        """Return the comparison for a terminal."""
        return self.words().rich()

    def markdown(self) -> str:
        """Return the comparison as Markdown."""
        return self.words().markdown()

    def latex(self) -> str:
        """Return the comparison as LaTeX (booktabs)."""
        return self.words().latex()

    def csv(self) -> str:
        """Return the frame as CSV; the source is the last column."""
        return frame_to_csv(self.frame.assign(source=self.block.source))


def compare(rows: Sequence[Row] | Report, block: str = "cflow-paper") -> Comparison:
    """Put published results beside measured ones.

    The rows of the block's method are taken, or all rows where there are none of it (then the title tells).

    Args:
        rows: rows of an evaluation, or a report of them.
        block: name of a block of `adflow.published`.

    Raises:
        UsageError: no such block, or it shares no class and metric with the rows.
    """
    known = published.block(block)
    report = rows if isinstance(rows, Report) else Report(rows)
    ours = report.by_class()
    if not ours.empty and (ours["method"] == known.method).any():
        ours = ours[ours["method"] == known.method]
    lines: list[dict[str, Any]] = []
    closing: list[dict[str, Any]] = []
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in ours.to_dict("records"):
        run = "/".join(line[part] for part in CONFIG if line[part]) or "ours"
        runs.setdefault((run, line["dataset"]), []).append({str(key): value for key, value in line.items()})
    whole_set = {dataset: published.classes_of(dataset) for _, dataset in runs}
    for (run, dataset), cells in runs.items():
        for metric in (name for name in METRICS if name in cells[0] and name in known.values.get(dataset, {})):
            selected = metric in known.selected_on_test
            fixed = {"run": run, "dataset": dataset, "metric": metric, "selected_on_test": selected}
            pairs = []
            for cell in cells:
                theirs, value = known.value(dataset, metric, cell["class"]), cell[metric]
                if theirs is not None:
                    lines.append({**fixed, "class": cell["class"], "published": theirs, "ours": value})
                    pairs += [(theirs, value)] if value == value else []
            if pairs:
                theirs, value = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
                closing.append({**fixed, "class": f"mean of {len(pairs)}", "published": theirs, "ours": value})
            printed = known.value(dataset, metric, "average")
            if printed is not None:
                defined = {cell["class"]: cell[metric] for cell in cells if cell[metric] == cell[metric]}
                whole = bool(defined) and whole_set[dataset] <= set(defined)
                value = sum(defined.values()) / len(defined) if whole else math.nan
                closing.append({**fixed, "class": PRINTED, "published": printed, "ours": value})
    lines += sorted(closing, key=lambda line: line["class"] == PRINTED)
    if not lines:
        have = ", ".join(f"{dataset} ({', '.join(metrics)})" for dataset, metrics in known.values.items())
        hint = "Choose a block for this data set, or evaluate one that the block has."
        raise UsageError(f"{block} has nothing to hold against these rows; it has {have}", hint)
    frame = pd.DataFrame(lines)
    frame["difference"] = frame["ours"] - frame["published"]
    order = ["run", "dataset", "class", "metric", "published", "ours", "difference", "selected_on_test"]
    return Comparison(known, frame[order])
