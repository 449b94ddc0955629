"""Laws that every method obeys, on a tiny random backbone, in seconds. A new method is tested with no edit here."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from adflow import methods
from adflow._clock import counting
from adflow.backbones import Backbone
from adflow.bundle import MODELS, open_model
from adflow.detector import Detector, FeatureDetector
from adflow.detector_file import load_detector, save_detector
from adflow.errors import AdflowError, InputError, UsageError
from adflow.imaging import Box
from adflow.tasks._null import GaussianNull
from adflow.tasks._program import Form, Thresholds, write_program

NAMES = methods.names()
SIZE = (64, 64)


def good_images(count: int, size: tuple[int, int] = SIZE, seed: int = 0) -> torch.Tensor:
    """Smooth stripes with a little noise: every image differs, all look alike."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.linspace(0, 6.28, size[0])[:, None]
    x = torch.linspace(0, 6.28, size[1])[None, :]
    phase = torch.rand(count, 3, 1, 1, generator=generator) * 0.4
    images = 0.5 + 0.25 * torch.sin(2 * x + phase) + 0.15 * torch.cos(3 * y + phase)
    return (images + 0.02 * torch.randn(count, 3, *size, generator=generator)).clamp(0, 1)


def with_defect(images: torch.Tensor) -> torch.Tensor:
    """A bright checkered patch that no good image has."""
    bad = images.clone()
    h, w = images.shape[2] // 4, images.shape[3] // 4
    board = (torch.arange(h)[:, None] + torch.arange(w)[None, :]) % 2
    bad[:, :, h : 2 * h, w : 2 * w] = board.float()
    return bad


def make(name: str, backbone: Backbone) -> Detector:
    cls = methods.get(name)
    recipe = cls.recipe_for("tiny" if "tiny" in cls.recipes else "fast")
    settings = {k: v for k, v in recipe.items() if k not in ("backbone", "taps", "size", "keep_aspect")}
    return cls(backbone, **settings)


