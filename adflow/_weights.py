"""Weight files of pretrained nets: find them, hash them, read them without executing anything.

A weight file is a path the user gives, or what the catalogue names: inside an installed package (the lite
nets), on a model hub, or behind a URL; those come through ``fetch``, which verifies them.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from adflow import zoo
from adflow._files import sha256_of
from adflow.errors import InputError, UnavailableError
from adflow.fetch import fetch

OFFLINE_CHOICE = "Use --backbone lite0, whose weights come with adflow, or give a file with --weights."
_READABLE = "Expected a .safetensors file, or a torch file of tensors: torch.save(model.state_dict(), FILE)."


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A file on this machine and the sha256 of its bytes."""

    path: Path
    sha256: str


def find_weights(name: str, given: Path | None = None, fallback: zoo.File | None = None) -> WeightFile:
    """Return the weight file of the backbone ``name``.

    Args:
        name: of the backbone.
        given: a local file that the user chose.
        fallback: where the file is when the catalogue does not know the backbone. Nobody has vouched for such
            a file: its hash is written down at the first download and checked ever after.

    Raises:
        InputError: the given file cannot be read.
        UnavailableError: the weights are not on this machine and cannot be fetched; names the offline choice.
    """
    if given is not None:
        return WeightFile(Path(given), hash_file(Path(given)))
    entry = zoo.load().backbones.get(name)
    file = entry.weights[0] if entry and entry.weights else fallback
    if file is None:
        raise UnavailableError(f"there are no weights for {name} that adflow knows of", hint=OFFLINE_CHOICE)
    try:
        path = fetch(file, unverified=file is fallback)
    except UnavailableError as error:
        hint = " ".join(part for part in (error.hint, OFFLINE_CHOICE if name != "lite0" else None) if part)
        raise UnavailableError(f"no weights for the backbone {name}: {error}", hint=hint) from error
    return WeightFile(path, file.sha256 or hash_file(path))  # fetch has compared the file with a known hash


def hash_file(path: Path) -> str:
    """Return the sha256 of the bytes of ``path`` in hex; InputError when it cannot be read."""
    try:
        return sha256_of(path)
    except OSError as error:
        raise InputError(
            f"cannot read the weight file {path}: {error.strerror}",
            hint="Give an existing file with --weights.",
        ) from error


def read_tensors(path: Path) -> Any:
    """Return what a .safetensors or a torch file holds: tensors and plain values. Nothing of it is executed.

    Raises:
        InputError: the file is missing, damaged, or holds objects whose loading would run code.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd pickles; what is refused is an error below
            return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except pickle.UnpicklingError as error:
        reason = "it is damaged, or holds more than tensors and plain values, which could run code"
        raise InputError(f"{path} cannot be read as weights: {reason}", hint=_READABLE) from error
    except Exception as error:  # torch's reader lets through whatever a wrong byte led it to: KeyError, struct.error...
        reason = (str(error) or "it is empty").strip().splitlines()[0]
        raise InputError(f"{path} cannot be read as weights: {reason}", hint=_READABLE) from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name, see :func:`read_tensors`.

    Checkpoints that wrap their tensors ({"model": ...}, {"state_dict": ...}) are unwrapped, and the prefix
    "module." that data-parallel training leaves is taken off.

    Raises:
        InputError: the file is missing, damaged, or holds anything but tensors.
    """
    state = read_tensors(path)
    for key in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    named = isinstance(state, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    if not named:
        raise InputError(f"{path} holds something else than named tensors, expected a state dict")
    return {key.removeprefix("module."): value for key, value in state.items()}


_OLD_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_OLD_BLOCK = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
    "_project_conv": "conv_pwl", "_bn2": "bn3",
}  # fmt: skip
_OLD_TOP = {
    "_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier",
}  # fmt: skip


def rename_lite(state: dict[str, Tensor], depths: Iterable[int]) -> dict[str, Tensor]:
    """Return the tensors of an efficientnet_pytorch-style lite checkpoint under timm's names.

    The old names count blocks through (``_blocks.5``); timm counts stages, then blocks (``blocks.2.1``).

    Args:
        state: tensors by old name.
        depths: number of blocks of every stage, e.g. [1, 2, 2, 3, 3, 4, 1].

    Raises:
        InputError: a name does not belong to such a checkpoint.
    """
    places = [f"blocks.{stage}.{block}" for stage, depth in enumerate(depths) for block in range(depth)]
    renamed = {}
    for key, value in state.items():
        match = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
        number = int(match[1]) if match else -1
        layer, _, what = key.partition(".")
        parts = _OLD_FIRST if number == 0 else _OLD_BLOCK
        if match and number < len(places) and match[2] in parts:
            renamed[f"{places[number]}.{parts[match[2]]}.{match[3]}"] = value
        elif not match and layer in _OLD_TOP:
            renamed[f"{_OLD_TOP[layer]}.{what}"] = value
        else:
            raise InputError(f"'{key}' is no tensor of an EfficientNet-Lite checkpoint with {len(places)} blocks")
    return renamed


def load_strictly(net: torch.nn.Module, state: dict[str, Tensor], path: Path, name: str) -> None:
    """Load ``state`` into ``net``, as float32; every name and shape must agree.

    Raises:
        InputError: the file belongs to another net; names the first differences.
    """
    own = net.state_dict()
    # Counters of training steps: old files lack them, and a frozen net does not read them.
    counters = {key: torch.zeros((), dtype=torch.long) for key in own if key.endswith(".num_batches_tracked")}
    state = counters | state
    missing = sorted(set(own) - set(state))
    foreign = sorted(set(state) - set(own))
    shapes = [key for key in own if key in state and own[key].shape != state[key].shape]
    if missing or foreign or shapes:
        parts = [
            f"{what} {len(keys)} ({', '.join(keys[:2])}{', …' if len(keys) > 2 else ''})"
            for what, keys in (("missing", missing), ("unknown", foreign), ("of another shape", shapes))
            if keys
        ]
        raise InputError(
            f"{path} does not hold the weights of {name}: tensors {'; '.join(parts)}",
            hint=f"Give the weight file of {name}.",
        )
    net.load_state_dict(state, strict=True, assign=True)
    net.float()  # files in half precision take the net with them
