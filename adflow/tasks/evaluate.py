"""``evaluate``: how good detectors are on labelled images, cell by cell, in a way that can be stopped and repeated."""

from __future__ import annotations

import contextlib
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from adflow._files import make_folder, sha256_of, write_text
from adflow._lock import claim
from adflow._threads import default_workers, one_thread
from adflow.detector import Detector, Progress
from adflow.detector_file import digest, load_detector
from adflow.errors import AdflowError, InputError
from adflow.runs import run_name
from adflow.tasks._bank import TrainFeatures, can_share
from adflow.tasks._cells import Job, Measuring, read_cell, write_cell
from adflow.tasks._device import choose_device, set_precision
from adflow.tasks._jobs import run_units
from adflow.tasks._measure import Evaluation, evaluate_detector
from adflow.tasks._pictures import Drawer, draw
from adflow.tasks._point import OperatingPoint, operating_point
from adflow.tasks._ray import Cluster
from adflow.tasks.fit import fit_detector, prepare, save_run

__all__ = ["Done", "Outcome", "evaluate", "evaluate_detector"]


# Costs of a cell that stand in its row.
_SHOWN = ("fit_seconds", "ms_per_image", "detector_mb")


@dataclass(frozen=True)
class Done:
    """One cell is done, was there before, or failed.

    Attributes:
        job: which.
        cell: its file's content; None when it failed.
        error: why it failed.
        reused: whether it was there before.
        done: how many cells are done.
        total: of how many.
        left: estimated seconds until the last one is done; None when nothing is known.
    """

    job: Job
    cell: dict[str, Any] | None
    error: str | None
    reused: bool
    done: int
    total: int
    left: float | None