@pytest.fixture(scope="module")
def fitted(tiny_backbone: Backbone) -> dict[str, Detector]:
    """Every method fitted once on the same good images."""
    return {name: make(name, tiny_backbone).fit(good_images(12), seed=3) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_score_is_a_function_of_one_image(name: str, fitted: dict[str, Detector]) -> None:
    images = torch.cat([good_images(3, seed=1), with_defect(good_images(1, seed=2))])
    together = fitted[name].score(images)
    assert together.map.shape == (4, *SIZE) and together.image.shape == (4,)
    for i in range(4):
        alone = fitted[name].score(images[i : i + 1])
        assert torch.equal(alone.map[0], together.map[i]) and torch.equal(alone.image[0], together.image[i])
    turned = fitted[name].score(images.flip(0))
    assert torch.equal(turned.map.flip(0), together.map) and torch.equal(turned.image.flip(0), together.image)


@pytest.mark.parametrize("name", NAMES)
def test_scoring_changes_no_state_and_no_generator(name: str, fitted: dict[str, Detector]) -> None:
    detector = fitted[name]
    before = {k: v.clone() for k, v in detector.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    numpy_state = np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
    detector.score(good_images(2))
    assert torch.equal(torch.rand(3), expected)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # type: ignore[arg-type]
    after = detector.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before) and not detector.training


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_bits_and_refit_forgets(name: str, tiny_backbone: Backbone, fitted: dict[str, Detector]) -> None:
    other = make(name, tiny_backbone).fit(good_images(10, seed=9), seed=1)
    other.fit(good_images(12), seed=3)
    first, second = fitted[name].learned(), other.learned()
    assert set(first) == set(second)
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("name", NAMES)
def test_fit_leaves_the_backbone_alone(name: str, tiny_backbone: Backbone) -> None:
    before = {k: v.clone() for k, v in tiny_backbone.state_dict().items()}
    make(name, tiny_backbone).fit(good_images(8), seed=0)
    after = tiny_backbone.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not any(p.requires_grad for p in tiny_backbone.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_planted_defect_scores_higher(name: str, fitted: dict[str, Detector]) -> None:
    good = good_images(6, seed=4)
    scores_good, scores_bad = fitted[name].score(good).image, fitted[name].score(with_defect(good)).image
    assert (scores_bad > scores_good).all(), (scores_good, scores_bad)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["onnx", "torchscript"])
def test_an_export_gives_the_same_scores(kind: str, name: str, fitted: dict[str, Detector], tmp_path: Path) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxruntime", reason="needs adflow[onnx]")
        pytest.importorskip("onnxscript", reason="needs adflow[onnx]")
    detector = fitted[name]
    write_program(detector, Thresholds(), Form(kind, pixels="float"), tmp_path)
    images = torch.cat([good_images(1, seed=6), with_defect(good_images(1, seed=7))])
    expected = detector.score(images)
    score_map, score, _, _ = open_model(tmp_path / MODELS[kind][0], kind)(images.permute(0, 2, 3, 1).numpy())
    # Of the range: kernels that add in another order are some 1e-6 apart; a step left out would show at once.
    allowed = 1e-4 * float(expected.map.max() - expected.map.min())
    assert np.abs(score_map - expected.map.numpy()).max() <= allowed
    assert np.abs(score - expected.image.numpy()).max() <= allowed


@pytest.mark.parametrize("name", NAMES)
def test_odd_sizes_and_extreme_images_give_finite_scores(name: str, tiny_backbone: Backbone) -> None:
    size = (72, 88)
    detector = make(name, tiny_backbone).fit(good_images(8, size), seed=0)
    extreme = torch.stack([torch.zeros(3, *size), torch.ones(3, *size), good_images(1, size, seed=7)[0]])
    scores = detector.score(extreme)
    assert scores.map.shape == (3, *size)
    assert torch.isfinite(scores.map).all() and torch.isfinite(scores.image).all()


LOAD = """
import sys
from pathlib import Path

import torch
from conftest import TinyBackbone

from adflow import detector_file

detector_file.make_backbone = lambda *_, **__: TinyBackbone()
folder, names = Path(sys.argv[1]), sys.argv[2:]
images = torch.load(folder / "images.pt")
detectors = {name: detector_file.load_detector(folder / f"{name}.safetensors") for name in names}
torch.save({name: (one.score(images).map, one.params()) for name, one in detectors.items()}, folder / "found.pt")
"""


def test_saved_and_loaded_in_a_fresh_process_it_scores_the_same_bits(
    fitted: dict[str, Detector], tmp_path: Path
) -> None:
    images = with_defect(good_images(2, seed=6))
    torch.save(images, tmp_path / "images.pt")
    for name, detector in fitted.items():
        save_detector(detector, tmp_path / f"{name}.safetensors")
    subprocess.run([sys.executable, "-c", LOAD, str(tmp_path), *NAMES], check=True, cwd=Path(__file__).parent)
    found = torch.load(tmp_path / "found.pt")
    for name, (score_map, params) in found.items():
        assert torch.equal(score_map, fitted[name].score(images).map), name
        assert params == fitted[name].params(), name
    assert list(found) == NAMES


def test_energies_are_non_negative_and_roughly_calibrated(fitted: dict[str, Detector]) -> None:
    with_null = [name for name in NAMES if methods.get(name).has_null]
    assert with_null, "no method has a null model"
    for name in with_null:
        for energy in fitted[name].energies(good_images(12, seed=7)):
            assert (energy.chi2 >= 0).all() and torch.isfinite(energy.chi2).all(), name
            # On new good images (a memory knows its own) the mean is about the degrees: an order of magnitude.
            assert 0.1 < float(energy.chi2.mean()) / energy.dof < 10, name


def test_the_null_model_scores_the_image_and_not_what_surrounds_it(fitted: dict[str, Detector]) -> None:
    null, image = GaussianNull(fitted["padim"]), with_defect(good_images(1, seed=5))
    whole, part = null.score(image), null.score(image, [Box(40, 0, 24, SIZE[1])])
    assert torch.equal(whole.map, part.map) and float(whole.image[0]) == float(whole.map.max())
    assert float(part.image[0]) == float(whole.map[0, 40:].max()) < float(whole.image[0])


def test_methods_without_a_null_model_say_so(fitted: dict[str, Detector]) -> None:
    for name in NAMES:
        if not methods.get(name).has_null:
            with pytest.raises(InputError, match="null"):
                fitted[name].energies(good_images(1))


def test_pixels_of_0_to_255_and_detectors_that_know_nothing_are_refused(
    fitted: dict[str, Detector], tiny_backbone: Backbone, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"torch\.uint8, expected float in \[0, 1\]"):
        fitted["padim"].score((255 * good_images(1)).byte())
    with pytest.raises(InputError, match="has not been fitted"):
        save_detector(make("padim", tiny_backbone), tmp_path / "padim.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_what_is_listed_of_a_method_is_complete_and_true(name: str) -> None:
    row = next(row for row in methods.facts() if row["name"] == name)
    assert row["paper"] and row["year"] and row["learns"] and row["fit_cost"] and row["score_cost"]
    # Without a null model a method need not say so.
    assert row.get("null", False) is methods.get(name).has_null


@pytest.mark.parametrize("name", [name for name in NAMES if issubclass(methods.get(name), FeatureDetector)])
def test_what_the_image_score_takes_is_counted(name: str, fitted: dict[str, Detector]) -> None:
    with counting("method") as seconds:
        fitted[name].score(good_images(1))
    assert "image score" in seconds


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(AdflowError, match="did you mean 'cflow'"):
        methods.get("cflwo")
    with pytest.raises(AdflowError, match="setting of cflow"):
        methods.build("cflow", settings={"stepz": 3})


WRONG: dict[str, list[object]] = {
    "bool": ["abc", 2, [True], {"a": 1}],
    "int": ["abc", 1.5, True, [1, 2], {"a": 1}],
    "float": ["abc", False, math.nan, math.inf, [0.5], {"a": 1}],
    "str": [False, [1], {"a": 1}],
    "tuple[int, ...]": ["a", ["a", "b"], [1.5], [True], {"a": 1}],
}


@pytest.mark.parametrize("name", NAMES)
def test_a_setting_of_another_type_is_one_line(name: str) -> None:
    written: dict[str, str] = {}
    for owner in reversed(methods.get(name).__mro__):
        if issubclass(owner, Detector) and "__init__" in vars(owner):
            parameters = inspect.signature(vars(owner)["__init__"]).parameters
            written |= {key: parameter.annotation for key, parameter in parameters.items()}
    for key in methods.get(name).parameters_of():
        kind, _, none = written[key].partition(" | ")
        for value in (*WRONG[kind], *([] if none else [None])):
            with pytest.raises(UsageError, match=f"^setting {key} is .*, expected ") as caught:
                methods.build(name, settings={key: value})
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("padim", {"smooth": 1e30}),
        ("fastflow", {"hidden": 1e30}),
        ("uflow", {"hidden": -1.0}),
        ("differnet", {"sigma": 1e30}),
        ("uflow", {"weight_decay": -1.0}),
        ("csflow", {"lr": -1.0}),
        ("csflow", {"clip": 0.0}),
        ("csflow", {"clamp": 0.0}),
        ("differnet", {"clamp": 0.0}),
        ("cflow", {"average": 2.0}),
        ("cflow", {"width": -1.0}),
        ("uflow", {"shrinkage": 2.0}),
        ("fastflow", {"shrinkage": 2.0}),
        ("csflow", {"shrinkage": -1.0}),
    ],
)
def test_a_setting_out_of_range_is_one_line(name: str, settings: dict[str, float], tiny_backbone: Backbone) -> None:
    (word,) = settings
    with pytest.raises(UsageError, match=rf"^{word} is "):
        methods.get(name)(tiny_backbone, **settings).fit(good_images(4))


