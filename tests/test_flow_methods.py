"""FastFlow, CS-Flow and DifferNet: inverses, log-determinants, densities, null models and the turning of images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import TinyImages, make_tiny_images

from adflow.backbones import Backbone, PyramidBackbone
from adflow.detector import Detector, FeatureDetector, Resources
from adflow.errors import AdflowError, InputError, UsageError
from adflow.methods import _flow_maps
from adflow.methods._pooled_flow import PooledFlow, pool
from adflow.methods._spatial import PositionWhitening
from adflow.methods._whiten import leave_one_out
from adflow.methods.csflow import CrossScaleBlock, CrossScaleFlow, CrossScaleNet, CSFlow, cross_scale_loss, mean_energy
from adflow.methods.differnet import DifferNet, gradient_map, turn
from adflow.methods.fastflow import FastFlow, conv_chain, flow_loss
from adflow.methods.uflow import load_graph, u_graph

METHODS = (FastFlow, CSFlow, DifferNet)
SHAPES = [(6, 4, 6), (5, 2, 3), (4, 1, 2)]  # odd channels, and a grid (1, 2) that is not half of (2, 3)


@pytest.fixture(scope="module")
def images() -> TinyImages:
    return make_tiny_images(16, 48, 64)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def stirred(module: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    """Move every parameter away from where it starts (zeros would hide terms), and compute in float64."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module.double()


def tiny(cls: type[Detector], backbone: Backbone, **settings: Any) -> Any:
    return cls(backbone, **cls.recipe_for("tiny") | settings)


