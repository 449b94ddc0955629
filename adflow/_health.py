"""What held-out images say about the promises themselves, and scores about images that come later."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from adflow._regions import Curves, add_curves, lowest_level

Array = npt.NDArray[Any]

# The promises whose realised values are reported.
_WISHES = (0.1, 0.3, 1.0)
# Fewer incoming images cannot tell a shift from one defect.
DRIFT_IMAGES = 8


def kept_promises(levels: Array, counts: Array, owner: Array, curves: Curves) -> dict[str, Any]:
    """Return what each image shows at the thresholds of the others, see :meth:`Calibration.health`.

    Args:
        levels: [K] count curves one image after the other, levels descending.
        counts: [K] the region count reached just below each level.
        owner: [K] the number of the image, ascending.
        curves: the sum of them all.
    """
    realised = {eps: _leave_one_out(levels, counts, owner, curves, eps) for eps in _WISHES}
    known = {eps: found for eps, found in realised.items() if found is not None}
    last = known[max(known)] if known else None
    clumped = last is not None and last.mean() > 0
    return {
        "leave_one_out": {f"{eps:g}": round(float(c.mean()), 4) for eps, c in known.items()},
        "flagged": {f"{eps:g}": round(float((c > 0).mean()), 4) for eps, c in known.items()},
        "variance_over_mean": round(float(last.var() / last.mean()), 3) if clumped and last is not None else None,
        "max_count": None if last is None else int(last.max()),
    }


def _leave_one_out(levels: Array, counts: Array, owner: Array, curves: Curves, eps: float) -> Array | None:
    """Return, per image, its regions above the threshold of the others; None when there are too few."""
    n = int(owner[-1]) + 1
    if n < 2 or n < math.ceil(1 / eps - 1e-9):
        return None
    # Without any one image the sum is still above eps * n here: no threshold of the others lies lower.
    bound = np.flatnonzero(curves.total - curves.largest > eps * n)
    floor = curves.level[bound[0]] if len(bound) else -np.inf
    keep = levels >= floor
    high, high_counts, high_owner = levels[keep], counts[keep], owner[keep]
    realised = np.zeros(n)
    for i in range(n):
        others = high_owner != i
        rest = add_curves(high[others], high_counts[others], high_owner[others])
        level = lowest_level(rest, rest.nfa(n - 1), eps)
        own = slice(*np.searchsorted(owner, [i, i + 1]))
        k = int(np.sum(levels[own] > (floor if level is None else level)))
        realised[i] = counts[own][k - 1] if k else 0
    return realised


def drift(held_out: Array, incoming: Array) -> dict[str, Any] | None:
    """Compare image scores, see :meth:`Calibration.drift`."""
    if len(incoming) < DRIFT_IMAGES:
        return None
    auc, p_value = _rank_test(incoming, held_out)
    warning = None
    if p_value < 0.01 and abs(auc - 0.5) > 0.15:
        side = "higher" if auc > 0.5 else "lower"
        consequence = "more false alarms than promised" if auc > 0.5 else "fewer detections than possible"
        warning = (
            f"these images score {side} than the held-out good ones (AUC {auc:.2f}, p = {p_value:.1g}); "
            f"if most of them are good, expect {consequence}: run `adflow calibrate RUN FOLDER_OF_GOOD`"
        )
    return {
        "images": len(incoming),
        "auc": auc,
        "p_value": p_value,
        "below_median": float((incoming < np.median(held_out)).mean()),
        "warning": warning,
    }


def exchangeability(held_out: Array, fit_scores: Array | None, blocks: int) -> dict[str, Any]:
    """Check image scores in file order, see :meth:`Calibration.exchangeability`."""
    from scipy.stats import kruskal

    report: dict[str, Any] = {"blocks_p": None, "warnings": []}
    parts = np.array_split(held_out, min(blocks, len(held_out) // 4)) if len(held_out) >= 8 else []
    if len(parts) >= 2 and np.ptp(held_out) > 0:
        report["blocks_p"] = float(kruskal(*parts).pvalue)
        if report["blocks_p"] < 0.01:
            report["warnings"].append(
                f"held-out good images differ from one part of the folder to the next (p = "
                f"{report['blocks_p']:.1g}): a promise made on them may not hold for the next session"
            )
    if fit_scores is not None:
        auc, p_value = _rank_test(held_out, np.asarray(fit_scores, dtype=np.float64))
        report |= {"fit_auc": auc, "fit_p": p_value}
        if auc < 0.35 and p_value < 0.01:
            report["warnings"].append(
                f"images that were fitted on score higher than held-out ones (AUC {1 - auc:.2f}, p = "
                f"{p_value:.1g}): look for defects among the training images"
            )
    return report


def _rank_test(a: Array, b: Array) -> tuple[float, float]:
    """Return (P(a > b) + P(a = b) / 2, two-sided p-value of the rank test)."""
    from scipy.stats import mannwhitneyu

    if len(a) == 0 or len(b) == 0:
        return 0.5, 1.0
    result = mannwhitneyu(a, b)
    p_value = float(result.pvalue)
    return float(result.statistic) / (len(a) * len(b)), 1.0 if math.isnan(p_value) else p_value
