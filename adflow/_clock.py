"""How far work is (:data:`Progress`), and where the time of an image goes.

Stages add their seconds to whoever counts, and cost nothing otherwise.

    >>> with counting("method") as seconds:
    ...     with stage("encoder"):
    ...         pass
    >>> sorted(seconds)
    ['encoder', 'method']

Each thread counts for itself. A stage inside a stage is taken off the outer one, so that seconds add up to the
whole. Work on a GPU counts where it is waited for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Progress = Callable[[int, int, str], object]  # (done, of how many, what or in which words)


class _Clock:
    def __init__(self, name: str) -> None:
        self.seconds: dict[str, float] = {}
        self.names = [name]
        self.since = time.perf_counter()

    def add(self) -> None:
        """Give the time since the last change to the innermost stage."""
        now, name = time.perf_counter(), self.names[-1]
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.since
        self.since = now


_clock: ContextVar[_Clock | None] = ContextVar("adflow_clock", default=None)


@contextmanager
def counting(name: str) -> Iterator[dict[str, float]]:
    """Count the seconds of what happens inside, by stage; ``name`` gets what no stage claims."""
    clock = _Clock(name)
    token = _clock.set(clock)
    try:
        yield clock.seconds
    finally:
        clock.add()
        _clock.reset(token)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Count what happens inside as stage ``name``, when somebody counts."""
    clock = _clock.get()
    if clock is None:
        yield
        return
    clock.add()
    clock.names.append(name)
    try:
        yield
    finally:
        clock.add()
        clock.names.pop()
