"""One lock between processes, the only place that knows how an operating system locks a file.

The kernel holds the lock and drops it when its process ends, however it ends: no stale lock survives
``kill -9``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from adflow._files import make_folder, tidy, write_error
from adflow.errors import ResourceError

if sys.platform == "win32":
    import msvcrt

    def _hold(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _hold(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


# What file systems without locks (some network shares) answer. There is nothing to hold then, and writing is still
# whole or not at all: going on beats refusing all work.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


@contextlib.contextmanager
def lock(path: Path, waiting: Callable[[], None] | None = None, pause: float = 0.1) -> Iterator[None]:
    """Hold the lock file ``path`` while the body runs; wait for whoever holds it now.

    Args:
        path: the lock file; created when it is not there, and left there.
        waiting: called once if the lock is taken, so that the user learns why nothing happens.
        pause: seconds between two tries.

    Raises:
        ResourceError: the file cannot be created there.
    """
    make_folder(path.parent)
    told = False
    while (descriptor := _take(path)) is None:
        if not told and waiting is not None:
            waiting()
        told = True
        time.sleep(pause)
    try:
        yield
    finally:
        os.close(descriptor)  # closing drops the lock


@contextlib.contextmanager
def claim(folder: Path, *inside: str) -> Iterator[None]:
    """Be the only one who writes to ``folder``, created when it is not there, while the body runs.

    First, what a killed process left half-written there is removed, see :func:`adflow._files.tidy`.

    Raises:
        ResourceError: somebody else writes there now, or nobody may.
    """
    mine = not folder.exists()
    path = make_folder(folder) / ".adflow.lock"
    descriptor = _take(path)
    if descriptor is None:
        raise ResourceError(
            f"another process is writing to {folder}", hint="Wait until it has ended, or give another --out."
        )
    try:
        tidy(folder, *inside)
        yield
    finally:
        # On Windows an open file cannot be removed, elsewhere a closed one may be somebody's already.
        if sys.platform == "win32":
            os.close(descriptor)
        with contextlib.suppress(OSError):
            path.unlink()
        if sys.platform != "win32":
            os.close(descriptor)
        if mine:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only when nothing was written


def _take(path: Path) -> int | None:
    """Return a descriptor that holds the lock on ``path``, or None while another one does."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise write_error(path, error) from error
        try:
            _hold(descriptor)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                return None
        # Whoever held it may have removed the file meanwhile: the lock must be on the one that others will open.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)
