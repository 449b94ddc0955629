"""The operating point: where the line between good and defective is drawn, and what that promises."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from adflow._regions import Region, plain_regions
from adflow.detector import Detector
from adflow.errors import InputError, UsageError


@dataclass(frozen=True)
class OperatingPoint:
    """Where the line between good and defective is drawn, and what that promises.

    Attributes:
        kind: "nfa", "flag-rate", "threshold" or "gaussian".
        value: what was asked for.
        threshold: score map level at which a region counts as a defect.
        promise: one sentence for people.
        observed: on the calibration images: regions per image and share of images flagged.
    """

    kind: str
    value: float
    threshold: float
    promise: str
    observed: dict[str, float] = field(default_factory=dict)


# Tried in this order when the user names no setting: the strictest that the number of held-out images can carry.
DEFAULT_NFA = (0.1, 0.3, 1.0)
# So many held-out images, divided by eps, keep the promise on average; fewer exceed it (resampling study in
# tests/test_calibration.py).
_ENOUGH = 3


def operating_point(
    detector: Detector,
    *,
    nfa: float | None = None,
    flag_rate: float | None = None,
    threshold: float | None = None,
) -> OperatingPoint:
    """Return the operating point the user asked for, or the default one.

    Args:
        detector: fitted, and calibrated unless ``threshold`` is given.
        nfa: expected number of false regions per good image.
        flag_rate: share of good images on which anything may be marked.
        threshold: a level of the score map, promising nothing.

    Raises:
        UsageError: more than one of them.
        InputError: the detector is not calibrated, or on too few images for the wish.
    """
    if sum(wish is not None for wish in (nfa, flag_rate, threshold)) > 1:
        raise UsageError("give one of --nfa, --flag-rate and --threshold")
    if threshold is not None:
        return OperatingPoint("threshold", threshold, threshold, "A level chosen by hand; nothing is promised.")
    calibration = detector.calibration
    if calibration is None:
        raise InputError(
            "this detector has no calibration, so no false-alarm rate can be promised",
            hint="Run `adflow calibrate RUN FOLDER_OF_GOOD`, or give --threshold.",
        )
    if flag_rate is not None:
        level = calibration.flag_threshold(flag_rate)
        promise = f"At most {flag_rate:.3g} of good images are marked at all, on average over calibration sets."
        return OperatingPoint("flag-rate", flag_rate, level, promise, calibration.observed(level))
    if nfa is None:
        reachable = [eps for eps in DEFAULT_NFA if calibration.n >= _ENOUGH / eps]
        nfa = reachable[0] if reachable else DEFAULT_NFA[-1]
    level = calibration.threshold(nfa)
    return OperatingPoint("nfa", nfa, level, _count_promise(nfa, calibration.n), calibration.observed(level))


def _count_promise(nfa: float, n: int) -> str:
    """Say what ``--nfa`` promises with ``n`` held-out images.

    The threshold is never below that of the flag rate of the same value (a count is at least 1 where it is not 0), so
    below 1 the share of marked images is bounded by the theorem, whatever n. The count is not: where few images show
    any region, few tell how many such an image shows.
    """
    if n >= _ENOUGH / nfa:
        return f"At most {nfa:.3g} false regions per good image, on average."
    enough = math.ceil(_ENOUGH / nfa - 1e-9)
    return (
        f"At most {nfa:.1%} of good images are marked at all, on average over calibration sets. Marked ones show about "
        f"1 to 2 regions; {n} held-out images are too few to count these in: {enough} keep {nfa:.3g} per image."
    )


def gaussian_point(nfa: float | None) -> OperatingPoint:
    """Return the operating point of the Gaussian null model: a map of -log10 NFA, cut at ``nfa`` (default 1)."""
    eps = 1.0 if nfa is None else nfa
    promise = (
        f"NFA below {eps:g} if latents were independent and Gaussian. On real images they are not: "
        "take it as an order of magnitude."
    )
    return OperatingPoint("gaussian", eps, -math.log10(eps), promise)


def regions_at(detector: Detector, score_map: np.ndarray, point: OperatingPoint) -> tuple[np.ndarray, list[Region]]:
    """Return the mask [h, w] bool of what ``point`` marks on a score map, and its regions, the strongest first."""
    if point.kind == "gaussian":
        return plain_regions(score_map, point.threshold, log10_nfa=np.negative)
    if detector.calibration is None:
        return plain_regions(score_map, point.threshold)
    return detector.calibration.segment(score_map, point.threshold)
