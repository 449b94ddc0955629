"""``download``: bring a data set, a backbone or a detector of the catalogue to this machine, checked.

A data set is unpacked beside its place, its files are counted against the catalogue, then it is moved
there, so that an interrupted run never leaves a half-filled class behind; the same command finishes it. A
receipt in ``<data set>/.adflow`` says which archive the files came from.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from adflow import _store, fetch, zoo
from adflow._clock import Progress
from adflow._files import make_folder, replace_folder, sha256_of, tidy, write_error, write_text
from adflow._lock import lock
from adflow._unpack import Unpacked, is_archive, unpack
from adflow.errors import InputError, UsageError
from adflow.tasks._counts import compare, fits
from adflow.zoo import BackboneEntry, DatasetEntry, DetectorEntry, File, Licence


@dataclass(frozen=True)
class Planned:
    """One file that would be fetched. ``here``: it need not be; ``trust`` says what vouches for it."""

    name: str
    bytes: int | None
    trust: str
    sources: list[str]
    here: bool


@dataclass(frozen=True)
class Plan:
    """What `download` would do.

    Attributes:
        name: as typed.
        kind: "data set", "backbone" or "detector".
        title: what it is.
        licence: terms of use.
        files: what would be fetched, in order.
        destination: where it ends up.
        here: nothing is left to do.
        free: bytes left on the disk of the destination.
        counts: files expected, per class and kind; empty for weights.
    """

    name: str
    kind: str
    title: str
    licence: Licence
    files: list[Planned]
    destination: Path
    here: bool
    free: int
    counts: dict[str, dict[str, int | None]] = field(default_factory=dict)

    @property
    def bytes(self) -> int | None:
        """Bytes still to fetch; None where one of the files has no known size."""
        return _total([file for file in self.files if not file.here])

    @property
    def size(self) -> int | None:
        """Bytes of all files, those that are here included; None likewise."""
        return _total(self.files)


def _total(files: Sequence[Planned]) -> int | None:
    sizes = [file.bytes for file in files]
    return None if None in sizes else sum(size or 0 for size in sizes)


@dataclass(frozen=True)
class Downloaded:
    """What `download` did.

    Attributes:
        name: as typed.
        paths: the data set's folder, or the weight or detector files.
        already: nothing had to be done.
        files: number of files that were unpacked; 0 for weights.
        notes: what the user should know.
    """

    name: str
    paths: list[Path]
    already: bool
    files: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Call:
    """How to fetch; the options that every step shares."""

    cache: Path
    no_network: bool = False
    unverified: bool = False
    patience: fetch.Patience | None = None
    progress: Progress | None = None
    say: Callable[[str], None] | None = None

    def fetch(self, file: File) -> Path:
        """Fetch one file of the catalogue."""
        return fetch.fetch(
            file,
            cache=self.cache,
            no_network=self.no_network,
            unverified=self.unverified,
            patience=self.patience,
            progress=self.progress,
            say=self.say,
        )


def plan(name: str, *, catalogue: zoo.Zoo | None = None, root: Path | None = None, unverified: bool = False) -> Plan:
    """Say what `download` would do; touches neither the network nor the disk.

    Raises:
        UsageError: no such name, or one of the hub.
    """
    if name.startswith("hub:"):
        raise UsageError(f"only the hub knows what {name} is: there is no plan of it", hint="Leave --dry-run out.")
    entry = (catalogue or zoo.load()).find(name)
    cache = zoo.home()
    if isinstance(entry, DatasetEntry):
        class_ = name.partition("/")[2] or None
        place = zoo.data_folder(entry.name, root)
        file, only = _archive(entry, class_, Call(cache, unverified=unverified))
        wanted = {class_: entry.classes[class_]} if class_ else entry.classes
        title = f"{entry.title}, class {class_}" if class_ else entry.title
        counts = {key: dict(value.counts) for key, value in wanted.items()}
        files, kind, here = [file], "data set", _present(entry, class_, place)
        destination = place / only if only else place
    else:
        files = _weights(catalogue or zoo.load(), entry)
        kind = "backbone" if isinstance(entry, BackboneEntry) else "detector"
        title = entry.title if isinstance(entry, DetectorEntry) else f"weights of {entry.timm or entry.name}"
        counts, destination = {}, cache / "files"
        here = all(_here(file, cache) for file in files)
    planned = [Planned(f.name, f.bytes, f.trust, [str(s) for s in f.sources], here or _here(f, cache)) for f in files]
    return Plan(name, kind, title, entry.licence, planned, destination, here, _free(destination), counts)


def download(
    name: str,
    *,
    source: Path | None = None,
    root: Path | None = None,
    runs: Path | None = None,
    catalogue: zoo.Zoo | None = None,
    no_network: bool = False,
    unverified: bool = False,
    keep_archive: bool = False,
    patience: fetch.Patience | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> Downloaded:
    """Bring ``name`` to this machine, unless it is there.

    Args:
        name: data set (``mvtec``), class (``mvtec/cable``), backbone, detector, or
            ``hub:owner/name[@revision]``.
        source: an archive or file already on disk, a folder that holds it, or an unpacked data set.
        root: folder of data sets; default the cache.
        runs: folder of runs, for checkpoints of the originals; each becomes a run.
        catalogue: default the shipped one.
        no_network: use only what is here.
        unverified: accept a file that nobody vouches for; its hash is written down and checked ever after.
        keep_archive: keep the archive in the cache after unpacking.
        patience: how long to try.
        progress: called with (done, total, what); total 0 where it is not known.
        say: told what the user should know while it waits.

    Raises:
        UsageError: no such name.
        UnavailableError: no source has it, or it is not verified.
        InputError: an archive is damaged or not what it should be; files are missing or left over.
        ResourceError: the disk is full or not writable.
    """
    call = Call(zoo.home(), no_network, unverified, patience, progress, say)
    if name.startswith("hub:"):
        repo, _, revision = name.removeprefix("hub:").partition("@")
        if source is not None:
            raise UsageError("--from goes with names of the catalogue, not with hub:owner/name")
        path = fetch.pull_detector(repo, revision=revision or "main", cache=call.cache, no_network=no_network)
        return Downloaded(name, [path], already=False)
    catalogue = catalogue or zoo.load()
    entry = catalogue.find(name)
    if not isinstance(entry, DatasetEntry):
        return _converted(_download_files(name, entry, catalogue, source, call), entry, runs)
    class_ = name.partition("/")[2] or None
    place = zoo.data_folder(entry.name, root)
    with lock(make_folder(place) / ".adflow" / "lock", _wait(say, place)):
        tidy(place / ".adflow")
        if source is None and _present(entry, class_, place):
            done = Downloaded(name, [place], already=True)
        else:
            done = _download_dataset(name, entry, class_, place, source, call, keep_archive)
        layout = import_module(f"adflow.data.{entry.layout}") if entry.layout else None
        if layout is not None and hasattr(layout, "prepare"):
            done.notes.extend(layout.prepare(place, [class_] if class_ else None, progress))
    return done


def _wait(say: Callable[[str], None] | None, place: Path) -> Callable[[], None] | None:
    return None if say is None else lambda: say(f"another process is filling {place}; waiting for it")


def _converted(done: Downloaded, entry: BackboneEntry | DetectorEntry, runs: Path | None) -> Downloaded:
    """Turn the checkpoint of an original implementation into a run of ours; leave everything else alone."""
    if not isinstance(entry, DetectorEntry) or entry.format == "adflow":
        return done
    from adflow.tasks.convert import convert

    (checkpoint,) = done.paths
    detector = convert(checkpoint, entry, runs=runs)
    calibrate = f"{entry.name} is not calibrated: run `adflow calibrate {entry.name} FOLDER_OF_GOOD` for verdicts"
    return Downloaded(done.name, [detector], done.already, notes=[*done.notes, calibrate])


def _download_files(
    name: str, entry: BackboneEntry | DetectorEntry, catalogue: zoo.Zoo, source: Path | None, call: Call
) -> Downloaded:
    files = _weights(catalogue, entry)
    if source is None:
        already = all(_here(file, call.cache) for file in files)
        return Downloaded(name, [call.fetch(file) for file in files], already)
    paths = []
    for file in files:
        path = source / file.name if source.is_dir() else source
        if not path.is_file() or (source.is_file() and len(files) > 1):
            raise InputError(
                f"{name} needs {', '.join(f.name for f in files)}; {path} is not there",
                hint="Give the file itself, or the folder that holds it, with --from.",
            )
        _store.adopt(path, file, cache=call.cache, unverified=call.unverified)
        part = _store.partial(file, call.cache)
        try:
            shutil.copyfile(path, part)
        except OSError as error:
            raise write_error(part, error) from error
        paths.append(_store.keep(part, file, sha256_of(part), str(path), call.cache))
    return Downloaded(name, paths, already=False)


def _download_dataset(
    name: str,
    entry: DatasetEntry,
    class_: str | None,
    place: Path,
    source: Path | None,
    call: Call,
    keep_archive: bool,
) -> Downloaded:
    """Fetch, unpack beside, count, move."""
    beside = _beside(place, class_)
    shutil.rmtree(beside, ignore_errors=True)
    file, only = _archive(entry, class_, call)
    archive: Path | None = None
    origin = str(source) if source is not None else ""
    if source is None:
        archive = call.fetch(file)
        origin = file.name
    elif not source.exists():
        raise InputError(f"there is no file or folder {source}", hint="Look at what --from says.")
    elif source.is_file():
        archive, file, only = _own_archive(source, entry, class_, call)
    else:
        own = next((f for f in _candidates(entry, class_) if (source / f.name).is_file()), None)
        if own is not None:
            archive, file, only = _own_archive(source / own.name, entry, class_, call)
    try:
        if archive is not None:
            out = unpack(archive, beside, strip=file.strip, only=only, limit=file.unpacked, progress=call.progress)
        else:
            out = _copy(source or place, entry, class_, beside)
        notes = compare(entry, [class_] if class_ else list(entry.classes), beside, out.names)
        _move(beside, place)  # and keeps the empty folder: the work is not done
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    receipt = {
        "from": origin,
        "sha256": _store.known_hash(file, call.cache) if archive is not None else None,
        "files": len(out.names),
        "bytes": out.bytes,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_text(place / ".adflow" / f"{class_ or 'all'}.json", json.dumps(receipt, indent=1) + "\n")
    if archive is not None and source is None and not keep_archive and archive.is_relative_to(call.cache):
        shutil.rmtree(archive.parent, ignore_errors=True)
    shutil.rmtree(beside, ignore_errors=True)
    return Downloaded(name, [place], already=False, files=len(out.names), notes=notes)


def _beside(place: Path, class_: str | None) -> Path:
    """Return the folder to unpack into; there from the first file to the receipt."""
    return place / ".adflow" / f"{class_ or 'all'}.unpacking"


def _candidates(entry: DatasetEntry, class_: str | None) -> list[File]:
    own = entry.classes[class_].archive if class_ else None
    return [file for file in (own, entry.archive) if file is not None]


def _archive(entry: DatasetEntry, class_: str | None, call: Call) -> tuple[File, str | None]:
    """Return the archive to unpack for ``class_`` and the folder of it to take, None for all of it."""
    globs = [glob for group in entry.folders.values() for glob in group]
    apart = class_ is not None and all(glob.lstrip("!").startswith("{class}/") for glob in globs)
    folder = class_ if apart else None
    own = entry.classes[class_].archive if class_ else None
    if own is None or (not own.sha256 and not call.unverified and _store.kept(entry.archive, call.cache)):
        return entry.archive, folder
    return own, folder


def _own_archive(path: Path, entry: DatasetEntry, class_: str | None, call: Call) -> tuple[Path, File, str | None]:
    """Check an archive that the user brought against what the catalogue knows of it."""
    if not is_archive(path):
        raise InputError(f"{path} is not an archive", hint="Expected zip, tar, tar.gz, tar.xz, or a folder.")
    candidates = _candidates(entry, class_)
    file = next((f for f in candidates if f.name == path.name), candidates[-1])
    folder = _archive(entry, class_, call)[1]
    return _store.adopt(path, file, cache=call.cache, unverified=call.unverified), file, folder


def _copy(source: Path, entry: DatasetEntry, class_: str | None, beside: Path) -> Unpacked:
    """Copy an unpacked data set that the user brought; links are followed, modes are not kept."""
    roots = [source, *(path for path in sorted(source.iterdir()) if path.is_dir())]
    if class_ is not None:
        roots.append(source.parent)
    root = next((r for r in roots if fits(entry, [class_] if class_ else list(entry.classes), r)), None)
    if root is None:
        known = ", ".join(file.name for file in _candidates(entry, class_))
        raise InputError(
            f"{source} holds neither {known} nor the unpacked {entry.title}",
            hint="Name the archive itself, or the folder that holds the classes.",
        )
    part = root / class_ if class_ and (root / class_).is_dir() else root
    target = beside / class_ if part != root and class_ else beside
    try:
        shutil.copytree(part, target, copy_function=shutil.copyfile, ignore=shutil.ignore_patterns(".*"))
    except shutil.Error as error:
        raise InputError(f"cannot copy {part}: {error.args[0][0][2]}") from error
    except OSError as error:
        raise write_error(target, error) from error
    files = [path for path in beside.rglob("*") if path.is_file()]
    names = [path.relative_to(beside).as_posix() for path in files]
    return Unpacked(names, sum(path.stat().st_size for path in files))


def _move(beside: Path, place: Path) -> None:
    """Move what was unpacked to its place, one top-level name after the other, each whole or not at all."""
    try:
        for item in sorted(beside.iterdir()):
            replace_folder(item, place / item.name, beside.with_name(f"{item.name}.old"))
    except OSError as error:
        raise write_error(place, error) from error


def _present(entry: DatasetEntry, class_: str | None, place: Path) -> bool:
    """Say whether the data set is there: brought by us, or from elsewhere and whole."""
    names = [class_] if class_ else list(entry.classes)
    if not place.is_dir() or not fits(entry, names, place):
        return False
    whole, *each = ((place / ".adflow" / f"{key}.json").is_file() for key in ("all", *names))
    if whole or all(each):
        return True
    if _beside(place, class_).exists():
        return False  # whoever brought it was killed
    with contextlib.suppress(InputError):
        counted = all(v is not None for n in names for v in entry.classes[n].counts.values())
        return counted and not compare(entry, names, place, None)
    return False


def _weights(catalogue: zoo.Zoo, entry: BackboneEntry | DetectorEntry) -> list[File]:
    if isinstance(entry, DetectorEntry):
        return [entry.file]
    return [*entry.weights, *(file for part in entry.parts for file in catalogue.backbones[part].weights)]


def _here(file: File, cache: Path) -> bool:
    packed = any(source.package and _store.package_file(source) for source in file.sources)
    return packed or _store.kept(file, cache) is not None


def _free(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def to_dict(result: Plan | Downloaded) -> dict[str, Any]:
    """Return a plan or a result as plain values for JSON."""
    values: dict[str, Any] = {key: _plain(value) for key, value in vars(result).items()}
    return values | {"bytes": result.bytes} if isinstance(result, Plan) else values


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    if isinstance(value, Planned):
        return vars(value)
    if isinstance(value, Licence):
        return {key: getattr(value, key) for key in ("name", "url", "commercial", "note")}
    return value
