"""DFR, PEFM, CutPaste, Patch SVDD, CAVGA: what is particular to each; the laws are in test_methods.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import TinyImages
from torch.nn import functional as F

from adflow.backbones import Backbone, PixelBackbone, make_backbone
from adflow.detector import Resources
from adflow.detector_file import load_detector, save_detector
from adflow.errors import InputError, UsageError
from adflow.features import FeatureBank
from adflow.methods import _patch_pairs, cutpaste
from adflow.methods._patch_nets import Direction, Encoder, LargeEncoder, covering
from adflow.methods._rebuild import PositionCodes, components
from adflow.methods.cavga import CAVGA, attention_map
from adflow.methods.cutpaste import CutPaste, cut_paste, ledoit_wolf, scar
from adflow.methods.dfr import DFR, Autoencoder, aligned_matrix, joining
from adflow.methods.patchsvdd import PatchSVDD
from adflow.methods.pefm import PEFM, LinearMaps
from adflow.tasks._bank import can_share


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- DFR -----------------------------------------------------------------------------------------------------


def test_aligned_matrix_is_linear_interpolation_with_aligned_corners() -> None:
    x = noise(1, 1, 5, 7)
    expected = F.interpolate(x, (12, 9), mode="bilinear", align_corners=True)
    # The matrix is built in float64: what differs is torch's own float32 rounding of positions.
    torch.testing.assert_close(aligned_matrix(12, 5) @ x[0, 0] @ aligned_matrix(9, 7).T, expected[0, 0])


@pytest.mark.parametrize(("window", "size"), [(4, (24, 16)), (8, (24, 16)), (4, (22, 18))])
def test_joining_enlarges_and_averages_windows(window: int, size: tuple[int, int]) -> None:
    x = noise(1, 3, 6, 5)
    (rows,), (columns,) = (joining([(6, 5)], n, axis, window, 4) for axis, n in enumerate(size))
    large = F.interpolate(x, size, mode="bilinear", align_corners=True)
    before = (window - 4) // 2
    after = [before + -n % 4 for n in size]
    padded = F.pad(large, (before, after[1], before, after[0]), mode="replicate")
    expected = F.avg_pool2d(padded, window, 4)
    torch.testing.assert_close(rows @ x @ columns.T, expected)


def test_components_hold_the_share_and_never_all() -> None:
    values = torch.tensor([6.0, 3.0, 0.5, 0.5])
    assert [components(values, s) for s in (0.0, 0.5, 0.6, 0.9, 0.96, 0.999)] == [1, 1, 1, 2, 3, 3]


def test_of_one_image_a_code_holds_nothing() -> None:
    codes, image, new = PositionCodes(4, 6), noise(1, 4, 6), noise(3, 4, 6, seed=1)
    codes.learn([image], 0.3, 0, 0.9)
    torch.testing.assert_close(codes(new), (new - image) / codes.unit_)


def test_linear_autoencoder_is_the_best_of_its_width(tiny_backbone: Backbone, tiny_images: TinyImages) -> None:
    """No other linear code of that width has a smaller error on the training data (Eckart & Young)."""
    detector = DFR(tiny_backbone, latent=3, local=False).fit(tiny_images.normal)
    with FeatureBank.build(tiny_backbone, tiny_images) as bank:
        x = detector.features(bank.pyramid(range(len(bank)))).flatten(2).transpose(1, 2).flatten(0, 1)
    z = ((x - x.mean(0)) / detector.code.unit_).double()
    values = torch.linalg.svdvals(z)
    found = detector.score_features(tiny_backbone(tiny_images.normal)).double().mean() * z.shape[1]
    # float32 scores against float64 singular values
    torch.testing.assert_close(found, values[3:].square().sum() / len(z), rtol=1e-4, atol=0)


def test_deep_autoencoder_trains_folds_and_survives_its_file(
    tiny_backbone: Backbone, tiny_images: TinyImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"net": "deep", "grid": "window", "aligned": True, "smooth": 0.0, "lr": 3e-3, "pca_images": 4}
    raw = DFR(tiny_backbone, epochs=0, **settings).fit(tiny_images.normal, seed=1)
    detector = DFR(tiny_backbone, epochs=8, **settings).fit(tiny_images.normal, seed=1)
    pyramid = tiny_backbone(tiny_images.normal)
    # 24 steps are far from an optimum; without any training the error is that of an arbitrary map.
    assert detector.score_features(pyramid).mean() < 0.7 * raw.score_features(pyramid).mean()
    path = save_detector(detector, tmp_path / "d.safetensors")
    monkeypatch.setattr("adflow.detector_file.make_backbone", lambda *_, **__: tiny_backbone)
    again = load_detector(path)
    assert torch.equal(again.score(tiny_images.defective).map, detector.score(tiny_images.defective).map)


def test_folded_batch_norm_is_the_same_map() -> None:
    net = Autoencoder(10, 3)
    for _ in range(5):
        net(noise(4, 10, 6, 6))
    x = noise(2, 10, 4, 4, seed=1)
    expected = net.eval()(x)
    h = x.flatten(2).transpose(1, 2)
    for k, (weight, bias) in enumerate(net.folded()):
        h = h @ weight.T + bias
        h = h if k in (2, 5) else h.relu()
    torch.testing.assert_close(h.transpose(1, 2).reshape(x.shape), expected, rtol=1e-4, atol=1e-6)


# --- PEFM ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whitened", [True, False])
def test_linear_maps_are_the_regressions_of_each_from_the_other(whitened: bool) -> None:
    mixing = noise(7, 7, seed=2)
    rows = torch.einsum("ij,njhw->nihw", mixing, noise(4000, 7, 1, 1)) + 5
    source, target = rows[:, :4], rows[:, 4:]
    maps = LinearMaps(4, 3, 1)
    maps.solve(iter([(source, target)]), 1.0, 1e-9, whitened)
    x, y = source[:, :, 0, 0].double() - 5, target[:, :, 0, 0].double() - 5
    x, y = x - x.mean(0), y - y.mean(0)
    expected = torch.zeros(len(x), dtype=torch.float64)
    for a, b in ((x, y), (y, x)):
        error = b - a @ torch.linalg.lstsq(a, b).solution
        if whitened:
            precision = torch.linalg.inv(error.T @ error / (len(a) - 1))
            expected += 0.5 * ((error @ precision) * error).sum(1)
        else:
            expected += 0.5 * (error / b.std(0)).square().sum(1)
    found = maps(source, target)[:, 0, 0].double()
    # float32 matrices, conditioned like the square of the mixing
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_deep_maps_of_halves_learn_and_pairs_are_checked(tiny_backbone: Backbone, tiny_images: TinyImages) -> None:
    class Two(Backbone):
        """The tiny net twice: two nets of one set of strides."""

        def __init__(self) -> None:
            half = tiny_backbone
            super().__init__(
                "two", ("a1", "a2", "a3", "b1", "b2", "b3"), half.channels * 2, half.strides * 2, "0" * 64, half.net
            )

        def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
            found = tiny_backbone(images)
            return [*found, *[f.flip(1).square() for f in found]]

    settings = {"pairs": "halves", "net": "deep", "unit_length": True, "latent": (4, 5), "lr": 1e-2, "batch": 6}
    raw = PEFM(Two(), epochs=0, **settings).fit(tiny_images.normal)
    trained = PEFM(Two(), epochs=10, **settings).fit(tiny_images.normal)
    pyramid = Two()(tiny_images.normal)
    assert trained.score_features(pyramid).mean() < 0.7 * raw.score_features(pyramid).mean()
    with pytest.raises(InputError, match="3 taps"):
        PEFM(tiny_backbone, pairs="halves").fit(tiny_images.normal)


# --- CutPaste ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [cut_paste, scar])
def test_pasted_pieces_lie_where_the_mask_says_and_sizes_are_the_papers(change: object) -> None:
    image = torch.rand(3, 128, 96, generator=torch.Generator().manual_seed(3))
    shares = []
    for seed in range(30):
        made, where = change(image, torch.Generator().manual_seed(seed))  # type: ignore[operator]
        again, _ = change(image, torch.Generator().manual_seed(seed))  # type: ignore[operator]
        assert torch.equal(made, again) and made.shape == image.shape
        assert torch.equal(made[:, ~where], image[:, ~where])
        assert float(made.min()) >= 0 and float(made.max()) <= 1
        shares.append(float(where.float().mean()))
    if change is cut_paste:
        # Rounded sides change an area by a few per cent; a side longer than the image is cut.
        assert min(shares) > 0.015 and max(shares) < 0.16
    else:
        assert max(shares) < 0.02 and min(shares) > 0


def test_cell_labels_follow_the_pasted_area() -> None:
    where = torch.zeros(8, 8, dtype=torch.bool)
    where[0:2, 0:4] = True
    where[7, 7] = True
    # A cell of 4 x 4: half covered, one of 16 pixels covered, untouched.
    assert cutpaste._labels(where, (2, 2), 1).tolist() == [1, 0, 0, 0]
    assert cutpaste._labels(where, (2, 2), 2).tolist() == [2, 0, 0, 0]


def test_ledoit_wolf_is_that_of_scikit_learn() -> None:
    covariance = pytest.importorskip("sklearn.covariance")
    rows = noise(30, 12) @ noise(12, 12, seed=1)
    found = ledoit_wolf(rows)[1]
    expected = torch.from_numpy(covariance.ledoit_wolf(rows.double().numpy())[0])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)  # float64 both


def test_the_papers_whole_net_is_trained_and_the_backbone_is_not(
    tiny_backbone: Backbone, tiny_images: TinyImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {key: value.clone() for key, value in tiny_backbone.state_dict().items()}
    detector = CutPaste(tiny_backbone, level="image", steps=3, batch=6, lr=1e-3).fit(tiny_images.normal, seed=2)
    backbone, net = tiny_backbone.state_dict(), detector.net.state_dict()
    assert all(torch.equal(before[k], backbone[k]) for k in before)
    assert any(not torch.equal(before[k], net[k]) for k in before)
    path = save_detector(detector, tmp_path / "d.safetensors")
    monkeypatch.setattr("adflow.detector_file.make_backbone", lambda *_, **__: tiny_backbone)
    again, bad = load_detector(path), tiny_images.defective
    assert torch.equal(again.score(bad).image, detector.score(bad).image)
    with FeatureBank.build(tiny_backbone, tiny_images) as bank, pytest.raises(InputError, match="learns from images"):
        detector.fit_bank(bank)


def test_cells_are_classified_by_the_densities_of_the_classes(tiny_backbone: Backbone, tiny_images: TinyImages) -> None:
    stats = pytest.importorskip("scipy.stats")
    detector = CutPaste(tiny_backbone)
    detector.prepare(tiny_backbone.channels, tiny_backbone.grids((64, 64)), (64, 64), torch.Generator())
    width = sum(tiny_backbone.channels)
    classes = [(k + 1) * noise(200, width, seed=k) + k for k in range(3)]
    detector._learn_gaussians(classes)
    cells = noise(1, 16, width, seed=7)
    detector._cells = lambda _: cells  # type: ignore[method-assign, assignment]
    log = []
    for rows in classes:
        mean, covariance = ledoit_wolf(rows)
        log.append(torch.from_numpy(stats.multivariate_normal(mean, covariance).logpdf(cells[0].double())))
    expected = (torch.logaddexp(log[1], log[2]) - log[0]) / width
    found = detector.score_features([]).flatten().double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # float32 factors


def test_black_images_in_which_nothing_pasted_shows_leave_the_distance_from_good(tiny_backbone: Backbone) -> None:
    detector = CutPaste(tiny_backbone).fit(torch.zeros(4, 3, 64, 64))
    assert len(detector.means_) == 1
    black, spot = torch.zeros(2, 1, 3, 64, 64)
    spot[..., 20:40, 20:40] = 1
    scores = detector.score(torch.cat([black, spot])).image
    assert torch.isfinite(scores).all() and scores[1] > scores[0]


def test_shared_features_of_good_images_change_no_bit_and_a_trained_net_takes_none(
    tiny_backbone: Backbone, tiny_images: TinyImages
) -> None:
    alone = CutPaste(tiny_backbone).fit(tiny_images, seed=2)
    with FeatureBank.build(tiny_backbone, tiny_images) as bank:
        shared = CutPaste(tiny_backbone).fit(tiny_images, seed=2, resources=Resources(bank=bank))
    assert all(torch.equal(alone.learned()[k], v) for k, v in shared.learned().items())
    assert can_share(alone, {}) and not can_share(CutPaste(tiny_backbone, level="image"), {})


# --- Patch SVDD ----------------------------------------------------------------------------------------------


def test_encoders_of_the_paper_have_its_layers() -> None:
    small = Encoder(32, 64, 1.0)
    convolutions = [layer for layer in small.layers if isinstance(layer, torch.nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [32, 64, 128, 128, 64, 32, 32, 64]
    assert small(torch.zeros(2, 3, 32, 32)).shape == (2, 64)
    assert LargeEncoder(small, 64)(torch.zeros(2, 3, 64, 64)).shape == (2, 64)


def test_quarters_are_not_scrambled() -> None:
    large = LargeEncoder(Encoder(8, 4, 0.25), 4)
    x = noise(1, 3, 16, 16)
    seen: list[torch.Tensor] = []
    large.small.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    large(x)
    assert torch.equal(seen[0], torch.cat([x[..., :8, :8], x[..., :8, 8:], x[..., 8:, :8], x[..., 8:, 8:]]))


def test_the_last_layer_of_the_direction_classifier_trains() -> None:
    tell = Direction(5)
    F.cross_entropy(tell(noise(6, 5)), torch.arange(6)).backward()
    assert tell.last.weight.grad is not None and float(tell.last.weight.grad.norm()) > 0


def test_pairs_of_patches_lie_in_the_direction_they_are_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_patch_pairs, "_RGB_SHIFT", 0.0)
    monkeypatch.setattr(_patch_pairs, "_NOISE", 0.0)
    # A picture whose red and green are row and column: a patch says where it was cut.
    place = torch.arange(64.0)
    picture = torch.stack([place[:, None].expand(64, 64), place[None].expand(64, 64), torch.zeros(64, 64)])
    generator = torch.Generator().manual_seed(0)
    first, second, direction = _patch_pairs.neighbours(picture[None], torch.zeros(3, 64, 64), 16, 200, generator)
    moved = (second - first)[:, :2, 0, 0]
    step = torch.tensor(_patch_pairs.DIRECTIONS)[direction]
    far = step != 0
    assert (moved[far] * step[far] >= 12).all() and (moved[far] * step[far] < 16).all()
    assert (moved[~far].abs() <= 4).all()


def test_pairs_of_cells_lie_in_the_direction_they_are_said_to(tiny_backbone: Backbone, tiny_images: TinyImages) -> None:
    detector = PatchSVDD(tiny_backbone, steps=0, batch=100, dimension=4).fit(tiny_images.normal)
    # Embeddings that say where they are: every cell's are its row and column.
    for name in ("large", "small"):
        setattr(detector, f"matrix_{name}", torch.eye(2, 2))
        setattr(detector, f"mean_{name}", torch.zeros(2))
    detector.finest = 0

    class Places:
        def __len__(self) -> int:
            return 3

        def pyramid(self, rows: torch.Tensor) -> list[torch.Tensor]:
            h, w = detector.grids["small"]
            grid = torch.stack([torch.arange(h)[:, None].expand(h, w), torch.arange(w).expand(h, w)]).float()
            return [grid.expand(len(rows), 2, h, w)]

    large, small = detector._draw_cells(Places(), torch.Generator().manual_seed(1))  # type: ignore[arg-type]
    for (first, second, direction, one, other), apart in ((large, 4), (small, 1)):
        # Averaged onto the coarse grid, neighbouring cells are 4 fine ones apart.
        assert torch.equal(second - first, apart * torch.tensor(_patch_pairs.DIRECTIONS)[direction].float())
        assert torch.equal(first, one) and torch.equal(second, other)


def test_a_pixel_is_the_mean_of_the_patches_that_cover_it() -> None:
    found = covering(torch.tensor([[[[1.0, 3.0], [5.0, 7.0]]]]), 6, 3, (10, 9))[0]
    assert found[0, 0] == 1 and found[4, 1] == 3 and found[4, 4] == 4 and found[8, 8] == 7
    assert torch.equal(found[9], found[8])  # not covered: the border repeats
    # In the type of what is given, and so on its device.
    assert covering(torch.ones(1, 1, 2, 2).double(), 6, 3, (9, 9)).dtype is torch.float64


def test_pixels_are_taken_from_the_bank_once(tiny_images: TinyImages, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a part of a bank they are a copy: one a step would take longer than the step."""
    level, taken = FeatureBank.level, []

    def counted(self: FeatureBank, index: int) -> torch.Tensor:
        taken.append(index)
        return level(self, index)

    monkeypatch.setattr(FeatureBank, "level", counted)
    settings = {"patch": 16, "channels": 0.25, "strides": (8, 8), "bank": 50, "batch": 4}
    PatchSVDD(PixelBackbone(), net="deep", steps=3, **settings).fit(tiny_images.normal[:4])
    assert taken == [0]