def pyramid_of(backbone: Backbone, pictures: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        return backbone(pictures)


# --------------------------------------------------------------------------------- the flows as maps, in float64


def flat_jacobian(flow: Any, sizes: list[torch.Size], point: torch.Tensor) -> torch.Tensor:
    def mapped(flat: torch.Tensor) -> torch.Tensor:
        parts = [p.reshape(1, *s) for p, s in zip(flat.split([s.numel() for s in sizes]), sizes, strict=True)]
        out = flow(parts)[0]
        return torch.cat([o.flatten() for o in out])

    jacobian: torch.Tensor = torch.autograd.functional.jacobian(mapped, point)
    return jacobian


def test_cross_scale_flow_inverts_and_knows_its_log_determinant() -> None:
    flow = stirred(CrossScaleFlow(SHAPES, (3, 5), hidden=3, generator=torch.Generator().manual_seed(0)))
    xs = [normal(2, *shape, seed=i, dtype=torch.float64) for i, shape in enumerate(SHAPES)]
    zs, logdet = flow(xs)
    back, undone = flow(zs, rev=True)
    for x, b, z in zip(xs, back, zs, strict=True):
        assert torch.allclose(x, b, atol=1e-10) and not torch.allclose(x, z, atol=0.1)
    assert torch.allclose(logdet, -undone, atol=1e-10)
    # Log-determinants at positions are exact together; autograd sees the whole map of one image.
    sizes = [torch.Size(shape) for shape in SHAPES]
    jacobian = flat_jacobian(flow, sizes, torch.cat([x[0].flatten() for x in xs]))
    assert torch.allclose(torch.linalg.slogdet(jacobian).logabsdet, logdet[0], atol=1e-8)
    # It does cross scales: the coarsest input moves the finest output and the other way round.
    first, last = sizes[0].numel(), sizes[-1].numel()
    assert jacobian[:first, -last:].abs().max() > 1e-6 and jacobian[-last:, :first].abs().max() > 1e-6


def test_cross_scale_block_follows_freias_conventions() -> None:
    block = stirred(CrossScaleBlock(SHAPES, kernel=3, hidden=3, clamp=3.0, generator=torch.Generator().manual_seed(0)))
    xs = [normal(2, *shape, seed=i, dtype=torch.float64) for i, shape in enumerate(SHAPES)]
    out, logdet = block(xs)
    assert logdet.shape == (2,) and block.output_dims(SHAPES) == SHAPES
    back, _ = block(out, rev=True)
    assert all(torch.allclose(x, b, atol=1e-10) for x, b in zip(xs, back, strict=True))
    assert {"order0", "order1", "order2"} <= set(block.state_dict())


def test_cross_scale_networks_start_with_zero_output() -> None:
    net = CrossScaleNet([2, 2], [4, 4], 3, 3, torch.Generator().manual_seed(0))
    assert all(not y.any() for y in net([normal(1, 2, 4, 4), normal(1, 2, 2, 2)]))


def test_pooled_flow_inverts_and_knows_its_log_determinant() -> None:
    flow = stirred(PooledFlow(7, 3, hidden=5, generator=torch.Generator().manual_seed(0)))
    x = normal(4, 7, dtype=torch.float64)
    z, logdet = flow(x)
    back, undone = flow(z, rev=True)
    assert torch.allclose(back, x, atol=1e-10) and torch.allclose(undone, -logdet, atol=1e-10)
    jacobian = torch.autograd.functional.jacobian(lambda one: flow(one[None])[0][0], x[0])
    assert torch.allclose(torch.linalg.slogdet(jacobian).logabsdet, logdet[0], atol=1e-10)


def test_conv_chain_inverts_and_knows_its_log_determinant() -> None:
    flow = stirred(conv_chain((5, 3, 2), 4, hidden=0.7, generator=torch.Generator().manual_seed(0)))
    kernels = [block.subnet[0].kernel_size[0] for block in flow]
    assert kernels == [3, 1, 3, 1] and flow[0].subnet[0].out_channels == int(3 * 0.7)
    assert {block.subnet[0].kernel_size for block in conv_chain((4, 3, 3), 3, kernels="3")} == {(3, 3)}
    x = normal(2, 5, 3, 2, dtype=torch.float64)
    z, logdet = flow(x)
    assert torch.allclose(flow(z, rev=True)[0], x, atol=1e-9)
    one = x[0].flatten()
    jacobian = torch.autograd.functional.jacobian(lambda flat: flow(flat.reshape(1, 5, 3, 2))[0].flatten(), one)
    assert torch.allclose(torch.linalg.slogdet(jacobian).logabsdet, logdet[0], atol=1e-8)


# ------------------------------------------------------------------------------------------ inputs, maps, scores


def test_taps_are_joined_as_asked() -> None:
    channels, grids = [3, 5, 7], [(8, 8), (4, 4), (4, 4)]
    shown = {
        join: [(s.channels, s.grid, s.taps) for s in _flow_maps.scales(join, channels, grids)]
        for join in _flow_maps.JOINS
    }
    assert shown["own"] == [(3, (8, 8), (0,)), (5, (4, 4), (1,)), (7, (4, 4), (2,))]
    assert shown["scale"] == [(3, (8, 8), (0,)), (12, (4, 4), (1, 2))]
    assert shown["coarsest"] == [(15, (4, 4), (0, 1, 2))] and shown["finest"] == [(15, (8, 8), (0, 1, 2))]
    # Grids of one size but another shape are different scales.
    assert len(_flow_maps.scales("scale", [1, 1, 1], [(4, 2), (2, 4), (4, 2)])) == 2
    features = [normal(2, c, *g) for c, g in zip(channels, grids, strict=True)]
    joined = _flow_maps.scales("coarsest", channels, grids)[0].of(features)
    assert joined.shape == (2, 15, 4, 4)


def test_an_image_pyramid_is_one_scale_per_image_size(tiny_backbone: Backbone, images: TinyImages) -> None:
    backbone = PyramidBackbone(tiny_backbone, [1.0, 0.5])
    detector = tiny(CSFlow, backbone, join="image").fit(images.normal[:8])
    assert [(s.channels, s.taps) for s in detector.scales] == [(36, (0, 1, 2)), (36, (3, 4, 5))]
    assert detector.scales[0].grid > detector.scales[1].grid
    assert torch.isfinite(detector.score(images.defective).map).all()


@pytest.mark.parametrize("cls", [FastFlow, CSFlow])
def test_densities_of_positions_add_up_to_that_of_the_image(
    cls: type[FeatureDetector], tiny_backbone: Backbone, images: TinyImages
) -> None:
    detector: Any = tiny(cls, tiny_backbone).fit(images.normal)
    pyramid = pyramid_of(tiny_backbone, images.normal[:2])
    local, inputs = detector.latents(pyramid), detector.normalised(pyramid)
    if isinstance(detector, FastFlow):  # FrEIA's own log-determinants
        whole = sum(flow(x)[1] for flow, x in zip(detector.flows, inputs, strict=True))
    else:
        whole = detector.flow(inputs)[1]
    whole = whole + sum(norm.logdet for norm in detector.norms)
    parts = sum(logdet.expand(2, *logdet.shape[-2:]).flatten(1).sum(1) for _, logdet in local)
    assert torch.allclose(parts, whole, rtol=1e-4, atol=1e-2)  # float32 sums of hundreds
    # Before training the map is the position Gaussian's: half of (Mahalanobis + log det) per channel.
    start: Any = tiny(cls, tiny_backbone, epochs=0, smooth=0.0, join="coarsest").fit(images.normal)
    norm = start.norms[0]
    assert isinstance(norm, PositionWhitening)
    z = start.normalised(pyramid)[0]
    expected = (0.5 * z.square().sum(1) - norm.position_logdet()) / z.shape[1]
    assert torch.allclose(start.score_features(pyramid), expected, rtol=1e-5, atol=1e-5)


def test_losses_are_the_formulas() -> None:
    latents = [(normal(3, 2, 4, 4), normal(3, seed=1)), (normal(3, 5, 2, 2, seed=2), normal(3, seed=3))]
    per_image = [(0.5 * z.square().flatten(1).sum(1) - logdet).mean() for z, logdet in latents]
    assert torch.allclose(flow_loss(latents), per_image[0] + per_image[1])
    assert torch.allclose(cross_scale_loss(latents), (per_image[0] + per_image[1]) / (2 * 16 + 5 * 4))
    flat = torch.cat([z.flatten(1) for z, _ in latents], 1)
    assert torch.allclose(mean_energy([z for z, _ in latents]), flat.square().mean(1) / 2)


def test_csflow_scores_as_the_paper_does(tiny_backbone: Backbone, images: TinyImages) -> None:
    settings = {"norm": "none", "score_by": "energy", "smooth": 0.0, "epochs": 1}
    paper = tiny(CSFlow, tiny_backbone, **settings, map_scales="finest", image_by="mean").fit(images.normal)
    pyramid = pyramid_of(tiny_backbone, images.defective)
    latents = [z for z, _ in paper.latents(pyramid)]
    scores = paper.score(images.defective)
    assert torch.allclose(scores.image, mean_energy(latents), rtol=1e-5)
    finest = _flow_maps.upsample(latents[0].square().mean(1), scores.map.shape[1:], 0.0)
    assert torch.allclose(scores.map, finest, rtol=1e-5)
    assert [e.dof for e in paper.energies(images.defective)] == [z.shape[1] for z in latents]


@pytest.mark.parametrize("cls", [FastFlow, CSFlow])
def test_energies_of_new_good_images_have_the_promised_mean(
    cls: type[FeatureDetector], tiny_backbone: Backbone
) -> None:
    seen, new = make_tiny_images(24, 48, 48), make_tiny_images(24, 48, 48, seed=5)
    detector = tiny(cls, tiny_backbone).fit(seen.normal)
    for energy in detector.energies(new.normal):
        # 24 images in up to 36 dimensions, without leaving out the mean would be several times the degrees.
        assert 0.6 < float(energy.chi2.mean()) / energy.dof < 1.6
    good, bad = detector.energies(seen.normal[:1]), detector.energies(seen.defective)
    assert all(b.chi2.max() > 3 * g.chi2.max() for g, b in zip(good, bad, strict=True))


def test_features_as_left_out_have_the_length_that_leaving_out_gives() -> None:
    rows = normal(20, 3, 2, 2)
    layer = PositionWhitening(3, (2, 2))
    layer.learn(iter([rows]), 0.3)
    longer = _flow_maps.as_left_out(layer(rows), 20, 0.3)
    expected = leave_one_out(layer(rows).square().sum(1), 20, 0.7)
    assert torch.allclose(longer.square().sum(1), expected, rtol=1e-5)
    assert (longer.norm() > layer(rows).norm()) and not torch.isnan(_flow_maps.as_left_out(0 * rows, 20, 0.3)).any()


# -------------------------------------------------------------------------------------------- turning (DifferNet)


def test_turning_is_exact_where_it_can_be_and_close_elsewhere() -> None:
    square, oblong = normal(1, 3, 16, 16), normal(1, 3, 12, 20)
    for k in range(-4, 5):
        assert torch.equal(turn(square, 90.0 * k, "zeros"), torch.rot90(square, k % 4, (2, 3)))
    assert torch.equal(turn(oblong, 180.0, "zeros"), oblong.flip(2, 3))
    # The general path at a right angle is the same turn, and in pixels, not in shares of width and height.
    smooth = _flow_maps.upsample(normal(1, 4, 4), (24, 24), 2.0)[None]
    nearly = turn(smooth, 90.0 + 1e-4, "border")
    assert torch.allclose(nearly, torch.rot90(smooth, 1, (2, 3)), atol=1e-3)
    dot = torch.zeros(1, 1, 21, 41)
    dot[0, 0, 10, 26] = 1  # six pixels right of the centre
    turned = turn(dot, 89.9999, "zeros")[0, 0]
    assert divmod(int(turned.argmax()), 41) == (4, 20)  # counter-clockwise: six pixels above it
    there = turn(turn(dot, 30.0, "zeros"), -30.0, "zeros")
    assert int(there.argmax()) == int(dot.argmax())
    assert turn(torch.ones(1, 1, 8, 8), 45.0, "zeros")[0, 0, 0, 0] == 0
    assert torch.allclose(turn(torch.ones(1, 1, 8, 8), 45.0, "border"), torch.ones(()), atol=1e-6)


def test_angles_of_scoring(tiny_backbone: Backbone) -> None:
    assert tiny(DifferNet, tiny_backbone, transforms=4).angles() == [0, 90, 180, 270]
    assert tiny(DifferNet, tiny_backbone, transforms=3, degrees=10).angles() == [-10, 0, 10]
    assert tiny(DifferNet, tiny_backbone, degrees=0).angles() == [0]
    assert tiny(DifferNet, tiny_backbone, transforms=1, degrees=10).angles() == [0]


def test_differnet_starts_from_the_gaussian_of_pooled_vectors(tiny_backbone: Backbone, images: TinyImages) -> None:
    detector = tiny(DifferNet, tiny_backbone, whiten="all", epochs=0, degrees=0, ridge=1e-6).fit(images.normal)
    y = pool(pyramid_of(tiny_backbone, images.normal))
    z, logdet = detector.latents(y)
    assert z.mean(0).abs().max() < 0.01  # float32 rounding, stretched up to 1 / sqrt(ridge)-fold
    # Whitening with a ridge: variances are at most 1, and 1 where the data vary.
    variances = torch.linalg.eigvalsh(z.double().T.cov())
    assert variances.max() < 1.01 and (variances > 0.99).sum() >= 8
    jacobian = torch.autograd.functional.jacobian(lambda one: detector.latents(one[None])[0][0].double(), y[0])
    assert float(logdet[0]) == pytest.approx(float(torch.linalg.slogdet(jacobian).logabsdet), abs=1e-2)
    expected = z.square().mean(1)
    assert torch.allclose(detector.score(images.normal).image, expected, rtol=1e-3)  # one by one: other kernels


def test_differnet_has_a_whitening_for_each_angle(tiny_backbone: Backbone) -> None:
    images = make_tiny_images(12, 48, 48)
    detector = tiny(DifferNet, tiny_backbone, transforms=3, epochs=0, ridge=1e-6).fit(images.normal)
    total = torch.zeros(12)
    for k, angle in enumerate(detector.angles()):
        y = pool(pyramid_of(tiny_backbone, detector.turned(images.normal, angle)))
        pairs = [detector.latents(one[None], k) for one in y]
        z = torch.cat([z for z, _ in pairs])
        # float32 rounding of the pooled vectors, stretched up to 1 / sqrt(ridge)-fold
        assert z.mean(0).abs().max() < 0.03 and torch.linalg.eigvalsh(z.double().T.cov()).max() < 1.03
        jacobian = torch.autograd.functional.jacobian(
            lambda one, k=k: detector.latents(one[None], k)[0][0].double(), y[0]
        )
        assert float(pairs[0][1]) == pytest.approx(float(torch.linalg.slogdet(jacobian).logabsdet), abs=1e-2)
        total += z.square().mean(1) / 3
    assert torch.allclose(detector.score(images.normal).image, total, rtol=1e-3)
    # Good images lie one way: turned by a quarter they are not normal any more.
    turned = detector.score(torch.rot90(images.normal, 1, (2, 3))).image
    assert turned.min() > 10 * total.max()


@pytest.mark.parametrize("views", [0, 3])
def test_differnet_looks_at_turned_copies(views: int, tiny_backbone: Backbone) -> None:
    images = make_tiny_images(12, 48, 48)
    detector = tiny(DifferNet, tiny_backbone, whiten="all", views=views).fit(images.normal, seed=1)
    again = tiny(DifferNet, tiny_backbone, whiten="all", views=views).fit(images.normal, seed=1)
    first, second = detector.learned(), again.learned()
    assert all(torch.equal(first[key], second[key]) for key in first)
    # Scored at quarter turns, a square image and its quarter turn are the same set of copies.
    scores = detector.score(images.defective).image
    turned = detector.score(torch.rot90(images.defective, 1, (2, 3))).image
    assert torch.allclose(scores, turned, rtol=1e-4)
    assert scores > 2 * detector.score(images.normal).image.max()


def test_differnet_keeps_features_in_the_type_it_is_told(tiny_backbone: Backbone, images: TinyImages) -> None:
    exact, rounded = (
        tiny(DifferNet, tiny_backbone, epochs=0).fit(images.normal, resources=Resources(dtype=dtype)).mean
        for dtype in ("float32", "bfloat16")
    )
    assert not torch.equal(exact, rounded)
    # bfloat16 has 8 bits: each vector is off by 2^-9 of itself, and so is no mean by more than that of the largest.
    torch.testing.assert_close(rounded, exact, rtol=0, atol=2**-8 * float(exact.abs().max()))


@pytest.mark.parametrize("localise", ["features", "gradient"])
def test_differnet_maps_show_the_defect(localise: str, tiny_backbone: Backbone) -> None:
    images = make_tiny_images(16, 64, 64)
    # Quarter turns both ways: a map that is turned back the wrong way shows the defect on the other side.
    settings = {"localise": localise, "sigma": 4.0, "transforms": 2, "degrees": 90}
    detector = tiny(DifferNet, tiny_backbone, **settings).fit(images.normal)
    for turns in range(2):
        picture, mask = torch.rot90(images.defective, turns, (2, 3)), torch.rot90(images.mask, turns)
        shown = detector.score(picture).map[0]
        assert shown[mask].mean() > 2 * shown[~mask].mean()


def test_differnet_without_maps_gives_the_score_everywhere(tiny_backbone: Backbone, images: TinyImages) -> None:
    plain = tiny(DifferNet, tiny_backbone, localise="none").fit(images.normal)
    scores = plain.score(images.defective)
    assert torch.equal(scores.map, scores.image[:, None, None].expand_as(scores.map))
    # Many copies pass in parts; the score is their mean.
    many = tiny(DifferNet, tiny_backbone, localise="none", transforms=20).fit(images.normal[:4])
    copies = torch.cat([many.turned(images.defective, angle) for angle in many.angles()])
    z = many.latents(pool(pyramid_of(tiny_backbone, copies)))[0]
    assert torch.allclose(many.score(images.defective).image, z.square().mean(), rtol=1e-4)


def test_gradient_map_is_the_papers_formula() -> None:
    gradients = normal(4, 3, 10, 12)
    assert torch.allclose(gradient_map(gradients, 0.0), gradients.abs().mean((0, 1)).square(), rtol=1e-5)


# -------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize("cls", METHODS)
def test_every_recipe_names_known_parameters(cls: type[Detector]) -> None:
    known = set(cls.parameters_of()) | {"backbone", "taps", "size", "keep_aspect"}
    assert {"fast", "paper", "tiny"} <= set(cls.recipes)
    for name in cls.recipes:
        assert set(cls.recipe_for(name)) <= known


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (FastFlow, {"join": "both"}),
        (FastFlow, {"kernels": "5"}),
        (FastFlow, {"norm": "batch"}),
        (FastFlow, {"score_by": "energy"}),
        (FastFlow, {"flow_steps": 0}),
        (CSFlow, {"join": "both"}),
        (CSFlow, {"kernels": (3, 4)}),
        (CSFlow, {"kernels": ()}),
        (CSFlow, {"map_scales": "two"}),
        (CSFlow, {"image_by": "max"}),
        (CSFlow, {"hidden": 0}),
        (DifferNet, {"localise": "pixels"}),
        (DifferNet, {"fill": "white"}),
        (DifferNet, {"degrees": 190}),
        (DifferNet, {"ridge": 0.0}),
        (DifferNet, {"whiten": "both"}),
        (DifferNet, {"whiten": "angle", "views": 3}),
    ],
)
def test_wrong_settings_are_refused_in_words(
    cls: type[Detector], settings: dict[str, Any], tiny_backbone: Backbone
) -> None:
    with pytest.raises(UsageError) as found:
        cls(tiny_backbone, **settings)
    assert next(iter(settings)).split("_")[0] in str(found.value)


