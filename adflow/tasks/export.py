"""``export``: a detector as a file, on the hub, or as a bundle that is proven to give the same scores."""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adflow._card import METRICS, model_card
from adflow._files import atomic_write, is_full, make_folder, replace_folder, sha256_of, write_error
from adflow._lock import claim
from adflow._threads import one_thread
from adflow.bundle import CERTIFICATE, MODELS, load_bundle, need
from adflow.data import Sample
from adflow.detector import Detector, Progress
from adflow.detector_file import digest, load_detector, read_header
from adflow.errors import InputError, UsageError
from adflow.fetch import push_detector
from adflow.imaging import fit_to, read_image
from adflow.runs import runs_folder
from adflow.tasks._about import licence_of, public, write_about
from adflow.tasks._cells import read_cell
from adflow.tasks._certificate import certify
from adflow.tasks._point import operating_point
from adflow.tasks._program import OPSETS, Form, Thresholds, write_program
from adflow.tasks.score import image_level, verdict_rate

FORMATS = tuple(MODELS)
# Packages beyond adflow's own, and the extra of the same name.
NEEDED = {"onnx": ("onnx", "onnxruntime", "onnxscript"), "openvino": ("onnx", "onnxscript", "openvino")}
# Of the map's range: what float32 kernels that add in another order differ by is some 1e-6, an error is more.
TOLERANCE = 1e-4
# 16-bit weights are off by 2^-12 of themselves; whitening enlarges that.
HALF_TOLERANCE = 2e-2
# Of AUROC, a fraction; for 8-bit models.
MAX_DROP = 0.01


def copy_detector(model: Path, target: Path, *, weights: Path | None = None) -> Path:
    """Copy a detector file, checked with its backbone, to ``target`` (a file, or a folder that is there)."""
    load_detector(model, weights=weights)
    place = target / model.name if target.is_dir() else target
    with atomic_write(place) as temporary:
        shutil.copyfile(model, temporary)
    return place


def publish(
    model: Path, repo: str, *, runs: Path | None = None, private: bool = False, weights: Path | None = None
) -> dict[str, Any]:
    """Write a detector with its model card to the hub repository ``repo`` (owner/name).

    Raises:
        UnavailableError: no token, no right, no network.
    """
    detector = load_detector(model, weights=weights)
    header = read_header(model)
    data = str(header["provenance"].get("data") or "unknown data")
    terms = licence_of(data)
    learned = digest(detector.learned(), {})
    card = model_card(
        name=f"{header['method']} on {data}",
        method=header["method"],
        backbone=header["backbone"]["name"],
        dataset=data,
        licence=terms["name"],
        licence_note=terms["note"],
        measured=measured(learned, runs),
        provenance=public(header["provenance"]) | {"digest": header["digest"]},
    )
    return {"repo": repo, "commit": push_detector(model, repo, card, private=private), "licence": terms}


