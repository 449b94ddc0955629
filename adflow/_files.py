"""Write beside, then move: no half-written file ever stands where a good one should be."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adflow.errors import AdflowError, InputError, ResourceError

if TYPE_CHECKING:
    from PIL import Image

_REASONS = {
    errno.ENOSPC: ("the disk is full", "Free some space or choose another place."),
    errno.EDQUOT: ("the disk quota is used up", "Free some space or choose another place."),
    errno.EFBIG: ("the file is larger than this system allows", "Choose another disk, or raise the limit (ulimit -f)."),
    errno.EACCES: ("no permission to write there", "Choose a folder you may write to."),
    errno.EPERM: ("no permission to write there", "Choose a folder you may write to."),
    errno.EROFS: ("the file system is read-only", "Choose a folder you may write to."),
}
# Libraries written in Rust tell an operating system's error in words.
_IN_WORDS = re.compile(r"\(os error (\d+)\)")
_TEMPORARY = re.compile(r"\.[0-9a-f]{12}\.partial(\.\w+)?")


def write_error(path: Path, error: OSError) -> AdflowError:
    """Turn an operating-system error met while writing ``path`` into one clear line."""
    number = error.errno or (errno.ENOSPC if is_full(path) else 0)  # image writers lose the number
    reason = _REASONS.get(number)
    if reason:
        return ResourceError(f"cannot write {path}: {reason[0]}", hint=reason[1])
    return InputError(f"cannot write {path}: {error.strerror or error}")


def is_full(path: Path) -> bool:
    """Return whether the disk of ``path``, or of its nearest folder that is there, has less than a block left."""
    here = next((folder for folder in (path, *path.parents) if folder.is_dir()), Path())
    try:
        return shutil.disk_usage(here).free < 4096
    except OSError:
        return False


def expanded(path: Path | str) -> Path:
    """Return ``path`` with its ``~`` or ``~user`` replaced; raise InputError when there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"cannot use {path}: no home folder is known for it", hint="Write it in full.") from error


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal; an OSError where it cannot be read."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def make_folder(path: Path) -> Path:
    """Create ``path`` and its parents; raise ResourceError or InputError when that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(path, error) from error
    return path


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``; move it there on success, remove it on failure.

    The content is flushed to disk before the move, so that after a power cut the target is either the old file or
    the whole new one.

    Raises:
        ResourceError: the disk is full, or writing is not permitted.
        InputError: the path cannot be written for another reason.
    """
    path = Path(path)
    make_folder(path.parent)
    # The suffix is kept: image writers choose the format by it. The name is kept short: file systems allow 255 bytes.
    temporary = path.with_name(f".{secrets.token_hex(6)}.partial{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        raise write_error(path, error) from error
    except Exception as error:
        number = _IN_WORDS.search(str(error))
        if number is None:
            raise
        raise write_error(path, _system_error(int(number[1]))) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def replace_folder(new: Path, place: Path, old: Path) -> None:
    """Move ``new`` to ``place``; a folder that is there waits at ``old``, and is put back where that fails."""
    shutil.rmtree(old, ignore_errors=True)
    if place.is_dir() and new.is_dir():
        place.replace(old)
    try:
        new.replace(place)
    except OSError:
        if old.is_dir():
            old.replace(place)
        raise
    shutil.rmtree(old, ignore_errors=True)


def tidy(folder: Path, *inside: str) -> None:
    """Remove what :func:`atomic_write` leaves when its process is killed; nobody may be writing there.

    Args:
        folder: looked through itself, but not the folders in it,
        inside: other than these, which are looked through to their ends.
    """
    try:
        for place in (folder.iterdir(), *((folder / name).rglob("*") for name in inside)):
            for path in place:
                if _TEMPORARY.fullmatch(path.name) and path.is_file():
                    path.unlink(missing_ok=True)
    except OSError as error:
        raise write_error(folder, error) from error


def write_text(path: Path, text: str) -> None:
    r"""Write ``text`` to ``path`` in UTF-8, whole or not at all.

    File names need not be text: their stray bytes, which Python holds as U+DC80 to U+DCFF, are written as ``\udc80``,
    which JSON reads back.
    """
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def encoded(picture: Image.Image, suffix: str, **options: Any) -> bytes:
    """Return a picture as a file's content; ``suffix`` chooses the format.

    Pillow's own JPEG writer does not notice when a disk that fills up takes the last block in part; Python's does.
    """
    stream = io.BytesIO()
    picture.save(stream, {".jpg": "JPEG", ".jpeg": "JPEG"}.get(suffix.lower(), suffix[1:]), **options)
    return stream.getvalue()


def _system_error(number: int) -> OSError:
    return OSError(0, "", None, number) if sys.platform == "win32" else OSError(number, os.strerror(number))
