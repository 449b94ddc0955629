"""Thousands of damaged and hostile detectors, weights, catalogues, bundles and archives, and mistyped options.

Each gives a result or one AdflowError, within ten seconds.
"""

from __future__ import annotations

import copy
import io
import json
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from adflow import cli, detector_file, methods, zoo
from adflow._unpack import unpack
from adflow._weights import read_weights
from adflow.bundle import read_metadata
from adflow.detector import Detector
from adflow.detector_file import load_detector, read_header, save_detector
from adflow.errors import AdflowError
from adflow.tasks._cells import read_cell, read_cells

from .fuzz import DAMAGE, damage, quick, survives
from .stage import Count
from .test_fuzz_pictures import pictures

pytestmark = pytest.mark.usefixtures("little_memory")


# ---- detector files and weights


@pytest.fixture
def file(detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(detector_file, "make_backbone", lambda *_, **__: detector.backbone)
    return save_detector(detector, tmp_path / "d.safetensors")


def same(first: Detector, second: Detector) -> bool:
    a, b = first.learned(), second.learned()
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a) and first.provenance == second.provenance


def test_every_byte_of_a_detector_flipped(file: Path, detector: Detector, tmp_path: Path, count: Count) -> None:
    content = file.read_bytes()
    header = 8 + struct.unpack("<Q", content[:8])[0]
    # Every byte of the header, and of the tensors as many again.
    step = max(1, (len(content) - header) // header)
    for at in [*range(header), *range(header, len(content), step)]:
        changed = bytearray(content)
        changed[at] ^= 1 << at % 8
        path = tmp_path / "flipped.safetensors"
        path.write_bytes(changed)
        found = survives("detector files, one bit flipped", lambda path=path: load_detector(path), count, at)  # type: ignore[misc]
        assert isinstance(found, AdflowError) or same(found, detector), f"byte {at} changed what was loaded, unnoticed"


def test_detectors_cut_short(file: Path, tmp_path: Path, count: Count) -> None:
    content = file.read_bytes()
    for cut in [*range(0, 600), *range(600, len(content), max(1, len(content) // 400))]:
        path = tmp_path / "cut.safetensors"
        path.write_bytes(content[:cut])
        found = survives("detector files, cut", lambda path=path: load_detector(path), count, cut)  # type: ignore[misc]
        assert isinstance(found, AdflowError), cut


def test_damaged_detectors(file: Path, tmp_path: Path, count: Count) -> None:
    content = file.read_bytes()

    @quick(800)
    @given(DAMAGE)
    def check(steps: list[tuple[str, float, int]]) -> None:
        path = tmp_path / "damaged.safetensors"
        path.write_bytes(damage(content, steps))
        survives("detector files, damaged", lambda: (read_header(path), load_detector(path)), count, steps)

    check()


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("open('exploded', 'w').close()",)


def foreign(folder: Path) -> Iterator[Path]:
    """Files that are something else, named like a detector."""
    import pickle

    bomb = pickle.dumps(_Bomb())
    contents = {
        "pickle": bomb,
        "pickle4": pickle.dumps({"a": _Bomb()}, protocol=4),
        "text": b"hello",
        "empty": b"",
        "zeros": bytes(4096),
        "ones": b"\xff" * 4096,
        "json": b'{"format": 1}',
        "png": pictures()["rgb.png"],
        "zip": b"PK\x03\x04" + bytes(100),
        "gigabytes": struct.pack("<Q", 1 << 30) + b"{" * 1000,
        "small": struct.pack("<Q", 2) + b"{}",
        "deep": struct.pack("<Q", 100_000) + b"[" * 100_000,
        "overlap": _raw({k: {"dtype": "U8", "shape": [8], "data_offsets": [i, i + 8]} for i, k in enumerate("ab")}, 9),
        "beyond": _raw({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}, 8),
        "huge shape": _raw({"a": {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 0]}}, 0),
        "negative": _raw({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, 4),
        "dtype": _raw({"a": {"dtype": "OBJECT", "shape": [1], "data_offsets": [0, 4]}}, 4),
        "no metadata": _raw({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, 4),
        "odd metadata": _raw({"__metadata__": {"adflow": 3}}, 0),
        "list metadata": _raw({"__metadata__": []}, 0),
        "null": _raw({"__metadata__": {"adflow": "null"}}, 0),
        "number": _raw({"__metadata__": {"adflow": "1e999"}}, 0),
    }  # fmt: skip
    for name, content in contents.items():
        path = folder / f"{name}.safetensors"
        path.write_bytes(content)
        yield path
    torch.save({"model": torch.zeros(3)}, folder / "torch.safetensors")
    yield folder / "torch.safetensors"
    for dtype in (torch.float16, torch.bfloat16, torch.int8, torch.bool, torch.float64):
        save_file({"model.a": torch.zeros(3, dtype=dtype)}, folder / f"{dtype}.safetensors")
        yield folder / f"{dtype}.safetensors"
    (folder / "folder.safetensors").mkdir()
    yield folder / "folder.safetensors"


def _raw(header: dict[str, Any], length: int) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(length)


def test_files_that_are_no_detector(tmp_path: Path, count: Count, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in foreign(tmp_path):
        for call in (load_detector, read_header):
            found = survives("files that are no detector", lambda: call(path), count, path.name)  # noqa: B023
            assert isinstance(found, AdflowError), path
        survives("files that are no weights", lambda: read_weights(path), count, path.name)  # noqa: B023
        renamed = path.with_suffix(".pth")
        path.rename(renamed)
        survives("files that are no weights", lambda: read_weights(renamed), count, renamed.name)  # noqa: B023
    assert not (tmp_path / "exploded").exists(), "code of a file was run"


def test_tensors_added_removed_and_of_other_types(file: Path, detector: Detector, tmp_path: Path, count: Count) -> None:
    from test_faults_files import forge, parts

    tensors, header = parts(file)

    def changes() -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        for name, value in tensors.items():
            yield f"without {name}", {k: v for k, v in tensors.items() if k != name}
            flat = value.reshape(-1)
            for what, other in {
                "float64": value.double(),
                "float16": value.half(),
                "int64": value.long(),
                "bool": value.bool(),
                "empty": flat[:0],
                "longer": torch.cat([flat, flat]),
                "flat": flat.clone(),
                "scalar": flat.sum(),
                "more dimensions": value[None].clone(),
                "transposed": value.transpose(0, -1).contiguous() if value.ndim > 1 else value,
                "nan": torch.full_like(value, float("nan")) if value.is_floating_point() else value,
                "infinite": torch.full_like(value, float("inf")) if value.is_floating_point() else value,
            }.items():
                yield f"{name} {what}", {**tensors, name: other.clone()}
        for extra in ("model.extra", "model.__class__", "model.a.b.c", "other", "calibration.x", "model.backbone.net"):
            yield f"with {extra}", {**tensors, extra: torch.zeros(2)}

    for what, changed in changes():
        path = forge(tmp_path / "forged.safetensors", changed, dict(header))
        # Their sums are right: only shapes that no buffer can have are refused, the rest is what somebody signed for.
        survives("detector files with other tensors", lambda path=path: load_detector(path), count, what)  # type: ignore[misc]


# ---- catalogues, bundles, cells, archives


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.just([]), st.just({}),
    st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
    st.just("../../etc/passwd"), st.just("file:///etc/passwd"), st.just("{class}"), st.just("x" * 5000),
    st.just("a\nb"),
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*path, key))
    elif isinstance(value, list):
        for key, item in enumerate(value):
            yield from places(item, (*path, key))


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    changed = copy.deepcopy(value)
    here = changed
    for key in path[:-1]:
        here = here[key]
    if new is ...:
        del here[path[-1]]
    else:
        here[path[-1]] = new
    return changed


def test_catalogues_with_wrong_fields(count: Count) -> None:
    raw = yaml.safe_load(zoo.shipped().read_text(encoding="utf-8"))
    where = list(places(raw))

    @quick(600)
    @given(st.sampled_from(where), st.one_of(st.just(...), VALUES))
    def check(path: tuple[Any, ...], new: Any) -> None:
        survives(
            "zoo files with one wrong field", lambda: zoo.Zoo(*zoo.decode(put(raw, path, new))), count, (path, new)
        )

    check()


def test_damaged_catalogues(tmp_path: Path, count: Count, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = {"datasets": {"mvtec": yaml.safe_load(zoo.shipped().read_text(encoding="utf-8"))["datasets"]["btad"]}}
    text = yaml.safe_dump(small).encode()

    @quick(100)
    @given(DAMAGE)
    def check(steps: list[tuple[str, float, int]]) -> None:
        path = tmp_path / "zoo.yaml"
        path.write_bytes(damage(text, steps))
        survives("zoo files, damaged", lambda: zoo.load(path), count, steps)

    check()
    laughs = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{b}: &{b} [*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a}]\n"
        for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    for odd in (
        laughs,
        "a: !!python/object/apply:os.system [touch exploded]",
        "[" * 5000,
        "a: " + "9" * 5000,
        "\0",
        "- a",
    ):
        (tmp_path / "zoo.yaml").write_text(odd)
        survives("zoo files, hostile", lambda: zoo.load(tmp_path / "zoo.yaml"), count, odd[:50])
    assert not (tmp_path / "exploded").exists(), "code of a file was run"


def test_damaged_bundles_and_cells(tmp_path: Path, count: Count) -> None:
    about = {"format": 1, "kind": "onnx", "sha256": "0" * 64, "detector": {"method": "padim"}, "calibration": None}
    cell = {"format": 1, "key": "k", "row": {"image_auroc": 1.0}, "cost": {}, "records": []}
    table = {"provenance": {"cells": ["c"]}}
    (tmp_path / "cells").mkdir()

    @quick(300)
    @given(DAMAGE, st.sampled_from(["metadata.json", "cells/c.json", "table.json"]))
    def check(steps: list[tuple[str, float, int]], name: str) -> None:
        for file, value in (("metadata.json", about), ("cells/c.json", cell), ("table.json", table)):
            text = json.dumps(value).encode()
            (tmp_path / file).write_bytes(damage(text, steps) if file == name else text)
        survives("bundles and cells, damaged", lambda: read_metadata(tmp_path), count, steps)
        survives("bundles and cells, damaged", lambda: read_header(tmp_path), count, steps)
        survives("bundles and cells, damaged", lambda: load_detector(tmp_path), count, steps)
        survives("bundles and cells, damaged", lambda: read_cell(tmp_path / "cells" / "c.json"), count, steps)
        survives("bundles and cells, damaged", lambda: read_cells(tmp_path), count, steps)

    check()


def archives() -> dict[str, bytes]:
    found = {}
    for kind in ("w", "w:gz", "w:xz", "w:bz2"):
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode=kind) as tar:
            for name in ("cable/train/good/000.png", "cable/test/x/" + "n" * 120 + ".png"):
                info = tarfile.TarInfo(name)
                info.size = 300
                tar.addfile(info, io.BytesIO(bytes(300)))
        found[kind] = stream.getvalue()
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("cable/train/good/000.png", bytes(300))
        packed.writestr("cable/a/b.txt", "hello")
    found["zip"] = stream.getvalue()
    return found


def test_damaged_archives(tmp_path: Path, count: Count) -> None:
    seeds = archives()
    outside = tmp_path / "outside"
    outside.mkdir()

    @quick(600)
    @given(st.sampled_from(sorted(seeds)), DAMAGE)
    def check(kind: str, steps: list[tuple[str, float, int]]) -> None:
        path = tmp_path / "archive"
        path.write_bytes(damage(seeds[kind], steps))
        place = outside / "place"
        survives("archives, damaged", lambda: unpack(path, place, limit=1 << 20), count, (kind, steps))
        assert sorted(p.name for p in tmp_path.iterdir()) == ["archive", "outside"]
        assert [p.name for p in outside.iterdir()] in ([], ["place"])
        shutil.rmtree(place, ignore_errors=True)

    check()


# ---- what people type


@pytest.fixture(scope="module")
def typed(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A fit that works, to which mistyped options are added; the last word for an option counts."""
    out = tmp_path_factory.mktemp("typed")
    words = ["fit", str(parts), "--method=padim", "--size=32", f"--out={out}", "--quiet"]
    # These pay for what is compiled and loaded once.
    assert cli.run(words) == 0 and cli.run([*words, "--backbone=none"]) == 2
    return words


def one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Check what the command line said: nothing, or one line and its hint; a box of typer's is one answer too."""
    said = capsys.readouterr().err
    assert "Traceback" not in said
    if said and "╭" not in said and "Usage:" not in said:
        assert len(said.strip().splitlines()) <= 2 and len(said) <= 1000, said


def test_values_of_options(typed: list[str], count: Count, capsys: pytest.CaptureFixture[str]) -> None:
    words = st.one_of(
        st.text(max_size=12), st.sampled_from(["0", "-1", "1e309", "nan", "inf", "9" * 400, "1x1", "💥", ""])
    )
    options = ["--size", "--set", "--taps", "--method", "--backbone", "--recipe", "--device", "--seed", "--holdout",
               "--folds", "--feature-memory", "--feature-dtype", "--max-memory"]  # fmt: skip

    @quick(250)
    @given(st.sampled_from(options), words)
    def check(option: str, word: str) -> None:
        def call() -> None:
            # A word may be a good value, or none that this machine has the weights or the memory for.
            code = cli.run([*typed, f"{option}={word}"])
            assert code in (0, 2, 3, 4, 5), code
            one_line(capsys)

        survives("values of options", call, count, (option, word))

    check()


@pytest.mark.parametrize("method", methods.names())
def test_values_of_settings(method: str, typed: list[str], count: Count, capsys: pytest.CaptureFixture[str]) -> None:
    huge = "9" * 400
    known = {bool: ["abc", "7", huge], int: ["abc", "1.5", "no", huge], float: ["abc", "yes", ".nan", huge],
             str: ["no", "[1]"], tuple: ["a", "[a, b]", "[1.5]", huge]}  # fmt: skip
    for name, default in methods.get(method).parameters_of().items():
        # Those without a value of their own take a number or a text: no list, no switch.
        for word in [*known.get(type(default), ["[a]", "no", huge]), "{a: 1}", "2020-01-01", "[[[", "💥"]:

            def call(setting: str = f"--set={name}={word}") -> None:
                code = cli.run([*typed, f"--method={method}", setting])
                assert code in (2, 3), code
                one_line(capsys)

            survives("values of settings", call, count, (method, name, word))
