"""Compare the files of a data set with what the catalogue expects, and name the odd one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from adflow.errors import InputError
from adflow.zoo import DatasetEntry


def fits(entry: DatasetEntry, classes: Sequence[str], folder: Path) -> bool:
    """Say whether ``folder`` holds at least one file of the first kind of each of ``classes``."""
    first = next(iter(entry.folders.values()))
    return all(any(any(_glob(folder, glob, c)) for glob in first if not glob.startswith("!")) for c in classes)


def compare(entry: DatasetEntry, classes: Sequence[str], folder: Path, names: Sequence[str] | None) -> list[str]:
    """Count the files of each class and kind.

    Args:
        entry: the data set.
        classes: which of its classes.
        folder: where they lie.
        names: what an archive held, to be found on disk again; None: not known.

    Returns:
        Differences from counts that the catalogue only quotes, in words.

    Raises:
        InputError: a difference from counts that are verified; names a missing or extra file.
    """
    lost = next((name for name in names or () if not (folder / name).is_file()), None)
    if lost is not None:
        raise InputError(f"{lost} was unpacked into {folder} and is not there", hint="Run the same command again.")
    notes = []
    for class_ in classes:
        expected = entry.classes[class_]
        found = {kind: _files(folder, globs, class_) for kind, globs in entry.folders.items()}
        for kind, number in expected.counts.items():
            if number is None or len(found[kind]) == number:
                continue
            text = (
                f"{entry.name}/{class_} has {len(found[kind])} {kind} files, expected {number}"
                f"{_odd(kind, number, found)}"
            )
            if expected.verified:
                raise InputError(text, hint="The copy is not the original; get it from another source.")
            notes.append(f"{text} (a number quoted by others, so no error)")
    return notes


def _glob(folder: Path, glob: str, class_: str) -> list[Path]:
    return [path for path in folder.glob(glob.replace("{class}", class_)) if not path.name.startswith(".")]


def _files(folder: Path, globs: Sequence[str], class_: str) -> set[str]:
    """Return the names, relative to ``folder``, that match a glob and none of those with a leading ``!``."""
    found: set[str] = set()
    for glob in globs:
        if not glob.startswith("!"):
            found |= {p.relative_to(folder).as_posix() for p in _glob(folder, glob, class_) if p.is_file()}
    for glob in globs:
        if glob.startswith("!"):
            pattern = glob[1:].replace("{class}", class_)
            found = {name for name in found if not fnmatchcase(name, pattern)}
    return found


def _odd(kind: str, number: int, found: dict[str, set[str]]) -> str:
    """Name a file that is missing or left over: a gap in the numbers, or an image without its mask."""
    names = found[kind]
    folders: dict[str, dict[int, str]] = {}
    for name in names:
        parent, _, last = name.rpartition("/")
        digits = re.match(r"\d+", last)
        if digits:
            folders.setdefault(parent, {})[int(digits[0])] = last
        elif len(names) > number:
            return f"; extra: {name}"
    for parent, numbered in sorted(folders.items()):
        for gap in range(min(min(numbered), 1), max(numbered)):
            if gap not in numbered:
                model = numbered[max(numbered)]
                width = len(model) - len(model.lstrip("0123456789"))
                return f"; missing: {parent}/{gap:0{width}d}{model[width:]}"
    for one, other in (("masks", "defective"), ("defective", "masks")):
        if kind == one and other in found:
            keys = {_key(name) for name in found[other]}
            extra = sorted(name for name in names if _key(name) not in keys)
            if len(names) > number and extra:
                return f"; extra: {extra[0]}"
            here = {_key(name) for name in names}
            lost = sorted(name for name in found[other] if _key(name) not in here)
            if lost:
                return f"; missing: the {one.rstrip('s')} of {lost[0]}"
    last_name = max(names, default="")
    return f"; the last is {last_name}" if last_name else "; there is none"


def _key(name: str) -> tuple[str, str]:
    """Return (kind of defect, stem) of an image or mask."""
    parts = name.split("/")
    return parts[-2], parts[-1].rsplit(".", 1)[0].removesuffix("_mask")
