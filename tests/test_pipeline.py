"""Scoring from files: groups share a reading, results do not show it; and the clock that says where time goes."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from PIL import Image

from adflow._clock import counting, stage
from adflow.backbones import Backbone
from adflow.data import Sample
from adflow.errors import InputError
from adflow.methods.cflow import CFlow
from adflow.pipeline import Scored, _groups, run

STAGES = {"decode", "resize", "encoder", "method", "upsample", "image score"}


@pytest.fixture(scope="module")
def detector(tiny_backbone: Backbone) -> CFlow:
    generator = torch.Generator().manual_seed(0)
    return CFlow(tiny_backbone, blocks=0, context=3).fit(torch.rand(12, 3, 64, 64, generator=generator))


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    paths = [folder / f"{number:02}.png" for number in range(19)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    paths[5].write_bytes(b"no image")
    return [Sample(path, "test", None, None, None) for path in paths]


@pytest.mark.parametrize("workers", [1, 2])
def test_results_are_those_of_each_image_alone_in_order(detector: CFlow, samples: list[Sample], workers: int) -> None:
    assert detector.at_once > 1
    found = list(run(detector, samples, workers=workers))
    assert [scored.sample for scored in found] == samples
    assert [scored.error is not None for scored in found] == [number == 5 for number in range(19)]
    for scored, sample in zip(found, samples, strict=True):
        (alone,) = run(detector, iter([sample]))
        assert np.array_equal(alone.map, scored.map)
        assert scored.error is not None or (alone.image == scored.image and set(scored.seconds) == STAGES)


def test_groups_shrink_towards_a_known_end(samples: list[Sample]) -> None:
    def sizes(left: int | None, workers: int) -> list[int]:
        found = list(_groups(iter(samples), left, 8, workers))
        assert [sample for group in found for sample in group] == samples
        return [len(group) for group in found]

    assert sizes(None, 2) == [8, 8, 3]
    assert sizes(19, 2) == [8, 5, 3, 1, 1, 1]
    assert sizes(19, 64) == [1] * 19
    assert sizes(4, 1) == [4, *[1] * 15]  # fewer were announced: no image is lost


def test_strict_stops_at_the_unreadable_image(detector: CFlow, samples: list[Sample]) -> None:
    with pytest.raises(InputError, match=r"05\.png"):
        list(run(detector, samples, strict=True))


def test_kept_pictures_are_seen_one_by_one(detector: CFlow, samples: list[Sample]) -> None:
    def shape(scored: Scored) -> tuple[int, ...]:
        assert scored.picture is not None
        return scored.picture.shape

    seen = list(run(detector, samples[:4], keep_picture=True, after=shape))
    assert [scored.result for scored in seen] == [(40, 50, 3)] * 4
    assert all(scored.picture is None and "after" in scored.seconds for scored in seen)


def test_stages_inside_stages_are_counted_once() -> None:
    began = time.perf_counter()
    with counting("rest") as seconds:
        time.sleep(0.002)
        with stage("outer"):
            time.sleep(0.002)
            with stage("inner"):
                time.sleep(0.004)
    whole = time.perf_counter() - began
    assert set(seconds) == {"rest", "outer", "inner"}
    # A sleep never ends early; each stage has its own and no other's.
    assert seconds["rest"] >= 0.002 and seconds["outer"] >= 0.002 and seconds["inner"] >= 0.004
    assert sum(seconds.values()) <= whole
    with stage("nobody counts"):
        pass
    assert "nobody counts" not in seconds
