"""The paper's way to a threshold: a Gaussian null model of the latents instead of held-out images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast, get_args

import torch
from torch import Tensor

from adflow import nfa
from adflow._reduce import reduce_map
from adflow.detector import Detector, Energy, Scores
from adflow.errors import InputError, unknown
from adflow.imaging import Box
from adflow.nfa import Bound, Tests


class GaussianNull(Detector):
    """A fitted detector whose map is -log10 of the number of false alarms under the Gaussian null model.

    Args:
        detector: fitted, of a method that has energies.
        bound: "one-sided" (a level at or below the null's mean is no evidence) or "reference" (the original's).
        tests: "image" charges every region for all regions of the image (the original), "area" for those of its area.

    Raises:
        InputError: the method has no null model.
        UsageError: unknown bound or tests.
    """

    def __init__(self, detector: Detector, bound: str = "one-sided", tests: str = "image") -> None:
        super().__init__(detector.backbone)
        if not detector.has_null:
            raise InputError(
                f"{detector.method()} has no Gaussian null model",
                hint="Use --null calibrated (the default), which works with every method.",
            )
        if bound not in get_args(Bound):
            raise unknown("bound", bound, get_args(Bound))
        if tests not in get_args(Tests):
            raise unknown("tests", tests, get_args(Tests))
        self.inner = detector
        self.bound = cast(Bound, bound)
        self.tests = cast(Tests, tests)
        self.size, self.keep_aspect = detector.size, detector.keep_aspect
        self.provenance = detector.provenance

    def fit(self, *_: object, **__: object) -> GaussianNull:
        """Refuse: it is the detector inside that is fitted."""
        raise InputError("a null model is not fitted; fit the detector it belongs to")

    def _score(self, images: Tensor, boxes: Sequence[Box] | None) -> Scores:
        energies = [(e.chi2.cpu().numpy(), e.dof) for e in self.inner.energies(images)]
        size = (images.shape[2], images.shape[3])
        maps = torch.from_numpy(nfa.tree(energies, size, bound=self.bound, tests=self.tests))
        values = [reduce_map(m, "max", 0.0, boxes[i] if boxes else None) for i, m in enumerate(maps)]
        return Scores(maps, torch.stack(values))

    def _energies(self, images: Tensor) -> list[Energy]:
        return self.inner.energies(images)
