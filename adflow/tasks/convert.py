"""Public checkpoints of the original implementations become adflow detectors.

Read with ``torch.load(weights_only=True)``: a checkpoint that holds anything but tensors and plain values is refused,
because unpickling it would run its code. Formats:

* ``uflow-lightning``: U-Flow's releases (https://github.com/mtailanian/uflow), ``state_dict`` with ``model.flow.*``;
* ``cflow-ad``: CFLOW-AD's (https://github.com/gudovskiy/cflow-ad), ``encoder_state_dict`` and a list
  ``decoder_state_dict``, one per tap. The maxima over the test set that its scores subtract are not in the file, and
  would make a score depend on other images: the map is the sum over taps of -log p / C instead.

A converted detector is not calibrated: no good image has passed it yet (``adflow calibrate RUN FOLDER_OF_GOOD``).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adflow import __version__, methods
from adflow._catalogue import DetectorEntry
from adflow._files import make_folder, sha256_of, write_text
from adflow._weights import read_tensors
from adflow.backbones import Backbone, make_backbone
from adflow.detector import FeatureDetector, FeatureShapes
from adflow.detector_file import digest, save_detector
from adflow.errors import InputError, unknown
from adflow.runs import DETECTOR, runs_folder

FORMATS = ("uflow-lightning", "cflow-ad")


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """Return the content of a torch file of tensors and plain values, by name.

    Raises:
        InputError: not such a file, damaged, or holding objects whose loading would run code.
    """
    found = read_tensors(path)
    if not isinstance(found, Mapping):
        raise InputError(f"{path} holds a {type(found).__name__}, expected a mapping with state dicts")
    return found


def convert(
    path: Path,
    entry: DetectorEntry,
    *,
    runs: Path | None = None,
    backbone: Backbone | None = None,
    weights: Path | None = None,
) -> Path:
    """Write the run folder of the checkpoint at ``path``; return its detector file.

    Args:
        path: the original's checkpoint.
        entry: what the catalogue says of it: method, backbone, format, parameters, figures.
        runs: folder of runs; the run is named like the entry.
        backbone: the net its flow was trained on; None = by the entry's name, with the weights of the catalogue.
        weights: local weight file (or folder, for joined nets) of that backbone.

    Raises:
        InputError: the checkpoint is not one, or does not fit method and backbone.
        UnavailableError: the backbone's weights are not on this machine.
    """
    if entry.format not in FORMATS:
        raise unknown("format of a checkpoint", entry.format, FORMATS)
    checkpoint = read_checkpoint(path)
    class_ = entry.dataset.partition("/")[2] or None
    size = _size(entry)
    read = _uflow if entry.format == "uflow-lightning" else _cflow
    net = backbone or make_backbone(entry.backbone, taps=_taps(entry), weights=weights)
    detector, notes = read(checkpoint, entry, net, class_, size)
    detector.provenance = {
        "adflow": __version__,
        "torch": torch.__version__,
        "data": entry.dataset,
        "recipe": "paper",
        "converted_from": entry.name,
        "checkpoint_sha256": sha256_of(path),
        "selected_by": entry.selected_by,
        "licence": entry.licence.name,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    folder = make_folder(runs_folder(runs) / entry.name)
    file = save_detector(detector, folder / DETECTOR)
    summary = {
        "run": folder.name,
        "detector": str(file),
        "data": entry.dataset,
        "method": entry.method,
        "recipe": "paper",
        "backbone": detector.backbone.name,
        "size": list(size),
        "converted_from": entry.name,
        # The authors' own figures; `adflow evaluate` measures ours, and they are never merged.
        "paper": None if entry.paper is None else dict(entry.paper),
        "selected_by": entry.selected_by,
        "licence": {"name": entry.licence.name, "url": entry.licence.url, "note": entry.licence.note},
        "calibration": None,
        "digest": digest(detector.learned(), {}),
        "notes": notes,
    }
    write_text(folder / "fit.json", json.dumps(summary, indent=2) + "\n")
    return file


def _size(entry: DetectorEntry) -> tuple[int, int]:
    found = entry.parameters.get("size")
    if found is None:
        cls = methods.get(entry.method)
        found = cls.recipe_for("paper", entry.dataset.partition("/")[2] or None).get("size", 256)
    return (found, found) if isinstance(found, int) else (int(found[0]), int(found[1]))


def _taps(entry: DetectorEntry) -> tuple[str, ...] | None:
    """Return the taps the checkpoint was trained on: its own, else the paper recipe's where the backbone is its."""
    if "taps" in entry.parameters:
        return tuple(str(tap) for tap in entry.parameters["taps"])
    recipe = methods.get(entry.method).recipe_for("paper", None)
    return recipe.get("taps") if recipe.get("backbone", "lite0") == entry.backbone else None


