"""Units of work in other processes: started fresh, one torch thread each, so that results do not depend on them.

A process that dies (out of memory, killed) costs the item it was at: the rest of its unit goes to a new process.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

Work = Callable[[Sequence[Any]], Iterator[Any]]
"""From the items of a unit to one result each, in order; must be importable by name."""


@dataclass
class _Process:
    """One process and what it is at: items ``at`` to the end of ``unit``; idle when ``unit`` is None."""

    process: BaseProcess
    unit: int | None = None
    at: int = 0


def run_units(work: Work, units: Sequence[Sequence[Any]], jobs: int) -> Iterator[tuple[int, int, Any]]:
    """Run ``work`` on every unit in ``jobs`` processes; yield (unit, place in it, result) as they come.

    A result is what ``work`` yields, or a ``RuntimeError`` for an item whose process died.

    Args:
        work: a function of a module, as it is sent by name.
        units: what can be pickled; none of them empty.
        jobs: number of processes.
    """
    context = multiprocessing.get_context("spawn")
    waiting: deque[tuple[int, int]] = deque((i, 0) for i in range(len(units)))  # unit, first item to do
    there: dict[Connection, _Process] = {}
    try:
        while waiting or any(one.unit is not None for one in there.values()):
            for connection, one in there.items():
                if one.unit is None and waiting:
                    _send(connection, one, units, waiting.popleft())
            while waiting and len(there) < jobs:
                mine, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, work), daemon=True)
                process.start()
                theirs.close()
                there[mine] = _Process(process)
                _send(mine, there[mine], units, waiting.popleft())
            for ready in wait(list(there)):
                assert isinstance(ready, Connection)
                connection = ready
                one = there[connection]
                unit, at = one.unit, one.at
                try:
                    result = connection.recv()
                    one.at += 1
                except (EOFError, OSError):
                    del there[connection]
                    one.process.join()
                    result = RuntimeError(_death(one.process.exitcode))
                    if unit is not None and at + 1 < len(units[unit]):
                        waiting.appendleft((unit, at + 1))
                if unit is None:
                    continue
                if at + 1 == len(units[unit]):
                    one.unit = None
                yield unit, at, result
    finally:
        for one in there.values():
            one.process.terminate()
        for one in there.values():
            one.process.join()


def _send(connection: Connection, one: _Process, units: Sequence[Sequence[Any]], what: tuple[int, int]) -> None:
    one.unit, one.at = what
    # A process that died before it read this shows as the end of its connection.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.send(units[one.unit][one.at :])


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        more = " (out of memory?)" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{more}"
    return f"its process ended with exit code {code}"


def _serve(connection: Connection, work: Work) -> None:
    """Run in the other process: take units and send each result as it comes, until the parent is gone."""
    # Ctrl-C reaches the whole group; the parent decides, and ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            for result in work(connection.recv()):
                connection.send(sendable(result))


def sendable(result: Any) -> Any:
    """Return ``result``, or an error that says the same where it is one of another package that cannot be sent."""
    try:
        pickle.dumps(result)
    except (pickle.PicklingError, TypeError, AttributeError):
        return RuntimeError(f"{type(result).__name__}: {result}")
    return result