def measured(learned: str, runs: Path | None) -> dict[str, float]:
    """Return the figures of the newest evaluation of the detector with this digest, as fractions; {} without one."""
    cells = sorted(runs_folder(runs).glob("*/cells/*.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for path in cells:
        cell = read_cell(path)
        if cell is not None and cell.get("detector") == learned:
            row = cell["row"]
            return {name: float(row[name]) for name in METRICS if isinstance(row.get(name), int | float)}
    return {}


def thresholds_of(detector: Detector) -> tuple[Thresholds, dict[str, Any]]:
    """Return the levels of verdict and mask, and what they promise; infinite without calibration."""
    calibration = detector.calibration
    rate = verdict_rate(detector, None)
    if calibration is None or rate is None:
        return Thresholds(), {"image": None, "pixel": None, "promise": "not calibrated: scores and maps only"}
    image = image_level(calibration, rate)
    try:
        point = operating_point(detector)
        pixel, promise = point.threshold, point.promise
    except InputError as error:
        pixel, promise = math.inf, str(error)
    about = {
        "image": image,
        "image_rate": rate,
        "pixel": pixel if math.isfinite(pixel) else None,
        "promise": f"At most {rate:.1%} of good images are called defective, on average. {promise}",
    }
    return Thresholds(image, pixel), about


def export_bundle(
    model: Path,
    out: Path,
    form: Form,
    samples: Sequence[Sample],
    *,
    source: str = "given",
    tolerance: float | None = None,
    ranges: Sequence[Sample] = (),
    max_drop: float = MAX_DROP,
    weights: Path | None = None,
    bisect: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a bundle to the folder ``out`` and prove on ``samples`` that it gives the detector's scores.

    Args:
        model: detector file.
        out: folder; a bundle that is there is replaced.
        form: format, input and storage.
        samples: images of the certificate.
        source: where they come from, in words.
        tolerance: largest difference of map and score allowed, as a share of the map's range; None =
            :data:`TOLERANCE`, or :data:`HALF_TOLERANCE` for 16-bit weights.
        ranges: good images, if any: convolutions are rounded to 8 bits within the ranges these give, and instead of
            equality the loss of AUROC on ``samples`` is measured.
        max_drop: largest such loss allowed, as a fraction.
        weights: local weight file of the backbone.
        bisect: compare the stages inside as well (ONNX, OpenVINO).
        progress: called with (done, total, message).

    Returns:
        The certificate, with "bundle".

    Raises:
        UnavailableError: a package is missing, or the format cannot hold the method.
        GateError: the export differs; nothing is left behind.
    """
    _check(form, samples, out, bool(ranges))
    detector = load_detector(model, weights=weights)
    assert detector.size is not None
    if detector.keep_aspect and not form.any_size:
        raise InputError(
            "this detector letterboxes images, which needs their size: its bundle takes images of any size",
            hint="Add --dynamic size.",
        )
    if tolerance is None:
        tolerance = HALF_TOLERANCE if form.half else TOLERANCE
    levels, about = thresholds_of(detector)
    if ranges:
        about["promise"] += " Learned before the weights were rounded to 8 bits: see certificate.json."
    beside, old = (out.with_name(f".{out.name}.{word}") for word in ("partial", "old"))
    with claim(out.parent):
        try:
            # A process killed between the two moves below leaves the bundle under its second name.
            if old.exists() and not out.exists():
                old.replace(out)
            shutil.rmtree(beside, ignore_errors=True)
            make_folder(beside)
            write_program(detector, levels, form, beside, [_as_taken(detector, form, sample) for sample in ranges])
            extra = form.kind if form.kind in NEEDED else None
            write_about(detector, model, beside, form, about, bool(ranges), extra)
            with one_thread():
                certificate = certify(
                    detector,
                    load_bundle(beside),
                    beside,
                    form,
                    levels,
                    samples,
                    source=source,
                    tolerance=tolerance,
                    max_drop=max_drop if ranges else None,
                    bisect=bisect,
                    progress=progress,
                )
            certificate["detector_sha256"] = sha256_of(model)
            (beside / CERTIFICATE).write_text(json.dumps(certificate, indent=2) + "\n", encoding="utf-8")
            replace_folder(beside, out, old)
        except OSError as error:
            raise write_error(out, error) from error
        except RuntimeError as error:
            # torch's writers have no better word for a full disk.
            if "writ" in str(error) and is_full(beside):
                raise write_error(out, OSError(errno.ENOSPC, "")) from error
            raise
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return certificate | {"bundle": str(out)}


def _check(form: Form, samples: Sequence[Sample], out: Path, int8: bool) -> None:
    for kind, packages in NEEDED.items():
        if form.kind == kind:
            need(packages, f"--format {kind}", kind)
    if form.opset not in OPSETS:
        raise UsageError(f"opset {form.opset} cannot be written, expected {OPSETS[0]} to {OPSETS[-1]}")
    if int8 and (form.kind not in NEEDED or form.half):
        raise UsageError("--int8 is for --format onnx and openvino, and takes the place of --half")
    if int8:
        need(("onnxruntime",), "--int8")
    if not samples:
        raise InputError("there is no image to prove the export on", hint="Give some with --images.")
    if out.exists() and not (out / CERTIFICATE).is_file():
        raise InputError(f"{out} is there and no bundle", hint="Choose another --out.")


def _as_taken(detector: Detector, form: Form, sample: Sample) -> np.ndarray:
    """Return an image of the network's size as the program takes it, [1, H, W, 3]."""
    assert detector.size is not None
    array, box = fit_to(read_image(sample.image), detector.size, detector.keep_aspect)
    inside = array[None, :, box.top : box.top + box.height, box.left : box.left + box.width].transpose(0, 2, 3, 1)
    if form.pixels == "uint8":
        inside = np.round(inside * 255).astype(np.uint8)
    return np.ascontiguousarray(inside)
