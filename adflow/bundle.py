"""A bundle: an exported detector in a folder, run without the method's own code.

    model.onnx | model.xml + .bin | model.pt | model.pt2    RGB [B, H, W, 3] -> map, score, verdict, mask
    README.md           what this is and how to run it, for who finds it
    metadata.json       input, outputs, labels, thresholds, licences, the detector's header, sha256
    calibration.npz     what held-out good images taught, for regions, NFA and p-values
    certificate.json    proof that the bundle gives what the fitted detector gives
    LICENCES.txt        terms of the training data and of the backbone's weights
    predict.py          (onnx) the same without torch and adflow

The model takes images of the network's size, or, exported so, of any size: then the resize is inside and rounds as
Pillow's does, which the detector was fitted with.
"""

from __future__ import annotations

import hashlib
import json
import threading
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
LICENCES, README = "LICENCES.txt", "README.md"
OUTPUTS = ("map", "score", "verdict", "mask")
# The files of the model by format; the first one is opened.
MODELS = {
    "onnx": ("model.onnx",),
    "openvino": ("model.xml", "model.bin"),
    "torchscript": ("model.pt",),
    "torch": ("model.pt2",),
}
Run = Callable[[np.ndarray], Sequence[np.ndarray]]


def model_sha256(folder: Path, kind: str) -> str:
    """Return the sha256 over the files of a bundle's model."""
    total = hashlib.sha256()
    for name in MODELS[kind]:
        total.update((folder / name).read_bytes())
    return total.hexdigest()


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
    if not isinstance(found, dict) or found.get("format") != FORMAT or str(found.get("kind")) not in MODELS:
        raise DetectorFileError(f"{folder} is a bundle of another version of adflow", hint="Export it again.")
    try:
        said = [found["sha256"], found["detector"]["method"], found["detector"]["backbone"]["name"]]
    except (KeyError, TypeError):
        said = [None]
    if not all(isinstance(word, str) for word in said):
        raise DetectorFileError(f"{folder} is damaged: {METADATA} does not say what it holds", hint="Export it again.")
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
    kind = about["kind"]
    model = folder / MODELS[kind][0]
    if not all((folder / name).is_file() for name in MODELS[kind]) or model_sha256(folder, kind) != about["sha256"]:
        raise DetectorFileError(f"{model} is missing or not the file that was certified", hint="Export it again.")
    try:
        bundle = Bundle(about, open_model(model, kind, about["input"]["batch"]))
        if about["calibration"]:
            with np.load(folder / CALIBRATION, allow_pickle=False) as arrays:
                bundle.calibration = Calibration.from_tensors(dict(arrays))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise DetectorFileError(f"{folder} is damaged: {error}", hint="Export it again.") from error
    return bundle


def open_model(path: Path, kind: str, batch: int | str = 1) -> Run:
    """Return a function from images [B, H, W, 3] to map, score, verdict and mask, one thread.

    Args:
        path: the first file of the model.
        kind: a key of :data:`MODELS`.
        batch: "any", or 1 for a model that takes one image: then the function runs it once an image.
    """
    opener = {"onnx": _open_onnx, "openvino": _open_openvino}.get(kind, _open_torch)
    whole = opener(path, kind)
    if batch == "any":
        return whole

    def each(images: np.ndarray) -> Sequence[np.ndarray]:
        parts = [whole(images[i : i + 1]) for i in range(len(images))]
        return parts[0] if len(parts) == 1 else [np.concatenate(column) for column in zip(*parts, strict=True)]

    return each


def _open_onnx(path: Path, kind: str) -> Run:
    need(("onnxruntime",), "a bundle in ONNX format")
    session = onnx_session(path.read_bytes())
    return lambda images: cast(Sequence[np.ndarray], session.run(list(OUTPUTS), {"images": images}))


def _open_openvino(path: Path, kind: str) -> Run:
    need(("openvino",), "a bundle in OpenVINO format", "openvino")
    compiled = openvino_model(path)
    own = threading.local()  # a request serves one thread at a time

    def run(images: np.ndarray) -> Sequence[np.ndarray]:
        if not hasattr(own, "request"):
            own.request = compiled.create_infer_request()
        found = own.request.infer([images])
        return [np.array(found[i]) for i in range(len(OUTPUTS))]

    return run


def _open_torch(path: Path, kind: str) -> Run:
    with warnings.catch_warnings():
        # torch tells that TorchScript has no future; who asked for it has a runtime that needs it.
        warnings.simplefilter("ignore")
        torch_: Any = torch  # torch.jit is untyped
        program: Any = torch_.jit.load(str(path)) if kind == "torchscript" else torch.export.load(path).module()

    def run(images: np.ndarray) -> Sequence[np.ndarray]:
        with torch.inference_mode():
            taken = torch.from_numpy(np.require(images, requirements=("C", "W")))
            return [found.numpy() for found in program(taken)]

    return run


def openvino_model(model: Any) -> Any:
    """Compile a model or its file for the CPU, with one thread and in float32 whatever the processor prefers."""
    import openvino

    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    return openvino.Core().compile_model(model, "CPU", settings)


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
        self.keep_aspect = bool(header["keep_aspect"])
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
        if self.keep_aspect and boxes is not None:
            # The model letterboxes by itself; an image that fits is not resized again.
            box = boxes[0]
            images = images[:, :, box.top : box.top + box.height, box.left : box.left + box.width]
        score_map, score = self.run(self.pixels(images))[:2]
        return Scores(torch.from_numpy(np.asarray(score_map)), torch.from_numpy(np.asarray(score)))

    def pixels(self, images: Tensor) -> np.ndarray:
        """Return images [B, 3, H, W] in [0, 1] as the model takes them, [B, H, W, 3].

        Raises:
            InputError: the model takes 8 bits, and the images have more.
        """
        last = images.permute(0, 2, 3, 1)
        if self.about["input"]["type"] == "float32":
            return np.ascontiguousarray(last.numpy())
        levels = last * 255
        whole = levels.round()
        if float((levels - whole).abs().max()) > 1e-3:
            raise InputError(
                "this bundle takes 8-bit images, found one of more bits", hint="Export it with --input float."
            )
        return np.ascontiguousarray(whole.to(torch.uint8).numpy())
