"""``adflow calibrate``."""

from __future__ import annotations

from typing import Annotated

import typer

from adflow.cli import _options as o
from adflow.cli._console import Talk


def calibrate(
    model: Annotated[str, typer.Argument(help="Detector file or run name.")],
    good: Annotated[list[str], typer.Argument(help="Good images or folders, none of them fitted on.")],
    device: o.Device = "auto",
    weights: o.Weights = None,
    strict: o.Strict = False,
    data_root: o.DataRoot = None,
    runs: o.Runs = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Learn the false-alarm rate of a fitted detector anew, from good images of today."""
    from adflow.cli._inputs import gather
    from adflow.runs import find_detector
    from adflow.tasks.fit import calibrate as run_calibrate

    talk = Talk(json=json, quiet=quiet, verbose=verbose)
    path = find_detector(model, runs)
    samples = gather(good, data_root, split="train")
    summary = run_calibrate(path, samples, device=device, weights=weights, strict=strict)
    for error in summary.pop("skipped"):
        talk.warn(f"skipped {error}")
    talk.say(f"{path}: calibrated on {summary['images']} good images")
    talk.data(summary, summary["detector"])
