"""The same work on a Ray cluster: units of cells, images to score, and the images of one fit.

Ray places each task on a node that has what it asks for, runs it again when its node or process is lost, and brings
results and logs to this process. Data sets, ``--out`` and detectors must lie in folders that all nodes see by the
same names; nothing else is shared. Results are those of one machine, bit for bit, on processors of one kind.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from adflow._rows import Shape, Store, SubsetStore
from adflow.backbones import Backbone
from adflow.data import Sample
from adflow.detector import Detector, Progress
from adflow.errors import InputError, ResourceError, UnavailableError
from adflow.features import DTYPES, Divisible, FeatureBank, ImageSource, T, extract
from adflow.pipeline import Scored, run
from adflow.tasks._jobs import Work, sendable

RETRIES = 3  # times that Ray starts a lost task again
# Images a task takes: enough to pay for sending a detector, few enough that a lost node costs little.
_MOST_IMAGES, _LEAST_IMAGES = 256, 8
_CHUNK = 64  # images whose features lie together, at most


@dataclass(frozen=True)
class Cluster:
    """A connection to a Ray cluster, and what every task asks of its node; made by :func:`connect`.

    Attributes:
        cpus: CPUs of a task; it works on so many images at once.
        gpus: GPUs of a task.
    """

    cpus: int = 1
    gpus: float = 0

    @property
    def slots(self) -> int:
        """Return how many tasks the cluster can run at once, at least 1."""
        import ray

        there = ray.cluster_resources()
        found = there.get("CPU", 0) // self.cpus
        return max(1, int(min(found, there.get("GPU", 0) // self.gpus) if self.gpus else found))

    def need(self) -> dict[str, Any]:
        """Return what a task asks for, as options of Ray."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, "max_retries": RETRIES}

    def units(
        self, work: Work, units: Sequence[Sequence[Any]], memory: Sequence[int] | None = None
    ) -> Iterator[tuple[int, int, Any]]:
        """Run ``work`` on every unit, each a task; as :func:`adflow.tasks._jobs.run_units`.

        Args:
            work: items to one result each, in order.
            units: what can be pickled; none of them empty.
            memory: bytes each unit asks for; None = none.
        """
        import ray

        # What no node has would never start: such a unit gets a node with the most memory.
        most = max((node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"]), default=0)

        def start(unit: int, at: int) -> Any:
            # Streaming: a result is here when it is made, and stays when its node is lost later.
            need = {"num_returns": "streaming", "memory": min(memory[unit], most) if memory else None}
            return ray.remote(_serve).options(**need, **self.need()).remote(_here(), work, units[unit][at:])

        streams = {start(unit, 0): (unit, 0) for unit in range(len(units))}
        try:
            while streams:
                for stream in ray.wait(list(streams), num_returns=1)[0]:
                    unit, at = streams.pop(stream)
                    try:
                        result = ray.get(next(stream))
                        if at + 1 < len(units[unit]):
                            streams[stream] = unit, at + 1
                    except ray.exceptions.RayError as error:
                        result = _failure(error)
                        if at + 1 < len(units[unit]):
                            streams[start(unit, at + 1)] = unit, at + 1
                    yield unit, at, result
        finally:
            for stream in streams:
                ray.cancel(stream, force=True)

    def images(
        self,
        detector: Detector,
        samples: Sequence[Sample],
        *,
        after: Callable[[Scored], Any] | None = None,
        keep_picture: bool = False,
        keep_map: bool = True,
        strict: bool = False,
        workers: int | None = None,
    ) -> Iterator[Scored]:
        """Yield one result per sample, in order, as :func:`adflow.pipeline.run`; tasks take some images each.

        Raises:
            InputError: an image cannot be read and ``strict`` is set.
            ResourceError: a task was lost again and again.
        """
        import ray

        device = detector.device()
        shared = ray.put((_here(), detector.to("cpu"), after, keep_picture, keep_map, strict, workers or self.cpus))
        detector.to(device)
        score = ray.remote(_score).options(**self.need())
        size = min(_MOST_IMAGES, max(_LEAST_IMAGES, -(-len(samples) // (4 * self.slots))))
        tasks = (
            score.remote(shared, device.type, [samples[i] for i in range(at, min(at + size, len(samples)))])
            for at in range(0, len(samples), size)
        )
        for found in self.in_order(tasks):
            yield from found

    def bank(self, backbone: Backbone, images: ImageSource, dtype: str, progress: Progress | None) -> FeatureBank:
        """Pass every image through ``backbone`` on the nodes, and leave the features in their object stores.

        So one detector is fitted on many nodes: decoding, backbone and what a method learns part by part are done
        there. Features of a node that is lost are made again.

        Raises:
            InputError: no image can be read, or features are not finite.
            ResourceError: a task was lost again and again.
        """
        import ray

        assert isinstance(images, Divisible)
        device = next(backbone.buffers()).device
        shared = ray.put((_here(), backbone.to("cpu"), dtype, self.cpus))
        backbone.to(device)
        take = ray.remote(_extract).options(num_returns=2, **self.need())
        step = min(_CHUNK, max(_LEAST_IMAGES, -(-len(images) // (4 * self.slots))))
        chunks: list[Any] = []

        def start() -> Iterator[Any]:
            for at in range(0, len(images), step):
                facts, chunk = take.remote(shared, device.type, images.part(at, at + step), at)
                chunks.append(chunk)
                yield facts

        counts, skipped = [], []
        size, shapes = (0, 0), list[Shape]()
        for count, *found, bad in self.in_order(start()):
            counts.append(count)
            skipped += bad
            if count:
                size, shapes = found
            if progress:
                progress(sum(counts), len(images), "features")
        images.leave_out(skipped)
        if not shapes:
            raise InputError("there is no image to take features from, expected at least 1")
        levels = [_Chunks(chunks, counts, level, shape, DTYPES[dtype]) for level, shape in enumerate(shapes)]
        return _Spread(self, levels, range(sum(counts)), size)

    def in_order(self, tasks: Iterator[Any]) -> Iterator[Any]:
        """Yield the result of every task in order, with a few more than can run at once under way."""
        import ray

        waiting = deque(islice(tasks, 2 * self.slots))
        try:
            while waiting:
                try:
                    found = ray.get(waiting[0])
                except ray.exceptions.RayError as error:
                    raise _failure(error) from None
                waiting.popleft()
                waiting.extend(islice(tasks, 1))
                yield found
        finally:
            for task in waiting:
                ray.cancel(task, force=True)


def connect(address: str | None, *, cpus: int = 1, gpus: float = 0) -> Cluster:
    """Return a connection to the cluster at ``address``; None = the one RAY_ADDRESS names, else this machine alone.

    Raises:
        UnavailableError: ray is not installed, or no cluster answers.
    """
    try:
        import ray
    except ImportError:
        raise UnavailableError(
            "--executor ray needs the package ray, which is not installed",
            hint="Run `pip install 'adflow[ray]'`, then the same command.",
        ) from None
    if not ray.is_initialized():
        known = address or os.environ.get("RAY_ADDRESS")
        own = {} if known else {"include_dashboard": False}  # progress and results come here
        try:
            ray.init(known or "local", logging_level=logging.WARNING, **own)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UnavailableError(
                f"no Ray cluster at {known or 'this machine'}: {_first_line(error)}",
                hint="Start one with `ray start --head`, or leave --ray-address out to use this machine alone. "
                "One with a token wants RAY_AUTH_MODE=token and its ~/.ray/auth_token on this machine too.",
            ) from error
    return Cluster(cpus, gpus)


def _here() -> dict[str, str]:
    """Return what a task needs so that names and paths mean there what they mean here."""
    return {"PWD": os.getcwd()} | {k: v for k, v in os.environ.items() if k.startswith("ADFLOW_")}  # noqa: PTH109


def _settle(here: dict[str, str]) -> None:
    os.environ.update(here)
    os.chdir(here["PWD"])
    # One thread, as every process that adflow starts: kernels round differently with more.
    torch.set_num_threads(1)


def _serve(here: dict[str, str], work: Work, unit: Sequence[Any]) -> Iterator[Any]:
    """Run in the task: yield each result as it comes."""
    _settle(here)
    for result in work(unit):
        yield sendable(result)


def _score(shared: tuple[Any, ...], device: str, samples: list[Sample]) -> list[Scored]:
    """Run in the task: score some images."""
    here, detector, after, keep_picture, keep_map, strict, workers = shared
    _settle(here)
    found = run(
        detector.to(device),
        samples,
        after=after,
        keep_picture=keep_picture,
        keep_map=keep_map,
        strict=strict,
        workers=workers,
    )
    return list(found)


def _extract(shared: tuple[Any, ...], device: str, images: Any, first: int) -> tuple[tuple[Any, ...], list[Any]]:
    """Run in the task: take some images through the backbone; return facts, and their features as they are kept."""
    here, backbone, dtype, workers = shared
    _settle(here)
    images.skipped.clear()
    size, levels = extract(backbone.to(device), images, dtype=dtype, workers=workers, first=first)
    count, shapes = (len(levels[0]) if levels else 0), [tuple(level.shape[1:]) for level in levels]
    kept = [level.view(torch.int16) if level.dtype is torch.bfloat16 else level for level in levels]
    return (count, size, shapes, images.skipped), [level.numpy() for level in kept]


def _learn(shared: tuple[Any, ...], rows: Sequence[int], first: int) -> Any:
    """Run in the task: do what a method does with a part of the images."""
    here, work, chunks, size = shared
    _settle(here)
    part = FeatureBank([SubsetStore(level, rows) for level in chunks], size, 1, "features: on the cluster", False)
    part.first = first
    return work(part)


class _Chunks(Store):
    """One level of features that lie in the object stores of a cluster, some rows together.

    Args:
        chunks: references to lists of arrays [n, C, h, w], one per level.
        counts: rows of each.
        level: which array of each.
        shape: of a row.
        dtype: of a row.
    """

    def __init__(
        self, chunks: Sequence[Any], counts: Sequence[int], level: int, shape: Shape, dtype: torch.dtype
    ) -> None:
        super().__init__(shape, dtype)
        self.chunks, self.level = chunks, level
        self.starts = np.cumsum([0, *counts])
        self.count = int(self.starts[-1])

    def append(self, row: torch.Tensor) -> None:
        raise InputError("features on a cluster cannot grow", hint="Build a bank of all images.")

    def finish(self) -> None:
        """Nothing to do: the rows are there."""

    def whole(self) -> torch.Tensor:
        return self.rows(range(self.count))

    def rows(self, indices: Sequence[int]) -> torch.Tensor:
        import ray

        self.check_open()
        wanted = np.asarray(indices, dtype=np.int64)
        found = torch.empty((len(wanted), *self.shape), dtype=self.dtype)
        owner = np.searchsorted(self.starts, wanted, side="right") - 1
        for number in np.unique(owner):
            here = np.flatnonzero(owner == number)
            try:
                chunk = ray.get(self.chunks[number])[self.level]
            except ray.exceptions.RayError as error:
                raise _failure(error) from None
            found[torch.from_numpy(here)] = torch.from_numpy(chunk[wanted[here] - self.starts[number]]).view(self.dtype)
        return found

    def close(self) -> None:
        self.chunks = []
        self.closed = True


class _Spread(FeatureBank):
    """Some rows of features on a cluster: what is learned part by part is learned there, all else is read from here."""

    def __init__(self, cluster: Cluster, chunks: Sequence[_Chunks], rows: Sequence[int], size: tuple[int, int]) -> None:
        super().__init__([SubsetStore(level, rows) for level in chunks], size, 1, "features: on the cluster", False)
        self._cluster, self._chunks, self._rows = cluster, chunks, rows

    def __reduce__(self) -> tuple[Any, ...]:
        # A task that gets these features reads them where it is: it starts no tasks of its own.
        return FeatureBank, (self._stores, self.size, self.views, self.note, self.on_disk)

    def subset(self, images: Sequence[int]) -> FeatureBank:
        super().subset(images)  # raises where there is no such image
        return _Spread(self._cluster, self._chunks, [self._rows[i] for i in images], self.size)

    def parts(self, work: Callable[[FeatureBank], T]) -> Iterator[T]:
        import ray

        shared = ray.put((_here(), work, self._chunks, self.size))
        learn = ray.remote(_learn).options(**self._cluster.need())
        yield from self._cluster.in_order(
            learn.remote(shared, [self._rows[i] for i in part], part.start) for part in self._in_parts()
        )


def _failure(error: Exception) -> Exception:
    """Return what a task raised, or that it was lost for good."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception):
        return cause
    return ResourceError(f"its task was lost {1 + RETRIES} times, the last time: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
