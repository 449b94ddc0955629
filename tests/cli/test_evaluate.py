"""``adflow evaluate`` on files: resumed after kills, in two processes, compared, gated."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from adflow import cli
from adflow.tasks import _device

from .conftest import Call

README = Path(__file__).parents[2] / "README.md"

FIT = ("-m", "padim", "--size", "64")
SAME = (*FIT, "--seeds", "0,1,2", "--nfa", "1")


def words(parts: Path, out: Path) -> list[str]:
    """Return the arguments of an evaluation of three cells."""
    return ["evaluate", str(parts), *FIT, "--seeds", "0,1,2", "--nfa", "1", "--out", str(out), "-q"]


@pytest.fixture(scope="module")
def done(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished evaluation, computed by the two processes of --jobs 2, undisturbed."""
    folder = tmp_path_factory.mktemp("done") / "e"
    assert cli.run([*words(parts, folder), "--jobs", "2", "--no-report"]) == 0
    return folder


def start(parts: Path, out: Path) -> subprocess.Popen[bytes]:
    """Start the same evaluation in a session of its own, to be killed."""
    return subprocess.Popen(
        [sys.executable, "-m", "adflow", *words(parts, out)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )


def rows_without_cost(table: Path) -> list[dict[str, Any]]:
    rows = json.loads(table.read_text())["rows"]
    return [{k: v for k, v in row.items() if k not in ("fit_seconds", "ms_per_image", "detector_mb")} for row in rows]


def test_killed_twice_and_run_again_gives_the_same_table(parts: Path, done: Path, tmp_path: Path) -> None:
    out = tmp_path / "e"
    seen: dict[str, int] = {}
    for cells in (1, 2):
        process = start(parts, out)
        deadline = time.monotonic() + 120
        while len(list((out / "cells").glob("[!.]*.json"))) < cells and time.monotonic() < deadline:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for path in (out / "cells").glob("[!.]*.json"):
            assert seen.setdefault(path.name, path.stat().st_mtime_ns) == path.stat().st_mtime_ns
    assert not (out / "table.json").exists() and 2 <= len(seen) <= 3
    assert cli.run([*words(parts, out), "--no-report"]) == 0
    for name, written in seen.items():
        assert (out / "cells" / name).stat().st_mtime_ns == written, "a cell was computed again"
    assert rows_without_cost(out / "table.json") == rows_without_cost(done / "table.json")
    # Cells, computed in one process here and in two there, differ in nothing but what they cost.
    for path in sorted((done / "cells").glob("*.json")):
        ours, theirs = (json.loads((folder / "cells" / path.name).read_text()) for folder in (out, done))
        assert ours.pop("cost") and theirs.pop("cost")
        assert ours == theirs
    drawn = sorted(p.relative_to(out).as_posix() for p in (out / "overlays").rglob("*.jpg"))
    assert len(drawn) == 3 * 12
    for name in drawn:
        assert (out / name).read_bytes() == (done / name).read_bytes()
    shutil.rmtree(out)


def test_every_form_of_the_table_and_the_page_are_written(parts: Path, done: Path, call: Call) -> None:
    found = call("evaluate", parts, *SAME, "--out", done, "--json", "--per-defect", "--ci")
    assert found.code == 0, found.err
    assert "all 3 cells are there already" in found.err
    whole = found.json()
    assert [row["seed"] for row in whole["rows"]] == [0, 1, 2] and whole["mean"]["seeds"] == 3
    for name in ("command", "adflow", "torch", "device", "threads", "date", "data", "detectors", "cells"):
        assert whole["provenance"][name], name
    row = whole["rows"][0]
    assert row["image_auroc"] == 1.0 and row["image_auroc_ci_low"] == 1.0
    assert row["pixel_auroc_ci_low"] <= row["pixel_auroc"] <= row["pixel_auroc_ci_high"]
    assert row["n_test"] == 12 and row["n_defects"] == 6 and row["n_train"] == 32 and row["size"] == "64x64"
    assert row["setting"] == "nfa 1" and row["mean_iou"] <= row["mean_iou_oracle"]
    with (done / "table.csv").open() as stream:
        assert [float(line["pixel_auroc"]) for line in csv.DictReader(stream)] == [
            r["pixel_auroc"] for r in whole["rows"]
        ]
    assert "±" in (done / "table.md").read_text() and "booktabs" not in (done / "table.tex").read_text()
    assert r"\toprule" in (done / "table.tex").read_text()
    page = (done / "report.html").read_text()
    assert page.count("data:image/") == 3 * 12 and "http://" not in page.replace("http://www.w3.org", "")
    assert "Repeat it:" in page
    shown = call("evaluate", parts, *SAME, "--out", done, "--ci", "--no-report")
    assert "95% interval" in shown.out and "[100.0, 100.0]" in shown.out
    # Other settings are other cells.
    other = call("evaluate", parts, *FIT, "--out", done.parent / "other", "--nfa", "0.5", "--no-report", "--json")
    assert other.code == 0 and other.json()["rows"][0]["setting"] == "nfa 0.5"
    assert not (done.parent / "other" / "report.html").exists()


def test_a_run_is_measured_and_a_second_time_from_its_cell(parts: Path, runs: Path, tmp_path: Path, call: Call) -> None:
    first = call("evaluate", parts, "--runs", runs, "--out", tmp_path, "--json", "--no-report")
    assert first.code == 0, first.err
    again = call("evaluate", parts, "--runs", runs, "--out", tmp_path, "--json", "--overlays", "--no-report")
    assert again.code == 0 and "there already" not in again.err  # other pictures, another cell
    assert len(list((tmp_path / "overlays").rglob("*.jpg"))) == 12
    third = call("evaluate", parts, "--runs", runs, "--out", tmp_path, "--json", "--overlays", "--no-report")
    assert "there already" in third.err
    assert third.json()["rows"] == again.json()["rows"]
    same = {k: v for k, v in first.json()["rows"][0].items() if k != "ms_per_image"}
    assert same.items() <= again.json()["rows"][0].items()
    shown = call("evaluate", parts, "--runs", runs, "--out", tmp_path, "--overlays", "--compare", "padim-paper")
    assert shown.code == 2 and "nothing to hold against" in shown.err


def test_gates_fail_with_code_6_and_say_where(parts: Path, done: Path, tmp_path: Path, call: Call) -> None:
    base = ("evaluate", parts, *SAME, "--out", done, "--no-report")
    assert call(*base, "--fail-under", "pixel_auroc=0.9", "--fail-under", "mean:aupro=0.5").code == 0
    failed = call(*base, "--fail-under", "pixel_auroc=0.9999", "--json")
    assert failed.code == 6 and "pixel_auroc of folder/my parts/padim, seed 0 is 0.9" in failed.err
    assert failed.json()["rows"]  # the table is there all the same
    assert call(*base, "--fail-under", "pixel_aurok=1").code == 2
    assert call(*base, "--fail-on-regression").code == 2
    # A baseline that found every pixel: measured against it, we got worse.
    baseline = tmp_path / "baseline"
    shutil.copytree(done, baseline)
    assert call(*base, "--compare", baseline, "--fail-on-regression").code == 0
    for path in (baseline / "cells").glob("*.json"):
        cell = json.loads(path.read_text())
        for record in cell["records"]:
            record["intersection"] = record["union"]
            record["regions"] = int(record["label"])
        path.write_text(json.dumps(cell))
    worse = call(*base, "--compare", baseline, "--fail-on-regression")
    assert worse.code == 6 and "mean_iou of folder/my parts, padim, fell from 1.0000" in worse.err
    two = call("evaluate", "--compare", done, "--compare", baseline, "--json")
    assert two.code == 0 and {line["verdict"] for line in two.json()["comparison"]} >= {"worse", "not shown"}
    assert call("evaluate", "--compare", done, "--compare", baseline, "--fail-on-regression").code == 6
    ungated = call("evaluate", "--compare", done, "--compare", baseline, "--fail-under", "pixel_auroc=0.9999")
    assert ungated.code == 2 and "--fail-on-regression" in ungated.err
    assert call("evaluate", "--compare", done).code == 2
    assert call("evaluate").code == 2
    assert "worse" in call("evaluate", "--compare", done, "--compare", baseline).out
    assert (done / "compare.csv").is_file()


def test_a_run_can_be_the_other_side(parts: Path, runs: Path, done: Path, call: Call) -> None:
    run = next(runs.glob("*/detector.safetensors")).parent.name
    found = call("evaluate", parts, *SAME, "--out", done, "--runs", runs, "--compare", run, "--json")
    assert found.code == 0, found.err
    lines = {line["metric"]: line for line in found.json()["comparison"]}
    assert lines["pixel_auroc"]["difference"] == pytest.approx(0, abs=0.02)  # other seeds of the same method
    assert lines["pixel_auroc"]["verdict"] == "not shown"
    assert "Side by side" in (done / "report.html").read_text()


def test_a_failing_cell_gives_code_7_and_its_neighbour_a_row(
    parts: Path, done: Path, tmp_path: Path, call: Call
) -> None:
    # padim has no setting that fails on data only; a class of one training image does.
    second = tmp_path / "two" / "few"
    shutil.copytree(parts / "test", second / "test")
    shutil.copytree(parts / "ground_truth", second / "ground_truth")
    (second / "train" / "good").mkdir(parents=True)
    shutil.copy(next((parts / "train" / "good").iterdir()), second / "train" / "good" / "a.png")
    found = call("evaluate", parts, second, *FIT, "--out", tmp_path / "e", "--json", "--keep", "--runs", tmp_path / "r")
    assert found.code == 7, found.err
    rows = {row["class"]: row for row in found.json()["rows"]}
    assert "at least 2" in rows["few"]["error"] and rows["my parts"]["image_auroc"] == 1.0
    assert "1 of 2 cells failed" in found.err
    kept = tmp_path / "r" / "my-parts-padim-lite0"
    assert (kept / "detector.safetensors").is_file() and (kept / "fit.json").is_file()
    detectors = found.json()["provenance"]["detectors"]
    assert list(detectors.values()) == [json.loads((kept / "fit.json").read_text())["digest"]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "padim,cflwo"], "did you mean 'cflow'"),
        (["--method", ","], "names no method"),
        (["--method", "padim", "--seeds", "a"], "--seeds"),
        (["--method", "padim", "--model", "x"], "--model"),
        (["--size", "64"], "--method"),
        (["--method", "padim", "--set", "rnak=1"], "rnak"),
        (["--method", "padim", "--compare", "cflow-papr"], "cflow-paper"),
        (["--method", "padim", "--map-memory", "much"], "much"),
    ],
)
def test_bad_options_are_one_line(options: list[str], words: str, parts: Path, tmp_path: Path, call: Call) -> None:
    found = call("evaluate", parts, *options, "--out", tmp_path / "e", "--runs", tmp_path / "r")
    assert found.code == 2, found.err
    assert words in found.err and "Traceback" not in found.err and not (tmp_path / "e").exists()


