"""Options that several commands share, each written once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adflow.errors import UsageError, unknown

if TYPE_CHECKING:
    from adflow.tasks._ray import Cluster

MAX_SEED = 2**63 - 1  # what torch and numpy both take

Data = Annotated[
    list[str],
    typer.Argument(help="Data sets: mvtec, mvtec/cable, demo/brick, or a folder of good images.", show_default=False),
]
Paths = Annotated[list[str], typer.Argument(help="Images, folders of images, or data sets.", show_default=False)]
Model = Annotated[
    str | None,
    typer.Option("--model", help="Detector file, run name or bundle; default: the last run.", show_default=False),
]
Method = Annotated[str, typer.Option("--method", "-m", help="Method; `adflow list methods` shows them.")]
Recipe = Annotated[
    str, typer.Option(help="fast: best quality per CPU second; paper: the paper's; more: `adflow list methods`.")
]
BackboneName = Annotated[
    str | None, typer.Option("--backbone", "-b", help="Default: the recipe's, else lite0.", show_default=False)
]
Taps = Annotated[str | None, typer.Option(help="Taps of the backbone, such as b2,b3,b4.", show_default=False)]
Weights = Annotated[Path | None, typer.Option(help="Local weight file of the backbone.", show_default=False)]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="name=value of the method; may be repeated.", show_default=False)
]
SizeText = Annotated[
    str | None, typer.Option("--size", help="256 or HEIGHTxWIDTH; default: the recipe's.", show_default=False)
]
KeepAspect = Annotated[
    bool | None,
    typer.Option("--keep-aspect/--stretch", help="Letterbox, or stretch to the input size.", show_default=False),
]
Seed = Annotated[int, typer.Option(help="Seed of everything random.", min=0, max=MAX_SEED)]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps or auto.")]
Precision = Annotated[str, typer.Option(help="float32 (exact) or bf16.")]
Strict = Annotated[bool, typer.Option("--strict", help="An unreadable image is fatal, not skipped.")]
DataRoot = Annotated[
    Path | None, typer.Option(help="Folder of data sets; default: ADFLOW_DATA, else the cache.", show_default=False)
]
Runs = Annotated[
    Path | None, typer.Option(help="Folder of runs; default: ADFLOW_RUNS, else ./runs.", show_default=False)
]
Out = Annotated[Path | None, typer.Option(help="Folder to write to.", show_default=False)]
Workers = Annotated[int | None, typer.Option(help="Images at once; default: the cores.", show_default=False, min=1)]
Stride = Annotated[int, typer.Option(help="Take every n-th image of a data set or frame of a video.", min=1)]
Executor = Annotated[
    str, typer.Option(help="local, or ray: on a cluster, with the same results; --workers then is CPUs a task.")
]
RayAddress = Annotated[
    str | None,
    typer.Option(help="Head of the Ray cluster; default: RAY_ADDRESS, else this machine alone.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors on stderr.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more on stderr.")]
Nfa = Annotated[
    float | None,
    typer.Option(help="Allowed false regions per good image, on average.", show_default=False, min=1e-9),
]
FlagRate = Annotated[
    float | None,
    typer.Option(help="Allowed share of good images with any mark.", show_default=False, min=1e-9, max=1.0),
]
Threshold = Annotated[
    float | None, typer.Option(help="A level of the score map; promises nothing.", show_default=False)
]


def settings(pairs: list[str] | None) -> dict[str, Any]:
    """Read ``name=value`` pairs; values are YAML scalars or lists.

    >>> settings(["coreset=10%", "steps=200", "taps=[1, 2]"])
    {'coreset': '10%', 'steps': 200, 'taps': [1, 2]}
    """
    import yaml

    found: dict[str, Any] = {}
    for pair in pairs or []:
        name, separator, value = pair.partition("=")
        if not separator or not name:
            raise UsageError(f"--set takes name=value, found '{pair}'")
        try:
            found[name.strip()] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError):
            found[name.strip()] = value
    return found


def cluster(executor: str, address: str | None, workers: int | None, device: str) -> Cluster | None:
    """Return the connection that ``--executor`` asks for; None = here."""
    if executor not in ("local", "ray"):
        raise unknown("executor", executor, ["local", "ray"])
    if executor == "local":
        if address is not None:
            raise UsageError("--ray-address goes with --executor ray")
        return None
    from adflow.tasks._device import choose_device
    from adflow.tasks._ray import connect

    return connect(address, cpus=workers or 1, gpus=1 if choose_device(device).type == "cuda" else 0)


def names(text: str | None) -> tuple[str, ...] | None:
    """Split a comma-separated list; None stays None."""
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def size(text: str | None) -> tuple[int, int] | None:
    """Read ``--size``; None stays None."""
    if text is None:
        return None
    from adflow.imaging import parse_size

    return parse_size(text)
