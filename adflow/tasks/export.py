"""``export``: a detector as a file, on the hub, or as a bundle that is proven to give the same scores."""

from __future__ import annotations

import errno
import json
import math
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adflow import __version__, zoo
from adflow._card import _METRICS, model_card
from adflow._files import atomic_write, is_full, make_folder, write_error
from adflow._lock import claim
from adflow.bundle import CALIBRATION, CERTIFICATE, METADATA, MODELS, load_bundle, need, onnx_session, sha256_of
from adflow.data import Sample
from adflow.detector import Detector, Progress
from adflow.detector_file import digest, load_detector, read_header
from adflow.errors import GateError, InputError
from adflow.features import one_thread
from adflow.fetch import push_detector
from adflow.imaging import fit_to, read_image
from adflow.runs import runs_folder
from adflow.tasks._point import operating_point
from adflow.tasks._program import Thresholds, watch, with_stages, write_program
from adflow.tasks.score import verdict_rate

FORMATS = tuple(MODELS)
# Of the map's range: what float32 kernels that add in another order differ by is some 1e-6, an error is more.
TOLERANCE = 1e-4

_PREDICT = '''"""python predict.py IMAGE...: score, verdict, marked share. Needs numpy, onnxruntime and pillow only.

For 8-bit pictures without transparency; `adflow score --model .` reads all kinds and gives p-values and regions.
"""
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

here = Path(__file__).resolve().parent
about = json.loads((here / "metadata.json").read_text(encoding="utf-8"))
height, width = about["input"]["size"]
session = onnxruntime.InferenceSession(str(here / about["model"]), providers=["CPUExecutionProvider"])
for name in sys.argv[1:]:
    picture = ImageOps.exif_transpose(Image.open(name)).convert("RGB")
    picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    pixels = np.asarray(picture, dtype=np.float32)[None]  # [1, H, W, 3], 0..255
    anomaly_map, score, verdict, mask = session.run(["map", "score", "verdict", "mask"], {"images": pixels})
    label = about["labels"][int(verdict[0])] if about["thresholds"]["image"] is not None else None
    print(json.dumps({"image": name, "score": float(score[0]), "verdict": label, "marked": float(mask[0].mean())}))
'''


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
        provenance={k: v for k, v in header["provenance"].items() if k != "command"} | {"digest": header["digest"]},
    )
    return {"repo": repo, "commit": push_detector(model, repo, card, private=private), "licence": terms}


