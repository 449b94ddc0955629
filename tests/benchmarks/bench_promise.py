"""Does the promise hold? False regions on good test images at each operating point, and the masks' overlap.

    python tests/benchmarks/bench_promise.py DATA... [--methods uflow,cflow,padim] [--seeds 0,1,2] [--cache FOLDER]

For every data set, method and seed of the hold-out: fit, calibrate on the held-out images, then count on the
test images. Prints a table over seeds; intervals are 95 % bootstrap intervals over good test images and seeds.
``IoU def.`` is over images with a marked defect only, and ``of oracle`` its share of what the best single threshold of
the same maps reaches, chosen on the test set.

``--cache`` keeps the maps of every data set, method and seed, so that another rule for thresholds or outlines
needs no other fit; empty it when a method has changed.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from adflow import methods, metrics
from adflow._threads import one_thread
from adflow.calibration import Calibration
from adflow.data import Dataset, Images, open_data
from adflow.detector import FeatureDetector
from adflow.features import FeatureBank
from adflow.imaging import mask_to, read_mask
from adflow.tasks.fit import hold_out

EPS = (0.1, 0.3, 1.0)
RATES = (0.05, 0.1)


class Study(NamedTuple):
    """What one fit says of held-out and test images: maps [n, H, W] and image scores [n] of both."""

    held: np.ndarray
    held_scores: np.ndarray
    test: np.ndarray
    test_scores: np.ndarray


def maps_of(detector: FeatureDetector, bank: FeatureBank, rows: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Score rows of a bank one by one, as scoring of files does."""
    maps, scores = [], []
    with torch.inference_mode(), one_thread():
        for row in rows:
            pyramid = bank.pyramid([row])
            found = detector.score_maps(pyramid, bank.size)
            maps.append(found[0].numpy())
            scores.append(float(detector.score_images(pyramid, found, None)[0]))
    return np.stack(maps), np.array(scores)


def studies(
    data: Dataset, names: list[str], seeds: list[int], size: tuple[int, int], cache: Path
) -> Iterator[tuple[str, int, Study]]:
    """Yield (method, seed, maps), from the cache where they are there; images pass the backbone once for all."""
    with ExitStack() as banks:
        train = test = None
        for method in names:
            for seed in seeds:
                folder = cache / f"{data.name.replace('/', '-')}-{method}-{seed}-{size[0]}"
                paths = [folder / f"{field}.npy" for field in Study._fields]
                if not all(path.exists() for path in paths):
                    detector, _ = methods.build(method)
                    assert isinstance(detector, FeatureDetector)
                    if train is None or test is None:
                        train = banks.enter_context(FeatureBank.build(detector.backbone, Images(data.train, size)))
                        test = banks.enter_context(FeatureBank.build(detector.backbone, Images(data.test, size)))
                    fit_on, held = hold_out(len(train), 0.1, seed)
                    detector.fit_bank(train.subset(fit_on), seed=seed)
                    found = (*maps_of(detector, train, held), *maps_of(detector, test, list(range(len(data.test)))))
                    folder.mkdir(parents=True, exist_ok=True)
                    for path, array in zip(paths, found, strict=True):
                        np.save(path, array)
                yield method, seed, Study(*(np.load(path, mmap_mode="r") for path in paths))


def interval(counts: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean."""
    rng = np.random.default_rng(0)
    means = counts[rng.integers(0, len(counts), (draws, len(counts)))].mean(1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def measure(study: Study, masks: list[np.ndarray], labels: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    """Return per setting: false regions of each good image, IoU of all images, share of the oracle."""
    calibration = Calibration.from_maps(study.held, study.held_scores)
    best = metrics.oracle_threshold(study.test, masks, anomalous_only=True).value
    n = calibration.n  # settings that so few held-out images cannot carry are left out
    points = {f"--nfa {e:g}": calibration.threshold(e) for e in EPS if n + 1 >= 1 / e}
    points |= {f"--flag-rate {r:g}": calibration.flag_threshold(r) for r in RATES if n + 1 >= 1 / r}
    found = {}
    for name, level in points.items():
        regions, overlap = [], []
        for score_map, mask in zip(study.test, masks, strict=True):
            predicted, parts = calibration.segment(score_map, level)
            regions.append(len(parts))
            union = (predicted | mask).sum()
            overlap.append((predicted & mask).sum() / union if union else 1.0)
        good, iou = np.array(regions)[labels == 0], np.array(overlap)
        # Four images of magnetic tile are called defective but nothing is marked on them: no overlap to measure.
        defective = iou[[bool(mask.any()) for mask in masks]].mean()
        found[name] = {"good": good, "iou": iou.mean(), "defective": defective, "share": defective / best}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="+")
    parser.add_argument("--methods", default="uflow,cflow,padim")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--cache", type=Path)
    chosen = parser.parse_args()
    seeds = [int(seed) for seed in chosen.seeds.split(",")]
    size = (chosen.size, chosen.size)
    print("| data | method | setting | false regions per good image | good marked | mIoU | IoU def. | of oracle |")
    print("|---|---|---|---|---|---|---|---|")
    for spec in chosen.data:
        (data,) = open_data(spec)
        labels = np.array([sample.label for sample in data.test])
        masks = [mask_to(read_mask(s.mask), size) if s.mask is not None else np.zeros(size, bool) for s in data.test]
        with tempfile.TemporaryDirectory() as temporary:
            cache = chosen.cache or Path(temporary)
            found: dict[str, list[dict[str, np.ndarray]]] = {}
            for method, seed, study in studies(data, chosen.methods.split(","), seeds, size, cache):
                for name, cell in measure(study, masks, labels).items():
                    found.setdefault(name, []).append(cell)
                if seed != seeds[-1]:
                    continue
                for name, cells in found.items():
                    good = np.concatenate([cell["good"] for cell in cells])
                    low, high = interval(good)
                    mean = {key: np.mean([cell[key] for cell in cells]) for key in ("iou", "defective", "share")}
                    print(
                        f"| {data.name} | {method} | {name} | {good.mean():.3f} [{low:.3f}, {high:.3f}] "
                        f"| {(good > 0).mean():.3f} | {mean['iou']:.3f} | {mean['defective']:.3f} "
                        f"| {mean['share']:.0%} |",
                        flush=True,
                    )
                found = {}


if __name__ == "__main__":
    main()
