"""A contrario regions: brute-force twins, promises under the null, planted defects, bad input."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from adflow import _maxtree, nfa
from adflow.errors import InputError, UsageError


@pytest.fixture(params=["compiled", "plain"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run a test with numba and without it."""
    if request.param == "plain":
        monkeypatch.setattr(_maxtree, "compiled", lambda: None)
    elif _maxtree.compiled() is None:
        pytest.skip("numba is not installed")
    yield request.param


# ------------------------------------------------------------------------------------------------ brute-force twins
def naive_tree(level: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """Prune and merge as U-Flow states them, on an explicit graph of components, iterated to the fix-point."""
    nodes: list[tuple[float, frozenset[int]]] = []
    for v in np.unique(level):
        labels, count = ndimage.label(level >= v)
        for k in range(1, count + 1):
            pixels = frozenset(np.flatnonzero(labels.ravel() == k).tolist())
            if min(level.ravel()[sorted(pixels)]) == v:
                nodes.append((v, pixels))
    nodes.sort(key=lambda node: len(node[1]))
    value = {p: -len(p) * float(unit.ravel()[level.ravel() == v][0]) for v, p in nodes}
    parent: dict[frozenset[int], frozenset[int] | None] = {}
    for i, (_, pixels) in enumerate(nodes):
        parent[pixels] = next((q for _, q in nodes[i + 1 :] if pixels < q), None)
    alive = set(parent)

    def children(node: frozenset[int]) -> list[frozenset[int]]:
        return [c for c in alive if parent[c] == node]

    def prune() -> None:
        for leaf in [n for n in alive if not children(n)]:
            branch = [leaf]
            while (up := parent[branch[-1]]) is not None and len(children(up)) == 1:
                branch.append(up)
            best = min(branch, key=lambda n: value[n])  # the first, i.e. smallest, on ties
            parent[best] = parent[branch[-1]]
            alive.difference_update(n for n in branch if n != best)

    changed = True
    while changed:
        changed = False
        prune()
        for node in sorted(alive, key=len):
            kids = children(node)
            if len(kids) >= 2 and not any(children(k) for k in kids) and value[node] <= min(value[k] for k in kids):
                alive.difference_update(kids)
                changed = True
    prune()
    painted = np.full(level.size, np.nan)
    for leaf in [n for n in alive if not children(n)]:
        painted[sorted(leaf)] = value[leaf]
    return painted.reshape(level.shape)


small_maps = hnp.arrays(
    np.float64, st.tuples(st.integers(1, 6), st.integers(1, 6)), elements=st.integers(0, 7).map(float)
)


@settings(max_examples=150, deadline=None)
@given(small_maps)
def test_clusters_are_those_of_the_iterated_procedure(level: np.ndarray) -> None:
    # A growing evidence, so that big unions and small peaks both win somewhere; exact in binary, so ties are ties.
    unit = level**2
    ranks, value, _, _ = _maxtree.best_regions(level, unit, np.zeros(level.size + 1), -np.inf)
    found = np.where(ranks >= 0, value[ranks], np.nan)
    np.testing.assert_array_equal(found, naive_tree(level, unit))


@pytest.mark.parametrize(("row", "areas"), [([6, 3, 3, 6], [4, 4, 4, 4]), ([6, 3, 3, 3], [1, 0, 0, 0])])
def test_ties_merge_siblings_but_keep_the_smaller_of_a_chain(row: list[int], areas: list[int], path: str) -> None:
    # One pixel at level 6 is worth 36, four at level 3 as well.
    level = np.array([row], dtype=np.float64)
    ranks, value, area, _ = _maxtree.best_regions(level, level**2, np.zeros(5), -np.inf)
    assert np.where(ranks >= 0, area[ranks], 0).tolist() == [areas]
    np.testing.assert_array_equal(np.where(ranks >= 0, value[ranks], np.nan), naive_tree(level, level**2))


@pytest.mark.skipif(find_spec("numba") is None, reason="numba is not installed")
@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.float64, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.floats(0, 40)),
    st.sampled_from([0, 0.5, 3]),
)
def test_both_paths_agree_bit_for_bit(chi2: np.ndarray, step: float) -> None:
    chi2 = np.round(chi2 / step) * step if step else chi2
    quick = [nfa.clusters(chi2[None], 6.0, bound=b) for b in ("one-sided", "reference")]
    levels = nfa.count_curve(chi2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_maxtree, "compiled", lambda: None)
        plain = [nfa.clusters(chi2[None], 6.0, bound=b) for b in ("one-sided", "reference")]
        plain_levels = nfa.count_curve(chi2)
    for a, b in itertools.chain(*(zip(*pair, strict=True) for pair in zip(quick, plain, strict=True))):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(levels, plain_levels, strict=True):
        np.testing.assert_array_equal(a, b)