def test_checkpoints_that_do_not_fit_are_refused(tiny_backbone: Backbone, images: TinyImages) -> None:
    fast = tiny(FastFlow, tiny_backbone, norm="affine", join="own").fit(images.normal[:4])
    good = {f"norms.{i}.{key}": value for i, norm in enumerate(fast.norms) for key, value in norm.state_dict().items()}
    with pytest.raises(AdflowError, match="does not fit"):
        fast.load_original(good)
    cross = tiny(CSFlow, tiny_backbone).fit(images.normal[:4])
    with pytest.raises(InputError, match="0 blocks, this flow 2"):
        cross.load_original({}, [])
    pooled = tiny(DifferNet, tiny_backbone).fit(images.normal[:4])
    with pytest.raises(InputError, match="0 couplings, this flow 2"):
        pooled.load_original({}, [])
    with pytest.raises(InputError, match="0 couplings, this flow 1"):
        load_graph(u_graph([(8, 2, 2)], flow_steps=1), {"encoder.global_scale": torch.ones(1)})


@pytest.mark.parametrize("cls", METHODS)
def test_fitting_on_nothing_is_refused(cls: type[Detector], tiny_backbone: Backbone) -> None:
    with pytest.raises(InputError, match="no image"):
        tiny(cls, tiny_backbone).fit(torch.zeros(0, 3, 32, 32))
