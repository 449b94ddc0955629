"""The panels: one scale a class, shapes of any size, and nothing that depends on colour alone."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from adflow._drawing import BLUE, INK, SKY_BLUE, VERMILION
from adflow.errors import InputError
from adflow.overlays import Scale, overlay, write_overlay

SCALE = Scale.from_alarm(ordinary=10.0, threshold=18.0)


def picture(height: int = 256, width: int = 256) -> np.ndarray:
    """A grey ramp, so that any colour in a panel was put there by it."""
    ramp = np.linspace(60, 200, width, dtype=np.float32).astype(np.uint8)
    return np.repeat(np.repeat(ramp[None, :, None], height, axis=0), 3, axis=2)


def count(panel: Image.Image, colour: tuple[int, int, int]) -> int:
    return int((np.asarray(panel) == colour).all(axis=2).sum())


def halves(panel: Image.Image, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The two pictures of a panel without title and verdict; the gaps are read off the known layout."""
    array = np.asarray(panel)
    inside = 2 * width + 8
    gap = (panel.width - inside) // 2
    top = gap
    return array[top : top + height, gap : gap + width], array[top : top + height, gap + width + 8 : -gap]


def test_ordinary_scores_stay_transparent_and_heat_rises_with_the_score() -> None:
    image = picture()
    left, right = halves(overlay(image, np.full((256, 256), 12.0), scale=SCALE), 256, 256)
    assert (left == image).all()
    # 12 is below low = 14: the heat half is the grey photograph (via luma, which may move a level).
    assert np.abs(right.astype(int) - image).max() <= 1

    ramp = np.linspace(14, 34, 256)[None].repeat(256, axis=0)
    _, heat = halves(overlay(np.full_like(image, 128), ramp, scale=SCALE), 256, 256)
    luma = np.asarray(Image.fromarray(heat).convert("L")).astype(int)[128]
    hot = luma[64:]  # from the alarm level on opacity is constant
    assert (np.diff(hot) >= -1).all()  # rounding
    assert hot[-1] - hot[0] > 80


def test_the_same_score_has_the_same_colour_in_every_panel_of_a_class() -> None:
    image = np.full((200, 200, 3), 128, np.uint8)
    maps = [np.full((200, 200), 20.0) for _ in range(2)]
    maps[1][:20] = 500.0
    cold, warm = (halves(overlay(image, m, scale=SCALE), 200, 200)[1] for m in maps)
    assert (cold[100:] == warm[100:]).all()


def test_contours_are_drawn_only_where_they_belong() -> None:
    mask = np.zeros((256, 256), bool)
    mask[100:140, 60:90] = True
    truth = np.zeros((256, 256), bool)
    truth[20:60, 200:230] = True
    left, right = halves(overlay(picture(), np.zeros((256, 256)), scale=SCALE, mask=mask, truth=truth), 256, 256)

    def where(half: np.ndarray, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
        rows, columns = np.nonzero((half == colour).all(axis=2))
        return rows.min(), rows.max(), columns.min(), columns.max()

    assert not (left == VERMILION).all(axis=2).any()
    assert where(right, VERMILION) == (98, 141, 58, 91)  # two pixels outside the mask, none inside
    for half in (left, right):
        assert where(half, SKY_BLUE)[0] >= 18 and where(half, SKY_BLUE)[1] <= 61
    # Dashed: a good part of the ring is not blue.
    dashes = (left == SKY_BLUE).all(axis=2).sum()
    ring = (44 * 34) - (40 * 30)
    assert 0.3 * ring < dashes < 0.7 * ring


@pytest.mark.parametrize("whole", [True, False])
def test_a_mask_over_everything_gets_a_frame_and_an_empty_one_nothing(whole: bool) -> None:
    mask = np.full((256, 256), whole)
    _, right = halves(overlay(picture(), np.zeros((256, 256)), scale=SCALE, mask=mask), 256, 256)
    line = (right == VERMILION).all(axis=2)
    assert line[0].all() == line[-1].all() == line[:, 0].all() == line[:, -1].all() == whole
    assert line[10:-10, 10:-10].sum() == 0


def test_a_defect_of_one_pixel_survives_shrinking() -> None:
    mask = np.zeros((2000, 2000), bool)
    mask[777, 1234] = True
    panel = overlay(picture(2000, 2000), np.zeros((50, 50)), scale=SCALE, mask=mask, overlay_size=256)
    _, right = halves(panel, 256, 256)
    assert (right == VERMILION).all(axis=2).sum() >= 8


def test_the_verdict_is_a_colour_and_a_shape_and_a_word() -> None:
    image, heat = picture(), np.zeros((256, 256))
    good = overlay(image, heat, scale=SCALE, verdict="good", score=3.0, threshold=18.0)
    bad = overlay(image, heat, scale=SCALE, verdict="defect", score=33.0, threshold=18.0)
    bare = overlay(image, heat, scale=SCALE)
    assert count(good, BLUE) > 5000 and count(good, VERMILION) == 0
    assert count(bad, VERMILION) > 5000 and count(bad, BLUE) == 0
    assert count(bare, BLUE) == count(bare, VERMILION) == 0
    assert bare.height < good.height == bad.height
    badge = [np.asarray(panel.convert("L"))[:30, :30] > 200 for panel in (good, bad)]
    assert (badge[0] != badge[1]).any()


@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (700, 1), (3, 2000), (2, 2), (37, 61), (480, 640), (1200, 90)])
@pytest.mark.parametrize("overlay_size", [None, 64, 400, (100, 300)])
def test_any_shape_gives_a_panel(shape: tuple[int, int], overlay_size: int | tuple[int, int] | None) -> None:
    generator = np.random.default_rng(0)
    panel = overlay(
        generator.integers(0, 256, (*shape, 3), dtype=np.uint8),
        generator.normal(15, 5, shape),
        scale=SCALE,
        mask=generator.random(shape) > 0.5,
        truth=generator.random(shape) > 0.5,
        title="x" * 500,
        score=1e30,
        threshold=-1e-30,
        verdict="defect",
        overlay_size=overlay_size,
    )
    assert panel.mode == "RGB" and panel.width >= 2 * 192
    height, width = shape
    if overlay_size is None and max(shape) >= 192:
        assert panel.width >= width and panel.height >= height
    if overlay_size == 400:
        assert max(panel.size) < 2.5 * 400


