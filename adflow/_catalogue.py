"""What an entry of ``zoo.yaml`` is, and the check of every field; plumbing of ``zoo.py``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from adflow.errors import InputError

KINDS = ("datasets", "backbones", "detectors")
_HEX = re.compile(r"[0-9a-f]+")
_T = TypeVar("_T")


def brief(value: Any) -> str:
    """Write a value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


@dataclass(frozen=True, slots=True)
class Paper:
    """What to cite."""

    title: str
    year: int
    url: str


@dataclass(frozen=True, slots=True)
class Licence:
    """Terms of use; ``commercial`` is None where the sources are silent or disagree."""

    name: str
    url: str
    commercial: bool | None
    note: str


@dataclass(frozen=True, slots=True)
class Source:
    """One place to have a file from: a URL, a hub repository, or an installed package."""

    url: str | None = None
    hub: str | None = None
    type: str = "model"
    revision: str | None = None
    package: str | None = None
    module: str | None = None
    path: str | None = None

    @property
    def pinned(self) -> bool:
        """Whether a full commit fixes the content."""
        return self.hub is not None and bool(re.fullmatch(r"[0-9a-f]{40}", self.revision or ""))

    def __str__(self) -> str:
        if self.url:
            return self.url
        return f"hub:{self.hub}@{self.revision}/{self.path}" if self.hub else f"package:{self.package}"


@dataclass(frozen=True, slots=True)
class File:
    """One file, its sources in order of preference, and what is known to check it by.

    ``unpacked`` is the number of bytes an archive may hold (None: a multiple of its size), ``strip`` the
    folder that an archive wraps its content in.
    """

    name: str
    sources: tuple[Source, ...]
    sha256: str | None = None
    sha256_starts: str | None = None
    bytes: int | None = None
    unpacked: int | None = None
    strip: str | None = None
    origin: str = ""

    @property
    def trust(self) -> str:
        """Say what vouches for the file: sha256, sha256 prefix, pinned commit or nothing."""
        if self.sha256:
            return "sha256"
        if self.sha256_starts:
            return "sha256 prefix"
        return "pinned commit" if any(source.pinned for source in self.sources) else "not verified"


@dataclass(frozen=True, slots=True)
class DataClass:
    """One class (MVTec: cable) of a data set: files expected per kind, and its own archive if any."""

    counts: Mapping[str, int | None]
    verified: bool
    archive: File | None = None


@dataclass(frozen=True, slots=True)
class DatasetEntry:
    """A data set. ``folders`` maps each kind of ``counts`` to globs; a leading ``!`` excludes."""

    name: str
    title: str
    paper: Paper
    licence: Licence
    layout: str | None
    archive: File
    folders: Mapping[str, tuple[str, ...]]
    classes: Mapping[str, DataClass]
    see_also: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BackboneEntry:
    """A pretrained network: its timm name and weight file, or the names of the ``parts`` it is made of."""

    name: str
    timm: str | None
    paper: Paper
    licence: Licence
    weights: tuple[File, ...]
    parts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DetectorEntry:
    """A fitted detector. ``paper`` holds its authors' figures, ``measured`` ours; they are never merged."""

    name: str
    title: str
    method: str
    backbone: str
    dataset: str
    format: str
    parameters: Mapping[str, Any]
    selected_by: str
    paper: Mapping[str, float] | None
    measured: Mapping[str, float] | None
    licence: Licence
    file: File
    page: str | None = None


Entries = tuple[dict[str, DatasetEntry], dict[str, BackboneEntry], dict[str, DetectorEntry]]


def decode(raw: Mapping[str, Any]) -> Entries:
    """Turn the mapping read from YAML into entries, checking every field.

    Raises:
        InputError: a field is missing, unknown or of the wrong type; names the field.
    """
    _fields(raw, "zoo.yaml", required=("version",), optional=KINDS)
    if raw["version"] != 1:
        raise InputError(f"zoo.yaml: version is {brief(raw['version'])}, expected 1", hint="Install a newer adflow.")
    datasets = {k: _dataset(k, v) for k, v in _named(raw, "datasets")}
    backbones = {k: _backbone(k, v) for k, v in _named(raw, "backbones")}
    detectors = {k: _detector(k, v) for k, v in _named(raw, "detectors")}
    for entry in backbones.values():
        for part in entry.parts:
            if part not in backbones:
                where = f"zoo.yaml: backbones.{entry.name}.parts"
                raise InputError(f"{where}: {brief(part)} is no backbone of the catalogue")
    for detector in detectors.values():
        where = f"zoo.yaml: detectors.{detector.name}"
        if detector.backbone not in backbones:
            raise InputError(f"{where}.backbone: {brief(detector.backbone)} is no backbone of the catalogue")
        family, _, class_ = detector.dataset.partition("/")
        if family not in datasets or (class_ and class_ not in datasets[family].classes):
            raise InputError(f"{where}.dataset: {brief(detector.dataset)} is no data set of the catalogue")
    return datasets, backbones, detectors


