"""Cells and images on a Ray cluster of two nodes, one of which is lost: the same results as here."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import conftest
import numpy as np
import pytest
import torch
from children import tree
from conftest import TinyBackbone, make_tiny_images
from miniatures import make_mvtec
from PIL import Image

from adflow import cli, features, methods
from adflow._extract import Extraction
from adflow._threads import one_thread
from adflow.data import Images, Sample, open_data
from adflow.detector import Resources
from adflow.errors import InputError, UnavailableError
from adflow.pipeline import run
from adflow.tasks import _ray
from adflow.tasks import evaluate as task
from adflow.tasks._cells import Measuring, plan_fits
from adflow.tasks.fit import FitOptions, fit_detector

ray = pytest.importorskip("ray")
# Ray leaves sockets and files to the collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[Any, Any]]:
    """A cluster of two nodes with one CPU each, and the second of them."""
    from ray.cluster_utils import Cluster

    patch = pytest.MonkeyPatch()
    # Ray's workers stand back for everything else by default: on a busy machine they would not get on.
    patch.setenv("RAY_worker_niceness", "0")
    cluster = Cluster()
    cluster.add_node(num_cpus=1, include_dashboard=False)
    second = cluster.add_node(num_cpus=1)
    # Workers do not find modules of tests.
    for module in (conftest, sys.modules[__name__]):
        ray.cloudpickle.register_pickle_by_value(module)
    yield cluster, second
    ray.shutdown()
    cluster.shutdown()
    patch.undo()


def slow_squares(items: Sequence[Any]) -> Iterator[Any]:
    for folder, number in items:
        (folder / f"{number}-{time.monotonic_ns()}").touch()
        time.sleep(0.3)
        if number < 0:
            raise ValueError(f"{number} has no root")
        yield number * number


def test_images_and_units_are_those_of_one_process_and_a_lost_node_costs_its_own(
    nodes: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, second = nodes
    there = _ray.connect(cluster.address)
    assert there.slots == 2

    # Images: in order, the same bits, unreadable ones named.
    detector = methods.get("padim")(TinyBackbone()).fit(make_tiny_images().normal)
    rng = np.random.default_rng(0)
    samples = []
    for i in range(20):
        path = tmp_path / f"{i}.png"
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(path)
        samples.append(Sample(path, "test", None, None, None))
    samples[3].image.write_bytes(b"no image")
    state = torch.random.get_rng_state()
    ours = list(run(detector, samples, after=lambda s: s.image * 2))
    theirs = list(there.images(detector, samples, after=lambda s: s.image * 2))
    assert [s.sample for s in theirs] == samples and torch.equal(state, torch.random.get_rng_state())
    for a, b in zip(ours, theirs, strict=True):
        assert a.error == b.error and np.array_equal(a.map, b.map)
        assert a.error or (a.image == b.image and a.result == b.result)
    with pytest.raises(InputError, match=r"3\.png"):
        list(there.images(detector, samples, strict=True))

    # Features: as extracted here, for any method.
    ours_bank, theirs_bank = (
        Resources(spread=spread).build(TinyBackbone(), Images([s.image for s in samples] * 2, (64, 64)))
        for spread in (None, there.bank)
    )
    assert len(theirs_bank) == 38
    assert all(torch.equal(ours_bank.level(k), theirs_bank.level(k)) for k in range(3))
    images = Images([s.image for s in samples], (64, 64))
    there.bank(TinyBackbone(), images, "float32", None)
    assert len(images) == 19 and [path.name for path, _ in images.skipped] == ["3.png"]

    # A fit: what is learned of parts on the nodes is what is learned of the same parts here, and so is the calibration.
    monkeypatch.setattr(features, "PART", 7)
    for name in ("padim", "patchcore", "local", "differnet", "cutpaste"):
        found = []
        for spread in (None, there.bank):
            detector = methods.get(name)(TinyBackbone())
            options = FitOptions(name, holdout=0.3, resources=Resources(spread=spread, workers=1))
            summary = fit_detector(detector, samples, options, (64, 64), keep_aspect=False)
            assert detector.calibration is not None and len(summary["skipped"]) == 1
            found.append((summary["digest"], *detector.calibration.tensors().values()))
        assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True)), name

    # Units: one node dies when two results are there.
    folder = tmp_path / "began"
    folder.mkdir()
    units = [[(folder, 3 * unit + i) for i in range(3)] for unit in range(3)] + [[(folder, -1), (folder, 9)]]
    found: dict[tuple[int, int], Any] = {}
    for unit, place, result in there.units(slow_squares, units):
        assert (unit, place) not in found
        found[unit, place] = result
        if len(found) == 2:
            threading.Thread(target=cluster.remove_node, args=(second,)).start()
    error = found.pop((3, 0))
    assert isinstance(error, ValueError) and "no root" in str(error)
    assert found == {(u, i): n * n for u, unit in enumerate(units) for i, (_, n) in enumerate(unit) if n >= 0}
    # What the living node did was done once: only the unit that was on the lost one began again.
    began = [int(path.name.rpartition("-")[0]) for path in folder.iterdir()]
    again = {n // 3 for n in range(9) if began.count(n) > 1}
    assert len(again) <= 1, began
    # Features that lay on it are made again.
    assert all(torch.equal(ours_bank.level(k), theirs_bank.level(k)) for k in range(3))


def test_commands_write_the_same_files(nodes: tuple[Any, Any], tmp_path: Path) -> None:
    data = make_mvtec(tmp_path / "mvtec", ["cable"], train=12) / "cable"
    detector = tmp_path / "run" / "detector.safetensors"
    assert cli.run(["fit", str(data), "-m", "padim", "--size", "64", "--out", str(detector.parent), "-q"]) == 0
    commands = {
        "score": [data / "test"],
        "segment": [data / "test", "--flag-rate", "0.5"],
        "evaluate": [data, "--overlays"],
    }
    for name, arguments in commands.items():
        found = []
        for where in ([], ["--executor", "ray", "--ray-address", nodes[0].address]):
            out = tmp_path / f"{name}-{len(where)}"
            rest = ["--model", detector, "--out", out, "-q", *where]
            assert cli.run([str(word) for word in (name, *arguments, *rest)]) == 0
            files = tree(out)
            if name == "evaluate":  # seconds differ, and stand in the reports
                files = {path: content for path, content in files.items() if path.startswith("overlays")}
                (cell,) = (json.loads(path.read_text()) for path in (out / "cells").glob("*.json"))
                files["cell"] = json.dumps(cell | {"cost": 0}).encode()
            found.append(files)
        assert found[0] == found[1] and len(found[0]) >= 2, name


def test_cells_read_features_that_the_nodes_extracted_once(
    nodes: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = open_data(make_mvtec(tmp_path / "mvtec", ["cable"], train=12) / "cable")[0]
    options, measuring = FitOptions(size=(64, 64)), Measuring()
    jobs = plan_fits([data], ["padim", "patchcore"], [0, 1], options, measuring)
    folders = [tmp_path / name for name in ("here", "there")]
    there = _ray.connect(nodes[0].address)
    for folder, cluster in zip(folders, (None, there), strict=True):
        assert not task.evaluate(jobs, measuring, folder, cluster=cluster).failed
    cells = [[json.loads(path.read_text()) for path in sorted(folder.glob("cells/*.json"))] for folder in folders]
    assert len(cells[0]) == 4
    assert [cell | {"cost": 0} for cell in cells[0]] == [cell | {"cost": 0} for cell in cells[1]]

    # The features of a cell that a task is sent are all that it needs of the training images.
    assert task._extracted(jobs, [[0], [1]], there, None) == {}
    shared = task._extracted(jobs, [[0, 1, 2, 3]], there, None)
    assert set(shared) == {0, 1, 2, 3} and len(set(map(id, shared.values()))) == 1
    items = [task._Item(jobs[i], measuring, tmp_path / "sent", None, None, None, shared[i]) for i in (0, 2)]
    (tmp_path / "sent" / "cells").mkdir(parents=True)
    sent = ray.cloudpickle.loads(ray.cloudpickle.dumps(items))
    monkeypatch.setattr(Extraction, "run", None)
    with one_thread():
        assert [list(task.work([item])) for item in sent] == [[None], [None]]
    for item in sent:
        cell = json.loads((tmp_path / "sent" / "cells" / f"{item.job.name}.json").read_text())
        assert cell | {"cost": 0} in [one | {"cost": 0} for one in cells[0]]


def test_no_cluster_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(UnavailableError, match="no Ray cluster"):
        _ray.connect("127.0.0.1:1")
