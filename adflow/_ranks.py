"""Processes that fit one detector together, started by ``torchrun``: which one this is, and what they exchange.

Every process sees the same images in the same order and draws from the same seed. An image passes the backbone in one
of them and its features go to all; in training each takes its share of every batch, and gradients are added up. So the
result is that of one process, up to the rounding of sums. In one process every function here does nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Batch = TypeVar("Batch")


def rank() -> int:
    """Return the number of this process, from 0; process 0 writes and speaks."""
    return dist.get_rank() if _joined() else 0


def world() -> int:
    """Return how many processes work together."""
    return dist.get_world_size() if _joined() else 1


def silent() -> bool:
    """Return whether this process is one of several that torchrun started, and not the one that speaks."""
    return _launched() and os.environ.get("RANK", "0") != "0"


@contextlib.contextmanager
def together(device: str) -> Iterator[str]:
    """Join the processes that torchrun started, if it did; yield the device of this one."""
    if not _launched() or _joined():
        yield device
        return
    if device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    # Features travel between main memories, gradients between devices.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def share(batch: Batch) -> tuple[Batch, float]:
    """Return the part of a batch that is this process's, and its weight: the weights of all add up to 1.

    Tensors are cut along their first axis. A batch whose tensors differ in it, or that is shorter than there are
    processes, goes to all of them whole.
    """
    count = world()
    if count == 1:
        return batch, 1.0
    lengths = {len(tensor) if tensor.ndim else 0 for tensor in _tensors(batch)}
    if len(lengths) != 1 or min(lengths) < count:
        return batch, 1 / count
    (length,) = lengths
    part = slice(length * rank() // count, length * (rank() + 1) // count)
    return _cut(batch, part), (part.stop - part.start) / length


def add_up(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over all processes: the same bits in each of them."""
    if world() == 1:
        return
    chosen = list(tensors)
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in chosen])
    dist.all_reduce(flat)
    start = 0
    for tensor in chosen:
        tensor.detach().copy_(flat[start : start + tensor.numel()].view_as(tensor))
        start += tensor.numel()


def from_first(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by that of process 0."""
    if world() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)


def gathered(mine: Any) -> list[Any]:
    """Return what every process has, by number; small things only."""
    if world() == 1:
        return [mine]
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, mine)
    return found


def all_rows(mine: list[list[Tensor]]) -> Iterator[list[Tensor]]:
    """Yield the rows of every process, those of process 0 first; a row is one tensor [1, C, h, w] per level."""
    shapes = gathered((len(mine), [tuple(level.shape[1:]) for level in mine[0]] if mine else []))
    for sender, (count, levels) in enumerate(shapes):
        if count == 0:
            continue
        sent = [
            torch.cat([row[k] for row in mine]).float().contiguous() if sender == rank() else torch.empty(count, *shape)
            for k, shape in enumerate(levels)
        ]
        for level in sent:
            dist.broadcast(level, sender)
        for i in range(count):
            yield [level[i : i + 1] for level in sent]


def wait() -> None:
    """Wait until every process is here."""
    if world() > 1:
        dist.barrier()


def _launched() -> bool:
    return dist.is_available() and dist.is_torchelastic_launched() and os.environ.get("WORLD_SIZE", "1") != "1"


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, tuple | list):
        for part in batch:
            yield from _tensors(part)


def _cut(batch: Any, part: slice) -> Any:
    if isinstance(batch, Tensor):
        return batch[part]
    return type(batch)(_cut(one, part) for one in batch) if isinstance(batch, tuple | list) else batch
