"""Method by format: how far an export is from the fitted detector, how fast, how large. Prints a Markdown table.

    python tests/benchmarks/bench_export.py [--methods padim,cflow] [--formats onnx,torchscript] [--size 64]

Fits each method on demo/brick (lite0, few training images), exports it, and reads the certificate. A pair that a
format cannot hold prints the reason. Latency: median over the certificate's images, one thread, batch of 1.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from adflow import methods
from adflow.data import open_data
from adflow.detector_file import save_detector
from adflow.errors import AdflowError
from adflow.runs import DETECTOR
from adflow.tasks.export import FORMATS, default_samples, export_bundle
from adflow.tasks.fit import FitOptions, fit_detector, prepare

# Training long enough to leave the starting point, no longer: parity does not depend on quality.
SHORT = {"steps": 10, "epochs": 1, "passes": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", default=",".join(methods.names()))
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--train", type=int, default=24)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    (data, *_) = open_data("demo/brick")
    samples = default_samples(chosen.images)
    print("| method | format | map, of range | score, of range | mask IoU | torch ms | export ms | MB |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        for name in chosen.methods.split(","):
            model = Path(temporary) / name / DETECTOR
            model.parent.mkdir()
            try:
                known = methods.get(name).parameters_of()
                settings = {k: v for k, v in SHORT.items() if k in known and known[k] != v}
                options = FitOptions(method=name, backbone="lite0", settings=settings, device="cpu")
                detector, _, _ = prepare(data, options)
                fit_detector(detector, data.train[: chosen.train], options, (chosen.size, chosen.size), False)
                save_detector(detector, model)
            except AdflowError as error:
                print(f"| {name} | - | not fitted: {error} | | | | | |", flush=True)
                continue
            for kind in chosen.formats.split(","):
                try:
                    c = export_bundle(model, model.parent / kind, kind, samples)
                except AdflowError as error:
                    print(f"| {name} | {kind} | {error} {error.hint or ''} | | | | | |", flush=True)
                    continue
                span, took = c["map_range"], c["milliseconds"]
                print(
                    f"| {name} | {kind} | {c['map_max_difference'] / span:.1e} | "
                    f"{c['score_max_difference'] / span:.1e} | {c['mask_iou']:.4f} | {took['detector']:.1f} | "
                    f"{took['export']:.1f} | {c['bytes'] / 1e6:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
