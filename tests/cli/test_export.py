"""``adflow export`` and the commands that take a bundle."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from adflow import fetch, zoo
from adflow._files import sha256_of
from adflow.bundle import load_bundle, open_model
from adflow.data import Sample
from adflow.detector_file import load_detector, read_header
from adflow.imaging import fit_to
from adflow.tasks import export as task
from adflow.tasks._about import licence_of
from adflow.tasks._proof import default_samples, remember

from .conftest import Call, Result, write_part

PACKAGES = {"onnx": ("onnx", "onnxruntime", "onnxscript"), "openvino": ("onnx", "onnxscript", "openvino")}
MISSING = {kind: [name for name in names if find_spec(name) is None] for kind, names in PACKAGES.items()}
ONNX = pytest.mark.skipif(bool(MISSING["onnx"]), reason="needs adflow[onnx]")
OPENVINO = pytest.mark.skipif(bool(MISSING["openvino"]), reason="needs adflow[openvino]")
KINDS = [
    pytest.param("onnx", marks=ONNX),
    pytest.param("openvino", marks=OPENVINO),
    "torchscript",
    "torch",
]


def made(folder: Path, parts: Path, runs: Path, *more: object) -> Path:
    from adflow import cli

    arguments = ["export", "--runs", runs, "--images", parts / "test", "--out", folder, "-q", *more]
    with contextlib.redirect_stdout(io.StringIO()):  # a test reads what its own call says
        assert cli.run([str(a) for a in arguments]) == 0
    return folder


@pytest.fixture(scope="session")
def bundle(parts: Path, runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX bundle of the fitted run."""
    return made(tmp_path_factory.mktemp("bundles") / "onnx", parts, runs, "--format", "onnx")


