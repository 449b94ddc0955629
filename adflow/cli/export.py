"""``adflow export``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from adflow.cli import _options as o
from adflow.cli._console import Talk

RANGES = 32  # good images that give the ranges of 8-bit activations


def export(
    model: Annotated[
        str | None, typer.Argument(help="Detector file or run name; default: the last run.", show_default=False)
    ] = None,
    format_: Annotated[
        str | None,
        typer.Option("--format", "-f", help="Bundle: onnx, openvino, torchscript or torch.", show_default=False),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(help="A copy of the detector instead: FILE, or hub:owner/name.", show_default=False),
    ] = None,
    images: Annotated[
        list[str] | None,
        typer.Option(
            help="Images, folders or data sets of the certificate; default: held-out ones of the fit, or the demo.",
            show_default=False,
        ),
    ] = None,
    count: Annotated[int, typer.Option(help="Images of the certificate, at most, evenly chosen.", min=1)] = 16,
    input_: Annotated[
        str, typer.Option("--input", help="Pixels the bundle takes: uint8, or float in [0, 1] for deeper images.")
    ] = "uint8",
    dynamic: Annotated[
        str,
        typer.Option(help="What may vary from call to call: batch, size (of images), or both.", show_default=False),
    ] = "",
    half: Annotated[bool, typer.Option("--half", help="Keep weights in 16 bits.")] = False,
    int8: Annotated[
        bool,
        typer.Option("--int8", help="Round convolutions to 8 bits; needs labelled --images (onnx, openvino)."),
    ] = False,
    max_drop: Annotated[
        float, typer.Option(help="Largest loss of image or pixel AUROC by --int8.", min=0.0, max=1.0)
    ] = 0.01,
    opset: Annotated[int, typer.Option(help="ONNX operator set, 16 to 20.")] = 18,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Largest difference allowed, as a share of the map's range; default: 1e-4, with --half 2e-2.",
            min=0.0,
            show_default=False,
        ),
    ] = None,
    bisect: Annotated[bool, typer.Option("--bisect", help="Compare every layer inside, too (onnx, openvino).")] = False,
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
    from adflow.detector_file import read_header
    from adflow.errors import InputError, UsageError, unknown
    from adflow.runs import find_detector
    from adflow.tasks import export as task
    from adflow.tasks._program import Form
    from adflow.tasks._proof import default_samples, evenly

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
        done = task.publish(path, to.removeprefix("hub:"), runs=runs, private=private, weights=weights)
        talk.data(done, f"{done['repo']} at commit {done['commit']}")
        talk.say(f"licence of the training data: {done['licence']['name']}. {done['licence']['note']}")
        return
    if to is not None:
        place = task.copy_detector(path, Path(to), weights=weights)
        talk.data({"detector": str(place)}, str(place))
        return
    assert format_ is not None
    varying = {word.strip() for word in dynamic.split(",") if word.strip()}
    for word in sorted(varying - {"batch", "size"}):
        raise unknown("--dynamic", word, ["batch", "size"])
    if input_ not in ("uint8", "float"):
        raise unknown("--input", input_, ["uint8", "float"])
    form = Form(format_, input_, "batch" in varying, "size" in varying, half, opset)
    if int8 and not images:
        raise UsageError("--int8 measures what it costs", hint="Give --images DATA, with good and defective images.")
    if images:
        samples, source = gather(images, data_root), "given"
    else:
        samples, source = default_samples(count, read_header(path)["provenance"], data_root)
    ranges = gather(images, data_root, split="train")[:RANGES] if int8 and images else []
    folder = out or path.parent / format_
    with talk.progress("export") as progress:
        done = task.export_bundle(
            path,
            folder,
            form,
            samples if int8 else evenly(samples, count),
            source=source,
            tolerance=tolerance,
            ranges=ranges,
            max_drop=max_drop,
            weights=weights,
            bisect=bisect,
            progress=progress,
        )
    talk.data(done, _table(done))
    proven = "measured" if int8 else f"proven equal within {done['tolerance']:g}"
    talk.say(f"{proven} on {done['images']} images ({source}); written: {folder}")
    talk.next(f"adflow score --model {shlex.quote(str(folder))} IMAGES")


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
        table.add_row(f"{name}, processor ms per image, 1 thread", f"{took:.1f}")
    table.add_row("size", f"{done['bytes'] / 1e6:.1f} MB")
    for name in ("image_auroc", "pixel_auroc"):
        if name in done.get("accuracy", {}):
            before, after = done["accuracy"][name]
            table.add_row(f"{name.split('_')[0]} AUROC", f"{before:.4f} -> {after:.4f}")
    for row in done.get("stages", []):
        table.add_row(f"  {row['stage']}", f"{row['of_range']:.1e}")
    return table
