"""What a bundle says of itself: metadata, licences, a README, and a script that runs it."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from adflow import zoo
from adflow.bundle import CALIBRATION, FORMAT, LICENCES, METADATA, MODELS, README, model_sha256
from adflow.detector import Detector
from adflow.detector_file import read_header
from adflow.tasks._program import Form

_README = """\
# A detector of defects, exported by adflow

Method {method}, fitted on good images of {data}. It takes an RGB image and gives an anomaly map, a score, the verdict
good or defect, and a mask of what is defective.

{run}    pip install {package}
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


def public(provenance: dict[str, Any]) -> dict[str, Any]:
    """Return a provenance without what names folders of the machine it was fitted on."""
    return {key: value for key, value in provenance.items() if key not in ("command", "held_out_images")}


def licence_of(data: str) -> dict[str, str]:
    """Return name and note of the terms that training data put on what was fitted on them."""
    entry = zoo.load().datasets.get(data.partition("/")[0])
    if entry is not None:
        return {"name": entry.licence.name, "note": entry.licence.note}
    if data.startswith("demo/"):
        note = "Photographs of textures that scikit-image carries, with defects that adflow draws."
        return {"name": "CC0 1.0", "note": note}
    return {"name": "unknown", "note": "The images are in no catalogue: ask their owner before you pass this on."}


def write_about(
    detector: Detector, model: Path, folder: Path, form: Form, thresholds: dict[str, Any], int8: bool, extra: str | None
) -> None:
    """Write everything of a bundle but its model and certificate.

    Args:
        detector: fitted.
        model: its file.
        folder: where the model lies already.
        form: what was exported.
        thresholds: of verdict and mask, and their promise.
        int8: convolutions are in 8 bits.
        extra: of adflow, that runs the bundle; None = none is needed.
    """
    header = read_header(model)
    header["provenance"] = public(header["provenance"])
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
        script = resources.files("adflow.tasks").joinpath("_predict.py").read_text(encoding="utf-8")
        (folder / "predict.py").write_text(script, encoding="utf-8")
        files["predict.py"] = "runs the model without adflow and torch; an example to start from"
    text = _README.format(
        method=header["method"],
        data=header["provenance"].get("data") or "unknown data",
        run=_RUN if form.kind == "onnx" else "",
        package=f'"adflow[{extra}]"' if extra else "adflow",
        files="\n".join(f"| {name} | {what} |" for name, what in files.items()),
        promise=thresholds["promise"],
    )
    (folder / README).write_text(text, encoding="utf-8")
