"""Coreset, nearest neighbours, local banks and Gaussian statistics against plain twins and other libraries.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_memory.py [--rows 80000] [--width 232] [--repeat 5]

Every row runs in turn, medians of the rounds: only ratios mean anything on a shared machine. The plain
coreset loops are run for ``--picks`` picks only; their cost per pick does not change. "naive" does what the
best known library's k-centre class does for every pick: the distance of all rows to the new centre by
differences, then a minimum.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

from adflow.methods._gaussian import PositionGaussians
from adflow.methods._local_bank import LocalBank
from adflow.methods._memory import greedy_coreset, half_norms, nearest, start_from_points


def features(rows: int, width: int) -> torch.Tensor:
    """Rows whose variances fall as those of whitened backbone features do, in some 50 clumps."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(50, width, generator=generator)
    noise = torch.randn(rows, width, generator=generator)
    kind = torch.randint(0, 50, (rows,), generator=generator)
    return (centres[kind] + noise) * torch.logspace(0, -1, width)


def naive_coreset(rows: torch.Tensor, picks: int, start: torch.Tensor) -> list[int]:
    reach, chosen = start.sqrt(), []
    for _ in range(picks):
        pick = int(reach.argmax())
        chosen.append(pick)
        reach = torch.minimum(reach, F.pairwise_distance(rows, rows[pick : pick + 1]))
        reach[pick] = 0
    return chosen


def textbook_coreset(rows: torch.Tensor, picks: int, start: torch.Tensor) -> list[int]:
    rows = rows - rows.mean(dim=0)
    norms, reach, chosen = rows.square().sum(dim=1), start.clone(), []
    for _ in range(picks):
        pick = int(reach.argmax())
        chosen.append(pick)
        distance = torch.addmv(norms + norms[pick], rows, rows[pick], alpha=-2).clamp_(min=0)
        reach = torch.minimum(reach, distance)
        reach[pick] = -1
    return chosen


def medians(rows: dict[str, Callable[[], object]], repeat: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in rows}
    for round_ in range(repeat + 1):
        for name, run in rows.items():
            start = time.perf_counter()
            run()
            if round_:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def show(title: str, rows: dict[str, Callable[[], object]], repeat: int) -> dict[str, float]:
    found = medians(rows, repeat)
    first = next(iter(found.values()))
    print(title)
    for name, seconds in found.items():
        print(f"  {name:52s} {1e3 * seconds:9.1f} ms   {seconds / first:6.2f} x ours")
    return found


def coresets(rows: torch.Tensor, picks: int, repeat: int) -> None:
    start = start_from_points(rows, torch.arange(10))
    radii = [
        float(nearest(rows, rows[chosen])[0].max().sqrt())
        for chosen in (greedy_coreset(rows, picks, start), textbook_coreset(rows, picks, start))
    ]
    # The same picks but for ties within float32 rounding, after which orders may part.
    show(
        f"coreset: {picks} of {len(rows)} rows of {rows.shape[1]} numbers, "
        f"radius {radii[0]:.4f} (textbook {radii[1]:.4f})",
        {
            "adflow": lambda: greedy_coreset(rows, picks, start),
            "textbook loop, one matrix-vector product a pick": lambda: textbook_coreset(rows, picks, start),
            "naive loop, differences to all rows a pick": lambda: naive_coreset(rows, picks, start),
        },
        repeat,
    )


def neighbours(rows: torch.Tensor, repeat: int) -> None:
    bank, queries = rows[:8192].contiguous(), rows[-784:].contiguous()
    halves = half_norms(bank)
    for k in (1, 9):
        found: dict[str, Callable[[], object]] = {
            "adflow, blocks, nearest measured directly": lambda k=k: nearest(queries, bank, k, halves),
            "torch.cdist + topk": lambda k=k: torch.cdist(queries, bank).topk(k, largest=False),
        }
        try:
            from sklearn.neighbors import NearestNeighbors
        except ImportError:
            pass
        else:
            tree = NearestNeighbors(n_neighbors=k, algorithm="brute", n_jobs=1).fit(bank.numpy())
            found["scikit-learn, brute force"] = lambda tree=tree: tree.kneighbors(queries.numpy())
        show(f"{k} nearest of 8192 rows of {rows.shape[1]} numbers, 784 queries", found, repeat)


def local_banks(repeat: int) -> None:
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(320, 256, 128, generator=generator)
    query = torch.randn(1, 256, 128, generator=generator)
    local = LocalBank((16, 16), 128, 1)
    local.start(512)
    local.add(bank)
    local.finish()
    cells = [
        [16 * j + i for j in range(16) for i in range(16) if abs(j - y) <= 1 and abs(i - x) <= 1]
        for y in range(16)
        for x in range(16)
    ]

    def by_cell() -> list[torch.Tensor]:
        return [torch.cdist(query[:, p], bank[:, c].flatten(0, 1)).amin() for p, c in enumerate(cells)]

    show(
        "local neighbours of one image: 16 x 16 cells, 3 x 3 around, 320 images, 128 numbers",
        {"adflow, one batched product": lambda: local(query), "torch.cdist cell by cell": by_cell},
        repeat,
    )


def gaussians(repeat: int) -> None:
    vectors = torch.randn(320, 256, 100, generator=torch.Generator().manual_seed(0))

    def ours() -> None:
        PositionGaussians(256, 100).fit(lambda: vectors.split(32), whiten=False, ridge=0.01)

    def by_position() -> None:
        values = vectors.numpy()
        for p in range(256):
            np.linalg.inv(np.cov(values[:, p].T) + 0.01 * np.eye(100))

    show(
        "PaDiM statistics: 320 images, 256 positions, 100 channels, float64, factor or inverse",
        {"adflow, streamed, batched Cholesky": ours, "numpy.cov and inv, position by position": by_position},
        repeat,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmarks of adflow's memory banks.")
    parser.add_argument("--rows", type=int, default=80_000)
    parser.add_argument("--width", type=int, default=232)
    parser.add_argument("--picks", type=int, default=300)
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    rows = features(arguments.rows, arguments.width)
    coresets(rows, arguments.picks, min(2, arguments.repeat))
    neighbours(rows, arguments.repeat)
    local_banks(arguments.repeat)
    gaussians(min(3, arguments.repeat))


if __name__ == "__main__":
    main()
