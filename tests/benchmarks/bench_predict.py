"""Scoring from files: images per second until their scores are written, beside anomalib's predict and the bare encoder.

    python tests/benchmarks/bench_predict.py FOLDER [--methods padim,cflow] [--images 83] [--rounds 5]

FOLDER is laid out like MVTec AD. Both sides have the same files, method and backbone weights, and write one CSV of
scores. adflow scores image by image (its result cannot depend on a batch); anomalib gets batches of 16 and of 1. The
encoder alone is timm's net, as it comes, over images that are decoded already. Models are fitted on few images: how
fast they score does not depend on it.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _contest import Call, Outcome, Sides, contest, cores, show

FITTED_ON = 24


def _files(root: str, images: int) -> tuple[Any, list[Any]]:
    import torch

    from adflow.data import open_data

    torch.set_num_threads(cores())
    data = open_data(Path(root))[0]
    return data, list(data.test)[:images]


def adflow_score(root: str, method: str, images: int, precision: str = "float32") -> Call:
    from adflow.tasks.fit import FitOptions, fit_detector, prepare
    from adflow.tasks.score import score

    data, samples = _files(root, images)
    options = FitOptions(method=method, device="cpu")
    detector, size, keep_aspect = prepare(data, options)
    fit_detector(detector, data.train[:FITTED_ON], options, size, keep_aspect)
    detector.backbone.to_precision(precision)
    out = Path(tempfile.mkdtemp(prefix="bench-adflow-"))

    def call() -> None:
        score(detector, samples, out=out)

    return call


def anomalib_predict(root: str, method: str, images: int, batch_size: int) -> Call:
    import _anomalib

    data, samples = _files(root, images)
    model, runner = _anomalib.build(method), _anomalib.engine()
    if method in ("padim", "patchcore"):  # flows score as fast before they are trained
        folder = Path(tempfile.mkdtemp(prefix="bench-anomalib-")) / "train" / "good"
        folder.mkdir(parents=True)
        for sample in data.train[:FITTED_ON]:
            (folder / sample.image.name).symlink_to(sample.image)
        runner.fit(model, datamodule=_anomalib.training_data(folder.parent.parent))
    paths = [sample.image for sample in samples]
    out = Path(tempfile.mkdtemp(prefix="bench-anomalib-")) / "scores.csv"

    def call() -> None:
        _, scores = _anomalib.predict(model, runner, paths, batch_size)
        with out.open("w", newline="") as stream:
            csv.writer(stream).writerows(zip(paths, scores, strict=True))

    return call


def encoder_alone(root: str, images: int, batch_size: int) -> Call:
    """The plain net of timm, not adflow's streamlined copy: what a user would have without either library."""
    import numpy as np
    import timm
    import torch

    from adflow._weights import find_weights, read_weights, rename_lite
    from adflow.imaging import fit_to, read_image

    _, samples = _files(root, images)
    net = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=(2, 3)).eval()
    state = rename_lite(read_weights(find_weights("lite0").path), (1, 2, 2, 3, 3, 4, 1))
    net.load_state_dict(state, strict=False)
    net = net.to(memory_format=torch.channels_last)
    pictures = torch.from_numpy(np.stack([fit_to(read_image(s.image), (256, 256), False)[0] for s in samples]))

    @torch.inference_mode()
    def call() -> None:
        for batch in torch.split(pictures, batch_size):
            net((batch * 2 - 1).contiguous(memory_format=torch.channels_last))

    return call


def sides(root: str, method: str, images: int) -> Sides:
    """Return the sides of one method by name; the first is the one the others are compared with."""
    return {
        f"adflow score, {method}": (adflow_score, root, method, images),
        f"anomalib predict, {method}, batches of 16": (anomalib_predict, root, method, images, 16),
        f"anomalib predict, {method}, batches of 1": (anomalib_predict, root, method, images, 1),
        "encoder alone (timm), batches of 8": (encoder_alone, root, images, 8),
        "encoder alone (timm), batches of 1": (encoder_alone, root, images, 1),
    }


def rates(found: dict[str, Outcome], images: int) -> None:
    """Add images per second to what is printed as quality."""
    for one in found.values():
        if one.seconds:
            one.result = {"images/s": round(images / one.median, 2)} | one.result


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--methods", default="padim,cflow")
    parser.add_argument("--images", type=int, default=83)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args(arguments)
    for method in given.methods.split(","):
        found = contest(sides(str(given.folder.resolve()), method, given.images), given.rounds)
        rates(found, given.images)
        show(f"score {given.images} images of {given.folder.name} from files, {cores()} cores", found)


if __name__ == "__main__":
    main()
