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

from adflow import zoo
from adflow._card import _METRICS, model_card
from adflow._files import atomic_write, is_full, make_folder, replace_folder, sha256_of, write_error
from adflow._lock import claim
from adflow.bundle import (
    CALIBRATION,
    CERTIFICATE,
    FORMAT,
    LICENCES,
    METADATA,
    MODELS,
    README,
    load_bundle,
    model_sha256,
    need,
)
from adflow.data import Sample
from adflow.detector import Detector, Progress
from adflow.detector_file import digest, load_detector, read_header
from adflow.errors import InputError, UsageError
from adflow.features import one_thread
from adflow.fetch import push_detector
from adflow.imaging import fit_to, read_image
from adflow.runs import runs_folder
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

_PREDICT = '''"""python predict.py IMAGE...: one line of JSON an image: score, verdict, marked share of the pixels.

Needs numpy, onnxruntime and pillow only. For 8-bit grey or RGB pictures; `adflow score --model .` reads all kinds and
gives p-values and regions. Exits with 1 where a picture could not be read.
"""
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

if len(sys.argv) < 2:
    sys.exit(__doc__)
here = Path(__file__).resolve().parent
about = json.loads((here / "metadata.json").read_text(encoding="utf-8"))
takes, levels = about["input"], about["thresholds"]
session = onnxruntime.InferenceSession(str(here / about["model"]), providers=["CPUExecutionProvider"])
failed = 0
for name in sys.argv[1:]:
    try:
        picture = Image.open(name)
        if picture.mode not in ("1", "L", "P", "RGB") or "transparency" in picture.info:
            raise ValueError(f"expected 8-bit grey or RGB without transparency, found mode {picture.mode}")
        picture = ImageOps.exif_transpose(picture).convert("RGB")
    except Exception as error:  # Pillow raises many kinds
        print(f"{name}: left out: {error}", file=sys.stderr)
        failed = 1
        continue
    if not takes["any_size"]:
        for size in (takes["size"][1], picture.height), takes["size"][::-1]:  # columns first
            picture = picture.resize(size, Image.Resampling.BILINEAR)
    pixels = np.asarray(picture)[None]  # [1, H, W, 3]
    if takes["type"] == "float32":
        pixels = pixels.astype(np.float32) / 255
    anomaly_map, score, verdict, mask = session.run(["map", "score", "verdict", "mask"], {"images": pixels})
    label = about["labels"][int(verdict[0])] if levels["image"] is not None else None
    print(json.dumps({"image": name, "score": float(score[0]), "verdict": label, "marked": float(mask[0].mean())}))
sys.exit(failed)
'''

_README = """\
# A detector of defects, exported by adflow

Method {method}, fitted on good images of {data}. It takes an RGB image and gives an anomaly map, a score, the verdict
good or defect, and a mask of what is defective.

{run}    pip install "adflow[{extra}]"
    adflow score --model . IMAGES         # scores, p-values, verdicts
    adflow segment --model . IMAGES       # masks and regions

| file | |
|---|---|
{files}
| metadata.json | what the model takes and gives, thresholds, where it comes from |
| certificate.json | how far it is from the fitted detector, on which images, how fast |
| LICENCES.txt | terms of the training data and of the backbone's weights |

{promise}
"""
_RUN = """\
    pip install numpy onnxruntime pillow
    python predict.py IMAGE...            # the least that is needed

or

"""


def copy_detector(model: Path, target: Path) -> Path:
    """Copy a detector file, checked, to ``target`` (a file, or a folder that is there)."""
    load_detector(model)
    place = target / model.name if target.is_dir() else target
    with atomic_write(place) as temporary:
        shutil.copyfile(model, temporary)
    return place


def publish(model: Path, repo: str, *, runs: Path | None = None, private: bool = False) -> dict[str, Any]:
    """Write a detector with its model card to the hub repository ``repo`` (owner/name).

    Raises:
        UnavailableError: no token, no right, no network.
    """
    detector = load_detector(model)
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
        provenance=_public(header["provenance"]) | {"digest": header["digest"]},
    )
    return {"repo": repo, "commit": push_detector(model, repo, card, private=private), "licence": terms}


