"""The steps of ``adflow evaluate`` between its options and :mod:`adflow.tasks`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group

from adflow import published
from adflow.backbones import PRECISIONS
from adflow.cli._console import Talk, command
from adflow.cli._inputs import open_strided
from adflow.cli._options import MAX_SEED
from adflow.comparison import compare
from adflow.data import Dataset
from adflow.errors import GateError, PartialError, UsageError, unknown
from adflow.report import METRICS, Gridded
from adflow.runs import find_detector, run_for, runs_folder
from adflow.tasks._cells import Job, Measuring, plan_fits, plan_model, read_cells, unique
from adflow.tasks._difference import Differences, difference
from adflow.tasks._publish import cell_name
from adflow.tasks._ray import Cluster
from adflow.tasks.evaluate import Done, Outcome
from adflow.tasks.evaluate import evaluate as run_evaluate
from adflow.tasks.fit import FitOptions


@dataclass(frozen=True)
class Side:
    """What ``--compare`` names.

    Attributes:
        kind: "published", "evaluation" or "run".
        name: as it is shown.
        path: folder of the evaluation, or detector file of the run.
    """

    kind: str
    name: str
    path: Path | None = None


@dataclass(frozen=True)
class Where:
    """How and where models are loaded."""

    device: str
    precision: str
    weights: Path | None
    runs: Path | None


def side(text: str, runs: Path | None) -> Side:
    """Return what ``--compare TEXT`` means.

    Raises:
        UsageError: neither published results nor an evaluation nor a run.
    """
    path = Path(text)
    for candidate in (path, path.parent, runs_folder(runs) / text):
        if (candidate / "table.json").is_file() and (candidate != path.parent or path.is_file()):
            return Side("evaluation", str(candidate), candidate)
    if text in published.names():
        return Side("published", text)
    try:
        return Side("run", text, find_detector(text, runs))
    except UsageError:
        papers = ", ".join(name for name in published.names() if name.endswith("-paper"))
        raise UsageError(
            f"--compare {text} is neither the folder of an evaluation, nor a run, nor published results",
            hint=f"Published: {papers} ({len(published.names())} in all).",
        ) from None


def two_evaluations(sides: Sequence[Side], talk: Talk, fail: bool) -> None:
    """Test the difference of two finished evaluations.

    Raises:
        UsageError: not two of them.
        GateError: ``fail``, and something got worse.
    """
    folders = [one.path for one in sides if one.kind == "evaluation"]
    if len(sides) != 2 or len(folders) != 2:
        raise UsageError(
            "there is nothing to evaluate: name a data set, or two finished evaluations with --compare A --compare B",
            hint="adflow evaluate demo/brick",
        )
    ours, other = (read_cells(folder) for folder in folders if folder is not None)
    found = difference(ours, other, sides[1].name)
    talk.data({"comparison": found.rows()}, found.words().rich())
    if fail:
        missed = worse([found])
        if missed:
            raise GateError("; ".join(missed))


def classes(specs: Sequence[str], root: Path | None, talk: Talk, stride: int = 1) -> list[Dataset]:
    """Return the classes that were named, each once."""
    found: dict[Path, Dataset] = {}
    for one in open_strided(list(specs), root, stride):
        found.setdefault(one.root / one.class_, one)
    for one in found.values():
        for note in one.notes:
            talk.detail(f"{one.name}: {note}")
    return list(found.values())


def seed_list(text: str) -> list[int]:
    """Read ``--seeds``.

    >>> seed_list("0, 1,2")
    [0, 1, 2]
    """
    try:
        found = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UsageError(f"--seeds is '{text}', expected numbers such as 0,1,2") from None
    if not found or min(found) < 0 or max(found) > MAX_SEED:
        raise UsageError(f"--seeds is '{text}', expected numbers such as 0,1,2")
    return list(dict.fromkeys(found))


def fits(
    found: Sequence[Dataset], methods: Sequence[str], seeds: Sequence[int], options: FitOptions, measuring: Measuring
) -> list[Job]:
    """Return the cells to fit and measure."""
    if not methods:
        raise UsageError("--method names no method", hint="`adflow list methods` shows them.")
    return unique(plan_fits(found, list(dict.fromkeys(methods)), seeds, options, measuring))


def models(found: Sequence[Dataset], model: str | None, measuring: Measuring, where: Where, talk: Talk) -> list[Job]:
    """Return the cells of fitted detectors: the one that is named, else the last one of each class."""
    if where.precision not in PRECISIONS:
        raise unknown("precision", where.precision, PRECISIONS)
    jobs = []
    for one in found:
        path = find_detector(model or run_for(one.name, where.runs), where.runs)
        if model is None:
            talk.say(f"model: {path.parent.name} (the run fitted last; choose with --model)")
        jobs.append(_model(one, path, measuring, where))
    return unique(jobs)


def _model(one: Dataset, path: Path, measuring: Measuring, where: Where) -> Job:
    return plan_model(one, path, measuring, device=where.device, precision=where.precision, weights=where.weights)


def compute(
    jobs: Sequence[Job],
    measuring: Measuring,
    folder: Path,
    processes: int,
    fresh: bool,
    keep: Path | None,
    typed: str,
    talk: Talk,
    cluster: Cluster | None = None,
) -> Outcome:
    """Compute the cells, telling of each."""
    for note in dict.fromkeys(job.note for job in jobs if job.note):
        talk.say(note)
    before = 0
    told: set[str] = set()

    def each(done: Done) -> None:
        nonlocal before
        for note in done.cell["notes"] if done.cell else []:
            if note not in told:
                told.add(note)
                talk.warn(note)
        if done.reused:
            before += 1
            return
        if before and "before" not in told:
            told.add("before")
            talk.say(f"{before} of {done.total} cells are there already (--fresh computes them anew)")
        if done.error is not None:
            talk.warn(f"{cell_name(done.job.head)} failed: {done.error}")
        elif done.total > 1:
            talk.say(_line(done))

    with talk.progress("evaluate") as progress:
        outcome = run_evaluate(
            jobs,
            measuring,
            folder,
            processes=processes,
            cluster=cluster,
            fresh=fresh,
            keep=keep,
            command=typed,
            each=each,
            progress=progress,
        )
    if before and "before" not in told:
        talk.say(f"all {before} cells are there already (--fresh computes them anew)")
    return outcome


def _line(done: Done) -> str:
    assert done.cell is not None
    row = done.cell["row"]
    figures = [
        f"{METRICS[name][0]} {100 * row[name]:.1f}"
        for name in ("image_auroc", "pixel_auroc", "aupro")
        if row.get(name) is not None
    ]
    left = "" if not done.left else f"; {_time(done.left)} left"
    return f"[{done.done}/{done.total}] {cell_name(done.job.head)}: {', '.join(figures)}{left}"


def _time(seconds: float) -> str:
    """Return a time in words that do not promise more than an estimate can.

    >>> _time(42.3), _time(200), _time(9000)
    ('about 42 s', 'about 3 min', 'about 2.5 h')
    """
    if seconds < 100:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


def rows_of(outcome: Outcome) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield each cell with its row."""
    rows = (row for row in outcome.rows if not row.get("error"))
    yield from zip(outcome.cells, rows, strict=True)


