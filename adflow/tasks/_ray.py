"""The same work on a Ray cluster: units of cells, and images to score.

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
from pathlib import Path
from typing import Any

import torch

from adflow.backbones import Backbone
from adflow.data import Sample
from adflow.detector import Detector
from adflow.errors import ResourceError, UnavailableError
from adflow.features import Divisible, ImageSource, extract
from adflow.pipeline import Scored, run
from adflow.tasks._jobs import Work, sendable

RETRIES = 3  # times that Ray starts a lost task again
# Images a task scores: enough to pay for sending the detector, few enough that a lost node costs little.
_MOST_IMAGES, _LEAST_IMAGES = 256, 8
_ROWS = 32  # images whose features come back together


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

    def _need(self) -> dict[str, Any]:
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
            return ray.remote(_serve).options(**need, **self._need()).remote(_here(), work, units[unit][at:])

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
        score = ray.remote(_score).options(**self._need())
        size = min(_MOST_IMAGES, max(_LEAST_IMAGES, -(-len(samples) // (4 * self.slots))))
        tasks = (
            score.remote(shared, device.type, [samples[i] for i in range(at, min(at + size, len(samples)))])
            for at in range(0, len(samples), size)
        )
        for found in self._in_order(tasks):
            yield from found

    def features(self, backbone: Backbone, images: ImageSource) -> Iterator[tuple[tuple[int, int], list[torch.Tensor]]]:
        """Yield (image size, pyramid of one row) of every image, in order; tasks take some images each.

        So one detector is fitted on many nodes: what costs most, decoding and backbone, is done on all of them, and
        the method learns here from the same features as ever.
        """
        import ray

        assert isinstance(images, Divisible)
        device = next(backbone.buffers()).device
        shared = ray.put((_here(), backbone.to("cpu"), self.cpus))
        backbone.to(device)
        skipped: list[tuple[Path, str]] = []
        take = ray.remote(_extract).options(**self._need())
        parts = (images.part(at, at + _ROWS) for at in range(0, len(images), _ROWS))
        for rows, bad in self._in_order(take.remote(shared, device.type, part) for part in parts):
            skipped += bad
            yield from rows
        images.leave_out(skipped)

    def _in_order(self, tasks: Iterator[Any]) -> Iterator[Any]:
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
                f"no Ray cluster at {address or os.environ.get('RAY_ADDRESS')}: {_first_line(error)}",
                hint="Start one with `ray start --head`, or leave --ray-address out to use this machine alone.",
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


def _extract(shared: tuple[Any, ...], device: str, images: Any) -> tuple[list[Any], list[tuple[Path, str]]]:
    """Run in the task: take some images through the backbone; return rows, and what could not be read."""
    here, backbone, workers = shared
    _settle(here)
    images.skipped.clear()
    rows = extract(backbone.to(device), images, workers) if len(images) else []
    return [(size, [level.cpu() for level in pyramid]) for size, pyramid in rows], images.skipped


def _failure(error: Exception) -> Exception:
    """Return what a task raised, or that it was lost for good."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception):
        return cause
    return ResourceError(f"its task was lost {1 + RETRIES} times, the last time: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
