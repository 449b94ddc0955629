"""The folder is the registry: ``get("padim")`` imports ``padim.py`` beside this file and takes its one Detector.

Packages outside adflow add methods through the entry-point group ``adflow.methods``: name = "package.module".
"""

from __future__ import annotations

import ast
import contextlib
import pkgutil
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adflow.errors import AdflowError, UsageError, unknown

if TYPE_CHECKING:
    from adflow.detector import Detector

GROUP = "adflow.methods"
# Class attribute of a Detector -> column of `adflow list methods`.
FACTS = {
    "paper": "paper",
    "year": "year",
    "learns": "learns",
    "has_null": "null",
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

    if name not in names() or name.startswith("_"):
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
    known = cls.parameters_of()
    for key, value in (settings or {}).items():
        if key not in known:
            raise unknown(f"setting of {name}", key, known)
        chosen[key] = _typed(key, value, known[key])
    if taps is None and backbone in (None, recipe_backbone):
        taps = recipe_taps
    net = make_backbone(backbone or recipe_backbone, taps=taps, weights=weights)
    return cls(net, **chosen), reading


def _typed(name: str, value: Any, default: Any) -> Any:
    """Check a value from the command line against the type of the parameter's default."""
    if default is None or value is None or isinstance(default, str):
        return value
    try:
        if isinstance(default, bool):
            if not isinstance(value, bool):
                raise ValueError
            return value
        if isinstance(default, int):
            if int(value) != float(value):
                raise ValueError
            return int(value)
        if isinstance(default, float):
            return float(value)
        if isinstance(default, tuple):
            return tuple(value) if isinstance(value, list | tuple) else (value,)
    except (TypeError, ValueError):
        raise UsageError(
            f"setting {name} is {value!r}, expected a {type(default).__name__} such as {default!r}"
        ) from None
    return value


def facts() -> list[dict[str, Any]]:
    """Return what each method says of itself, read from its source without importing it (and so without torch).

    The class attributes ``paper``, ``year``, ``learns``, ``has_null``, ``fit_cost`` and ``score_cost`` are literals.
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
                        row[FACTS[target.id]] = ast.literal_eval(node.value) if node.value else None
        rows.append(row)
    return rows