@pytest.mark.parametrize("there", [True, False])
def test_a_precision_that_is_not_there_is_told_of(
    there: bool, parts: Path, runs: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_device, "has_bf16", lambda device: there)
    done = call("evaluate", parts, "--runs", runs, "--precision", "bf16", "--out", tmp_path / "e", "--no-report")
    assert done.code == 0 and ("float32 is used" in done.err) is not there
    (cell,) = (json.loads(path.read_text()) for path in (tmp_path / "e" / "cells").glob("*.json"))
    assert cell["provenance"]["precision"] == ("bf16" if there else "float32")
    unknown = call("evaluate", parts, "--runs", runs, "--precision", "fp16", "--out", tmp_path / "f")
    assert unknown.code == 2 and "Known: bf16, float32" in unknown.err and not (tmp_path / "f").exists()


def test_the_ci_job_of_the_readme_gates(
    parts: Path, done: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    steps = yaml.safe_load(text)["jobs"]["evaluate"]["steps"]
    install, command = (step["run"] for step in steps if "run" in step)
    assert install == "pip install adflow"  # done already, here
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "parts").symlink_to(parts)
    shutil.copytree(done, tmp_path / "baseline")
    for cell in (tmp_path / "baseline" / "cells").glob("*.json"):
        cell.write_text(cell.read_text().replace('"class": "my parts"', '"class": "parts"'))
    script = f'adflow() {{ {sys.executable} -m adflow "$@"; }}\n{command}\n'
    passed = subprocess.run(["bash", "-ec", script], cwd=tmp_path, capture_output=True, text=True)
    assert passed.returncode == 0, passed.stderr
    assert "verdict" in passed.stdout
    monkeypatch.chdir(tmp_path)
    stricter = shlex.split(command.replace("pixel_auroc=0.97", "pixel_auroc=0.9999"))[1:]
    failed = call(*stricter)
    assert failed.code == 6 and "below 0.9999" in failed.err and "there already" in failed.err


def test_what_is_not_on_this_machine_has_the_code_and_the_hint_of_fit(
    parts: Path, tmp_path: Path, call: Call, own_home: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADFLOW_OFFLINE", "1")
    for command in ("fit", "evaluate"):
        done = call(command, parts, "-m", "padim", "-b", "resnet18", "--out", tmp_path / command)
        assert done.code == 4 and "Use --backbone lite0" in done.err, done.err


def test_without_ray_the_way_is_shown(
    parts: Path, runs: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    for command in (["evaluate", parts, *FIT], ["score", parts / "test"], ["segment", parts / "test", "--nfa", "1"]):
        done = call(*command, "--runs", runs, "--out", tmp_path, "--executor", "ray")
        assert done.code == 4 and "pip install 'adflow[ray]'" in done.err, done.err
    assert call("fit", parts, "--executor", "rya").code == 2
    assert call("fit", parts, "--ray-address", "auto").code == 2
