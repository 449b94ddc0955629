"""Coreset, nearest neighbours, local banks and Gaussian statistics against plain twins, floors and other libraries.

    python tests/benchmarks/bench_memory.py [--rows 80000] [--width 232] [--picks 400] [--rounds 3]

Every side works in a process of its own, in turn. Only so many ``picks`` of a coreset are made: the cost per pick of
the loops does not change. Quality of a coreset is its radius, the largest distance of a row to the nearest one kept.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from _contest import Call, Sides, contest, cores, measured, show

POSITIONS, IMAGES, CHANNELS = 1024, 128, 100  # a quarter of the paper's 64 x 64 cells: cost is linear in them


def features(rows: int, width: int) -> torch.Tensor:
    """Rows whose variances fall as those of whitened backbone features do, in some 50 clumps."""
    torch.set_num_threads(cores())
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(50, width, generator=generator)
    noise = torch.randn(rows, width, generator=generator)
    kind = torch.randint(0, 50, (rows,), generator=generator)
    return (centres[kind] + noise) * torch.logspace(0, -1, width)


# --- coresets ---------------------------------------------------------------------------------------------------


def adflow_coreset(rows: int, width: int, picks: int, projection: int) -> Call:
    from adflow.methods._memory import choose_rows, random_projection

    data = features(rows, width)

    def call() -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        with measured() as took:
            chosen = choose_rows(data, picks, random_projection(width, projection, generator), generator)
        return radius(data, chosen) | took

    return call


def textbook_coreset(rows: int, width: int, picks: int) -> Call:
    """The plain twin: one matrix-vector product over all rows a pick."""
    from adflow.methods._memory import start_from_points

    data = features(rows, width)

    def call() -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        with measured() as took:
            reach = start_from_points(data, torch.randperm(rows, generator=generator)[:10])
            centred = data - data.mean(dim=0)
            norms, chosen = centred.square().sum(dim=1), []
            for _ in range(picks):
                pick = int(reach.argmax())
                chosen.append(pick)
                distance = torch.addmv(norms + norms[pick], centred, centred[pick], alpha=-2).clamp_(min=0)
                reach = torch.minimum(reach, distance)
                reach[pick] = -1
        return radius(data, torch.tensor(chosen)) | took

    return call


def anomalib_coreset(rows: int, width: int, picks: int) -> Call:
    from anomalib.models.components.sampling import KCenterGreedy

    data = features(rows, width)

    def call() -> dict[str, Any]:
        torch.manual_seed(0)
        with measured() as took:
            chosen = KCenterGreedy(data, (picks + 0.5) / rows).select_coreset_idxs()
        return radius(data, torch.tensor(chosen)) | took

    return call


def radius(data: torch.Tensor, chosen: torch.Tensor) -> dict[str, Any]:
    from adflow.methods._memory import nearest

    return {"radius": float(nearest(data, data[chosen])[0].max().sqrt())}


def coresets(rows: int, width: int, picks: int) -> Sides:
    return {
        "adflow, as PatchCore does, on 128 projected numbers": (adflow_coreset, rows, width, picks, 128),
        "adflow, on all numbers": (adflow_coreset, rows, width, picks, width),
        "textbook loop, one matrix-vector product a pick": (textbook_coreset, rows, width, picks),
        "anomalib KCenterGreedy": (anomalib_coreset, rows, width, picks),
    }


# --- nearest neighbours -----------------------------------------------------------------------------------------


def adflow_nearest(width: int, k: int) -> Call:
    from adflow.methods._memory import half_norms, nearest

    bank, queries = _bank(width)
    halves = half_norms(bank)
    return lambda: _distances(nearest(queries, bank, k, halves)[0].sqrt())


def cdist_nearest(width: int, k: int) -> Call:
    bank, queries = _bank(width)
    return lambda: _distances(torch.cdist(queries, bank).topk(k, largest=False).values)


def sklearn_nearest(width: int, k: int) -> Call:
    from sklearn.neighbors import NearestNeighbors

    bank, queries = _bank(width)
    tree = NearestNeighbors(n_neighbors=k, algorithm="brute", n_jobs=1).fit(bank.numpy())
    return lambda: _distances(torch.from_numpy(tree.kneighbors(queries.numpy())[0]))


def product(width: int) -> Call:
    bank, queries = _bank(width)

    def call() -> None:
        torch.mm(queries, bank.T)

    return call


def _bank(width: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = features(16384, width)
    return rows[:8192].contiguous(), rows[-784:].contiguous()


def _distances(found: torch.Tensor) -> dict[str, Any]:
    return {"mean distance": float(found.mean())}


def neighbours(width: int, k: int) -> Sides:
    return {
        "adflow, blocks, nearest measured directly": (adflow_nearest, width, k),
        "torch.cdist + topk": (cdist_nearest, width, k),
        "scikit-learn, brute force": (sklearn_nearest, width, k),
        "one matrix product of that size (floor)": (product, width),
    }


# --- local banks ------------------------------------------------------------------------------------------------


def _local() -> tuple[torch.Tensor, torch.Tensor]:
    torch.set_num_threads(cores())
    generator = torch.Generator().manual_seed(0)
    return torch.randn(320, 256, 128, generator=generator), torch.randn(1, 256, 128, generator=generator)


def adflow_local() -> Call:
    from adflow.methods._local_bank import LocalBank

    bank, query = _local()
    local = LocalBank((16, 16), 128, 1)
    local.start(512)
    local.add(bank)
    local.finish()

    def call() -> None:
        local(query)

    return call


def local_by_cell() -> Call:
    bank, query = _local()
    cells = [
        [16 * j + i for j in range(16) for i in range(16) if abs(j - y) <= 1 and abs(i - x) <= 1]
        for y in range(16)
        for x in range(16)
    ]

    def call() -> None:
        for p, c in enumerate(cells):
            torch.cdist(query[:, p], bank[:, c].flatten(0, 1)).amin()

    return call


LOCAL: Sides = {"adflow, one batched product": (adflow_local,), "torch.cdist cell by cell": (local_by_cell,)}

# --- statistics of PaDiM ----------------------------------------------------------------------------------------


def _vectors() -> torch.Tensor:
    torch.set_num_threads(cores())
    return torch.randn(IMAGES, POSITIONS, CHANNELS, generator=torch.Generator().manual_seed(0))


def adflow_gaussians() -> Call:
    from adflow._rows import RamStore
    from adflow.features import FeatureBank
    from adflow.methods._gaussian import PositionGaussians

    vectors = _vectors()
    store = RamStore((CHANNELS, POSITIONS, 1), torch.float32, IMAGES)
    for row in vectors.transpose(1, 2).unsqueeze(3).split(1):
        store.append(row)
    bank = FeatureBank([store], (POSITIONS, 1), 1, "given", on_disk=False)

    def call() -> dict[str, Any]:
        model = PositionGaussians(POSITIONS, CHANNELS)
        model.fit(bank, lambda pyramid: pyramid[0].flatten(2).transpose(1, 2), whiten=False, ridge=0.01)
        return {"mean distance": float(model(vectors[:1]).sqrt().mean())}

    return call


def anomalib_gaussians() -> Call:
    from anomalib.models.components import MultiVariateGaussian

    vectors = _vectors()
    side = round(POSITIONS**0.5)
    embedding = vectors.transpose(1, 2).reshape(IMAGES, CHANNELS, side, side).contiguous()

    def call() -> dict[str, Any]:
        mean, inverse = MultiVariateGaussian().fit(embedding)
        centred = vectors[0] - mean.T  # [P, C]
        return {"mean distance": float(torch.einsum("pc,pcd,pd->p", centred, inverse, centred).sqrt().mean())}

    return call


GAUSSIANS: Sides = {
    "adflow, streamed, batched Cholesky, float64": (adflow_gaussians,),
    "anomalib MultiVariateGaussian": (anomalib_gaussians,),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=80_000)
    parser.add_argument("--width", type=int, default=232)
    parser.add_argument("--picks", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    title = f"coreset: {given.picks} of {given.rows} rows of {given.width} numbers"
    slow = ("textbook loop, one matrix-vector product a pick", "anomalib KCenterGreedy")
    show(title, contest(coresets(given.rows, given.width, given.picks), given.rounds, once=slow))
    for k in (1, 9):
        title = f"{k} nearest of 8192 rows of {given.width} numbers, 784 queries"
        show(title, contest(neighbours(given.width, k), given.rounds))
    title = "local neighbours of one image: 16 x 16 cells, 3 x 3 around, 320 images, 128 numbers"
    show(title, contest(LOCAL, given.rounds))
    title = f"PaDiM statistics: {IMAGES} images, {POSITIONS} positions, {CHANNELS} channels"
    show(title, contest(GAUSSIANS, given.rounds))


if __name__ == "__main__":
    main()
