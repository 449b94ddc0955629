"""``adflow export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from adflow.cli import _options as o
from adflow.cli._console import Talk


def export(
    model: Annotated[
        str | None, typer.Argument(help="Detector file or run name; default: the last run.", show_default=False)
    ] = None,
    format_: Annotated[
        str | None,
        typer.Option("--format", "-f", help="Write a bundle: onnx, torchscript or torch.", show_default=False),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(help="A copy of the detector instead: FILE, or hub:owner/name.", show_default=False),
    ] = None,
    images: Annotated[
        list[str] | None,
        typer.Option(help="Images, folders or data sets of the certificate; default: the demo.", show_default=False),
    ] = None,
    count: Annotated[int, typer.Option(help="Images of the certificate, at most.", min=1)] = 16,
    tolerance: Annotated[
        float, typer.Option(help="Largest difference allowed, as a share of the map's range.", min=0.0)
    ] = 1e-4,
    bisect: Annotated[
        bool, typer.Option("--bisect", help="Compare the stages inside, too (onnx).")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="Make a new hub repository private.")] = False,
    weights: o.Weights = None,
    data_root: o.DataRoot = None,
    runs: o.Runs = None,
    out: o.Out = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Write a bundle that runs elsewhere, proven equal to the fitted detector; or a copy, or to the hub."""
    from adflow.cli._inputs import gather
    from adflow.errors import InputError, UsageError, unknown
    from adflow.runs import find_detector
    from adflow.tasks import export as task

    talk = Talk(json=json, quiet=quiet, verbose=verbose)
    if (format_ is None) == (to is None):
        raise UsageError("give one of --format and --to", hint="adflow export RUN --format onnx")
    if format_ is not None and format_ not in task.FORMATS:
        raise unknown("format", format_, task.FORMATS)
    path = find_detector(model, runs)
    if path.is_dir():
        raise InputError(f"{path} is a bundle already", hint="Give the run it was exported from.")
    if model is None:
        talk.say(f"model: {path.parent.name} (the run fitted last)")
    if to is not None and to.startswith("hub:"):
        done = task.publish(path, to.removeprefix("hub:"), runs=runs, private=private)
        talk.data(done, f"{done['repo']} at commit {done['commit']}")
        talk.say(f"licence of the training data: {done['licence']['name']}. {done['licence']['note']}")
        return
    if to is not None:
        place = task.copy_detector(path, Path(to))
        talk.data({"detector": str(place)}, str(place))
        return
    assert format_ is not None
    samples = gather(images, data_root) if images else task.default_samples(count)
    folder = out or path.parent / format_
    with talk.progress("export") as progress:
        done = task.export_bundle(
            path,
            folder,
            format_,
            samples[:count],
            tolerance=tolerance,
            weights=weights,
            bisect=bisect,
            progress=progress,
        )
    talk.data(done, _table(done))
    talk.say(f"proven equal on {done['images']} images; written: {folder}")
    talk.next(f"adflow score --model {folder} IMAGES")


def _table(done: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("against the fitted detector")
    table.add_column("", justify="right")
    span = done["map_range"]
    table.add_row("map, largest difference of its range", f"{done['map_max_difference'] / span:.1e}")
    table.add_row("score, largest difference of the map's range", f"{done['score_max_difference'] / span:.1e}")
    table.add_row("mask IoU", f"{done['mask_iou']:.4f}")
    table.add_row("verdicts equal", f"{done['verdicts_equal']} of {done['images']}")
    for name, took in done["milliseconds"].items():
        table.add_row(f"{name}, ms per image, 1 thread", f"{took:.1f}")
    table.add_row("size", f"{done['bytes'] / 1e6:.1f} MB")
    for row in done.get("stages", []):
        table.add_row(f"  {row['stage']}", f"{row['of_range']:.1e}")
    return table