def beside(
    one: Side,
    outcome: Outcome,
    found: Sequence[Dataset],
    measuring: Measuring,
    folder: Path,
    where: Where,
    talk: Talk,
    processes: int,
) -> Gridded:
    """Return the comparison with one side."""
    if one.kind == "published":
        return compare(outcome.rows, one.name)
    assert one.path is not None
    if one.kind == "evaluation":
        return difference(outcome.cells, read_cells(one.path), one.name)
    jobs = unique([_model(data, one.path, measuring, where) for data in found])
    other = compute(jobs, measuring, folder, processes, False, None, command(), talk)
    return difference(outcome.cells, other.cells, one.name)


def stacked(parts: Sequence[Any]) -> Group:
    """Return tables one below the other, an empty line between them."""
    return Group(*(line for part in parts for line in (part, ""))) if len(parts) > 1 else Group(*parts)


def worse(found: Sequence[Differences]) -> list[str]:
    """Return one sentence for every regression."""
    return [
        f"{line.metric} of {line.dataset}/{line.class_}, {line.run}, {'fell' if line.ours < line.other else 'rose'} "
        f"from {line.other:.4f} to {line.ours:.4f} (p = {line.p_value:.2g})"
        for one in found
        for line in one.regressions()
    ]


def judge(missed: Sequence[str], outcome: Outcome) -> None:
    """Raise what the exit code must say.

    Raises:
        GateError: a figure misses its gate.
        PartialError: cells failed.
    """
    if missed:
        raise GateError("; ".join(missed), hint="The table above, and report.html, show where.")
    if outcome.failed:
        job, error = outcome.failed[0]
        total = len(outcome.rows)
        raise PartialError(
            f"{len(outcome.failed)} of {total} cells failed; the first, {cell_name(job.head)}: {error}",
            hint="The same command tries only these again.",
        )