def test_the_map_is_the_product_of_nearest_distances_at_both_sizes(
    tiny_backbone: Backbone, tiny_images: TinyImages
) -> None:
    """Untrained, with all rows kept, distances are those of half-whitened features to all training cells."""
    detector = PatchSVDD(tiny_backbone, steps=0, bank=0, dimension=100).fit(tiny_images.normal)
    with FeatureBank.build(tiny_backbone, tiny_images) as bank:
        good = bank.pyramid(range(len(bank)))
    bad = tiny_backbone(tiny_images.defective)
    grid = bad[0].shape[2:]
    expected = torch.ones(1, *grid, dtype=torch.float64)
    for large in (True, False):
        if large:
            coarse = bad[2].shape[2:]
            x, q = (torch.cat([F.adaptive_avg_pool2d(f, coarse) for f in maps], 1).double() for maps in (good, bad))
        else:
            x, q = good[0].double(), bad[0].double()
        rows = x.permute(0, 2, 3, 1).flatten(0, 2)
        unit = rows.std(0)
        values, vectors = torch.linalg.eigh(torch.corrcoef(rows.T))
        matrix = vectors / unit[:, None] * (values + 0.01) ** -0.25  # the ridge of `whitening`
        distance = torch.cdist(q.permute(0, 2, 3, 1).flatten(0, 2) @ matrix, rows @ matrix).amin(1)
        distance = distance.reshape(1, 1, *q.shape[2:])
        expected *= F.interpolate(distance, grid, mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(detector.score_features(bad).double(), expected, rtol=1e-3, atol=1e-4)  # float32 rows


def test_the_svdd_loss_pulls_neighbours_together(tiny_backbone: Backbone, tiny_images: TinyImages) -> None:
    def apart(svdd: float) -> float:
        detector = PatchSVDD(tiny_backbone, steps=80, svdd=svdd, lr=0.1, bank=100).fit(tiny_images.normal)
        cells = detector._embed(tiny_backbone(tiny_images.normal), "small")
        return float((cells[..., 1:] - cells[..., :-1]).norm(dim=1).mean())

    # A weight that outweighs the position task collapses the embedding; without it nothing does.
    assert apart(10.0) < 0.1 * apart(0.0)


@pytest.mark.parametrize("method", [PatchSVDD, CAVGA])
def test_deep_nets_learn_from_pixels_and_nothing_else(
    method: type, tiny_backbone: Backbone, tiny_images: TinyImages, tmp_path: Path
) -> None:
    small = {
        PatchSVDD: {"patch": 16, "channels": 0.25, "strides": (8, 4), "bank": 100, "steps": 8, "batch": 8},
        CAVGA: {"depth": 3, "width": 4, "latent": 8, "steps": 20, "batch": 4, "lr": 1e-3},
    }[method]
    detector = method(make_backbone("pixels"), net="deep", **small).fit(tiny_images.normal, seed=1)
    good, bad = detector.score(tiny_images.normal[:2]), detector.score(tiny_images.defective)
    assert torch.isfinite(bad.map).all() and bool((bad.image > good.image).all())
    alone = detector.score(tiny_images.normal[1:2])
    assert torch.equal(good.map[1:], alone.map) and torch.equal(good.image[1:], alone.image)
    again = load_detector(save_detector(detector, tmp_path / "d.safetensors"))
    assert torch.equal(again.score(tiny_images.defective).map, bad.map)
    with pytest.raises(InputError, match="pixels"):
        method(tiny_backbone, net="deep", **small).fit(tiny_images.normal)


# --- CAVGA ---------------------------------------------------------------------------------------------------


def test_attention_is_grad_cam() -> None:
    to_mean = torch.nn.Conv2d(5, 3, 1)
    features = noise(2, 5, 4, 6).requires_grad_(True)
    (gradient,) = torch.autograd.grad(to_mean(features).sum(), features)
    expected = (gradient.mean((2, 3), keepdim=True) * features).sum(1).relu()
    torch.testing.assert_close(attention_map(features, to_mean), expected)


def test_what_linear_attention_does_not_cover_is_the_error_of_rebuilding() -> None:
    """|F|^2 minus gradient times feature of the latent's energy, by autograd."""
    codes = PositionCodes(4, 6)
    codes.learn([noise(30, 4, 6, seed=3) @ noise(6, 6, seed=4) + 2], 0.1, 2)
    features = ((noise(3, 4, 6, seed=5) - codes.mean_) / codes.unit_).requires_grad_(True)
    latent = torch.einsum("bpc,pcd->bpd", features, codes.basis_)
    assert latent.shape == (3, 4, 2)
    (gradient,) = torch.autograd.grad(0.5 * latent.square().sum(), features)
    uncovered = features.square().sum(2) - (gradient * features).sum(2)
    left = codes(features * codes.unit_ + codes.mean_).square().sum(2)
    torch.testing.assert_close(left, uncovered, rtol=1e-4, atol=1e-4)  # a difference of float32 sums


def test_discriminator_and_autoencoder_take_turns() -> None:
    detector = CAVGA(PixelBackbone(), net="deep", depth=2, width=4, latent=3)
    detector.prepare([3], [(16, 16)], (16, 16), torch.Generator())
    images, drawn = torch.rand(2, 3, 16, 16), noise(2, 3, 4, 4)
    for judging in (True, False):
        detector.zero_grad(set_to_none=True)
        detector._loss(images, drawn, judging).backward()
        reached = {name.split(".")[0] for name, p in detector.named_parameters() if p.grad is not None}
        assert reached == ({"judge"} if judging else {"encoder", "decoder", "to_mean", "to_log_variance"})


# --- all -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [DFR, PEFM, CutPaste, PatchSVDD, CAVGA])
def test_bad_settings_are_refused(method: type, tiny_backbone: Backbone) -> None:
    wrong = {
        DFR: [{"net": "deeper"}, {"variance": 1.0}, {"shrinkage": 0.0}, {"window": 2}],
        PEFM: [{"pairs": "all"}, {"latent": ()}, {"ridge": 0.0}],
        CutPaste: [{"level": "pixel"}, {"shrinkage": 2.0}, {"batch": 1}],
        PatchSVDD: [{"net": "deeper"}, {"patch": 20}, {"strides": (4,)}, {"steps": -1}],
        CAVGA: [{"net": "deeper"}, {"depth": 0}, {"shrinkage": 0.0}],
    }
    for settings in wrong[method]:
        with pytest.raises(UsageError):
            method(tiny_backbone, **settings)


@pytest.mark.parametrize("method", [DFR, PEFM, CutPaste, PatchSVDD, CAVGA])
def test_paper_recipes_are_constructor_parameters(method: type, tiny_backbone: Backbone) -> None:
    for recipe in method.recipes:  # type: ignore[attr-defined]
        settings = method.recipe_for(recipe)  # type: ignore[attr-defined]
        method(tiny_backbone, **{k: v for k, v in settings.items() if k not in ("backbone", "taps", "size")})
