"""Memory and time of a fit, a scoring and an evaluation against the number of frames.

A set in the layout of ShanghaiTech Campus is generated (64 x 96 px, half of the frames for training, half for test, in
videos of 500 frames; drifting stripes, a bright square where a frame is abnormal), and each command is run on it in a
process of its own. Printed are CPU seconds per 1,000 frames and the peak of resident memory: both should not grow.

    python tests/benchmarks/bench_scale.py FOLDER [5000,50000] [method] [size]
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

HEIGHT, WIDTH, VIDEO = 64, 96, 500
LIMIT = "1GiB"


def frame(rng: np.random.Generator, t: int, bad: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return a frame [H, W, 3] uint8 and its mask [H, W] bool."""
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    grey = 120 + 50 * np.sin(x / 7 + 0.02 * t) + 30 * np.cos(y / 5) + rng.normal(0, 6, (HEIGHT, WIDTH))
    mask = np.zeros((HEIGHT, WIDTH), bool)
    if bad:
        top, left = 8 + t % 40, 10 + t % 70
        mask[top : top + 12, left : left + 12] = True
        grey[mask] = 240
    return np.repeat(grey.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2), mask


def make(folder: Path, frames: int) -> None:
    """Write ``frames`` frames in all, one scene."""
    rng = np.random.default_rng(0)
    for part, digits in (("training", 8), ("testing", 3)):
        for video in range(frames // 2 // VIDEO):
            name = f"01_{video:04d}"
            place = folder / part / "frames" / name
            place.mkdir(parents=True)
            masks = np.zeros((VIDEO, HEIGHT, WIDTH), np.uint8)
            for i in range(VIDEO):
                picture, masks[i] = frame(rng, i, part == "testing" and i % 100 >= 80)
                Image.fromarray(picture).save(place / f"{i:0{digits}d}.jpg", quality=90)
            if part == "testing":
                for kind, array in (("frame", masks.any((1, 2)).astype(np.uint8)), ("pixel", masks)):
                    path = folder / part / f"test_{kind}_mask" / f"{name}.npy"
                    path.parent.mkdir(exist_ok=True)
                    np.save(path, array)


def measured(arguments: list[str]) -> tuple[float, float]:
    """Run a command; return its CPU seconds and the peak of its resident memory in MiB."""
    child = os.spawnvpe(os.P_NOWAIT, sys.executable, [sys.executable, "-m", "adflow", *arguments], dict(os.environ))
    _, status, used = os.wait4(child, 0)
    if status:
        raise SystemExit(f"{' '.join(arguments)} ended with {status}")
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def main(base: Path, counts: list[int], method: str, size: str) -> None:
    print("| frames | command | CPU seconds per 1,000 frames | peak RSS, MiB |\n|---|---|---|---|")
    for count in counts:
        root, runs = base / f"stc-{count}" / "stc", base / f"runs-{count}-{method}"
        if not root.exists():
            make(root, count)
        shutil.rmtree(runs, ignore_errors=True)
        where = ["--data-root", str(root.parent), "--runs", str(runs), "-q"]
        for command, most in (
            (["fit", "stc/01", "-m", method, "--size", size, "--max-memory", LIMIT], count // 2),
            (["score", "stc/01", "--top", "1"], count // 2),
            (["evaluate", "stc/01", "--map-memory", "256MiB", "--no-report"], count // 2),
        ):
            took, peak = measured([*command, *where])
            print(f"| {count:,} | {command[0]} | {took / most * 1e3:.1f} | {peak:.0f} |", flush=True)


if __name__ == "__main__":
    sizes = [int(n) for n in (sys.argv[2] if len(sys.argv) > 2 else "5000,50000").split(",")]
    method = sys.argv[3] if len(sys.argv) > 3 else "cflow"
    main(Path(sys.argv[1]), sizes, method, sys.argv[4] if len(sys.argv) > 4 else f"{HEIGHT}x{WIDTH}")
