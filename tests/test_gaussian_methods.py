"""PaDiM, PatchCore, SPADE and the local method: their statistics, definitions, limits and null models."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_tiny_images
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import mahalanobis

from adflow import features
from adflow._rows import RamStore
from adflow.backbones import Backbone
from adflow.detector_file import load_detector, save_detector
from adflow.errors import AdflowError, InputError, ResourceError, UsageError
from adflow.features import FeatureBank
from adflow.methods._gaussian import PositionGaussians, global_whitening, moments_of
from adflow.methods._memory import nearest
from adflow.methods._whiten import (
    Moments,
    by_position,
    chi_square_fit,
    inverse_factor,
    leave_one_out,
    shrink,
    whitening,
)
from adflow.methods.cflow import CFlow
from adflow.methods.local import Local
from adflow.methods.padim import PaDiM
from adflow.methods.patchcore import PatchCore
from adflow.methods.spade import SPADE

IMAGES = make_tiny_images(24, 64, 48)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(n: int, positions: int, width: int, seed: int = 0) -> torch.Tensor:
    """Vectors [n, P, C] with channels of very different size, far from 0, and correlated."""
    mixing = normal(width, width, seed=seed + 1) * torch.logspace(-1, 1, width)
    return normal(n, positions, width, seed=seed) @ mixing + 100 * normal(width, seed=seed + 2)


def bank_of(levels: list[torch.Tensor]) -> FeatureBank:
    """A bank of features [n, C, h, w] of images of 64 x 48 pixels."""
    stores = [RamStore((level.shape[1], level.shape[2], level.shape[3]), torch.float32, len(level)) for level in levels]
    for store, level in zip(stores, levels, strict=True):
        for row in level.split(1):
            store.append(row)
    return FeatureBank(stores, (64, 48), 1, "", on_disk=False)


def of_vectors(vectors: torch.Tensor) -> FeatureBank:
    """A bank with one level that holds vectors [n, P, d]."""
    return bank_of([vectors.transpose(1, 2).unsqueeze(3)])


def vectors_of(pyramid: list[torch.Tensor]) -> torch.Tensor:
    return pyramid[0].flatten(2).transpose(1, 2)


# Statistics


@pytest.mark.parametrize("n, positions, width", [(1, 6, 5), (4, 1, 5), (4, 6, 1), (3, 6, 5)])
def test_vectors_are_laid_out_by_position_from_maps_and_from_rows(n: int, positions: int, width: int) -> None:
    rows = normal(n, positions, width)
    from_maps = rows.transpose(1, 2).contiguous().transpose(1, 2)
    for vectors in (rows, from_maps, from_maps[:, : max(1, positions // 2)]):
        laid = by_position(vectors)
        assert laid.is_contiguous() and torch.equal(laid, vectors.transpose(0, 1))


def test_padim_of_parts_is_padim_of_the_whole() -> None:
    """Statistics of unequal parts, merged in any order, give the same Gaussians: to 1e-9 before they become float32."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(57, 6, 5, generator=generator) * torch.tensor([1e-2, 1, 3, 10, 1e3]) + 1e3
    bank = of_vectors(vectors)
    pieces = [bank.subset(range(2)), bank.subset(range(2, 40)), bank.subset(range(40, 57))]
    whole = moments_of(vectors_of, 5, slice(None), bank)
    white = global_whitening(bank, vectors_of, 5, 0.01)
    known = torch.from_numpy(np.cov(vectors.double().reshape(-1, 5).numpy().T))
    reach = known.diagonal().sqrt().unsqueeze(1) * known.diagonal().sqrt()
    for order in ((0, 1, 2), (2, 0, 1)):
        merged = moments_of(vectors_of, 5, slice(None), pieces[order[0]])
        everywhere = Moments(1, 5)
        for i in order[1:]:
            merged.merge(moments_of(vectors_of, 5, slice(None), pieces[i]))
        for i in order:
            everywhere.merge(moments_of(vectors_of, 5, None, pieces[i]))
        scale = whole.covariance().diagonal(dim1=1, dim2=2).sqrt()
        size = scale.unsqueeze(2) * scale.unsqueeze(1)  # what an entry of a covariance is measured against
        assert float(((merged.covariance() - whole.covariance()) / size).abs().max()) < 1e-9
        assert float(((merged.mean - whole.mean) / scale).abs().max()) < 1e-9
        for pooled in (everywhere, merged.pooled()):
            assert float(((pooled.covariance()[0] - known) / reach).abs().max()) < 1e-9
            np.testing.assert_allclose(whitening(pooled, 0.01).spectrum, white.spectrum, rtol=1e-9)
        models = [PositionGaussians(6, 5) for _ in range(2)]
        for model, moments in zip(models, (whole, merged), strict=True):
            model.learn(moments, white, slice(None), ridge=0.01, shrinkage=0.3)
        # Float64 rounding may tip a float32 by its last bit.
        torch.testing.assert_close(models[0].inverse_, models[1].inverse_, rtol=3e-7, atol=0)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(0, 3))
