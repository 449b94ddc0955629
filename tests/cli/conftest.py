"""A small data set in MVTec layout, one fitted run, and a caller of the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from adflow import cli


@dataclass
class Result:
    """What one call of the command line gave."""

    code: int
    out: str
    err: str

    def json(self) -> dict[str, Any]:
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found


Call = Callable[..., Result]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*arguments: object) -> Result:
        code = cli.run([str(a) for a in arguments])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


def write_part(folder: Path, count: int, rng: np.random.Generator, defect: bool = False) -> None:
    """Write grey stripes; defective ones carry a bright square, with its mask."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        x = np.arange(96)[None, :] / 8 + rng.normal(0, 0.1)
        picture = 120 + 50 * np.sin(x) + rng.normal(0, 4, (80, 96))
        if defect:
            picture[30:50, 40:60] = 250
            truth = folder.parents[1] / "ground_truth" / folder.name / f"{i:03}_mask.png"
            truth.parent.mkdir(parents=True, exist_ok=True)
            mask = np.zeros((80, 96), np.uint8)
            mask[30:50, 40:60] = 255
            Image.fromarray(mask).save(truth)
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / f"{i:03}.png")


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 good training images, 6 good and 6 defective test images with masks, 80 x 96 px."""
    root = tmp_path_factory.mktemp("data") / "my parts"
    rng = np.random.default_rng(0)
    write_part(root / "train" / "good", 40, rng)
    write_part(root / "test" / "good", 6, rng)
    write_part(root / "test" / "spot", 6, rng, defect=True)
    return root


@pytest.fixture(scope="session")
def runs(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs that holds one fitted detector."""
    folder = tmp_path_factory.mktemp("runs")
    assert cli.run(["fit", str(parts), "-m", "padim", "--size", "64", "--runs", str(folder), "-q"]) == 0
    return folder
