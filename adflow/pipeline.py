"""Score many images from files: decode, fit to the input size, score, and what the caller does with each result.

On a CPU every worker takes an image through all stages with one thread. That keeps an image in one core's cache,
needs no synchronisation inside a layer, and makes the score of an image the same bits whatever runs beside it. Where
the method allows it (``Detector.at_once``) a worker takes a few images, which share what is read from memory.
On a GPU workers decode and finish, and batches go through the device in between.
Memory is bounded: at most a few images per worker are under way, whatever the length of the list.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch

from adflow._clock import counting
from adflow._threads import default_workers, in_halves, one_thread, ordered
from adflow.data import Sample
from adflow.detector import Detector
from adflow.errors import InputError
from adflow.imaging import Box, fit_to, read_image, show


@dataclass
class Scored:
    """One image with its scores.

    Attributes:
        sample: what was scored.
        map: [h, w] float32, higher = more anomalous; the image's own area of the network input.
        image: image score, higher = more anomalous.
        original: (height, width) of the file's image.
        picture: [H, W, 3] uint8 or float32 as read, when the caller asked to keep it.
        seconds: time per stage: "decode", "resize", on a CPU "encoder", "method", "upsample" and "image score", else
            "score", and "after".
        result: what ``after`` returned.
        error: why this image could not be scored, or None; then the arrays are empty.
    """

    sample: Sample
    map: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    image: float = float("nan")
    original: tuple[int, int] = (0, 0)
    picture: np.ndarray | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    result: Any = None
    error: str | None = None


def run(
    detector: Detector,
    samples: Iterable[Sample],
    *,
    after: Callable[[Scored], Any] | None = None,
    keep_picture: bool = False,
    keep_map: bool = True,
    strict: bool = False,
    workers: int | None = None,
    batch_size: int = 16,
) -> Iterator[Scored]:
    """Yield one :class:`Scored` per sample, in order.

    Args:
        detector: fitted; its device decides how the work is spread.
        samples: any iterable; it is read as results are consumed.
        after: called in the worker with each result (masks, overlays); what it returns is ``Scored.result``.
        keep_picture: keep the decoded image for ``after``; it is dropped before the result is handed out.
        keep_map: keep the score map in what is handed out.
        strict: raise at the first unreadable image instead of yielding a result with ``error``.
        workers: threads; None = the cores of this process, at most 8.
        batch_size: images per pass on a GPU.

    Raises:
        InputError: an image cannot be read and ``strict`` is set.
    """
    work = _Work(detector, after, keep_picture, keep_map, strict)
    count = workers or default_workers()
    source = iter(samples)
    if detector.device().type == "cpu":
        left = len(samples) if isinstance(samples, Sized) else None
        # Pictures that are kept take memory.
        groups = _groups(source, left, 1 if keep_picture else detector.at_once, count)
        with one_thread(), ThreadPoolExecutor(count, "adflow-score") as pool:
            for done in ordered(pool, work.whole, groups, ahead=2 * count):
                yield from done
    else:
        with ThreadPoolExecutor(count, "adflow-score") as pool:
            read = ordered(pool, work.read, source, ahead=2 * batch_size + count)
            while group := list(islice(read, batch_size)):
                work.score_together(group)
                yield from ordered(pool, work.finish, group, ahead=2 * count)


def _groups(source: Iterator[Sample], left: int | None, most: int, workers: int) -> Iterator[list[Sample]]:
    """Yield groups of at most ``most``, smaller towards the end of a known length: all workers shall end together."""
    size = most
    while True:
        if left is not None:
            size = max(1, min(most, left // workers))
            left -= size
        group = list(islice(source, size))
        if not group:
            return
        yield group


class _Work:
    """The stages of one image, shared by the CPU and GPU ways."""

    def __init__(
        self,
        detector: Detector,
        after: Callable[[Scored], Any] | None,
        keep_picture: bool,
        keep_map: bool,
        strict: bool,
    ) -> None:
        if detector.size is None:
            raise InputError("this detector has not been fitted", hint="Run `adflow fit` first.")
        self.size: tuple[int, int] = detector.size
        self.detector, self.after = detector, after
        self.keep_picture, self.keep_map, self.strict = keep_picture, keep_map, strict
        self.inputs: dict[int, tuple[np.ndarray, Box]] = {}

    def whole(self, samples: list[Sample]) -> list[Scored]:
        group = [self.read(sample) for sample in samples]
        good = [scored for scored in group if scored.error is None]
        if good:
            taken = [self.inputs.pop(id(scored)) for scored in good]
            images = torch.from_numpy(np.stack([array for array, _ in taken]))
            with counting("method") as seconds:
                scores = self.detector.score(images, [box for _, box in taken])
            maps, values = scores.map.numpy(), scores.image.tolist()
            for scored, score_map, value, (_, box) in zip(good, maps, values, taken, strict=True):
                self._take(scored, score_map, value, box)
                scored.seconds |= {name: took / len(good) for name, took in seconds.items()}
        return [self.finish(scored) for scored in group]

    def read(self, sample: Sample) -> Scored:
        scored = Scored(sample)
        began = time.perf_counter()
        try:
            # Always in full: a JPEG decoded smaller would score differently with and without an overlay.
            picture = read_image(sample.image)
        except InputError as error:
            self._fail(scored, error)
            return scored
        decoded = time.perf_counter()
        scored.original = picture.shape[:2]
        if self.keep_picture:
            scored.picture = picture
        self.inputs[id(scored)] = fit_to(picture, self.size, self.detector.keep_aspect)
        scored.seconds = {"decode": decoded - began, "resize": time.perf_counter() - decoded}
        return scored

    def score_together(self, group: list[Scored]) -> None:
        good = [scored for scored in group if scored.error is None]
        if not good:
            return
        began = time.perf_counter()
        taken = [self.inputs.pop(id(scored)) for scored in good]
        images = torch.from_numpy(np.stack([array for array, _ in taken]))
        parts = in_halves(self._batch, images, [box for _, box in taken])
        maps, values = (np.concatenate(found) for found in zip(*parts, strict=True))
        each = (time.perf_counter() - began) / len(good)
        for i, scored in enumerate(good):
            self._take(scored, maps[i], float(values[i]), taken[i][1])
            scored.seconds["score"] = each

    def _batch(self, images: torch.Tensor, boxes: list[Box]) -> tuple[np.ndarray, np.ndarray]:
        scores = self.detector.score(images.pin_memory() if torch.cuda.is_available() else images, boxes)
        return scores.map.cpu().numpy(), scores.image.cpu().numpy()

    def _take(self, scored: Scored, score_map: np.ndarray, value: float, box: Box) -> None:
        inside = score_map[box.top : box.top + box.height, box.left : box.left + box.width]
        scored.map, scored.image = np.ascontiguousarray(inside), value
        if not (np.isfinite(value) and np.isfinite(scored.map).all()):
            # A NaN compares as false: it would pass for good in silence.
            self._fail(scored, InputError(f"{show(scored.sample.image)}: its score is not finite (NaN or infinite)"))

    def _fail(self, scored: Scored, error: InputError) -> None:
        if self.strict:
            raise error
        scored.error, scored.image, scored.map = str(error), float("nan"), np.zeros((0, 0), np.float32)

    def finish(self, scored: Scored) -> Scored:
        if scored.error is None and self.after is not None:
            began = time.perf_counter()
            scored.result = self.after(scored)
            scored.seconds["after"] = time.perf_counter() - began
        scored.picture = None
        if not self.keep_map:
            scored.map = np.zeros((0, 0), np.float32)
        return scored
