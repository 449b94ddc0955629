"""Figures of one detector on one class, cells that outlive a kill, gates, and tests of a difference."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
from conftest import TinyBackbone, make_tiny_images
from PIL import Image
from torch import Tensor

from adflow import methods, metrics
from adflow.calibration import Calibration
from adflow.data import Dataset, open_data
from adflow.detector import Detector, Progress, Resources, Scores
from adflow.errors import AdflowError, GateError, InputError, ResourceError, UsageError
from adflow.features import FeatureBank
from adflow.methods import _train
from adflow.tasks import _cells, _difference, _jobs, _publish
from adflow.tasks import evaluate as task
from adflow.tasks._bank import TrainFeatures
from adflow.tasks._cells import Job, Measuring
from adflow.tasks._measure import evaluate_detector, image_threshold, streams
from adflow.tasks._point import OperatingPoint
from adflow.tasks.fit import FitOptions, fit_detector, prepare, split

SIZE = (32, 48)


class Bright(Detector):
    """Scores brightness: no learning, so that what is tested is the measuring."""

    def __init__(self, backbone: Any, gain: float = 1.0) -> None:
        super().__init__(backbone)
        self.gain = gain
        self.size = SIZE

    def fit(self, images: Any, **rest: Any) -> Self:
        return self

    def _score(self, images: Tensor, boxes: Sequence[Any] | None) -> Scores:
        maps = images.mean(dim=1) * self.gain
        return Scores(maps, maps.flatten(1).amax(dim=1))


def picture(path: Path, level: float, rng: np.random.Generator, spot: bool = False, mask: Path | None = None) -> None:
    """Write noise around ``level``; with ``spot`` a brighter square, half of it hardly so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grey = rng.normal(level, 12, SIZE)
    if spot:
        grey[8:16, 10:15] += 60
        grey[8:16, 15:20] += 15
    Image.fromarray(grey.clip(0, 255).astype(np.uint8)).save(path)
    if mask is not None:
        mask.parent.mkdir(parents=True, exist_ok=True)
        truth = np.zeros(SIZE, np.uint8)
        truth[8:16, 10:20] = 255
        Image.fromarray(truth).save(mask)