@dataclass
class Outcome:
    """What an evaluation gave.

    Attributes:
        cells: contents of the cells that succeeded, in the order planned.
        rows: one row per planned cell, failed ones with their "error".
        failed: the failed ones, job and reason.
        reused: number of cells that were there before.
    """

    cells: list[dict[str, Any]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    failed: list[tuple[Job, str]] = field(default_factory=list)
    reused: int = 0


@dataclass(frozen=True)
class _Item:
    """A job with what a process needs to do it."""

    job: Job
    measuring: Measuring
    out: Path
    keep: Path | None
    command: str | None
    stale: str | None = None  # sha256 of a cell that is there and is to be made anew
    features: TrainFeatures | None = None  # of the training images, where the nodes of a cluster have extracted them

    def made(self) -> dict[str, Any] | None:
        """Return the cell when it is there, and not the one that is to be made anew."""
        path = self.out / "cells" / f"{self.job.name}.json"
        return None if self.stale is not None and _sha256(path) == self.stale else read_cell(path, self.job.key)


def evaluate(
    jobs: Sequence[Job],
    measuring: Measuring,
    out: Path,
    *,
    processes: int = 1,
    cluster: Cluster | None = None,
    fresh: bool = False,
    keep: Path | None = None,
    command: str | None = None,
    each: Callable[[Done], None] | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Compute the cells that are not there yet, each written when it is done.

    Detectors are fitted with one torch thread, whatever the number of processes: results are the same bits.

    Args:
        jobs: from :func:`adflow.tasks._cells.plan_fits` or ``plan_model``.
        measuring: as they were planned with.
        out: folder; cells go to ``out/cells``, pictures to ``out/overlays``.
        processes: cells at once, each in a process of its own when more than one.
        cluster: where cells run instead; ``out``, data and ``keep`` must be folders that all its nodes see.
        fresh: compute cells that are there already, too.
        keep: folder of runs in which fitted detectors are kept; None = they are forgotten.
        command: what the user typed, for the provenance of kept detectors.
        each: called when a cell is done.
        progress: called with (done, total, message).

    Raises:
        AdflowError: the error of the only cell there is; with several a failed one becomes a row.
    """
    folder = make_folder(out / "cells")
    processes = cluster.slots if cluster else processes
    found: dict[int, dict[str, Any]] = {}
    errors: dict[int, str] = {}
    clock = _Clock(jobs)
    pending = []

    def tell(index: int, cell: dict[str, Any] | None, error: str | None, reused: bool = False) -> None:
        if cell is not None:
            found[index] = cell
        else:
            errors[index] = error or "?"
        done = len(found) + len(errors)
        if progress:
            progress(done, len(jobs), "cells")
        if each:
            each(Done(jobs[index], cell, error, reused, done, len(jobs), clock.left(found, errors)))

    for index, job in enumerate(jobs):
        cell = None if fresh or job.error else read_cell(folder / f"{job.name}.json", job.key)
        if cell is not None and keep is not None and job.options and not _kept(keep, job, cell):
            cell = None
        if cell is not None:
            tell(index, cell, None, reused=True)
        elif job.error:
            if len(jobs) == 1:
                raise job.error
            tell(index, None, str(job.error))
        else:
            pending.append(index)
    reused = len(found)
    workers = cluster.cpus if cluster else measuring.workers or max(1, default_workers() // max(1, processes))
    measuring = replace(measuring, workers=workers)
    clock.start()
    units, shared = _groups(jobs, pending), dict[int, TrainFeatures]()
    if cluster and len(units) < processes:
        shared = _extracted(jobs, units, cluster, progress)
        units = [unit for group in units for unit in ([[i] for i in group] if group[0] in shared else [group])]
    units = _divided(units, processes)
    # A unit that is begun again takes the cells that it has made; what was there before stays until then.
    items = [
        [
            _Item(jobs[i], measuring, out, keep, command, _sha256(folder / f"{jobs[i].name}.json"), shared.get(i))
            for i in unit
        ]
        for unit in units
    ]
    results = (
        cluster.units(work, items, [max(jobs[i].memory for i in unit) for unit in units])
        if cluster
        else _results(items, processes, progress, alone=len(jobs) == 1)
    )
    for unit, place, result in results:
        index = units[unit][place]
        clock.took(index)
        if isinstance(result, Exception):
            tell(index, None, _reason(result))
        else:
            cell = items[unit][place].made()
            missing = None if cell else f"its file did not come: {folder} must be a folder that all nodes see"
            tell(index, cell, missing)
    rows = [_row(found[i]) if i in found else {**job.head, "error": errors[i]} for i, job in enumerate(jobs)]
    cells = [found[i] for i in sorted(found)]
    return Outcome(cells, rows, [(jobs[i], errors[i]) for i in sorted(errors)], reused)


def _sha256(path: Path) -> str | None:
    try:
        return sha256_of(path)
    except OSError:
        return None


def _kept(keep: Path, job: Job, cell: dict[str, Any]) -> bool:
    """Return whether the run of a cell is there, with the very detector that was measured."""
    try:
        return str(cell["detector"]) in (_run_folder(keep, job) / "fit.json").read_text(encoding="utf-8")
    except OSError:
        return False


def _run_folder(keep: Path, job: Job) -> Path:
    return keep / run_name(job.data.name, job.head["method"], job.head["backbone"], job.head["seed"] or 0)


def _row(cell: dict[str, Any]) -> dict[str, Any]:
    """Return the table row of a cell: its results, and what they cost."""
    row: dict[str, Any] = cell["row"] | {k: v for k, v in cell["cost"].items() if k in _SHOWN}
    return row


def _groups(jobs: Sequence[Job], pending: Sequence[int]) -> list[list[int]]:
    """Return the cells that share features together: units that one process does, one cell after the other."""
    groups: dict[Any, list[int]] = {}
    for index in pending:
        job = jobs[index]
        groups.setdefault(job.group if job.group and job.group[-1] else index, []).append(index)
    return list(groups.values())


def _extracted(
    jobs: Sequence[Job], groups: Sequence[Sequence[int]], cluster: Cluster, progress: Progress | None
) -> dict[int, TrainFeatures]:
    """Let all nodes extract the features that the cells of a group share; return them by cell.

    A group whose features cannot be taken is left out: its cells find out why themselves.
    """
    found: dict[int, TrainFeatures] = {}
    for group in groups:
        job = jobs[group[0]]
        if len(group) == 1 or job.options is None:
            continue
        resources = replace(job.options.resources, workers=cluster.cpus, spread=cluster.bank)
        with contextlib.suppress(AdflowError):
            detector, size, keep_aspect = prepare(job.data, job.options)
            if can_share(detector, job.options.settings):
                detector.to(choose_device(job.options.device))
                strict = job.options.strict
                features = TrainFeatures(detector, job.data.train, size, keep_aspect, strict, resources, progress)
                found |= dict.fromkeys(group, features)
    return found


def _divided(units: list[list[int]], processes: int) -> list[list[int]]:
    """Halve the longest units until every process has one; each half extracts the features it needs."""
    while units and len(units) < processes and max(map(len, units)) > 1:
        longest = max(range(len(units)), key=lambda i: len(units[i]))
        unit = units.pop(longest)
        units[longest:longest] = [unit[: (len(unit) + 1) // 2], unit[(len(unit) + 1) // 2 :]]
    return units


def _results(
    items: list[list[_Item]], processes: int, progress: Progress | None, alone: bool
) -> Iterator[tuple[int, int, Any]]:
    if processes > 1 and sum(map(len, items)) > 1:
        yield from run_units(work, items, processes)
        return
    with one_thread():
        for number, unit in enumerate(items):
            for place, result in enumerate(work(unit, progress)):
                if alone and isinstance(result, Exception):
                    raise result
                yield number, place, result


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, AdflowError | RuntimeError) else f"{type(error).__name__}: {error}"


def work(unit: Sequence[_Item], progress: Progress | None = None) -> Iterator[Exception | None]:
    """Compute the cells of a unit one after the other; yield None or what went wrong for each of them."""
    own: TrainFeatures | None = None
    try:
        for item in unit:
            failed: Exception | None = None
            job = item.job
            if item.made() is not None:
                yield None  # made before the node of this unit was lost
                continue
            try:
                if job.options is None:
                    _measure_model(item, progress)
                else:
                    resources = replace(job.options.resources, workers=item.measuring.workers)
                    job = replace(job, options=replace(job.options, resources=resources))
                    assert job.options is not None
                    detector, size, keep_aspect = prepare(job.data, job.options)
                    if item.features is None and own is None and can_share(detector, job.options.settings):
                        detector.to(choose_device(job.options.device))
                        own = TrainFeatures(
                            detector,
                            job.data.train,
                            size,
                            keep_aspect,
                            job.options.strict,
                            job.options.resources,
                            progress,
                        )
                    features = item.features or own
                    _measure_fitted(replace(item, job=job), detector, size, keep_aspect, features, progress)
            except Exception as error:
                # Hours of work must not end with one cell: whatever it is becomes its row, with the trace beside it.
                failed = error
                write_text(item.out / "cells" / f"{job.name}.failed.txt", traceback.format_exc())
            yield failed
    finally:
        if own is not None:
            own.close()


def _measure_fitted(
    item: _Item,
    detector: Detector,
    size: tuple[int, int],
    keep_aspect: bool,
    features: TrainFeatures | None,
    progress: Progress | None,
) -> None:
    job = item.job
    assert job.options is not None
    # Named by the key: the state of another fit is never gone on with.
    checkpoint = item.out / "cells" / f".{job.name}-{job.key[:8]}.checkpoint"
    options = replace(job.options, resources=replace(job.options.resources, checkpoint=checkpoint))
    fitted = fit_detector(detector, job.data.train, options, size, keep_aspect, progress, features)
    if item.keep is not None:
        folder = _run_folder(item.keep, job)
        with claim(folder):
            save_run(detector, job.data, options, fitted, folder, item.command)
    cost = {"fit_seconds": fitted["seconds"]["fit"]}
    notes = [f"skipped {line}" for line in fitted["skipped"]]
    _measure(item, detector, fitted["digest"], cost, notes, progress)
    checkpoint.unlink(missing_ok=True)


def _measure_model(item: _Item, progress: Progress | None) -> None:
    job = item.job
    assert job.model is not None
    detector = load_detector(job.model, device=choose_device(job.device), weights=job.weights)
    note = set_precision(detector, job.precision)
    notes = [note] if note else []
    learned_from = detector.provenance.get("data")
    if learned_from and learned_from != job.data.name:
        notes.append(f"this detector learned from {learned_from}, not from {job.data.name}")
    seconds = detector.provenance.get("seconds")
    cost = {} if seconds is None else {"fit_seconds": float(seconds)}
    learned = digest({k: v.cpu() for k, v in detector.learned().items()}, {})
    _measure(item, detector, learned, cost, notes, progress)


def _measure(
    item: _Item,
    detector: Detector,
    learned: str,
    cost: dict[str, float],
    notes: list[str],
    progress: Progress | None,
) -> None:
    """Measure a fitted detector, draw its pictures, and write the cell last: when it is there, all of it is."""
    job, measuring = item.job, item.measuring
    point, why = point_of(detector, measuring)
    folder = item.out / "overlays" / job.name
    drawer = None
    if measuring.overlays and point is not None:
        drawer = Drawer(detector, job.data, point, folder, measuring.overlay_size)
    found: Evaluation = evaluate_detector(
        detector,
        job.data,
        point=point,
        strict=measuring.strict,
        workers=measuring.workers,
        memory=measuring.map_memory,
        after=drawer,
        progress=progress,
    )
    pictures = draw(detector, job.data, found, point, measuring, folder, drawer)
    found.notes = [*notes, *([why] if why else []), *found.notes]
    found.cost |= cost | {"detector_mb": sum(t.numel() * t.element_size() for t in detector.learned().values()) / 1e6}
    write_cell(
        item.out / "cells",
        job,
        found,
        {
            "point": None if point is None else {"kind": point.kind, "value": point.value, "promise": point.promise},
            "pictures": pictures,
            "detector": learned,
            "provenance": {
                "device": str(detector.device()),
                "threads": 1 if job.options is not None else torch.get_num_threads(),
                "fingerprint": job.data.fingerprint(),
                "weights": detector.backbone.weights,
                "params": detector.params(),
                "precision": detector.backbone.precision,
            },
        },
    )


def point_of(detector: Detector, measuring: Measuring) -> tuple[OperatingPoint | None, str | None]:
    """Return the operating point, or why there is none.

    Raises:
        InputError: the one that was asked for cannot be kept by this detector.
    """
    asked = (measuring.nfa, measuring.flag_rate, measuring.threshold)
    if all(wish is None for wish in asked) and detector.calibration is None:
        return None, "no calibration, so no operating point: its columns are empty (give --threshold for some)"
    try:
        return operating_point(
            detector, nfa=measuring.nfa, flag_rate=measuring.flag_rate, threshold=measuring.threshold
        ), None
    except InputError as error:
        if any(wish is not None for wish in asked):
            raise
        return None, f"no operating point: {error}"


class _Clock:
    """Estimates the time left from what cells of the same method took."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.methods = [job.head["method"] for job in jobs]
        self.seconds: dict[str, list[float]] = {}
        self.last = time.monotonic()

    def start(self) -> None:
        self.last = time.monotonic()

    def took(self, index: int) -> None:
        now = time.monotonic()
        # With several processes a cell ends while others run: the gap since the last end is its share of the time.
        self.seconds.setdefault(self.methods[index], []).append(now - self.last)
        self.last = now

    def left(self, found: dict[int, Any], errors: dict[int, str]) -> float | None:
        """Return the estimated seconds until all cells are done; None before the first one is."""
        if not self.seconds:
            return None
        typical = {method: statistics.mean(values) for method, values in self.seconds.items()}
        other = statistics.mean(typical.values())
        rest = [m for i, m in enumerate(self.methods) if i not in found and i not in errors]
        return sum(typical.get(method, other) for method in rest)
