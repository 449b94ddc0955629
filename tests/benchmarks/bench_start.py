"""Starting up: seconds from a command's start to its end, beside what importing anomalib alone takes.

    python tests/benchmarks/bench_start.py FOLDER [--rounds 5]

FOLDER is laid out like MVTec AD; ``score`` gets one of its images and a detector fitted on a few others. Every command
is a process of its own, with the files it reads in the page cache.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from _contest import Call, Sides, contest, show

LIMITS = {"adflow --help": 0.5, "adflow list": 1.0, "adflow score one image": 4.0}  # seconds that we set ourselves


def command(*words: str) -> Call:
    """Return a call that runs Python with ``words`` and waits for its end."""
    elsewhere = tempfile.mkdtemp(prefix="bench-start-")

    def call() -> None:
        here = {**os.environ, "ADFLOW_RUNS": elsewhere}
        subprocess.run([sys.executable, *words], cwd=elsewhere, env=here, check=True, stdout=subprocess.DEVNULL)

    return call


def fitted(root: Path) -> Path:
    """Return the file of a detector of the default method, fitted on a few images."""
    from adflow.data import open_data
    from adflow.detector_file import save_detector
    from adflow.tasks.fit import FitOptions, fit_detector, prepare

    data, options = open_data(root)[0], FitOptions(device="cpu")
    detector, size, keep_aspect = prepare(data, options)
    fit_detector(detector, data.train[:24], options, size, keep_aspect)
    return save_detector(detector, Path(tempfile.mkdtemp(prefix="bench-start-")) / "detector.adflow")


def scoring(root: str) -> Call:
    from adflow.data import open_data

    image = open_data(Path(root))[0].test[0].image
    return command("-m", "adflow", "score", str(image), "--model", str(fitted(Path(root))), "--out", "scores")


def sides(root: Path) -> Sides:
    return {
        "adflow --help": (command, "-m", "adflow", "--help"),
        "adflow list": (command, "-m", "adflow", "list", "methods"),
        "adflow score one image": (scoring, str(root)),
        "import torch": (command, "-c", "import torch"),
        "import anomalib.models, anomalib.engine": (command, "-c", "import anomalib.models, anomalib.engine"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    show("start", contest(sides(options.folder.resolve()), options.rounds))


if __name__ == "__main__":
    main()
