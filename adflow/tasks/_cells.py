"""Cells of an evaluation: what determines a result, and the file that keeps it.

A cell is one class under one method and seed (or one fitted detector). Its file appears whole or not at all and
carries a key over everything that determines the result: so an evaluation that was killed goes on where it stopped,
and a cell of other data, settings or code is never taken for this one.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adflow import __version__, methods
from adflow._files import write_text
from adflow._table import plain
from adflow._video import is_frame
from adflow.data import Dataset
from adflow.detector_file import read_header
from adflow.errors import AdflowError, InputError, UsageError
from adflow.metrics import PixelHistograms
from adflow.runs import run_name
from adflow.tasks._bank import bank_key, image_bytes
from adflow.tasks._device import choose_device
from adflow.tasks._measure import MAP_MEMORY, Evaluation, map_bytes, streaming_note, streams
from adflow.tasks.fit import PROCESS, FitOptions, prepare

FORMAT = 1
# Modules that look at results and do not make them.
_LOOKS = {"adflow.report", "adflow.published", "adflow.fetch", "adflow.zoo", "adflow.tasks.segment"}


@dataclass(frozen=True)
class Measuring:
    """How cells are measured; the same for all cells of an evaluation.

    Attributes:
        nfa: operating point, see :func:`adflow.tasks._point.operating_point`; at most one of the three.
        flag_rate: likewise.
        threshold: likewise.
        strict: an unreadable image is fatal.
        map_memory: bytes of maps and exact pixel metrics beyond which pixels are streamed.
        pictures: how many of the worst defective and good images are drawn.
        overlays: draw every test image.
        overlay_size: longer side of each picture in pixels; None = the original size.
        workers: images at once; does not change any result.
    """

    nfa: float | None = None
    flag_rate: float | None = None
    threshold: float | None = None
    strict: bool = False
    map_memory: int = MAP_MEMORY
    pictures: int = 6
    overlays: bool = False
    overlay_size: int | None = 320
    workers: int | None = None


@dataclass(frozen=True)
class Job:
    """A cell to compute: fit and measure, or load and measure.

    Attributes:
        data: one class.
        name: stem of its file.
        key: sha256 over everything that determines the result.
        head: dataset, class, method, backbone, recipe and seed, for tables and talk.
        options: how to fit; None when there is a ``model``.
        model: detector file.
        device: where a model runs.
        precision: "float32" or "bf16" of a model's backbone.
        weights: local weight file of a model's backbone.
        group: jobs of one group can share a feature bank.
        memory: bytes it takes at about: what a cluster is asked for.
        error: why this cell cannot be computed, known before the start.
        note: what to tell before the start.
    """

    data: Dataset
    name: str
    key: str
    head: dict[str, Any]
    options: FitOptions | None = None
    model: Path | None = None
    device: str = "auto"
    precision: str = "float32"
    weights: Path | None = None
    group: tuple[Any, ...] = ()
    memory: int = 0
    error: AdflowError | None = None
    note: str | None = None


def plan_fits(
    classes: Sequence[Dataset],
    names: Sequence[str],
    seeds: Sequence[int],
    options: FitOptions,
    measuring: Measuring,
) -> list[Job]:
    """Return the cells of classes by methods by seeds, in this order.

    Raises:
        UsageError: an unknown method, recipe, backbone or setting; whatever else is wrong with a method becomes the
            error of its cells.
    """
    facts: dict[str, Any] = {}
    jobs = []
    codes = {name: code_digest(name) for name in names}
    for data in classes:
        state = data_state(data)
        for name in names:
            recipe = methods.get(name).recipe_for(options.recipe, data.class_)
            known = json.dumps([name, plain(recipe)], sort_keys=True)
            if known not in facts:
                facts[known] = _facts(data, replace(options, method=name))
            found = facts[known]
            for seed in seeds:
                chosen = replace(options, method=name, seed=seed)
                head = _head(data, name, found.get("backbone", options.backbone or "?"), options.recipe, seed)
                stem = run_name(data.name, name, head["backbone"], 0) + f"-s{seed}"
                key = _digest(
                    {
                        "fit": found.get("fit"),
                        "seed": seed,
                        "holdout": options.holdout,
                        "folds": options.folds,
                        "dtype": options.resources.dtype,
                        "device": choose_device(options.device).type,
                    }
                    | _common(data, state, measuring, found.get("size"), codes[name])
                )
                group = (data.name, str(data.root), found.get("group"))
                note = _note(data, found.get("size"), measuring)
                bank = min(options.resources.memory, len(data.train) * found.get("image_bytes", 0))
                memory = PROCESS + bank + _maps(data, found.get("size"), measuring)
                error = found.get("error")
                jobs.append(Job(data, stem, key, head, chosen, group=group, memory=memory, error=error, note=note))
    return jobs


def plan_model(
    data: Dataset,
    model: Path,
    measuring: Measuring,
    *,
    device: str = "auto",
    precision: str = "float32",
    weights: Path | None = None,
) -> Job:
    """Return the cell of a fitted detector on one class.

    Raises:
        DetectorFileError: no such file, or a damaged one.
    """
    header = read_header(model)
    made = header.get("provenance") or {}
    head = _head(data, header["method"], header["backbone"]["name"], made.get("recipe"), made.get("seed"))
    height, width = header.get("size") or (0, 0)
    size = int(height), int(width)
    key = _digest(
        {"model": header.get("digest"), "precision": precision, "device": choose_device(device).type}
        | _common(data, data_state(data), measuring, size, code_digest(header["method"]))
    )
    run = model.parent.name if model.stem == "detector" else model.stem
    stem = run_name(data.name, run, str(header.get("digest"))[:8], 0)
    memory = PROCESS + _maps(data, size, measuring)
    note = _note(data, size, measuring)
    return Job(data, stem, key, head, None, model, device, precision, weights, memory=memory, note=note)


def unique(jobs: Sequence[Job]) -> list[Job]:
    """Return the jobs without repetitions; of different ones with one name, the later get part of their key."""
    kept: dict[str, Job] = {job.key + job.name: job for job in jobs}
    names: set[str] = set()
    found = []
    for job in kept.values():
        name = job.name if job.name.casefold() not in names else f"{job.name}-{job.key[:8]}"
        names.add(name.casefold())
        found.append(replace(job, name=name))
    return found


def _note(data: Dataset, size: tuple[int, int] | None, measuring: Measuring) -> str | None:
    """Return what to tell before the start: that pixels will be streamed."""
    count = sum(sample.label is not None for sample in data.test)
    if size is None or not streams(count, size, measuring.map_memory):
        return None
    return f"{data.name}: {streaming_note(count, size, measuring.map_memory)}"


def _maps(data: Dataset, size: tuple[int, int] | None, measuring: Measuring) -> int:
    """Return the bytes that maps take while they are measured; none to speak of when pixels are streamed."""
    count = sum(sample.label is not None for sample in data.test)
    if size is None or streams(count, size, measuring.map_memory):
        return 0
    return map_bytes(count, size)


def _facts(data: Dataset, options: FitOptions) -> dict[str, Any]:
    """Return what determines a fit besides data and seed, and which features it needs."""
    try:
        detector, size, keep = prepare(data, options)
    except UsageError:
        raise
    except AdflowError as error:
        return {"error": error}
    backbone = detector.backbone
    shared = bank_key(detector, size, keep)
    fit = [options.method, detector.params(), backbone.name, backbone.taps, backbone.weights, size, keep]
    image = image_bytes(detector, size)
    return {"backbone": backbone.name, "fit": plain(fit), "group": shared, "size": size, "image_bytes": image}


def _head(data: Dataset, method: str, backbone: str, recipe: str | None, seed: int | None) -> dict[str, Any]:
    return {
        "dataset": data.family,
        "class": data.class_,
        "method": method,
        "backbone": backbone,
        "recipe": recipe,
        "seed": seed,
    }


def _common(data: Dataset, state: str, measuring: Measuring, size: tuple[int, int] | None, code: str) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "adflow": __version__,
        "code": code,
        "torch": torch.__version__,
        "data": [data.name, str(data.root), state],
        "point": [measuring.nfa, measuring.flag_rate, measuring.threshold],
        "streaming": _note(data, size, measuring) is not None,
        "strict": measuring.strict,
        "pictures": [measuring.pictures, measuring.overlays, measuring.overlay_size],
    }


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain(facts), sort_keys=True).encode()).hexdigest()


def data_state(data: Dataset) -> str:
    """Return the sha256 over the fingerprint and the times of change: an edited file is another data set."""
    total = hashlib.sha256(data.fingerprint().encode())
    for sample in (*data.train, *data.test):
        for path in (sample.image, sample.mask):
            if path is not None:
                file = path.parent if is_frame(path) else path
                total.update(str(file.stat().st_mtime_ns if file.exists() else -1).encode() + b"\0")
        total.update(f"{sample.split}{sample.label}{sample.defect}{sample.mask_index}".encode())
    return total.hexdigest()


def code_digest(method: str) -> str:
    """Return the sha256 over the sources a result comes from: the method's module and all it imports from adflow.

    So a cell is computed again after a change of its method or of the metrics, and not after one of another method.
    Modules that only look at results count as little as the command line.
    """
    module = methods.get(method).__module__
    waiting, seen = {module, "adflow.tasks.fit", "adflow.tasks._measure", "adflow.tasks._pictures"}, set[str]()
    total = hashlib.sha256()
    sources: dict[str, bytes] = {}
    while waiting:
        name = waiting.pop()
        seen.add(name)
        source = _source(name)
        if source is not None and name not in _LOOKS:
            sources[name] = source
            waiting |= {found for found in _imported(source.decode()) if found not in seen}
    for name in sorted(sources):
        total.update(name.encode() + b"\0" + sources[name])
    return total.hexdigest()


def _imported(source: str) -> set[str]:
    """Return the names below adflow that a source imports, of modules or of what is in them."""
    found: set[str] = set()
    pattern = r"^[ ]*(?:from|import) (adflow[\w.]*)(?: import (?:\(([^)]*)\)|([\w, ]+)))?"
    for start, several, one_line in re.findall(pattern, source, re.MULTILINE):
        names = (several or one_line).split(",")
        found |= {start, *(f"{start}.{name.strip().split(' ')[0]}" for name in names if name.strip())}
    return found


def _source(name: str) -> bytes | None:
    """Return the source of a module, or None when there is no such module."""
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    return Path(spec.origin).read_bytes()


def write_cell(folder: Path, job: Job, found: Evaluation, extra: dict[str, Any]) -> dict[str, Any]:
    """Write the file of a cell, whole or not at all; return it as it will be read back."""
    cell = {
        "format": FORMAT,
        "key": job.key,
        "name": job.name,
        "data": job.data.name,
        "row": found.row,
        "cost": found.cost,
        "image_threshold": found.image_threshold,
        "image_promise": found.image_promise,
        **extra,
        "notes": found.notes,
        "curves": found.curves,
        "records": found.records,
        "in_pixels": found.in_pixels,
        "histograms": pack(found.histograms),
    }
    text = json.dumps(plain(cell), ensure_ascii=False, allow_nan=False) + "\n"
    write_text(folder / f"{job.name}.json", text)
    (folder / f"{job.name}.failed.txt").unlink(missing_ok=True)
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def read_cell(path: Path, key: str | None = None) -> dict[str, Any] | None:
    """Return the cell in ``path``, or None when there is none, it is damaged, or its key is another one."""
    try:
        cell = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(cell, dict) or cell.get("format") != FORMAT or "row" not in cell:
        return None
    return cell if key is None or cell.get("key") == key else None


def read_cells(folder: Path) -> list[dict[str, Any]]:
    """Return the cells that the table of an evaluation in ``folder`` is made of.

    Raises:
        InputError: there is no evaluation.
    """
    folder = folder if folder.is_dir() else folder.parent
    try:
        names = json.loads((folder / "table.json").read_text(encoding="utf-8"))["provenance"]["cells"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"{folder} holds no finished evaluation (no table.json that names its cells)",
            hint="Give the folder that `adflow evaluate --out FOLDER` wrote.",
        ) from None
    found = [read_cell(folder / "cells" / f"{name}.json") for name in names]
    if not found or any(cell is None for cell in found):
        raise InputError(f"cells of the evaluation in {folder} are missing or damaged", hint="Run it again.")
    return [cell for cell in found if cell is not None]


def pack(histograms: PixelHistograms | None) -> dict[str, Any] | None:
    """Return histograms as text: counts as uint32, weights as float32, compressed."""
    if histograms is None:
        return None
    parts: Iterable[tuple[Any, Any]] = (
        (histograms.negative, np.uint32),
        (histograms.positive, np.uint32),
        (histograms.weighted, np.float32),
        (histograms.regions, np.uint32),
    )
    data = b"".join(np.ascontiguousarray(values, dtype=kind).astype(kind).tobytes() for values, kind in parts)
    return {"shape": list(histograms.negative.shape), "data": base64.b64encode(zlib.compress(data, 6)).decode()}


def unpack(packed: dict[str, Any] | None) -> PixelHistograms | None:
    """Return what :func:`pack` was given, bit for bit."""
    if packed is None:
        return None
    n, bins = packed["shape"]
    data = zlib.decompress(base64.b64decode(packed["data"]))
    tables = [
        np.frombuffer(data, dtype=kind, count=n * bins, offset=4 * n * bins * i).astype(np.float64).reshape(n, bins)
        for i, kind in enumerate((np.uint32, np.uint32, np.float32))
    ]
    regions = np.frombuffer(data, dtype=np.uint32, count=n, offset=12 * n * bins).astype(np.float64)
    return PixelHistograms(tables[0], tables[1], tables[2], regions)


def folder_name(classes: Sequence[str], options: FitOptions, measuring: Measuring) -> str:
    """Return the name of an evaluation's folder: its data, and a hash of what is not the default.

    Methods and seeds are left out: adding some goes on with the same evaluation.
    """
    plain_options = replace(options, method="", seed=0, device="auto", strict=False, resources=FitOptions().resources)
    usual = replace(FitOptions(), method="")
    wish = Measuring(measuring.nfa, measuring.flag_rate, measuring.threshold)
    name = re.sub(r"[^\w.-]+", "-", "-".join(classes)).strip("-.")
    if len(name) > 60:
        name = name[:51] + "-" + _digest({"names": list(classes)})[:8]
    if plain_options == usual and wish == Measuring():
        return f"evaluate-{name}"
    return f"evaluate-{name}-{_digest({'options': repr(plain_options), 'wish': repr(wish)})[:8]}"
