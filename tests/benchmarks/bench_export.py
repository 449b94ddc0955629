"""Method by format: how far an export is from the fitted detector, how fast, how large. Prints a Markdown table.

    python tests/benchmarks/bench_export.py [--data mvtec/screw] [--methods padim,cflow] [--formats onnx,onnx-half]

Fits each method on a few training images, exports it, and reads the certificate. A cell holds, of the map's range, the
largest difference of the map and of the score; processor milliseconds per image (median over the certificate's images,
one thread, from the resized image on); megabytes of the model. ``onnx-half`` is ``--format onnx --half``. A pair that a
format cannot hold prints a dash, and the reason below the table.
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
from adflow.tasks._program import Form
from adflow.tasks._proof import default_samples
from adflow.tasks.export import FORMATS, export_bundle
from adflow.tasks.fit import FitOptions, fit_detector, prepare

# Training long enough to leave the starting point, no longer: parity does not depend on quality.
SHORT = {"steps": 10, "epochs": 1, "passes": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="demo/brick")
    parser.add_argument("--methods", default=",".join(methods.names()))
    parser.add_argument("--formats", default=",".join([*FORMATS, "onnx-half"]))
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--train", type=int, default=40)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    (data, *_) = open_data(chosen.data)
    samples, _ = default_samples(chosen.images, {"data": chosen.data})
    formats = chosen.formats.split(",")
    reasons: list[str] = []
    print(f"| method | detector ms | {' | '.join(formats)} | lowest mask IoU |")
    print("|---" * (len(formats) + 3) + "|")
    with tempfile.TemporaryDirectory() as temporary:
        for name in chosen.methods.split(","):
            model = Path(temporary) / name / DETECTOR
            model.parent.mkdir()
            known = methods.get(name).parameters_of()
            settings = {k: v for k, v in SHORT.items() if k in known and known[k] != v}
            options = FitOptions(method=name, backbone="lite0", settings=settings, device="cpu")
            detector, _, _ = prepare(data, options)
            fit_detector(detector, data.train[: chosen.train], options, (chosen.size, chosen.size), False)
            save_detector(detector, model)
            cells, took, overlap = [], [], []
            for kind in formats:
                form = Form(kind.removesuffix("-half"), half=kind.endswith("-half"))
                try:
                    c = export_bundle(model, model.parent / kind, form, samples)
                except AdflowError as error:
                    cells.append("-")
                    reasons.append(f"{name}, {kind}: {error} {error.hint or ''}")
                    continue
                far, score = (c[f"{what}_max_difference"] / c["map_range"] for what in ("map", "score"))
                cells.append(f"{far:.0e}, {score:.0e}, {c['milliseconds']['export']:.0f}, {c['bytes'] / 1e6:.1f}")
                took.append(c["milliseconds"]["detector"])
                overlap.append(c["mask_iou"])
            lowest = f"{min(overlap):.3f}" if overlap else "-"
            middle = f"{sorted(took)[len(took) // 2]:.0f}" if took else "-"
            print(f"| `{name}` | {middle} | {' | '.join(cells)} | {lowest} |", flush=True)
    print("\n".join(reasons))


if __name__ == "__main__":
    main()
