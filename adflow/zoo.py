"""The catalogue: read ``zoo.yaml``, find an entry by the name a user types.

The file lists data sets, backbones and fitted detectors with sources, hashes, licences and figures; its head
explains every field, and ``_catalogue.py`` checks each of them. A user's own file (``--zoo FILE``,
``ADFLOW_ZOO``) is merged over it, field by field. Nothing here touches the network or loads torch.

    >>> from adflow import zoo
    >>> entry, class_ = zoo.load().dataset("mvtec/cable")
    >>> entry.classes["cable"].counts["train"]
    224
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import platformdirs
import yaml

from adflow._catalogue import (
    KINDS,
    BackboneEntry,
    DataClass,
    DatasetEntry,
    DetectorEntry,
    File,
    Licence,
    Paper,
    Source,
    decode,
)
from adflow._files import expanded
from adflow.errors import InputError, UnavailableError, unknown

__all__ = [
    "KINDS",
    "BackboneEntry",
    "DataClass",
    "DatasetEntry",
    "DetectorEntry",
    "Entry",
    "File",
    "Licence",
    "Paper",
    "Source",
    "Zoo",
    "data_folder",
    "decode",
    "home",
    "load",
    "shipped",
]


# Ours has some thousand.
_NODES = 100_000


def home() -> Path:
    """Return the cache folder: ``ADFLOW_HOME``, else the user's cache folder of this system."""
    chosen = os.environ.get("ADFLOW_HOME")
    return expanded(chosen) if chosen else Path(platformdirs.user_cache_dir("adflow", appauthor=False))


def data_folder(name: str, root: Path | None = None) -> Path:
    """Return where the data set ``name`` (without its class) lies: ``root/name``, or ``<home>/data/name``."""
    return (root if root is not None else home() / "data") / name.split("/")[0]


Entry = DatasetEntry | BackboneEntry | DetectorEntry


@dataclass(frozen=True, slots=True)
class Zoo:
    """The whole catalogue, checked."""

    datasets: Mapping[str, DatasetEntry]
    backbones: Mapping[str, BackboneEntry]
    detectors: Mapping[str, DetectorEntry]

    def names(self) -> list[str]:
        """Return every name that `adflow download` takes, without the classes of data sets."""
        return [*self.datasets, *self.backbones, *self.detectors]

    def find(self, name: str) -> Entry:
        """Return the entry called ``name`` (``mvtec``, ``mvtec/cable``, ``resnet18``, ``uflow-mvtec-cable``).

        Raises:
            UsageError: there is none; names the nearest.
        """
        if name in self.backbones:
            return self.backbones[name]
        if name in self.detectors:
            return self.detectors[name]
        if name.split("/")[0] in self.datasets:
            return self.dataset(name)[0]
        raise unknown("name", name, self.names())

    def dataset(self, name: str) -> tuple[DatasetEntry, str | None]:
        """Return the data set and the class of ``"mvtec/cable"``; the class is None for ``"mvtec"``."""
        family, _, class_ = name.partition("/")
        if family not in self.datasets:
            raise unknown("data set", family, self.datasets)
        entry = self.datasets[family]
        if class_ and class_ not in entry.classes:
            raise unknown(f"class of {family}", class_, entry.classes)
        return entry, class_ or None

    def to_dict(self) -> dict[str, Any]:
        """Return the catalogue as plain lists and dictionaries, as `adflow list --json` prints it."""
        return {kind: {k: _plain(v) for k, v in getattr(self, kind).items()} for kind in KINDS}


def load(extra: Path | None = None) -> Zoo:
    """Read the shipped catalogue, then ``ADFLOW_ZOO``, then ``extra``, each merged over the one before.

    Raises:
        InputError: a file is not YAML, or a field is missing, unknown or of the wrong type; names the field.
        UnavailableError: a file asked for does not exist.
    """
    raw = _read(shipped())
    said = os.environ.get("ADFLOW_ZOO")
    for path in [expanded(said) if said else None, extra]:
        if path is not None:
            raw = _merge(raw, _read(path))
    return Zoo(*decode(raw))


def shipped() -> Path:
    """Return the catalogue that came with adflow: inside an installed wheel, or at the top of a checkout."""
    inside = Path(str(resources.files("adflow"))) / "zoo.yaml"
    for path in (inside, inside.parent.parent / "zoo.yaml"):
        if path.is_file():
            return path
    raise UnavailableError("zoo.yaml is missing from this installation", hint="Install adflow again.")


def _construct(text: str) -> Any:
    """Return what the YAML ``text`` holds; unlike YAML's own reader, refuse a key that is given twice."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
    try:
        document = loader.get_single_node()
        waiting, left = [document], _NODES
        while waiting:
            node = waiting.pop()
            left -= 1
            # A few lines of aliases of aliases are millions of values, and one that holds itself has no end.
            if left < 0 and node is not None:
                raise yaml.MarkedYAMLError(None, None, f"it holds more than {_NODES} values", node.start_mark)
            if isinstance(node, yaml.MappingNode):
                # Keys that are not plain are refused by the loader.
                keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
                for key in (key for key, count in keys.items() if count > 1):
                    raise yaml.MarkedYAMLError(None, None, f"'{key}' is given twice", node.start_mark)
                waiting.extend(value for _, value in node.value)
            elif isinstance(node, yaml.SequenceNode):
                waiting.extend(node.value)
        return loader.construct_document(document) if document is not None else None
    finally:
        loader.dispose()


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UnavailableError(f"cannot read the catalogue {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error.reason}") from error
    try:
        raw = _construct(text)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        # What PyYAML says itself; then days, numbers and truth values that are none; then nesting.
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise InputError(f"{path} holds {type(raw).__name__}, expected a mapping with {', '.join(KINDS)}")
    return raw


def _merge(base: Any, over: Any) -> Any:
    """Return ``over`` merged over ``base``: mappings field by field, everything else replaced."""
    if isinstance(base, dict) and isinstance(over, dict):
        return base | {key: _merge(base.get(key), value) for key, value in over.items()}
    return over


def _plain(value: Any) -> Any:
    """Turn dataclasses, tuples and mappings into what JSON holds."""
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
