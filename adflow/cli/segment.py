"""``adflow segment``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from adflow.cli import _options as o
from adflow.cli._console import Talk, image_table


def segment(
    paths: o.Paths,
    model: o.Model = None,
    nfa: o.Nfa = None,
    flag_rate: o.FlagRate = None,
    threshold: o.Threshold = None,
    null: Annotated[str, typer.Option(help="calibrated on held-out images, or gaussian.")] = "calibrated",
    bound: Annotated[str, typer.Option(help="Of --null gaussian: one-sided or reference.")] = "one-sided",
    tests: Annotated[str, typer.Option(help="Of --null gaussian: image (the original's charge) or area.")] = "image",
    min_area: Annotated[int, typer.Option(help="Drop regions of fewer pixels.", min=0)] = 0,
    overlays: Annotated[bool, typer.Option("--overlays/--no-overlays", help="Write pictures for people.")] = True,
    overlay_size: Annotated[
        int | None, typer.Option(help="Longer side of the pictures in pixels.", show_default=False, min=16)
    ] = None,
    device: o.Device = "auto",
    precision: o.Precision = "float32",
    weights: o.Weights = None,
    workers: o.Workers = None,
    stride: o.Stride = 1,
    executor: o.Executor = "local",
    ray_address: o.RayAddress = None,
    strict: o.Strict = False,
    data_root: o.DataRoot = None,
    runs: o.Runs = None,
    out: o.Out = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Mark the defects: masks, overlays, regions.jsonl and COCO, at a false-alarm rate you choose."""
    from adflow._lock import claim
    from adflow.cli._inputs import gather, open_detector
    from adflow.errors import UsageError, unknown
    from adflow.pipeline import run
    from adflow.tasks._null import GaussianNull
    from adflow.tasks._point import gaussian_point, operating_point
    from adflow.tasks.segment import segment as run_segment

    talk = Talk(json=json, quiet=quiet, verbose=verbose)
    samples = gather(paths, data_root, stride=stride)
    detector, path = open_detector(model, runs, device, precision, weights, talk)
    if null not in ("calibrated", "gaussian"):
        raise unknown("null model", null, ["calibrated", "gaussian"])
    if null == "gaussian":
        if flag_rate is not None or threshold is not None:
            raise UsageError("--null gaussian goes with --nfa only")
        detector = GaussianNull(detector, bound, tests)
        point = gaussian_point(nfa)
    else:
        point = operating_point(detector, nfa=nfa, flag_rate=flag_rate, threshold=threshold)
    folder = out or path.parent / "segment"
    cluster = o.cluster(executor, ray_address, workers, device)
    with claim(folder, "masks", "overlays"), talk.progress("segment") as progress:
        result = run_segment(
            detector,
            samples,
            point,
            out=folder,
            min_area=min_area,
            overlays=overlays,
            overlay_size=overlay_size,
            strict=strict,
            workers=workers,
            through=cluster.images if cluster else run,
            progress=progress,
        )
    for row in result["images"]:
        if row["error"]:
            talk.warn(f"skipped {row['error']}")
    if result["drift"] and result["drift"].get("warning"):
        talk.warn(result["drift"]["warning"])
    talk.data({**result, "detector": str(path)}, _table(result))
    marked = sum(row["verdict"] == "defect" for row in result["images"])
    talk.say(f"{len(result['regions'])} regions in {marked} of {len(result['images'])} images. {point.promise}")
    if point.observed:
        talk.say(
            f"On the {point.observed['images']:.0f} calibration images: "
            f"{point.observed['regions_per_image']:.2f} regions per image, "
            f"{point.observed['flagged_share']:.0%} of them marked."
        )
    pictures = ", overlays" if overlays else ""
    talk.say(f"written: {folder}/masks{pictures}, regions.jsonl, images.csv, coco.json")


def _table(result: dict[str, Any]) -> Any:
    from rich.text import Text

    rows = [row for row in result["images"] if not row["error"]]
    rows.sort(key=lambda row: (row["log10_nfa"] if row["log10_nfa"] is not None else 0.0, -row["score"]))
    shown = [
        (
            row["image"],
            (
                str(row["regions"]),
                str(row["area"]),
                "-" if row["log10_nfa"] is None else f"{row['log10_nfa']:.2f}",
                Text(row["verdict"], style="bold red" if row["verdict"] == "defect" else ""),
            ),
        )
        for row in rows[:20]
    ]
    below = f"the 20 strongest of {len(rows)}; all are in images.csv" if len(rows) > 20 else None
    return image_table(("regions", "pixels", "log10 NFA", "verdict"), shown, below)