def _public(provenance: dict[str, Any]) -> dict[str, Any]:
    """Return a provenance without what names folders of the machine it was fitted on."""
    return {key: value for key, value in provenance.items() if key not in ("command", "held_out_images")}


def licence_of(data: str) -> dict[str, str]:
    """Return name and note of the terms that training data put on what was fitted on them."""
    entry = zoo.load().datasets.get(data.partition("/")[0])
    if entry is not None:
        return {"name": entry.licence.name, "note": entry.licence.note}
    if data.startswith("demo"):
        note = "Photographs of textures that scikit-image carries, with defects that adflow draws."
        return {"name": "CC0 1.0", "note": note}
    return {"name": "unknown", "note": "The images are in no catalogue: ask their owner before you pass this on."}


def measured(learned: str, runs: Path | None) -> dict[str, float]:
    """Return the figures of the newest evaluation of the detector with this digest, as fractions; {} without one."""
    cells = sorted(runs_folder(runs).glob("*/cells/*.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for path in cells:
        try:
            cell = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(cell, dict) and cell.get("detector") == learned:
            row = cell["row"]
            return {name: float(row[name]) for name in _METRICS if isinstance(row.get(name), int | float)}
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
            _write_about(detector, model, beside, form, about, bool(ranges))
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


def _write_about(
    detector: Detector, model: Path, folder: Path, form: Form, thresholds: dict[str, Any], int8: bool
) -> None:
    header = read_header(model)
    header["provenance"] = _public(header["provenance"])
    net = zoo.load().backbones.get(detector.backbone.name)
    assert detector.size is not None
    if detector.calibration is not None:
        np.savez(folder / CALIBRATION, **detector.calibration.tensors())  # type: ignore[arg-type]  # numpy's stub
    licences = {
        "training data": licence_of(str(header["provenance"].get("data") or "")),
        "backbone": None if net is None else {"name": net.licence.name, "note": net.licence.note},
        "adflow": {"name": "Apache-2.0", "note": "The code of this bundle."},
    }
    resize = "Pillow bilinear, columns first, to the size"
    metadata = {
        "format": FORMAT,
        "kind": form.kind,
        "model": MODELS[form.kind][0],
        "sha256": model_sha256(folder, form.kind),
        "input": {
            "name": "images",
            "layout": "[B, H, W, 3], RGB",
            "type": "uint8" if form.pixels == "uint8" else "float32",
            "range": [0, 255] if form.pixels == "uint8" else [0, 1],
            "size": list(detector.size),
            "any_size": form.any_size,
            "batch": "any" if form.any_batch else 1,
            "resize": f"inside, as {resize}" if form.any_size else resize,
            "letterbox": detector.keep_aspect,
        },
        "outputs": {
            "map": "[B, h, w] float32 at the size, higher = more anomalous",
            "score": "[B] float32, higher = more anomalous",
            "verdict": "[B] bool: score > thresholds.image",
            "mask": "[B, h, w] bool: map > thresholds.pixel",
        },
        "weights": "8-bit convolutions, float32" if int8 else "16 bits" if form.half else "float32",
        "labels": ["good", "defect"],
        "thresholds": thresholds,
        "licences": licences,
        "calibration": CALIBRATION if detector.calibration is not None else None,
        "detector": header,
    }
    (folder / METADATA).write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    terms = (f"{what}: {terms['name']}. {terms['note']}\n" for what, terms in licences.items() if terms)
    (folder / LICENCES).write_text("".join(terms), encoding="utf-8")
    files = {name: "the model" for name in MODELS[form.kind]}
    if detector.calibration is not None:
        files[CALIBRATION] = "what adflow needs for p-values and regions"
    if form.kind == "onnx":
        (folder / "predict.py").write_text(_PREDICT, encoding="utf-8")
        files["predict.py"] = "runs the model without adflow and torch; an example to start from"
    text = _README.format(
        method=header["method"],
        data=header["provenance"].get("data") or "unknown data",
        run=_RUN if form.kind == "onnx" else "",
        extra=form.kind if form.kind in NEEDED else "",
        files="\n".join(f"| {name} | {what} |" for name, what in files.items()),
        promise=thresholds["promise"],
    )
    (folder / README).write_text(text.replace("[]", ""), encoding="utf-8")
