"""``adflow evaluate``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from adflow.cli import _options as o
from adflow.cli._console import Talk, command
from adflow.errors import UsageError

_FIT, _MEASURE, _COMPARE, _OUT = "Fit and measure", "What is measured", "Comparison and gates", "Output"


def evaluate(
    data: Annotated[
        list[str] | None,
        typer.Argument(
            help="Data sets with labelled test images: mvtec, mvtec/cable, demo/brick, or a folder; none to hold two "
            "finished evaluations against each other.",
            show_default=False,
        ),
    ] = None,
    model: o.Model = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            "-m",
            help="Fit these first, such as cflow,uflow,padim: every class by method by seed is a cell, written when "
            "it is done. The same command again goes on where it stopped.",
            show_default=False,
            rich_help_panel=_FIT,
        ),
    ] = None,
    seeds: Annotated[
        str, typer.Option(help="Seeds, such as 0,1,2: the table gives mean ± deviation.", rich_help_panel=_FIT)
    ] = "0",
    recipe: o.Recipe = "fast",
    backbone: o.BackboneName = None,
    taps: o.Taps = None,
    weights: o.Weights = None,
    settings: o.Set = None,
    size: o.SizeText = None,
    keep_aspect: o.KeepAspect = None,
    holdout: Annotated[
        float, typer.Option(help="Share of good images kept for calibration.", rich_help_panel=_FIT)
    ] = 0.1,
    folds: Annotated[
        int, typer.Option(help="K > 1: calibrate out of fold, fit on everything.", min=0, rich_help_panel=_FIT)
    ] = 0,
    jobs: Annotated[
        int, typer.Option(help="Cells at once, each in its own process; same results.", min=1, rich_help_panel=_FIT)
    ] = 1,
    keep: Annotated[bool, typer.Option("--keep", help="Keep fitted detectors as runs.", rich_help_panel=_FIT)] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Compute cells that are there already, too.", rich_help_panel=_FIT)
    ] = False,
    feature_memory: Annotated[
        str, typer.Option(help="RAM for features; beyond it a file is used.", rich_help_panel=_FIT)
    ] = "4GiB",
    nfa: o.Nfa = None,
    flag_rate: o.FlagRate = None,
    threshold: o.Threshold = None,
    ci: Annotated[
        bool, typer.Option("--ci", help="95 % intervals by bootstrap over images.", rich_help_panel=_MEASURE)
    ] = False,
    per_defect: Annotated[
        bool,
        typer.Option(
            "--per-defect",
            help="Also a table of each kind of defect, and of all others without it.",
            rich_help_panel=_MEASURE,
        ),
    ] = False,
    map_memory: Annotated[
        str,
        typer.Option(
            help="Limit for exact pixel metrics of a class; beyond it they are streamed, with error bounds.",
            rich_help_panel=_MEASURE,
        ),
    ] = "2GiB",
    compare: Annotated[
        list[str] | None,
        typer.Option(
            "--compare",
            help="Published numbers (cflow-paper, ...): side by side, * = selected on the test set. Or another "
            "evaluation (its folder), or a run: each difference is tested on the same images (paired bootstrap, "
            "DeLong's test for image AUROC). May be repeated; without DATA, give two evaluations.",
            show_default=False,
            rich_help_panel=_COMPARE,
        ),
    ] = None,
    fail_under: Annotated[
        list[str] | None,
        typer.Option(
            help="Exit code 6 when a cell is below, such as pixel_auroc=0.97; mean:pixel_auroc=0.97 for the mean over "
            "classes. May be repeated.",
            show_default=False,
            rich_help_panel=_COMPARE,
        ),
    ] = None,
    fail_over: Annotated[
        list[str] | None,
        typer.Option(
            help="The same for figures that should be low, such as flagged_share=0.1.",
            show_default=False,
            rich_help_panel=_COMPARE,
        ),
    ] = None,
    fail_on_regression: Annotated[
        bool,
        typer.Option(
            "--fail-on-regression",
            help="Exit code 6 when a figure is significantly worse than in the --compare evaluation.",
            rich_help_panel=_COMPARE,
        ),
    ] = False,
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="Write report.html.", rich_help_panel=_OUT)
    ] = True,
    overlays: Annotated[
        bool,
        typer.Option("--overlays", help="Draw every test image, not only the worst ones.", rich_help_panel=_OUT),
    ] = False,
    overlay_size: Annotated[
        int, typer.Option(help="Longer side of each picture in pixels; 0 = original.", min=0, rich_help_panel=_OUT)
    ] = 320,
    device: o.Device = "auto",
    precision: o.Precision = "float32",
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
    """Measure detectors on labelled images: a table of honest figures, a report page, gates for a build.

    Without --method a fitted run is measured (--model, else the last one of each class). Written to --out (default:
    evaluate-<data> in the folder of runs): table.csv, table.json, table.md, table.tex, report.html, and cells/ with
    all that comparisons need. Exit codes: 6 a gate failed, 7 some cells failed (the others are in the table).
    """
    from dataclasses import replace

    from adflow._bytes import parse_bytes
    from adflow._lock import claim
    from adflow.cli import _evaluate as steps
    from adflow.report import Gridded
    from adflow.runs import runs_folder
    from adflow.tasks import _publish
    from adflow.tasks._cells import Measuring, folder_name
    from adflow.tasks._difference import Differences, intervals
    from adflow.tasks.fit import FitOptions

    talk = Talk(json=json, quiet=quiet, verbose=verbose)
    wanted = _publish.gates(fail_under or [], fail_over or [])
    sides = [steps.side(text, runs) for text in compare or []]
    if fail_on_regression and not any(side.kind != "published" for side in sides):
        raise UsageError("--fail-on-regression needs --compare with another evaluation or run")
    if not data:
        if wanted:
            raise UsageError(
                "--fail-under and --fail-over gate what is evaluated now, and no data set is named",
                hint="Two finished evaluations are gated by --fail-on-regression.",
            )
        steps.two_evaluations(sides, talk, fail_on_regression)
        return
    given = {"--recipe": recipe != "fast", "--backbone": backbone, "--taps": taps, "--set": settings, "--size": size,
             "--keep-aspect": keep_aspect is not None, "--folds": folds, "--holdout": holdout != 0.1,
             "--seeds": seeds != "0", "--keep": keep}  # fmt: skip
    chosen = [name for name, value in given.items() if value]
    if method is None and chosen:
        raise UsageError(f"{chosen[0]} is for fitting, and no --method is given", hint="Add --method padim, say.")
    if method is not None and (model is not None or precision != "float32"):
        raise UsageError("--method fits anew: it goes with neither --model nor --precision")
    measuring = Measuring(
        nfa,
        flag_rate,
        threshold,
        strict,
        parse_bytes(map_memory),
        overlays=overlays,
        overlay_size=overlay_size or None,
        workers=workers,
    )
    options = FitOptions(
        recipe=recipe, backbone=backbone, taps=o.names(taps), weights=weights, settings=o.settings(settings),
        size=o.size(size), keep_aspect=keep_aspect, holdout=holdout, folds=folds, device=device, strict=strict,
    )  # fmt: skip
    options = replace(options, resources=replace(options.resources, memory=parse_bytes(feature_memory) // jobs))
    classes = steps.classes(data, data_root, talk, stride)
    where = steps.Where(device, precision, weights, runs)
    if method is None:
        planned = steps.models(classes, model, measuring, where, talk)
    else:
        planned = steps.fits(classes, o.names(method) or (), steps.seed_list(seeds), options, measuring)
    folder = out or runs_folder(runs) / folder_name([one.name for one in classes], options, measuring)
    typed = command()
    kept = runs_folder(runs) if keep else None
    cluster = o.cluster(executor, ray_address, workers, device)
    with claim(folder, "cells", "overlays"):
        outcome = steps.compute(planned, measuring, folder, jobs, fresh, kept, typed, talk, cluster)
        if ci:
            for cell, row in steps.rows_of(outcome):
                row.update(intervals(cell))
        beside: list[Gridded] = [
            steps.beside(one, outcome, classes, measuring, folder, where, talk, jobs) for one in sides
        ]
        facts = {"seeds": seeds if method else None, "set": options.settings or None}
        found = _publish.provenance(outcome, typed, facts)
        table = _publish.publish(outcome, found, folder, page=report, beside=beside)
    parts: list[Any] = [table.table(talk.out.width)]
    if ci:
        parts.append(_publish.interval_table(outcome.rows).rich())
    if per_defect:
        parts.append(_publish.defect_table(outcome.rows, talk.out.width).rich())
    parts += [one.words().rich() for one in beside]
    talk.data(_publish.whole(table, beside, folder), steps.stacked(parts))
    talk.say(f"written: {folder}/table.csv, .json, .md, .tex" + (", report.html" if report else ""))
    missed = _publish.broken(outcome.rows, table.mean(), wanted)
    if fail_on_regression:
        missed += steps.worse([one for one in beside if isinstance(one, Differences)])
    steps.judge(missed, outcome)
