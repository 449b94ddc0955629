"""Memory banks: exact neighbours, coresets against the textbook loop, grids, limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import TinyBackbone
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import start_from_all

from adflow._bytes import in_units
from adflow.errors import InputError, ResourceError, UsageError
from adflow.features import as_source
from adflow.methods import _memory
from adflow.methods._local_bank import LocalBank
from adflow.methods._memory import (
    StreamingCoreset,
    choose_rows,
    common_grid,
    concatenate,
    coreset_size,
    greedy_coreset,
    half_norms,
    keep_within,
    nearest,
    parse_bytes,
    pyramid_shapes,
    random_projection,
    start_from_points,
    to_grid,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed))


# Neighbours


def brute_force(queries: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
    return (queries[:, None].double() - bank[None].double()).square().sum(dim=2)


@pytest.mark.parametrize("rows", [1, 2, 63, 64, 65, 200, 257])
@pytest.mark.parametrize("k", [1, 3])
def test_neighbours_are_those_of_all_differences(rows: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_memory, "_BANK_BLOCK", 128)  # several blocks, the last one not full
    queries, bank = normal(50, 7), normal(rows, 7, seed=1)
    squared, index = nearest(queries, bank, k)
    exact = brute_force(queries, bank).sort(dim=1)
    assert squared.shape == index.shape == (50, min(k, rows))
    # float32 sums of 7 squares
    np.testing.assert_allclose(squared, exact.values[:, :k], rtol=1e-5)
    assert torch.equal(index, exact.indices[:, :k])
    again = nearest(queries, bank, k, half_norms(bank))
    assert torch.equal(again[0], squared) and torch.equal(again[1], index)


def test_distances_keep_their_digits_far_from_the_origin() -> None:
    # |q|^2 is 1e6 times the distance: the product alone would return noise of about its size.
    bank = 1000 + normal(300, 16)
    queries = bank[:40] + 0.01 * normal(40, 16, seed=1)
    squared, index = nearest(queries, bank)
    assert torch.equal(index[:, 0], torch.arange(40))
    exact = brute_force(queries, bank).amin(dim=1, keepdim=True)
    np.testing.assert_allclose(squared, exact, rtol=1e-5)


def test_equal_distances_go_by_row_number() -> None:
    bank = torch.zeros(5, 3)
    squared, index = nearest(torch.ones(2, 3), bank, 3)
    assert index.tolist() == [[0, 1, 2]] * 2 and squared.tolist() == [[3.0] * 3] * 2


def test_one_query_gives_the_same_bits_as_many() -> None:
    bank, queries = normal(500, 20), normal(9, 20, seed=1)
    together, alone = nearest(queries, bank, 2), [nearest(q[None], bank, 2) for q in queries]
    # What is returned is measured by differences, one query at a time: no product's blocking enters.
    assert torch.equal(together[0], torch.cat([a[0] for a in alone]))
    assert torch.equal(together[1], torch.cat([a[1] for a in alone]))


def test_an_empty_bank_is_an_error() -> None:
    with pytest.raises(InputError, match="empty"):
        nearest(torch.zeros(1, 2), torch.zeros(0, 2))


# Local neighbours


def local_by_loops(patches: torch.Tensor, bank: torch.Tensor, grid: tuple[int, int], radius: int) -> torch.Tensor:
    h, w = grid
    result = torch.empty(patches.shape[:2], dtype=torch.float64)
    for p in range(h * w):
        y, x = divmod(p, w)
        cells = [
            j * w + i
            for j in range(max(0, y - radius), min(h, y + radius + 1))
            for i in range(max(0, x - radius), min(w, x + radius + 1))
        ]
        result[:, p] = brute_force(patches[:, p], bank[:, cells].flatten(0, 1)).amin(dim=1)
    return result


@pytest.mark.parametrize("grid", [(4, 6), (1, 3), (1, 1)])
@pytest.mark.parametrize("radius", [0, 1, 2])
def test_local_neighbours_are_those_of_loops(grid: tuple[int, int], radius: int) -> None:
    cells = grid[0] * grid[1]
    bank, patches = normal(11, cells, 5), normal(3, cells, 5, seed=1)
    local = LocalBank(grid, 5, radius)
    local.start(50)
    local.add(bank[:4])
    local.add(bank[4:])
    local.finish()
    np.testing.assert_allclose(local(patches), local_by_loops(patches, bank, grid, radius), rtol=1e-5)
    left_out = local_by_loops(bank[6:7], bank[[i for i in range(11) if i != 6]], grid, radius)
    np.testing.assert_allclose(local(bank[6:7], own=6), left_out, rtol=1e-5)
    assert float(local(bank[6:7]).max()) == 0


def test_a_full_cell_keeps_what_covers_the_others() -> None:
    # 3 tight groups in every cell: with 3 places, one patch of each group stays.
    centres = 10 * torch.eye(3)
    bank = centres[torch.arange(30) % 3][:, None].expand(30, 4, 3) + 0.01 * normal(30, 4, 3)
    local = LocalBank((2, 2), 3, 1)
    local.start(3)
    for part in bank.split(2):
        local.add(part)
    local.finish()
    assert local.bank_.shape == (4, 3, 3)
    same = LocalBank((2, 2), 3, 1)
    same.start(3)
    same.add(torch.ones(6, 4, 3))
    same.finish()
    assert all(len(set(cell)) == 3 for cell in same._numbers.tolist())
    assert float(local(bank).max()) < 0.1


# Coresets


def textbook(rows: torch.Tensor, size: int, start: torch.Tensor) -> torch.Tensor:
    """Greedy k-centre with all distances, in float64."""
    distances = brute_force(rows, rows)
    reach, picks = start.double().clone(), []
    for _ in range(size):
        pick = int(reach.argmax())
        picks.append(pick)
        reach = torch.minimum(reach, distances[pick])
        reach[pick] = -1
    return torch.tensor(picks)


@pytest.mark.parametrize("size", [1, 5, 120, 2500])
def test_the_picks_are_those_of_the_textbook(size: int) -> None:
    # More rows than the pool of candidates (1,024), and more picks than one pass takes (256).
    # In float64: the last picks are decided by differences that float32 does not resolve.
    rows = normal(2500, 4).double() * torch.tensor([3.0, 1.0, 0.3, 0.1])
    for start in (start_from_points(rows, torch.arange(10)), start_from_all(rows)):
        picks = greedy_coreset(rows, size, start)
        assert torch.equal(picks, textbook(rows, size, start))
        assert len(set(picks.tolist())) == size


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.integers(1, 5), st.integers(1, 50), st.integers(0, 5))
def test_no_row_is_picked_twice_and_the_cover_is_within_twice_the_best(
    rows: int, width: int, size: int, seed: int
) -> None:
    data = torch.randint(0, 4, (rows, width), generator=seeded(seed)).float()  # many equal rows
    picks = greedy_coreset(data, size, start_from_all(data))
    assert len(set(picks.tolist())) == len(picks) == min(size, rows)
    # Gonzalez: the picks and the row farthest from them lie at least the radius apart, so any cover of as
    # many sets has a diameter of the radius or more.
    reach = brute_force(data, data[picks]).amin(dim=1).max()
    chosen = brute_force(data[picks], data[picks]) + torch.eye(len(picks)) * 1e9
    assert float(chosen.amin()) >= float(reach) - 1e-4


def test_equal_rows_are_not_picked_twice_across_passes() -> None:
    # 4 different rows: after 4 picks every distance is 0, and a pass ends after 256 picks.
    data = 0.1 + torch.eye(4)[torch.arange(1500) % 4]
    picks = greedy_coreset(data, 700, start_from_all(data))
    assert len(set(picks.tolist())) == 700
    assert len(set((picks[:4] % 4).tolist())) == 4


def test_picks_do_not_depend_on_where_the_origin_is() -> None:
    # Whole numbers, so that shifting by 1,000 is exact: only cancellation could tell the two apart.
    rows = (100 * normal(1500, 3)).round() / 8
    for start in (start_from_all, lambda x: start_from_points(x, torch.arange(3))):
        near, far = (greedy_coreset(x, 40, start(x)) for x in (rows, rows + 1000))
        assert torch.equal(near, far)


def test_starts_are_the_sums_they_say() -> None:
    rows = 5 + normal(40, 3)
    distances = brute_force(rows, rows)
    points = torch.tensor([3, 7])
    np.testing.assert_allclose(start_from_all(rows), distances.sum(dim=1), rtol=1e-4)
    np.testing.assert_allclose(
        start_from_points(rows, points), distances[points].sqrt().mean(dim=0).square(), rtol=1e-5
    )


def test_a_projection_keeps_lengths_in_the_mean_and_is_seeded() -> None:
    matrix = random_projection(300, 128, seeded(1))
    assert torch.equal(matrix, random_projection(300, 128, seeded(1)))
    rows = normal(400, 300)
    ratio = (rows @ matrix).square().sum() / rows.square().sum()
    assert 0.95 < float(ratio) < 1.05  # standard deviation about sqrt(2 / 128 / 400)
    assert torch.equal(random_projection(5, 5, seeded()), torch.eye(5))


def test_streaming_with_room_for_all_is_the_plain_coreset() -> None:
    rows = normal(500, 6)
    stream = StreamingCoreset(60, 500, torch.eye(6), seeded(2))
    for part in rows.split(77):
        stream.add(part)
    expected = rows[choose_rows(rows, 60, torch.eye(6), seeded(2)).sort().values]
    assert torch.equal(stream.rows(), expected) and stream.seen == 500 and stream.reductions == 1


def test_streaming_in_little_room_covers_nearly_as_well() -> None:
    rows = normal(3000, 3)

    def radius(kept: torch.Tensor) -> float:
        return float(nearest(rows, kept)[0].max().sqrt())

    stream = StreamingCoreset(100, 250, torch.eye(3), seeded())
    halves = [StreamingCoreset(100, 250, torch.eye(3), seeded(i)) for i in (1, 2)]
    for i, part in enumerate(rows.split(100)):
        stream.add(part)
        halves[i % 2].add(part)
    halves[0].add(halves[1].rows())
    plain = radius(rows[choose_rows(rows, 100, torch.eye(3), seeded())])
    originals = {tuple(row) for row in rows.tolist()}
    for kept in (stream.rows(), halves[0].rows()):
        assert len(kept) == 100 and {tuple(row) for row in kept.tolist()} <= originals
        # A chain of reductions loses a little; random rows reach 2.3 times the plain radius here.
        assert radius(kept) < 1.6 * plain
    assert stream.seen == 3000 and stream.reductions > 10


def test_a_part_is_thinned_only_where_that_pays() -> None:
    rows = normal(100, 3)
    whole = StreamingCoreset(25, 100, torch.eye(3), seeded(3))
    part = whole.fresh()
    part.add(rows)
    expected = rows[choose_rows(rows, 25, torch.eye(3), seeded(3)).sort().values]
    assert torch.equal(part.of_part(), expected)
    few = whole.fresh()
    few.add(rows[:99])
    assert torch.equal(few.of_part(), rows[:99])


@pytest.mark.parametrize("seed", range(6))
def test_a_coreset_of_coresets_of_parts_is_within_its_factor(seed: int) -> None:
    """Covering radius at most 4 times the best (plain greedy: 2 times), however the parts are cut."""
    rows = normal(600, 4, seed=seed)
    rows[:550] *= 0.1  # most rows crowded, as patches are; a few far out
    rows = rows[(rows[:, 0].sort().indices if seed % 2 else torch.randperm(600, generator=seeded(seed)))]

    def chosen(part: torch.Tensor) -> torch.Tensor:
        return part[greedy_coreset(part, 20, start_from_all(part))]

    def radius(kept: torch.Tensor) -> float:
        return float(nearest(rows, kept)[0].max().sqrt())

    merged = chosen(torch.cat([chosen(part) for part in rows.split(150)]))
    # The best radius is not known: no less than half of greedy's, and no more than greedy's.
    assert radius(merged) <= 4 * radius(chosen(rows))
    assert radius(merged) <= 1.5 * radius(chosen(rows))  # what is seen; 1.22 at most here


# Grids, sizes, limits


def test_taps_meet_on_one_grid() -> None:
    fine, coarse = normal(2, 3, 4, 6), normal(2, 5, 2, 3, seed=1)
    finest = concatenate([fine, coarse], (4, 6))
    assert torch.equal(finest[:, :3], fine)
    assert torch.equal(finest[:, 3:], coarse.repeat_interleave(2, 2).repeat_interleave(2, 3))
    coarsest = concatenate([fine, coarse], (2, 3))
    means = fine.unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(4, 5))
    np.testing.assert_allclose(coarsest[:, :3], means, rtol=1e-5)
    odd = to_grid(normal(1, 1, 7, 5), (3, 2))
    assert odd.shape == (1, 1, 3, 2)
    assert common_grid([(4, 6), (2, 3)], "finest") == (4, 6)
    assert common_grid([(4, 6), (2, 3)], "coarsest") == (2, 3)
    with pytest.raises(UsageError, match="finest"):
        common_grid([(1, 1)], "middle")


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GiB", 2 << 30), ("1.5 kib", 1536), ("500MB", 500_000_000), ("7", 7), (9, 9), (None, None)],
)
def test_sizes_are_read(text: str | int | None, size: int | None) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1", "0", "2XB", "iB", "1 2"])
def test_what_is_no_size_is_an_error(text: str) -> None:
    with pytest.raises(UsageError, match="2GiB"):
        parse_bytes(text)


def test_a_limit_refuses_before_and_says_how_much() -> None:
    keep_within(None, 1 << 50, "all of it", "less")
    keep_within(1 << 60, 1 << 50, "all of it", "less")
    with pytest.raises(ResourceError, match=r"all of it needs 1 GiB .* limit is 100 MiB") as caught:
        keep_within(100 << 20, 1 << 30, "all of it", "Take less.")
    assert caught.value.hint == "Take less."
    assert in_units(0) == "0 B" and in_units(1 << 50) == "1024 TiB"


def test_shapes_are_known_on_the_device_of_the_backbone() -> None:
    backbone = TinyBackbone().to("meta")  # stands for a GPU: what is not brought there is an error
    shapes = pyramid_shapes(backbone, as_source(torch.zeros(2, 3, 64, 48)))
    assert shapes == ([8, 12, 16], [(16, 12), (8, 6), (4, 3)])


@pytest.mark.parametrize("text", ["0", "0%", "-3", "ten", "10 %%", ""])
def test_what_is_no_coreset_is_an_error(text: str) -> None:
    with pytest.raises(UsageError, match="10%"):
        coreset_size(text, 100)