@pytest.fixture(scope="session")
def any_bundle(parts: Path, runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX bundle that takes any number of images of any size."""
    folder = tmp_path_factory.mktemp("bundles") / "any"
    return made(folder, parts, runs, "--format", "onnx", "--dynamic", "batch,size")


@ONNX
def test_the_certificate_proves_equality(bundle: Path, parts: Path) -> None:
    found = json.loads((bundle / "certificate.json").read_text())
    assert found["images"] == 12 and found["verdicts_equal"] == 12 and found["mask_iou"] > 0.99
    assert 0 <= found["map_max_difference"] <= 1e-4 * found["map_range"]
    assert len(found["model_sha256"]) == len(found["detector_sha256"]) == 64
    assert {p.name for p in bundle.iterdir()} == {
        "model.onnx", "metadata.json", "calibration.npz", "certificate.json", "predict.py", "LICENCES.txt",
        "README.md",
    }  # fmt: skip
    assert [p for p in bundle.parent.iterdir() if p != bundle] == []
    about = json.loads((bundle / "metadata.json").read_text())
    assert all(str(parts.parent) not in path.read_text() for path in bundle.glob("*.json"))
    assert about["thresholds"]["image"] is not None and about["licences"]["training data"]["name"] == "unknown"
    assert "training data: unknown" in (bundle / "LICENCES.txt").read_text()
    text = (bundle / "README.md").read_text()
    assert "Method padim, fitted on good images of my parts" in text and "adflow[onnx]" in text
    assert all(f"| {path.name} |" in text for path in bundle.iterdir() if path.name != "README.md")


def test_the_default_proof_is_on_the_held_out_images_and_defective_ones(
    parts: Path, runs: Path, tmp_path: Path, call: Call
) -> None:
    done = call("export", "--runs", runs, "-f", "torchscript", "--count", 5, "--out", tmp_path / "x", "--json")
    assert done.code == 0 and "(good images held out in the fit" in " ".join(done.err.split())
    assert "    pip install adflow\n" in (tmp_path / "x" / "README.md").read_text()
    found = json.loads((tmp_path / "x" / "certificate.json").read_text())
    assert "held out in the fit" in found["source"] and "test images of my parts" in found["source"]
    (source,) = runs.glob("*/detector.safetensors")
    held = read_header(source)["provenance"]["held_out_images"]["files"]
    assert len(held) == 8 and all((parts / name).is_file() and name.startswith("train/good/") for name in held)
    bad = {sha256_of(path) for path in (parts / "test" / "spot").glob("*.png")}
    kinds = [sha in held.values() for sha in found["images_sha256"]]
    assert kinds == [True, False, True, False, True] and set(found["images_sha256"]) <= {*held.values(), *bad}


@pytest.mark.usefixtures("own_home")
def test_held_out_images_are_known_by_their_content_wherever_the_data_lie_now(parts: Path, tmp_path: Path) -> None:
    good = sorted((parts / "train" / "good").glob("*.png"))
    known = remember([Sample(path, "train", 0, None, None) for path in good], parts)
    assert len(known["files"]) == 32
    known["folder"] = str(tmp_path / "gone")
    moved = shutil.copytree(parts, tmp_path / "mvtec" / "parts")
    first = next(iter(known["files"]))
    (moved / first).write_bytes((moved / "test/good/000.png").read_bytes())
    made = {"data": "mvtec/parts", "held_out_images": known}
    samples, source = default_samples(100, made, tmp_path)
    assert "held out" in source and "test images of mvtec/parts" in source
    again = {str(s.image.relative_to(moved)) for s in samples if s.split == "train"}
    assert again == set(known["files"]) - {first} and sum(bool(s.label) for s in samples) == 6
    (moved / first).write_bytes(b"no picture")
    known["files"][first] = sha256_of(moved / first)  # as a fit would remember what it could not read
    samples, _ = default_samples(100, made, tmp_path)
    assert {str(s.image.relative_to(moved)) for s in samples if s.split == "train"} == again
    # Without them: what the data set has; without that, and with detectors that remember none: the demo, said aloud.
    shutil.rmtree(moved / "train" / "good")
    write_part(moved / "train" / "good", 2, np.random.default_rng(9))
    samples, source = default_samples(6, made, tmp_path)
    assert source == "test images of mvtec/parts" and [s.label for s in samples] == [0, 1] * 3
    for made in ({"data": "mvtec/nothing"}, {"data": "parts"}, {}):
        samples, source = default_samples(4, made, tmp_path)
        assert len(samples) == 4 and source.startswith("test images of demo/brick, as neither")


def within(bundle: Path) -> float:
    """Return what the certificate allows: float32 kernels add in another order, nearly singular maps enlarge it."""
    return float(1e-4 * json.loads((bundle / "certificate.json").read_text())["map_range"])


def rows(done: Result) -> list[dict[str, Any]]:
    assert done.code == 0, done.err
    found: list[dict[str, Any]] = done.json()["rows"]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_score_segment_and_evaluate_take_a_bundle(
    kind: str, parts: Path, runs: Path, tmp_path: Path, call: Call
) -> None:
    bundle = made(tmp_path / kind, parts, runs, "--format", kind, "--count", 3)
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
@pytest.mark.parametrize("which", ["bundle", "any_bundle"])
def test_predict_needs_neither_torch_nor_adflow_and_gives_the_verdicts(
    which: str, request: pytest.FixtureRequest, parts: Path, runs: Path, tmp_path: Path, call: Call
) -> None:
    bundle = request.getfixturevalue(which)
    copied = shutil.copytree(bundle, tmp_path / "elsewhere")
    images = sorted(str(p) for p in (parts / "test").rglob("*.png"))
    bad = [tmp_path / name for name in ("cut.png", "deep.png", "none.png")]
    bad[0].write_bytes(Path(images[0]).read_bytes()[:500])
    Image.fromarray(np.full((80, 96), 40000, np.uint16)).save(bad[1])
    code = (
        "import sys, runpy; sys.modules.update(torch=None, adflow=None, skimage=None, scipy=None); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(copied / "predict.py"), *map(str, bad), *images],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and [line.partition(": left out: ")[0] for line in done.stderr.splitlines()] == [
        str(path) for path in bad
    ], done.stderr
    said = {row["image"]: row for row in map(json.loads, done.stdout.splitlines())}
    ours = rows(call("score", parts / "test", "--runs", runs, "--out", tmp_path / "a", "--json"))
    assert len(ours) == 12 and {r["verdict"] for r in ours} == {"good", "defect"}
    for row in ours:
        assert said[row["image"]]["verdict"] == row["verdict"]
        assert said[row["image"]]["score"] == pytest.approx(row["score"], abs=within(bundle))


@ONNX
def test_one_file_takes_any_batch_and_any_size(any_bundle: Path, parts: Path, runs: Path) -> None:
    """Pictures as a camera gives them, of two sizes, alone and together, against Pillow's resize and the detector."""
    found = json.loads((any_bundle / "certificate.json").read_text())
    assert found["batch_max_difference"] == 0 and found["size_max_difference"] <= within(any_bundle)
    (source,) = runs.glob("*/detector.safetensors")
    detector, run = load_detector(source), open_model(any_bundle / "model.onnx", "onnx", "any")
    pictures = [Image.open(path).convert("RGB") for path in sorted((parts / "test" / "spot").glob("*.png"))[:3]]
    for size in ((96, 80), (57, 130), (64, 64)):
        batch = np.stack([np.asarray(picture.resize(size)) for picture in pictures])
        together = run(batch)
        for i, picture in enumerate(batch):
            alone = run(batch[i : i + 1])
            assert all(np.array_equal(whole[i], one[0]) for whole, one in zip(together, alone, strict=True))
            expected = detector.score(torch.from_numpy(fit_to(picture, (64, 64))[0])[None])
            assert np.abs(together[0][i] - expected.map[0].numpy()).max() <= within(any_bundle)
            assert together[1][i] == pytest.approx(float(expected.image[0]), abs=within(any_bundle))


@pytest.mark.parametrize("kind", KINDS)
def test_a_letterboxed_detector_is_exported_with_its_letterbox(
    kind: str, boxed: Path, parts: Path, tmp_path: Path, call: Call
) -> None:
    done = call("export", "--runs", boxed, "-f", kind, "--images", parts / "test", "--out", tmp_path / "x")
    assert done.code == 3 and "--dynamic size" in done.err
    # Its images are wider than high; the certificate turns to another shape by itself.
    bundle = made(tmp_path / "b", parts, boxed, "-f", kind, "--dynamic", "size", "--count", 3)
    found = json.loads((bundle / "certificate.json").read_text())
    assert found["size_max_difference"] <= within(bundle) and found["verdicts_equal"] == 3
    mask = load_bundle(bundle).run(np.full((1, 40, 90, 3), 255, np.uint8))[3][0]
    assert mask[20:40].any() and not mask[:17].any() and not mask[47:].any()
    ours = rows(call("score", parts / "test", "--runs", boxed, "--out", tmp_path / "a", "--json"))
    theirs = rows(call("score", parts / "test", "--model", bundle, "--out", tmp_path / "c", "--json"))
    for a, b in zip(ours, theirs, strict=True):
        assert a["verdict"] == b["verdict"] and a["score"] == pytest.approx(b["score"], abs=within(bundle))


@pytest.fixture(scope="session")
def boxed(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs that holds a detector fitted on letterboxed images."""
    from adflow import cli

    folder = tmp_path_factory.mktemp("boxed")
    arguments = ["fit", parts, "-m", "padim", "--size", "64", "--keep-aspect", "--runs", folder, "-q"]
    assert cli.run([str(a) for a in arguments]) == 0
    return folder


@pytest.mark.parametrize("kind", [pytest.param("onnx", marks=ONNX), "torchscript", "torch"])
def test_a_method_that_takes_gradients_to_score_exports(kind: str, parts: Path, turned: Path, tmp_path: Path) -> None:
    bundle = made(tmp_path / "x", parts, turned, "-f", kind, "--count", 2)
    assert json.loads((bundle / "certificate.json").read_text())["verdicts_equal"] == 2


@pytest.fixture(scope="session")
def turned(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs that holds a small DifferNet: the backward pass of its flow gives its maps."""
    from adflow import cli

    folder = tmp_path_factory.mktemp("turned")
    settings = ["--set", "transforms=2", "--set", "epochs=1", "--size", "64", "--runs", folder, "-q"]
    assert cli.run([str(a) for a in ("fit", parts, "-m", "differnet", *settings)]) == 0
    return folder


@ONNX
def test_images_of_more_bits_need_a_bundle_for_them(
    bundle: Path, parts: Path, runs: Path, tmp_path: Path, call: Call
) -> None:
    deep = tmp_path / "deep.png"
    levels = np.arange(80 * 96, dtype=np.uint16).reshape(80, 96) * 8
    Image.fromarray(levels).save(deep)
    done = call("score", deep, "--model", bundle, "--out", tmp_path / "a")
    assert done.code == 3 and "--input float" in done.err
    more = ("-f", "onnx", "--input", "float", "--images", deep, "--dynamic", "size")
    floats = made(tmp_path / "f", parts, runs, *more)
    ours = rows(call("score", deep, "--runs", runs, "--out", tmp_path / "b", "--json"))
    theirs = rows(call("score", deep, "--model", floats, "--out", tmp_path / "c", "--json"))
    assert theirs[0]["score"] == pytest.approx(ours[0]["score"], abs=within(floats))


@pytest.mark.parametrize("kind", KINDS)
def test_half_stores_less_and_says_what_it_may_cost(
    kind: str, parts: Path, runs: Path, tmp_path: Path, call: Call
) -> None:
    sizes = []
    for more in ((), ("--half",)):
        done = call(
            "export", "--runs", runs, "-f", kind, "--images", parts / "test", "--count", 2, *more,
            "--out", tmp_path / f"x{len(sizes)}", "--json",
        )  # fmt: skip
        assert done.code == 0, done.err
        sizes.append(done.json()["bytes"])
        assert done.json()["tolerance"] == (2e-2 if more else 1e-4)
    assert sizes[1] < 0.6 * sizes[0]
    done = call("export", "--runs", runs, "-f", kind, "--half", "--tolerance", "1e-6", "--out", tmp_path / "y")
    assert done.code == 6 and "not equal" in done.err and not (tmp_path / "y").exists()


def spoilt(which: int, factor: float) -> Callable[..., None]:
    """Return a writer of ONNX programs that multiplies the weights of one convolution afterwards."""
    write = task.write_program

    def broken(detector: Any, levels: Any, form: Any, folder: Path, ranges: Any) -> None:
        import onnx
        from onnx import numpy_helper

        write(detector, levels, form, folder, ranges)
        model = onnx.load(str(folder / "model.onnx"))
        weights = [t for t in model.graph.initializer if len(t.dims) == 4 and t.data_type == onnx.TensorProto.FLOAT]
        array = numpy_helper.to_array(weights[which]) * np.float32(factor)
        weights[which].CopyFrom(numpy_helper.from_array(array, weights[which].name))
        (folder / "model.onnx").write_bytes(model.SerializeToString())

    return broken


@ONNX
def test_int8_is_measured_on_given_data_and_refused_beyond_the_allowed_loss(
    parts: Path, runs: Path, tmp_path: Path, call: Call
) -> None:
    start = ("export", "--runs", runs, "-f", "onnx", "--int8")
    done = call(*start, "--out", tmp_path / "x")
    assert done.code == 2 and "--images" in done.err
    done = call(*start, "--images", parts, "--max-drop", "1", "--out", tmp_path / "x", "--json")
    assert done.code == 0, done.err
    found = done.json()
    assert found["tolerance"] is None and found["images"] == 12
    assert found["accuracy"]["image_auroc"][0] == 1.0 and set(found["accuracy"]) >= {"pixel_auroc", "drop"}
    # 0.04 here: something was rounded, but nothing that ruins the features.
    assert 1e-3 < found["map_max_difference"] / found["map_range"] < 0.1
    import onnx

    model = onnx.load(str(tmp_path / "x" / "model.onnx"))
    made = {name: node.op_type for node in model.graph.node for name in node.output}
    kinds = [made.get(node.input[1], "float") for node in model.graph.node if node.op_type == "Conv"]
    assert kinds == ["float"] * 15 + ["DequantizeLinear"] * 18
    # The finest features are made in float32, and no activation stands between a rounded convolution and its range.
    assert sum(node.op_type == "Clip" for node in model.graph.node) == 10
    assert call(*start, "--half", "--images", parts, "--out", tmp_path / "y").code == 2


@ONNX
def test_an_8_bit_export_that_loses_accuracy_is_removed(
    parts: Path, runs: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task, "write_program", spoilt(0, 0.0))  # it does not see the image any more
    done = call("export", "--runs", runs, "-f", "onnx", "--int8", "--images", parts, "--out", tmp_path / "x")
    assert done.code == 6 and "AUROC fell from" in done.err and "allowed is 0.01" in " ".join(done.err.split())
    assert list(tmp_path.iterdir()) == []


def test_a_loss_of_accuracy_is_refused() -> None:
    from adflow.errors import GateError
    from adflow.tasks._certificate import _accuracy

    samples = [Sample(Path(f"{i}.png"), "test", i % 2, None, None) for i in range(4)]
    scores = np.array([0.0, 2.0, 1.0, 3.0]), np.array([0.0, 2.0, 2.5, 3.0])
    maps = np.zeros((4, 2, 2)), np.zeros((4, 2, 2))
    detector: Any = None
    found = _accuracy(detector, samples, scores, maps, 0.25)
    assert found["image_auroc"] == [1.0, 0.75] and found["drop"] == 0.25
    with pytest.raises(GateError, match=r"image AUROC fell from 1.0000 to 0.7500"):
        _accuracy(detector, samples, scores, maps, 0.2)


@ONNX
@pytest.mark.parametrize("opset", [16, 20])
def test_any_opset_that_torch_writes(opset: int, parts: Path, runs: Path, tmp_path: Path) -> None:
    import onnx

    bundle = made(tmp_path / "x", parts, runs, "-f", "onnx", "--opset", opset, "--count", 1)
    assert onnx.load(str(bundle / "model.onnx")).opset_import[0].version == opset


@ONNX
def test_a_broken_export_is_refused_and_the_place_named(
    parts: Path, runs: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The last convolution of the backbone but one.
    monkeypatch.setattr(task, "write_program", spoilt(-2, 1.1))
    done = call(
        "export", "--runs", runs, "--format", "onnx", "--images", parts / "test", "--count", 2, "--bisect",
        "--out", tmp_path / "x",
    )  # fmt: skip
    assert done.code == 6, done.err
    said = " ".join(done.err.split())
    # Which layers of the block can be compared depends on what the processor fuses.
    assert "not equal and was removed" in said and "begins at backbone.net.stages.4.2." in said
    assert "backbone.net.stages.4.2." in said.partition("of its range); ")[2]
    assert list(tmp_path.iterdir()) == []


@ONNX
def test_a_changed_model_is_refused(bundle: Path, parts: Path, tmp_path: Path, call: Call) -> None:
    copied = shutil.copytree(bundle, tmp_path / "b")
    with (copied / "model.onnx").open("ab") as stream:
        stream.write(b"x")
    done = call("score", parts / "test", "--model", copied)
    assert done.code == 3 and "certified" in done.err


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_without_the_packages_there_is_the_pip_line(
    kind: str, runs: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adflow.bundle.find_spec", lambda name: None)
    done = call("export", "--runs", runs, "--format", kind, "--out", tmp_path / "x")
    assert done.code == 4 and f"pip install 'adflow[{kind}]'" in done.err and not (tmp_path / "x").exists()


def test_what_a_format_cannot_hold_is_said(runs: Path, tmp_path: Path, call: Call) -> None:
    done = call("export", "--runs", runs, "--format", "torch", "--dynamic", "batch", "--out", tmp_path / "x")
    assert done.code == 4 and "--format onnx" in done.err and not (tmp_path / "x").exists()


def test_a_copy_scores_the_same(runs: Path, tmp_path: Path, call: Call) -> None:
    done = call("export", "--runs", runs, "--to", tmp_path / "mine.safetensors", "--json")
    assert done.code == 0, done.err
    (source,) = runs.glob("*/detector.safetensors")
    assert (tmp_path / "mine.safetensors").read_bytes() == source.read_bytes()
    for target in (tmp_path / "other.safetensors", "hub:me/parts"):
        other = call("export", "--runs", runs, "--to", target, "--weights", tmp_path / "none.pth")
        assert other.code == 3 and "none.pth" in other.err


def test_the_licence_is_that_of_the_training_data() -> None:
    names = [licence_of(data)["name"] for data in ("demo/brick", "demolition", "mvtec/screw", "my parts")]
    assert names == ["CC0 1.0", "unknown", zoo.load().datasets["mvtec"].licence.name, "unknown"]


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
    assert "did you mean 'size'" in call("export", "--runs", runs, "-f", "torch", "--dynamic", "sizes").err
    assert call("export", "--runs", runs, "-f", "torch", "--input", "int").code == 2
    assert call("export", "--runs", runs, "-f", "torch", "--opset", "9").code == 2
    (tmp_path / "x").mkdir()
    done = call("export", "--runs", runs, "--format", "torchscript", "--out", tmp_path / "x")
    assert done.code == 3 and "no bundle" in done.err