def test_merged_parts_are_the_whole(counts: list[int], seed: int) -> None:
    vectors = correlated(max(2, sum(counts)), 3, 4, seed)
    whole, merged, done = Moments(3, 4), Moments(3, 4), 0
    whole.add(vectors)
    for count in [*counts, len(vectors) - sum(counts)]:
        part = Moments(3, 4)
        part.add(vectors[done : done + count])
        merged.merge(part)
        done += count
    assert merged.count == whole.count == len(vectors)
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-9)
    scale = float(whole.scatter.abs().max())
    np.testing.assert_allclose(merged.scatter, whole.scatter, rtol=1e-9, atol=1e-9 * scale)


def test_moments_are_numpys() -> None:
    vectors = correlated(15, 2, 5)
    moments = Moments(2, 5)
    for part in vectors.split(4):
        moments.add(part)
    for p in range(2):
        np.testing.assert_allclose(moments.mean[p], vectors[:, p].double().mean(dim=0), rtol=1e-12)
        np.testing.assert_allclose(moments.covariance()[p], np.cov(vectors[:, p].double().T), rtol=1e-9)
    with pytest.raises(InputError, match="at least 2"):
        Moments(1, 1).covariance()
    with pytest.raises(InputError, match="not finite"):
        moments.add(torch.full((1, 2, 5), float("nan")))


def test_whitening_makes_all_directions_alike() -> None:
    vectors = correlated(4000, 1, 6).double()
    moments = Moments(1, 6)
    moments.add(vectors)
    white = whitening(moments, ridge=0.0)
    flat = (vectors[:, 0] - white.mean) @ white.matrix()
    np.testing.assert_allclose(np.cov(flat.T), np.eye(6), atol=1e-8)
    half = (vectors[:, 0] - white.mean) @ white.matrix(0.5)
    np.testing.assert_allclose(np.cov(half.T), np.diag(white.spectrum.sqrt()), atol=1e-8)
    assert bool((white.spectrum[:-1] >= white.spectrum[1:]).all())


def test_whitening_leaves_a_dead_channel_dead() -> None:
    vectors = correlated(50, 1, 4)
    vectors[:, :, 2] = 7.0
    moments = Moments(1, 4)
    moments.add(vectors)
    flat = (vectors[:, 0].double() - whitening(moments).mean) @ whitening(moments).matrix()
    assert bool(torch.isfinite(flat).all()) and float(flat.abs().max()) < 10


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("whiten", [False, True])
def test_distances_are_those_of_solving_by_position(rank: int | None, whiten: bool) -> None:
    vectors, new = correlated(40, 5, 6), correlated(3, 5, 6, seed=9)
    model = PositionGaussians(5, 6, rank)
    # Room for the scatter of three positions and to work on one: two passes, the last one not full.
    white = model.fit(of_vectors(vectors), vectors_of, whiten=whiten, ridge=0.01, shrinkage=0.2 * whiten, work=48 * 36)
    for p in range(5):
        x = vectors[:, p].double()
        covariance = torch.cov(x.T)
        difference = new[:, p].double() - x.mean(dim=0)
        if white is None:
            covariance = covariance + 0.01 * torch.eye(6)
        else:
            covariance = shrink(white.matrix().T @ covariance @ white.matrix(), 0.2)
            difference = difference @ white.matrix()
        if rank:
            values, axes = torch.linalg.eigh(covariance)
            values[:-rank] = values[:-rank].mean()
            covariance = axes @ torch.diag(values) @ axes.T
        exact = (difference * torch.linalg.solve(covariance, difference.T).T).sum(dim=1)
        # float32 of a factor whose condition is some hundreds; the low rank subtracts two large sums.
        np.testing.assert_allclose(model(new)[:, p], exact, rtol=1e-3)
        np.testing.assert_allclose(model.log_det_[p], torch.logdet(covariance), rtol=1e-4, atol=1e-4)


