"""``adflow export`` and the commands that take a bundle."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adflow import fetch
from adflow.tasks import export as task

from .conftest import Call, Result

ONNX = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxscript")), reason="needs adflow[onnx]"
)


@pytest.fixture(scope="session")
def bundle(parts: Path, runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX bundle of the fitted run."""
    from adflow import cli

    folder = tmp_path_factory.mktemp("bundles") / "onnx"
    arguments = ["export", "--runs", runs, "--format", "onnx", "--images", parts / "test", "--out", folder, "-q"]
    assert cli.run([str(a) for a in arguments]) == 0
    return folder


@ONNX
def test_the_certificate_proves_equality(bundle: Path) -> None:
    found = json.loads((bundle / "certificate.json").read_text())
    assert found["images"] == 12 and found["verdicts_equal"] == 12 and found["mask_iou"] > 0.99
    assert 0 <= found["map_max_difference"] <= 1e-4 * found["map_range"]
    assert len(found["model_sha256"]) == len(found["detector_sha256"]) == 64
    assert {p.name for p in bundle.iterdir()} == {
        "model.onnx", "metadata.json", "calibration.npz", "certificate.json", "predict.py"
    }  # fmt: skip
    assert [p for p in bundle.parent.iterdir() if p != bundle] == []
    about = json.loads((bundle / "metadata.json").read_text())
    assert about["thresholds"]["image"] is not None and about["licences"]["training data"]["name"] == "unknown"


def within(bundle: Path) -> float:
    """Return what the certificate allows: float32 kernels add in another order, nearly singular maps enlarge it."""
    return float(1e-4 * json.loads((bundle / "certificate.json").read_text())["map_range"])


def rows(done: Result) -> list[dict[str, Any]]:
    assert done.code == 0, done.err
    found: list[dict[str, Any]] = done.json()["rows"]
    return found


@ONNX
def test_score_segment_and_evaluate_take_a_bundle(
    bundle: Path, parts: Path, runs: Path, tmp_path: Path, call: Call
) -> None:
    ours = rows(call("score", parts / "test", "--runs", runs, "--out", tmp_path / "a", "--json"))
    theirs = rows(call("score", parts / "test", "--model", bundle, "--out", tmp_path / "b", "--json"))
    for a, b in zip(ours, theirs, strict=True):
        assert a["verdict"] == b["verdict"] and a["p_value"] == b["p_value"]
        assert a["score"] == pytest.approx(b["score"], abs=within(bundle))
    found = [
        call("segment", parts, "--nfa", "1", "--no-overlays", *more, "--out", tmp_path / name, "--json").json()
        for name, more in (("c", ("--runs", runs)), ("d", ("--model", bundle)))
    ]
    assert [r["area"] for r in found[0]["images"]] == [r["area"] for r in found[1]["images"]]
    done = call("evaluate", parts, "--model", bundle, "--out", tmp_path / "e", "--no-report", "--json")
    assert done.code == 0, done.err
    assert done.json()["rows"][0]["method"] == "padim" and done.json()["rows"][0]["image_auroc"] > 0.9


@ONNX
def test_predict_needs_neither_torch_nor_adflow_and_gives_the_verdicts(
    bundle: Path, parts: Path, runs: Path, tmp_path: Path, call: Call
) -> None:
    copied = shutil.copytree(bundle, tmp_path / "elsewhere")
    images = sorted(str(p) for p in (parts / "test").rglob("*.png"))
    code = (
        "import sys, runpy; sys.modules.update(torch=None, adflow=None, skimage=None, scipy=None); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(copied / "predict.py"), *images], check=True, capture_output=True, text=True
    )
    said = {row["image"]: row for row in map(json.loads, done.stdout.splitlines())}
    ours = rows(call("score", parts / "test", "--runs", runs, "--out", tmp_path / "a", "--json"))
    assert len(ours) == 12 and {r["verdict"] for r in ours} == {"good", "defect"}
    for row in ours:
        assert said[row["image"]]["verdict"] == row["verdict"]
        assert said[row["image"]]["score"] == pytest.approx(row["score"], abs=within(bundle))


@ONNX
def test_any_batch_gives_what_each_image_gives(bundle: Path) -> None:
    from adflow.bundle import open_model

    run = open_model(bundle / "model.onnx", "onnx")
    images = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3)).astype(np.float32)
    together, single = run(images), [run(images[i : i + 1]) for i in range(5)]
    for k, whole in enumerate(together):
        np.testing.assert_array_equal(whole, np.concatenate([one[k] for one in single]))


