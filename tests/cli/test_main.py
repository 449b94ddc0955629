"""The main job through the command line, on files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from adflow import backbones, data, methods
from adflow.cli import doctor
from adflow.cli._console import image_table
from adflow.detector_file import read_header
from adflow.tasks import _device

from .conftest import Call, write_part


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from adflow import cli; code = cli.run(['--help']); "
        "assert code == 0 and 'torch' not in sys.modules and 'pandas' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "segment" in done.stdout


def test_fit_writes_a_run_and_says_the_next_command(parts: Path, tmp_path: Path, call: Call) -> None:
    done = call("fit", parts, "-m", "padim", "--size", "64", "--runs", tmp_path, "--json")
    assert done.code == 0, done.err
    (run,) = done.json()["runs"]
    assert run["images"] == 32 and run["held_out"] == 8 and run["size"] == [64, 64]
    assert Path(run["detector"]).is_file() and f"next: adflow evaluate '{parts}'" in done.err  # it has a space
    assert 0 <= run["calibration"]["fit_auc"] <= 1 and "fitted ones (AUC" in done.err
    assert sorted(p.name for p in Path(run["detector"]).parent.iterdir()) == ["detector.safetensors", "fit.json"]


def test_two_fits_with_one_seed_have_one_digest(parts: Path, tmp_path: Path, call: Call) -> None:
    found = [
        call("fit", parts, "--size", "64", "--set", "steps=5", "--out", tmp_path / str(i), "--json").json()
        for i in range(2)
    ]
    assert found[0]["runs"][0]["digest"] == found[1]["runs"][0]["digest"]


def test_score_gives_table_csv_jsonl_and_verdicts(parts: Path, runs: Path, tmp_path: Path, call: Call) -> None:
    done = call("score", parts / "test", "--runs", runs, "--out", tmp_path, "--json")
    assert done.code == 0, done.err
    rows = done.json()["rows"]
    assert len(rows) == 12 and {row["verdict"] for row in rows} == {"good", "defect"}
    bad = [row for row in rows if "spot" in row["image"]]
    assert all(row["verdict"] == "defect" for row in bad)
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert lines == rows
    assert len((tmp_path / "scores.csv").read_text().splitlines()) == 13
    profile = done.json()["profile"]
    assert profile["images"] == 12
    assert {"decode", "resize", "encoder", "method", "upsample", "write"} <= set(profile["stages"])
    # Rounded to a tenth of a millisecond each.
    assert 0 < sum(profile["stages"].values()) <= profile["workers"] * profile["seconds"] + 0.001
    shown = call("score", parts / "test", "--runs", runs, "--out", tmp_path, "--profile")
    assert "verdict" in shown.out and "the run fitted last" in shown.err
    assert "ms per image" in shown.err and "encoder" in shown.err and "images/s: 12 images" in shown.err


@pytest.mark.parametrize("there", [True, False])
def test_a_precision_that_is_not_there_is_told_of(
    there: bool, parts: Path, runs: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_device, "has_bf16", lambda device: there)
    exact, other = (
        call("score", parts / "test", "--runs", runs, "--out", tmp_path / name, "--precision", name, "--json")
        for name in ("float32", "bf16")
    )
    assert exact.code == other.code == 0 and ("float32 is used" in other.err) is not there
    assert (exact.json()["rows"] == other.json()["rows"]) is not there


def test_segment_writes_masks_overlays_regions_and_coco(parts: Path, runs: Path, tmp_path: Path, call: Call) -> None:
    done = call("segment", parts, "--nfa", "1", "--runs", runs, "--out", tmp_path, "--json")
    assert done.code == 0, done.err
    found = done.json()
    for row in found["images"]:
        with Image.open(tmp_path / row["mask"]) as mask:
            assert mask.size == (96, 80) and set(np.unique(np.asarray(mask))) <= {0, 255}
    bad = [row for row in found["images"] if "spot" in row["image"]]
    assert len(bad) == 6 and all(row["regions"] >= 1 for row in bad)
    with Image.open(tmp_path / bad[0]["mask"]) as mask:
        marked = np.asarray(mask)[30:50, 40:60] == 255
    assert marked.mean() > 0.5
    regions = [json.loads(line) for line in (tmp_path / "regions.jsonl").read_text().splitlines()]
    assert regions == found["regions"] and all(region["log10_nfa"] <= 0 for region in regions)
    coco = json.loads((tmp_path / "coco.json").read_text())
    assert len(coco["images"]) == 12 and len(coco["annotations"]) == len(regions)
    assert len(list((tmp_path / "overlays").rglob("*.png"))) == 12
    assert "false regions per good image" in done.err
    assert f"{tmp_path}/masks, overlays, regions.jsonl" in done.err
    out = tmp_path / "none"
    none = call("segment", bad[0]["image"], "--runs", runs, "--out", out, "--min-area", 9999, "--no-overlays")
    assert none.code == 0 and "0 regions in 0 of 1" in none.err and f"{out}/masks, regions.jsonl" in none.err
    with Image.open(next((out / "masks").iterdir())) as mask:
        assert not np.asarray(mask).any()


def test_evaluate_prints_one_object_with_fractions(parts: Path, runs: Path, call: Call) -> None:
    done = call("evaluate", parts, "--runs", runs, "--json")
    assert done.code == 0, done.err
    (row,) = done.json()["rows"]
    assert {"dataset", "class", "method", "backbone", "seed", "image_auroc", "pixel_auroc", "aupro"} <= set(row)
    assert row["image_auroc"] == 1.0 and 0.9 < row["pixel_auroc"] <= 1.0
    assert done.json()["mean"]["image_auroc"] == 1.0 and "command" in done.json()["provenance"]
    assert "pixel" in call("evaluate", parts, "--runs", runs).out


def test_darker_images_are_warned_of_until_calibrated_anew(parts: Path, runs: Path, tmp_path: Path, call: Call) -> None:
    copy = tmp_path / "d.safetensors"
    copy.write_bytes(next(runs.glob("*/detector.safetensors")).read_bytes())
    rng = np.random.default_rng(7)
    for name, light in (("same", 1.0), ("dark", 0.5), ("dark2", 0.5)):
        write_part(tmp_path / name, 20, rng)
        for path in (tmp_path / name).iterdir():
            Image.fromarray((np.asarray(Image.open(path)) * light).astype(np.uint8)).save(path)
    warning = "run `adflow calibrate RUN FOLDER_OF_GOOD`"
    out = tmp_path / "out"
    for command in ("score", "segment"):
        assert warning not in call(command, tmp_path / "same", "--model", copy, "--out", out).err
        shifted = call(command, tmp_path / "dark", "--model", copy, "--out", out)
        assert shifted.code == 0 and warning in shifted.err and "more false alarms than promised" in shifted.err
    done = call("calibrate", copy, tmp_path / "dark2", "--json")
    assert done.code == 0 and done.json()["images"] == 20, done.err
    assert warning not in call("score", tmp_path / "dark", "--model", copy, "--out", out).err


def test_calibrate_names_what_it_cannot_read_and_counts_the_others(
    parts: Path, runs: Path, tmp_path: Path, call: Call
) -> None:
    copy = tmp_path / "d.safetensors"
    copy.write_bytes(next(runs.glob("*/detector.safetensors")).read_bytes())
    write_part(tmp_path / "good", 10, np.random.default_rng(8))
    (tmp_path / "good" / "broken.png").write_bytes(b"no picture")
    done = call("calibrate", copy, tmp_path / "good", "--json")
    assert done.code == 0 and "broken.png" in done.err and "calibrated on 10 good images" in done.err, done.err
    assert done.json()["images"] == 10 and set(done.json()) == {"detector", "images", "calibration"}
    assert read_header(copy)["provenance"]["held_out"] == 10
    other = call("calibrate", copy, tmp_path / "good", "--weights", tmp_path / "none.pth")
    assert other.code == 3 and "none.pth" in other.err
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "certificate.json").write_text("{}")
    refused = call("calibrate", tmp_path / "bundle", tmp_path / "good")
    assert refused.code == 3 and "is a bundle" in refused.err


def test_list_detectors_and_methods(runs: Path, call: Call) -> None:
    found = call("list", "detectors", "--runs", runs, "--json").json()["detectors"]
    assert [row["method"] for row in found] == ["padim"]
    assert "padim" in call("list", "methods").out


def test_doctor_shows_what_is_missing_and_fails_where_nothing_works(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(doctor, "version_of", lambda package: None)
        bare = call("doctor", "--json")
    assert bare.code == 0 and bare.json()["self_test"] is None and "pip install efficientnet-lite0" in bare.err
    whole = call("doctor", "--json")
    assert whole.code == 0 and whole.json()["self_test"]["works"] and whole.json()["packages"]["torch"]
    monkeypatch.setattr(doctor, "_self_test", lambda device: {"works": False, "peak": [0, 0], "seconds": 0.0})
    failed = call("doctor")
    assert failed.code == 1 and "works" in failed.out and "self-test failed" in failed.err


def test_a_damaged_summary_is_a_note(tmp_path: Path, call: Call) -> None:
    for name, text in (("a", "{"), ("b", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "detector.safetensors").write_bytes(b"")
        (tmp_path / name / "fit.json").write_text(text)
    done = call("list", "detectors", "--runs", tmp_path, "--json")
    assert done.code == 0 and [row["note"] for row in done.json()["detectors"]] == ["fit.json is damaged"] * 2


def test_list_shows_recipes_backbones_and_layouts(parts: Path, call: Call) -> None:
    for row in call("list", "methods", "--json").json()["methods"]:
        assert set(row["recipes"]) == set(methods.get(row["name"]).recipes) - {"tiny"}
    found = call("list", "backbones", "--json").json()["backbones"]
    assert {row["name"] for row in found} == set(backbones.names())
    assert next(row for row in found if row["name"] == "lite0")["size"] == "18.8 MB"
    shown = call("list", "datasets").out
    assert "<class>/ground_truth/<defect>/000_mask.png" in shown and "parts/good/*.jpg" in shown
    assert set(call("list", "datasets", "--json").json()["layouts"]) == {"folder", *data.families()} - {"demo"}
    failed = call("fit", parts, "-m", "uflow", "--recipe", "quick")
    assert failed.code == 2 and "Known: fast, paper" in failed.err and "tiny" not in failed.err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["fit", "no-such-folder/x"], 3, "no-such-folder"),
        (["fit", "{parts}", "-m", "cflwo"], 2, "did you mean 'cflow'"),
        (["fit", "{parts}", "-b", "lite9"], 2, "lite0"),
        (["fit", "{parts}", "-m", "padim", "--set", "shrinkag=1"], 2, "shrinkag"),
        (["fit", "{parts}", "-m", "padim", "--set", "rank=abc"], 2, "rank is 'abc', expected a whole number or none"),
        (["fit", "{parts}", "-m", "uflow", "--set", "norm=no"], 2, "norm is False, expected a text such as position"),
        (["fit", "{parts}", "--size", "1"], 2, "size"),
        (["fit", "{parts}", "--recipe", "quick"], 2, "fast"),
        (["fit", "{empty}"], 3, "image"),
        (["fit", "{parts}", "--device", "tpu"], 2, "tpu"),
        (["score", "{parts}/test", "--model", "nothing"], 2, "nothing"),
        (["score", "{empty}", "--runs", "{runs}"], 3, "no image"),
        (["score", "{parts}/test/none.png", "--runs", "{runs}"], 3, "none.png"),
        (["score", "{parts}/test", "--runs", "{empty}"], 3, "adflow fit"),
        (["segment", "{parts}/test", "--runs", "{runs}", "--nfa", "0.001"], 3, "held"),
        (["segment", "{parts}/test", "--runs", "{runs}", "--nfa", "1", "--flag-rate", "0.2"], 2, "one of"),
        (["list", "stuff"], 2, "methods"),
        (["fit", "{parts}", "--feature-memory", "lots"], 2, "lots"),
    ],
)
def test_bad_input_is_one_clear_line(
    arguments: list[str], code: int, words: str, parts: Path, runs: Path, tmp_path: Path, call: Call
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    done = call(*[a.format(parts=parts, runs=runs, empty=empty) for a in arguments])
    assert done.code == code, (done.code, done.err)
    assert words in done.err and "Traceback" not in done.err and done.out == ""


def test_a_corrupt_image_is_named_and_skipped_or_fatal(parts: Path, runs: Path, tmp_path: Path, call: Call) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    good = next((parts / "test" / "good").iterdir())
    (folder / "a.png").write_bytes(good.read_bytes())
    (folder / "b.png").write_bytes(good.read_bytes()[:200])
    done = call("score", folder, "--runs", runs, "--out", tmp_path / "out", "--json")
    assert done.code == 0 and "b.png" in done.err
    assert [row["error"] is None for row in done.json()["rows"]] == [True, False]
    strict = call("score", folder, "--runs", runs, "--out", tmp_path / "out2", "--strict")
    assert strict.code == 3 and "b.png" in strict.err and not (tmp_path / "out2").exists()


def test_damaged_detector_files_are_refused(runs: Path, parts: Path, tmp_path: Path, call: Call) -> None:
    whole = next(runs.glob("*/detector.safetensors")).read_bytes()
    file = tmp_path / "d.safetensors"
    flipped = bytearray(whole)
    flipped[-100] ^= 1
    for content in (b"", whole[:50], whole[: len(whole) // 2], bytes(flipped), b"\xff" * 64):
        file.write_bytes(content)
        done = call("score", parts / "test", "--model", file)
        assert done.code == 3 and "d.safetensors" in done.err, done.err


def test_no_permission_to_write_is_said(parts: Path, runs: Path, tmp_path: Path, call: Call) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("x")
    done = call("score", parts / "test", "--runs", runs, "--out", blocker / "below")
    assert done.code in (3, 5) and "cannot write" in done.err


def test_tables_name_images_below_the_folder_they_share(capsys: pytest.CaptureFixture[str]) -> None:
    def shown(*images: str) -> str:
        Console(width=60).print(image_table(["score"], [(image, ["1"]) for image in images]))
        return capsys.readouterr().out

    several = shown("/a/b/good/0.png", "/a/b/bad/1.png")
    assert "in /a/b" in several and "good/0.png" in several and "/a/b/good" not in several
    assert "x.png" in shown("x.png") and "/a/x.png" in shown("/a/x.png", "y/z.png")
    assert "in " not in shown("x.png", "y/z.png")
