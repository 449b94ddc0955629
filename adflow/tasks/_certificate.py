"""The proof that a bundle gives what the fitted detector gives, image by image; and where it does not."""

from __future__ import annotations

import platform
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from adflow import __version__
from adflow._files import sha256_of
from adflow._system import version_of
from adflow._video import is_frame
from adflow.bundle import MODELS, Bundle, onnx_session, openvino_model
from adflow.data import Sample
from adflow.detector import Detector, Progress
from adflow.errors import GateError, InputError
from adflow.imaging import Box, fit_to, mask_to, read_image, read_mask
from adflow.metrics import image_metrics, pixel_metrics
from adflow.tasks._program import Form, Thresholds, watch

PACKAGES = {"onnx": ("onnx", "onnxruntime"), "openvino": ("onnx", "openvino"), "torchscript": (), "torch": ()}


def certify(
    detector: Detector,
    bundle: Bundle,
    folder: Path,
    form: Form,
    levels: Thresholds,
    samples: Sequence[Sample],
    *,
    source: str,
    tolerance: float,
    max_drop: float | None = None,
    bisect: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare ``bundle`` with ``detector`` image by image, a batch with its images, and another size with its resize.

    Args:
        detector: fitted.
        bundle: what was exported.
        folder: where it lies.
        form: what it takes.
        levels: of verdict and mask.
        samples: images.
        source: where they come from, in words.
        tolerance: largest difference of map and score allowed, as a share of the map's range.
        max_drop: largest loss of AUROC on ``samples`` allowed, instead of ``tolerance``; for 8-bit models.
        bisect: compare the stages inside as well.
        progress: called with (done, total, message).

    Raises:
        GateError: a difference beyond what is allowed; says where it began.
        InputError: with ``max_drop``: the samples are not labelled.
    """
    pairs: list[_Pair] = []
    for done, sample in enumerate(samples, start=1):
        picture = read_image(sample.image)
        if not pairs:  # runtimes make things on first use: not what is timed
            _Pair(detector, bundle, form, picture)
        pairs.append(_Pair(detector, bundle, form, picture))
        if progress:
            progress(done, len(samples), "certificate")
    maps, scores = np.stack([pair.map for pair in pairs]), np.array([pair.score for pair in pairs])
    exported, exported_scores, verdicts, found = (np.stack([pair.export[k] for pair in pairs]) for k in range(4))
    expected = np.stack([pair.inside & (pair.map > np.float32(levels.pixel)) for pair in pairs])
    union = int((expected | found).sum())
    certificate: dict[str, Any] = {
        "images": len(pairs),
        "source": source,
        "images_sha256": [None if is_frame(sample.image) else sha256_of(sample.image) for sample in samples],
        "tolerance": tolerance if max_drop is None else None,
        "map_range": float(maps.max() - maps.min()) or 1.0,
        "map_max_difference": float(np.abs(maps - exported).max()),
        "map_mean_difference": float(np.abs(maps - exported).mean()),
        "score_max_difference": float(np.abs(scores - exported_scores).max()),
        "score_mean_difference": float(np.abs(scores - exported_scores).mean()),
        "batch_max_difference": _batch(bundle, pairs[0]) if form.any_batch else None,
        "size_max_difference": _other_size(detector, bundle, form, samples[0]) if form.any_size else None,
        "mask_iou": 1.0 if union == 0 else float((expected & found).sum() / union),
        "verdicts_equal": int(((scores > np.float32(levels.image)) == verdicts).sum()),
        **_facts(bundle, folder, form, pairs),
    }
    if max_drop is not None:
        certificate["accuracy"] = _accuracy(detector, samples, (scores, exported_scores), (maps, exported), max_drop)
        return certificate
    # NaN must not pass: it is neither above nor below.
    equal = all(difference <= tolerance for difference in _differences(certificate).values())
    if form.kind in ("onnx", "openvino") and (bisect or not equal):
        certificate["stages"] = compare_stages(detector, folder / MODELS[form.kind][0], form, pairs[0])
    if not equal:
        raise _unequal(certificate, form, tolerance)
    return certificate


def _facts(bundle: Bundle, folder: Path, form: Form, pairs: Sequence[_Pair]) -> dict[str, Any]:
    """Return what the certificate says of times, versions and files."""
    return {
        "milliseconds": {
            side: round(statistics.median(pair.seconds[side] for pair in pairs) * 1e3, 3)
            for side in ("detector", "export")
        },
        "milliseconds_with_resize": pairs[0].raw,
        "threads": 1,
        "versions": {"adflow": __version__, "python": platform.python_version(), "torch": torch.__version__}
        | {name: version_of(name) for name in ("numpy", "pillow", *PACKAGES[form.kind])},
        "model_sha256": bundle.about["sha256"],
        "bytes": sum((folder / name).stat().st_size for name in MODELS[form.kind]),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _differences(certificate: dict[str, Any]) -> dict[str, float]:
    """Return the largest differences as shares of the map's range, by what differs."""
    found = {name: certificate[f"{name}_max_difference"] for name in ("map", "score", "batch", "size")}
    return {name: value / certificate["map_range"] for name, value in found.items() if value is not None}


def _unequal(certificate: dict[str, Any], form: Form, tolerance: float) -> GateError:
    """Return the error for an export that differs by more than ``tolerance``: what most, and where it begins."""
    differences = _differences(certificate)
    worst = max(differences, key=lambda name: differences[name])
    return GateError(
        f"the {form.kind} export is not equal and was removed: {worst} differs by {differences[worst]:.2g} of the "
        f"map's range on {certificate['images']} images, allowed is {tolerance:g}",
        hint=_where(certificate.get("stages"), tolerance),
    )


class _Pair:
    """One image through detector and bundle.

    Attributes:
        map, score: of the detector.
        export: map, score, verdict and mask of the bundle.
        seconds: of the processor that each took; those of a clock tell more of what else the machine did.
        inside: [H, W] bool: the part of the network's input that shows the image.
        raw: the bundle resized the image by itself.
        pixels: what the bundle took.
        images: what the detector took.
    """

    def __init__(self, detector: Detector, bundle: Bundle, form: Form, picture: np.ndarray) -> None:
        assert detector.size is not None
        # 8-bit pictures are rounded after resizing: a program for float images does not do that.
        self.raw = form.any_size and (picture.dtype == np.uint8) == (form.pixels == "uint8")
        began = time.process_time()
        array, box = fit_to(picture, detector.size, detector.keep_aspect)
        resized = time.process_time()
        self.images, self.boxes = torch.from_numpy(array)[None], [box] if detector.keep_aspect else None
        self.inside = np.zeros(detector.size, bool)
        self.inside[box.top : box.top + box.height, box.left : box.left + box.width] = True
        self.pixels = picture[None] if self.raw else bundle.pixels(_cut(self.images, box))
        start = time.process_time()
        scores = detector.score(self.images, self.boxes)
        middle = time.process_time()
        self.export = [output[0] for output in bundle.run(self.pixels)]
        end = time.process_time()
        self.map, self.score = scores.map[0].numpy(), float(scores.image[0])
        self.seconds = {"detector": middle - start + (resized - began if self.raw else 0), "export": end - middle}


def _cut(images: torch.Tensor, box: Box) -> torch.Tensor:
    return images[:, :, box.top : box.top + box.height, box.left : box.left + box.width]


def _batch(bundle: Bundle, pair: _Pair) -> float:
    """Return the largest difference between maps of three images in one batch and one by one."""
    three = np.concatenate([pair.pixels, pair.pixels[:, :, ::-1], pair.pixels[:, ::-1]])
    together = bundle.run(three)[0]
    return max(float(np.abs(together[i] - bundle.run(three[i : i + 1])[0][0]).max()) for i in range(3))


def _other_size(detector: Detector, bundle: Bundle, form: Form, sample: Sample) -> float:
    """Return the largest difference of the map on an image of another size and shape."""
    picture = read_image(sample.image)
    if picture.dtype != np.uint8:
        pair = _Pair(detector, bundle, form, np.ascontiguousarray(picture[::2]))
    else:
        height, width = picture.shape[:2]
        smaller = Image.fromarray(picture).resize((max(2, width * 2 // 3), max(2, height * 4 // 5)))
        pair = _Pair(detector, bundle, form, np.asarray(smaller))
    return float(np.abs(pair.map - pair.export[0]).max())


def _accuracy(
    detector: Detector,
    samples: Sequence[Sample],
    scores: tuple[np.ndarray, np.ndarray],
    maps: tuple[np.ndarray, np.ndarray],
    max_drop: float,
) -> dict[str, Any]:
    """Return image and pixel AUROC of detector and export.

    Raises:
        InputError: the samples are not labelled, or all alike.
        GateError: one of them falls by more than ``max_drop``.
    """
    labels = [sample.label for sample in samples]
    if None in labels or len(set(labels)) < 2:
        raise InputError(
            "the accuracy of an 8-bit model is measured on good and defective images",
            hint="Give --images a data set with both.",
        )
    found = {"image_auroc": [image_metrics(side, [int(bool(x)) for x in labels]).auroc for side in scores]}
    if all(sample.mask is not None for sample in samples if sample.label):
        assert detector.size is not None
        masks = [
            None
            if sample.mask is None
            else mask_to(read_mask(sample.mask, sample.mask_index), detector.size, detector.keep_aspect)
            for sample in samples
        ]
        found["pixel_auroc"] = [pixel_metrics(side, masks).auroc for side in maps]
    drop = max(before - after for before, after in found.values())
    if not drop <= max_drop:
        name = max(found, key=lambda key: found[key][0] - found[key][1])
        before, after = found[name]
        raise GateError(
            f"the 8-bit export was removed: {name.replace('_', ' ').replace('auroc', 'AUROC')} fell from "
            f"{before:.4f} to {after:.4f} on {len(samples)} images, allowed is {max_drop:g}",
            hint="Raise --max-drop, or use --half.",
        )
    return {**found, "drop": drop, "max_drop": max_drop}


def compare_stages(detector: Detector, model: Path, form: Form, pair: _Pair) -> list[dict[str, Any]]:
    """Compare what every module gives, in order: name, largest difference, and its share of the range."""
    with watch(detector) as stages, torch.inference_mode():
        scores = detector._score(pair.images, pair.boxes)
    ours = dict(zip(stages.names, stages.values, strict=True)) | {"map": scores.map, "score": scores.image}
    read = _onnx_stages if form.kind == "onnx" else _openvino_stages
    theirs = read(model, pair.pixels)
    # Fused kernels skip modules that an export runs: one that ran another number of times cannot be told apart.
    runs, exported = (Counter(name.partition(" #")[0] for name in side) for side in (ours, theirs))
    rows = []
    for name, value in theirs.items():
        module = name.partition(" #")[0]
        if runs[module] != exported[module] or value.size != ours[name].numel():
            continue
        mine = ours[name].numpy()
        difference = float(np.abs(mine - value.reshape(mine.shape)).max())
        reference = ours["map"].numpy() if name == "score" else mine
        span = float(reference.max() - reference.min())
        rows.append({"stage": name, "max_difference": difference, "of_range": difference / (span or 1.0)})
    return rows


def _onnx_stages(model: Path, pixels: np.ndarray) -> dict[str, np.ndarray]:
    import onnx

    from adflow.tasks._onnx import STAGE, with_stages

    shown, names = with_stages(onnx.load(str(model)))
    wanted = [f"{STAGE}{name}" for name in names] + ["map", "score"]
    found = onnx_session(shown.SerializeToString()).run(wanted, {"images": pixels})
    return dict(zip([*names, "map", "score"], found, strict=True))


def _openvino_stages(model: Path, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Return the stages that have kept their names; inside a batch's loop there are none."""
    import openvino

    from adflow.tasks._onnx import STAGE

    whole = openvino.Core().read_model(str(model))
    names: list[str] = []
    for operation in whole.get_ordered_ops():
        for output in operation.outputs():
            names += [name.removeprefix(STAGE) for name in output.get_names() if name.startswith(STAGE)]
    if names:
        whole.add_outputs([f"{STAGE}{name}" for name in names])
    found = openvino_model(whole)([pixels])
    stages = {name: np.array(found[f"{STAGE}{name}"]) for name in names}
    return stages | {"map": np.array(found[0]), "score": np.array(found[1])}


def _where(stages: list[dict[str, Any]] | None, tolerance: float) -> str:
    if stages is None:
        return "Use --format onnx --bisect to see where it begins, or another format."
    for number, row in enumerate(stages):
        if not row["of_range"] <= tolerance:
            before = f"{stages[number - 1]['stage']} is still equal" if number else "the first stage compared"
            return f"It begins at {row['stage']} ({row['of_range']:.2g} of its range); {before}."
    return "No stage of the first image differs: it depends on the image, its size or the batch."
