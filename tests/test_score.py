"""``score`` as a stream: files written as rows come, the highest rows kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TinyBackbone, make_tiny_images

from adflow import methods
from adflow.calibration import Calibration
from adflow.data import Sample
from adflow.detector import Detector
from adflow.errors import InputError
from adflow.pipeline import Scored
from adflow.tasks import score as scoring

VALUES = [0.5, 2.0, None, 0.1, 2.0, 3.0, None, 1.0]


@pytest.fixture(scope="module")
def detector() -> Detector:
    found = methods.get("padim")(TinyBackbone()).fit(make_tiny_images().normal)
    scores = found.score(make_tiny_images(10, seed=1).normal)
    found.calibration = Calibration.from_maps(scores.map.numpy(), scores.image.numpy())
    return found


def given(*_: Any, **__: Any) -> Iterator[Scored]:
    for i, value in enumerate(VALUES):
        sample = Sample(Path(f"=no,formula/{i}.png"), "test", None, None, None)
        error = f"{sample.image}: broken" if value is None else None
        yield Scored(sample, image=value or 0.0, error=error, seconds={"decode": 0.25})


def test_rows_are_safe_in_a_spreadsheet_and_whole_in_json(detector: Detector, tmp_path: Path) -> None:
    result = scoring.score(detector, [], through=given, out=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scores.csv", "scores.jsonl"]
    lines = (tmp_path / "scores.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == result["rows"]
    table = (tmp_path / "scores.csv").read_bytes().decode().splitlines()
    assert table[0] == "image,score,p_value,verdict,error" and len(table) == 9
    assert (
        table[1].startswith('"\'=no,formula/0.png",0.5,')
        and table[3] == '"\'=no,formula/2.png",,,,"\'=no,formula/2.png: broken"'
    )
    assert [row["score"] for row in result["rows"]] == VALUES
    assert len(result["failed"]) == 2 and result["profile"]["images"] == 8
    assert result["flagged"] == sum(row["verdict"] == "defect" for row in result["rows"])
    assert result["profile"]["stages"]["decode"] == 2.0


def test_only_the_highest_rows_are_kept(detector: Detector, tmp_path: Path) -> None:
    every, some, most = (scoring.score(detector, [], through=given, keep=keep) for keep in (None, 3, 7))
    by_score = [every["rows"][i] for i in (5, 1, 4, 7, 0, 3)]
    assert some["rows"] == by_score[:3] and most["rows"][:6] == by_score
    assert every | {"rows": 0, "profile": 0} == some | {"rows": 0, "profile": 0}


def test_an_error_leaves_the_files_of_before(detector: Detector, tmp_path: Path) -> None:
    def breaks(*_: Any, **__: Any) -> Iterator[Scored]:
        yield from given()
        raise InputError("no more")

    scoring.score(detector, [], through=given, out=tmp_path)
    before = (tmp_path / "scores.csv").read_bytes()
    with pytest.raises(InputError, match="no more"):
        scoring.score(detector, [], through=breaks, out=tmp_path)
    assert (tmp_path / "scores.csv").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scores.csv", "scores.jsonl"]


@pytest.mark.parametrize("count", [4, 8, 9, 40])
def test_the_level_is_where_p_values_fall_to_the_rate(
    count: int, detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(count)
    held = np.round(rng.normal(size=count), 1)  # with ties
    calibration = Calibration.from_maps(rng.normal(size=(count, 8, 8)).astype(np.float32), held)
    monkeypatch.setattr(detector, "calibration", calibration)
    sample = Sample(Path("a.png"), "test", None, None, None)
    tried = np.concatenate([held, np.nextafter(held, np.inf), np.nextafter(held, -np.inf), [-9.0, 9.0]])
    # A k-th of n + 1 is where floor and rounding can be off by one.
    for rate in (*(k / (count + 1) for k in range(1, count + 2)), 0.3, 0.5):
        level = scoring.image_level(calibration, rate)
        expected = [(1 + int((held >= one).sum())) * (1 - 1e-9) <= rate * (count + 1) for one in tried]
        assert ((tried > level) == expected).all(), rate
        rows = [scoring.row_of(Scored(sample, image=float(one)), detector, rate) for one in tried]
        assert [row["verdict"] == "defect" for row in rows] == expected, rate
