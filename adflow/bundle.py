"""A bundle: an exported detector in a folder, run without the method's own code.

    model.onnx | model.pt | model.pt2   RGB float32 [B, H, W, 3] in 0..255 -> map, score, verdict, mask
    metadata.json                       input, outputs, labels, thresholds, licences, the detector's header, sha256
    calibration.npz                     what held-out good images taught, for regions, NFA and p-values
    certificate.json                    proof that the bundle gives what the fitted detector gives
    predict.py                          (onnx) the same without torch and adflow

The model begins at the input size: images are resized by Pillow, as when the detector was fitted. A resize inside the
graph was measured and left out: onnxruntime's antialiased one differs from Pillow's by up to 19 of 255 levels.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from adflow.backbones import Backbone
from adflow.calibration import Calibration
from adflow.detector import Detector, ImageSource, Progress, Resources, Scores
from adflow.errors import DetectorFileError, InputError, UnavailableError
from adflow.imaging import Box

FORMAT = 1
METADATA, CERTIFICATE, CALIBRATION = "metadata.json", "certificate.json", "calibration.npz"
OUTPUTS = ("map", "score", "verdict", "mask")
MODELS = {"onnx": "model.onnx", "torchscript": "model.pt", "torch": "model.pt2"}
Run = Callable[[np.ndarray], Sequence[np.ndarray]]


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_metadata(folder: Path) -> dict[str, Any]:
    """Return the metadata of a bundle.

    Raises:
        DetectorFileError: no bundle, or one of another version.
    """
    try:
        found = json.loads((folder / METADATA).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DetectorFileError(
            f"{folder} is no bundle: {METADATA} is missing or damaged", hint="Make one: adflow export RUN --format onnx"
        ) from error
    if not isinstance(found, dict) or found.get("format") != FORMAT or found.get("kind") not in MODELS:
        raise DetectorFileError(f"{folder} is a bundle of another version of adflow", hint="Export it again.")
    return found


def bundle_header(folder: Path) -> dict[str, Any]:
    """Return the header of the detector that was exported, with the hash of the exported model as its digest."""
    about = read_metadata(folder)
    return {**about["detector"], "digest": about["sha256"]}


def load_bundle(folder: Path) -> Bundle:
    """Open a bundle.

    Raises:
        DetectorFileError: it is damaged, or its model is not the one that was certified.
        UnavailableError: the package that runs it is not installed.
    """
    about = read_metadata(folder)
    model = folder / MODELS[about["kind"]]
    if not model.is_file() or sha256_of(model) != about["sha256"]:
        raise DetectorFileError(f"{model} is missing or not the file that was certified", hint="Export it again.")
    try:
        bundle = Bundle(about, open_model(model, about["kind"]))
        if about["calibration"]:
            with np.load(folder / CALIBRATION, allow_pickle=False) as arrays:
                bundle.calibration = Calibration.from_tensors(dict(arrays))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise DetectorFileError(f"{folder} is damaged: {error}", hint="Export it again.") from error
    return bundle


def open_model(path: Path, kind: str) -> Run:
    """Return a function from images [B, H, W, 3] (RGB float32, 0..255) to map, score, verdict and mask."""
    if kind == "onnx":
        need(("onnxruntime",), "a bundle in ONNX format")
        session = onnx_session(path.read_bytes())
        return lambda images: cast(Sequence[np.ndarray], session.run(list(OUTPUTS), {"images": images}))
    with warnings.catch_warnings():
        # torch tells that TorchScript has no future; who asked for it has a runtime that needs it.
        warnings.simplefilter("ignore")
        torch_: Any = torch  # torch.jit is untyped
        program: Any = torch_.jit.load(str(path)) if kind == "torchscript" else torch.export.load(path).module()

    def run(images: np.ndarray) -> Sequence[np.ndarray]:
        with torch.inference_mode():
            step = 1 if kind == "torch" else len(images)
            parts = [program(part) for part in torch.split(torch.from_numpy(images), step)]
        return [torch.cat([part[i] for part in parts]).numpy() for i in range(len(OUTPUTS))]

    return run


def onnx_session(model: bytes) -> Any:
    """Return an onnxruntime session on the CPU with one thread: a worker takes an image through all of it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def need(packages: Sequence[str], what: str, extra: str = "onnx") -> None:
    """Raise UnavailableError with the pip line when one of ``packages`` is not installed."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise UnavailableError(
            f"{what} needs the package{'s' if len(missing) > 1 else ''} {', '.join(missing)}",
            hint=f"pip install 'adflow[{extra}]'",
        )


class _Inside(nn.Module):
    """Stands for the backbone, which is inside the exported model."""

    def __init__(self, header: Mapping[str, Any]) -> None:
        super().__init__()
        self.name, self.taps = str(header["name"]), tuple(header["taps"])
        self.weights, self.precision = str(header["weights"]), "float32"

    def to_precision(self, precision: str) -> None:
        """Refuse: a bundle computes as it was exported."""
        raise InputError("a bundle computes in the precision it was exported in", hint="Leave --precision out.")


class Bundle(Detector):
    """An exported detector; it scores like the fitted one and cannot be fitted."""

    def __init__(self, about: Mapping[str, Any], run: Run) -> None:
        header = about["detector"]
        super().__init__(cast(Backbone, _Inside(header["backbone"])))
        self.about, self.run = about, run
        height, width = about["input"]["size"]
        self.size = (int(height), int(width))
        self.provenance = dict(header["provenance"])
        # The class cannot know it: tables name the method that was exported.
        self.__dict__["method"] = lambda: str(header["method"])

    def learned(self) -> dict[str, Tensor]:
        """Return the sha256 of the exported model, which stands for what it holds."""
        return {"model": torch.tensor(list(bytes.fromhex(self.about["sha256"])), dtype=torch.uint8)}

    def params(self) -> dict[str, Any]:
        """Return the constructor parameters of the detector that was exported."""
        return dict(self.about["detector"]["params"])

    def fit(
        self,
        images: ImageSource | Tensor,
        *,
        seed: int = 0,
        resources: Resources | None = None,
        progress: Progress | None = None,
    ) -> Bundle:
        """Raise: a bundle is what was exported."""
        raise InputError("a bundle cannot be fitted", hint="Fit a detector and export it: adflow fit, adflow export.")

    def _score(self, images: Tensor, boxes: Sequence[Box] | None) -> Scores:
        pixels = np.ascontiguousarray((images * 255).permute(0, 2, 3, 1).numpy())
        score_map, score = self.run(pixels)[:2]
        return Scores(torch.from_numpy(np.asarray(score_map)), torch.from_numpy(np.asarray(score)))
