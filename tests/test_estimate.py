"""What a fit will take, told before it starts; and memory that does not grow with the images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TinyBackbone, make_tiny_images
from PIL import Image
from torch import nn

from adflow import methods
from adflow.data import Dataset, open_data
from adflow.detector import Detector
from adflow.errors import ResourceError
from adflow.features import FeatureBank
from adflow.methods._train import train
from adflow.tasks import estimate as task
from adflow.tasks import fit as fitting
from adflow.tasks.fit import FitOptions, fit_detector


@pytest.fixture(scope="module")
def plates(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """60 pictures of 64 x 64 px."""
    root = tmp_path_factory.mktemp("plates")
    for i, picture in enumerate(make_tiny_images(60).normal):
        array = (picture.permute(1, 2, 0) * 255).byte().numpy()
        Image.fromarray(array).save(root / f"{i:02}.png")
    (data,) = open_data(root)
    return data


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny net in the place of every backbone."""

    def prepare(data: Dataset, options: FitOptions) -> tuple[Detector, tuple[int, int], bool]:
        return methods.get(options.method)(TinyBackbone(), **options.settings), (64, 64), False

    monkeypatch.setattr(task, "prepare", prepare)
    monkeypatch.setattr(fitting, "prepare", prepare)


@pytest.mark.parametrize(
    ("method", "settings"), [("padim", {}), ("cflow", {"steps": 60, "blocks": 2}), ("cutpaste", {})]
)
def test_an_estimate_has_the_counts_and_about_the_costs(
    method: str, settings: dict[str, Any], plates: Dataset, tiny: None
) -> None:
    options = FitOptions(method=method, settings=settings, size=(64, 64), device="cpu")
    found = task.estimate(plates, options, start=1.5)
    assert (found["images"], found["held_out"], found["disk"]) == (52, 8, 0)
    assert found["probed_with"] == 52  # two probes at least
    seconds = found["seconds"]
    parts = ("start", "features", "fit", "calibration")
    assert seconds["total"] == pytest.approx(sum(seconds[part] for part in parts), abs=0.03)
    assert seconds["start"] >= 1.5  # and what the first images pay
    detector, size, keep = task.prepare(plates, options)
    real = fit_detector(detector, plates.train, options, size, keep)["seconds"]
    # Tiny works on a shared machine: the order of magnitude is all that can be asked of the clock here.
    assert 0.05 < (seconds["total"] - seconds["start"]) / sum(real.values()) < 20
    assert found["memory"] is None or 50 << 20 < found["memory"] < 8 << 30


def test_what_exceeds_the_feature_memory_is_counted_as_disk(plates: Dataset, tiny: None) -> None:
    options = FitOptions(method="padim", size=(64, 64), device="cpu")
    detector, _, _ = task.prepare(plates, options)
    small = FitOptions(
        method="padim", size=(64, 64), device="cpu", resources=fitting.Resources(memory=1000, dtype="float16")
    )
    # Grids 16, 8 and 4 with 8, 12 and 16 channels, 2 bytes each.
    row = 2 * (8 * 16**2 + 12 * 8**2 + 16 * 4**2)
    assert detector.backbone.channels == [8, 12, 16]
    assert task.estimate(plates, small)["disk"] == 60 * row  # held-out images included


def test_a_training_is_ended_and_its_rest_counted() -> None:
    net = nn.Linear(3, 1)
    batches = iter([torch.ones(4, 3)] * 1000)
    watch = task._Training()
    train(net, lambda x: net(x).square().mean(), batches, steps=1000, lr=0.1, progress=watch)
    assert len(list(batches)) == watch.missing == 1000 - task._STEPS
    assert watch.left() == pytest.approx(watch.missing * watch.per_step) and watch.per_step > 0


@pytest.mark.parametrize(
    ("points", "to", "value"),
    [
        ([(32, 2.0)], 32, 2.0),
        ([(32, 3.0), (64, 5.0)], 128, 9.0),  # a line
        ([(16, 1.0), (32, 4.0), (64, 16.0)], 128, 64.0),  # a square
        ([(32, 5.0), (64, 4.0)], 128, 4.0),  # noise does not fall below what was seen
    ],
)
def test_the_course_is_extended(points: list[tuple[int, float]], to: int, value: float) -> None:
    assert task._extended(points, to) == pytest.approx(value)


def test_calibration_in_parts_is_that_of_all_maps(plates: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = methods.get("padim")(TinyBackbone()).fit(make_tiny_images(20).normal)
    whole, _ = fitting._calibration(detector, plates.train, False)
    monkeypatch.setattr(fitting, "_MAP_BYTES", 7 * 4 * 64 * 64)
    parts, _ = fitting._calibration(detector, plates.train, False)
    assert parts.n == whole.n == 60 and np.array_equal(parts.scores, whole.scores)
    assert parts.threshold(0.2) == whole.threshold(0.2) and parts.flag_threshold(0.1) == whole.flag_threshold(0.1)


def test_a_limit_with_room_changes_nothing_in_cflow_and_one_that_cannot_be_kept_is_refused() -> None:
    images = make_tiny_images(24)
    with FeatureBank.build(TinyBackbone(), images) as bank:
        pools = []
        for limit in (None, 1 << 60):
            detector = methods.get("cflow")(TinyBackbone(), steps=2, blocks=1, context=4, max_memory=limit)
            detector.fit_bank(bank)
            pools.append(detector.learned())
        assert all(torch.equal(pools[0][k], pools[1][k]) for k in pools[0])
        detector = methods.get("cflow")(TinyBackbone(), blocks=1, max_memory="10MiB")
        with pytest.raises(ResourceError, match="CFLOW-AD with 36 channels at 16 positions needs"):
            detector.fit_bank(bank)
        assert detector._pool_bytes() == (10 << 20) // 8


def test_estimate_prints_and_does_not_fit(plates: Dataset, tiny: None, tmp_path: Path, capsys: Any) -> None:
    from adflow import cli

    arguments = ["fit", str(plates.root), "-m", "padim", "--size", "64", "--runs", str(tmp_path / "runs")]
    assert cli.run([*arguments, "--estimate"]) == 0
    assert "padim on 52 images takes about" in capsys.readouterr().out and not (tmp_path / "runs").exists()