def licence_of(data: str) -> dict[str, str]:
    """Return name and note of the terms that training data put on what was fitted on them."""
    entry = zoo.load().datasets.get(data.partition("/")[0])
    if entry is not None:
        return {"name": entry.licence.name, "note": entry.licence.note}
    if data.startswith("demo"):
        return {"name": "Apache-2.0", "note": "The demo images are drawn by adflow."}
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
    # p = (1 + #{held >= s}) / (n + 1) <= rate exactly where s is above the k-th highest held-out score.
    k = math.floor(rate * (1 + 1e-9) * (calibration.n + 1)) - 1
    image = float(np.sort(calibration.scores)[::-1][min(max(k, 0), calibration.n - 1)])
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
    kind: str,
    samples: Sequence[Sample],
    *,
    tolerance: float = TOLERANCE,
    weights: Path | None = None,
    bisect: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a bundle to the folder ``out`` and prove on ``samples`` that it gives the detector's scores.

    Args:
        model: detector file.
        out: folder; a bundle that is there is replaced.
        kind: one of :data:`FORMATS`.
        samples: images of the certificate.
        tolerance: largest difference of map and score allowed, as a share of the map's range.
        weights: local weight file of the backbone.
        bisect: compare the stages inside as well (ONNX).
        progress: called with (done, total, message).

    Returns:
        The certificate, with "bundle".

    Raises:
        UnavailableError: a package is missing, or the format cannot hold the method.
        GateError: the export differs; nothing is left behind.
    """
    if kind == "onnx":
        need(("onnx", "onnxruntime", "onnxscript"), "--format onnx")
    if not samples:
        raise InputError("there is no image to prove the export on", hint="Give some with --images.")
    if out.exists() and not (out / CERTIFICATE).is_file():
        raise InputError(f"{out} is there and no bundle", hint="Choose another --out.")
    detector = load_detector(model, weights=weights)
    if detector.keep_aspect:
        raise InputError(
            "a letterboxed detector cannot be exported: the border its image score leaves out differs per image",
            hint="Fit with --stretch.",
        )
    levels, about = thresholds_of(detector)
    beside, old = (out.with_name(f".{out.name}.{word}") for word in ("partial", "old"))
    with claim(out.parent):
        try:
            # A process killed between the two moves below leaves the bundle under its second name.
            if old.exists() and not out.exists():
                old.replace(out)
            for stale in (beside, old):
                shutil.rmtree(stale, ignore_errors=True)
            make_folder(beside)
            write_program(detector, levels, kind, beside / MODELS[kind])
            _write_about(detector, model, beside, kind, about)
            with one_thread():
                certificate = certify(detector, beside, kind, samples, tolerance, bisect, progress)
            certificate["detector_sha256"] = sha256_of(model)
            (beside / CERTIFICATE).write_text(json.dumps(certificate, indent=2) + "\n", encoding="utf-8")
            if out.exists():
                out.replace(old)
            beside.replace(out)
        except OSError as error:
            raise write_error(out, error) from error
        except RuntimeError as error:
            # torch's writers have no better word for a full disk.
            if "writ" in str(error) and is_full(beside):
                raise write_error(out, OSError(errno.ENOSPC, "")) from error
            raise
        finally:
            for stale in (beside, old):
                shutil.rmtree(stale, ignore_errors=True)
    return certificate | {"bundle": str(out)}


def _write_about(detector: Detector, model: Path, folder: Path, kind: str, thresholds: dict[str, Any]) -> None:
    header = read_header(model)
    data = str(header["provenance"].get("data") or "")
    net = zoo.load().backbones.get(detector.backbone.name)
    assert detector.size is not None
    if detector.calibration is not None:
        np.savez(folder / CALIBRATION, **detector.calibration.tensors())  # type: ignore[arg-type]  # numpy's stub
    metadata = {
        "format": 1,
        "kind": kind,
        "model": MODELS[kind],
        "sha256": sha256_of(folder / MODELS[kind]),
        "input": {
            "name": "images",
            "layout": "[B, H, W, 3], RGB, float32 in 0..255",
            "size": list(detector.size),
            "batch": 1 if kind == "torch" else "any",
            "resize": "Pillow, bilinear, antialiased, to the size",
        },
        "outputs": {
            "map": "[B, H, W] float32, higher = more anomalous",
            "score": "[B] float32, higher = more anomalous",
            "verdict": "[B] bool: score > thresholds.image",
            "mask": "[B, H, W] bool: map > thresholds.pixel",
        },
        "labels": ["good", "defect"],
        "thresholds": thresholds,
        "licences": {
            "training data": licence_of(data),
            "backbone": None if net is None else {"name": net.licence.name, "note": net.licence.note},
        },
        "calibration": CALIBRATION if detector.calibration is not None else None,
        "detector": header,
    }
    (folder / METADATA).write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    if kind == "onnx":
        (folder / "predict.py").write_text(_PREDICT, encoding="utf-8")


def certify(
    detector: Detector,
    folder: Path,
    kind: str,
    samples: Sequence[Sample],
    tolerance: float,
    bisect: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare the bundle in ``folder`` with ``detector`` image by image, and a batch with its images.

    Raises:
        GateError: a difference beyond ``tolerance``; says where it began, for ONNX.
    """
    bundle = load_bundle(folder)
    assert detector.size is not None
    arrays = [fit_to(read_image(sample.image), detector.size)[0] for sample in samples]
    ours, theirs, masks = [], [], []
    seconds: dict[str, list[float]] = {"detector": [], "export": []}
    for done, array in enumerate(arrays, start=1):
        images = torch.from_numpy(array)[None]
        ours.append(_timed(seconds["detector"], lambda images=images: detector.score(images)))  # type: ignore[misc]
        theirs.append(_timed(seconds["export"], lambda images=images: bundle.score(images)))  # type: ignore[misc]
        masks.append(bundle.run(np.ascontiguousarray((images * 255).permute(0, 2, 3, 1).numpy()))[2:])
        if progress:
            progress(done, len(arrays), "certificate")
    first, second = (torch.cat([s.map for s in side]).numpy() for side in (ours, theirs))
    scores, exported = (torch.cat([s.image for s in side]).numpy() for side in (ours, theirs))
    span = float(first.max() - first.min()) or 1.0
    levels, _ = thresholds_of(detector)
    expected = first > np.float32(levels.pixel)
    found = np.concatenate([mask[1] for mask in masks])
    verdicts = np.concatenate([mask[0] for mask in masks])
    together = bundle.run(np.stack([np.ascontiguousarray((a * 255).transpose(1, 2, 0)) for a in arrays[:3]]))
    union = int((expected | found).sum())
    certificate: dict[str, Any] = {
        "images": len(arrays),
        "tolerance": tolerance,
        "map_range": span,
        "map_max_difference": float(np.abs(first - second).max()),
        "map_mean_difference": float(np.abs(first - second).mean()),
        "score_max_difference": float(np.abs(scores - exported).max()),
        "score_mean_difference": float(np.abs(scores - exported).mean()),
        "batch_max_difference": float(np.abs(together[0] - second[:3]).max()),
        "mask_iou": 1.0 if union == 0 else float((expected & found).sum() / union),
        "verdicts_equal": int(((scores > np.float32(levels.image)) == verdicts).sum()),
        "milliseconds": {name: round(statistics.median(took) * 1e3, 3) for name, took in seconds.items()},
        "threads": 1,
        "versions": {"adflow": __version__, "python": platform.python_version(), "torch": torch.__version__}
        | {name: version_of(name) for name in ("numpy", "onnx", "onnxruntime") if kind == "onnx" or name == "numpy"},
        "model_sha256": bundle.about["sha256"],
        "bytes": (folder / MODELS[kind]).stat().st_size,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    differences = [certificate[f"{name}_max_difference"] / span for name in ("map", "score", "batch")]
    # NaN must not pass: it is neither above nor below.
    equal = all(difference <= tolerance for difference in differences)
    if kind == "onnx" and (bisect or not equal):
        certificate["stages"] = compare_stages(detector, folder / MODELS[kind], arrays[0])
    if not equal:
        raise GateError(
            f"the {kind} export is not equal and was removed: {max(differences):.2g} of the map's range on "
            f"{len(arrays)} images, allowed is {tolerance:g}",
            hint=_where(certificate.get("stages"), tolerance),
        )
    return certificate


def _timed(seconds: list[float], call: Callable[[], Any]) -> Any:
    began = time.perf_counter()
    result = call()
    seconds.append(time.perf_counter() - began)
    return result


def version_of(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return version(package) if find_spec(package) else None
    except PackageNotFoundError:
        return None


def compare_stages(detector: Detector, model: Path, array: np.ndarray) -> list[dict[str, Any]]:
    """Compare the tensors between image and score, in order: name, largest difference, and its share of the range."""
    import onnx

    images = torch.from_numpy(array)[None]
    with watch(detector) as stages:
        scores = detector.score(images)
    names = [*stages.names, "map", "score"]
    ours = [value.numpy() for value in stages.values] + [scores.map.numpy(), scores.image.numpy()]
    shown = with_stages(onnx.load(str(model)), stages.names)
    wanted = [f"stage_one_{name}".replace(" ", "_") for name in stages.names] + ["map", "score"]
    pixels = np.ascontiguousarray((array * 255).transpose(1, 2, 0))[None]
    theirs = onnx_session(shown.SerializeToString()).run(wanted, {"images": pixels})
    rows = []
    for name, a, b in zip(names, ours, theirs, strict=True):
        difference = float(np.abs(a - np.asarray(b).reshape(a.shape)).max())
        span = float(ours[-2].max() - ours[-2].min()) if name == "score" else float(a.max() - a.min())
        rows.append({"stage": name, "max_difference": difference, "of_range": difference / (span or 1.0)})
    return rows


def _where(stages: list[dict[str, Any]] | None, tolerance: float) -> str:
    if stages is None:
        return "Use --format onnx --bisect to see where it begins, or another format."
    for number, row in enumerate(stages):
        if not row["of_range"] <= tolerance:
            before = f"{stages[number - 1]['stage']} is still equal" if number else "the first stage compared"
            return f"It begins at {row['stage']} ({row['of_range']:.2g} of its range); {before}."
    return "No stage of the first image differs: it depends on the image or the batch."


def default_samples(count: int = 8) -> list[Sample]:
    """Return test images of the demo, good and defective in turn."""
    from adflow.data import open_data

    (data, *_) = open_data("demo/brick")
    good, bad = ([s for s in data.test if s.label == label] for label in (0, 1))
    return [sample for pair in zip(good, bad, strict=False) for sample in pair][:count]
