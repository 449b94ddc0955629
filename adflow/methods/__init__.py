"""The folder is the registry: ``get("padim")`` imports ``padim.py`` beside this file and takes its one Detector.

Packages outside adflow add methods through the entry-point group ``adflow.methods``: name = "package.module".
"""

from __future__ import annotations

import ast
import contextlib
import math
import pkgutil
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

from adflow.errors import AdflowError, UsageError, unknown

if TYPE_CHECKING:
    from adflow.detector import Detector

GROUP = "adflow.methods"
DEFAULT = "cflow"
# Class attribute of a Detector -> field of `adflow list methods --json`; the table shows some of them.
FACTS = {
    "paper": "paper",
    "year": "year",
    "learns": "learns",
    "has_null": "null",
    "recipes": "recipes",
    "fit_cost": "fit_cost",
    "score_cost": "score_cost",
}


def names() -> list[str]:
    """Return the names of all methods, those of other packages included, without importing any."""
    own = {m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")}
    return sorted(own | {point.name for point in entry_points(group=GROUP)})


def get(name: str) -> type[Detector]:
    """Return the Detector class called ``name``.

    Raises:
        UsageError: there is no such method; the nearest names are listed.
    """
    from adflow.detector import Detector

    if name not in names():
        raise unknown("method", name, names())
    points = {point.name: point.value for point in entry_points(group=GROUP)}
    module = import_module(points.get(name, f"{__name__}.{name}"))
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Detector) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise AdflowError(f"{module.__name__} defines {len(found)} Detector classes, expected exactly 1")
    return found[0]


def build(
    name: str,
    *,
    recipe: str = "fast",
    class_: str | None = None,
    backbone: str | None = None,
    taps: tuple[str, ...] | None = None,
    weights: Path | None = None,
    settings: dict[str, Any] | None = None,
) -> tuple[Detector, dict[str, Any]]:
    """Create an unfitted detector from a recipe and the user's own settings.

    Args:
        name: method.
        recipe: "fast" or "paper" (what else a method offers is in its ``recipes``).
        class_: class of the data set, for papers with per-class constants.
        backbone: name of a backbone; None = the recipe's, else lite0.
        taps: names of its taps; None = the recipe's when its backbone is used, else the backbone's own default.
        weights: a local weight file for the backbone.
        settings: constructor parameters that override the recipe.

    Returns:
        The detector, and what of the recipe belongs to reading images ("size", "keep_aspect").
    """
    from adflow.backbones import make_backbone

    cls = get(name)
    chosen = cls.recipe_for(recipe, class_)
    recipe_backbone, recipe_taps = chosen.pop("backbone", "lite0"), chosen.pop("taps", None)
    reading: dict[str, Any] = {key: chosen.pop(key) for key in ("size", "keep_aspect") if key in chosen}
    chosen |= checked(cls, settings or {})
    if taps is None and backbone in (None, recipe_backbone):
        taps = recipe_taps
    net = make_backbone(backbone or recipe_backbone, taps=taps, weights=weights)
    return cls(net, **chosen), reading


def checked(cls: type[Detector], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``settings``, read from text or YAML, as the types of the constructor's parameters.

    Raises:
        UsageError: an unknown name, or a value of another type.
    """
    known, kinds = cls.parameters_of(), _kinds(cls)
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if key not in known:
            raise unknown(f"setting of {cls.method()}", key, known)
        found[key] = _typed(key, value, known[key], kinds.get(key, Any if known[key] is None else type(known[key])))
    return found


def _kinds(cls: type[Detector]) -> dict[str, Any]:
    """Return the annotation of every constructor parameter, base classes included.

    Those that are imported for type checkers alone cannot be looked up; of our own that is the backbone's.
    """
    from adflow.detector import Detector

    found: dict[str, Any] = {}
    for owner in cls.__mro__:
        if issubclass(owner, Detector) and "__init__" in vars(owner):
            with contextlib.suppress(NameError):
                found = get_type_hints(vars(owner)["__init__"], localns={"Backbone": Any}) | found
    return found


def _typed(name: str, value: Any, default: Any, kind: Any) -> Any:
    """Return a value from the command line as its parameter's type; the word none is None where that may be."""
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if NoneType in kinds and value in (None, "none"):
        return None
    for one in kinds:
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            return _as(value, one)
    example = list(default) if isinstance(default, tuple) else default
    such = "" if default is None or isinstance(default, bool) else f" such as {example}"
    raise UsageError(f"setting {name} is {value!r:.60}, expected {' or '.join(map(_words, kinds))}{such}")


def _as(value: Any, kind: Any) -> Any:
    """Return ``value`` as ``kind``; TypeError, ValueError or OverflowError where it is none."""
    if kind is tuple or get_origin(kind) is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_as(item, (get_args(kind) or [Any])[0]) for item in items)
    if kind is NoneType:
        raise TypeError
    if kind not in (bool, int, float, str):
        return value  # of another package's method: its own affair
    if (kind is bool) != isinstance(value, bool):
        raise TypeError
    if kind is bool:
        return value
    if kind is str:
        if not isinstance(value, str | int | float):
            raise TypeError
        return str(value)  # YAML reads --set coreset=4500 as a number
    number = float(value)  # YAML reads --set lr=1e-3 as text
    if not math.isfinite(number) or (kind is int and not number.is_integer()):
        raise ValueError
    return kind(value if isinstance(value, int) else number)


def _words(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return f"a list of {_words(get_args(kind)[0]).removeprefix('a ')}s"
    known = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", NoneType: "none"}
    return known.get(kind, str(kind))


def facts() -> list[dict[str, Any]]:
    """Return what each method says of itself, read from its source without importing it (and so without torch).

    The class attributes of ``FACTS`` are literals, of ``recipes`` the names at least; "tiny" is for tests.
    """
    points = {point.name: point.value for point in entry_points(group=GROUP)}
    rows = []
    for name in names():
        spec = find_spec(points.get(name, f"{__name__}.{name}"))
        row: dict[str, Any] = {"name": name}
        if spec is not None and spec.origin is not None:
            tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                target: ast.expr | None = node.target if isinstance(node, ast.AnnAssign) else None
                if isinstance(node, ast.Assign) and len(node.targets) == 1:
                    target = node.targets[0]
                if isinstance(target, ast.Name) and target.id in FACTS and isinstance(node, ast.Assign | ast.AnnAssign):
                    with contextlib.suppress(ValueError):
                        row[FACTS[target.id]] = _literal(node.value)
        rows.append(row)
    return rows


def _literal(node: ast.expr | None) -> Any:
    """Return the value that a source text writes; of a mapping its names."""
    if isinstance(node, ast.Dict):
        return [key.value for key in node.keys if isinstance(key, ast.Constant) and key.value != "tiny"]
    return ast.literal_eval(node) if node else None
