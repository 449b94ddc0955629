"""Parity with the original implementations, on arrays they produced.

The folder is read from ``ADFLOW_ORACLES`` (default ``../shared/oracles``); where it is absent every test here is
skipped, visibly. Cases, shapes and parameters are taken from the files, so that the same tests run on another set.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FOLDER = Path(os.environ.get("ADFLOW_ORACLES", Path(__file__).parents[2] / "shared" / "oracles"))


def number(key: str) -> int:
    """Return the number at the end of a key: 2 comes before 10, however many digits are written."""
    return int(re.search(r"(\d+)$", key)[1])  # type: ignore[index]  # such keys only


def files(prefix: str, without: str = "-") -> list[str]:
    """Return the names of the oracle files with a prefix; the prefix itself where there is none, to be skipped."""
    return sorted(path.stem for path in FOLDER.glob(f"{prefix}*.npz") if without not in path.stem) or [prefix]


def oracle(name: str) -> dict[str, np.ndarray]:
    """Return all arrays of ``name``.npz, or skip the test when the file is not here."""
    path = FOLDER / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"no oracle file {path}; set ADFLOW_ORACLES to a folder that holds it")
    with np.load(path) as arrays:
        return {key: arrays[key] for key in arrays.files}


def weights(name: str) -> dict[str, object]:
    """Return the state dict of ``name``.safetensors as torch tensors, or skip the test."""
    from safetensors.torch import load_file

    path = FOLDER / f"{name}.safetensors"
    if not path.exists():
        pytest.skip(f"no oracle file {path}; set ADFLOW_ORACLES to a folder that holds it")
    return load_file(path)


# ---- metrics.npz: pixel and image metrics, published AUPRO variants, mIoU and fair thresholds -----------------------


def metric_cases() -> list[str]:
    path = FOLDER / "metrics.npz"
    if not path.exists():
        return ["absent"]
    with np.load(path) as arrays:
        names = [key.removesuffix("_score") for key in arrays.files if key.endswith("_score")]
    return sorted(name for name in names if not name.endswith("_train_normal"))


@pytest.mark.parametrize("case", metric_cases())
def test_metrics_of_arrays(case: str) -> None:
    from adflow import metrics

    arrays = oracle("metrics")
    maps, masks = arrays[f"{case}_score"], arrays[f"{case}_mask"]
    pixel = metrics.pixel_metrics(maps, masks)
    image = metrics.image_metrics(maps.max(axis=(1, 2)), masks.any(axis=(1, 2)))
    assert pixel.n_regions == arrays[f"{case}_n_regions"]
    for found, level in ((pixel, "pixel"), (image, "image")):
        for ours, theirs in (("auroc", "auroc"), ("ap", "ap"), ("f1_max", "f1max")):
            expected = arrays[f"{case}_{level}_{theirs}"]
            assert getattr(found, ours) == pytest.approx(expected, abs=1e-9), (level, ours)  # float64 sums
        assert found.f1_threshold == arrays[f"{case}_{level}_f1_threshold"]
    assert pixel.aupro == pytest.approx(arrays[f"{case}_aupro_exact"], abs=1e-9)
    for method, tolerance in (("cflow", 1e-6), ("uflow", 1e-5)):  # the latter accumulates in float32
        expected = float(arrays[f"{case}_aupro_{method}"])
        assert metrics.aupro(maps, masks, method=method) == pytest.approx(expected, abs=tolerance, nan_ok=True)
    stream = metrics.StreamingPixelMetrics()
    for one, mask in zip(maps, masks, strict=True):
        stream.add(one, mask)
    streamed = stream.result()
    for name in ("auroc", "ap", "f1_max", "aupro"):
        assert abs(getattr(streamed, name) - getattr(pixel, name)) <= streamed.bounds[name]


@pytest.mark.parametrize("case", metric_cases())
def test_operating_points_of_arrays(case: str) -> None:
    from adflow import metrics

    arrays = oracle("metrics")
    maps, masks = arrays[f"{case}_score"], arrays[f"{case}_mask"]
    grid = arrays[f"{case}_miou_thresholds"]
    curve = metrics.iou_curve(maps, masks, grid)
    np.testing.assert_allclose(curve, arrays[f"{case}_miou_allinone"], rtol=0, atol=1e-6)  # float32 means
    np.testing.assert_allclose(curve, arrays[f"{case}_miou_batch4"], rtol=0, atol=1e-6)
    best = metrics.oracle_threshold(maps, masks, grid)
    assert best.value == pytest.approx(arrays[f"{case}_miou_oracle"], abs=1e-6)
    theirs = np.searchsorted(grid, arrays[f"{case}_miou_oracle_threshold"].astype(grid.dtype))
    assert curve[theirs] == pytest.approx(best.value, abs=1e-6)  # equals may be told apart by float32 rounding
    assert metrics.oracle_threshold(maps, masks).value >= best.value - 1e-12
    cflow = metrics.cflow_curve(maps, masks)
    thresholds = cflow.threshold.astype(maps.dtype)
    only = metrics.iou_curve(maps, masks, thresholds, anomalous_only=True).max()
    assert only == pytest.approx(arrays[f"{case}_cflow_best_per_image_iou_anomalous_only"], abs=1e-6)
    if f"{case}_cflow_thr" in arrays:
        np.testing.assert_array_equal(thresholds, arrays[f"{case}_cflow_thr"])
        np.testing.assert_allclose(cflow.x, arrays[f"{case}_cflow_fpr"], rtol=0, atol=1e-12)
        np.testing.assert_allclose(cflow.y, arrays[f"{case}_cflow_pro"], rtol=0, atol=1e-12)
    if f"{case}_train_normal_score" not in arrays:
        return
    normal = arrays[f"{case}_train_normal_score"]
    pixels = float(arrays[f"{case}_fair_target_fpr"]) * normal[0].size
    for method, name in (("original", "original"), ("interpolated", "no_drop")):
        threshold = metrics.fair_threshold(normal, pixels, method)
        assert threshold == pytest.approx(float(arrays[f"{case}_fair_threshold_{name}"]), abs=1e-6)
        expected = arrays[f"{case}_miou_fair_{name}"]
        assert metrics.mean_iou(maps, masks, threshold) == pytest.approx(expected, abs=1e-6)
    direct = metrics.fair_threshold(normal, pixels)
    assert np.mean(normal > direct) <= arrays[f"{case}_fair_target_fpr"] * (1 + 1e-9)


# ------------------------------------------------------------------------------------------------ U-Flow (graph)


def hidden_ratio(weights: Iterable[Any]) -> float:
    """Return the ratio by which all first convolutions [out, in, k, k] have out = int(ratio * in)."""
    return max(weight.shape[0] / weight.shape[1] for weight in weights) + 1e-9


UFLOW = files("uflow_")


@pytest.mark.parametrize("name", UFLOW)
def test_uflow_graph_likelihood_and_gradients(name: str) -> None:
    import torch

    from adflow.flows import AllInOneBlock, load_original
    from adflow.imaging import upsample
    from adflow.methods.uflow import load_graph, u_graph

    arrays, state = oracle(name), weights(name)
    scales = sum(key.startswith("feat_in") for key in arrays)
    features = [torch.from_numpy(arrays[f"feat_in{i}"]) for i in range(scales)]
    couplings = sum(key.endswith("global_scale") for key in state)
    first = [value for key, value in state.items() if key.endswith("subnet.0.weight")]
    shapes = [tuple(f.shape[1:]) for f in features]
    flow = u_graph(shapes, flow_steps=couplings // scales, hidden=hidden_ratio(first))
    load_graph(flow, state)
    norms = torch.nn.ModuleList()
    prefix = "model.feature_extractor.feature_normalizations."
    if any(key.startswith(prefix) for key in state):
        norms.extend(torch.nn.LayerNorm(f.shape[1:]) for f in features)
        load_original(norms, state, prefix=prefix)
        features = [norm(f) for norm, f in zip(norms, features, strict=True)]
        for i, f in enumerate(features):
            np.testing.assert_allclose(f.detach(), arrays[f"feat_norm{i}"], atol=1e-5)
    z, logdet = flow(features)
    # Ten times the original's own float32 noise (rel 5e-7 of the largest latent; logdet near 0: absolute 1e-3).
    for i in range(scales):
        np.testing.assert_allclose(z[i].detach(), arrays[f"z{i}"], atol=1e-5 * float(np.abs(arrays[f"z{i}"]).max()))
    np.testing.assert_allclose(logdet.detach(), arrays["logdet"], atol=5e-3, rtol=1e-5)
    half = sum(0.5 * zi.square().flatten(1).sum(1) for zi in z)
    np.testing.assert_allclose(half.detach(), arrays["half_sum_z2"], rtol=1e-5)
    loss = (half - logdet).mean()
    np.testing.assert_allclose(float(loss.detach()), float(arrays["loss"]), rtol=1e-5, atol=5e-3)

    loss.backward()
    blocks = [m for m in flow.module_list if isinstance(m, AllInOneBlock)]
    numbers = sorted({int(key.split(".")[3]) for key in state if key.endswith("global_scale")})
    ours = {
        f"flow.module_list.{number}.{key}": value
        for number, block in zip(numbers, blocks, strict=True)
        for key, value in block.named_parameters()
    }
    ours |= {f"feature_extractor.feature_normalizations.{key}": value for key, value in norms.named_parameters()}
    wanted = {key[len("gradnorm.") :]: value for key, value in arrays.items() if key.startswith("gradnorm.")}
    assert set(wanted) <= set(ours)
    for key, value in wanted.items():
        assert ours[key].grad is not None
        np.testing.assert_allclose(float(ours[key].grad.norm()), float(value), rtol=1e-3, atol=1e-6)

    size = arrays["probability64"].shape[-2:]
    grids = [(-0.5 * zi.detach().square().mean(1)).exp() for zi in z]
    probability = torch.stack([upsample(g, size, 0.0) for g in grids]).mean(0)
    np.testing.assert_allclose(probability, arrays["probability64"][:, 0], atol=2e-6)
    np.testing.assert_allclose((1 - probability).flatten(1).max(1).values, arrays["image_score"].ravel(), atol=2e-6)
    back, _ = flow([zi.detach() for zi in z], rev=True)
    for i, f in enumerate(features):
        np.testing.assert_allclose(back[i].detach(), f.detach(), atol=1e-4)


@pytest.mark.parametrize("name", UFLOW)
def test_uflow_latents_give_the_originals_nfa(name: str) -> None:
    from skimage.measure import label

    from adflow import nfa

    arrays = oracle(name)
    latents = [arrays[key] for key in sorted(arrays) if key.startswith("z") and key[1:].isdigit()]
    expected = arrays["nfa_tree_score64"][:, 0]
    found = nfa.tree(nfa.latent_energies(latents), expected.shape[-2:], bound="reference")
    # A level that flips in the last digit of float32 can move one whole region; everything else is bit-close.
    for ours, theirs in zip(found, expected, strict=True):
        _, regions = label(np.abs(ours - theirs) > 0.05 + 1e-5 * np.abs(theirs), return_num=True, connectivity=2)
        assert regions <= 1


# ---- padim*.npz, spade.npz, patchcore_*.npz: Gaussians and memories ---------------------------------------


class GivenFeatures:
    """A bank of features that are there already, and the same as a pyramid of all images."""

    def __init__(self, levels: list[np.ndarray]) -> None:
        import torch

        from adflow._rows import RamStore
        from adflow.features import FeatureBank

        self.levels = [torch.from_numpy(level).float() for level in levels]
        stores = [RamStore(tuple(level.shape[1:]), torch.float32, len(level)) for level in self.levels]
        for store, level in zip(stores, self.levels, strict=True):
            for row in level.split(1):
                store.append(row)
        self.bank = FeatureBank(stores, (0, 0), 1, "given", on_disk=False)


def levels_of(arrays: dict[str, np.ndarray], part: str) -> list[np.ndarray]:
    """Return layer<k>_<part>, finest first."""
    names = sorted(key for key in arrays if key.startswith("layer") and key.endswith(f"_{part}"))
    assert names
    return [arrays[name] for name in names]


def fit_given(detector: Any, features: GivenFeatures, size: tuple[int, int]) -> Any:
    import torch

    generator = torch.Generator().manual_seed(0)
    detector.prepare(features.bank.channels, features.bank.grids, size, generator)
    return generator


@pytest.mark.parametrize("name", files("padim", without="subsets"))
def test_padim_is_the_repositorys(name: str, tiny_backbone: Any) -> None:
    import torch

    from adflow.imaging import upsample
    from adflow.methods.padim import PaDiM

    arrays = oracle(name)
    train, test = (GivenFeatures(levels_of(arrays, part)) for part in ("train", "test"))
    size = arrays["score_map_after"].shape[1:]
    recipe = PaDiM.recipe_for("paper")
    settings = {k: recipe[k] for k in ("grid", "whiten", "shrinkage", "log_det")}
    detector = PaDiM(tiny_backbone, channels=len(arrays["channel_subset"]), **settings)
    generator = fit_given(detector, train, size)
    detector.channels_ = torch.from_numpy(arrays["channel_subset"])
    detector.fit_features(train.bank, generator=generator)
    mean = detector.gaussians.mean_.T.numpy()
    inverse = detector.gaussians.inverse_.double()
    covariance = torch.linalg.inv(inverse @ inverse.transpose(1, 2)).permute(1, 2, 0).numpy()
    # Both sides round means and inverse factors to float32.
    np.testing.assert_allclose(mean, arrays["mean"], rtol=1e-5, atol=1e-6)
    expected = arrays["cov_plus_001I"]
    np.testing.assert_allclose(covariance, expected, rtol=0, atol=1e-4 * expected.max())
    found = detector.score_features(test.levels)
    np.testing.assert_allclose(found.numpy(), arrays["distance_f64_solve"], rtol=1e-5)
    # The repository inverts in float32: its noise grows with the condition of the covariances.
    np.testing.assert_allclose(found.numpy(), arrays["distance"], rtol=1e-4)
    before, after = (upsample(found, size, sigma).numpy() for sigma in (0.0, 4.0))
    np.testing.assert_allclose(before, arrays["score_map_before"], rtol=1e-4)
    np.testing.assert_allclose(after, arrays["score_map_after"], rtol=1e-4)


@pytest.mark.parametrize(("net", "total"), [("resnet18", 448), ("wide_resnet50_2", 1792)])
def test_padim_draws_the_channels_of_the_repository(net: str, total: int, tiny_backbone: Any) -> None:
    import torch

    from adflow.methods.padim import PaDiM

    expected = oracle("padim_repo_channel_subsets")[net]
    detector = PaDiM(tiny_backbone, channels=len(expected))
    detector.prepare([total], [(1, 1)], (8, 8), torch.Generator().manual_seed(1024))
    assert detector.channels_.tolist() == expected.tolist()


def spade(tiny_backbone: Any, **settings: Any) -> tuple[Any, dict[str, np.ndarray], GivenFeatures]:
    from adflow.methods.spade import SPADE

    arrays = oracle("spade")
    parts = [GivenFeatures([*levels_of(arrays, part), arrays[f"avgpool_{part}"]]) for part in ("train", "test")]
    detector = SPADE(tiny_backbone, images=int(arrays["top_k"]), **settings)
    detector.fit_features(parts[0].bank, generator=fit_given(detector, parts[0], (224, 224)))
    return detector, arrays, parts[1]


def test_spade_finds_the_repositorys_images_and_compares_the_whole_gallery(tiny_backbone: Any) -> None:
    import torch

    detector, arrays, test = spade(tiny_backbone, levels="separate", retrieval_score=True)
    distances, index = detector.retrieve(test.levels)
    assert np.array_equal(np.sort(index.numpy(), axis=1), np.sort(arrays["knn_index"], axis=1))
    np.testing.assert_allclose(distances.numpy(), np.sort(arrays["knn_dist"], axis=1), rtol=1e-5)
    scores = detector.score_images(test.levels, torch.zeros(len(index), 8, 8), None)
    np.testing.assert_allclose(scores.numpy(), arrays["image_score"], rtol=1e-5)
    for level, found in enumerate(detector.level_distances(test.levels, index), start=1):
        # float64 reference; ours measures the nearest directly in float32.
        np.testing.assert_allclose(found.numpy(), arrays[f"min_dist_full_gallery_layer{level}"], rtol=1e-5)


def test_spade_differs_from_the_repository_by_the_dropped_gallery_only(tiny_backbone: Any) -> None:
    import torch

    from adflow.imaging import upsample
    from adflow.methods._memory import nearest

    detector, arrays, test = spade(tiny_backbone, levels="separate")
    _, index = detector.retrieve(test.levels)
    given = []
    for level in range(len(test.levels) - 1):
        names = [f"min_dist_layer{level + 1}_img{b}" for b in range(len(test.bank))]
        given.append(torch.from_numpy(np.stack([arrays[name] for name in names])))
        for b, name in enumerate(names):
            gallery = getattr(detector, f"level{level}_")[index[b]]  # [K, C, h, w]
            rows = gallery.permute(0, 3, 2, 1).flatten(0, 2)  # the repository's order: image, column, row
            query = test.levels[level][b].flatten(1).T
            squared, _ = nearest(query, rows[: len(rows) // 100 * 100])
            # The repository adds 1e-6 to every difference.
            found = squared.sqrt().numpy().reshape(arrays[name].shape)
            np.testing.assert_allclose(found, arrays[name], rtol=1e-4)
    size = tuple(2 * side for side in arrays["score_map_after"].shape[1:])
    maps = upsample(detector._mean(given, size), size, 4.0)[:, ::2, ::2]
    np.testing.assert_allclose(maps.numpy(), arrays["score_map_after"], rtol=1e-4)


PATCHCORE = files("patchcore_")


def patchcore(arrays: dict[str, np.ndarray], part: str, net: Any) -> tuple[Any, GivenFeatures]:
    """Return a detector with the file's widths. How long a pooled layer is no file says: it is looked for."""
    import torch

    from adflow.methods.patchcore import PatchCore

    suffix = f"_{part}" if part else ""
    found = [k for k in arrays if k.startswith("layer") and k.endswith(suffix)]
    names = sorted(k for k in found if k.count("_") == bool(part))
    features = GivenFeatures([arrays[name] for name in names])
    rows = torch.from_numpy(arrays[f"embedding{suffix}"])
    width = rows.shape[1]
    recipe = PatchCore.recipe_for("code")
    settings = {k: recipe[k] for k in ("neighbourhood", "grid", "whiten")}
    first = [level[:1] for level in features.levels]
    for layer_width in [width, *range(1, 4 * width)]:
        detector = PatchCore(net, layer_width=layer_width, width=width, **settings)
        made = detector.embed(first)[0]
        if torch.allclose(made, rows[: len(made)], rtol=1e-5, atol=1e-5 * float(rows.abs().max())):
            return detector, features
    raise AssertionError("no width of a pooled layer gives the embedding")