def test_settings_are_read_as_the_types_of_their_parameters() -> None:
    # What YAML makes of --set coreset=300, rank=none, smooth=1e0 and radius=2.0.
    detector, _ = methods.build("local", settings={"coreset": 300, "rank": "none", "smooth": "1e0", "radius": 2.0})
    found = detector.params()
    assert (found["coreset"], found["rank"], found["smooth"], found["radius"]) == ("300", None, 1.0, 2)
    assert isinstance(found["radius"], int)
    assert methods.build("uflow", settings={"norm": "none"})[0].params()["norm"] == "none"
    assert methods.build("patchsvdd", settings={"strides": [8, 2]})[0].params()["strides"] == (8, 2)
    with pytest.raises(UsageError, match=r"expected a list of whole numbers such as \[16, 4\]$"):
        methods.build("patchsvdd", settings={"strides": ["a"]})
    with pytest.raises(UsageError, match="rank is 'abc', expected a whole number or none"):
        methods.build("padim", settings={"rank": "abc"})


def test_listing_methods_imports_no_torch() -> None:
    code = "import sys; from adflow import methods; methods.facts(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_methods_that_need_no_flow_load_none() -> None:
    """FrEIA takes a second to import."""
    names = ", ".join(f"adflow.methods.{name}" for name in ("cflow", "cutpaste", "pefm"))
    code = f"import sys, {names}; assert 'FrEIA' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


TOY = '''
    """A method in one file: the distance of each cell to the mean of all good cells."""

    import torch

    from adflow.detector import FeatureDetector


    class Toy(FeatureDetector):
        paper = "no paper: an example"
        year = 2026
        learns = "the mean feature"
        fit_cost = "O(n)"
        score_cost = "O(1)"

        def prepare(self, channels, grids, size, generator):
            self.register_buffer("mean", torch.zeros(channels[0]))

        def fit_features(self, bank, *, generator, progress=None, checkpoint=None):
            self.mean = bank.level(0).float().mean((0, 2, 3))

        def score_features(self, pyramid):
            return (pyramid[0] - self.mean[:, None, None]).square().mean(1)
'''


def test_a_method_of_another_package_needs_one_file_and_an_entry_point(
    tmp_path: Path, tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "toy_method.py").write_text(textwrap.dedent(TOY))
    info = tmp_path / "toy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[adflow.methods]\ntoy = toy_method\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "toy" in methods.names()
    images = good_images(6)
    detector = make("toy", tiny_backbone).fit(images)
    scores = detector.score(images)
    assert torch.isfinite(scores.map).all()
    # The file names the method only: loading finds the class through the entry point.
    path = save_detector(detector, tmp_path / "toy.safetensors")
    monkeypatch.setattr("adflow.detector_file.make_backbone", lambda *_, **__: tiny_backbone)
    assert torch.equal(load_detector(path).score(images).map, scores.map)
    row = next(row for row in methods.facts() if row["name"] == "toy")
    assert row["learns"] == "the mean feature" and detector.method() == "toy"
