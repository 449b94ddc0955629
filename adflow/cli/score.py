"""``adflow score``."""

from __future__ import annotations

import shlex
from typing import Annotated, Any

import typer

from adflow.cli import _options as o
from adflow.cli._console import Talk, image_table


def score(
    paths: o.Paths,
    model: o.Model = None,
    flag_rate: o.FlagRate = None,
    device: o.Device = "auto",
    precision: o.Precision = "float32",
    weights: o.Weights = None,
    workers: o.Workers = None,
    stride: o.Stride = 1,
    executor: o.Executor = "local",
    ray_address: o.RayAddress = None,
    top: Annotated[int, typer.Option(help="Rows of the table on the terminal; 0 = all.", min=0)] = 20,
    profile: Annotated[bool, typer.Option("--profile", help="Show where the time goes.")] = False,
    strict: o.Strict = False,
    data_root: o.DataRoot = None,
    runs: o.Runs = None,
    out: o.Out = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Give every image an anomaly score, a p-value and a verdict; CSV and JSON lines beside the table."""
    from adflow._lock import claim
    from adflow.cli._inputs import gather, open_detector
    from adflow.pipeline import run
    from adflow.tasks.score import score as run_score

    talk = Talk(json=json, quiet=quiet, verbose=verbose)
    samples = gather(paths, data_root, stride=stride)
    detector, path = open_detector(model, runs, device, precision, weights, talk)
    folder = out or path.parent / "score"
    cluster = o.cluster(executor, ray_address, workers, device)
    with claim(folder), talk.progress("score") as progress:
        result = run_score(
            detector,
            samples,
            rate=flag_rate,
            out=folder,
            strict=strict,
            workers=workers,
            keep=None if json else top or None,
            through=cluster.images if cluster else run,
            progress=progress,
        )
    failed, flagged = result.pop("failed"), result.pop("flagged")
    for error in failed:
        talk.warn(f"skipped {error}")
    count = result["profile"]["images"] - len(failed)
    if result["drift"] and result["drift"].get("warning"):
        talk.warn(result["drift"]["warning"])
    talk.data({**result, "detector": str(path), "out": str(folder)}, _table(result["rows"], top, count))
    if result["rate"] is not None:
        talk.say(
            f"{flagged} of {count} images called defective; of good images at most {result['rate']:.1%} are, on average"
        )
    else:
        talk.warn("this detector is not calibrated: scores only, no verdict. Run `adflow calibrate`.")
    if profile:
        for line in _profile(result["profile"]):
            talk.say(line)
    talk.say(f"written: {folder}/scores.csv, {folder}/scores.jsonl")
    talk.next(f"adflow segment {shlex.quote(paths[0])}")


def _profile(profile: dict[str, Any]) -> list[str]:
    """Return the lines that say where the time went; shares are of the workers' time together."""
    images, stages = max(1, profile["images"]), profile["stages"]
    total = sum(stages.values()) or 1.0
    return [
        f"{'stage':<12}{'ms per image':>13}{'share':>8}",
        *(f"{name:<12}{took / images * 1e3:>13.2f}{took / total:>8.1%}" for name, took in stages.items()),
        f"{'together':<12}{total / images * 1e3:>13.2f}{1:>8.1%}",
        f"{images / (profile['seconds'] or 1.0):.1f} images/s: {images} images in {profile['seconds']:.2f} s "
        f"by {profile['workers']} workers",
    ]


def _table(found: list[dict[str, Any]], top: int, count: int) -> Any:
    from rich.text import Text

    rows = sorted((row for row in found if not row["error"]), key=lambda row: -row["score"])
    shown = [
        (
            row["image"],
            (
                f"{row['score']:.4g}",
                "-" if row["p_value"] is None else f"{row['p_value']:.3f}",
                Text(row["verdict"] or "-", style="bold red" if row["verdict"] == "defect" else ""),
            ),
        )
        for row in rows[: top or None]
    ]
    below = f"the {top} highest of {count} (--top 0 shows all)" if top and count > top else None
    return image_table(("score", "p-value", "verdict"), shown, below)
