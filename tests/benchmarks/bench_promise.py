"""Does the promise hold? False regions on good test images at each operating point, and the masks' overlap.

    python tests/benchmarks/bench_promise.py DATA... [--methods uflow,cflow,padim] [--seeds 0,1,2] [--size 256]

For every data set, method and seed of the hold-out: fit, calibrate on the held-out images, then count on the
test images. Prints a table over seeds; intervals are 95 % bootstrap intervals over good test images and seeds.
``IoU def.`` is over defective images only, and ``of oracle`` its share of what the best single threshold of the
same maps reaches, chosen on the test set.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from adflow import methods, metrics
from adflow.calibration import Calibration
from adflow.data import Images, open_data
from adflow.detector import FeatureDetector
from adflow.features import FeatureBank, one_thread
from adflow.imaging import mask_to, read_mask
from adflow.tasks.fit import hold_out

EPS = (0.1, 0.3, 1.0)
RATES = (0.05, 0.1)


def maps_of(detector: FeatureDetector, bank: FeatureBank, rows: list[int]) -> tuple[list[np.ndarray], np.ndarray]:
    """Score rows of a bank one by one, as scoring of files does."""
    maps, scores = [], []
    with torch.inference_mode(), one_thread():
        for row in rows:
            pyramid = bank.pyramid([row])
            found = detector.score_maps(pyramid, bank.size)
            maps.append(found[0].numpy())
            scores.append(float(detector.score_images(pyramid, found, None)[0]))
    return maps, np.array(scores)


def interval(counts: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean."""
    rng = np.random.default_rng(0)
    means = counts[rng.integers(0, len(counts), (draws, len(counts)))].mean(1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="+")
    parser.add_argument("--methods", default="uflow,cflow,padim")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--size", type=int, default=256)
    chosen = parser.parse_args()
    seeds = [int(seed) for seed in chosen.seeds.split(",")]
    size = (chosen.size, chosen.size)
    print("| data | method | setting | false regions per good image | good marked | mIoU | IoU def. | of oracle |")
    print("|---|---|---|---|---|---|---|---|")
    for spec in chosen.data:
        (data,) = open_data(spec)
        labelled = list(data.test)
        labels = np.array([sample.label for sample in labelled])
        masks = [
            mask_to(read_mask(s.mask), size) if s.mask is not None else np.zeros(size, bool) for s in labelled
        ]
        backbone = methods.build("padim")[0].backbone
        with (
            FeatureBank.build(backbone, Images(data.train, size)) as train,
            FeatureBank.build(backbone, Images(labelled, size)) as test,
        ):
            for method in chosen.methods.split(","):
                found: dict[str, dict[str, list[np.ndarray | float]]] = {}
                for seed in seeds:
                    detector, _ = methods.build(method)
                    assert isinstance(detector, FeatureDetector)
                    fit_on, held = hold_out(len(train), 0.1, seed)
                    detector.fit_bank(train.subset(fit_on), seed=seed)
                    calibration = Calibration.from_maps(*maps_of(detector, train, held))
                    maps, _ = maps_of(detector, test, list(range(len(labelled))))
                    best = metrics.oracle_threshold(maps, masks, anomalous_only=True).value
                    n = calibration.n  # settings that so few held-out images cannot carry are left out
                    points = {f"--nfa {e:g}": calibration.threshold(e) for e in EPS if n + 1 >= 1 / e}
                    points |= {f"--flag-rate {r:g}": calibration.flag_threshold(r) for r in RATES if n + 1 >= 1 / r}
                    for name, level in points.items():
                        regions, overlap = [], []
                        for score_map, mask in zip(maps, masks, strict=True):
                            predicted, parts = calibration.segment(score_map, level)
                            regions.append(len(parts))
                            union = (predicted | mask).sum()
                            overlap.append((predicted & mask).sum() / union if union else 1.0)
                        good, iou = np.array(regions)[labels == 0], np.array(overlap)
                        cell = found.setdefault(name, {"good": [], "iou": [], "defective": [], "share": []})
                        cell["good"].append(good)
                        cell["iou"].append(float(iou.mean()))
                        cell["defective"].append(float(iou[labels == 1].mean()))
                        cell["share"].append(float(iou[labels == 1].mean()) / best)
                for name, cell in found.items():
                    good = np.concatenate(cell["good"])
                    low, high = interval(good)
                    print(
                        f"| {data.name} | {method} | {name} | {good.mean():.3f} [{low:.3f}, {high:.3f}] "
                        f"| {(good > 0).mean():.3f} | {np.mean(cell['iou']):.3f} | {np.mean(cell['defective']):.3f} "
                        f"| {np.mean(cell['share']):.0%} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