@pytest.fixture(scope="session")
def spots(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """12 good training images; 10 good, 6 "chip" and 5 "dent" test images with masks."""
    root = tmp_path_factory.mktemp("spots") / "plate"
    rng = np.random.default_rng(1)
    for i in range(12):
        picture(root / "train" / "good" / f"{i:02}.png", 100, rng)
    for i in range(10):
        picture(root / "test" / "good" / f"{i:02}.png", 100, rng)
    for kind, count, level in (("chip", 6, 100), ("dent", 5, 85)):
        for i in range(count):
            mask = root / "ground_truth" / kind / f"{i:02}_mask.png"
            picture(root / "test" / kind / f"{i:02}.png", level, rng, True, mask)
    (data,) = open_data(root)
    return data


def detector(gain: float = 1.0, calibrated: bool = True) -> Bright:
    found = Bright(TinyBackbone(), gain)
    if calibrated:
        rng = np.random.default_rng(2)
        maps = [rng.normal(100, 12, SIZE).astype(np.float32) / 255 * gain for _ in range(20)]
        found.calibration = Calibration.from_maps(maps, np.array([m.max() for m in maps]))
    return found


def point(found: Bright, threshold: float = 0.6) -> OperatingPoint:
    return OperatingPoint("threshold", threshold, threshold * found.gain, "nothing")


def maps_of(found: Bright, data: Dataset) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Return maps, masks and labels, computed apart from the code under test."""
    maps, masks = [], []
    for sample in data.test:
        grey = np.asarray(Image.open(sample.image)).astype(np.float32) / np.float32(255)
        maps.append(np.mean([grey] * 3, axis=0, dtype=np.float32) * np.float32(found.gain))
        masks.append(np.asarray(Image.open(sample.mask)) > 0 if sample.mask else np.zeros(SIZE, bool))
    return maps, masks, np.array([sample.label for sample in data.test])


def test_the_row_is_what_the_metrics_say(spots: Dataset) -> None:
    found = detector()
    maps, masks, labels = maps_of(found, spots)
    row = evaluate_detector(found, spots, point=point(found)).row
    pixel = metrics.pixel_metrics(maps, masks)
    image = metrics.image_metrics([m.max() for m in maps], labels)
    # 1e-6: brightness is a mean of three equal float32, rounded in another order here.
    for name, value in (
        ("image_auroc", image.auroc), ("image_f1", image.f1_max), ("pixel_auroc", pixel.auroc),
        ("pixel_ap", pixel.ap), ("aupro", pixel.aupro), ("pixel_f1", pixel.f1_max),
    ):  # fmt: skip
        assert row[name] == pytest.approx(value, abs=1e-6), name
    assert row["n_test"] == 21 and row["n_defects"] == 11 and row["n_regions"] == 11
    assert row["size"] == "32x48" and row["streaming"] is False and row["undefined"] == {}
    marked = [found.calibration.segment(m, 0.6)[0] for m in maps if found.calibration]
    iou = metrics.iou_per_image(marked, masks)
    assert row["mean_iou"] == pytest.approx(iou.mean())
    assert row["iou_defective"] == pytest.approx(iou[labels == 1].mean())
    assert row["iou_defective_oracle"] >= metrics.iou_anomalous_only(maps, masks, 0.6) - 1e-9
    assert row["mean_iou_oracle"] == pytest.approx(metrics.mean_iou(maps, masks, row["oracle_threshold"]))
    assert row["hit"] == metrics.hit_rate(maps, masks, round(6 * 32 / 256), 0.0)
    assert row["flagged_share"] == pytest.approx(np.mean([bool(m.any()) for m in np.array(marked)[labels == 0]]))


def test_kinds_of_defects_are_measured_against_good_images_and_without_each_other(spots: Dataset) -> None:
    found = detector()
    maps, masks, labels = maps_of(found, spots)
    kinds = np.array([sample.defect or "" for sample in spots.test])
    row = evaluate_detector(found, spots, point=point(found)).row
    for kind in ("chip", "dent"):
        for prefix, keep in (("", (labels == 0) | (kinds == kind)), ("without_", kinds != kind)):
            chosen = np.flatnonzero(keep)
            exact = metrics.pixel_metrics([maps[i] for i in chosen], [masks[i] for i in chosen])
            image = metrics.image_metrics([maps[i].max() for i in chosen], labels[chosen])
            line = row["defects"][kind]
            assert line[f"{prefix}image_auroc"] == pytest.approx(image.auroc)
            # What the histograms promise.
            assert line[f"{prefix}pixel_auroc"] == pytest.approx(exact.auroc, abs=1e-3)
            assert line[f"{prefix}aupro"] == pytest.approx(exact.aupro, abs=1e-3)
    assert row["defects"]["chip"]["n"] == 6
    # Two kinds: one without the other is the other.
    assert row["defects"]["chip"]["without_pixel_auroc"] == row["defects"]["dent"]["pixel_auroc"]


def test_streaming_starts_by_itself_and_stays_within_its_bounds(spots: Dataset) -> None:
    found = detector()
    exact = evaluate_detector(found, spots, point=point(found)).row
    assert not streams(21, SIZE, 2 << 30) and streams(21, SIZE, 100_000)
    streamed = evaluate_detector(found, spots, point=point(found), memory=100_000)
    row = streamed.row
    assert row["streaming"] is True and streamed.histograms is None
    for name in ("pixel_auroc", "pixel_ap", "pixel_f1", "aupro"):
        # 2e-2: a bound that says something, even on as few as 32,256 pixels of 256 grey levels.
        assert abs(row[name] - exact[name]) <= row["bounds"][name] < 2e-2, name
    for name in ("image_auroc", "mean_iou", "hit", "flagged_share"):
        assert row[name] == exact[name]
    assert math.isnan(row["mean_iou_oracle"]) and "streamed" in row["undefined"]["mean_iou_oracle"]
    for kind in ("chip", "dent"):
        for name in ("pixel_auroc", "without_pixel_auroc", "aupro"):
            # 1e-3 of the histograms and the streamed bins' own width.
            assert row["defects"][kind][name] == pytest.approx(exact["defects"][kind][name], abs=2e-3)


def test_what_is_undefined_is_nan_with_a_reason(spots: Dataset, tmp_path: Path) -> None:
    found = detector()
    good = Dataset("a", "folder", "a", spots.root, spots.train, [s for s in spots.test if s.label == 0])
    row = evaluate_detector(found, good, point=point(found)).row
    for name in ("image_auroc", "pixel_auroc", "aupro", "hit", "iou_defective"):
        assert math.isnan(row[name]) and row["undefined"][name], name
    assert 0 <= row["flagged_share"] <= 1
    bad = Dataset("b", "folder", "b", spots.root, spots.train, [s for s in spots.test if s.label == 1])
    row = evaluate_detector(found, bad, point=point(found)).row
    assert math.isnan(row["image_auroc"]) and "normal" in row["undefined"]["image_auroc"]
    assert math.isnan(row["flagged_share"]) and 0 < row["pixel_auroc"] <= 1
    blind = Dataset("c", "folder", "c", spots.root, spots.train, [replace(s, mask=None) for s in spots.test])
    row = evaluate_detector(found, blind, point=point(found)).row
    assert math.isnan(row["pixel_auroc"]) and "mask" in row["undefined"]["pixel_auroc"]
    assert 0 < row["image_auroc"] <= 1 and row["n_without_mask"] == 11
    nothing = Dataset("d", "folder", "d", spots.root, spots.train, [replace(s, label=None) for s in spots.test])
    with pytest.raises(InputError, match="known label"):
        evaluate_detector(found, nothing)


def test_defects_without_a_mask_do_not_count_as_normal_pixels(spots: Dataset) -> None:
    found = detector()
    some = [replace(s, mask=None) if s.defect == "dent" else s for s in spots.test]
    row = evaluate_detector(found, Dataset("a", "folder", "a", spots.root, [], some), point=point(found)).row
    kept = [s for s in spots.test if s.defect != "dent"]
    other = evaluate_detector(found, Dataset("a", "folder", "a", spots.root, [], kept), point=point(found)).row
    assert row["pixel_auroc"] == other["pixel_auroc"] and row["n_without_mask"] == 5
    assert (row["n_defects"], other["n_defects"]) == (11, 6)


def test_the_image_threshold_stops_no_more_good_images_than_promised() -> None:
    found = detector()
    assert found.calibration is not None
    level, promise = image_threshold(found, OperatingPoint("flag-rate", 0.2, 0.5, ""))
    # p = (1 + as high) / 21 <= 0.2 where at most 3 of the 20 held-out ones are as high.
    assert level is not None and int((found.calibration.scores >= level).sum()) == 3
    assert promise is not None and "20 %" in promise
    assert image_threshold(detector(calibrated=False), None) == (None, None)


# --- cells ---------------------------------------------------------------------------


def plan(data: Dataset, names: str = "ab", seeds: Sequence[int] = (0,)) -> list[Job]:
    """Return cells whose detectors come from ``patched``."""
    return [
        Job(
            data,
            f"{data.class_}-{name}-s{seed}",
            f"{name}{seed}",
            {"dataset": data.family, "class": data.class_, "method": name, "backbone": "tiny", "recipe": "fast",
             "seed": seed},
            FitOptions(method=name, seed=seed),
        )
        for name in names
        for seed in seeds
    ]  # fmt: skip


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make every fit give the brightness detector; method "x" fails. Returns the log of fits."""
    log: list[str] = []

    def make(data: Dataset, options: FitOptions) -> tuple[Bright, Any, bool]:
        return detector(gain=1 + options.seed), SIZE, False

    def learn(found: Bright, train: Any, options: FitOptions, *rest: Any) -> dict[str, Any]:
        log.append(f"{options.method}{options.seed}")
        if options.method == "x":
            raise AdflowError("this method always fails")
        if options.method == "y":
            raise ValueError("a bug")
        found.provenance = {"seed": options.seed, "recipe": "fast", "images": 12}
        return {"seconds": {"fit": 1.0}, "skipped": [], "digest": "d" * 64}

    monkeypatch.setattr(task, "prepare", make)
    monkeypatch.setattr(task, "fit_detector", learn)
    return log


def test_a_rerun_goes_on_where_it_stopped_and_changes_nothing(
    spots: Dataset, tmp_path: Path, fitted: list[str]
) -> None:
    first = task.evaluate(plan(spots, "a", (0, 1)), Measuring(), tmp_path)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    again = task.evaluate(plan(spots, "ab", (0, 1)), Measuring(), tmp_path)
    assert fitted == ["a0", "a1", "b0", "b1"] and again.reused == 2
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert again.rows[:2] == first.rows
    one = tmp_path / "cells" / "plate-a-s0.json"
    one.write_text(one.read_text()[:500])  # damaged: computed again
    task.evaluate(plan(spots, "a", (0, 1)), Measuring(), tmp_path)
    assert fitted[4:] == ["a0"]
    task.evaluate(plan(spots, "a", (0,)), Measuring(), tmp_path, fresh=True)
    assert fitted[5:] == ["a0"]


def test_a_cell_that_is_made_anew_stays_until_then(
    spots: Dataset, tmp_path: Path, fitted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    task.evaluate(plan(spots, "a", (0,)), Measuring(), tmp_path)
    cell = tmp_path / "cells" / "plate-a-s0.json"
    before = cell.read_bytes()

    def full(*_: object) -> None:
        raise ResourceError("the disk is full")

    with monkeypatch.context() as patch, pytest.raises(ResourceError):
        patch.setattr(task, "write_cell", full)
        task.evaluate(plan(spots, "a", (0,)), Measuring(), tmp_path, fresh=True)
    assert cell.read_bytes() == before
    task.evaluate(plan(spots, "a", (0,)), Measuring(), tmp_path, fresh=True)
    assert fitted == ["a0"] * 3 and cell.read_bytes() != before  # what it cost is in it


def test_a_cell_of_other_settings_or_data_or_code_is_stale(spots: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    options = FitOptions(size=(64, 64))
    monkeypatch.setattr(_cells, "code_digest", lambda method: "this code")

    def keys(measuring: Measuring = Measuring(), **changes: Any) -> str:  # noqa: B008
        return _cells.plan_fits([spots], ["padim"], [0], replace(options, **changes), measuring)[0].key

    usual = keys()
    assert keys() == usual
    others = {
        keys(settings={"rank": 8}), keys(size=(96, 64)), keys(holdout=0.2), keys(folds=3), keys(keep_aspect=True),
        keys(Measuring(nfa=1.0)), keys(Measuring(map_memory=1000)), keys(taps=("b2", "b3")),
    }  # fmt: skip
    assert len(others | {usual}) == 9
    assert keys(Measuring(workers=1)) == usual  # does not change results
    monkeypatch.setattr(_cells, "code_digest", lambda method: "other code")
    assert keys() != usual
    monkeypatch.setattr(_cells, "code_digest", lambda method: "this code")
    sample = spots.test[0]
    stat = sample.image.stat()
    os.utime(sample.image, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    try:
        assert keys() != usual
    finally:
        os.utime(sample.image, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_code_is_what_a_method_imports_and_no_other_method(monkeypatch: pytest.MonkeyPatch) -> None:
    read: set[str] = set()
    source = _cells._source

    def reading(name: str) -> bytes | None:
        found = source(name)
        read.update([name] if found is not None else [])
        return found

    monkeypatch.setattr(_cells, "_source", reading)
    before = _cells.code_digest("padim")
    assert {"adflow.methods.padim", "adflow.methods._gaussian", "adflow.metrics", "adflow.features"} <= read
    assert "adflow.methods.uflow" not in read and not any(name.startswith("adflow.cli") for name in read)
    assert _cells.code_digest("padim") == before != _cells.code_digest("spade")
    monkeypatch.setattr(_cells, "_source", lambda name: b"#" if name == "adflow.metrics" else source(name))
    assert _cells.code_digest("padim") != before


def test_a_failing_cell_is_a_row_and_the_rest_goes_on(spots: Dataset, tmp_path: Path, fitted: list[str]) -> None:
    seen: list[task.Done] = []
    found = task.evaluate(plan(spots, "axyb"), Measuring(), tmp_path, each=seen.append)
    assert [row.get("error") for row in found.rows] == [None, "this method always fails", "ValueError: a bug", None]
    assert found.rows[1]["class"] == "plate" and found.rows[1]["method"] == "x"
    assert len(found.cells) == 2 and len(found.failed) == 2
    assert [(d.done, d.total, d.reused) for d in seen] == [(i, 4, False) for i in range(1, 5)]
    assert seen[0].left is not None and seen[-1].left == 0
    assert "ValueError: a bug" in (tmp_path / "cells" / "plate-y-s0.failed.txt").read_text()
    again = task.evaluate(plan(spots, "axyb"), Measuring(), tmp_path)
    assert again.reused == 2 and fitted[4:] == ["x0", "y0"]  # only these are tried again
    with pytest.raises(AdflowError, match="always fails"):
        task.evaluate(plan(spots, "x"), Measuring(), tmp_path)


def test_histograms_survive_the_file(spots: Dataset, tmp_path: Path, fitted: list[str]) -> None:
    (cell,) = task.evaluate(plan(spots, "a"), Measuring(pictures=0), tmp_path).cells
    direct = evaluate_detector(detector(), spots).histograms
    stored = _cells.unpack(cell["histograms"])
    assert direct is not None and stored is not None
    for name in ("negative", "positive", "weighted", "regions"):
        assert np.array_equal(getattr(direct, name), getattr(stored, name)), name
    assert _cells.unpack(_cells.pack(None)) is None


def test_pictures_show_the_worst_or_all(spots: Dataset, tmp_path: Path, fitted: list[str]) -> None:
    (cell,) = task.evaluate(plan(spots, "a"), Measuring(pictures=2, overlay_size=192), tmp_path).cells
    scores = {r["image"]: r["score"] for r in cell["records"]}
    drawn = sorted(p.relative_to(tmp_path / "overlays").as_posix() for p in (tmp_path / "overlays").rglob("*.jpg"))
    assert drawn == sorted(cell["pictures"].values()) and len(drawn) == 4
    good = sorted((n for n in scores if "good" in n), key=lambda n: scores[n])[-2:]
    bad = sorted((n for n in scores if "good" not in n), key=lambda n: scores[n])[:2]
    assert set(cell["pictures"]) == {*good, *bad}
    (cell,) = task.evaluate(plan(spots, "b"), Measuring(overlays=True, overlay_size=192), tmp_path / "all").cells
    assert len(list((tmp_path / "all" / "overlays").rglob("*.jpg"))) == 21
    shown = _publish.to_show(cell, tmp_path / "all")
    assert sum(image.picture is not None for image in shown.images) == 12


def _halves(items: Sequence[Any]) -> Iterator[Any]:
    for item in items:
        if item == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        yield item * 2


def test_a_process_that_dies_costs_one_item_only() -> None:
    found = {(u, i): r for u, i, r in _jobs.run_units(_halves, [[1, "die", 3], [4]], 1)}
    error = found.pop((0, 1))
    assert found == {(0, 0): 2, (0, 2): 6, (1, 0): 8}
    assert isinstance(error, RuntimeError) and "SIGKILL" in str(error)


def test_units_share_features_and_fill_the_processes(spots: Dataset) -> None:
    jobs = [replace(job, group=("set", "/", "taps")) for job in plan(spots, "ab", (0, 1))]
    assert task._groups(jobs, [0, 1, 2, 3]) == [[0, 1, 2, 3]]
    assert task._groups([*jobs[:2], *plan(spots, "ab", (0, 1))[2:]], [0, 1, 2, 3]) == [[0, 1], [2], [3]]
    assert task._divided([[0, 1, 2, 3]], 1) == [[0, 1, 2, 3]]
    assert task._divided([[0, 1, 2, 3]], 2) == [[0, 1], [2, 3]]
    assert task._divided([[0, 2, 3]], 3) == [[0], [2], [3]]
    assert _cells.unique([*jobs, *jobs]) == jobs
    renamed = _cells.unique([jobs[0], replace(jobs[0], key="other")])
    assert renamed[1].name != renamed[0].name


# --- features shared -----------------------------------------------------------------


def test_a_subset_of_a_bank_is_a_bank_of_those_images(tmp_path: Path) -> None:
    backbone, images = TinyBackbone(), make_tiny_images(8)
    for memory in (1 << 30, 1):
        with FeatureBank.build(backbone, images, memory=memory, folder=tmp_path) as bank:
            part = bank.subset([6, 1, 3])
            assert len(part) == 3 and part.grids == bank.grids and part.on_disk == bank.on_disk
            for level in range(3):
                whole = bank.level(level)
                assert torch.equal(part.level(level), whole[[6, 1, 3]])
                assert torch.equal(part.pyramid([2, 0])[level], whole[[3, 6]])
            assert sum(len(batch[0]) for batch in part.batches(2)) == 3
            with pytest.raises(InputError, match="image 8"):
                bank.subset([8])
            part.close()
            assert len(bank.pyramid([0])) == 3  # the bank stays open


@pytest.mark.parametrize("folds", [0, 3])
def test_shared_features_give_the_same_bits_as_a_plain_fit(spots: Dataset, folds: int) -> None:
    options = FitOptions(method="padim", size=(64, 64), device="cpu", seed=3, folds=folds)
    found = []
    for shared in (False, True):
        made, size, keep = prepare(spots, options)
        if shared:
            with TrainFeatures(made, spots.train, size, keep, False, options.resources) as features:
                assert features.calibration(made.fit(features_images(spots, size)), [0]) is not None
                summary = fit_detector(made, spots.train, options, size, keep, features=features)
        else:
            summary = fit_detector(made, spots.train, options, size, keep)
        assert made.calibration is not None
        found.append((summary["digest"], made.calibration.tensors()))
    assert found[0][0] == found[1][0]
    for name, value in found[0][1].items():
        assert np.array_equal(value, found[1][1][name]), name


def features_images(data: Dataset, size: tuple[int, int]) -> Any:
    from adflow.data import Images

    return Images(data.train, size)


def test_folds_do_not_go_on_with_the_training_of_another(
    spots: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    monkeypatch.setattr(_train, "CHECKPOINT_SECONDS", -1.0)  # after every step
    uflow = methods.get("uflow")
    found = []
    for checkpoint in (None, tmp_path / "fit.checkpoint"):
        made = uflow(TinyBackbone(), **uflow.recipes["tiny"])
        options = FitOptions(device="cpu", folds=2, resources=Resources(checkpoint=checkpoint))
        summary = fit_detector(made, spots.train, options, (64, 64), False)
        assert made.calibration is not None
        found.append((summary["digest"], made.calibration.scores.tolist()))
    assert found[0] == found[1] and checkpoint is not None and checkpoint.exists()


def test_a_held_out_image_that_cannot_be_read_is_named(spots: Dataset, tmp_path: Path) -> None:
    options = FitOptions(device="cpu", holdout=0.5)
    train = list(spots.train)
    _, held = split(len(train), options)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    train[held[0]] = replace(train[held[0]], image=tmp_path / "broken.png")
    summary = fit_detector(detector(calibrated=False), train, options, SIZE, False)
    assert summary["calibration"]["images"] == len(held) - 1
    (line,) = summary["skipped"]
    assert "broken.png" in line


# --- gates, intervals, differences ---------------------------------------------------


def test_gates_name_the_cell_and_the_figure() -> None:
    rows = [
        {"dataset": "mvtec", "class": "screw", "method": "padim", "seed": 0, "pixel_auroc": 0.95, "flagged_share": 0.2},
        {"dataset": "mvtec", "class": "nut", "method": "padim", "seed": 0, "pixel_auroc": None,
         "undefined": {"pixel_auroc": "no masks"}, "flagged_share": 0.0},
    ]  # fmt: skip
    mean = {"pixel_auroc": 0.95, "classes": 2, "seeds": 1, "undefined": {"pixel_auroc": 1}}
    assert _publish.broken(rows, mean, _publish.gates(["pixel_auroc=0.97"], ["flagged_share=0.1"])) == [
        "pixel_auroc of mvtec/screw/padim, seed 0 is 0.9500, below 0.97",
        "pixel_auroc of mvtec/nut/padim, seed 0 is undefined (no masks)",
        "flagged_share of mvtec/screw/padim, seed 0 is 0.2000, above 0.1",
    ]
    assert _publish.broken(rows[:1], mean, _publish.gates(["pixel_auroc=0.95", "mean:pixel_auroc=0.9"])) == []
    assert _publish.broken(rows, mean, _publish.gates(["mean:pixel_auroc=0.96"])) != []
    several = {"padim": {"pixel_auroc": 0.9, "classes": 1}, "local": {"pixel_auroc": 0.99, "classes": 1}}
    (missed,) = _publish.broken(rows, several, _publish.gates(["mean:pixel_auroc=0.95"]))
    assert "the mean of padim" in missed
    for text in ("pixel_auroc", "pixel_auroc=high", "pixel_auroc=97", "hits=0.9", "flagged_share=0.1", "x:hit=1"):
        with pytest.raises(UsageError):
            _publish.gates([text])
    with pytest.raises(UsageError, match="did you mean 'pixel_auroc'"):
        _publish.gates(["pixel_aurok=0.9"])
    assert GateError.exit_code == 6


def cells_of(data: Dataset, folder: Path, gains: Sequence[float], noise: float = 0.0) -> list[dict[str, Any]]:
    """Return cells of detectors that see the images through noise."""

    class Noisy(Bright):
        def _score(self, images: Tensor, boxes: Sequence[Any] | None) -> Scores:
            seed = int(images.sum().item() * 1000) % 2**31
            rough = torch.randn(images.shape[2:], generator=torch.Generator().manual_seed(seed)) * noise
            maps = images.mean(dim=1) * self.gain + rough
            return Scores(maps, maps.flatten(1).amax(dim=1))

    found = []
    for seed, gain in enumerate(gains):
        made = Noisy(TinyBackbone(), gain)
        made.calibration = detector(gain).calibration
        measured = evaluate_detector(made, data, point=point(made))
        measured.row |= {"method": "bright", "seed": seed}
        job = Job(data, f"c{seed}", "k", {})
        extra = {"point": {"kind": "threshold"}, "pictures": {}, "detector": "", "provenance": {}}
        found.append(_cells.write_cell(folder, job, measured, extra))
    return found


def test_a_real_difference_is_shown_and_chance_is_not(spots: Dataset, tmp_path: Path) -> None:
    clean = cells_of(spots, tmp_path / "a", [1.0])
    same = _difference.difference(clean, cells_of(spots, tmp_path / "b", [2.0]), "b")
    # Twice the brightness ranks the same: no difference at all.
    assert {line.metric for line in same.lines} == set(_difference.TESTED)
    assert all(line.value == 0 and line.p_value == 1 for line in same.lines if line.metric != "mean_iou")
    assert same.regressions() == []
    noisy = cells_of(spots, tmp_path / "c", [1.0], noise=0.3)
    worse = _difference.difference(noisy, clean, "clean")
    fallen = {line.metric for line in worse.regressions()}
    assert {"pixel_auroc", "aupro"} <= fallen
    by_name = {line.metric: line for line in worse.lines}
    exact = metrics.delong(
        [r["score"] for r in noisy[0]["records"]], [r["score"] for r in clean[0]["records"]],
        [r["label"] for r in clean[0]["records"]],
    )  # fmt: skip
    assert by_name["image_auroc"].value == exact.difference.value
    assert by_name["image_auroc"].p_value >= exact.difference.p_value  # corrected for the other tests
    fall = noisy[0]["row"]["pixel_auroc"] - clean[0]["row"]["pixel_auroc"]
    assert by_name["pixel_auroc"].value == pytest.approx(fall, abs=1e-3)
    assert by_name["pixel_auroc"].low <= by_name["pixel_auroc"].value <= by_name["pixel_auroc"].high < 0
    better = _difference.difference(clean, noisy, "noisy")
    assert better.regressions() == [] and any(line.verdict == "better" for line in better.lines)
    text = worse.words().markdown()
    assert "worse" in text and "Holm" in text
    seeds = _difference.difference(cells_of(spots, tmp_path / "d", [1.0, 2.0]), clean, "clean")
    assert {line.value for line in seeds.lines if line.metric in ("pixel_auroc", "image_auroc")} == {0.0}


def test_holm_multiplies_by_the_tests_that_are_left() -> None:
    line = _difference.Difference("d", "c", "r", "hit", 1, 1, 1, 0, 0, math.nan)
    found = _difference._holm([replace(line, p_value=p) for p in (0.04, 0.01, math.nan, 0.03)])
    assert [x.p_value for x in found] == pytest.approx([0.06, 0.03, math.nan, 0.06], nan_ok=True)


def test_other_images_are_left_out_and_said(spots: Dataset, tmp_path: Path) -> None:
    cells = cells_of(spots, tmp_path / "a", [1.0])
    part = Dataset(spots.name, spots.family, spots.class_, spots.root, [], spots.test[2:])
    found = _difference.difference(cells, cells_of(part, tmp_path / "b", [1.0]), "b")
    assert any("19 images that both have, of 21" in note for note in found.notes)
    with pytest.raises(InputError, match="nothing to compare"):
        other = [dict(cell, row={**cell["row"], "class": "other"}) for cell in cells]
        _difference.difference(cells, other, "b")


def test_intervals_hold_the_value_and_come_out_the_same(spots: Dataset, tmp_path: Path) -> None:
    (cell,) = cells_of(spots, tmp_path, [1.0], noise=0.2)
    found = _difference.intervals(cell, draws=300)
    assert found == _difference.intervals(cell, draws=300)
    for name in ("image_auroc", "pixel_auroc", "pixel_ap", "aupro", "mean_iou", "flagged_share"):
        low, high = found[f"{name}_ci_low"], found[f"{name}_ci_high"]
        assert 0 <= low <= cell["row"][name] <= high <= 1, name
    assert found["pixel_auroc_ci_high"] > found["pixel_auroc_ci_low"]


def test_the_folder_is_named_by_data_and_what_is_unusual() -> None:
    usual = _cells.folder_name(["mvtec/screw"], FitOptions(method="padim", seed=3), Measuring(workers=2))
    assert usual == "evaluate-mvtec-screw"
    other = _cells.folder_name(["mvtec/screw"], FitOptions(size=(64, 64)), Measuring())
    assert other.startswith("evaluate-mvtec-screw-") and other != usual
    long = _cells.folder_name([f"mvtec/class{i}" for i in range(40)], FitOptions(), Measuring())
    assert len(long) <= 80


def test_progress_counts_cells(spots: Dataset, tmp_path: Path, fitted: list[str]) -> None:
    steps: list[tuple[int, int, str]] = []
    progress: Progress = lambda done, total, message: steps.append((done, total, message))  # noqa: E731
    task.evaluate(plan(spots, "ab"), Measuring(pictures=0), tmp_path, progress=progress)
    assert [step for step in steps if step[2] == "cells"] == [(1, 2, "cells"), (2, 2, "cells")]
