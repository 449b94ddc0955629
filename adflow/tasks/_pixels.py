"""The pixels of a class while it is measured: kept whole, or counted where they would not fit into memory."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np

from adflow import metrics

# Entries per histogram (images x bins): 2048 bins for a thousand images, 256 for ten thousand.
_ENTRIES = 1 << 21
_BINS = (256, 2048)
CURVE_POINTS = 400


class Exact:
    """Maps and masks kept until the end."""

    streaming = False

    def __init__(self) -> None:
        self.maps: list[np.ndarray] = []
        self.masks: list[np.ndarray] = []
        self.kinds: list[str | None] = []

    def add(self, score_map: np.ndarray, truth: np.ndarray, kind: str | None) -> None:
        self.maps.append(score_map)
        self.masks.append(truth)
        self.kinds.append(kind)

    def __len__(self) -> int:
        return len(self.maps)

    def whole(self) -> metrics.PixelMetrics:
        return metrics.pixel_metrics(self.maps, self.masks, points=CURVE_POINTS)

    def histograms(self) -> metrics.PixelHistograms:
        bins = min(max(_ENTRIES // len(self.maps), _BINS[0]), _BINS[1])
        found = metrics.PixelHistograms.of(self.maps, self.masks, bins)
        # As they are stored: what is computed now and what is computed from a file later are the same bits.
        weighted = found.weighted.astype(np.float32).astype(np.float64)
        return metrics.PixelHistograms(found.negative, found.positive, weighted, found.regions)

    def oracle(self, anomalous_only: bool) -> metrics.Operating:
        return metrics.oracle_threshold(self.maps, self.masks, anomalous_only=anomalous_only)


class Streamed:
    """Counters of fixed size, one set for each kind of defect and one for good images."""

    streaming = True

    def __init__(self) -> None:
        self.streams: dict[str | None, metrics.StreamingPixelMetrics] = {}
        self.count = 0

    def add(self, score_map: np.ndarray, truth: np.ndarray, kind: str | None) -> None:
        self.streams.setdefault(kind, metrics.StreamingPixelMetrics()).add(score_map, truth)
        self.count += 1

    def __len__(self) -> int:
        return self.count

    def whole(self) -> metrics.PixelMetrics:
        return self.of(list(self.streams)).result()

    def of(self, kinds: Sequence[str | None]) -> metrics.StreamingPixelMetrics:
        """Return the counters of some kinds together; those kept here stay as they are."""
        total = metrics.StreamingPixelMetrics()
        for kind in kinds:
            if kind in self.streams:
                total.merge(copy.deepcopy(self.streams[kind]))
        return total
