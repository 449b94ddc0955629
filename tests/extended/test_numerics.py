"""Numbers at the edge for every method: the slower half of tests/test_faults_numerics.py."""

from __future__ import annotations

import pytest
import torch
from test_faults_numerics import Spoiled, check, fit
from test_methods import NAMES, SIZE, good_images

from .stage import Count


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["dead", "constant", "huge", "tiny"])
def test_channels(name: str, how: str, count: Count) -> None:
    check(fit(name, good_images(8), Spoiled(how)), good_images(1, seed=5))
    count("features at the edge, all methods", True)


@pytest.mark.parametrize("name", NAMES)
def test_training_images_that_are_all_the_same(name: str, count: Count) -> None:
    for images in (torch.full((8, 3, *SIZE), 0.5), torch.zeros(8, 3, *SIZE), good_images(1).expand(8, -1, -1, -1)):
        check(fit(name, images.contiguous()), images)
        count("features at the edge, all methods", True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("images", [2, 3, 8])
def test_few_training_images(name: str, images: int, count: Count) -> None:
    check(fit(name, good_images(images)), good_images(1, seed=5), ordered=images == 8)
    count("features at the edge, all methods", True)
