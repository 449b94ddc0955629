"""Cost of the NFA tree against what must be done anyway: one sum of squares over z, one sort per scale.

    python tests/benchmarks/bench_nfa.py

One thread, medians of interleaved runs, in processor time. Bars: 4 x the floor for the first shape, 6 x for the
second, the path without numba at most 5 x slower, compilation under 3 s, growth about n log n.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from unittest import mock

import numpy as np

from adflow import _maxtree, nfa

SHAPES = [
    [(816, 28), (192, 14)],
    [(336, 64), (320, 32), (512, 16)],
    [(84, 64), (80, 32), (128, 16)],
]
GROWTH = [(64, side) for side in (16, 32, 64, 128, 256)]
SIZE = (256, 256)


def latents(shapes: list[tuple[int, int]], seed: int) -> list[np.ndarray]:
    """Return N(0, 1) latents whose scale varies smoothly and holds two blobs, as a trained flow's do."""
    rng = np.random.default_rng(seed)
    scales = []
    for channels, side in shapes:
        y, x = np.mgrid[:side, :side] / side
        scale = np.exp(0.08 * np.sin(5 * x + rng.uniform(0, 6)) * np.cos(4 * y + rng.uniform(0, 6)))
        for cy, cx, radius in ((0.3, 0.6, 0.06), (0.7, 0.2, 0.1)):
            scale += np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * radius**2))
        scales.append((rng.standard_normal((1, channels, side, side)) * scale).astype(np.float32))
    return scales


def floor(z: list[np.ndarray]) -> None:
    for scale in z:
        np.argsort(np.einsum("bchw,bchw->bhw", scale, scale).ravel())


def tree(z: list[np.ndarray]) -> None:
    nfa.tree(nfa.latent_energies(z), SIZE)


def plain(z: list[np.ndarray]) -> None:
    with mock.patch.object(_maxtree, "compiled", lambda: None):
        tree(z)


Call = Callable[[list[np.ndarray]], None]


def side(which: str, shapes: list[tuple[int, int]]) -> Callable[[], None]:
    """Return a call for ``_contest``: every time latents of its own, so that no cache helps."""
    work = {"adflow": tree, "adflow without numba": plain, "floor": floor}[which]
    rounds = itertools.cycle([latents(shapes, seed) for seed in range(8)])
    return lambda: work(next(rounds))


def medians(calls: list[Call], shapes: list[tuple[int, int]]) -> list[float]:
    """Return milliseconds per call, interleaved; every round has latents of its own, so no cache helps."""
    rounds = [latents(shapes, seed) for seed in range(15)]
    for call in calls:
        call(rounds[0])
    took: list[list[float]] = [[] for _ in calls]
    for z in rounds:
        for call, times in zip(calls, took, strict=True):
            begin = time.thread_time()  # processor time: other processes do not count
            call(z)
            times.append(1e3 * (time.thread_time() - begin))
    return [float(np.median(times)) for times in took]


def first_call(cache: str) -> float:
    """Return processor seconds of the first call in a new process, the import of adflow and numpy left out."""
    code = (
        "import time, numpy as np; from adflow import nfa\n"
        "z = [np.random.default_rng(0).standard_normal((1, 8, 9, 9)).astype('float32')]\n"
        "e = nfa.latent_energies(z); t = time.process_time(); nfa.tree(e, (9, 9)); print(time.process_time() - t)"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return float(run.stdout)


def main() -> None:
    print(f"{'latents':42} {'floor ms':>9} {'tree ms':>9} {'x floor':>8} {'plain ms':>9} {'x tree':>7}")
    for shapes in SHAPES:
        label = " + ".join(f"{c}x{s}x{s}" for c, s in shapes)
        low, quick, slow = medians([floor, tree, plain], shapes)
        print(f"{label:42} {low:9.3f} {quick:9.3f} {quick / low:8.2f} {slow:9.3f} {slow / quick:7.2f}")
    times = []
    for channels, side in GROWTH:
        low, quick, slow = medians([floor, tree, plain], [(channels, side)])
        times.append(quick)
        label = f"{channels}x{side}x{side}"
        print(f"{label:42} {low:9.3f} {quick:9.3f} {quick / low:8.2f} {slow:9.3f} {slow / quick:7.2f}")
    pixels = np.array([side * side for _, side in GROWTH])
    exponent = np.polyfit(np.log(pixels[2:]), np.log(times[2:]), 1)[0]
    print(f"time grows as pixels ** {exponent:.2f} from 64x64 to 256x256 (n log n: about 1.1)")
    with tempfile.TemporaryDirectory() as cache:
        print(f"first call: {first_call(cache):.2f} s compiling, {first_call(cache):.2f} s from numba's cache on disk")


if __name__ == "__main__":
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    if any(os.environ.get(name) != "1" for name in one):  # read when numpy is loaded: start again with them
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **one})
    main()