@ONNX
def test_a_broken_export_is_refused_and_the_place_named(
    parts: Path, runs: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx
    from onnx import numpy_helper

    write = task.write_program

    def broken(detector: Any, levels: Any, kind: str, path: Path) -> None:
        write(detector, levels, kind, path)
        model = onnx.load(str(path))
        body = next(a for a in model.graph.node[0].attribute if a.name == "body").g
        # A convolution that only the last tap sees: the second one from the end.
        weights = [t for t in body.initializer if len(t.dims) == 4]
        array = numpy_helper.to_array(weights[-2]).copy()
        array *= 1.1
        weights[-2].CopyFrom(numpy_helper.from_array(array, weights[-2].name))
        path.write_bytes(model.SerializeToString())

    monkeypatch.setattr(task, "write_program", broken)
    done = call(
        "export", "--runs", runs, "--format", "onnx", "--images", parts / "test", "--count", 2, "--bisect",
        "--out", tmp_path / "x",
    )  # fmt: skip
    assert done.code == 6, done.err
    assert "not equal and was removed" in done.err and "begins at backbone b4" in done.err
    assert "backbone b3 is still equal" in done.err
    assert list(tmp_path.iterdir()) == []


@ONNX
def test_a_changed_model_is_refused(bundle: Path, parts: Path, tmp_path: Path, call: Call) -> None:
    copied = shutil.copytree(bundle, tmp_path / "b")
    with (copied / "model.onnx").open("ab") as stream:
        stream.write(b"x")
    done = call("score", parts / "test", "--model", copied)
    assert done.code == 3 and "certified" in done.err


@pytest.mark.parametrize("kind", ["torchscript"])
def test_torch_formats_are_equal_too(kind: str, parts: Path, runs: Path, tmp_path: Path, call: Call) -> None:
    out = tmp_path / kind
    done = call("export", "--runs", runs, "-f", kind, "--images", parts / "test", "--count", 3, "--out", out, "--json")
    assert done.code == 0, done.err
    assert done.json()["map_max_difference"] <= 1e-4 * done.json()["map_range"]
    scored = rows(call("score", parts / "test" / "good", "--model", out, "--out", tmp_path / "s", "--json"))
    assert len(scored) == 6 and all(row["error"] is None for row in scored)


def test_without_the_packages_there_is_the_pip_line(
    runs: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adflow.bundle.find_spec", lambda name: None)
    done = call("export", "--runs", runs, "--format", "onnx", "--images", tmp_path, "--out", tmp_path / "x")
    assert done.code in (3, 4)
    done = call("export", "--runs", runs, "--format", "onnx", "--out", tmp_path / "x")
    assert done.code == 4 and "pip install 'adflow[onnx]'" in done.err and not (tmp_path / "x").exists()


def test_a_copy_scores_the_same(runs: Path, tmp_path: Path, call: Call) -> None:
    done = call("export", "--runs", runs, "--to", tmp_path / "mine.safetensors", "--json")
    assert done.code == 0, done.err
    (source,) = runs.glob("*/detector.safetensors")
    assert (tmp_path / "mine.safetensors").read_bytes() == source.read_bytes()


def test_the_hub_gets_detector_and_card_with_measured_figures(
    parts: Path, runs: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call("evaluate", parts, "--runs", runs, "--no-report").code == 0
    sent: dict[str, Any] = {}

    def push(file: Path, repo: str, card: str, *, token: str | None = None, private: bool = False) -> str:
        sent.update(file=file, repo=repo, card=card)
        return "c" * 40

    monkeypatch.setattr(task, "push_detector", push)
    done = call("export", "--runs", runs, "--to", "hub:me/parts", "--json")
    assert done.code == 0, done.err
    assert done.json()["commit"] == "c" * 40 and sent["repo"] == "me/parts"
    assert "image AUROC" in sent["card"] and "model-index" in sent["card"] and "unknown" in sent["card"]
    assert str(parts) not in sent["card"].partition("## Provenance")[2]


def test_the_hub_is_refused_without_a_token_in_one_line(
    runs: Path, call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr(fetch, "offline", lambda flag=False: False)
    done = call("export", "--runs", runs, "--to", "hub:me/parts")
    assert done.code == 4 and "needs a token" in done.err and "Traceback" not in done.err


def test_contradicting_options_are_refused(runs: Path, tmp_path: Path, call: Call) -> None:
    assert call("export", "--runs", runs).code == 2
    assert "did you mean 'onnx'" in call("export", "--runs", runs, "--format", "onxn").err
    (tmp_path / "x").mkdir()
    done = call("export", "--runs", runs, "--format", "torchscript", "--out", tmp_path / "x")
    assert done.code == 3 and "no bundle" in done.err
