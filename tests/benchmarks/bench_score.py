"""Images per second: the encoder alone, and full scoring from files to maps and image scores, in one process.

    python tests/benchmarks/bench_score.py DETECTOR FOLDER [--images 160] [--rounds 5]

The encoder is measured both ways: one image per thread in a pool, and batches of 8 with all threads; the ratio is
taken to the faster. Rounds are interleaved, medians printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from adflow.data import Sample, list_images
from adflow.detector_file import load_detector
from adflow.features import one_thread
from adflow.imaging import fit_to, read_image
from adflow.pipeline import default_workers, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("detector", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    detector = load_detector(chosen.detector)
    assert detector.size is not None
    paths = list_images(chosen.folder)[: chosen.images]
    samples = [Sample(path, "test", None, None, None) for path in paths]
    arrays = [fit_to(read_image(path), detector.size, detector.keep_aspect)[0] for path in paths]
    images = torch.from_numpy(np.stack(arrays))
    workers = default_workers()

    @torch.inference_mode()
    def one(i: int) -> None:
        detector.backbone(images[i : i + 1])

    def pooled() -> None:
        with one_thread(), ThreadPoolExecutor(workers) as pool:
            list(pool.map(one, range(len(images))))

    @torch.inference_mode()
    def batched() -> None:
        for batch in torch.split(images, 8):
            detector.backbone(batch)

    def full() -> None:
        for scored in run(detector, samples):
            assert scored.error is None

    ways = {"encoder, one image per thread": pooled, "encoder, batches of 8": batched, "full scoring from files": full}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(chosen.rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if round_:  # the first round warms up
                rates[name].append(len(images) / (time.perf_counter() - began))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    best = max(value for name, value in medians.items() if name.startswith("encoder"))
    print(f"{detector.method()} on {detector.backbone.name}, {detector.size} px, {len(images)} images, {workers} cores")
    for name, value in medians.items():
        spread = f"{min(rates[name]):.1f} to {max(rates[name]):.1f}"
        print(f"{name:32} {value:7.1f} images/s ({spread})   {value / best:.2f} of the encoder")


if __name__ == "__main__":
    main()
