"""The detector's file: one safetensors file whose JSON header says what it is. Loading never executes code.

Layout: tensors ``model.<name>`` (learned, without the backbone) and ``calibration.<name>``; under the metadata key
``adflow`` a JSON object::

    {"format": 1, "method": "cflow", "params": {...},
     "backbone": {"name", "taps", "weights": sha256 of the weight file}, "shapes": {"channels", "grids"} | null,
     "size": [H, W], "keep_aspect": bool, "provenance": {...}, "digest": sha256 over the tensors and what gives them
     meaning here, "check": sha256 over all the rest of this object}

The backbone's weights are not stored: they are public, named by their hash, and refused when they differ.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from adflow import methods
from adflow._files import atomic_write
from adflow.backbones import make_backbone
from adflow.calibration import Calibration
from adflow.detector import Detector, FeatureDetector, FeatureShapes
from adflow.errors import AdflowError, DetectorFileError

FORMAT = 1
SUFFIX = ".safetensors"
# Headers are a few kilobytes; one beyond this is not ours, and parsing it could eat the memory of the machine.
MAX_HEADER = 16 << 20
MAX_SIDE = 8192  # of an input, in pixels; see imaging.parse_size
_OTHER = "Another version of adflow wrote it: fit again."
_FIELDS = {
    "method": str,
    "params": dict,
    "backbone": dict,
    "shapes": dict | None,
    "size": list,
    "keep_aspect": bool,
    "provenance": dict,
    "digest": str,
}


def digest(tensors: dict[str, Tensor], header: dict[str, Any]) -> str:
    """Return the sha256 over all tensors (name, type, shape, bytes) and the header that gives them meaning.

    Provenance holds times and paths; it is left out, so that two fits with one seed have one digest.
    """
    total = hashlib.sha256()
    meaning = {key: value for key, value in header.items() if key not in ("provenance", "digest", "check")}
    total.update(json.dumps(meaning, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return total.hexdigest()


def save_detector(detector: Detector, path: Path) -> Path:
    """Write ``detector`` to ``path``, whole or not at all.

    Raises:
        InputError: it has not been fitted.
        ResourceError: the disk is full, or writing is not permitted.
    """
    tensors = {f"model.{k}": v.detach().cpu().contiguous() for k, v in detector.learned().items()}
    if detector.calibration is not None:
        for key, value in detector.calibration.tensors().items():
            tensors[f"calibration.{key}"] = torch.from_numpy(np.ascontiguousarray(value))
    shapes = detector.shapes if isinstance(detector, FeatureDetector) else None
    header = {
        "format": FORMAT,
        "method": detector.method(),
        "params": detector.params(),
        "backbone": {
            "name": detector.backbone.name,
            "taps": list(detector.backbone.taps),
            "weights": detector.backbone.weights,
        },
        "shapes": None if shapes is None else {"channels": shapes.channels, "grids": shapes.grids},
        "size": detector.fitted_size(),
        "keep_aspect": detector.keep_aspect,
        "provenance": detector.provenance,
    }
    header = json.loads(json.dumps(header))
    header["digest"] = digest(tensors, header)
    header["check"] = _check(header)
    with atomic_write(Path(path)) as temporary:
        save_file(tensors, str(temporary), metadata={"adflow": json.dumps(header, sort_keys=True)})
    return Path(path)


def read_header(path: Path) -> dict[str, Any]:
    """Return the JSON header of a detector file without reading its tensors.

    Raises:
        DetectorFileError: no such file, or not a detector file of this version.
    """
    path = Path(path)
    if path.is_dir():
        from adflow.bundle import bundle_header

        return bundle_header(path)
    return _read(path, tensors=False)[0]


def _read(path: Path, tensors: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return header and tensors of one and the same file, also while another process replaces it."""
    try:
        with path.open("rb") as stream:
            start = stream.read(8)
        if len(start) < 8 or struct.unpack("<Q", start)[0] > MAX_HEADER:
            raise DetectorFileError(
                f"{path} is not an adflow detector: it does not start like a safetensors file",
                hint="Give a file written by `adflow fit`; `adflow list detectors` shows those found.",
            )
        with safe_open(str(path), framework="pt") as stored:
            text = (stored.metadata() or {}).get("adflow")
            found = {}
            if tensors and text is not None:
                found = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError:
        raise DetectorFileError(
            f"there is no detector file {path}", hint="`adflow list detectors` shows those found."
        ) from None
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        message = f"{path} is damaged or not a detector: {error}"
        raise DetectorFileError(message, hint="Fit or fetch it again.") from None
    if text is None:
        raise DetectorFileError(
            f"{path} is a safetensors file, but not one written by adflow",
            hint="Give a file written by `adflow fit`; `adflow list detectors` shows those found.",
        )
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DetectorFileError(f"{path} has a damaged header: {error}", hint="Fit or fetch it again.") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        version = header.get("format") if isinstance(header, dict) else None
        raise DetectorFileError(
            f"{path} has format {str(version)[:20]}, this adflow reads {FORMAT}", hint="Update adflow, or fit again."
        )
    wrong = [key for key, kind in _FIELDS.items() if key not in header or not isinstance(header[key], kind)]
    # Files of the first adflow carry no check.
    if wrong or header.get("check", _check(header)) != _check(header):
        what = f": {', '.join(wrong)}" if wrong else ": its content is not what was written"
        raise DetectorFileError(f"{path} has a damaged header{what}", hint="Fit or fetch it again.")
    return header, found


