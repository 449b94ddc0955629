"""Write beside, then move: no half-written file ever stands where a good one should be."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from adflow.errors import AdflowError, InputError, ResourceError

_REASONS = {
    errno.ENOSPC: ("the disk is full", "Free some space or choose another place."),
    errno.EDQUOT: ("the disk quota is used up", "Free some space or choose another place."),
    errno.EACCES: ("no permission to write there", "Choose a folder you may write to."),
    errno.EPERM: ("no permission to write there", "Choose a folder you may write to."),
    errno.EROFS: ("the file system is read-only", "Choose a folder you may write to."),
}


def write_error(path: Path, error: OSError) -> AdflowError:
    """Turn an operating-system error met while writing ``path`` into one clear line."""
    reason = _REASONS.get(error.errno or 0)
    if reason:
        return ResourceError(f"cannot write {path}: {reason[0]}", hint=reason[1])
    return InputError(f"cannot write {path}: {error.strerror or error}")


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
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` in UTF-8, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
