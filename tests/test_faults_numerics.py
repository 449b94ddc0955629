"""Numbers at the edge, and the same bits on every way, for every method on a tiny backbone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from conftest import TinyBackbone
from test_methods import NAMES, SIZE, good_images, make, with_defect
from torch import Tensor

from adflow._threads import one_thread
from adflow.backbones import Backbone
from adflow.detector import Detector, Resources
from adflow.detector_file import digest
from adflow.errors import AdflowError
from adflow.tasks._jobs import run_units


class Spoiled(TinyBackbone):
    """A backbone whose features are spoiled in one way; in inference as in fitting."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, images: Tensor) -> list[Tensor]:
        pyramid = super().forward(images)
        for level in pyramid:
            if self.how == "dead":
                level[:, ::2] = 0.0
            elif self.how == "constant":
                level[:, ::2] = 7.0
            elif self.how == "huge":
                level[:, 0] *= 1e6
            elif self.how == "tiny":
                level *= 1e-6
            elif self.how == "nan" and float(images.amax()) > 0.999:
                level[:, 0, 0, 0] = float("nan")
        return pyramid


def fit(name: str, images: Tensor, backbone: Backbone | None = None) -> Detector:
    return make(name, backbone or TinyBackbone()).fit(images, seed=0)


def specks() -> Tensor:
    """An image [3, H, W] of pixels that are black or white at random."""
    return (torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(0)) > 0.5).float()


def check(detector: Detector, good: Tensor, ordered: bool = True) -> None:
    """Scores of good, defective, black and white images are finite, and the defect is above the good one."""
    edge = torch.stack([torch.zeros(3, *SIZE), torch.ones(3, *SIZE), specks()])
    scores = detector.score(torch.cat([good[:1], with_defect(good[:1]), edge]))
    assert torch.isfinite(scores.map).all() and torch.isfinite(scores.image).all()
    if ordered:
        assert scores.image[1] > scores.image[0], scores.image


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["dead", "huge"])
def test_channels_that_are_dead_or_of_another_scale(name: str, how: str) -> None:
    check(fit(name, good_images(8), Spoiled(how)), good_images(1, seed=5))


@pytest.mark.parametrize("name", NAMES)
def test_an_outlier_among_few_training_images(name: str) -> None:
    images = good_images(8)
    images[3] = specks()
    check(fit(name, images), good_images(1, seed=5))


@pytest.mark.parametrize("name", NAMES)
def test_features_that_are_not_finite_are_refused(name: str) -> None:
    images = good_images(8)
    images[2, :, :4] = 1.0
    try:
        detector = fit(name, images, Spoiled("nan"))
    except AdflowError:
        return
    check(detector, good_images(1, seed=5), ordered=False)  # its features are not the backbone's


@pytest.mark.parametrize("name", NAMES)
def test_features_in_ram_or_on_disk_give_the_same_bits(name: str, tmp_path: Path) -> None:
    detectors = [make(name, TinyBackbone()).fit(good_images(8), seed=2, resources=resources)
                 for resources in (Resources(), Resources(memory=0, folder=tmp_path))]  # fmt: skip
    first, second = (detector.learned() for detector in detectors)
    assert set(first) == set(second) and all(torch.equal(first[k], second[k]) for k in first)


def learn(names: Sequence[str]) -> Iterator[str]:
    """The digest of what each method learns, here or in another process."""
    for name in names:
        yield digest(fit(name, good_images(8)).learned(), {})


def test_two_processes_learn_the_same_bits_as_one() -> None:
    units = [NAMES[::2], NAMES[1::2]]
    with one_thread():  # as in `evaluate`, whatever its --jobs
        here = [list(learn(unit)) for unit in units]
    for unit, at, found in run_units(learn, units, 2):
        assert found == here[unit][at], units[unit][at]
