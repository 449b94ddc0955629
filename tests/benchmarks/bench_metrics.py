"""Pixel metrics against the floor of one ``np.sort`` of the same pixels in the same process, and the peers.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_metrics.py [--maps 100] [--size 512] [--repeat 5]

Times are medians of rounds in which every row runs once, in turn, so that a busy machine slows all of them
alike; only the ratios mean anything. Peak memory over the data is that of tracemalloc, in a round of its own.
Rows of scikit-learn, torchmetrics and ADEval appear where they are installed.
"""

from __future__ import annotations

import argparse
import statistics
import time
import tracemalloc
from collections.abc import Callable

import numpy as np
from scipy import ndimage

from adflow import metrics


def data(n: int, size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Smooth maps as detectors give them, two thirds with one to three elliptic defects; float32 and bool."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    maps, masks = np.empty((n, size, size), np.float32), np.zeros((n, size, size), bool)
    for i in range(n):
        small = rng.gumbel(size=(size // 8, size // 8))
        maps[i] = ndimage.zoom(small, 8, order=1) + 0.05 * rng.standard_normal((size, size))
        for _ in range(rng.integers(1, 4) if i % 3 else 0):
            cy, cx = rng.uniform(0.1, 0.9, 2) * size
            ry, rx = rng.uniform(0.02, 0.08, 2) * size
            masks[i] |= ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 <= 1
        maps[i][masks[i]] += 1.5
    return maps, masks


def streaming(maps: np.ndarray, masks: np.ndarray) -> metrics.PixelMetrics:
    stream = metrics.StreamingPixelMetrics()
    for one, mask in zip(maps, masks, strict=True):
        stream.add(one, mask)
    return stream.result()


def rows(maps: np.ndarray, masks: np.ndarray) -> dict[str, Callable[[], object]]:
    found: dict[str, Callable[[], object]] = {
        "np.sort of the pixels (floor)": lambda: np.sort(maps, axis=None),
        "adflow exact: AUROC, AP, F1, AUPRO": lambda: metrics.pixel_metrics(maps, masks),
        "adflow streaming: the same": lambda: streaming(maps, masks),
    }
    try:
        from sklearn.metrics import roc_auc_score
    except ImportError:
        pass
    else:
        found["scikit-learn: AUROC"] = lambda: roc_auc_score(masks.ravel(), maps.ravel())
    try:
        import torch
        from torchmetrics.functional.classification import binary_auroc
    except ImportError:
        pass
    else:
        low, high = maps.min(), maps.max()  # in [0, 1], so that it applies no sigmoid
        found["torchmetrics: AUROC"] = lambda: binary_auroc(
            torch.from_numpy(((maps - low) / (high - low)).ravel()), torch.from_numpy(masks.ravel())
        )
    try:
        from adeval import EvalAccumulatorCuda
    except ImportError:
        pass
    else:

        def adeval() -> object:
            low, high = float(maps.min()), float(maps.max())
            counter = EvalAccumulatorCuda(low, high, low, high, nstrips=1000)
            for one, mask in zip(maps, masks, strict=True):
                counter.add_anomap(torch.from_numpy(one), torch.from_numpy(mask.astype(np.uint8)))
            return counter.summary()

        found["ADEval, 1,000 bins: AUROC, AP, AUPRO"] = adeval
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--maps", type=int, default=100)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    maps, masks = data(options.maps, options.size)
    seconds: dict[str, list[float]] = {}
    calls = rows(maps, masks)
    slow = {name for name in calls if name.startswith(("scikit", "torchm"))}
    for turn in range(options.repeat + 1):  # the first round warms caches and is dropped
        for name, call in calls.items():
            if name in slow and turn > 2:
                continue
            start = time.perf_counter()
            call()
            if turn:
                seconds.setdefault(name, []).append(time.perf_counter() - start)
    floor = statistics.median(seconds["np.sort of the pixels (floor)"])
    print(f"{options.maps} maps of {options.size}x{options.size}, {masks.mean():.1%} of the pixels on a mask")
    print(f"{'':44s} {'seconds':>8s} {'x floor':>8s} {'peak bytes/pixel':>17s}")
    for name, call in calls.items():
        tracemalloc.start()
        call()
        peak = tracemalloc.get_traced_memory()[1] / maps.size
        tracemalloc.stop()
        median = statistics.median(seconds[name])
        print(f"{name:44s} {median:8.3f} {median / floor:8.2f} {peak:17.2f}")
    exact, stream = metrics.pixel_metrics(maps, masks), streaming(maps, masks)
    for name, bound in stream.bounds.items():
        error = abs(getattr(stream, name) - getattr(exact, name))
        print(f"streaming {name:7s} {getattr(stream, name):.6f}  error {error:.1e}  bound {bound:.1e}")


if __name__ == "__main__":
    main()
