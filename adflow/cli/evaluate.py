"""``adflow evaluate``."""

from __future__ import annotations

import sys

from adflow.cli import _options as o
from adflow.cli._console import Talk


def evaluate(
    data: o.Data,
    model: o.Model = None,
    nfa: o.Nfa = None,
    flag_rate: o.FlagRate = None,
    threshold: o.Threshold = None,
    device: o.Device = "auto",
    precision: o.Precision = "float32",
    weights: o.Weights = None,
    workers: o.Workers = None,
    strict: o.Strict = False,
    data_root: o.DataRoot = None,
    runs: o.Runs = None,
    out: o.Out = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Measure a detector on labelled images: a per-class table of honest figures."""
    from json import loads

    from adflow import __version__
    from adflow.cli._inputs import open_detector
    from adflow.data import open_data
    from adflow.report import Report
    from adflow.runs import run_for
    from adflow.tasks._point import operating_point
    from adflow.tasks.evaluate import evaluate_detector

    talk = Talk(json=json, quiet=quiet, verbose=verbose)
    rows = []
    for spec in data:
        for one in open_data(spec, root=data_root):
            wanted = model or run_for(one.name, runs)
            detector, _ = open_detector(wanted, runs, device, precision, weights, talk)
            calibrated = detector.calibration is not None or threshold is not None
            point = (
                operating_point(detector, nfa=nfa, flag_rate=flag_rate, threshold=threshold) if calibrated else None
            )
            with talk.progress(one.name) as progress:
                found = evaluate_detector(
                    detector, one, point=point, strict=strict, workers=workers, progress=progress
                )
            rows.append(found.row)
    table = Report(rows, {"command": " ".join(["adflow", *sys.argv[1:]]), "adflow": __version__})
    talk.data(loads(table.json()), table.table(talk.out.width))
