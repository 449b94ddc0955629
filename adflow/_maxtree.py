"""The sweeps behind regions: a max-tree with its best regions or its peaks, and the region count of a map.

Pixels are visited in descending order and joined by union-find, so one sort is the only cost above linear.
The kernels below are plain Python on flat sequences: with numba installed (``pip install adflow[fast]``) they
are compiled and kept in numba's cache on disk; without it the same lines run on lists, and the count uses a
minimum spanning tree from scipy instead. Results are the same bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.integer[Any]]


def _link(order: Any, stride: int, at: Any, root: Any, up: Any) -> None:
    """Build the tree of pixels: ``up[i]`` is the parent of rank ``i``, a later rank, or ``i`` for a root.

    Args:
        order: pixel index in the padded map of each rank, highest value first.
        stride: row length of the padded map; neighbours of p are p - stride, p - 1, p + 1, p + stride.
        at: rank at each padded pixel, -1 where there is none yet; filled here.
        root: union-find forest over ranks (path halving); the root of a component is its lowest pixel so far.
        up: result.
    """
    for i in range(len(order)):
        p = order[i]
        root[i] = i
        up[i] = i
        for q in (p - stride, p - 1, p + 1, p + stride):
            r = at[q]
            if r >= 0:
                while root[r] != r:
                    root[r] = root[root[r]]
                    r = root[r]
                if r != i:
                    root[r] = i
                    up[r] = i
        at[p] = i


def _choose(
    level: Any,
    unit: Any,
    charge: Any,
    up: Any,
    area: Any,
    kids: Any,
    opened: Any,
    best: Any,
    value: Any,
    kept: Any,
    label: Any,
) -> None:
    """Choose disjoint best regions: the fix-point of U-Flow's prune and merge, in one pass up and one down.

    A node is a connected component {level >= v}; ranks of equal level that touch are one node, represented by
    the last of them. ``value`` of a node is charge[area] - area * unit (log10; lower = more meaningful).
    Up: a leaf is its own best. A node with one child takes the lower of its own value and the child's best
    (the smaller region wins ties), unless the child is open. A node with several children closes over them
    when all are closed and its value is not above their lowest; else it stays open.
    Down: the best region of a closed node under an open one, or of a closed root, is kept.

    Args:
        level: value of each rank, descending.
        unit: evidence per pixel of a region at that level, -log10 P, >= 0.
        charge: log10 of the tests charged to a region, by area.
        up: from :func:`_link`.
        area: ones on entry; pixels of the node.
        kids: zeros; number of children.
        opened: zeros; 1 when the node cannot be one region.
        best: -1; rank of the best region inside the node.
        value: any; log10 value of each node.
        kept: zeros; 1 for the regions chosen.
        label: any; result: rank of the chosen region a pixel belongs to, or -1.
    """
    for p in range(len(up)):
        q = up[p]
        size, children, b = area[p], kids[p], best[p]
        if q != p and level[q] == level[p]:
            area[q] += size
            kids[q] += children
            opened[q] |= opened[p]
        else:
            v = charge[size] - size * unit[p]
            value[p] = v
            if children == 0 or (opened[p] == 0 and (v < value[b] or (v == value[b] and children > 1))):
                b = p
                best[p] = p
            elif children > 1:
                opened[p] = 1
            if q == p:
                continue
            area[q] += size
            kids[q] += 1
            opened[q] |= opened[p]
        if b >= 0:
            other = best[q]
            if other < 0 or value[b] < value[other]:
                best[q] = b
    for p in range(len(up) - 1, -1, -1):
        q = up[p]
        if q == p:
            label[p] = -1
            top = True
        elif level[q] == level[p]:
            label[p] = label[q]
            opened[p] = opened[q]
            continue
        else:
            label[p] = label[q]
            top = opened[q] == 1
        if top and opened[p] == 0:
            kept[best[p]] = 1
        if kept[p] == 1:
            label[p] = p


def _crown(level: Any, up: Any, peak: Any) -> None:
    """Raise ``peak``, the values of the ranks on entry, to the highest value of each rank's node.

    Up: a parent is as high as its highest child. Down: ranks of one level that touch are one node, whose last rank
    knows all of it.
    """
    for p in range(len(up)):
        if peak[up[p]] < peak[p]:
            peak[up[p]] = peak[p]
    for p in range(len(up) - 1, -1, -1):
        if level[up[p]] == level[p]:
            peak[p] = peak[up[p]]


def _count(order: Any, level: Any, stride: int, root: Any, limit: int, where: Any, counts: Any) -> int:
    """Record where the number of components of {map >= level} reaches a new maximum; return how many records.

    Args:
        order: pixel index in the padded map of each rank, highest value first.
        level: value of each rank.
        stride: row length of the padded map.
        root: -1 for every padded pixel; union-find forest.
        limit: stop after the first record above this count.
        where: result, rank of each record.
        counts: result, count of each record, increasing.
    """
    count, top, records = 0, 0, 0
    last = len(order) - 1
    for i in range(last + 1):
        p = order[i]
        root[p] = p
        count += 1
        for q in (p - stride, p - 1, p + 1, p + stride):
            r = root[q]
            if r >= 0:
                while root[r] != r:
                    root[r] = root[root[r]]
                    r = root[r]
                if r != p:
                    root[r] = p
                    count -= 1
        if count > top and (i == last or level[i + 1] != level[i]):
            where[records] = i
            counts[records] = count
            records += 1
            top = count
            if top > limit:
                break
    return records


@functools.cache
def compiled() -> dict[str, Callable[..., Any]] | None:
    """Return the numba versions of the kernels by name, or None when numba is not installed."""
    try:
        import numba
    except ImportError:
        return None
    kernels: dict[str, Callable[..., Any]] = {}
    for kernel in (_link, _choose, _crown, _count):
        try:
            kernels[kernel.__name__] = numba.njit(cache=True, nogil=True)(kernel)
        except RuntimeError:  # numba finds no folder it may write its cache to
            kernels[kernel.__name__] = numba.njit(nogil=True)(kernel)
    return kernels


def _padded(flat: npt.NDArray[np.intp], h: int, w: int) -> tuple[Ints, int, int]:
    """Return places of pixels in a map with a border all around, the length of its rows, and how many places it has.

    One column of padding serves as the right border of a row and the left border of the next.
    """
    stride = w + 1
    return flat + flat // w + stride + 1, stride, (h + 2) * stride + 1


def best_regions(
    level: Floats, unit: Floats, charge: Floats, floor: float
) -> tuple[Ints, Floats, Ints, npt.NDArray[np.intp]]:
    """Return the best disjoint regions of one map among the nodes of its max-tree above ``floor``.

    Args:
        level: [h, w] float64, finite.
        unit: [h, w] evidence per pixel of a region whose lowest level is this one.
        charge: [h * w + 1] log10 tests by area.
        floor: nodes at or below this level are not looked at (-inf: all).

    Returns:
        ranks [h, w], the region of each pixel as an index into the next three, or -1; and by rank: value
        (log10), area, flat pixel index. Only entries named in the first array mean anything.
    """
    h, w = level.shape
    flat = np.flatnonzero(level.ravel() > floor)
    flat = flat[np.argsort(-level.ravel()[flat])]
    m = len(flat)
    order, stride, padded = _padded(flat, h, w)
    ranks = np.full(h * w, -1, dtype=np.int64)
    levels, units = level.ravel()[flat], unit.ravel()[flat]
    kernels = compiled()
    if kernels is None:
        up, area, value, label = _best_plain(order, stride, padded, levels, units, charge)
    else:
        at = np.full(padded, -1, dtype=np.int64)
        up, root, best, label = (np.full(m, -1, dtype=np.int64) for _ in range(4))
        kids, opened, kept = (np.zeros(m, dtype=np.int64) for _ in range(3))
        area, value = np.ones(m, dtype=np.int64), np.empty(m)
        kernels["_link"](order, stride, at, root, up)
        kernels["_choose"](levels, units, charge, up, area, kids, opened, best, value, kept, label)
    ranks[flat] = label
    return ranks.reshape(h, w), value, area, flat


def _best_plain(
    order: Ints, stride: int, padded: int, levels: Floats, units: Floats, charge: Floats
) -> tuple[Ints, Ints, Floats, Ints]:
    m = len(order)
    at, root, up = [-1] * padded, [0] * m, [0] * m
    area, kids, opened, best, kept, label = [1] * m, [0] * m, [0] * m, [-1] * m, [0] * m, [-1] * m
    value = [0.0] * m
    _link(order.tolist(), stride, at, root, up)
    level, unit, tests = levels.tolist(), units.tolist(), charge.tolist()
    _choose(level, unit, tests, up, area, kids, opened, best, value, kept, label)
    return np.array(up), np.array(area), np.array(value), np.array(label, dtype=np.int64)


def own_peaks(score: Floats, floor: float) -> tuple[Ints, Floats, Floats, Ints]:
    """Return, for the pixels of {score >= floor} in descending order, how high their region is and how many there are.

    The region of a pixel p is the 4-connected component of {score >= score(p)} that holds p.

    Args:
        score: [h, w], finite or infinite.
        floor: pixels below are not looked at.

    Returns:
        By rank: flat pixel index, value, highest value in the pixel's region, and number of components of
        {score >= value}. The last means nothing but at the last rank of each value.
    """
    h, w = score.shape
    flat = np.flatnonzero(score.ravel() >= floor)
    flat = flat[np.argsort(-score.ravel()[flat], kind="stable")]
    levels = score.ravel()[flat]
    m = len(flat)
    order, stride, padded = _padded(flat, h, w)
    kernels = compiled()
    if kernels is None:
        ranks, high = [0] * m, levels.tolist()
        _link(order.tolist(), stride, [-1] * padded, [0] * m, ranks)
        _crown(levels.tolist(), ranks, high)
        up, peak = np.array(ranks, dtype=np.int64), np.array(high, dtype=levels.dtype)
    else:
        up, peak = np.empty(m, dtype=np.int64), levels.copy()
        kernels["_link"](order, stride, np.full(padded, -1, dtype=np.int64), np.empty(m, dtype=np.int64), up)
        kernels["_crown"](levels, up, peak)
    # A pixel starts a component and ends those it joins.
    joined = np.bincount(up[up != np.arange(m)], minlength=m)
    return flat, levels, peak, np.cumsum(1 - joined)


def count_records(score: Floats, limit: int) -> tuple[Floats, Ints]:
    """Return levels (falling) and counts (rising) where {score >= level} has more regions than ever before.

    Regions are 4-connected. The list ends after the first count above ``limit``.

    Args:
        score: [H, W], finite.
        limit: largest count of interest.
    """
    h, w = score.shape
    flat = np.argsort(-score.ravel(), kind="stable")
    levels = score.ravel()[flat]
    kernels = compiled()
    if kernels is None:
        return _count_plain(flat, levels, (h, w), limit)
    order, stride, padded = _padded(flat, h, w)
    root = np.full(padded, -1, dtype=np.int64)
    where, counts = np.empty(h * w, dtype=np.int64), np.empty(h * w, dtype=np.int64)
    records = kernels["_count"](order, levels, stride, root, limit, where, counts)
    return levels[where[:records]], counts[:records].copy()


def _count_plain(flat: Ints, levels: Floats, shape: tuple[int, int], limit: int) -> tuple[Floats, Ints]:
    """Count components as pixels minus edges of a spanning forest, both added in descending order."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import minimum_spanning_tree

    n = len(flat)
    rank = np.empty(n, dtype=np.int64)
    rank[flat] = np.arange(n)
    grid = rank.reshape(shape)
    a = np.concatenate([grid[:, :-1].ravel(), grid[:-1].ravel()])
    b = np.concatenate([grid[:, 1:].ravel(), grid[1:].ravel()])
    # An edge appears with its lower pixel, i.e. its later rank; +1 because a sparse matrix takes 0 for no edge.
    weights = np.maximum(a, b) + 1.0
    forest = minimum_spanning_tree(coo_matrix((weights, (a, b)), shape=(n, n)).tocsr(), overwrite=True)
    joined = np.bincount(forest.data.astype(np.int64) - 1, minlength=n)
    count = np.cumsum(1 - joined)
    ends = np.flatnonzero(np.append(levels[1:] != levels[:-1], True))
    count = count[ends]
    before = np.concatenate([[0], np.maximum.accumulate(count)[:-1]])
    new = np.flatnonzero(count > before)
    over = np.flatnonzero(count[new] > limit)
    if len(over):
        new = new[: over[0] + 1]
    return levels[ends[new]], count[new].astype(np.int64)
