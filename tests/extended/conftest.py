"""The long fault tests: `python -m pytest tests/extended`. Linux; some need root (they mount a small disk) and skip.

Each test adds its counts to one table, printed at the end: kind of fault, how many tried, how many survived.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from children import Children
from cli.conftest import write_part
from conftest import TinyBackbone, make_tiny_images
from servers import file_server

from adflow import methods
from adflow.detector import Detector

from .stage import Count, Stage, serve_archive

if sys.platform != "linux":
    collect_ignore_glob = ["test_*"]

COUNTS: dict[str, list[int]] = {}


@pytest.fixture
def count() -> Count:
    """Call with a kind and whether it survived."""

    def one(kind: str, survived: bool) -> None:
        row = COUNTS.setdefault(kind, [0, 0])
        row[0] += 1
        row[1] += survived

    return one


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if COUNTS:
        terminalreporter.section("faults and inputs")
        for kind, (tried, survived) in COUNTS.items():
            terminalreporter.write_line(f"{kind:<60} {tried:>7} tried {survived:>7} survived")


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 good training images, 3 good and 3 defective test images with masks."""
    root = tmp_path_factory.mktemp("data") / "parts"
    rng = np.random.default_rng(0)
    write_part(root / "train" / "good", 16, rng)
    write_part(root / "test" / "good", 3, rng)
    write_part(root / "test" / "spot", 3, rng, defect=True)
    return root


@pytest.fixture(scope="session")
def run(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one fitted run."""
    return tmp_path_factory.mktemp("runs") / "base"


@pytest.fixture(scope="session")
def children(parts: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Children]:
    warm = tmp_path_factory.mktemp("warm")
    commands = [
        ["fit", parts, "-m", "padim", "--size", "64", "--out", run],
        ["segment", parts, "--model", run, "--threshold", "1", "--out", warm / "segment"],
        ["evaluate", parts, "--model", run, "--out", warm / "evaluate"],
        ["export", run, "--format", "onnx", "--images", parts, "--out", warm / "onnx"],
    ]
    with Children([[*map(str, command), "-q"] for command in commands]) as found:
        yield found


@pytest.fixture(scope="session")
def places(parts: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What the words of a command in braces stand for, ``out`` aside."""
    with file_server() as server:
        yield serve_archive(server, tmp_path_factory.mktemp("archive")) | {"parts": str(parts), "run": str(run)}


@pytest.fixture
def stage(children: Children, places: dict[str, str], tmp_path: Path) -> Callable[[str], Stage]:
    """Call with the name of a command."""
    return lambda name: Stage(name, places, children, tmp_path / "out", tmp_path / "home", tmp_path / "older")


@pytest.fixture(scope="session")
def root_user() -> None:
    if os.getuid() != 0:
        pytest.skip("needs root")


@pytest.fixture(scope="module")
def detector() -> Detector:
    """A fitted detector on a tiny backbone, for images of 32 px."""
    return methods.get("dfr")(TinyBackbone()).fit(make_tiny_images(8, 32, 32).normal)
