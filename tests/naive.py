"""Plain, slow twins of metrics and methods, written as the definitions read, to test the fast ones by."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch


def components(mask: np.ndarray) -> list[np.ndarray]:
    """Return the 8-connected components of ``mask`` [H, W] as index arrays [n, 2], by flood fill."""
    left = {(int(r), int(c)) for r, c in np.argwhere(mask)}
    found = []
    while left:
        stack, region = [left.pop()], []
        while stack:
            r, c = stack.pop()
            region.append((r, c))
            for dr in (-1, 0, 1):
                for dc in (-1, 0, 1):
                    if (r + dr, c + dc) in left:
                        left.remove((r + dr, c + dc))
                        stack.append((r + dr, c + dc))
        found.append(np.array(region))
    return found


def pro_points(maps: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return false-positive rate and mean region overlap at every distinct score, from (0, 0) on."""
    regions = [m[tuple(part.T)] for m, mask in zip(maps, masks, strict=True) for part in components(mask)]
    negative = maps[~masks]
    x, y = [0.0], [0.0]
    for t in np.unique(maps)[::-1]:
        x.append(float(np.mean(negative >= t)))
        y.append(float(np.mean([np.mean(scores >= t) for scores in regions])))
    return np.array(x), np.array(y)


def area_up_to(x: np.ndarray, y: np.ndarray, limit: float) -> float:
    """Return the area under straight lines through the points from 0 to ``limit``."""
    area = 0.0
    for i in range(1, len(x)):
        if x[i] <= limit:
            area += (x[i] - x[i - 1]) * (y[i] + y[i - 1]) / 2
        elif x[i - 1] < limit:
            end = y[i - 1] + (y[i] - y[i - 1]) * (limit - x[i - 1]) / (x[i] - x[i - 1])
            area += (limit - x[i - 1]) * (end + y[i - 1]) / 2
    return area


def aupro(maps: np.ndarray, masks: np.ndarray, limit: float = 0.3) -> float:
    """Return the official AUPRO, one threshold after the other."""
    return area_up_to(*pro_points(maps, masks), limit) / limit


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of (positive, negative) pairs in the right order, a tie counting half."""
    positive, negative = scores[labels], scores[~labels]
    wins = sum(float(np.sum(p > negative)) + 0.5 * float(np.sum(p == negative)) for p in positive)
    return wins / (len(positive) * len(negative))


def ious(maps: np.ndarray, masks: np.ndarray, threshold: float) -> Iterator[float]:
    """Yield U-Flow's IoU of each image at score > threshold."""
    for scores, mask in zip(maps, masks, strict=True):
        predicted = scores > threshold
        yield ((predicted & mask).sum() + 2.2e-16) / ((predicted | mask).sum() + 2.2e-16)


def best_mean_iou(maps: np.ndarray, masks: np.ndarray) -> float:
    """Return the highest mean IoU over all thresholds."""
    thresholds = np.append(np.unique(maps), -np.inf)
    return max(float(np.mean(list(ious(maps, masks, t)))) for t in thresholds)


def delong_variance(a: np.ndarray, b: np.ndarray, labels: np.ndarray) -> float:
    """Return DeLong's variance of AUROC(a) - AUROC(b) from the full matrices of pairs."""

    def wins(scores: np.ndarray) -> np.ndarray:  # [positives, negatives]
        p, n = scores[labels][:, None], scores[~labels][None, :]
        return (p > n) + 0.5 * (p == n)

    difference = wins(a) - wins(b)
    rows, columns = difference.mean(axis=1), difference.mean(axis=0)
    return float(np.var(rows, ddof=1) / len(rows) + np.var(columns, ddof=1) / len(columns))


def start_from_all(rows: torch.Tensor) -> torch.Tensor:
    """Return the start of PatchCore's exact greedy choice: the sum of squared distances to all rows [N].

    The official sampler takes the Euclidean norm of each row of the distance matrix; this is its square.
    """
    centred = rows - rows.mean(dim=0)
    norms = centred.square().sum(dim=1)
    return len(rows) * norms + norms.sum() - 2 * centred @ centred.sum(dim=0)


def mahalanobis(vectors: torch.Tensor, mean: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Return squared Mahalanobis distances [B, P] of vectors [B, P, C], with A [P, C, C], A^T A = covariance^-1."""
    return torch.einsum("pij,bpj->bpi", inverse, vectors - mean).square().sum(2)
