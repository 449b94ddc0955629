"""CFLOW-AD: what is particular to it, and the training loop; the laws of all methods are in test_methods.py."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from adflow.backbones import Backbone
from adflow.errors import InputError, TrainingError, UsageError
from adflow.features import FeatureBank
from adflow.flows import log_likelihood
from adflow.methods import _train
from adflow.methods._cflow_paper import fiber_steps, paper_rate, paper_schedule, probability_map, turned
from adflow.methods._context import ContextWhitening, cross_fitted
from adflow.methods._train import one_cycle, train
from adflow.methods.cflow import CFlow


class Rows:
    """Features [n, C, h, w] with correlated channels whose mean depends on position and on the image."""

    def __init__(self, count: int = 60, channels: int = 5, grid: tuple[int, int] = (3, 4), seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        mixing = torch.randn(channels, channels, generator=generator)
        mean = 3 * torch.randn(channels, *grid, generator=generator)
        pose = torch.randn(count, 1, 1, 1, generator=generator)
        direction = 2 * torch.randn(channels, *grid, generator=generator)
        noise = torch.randn(count, channels, *grid, generator=generator)
        self.x = mean + pose * direction + 0.5 * torch.einsum("ij,njhw->nihw", mixing, noise)

    def __call__(self, which: object) -> Tensor:
        return self.x[torch.as_tensor(list(which))]  # type: ignore[call-overload]


def first_layer(rows: Rows, context: int, shrinkage: float = 0.3) -> ContextWhitening:
    layer = ContextWhitening(rows.x.shape[1], (rows.x.shape[2], rows.x.shape[3]), context, shrinkage)
    layer.learn(rows, range(len(rows.x)))
    return layer


def triangle(layer: ContextWhitening) -> Tensor:
    """The factors [P, C, C], put together again."""
    whole = torch.zeros(len(layer.mean), len(layer.world), len(layer.world), dtype=layer.world.dtype)
    for name, start in zip(("factor0", "factor1", "factor2", "factor3"), layer.edges[:-1], strict=True):
        block = layer.get_buffer(name)
        whole[:, : block.shape[1], start : start + block.shape[2]] = block
    return whole


# --- first layer ---------------------------------------------------------------------------------------------


def test_first_layer_log_determinant_is_that_of_its_map() -> None:
    rows = Rows()
    layer = first_layer(rows, context=2).double()
    x = rows.x[:1].double()
    # The context is a condition: held fixed, it does not count in the determinant.
    z = layer(x)
    for position in (0, 7):
        expected = torch.linalg.slogdet(layer.world @ triangle(layer)[position])[1]
        # logdet and factors are rounded to float32 independently of each other
        torch.testing.assert_close(layer.logdet[position], expected, rtol=0, atol=1e-5)
    assert z.shape == (1, 12, 5)


def test_first_layer_equals_its_formula_in_float64() -> None:
    rows = Rows(channels=11)
    layer = first_layer(rows, context=3)
    x = rows.x[:5]
    z = layer(x)
    exact = copy.deepcopy(layer).double()
    u = exact.describe(x.double())
    assert torch.equal(triangle(exact).tril(-1), torch.zeros_like(triangle(exact)))
    y = (x.double().flatten(2).transpose(1, 2) - exact.mean) @ exact.world
    expected = torch.einsum("npc,pcd->npd", y, triangle(exact)) - (u @ exact.slope).reshape(5, 12, 11)
    # float32 sums of 11 terms, of values up to about 10
    torch.testing.assert_close(z.double(), expected, rtol=1e-5, atol=1e-5)


def test_first_layer_gives_an_image_the_same_bits_in_any_company() -> None:
    rows = Rows(count=40, channels=52, grid=(5, 7))
    layer = first_layer(rows, context=6)
    together = layer(rows.x[:19])  # two full groups and a part
    for i in range(19):
        assert torch.equal(layer(rows.x[i : i + 1])[0], together[i])
    assert torch.equal(layer(rows.x[:19].flip(0)).flip(0), together)


def test_without_context_it_is_the_gaussian_of_the_position() -> None:
    rows = Rows(count=200)
    layer = first_layer(rows, context=0, shrinkage=1e-6)
    x = rows.x[:3]
    found = log_likelihood(layer(x).flatten(0, 1), layer.logdet.repeat(3)).reshape(3, 12)
    at = rows.x.flatten(2).permute(2, 0, 1)  # [P, n, C]
    centred = at - at.mean(1, keepdim=True)
    covariance = centred.transpose(1, 2) @ centred / (at.shape[1] - 1)
    density = torch.distributions.MultivariateNormal(at.mean(1), covariance)
    # A millionth of shrinkage is left, and float32; values are of order 10.
    torch.testing.assert_close(found, density.log_prob(x.flatten(2).transpose(1, 2)), rtol=1e-3, atol=1e-3)


def test_context_explains_what_images_have_in_common() -> None:
    rows = Rows(count=120)
    known, blind = first_layer(rows, context=1), first_layer(rows, context=0)

    def bits(layer: ContextWhitening, x: Tensor) -> float:
        z = layer(x)
        return float(log_likelihood(z.flatten(0, 1), layer.logdet.repeat(len(x))).mean())

    assert bits(known, rows.x) > bits(blind, rows.x) + 0.5


def test_first_layer_needs_two_images() -> None:
    with pytest.raises(InputError, match="1 training image"):
        ContextWhitening(5, (3, 4), 2).learn(Rows(), [0])


def test_folds_are_whitened_like_the_layer_by_the_other_images() -> None:
    rows = Rows(count=12)
    layer, other = (ContextWhitening(5, (3, 4), 0, 0.3, ridge=5.0) for _ in range(2))
    layer.learn(rows, range(12))
    other.learn(rows, range(1, 12, 2))
    z = cross_fitted(layer, rows, torch.arange(12), views=1, folds=2, keep=12, parts=1)
    assert torch.equal(z, other(rows(range(0, 12, 2))))


# --- the detector --------------------------------------------------------------------------------------------


def images(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    wave = torch.sin(torch.linspace(0, 9, 64) + torch.rand(count, 3, 1, 1, generator=generator))
    return (0.5 + 0.3 * wave + 0.05 * torch.randn(count, 3, 64, 64, generator=generator)).clamp(0, 1)


def test_untrained_couplings_leave_the_gaussians_density_as_it_is(tiny_backbone: Backbone) -> None:
    plain = CFlow(tiny_backbone, blocks=0).fit(images(8))
    zero = CFlow(tiny_backbone, blocks=3, steps=0).fit(images(8))
    with torch.inference_mode():
        pyramid = tiny_backbone(images(2, seed=1))
        # Three rotations in float32 leave lengths equal to about 1e-6; nothing else happens.
        torch.testing.assert_close(zero.likelihoods(pyramid), plain.likelihoods(pyramid), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("permutation", ["soft", "hard"])
@pytest.mark.parametrize("position", [0, 8])
def test_fused_scores_equal_freias_pass(tiny_backbone: Backbone, permutation: str, position: int) -> None:
    detector = CFlow(
        tiny_backbone, blocks=2, steps=8, fibers=16, permutation=permutation, position=position, context=3
    ).fit(images(8))
    with torch.inference_mode():
        pyramid = tiny_backbone(images(2, seed=1))
        (found,) = detector.likelihoods(pyramid)
        layer, (x,), (code,) = detector.first[0], detector.inputs(pyramid), detector.codes()
        for i in range(2):
            start = layer(x[i : i + 1])[0]
            z, logdet = detector.decoders[0](start, [code])
            expected = log_likelihood(z, logdet + layer.logdet) / x.shape[1]
            # float32: the same sums in another order, of energies up to a few hundred
            torch.testing.assert_close(found[i].flatten(), expected, rtol=1e-5, atol=1e-4)


def test_training_raises_the_likelihood_of_new_images(tiny_backbone: Backbone) -> None:
    def mean(steps: int) -> float:
        detector = CFlow(tiny_backbone, blocks=2, steps=steps, fibers=64, context=2, lr=5e-3).fit(images(16))
        with torch.inference_mode():
            (values,) = detector.likelihoods(tiny_backbone(images(12, seed=5)))
        return float(values.mean())

    assert mean(steps=25) > mean(steps=0)


def test_paper_settings_fit_score_and_normalise_by_training_images(tiny_backbone: Backbone) -> None:
    settings = {k: v for k, v in CFlow.recipe_for("paper").items() if k not in ("backbone", "taps", "size")}
    settings |= {"blocks": 1, "passes": 1, "fibers": 64, "images": 5}
    detector = CFlow(tiny_backbone, **settings).fit(images(10))
    assert len(detector.decoders) == 3
    scores = detector.score(images(3, seed=2))
    assert torch.isfinite(scores.map).all() and torch.equal(scores.image, scores.map.flatten(1).amax(1))
    # The number of taps less each one.s likelihood relative to the likeliest vector of training: hardly below 0.
    assert float(scores.map.min()) > -0.5
    tops = detector.log_top_.clone()
    detector.score(images(4, seed=3))
    assert torch.equal(tops, detector.log_top_)


def test_paper_recipe_has_a_size_per_class() -> None:
    assert CFlow.recipe_for("paper", "screw")["size"] == 512
    assert CFlow.recipe_for("paper", "transistor")["size"] == 128
    assert CFlow.recipe_for("paper", "cable")["size"] == 256


def test_too_few_vectors_for_a_step_is_one_clear_error(tiny_backbone: Backbone) -> None:
    detector = CFlow(tiny_backbone, joint=False, whiten="none", passes=1, fibers=10_000, blocks=1)
    with pytest.raises(InputError, match="fewer than one step's 10000"):
        detector.fit(images(4))


@pytest.mark.parametrize(
    "wrong", [{"whiten": "zca"}, {"position": 6}, {"blocks": -1}, {"shrinkage": 0.0}, {"views": 2}]
)
def test_wrong_parameters_are_refused(tiny_backbone: Backbone, wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        CFlow(tiny_backbone, **wrong)


def test_fiber_steps_take_every_vector_once_with_its_own_code() -> None:
    x = torch.arange(2 * 3 * 2 * 2.0).reshape(2, 3, 2, 2)
    code = torch.arange(4.0).unsqueeze(1)
    steps = list(fiber_steps([x], [code], 3, lambda n: torch.arange(n).flip(0)))
    assert [tap for tap, _, _ in steps] == [0, 0]  # 8 vectors, 3 a step, 2 left over
    for _, vectors, codes in steps:
        for vector, c in zip(vectors, codes, strict=True):
            place = int(c)
            assert any(torch.equal(vector, x[i, :, place // 2, place % 2]) for i in range(2))


def test_rate_falls_by_cosine_after_the_warm_up() -> None:
    rates = [paper_rate(k, 8) for k in range(25 * 8)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[16] == max(rates) and all(a >= b for a, b in itertools.pairwise(rates[16:]))
    assert rates[-1] == pytest.approx(1e-3 + 0.999 * 0.5 * (1 + math.cos(math.pi * 24 / 25)))


def test_schedule_is_squeezed_down_to_one_pass_a_meta_epoch_and_constant_below() -> None:
    whole = paper_schedule(200, 10, 3)
    assert [whole(3 * k) for k in range(2000)] == [paper_rate(k, 80) for k in range(2000)]
    assert whole(300) == whole(302)  # the steps of one image batch share their rate
    short = paper_schedule(50, 10, 3)
    assert [short(3 * k) for k in range(500)] == [paper_rate(4 * k, 80) for k in range(500)]
    assert {paper_schedule(24, 10, 3)(k) for k in range(720)} == {1.0}


def test_probability_map_depends_on_other_images_only_without_learned_maxima() -> None:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(3, 4, 4, generator=generator).double()]
    alone = probability_map([v[:1] for v in values], (8, 8))
    together = probability_map(values, (8, 8))[:1]
    assert not torch.allclose(alone, together)
    top = [torch.tensor(2.5).double()]
    assert torch.equal(probability_map([v[:1] for v in values], (8, 8), top), probability_map(values, (8, 8), top)[:1])


def test_turned_is_a_rotation_about_the_centre() -> None:
    image = torch.zeros(1, 1, 41, 61)
    image[..., 20, 50] = 1  # 20 px right of the centre
    angles = []
    for seed in range(20):
        out = turned(image, 30.0, torch.Generator().manual_seed(seed))
        if out.max() == 0:  # nearest neighbour may skip a single pixel
            continue
        y, x = divmod(int(out.flatten().argmax()), 61)
        # Its distance from the centre stays, to a pixel; its angle is within the bound.
        assert math.hypot(x - 30, y - 20) == pytest.approx(20, abs=1)
        angles.append(math.degrees(math.atan2(y - 20, x - 30)))
    assert max(angles) <= 32 and min(angles) >= -32 and max(angles) - min(angles) > 20


def test_rotated_views_are_part_of_the_bank(tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    build = FeatureBank.build.__func__  # type: ignore[attr-defined]

    def spy(cls: type[FeatureBank], *args: object, **kwargs: object) -> FeatureBank:
        bank: FeatureBank = build(cls, *args, **kwargs)
        seen.append((len(bank), bank.views))
        return bank

    monkeypatch.setattr(FeatureBank, "build", classmethod(spy))
    CFlow(tiny_backbone, rotate=5.0, views=3, blocks=0).fit(images(4))
    assert seen == [(12, 3)]


# --- training loop -------------------------------------------------------------------------------------------


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([3.0, -2.0]))
        self.unused = nn.Parameter(torch.ones(2))

    def loss(self, batch: Tensor) -> Tensor:
        return (self.weight - batch).square().sum()


def draws(seed: int = 0) -> tuple[Iterator[Tensor], torch.Generator]:
    generator = torch.Generator().manual_seed(seed)

    def endless() -> Iterator[Tensor]:
        while True:
            yield torch.randn(2, generator=generator)

    return endless(), generator


def test_training_goes_down_and_leaves_unreached_parameters_alone() -> None:
    line = Line()
    batches, generator = draws()
    seen: list[tuple[int, int]] = []
    train(
        line,
        line.loss,
        batches,
        steps=200,
        lr=0.1,
        schedule=one_cycle(200),
        generator=generator,
        progress=lambda done, total, _: seen.append((done, total)),
    )
    assert seen == [(k, 200) for k in range(1, 201)]
    assert float(line.weight.detach().norm()) < 1  # from 3.6; the mean of what it is drawn to is 0
    assert torch.equal(line.unused, torch.ones(2)) and line.weight.grad is None


def test_a_killed_training_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_train, "CHECKPOINT_SECONDS", -1.0)
    whole, cut = Line(), Line()
    batches, generator = draws()
    train(whole, whole.loss, batches, steps=60, lr=0.1, average=0.9, generator=generator)
    file = tmp_path / "fit.checkpoint"

    def killed(done: int, total: int, message: str) -> None:
        if done == 37:
            raise KeyboardInterrupt

    batches, generator = draws()
    with pytest.raises(KeyboardInterrupt):
        train(
            cut, cut.loss, batches, steps=60, lr=0.1, average=0.9, generator=generator, progress=killed, checkpoint=file
        )
    again = Line()
    batches, generator = draws()
    train(again, again.loss, batches, steps=60, lr=0.1, average=0.9, generator=generator, checkpoint=file)
    assert torch.equal(again.weight, whole.weight)
    for seed, average in ((1, 0.9), (0, None)):
        batches, generator = draws(seed)
        with pytest.raises(InputError, match="not a checkpoint of this training"):
            train(again, again.loss, batches, steps=60, lr=0.1, average=average, generator=generator, checkpoint=file)
    file.write_bytes(b"nonsense")
    with pytest.raises(InputError, match="not a checkpoint"):
        train(again, again.loss, batches, steps=60, lr=0.1, checkpoint=file)


def test_a_single_bad_batch_is_survived() -> None:
    line = Line()
    batches, _ = draws()
    count = iter(range(10_000))

    def loss(batch: Tensor) -> Tensor:
        return line.loss(batch) * (float("nan") if next(count) == 30 else 1.0)

    train(line, loss, batches, steps=100, lr=0.1)
    assert next(count) == 100 and torch.isfinite(line.weight).all()
    assert float(line.weight.detach().norm()) < 2  # from 3.6: it went on, at half the rate


def test_lasting_nan_keeps_the_last_good_weights_and_says_so() -> None:
    line = Line()
    batches, _ = draws()
    count = iter(range(10_000))
    good: list[Tensor] = []

    def loss(batch: Tensor) -> Tensor:
        k = next(count)
        if k == 50:  # two snapshots have been taken by then, after 25 and 50 steps
            good.append(line.weight.detach().clone())
        return line.loss(batch) * (float("nan") if k >= 50 else 1.0)

    with pytest.raises(TrainingError, match=r"not finite .* last good weights are kept"):
        train(line, loss, batches, steps=100, lr=0.1)
    assert torch.equal(line.weight, good[0])


def test_gradients_are_clipped_together() -> None:
    line = Line()
    before = line.weight.detach().clone()
    train(line, line.loss, iter([torch.zeros(2)]), steps=1, lr=1e-3, clip=1e-12, eps=1.0)
    # With a large eps Adam's step is proportional to the gradient, which the clip has made tiny.
    torch.testing.assert_close(line.weight.detach(), before, rtol=0, atol=1e-12)


def test_running_statistics_go_back_too() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    net[0].weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    batches = iter([torch.ones(4, 2), torch.full((4, 2), torch.inf)] * 20)
    with pytest.raises(TrainingError):
        train(net, lambda x: net(x).square().mean(), batches, steps=20, lr=1e-3)
    assert torch.isfinite(net[1].running_mean).all()


def test_recipes_differ_by_their_couplings(tiny_backbone: Backbone) -> None:
    outside = ("backbone", "taps", "size")
    for name, blocks in (("fast", 0), ("trained", 4), ("paper", 8)):
        recipe = {key: value for key, value in CFlow.recipe_for(name).items() if key not in outside}
        assert CFlow(tiny_backbone, **recipe).blocks == blocks
