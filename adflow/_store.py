"""Where fetched files lie in the cache, and how one is known to be right; plumbing of ``fetch.py``.

::

    <home>/files/<sha256>/<name>     verified files; nothing else ever gets a name there
    <home>/partial/<key>/<name>.part what has come so far
    <home>/locks/<key>.lock          so that two processes share one download
    <home>/first_use/<key>.json      hashes of files that came without one, found on the first download
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from importlib import util
from pathlib import Path

from adflow._files import make_folder, sha256_of, write_error, write_text
from adflow.errors import InputError, ResourceError, UnavailableError
from adflow.zoo import File, Source

_CHUNK = 1 << 20


def key(file: File) -> str:
    """Return a short name for what ``file`` is: its hash, else a hash of where it comes from."""
    if file.sha256:
        return file.sha256[:32]
    text = "\n".join([file.name, *map(str, file.sources)])
    return "u-" + hashlib.sha256(text.encode()).hexdigest()[:30]


def known_hash(file: File, home: Path) -> str | None:
    """Return the sha256 ``file`` must have: the catalogue's, else the one found on its first use."""
    if file.sha256:
        return file.sha256
    try:
        first = json.loads((home / "first_use" / f"{key(file)}.json").read_text(encoding="utf-8"))
        return str(first["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def kept(file: File, home: Path) -> Path | None:
    """Return the verified file if it is in the cache."""
    sha256 = known_hash(file, home)
    path = home / "files" / (sha256 or "-") / file.name
    # Only verified files get a name there; the size catches one that was cut by hand or by a broken disk.
    if path.is_file() and (file.bytes is None or path.stat().st_size == file.bytes):
        return path
    return None


def partial(file: File, home: Path) -> Path:
    """Return the path of the partial file, its folder made."""
    return make_folder(home / "partial" / key(file)) / f"{file.name}.part"


def keep(part: Path, file: File, sha256: str, source: str, home: Path) -> Path:
    """Move the verified ``part`` to its name in the cache and return that.

    Raises:
        ResourceError: the disk is full or not writable.
    """
    target = make_folder(home / "files" / sha256) / file.name
    try:
        with part.open("rb+") as stream:
            os.fsync(stream.fileno())
        part.replace(target)
    except OSError as error:
        raise write_error(target, error) from error
    shutil.rmtree(part.parent, ignore_errors=True)
    if not file.sha256:
        first = {"name": file.name, "sha256": sha256, "source": source}
        write_text(home / "first_use" / f"{key(file)}.json", json.dumps(first, indent=1) + "\n")
    return target


def fault(path: Path, file: File, sha256: str | None) -> tuple[str, str | None]:
    """Compare ``path`` with what is known of ``file``.

    Returns:
        Its sha256, and what is wrong in words, or None.
    """
    size = path.stat().st_size
    if file.bytes is not None and size != file.bytes:
        return "", f"{file.name} has {size} bytes, zoo.yaml says {file.bytes}"
    found = sha256_of(path)
    if sha256 and found != sha256:
        who = "zoo.yaml" if file.sha256 else "its first download"
        return found, f"sha256 of {file.name} is {found[:16]}…, {who} says {sha256[:16]}…"
    if file.sha256_starts and not found.startswith(file.sha256_starts):
        return (
            found,
            f"sha256 of {file.name} is {found[:16]}…, zoo.yaml says it starts with {file.sha256_starts}",
        )
    return found, None


def room(folder: Path, needed: int, what: str) -> None:
    """Check that the disk of ``folder`` has ``needed`` bytes left.

    Raises:
        ResourceError: it has not; says how much is missing.
    """
    free = shutil.disk_usage(make_folder(folder)).free
    if needed > free:
        raise ResourceError(
            f"{what} needs {size_text(needed)} in {folder}, but only {size_text(free)} are free",
            hint="Free some space, or set ADFLOW_HOME to a folder on another disk.",
        )


def size_text(count: int | None) -> str:
    """Write a number of bytes for people.

    >>> size_text(5264982680), size_text(999_700_000), size_text(312), size_text(None)
    ('5.26 GB', '1 GB', '312 bytes', 'unknown size')
    """
    if count is None:
        return "unknown size"
    for unit, power in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= 0.9995 * power:  # what three digits round to 1000 is 1 of the next unit
            return f"{count / power:.3g} {unit}"
    return f"{count} bytes"


def adopt(path: Path, file: File, *, cache: Path, unverified: bool = False) -> Path:
    """Take ``path``, brought by the user, as ``file``: check it and return it where it is.

    Raises:
        InputError: it is another file.
        UnavailableError: nothing is known to check it by, and ``unverified`` is not set.
    """
    sha256 = known_hash(file, cache)
    if sha256 is None and file.sha256_starts is None and not unverified:
        raise UnavailableError(
            f"the catalogue has no sha256 to check {path.name} by",
            hint="Add --unverified if you trust this file.",
        )
    _, wrong = fault(path, file, sha256)
    if wrong is not None:
        raise InputError(f"{path} is not the file of the catalogue: {wrong}", hint="Get it again.")
    return path


def package_file(source: Source) -> Path | None:
    """Return the file that ``source`` names inside an installed package, if it is there.

    The package is not imported (but what a dotted name lies in).
    """
    try:
        spec = util.find_spec(source.module or "")
    except (ImportError, ValueError):  # what a dotted name lies in is not there; a module without a place
        return None
    paths = [Path(place) / (source.path or "") for place in (spec and spec.submodule_search_locations) or []]
    return next((path for path in paths if path.is_file()), None)


def from_package(file: File, source: Source) -> Path:
    """Return the file inside an installed package, checked.

    Raises:
        UnavailableError: it is not there, or not the file of the catalogue.
    """
    path = package_file(source)
    if path is None:
        raise UnavailableError(
            f"{file.name} comes inside the package {source.package}, which is not installed",
            hint=f"Run `pip install {source.package}`.",
        )
    _, wrong = fault(path, file, file.sha256)
    if wrong is not None:
        raise UnavailableError(f"{path}: {wrong}", hint=f"Install {source.package} again.")
    return path


def length(part: Path) -> int:
    """Return the bytes of ``part`` that are here."""
    return part.stat().st_size if part.exists() else 0


def memo(part: Path) -> dict[str, str]:
    """Return which version of which URL ``part`` was begun from; empty when that is not known."""
    try:
        found = json.loads(part.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def remember(part: Path, url: str, etag: str | None) -> None:
    """Write down which version of which URL ``part`` is."""
    strong = etag if etag and not etag.startswith("W/") else ""  # a weak tag promises meaning, not bytes
    try:
        part.with_suffix(".json").write_text(json.dumps({"url": url, "etag": strong}), encoding="utf-8")
    except OSError as error:
        raise write_error(part, error) from error


def forget(part: Path) -> None:
    """Remove ``part`` and what is remembered of it."""
    part.unlink(missing_ok=True)
    part.with_suffix(".json").unlink(missing_ok=True)
