"""Images per second: encoders alone, scores from tensors, scores from files; in one process, interleaved.

    python tests/benchmarks/bench_score.py DETECTOR FOLDER [--images 160] [--rounds 5] [--precision float32,bf16]
    python tests/benchmarks/bench_score.py DETECTOR FOLDER --grow

Encoder alone is measured both ways, one image per thread in a pool and batches of 8 with all threads; "of encoder" is
taken to the faster. The plain encoder is the same net as timm builds it, cut after the same tap. "Cold" drops the files
from the page cache first (Linux). Stages are milliseconds of one worker per image, from the scoring of files; `command`
is `adflow score FOLDER` as a user starts it: process, imports, detector and written tables included.

``--grow`` gives, per stage, the exponent of time against the number of pixels of the input (256, 512, 1024 px; by a
detector of the same method that has learned nothing, which takes the same time), and of time and memory against the
number of images.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import timm
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from adflow import backbones, methods
from adflow._threads import default_workers, one_thread
from adflow._weights import find_weights, load_strictly, read_weights, rename_lite
from adflow.backbones import make_backbone
from adflow.data import Sample, list_images
from adflow.detector import Detector, FeatureDetector, FeatureShapes
from adflow.detector_file import load_detector
from adflow.imaging import fit_to, read_image
from adflow.pipeline import run

SIDES = (256, 512, 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("detector", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", default="float32", help="float32, bf16, or both with a comma")
    parser.add_argument("--grow", action="store_true")
    chosen = parser.parse_args()
    paths = list_images(chosen.folder)
    paths = paths[:: max(1, len(paths) // chosen.images)][: chosen.images]  # of every kind
    if chosen.grow:
        grow(chosen.detector, paths)
        return
    precisions = chosen.precision.split(",")
    detectors = {precision: load_detector(chosen.detector) for precision in precisions}
    for precision, detector in detectors.items():
        detector.backbone.to_precision(precision)
    first = detectors[precisions[0]]
    assert first.size is not None
    images = torch.from_numpy(np.stack([fit_to(read_image(p), first.size, first.keep_aspect)[0] for p in paths]))
    about = f"{first.method()} on {first.backbone.name}, {first.size} px"
    print(f"{about}, {len(images)} images, {default_workers()} workers")
    rates, stages, scores = measure(detectors, paths, images, chosen.rounds)
    medians = {key: statistics.median(values) for key, values in rates.items()}
    best = {p: max(v for (q, way), v in medians.items() if q == p and "encoder," in way) for p in precisions}
    print(f"{'':44}{'images/s':>9}  {'spread':>15}  of encoder" + "  of float32's" * ("float32" in best))
    for (precision, way), rate in medians.items():
        spread = f"{min(rates[precision, way]):.1f} to {max(rates[precision, way]):.1f}"
        shares = f"{rate / best[precision]:11.2f}" + (f"{rate / best['float32']:14.2f}" if "float32" in best else "")
        print(f"{precision:9}{way:35}{rate:9.1f}  {spread:>15}{shares}")
    for precision, seconds in stages.items():
        shown = ", ".join(f"{name} {1e3 * statistics.median(took):.2f}" for name, took in seconds.items())
        print(f"{precision} stages, ms: {shown}")
    for a, b in itertools.pairwise(scores):
        print(f"rank correlation of image scores, {a} and {b}: {spearmanr(scores[a], scores[b])[0]:.5f}")
    print(f"peak memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
    command(chosen.detector, chosen.folder, precisions)


def measure(
    detectors: dict[str, Detector], paths: list[Path], images: Tensor, rounds: int
) -> tuple[dict[tuple[str, str], list[float]], dict[str, dict[str, list[float]]], dict[str, list[float]]]:
    """Return images/s by (precision, way), seconds per image by precision and stage, image scores by precision."""
    samples = [Sample(path, "test", None, None, None) for path in paths]
    workers = default_workers()
    stages: dict[str, dict[str, list[float]]] = {p: {} for p in detectors}
    scores: dict[str, list[float]] = {}

    def pooled(work: Callable[[Tensor], object], batch: int) -> None:
        with one_thread(), ThreadPoolExecutor(workers) as pool:
            list(pool.map(torch.inference_mode()(work), torch.split(images, batch)))

    def batched(net: Callable[[Tensor], object]) -> None:
        with torch.inference_mode():
            for batch in torch.split(images, 8):
                net(batch)

    def full(precision: str, cold: bool) -> None:
        if cold:
            forget(paths)
        found = list(run(detectors[precision], samples))
        assert all(scored.error is None for scored in found)
        scores[precision] = [scored.image for scored in found]
        for name in found[0].seconds:
            took = statistics.fmean(scored.seconds[name] for scored in found)
            stages[precision].setdefault(name, []).append(took)

    ways: dict[tuple[str, str], Callable[[], None]] = {}
    for p, detector in detectors.items():
        if p == "float32" and detector.backbone.name == "lite0":
            net = plain_lite0(detector.backbone.taps)
            ways[p, "plain encoder of timm, per thread"] = lambda net=net: pooled(net, 1)  # type: ignore[misc]
            ways[p, "plain encoder of timm, batches of 8"] = lambda net=net: batched(net)  # type: ignore[misc]
        net = detector.backbone
        ways[p, "encoder, one image per thread"] = lambda net=net: pooled(net, 1)  # type: ignore[misc]
        ways[p, "encoder, batches of 8"] = lambda net=net: batched(net)  # type: ignore[misc]
        ways[p, "scores from tensors, batch 1"] = lambda d=detector: pooled(d.score, 1)  # type: ignore[misc]
        ways[p, "scores from tensors, batch 16"] = lambda d=detector: pooled(d.score, 16)  # type: ignore[misc]
        ways[p, "scores from files, cold"] = lambda p=p: full(p, True)  # type: ignore[misc]
        ways[p, "scores from files, warm"] = lambda p=p: full(p, False)  # type: ignore[misc]
    rates: dict[tuple[str, str], list[float]] = {key: [] for key in ways}
    for round_ in range(rounds + 1):
        for key, way in ways.items():
            began = time.perf_counter()
            way()
            if round_:  # the first round warms up
                rates[key].append(len(images) / (time.perf_counter() - began))
    return rates, stages, scores


def plain_lite0(taps: tuple[str, ...]) -> nn.Module:
    """Return timm's net with the same weights, cut after the same tap and otherwise as it comes."""
    recipe = backbones._NETS["lite0"]
    full = timm.create_model("tf_efficientnet_lite0")
    file = find_weights("lite0", None)
    assert recipe.depths is not None
    load_strictly(full, rename_lite(read_weights(file.path), recipe.depths), file.path, "lite0")
    return recipe.cut(full.eval(), taps)[0].requires_grad_(False)


