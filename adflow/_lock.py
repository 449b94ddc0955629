"""One lock between processes, the only place that knows how an operating system locks a file.

The kernel holds the lock and drops it when its process ends, however it ends: no stale lock survives
``kill -9``. The lock file itself stays: deleting it would let two processes hold one lock on two files.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from adflow._files import make_folder, write_error

if sys.platform == "win32":
    import msvcrt

    def _try(descriptor: int) -> bool:
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
else:
    import fcntl

    def _try(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


@contextlib.contextmanager
def lock(path: Path, waiting: Callable[[], None] | None = None, pause: float = 0.1) -> Iterator[None]:
    """Hold the lock file ``path`` while the body runs; wait for whoever holds it now.

    Args:
        path: the lock file; created when it is not there.
        waiting: called once if the lock is taken, so that the user learns why nothing happens.
        pause: seconds between two tries.

    Raises:
        ResourceError: the file cannot be created there.
    """
    make_folder(path.parent)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise write_error(path, error) from error
    try:
        told = False
        while not _try(descriptor):
            if not told and waiting is not None:
                waiting()
            told = True
            time.sleep(pause)
        yield
    finally:
        os.close(descriptor)  # closing drops the lock
