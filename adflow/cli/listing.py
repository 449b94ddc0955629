"""``adflow list``."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from adflow.cli import _options as o
from adflow.cli._console import Talk

WHAT = ("methods", "backbones", "datasets", "detectors")


def list_(
    what: Annotated[str, typer.Argument(help=f"One of {', '.join(WHAT)}; default: all.")] = "all",
    zoo_file: Annotated[Path | None, typer.Option("--zoo", help="Your own zoo file, merged over ours.")] = None,
    runs: o.Runs = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Show methods, backbones, data sets and fitted detectors."""
    from adflow.errors import unknown

    talk = Talk(json=json, quiet=quiet, verbose=verbose)
    if what not in (*WHAT, "all"):
        raise unknown("list", what, [*WHAT, "all"])
    parts = WHAT if what == "all" else (what,)
    makers: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "methods": _methods,
        "backbones": lambda: _zoo(zoo_file, "backbones"),
        "datasets": lambda: _zoo(zoo_file, "datasets"),
        "detectors": lambda: _detectors(runs),
    }
    found: dict[str, Any] = {part: makers[part]() for part in parts}
    if what == "datasets":
        from adflow.data import layouts

        found["layouts"] = layouts()
    if json:
        talk.data(found)
        return
    for part in parts:
        talk.data({}, _table(part, found[part]))
    if what == "methods":
        talk.say("null: whether it has a Gaussian null model (--null gaussian); costs and papers: --json")
    if what == "datasets":
        talk.data({}, _drawn(found["layouts"]))


def _methods() -> list[dict[str, Any]]:
    """Read the facts of each method from its source text: importing all of them would load torch."""
    from adflow.methods import facts

    return facts()


def _zoo(extra: Path | None, part: str) -> list[dict[str, Any]]:
    from adflow._store import size_text
    from adflow.tasks.download import plan
    from adflow.zoo import load

    catalogue = load(extra)
    rows = [asdict(entry) for entry in getattr(catalogue, part).values()]
    for row in rows:
        found = plan(row["name"], catalogue=catalogue)
        row |= {"size": size_text(found.size), "installed": found.here}
    if part == "backbones":
        rows.append({"name": "pixels", "installed": True})  # the image itself: nothing to have
    return rows


def _detectors(runs: Path | None) -> list[dict[str, Any]]:
    from adflow.runs import DETECTOR, list_runs

    rows = []
    for run in list_runs(runs):
        file = run / DETECTOR
        row: dict[str, Any] = {"name": run.name, "file": str(file), "bytes": file.stat().st_size}
        summary = run / "fit.json"
        if summary.is_file():
            try:
                row |= {k: v for k, v in json.loads(summary.read_text(encoding="utf-8")).items() if k in _SHOWN}
            except (ValueError, AttributeError):  # no JSON, or no object
                row["note"] = "fit.json is damaged"
        rows.append(row)
    return rows


_SHOWN = ("data", "method", "backbone", "recipe", "size", "seed", "images", "held_out")
_COLUMNS = {
    "methods": ("name", "year", "null", "recipes", "learns"),
    "backbones": ("name", "timm", "size", "licence", "installed"),
    "datasets": ("name", "title", "size", "licence", "installed"),
    "detectors": ("name", "data", "method", "backbone", "size", "held_out", "bytes"),
}


def _table(part: str, rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    columns = [c for c in _COLUMNS[part] if any(c in row for row in rows)]
    table = Table(title=f"{part} ({len(rows)})", title_justify="left", box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(Text(_short(row.get(column))) for column in columns))
    return table


def _drawn(layouts: dict[str, str]) -> str:
    """Return the folders of each layout, to be read below the table of data sets."""
    parts = [f"{name}\n{textwrap.indent(folders, '    ')}" for name, folders in layouts.items()]
    return "\n".join(["", "layouts: a folder in one of these is read as it is", *parts])


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return str(value.get("name", ", ".join(map(str, value))))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return "x".join(map(str, value)) if all(isinstance(v, int) for v in value) else ", ".join(map(str, value))
    return "-" if value is None else str(value)
