"""Parity with the original implementations, on arrays they produced.

The folder is read from ``ADFLOW_ORACLES`` (default ``../shared/oracles``); where it is absent every test here is
skipped, visibly. Cases, shapes and parameters are taken from the files, so that the same tests run on another set.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(os.environ.get("ADFLOW_ORACLES", Path(__file__).parents[2] / "shared" / "oracles"))


def oracle(name: str) -> dict[str, np.ndarray]:
    """Return all arrays of ``name``.npz, or skip the test when the file is not here."""
    path = FOLDER / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"no oracle file {path}; set ADFLOW_ORACLES to a folder that holds it")
    with np.load(path) as arrays:
        return {key: arrays[key] for key in arrays.files}


def weights(name: str) -> dict[str, "object"]:
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
    assert best.threshold == arrays[f"{case}_miou_oracle_threshold"]
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

UFLOW = sorted(path.stem for path in FOLDER.glob("uflow_*.npz")) or ["uflow"]


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
    flow = u_graph([tuple(f.shape[1:]) for f in features], flow_steps=couplings // scales)
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
        np.testing.assert_allclose(
            z[i].detach(), arrays[f"z{i}"], atol=1e-5 * float(np.abs(arrays[f"z{i}"]).max())
        )
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
    from adflow import nfa

    arrays = oracle(name)
    latents = [arrays[key] for key in sorted(arrays) if key.startswith("z") and key[1:].isdigit()]
    expected = arrays["nfa_tree_score64"][:, 0]
    found = nfa.tree(nfa.latent_energies(latents), expected.shape[-2:], bound="reference")
    # A level that flips in the last digit of float32 can move a whole small region; everything else is bit-close.
    assert (np.abs(found - expected) <= 0.05 + 1e-5 * np.abs(expected)).mean() > 0.99