def forget(paths: list[Path]) -> None:
    """Drop files from the page cache, where the system lets us."""
    if hasattr(os, "posix_fadvise"):
        for path in paths:
            with path.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def command(detector: Path, folder: Path, precisions: list[str]) -> None:
    """Print seconds and peak memory of the command, for one image and for the folder."""
    for precision, target in itertools.product(precisions, (list_images(folder)[0], folder)):
        with tempfile.TemporaryDirectory() as out:
            call = ["score", str(target), "--model", str(detector), "--precision", precision, "--out", out, "--quiet"]
            began, peak = time.perf_counter(), 0
            with subprocess.Popen([sys.executable, "-m", "adflow", *call], stdout=subprocess.DEVNULL) as process:
                while process.poll() is None:
                    peak = max(peak, resident_bytes(process.pid))
                    time.sleep(0.01)
            took = time.perf_counter() - began
            assert process.returncode == 0
        count = 1 if target.is_file() else len(list_images(target))
        print(f"command, {precision}, {count} images: {took:.1f} s, peak memory {peak >> 20} MiB")


def resident_bytes(process: int | str = "self") -> int:
    """Return the memory a process holds now; 0 where the system does not tell, or the process has gone."""
    try:
        fields = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in fields.splitlines() if line.startswith("VmRSS")), 0)


def grow(path: Path, paths: list[Path]) -> None:
    """Print how the stages grow with the size of the input, and time and memory with the number of images."""
    fitted = load_detector(path)
    samples = [Sample(p, "test", None, None, None) for p in paths]
    few = samples[:16]
    by_side: dict[str, list[float]] = {}
    for side in SIDES:
        detector = unlearned(fitted, side)
        list(run(detector, few[:4]))  # warms up
        found = list(run(detector, few))
        for name in found[0].seconds:
            by_side.setdefault(name, []).append(statistics.median(scored.seconds[name] for scored in found))
        del detector
        gc.collect()
    print(f"{'stage, ms per image':24}" + "".join(f"{side:>9} px" for side in SIDES) + "   exponent of pixels")
    pixels = np.log([side**2 for side in SIDES])
    for name, seconds in by_side.items():
        shown = "".join(f"{1e3 * s:12.2f}" for s in seconds)
        print(f"{name:24}{shown}   {np.polyfit(pixels, np.log(seconds), 1)[0]:.2f}")
    counts = [max(1, len(samples) // 16), max(1, len(samples) // 4), len(samples)]
    took, held = [], []
    for count in counts:
        began = time.perf_counter()
        peak = max(resident_bytes() for _ in run(fitted, samples[:count], keep_map=False))
        took.append(time.perf_counter() - began)
        held.append(peak)
    exponents = [np.polyfit(np.log(counts), np.log(values), 1)[0] for values in (took, held)]
    print(
        f"images {counts}: seconds {[round(s, 2) for s in took]}, exponent {exponents[0]:.2f}; "
        f"memory {[h >> 20 for h in held]} MiB, exponent {exponents[1]:.2f}"
    )


def unlearned(like: Detector, side: int) -> Detector:
    """Return a detector with the parameters of ``like`` for inputs of ``side`` pixels, that has seen no image."""
    assert isinstance(like, FeatureDetector)
    backbone = make_backbone(like.backbone.name, like.backbone.taps)
    detector = methods.get(like.method())(backbone, **like.params())
    assert isinstance(detector, FeatureDetector)
    detector.size = (side, side)
    detector.shapes = FeatureShapes(list(backbone.channels), backbone.grids(detector.size), detector.size)
    detector.prepare(detector.shapes.channels, detector.shapes.grids, detector.size, torch.Generator().manual_seed(0))
    return detector.eval()


if __name__ == "__main__":
    main()
