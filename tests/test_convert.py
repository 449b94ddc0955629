"""Checkpoints of the originals, written here with random weights and a tiny backbone, become detectors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adflow import zoo
from adflow.backbones import Backbone
from adflow.detector_file import read_header
from adflow.errors import InputError, UnavailableError, UsageError
from adflow.methods.cflow import CFlow
from adflow.methods.uflow import UFlow
from adflow.tasks import convert as module
from adflow.tasks.convert import convert, read_checkpoint
from adflow.tasks.download import download

SIZE = 64


def entry(method: str, format_: str, **parameters: Any) -> zoo.DetectorEntry:
    base = zoo.load().detectors["uflow-mvtec-cable"]
    return dataclasses.replace(
        base, name=f"{method}-tiny", method=method, format=format_, backbone="tiny",
        parameters={"size": SIZE, **parameters},
    )  # fmt: skip


def prepared(detector: Any, backbone: Backbone) -> Any:
    grids = [(SIZE // stride, SIZE // stride) for stride in backbone.strides]
    detector.size = (SIZE, SIZE)
    detector.prepare(list(backbone.channels), grids, (SIZE, SIZE), torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(4)
    for parameter in detector.parameters():
        parameter.requires_grad_(False)
        # Away from a fresh start, so that a tensor that is not loaded shows.
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return detector.eval()


def as_original(state: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Name our tensors as FrEIA does, mixing written as a matrix."""
    found = {}
    for key, value in state.items():
        stem, _, leaf = key.rpartition(".")
        if leaf == "permutation":
            value, leaf = torch.eye(len(value))[value][:, :, None, None], "w_perm"
        elif leaf == "rotation":
            leaf = "w_perm"
        found[f"{prefix}{stem}.{leaf}"] = value
        if leaf == "w_perm":
            found[f"{prefix}{stem}.w_perm_inv"] = value.transpose(0, 1)
    return found


def uflow_file(folder: Path, backbone: Backbone) -> tuple[Path, UFlow]:
    recipe = {k: v for k, v in UFlow.recipe_for("paper", None).items() if k not in ("backbone", "size")}
    source = prepared(UFlow(backbone, flow_steps=2, **recipe), backbone)
    path = folder / "u.ckpt"
    state = as_original(source.flow.state_dict(), "model.flow.")
    torch.save({"state_dict": {**state, "model.feature_extractor.extractor.weight": torch.ones(3)}, "epoch": 7}, path)
    return path, source


def cflow_file(folder: Path, backbone: Backbone) -> tuple[Path, CFlow]:
    recipe = {k: v for k, v in CFlow.recipe_for("paper", None).items() if k not in ("backbone", "size", "taps")}
    recipe |= {"blocks": 3, "position": 16, "normaliser": "none"}
    source = prepared(CFlow(backbone, **recipe), backbone)
    path = folder / "c.pt"
    encoder = {"conv1.weight": next(v for v in backbone.state_dict().values() if v.ndim == 4).clone()}
    states = [as_original(decoder.state_dict()) for decoder in source.decoders]
    torch.save({"encoder_state_dict": encoder, "decoder_state_dict": states}, path)
    return path, source


def converted(path: Path, what: zoo.DetectorEntry, runs: Path, backbone: Backbone, monkeypatch: Any) -> Any:
    import adflow.detector_file

    file = convert(path, what, runs=runs, backbone=backbone)
    monkeypatch.setattr(adflow.detector_file, "make_backbone", lambda *a, **k: backbone)
    return file, adflow.detector_file.load_detector(file)