def brute_count(score: np.ndarray, t: float) -> int:
    levels = np.unique(score)
    return max((ndimage.label(score > u)[1] for u in [t, *levels[levels > t]]), default=0)


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 7), st.integers(1, 7)), elements=st.integers(-3, 5).map(float)))
def test_count_curve_is_the_count_at_all_thresholds(score: np.ndarray) -> None:
    levels, counts = nfa.count_curve(score)
    assert (np.diff(levels) < 0).all() and (np.diff(counts) > 0).all()
    for t in np.arange(-4, 6, 0.5):
        above = counts[levels > t]
        assert (above[-1] if len(above) else 0) == brute_count(score, t)


def test_count_curve_ends_after_the_first_count_above_the_limit(path: str) -> None:
    score = np.zeros((9, 9), dtype=np.float32)
    score[::2, ::2] = np.arange(1, 26).reshape(5, 5)
    levels, counts = nfa.count_curve(score, max_count=4)
    assert counts.tolist() == [1, 2, 3, 4, 5] and levels.tolist() == [25, 24, 23, 22, 21]


# ------------------------------------------------------------------------------------------------ the null
@pytest.mark.parametrize("spread", [0.5, 0.8, 1.0])
@pytest.mark.parametrize("tests", ["image", "area"])
@pytest.mark.parametrize("tail", ["chernoff", "gamma"])
def test_noise_flags_nothing(spread: float, tests: nfa.Tests, tail: nfa.Tail) -> None:
    rng = np.random.default_rng(1)
    z = [spread * rng.standard_normal((3, c, s, s), dtype=np.float32) for c, s in ((64, 28), (32, 14))]
    assert (nfa.tree(nfa.latent_energies(z), (56, 56), tests=tests, tail=tail) < 0).all()


def test_the_reference_bound_calls_latents_that_are_too_normal_anomalous() -> None:
    z = [np.random.default_rng(1).standard_normal((1, 200, 20, 20), dtype=np.float32) * np.float32(0.8)]
    energies = nfa.latent_energies(z)
    assert (nfa.tree(energies, (20, 20), bound="reference") > 0).all()
    assert (nfa.tree(energies, (20, 20)) < 0).all()


def planted(gain: float = 2.0, seed: int = 0) -> tuple[list[np.ndarray], np.ndarray]:
    rng = np.random.default_rng(seed)
    latents, truth = [], None
    for channels, side in ((96, 32), (48, 16)):
        y, x = (np.mgrid[:side, :side] + 0.5) / side
        blob = ((y - 0.3) ** 2 + (x - 0.7) ** 2 < 0.1**2) | ((y - 0.8) ** 2 + (x - 0.2) ** 2 < 0.1**2)
        truth = blob if truth is None else truth
        latents.append((rng.standard_normal((1, channels, side, side)) * np.where(blob, gain, 1)).astype(np.float32))
    assert truth is not None
    return latents, truth


@pytest.mark.parametrize("tests", ["image", "area"])
@pytest.mark.parametrize("tail", ["chernoff", "gamma"])
def test_planted_blobs_are_found(tests: nfa.Tests, tail: nfa.Tail) -> None:
    latents, truth = planted()
    score = nfa.tree(nfa.latent_energies(latents), (32, 32), tests=tests, tail=tail)[0]
    mask, regions = nfa.detect(score)
    assert len(regions) == 2
    # The coarse scale paints whole cells of 2 x 2 pixels, so the outline may be off by one pixel.
    assert (mask & truth).sum() / (mask | truth).sum() > 0.6
    assert all(region.log10_nfa == -region.peak and region.log10_nfa < 0 for region in regions)


def test_area_charge_finds_smaller_defects_than_the_whole_image_charge() -> None:
    chi2 = np.full((1, 32, 32), 40.0)
    chi2[0, 10, 10] = 40 * 5.0
    assert nfa.tree([(chi2, 40.0)], (32, 32), tests="image").max() < 0
    assert nfa.tree([(chi2, 40.0)], (32, 32), tests="area").max() > 0


