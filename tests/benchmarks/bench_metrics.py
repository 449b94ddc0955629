"""Pixel metrics against the floor of one ``np.sort`` of the same pixels, and against the peers.

    python tests/benchmarks/bench_metrics.py [--maps 100] [--size 512] [--rounds 5]

Every side computes its figures of the same maps in a process of its own, in turn; memory is what it holds on top of
maps and masks. Peers that are not installed are named and left out.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from _contest import Call, Sides, contest, show
from scipy import ndimage


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


def floor(n: int, size: int) -> Call:
    maps, _ = data(n, size)

    def call() -> None:
        np.sort(maps, axis=None)

    return call


def exact(n: int, size: int) -> Call:
    from adflow import metrics

    maps, masks = data(n, size)
    return lambda: _figures(metrics.pixel_metrics(maps, masks))


def streaming(n: int, size: int) -> Call:
    from adflow import metrics

    maps, masks = data(n, size)

    def call() -> dict[str, Any]:
        stream = metrics.StreamingPixelMetrics()
        for one, mask in zip(maps, masks, strict=True):
            stream.add(one, mask)
        found = stream.result()
        return _figures(found) | {f"{name} bound": bound for name, bound in found.bounds.items()}

    return call


def _figures(found: Any) -> dict[str, Any]:
    return {"auroc": found.auroc, "ap": found.ap, "aupro": found.aupro}


def scikit_learn(n: int, size: int) -> Call:
    from sklearn.metrics import roc_auc_score

    maps, masks = data(n, size)
    return lambda: {"auroc": float(roc_auc_score(masks.ravel(), maps.ravel()))}


def torchmetrics_and_anomalib(n: int, size: int) -> Call:
    import torch
    from anomalib.metrics.aupro import _AUPRO
    from torchmetrics.functional.classification import binary_auroc

    maps, masks = data(n, size)
    # Scores outside [0, 1] would be put through a sigmoid, which merges the large ones in float32.
    low, high = maps.min(), maps.max()
    scores, truth = torch.from_numpy((maps - low) / (high - low)), torch.from_numpy(masks)

    def call() -> dict[str, Any]:
        auroc = binary_auroc(scores.flatten(), truth.flatten())
        aupro = _AUPRO()
        aupro.update(scores, truth.int())
        return {"auroc": float(auroc), "aupro": float(aupro.compute())}

    return call


def adeval(n: int, size: int) -> Call:
    from adeval import EvalAccumulator

    if not hasattr(np, "trapz"):
        np.trapz = np.trapezoid  # type: ignore[attr-defined]  # the old name, which ADEval 1.1 calls
    maps, masks = data(n, size)
    low, high = float(maps.min()), float(maps.max())
    truth = masks.astype(np.uint8)

    def call() -> dict[str, Any]:
        counter = EvalAccumulator(low, high, low, high, nstrips=1000)
        for one, mask in zip(maps, truth, strict=True):
            counter.add_anomap(one, mask)
            counter.add_image(float(one.max()), int(mask.any()))
        found = counter.summary()
        return {"auroc": found["p_auroc"], "ap": found["p_aupr"], "aupro": found["p_aupro"]}

    return call


SLOW = ("scikit-learn: AUROC", "torchmetrics AUROC + anomalib AUPRO")


def sides(n: int, size: int) -> Sides:
    """Return the sides by name; the first is the one the others are compared with."""
    return {
        "adflow exact: AUROC, AP, F1, AUPRO": (exact, n, size),
        "adflow streaming: the same": (streaming, n, size),
        "np.sort of the pixels (floor)": (floor, n, size),
        "scikit-learn: AUROC": (scikit_learn, n, size),
        "torchmetrics AUROC + anomalib AUPRO": (torchmetrics_and_anomalib, n, size),
        "ADEval, 1,000 bins: AUROC, AP, AUPRO": (adeval, n, size),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maps", type=int, default=100)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    found = contest(sides(options.maps, options.size), options.rounds, once=SLOW)
    show(f"pixel metrics of {options.maps} maps of {options.size}x{options.size}", found)
    stream = found["adflow streaming: the same"].result
    for name in ("auroc", "ap", "aupro"):
        error = abs(stream[name] - found["adflow exact: AUROC, AP, F1, AUPRO"].result[name])
        print(f"streaming {name:7s} {stream[name]:.6f}  error {error:.1e}  bound {stream[f'{name} bound']:.1e}")


if __name__ == "__main__":
    main()