def _fields(raw: Any, where: str, required: Iterable[str], optional: Iterable[str] = ()) -> None:
    """Check that ``raw`` is a mapping with all ``required`` fields and none beyond the ``optional`` ones."""
    if not isinstance(raw, Mapping):
        raise InputError(f"{where} is {type(raw).__name__}, expected a mapping")
    known = [*required, *optional]
    for key in raw:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            guess = f"did you mean '{near[0]}'? " if near else ""
            raise InputError(f"{where}: unknown field {brief(key)}; {guess}Known: {', '.join(known)}")
    missing = [key for key in required if key not in raw]
    if missing:
        raise InputError(f"{where}: missing {', '.join(missing)}")


def _typed(raw: Mapping[str, Any], key: str, where: str, kind: type[_T]) -> _T:
    """Return ``raw[key]``, which must be exactly of type ``kind``."""
    value = raw.get(key)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise InputError(f"{where}.{key} is {brief(value)}, expected {kind.__name__}")
    return value


def _maybe(raw: Mapping[str, Any], key: str, where: str, kind: type[_T]) -> _T | None:
    return None if raw.get(key) is None else _typed(raw, key, where, kind)


def _named(raw: Mapping[str, Any], kind: str) -> list[tuple[str, Any]]:
    entries = {} if raw.get(kind) is None else raw[kind]
    if not isinstance(entries, dict):
        raise InputError(f"zoo.yaml: {kind} is {type(entries).__name__}, expected a mapping of names")
    for name in entries:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise InputError(
                f"zoo.yaml: {kind}: name {brief(name)} must be text of letters, digits, dot, dash, underscore"
            )
    return list(entries.items())


