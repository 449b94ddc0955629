"""Detector files, weights, catalogues and archives that are damaged, foreign, replaced or lie: refused in one line."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import TinyBackbone, make_tiny_images
from safetensors.torch import save_file

from adflow import detector_file, methods, zoo
from adflow._unpack import unpack
from adflow._weights import read_weights
from adflow.cli._options import settings
from adflow.detector import Detector
from adflow.detector_file import digest, load_detector, read_header, save_detector
from adflow.errors import DetectorFileError, InputError


@pytest.fixture(scope="module")
def detector() -> Detector:
    return methods.get("padim")(TinyBackbone()).fit(make_tiny_images(8).normal)


@pytest.fixture
def file(detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(detector_file, "make_backbone", lambda *_, **__: detector.backbone)
    return save_detector(detector, tmp_path / "d.safetensors")


# ---- detector files


def parts(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as stored:
        tensors = {name: stored.get_tensor(name).clone() for name in stored.keys()}  # noqa: SIM118
        return tensors, json.loads(stored.metadata()["adflow"])


def forge(path: Path, tensors: dict[str, torch.Tensor], header: Any) -> Path:
    """Write a file whose sums are right: what is wrong with it must be found by what it says."""
    if isinstance(header, dict):
        header.pop("check", None)
        header["digest"] = digest(tensors, header)
    save_file(tensors, path, metadata={"adflow": json.dumps(header)})
    return path


WRONG: list[Any] = [None, True, -1, 10**30, "", "x" * 1000, [], [[]], [0, 0], {}, {"name": 3}, [1e308, 5], "../../etc"]


def headers(good: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for key in good:
        yield {k: v for k, v in good.items() if k != key}
        yield from ({**good, key: value} for value in WRONG)
    for key in ("backbone", "shapes", "params"):
        for inner in good[key]:
            yield {**good, key: {k: v for k, v in good[key].items() if k != inner}}
            yield from ({**good, key: {**good[key], inner: value}} for value in WRONG)
    yield {**good, "params": {**good["params"], "__class__": 3}}
    yield {**good, "method": "os"}
    yield {**good, "method": "_train"}
    yield {**good, "shapes": {"channels": [10**9], "grids": [[10**6, 10**6]]}}
    yield {**good, "size": [10**6, 10**6]}


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_headers_that_lie_are_refused_or_load(file: Path, tmp_path: Path, little_memory: None) -> None:
    tensors, good = parts(file)
    assert load_detector(forge(tmp_path / "same.safetensors", tensors, good))
    refused = 0
    for i, header in enumerate(headers(good)):
        path = forge(tmp_path / "forged.safetensors", tensors, header)
        try:
            load_detector(path)
        except (DetectorFileError, InputError) as error:
            refused += 1
            assert len(str(error)) < 2000, i
    assert refused > 100


def test_a_changed_bit_of_the_provenance_is_noticed(file: Path) -> None:
    tensors, header = parts(file)
    header["provenance"]["seconds"] = 5
    save_file(tensors, file, metadata={"adflow": json.dumps(header)})
    with pytest.raises(DetectorFileError, match="damaged header"):
        read_header(file)


@pytest.mark.parametrize("length", [17 << 20, 1 << 30, 1 << 62, 2**64 - 1])
def test_a_header_of_gigabytes_is_refused_unread(length: int, tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{" * 100)
    with pytest.raises(DetectorFileError, match="does not start like"):
        load_detector(path)


def test_a_header_nested_without_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata={"adflow": "[" * 200_000})
    with pytest.raises(DetectorFileError, match="damaged"):
        load_detector(path)


def test_a_detector_replaced_while_it_is_read_is_the_old_or_the_new_one(
    file: Path, detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = methods.get("padim")(detector.backbone).fit(make_tiny_images(8, seed=1).normal)
    known = {read_header(file)["digest"], read_header(save_detector(other, file.with_name("b.safetensors")))["digest"]}
    original = detector_file.safe_open

    def replaced_after_opening(path: str, **options: Any) -> Any:
        opened = original(path, **options)
        if file.with_name("b.safetensors").exists():
            file.with_name("b.safetensors").replace(path)
        return opened

    monkeypatch.setattr(detector_file, "safe_open", replaced_after_opening)
    loaded = load_detector(file)
    assert digest(loaded.learned(), {}) in {digest(d.learned(), {}) for d in (detector, other)}
    assert read_header(file)["digest"] in known


@pytest.mark.parametrize(
    "change", [{"detector": None}, {"detector": {"backbone": 3}}, {"sha256": None}, {"kind": ["onnx"]}], ids=str
)
def test_a_bundle_that_does_not_say_what_it_holds_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    header = {"method": "padim", "backbone": {"name": "x"}}
    about = {"format": 1, "kind": "onnx", "sha256": "0" * 64, "detector": header}
    (tmp_path / "model.onnx").write_bytes(b"a model")
    (tmp_path / "metadata.json").write_text(json.dumps(about))
    assert read_header(tmp_path)["digest"] == "0" * 64
    (tmp_path / "metadata.json").write_text(json.dumps(about | change))
    with pytest.raises(DetectorFileError):
        read_header(tmp_path)
    with pytest.raises(DetectorFileError):
        load_detector(tmp_path)


# ---- other files


@pytest.mark.parametrize(
    "content", [b"hello", b"", b"\x80\x04.", b"PK\x03\x04" + bytes(99), bytes(4096), b"e\x01" * 50]
)
def test_what_torch_stumbles_over_is_no_weight_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(InputError, match="cannot be read as weights"):
        read_weights(tmp_path / "w.pth")


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize("text", [LAUGHS, "a: &a [*a]", "&a {b: *a}"])
def test_a_catalogue_that_swells_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "zoo.yaml").write_text(text)
    with pytest.raises(InputError, match="more than 100000 values"):
        zoo.load(tmp_path / "zoo.yaml")


@pytest.mark.parametrize("text", ["a: 2026-13-45", "a: " + "9" * 5000, "[" * 5000])
def test_values_that_yaml_stumbles_over(text: str, tmp_path: Path) -> None:
    (tmp_path / "zoo.yaml").write_text(text)
    with pytest.raises(InputError, match="is not YAML"):
        zoo.load(tmp_path / "zoo.yaml")
    assert settings([f"name={text[3:]}"])


def test_messages_stay_one_short_line(tmp_path: Path) -> None:
    (tmp_path / "zoo.yaml").write_text(f"version: {'x' * 5000}\n")
    with pytest.raises(InputError) as found:
        zoo.load(tmp_path / "zoo.yaml")
    assert len(str(found.value)) < 300
    raw = yaml.safe_load(zoo.shipped().read_text(encoding="utf-8"))
    raw["detectors"]["uflow-mvtec-hazelnut"]["backbone"] = "x" * 5000
    with pytest.raises(InputError, match="is no backbone of the catalogue") as found:
        zoo.decode(raw)
    assert len(str(found.value)) < 300
    (tmp_path / "a.tar").write_bytes(b"no archive")
    with pytest.raises(InputError, match="is damaged or not an archive") as found:
        unpack(tmp_path / "a.tar", tmp_path / "out")
    assert "\n" not in str(found.value)
