"""One seed, one detector: every method learns and measures the same in a second run and on every other way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adflow import cli, methods

from .stage import Count, without_costs

WAYS = {
    "in a second run": [],
    "in two processes": ["--jobs", "2"],
    "with features on disk": ["--feature-memory", "1KiB"],
    "on disk, in two processes": ["--feature-memory", "1KiB", "--jobs", "2"],
}


def cells(parts: Path, out: Path, *more: str) -> dict[str, Any]:
    """What `evaluate` finds for every method: digests of learned tensors, curves, scores and all figures."""
    argv = [
        "evaluate",
        str(parts),
        "-m",
        ",".join(methods.names()),
        "--size",
        "64",
        "--out",
        str(out),
        "--no-report",
        "-q",
    ]
    assert cli.run([*argv, *more]) == 0
    found = [json.loads(path.read_text(encoding="utf-8")) for path in (out / "cells").glob("*.json")]
    return {cell["row"]["method"]: without_costs(cell) for cell in found}


@pytest.fixture(scope="module")
def first(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return cells(parts, tmp_path_factory.mktemp("first"))


@pytest.mark.parametrize("way", WAYS)
def test_the_same_detectors_and_figures(
    way: str, first: dict[str, Any], parts: Path, tmp_path: Path, count: Count
) -> None:
    found = cells(parts, tmp_path, *WAYS[way])
    assert set(found) == set(first) == set(methods.names())
    for name in methods.names():
        assert found[name]["detector"] == first[name]["detector"], name
        assert found[name] == first[name], name
        count("the same bits, every method, on other ways", True)
