"""Twenty thousand images in one process: memory and speed stay flat, and the bad one among them is reported."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from conftest import TinyBackbone, make_tiny_images
from PIL import Image

from adflow import methods
from adflow._system import resident_bytes
from adflow.data import Sample
from adflow.tasks.score import score

from .stage import Count

IMAGES, BAD = 20_000, 12_345


def test_twenty_thousand_images(tmp_path: Path, count: Count) -> None:
    if not resident_bytes():
        pytest.skip("this system does not tell how much memory a process holds")
    rng = np.random.default_rng(0)
    files = []
    for i in range(200):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        files.append(Sample(tmp_path / f"{i}.png", "test", None, None, None))
    samples = [files[i % len(files)] for i in range(IMAGES)]
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    samples[BAD] = Sample(tmp_path / "bad.png", "test", None, None, None)
    detector = methods.get("padim")(TinyBackbone()).fit(make_tiny_images(8).normal)

    memory: list[int] = []
    seconds: list[float] = []

    def look(done: int, total: int, message: str) -> None:
        if done % 2000 == 0:
            memory.append(resident_bytes())
            seconds.append(time.process_time())  # of this process: other work on the machine does not count

    found = score(detector, samples, out=tmp_path / "out", workers=1, progress=look)
    errors = [(i, row["error"]) for i, row in enumerate(found["rows"]) if row["error"]]
    assert len(found["rows"]) == IMAGES and [i for i, _ in errors] == [BAD] and "bad.png" in errors[0][1]
    drift = memory[-1] / memory[0] - 1
    speeds = 2000 / np.diff(seconds)
    slower = speeds[-3:].mean() / speeds[:3].mean()
    print(f"RSS {memory[0] >> 20} -> {memory[-1] >> 20} MiB ({drift:+.1%}); "
          f"{speeds.mean():.0f} images per CPU second, last third at {slower:.2f} of the first")  # fmt: skip
    assert drift < 0.05
    # A leak or a list that is searched shows as a factor; a tenth is the noise of a shared machine.
    assert slower > 0.8
    count("images in one process", True)