def test_no_region_is_worse_than_no_evidence() -> None:
    # A plateau just above the mean is one large region: many tests, hardly any evidence.
    score = nfa.tree([(np.full((1, 16, 16), 30.001), 30.0)], (16, 16), tests="area")
    # 256 places, one shape of area 1 (0.316915 * 4.062570 by the formula), 256 areas.
    assert score.min() == pytest.approx(-np.log10(256 * 0.316915 * 4.062570 * 256), rel=1e-6)


def test_equal_regions_both_survive(path: str) -> None:
    chi2 = np.ones((1, 9, 12))
    chi2[0, 2:4, 2:5] = chi2[0, 6:8, 7:10] = 60.0
    result = nfa.clusters(chi2, 4.0)
    assert np.count_nonzero(result.area == 6) == 12 and result.log10_p[0, 2, 2] == result.log10_p[0, 7, 8]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(1.01, 4))
def test_more_energy_is_never_less_anomalous(seed: int, gain: float) -> None:
    chi2 = np.random.default_rng(seed).chisquare(12, (1, 8, 9))
    low = nfa.tree([(chi2, 12.0)], (8, 9))
    high = nfa.tree([(chi2 * gain, 12.0)], (8, 9))
    assert high.max() >= low.max()


def test_an_image_does_not_depend_on_its_batch() -> None:
    rng = np.random.default_rng(3)
    energies = [
        (rng.chisquare(9, (5, 12, 10)) * rng.uniform(0.5, 3, (5, 1, 1)), 9.0),
        (rng.chisquare(5, (5, 6, 5)), 5.0),
    ]
    whole = nfa.tree(energies, (24, 20))
    order = [3, 0, 4, 1, 2]
    np.testing.assert_array_equal(nfa.tree([(c[order], d) for c, d in energies], (24, 20)), whole[order])
    # A matrix product may round differently for another batch size: float32, a few units in the last place.
    alone = np.concatenate([nfa.tree([(c[i : i + 1], d) for c, d in energies], (24, 20)) for i in range(5)])
    np.testing.assert_allclose(alone, whole, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (2, 2), (3, 20)])
def test_any_map_shape(shape: tuple[int, int], path: str) -> None:
    chi2 = np.full((2, *shape), 3.0)
    chi2[1, 0, 0] = 900.0
    for bound, tests in itertools.product(("one-sided", "reference"), ("image", "area")):
        score = nfa.tree([(chi2, 3.0)], (10, 12), bound=bound, tests=tests)
        assert score.shape == (2, 10, 12) and score[1].max() > 0 > score[0].max()


def test_a_long_ramp_needs_no_recursion(path: str) -> None:
    chi2 = np.arange(1, 3001, dtype=np.float64).reshape(1, 1, -1)
    assert nfa.clusters(chi2, 1.0).area.max() > 0


def test_exact_tail_matches_scipy_and_goes_on_where_it_underflows() -> None:
    from scipy.stats import chi2

    x = np.array([0.5, 3.0, 40.0, 300.0, 1200.0])
    np.testing.assert_allclose(nfa._chi2_log_sf(x, 5.0), chi2.logsf(x, 5), rtol=1e-12)
    # For even dof the tail is a Poisson sum: P(chi2_816 >= 10000) = exp(-5000) sum_{k < 408} 5000^k / k!.
    k = np.arange(408)
    terms = k * np.log(5000) - np.array([math.lgamma(j + 1) for j in k])
    expected = terms.max() + np.log(np.exp(terms - terms.max()).sum()) - 5000
    np.testing.assert_allclose(nfa._chi2_log_sf(np.array([10000.0]), 816.0), [expected], rtol=1e-12)
    chernoff = nfa._evidence(np.array([1.5, 4.0, 12.0]), 816.0, "chernoff")
    exact = nfa._evidence(np.array([1.5, 4.0, 12.0]), 816.0, "gamma")
    assert (exact >= chernoff).all() and (exact < chernoff * 1.2).all()  # a bound, and a tight one


def test_number_of_tests_by_hand() -> None:
    # 2 pixels: 2 (a b + a b^2 / 2), and one map of 1 pixel: a b
    a, b = 0.316915, 4.062570
    assert nfa.log10_tests((2, 1)) == pytest.approx(np.log10(2 * (a * b + a * b**2 / 2) + a * b), abs=1e-12)
    assert nfa.log10_tests((65536,)) == pytest.approx(39898, abs=10)  # no overflow: 0.6088 per pixel


