"""Metrics: exact ones against scikit-learn and plain loops, streamed ones within their bounds, intervals, tests."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc

import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn import metrics as sk

from adflow import metrics
from adflow.errors import InputError, UsageError
from adflow.metrics import StreamingPixelMetrics

# All results are ratios of counts in float64: only the order of the sums can differ from another exact code.
ROUNDING = 1e-9


def example(seed: int = 0, n: int = 6, size: tuple[int, int] = (24, 20), levels: int | None = None):
    """Maps [n, H, W] with two boxes and some specks as defects on all but the first third of the images."""
    rng = np.random.default_rng(seed)
    maps = rng.standard_normal((n, *size)).astype(np.float32)
    masks = np.zeros(maps.shape, dtype=bool)
    for mask in masks[n // 3 :]:
        r, c = rng.integers(0, size[0] - 6), rng.integers(0, size[1] - 5)
        mask[r : r + 6, c : c + 4] = True
        mask[rng.integers(0, size[0]), rng.integers(0, size[1])] = True
    maps[masks] += 1.0
    if levels:
        maps = np.round(maps * levels / 4)
    return maps, masks


@st.composite
def cases(draw):
    """Small maps with many ties or none, of either float type, and any masks with both kinds of pixels."""
    n, h, w = draw(st.integers(1, 4)), draw(st.integers(1, 7)), draw(st.integers(2, 7))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    width = 32 if dtype == np.float32 else 64
    few = st.integers(-3, 3).map(float)
    many = st.floats(-1e6, 1e6, width=width, allow_subnormal=False)
    maps = draw(hnp.arrays(dtype, (n, h, w), elements=draw(st.sampled_from([few, many]))))
    masks = draw(hnp.arrays(np.bool_, (n, h, w)))
    masks[0, 0, :2] = [True, False]
    return maps, masks


def agrees(found: float, expected: float) -> None:
    assert found == pytest.approx(expected, abs=ROUNDING, nan_ok=True)


@settings(deadline=None, max_examples=70)
@given(cases(), st.sampled_from([0.05, 0.3, 1.0]))
def test_exact_pixel_metrics_are_those_of_sklearn_and_of_the_naive_loops(case, limit):
    maps, masks = case
    found = metrics.pixel_metrics(maps, masks, limit)
    scores, truth = maps.ravel().astype(np.float64), masks.ravel()
    agrees(found.auroc, sk.roc_auc_score(truth, scores))
    agrees(found.auroc, naive.auroc(scores, truth))
    agrees(found.ap, sk.average_precision_score(truth, scores))
    precision, recall, _ = sk.precision_recall_curve(truth, scores)
    total = precision + recall
    f1 = np.divide(2 * precision * recall, total, out=np.zeros_like(total), where=total > 0)
    agrees(found.f1_max, f1.max())
    assert sk.f1_score(truth, scores >= found.f1_threshold) == pytest.approx(f1.max(), abs=ROUNDING)
    agrees(found.aupro, naive.aupro(maps, masks, limit))
    assert found.n_regions == sum(len(naive.components(m)) for m in masks)
    assert found.reasons == {} and found.bounds == {}
    assert found.regions is not None
    agrees(float(found.regions.aupro.mean()), found.aupro)
    assert found.regions.area.sum() == found.n_positive == masks.sum()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.sampled_from([0.0, -0.0, 0.5, 1.0, 7.25]) | st.floats(-9, 9), st.booleans()), min_size=2))
def test_image_metrics_are_those_of_sklearn(rows):
    scores, labels = np.array([s for s, _ in rows]), np.array([y for _, y in rows])
    labels[:2] = [True, False]
    found = metrics.image_metrics(scores, labels)
    agrees(found.auroc, sk.roc_auc_score(labels, scores))
    agrees(found.ap, sk.average_precision_score(labels, scores))
    assert sk.f1_score(labels, scores >= found.f1_threshold) == pytest.approx(found.f1_max, abs=ROUNDING)


def test_positives_beyond_one_block_carry_over(monkeypatch):
    maps, masks = example(levels=12)
    whole = metrics.pixel_metrics(maps, masks, points=30)
    monkeypatch.setattr("adflow.metrics._rank._BLOCK", 7)  # ties now straddle the blocks
    blocks = metrics.pixel_metrics(maps, masks, points=30)
    for name in ("auroc", "ap", "f1_max", "f1_threshold", "aupro"):
        agrees(getattr(blocks, name), getattr(whole, name))
    np.testing.assert_allclose(blocks.pro.y, whole.pro.y, atol=ROUNDING)


def test_only_the_order_of_the_scores_counts_and_negative_zero_ties_with_zero():
    maps, masks = example(levels=12)
    plain = metrics.pixel_metrics(maps, masks)
    for other in (maps.astype(np.float64), maps.astype(np.float16), maps.astype(np.int64), 3 * maps - 50):
        changed = metrics.pixel_metrics(other, masks)
        assert (changed.auroc, changed.ap, changed.aupro) == pytest.approx((plain.auroc, plain.ap, plain.aupro))
    signed = np.where(masks, np.float32(-0.0), np.float32(0.0))
    assert metrics.pixel_metrics(signed, masks).auroc == 0.5
    stream = StreamingPixelMetrics()
    for one, mask in zip(signed, masks, strict=True):
        stream.add(one, mask)
    assert stream.result().auroc == 0.5


def test_maps_of_several_sizes_and_none_for_the_mask_of_a_normal_image():
    maps, masks = example()
    a = metrics.pixel_metrics([maps[0], maps[3], maps[4][:, :13]], [None, masks[3], masks[4][:, :13]])
    pixels = np.concatenate([maps[0].ravel(), maps[3].ravel(), maps[4][:, :13].ravel()])
    truth = np.concatenate([masks[0].ravel() & False, masks[3].ravel(), masks[4][:, :13].ravel()])
    agrees(a.auroc, sk.roc_auc_score(truth, pixels))
    assert a.size is None and a.n_images == 3 and a.n_pixels == pixels.size
    assert metrics.pixel_metrics(maps, masks.astype(np.int64)).size == (24, 20)


def test_undefined_values_are_nan_with_a_reason():
    maps, masks = example()
    none = metrics.pixel_metrics(maps, [None] * len(maps), points=20)
    assert set(none.reasons) == {"auroc", "ap", "f1_max", "aupro"} and none.roc is None
    assert all(np.isnan(getattr(none, name)) for name in none.reasons)
    full = metrics.pixel_metrics(maps, np.ones_like(masks))
    assert set(full.reasons) == {"auroc", "aupro"} and np.isnan(full.auroc) and np.isnan(full.aupro)
    assert full.ap == 1.0 and full.f1_max == 1.0
    assert full.n_regions == len(maps) and np.isnan(full.regions.aupro).all()
    one_kind = metrics.image_metrics([0.1, 0.2], [1, 1])
    assert np.isnan(one_kind.auroc) and one_kind.reasons == {"auroc": "no normal image"}
    assert metrics.image_metrics([0.1, 0.2], [0, 0]).reasons["ap"] == "no anomalous image"
    assert len(metrics.roc_curve([0.1, 0.2], [1, 1]).x) == 0
    assert len(metrics.pro_curve(maps, [None] * len(maps)).x) == 0
    stream = StreamingPixelMetrics()
    stream.add(maps[0], None)
    empty = stream.result()
    assert empty.reasons == none.reasons and empty.bounds == {} and np.isnan(empty.f1_threshold)
    assert StreamingPixelMetrics().result().n_images == 0
    for method in ("cflow", "uflow"):
        assert np.isnan(metrics.aupro(maps, [None] * len(maps), method=method))


def bad_inputs():
    maps, masks = example()
    nan, inf = maps.copy(), maps.copy()
    nan[0, 3, 3], inf[1, 0, 0] = np.nan, -np.inf
    yield "lengths", maps, masks[:2], "6 maps but 2 masks"
    yield "none", maps[:0], masks[:0], "no maps at all"
    yield "shape", maps, masks[:, :5], "mask 0 has shape"
    yield "values", maps, masks.astype(np.uint8) * 255, "other than 0 and 1"
    yield "dimensions", maps[:, 0], masks[:, 0], "expected [height, width]"
    yield "type", maps.astype(complex), masks, "complex"
    yield "nan", nan, masks, "NaN or infinite"
    yield "inf", inf, masks, "NaN or infinite"


@pytest.mark.parametrize(("maps", "masks", "text"), [pytest.param(*b[1:], id=b[0]) for b in bad_inputs()])
def test_bad_input_is_one_clear_error(maps, masks, text):
    def stream():
        if len(maps) == 0 or len(maps) != len(masks):
            metrics.pixel_metrics(maps, masks)
        counter = StreamingPixelMetrics()
        for one, mask in zip(maps, masks, strict=True):
            counter.add(one, mask)

    with pytest.raises(InputError) as caught:
        metrics.pixel_metrics(maps, masks)
    assert text in str(caught.value) and "\n" not in str(caught.value)
    for call in (
        stream,
        lambda: metrics.oracle_threshold(maps, masks),
        lambda: metrics.mean_iou(maps, masks, 0.0),
    ):
        if text == "NaN or infinite" and maps.min() == -np.inf and call is not stream:
            continue  # minus infinity is a lawful prediction: simply not above the threshold
        with pytest.raises(InputError):
            call()


def test_bad_arguments_are_clear_errors():
    maps, masks = example()
    labels = masks.any(axis=(1, 2))
    for call in (
        lambda: metrics.pixel_metrics(maps, masks, 0.0),
        lambda: metrics.pro_curve(maps, masks, 1.5),
        lambda: metrics.image_metrics([0.1, np.nan], [0, 1]),
        lambda: metrics.image_metrics([0.1, 0.2], [0, 2]),
        lambda: metrics.image_metrics([0.1, 0.2], [0, 1, 1]),
        lambda: metrics.image_metrics([], []),
        lambda: metrics.image_metrics(["a", "b"], [0, 1]),
        lambda: metrics.fair_threshold(maps, -1.0),
        lambda: metrics.fair_threshold([]),
        lambda: metrics.hit_rate(maps, masks, margin=0.5),
        lambda: metrics.false_regions(maps, labels, 0.0, connectivity=6),
        lambda: metrics.mean_iou(maps, masks),
        lambda: metrics.bootstrap_ci(metrics.mean_statistic(labels), labels, level=95),
        lambda: metrics.bootstrap_ci(metrics.mean_statistic(labels), labels, groups=[1, 2]),
        lambda: metrics.delong([0.1, 0.2], [0.3], [0, 1]),
        lambda: StreamingPixelMetrics(0.3).merge(StreamingPixelMetrics(0.2)),
        lambda: StreamingPixelMetrics().add(np.full((2, 2), 1e300), None),
    ):
        with pytest.raises(InputError) as caught:
            call()
        assert (
            "expected" in str(caught.value)
            or "limit" in str(caught.value)
            or "holds" in str(caught.value)
            or ("labels" in str(caught.value))
        )
    with pytest.raises(UsageError, match="did you mean 'cflow'"):
        metrics.aupro(maps, masks, method="cflwo")
    with pytest.raises(UsageError, match="unknown method"):
        metrics.fair_threshold(maps, method="medain")


# ---- curves ----


@pytest.mark.parametrize("levels", [None, 12])
@pytest.mark.parametrize("points", [12, 60, 5000])
def test_thinned_curves_lie_on_the_curve_and_carry_their_thresholds(levels, points):
    maps, masks = example(levels=levels)
    found = metrics.pixel_metrics(maps, masks, 0.25, points=points)
    roc, pro = found.roc, found.pro
    assert roc is not None and pro is not None
    assert 2 <= len(roc.x) <= points and 2 <= len(pro.x) <= points
    for x, y, t in zip(roc.x, roc.y, roc.threshold, strict=True):
        assert x == pytest.approx(np.mean(maps[~masks] >= t)) and y == pytest.approx(np.mean(maps[masks] >= t))
    assert (roc.x[0], roc.y[0]) == (0, 0) and (roc.x[-1], roc.y[-1]) == (1, 1)
    x, y = naive.pro_points(maps, masks)
    assert pro.x[0] == 0 and pro.x[-1] == 0.25
    for px, py in zip(pro.x[1:-1], pro.y[1:-1], strict=True):
        assert np.min(np.hypot(x - px, y - py)) < ROUNDING
    before, after = np.flatnonzero(x <= 0.25)[-1], np.flatnonzero(x > 0.25)[0]
    share = (0.25 - x[before]) / (x[after] - x[before])
    agrees(pro.y[-1], y[before] + share * (y[after] - y[before]))
    assert np.all(np.diff(pro.x) >= 0) and np.all(np.diff(pro.y) >= 0)


def test_image_roc_curve_has_the_area_of_the_auroc_when_nothing_is_left_out():
    rng = np.random.default_rng(3)
    scores, labels = rng.standard_normal(40), np.arange(40) % 3 == 0
    curve = metrics.roc_curve(scores, labels, points=400)
    agrees(float(np.trapezoid(curve.y, curve.x)), metrics.image_metrics(scores, labels).auroc)
    constant = metrics.roc_curve(np.ones(4), [0, 1, 1, 0])
    assert constant.x.tolist() == [0, 1] and constant.y.tolist() == [0, 1]
    flat = metrics.pro_curve(np.ones((2, 4, 4)), corner())
    assert flat.x.tolist() == [0, 0.3] and flat.y[1] == pytest.approx(0.3)


def corner() -> np.ndarray:
    masks = np.zeros((2, 4, 4), dtype=bool)
    masks[1, :2, :2] = True
    return masks


# ---- streaming ----


def streamed(maps, masks, limit=0.3) -> metrics.PixelMetrics:
    stream = StreamingPixelMetrics(limit)
    for one, mask in zip(maps, masks, strict=True):
        stream.add(one, mask)
    return stream.result()


def within_bounds(maps, masks, limit=0.3) -> dict[str, float]:
    found, exact = streamed(maps, masks, limit), metrics.pixel_metrics(maps, masks, limit)
    assert set(found.bounds) == {"auroc", "ap", "f1_max", "aupro"} - set(exact.reasons)
    for name, bound in found.bounds.items():
        assert abs(getattr(found, name) - getattr(exact, name)) <= bound, name
    for name in ("n_images", "n_pixels", "n_positive", "n_regions", "size", "reasons"):
        assert getattr(found, name) == getattr(exact, name)
    return found.bounds


def adversarial():
    maps, masks = example(n=9)
    yield "normal", maps, masks
    yield "exponential", np.exp(3 * maps), masks
    yield "narrow", 0.999 + 1e-5 * maps, masks  # a handful of bins
    yield "one bin, right order", 1 + 1e-6 * masks.astype(np.float32), masks
    yield "one bin, wrong order", 1 - 1e-6 * masks.astype(np.float64), masks
    yield "one bin, any order", 1 + 1e-9 * maps.astype(np.float64), masks
    yield (
        "positives in one bin below the others",
        np.where(masks, 1 + 1e-9 * maps.astype(np.float64), 2.0),
        masks,
    )
    outlier = maps.copy()
    outlier[0, 0, 0] = 3e38
    yield "outlier", outlier, masks
    yield "negative", -np.exp(maps), masks
    yield "tiny", maps * np.float32(1e-30), masks
    yield "full mask", maps, np.ones_like(masks)


@pytest.mark.parametrize(("maps", "masks"), [pytest.param(*a[1:], id=a[0]) for a in adversarial()])
def test_streaming_error_is_below_its_bound(maps, masks):
    for limit in (0.05, 0.3, 1.0):
        within_bounds(maps, masks, limit)


@settings(deadline=None, max_examples=60)
@given(cases())
def test_streaming_error_is_below_its_bound_on_anything(case):
    within_bounds(*case)


@settings(deadline=None, max_examples=60)
@given(cases(), st.integers(2, 30))
def test_streaming_error_is_below_its_bound_in_wide_bins(case, digits):
    # Scores that agree in their leading bits share bins, in every order of positives and negatives.
    maps, masks = case
    within_bounds(np.float64(1.5) + maps.astype(np.float64) / 1e6 * 2.0**-digits, masks)


def test_streaming_is_close_on_ordinary_maps_and_exact_where_no_bin_is_shared():
    maps, masks = example(n=30, size=(64, 64))
    # Scores spread over a few octaves of 8,192 bins: shared pairs are a ten-thousandth of all.
    assert max(within_bounds(maps, masks).values()) < 5e-4
    levels, masks = example(levels=12)
    found, exact = streamed(levels, masks), metrics.pixel_metrics(levels, masks)
    for name in ("auroc", "ap", "f1_max", "f1_threshold", "aupro"):
        agrees(getattr(found, name), getattr(exact, name))


def test_streaming_survives_more_octaves_than_it_has_pages(monkeypatch):
    monkeypatch.setattr("adflow.metrics._streaming._PAGES", 20)
    monkeypatch.setattr("adflow.metrics._streaming._SLOTS", (1 << 16) + 20 * 64)
    maps, masks = example(n=9)
    within_bounds(np.exp(8 * maps), masks)
    # Merging a stream whose pages ran out into one whose pages did not, and the reverse.
    narrow, wide = StreamingPixelMetrics(), StreamingPixelMetrics()
    close = np.exp(8 * maps[5]) * 0 + 1 + np.abs(maps[5]) / 100
    narrow.add(close, masks[5])
    for one, mask in zip(np.exp(8 * maps), masks, strict=True):
        wide.add(one, mask)
    exact = metrics.pixel_metrics([*np.exp(8 * maps), close], [*masks, masks[5]])
    for a, b in ((narrow, wide), (wide, narrow)):
        both = StreamingPixelMetrics().merge(a).merge(b).result()
        assert both.n_pixels == exact.n_pixels and both.n_positive == exact.n_positive
        for name, bound in both.bounds.items():
            assert abs(getattr(both, name) - getattr(exact, name)) <= bound


def test_coarse_bins_stay_coarse_in_a_merged_stream_that_has_pages_left(monkeypatch):
    monkeypatch.setattr("adflow.metrics._streaming._PAGES", 3)
    monkeypatch.setattr("adflow.metrics._streaming._SLOTS", (1 << 16) + 3 * 64)

    def score(coarse: int, fine: int = 0) -> np.float32:
        return np.array([(0x3F80 + coarse) << 16 | fine << 10], np.uint32).view(np.float32)[0]

    maps = [[score(5), score(7)], [score(i) for i in (1, 2, 3, 5, 7)], [score(5, 30), score(6)]]
    maps = [np.array([one], np.float32) for one in maps]
    masks = [None, None, np.array([[True, False]])]
    first, second = StreamingPixelMetrics(), StreamingPixelMetrics()
    first.add(maps[0], masks[0])
    second.add(maps[1], masks[1])  # no page is left for 5 and 7, whose pages in the first are given up
    stream = StreamingPixelMetrics().merge(first.merge(second))
    stream.add(maps[2], masks[2])
    found, exact = stream.result(), metrics.pixel_metrics(maps, masks)
    for name, bound in found.bounds.items():
        assert abs(getattr(found, name) - getattr(exact, name)) <= bound, name


def test_merged_streams_equal_the_whole():
    maps, masks = example(n=9)
    parts = [StreamingPixelMetrics() for _ in range(3)]
    for i, (one, mask) in enumerate(zip(maps, masks, strict=True)):
        parts[i % 3].add(one, mask)
    merged = StreamingPixelMetrics()
    for part in parts:
        assert merged.merge(part) is merged
    found, whole = merged.result(), streamed(maps, masks)
    assert (found.n_images, found.n_regions, found.size) == (whole.n_images, whole.n_regions, whole.size)
    assert (found.auroc, found.ap, found.f1_max) == (whole.auroc, whole.ap, whole.f1_max)
    agrees(found.aupro, whole.aupro)  # sums of weights in another order


def test_a_refused_map_leaves_the_stream_as_it_was():
    maps, masks = example()
    stream = StreamingPixelMetrics()
    stream.add(maps[3], masks[3])
    before = stream.result()
    bad = maps[4].copy()
    bad[0, 0] = np.inf
    with pytest.raises(InputError):
        stream.add(bad, masks[4])
    assert stream.result() == before


def test_streaming_memory_does_not_grow_with_the_number_of_maps():
    maps, masks = example(n=10, size=(40, 40))

    def peak(times: int) -> int:
        tracemalloc.start()
        stream = StreamingPixelMetrics()
        for _ in range(times):
            for one, mask in zip(maps, masks, strict=True):
                stream.add(one, mask)
        stream.result()
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    peak(1)
    few, many = peak(1), peak(100)
    assert many <= few + 64_000  # 64 kB: the interpreter's own noise; 990 maps would be 6 MB
    assert many < 256 * 2**20


# ---- operating points ----


@settings(deadline=None, max_examples=60)
@given(cases())
def test_iou_and_the_exact_oracle_threshold_are_those_of_the_naive_loops(case):
    maps, masks = case
    grid = np.unique(maps)[:: max(1, maps.size // 9)]
    expected = [np.mean(list(naive.ious(maps, masks, t))) for t in grid]
    np.testing.assert_allclose(metrics.iou_curve(maps, masks, grid), expected, atol=ROUNDING)
    np.testing.assert_allclose([metrics.mean_iou(maps, masks, t) for t in grid], expected, atol=ROUNDING)
    best = metrics.oracle_threshold(maps, masks)
    agrees(best.value, naive.best_mean_iou(maps, masks))
    agrees(metrics.mean_iou(maps, masks, best.threshold), best.value)
    assert metrics.oracle_threshold(maps, masks, grid).value <= best.value + ROUNDING
    defective = masks.any(axis=(1, 2))
    only = metrics.oracle_threshold(maps, masks, anomalous_only=True)
    agrees(only.value, naive.best_mean_iou(maps[defective], masks[defective]))
    agrees(metrics.iou_anomalous_only(maps, masks, only.threshold), only.value)


def test_iou_of_predictions_and_its_floor():
    _, masks = example()
    nothing = np.zeros_like(masks)
    normal = np.mean(~masks.any(axis=(1, 2)))
    assert metrics.mean_iou(nothing, masks) == pytest.approx(normal)
    assert metrics.mean_iou(masks, masks) == 1.0 and metrics.iou_micro(masks, masks) == 1.0
    assert metrics.iou_anomalous_only(nothing, masks) == pytest.approx(0)
    assert np.isnan(metrics.iou_anomalous_only(nothing, nothing)) and np.isnan(metrics.iou_micro(nothing, nothing))
    assert np.isnan(metrics.oracle_threshold(nothing * 1.0, nothing, anomalous_only=True).value)
    assert np.isnan(metrics.iou_curve(nothing * 1.0, nothing, [0.5], anomalous_only=True)[0])
    half = masks.copy()
    half[:, :, ::2] = False
    assert metrics.iou_micro(half, masks) == pytest.approx(half.sum() / masks.sum())


def test_fair_threshold_keeps_its_promise():
    rng = np.random.default_rng(5)
    maps = rng.gumbel(size=(20, 64, 64)).astype(np.float32)
    for pixels in (0.5, 1.0, 7.0):
        t = metrics.fair_threshold(maps, pixels)
        assert np.sum(maps > t) == pixels * 20  # without ties the quantile is met exactly
        assert metrics.fair_threshold(maps, pixels, "interpolated") == pytest.approx(t, abs=0.2)
    tied = np.round(maps)
    t = metrics.fair_threshold(tied, 1.0)
    assert np.sum(tied > t) <= 20 < np.sum(tied >= t)
    assert metrics.fair_threshold(np.ones((3, 4, 4)), method="interpolated") == np.inf
    assert metrics.fair_threshold(maps, 0.0) == maps.max()


def test_false_alarms_on_normal_images():
    predicted = np.zeros((4, 5, 5), dtype=bool)
    predicted[0, 1, 1] = predicted[0, 2, 2] = True  # touch at a corner
    predicted[3] = True
    labels = [0, 0, 0, 1]
    assert metrics.fp_images(predicted, labels) == pytest.approx(1 / 3)
    assert metrics.false_regions(predicted, labels) == pytest.approx(2 / 3)
    assert metrics.false_regions(predicted, labels, connectivity=8) == pytest.approx(1 / 3)
    assert metrics.fp_images(predicted * 0.7, labels, 0.7) == 0 < metrics.fp_images(predicted * 0.7, labels, 0.6)
    assert np.isnan(metrics.fp_images(predicted, [1] * 4)) and np.isnan(metrics.false_regions(predicted, [1] * 4))


def test_hit_rate_counts_the_highest_pixel_with_its_tolerance_margin_and_ties():
    masks = np.zeros((4, 10, 10), dtype=bool)
    masks[1:, 4:6, 4:6] = True
    maps = np.zeros((4, 10, 10))
    maps[0, 0, 0] = 9  # a normal image: left out
    maps[1, 4, 5] = 9  # on the mask
    maps[2, 4, 8] = 9  # three pixels beside it
    maps[3, 0, 9], maps[3, 5, 5] = 9, 8  # in the corner, the next highest on the mask
    assert metrics.hit_rate(maps, masks) == pytest.approx(1 / 3)
    assert metrics.hit_rate(maps, masks, tolerance=2.9) == pytest.approx(1 / 3)
    assert metrics.hit_rate(maps, masks, tolerance=3) == pytest.approx(2 / 3)
    assert metrics.hit_rate(maps, masks, tolerance=3, margin=0.1) == 1.0
    assert metrics.hit_rate(np.ones((1, 10, 10)), masks[1:2]) == pytest.approx(0.04)
    assert np.isnan(metrics.hit_rate(maps[:1], masks[:1]))


def test_region_overlap_reports_each_region():
    masks = np.zeros((3, 8, 8), dtype=bool)
    masks[1, :2, :2] = masks[2, 4:6, 4:8] = masks[2, 0, 0] = True
    predicted = np.zeros_like(masks)
    predicted[1, 0, :5] = predicted[2, 4:6, 6:] = True
    found = metrics.region_overlap(predicted, masks)
    assert found.image.tolist() == [1, 2, 2] and found.area.tolist() == [4, 1, 8]
    assert found.overlap.tolist() == [0.5, 0.0, 0.5]


# ---- intervals and tests ----


def test_statistics_of_unit_weights_and_of_repeated_images_are_the_metrics():
    maps, masks = example(n=9, size=(40, 40))
    times = np.array([[1] * 9, [2, 0, 1, 3, 1, 0, 1, 1, 2]], dtype=float)
    found = {name: s(times) for name, s in metrics.pixel_statistics(maps, masks).items()}
    for i, weights in enumerate(times.astype(int)):
        exact = metrics.pixel_metrics(np.repeat(maps, weights, axis=0), np.repeat(masks, weights, axis=0))
        for name, values in found.items():  # 2,048 quantile bins on 14,400 pixels
            assert values[i] == pytest.approx(getattr(exact, name), abs=1e-3)
    scores, labels = np.round(maps.max(axis=(1, 2)), 1), masks.any(axis=(1, 2))
    auroc = metrics.auroc_statistic(scores, labels)(times)
    for i, weights in enumerate(times.astype(int)):
        agrees(auroc[i], sk.roc_auc_score(np.repeat(labels, weights), np.repeat(scores, weights)))
    rows = np.arange(9.0)
    rows[4] = np.nan
    assert metrics.mean_statistic(rows)(times)[1] == pytest.approx(np.nanmean(np.repeat(rows, times[1].astype(int))))


def test_bootstrap_is_seeded_stratified_and_about_as_wide_as_theory():
    rng = np.random.default_rng(1)
    labels = np.arange(200) < 100
    scores = rng.standard_normal(200) + labels
    statistic = metrics.auroc_statistic(scores, labels)
    a = metrics.bootstrap_ci(statistic, labels, seed=4)
    assert a == metrics.bootstrap_ci(statistic, labels, seed=4)
    assert a != metrics.bootstrap_ci(statistic, labels, seed=5)
    assert a.low < a.value < a.high and a.reason is None
    agrees(a.value, sk.roc_auc_score(labels, scores))
    flat = metrics.delong(scores, np.zeros(200), labels)  # the other AUROC is 0.5 without variance
    width = flat.difference.high - flat.difference.low
    assert a.high - a.low == pytest.approx(width, rel=0.15)  # bootstrap and asymptotic theory at n = 100 + 100
    groups = np.arange(200) // 10  # ten images at a time that agree: fewer independent ones, a wider interval
    rows = np.repeat(rng.standard_normal(20), 10)
    alone = metrics.bootstrap_ci(metrics.mean_statistic(rows), labels)
    together = metrics.bootstrap_ci(metrics.mean_statistic(rows), labels, groups=groups)
    assert together.high - together.low > 2 * (alone.high - alone.low)
    nothing = metrics.bootstrap_ci(metrics.auroc_statistic(scores, labels * 0), labels * 0)
    assert np.isnan(nothing.low) and nothing.reason
    assert metrics.paired_bootstrap(metrics.auroc_statistic(scores, labels * 0), statistic, labels * 0).reason


def test_paired_bootstrap_finds_a_difference_and_none_where_there_is_none():
    rng = np.random.default_rng(2)
    labels = np.arange(120) < 60
    good = metrics.auroc_statistic(rng.standard_normal(120) + 2 * labels, labels)
    poor = metrics.auroc_statistic(rng.standard_normal(120) + 0.3 * labels, labels)
    found = metrics.paired_bootstrap(good, poor, labels, draws=500)
    assert found.low > 0 and found.p_value <= 0.01 and found.value > 0.1
    same = metrics.paired_bootstrap(good, good, labels, draws=500)
    assert same.value == same.low == same.high == 0 and same.p_value == 1.0
    reverse = metrics.paired_bootstrap(poor, good, labels, draws=500)
    assert reverse.value == -found.value and reverse.high < 0


def test_draws_in_which_a_statistic_is_not_defined_do_not_count():
    rows = np.full((2, 10), np.nan)
    rows[0, 0] = rows[1, 1] = 0.5
    a, b = (metrics.mean_statistic(row) for row in rows)
    # Both images are in 41 % of the draws, and there the two are equal.
    assert metrics.paired_bootstrap(a, b, [1] * 10).p_value == 1.0


def test_delong_is_the_variance_of_the_full_matrix_and_its_level_holds():
    rng = np.random.default_rng(3)
    labels = np.arange(60) < 25
    a, b = np.round(rng.standard_normal(60) + labels, 1), np.round(rng.standard_normal(60) + 0.5 * labels, 1)
    found = metrics.delong(a, b, labels)
    agrees(found.auroc_a, sk.roc_auc_score(labels, a))
    agrees(found.auroc_b, sk.roc_auc_score(labels, b))
    agrees(found.standard_error**2, naive.delong_variance(a, b, labels))
    assert found.difference.low < found.difference.value < found.difference.high
    same = metrics.delong(a, a, labels)
    assert same.difference.p_value == 1.0 and same.standard_error == 0
    assert "at least 2" in (metrics.delong(a, b, np.arange(60) < 1).difference.reason or "")
    rejected = np.mean(
        [
            metrics.delong(rng.standard_normal(60), rng.standard_normal(60), labels).difference.p_value < 0.1
            for _ in range(400)
        ]
    )
    assert 0.055 < rejected < 0.155  # binomial(400, 0.1): standard deviation 0.015, and the test is asymptotic


def test_importing_the_metrics_loads_numpy_only():
    code = "import sys, adflow.metrics; print({'torch', 'scipy', 'pandas', 'skimage'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
