"""``adflow fit``."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adflow.cli import _options as o
from adflow.cli._console import Talk, command
from adflow.methods import DEFAULT

if TYPE_CHECKING:
    from adflow.data import Dataset
    from adflow.tasks._ray import Cluster
    from adflow.tasks.fit import FitOptions


def fit(
    data: o.Data,
    method: o.Method = DEFAULT,
    recipe: o.Recipe = "fast",
    backbone: o.BackboneName = None,
    taps: o.Taps = None,
    weights: o.Weights = None,
    settings: o.Set = None,
    size: o.SizeText = None,
    keep_aspect: o.KeepAspect = None,
    holdout: Annotated[float, typer.Option(help="Share of good images kept for calibration.")] = 0.1,
    no_holdout: Annotated[bool, typer.Option("--no-holdout", help="Fit on everything; no promise then.")] = False,
    folds: Annotated[int, typer.Option(help="K > 1: calibrate out of fold, fit on everything.", min=0)] = 0,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    feature_memory: Annotated[str, typer.Option(help="RAM for features; beyond it a file is used.")] = "4GiB",
    feature_dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    max_memory: Annotated[
        str | None, typer.Option(help="Limit the fit must keep, such as 2GiB.", show_default=False)
    ] = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Print the time and memory it will take, and do not fit.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a killed fit stopped.")] = False,
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
    """Learn what good looks like, class by class, and keep some good images back to know the false-alarm rate."""
    from adflow import _ranks, methods
    from adflow.cli._inputs import open_strided
    from adflow.detector import Resources
    from adflow.errors import PartialError, UsageError
    from adflow.tasks.fit import FitOptions

    silent = _ranks.silent()
    talk = Talk(json=json, quiet=quiet or silent, verbose=verbose)
    classes = open_strided(data, data_root, stride)
    if out is not None and len(classes) > 1:
        raise UsageError(f"--out takes one class, found {len(classes)}", hint="Use --runs FOLDER for several.")
    chosen = o.settings(settings)
    if max_memory is not None and "max_memory" in methods.get(method).parameters_of():
        chosen.setdefault("max_memory", max_memory)
    options = FitOptions(
        method=method,
        recipe=recipe,
        backbone=backbone,
        taps=o.names(taps),
        weights=weights,
        settings=chosen,
        size=o.size(size),
        keep_aspect=keep_aspect,
        holdout=0.0 if no_holdout else holdout,
        folds=folds,
        seed=seed,
        device=device,
        strict=strict,
        resources=Resources(memory=_feature_bytes(feature_memory, max_memory), dtype=feature_dtype, workers=workers),
    )
    if estimate:
        _estimate(classes, options, talk)
        return
    for note in (note for one in classes for note in one.notes):
        talk.detail(note)
    cluster = o.cluster(executor, ray_address, workers, device)
    done = []
    failed: list[tuple[str, Exception]] = []
    found = _fitted(classes, options, cluster, talk, out=out, runs=runs, resume=resume)
    for one, summary in zip(classes, found, strict=True):
        if isinstance(summary, Exception):
            failed.append((one.name, summary))
        elif not silent:
            done.append(summary)
            _tell(summary, talk)
    if silent:
        return
    if failed and not done:
        raise failed[0][1]
    talk.data({"runs": done}, "\n".join(summary["detector"] for summary in done))
    if failed:
        name, error = failed[0]
        raise PartialError(f"{len(failed)} of {len(classes)} classes failed; the first, {name}: {error}")
    talk.next(f"adflow evaluate {shlex.quote(data[0])}   |   adflow segment FOLDER --nfa 1")


def _feature_bytes(features: str, whole: str | None) -> int:
    """Return the RAM that features may take: ``features``, and no more than a limit of the ``whole`` leaves them."""
    from adflow._bytes import parse_bytes
    from adflow._system import resident_bytes

    memory = parse_bytes(features)
    # Libraries alone take half a GiB: features get a quarter of what they leave, the method the rest.
    return memory if whole is None else min(memory, max(1, (parse_bytes(whole) - resident_bytes()) // 4))


def _fitted(
    classes: Sequence[Dataset],
    options: FitOptions,
    cluster: Cluster | None,
    talk: Talk,
    *,
    out: Path | None,
    runs: Path | None,
    resume: bool,
) -> Iterator[dict[str, Any] | Exception]:
    """Fit class by class; yield a summary of each, or what went wrong. On a cluster several are each a task."""
    from dataclasses import replace

    from adflow.tasks.fit import fit as run_fit
    from adflow.tasks.fit import fit_on

    typed = command()
    if cluster is not None and len(classes) > 1:
        with talk.progress("fit") as progress:
            found = fit_on(cluster, classes, options, runs=runs, resume=resume, command=typed, progress=progress)
        yield from found
        return
    if cluster is not None:  # the images of the one class are divided
        resources = replace(options.resources, spread=cluster.bank, workers=cluster.cpus)
        options = replace(options, resources=resources)
    for one in classes:
        with talk.progress(one.name) as progress:
            yield run_fit(one, options, out=out, runs=runs, resume=resume, command=typed, progress=progress)


def _tell(summary: dict[str, Any], talk: Talk) -> None:
    """Say what a fit gave, and what may be wrong with it."""
    for line in summary["skipped"]:
        talk.warn(f"skipped {line}")
    talk.say(_sentence(summary))
    if summary["calibration"] is None:
        talk.warn("no calibration: the false-alarm rate of this detector is unknown")
        return
    talk.say(_health(summary))
    for line in summary["calibration"]["warnings"]:
        talk.warn(line)
    talk.detail(f"calibration: {summary['calibration']}")


def _estimate(classes: Sequence[Dataset], options: FitOptions, talk: Talk) -> None:
    from adflow._bytes import in_units
    from adflow.tasks.estimate import estimate

    start = time.process_time()  # what was imported by now, a fit will import as well
    found = [estimate(one, options, start=start) for one in classes]
    lines = []
    for one in found:
        took = one["seconds"]
        memory = "unknown" if one["memory"] is None else in_units(one["memory"])
        disk = f", {in_units(one['disk'])} of temporary files" if one["disk"] else ""
        lines.append(
            f"{one['data']}: {one['method']} on {one['images']} images takes about {took['total']:.1f} s "
            f"(start {took['start']:.1f}, features {took['features']:.1f}, fit {took['fit']:.1f}, "
            f"calibration {took['calibration']:.1f}) "
            f"and {memory} of memory{disk}"
        )
    talk.data({"estimates": found}, "\n".join(lines))


def _sentence(summary: dict[str, Any]) -> str:
    total = sum(summary["seconds"].values())
    return (
        f"{summary['data']}: {summary['method']} on {summary['backbone']} learned from {summary['images']} good images"
        f" in {total:.1f} s, {summary['held_out']} held out for calibration → run {summary['run']}"
    )


def _health(summary: dict[str, Any]) -> str:
    """Say in one line what the held-out images tell about false alarms, and whether a Gaussian null can be trusted."""
    calibration, null = summary["calibration"], summary["null"]
    rates = calibration["leave_one_out"].items()
    counts = ", ".join(f"{rate:.2g} at --nfa {eps}" for eps, rate in rates if rate is not None)
    text = f"false regions per good image, leave-one-out: {counts or 'too few images to say'}"
    if "fit_auc" in calibration:
        auc = calibration["fit_auc"]
        side = "like" if calibration["fit_p"] >= 0.01 else "higher than" if auc > 0.5 else "lower than"
        text += f"; held-out images score {side} fitted ones (AUC {auc:.2f})"
        # As of any method that learns its images by heart: why the fitted ones cannot tell the false-alarm rate.
        text += ", which are remembered" if side == "higher than" else ""
    if null:
        worst = min(null, key=lambda scale: scale["effective_dof"] / scale["dof"])
        state = "holds" if all(scale["trusted"] for scale in null) else "does not hold"
        text += (
            f"; Gaussian null {state} (energy {worst['dispersion']:.2f} of expected, "
            f"{worst['effective_dof']:.0f} of {worst['dof']:.0f} degrees of freedom)"
        )
    return text
