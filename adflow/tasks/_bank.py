"""The features of all training images of a class, extracted once for every fold, method and seed that wants them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from adflow._threads import default_workers, one_thread
from adflow.calibration import Calibration
from adflow.data import Images, Sample
from adflow.detector import Detector, Energy, FeatureDetector, Progress, Resources
from adflow.features import FeatureBank, T
from adflow.imaging import Box, Size, fit_to, read_image


class TrainFeatures:
    """One pass of the training images through one backbone; best in a ``with`` statement.

    Args:
        detector: any detector with the backbone, on the device to use.
        train: every training image, held-out ones included.
        size: (height, width) of the network input.
        keep_aspect: letterbox instead of stretching.
        strict: an unreadable image is fatal.
        resources: memory, folder and storage type of the features.
        progress: called with (done, total, "features").

    Attributes:
        skipped: "path: reason" of the images that could not be read.
    """

    def __init__(
        self,
        detector: Detector,
        train: Sequence[Sample],
        size: Size,
        keep_aspect: bool,
        strict: bool,
        resources: Resources,
        progress: Progress | None = None,
    ) -> None:
        source = Images(train, size, keep_aspect=keep_aspect, strict=strict)
        self.bank = resources.build(detector.backbone, source, progress)
        bad = {path for path, _ in source.skipped}
        self.skipped = [f"{path}: {reason}" for path, reason in source.skipped]
        readable = [i for i, sample in enumerate(train) if sample.image not in bad]
        self._row = {index: row for row, index in enumerate(readable)}
        self._train = train
        self._workers = resources.workers or default_workers()
        # What was rounded, letterboxed (the bank does not know where the image lies) or computed in batches on a
        # GPU is not what scoring sees.
        self._exact = resources.dtype == "float32" and not keep_aspect and detector.device().type == "cpu"

    def of(self, indices: Sequence[int]) -> FeatureBank:
        """Return the features of the readable ones among the training images ``indices``."""
        return self.bank.subset([self._row[i] for i in indices if i in self._row])

    def calibration(self, detector: Detector, indices: Sequence[int]) -> Calibration | None:
        """Calibrate on training images from their features; None as for :meth:`scores`."""
        parts = self._scored(detector, indices, Calibration.from_maps)
        return None if not parts else parts[0] if len(parts) == 1 else Calibration.merge(parts)

    def scores(self, detector: Detector, indices: Sequence[int]) -> np.ndarray | None:
        """Score training images from their features: the same bits as from their files, without decoding.

        Returns:
            Image scores of the readable ones; None when features cannot stand for the files (rounded, letterboxed,
            another device or another way of scoring): then score the files.
        """
        parts = self._scored(detector, indices, _values)
        return np.concatenate(parts) if parts else None

    def _scored(
        self, detector: Detector, indices: Sequence[int], make: Callable[[list[np.ndarray], np.ndarray], T]
    ) -> list[T]:
        """Return what ``make`` makes of maps and image scores, part by part; nothing where features will not do."""
        rows = [(i, self._row[i]) for i in indices if i in self._row]
        if not rows or not self._exact or not isinstance(detector, FeatureDetector):
            return []
        if not self._alike(detector, *rows[0], Box(0, 0, *self.bank.size)):
            return []
        work = partial(_score_part, detector, frozenset(row for _, row in rows), self._workers, make)
        return [part for part in self.bank.parts(work) if part is not None]

    def energies(self, detector: Detector, indices: Sequence[int]) -> list[list[Energy]] | None:
        """Return the energies of training images one by one, or None when features cannot stand for the files."""
        rows = [self._row[i] for i in indices if i in self._row]
        if not rows or not self._exact or not isinstance(detector, FeatureDetector):
            return None
        with one_thread(), ThreadPoolExecutor(self._workers, "adflow-energies") as pool:
            return list(pool.map(partial(_energies, detector, self.bank), rows))

    def _alike(self, detector: FeatureDetector, index: int, row: int, box: Box) -> bool:
        """Return whether one image scores the same bits from its features and from its file.

        Another memory layout is enough to make matrix kernels round differently, and a method may score in a way of
        its own: one image more is a cheap proof.
        """
        array, _ = fit_to(read_image(self._train[index].image), self.bank.size, False)
        with one_thread():
            scores = detector.score(torch.tensor(array)[None], [box])
            score_map, value = _score(detector, self.bank, row, box)
        return np.array_equal(scores.map[0].numpy(), score_map) and float(scores.image[0]) == value

    def close(self) -> None:
        """Give RAM and disk back."""
        self.bank.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _score(detector: FeatureDetector, bank: FeatureBank, row: int, box: Box) -> tuple[np.ndarray, float]:
    with torch.inference_mode():
        pyramid = bank.pyramid([row])
        maps = detector.score_maps(pyramid, bank.size)
        return maps[0].numpy(), float(detector.score_images(pyramid, maps, [box])[0])


def _energies(detector: FeatureDetector, bank: FeatureBank, row: int) -> list[Energy]:
    with torch.inference_mode():
        return detector.energy_features(bank.pyramid([row]))


def _score_part(
    detector: FeatureDetector,
    chosen: frozenset[int],
    workers: int,
    make: Callable[[list[np.ndarray], np.ndarray], T],
    part: FeatureBank,
) -> T | None:
    """Score those rows of a part that are among the ``chosen`` of the whole bank; None without any."""
    rows = [row for row in range(len(part)) if part.first + row in chosen]
    if not rows:
        return None
    box = Box(0, 0, *part.size)
    with one_thread(), ThreadPoolExecutor(workers, "adflow-calibrate") as pool:
        found = list(pool.map(lambda row: _score(detector, part, row, box), rows))
    return make([score_map for score_map, _ in found], np.array([value for _, value in found]))


def _values(_: list[np.ndarray], values: np.ndarray) -> np.ndarray:
    return values


def bank_key(detector: Detector, size: Size, keep_aspect: bool) -> tuple[Any, ...]:
    """Return what features depend on besides the images: equal keys can share one bank."""
    backbone = detector.backbone
    return backbone.name, backbone.taps, backbone.weights, size, keep_aspect


def image_bytes(detector: Detector, size: Size) -> int:
    """Return about how many bytes the float32 features of one image take."""
    taps = zip(detector.backbone.channels, detector.backbone.strides, strict=True)
    return 4 * sum(channels * -(-size[0] // step) * -(-size[1] // step) for channels, step in taps)


def can_share(detector: Detector, settings: dict[str, Any]) -> bool:
    """Return whether a detector may be fitted on features that others use too.

    With a memory limit of its own a method plans its bank itself.
    """
    return isinstance(detector, FeatureDetector) and detector.learns_from_bank and not settings.get("max_memory")