def test_maps_and_masks_of_other_sizes_and_pixels_that_are_no_numbers() -> None:
    heat = np.full((8, 8), 12.0)
    heat[0, 0], heat[7, 7], heat[0, 7] = np.nan, np.inf, -np.inf
    mask = np.zeros((8, 8), bool)
    mask[7, 7] = True
    image = np.full((256, 256, 3), 128, np.uint8)
    _, right = halves(overlay(image, heat, scale=SCALE, mask=mask), 256, 256)
    assert (right[5, 5] == 128).all() and (right[5, 250] == 128).all()
    assert right[250, 250].astype(int).max() - right[250, 250].min() > 60


def test_deep_images_are_drawn_like_their_8_bit_twins() -> None:
    image, heat = picture(), np.zeros((256, 256))
    deep = overlay(image.astype(np.float32) / 255, heat, scale=SCALE)
    assert (np.asarray(deep) == np.asarray(overlay(image, heat, scale=SCALE))).all()
    grey = overlay(image[:, :, 0], heat, scale=SCALE)
    assert (np.asarray(grey) == np.asarray(deep)).all()


@pytest.mark.parametrize("title", ["Größe/çedille.png", "部品_07.png", "a\nb\tc\x00d\x1b[31m", "", "🔩" * 400])
def test_any_title_can_be_drawn(title: str) -> None:
    panel = overlay(picture(), np.zeros((256, 256)), scale=SCALE, title=title)
    assert panel.height == overlay(picture(), np.zeros((256, 256)), scale=SCALE, title=title[:1]).height


def test_pure_and_the_same_in_many_threads() -> None:
    image, heat = picture(), np.random.default_rng(1).normal(15, 5, (256, 256))
    before = image.copy(), heat.copy()
    results: list[bytes] = []

    def draw() -> None:
        for _ in range(3):
            options: dict[str, Any] = {"mask": heat > 20, "title": "one", "verdict": "good", "score": 2.0}
            results.append(overlay(image, heat, scale=SCALE, **options).tobytes())

    threads = [threading.Thread(target=draw) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(results)) == 1 and len(results) == 12
    assert (image == before[0]).all() and (heat == before[1]).all()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_written_whole_or_not_at_all(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "földer" / f"名前{suffix}"
    write_overlay(path, picture(), np.zeros((256, 256)), scale=SCALE, title="x")
    with Image.open(path) as written:
        assert written.size == overlay(picture(), np.zeros((256, 256)), scale=SCALE, title="x").size
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"score_map of shape \[H, W\], found \(3,\)"):
        write_overlay(path, picture(), np.zeros(3), scale=SCALE)
    assert path.read_bytes() == before and [file.name for file in path.parent.iterdir()] == [path.name]


def test_bad_input_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\[H, W, 3\] or \[H, W\], found \(4, 4, 4\)"):
        overlay(np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4)), scale=SCALE)
    with pytest.raises(InputError, match="overlay_size must be at least 1, found 0"):
        overlay(picture(), np.zeros((4, 4)), scale=SCALE, overlay_size=0)
    with pytest.raises(InputError, match=r"must end in \.png, \.jpg or \.webp"):
        write_overlay(tmp_path / "a.gif", picture(), np.zeros((4, 4)), scale=SCALE)


def test_scales() -> None:
    assert [SCALE.label(score) for score in (10.0, 18.0, 34.0)] == [0.0, 1.0, 3.0]
    assert (SCALE.low, SCALE.high) == (14.0, 34.0)
    # Log-likelihoods: scores may be negative, what counts is the way from ordinary to alarm.
    assert Scale.from_alarm(-900.0, -400.0).label(-400.0) == 1.0
    nfa = Scale.from_nfa(0.1)
    assert nfa.threshold == pytest.approx(1.0) and nfa.label(2.0) == 2.0
    for flat in (Scale.from_alarm(5.0, 5.0), Scale.from_alarm(5.0, 4.0), Scale.from_alarm(0.0, 0.0)):
        assert flat.low < (flat.threshold or 0.0) < flat.high
        overlay(picture(), np.zeros((4, 4)), scale=flat)
    with pytest.raises(InputError, match="no colour scale"):
        Scale(1.0, 1.0)
    with pytest.raises(InputError, match="finite levels"):
        Scale.from_alarm(float("nan"), 1.0)


def test_the_legend_names_only_what_is_drawn() -> None:
    heat = np.zeros((256, 256))
    nothing = overlay(picture(), heat, scale=SCALE)
    both = overlay(picture(), heat, scale=SCALE, mask=heat > 1, truth=heat > 1)
    assert count(nothing, VERMILION) == count(nothing, SKY_BLUE) == 0
    assert count(both, VERMILION) > 50 and count(both, SKY_BLUE) > 30
    assert count(nothing, INK) > 50  # the alarm mark on the colour bar
