"""Unpack zip, tar, tar.gz, tar.xz and tar.bz2 archives that are not trusted.

Members are written by us, one by one, so that nothing but plain files and folders can come out: no path
leaves the folder, no link, no device, no mode bit, no owner. Bytes are counted as they come out, so that a
small file which swells is stopped at the limit whatever its header says. One offence ends the whole archive.
"""

from __future__ import annotations

import contextlib
import io
import lzma
import shutil
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Self

from adflow._clock import Progress
from adflow._files import make_folder, write_error
from adflow.errors import AdflowError, InputError, ResourceError

# Images do not shrink much: the fattest real case, plain TIFF slices and masks (LGG-MRI), is about 4 to 1.
GROWTH = 20
SLACK = 64 << 20
MEMBERS = 3_000_000  # ShanghaiTech, the largest data set of the catalogue, has 0.3 million frames
_CHUNK = 1 << 20
_JUNK = ("__MACOSX", ".DS_Store", "Thumbs.db")


@dataclass(frozen=True, slots=True)
class Unpacked:
    """What came out: names relative to the folder, with forward slashes, and the sum of their bytes."""

    names: list[str]
    bytes: int


def unpack(
    archive: Path,
    folder: Path,
    *,
    strip: str | None = None,
    only: str | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> Unpacked:
    """Unpack ``archive`` into ``folder``, which must be empty or absent; on any error ``folder`` is removed.

    Args:
        archive: the file; its kind is read from its content, not from its name.
        folder: where to.
        strip: folder that wraps the content; taken off every name. Members outside it stay as they are.
        only: keep only what lies in this folder (after ``strip``).
        limit: the most bytes that may come out; None: ``GROWTH`` times the archive plus ``SLACK``.
        progress: called with (bytes of the archive read, its size, its name).

    Raises:
        InputError: damaged, of unknown kind, or holding what no honest data set holds; names the member.
        ResourceError: the disk is full or not writable.
    """
    size = archive.stat().st_size
    allowed = limit if limit is not None else GROWTH * size + SLACK
    make_folder(folder)
    names: list[str] = []
    seen: dict[str, str] = {}
    total = 0
    try:
        with archive.open("rb") as raw, contextlib.closing(_members(archive, raw)) as members:
            for count, (member, content) in enumerate(members, start=1):
                if count > MEMBERS:
                    raise InputError(
                        f"{archive} holds more than {MEMBERS} files and folders; refused",
                        hint="If you trust it, unpack it yourself and name the folder with --from.",
                    )
                name = _safe(archive, member, strip)
                if name is None or (only is not None and not name.startswith(f"{only}/")):
                    continue
                if content is None:
                    make_folder(folder / name)
                    continue
                _once(archive, name, seen)
                total = _write(archive, content, folder / name, total, allowed)
                names.append(name)
                if progress is not None:
                    progress(raw.tell(), size, archive.name)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, ValueError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise _damaged(archive, error) from error
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        if error.errno is None:  # the decompressors' own complaints are OSErrors without a number
            raise _damaged(archive, error) from error
        raise write_error(folder, error) from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if not names:
        shutil.rmtree(folder, ignore_errors=True)
        inside = f" under {only}/" if only else ""
        raise InputError(f"{archive} holds no file{inside}")
    return Unpacked(names, total)


def is_archive(path: Path) -> bool:
    """Say whether ``path`` is an archive that `unpack` reads, judged by its content."""
    return path.is_file() and (zipfile.is_zipfile(path) or tarfile.is_tarfile(path))


def _damaged(archive: Path, error: Exception) -> AdflowError:
    return InputError(
        f"{archive} is damaged or not an archive: {' '.join(str(error).split()) or type(error).__name__}",
        hint="Get it again; a cut download continues where it stopped.",
    )


def _members(archive: Path, raw: IO[bytes]) -> Generator[tuple[str, IO[bytes] | None]]:
    """Yield (name, content) of every member in the archive's order; content is None for a folder."""
    # By the first bytes: a zip at the end of a plain tar would fool `zipfile.is_zipfile`.
    zip_like = raw.read(4) in (b"PK\x03\x04", b"PK\x05\x06")
    raw.seek(0)
    if zip_like:
        with zipfile.ZipFile(raw) as zipped:
            for info in zipped.infolist():
                kind = (info.external_attr >> 16) & 0o170000
                if kind not in (0, 0o100000, 0o040000):
                    raise InputError(f"{archive} holds '{info.filename}', a link or device; refused")
                if info.flag_bits & 1:
                    raise InputError(f"{archive} holds '{info.filename}', which is encrypted; refused")
                if info.is_dir():
                    yield info.filename, None
                    continue
                try:
                    with zipped.open(info) as content:
                        yield info.filename, content
                except NotImplementedError as error:
                    raise InputError(f"{archive}: '{info.filename}': {error}") from error
        return
    with tarfile.open(fileobj=raw, mode="r:*", tarinfo=_Header) as tarred:
        for member in tarred:
            if member.isdir():
                yield member.name, None
            elif member.isreg():
                yield member.name, tarred.extractfile(member) or io.BytesIO()
            else:
                raise InputError(f"{archive} holds '{member.name}', a link or device; refused")


class _Header(tarfile.TarInfo):
    """A tar header whose extensions (long names, pax) are bounded: Python reads those whole into memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Read one 512-byte header block."""
        info = super().frombuf(buf, encoding, errors)
        if info.type not in (*tarfile.REGULAR_TYPES, tarfile.DIRTYPE) and info.size > _CHUNK:
            raise InputError(f"the archive holds a header of {info.size} bytes; refused")
        return info


def _safe(archive: Path, member: str, strip: str | None) -> str | None:
    """Return the member's path below the folder, or None for a thing to skip."""
    if "\\" in member or ":" in member or any(ord(letter) < 32 for letter in member):
        raise InputError(f"{archive} holds {member!r}, whose name is not portable; refused")
    parts = [part for part in member.split("/") if part not in ("", ".")]
    if member.startswith("/") or ".." in parts:
        raise InputError(f"{archive} holds '{member}', which leads out of its folder; refused")
    if strip is not None and parts[:1] == [strip]:
        parts = parts[1:]
    if not parts or any(part in _JUNK for part in parts):
        return None
    return str(PurePosixPath(*parts))


def _once(archive: Path, name: str, seen: dict[str, str]) -> None:
    """Refuse two names that are one file where capitals do not count, as on macOS and Windows."""
    key = unicodedata.normalize("NFC", name).casefold()
    if key in seen:
        raise InputError(f"{archive} holds '{seen[key]}' and '{name}', one name on many systems; refused")
    seen[key] = name


def _write(archive: Path, content: IO[bytes], target: Path, total: int, allowed: int) -> int:
    """Write one member; return the bytes written so far."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        out = target.open("xb")
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"{archive} holds '{target.name}' as a file and as a folder; refused") from error
    with out:
        while chunk := content.read(_CHUNK):
            total += len(chunk)
            if total > allowed:
                raise ResourceError(
                    f"{archive} swells beyond the {allowed} bytes it may hold; refused",
                    hint="If the archive is right, state `unpacked` (bytes) in its zoo entry.",
                )
            out.write(chunk)
    return total