def _check(header: dict[str, Any]) -> str:
    """Return the sha256 over a header, so that no bit of it, provenance included, changes unnoticed."""
    rest = {key: value for key, value in header.items() if key != "check"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def load_detector(path: Path | str, *, device: torch.device | str = "cpu", weights: Path | None = None) -> Detector:
    """Load a fitted detector.

    Args:
        path: file written by :func:`save_detector`, or a bundle (see :mod:`adflow.bundle`; it runs on the CPU).
        device: where to put it.
        weights: a local weight file for the backbone, when it is not on this machine otherwise.

    Raises:
        DetectorFileError: the file is missing, damaged, foreign, or its backbone has other weights.
        UnavailableError: the backbone's weights are not on this machine.
    """
    path = Path(path)
    if path.is_dir():
        from adflow.bundle import load_bundle

        return load_bundle(path)
    header, tensors = _read(path)
    found = digest(tensors, header)
    if found != header.get("digest"):
        raise DetectorFileError(
            f"{path} is damaged: its content has sha256 {found[:12]}…, its header says "
            f"{str(header.get('digest'))[:12]}…",
            hint="Fit or fetch it again.",
        )
    try:
        detector = _build(header, tensors, weights)
    except AdflowError as error:
        if isinstance(error, DetectorFileError) or error.exit_code == 4:
            raise
        raise DetectorFileError(f"{path} cannot be used: {error}", hint=error.hint) from error
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError, ArithmeticError, MemoryError) as error:
        raise DetectorFileError(f"{path} does not fit its method: {error}", hint="Fit it again.") from error
    detector.to(device)
    return detector.eval()


def _build(header: dict[str, Any], tensors: dict[str, Tensor], weights: Path | None) -> Detector:
    wanted = header["backbone"]
    backbone = make_backbone(wanted["name"], taps=tuple(wanted["taps"]), weights=weights)
    if backbone.weights != wanted["weights"]:
        raise DetectorFileError(
            f"the backbone {wanted['name']} on this machine has weights {backbone.weights[:12]}…, "
            f"the detector was fitted with {wanted['weights'][:12]}…",
            hint="Give the right file with --weights, or fit again.",
        )
    cls = methods.get(header["method"])
    known = cls.parameters_of()
    foreign = set(header["params"]) - set(known)
    if foreign:
        raise DetectorFileError(f"unknown parameters {sorted(foreign)} of {header['method']}", hint=_OTHER)
    params = {
        k: tuple(v) if isinstance(known[k], tuple) and isinstance(v, list) else v for k, v in header["params"].items()
    }
    detector = cls(backbone, **params)
    height, width = detector.size = _size(header["size"])
    if isinstance(detector, FeatureDetector):
        grids = [_size(grid) for grid in header["shapes"]["grids"]]
        # Before anything is made of these sizes: a wrong one could take all the memory of the machine.
        if header["shapes"]["channels"] != backbone.channels or len(grids) != len(backbone.channels):
            raise DetectorFileError(
                f"features have {header['shapes']['channels']} channels, not {backbone.channels}", hint=_OTHER
            )
        if any(h > height or w > width for h, w in grids):
            raise DetectorFileError(f"feature grids {grids} are finer than the input {height}x{width}", hint=_OTHER)
        detector.empty(FeatureShapes(list(backbone.channels), grids, detector.size))
    _set_learned(detector, {k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    calibration = {k[12:]: v.numpy() for k, v in tensors.items() if k.startswith("calibration.")}
    detector.calibration = Calibration.from_tensors(calibration) if calibration else None
    detector.keep_aspect = bool(header["keep_aspect"])
    detector.provenance = dict(header["provenance"])
    return detector.requires_grad_(False)


def _size(sides: Any) -> tuple[int, int]:
    height, width = sides
    for side in (height, width):
        if not isinstance(side, int) or not 1 <= side <= MAX_SIDE:
            raise DetectorFileError(f"a size is {str(side)[:20]}, expected 1 to {MAX_SIDE} pixels")
    return height, width


def _set_learned(detector: Detector, tensors: dict[str, Tensor]) -> None:
    """Put every stored tensor in its place; buffers may have any length (memory banks), parameters may not."""
    places = detector.learned()
    if set(places) != set(tensors):
        missing, extra = sorted(set(places) - set(tensors)), sorted(set(tensors) - set(places))
        raise DetectorFileError(
            f"learned tensors differ from the method's: missing {missing}, unknown {extra}",
            hint=_OTHER,
        )
    buffers = dict(detector.named_buffers())
    for name, value in tensors.items():
        owner_name, _, leaf = name.rpartition(".")
        owner = detector.get_submodule(owner_name)
        if value.dtype != places[name].dtype or value.ndim != places[name].ndim:
            raise DetectorFileError(
                f"tensor {name} is {value.dtype} with {value.ndim} dimensions, "
                f"expected {places[name].dtype} with {places[name].ndim}"
            )
        if name in buffers:
            setattr(owner, leaf, value.clone())
        else:
            if value.shape != places[name].shape:
                wanted = list(places[name].shape)
                raise DetectorFileError(f"parameter {name} has shape {list(value.shape)}, expected {wanted}")
            with torch.no_grad():
                getattr(owner, leaf).copy_(value)
