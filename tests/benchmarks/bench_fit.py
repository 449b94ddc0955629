"""Fit: seconds from image files to a detector, and how good it is, beside anomalib on the same backbone weights.

    python tests/benchmarks/bench_fit.py FOLDER [--methods padim,cflow] [--cache FILE]

FOLDER is laid out like MVTec AD. adflow's side is what ``adflow fit`` does, calibration on held-out images and the
file included; anomalib's is its own default with one pass over the images (longer trainings need a GPU), its
checkpoint included. One run each (PaDiM three), in a process of its own, measured by the same code at 256 px. Then the
trained peers once more with the time adflow took, as many passes as fit into it: quality at equal time. ``--curve``
adds shorter trainings of both sides, and longer ones of the peer: quality against time. What is in the cache is not
run again.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from _contest import Call, Outcome, Sides, cached, cores, measured, show

# adflow's recipes that stand against one peer, and the peer's settings where its default is too long.
METHODS: dict[str, dict[str, Any]] = {
    # Short enough on both sides to run several times: the machine is never the same twice.
    "padim": {"recipes": ("fast",), "rounds": 3},
    "cflow": {"recipes": ("fast", "trained")},
    "fastflow": {"recipes": ("fast",)},
    "uflow": {"recipes": ("fast",)},
    # The peer's 10 % of 327,680 rows would take half a day; 819 rows are still chosen the same way.
    "patchcore": {"recipes": ("fast",), "peer": {"coreset_sampling_ratio": 0.0025}},
    "csflow": {"recipes": ("fast",)},
}
TRAINED = ("cflow", "fastflow", "uflow", "csflow")
# Points of the curves: adflow's recipe with shorter trainings, and the peer's in shares of the time of its one pass.
SHORTER: dict[str, tuple[str, list[dict[str, int]]]] = {
    "cflow": ("trained", [{"steps": 25}, {"steps": 100}]),
    "fastflow": ("fast", [{"epochs": 1}]),
    "uflow": ("fast", [{"epochs": 1}, {"epochs": 2}]),
}
SHARES = (0.5, 2.0)


def adflow_fit(root: str, method: str, recipe: str, **settings: Any) -> Call:
    import torch

    from adflow.data import open_data
    from adflow.detector_file import save_detector
    from adflow.pipeline import run
    from adflow.tasks.fit import FitOptions, fit_detector, prepare

    torch.set_num_threads(cores())
    data = open_data(Path(root))[0]
    options = FitOptions(method=method, recipe=recipe, device="cpu", settings=settings)
    prepare(data, options)
    # Imports and compiled code come before the clock, as they do on the other side.
    small = FitOptions(method="padim", device="cpu", size=(64, 64))
    detector, size, keep_aspect = prepare(data, small)
    fit_detector(detector, data.train[:12], small, size, keep_aspect)

    def call() -> dict[str, Any]:
        with measured() as took:
            detector, size, keep_aspect = prepare(data, options)
            fit_detector(detector, data.train, options, size, keep_aspect)
            save_detector(detector, Path(tempfile.mkdtemp(prefix="bench-adflow-")) / "detector.adflow")
        scored = list(run(detector, data.test))
        return quality(data, [s.map for s in scored], [s.image for s in scored]) | took

    return call


def anomalib_fit(root: str, method: str, settings: dict[str, Any], seconds: float | None) -> Call:
    import _anomalib
    import torch
    from lightning import seed_everything

    from adflow.data import open_data

    torch.set_num_threads(cores())
    data = open_data(Path(root))[0]

    def call() -> dict[str, Any]:
        seed_everything(0)
        with measured() as took:
            model = _anomalib.build(method, **settings)
            runner = _anomalib.engine(1 if seconds is None else 1000, seconds)
            runner.fit(model, datamodule=_anomalib.training_data(Path(root)))
        maps, scores = _anomalib.predict(model, runner, [sample.image for sample in data.test])
        return quality(data, maps, scores) | took

    return call


def quality(data: Any, maps: list[np.ndarray], scores: list[float]) -> dict[str, Any]:
    """Return percentages of one class by adflow's exact metrics, the same for both sides."""
    from adflow import metrics
    from adflow.tasks._measure import truth_of

    known = [i for i, sample in enumerate(data.test) if sample.label == 0 or sample.mask is not None]
    truth = [truth_of(data.test[i], maps[i].shape, maps[i].shape, False) for i in known]
    pixel = metrics.pixel_metrics([np.asarray(maps[i], np.float32) for i in known], truth)
    image = metrics.image_metrics(scores, np.array([sample.label for sample in data.test]))
    return {
        "image AUROC": round(100 * image.auroc, 2),
        "pixel AUROC": round(100 * pixel.auroc, 2),
        "AUPRO": round(100 * pixel.aupro, 2),
    }


def contests(root: Path, method: str, cache: Path | None) -> dict[str, Outcome]:
    """Run (or read) everything of one method; the first side is adflow's default recipe."""
    plan = METHODS[method]
    theirs = plan.get("peer", {})
    note = "".join(f", {k} {v}" for k, v in theirs.items())
    found: dict[str, Outcome] = {}
    sides: Sides = {
        f"adflow {method}, recipe {recipe}": (adflow_fit, str(root), method, recipe) for recipe in plan["recipes"]
    }
    sides |= {f"anomalib {method}{note}": (anomalib_fit, str(root), method, theirs, None)}
    found |= cached(f"fit/{root.name}", sides, cache, plan.get("rounds", 1))
    limit = next(iter(found.values())).median
    if method in TRAINED and limit == limit:
        name = f"anomalib {method}, stopped at adflow's time"
        found |= cached(f"fit/{root.name}", {name: (anomalib_fit, str(root), method, theirs, limit)}, cache)
    return found


def curve(root: Path, method: str, cache: Path | None) -> dict[str, Outcome]:
    """Run (or read) trainings of both sides that end earlier or later, in order of their duration."""
    found = contests(root, method, cache)
    recipe, shorter = SHORTER[method]
    sides: Sides = {}
    for settings in shorter:
        name = f"adflow {method}, recipe {recipe}, " + ", ".join(f"{k} {v}" for k, v in settings.items())
        sides[name] = (partial(adflow_fit, **settings), str(root), method, recipe)
    whole = next(one for name, one in found.items() if name == f"anomalib {method}").median
    for share in SHARES if whole == whole else ():
        name = f"anomalib {method}, stopped at {share:g} of the time of one pass"
        sides[name] = (anomalib_fit, str(root), method, {}, share * whole)
    found |= cached(f"fit/{root.name}", sides, cache)
    return dict(sorted(found.items(), key=lambda item: item[1].median))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--curve", action="store_true", help="shorter and longer trainings too, where there is one")
    parser.add_argument("--cache", type=Path)
    options = parser.parse_args()
    for method in options.methods.split(","):
        run = curve if options.curve and method in SHORTER else contests
        found = run(options.folder.resolve(), method, options.cache)
        show(f"fit {method} on {options.folder.name}", found)


if __name__ == "__main__":
    main()
