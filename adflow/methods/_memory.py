"""Memory banks: exact nearest neighbours, greedy coresets, features on one grid, and limits that are kept.

Distances come from matrix products in blocks and are then measured again, directly, for the few rows that
matter: the product is fast, the difference is accurate. Nothing here holds a queries x bank matrix of
unbounded size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from adflow import _bytes
from adflow._bytes import in_units
from adflow._system import resident_bytes
from adflow.errors import InputError, ResourceError, UsageError

if TYPE_CHECKING:
    from adflow.backbones import Backbone
    from adflow.detector import ImageSource

# Sizes of the blocks: small enough to stay in a core's cache, large enough for a matrix product to run at
# full speed.
_BANK_BLOCK = 4096
_ROW_BLOCK = 8192
_LANE = 64  # columns whose minimum is taken first: a vectorised pass that leaves 1/64 for the slow arg-min
_PICKS = 256  # coreset picks between two passes over all rows


# --- limits -------------------------------------------------------------------------------------------------


def parse_bytes(value: str | int | None) -> int | None:
    """Return the bytes of a setting ``max_memory``; None stays None (no limit).

    Raises:
        UsageError: not a size.
    """
    return None if value is None else _bytes.parse_bytes(str(value))


def keep_within(limit: int | None, needed: int, what: str, hint: str) -> None:
    """Refuse before the memory is taken.

    Args:
        limit: bytes the whole process may hold; None = no limit.
        needed: further bytes about to be taken.
        what: the thing that needs them, for the message.
        hint: how to need less.

    Raises:
        ResourceError: what the process holds now and ``needed`` exceed ``limit`` together.
    """
    if limit is None:
        return
    held = resident_bytes()
    if held + needed > limit:
        raise ResourceError(
            f"{what} needs {in_units(needed)} beside the {in_units(held)} already held, "
            f"but the limit is {in_units(limit)}",
            hint=hint,
        )


def pyramid_shapes(backbone: Backbone, images: ImageSource) -> tuple[list[int], list[tuple[int, int]]]:
    """Return channels and grids of the backbone's taps for ``images``, by the size of the first of them.

    Raises:
        InputError: none of them can be read.
    """
    first = next(iter(images.batches(1)), None)
    if first is None:
        raise InputError("there is no image to take features from, expected at least 1")
    with torch.inference_mode():
        return list(backbone.channels), backbone.grids((first.shape[2], first.shape[3]))


# --- features on one grid -----------------------------------------------------------------------------------


def to_grid(feature: Tensor, grid: tuple[int, int]) -> Tensor:
    """Bring a tap [B, C, h, w] onto ``grid``: coarser taps are repeated, finer ones averaged by area.

    Repeating is what PaDiM and SPADE do: the value of the coarse cell that covers a fine one. Averaging keeps
    every fine value in the sum, so that a small defect is diluted, never dropped.
    """
    if feature.shape[-2:] == grid:
        return feature
    if feature.shape[-2] <= grid[0] and feature.shape[-1] <= grid[1]:
        return F.interpolate(feature, size=grid, mode="nearest")
    steps = feature.shape[-2] // grid[0], feature.shape[-1] // grid[1]
    if (steps[0] * grid[0], steps[1] * grid[1]) == feature.shape[-2:]:
        return F.avg_pool2d(feature, steps)  # the same windows, a few times faster
    return F.adaptive_avg_pool2d(feature, grid)


def common_grid(grids: Sequence[tuple[int, int]], which: str) -> tuple[int, int]:
    """Return the "finest" or "coarsest" grid of a pyramid (height, width)."""
    if which not in ("finest", "coarsest"):
        raise UsageError(f"grid is {which!r}, expected 'finest' or 'coarsest'")
    return (max if which == "finest" else min)(grids, key=lambda g: g[0] * g[1])


def concatenate(pyramid: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
    """Return all taps side by side on one grid: [B, sum of channels, h, w]."""
    return torch.cat([to_grid(feature, grid) for feature in pyramid], dim=1)


# --- nearest neighbours -------------------------------------------------------------------------------------


def half_norms(bank: Tensor) -> Tensor:
    """Return half the squared length of every row: [M] for a bank [M, D]."""
    return bank.square().sum(dim=-1) / 2


def nearest(queries: Tensor, bank: Tensor, k: int = 1, halves: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the ``k`` nearest rows of ``bank`` for every query, exactly.

    |q - b|^2 = |q|^2 + 2 (|b|^2 / 2 - q.b): the bracket is one matrix product per block of the bank and ranks
    the rows; those in front are then measured again as a sum of squared differences, so that what is returned
    carries no cancellation. Only rows whose squared distances differ by less than the rounding of the
    product, some 1e-7 (|q|^2 + |b|^2), can change places before that second measurement.

    Args:
        queries: [Q, D] float.
        bank: [M, D] of the same type.
        k: how many; at most M are returned.
        halves: ``half_norms(bank)`` when it is known already.

    Returns:
        Squared Euclidean distances [Q, k], ascending, and row numbers [Q, k] (int64); equal distances by row
        number.
    """
    if len(bank) == 0:
        raise InputError("the memory bank is empty, expected at least 1 row")
    halves = half_norms(bank) if halves is None else halves
    rows, k = len(bank), min(k, len(bank))
    found = []
    blocks = -(-rows // _BANK_BLOCK)
    width = min(rows, -(-rows // (blocks * _LANE)) * _LANE)  # blocks of one width, a multiple of the lane
    for start in range(0, rows, width):
        stop = min(start + width, rows)
        if k == 1:
            start = stop - width  # the last block reaches back: full width, and a row seen twice is no harm
        part = torch.addmm(halves[start:stop], queries, bank[start:stop].T, alpha=-1)  # [Q, block]
        if k == 1:
            found.append(_argmin(part) + start)
        else:
            # Two more than asked: rows that rounding put on the wrong side of the cut come back in.
            least = part.topk(min(k + 2, stop - start), dim=1, largest=False, sorted=False)
            found.append(least.indices + start)
    index = torch.cat(found, dim=1).sort(dim=1).values  # a stable sort then breaks ties by row number
    distance = _measure(queries, bank, index)
    if k == 1:
        best = distance.argmin(dim=1, keepdim=True)
        return distance.gather(1, best), index.gather(1, best)
    order = distance.sort(dim=1, stable=True)
    return order.values[:, :k], index.gather(1, order.indices[:, :k])


def _argmin(values: Tensor) -> Tensor:
    """Return the column of each row's minimum [Q, 1]; in two steps, the first of them vectorised."""
    columns = values.shape[1]
    if columns % _LANE:
        return values.argmin(dim=1, keepdim=True)
    lanes = values.reshape(-1, columns // _LANE, _LANE)  # [Q, lanes, 64]
    lane = lanes.amin(dim=2).argmin(dim=1, keepdim=True)  # [Q, 1]
    within = lanes.gather(1, lane.unsqueeze(2).expand(-1, 1, _LANE)).squeeze(1).argmin(dim=1, keepdim=True)
    return lane * _LANE + within


def _measure(queries: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    """Return squared distances [Q, k] of queries [Q, D] to the bank rows ``index`` [Q, k], by differences."""
    step = max(1, (1 << 22) // max(1, index.shape[1] * bank.shape[1]))  # 16 MB of float32 at a time
    return torch.cat(
        [
            (bank[index[i : i + step]] - queries[i : i + step, None]).square().sum(dim=2)
            for i in range(0, len(queries), step)
        ]
    )


# --- coresets -----------------------------------------------------------------------------------------------


def coreset_size(coreset: str | int, rows: int) -> int:
    """Return how many of ``rows`` to keep: a share such as "10%", or a number of rows.

    >>> coreset_size("10%", 2880), coreset_size(2000, 500), coreset_size("1%", 20)
    (288, 500, 1)

    Raises:
        UsageError: neither, or not more than 0.
    """
    text = str(coreset).strip()
    try:
        wanted = int(rows * float(text[:-1]) / 100) if text.endswith("%") else int(text)
        if float(text.rstrip("%")) <= 0:
            raise ValueError
    except (ValueError, OverflowError):
        message = f"coreset is {coreset!r}, expected a share such as '10%' or a number of rows"
        raise UsageError(message) from None
    return max(1, min(wanted, rows))


def random_projection(width: int, kept: int, generator: torch.Generator) -> Tensor:
    """Return a matrix [width, kept] that keeps squared distances in the mean (Johnson-Lindenstrauss).

    The identity when ``kept`` is not smaller than ``width``: there is nothing to save.
    """
    if kept >= width:
        return torch.eye(width)
    return torch.randn(width, kept, generator=generator) / math.sqrt(kept)


def start_from_points(rows: Tensor, points: Tensor) -> Tensor:
    """Return the start of the approximate greedy choice: the mean distance to some rows, squared [N].

    PatchCore's official sampler begins with the mean distance to 10 random rows (arXiv:2106.08265, code).
    """
    total = torch.zeros(len(rows), dtype=rows.dtype)
    for point in rows[points]:
        total += (rows - point).square().sum(dim=1).sqrt()
    return (total / max(1, len(points))).square()


def greedy_coreset(rows: Tensor, size: int, start: Tensor) -> Tensor:
    """Choose ``size`` rows that leave no other row far away: greedy k-centre, farthest point first.

    (Gonzalez, Clustering to minimize the maximum intercluster distance, 1985: at most twice the best radius
    when ``start`` is nowhere less than a distance between rows; PatchCore, Roth et al., CVPR 2022,
    arXiv:2106.08265, algorithm 1.)

    The picks are those of the textbook loop, one matrix-vector product over all N rows per pick, but that
    loop reads all rows from main memory every time. Here distances to the nearest pick are kept as *upper
    bounds*: they only ever shrink. So the next pick is certain to be among the rows with the largest bounds,
    as long as the best of those, brought up to date, is not below the largest bound outside. Those few rows
    fit into the cache and yield many picks; then one matrix product brings all rows up to date with all new
    picks at once.

    Args:
        rows: [N, D] float.
        size: number of picks, at most N.
        start: [N] squared distances to begin with: the first pick is where it is largest.

    Returns:
        Row numbers [size] int64 in the order chosen; none twice.
    """
    total = len(rows)
    size = min(size, total)
    rows = rows - rows.mean(dim=0)  # shorter vectors: less cancellation in |x|^2 + |c|^2 - 2 x.c
    norms = rows.square().sum(dim=1)
    bounds = start.clone()
    picks: list[int] = []
    width = max(1024, total // 32)
    while len(picks) < size:
        width = min(width, total)
        reach, pool = bounds.topk(width)
        outside = float(reach[-1]) if width < total else -1.0
        near, near_norms = rows[pool], norms[pool]
        new: list[int] = []
        while len(picks) + len(new) < size and len(new) < _PICKS:
            i = int(reach.argmax())
            if float(reach[i]) < outside:
                break
            new.append(i)
            distance = torch.addmv(near_norms + near_norms[i], near, near[i], alpha=-2)
            reach = torch.minimum(reach, distance.clamp_(min=0))
            reach[i] = -1.0
        chosen = pool[torch.tensor(new)]
        picks += chosen.tolist()
        if len(picks) < size:
            _shrink(bounds, rows, norms, rows[chosen])
            bounds[chosen] = -1.0
        if len(new) < _PICKS // 4:  # a pass over all rows should pay for many picks: look at more next time
            width *= 2
        elif len(new) == _PICKS:  # fewer would have done
            width = max(1024, width * 3 // 4)
    return torch.tensor(picks)


def _shrink(bounds: Tensor, rows: Tensor, norms: Tensor, centres: Tensor) -> None:
    """Lower ``bounds`` [N] to the squared distance to the nearest of ``centres`` [p, D], where less."""
    halves = half_norms(centres)
    for start in range(0, len(rows), _ROW_BLOCK):
        part = slice(start, start + _ROW_BLOCK)
        least = torch.addmm(halves, rows[part], centres.T, alpha=-1).amin(dim=1)
        torch.minimum(bounds[part], (norms[part] + 2 * least).clamp_(min=0), out=bounds[part])


def choose_rows(rows: Tensor, size: int, projection: Tensor, generator: torch.Generator) -> Tensor:
    """Choose a coreset on a projection of ``rows``, started from 10 random rows: row numbers [size] int64."""
    small = rows @ projection
    points = torch.randperm(len(rows), generator=generator)[:10]
    return greedy_coreset(small, size, start_from_points(small, points))


class StreamingCoreset:
    """A greedy coreset of rows that never are in memory together.

    Rows are collected until ``capacity``, then reduced to ``size`` by the greedy choice, and so on: a coreset
    of coresets. Every kept row is an original row. Each reduction adds at most its own covering radius to the
    distance between a dropped row and the nearest kept one, so fewer reductions (a larger capacity) are
    better; with one, the result is the plain greedy coreset. A coreset of the coresets of parts has at most 4 times the
    best covering radius, where a greedy one of the whole has at most 2 times (Malkomes, Kusner, Chen, Weinberger &
    Moseley, Fast distributed k-center clustering with outliers, 2015, theorem for no outliers).

    Args:
        size: rows to keep.
        capacity: rows to hold at most, at least twice ``size`` to make headway.
        projection: [D, d] matrix the choice is made on.
        generator: draws the start of each choice.
    """

    def __init__(self, size: int, capacity: int, projection: Tensor, generator: torch.Generator) -> None:
        self.size = size
        self.capacity = max(capacity, 2 * size)
        self.projection = projection
        self.generator = generator
        self.seen = 0
        self.reductions = 0
        self._held = torch.empty(0, len(projection))
        self._count = 0

    def fresh(self) -> StreamingCoreset:
        """Return an empty coreset that draws as this one would now: for a part of the rows."""
        return StreamingCoreset(self.size, self.capacity, self.projection, self.generator.clone_state())

    def add(self, rows: Tensor) -> None:
        """Take rows [n, D]."""
        self.seen += len(rows)
        if not len(self._held):
            self._held = torch.empty(self.capacity, len(self.projection))
        while len(rows):
            if self._count == self.capacity:
                self._reduce()
            taken = min(len(rows), self.capacity - self._count)
            self._held[self._count : self._count + taken] = rows[:taken]
            self._count += taken
            rows = rows[taken:]

    def of_part(self) -> Tensor:
        """Return what a coreset of the whole is to be chosen from: this coreset, or all rows where they are few.

        Choosing more than a quarter takes longer than it saves, and costs a factor of the radius.
        """
        return self.rows() if self.seen >= 4 * self.size else self._held[: self._count].clone()

    def rows(self) -> Tensor:
        """Return the coreset [at most size, D]."""
        if self._count > self.size:
            self._reduce()
        return self._held[: self._count].clone()

    def _reduce(self) -> None:
        held = self._held[: self._count]
        kept = held[choose_rows(held, self.size, self.projection, self.generator).sort().values]
        self._held[: len(kept)] = kept
        self._count = len(kept)
        self.reductions += 1
