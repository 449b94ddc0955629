"""Published results by name, to stand beside measured ones.

The numbers live in ``published.yaml`` beside this file, as their sources print them; here they become
fractions. A block is one method in one configuration as one source printed it: ``cflow-paper``,
``anomalib-padim-r18`` ... Numbers that were selected by looking at the test set say so, because a measured
last epoch cannot be held against a chosen best one.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml

from adflow.errors import UsageError

Values = Mapping[str, Mapping[str, Mapping[str, float]]]


@dataclass(frozen=True, slots=True)
class Block:
    """One method in one configuration, as one source printed it.

    Attributes:
        name: what one types, for example "cflow-paper".
        title: one line for people.
        method: adflow's name of the method.
        source: paper, table, URL.
        official: printed by the method's own paper or repository; else quoted or re-run by somebody else.
        values: fractions, data set -> metric -> class; "average" is the printed average.
        selected_on_test: metric -> how its numbers were chosen by looking at the test set. A metric that is not here
            was not, or the source does not say.
        std: as `values`: the printed standard deviations over runs.
        backbone: the backbone, None where the source does not say.
        size: input size in px, as printed.
        note: what else to know about the numbers.
    """

    name: str
    title: str
    method: str
    source: str
    official: bool
    values: Values
    selected_on_test: Mapping[str, str]
    std: Values
    backbone: str | None = None
    size: str | None = None
    note: str | None = None

    def value(self, dataset: str, metric: str, class_: str) -> float | None:
        """Return the printed number as a fraction, or None where the source has none."""
        return self.values.get(dataset, {}).get(metric, {}).get(class_)


def _tables() -> dict[str, dict[str, Any]]:
    text = resources.files("adflow").joinpath("published.yaml").read_text(encoding="utf-8")
    # libyaml reads the file ten times faster; it is not in every build of PyYAML.
    tables: dict[str, dict[str, Any]] = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return tables["blocks"]


def _fractions(values: Values, unit: str) -> dict[str, dict[str, dict[str, float]]]:
    # Rounding takes away what the division by 100 adds behind the printed digits.
    divide = 100 if unit == "percent" else 1
    return {
        dataset: {
            metric: {str(class_): round(value / divide, 7) for class_, value in classes.items()}
            for metric, classes in metrics.items()
        }
        for dataset, metrics in values.items()
    }


def _block(name: str, found: Mapping[str, Any]) -> Block:
    size = found.get("size")
    return Block(
        name,
        found["title"],
        found["method"],
        found["source"],
        found["official"],
        _fractions(found["values"], found["unit"]),
        found.get("selected_on_test") or {},
        _fractions(found.get("std") or {}, found["unit"]),
        found.get("backbone"),
        None if size is None else str(size),
        found.get("note"),
    )


def names() -> list[str]:
    """Return the names of all blocks, in the order of the file: papers of a method beside each other."""
    return list(_tables())


def blocks() -> list[Block]:
    """Return all blocks."""
    return [_block(name, found) for name, found in _tables().items()]


def block(name: str) -> Block:
    """Return one block.

    Raises:
        UsageError: there is no block of that name; names the nearest ones and the papers'.
    """
    tables = _tables()
    if name not in tables:
        near = difflib.get_close_matches(name, tables, n=3)
        guess = f"did you mean {' or '.join(near)}? " if near else ""
        papers = ", ".join(known for known in tables if known.endswith("-paper"))
        raise UsageError(f"no published results '{name}'; {guess}Papers: {papers}; {len(tables)} blocks in all")
    return _block(name, tables[name])


def classes_of(dataset: str) -> frozenset[str]:
    """Return the classes of a data set as far as any source prints numbers class by class."""
    found: set[str] = set()
    for table in _tables().values():
        for classes in (table["values"].get(dataset) or {}).values():
            found.update(str(class_) for class_ in classes)
    return frozenset(found - {"average"})
