"""Where fitted detectors live: one folder a run, the detector and a readable summary inside.

``runs/<data>-<class>-<method>-<backbone>[-s<seed>]/detector.safetensors``; the folder's name is the run's name.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from adflow.errors import InputError, unknown

DETECTOR = "detector.safetensors"


def runs_folder(folder: Path | None = None) -> Path:
    """Return the folder of runs: the one given, else ``ADFLOW_RUNS``, else ``runs`` in the working folder."""
    return Path(folder or os.environ.get("ADFLOW_RUNS") or "runs")


def run_name(data: str, method: str, backbone: str, seed: int) -> str:
    """Return the name of a run: plain characters, the seed only when it is not 0.

    >>> run_name("mvtec/screw", "cflow", "lite0", 0)
    'mvtec-screw-cflow-lite0'
    """
    name = "-".join([data, method, backbone] + ([f"s{seed}"] if seed else []))
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "run"


def list_runs(folder: Path | None = None) -> list[Path]:
    """Return all run folders, the one fitted last first."""
    found = [path.parent for path in runs_folder(folder).glob(f"*/{DETECTOR}")]
    return sorted(found, key=lambda run: ((run / DETECTOR).stat().st_mtime_ns, run.name), reverse=True)


def find_detector(model: str | Path | None, folder: Path | None = None) -> Path:
    """Return the detector file, or the folder of the bundle, that ``model`` means.

    Args:
        model: a file, a run folder, a run's name, a bundle, or None for the run fitted last.
        folder: the folder of runs.

    Raises:
        InputError: nothing has been fitted yet.
        UsageError: no run has that name.
    """
    runs = list_runs(folder)
    if model is None:
        if not runs:
            raise InputError(
                f"there is no fitted detector in {runs_folder(folder)}",
                hint="Fit one: adflow fit demo/brick   (or give --model FILE)",
            )
        return runs[0] / DETECTOR
    path = Path(model)
    if path.is_file():
        return path
    for candidate in (path, runs_folder(folder) / path):
        if (candidate / DETECTOR).is_file():
            return candidate / DETECTOR
        if (candidate / "certificate.json").is_file():  # a bundle
            return candidate
    raise unknown("run or detector file", str(model), [run.name for run in runs])


def run_for(data: str, folder: Path | None = None) -> str | None:
    """Return the name of the run fitted last on the data set called ``data``, or None."""
    for run in list_runs(folder):
        try:
            summary = json.loads((run / "fit.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(summary, dict) and summary.get("data") == data:
            return run.name
    return None