@pytest.mark.parametrize("method", ["uflow", "cflow"])
def test_a_converted_checkpoint_scores_like_its_source(
    method: str, tmp_path: Path, tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, source = (uflow_file if method == "uflow" else cflow_file)(tmp_path, tiny_backbone)
    what = entry("uflow", "uflow-lightning", flow_steps=2) if method == "uflow" else entry("cflow", "cflow-ad")
    file, found = converted(path, what, tmp_path / "runs", tiny_backbone, monkeypatch)
    images = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    ours, theirs = found.score(images), source.score(images)
    # The same weights through the same code: nothing may differ but the layout of a matrix in memory.
    torch.testing.assert_close(ours.map, theirs.map, rtol=1e-6, atol=1e-6)
    assert float(theirs.map.std()) > 0
    assert file == tmp_path / "runs" / what.name / "detector.safetensors"


def test_parameters_of_the_catalogue_become_the_constructors(
    tmp_path: Path, tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = uflow_file(tmp_path, tiny_backbone)
    what = entry("uflow", "uflow-lightning", flow_steps=2, epochs=7, batch=3, lr=1e-2)
    _, found = converted(path, what, tmp_path / "runs", tiny_backbone, monkeypatch)
    assert (found.epochs, found.batch, found.lr) == (7, 3, 1e-2)
    with pytest.raises(UsageError, match="unknown setting of uflow 'batch_size'"):
        convert(path, entry("uflow", "uflow-lightning", batch_size=3), runs=tmp_path, backbone=tiny_backbone)


def test_the_run_keeps_the_papers_figures_apart_from_ours(tmp_path: Path, tiny_backbone: Backbone) -> None:
    path, _ = uflow_file(tmp_path, tiny_backbone)
    what = entry("uflow", "uflow-lightning", flow_steps=2)
    file = convert(path, what, runs=tmp_path / "runs", backbone=tiny_backbone)
    summary = json.loads((file.parent / "fit.json").read_text())
    assert what.paper is not None and summary["paper"] == dict(what.paper) and "measured" not in summary
    assert "test set" in summary["selected_by"] and summary["licence"]["name"] == "AGPL-3.0"
    made = read_header(file)["provenance"]
    assert made["converted_from"] == "uflow-tiny" and len(made["checkpoint_sha256"]) == 64


def test_a_foreign_encoder_is_told(tmp_path: Path, tiny_backbone: Backbone) -> None:
    path, _ = cflow_file(tmp_path, tiny_backbone)
    what = entry("cflow", "cflow-ad")
    notes = []
    for foreign in (False, True):
        if foreign:
            content = torch.load(path, weights_only=True)
            content["encoder_state_dict"]["conv1.weight"] = torch.randn(8, 3, 3, 3)
            torch.save(content, path)
        file = convert(path, what, runs=tmp_path / "runs", backbone=tiny_backbone)
        notes.append(" ".join(json.loads((file.parent / "fit.json").read_text())["notes"]))
    assert "could not be matched" not in notes[0] and "could not be matched" in notes[1]
    assert "test set" in notes[0]


class Evil:
    """Loading this without weights_only makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickled_object_is_refused_and_not_run(tmp_path: Path, tiny_backbone: Backbone) -> None:
    trap = tmp_path / "ran"
    torch.save({"state_dict": {}, "callbacks": Evil(trap)}, tmp_path / "evil.ckpt")
    with pytest.raises(InputError, match="could run code") as caught:
        convert(
            tmp_path / "evil.ckpt", entry("uflow", "uflow-lightning"), runs=tmp_path / "runs", backbone=tiny_backbone
        )
    assert not trap.exists() and not (tmp_path / "runs").exists()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 broken"])
def test_a_file_that_is_no_checkpoint_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(InputError):
        read_checkpoint(tmp_path / "x.ckpt")


@pytest.mark.parametrize(
    "what",
    [{"state_dict": {"a": 1}}, {}, {"state_dict": {"a": torch.ones(1)}}, [1]],
    ids=["value", "none", "names", "list"],
)
def test_a_checkpoint_that_does_not_fit_is_refused(what: Any, tmp_path: Path, tiny_backbone: Backbone) -> None:
    torch.save(what, tmp_path / "x.ckpt")
    with pytest.raises(InputError):
        convert(tmp_path / "x.ckpt", entry("uflow", "uflow-lightning"), runs=tmp_path / "runs", backbone=tiny_backbone)
    assert not (tmp_path / "runs").exists()


def test_decoders_must_be_as_many_as_taps(tmp_path: Path, tiny_backbone: Backbone) -> None:
    path, _ = cflow_file(tmp_path, tiny_backbone)
    content = torch.load(path, weights_only=True)
    content["decoder_state_dict"].pop()
    torch.save(content, path)
    with pytest.raises(InputError, match="2 decoders"):
        convert(path, entry("cflow", "cflow-ad"), runs=tmp_path / "runs", backbone=tiny_backbone)


@pytest.mark.parametrize("change", [("subnet.0", "net.0"), ("module_list.", "module_list.x")])
def test_decoders_of_another_kind_are_refused(change: tuple[str, str], tmp_path: Path, tiny_backbone: Backbone) -> None:
    path, _ = cflow_file(tmp_path, tiny_backbone)
    content = torch.load(path, weights_only=True)
    states = content["decoder_state_dict"]
    content["decoder_state_dict"] = [{key.replace(*change): value for key, value in s.items()} for s in states]
    torch.save(content, path)
    with pytest.raises(InputError, match="no FrEIA chains"):
        convert(path, entry("cflow", "cflow-ad"), runs=tmp_path / "runs", backbone=tiny_backbone)


def test_an_unknown_format_is_named(tmp_path: Path, tiny_backbone: Backbone) -> None:
    with pytest.raises(UsageError, match="uflow-lightning"):
        convert(tmp_path / "x", entry("uflow", "uflow-litening"), runs=tmp_path, backbone=tiny_backbone)


def test_download_from_a_local_checkpoint_writes_a_run(
    tmp_path: Path, tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = uflow_file(tmp_path, tiny_backbone)
    what = entry("uflow", "uflow-lightning", flow_steps=2)
    catalogue = dataclasses.replace(zoo.load(), detectors={what.name: what})
    monkeypatch.setenv("ADFLOW_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(module, "make_backbone", lambda *a, **k: tiny_backbone)
    done = download(what.name, source=path, runs=tmp_path / "runs", catalogue=catalogue, unverified=True)
    assert done.paths == [tmp_path / "runs" / what.name / "detector.safetensors"] and done.paths[0].is_file()
    assert any("adflow calibrate" in note for note in done.notes)


def test_without_the_backbones_weights_there_is_one_clear_error(
    tmp_path: Path, tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = uflow_file(tmp_path, tiny_backbone)
    monkeypatch.setenv("ADFLOW_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ADFLOW_OFFLINE", "1")
    with pytest.raises(UnavailableError, match="cait"):
        convert(path, zoo.load().detectors["uflow-mvtec-cable"], runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