@pytest.mark.parametrize("case", PATCHCORE)
def test_patchcore_embeds_as_the_official_code(case: str, tiny_backbone: Any) -> None:
    arrays = oracle(case)
    keys = sorted(key for key in arrays if key.startswith("embedding"))
    for part in (key.removeprefix("embedding").removeprefix("_") for key in keys):
        detector, features = patchcore(arrays, part, tiny_backbone)
        expected = arrays[f"embedding_{part}" if part else "embedding"]
        found = detector.embed(features.levels).flatten(0, 1).numpy()
        # Windows are pooled before they are resized, the other way round there: rounding only.
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("case", PATCHCORE)
def test_patchcore_chooses_and_scores_as_the_official_code(case: str, tiny_backbone: Any) -> None:
    import torch
    from naive import start_from_all

    from adflow.imaging import upsample
    from adflow.methods._memory import greedy_coreset, half_norms, nearest, start_from_points

    arrays = oracle(case)
    if "coreset_index" not in arrays:
        pytest.skip(f"{case} has an embedding only")
    rows = torch.from_numpy(arrays["embedding_train"])
    small = rows @ torch.from_numpy(arrays["projection_weight"]).T
    start = start_from_points(small, torch.from_numpy(arrays["start_points"]))
    expected = arrays["coreset_index_f64"]
    chosen = greedy_coreset(small, len(expected), start).numpy()
    # A choice between two rows whose distances differ by less than float32 resolves may fall either way.
    sure = int(np.argmax(np.append(arrays["coreset_argmax_gap_f64"] < 1e-5, True)))
    assert sure > 0 and np.array_equal(chosen[:sure], expected[:sure])
    if sure == len(expected):
        assert np.array_equal(chosen, arrays["coreset_index"])
    exact = arrays["exact_greedy_index_first300"]
    first = rows[:300]
    assert np.array_equal(greedy_coreset(first, len(exact), start_from_all(first)).numpy(), exact)

    detector, features = patchcore(arrays, "test", tiny_backbone)
    size = arrays["score_map"].shape[1:]
    fit_given(detector, features, size)
    detector.bank_ = rows[torch.from_numpy(arrays["coreset_index"])]
    detector.halves_ = half_norms(detector.bank_)
    queries = torch.from_numpy(arrays["embedding_test"])
    squared, index = nearest(queries, detector.bank_, 1, detector.halves_)
    scale = arrays["nn_sq_distance"].max()
    np.testing.assert_allclose(squared[:, 0].numpy(), arrays["nn_sq_distance"], rtol=1e-5, atol=1e-6 * scale)
    assert np.array_equal(index[:, 0].numpy(), arrays["nn_index_in_bank"])
    three = nearest(queries, detector.bank_, 3, detector.halves_)[0].mean(dim=1).numpy()
    np.testing.assert_allclose(three, arrays["patch_score_3nn_mean"], rtol=1e-5, atol=1e-6 * scale)
    maps = upsample(detector.score_features(features.levels), size, 4.0)
    np.testing.assert_allclose(maps.numpy(), arrays["score_map"], rtol=1e-5, atol=1e-6 * scale)
    detector.patch_score, detector.margin, detector.size = True, 0.0, size
    images = detector.score_images(features.levels, maps, None)
    np.testing.assert_allclose(images.numpy(), arrays["image_score"], rtol=1e-5, atol=1e-6 * scale)