def _texts(raw: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = raw.get(key) or []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise InputError(f"{where}.{key} is {brief(value)}, expected a list of text")
    return tuple(value)


def _url(raw: Mapping[str, Any], key: str, where: str) -> str:
    value = _typed(raw, key, where, str)
    if not re.match(r"https?://[^\s/]+", value):
        raise InputError(f"{where}.{key} is {brief(value)}, expected http:// or https://")
    return value


def _paper(raw: Any, where: str) -> Paper:
    _fields(raw, where, ("title", "year", "url"))
    year = _typed(raw, "year", where, int)
    return Paper(_typed(raw, "title", where, str), year, _url(raw, "url", where))


def _licence(raw: Any, where: str) -> Licence:
    _fields(raw, where, ("name", "url", "commercial", "note"))
    commercial = _maybe(raw, "commercial", where, bool)
    note = _typed(raw, "note", where, str)
    if not note.strip():
        raise InputError(f"{where}.note is empty, expected a plain sentence on commercial use")
    return Licence(_typed(raw, "name", where, str), _url(raw, "url", where), commercial, note)


_SOURCE_KINDS: dict[str, tuple[str, ...]] = {
    "url": ("url",),
    "hub": ("hub", "type", "revision", "path"),
    "package": ("package", "module", "path"),
}


def _source(raw: Any, where: str) -> Source:
    kinds = [kind for kind in _SOURCE_KINDS if isinstance(raw, Mapping) and kind in raw]
    if len(kinds) != 1:
        raise InputError(f"{where} must hold exactly one of url, hub, package")
    _fields(raw, where, _SOURCE_KINDS[kinds[0]])
    values = {key: _typed(raw, key, where, str) for key in raw}
    if kinds[0] == "url":
        _url(raw, "url", where)
    if kinds[0] == "hub":
        if values["type"] not in ("model", "dataset"):
            raise InputError(f"{where}.type is {brief(values['type'])}, expected model or dataset")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", values["hub"]):
            raise InputError(f"{where}.hub is {brief(values['hub'])}, expected owner/name")
    return Source(**values)


def _file(raw: Any, where: str) -> File:
    optional = ("sha256_starts", "unpacked", "strip", "from")
    _fields(raw, where, ("name", "sources", "sha256", "bytes"), optional)
    name = _typed(raw, "name", where, str)
    if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
        raise InputError(f"{where}.name is {brief(name)}, expected a plain file name")
    sources = _typed(raw, "sources", where, list)
    if not sources:
        raise InputError(f"{where}.sources is empty, expected at least one")
    sha256 = _maybe(raw, "sha256", where, str)
    starts = _maybe(raw, "sha256_starts", where, str)
    if sha256 is not None and (len(sha256) != 64 or not _HEX.fullmatch(sha256)):
        raise InputError(f"{where}.sha256 is {brief(sha256)}, expected 64 lower-case hexadecimal digits or null")
    if starts is not None and (not 8 <= len(starts) < 64 or not _HEX.fullmatch(starts)):
        raise InputError(f"{where}.sha256_starts is {brief(starts)}, expected 8 to 63 lower-case hexadecimal digits")
    sizes = {key: _maybe(raw, key, where, int) for key in ("bytes", "unpacked")}
    for key, size in sizes.items():
        if size is not None and size <= 0:
            raise InputError(f"{where}.{key} is {size}, expected a positive number or null")
    strip = _maybe(raw, "strip", where, str)
    made = tuple(_source(item, f"{where}.sources[{i}]") for i, item in enumerate(sources))
    origin = _maybe(raw, "from", where, str) or ""
    return File(name, made, sha256, starts, sizes["bytes"], sizes["unpacked"], strip, origin)


def _counts(raw: Any, where: str) -> dict[str, int | None]:
    if not isinstance(raw, dict) or not raw:
        raise InputError(f"{where} is {brief(raw)}, expected numbers of files per kind")
    return {str(key): _maybe(raw, key, where, int) for key in raw}


def _dataset(name: str, raw: Any) -> DatasetEntry:
    where = f"zoo.yaml: datasets.{name}"
    required = ("title", "paper", "licence", "layout", "archive", "folders", "classes")
    _fields(raw, where, required, ("see_also",))
    folders = {key: _texts(raw["folders"], key, f"{where}.folders") for key in _typed(raw, "folders", where, dict)}
    classes = {}
    for class_, value in _typed(raw, "classes", where, dict).items():
        inner = f"{where}.classes.{class_}"
        if not isinstance(class_, str):
            raise InputError(f'{inner}: the name must be text; write "{class_}" in quotes')
        _fields(value, inner, ("counts", "verified"), ("archive",))
        counts = _counts(value["counts"], f"{inner}.counts")
        if set(counts) != set(folders):
            raise InputError(f"{inner}.counts names {', '.join(counts)}, expected {', '.join(folders)}")
        archive = _file(value["archive"], f"{inner}.archive") if value.get("archive") else None
        classes[class_] = DataClass(counts, _typed(value, "verified", inner, bool), archive)
    if not classes:
        raise InputError(f"{where}.classes is empty, expected at least one")
    return DatasetEntry(
        name,
        _typed(raw, "title", where, str),
        _paper(raw["paper"], f"{where}.paper"),
        _licence(raw["licence"], f"{where}.licence"),
        _maybe(raw, "layout", where, str),
        _file(raw["archive"], f"{where}.archive"),
        folders,
        classes,
        _texts(raw, "see_also", where),
    )


def _backbone(name: str, raw: Any) -> BackboneEntry:
    where = f"zoo.yaml: backbones.{name}"
    _fields(raw, where, ("timm", "paper", "licence", "weights"), ("parts",))
    weights = _typed(raw, "weights", where, list)
    parts = _texts(raw, "parts", where)
    if bool(weights) == bool(parts):
        raise InputError(f"{where} must hold either weights or parts")
    return BackboneEntry(
        name,
        _maybe(raw, "timm", where, str),
        _paper(raw["paper"], f"{where}.paper"),
        _licence(raw["licence"], f"{where}.licence"),
        tuple(_file(item, f"{where}.weights[{i}]") for i, item in enumerate(weights)),
        parts,
    )


def _figures(raw: Mapping[str, Any], key: str, where: str) -> dict[str, float] | None:
    value = _maybe(raw, key, where, dict)
    for name, figure in (value or {}).items():
        if isinstance(figure, bool) or not isinstance(figure, int | float):
            raise InputError(f"{where}.{key}.{name} is {brief(figure)}, expected a number")
    return value


def _detector(name: str, raw: Any) -> DetectorEntry:
    where = f"zoo.yaml: detectors.{name}"
    required = ("title", "method", "backbone", "dataset", "format", "parameters", "selected_by")
    _fields(raw, where, (*required, "paper", "measured", "licence", "file"), ("page",))
    return DetectorEntry(
        name=name,
        title=_typed(raw, "title", where, str),
        method=_typed(raw, "method", where, str),
        backbone=_typed(raw, "backbone", where, str),
        dataset=_typed(raw, "dataset", where, str),
        format=_typed(raw, "format", where, str),
        parameters=_typed(raw, "parameters", where, dict),
        selected_by=_typed(raw, "selected_by", where, str),
        paper=_figures(raw, "paper", where),
        measured=_figures(raw, "measured", where),
        licence=_licence(raw["licence"], f"{where}.licence"),
        file=_file(raw["file"], f"{where}.file"),
        page=_maybe(raw, "page", where, str),
    )