def test_a_singular_covariance_is_a_clear_error() -> None:
    with pytest.raises(InputError, match="1 of 2 positions"):
        inverse_factor(torch.stack([torch.eye(3), torch.zeros(3, 3)]).double())


@pytest.mark.parametrize("shrinkage", [0.0, 0.3])
def test_leaving_out_is_fitting_without(shrinkage: float) -> None:
    n, width = 60, 5
    vectors = normal(n, 1, width).double()

    def model(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        moments = Moments(1, width)
        moments.add(values)
        return moments.mean, inverse_factor(shrink(moments.covariance(), shrinkage))[0]

    mean, inverse = model(vectors)
    estimated = leave_one_out(mahalanobis(vectors, mean, inverse), n, 1 - shrinkage)[:, 0]
    exact = [
        float(mahalanobis(vectors[i : i + 1], *model(torch.cat([vectors[:i], vectors[i + 1 :]])))) for i in range(n)
    ]
    # The formula leaves out the factor (n - 1) / (n - 2) of the others' covariance.
    np.testing.assert_allclose(estimated, exact, rtol=1.5 / n)
    few = torch.tensor([1.0])
    assert leave_one_out(few, 2, 1.0) is few


def test_chi_square_is_fitted_by_two_moments() -> None:
    squares = normal(20000, 3, 6).square().sum(dim=2) * torch.tensor([0.1, 1.0, 50.0])
    scale, dof = chi_square_fit(squares)
    assert dof == pytest.approx(6, rel=0.05)  # the variance of 60,000 values of chi-square is known to 2 %
    np.testing.assert_allclose(scale, torch.tensor([10.0, 1.0, 0.02]), rtol=0.06)


# Methods


def pyramid(seed: int = 0, count: int = 12) -> list[torch.Tensor]:
    return [normal(count, 4, 8, 6, seed=seed), normal(count, 5, 4, 3, seed=seed + 100)]


def fitted(detector: Any, levels: list[torch.Tensor], seed: int = 0) -> Any:
    return detector.fit_bank(bank_of(levels), seed=seed)


@pytest.mark.parametrize(
    "make", [PaDiM, lambda b: PatchCore(b, coreset="100%"), lambda b: Local(b, coreset="100%", samples=16)]
)
def test_what_is_learned_of_parts_is_what_is_learned_of_the_whole(
    make: Any, tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fitted(make(tiny_backbone), pyramid(count=15))
    monkeypatch.setattr(features, "PART", 4)
    parts = fitted(make(tiny_backbone), pyramid(count=15))
    # Sums in float64, grouped otherwise, then rounded to float32.
    for name, tensor in whole.learned().items():
        torch.testing.assert_close(parts.learned()[name], tensor, rtol=1e-4, atol=1e-5)


def test_padim_of_the_paper_by_definition(tiny_backbone: Backbone) -> None:
    recipe = {k: v for k, v in PaDiM.recipe_for("paper").items() if k not in ("backbone", "taps", "size")}
    detector = fitted(PaDiM(tiny_backbone, **{**recipe, "channels": 5}), pyramid())
    assert len(set(detector.channels_.tolist())) == 5 and detector.grid_ == (8, 6)
    both = [
        torch.cat([f, t.repeat_interleave(2, 2).repeat_interleave(2, 3)], dim=1) for f, t in (pyramid(), pyramid(7))
    ]
    train, test = (x[:, detector.channels_].double() for x in both)
    found = detector.score_features(pyramid(7))
    for y, x in ((0, 0), (7, 5), (3, 2)):
        rows = train[:, :, y, x]
        covariance = torch.cov(rows.T) + 0.01 * torch.eye(5)
        difference = test[:, :, y, x] - rows.mean(dim=0)
        exact = (difference * torch.linalg.solve(covariance, difference.T).T).sum(dim=1).sqrt()
        np.testing.assert_allclose(found[:, y, x], exact, rtol=1e-4)


def test_padim_draws_by_seed(tiny_backbone: Backbone) -> None:
    models = [fitted(PaDiM(tiny_backbone, channels=5), pyramid(), seed) for seed in (1, 1, 2)]
    drawn = [model.channels_.tolist() for model in models]
    assert drawn[0] == drawn[1] != drawn[2]


def test_patchcore_with_every_row_is_zero_on_its_own_images(tiny_backbone: Backbone) -> None:
    detector = fitted(PatchCore(tiny_backbone, coreset="100%"), pyramid())
    assert len(detector.bank_) == 12 * 4 * 3
    assert float(detector.score_features(pyramid()).max()) < 1e-8
    assert float(detector.score_features(pyramid(7)).min()) > 1e-3


def test_patchcore_reweights_as_equation_7(tiny_backbone: Backbone) -> None:
    settings = {"grid": "finest", "whiten": None, "patch_score": True, "margin": 0.0, "coreset": "50%"}
    plain = fitted(PatchCore(tiny_backbone, squared=False, **settings), pyramid())
    weighted = fitted(PatchCore(tiny_backbone, squared=False, neighbours=4, **settings), pyramid())
    test = pyramid(7, 2)
    vectors = weighted.vectors(test)
    for i, score in enumerate(weighted.score_images(test, torch.zeros(2, 8, 8), None)):
        distances = torch.cdist(vectors[i].double(), weighted.bank_.double())
        least, match = distances.min(dim=1)
        top = int(least.argmax())
        apart = torch.cdist(weighted.bank_[match[top]][None], weighted.bank_)[0]
        around = apart.topk(4, largest=False).indices
        weight = 1 - float(least[top].exp() / distances[top, around].exp().sum())
        assert float(score) == pytest.approx(weight * float(least[top]), rel=1e-4)
    best = plain.score_images(test, torch.zeros(2, 8, 8), None)
    np.testing.assert_allclose(best, plain.score_features(test).amax(dim=(1, 2)), rtol=1e-6)


def test_patchcore_in_little_memory_chooses_in_parts(tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fitted(PatchCore(tiny_backbone, coreset="20"), pyramid())
    monkeypatch.setattr("adflow.methods.patchcore._HELD", 1)
    parts = fitted(PatchCore(tiny_backbone, coreset="20"), pyramid())
    assert parts.bank_.shape == whole.bank_.shape and not torch.equal(parts.bank_, whole.bank_)
    # Every row is a patch of a training image.
    rows = parts.vectors(pyramid()).flatten(0, 1)
    assert float(nearest(parts.bank_, rows)[0].max()) < 1e-8


@pytest.mark.parametrize("levels", ["joined", "separate"])
@pytest.mark.parametrize("kappa", [1, 3])
def test_spade_by_definition(levels: str, kappa: int, tiny_backbone: Backbone) -> None:
    taps = [*pyramid(), normal(12, 6, 2, 2, seed=50)]
    test = [*pyramid(7, 2), normal(2, 6, 2, 2, seed=57)]
    detector = fitted(
        SPADE(tiny_backbone, images=4, kappa=kappa, levels=levels, grid="finest", retrieval_score=True), taps
    )
    means = [t[-1].mean(dim=(2, 3)) for t in (test, taps)]
    near = torch.cdist(*means).topk(4, largest=False)
    scores = detector.score_images(test, torch.zeros(2, 4, 4), None)
    np.testing.assert_allclose(scores, near.values.mean(dim=1), rtol=1e-4)
    if levels == "joined":
        queries, gallery = (
            [torch.cat([f[0], f[1].repeat_interleave(2, 2).repeat_interleave(2, 3)], dim=1)] for f in (test, taps)
        )
    else:
        queries, gallery = test[:-1], taps[:-1]
    found = detector.level_distances(test, near.indices)
    for maps, query, rows in zip(found, queries, gallery, strict=True):
        for b in range(2):
            pixels = rows[near.indices[b]].permute(0, 2, 3, 1).flatten(0, 2)
            exact = torch.cdist(query[b].flatten(1).T, pixels).topk(kappa, largest=False).values.mean(dim=1)
            np.testing.assert_allclose(maps[b].flatten(), exact, rtol=1e-4)


def test_spade_puts_features_into_place_batch_by_batch(
    tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels, held = [normal(140, 2, 3, 2), normal(140, 3, 1, 1)], []
    batches = FeatureBank.batches

    def watched(self: FeatureBank, *args: Any, **options: Any) -> Iterator[list[torch.Tensor]]:
        for pyramid in batches(self, *args, **options):
            held.append(weakref.ref(pyramid[0]))
            assert sum(ref() is not None for ref in held) <= 2  # this batch, and the one that is being put away
            yield pyramid

    monkeypatch.setattr(FeatureBank, "batches", watched)
    detector = fitted(SPADE(tiny_backbone), levels)
    assert len(held) > 3
    assert torch.equal(detector.level0_, levels[0]) and torch.equal(detector.pooled_, levels[1][:, :, 0, 0])


@pytest.mark.parametrize("coreset", [None, "60"])
def test_local_is_the_pool_of_its_densities(coreset: str | None, tiny_backbone: Backbone) -> None:
    detector = fitted(Local(tiny_backbone, rank=None, width=None, coreset=coreset), pyramid(count=30))
    test = pyramid(7, 3)
    vectors = detector.vectors(test)
    near = (vectors - detector.centre_) @ detector.near_
    product = detector.gaussians(vectors) * (detector.gaussians.log_det_ / vectors.shape[2]).exp()
    here = (product * detector.neighbours(near)).sqrt()
    expected = here / detector.unit_
    if coreset:
        assert len(detector.bank_) == 60
        expected = here.sqrt() * torch.cdist(near, detector.bank_).amin(2) / detector.unit_
    np.testing.assert_allclose(detector.score_features(test).flatten(1), expected, rtol=1e-3)


def test_local_scores_are_about_1_on_new_normal_images(tiny_backbone: Backbone) -> None:
    for chosen in ({}, {"coreset": None}, {"coreset": "50%"}, {"coreset": "50%", "gaussian": False}):
        detector = Local(tiny_backbone, **chosen).fit(IMAGES.normal)
        new = make_tiny_images(8, 64, 48, seed=5)
        # Left-out training images stand for new ones: a sample of 24 says so within a factor.
        assert 0.5 < float(detector.score_features(tiny_backbone(new.normal)).mean()) < 2
        assert float(detector.score(new.defective).image) > 2 * float(detector.score(new.normal).image.max())


@pytest.mark.parametrize("make", [PaDiM, Local])
def test_energies_of_new_normal_images_follow_their_law(make: Any, tiny_backbone: Backbone) -> None:
    # Gaussian features with different scales by position: then the model is right, and its null should be.
    scale = torch.logspace(-1, 1, 12).reshape(1, 1, 4, 3)
    train, new = ([normal(n, 6, 4, 3, seed=s) * scale] for n, s in ((200, 0), (400, 1)))
    detector = fitted(make(tiny_backbone), train)
    energy = detector.energy_features(new)[0]
    ratio = energy.chi2 / energy.dof
    assert float(ratio.mean()) == pytest.approx(1, abs=0.1)
    assert float(ratio.var()) == pytest.approx(2 / energy.dof, rel=0.3)
    by_position = ratio.mean(dim=0)
    assert float(by_position.min()) > 0.7 and float(by_position.max()) < 1.4


def test_a_full_bank_stays_bounded(tiny_backbone: Backbone) -> None:
    detector = fitted(Local(tiny_backbone, samples=4), pyramid(count=30))
    assert detector.neighbours.bank_.shape[2] == 4


@pytest.mark.parametrize("make", [PaDiM, PatchCore, SPADE, Local])
def test_a_limit_that_cannot_be_kept_is_refused_before_features_are_made(
    make: Any, tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("features were made")

    monkeypatch.setattr("adflow.features.FeatureBank.build", never)
    with pytest.raises(ResourceError, match=r"limit is 1 MiB") as caught:
        make(tiny_backbone, max_memory="1MiB").fit(IMAGES.normal)
    assert caught.value.hint


@pytest.mark.parametrize("make", [PaDiM, PatchCore, SPADE, Local, CFlow])
def test_the_limit_of_a_fit_does_not_keep_a_detector_from_being_loaded(
    make: Any, tiny_backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"steps": 1} if make is CFlow else {}
    detector = make(tiny_backbone, max_memory="64GiB", **few).fit(IMAGES.normal)
    file = save_detector(detector, tmp_path / "d.safetensors")
    monkeypatch.setattr("adflow.detector_file.make_backbone", lambda *_, **__: tiny_backbone)
    monkeypatch.setattr("adflow.methods._memory.resident_bytes", lambda: 1 << 50)
    assert torch.equal(load_detector(file).score(IMAGES.defective).map, detector.score(IMAGES.defective).map)


@pytest.mark.parametrize("make", [PaDiM, PatchCore, SPADE, Local])
def test_a_limit_is_no_trap_where_no_image_can_be_read(make: Any, tiny_backbone: Backbone) -> None:
    class Unreadable:
        def __len__(self) -> int:
            return 3

        def batches(self, batch_size: int) -> Iterator[torch.Tensor]:
            yield from ()

    with pytest.raises(InputError, match="no image"):
        make(tiny_backbone, max_memory="64GiB").fit(Unreadable())


@pytest.mark.parametrize("make", [PaDiM, PatchCore, SPADE, Local])
def test_a_limit_with_room_changes_nothing(make: Any, tiny_backbone: Backbone) -> None:
    limited = make(tiny_backbone, max_memory="64GiB").fit(IMAGES.normal)
    free = make(tiny_backbone).fit(IMAGES.normal)
    assert torch.equal(limited.score(IMAGES.defective).map, free.score(IMAGES.defective).map)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (PaDiM, {"shrinkage": 1.0}),
        (PaDiM, {"whiten": False}),  # its default shrinkage needs whitening
        (PaDiM, {"ridge": -1.0}),
        (PaDiM, {"channels": 0}),
        (PaDiM, {"rank": 0}),
        (PaDiM, {"grid": "middle"}),
        (PaDiM, {"max_memory": "much"}),
        (PaDiM, {"margin": 0.5}),
        (PaDiM, {"smooth": -1.0}),
        (PatchCore, {"coreset": "0%"}),
        (PatchCore, {"neighbourhood": 2}),
        (PatchCore, {"width": -1}),
        (PatchCore, {"projection": 0}),
        (PatchCore, {"whiten": 2.0}),
        (PatchCore, {"neighbours": 1}),
        (SPADE, {"images": 0}),
        (SPADE, {"levels": "all"}),
        (Local, {"samples": 0}),
        (Local, {"radius": -1}),
        (Local, {"whiten": -0.1}),
        (Local, {"rank": 0}),
        (Local, {"coreset": "many"}),
    ],
)
def test_what_cannot_be_is_a_clear_error(make: Any, settings: dict[str, Any], tiny_backbone: Backbone) -> None:
    with pytest.raises(UsageError):
        make(tiny_backbone, **settings)


@pytest.mark.parametrize("make", [PaDiM, Local])
def test_one_image_is_too_few_for_a_covariance(make: Any, tiny_backbone: Backbone) -> None:
    with pytest.raises(AdflowError, match="at least 2"):
        make(tiny_backbone).fit(IMAGES.normal[:1])