# ------------------------------------------------------------------------------------------------ the rest
def test_block_finds_a_blob_and_stays_silent_on_noise() -> None:
    latents, truth = planted(gain=4.0)
    noise = [np.random.default_rng(5).standard_normal(z.shape) for z in latents]
    for precision in ("low", "high"):
        score = nfa.block(latents, (32, 32), precision=precision)[0]
        assert score[truth].max() > 0
        assert (nfa.block(noise, (32, 32), precision=precision) < 0).all()


def test_block_stays_finite_when_every_entry_is_extreme() -> None:
    for precision in ("low", "high"):
        assert np.isfinite(nfa.block([np.full((1, 3, 8, 8), 9.0)], (16, 16), precision=precision)).all()


def test_regions_carry_area_box_peak_and_outline() -> None:
    score = np.full((8, 10), -1.0)
    score[2:5, 3:7] = 2.0
    score[3, 4] = 5.0
    score[7, 9] = 0.5
    mask, (first, second) = nfa.detect(score)
    assert (first.area, first.bbox, first.peak, first.log10_nfa) == (12, (2, 3, 5, 7), 5.0, -5.0)
    assert second.bbox == (7, 9, 8, 10)
    np.testing.assert_array_equal(first.mask | second.mask, mask)
    # find_contours runs half-way between inside and outside pixel centres.
    assert first.contour.min(axis=0).tolist() == [1.5, 2.5] and first.contour.max(axis=0).tolist() == [
        4.5,
        6.5,
    ]
    assert nfa.detect(score, eps=1e-3)[1][0].area == 1


def test_null_health_tells_a_null_from_another() -> None:
    rng = np.random.default_rng(0)
    good = rng.chisquare(40, (20, 32, 32))
    clumped = good * rng.gamma(8, 1 / 8, good.shape)
    fine, bad = nfa.null_health([(good, 40.0), (clumped, 40.0)])
    # 20,480 draws: the mean is known to 0.2 %, the variance to 1 %, the 1e-3 exceedance (20 events) to 25 %.
    assert fine.trusted and abs(fine.dispersion - 1) < 0.01 and abs(fine.effective_dof - 40) < 3 and fine.tail < 2
    assert not bad.trusted and bad.effective_dof < 15 and bad.tail > 20


def test_sums_of_squares_are_exact_to_float32_blocks() -> None:
    z = np.random.default_rng(0).standard_normal((2, 200, 5, 6)).astype(np.float32)
    ((chi2, dof),) = nfa.latent_energies([z])
    # 64 float32 additions of positive terms round by at most 64 * 2^-24 = 4e-6 relative, 1e-6 in practice.
    np.testing.assert_allclose(chi2, (z.astype(np.float64) ** 2).sum(1), rtol=4e-6)
    assert dof == 200


# ------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_energies_must_be_finite_and_not_negative(bad: float) -> None:
    chi2 = np.ones((1, 4, 4))
    chi2[0, 1, 2] = bad
    with pytest.raises(InputError, match=r"energ"):
        nfa.tree([(chi2, 3.0)], (4, 4))


def test_wrong_input_is_named() -> None:
    chi2 = np.ones((1, 4, 4))
    with pytest.raises(InputError, match=r"\[4, 4\], expected \[B, h, w\]"):
        nfa.tree([(chi2[0], 3.0)], (4, 4))
    with pytest.raises(InputError, match="degrees of freedom"):
        nfa.tree([(chi2, 0.0)], (4, 4))
    with pytest.raises(InputError, match="same number"):
        nfa.tree([(chi2, 1.0), (np.ones((2, 2, 2)), 1.0)], (4, 4))
    with pytest.raises(InputError, match="at least one scale"):
        nfa.tree([], (4, 4))
    with pytest.raises(UsageError, match="unknown bound 'onesided'; did you mean 'one-sided'"):
        nfa.tree([(chi2, 1.0)], (4, 4), bound="onesided")
    with pytest.raises(InputError, match="NaN"):
        nfa.count_curve(np.array([[np.nan]]))
    with pytest.raises(InputError, match="NaN"):
        nfa.block([np.full((1, 2, 4, 4), np.nan)], (4, 4))
    with pytest.raises(InputError, match="eps"):
        nfa.detect(np.zeros((2, 2)), eps=0)
