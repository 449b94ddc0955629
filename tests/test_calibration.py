"""Calibrated thresholds: the promise on exchangeable maps, formulas by hand, storage, drift."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from adflow._regions import plain_regions
from adflow.calibration import Calibration
from adflow.detector import Detector
from adflow.errors import InputError
from adflow.tasks._point import operating_point


def normal_maps(count: int, seed: int, side: int = 24) -> np.ndarray:
    """Return smooth maps with a random level and a random contrast each: correlated, over-dispersed counts."""
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.standard_normal((count, side, side)), (0, 1.2, 1.2))
    noise /= noise.std()
    contrast = rng.gamma(12, 1 / 12, (count, 1, 1))
    return (noise * contrast + 0.4 * rng.standard_normal((count, 1, 1))).astype(np.float32)


def calibrate(maps: np.ndarray) -> Calibration:
    return Calibration.from_maps(maps, maps.reshape(len(maps), -1).max(axis=1))


@pytest.fixture(scope="module")
def pool() -> tuple[np.ndarray, Calibration]:
    """Return 1,500 exchangeable maps, and the calibration that holds all their curves."""
    maps = normal_maps(1500, seed=0)
    return maps, calibrate(maps)


def part_of(whole: Calibration, images: np.ndarray) -> Calibration:
    """Return the calibration on some images without sweeping their maps again."""
    curves = [whole.curve(int(i)) for i in images]
    return Calibration._build(
        whole.scores[images],
        [levels for levels, _ in curves],
        [counts for _, counts in curves],
        np.zeros(1, dtype=np.float32),
        0,
        0.0,
        whole.max_count,
    )


def realised(
    pool: tuple[np.ndarray, Calibration], n: int, rule: str, wish: float, draws: int, seed: int
) -> tuple[float, float, float]:
    """Return mean, flagged share and the mean's error of what good images show, over draws of n + 20 maps.

    Regions are those of the raw mask for "nfa" and any region at all for "flag".
    """
    maps, whole = pool
    rng = np.random.default_rng(seed)
    counts = np.zeros((draws, 20))
    for row in counts:
        drawn = rng.choice(len(maps), n + 20, replace=False)
        calibration = part_of(whole, drawn[:n])
        level = calibration.threshold(wish) if rule == "nfa" else calibration.flag_threshold(wish)
        marked = whole.scores[drawn[n:]] > level
        row[marked] = 1 if rule == "flag" else [ndimage.label(maps[i] > level)[1] for i in drawn[n:][marked]]
    means = counts.mean(1)
    return float(means.mean()), float((counts > 0).mean()), float(means.std() / np.sqrt(draws))


# About 1,000 draws for each n, over three eps. n >= 3 / eps is where the promise holds on average.
@pytest.mark.parametrize("eps", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("n", [10, 20, 50, 100])
def test_good_images_show_at_most_eps_regions(pool: tuple[np.ndarray, Calibration], n: int, eps: float) -> None:
    mean, flagged, error = realised(pool, n, "nfa", eps, draws=334, seed=n)
    # 3.5 standard errors: one false failure in 4,000; the seed is fixed.
    if n >= 3 / eps:
        assert mean <= eps + 3.5 * error
    else:
        # What is said of fewer images: the share of marked ones is bounded, each shows 1 to 2 regions.
        assert flagged <= eps + 3.5 * error and mean <= 2 * eps
    # Not vacuous: the cap costs at most about (max count + 1) / n, so a good part of eps is used.
    assert mean >= 0.3 * eps


def test_the_threshold_of_a_count_keeps_the_flag_rate_too() -> None:
    for n, seed in ((12, 0), (25, 1), (60, 2)):
        calibration = calibrate(normal_maps(n, seed))
        for wish in (0.1, 0.3, 0.9):
            assert calibration.threshold(wish) >= calibration.flag_threshold(wish)


@pytest.mark.parametrize(("n", "said"), [(29, "At most 10.0% of good images are marked"), (30, "At most 0.1 false")])
def test_what_is_promised_depends_on_how_many_images_were_held_out(n: int, said: str) -> None:
    detector = SimpleNamespace(calibration=calibrate(normal_maps(n, 0)))
    promise = operating_point(cast(Detector, detector), nfa=0.1).promise
    assert promise.startswith(said) and ("30 keep 0.1 per image" in promise) == (n < 30)


@pytest.mark.parametrize(("n", "rate"), [(10, 0.1), (20, 0.05), (20, 0.3), (50, 0.1), (100, 0.02)])
def test_at_most_the_rate_of_good_images_is_flagged(pool: tuple[np.ndarray, Calibration], n: int, rate: float) -> None:
    mean, _, error = realised(pool, n, "flag", rate, draws=200, seed=n + 1)
    assert mean <= rate + 3.5 * error
    # The theorem's other side: at least rate - 1 / (n + 1) where maxima have no ties.
    assert mean >= rate - 1 / (n + 1) - 3.5 * error


def test_calibrating_on_shifted_images_breaks_the_promise() -> None:
    # Shows that the test above can fail: the promise is about exchangeable images.
    maps = normal_maps(400, seed=3)
    level = calibrate(maps[:200]).threshold(0.1)
    counts = [ndimage.label(m > level)[1] for m in maps[200:] + np.float32(2)]
    assert np.mean(counts) > 0.5


def brute_nfa(maps: np.ndarray, t: float) -> float:
    counts = []
    for m in maps:
        levels = np.unique(m)
        counts.append(max(ndimage.label(m > u)[1] for u in [t, *levels[levels > t]]))
    return (sum(counts) + max(1, *counts)) / (len(maps) + 1)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6), st.sampled_from([0.3, 0.5, 1.0, 1.7]), st.booleans())
def test_threshold_is_the_lowest_level_that_keeps_eps(seed: int, n: int, eps: float, ties: bool) -> None:
    maps = np.random.default_rng(seed).standard_normal((n, 6, 5)).astype(np.float32)
    maps = np.round(maps * 2) / 2 if ties else maps
    calibration = calibrate(maps)
    levels = np.unique(maps)[::-1].astype(np.float64)
    kept = [t for t in levels if all(brute_nfa(maps, u) <= eps for u in levels[levels >= t])]
    if not kept:
        with pytest.raises(InputError):
            calibration.threshold(eps)
        return
    try:
        assert calibration.threshold(eps) == min(kept)
    except InputError as error:
        assert "more than maps of good images ever show" in str(error) and len(kept) == len(levels)
    peaks = levels[: len(levels) // 2]
    np.testing.assert_allclose(10 ** calibration.log10_nfa(peaks), [brute_nfa(maps, t) for t in peaks], rtol=1e-12)


def test_detecting_above_the_threshold_is_detecting_where_the_nfa_is_small() -> None:
    calibration = calibrate(normal_maps(60, seed=1))
    for eps in (0.05, 0.1, 0.3, 1.0):
        level = calibration.threshold(eps)
        peaks = np.linspace(level - 1, level + 1, 501)
        peaks = peaks[peaks != level]
        np.testing.assert_array_equal(calibration.log10_nfa(peaks) <= np.log10(eps), peaks > level)


@pytest.mark.parametrize(("eps", "needed"), [(0.1, 9), (0.05, 19), (0.02, 49), (0.3, 3)])
def test_too_few_images_says_how_many(eps: float, needed: int) -> None:
    few, enough = calibrate(normal_maps(needed - 1, 0)), calibrate(normal_maps(needed, 0))
    for ask, option in ((few.threshold, f"--nfa {eps:g}"), (few.flag_threshold, f"--flag-rate {eps:g}")):
        with pytest.raises(InputError) as caught:
            ask(eps)
        assert str(caught.value) == (
            f"{option} needs at least {needed} held-out good images, this calibration has {needed - 1}"
        )
        offered = float(str(caught.value.hint).split("ask for ")[1].split(" ")[0])
        ask(offered)
    enough.threshold(eps)
    enough.flag_threshold(eps)


def test_a_curve_that_was_cut_is_never_trusted_below_its_end() -> None:
    maps = np.zeros((30, 9, 9), dtype=np.float32)
    maps[0, ::2, ::2] = np.arange(1, 26).reshape(5, 5)
    cut = Calibration.from_maps(maps, np.zeros(30), max_count=4)
    assert cut.threshold(1.5) == 21.0
    assert Calibration.from_maps(maps, np.zeros(30)).threshold(1.5) < 21.0


def test_outlines_add_no_region_and_hold_to_their_level() -> None:
    maps = normal_maps(80, seed=2, side=48)
    calibration = calibrate(maps)
    pixels = np.sort(maps.ravel())[::-1]
    assert calibration.pixel_level == pixels[int(1e-3 * maps.size)]
    several = 0
    for eps in (0.1, 1.0):
        level = calibration.threshold(eps)
        for m in normal_maps(40, seed=9, side=48) * np.float32(1.5):
            mask, regions = calibration.segment(m, level)
            levels = np.unique(m[m > level])
            most = max((ndimage.label(m > u)[1] for u in [level, *levels]), default=0)
            assert ndimage.label(mask)[1] == len(regions) <= most and bool(regions) == bool(most)
            several += len(regions) > 1
            for found in regions:
                # The outline is a whole component: that at its level, or the largest without a higher peak.
                lowest = float(m[found.mask].min())
                at = float(calibration.outline(np.array([found.peak]))[0])
                assert found.peak > level and lowest >= at
                for wider in (lowest, float(m[m < lowest].max())):
                    parts, _ = ndimage.label(m >= wider)
                    around = parts == parts[found.mask][0]
                    whole = around.sum() == found.area
                    assert whole if wider == lowest else whole or wider < at or m[around].max() > found.peak
                assert found.log10_nfa is not None and found.log10_nfa <= np.log10(eps)
    assert several > 5


def test_a_defect_in_pieces_keeps_them_however_low_the_threshold() -> None:
    calibration = calibrate(normal_maps(40, seed=3, side=48))
    base, unit = calibration.pixel_median, calibration.pixel_level - calibration.pixel_median
    y, x = np.mgrid[:48, :48]
    pieces = [np.exp(-((y - 24) ** 2 + (x - c) ** 2) / (2 * 3.0**2)) for c in (17, 30)]
    score = (base + unit * (6 * pieces[0] + 3 * pieces[1])).astype(np.float32)
    masks = [calibration.segment(score, base + share * unit) for share in (0.4, 1.0)]
    assert ndimage.label(score > base + 0.4 * unit)[1] == 1 and ndimage.label(score > base + unit)[1] == 2
    np.testing.assert_array_equal(masks[0][0], masks[1][0])
    assert len(masks[0][1]) == 2


def test_an_outline_is_near_the_peak_of_faint_defects_and_bounded_for_strong_ones() -> None:
    calibration = calibrate(normal_maps(40, seed=3, side=48))
    base, unit = calibration.pixel_median, calibration.pixel_level - calibration.pixel_median
    heights = np.array([-1.0, 0.0, 0.1, 1.0, 2.0, 100.0])
    expected = [-1, 0, 0.1 / np.sqrt(1 + 0.05**2), 2 / np.sqrt(5), np.sqrt(2), 2 / np.sqrt(1 + 4e-4)]
    np.testing.assert_allclose((calibration.outline(base + heights * unit) - base) / unit, expected, atol=1e-9)
    flat = Calibration.from_maps(np.zeros((9, 4, 4), dtype=np.float32), np.zeros(9))
    mask, regions = flat.segment(np.eye(4, dtype=np.float32), flat.threshold(0.1))
    np.testing.assert_array_equal(mask, np.eye(4) > 0)
    assert len(regions) == 4


@pytest.mark.skipif(find_spec("numba") is None, reason="numba is not installed")
def test_without_a_compiler_outlines_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = calibrate(normal_maps(40, seed=4))
    maps = np.round(normal_maps(6, seed=5) * 4) / np.float32(4)
    level = calibration.threshold(0.3)
    compiled = [calibration.segment(m, level)[0] for m in maps]
    monkeypatch.setattr("adflow._maxtree.compiled", lambda: None)
    np.testing.assert_array_equal([calibration.segment(m, level)[0] for m in maps], compiled)


def test_p_values_are_conformal() -> None:
    calibration = Calibration.from_maps(normal_maps(4, 0), np.array([1.0, 3.0, 2.0, 2.0]))
    np.testing.assert_allclose(calibration.p_value(np.array([0.0, 2.0, 2.5, 9.0])), [1.0, 0.8, 0.4, 0.2])


def test_storing_changes_nothing() -> None:
    maps = normal_maps(30, seed=5)
    calibration = calibrate(maps)
    stored = calibration.tensors()
    assert all(isinstance(value, np.ndarray) and value.dtype != object for value in stored.values())
    assert sum(value.nbytes for value in stored.values()) < maps.nbytes
    loaded = Calibration.from_tensors({key: value.copy() for key, value in stored.items()})
    for eps in (0.05, 0.1, 1.0):
        assert loaded.threshold(eps) == calibration.threshold(eps)
        assert loaded.flag_threshold(eps * 0.9) == calibration.flag_threshold(eps * 0.9)
    assert loaded.health() == calibration.health() and loaded.pixel_level == calibration.pixel_level
    for key, value in loaded.tensors().items():
        np.testing.assert_array_equal(value, stored[key])


def test_merged_parts_are_the_calibration_on_all_images() -> None:
    maps = normal_maps(40, seed=6)
    whole = calibrate(maps)
    merged = Calibration.merge([calibrate(maps[:7]), calibrate(maps[7:28]), calibrate(maps[28:])])
    assert merged.n == 40 and merged.threshold(0.2) == whole.threshold(0.2)
    # Every part rounds its number of pixels above the level down, so the merged level may be up to 3 pixels higher.
    ranked = np.sort(maps.ravel())[::-1]
    assert abs(int(np.flatnonzero(ranked == merged.pixel_level)[0]) - int(1e-3 * maps.size)) <= 3
    with pytest.raises(InputError, match="cannot be merged"):
        Calibration.merge([Calibration.from_tensors(whole.tensors())])


def test_health_reports_what_left_out_images_show() -> None:
    maps = normal_maps(40, seed=7)
    health = calibrate(maps).health()
    for eps in (0.1, 0.3, 1.0):
        counts = []
        for i in range(40):
            level = calibrate(np.delete(maps, i, axis=0)).threshold(eps)
            levels = np.unique(maps[i])
            counts.append(max(ndimage.label(maps[i] > u)[1] for u in [level, *levels[levels > level]]))
        assert health["leave_one_out"][f"{eps:g}"] == pytest.approx(np.mean(counts), abs=1e-4)
        assert health["flagged"][f"{eps:g}"] == pytest.approx(np.mean(np.array(counts) > 0), abs=1e-4)
    assert health["images"] == 40 and health["max_count"] == max(counts)
    assert health["variance_over_mean"] == pytest.approx(np.var(counts) / np.mean(counts), abs=1e-3)
    assert Calibration.from_maps(maps[:1], np.zeros(1)).health()["leave_one_out"] == {}


def test_observed_counts_regions_and_flagged_images() -> None:
    maps = normal_maps(20, seed=8)
    level = float(np.quantile(maps, 0.99))
    seen = calibrate(maps).observed(level)
    flagged = (maps > level).any(axis=(1, 2)).mean()
    assert seen["images"] == 20 and seen["flagged_share"] == flagged and seen["regions_per_image"] >= flagged


def test_drift_warns_on_a_shift_and_only_then() -> None:
    rng = np.random.default_rng(0)
    calibration = Calibration.from_maps(normal_maps(60, 0), rng.normal(size=60))
    found = [calibration.drift(rng.normal(shift, 1, 40)) for shift in (0, 1.5, -1.5)]
    same, up, down = (one for one in found if one is not None)
    assert same["warning"] is None and same["p_value"] > 0.01 and abs(same["auc"] - 0.5) < 0.15
    assert "more false alarms" in up["warning"] and up["auc"] > 0.8 and up["below_median"] < 0.2
    assert "fewer detections" in down["warning"] and down["auc"] < 0.2
    # Too few images to tell a shift from one defect.
    assert calibration.drift(np.full(7, 9.0)) is None and calibration.drift(np.full(8, 9.0)) is not None


def test_exchangeability_sees_sessions_and_memorised_fit_images() -> None:
    rng = np.random.default_rng(1)
    maps = normal_maps(60, 0)
    steady = Calibration.from_maps(maps, rng.normal(size=60))
    sessions = Calibration.from_maps(maps, rng.normal(size=60) + np.repeat([0, 2, 0], 20))
    assert steady.exchangeability()["warnings"] == []
    assert sessions.exchangeability()["blocks_p"] < 1e-3
    assert "may not hold for the next session" in sessions.exchangeability()["warnings"][0]
    # Fit images that are remembered are expected; fit images that score higher are not.
    remembered = steady.health(rng.normal(-2, 1, 50))
    assert remembered["fit_auc"] > 0.8 and remembered["fit_p"] < 1e-3 and remembered["warnings"] == []
    assert "defects among the training images" in steady.health(rng.normal(2, 1, 50))["warnings"][0]
    assert Calibration.from_maps(maps[:5], np.zeros(5)).exchangeability()["blocks_p"] is None


def test_bad_input_is_named() -> None:
    maps = normal_maps(3, 0)
    with pytest.raises(InputError, match="2 maps and 3 image scores"):
        Calibration.from_maps(maps[:2], np.zeros(3))
    with pytest.raises(InputError, match="n >= 1"):
        Calibration.from_maps([], np.zeros(0))
    with pytest.raises(InputError, match="NaN"):
        Calibration.from_maps(maps, np.array([0, np.nan, 1]))
    with pytest.raises(InputError, match="NaN"):
        Calibration.from_maps(maps * np.float32(np.nan), np.zeros(3))
    with pytest.raises(InputError, match=r"\[3, 24\], expected \[24, 24\]"):
        Calibration.from_maps([maps[0], maps[1][:3]], np.zeros(2))
    calibration = calibrate(maps)
    for eps in (0, -1, np.inf, np.nan):
        with pytest.raises(InputError, match="--nfa"):
            calibration.threshold(eps)
    for rate in (0, 1, 2, np.nan):
        with pytest.raises(InputError, match="--flag-rate"):
            calibration.flag_threshold(rate)
    with pytest.raises(InputError, match="more than maps of good images ever show"):
        calibration.threshold(1e5)
    with pytest.raises(InputError, match="lacks counts, offsets"):
        Calibration.from_tensors({k: v for k, v in calibration.tensors().items() if k not in ("counts", "offsets")})
    with pytest.raises(InputError, match="damaged"):
        Calibration.from_tensors({**calibration.tensors(), "levels": np.zeros(1)})
    with pytest.raises(InputError, match="NaN"):
        plain_regions(np.full((2, 2), np.nan), 0.0)
    with pytest.raises(InputError, match="threshold is NaN"):
        plain_regions(np.zeros((2, 2)), float("nan"))