def _settings(entry: DetectorEntry) -> dict[str, Any]:
    """Return the constructor's parameters that the entry names; the others are the paper recipe's."""
    own = {key: value for key, value in entry.parameters.items() if key not in ("size", "taps")}
    return methods.checked(methods.get(entry.method), own)


def _prepared(
    method: str, net: Backbone, class_: str | None, size: tuple[int, int], settings: Mapping[str, Any]
) -> FeatureDetector:
    """Return the paper's detector with its tensors created for ``size``, nothing learned."""
    cls = methods.get(method)
    chosen = cls.recipe_for("paper", class_)
    chosen = {key: value for key, value in chosen.items() if key in cls.parameters_of()}
    detector: Any = cls(net, **(chosen | dict(settings)))
    grids = [(-(-size[0] // stride), -(-size[1] // stride)) for stride in net.strides]
    assert isinstance(detector, FeatureDetector)
    return detector.empty(FeatureShapes(list(net.channels), grids, size))


def _tensors(found: Any, name: str) -> dict[str, Tensor]:
    """Return a state dict, checked to be one."""
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise InputError(f"the checkpoint's {name} is missing or is no state dict")
    return {str(key): value for key, value in found.items()}


def _uflow(
    checkpoint: Mapping[str, Any], entry: DetectorEntry, net: Backbone, class_: str | None, size: tuple[int, int]
) -> tuple[FeatureDetector, list[str]]:
    state = _tensors(checkpoint.get("state_dict"), "state_dict")
    settings = _settings(entry)
    if any(".feature_normalizations." in key for key in state):
        settings["norm"] = "affine"
    detector: Any = _prepared("uflow", net, class_, size, settings)
    detector.load_original(state)
    return detector, []


def _cflow(
    checkpoint: Mapping[str, Any], entry: DetectorEntry, net: Backbone, class_: str | None, size: tuple[int, int]
) -> tuple[FeatureDetector, list[str]]:
    from adflow.flows import load_original

    states = checkpoint.get("decoder_state_dict")
    if not isinstance(states, list | tuple) or len(states) != len(net.channels):
        count = len(states) if isinstance(states, list | tuple) else "no list of"
        raise InputError(
            f"the checkpoint has {count} decoders (decoder_state_dict), the backbone {net.name} "
            f"{len(net.channels)} taps: expected one each",
            hint="Give the taps it was trained on under parameters in the zoo entry.",
        )
    decoders = [_tensors(state, f"decoder {number}") for number, state in enumerate(states)]
    blocks = {_blocks(state) for state in decoders}
    first, offset = (decoders[0].get(f"module_list.0.{name}") for name in ("subnet.0.weight", "global_offset"))
    if len(blocks) != 1 or first is None or first.ndim != 2 or offset is None:
        raise InputError("the checkpoint's decoders are no FrEIA chains of equally many blocks (module_list.*)")
    half = offset.numel()
    settings = _settings(entry) | {
        "blocks": blocks.pop(),
        "position": int(first.shape[1] - (half - half // 2)),
        "normaliser": "none",
    }
    detector: Any = _prepared("cflow", net, class_, size, settings)
    for decoder, state in zip(detector.decoders, decoders, strict=True):
        load_original(decoder, state)
    notes = [
        "the original subtracts maxima over its test set, which its file does not hold: "
        "the map here is the sum over taps of -log p / C"
    ]
    if not _same_net(_tensors(checkpoint.get("encoder_state_dict", {}), "encoder_state_dict"), net):
        notes.append(
            f"the encoder in the checkpoint could not be matched with the weights of {net.name}: "
            "if it was trained on others, its scores are worthless here"
        )
    return detector, notes


def _blocks(decoder: Mapping[str, Tensor]) -> int:
    """Return how many FrEIA blocks a decoder has."""
    return len({found[1] for key in decoder if (found := re.match(r"module_list\.(\d+)\.", key))})


def _same_net(encoder: Mapping[str, Tensor], net: Backbone) -> bool:
    """Say whether the encoder's first convolution is the backbone's, up to the scale of a folded normalisation."""
    first = next((value for value in encoder.values() if value.ndim == 4), None)
    ours = next((value for value in net.state_dict().values() if value.ndim == 4 and value.shape[1] == 3
                 and value.shape[2] > 1), None)  # fmt: skip
    if first is None or ours is None or first.shape != ours.shape:
        return False
    a, b = first.flatten(1).double(), ours.flatten(1).double()
    cosine = (a * b).sum(1).abs() / (a.norm(dim=1) * b.norm(dim=1)).clamp_min(1e-30)
    # Filters that are numerically dead keep no direction; most of them decide.
    return bool(cosine.median() > 0.9999)