# ---- nfa_tree*.npz, nfa_ntests.npz, nfa_block.npz: a contrario detection ----------------------------------
TREES = sorted(
    (path.stem, case)
    for path in (FOLDER.glob("nfa_tree*.npz") if FOLDER.exists() else [])
    for case in {key.split("_")[0] for key in np.load(path).files}
) or [("nfa_tree", "c00")]


def scales_of(arrays: dict[str, np.ndarray], prefix: str) -> list[np.ndarray]:
    """Return prefix0, prefix1, ... in order."""
    return [arrays[f"{prefix}{i}"] for i in range(len(arrays)) if f"{prefix}{i}" in arrays]


def collided(expected: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Return the pixels the original lost because two of its clusters have the same key.

    The original keeps final clusters in a dictionary keyed by their float32 log P, so of two clusters with equal
    values one vanishes. Such a pixel is one we paint and it does not, with a value that it does paint elsewhere in
    the same image, to the last digits of float32.
    """
    lost = np.isnan(expected) & ~np.isnan(found)
    for b, image in enumerate(lost):
        kept = expected[b][~np.isnan(expected[b])].astype(np.float64)
        for value in found[b][image]:
            assert (np.abs(kept - value) <= 1e-6 * max(1, abs(value))).any(), "not in the original"
    return lost


@pytest.mark.parametrize(("file", "case"), TREES)
def test_nfa_tree_finds_the_originals_clusters(file: str, case: str) -> None:
    from adflow import nfa

    arrays = oracle(file)
    energies = nfa.latent_energies(scales_of(arrays, f"{case}_z"))
    level, area = scales_of(arrays, f"{case}_r"), scales_of(arrays, f"{case}_area")
    for i, (chi2, dof) in enumerate(energies):
        expected = arrays[f"{case}_logp{i}"].astype(np.float64)
        found = nfa.clusters(chi2, dof, bound="reference")
        lost = collided(expected, found.log10_p)
        np.testing.assert_array_equal(np.isnan(expected) & ~lost, np.isnan(found.log10_p))
        kept = ~np.isnan(expected)
        # 1e-5: ten times the float32 rounding of the original; levels likewise.
        np.testing.assert_allclose(found.log10_p[kept], expected[kept], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found.level[kept], level[i][kept], rtol=2e-6, atol=1e-6)
        np.testing.assert_array_equal(found.area[kept], area[i][kept])
        guarded = np.nan_to_num(nfa.clusters(chi2, dof).log10_p)
        expected = np.nan_to_num(arrays[f"{case}_logp_guarded{i}"].astype(np.float64))
        # The guarded original loses clusters in the same way; among those of value 0 that makes no difference.
        same = np.abs(guarded - expected) <= 1e-5 * np.maximum(1, np.abs(expected))
        assert (same | ((expected == 0) & np.isin(guarded, guarded[same]) | lost)).all()


@pytest.mark.parametrize(("file", "case"), TREES)
def test_nfa_tree_gives_the_originals_scores(file: str, case: str) -> None:
    from adflow import nfa

    arrays = oracle(file)
    energies = nfa.latent_energies(scales_of(arrays, f"{case}_z"))
    for key, given, bound in (("score", "logp", "reference"), ("score_guarded", "logp_guarded", "one-sided")):
        lost = False
        for i, (chi2, dof) in enumerate(energies):
            ours = nfa.clusters(chi2, dof, bound=bound).log10_p
            theirs = arrays[f"{case}_{given}{i}"].astype(np.float64)
            # What the original lost is no cluster there, or one of value 0, where we have evidence.
            lost |= bool((np.nan_to_num(ours) < np.nan_to_num(theirs) - 1e-5 * np.maximum(1, np.abs(ours))).any())
            lost |= bool(collided(arrays[f"{case}_logp{i}"], nfa.clusters(chi2, dof, bound="reference").log10_p).any())
        expected = arrays[f"{case}_{key}"][:, 0].astype(np.float64)
        found = nfa.tree(energies, expected.shape[-2:], bound=bound)
        # atol: the original rounds the number of tests and every map to float32.
        tolerance = 1e-2 + 1e-5 * np.abs(expected)
        if lost:
            # What the original lost can only be missing evidence; it detects nothing that we do not.
            assert (found >= expected - tolerance).all()
        else:
            assert (np.abs(found - expected) <= tolerance).all()
            np.testing.assert_array_equal(found > 0, expected > 0)


def test_nfa_number_of_tests_is_the_originals() -> None:
    from adflow import nfa

    arrays = oracle("nfa_ntests")
    for sizes, expected in zip(arrays["sizes"], arrays["log10_ntests"], strict=True):
        # The original casts to float32: half a unit in the last place.
        found = nfa.log10_tests(tuple(int(n) for n in sizes if n))
        assert found == pytest.approx(expected, rel=1.2e-7, abs=1e-7)


BLOCKS = (
    sorted({key.split("_")[0] for key in np.load(FOLDER / "nfa_block.npz").files})
    if (FOLDER / "nfa_block.npz").exists()
    else ["b0"]
)


@pytest.mark.parametrize("case", BLOCKS)
@pytest.mark.parametrize("precision", ["low", "high"])
def test_nfa_block_is_the_originals(case: str, precision: str) -> None:
    from adflow import nfa

    arrays = oracle("nfa_block")
    if f"{case}_score_{precision}" not in arrays:
        pytest.skip(f"{case} was not run in {precision} precision: the original takes seconds per map")
    latents = scales_of(arrays, f"{case}_z")
    for scale, z in enumerate(latents):
        expected = arrays[f"{case}_logp_{precision}{scale}"][:, 0]
        found = nfa.block_log_probability(z, scale, precision)
        finite = np.isfinite(expected)
        tolerance = 1e-12 if precision == "low" else 1e-9  # a table look-up; a quadrature
        np.testing.assert_allclose(found[finite], expected[finite], rtol=0, atol=tolerance)
        # Where all entries of a window are extreme the original has -inf; we keep the lowest finite value.
        lowest = found[finite].min() if finite.any() else found.max()
        assert (found[~finite] <= lowest).all() and np.isfinite(found).all()
    expected = arrays[f"{case}_score_{precision}"][:, 0]
    found = nfa.block(latents, expected.shape[-2:], precision=precision)
    finite = np.isfinite(expected)
    np.testing.assert_allclose(found[finite], expected[finite], rtol=0, atol=1e-9)


# ---- positional_encoding.npz, cflow_*.npz: CFLOW-AD ------------------------------------------------------------------


def test_positional_encoding_is_the_originals() -> None:
    from adflow.flows import positional_encoding

    for name, expected in oracle("positional_encoding").items():
        channels, height, width = expected.shape
        # The original multiplies in float32: the angle of index i is off by about i * 6e-8, and so is its sine.
        tolerance = 2e-6 * max(1.0, max(height, width) / 32)
        found = positional_encoding(channels, height, width).numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance, err_msg=name)


def cflow_decoder(state: dict[str, Any], prefix: str) -> tuple[Any, int]:
    """Return the decoder whose weights are ``prefix*`` in ``state``, and the width of its condition."""
    from adflow.flows import chain, linear_subnet, load_original

    keys = [key for key in state if key.startswith(prefix)]
    blocks = 1 + max(int(key[len(prefix) :].split(".")[1]) for key in keys)
    channels = state[f"{prefix}module_list.0.global_offset"].shape[1]
    hidden, inputs = state[f"{prefix}module_list.0.subnet.0.weight"].shape
    condition = inputs - (channels - channels // 2)
    decoder = chain(
        channels,
        blocks,
        condition=condition,
        subnet=linear_subnet(hidden=hidden),
        clamp=1.9,
        permutation="soft",
    )
    load_original(decoder, state, prefix=prefix)
    return decoder, condition


def tags(name: str) -> list[str]:
    path = FOLDER / f"{name}.npz"
    return sorted({key.split("_")[0] for key in np.load(path).files}) if path.exists() else ["absent"]


@pytest.mark.parametrize("tag", tags("cflow_decoder"))
def test_cflow_decoder_is_the_originals(tag: str) -> None:
    import torch

    from adflow._fused import FusedChain
    from adflow.flows import log_likelihood
    from adflow.methods._cflow_paper import fiber_loss

    arrays = {k.removeprefix(f"{tag}_"): v for k, v in oracle("cflow_decoder").items() if k.startswith(f"{tag}_")}
    decoder, _ = cflow_decoder(weights("cflow_decoder"), f"{tag}.")
    x, condition = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["cond"])
    channels = x.shape[1]
    z, logdet = decoder(x, [condition])
    likelihood = log_likelihood(z, logdet)
    loss = fiber_loss(likelihood, channels)
    loss.backward()

    def close(found: Any, name: str, rel: float = 0.0, atol: float = 0.0) -> None:
        expected = arrays[name]
        bound = rel * float(np.abs(expected).max()) + atol
        np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=bound, err_msg=name)

    # Tolerances: ten times the original's own difference between float32 and float64.
    close(z, "z", rel=1e-5)
    close(logdet, "logdet", rel=2e-5)
    close(likelihood / channels, "logp_per_dim", atol=5e-4)
    close(loss, "loss", rel=1e-5)
    parameters = dict(decoder.named_parameters())
    norms = {key.removeprefix("gradnorm."): v for key, v in arrays.items() if key.startswith("gradnorm.")}
    assert set(norms) == set(parameters)
    for name, norm in norms.items():
        assert float(parameters[name].grad.norm()) == pytest.approx(float(norm), rel=1e-4, abs=1e-9), name
    for key, gradient in arrays.items():
        if key.startswith("grad."):
            found = parameters[key.removeprefix("grad.")].grad.numpy()
            np.testing.assert_allclose(found, gradient, rtol=0, atol=1e-4 * float(np.abs(gradient).max()))
    back, inverse_logdet = decoder(torch.from_numpy(arrays["z"]), [condition], rev=True)
    close(back, "inv_x", rel=3e-5)
    close(inverse_logdet, "inv_logdet", rel=2e-5)
    fused = log_likelihood(*FusedChain(decoder, condition)(x)) / channels
    close(fused, "logp_per_dim", atol=5e-4)
    exact = FusedChain(decoder.double(), condition.double())(x.double())
    # Rotations were stored in float32, whose transpose is not an exact inverse: their rounding remains.
    close(log_likelihood(*exact) / channels, "logp_per_dim_f64", atol=5e-5)


def test_cflow_training_steps_are_the_originals() -> None:
    import torch

    from adflow.flows import log_likelihood, positional_encoding
    from adflow.methods._cflow_paper import fiber_loss, fiber_steps, paper_rate
    from adflow.methods._train import train

    arrays, state = oracle("cflow_training"), weights("cflow_training")
    taps = sorted(key for key in arrays if key.startswith("feat"))
    features = [torch.from_numpy(arrays[key]) for key in taps]
    made = [cflow_decoder(state, f"init.dec{i}.") for i in range(len(taps))]
    decoders = torch.nn.ModuleList(decoder for decoder, _ in made)
    codes = [
        positional_encoding(width, *x.shape[2:]).flatten(1).T for x, (_, width) in zip(features, made, strict=True)
    ]
    drawn = sorted((key for key in arrays if key.startswith("perm")), key=number)
    orders = iter([torch.from_numpy(arrays[key]) for key in drawn])
    batch = int(arrays["batch_size"])
    per_pass = len(features[0]) // batch
    epochs = arrays["meta_epochs_run"].tolist()
    per_epoch = len(arrays["lr_per_batch"]) // len(epochs)
    steps, rates, lr_per_batch = [], [], []
    for epoch in epochs:
        for k in range(per_epoch):
            start = k % per_pass * batch
            lr_per_batch.append(2e-4 * paper_rate(epoch * per_epoch + k, per_epoch))
            pyramid = [x[start : start + batch] for x in features]
            for step in fiber_steps(pyramid, codes, int(arrays["N"]), lambda _: next(orders)):
                steps.append(step)
                rates.append(lr_per_batch[-1] / 2e-4)
    np.testing.assert_allclose(lr_per_batch, arrays["lr_per_batch"], rtol=0, atol=1e-12)
    losses = []

    def loss(step: Any) -> Any:
        tap, vectors, code = step
        z, logdet = decoders[tap](vectors, [code])
        value = fiber_loss(log_likelihood(z, logdet), vectors.shape[1])
        losses.append(float(value.detach()))
        return value

    train(decoders, loss, iter(steps), steps=len(steps), lr=2e-4, schedule=lambda step: rates[step])
    # Another order of sums in float32; Adam amplifies the rounding of tiny gradients.
    np.testing.assert_allclose(losses, arrays["step_loss"], rtol=0, atol=1e-5)
    checked = 0
    for i, decoder in enumerate(decoders):
        for name, parameter in decoder.named_parameters():
            norm = float(arrays[f"final_norm.dec{i}.{name}"])
            found = float(parameter.detach().double().norm())
            assert found == pytest.approx(norm, abs=1e-4 * parameter.numel() ** 0.5), name
            key = f"final.dec{i}.{name}"
            if key in state:
                checked += 1
                torch.testing.assert_close(parameter.detach(), state[key], rtol=0, atol=1e-4)
    assert checked


def test_cflow_schedule_is_the_originals() -> None:
    from adflow.methods._cflow_paper import META_EPOCHS, RATE, SUB_EPOCHS, paper_rate

    expected = oracle("cflow_training")["schedule_lr"]
    epochs, passes, batches = expected.shape
    assert (epochs, passes) == (META_EPOCHS, SUB_EPOCHS)
    found = [RATE * paper_rate(k, passes * batches) for k in range(expected.size)]
    np.testing.assert_allclose(found, expected.ravel(), rtol=0, atol=1e-12)


def test_cflow_scores_are_the_originals(tiny_backbone: Any) -> None:
    import torch

    from adflow.flows import load_original
    from adflow.methods._cflow_paper import probability_map
    from adflow.methods.cflow import CFlow

    arrays, state = oracle("cflow_scoring"), weights("cflow_scoring")
    taps = range(len([key for key in arrays if key.startswith("feat")]))
    pyramid = [torch.from_numpy(arrays[f"feat{i}"]) for i in taps]
    height, width = arrays["score_map"].shape[1:]
    made = [cflow_decoder(state, f"dec{i}.") for i in taps]
    detector = CFlow(
        tiny_backbone,
        joint=False,
        whiten="none",
        position=made[0][1],
        blocks=len(made[0][0]),
        normaliser="train",
        smooth=0.0,
        image_score="max",
        margin=0.0,
    )
    grids = [(x.shape[2], x.shape[3]) for x in pyramid]
    detector.prepare([x.shape[1] for x in pyramid], grids, (height, width), torch.Generator())
    for i in taps:
        load_original(detector.decoders[i], state, prefix=f"dec{i}.")
    detector.eval()
    with torch.inference_mode():
        likelihoods = [values.double() for values in detector.likelihoods(pyramid)]
        for i, values in enumerate(likelihoods):
            # float32 decoders against float32 decoders: ten times the original's own noise of 2e-6
            np.testing.assert_allclose(values, arrays[f"loglik_per_dim{i}"], rtol=0, atol=2e-5)
        # The paper's normaliser: the maximum over all images that are scored together.
        normal = probability_map(likelihoods, (height, width))
        found = (normal.max() - normal).numpy()
        np.testing.assert_allclose(found, arrays["score_map"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(found.max((1, 2)), arrays["image_score"], rtol=0, atol=1e-5)
        # Ours: a maximum that was learned before; with the same numbers it is the same map, up to a constant.
        detector.log_top_.copy_(torch.tensor([float(arrays[f"testset_max{i}"]) for i in taps]))
        ours = detector.score_maps(pyramid, (height, width)).double().numpy()
    shift = ours - arrays["score_map"]
    np.testing.assert_allclose(shift, shift.mean(), rtol=0, atol=1e-5)


# ---- fastflow_*.npz, csflow.npz, differnet.npz: flows on feature maps and on pooled features ---------------

FASTFLOW = files("fastflow_")


def assert_gradients_like(arrays: dict[str, np.ndarray], ours: dict[str, Any]) -> None:
    wanted = {key.removeprefix("gradnorm."): value for key, value in arrays.items() if key.startswith("gradnorm.")}
    assert wanted and set(wanted) == set(ours)
    for key, value in wanted.items():
        assert ours[key].grad is not None, key
        # The original's own float32 noise times ten; parameters that cancel to nothing are compared absolutely.
        np.testing.assert_allclose(float(ours[key].grad.norm()), float(value), rtol=1e-3, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("name", FASTFLOW)
def test_fastflow_likelihood_gradients_inverse_and_map(name: str) -> None:
    import torch

    from adflow.flows import load_original
    from adflow.methods._flow_maps import likelihood_maps
    from adflow.methods.fastflow import conv_chain, flow_loss

    arrays, state = oracle(name), weights(name)
    taps = sum(key.startswith("feat_in") for key in arrays)
    features = [torch.from_numpy(arrays[f"feat_in{i}"]) for i in range(taps)]
    several = any(key.startswith("nf_flows.") for key in state)
    ours: dict[str, Any] = {}
    latents = []
    for i, x in enumerate(features):
        prefix = f"nf_flows.{i}." if several else ""
        first = {
            int(key.split(".module_list.")[-1].removeprefix("module_list.").split(".")[0]): value
            for key, value in state.items()
            if key.startswith(f"{prefix}module_list.") and key.endswith("subnet.0.weight")
        }
        kernels = "31" if any(weight.shape[-1] == 1 for weight in first.values()) else "3"
        flow = conv_chain(tuple(x.shape[1:]), len(first), kernels=kernels, hidden=hidden_ratio(first.values()))
        load_original(flow, state, prefix=prefix)
        ours |= {f"{prefix}{key}": value for key, value in flow.named_parameters()}
        if f"norms.{i}.weight" in state:
            norm = torch.nn.LayerNorm(x.shape[1:])
            load_original(norm, state, prefix=f"norms.{i}.")
            ours |= {f"norms.{i}.{key}": value for key, value in norm.named_parameters()}
            x = norm(x)
            np.testing.assert_allclose(x.detach(), arrays[f"feat_norm{i}"], atol=1e-5)
        z, logdet = flow(x)
        # Ten times the original's own float32 noise: z relative to its largest, logdet relative 8e-6.
        expected = arrays[f"z{i}"]
        np.testing.assert_allclose(z.detach(), expected, rtol=0, atol=1e-5 * float(np.abs(expected).max()))
        np.testing.assert_allclose(logdet.detach(), arrays[f"logdet{i}"], rtol=1e-4, atol=5e-3)
        back, undone = flow(z.detach(), rev=True)
        np.testing.assert_allclose(back.detach(), x.detach(), atol=1e-4 * float(x.detach().abs().max()))
        np.testing.assert_allclose(undone.detach(), -logdet.detach(), rtol=1e-4, atol=5e-3)
        latents.append((z, logdet))
    loss = flow_loss(latents)
    np.testing.assert_allclose(float(loss.detach()), float(arrays["loss"]), rtol=1e-5)
    loss.backward()
    assert_gradients_like(arrays, ours)
    if "anomaly_map" in arrays:
        maps = likelihood_maps([z.detach() for z, _ in latents], arrays["anomaly_map"].shape[-2:], 0.0)
        np.testing.assert_allclose(maps, arrays["anomaly_map"][:, 0], rtol=0, atol=2e-6)
        np.testing.assert_allclose(maps.flatten(1).amax(1), arrays["image_score"], rtol=0, atol=2e-6)


def test_fastflow_paper_recipe_loads_the_implementations_checkpoint(tiny_backbone: Any) -> None:
    import torch

    from adflow.methods.fastflow import FastFlow

    arrays, state = oracle("fastflow_res"), weights("fastflow_res")
    features = [torch.from_numpy(arrays[key]) for key in sorted(arrays) if key.startswith("feat_in")]
    size = arrays["anomaly_map"].shape[-2:]
    recipe = FastFlow.recipe_for("paper-resnet18")
    settings = {key: value for key, value in recipe.items() if key not in ("backbone", "taps", "size")}
    steps = sum(key.startswith("nf_flows.0.") and key.endswith("global_scale") for key in state)
    first = [value for key, value in state.items() if key.endswith("subnet.0.weight")]
    settings |= {
        "flow_steps": steps,
        "kernels": "31" if any(weight.shape[-1] == 1 for weight in first) else "3",
        "hidden": hidden_ratio(first),
    }
    detector = FastFlow(tiny_backbone, **settings)
    channels, grids = [f.shape[1] for f in features], [tuple(f.shape[2:]) for f in features]
    detector.prepare(channels, grids, size, torch.Generator())
    detector.load_original(state)
    with torch.no_grad():
        maps = detector.score_maps(features, size)
        np.testing.assert_allclose(maps, arrays["anomaly_map"][:, 0], rtol=0, atol=2e-6)
        scores = detector.score_images(features, maps, None)
        np.testing.assert_allclose(scores, arrays["image_score"], rtol=0, atol=2e-6)
        energies = detector.energy_features(features)
    for energy, key in zip(energies, sorted(k for k in arrays if k.startswith("z")), strict=True):
        assert energy.dof == arrays[key].shape[1]
        np.testing.assert_allclose(energy.chi2, np.square(arrays[key]).sum(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", files("csflow"))
def test_csflow_likelihood_gradients_inverse_scores_and_maps(name: str) -> None:
    import torch

    from adflow.imaging import upsample
    from adflow.methods.csflow import CrossScaleFlow, _renamed, cross_scale_loss, mean_energy

    arrays, state = oracle(name), weights(name)
    scales = sum(key.startswith("feat") for key in arrays)
    features = [torch.from_numpy(arrays[f"feat{i}"]) for i in range(scales)]
    blocks = sum(key.startswith("perm_block") for key in arrays) // scales
    orders = [[torch.from_numpy(arrays[f"perm_block{k}_scale{i}"]) for i in range(scales)] for k in range(blocks)]
    nodes = sorted({int(key.split(".")[1]) for key in state})
    first = [state[f"module_list.{node}.s1.conv_scale0_0.weight"] for node in nodes]
    flow = CrossScaleFlow(
        [tuple(f.shape[1:]) for f in features], [w.shape[-1] for w in first], hidden=first[0].shape[0]
    )
    flow.load_original(state, orders)
    found, logdets = flow.local(features)
    # Ten times the original's own float32 noise (z rel 6e-7, logdet rel 3e-7); logdet near 0 absolutely.
    for i, (z, logdet) in enumerate(zip(found, logdets, strict=True)):
        expected = arrays[f"z{i}"]
        np.testing.assert_allclose(z.detach(), expected, rtol=0, atol=1e-5 * float(np.abs(expected).max()))
        np.testing.assert_allclose(logdet.detach().flatten(1).sum(1), arrays[f"logdet{i}"], rtol=1e-5, atol=1e-4)
    loss = cross_scale_loss(list(zip(found, logdets, strict=True)))
    np.testing.assert_allclose(float(loss.detach()), float(arrays["loss"]), rtol=1e-5)
    loss.backward()
    ours = {}
    for node, block in zip(nodes, flow.blocks, strict=True):
        named = dict(block.named_parameters())
        keys = [key for key in state if key.startswith(f"module_list.{node}.")]
        ours |= {key: named[_renamed(key.split(".", 2)[2])] for key in keys}
    assert_gradients_like(arrays, ours)
    total = torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
    np.testing.assert_allclose(float(total), float(arrays["total_gradnorm_before_clip"]), rtol=1e-4)

    latents = [z.detach() for z in found]
    np.testing.assert_allclose(mean_energy(latents), arrays["image_score"], rtol=1e-5)
    grids = [z.square().mean(1) for z in latents]
    for grid, key in zip(grids, ["map_finest", *(f"map_scale{i}" for i in range(1, scales))], strict=True):
        np.testing.assert_allclose(grid, arrays[key], rtol=1e-4, atol=1e-5)
    shown = arrays["map_finest_up_bilinear"]
    enlarged = upsample(grids[0], shown.shape[1:], 0.0).numpy()
    closest = np.abs(enlarged - shown).max(axis=(1, 2)).min()
    assert closest <= 1e-4 * np.abs(shown).max()

    with torch.no_grad():
        back, undone = flow(latents, rev=True)
    for i, (x, f) in enumerate(zip(back, features, strict=True)):
        np.testing.assert_allclose(x, f, rtol=0, atol=1e-4 * float(f.abs().max()))
        # The original's inverse is not one: an error of the size of the features.
        assert np.abs(arrays[f"defective_inverse{i}"] - f.numpy()).max() > 0.1
    expected = -sum(logdet.detach().flatten(1).sum(1) for logdet in logdets)
    np.testing.assert_allclose(undone, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", files("differnet"))
def test_differnet_likelihood_gradients_inverse_scores_and_maps(name: str) -> None:
    import torch
    import torch.nn.functional as F
    from scipy import ndimage

    from adflow.methods._pooled_flow import PooledFlow, pool, pooled_loss
    from adflow.methods.differnet import gradient_map, turn

    arrays, state = oracle(name), weights(name)
    images = torch.from_numpy(arrays["images"]).requires_grad_(True)
    width = arrays["pooled_features"].shape[1]
    orders = [torch.from_numpy(arrays[f"perm_block{k}"]) for k in range(sum("perm_block" in key for key in arrays))]
    hidden = next(value for key, value in state.items() if key.endswith("s1.fc1.weight")).shape[0]
    flow = PooledFlow(width, len(orders), hidden=hidden)
    flow.load_original(state, orders)

    def extractor(x: Any, stride: int) -> Any:
        kernel = state["feature_extractor.features.0.weight"]
        bias = state["feature_extractor.features.0.bias"]
        return F.relu(F.conv2d(x, kernel, bias, stride=stride, padding=kernel.shape[-1] // 2))

    def turned_back(x: Any, degrees: float) -> Any:
        if degrees % 90 == 0:
            return turn(x, -degrees, "zeros")
        # As the original turns maps; images are turned bilinearly.
        return torch.from_numpy(ndimage.rotate(x.numpy(), -degrees, axes=(3, 2), reshape=False, order=3))

    scales = width // state["feature_extractor.features.0.weight"].shape[0]
    side = images.shape[-1]
    seen = [images if k == 0 else F.interpolate(images, size=(side // 2**k, side // 2**k)) for k in range(scales)]
    # The file does not say the stride of its extractor: the right one is that which fits.
    found = [pool([extractor(x, stride) for x in seen]) for stride in (4, 1, 2, 3, 5, 6, 8)]
    y = min(found, key=lambda one: float((one.detach() - torch.from_numpy(arrays["pooled_features"])).abs().max()))
    np.testing.assert_allclose(y.detach(), arrays["pooled_features"], rtol=1e-5, atol=1e-6)
    z, logdet = flow(y)
    # Ten times the original's own float32 noise (z rel 7e-7).
    largest = float(np.abs(arrays["z"]).max())
    np.testing.assert_allclose(z.detach(), arrays["z"], rtol=0, atol=1e-5 * largest)
    np.testing.assert_allclose(logdet.detach(), arrays["logdet"], rtol=1e-5, atol=1e-4)
    loss = pooled_loss(z, logdet)
    np.testing.assert_allclose(float(loss.detach()), float(arrays["loss"]), rtol=1e-5)
    loss.backward()
    nodes = sorted({int(key.split(".")[2]) for key in state if key.startswith("nf.")})
    ours = {
        f"module_list.{node}.{key}": value
        for node, block in zip(nodes, flow.couplings, strict=True)
        for key, value in block.named_parameters()
    }
    assert_gradients_like(arrays, ours)
    with torch.no_grad():
        back, undone = flow(z.detach(), rev=True)
    np.testing.assert_allclose(back, arrays["inverse_of_z"], rtol=0, atol=1e-4 * float(y.detach().abs().max()))
    np.testing.assert_allclose(undone, -logdet.detach(), rtol=1e-4, atol=1e-3)

    labels = arrays["label"]
    copies = len(images) // len(labels)
    scores = z.detach().square().mean(1).reshape(len(labels), copies).mean(1)
    np.testing.assert_allclose(scores, arrays["image_score"], rtol=1e-5)
    gradients = images.grad.reshape(len(labels), copies, *images.shape[1:])
    maps = [
        gradient_map(torch.cat([turned_back(one, 360.0 * k / copies) for k, one in enumerate(g.split(1))]), 3.0)
        for g, label in zip(gradients, labels, strict=True)
        if label
    ]
    for found, expected in zip(maps, arrays["gradient_map_sq_of_anomalous"], strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3 * float(expected.max()))


# ---- dfr_*, pefm_*: features on one grid, autoencoders, losses, gradients, maps --------------------------------------


def assert_norms_like(expected: dict[str, float], ours: dict[str, Any]) -> None:
    """Gradient norms: ten times float32 noise; biases in front of a batch norm have none, absolutely."""
    assert expected and set(expected) == set(ours)
    for key, value in expected.items():
        np.testing.assert_allclose(float(ours[key].grad.norm()), value, rtol=1e-4, atol=2e-6, err_msg=key)


@pytest.mark.parametrize("name", files("dfr_"))
def test_dfr_features_autoencoder_loss_gradients_and_map(name: str, tiny_backbone: Any) -> None:
    import torch
    from torch import nn

    from adflow import _nets
    from adflow.methods._rebuild import components
    from adflow.methods.dfr import DFR, Autoencoder

    arrays, state = oracle(name), weights(name)
    taps = [key.removeprefix("vgg.") for key in arrays if key.startswith("vgg.")]
    layers: list[nn.Module] = []
    for block in range(1, 6):
        for key in sorted(k for k in state if k.startswith(f"vgg.conv{block}_") and k.endswith("weight")):
            conv = nn.Conv2d(state[key].shape[1], state[key].shape[0], 3, padding=1)
            conv.load_state_dict({"weight": state[key], "bias": state[key.replace("weight", "bias")]})
            layers += [conv, nn.ReLU()]
        layers.append(nn.MaxPool2d(2, 2))
    holder = nn.Module()
    holder.features = nn.Sequential(*layers)
    net, order = _nets.vgg_stages(holder, taps)
    assert order == taps
    with torch.no_grad():
        pyramid = net(torch.from_numpy(arrays["image"]))
    # Ten times the noise of the original in float32 (rel 2e-7), by the largest value.
    for tap, found in zip(taps, pyramid, strict=True):
        close(found, arrays[f"vgg.{tap}"], 1e-5)

    size = arrays["image"].shape[2:]
    stride = -(-size[0] // arrays["features"].shape[2])
    matching = []
    # The file does not say its window; the right one is that which fits.
    for window in range(stride, 4 * stride + 1):
        detector = DFR(
            tiny_backbone, net="deep", grid="window", window=window, stride=stride, aligned=True, smooth=0.0,
            image_score="max", margin=0.0,
        )  # fmt: skip
        grids = [(f.shape[2], f.shape[3]) for f in pyramid]
        detector.prepare([f.shape[1] for f in pyramid], grids, size, torch.Generator())
        found = detector.features(pyramid).numpy()
        if np.abs(found - arrays["features"]).max() <= 1e-5 * np.abs(arrays["features"]).max():
            matching.append(detector)
    assert len(matching) == 1
    detector = matching[0]
    x = torch.from_numpy(arrays["features"])
    np.testing.assert_array_equal(x.flatten(2).transpose(1, 2).flatten(0, 1).numpy(), arrays["feature_vectors"])

    net_state = {k.removeprefix("autoencoder."): v for k, v in state.items() if k.startswith("autoencoder.")}
    net = Autoencoder(x.shape[1], net_state["encoder.6.weight"].shape[0])
    net.load_state_dict(net_state)
    rebuilt = net.eval()(x).detach()
    close(rebuilt, arrays["reconstruction_eval"], 1e-5)
    for k, (weight, bias) in enumerate(net.folded()):
        setattr(detector, f"weight_{k}", weight)
        setattr(detector, f"bias_{k}", bias)
    close(detector.score_features(pyramid), arrays["energy"], 1e-5)
    maps = detector.score_maps(pyramid, size)
    close(maps, arrays["score_map"], 1e-5)
    close(detector.score_images(pyramid, maps, None), arrays["image_score"], 1e-5)

    loss = (net.train()(x) - x).square().mean()
    np.testing.assert_allclose(float(loss.detach()), float(arrays["train_loss"]), rtol=1e-5)
    loss.backward()
    norms = {k.removeprefix("train_gradnorm."): float(v) for k, v in arrays.items() if k.startswith("train_gradnorm.")}
    assert_norms_like(norms, dict(net.named_parameters()))

    rows = torch.from_numpy(arrays["feature_vectors"]).double()
    values = torch.linalg.eigvalsh(torch.cov(rows.T)).flip(0)
    assert components(values, 0.9) == int(arrays["pca90_components"])
    ratio = (values / values.sum())[: len(arrays["pca_explained_variance_ratio"])]
    close(ratio, arrays["pca_explained_variance_ratio"], 1e-5)


def close(found: Any, expected: np.ndarray, share: float) -> None:
    """Equal up to ``share`` of the largest expected value."""
    np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=share * float(np.abs(expected).max()))


@pytest.mark.parametrize("name", files("pefm_"))
def test_pefm_maps_loss_gradients_and_scores(name: str, tiny_backbone: Any) -> None:
    import torch

    from adflow.methods.pefm import PEFM, mapping_loss

    arrays, state = oracle(name), weights(name)
    raw = next(one for one in map(oracle, (name, *files("pefm_"))) if "S_raw0" in one)
    scales = sum(key.startswith("S_hat_eval") for key in arrays)
    pyramid = [torch.from_numpy(raw[f"{side}_raw{i}"]) for side in "ST" for i in range(scales)]
    parts = sorted({key.split(".")[0] for key in state})
    latent = tuple(state[f"{part}.shared_coder.conv.0.weight"].shape[0] for part in parts)
    size = arrays["score_map_add"].shape[1:]
    fixed = {"smooth": 0.0, "image_score": "max", "margin": 0.0, "unit_length": True}
    matching = []
    # Only its results say whether the position is an input.
    for position in (True, False):
        detector = PEFM(tiny_backbone, pairs="halves", net="deep", position=position, latent=latent, **fixed)
        grids = [(f.shape[2], f.shape[3]) for f in pyramid]
        detector.prepare([f.shape[1] for f in pyramid], grids, size, torch.Generator())
        for maps, part in zip(detector.maps, parts, strict=True):
            maps.load_state_dict({k.removeprefix(f"{part}."): v for k, v in state.items() if k.startswith(f"{part}.")})
        detector.eval()
        with torch.no_grad():
            first = detector.maps[0](*next(iter(detector.views(pyramid))))[0].numpy()
        if np.abs(first - arrays["S_hat_eval0"]).max() <= 1e-5 * np.abs(arrays["S_hat_eval0"]).max():
            matching.append(detector)
    assert len(matching) == 1
    detector = matching[0]
    # Thirty times the noise of the original in float32 (3e-7), by the largest value.
    with torch.no_grad():
        for i, (maps, pair) in enumerate(zip(detector.maps, detector.views(pyramid), strict=True)):
            to_source, to_target = maps(*pair)
            close(to_source, arrays[f"S_hat_eval{i}"], 1e-5)
            close(to_target, arrays[f"T_hat_eval{i}"], 1e-5)
        for i, grid in enumerate(detector.scale_grids(pyramid)):
            if f"scale_map{i}" in arrays:
                from adflow.imaging import upsample

                close(upsample(grid, size, 0.0), arrays[f"scale_map{i}"], 1e-5)
        for join, key in (("add", "add"), ("multiply", "mul")):
            detector.join = join
            found = detector.score_maps(pyramid, size)
            if f"score_map_{key}" in arrays:
                close(found, arrays[f"score_map_{key}"], 2e-5)  # a product adds up the errors of its factors
            close(detector.score_images(pyramid, found, None), arrays[f"image_score_{key}"], 2e-5)
    detector.train()
    for i, (maps, pair) in enumerate(zip(detector.maps, detector.views(pyramid), strict=True)):
        loss = mapping_loss(maps, *pair)
        np.testing.assert_allclose(float(loss.detach()), float(arrays[f"train_loss{i}"]), rtol=1e-5)
        loss.backward()
        named = dict(maps.named_parameters())
        assert_norms_like(dict(zip(named, arrays[f"train_gradnorm{i}"].tolist(), strict=True)), named)
