"""How much runs at once: threads side by side, in order, and batches that fit a GPU."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

from adflow._system import cores

T = TypeVar("T")


def default_workers() -> int:
    """Return how many images to work on at once: the cores this process may use, at most 8."""
    return min(cores(), 8)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Give torch one thread per operation for as long as this lasts; threads started meanwhile inherit it."""
    import torch  # not with this module: reading images needs none of it

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def ordered(pool: ThreadPoolExecutor, task: Callable[[Any], T], source: Iterable[Any], ahead: int) -> Iterator[T]:
    """Run ``task`` on every item with at most ``ahead`` under way; yield results in the source's order."""
    items = iter(source)
    waiting: deque[Future[T]] = deque()
    try:
        waiting.extend(pool.submit(task, item) for item in islice(items, ahead))
        while waiting:
            done = waiting.popleft().result()
            waiting.extend(pool.submit(task, item) for item in islice(items, 1))
            yield done
    finally:
        for future in waiting:
            future.cancel()


def in_halves(call: Callable[..., T], *batches: Any) -> list[T]:
    """Return ``[call(*batches)]``; where that does not fit into a GPU's memory, what it gives for parts, in order.

    Args:
        call: takes some images, and what belongs to them.
        batches: all of it, each with one row per image.
    """
    import torch

    count = len(batches[0])
    try:
        return [call(*batches)]
    except torch.OutOfMemoryError:
        if count == 1:
            raise
    half = count // 2
    logging.getLogger("adflow").warning(f"{count} images at once are too many for the GPU: {half} are tried")
    parts = (slice(half), slice(half, None))
    return [found for part in parts for found in in_halves(call, *(batch[part] for batch in batches))]
