"""The one table: adflow beside its peers and the floors on the same images, weights and cores, and which bars hold.

    pip install -e ".[bench]"
    python tests/benchmarks/bench_peers.py FOLDER [--only start,metrics,memory,nfa,predict,fit,grow] [--cache FILE]

FOLDER is laid out like MVTec AD (train/good, test, ground_truth). Sides of one comparison run in turn, each in a
process of its own, with as many threads as there are cores (``taskset -c 0`` in front gives each one). Seconds are
medians of wall time; ratios are those of processor seconds, all threads and child processes together, because other
work on the machine changes these least (the bars of fits, which run once, give both). What is in the cache is read,
not run again, so that the table can be put together in pieces; without one everything runs: about an hour, most of it
the peers' fits.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import bench_fit
import bench_memory
import bench_metrics
import bench_nfa
import bench_predict
import bench_score
import bench_start
from _contest import HEAD, Outcome, Sides, cached, cores, lines

from adflow.data import list_images

PARTS = ("start", "metrics", "memory", "nfa", "predict", "fit", "grow")
ROUNDS = 5
MAPS = (100, 256)  # how many, and their side
ROWS = (40_000, 232, 300)  # of the coreset: how many to choose from, their length, how many are chosen
BARS = {"cflow": 10.0, "padim": 5.0}  # how many times faster a fit shall reach the peer's quality
Found = dict[str, Outcome]


def side(found: Found, start: str) -> Outcome:
    """Return the side of that name, else one whose name starts so; an empty outcome, of NaN, when there is none."""
    return found.get(start) or next((one for name, one in found.items() if name.startswith(start)), Outcome())


def ratio(found: Found, slow: str, quick: str) -> float:
    """Return how often the processor seconds of ``quick`` go into those of ``slow``; NaN when one did not run."""
    return side(found, slow).effort / side(found, quick).effort


class Table:
    """Prints the table as it grows, and remembers what the bars ask for."""

    def __init__(self, cache: Path | None) -> None:
        self.cache = cache
        self.bars: list[str] = []
        print(HEAD, flush=True)

    def run(self, section: str, work: str, sides: Sides, rounds: int = ROUNDS, threads: int | None = None) -> Found:
        found = cached(section, sides, self.cache, rounds, warm=rounds > 1, threads=threads)
        self.show(work, found)
        return found

    def show(self, work: str, found: Found) -> None:
        print("\n".join(lines(work, found)), flush=True)

    def bar(self, what: str, value: float, bound: float | None, *, at_most: bool = False) -> None:
        """Note a figure that was asked for, or that stands beside such; NaN (one side did not run) is left out."""
        if bound is None:
            wanted, held = "-", "-"
        else:
            wanted = f"{'at most' if at_most else 'at least'} {bound:g}"
            held = "yes" if (value <= bound if at_most else value >= bound) else "no"
        if value == value:
            self.bars.append(f"| {what} | {wanted} | {value:.2f} | {held} |")


def start(table: Table, folder: Path) -> None:
    found = table.run("start", "from a command to its end", bench_start.sides(folder))
    for name, limit in bench_start.LIMITS.items():
        table.bar(f"{name}: seconds", found[name].median, limit, at_most=True)


def fit(table: Table, folder: Path, methods: list[str]) -> None:
    for method in methods:
        found = (bench_fit.curve if method in bench_fit.SHORTER else bench_fit.contests)(folder, method, table.cache)
        table.show(f"fit {method}, {folder.name}", found)
        theirs = side(found, f"anomalib {method}")
        asked = theirs.result.get("pixel AUROC", float("nan"))
        # Time to quality: the shortest of adflow's fits that ends with at least what the peer's one pass ends with.
        fits = [one for name, one in found.items() if name.startswith("adflow") and one.result]
        enough = [one for one in fits if one.result["pixel AUROC"] >= asked]
        ours = min(enough, key=lambda one: one.median, default=Outcome())
        faster = theirs.median / ours.median if enough or asked != asked else 0.0
        what = f"fit {method} to pixel AUROC {asked} or more ({ours.result.get('pixel AUROC', 'not reached')}): "
        what += f"anomalib's one pass {theirs.median:.3g} s / adflow {ours.median:.3g} s"
        table.bar(f"{what} (processor seconds: {theirs.effort / ours.effort:.2f})", faster, BARS.get(method))


def predict(table: Table, folder: Path, images: int) -> None:
    for method in ("padim", "cflow"):
        sides = bench_predict.sides(str(folder), method, images)
        found = cached(f"predict/{folder.name}/{cores()} cores", sides, table.cache, ROUNDS, warm=True)
        bench_predict.rates(found, images)
        table.show(f"score {images} images of {folder.name} from files, {method}", found)
        for batch in (16, 1):
            value = ratio(found, f"anomalib predict, {method}, batches of {batch}", "adflow")
            table.bar(f"score {method} from files / anomalib's predict, batches of {batch}", value, 3)
        encoder = min((one for name, one in found.items() if "encoder" in name), key=lambda one: one.median)
        table.bar(f"score {method} from files / encoder alone", encoder.effort / next(iter(found.values())).effort, 0.7)


def metrics(table: Table) -> None:
    sides = bench_metrics.sides(*MAPS)
    quick = {name: side for name, side in sides.items() if name not in bench_metrics.SLOW}
    found = cached("metrics", quick, table.cache, ROUNDS, warm=True)
    found |= cached("metrics", {name: sides[name] for name in bench_metrics.SLOW}, table.cache)
    table.show(f"pixel metrics of {MAPS[0]} maps of {MAPS[1]} x {MAPS[1]}", found)
    table.bar("pixel metrics: torchmetrics + anomalib / adflow exact", ratio(found, "torchm", "adflow exact"), 20)
    table.bar("pixel metrics: adflow exact / one np.sort", ratio(found, "adflow exact", "np.sort"), 3, at_most=True)


def memory(table: Table) -> None:
    rows, width, picks = ROWS
    sides = bench_memory.coresets(rows, width, picks)
    title = f"coreset: {picks} of {rows} rows of {width} numbers"
    found = table.run("memory/coreset", title, sides, 1)
    table.bar("coreset: anomalib / adflow", ratio(found, "anomalib", "adflow, as PatchCore"), 4)
    for k in (1, 9):
        title = f"{k} nearest of 8192 rows of {width} numbers, 784 queries"
        table.run(f"memory/nearest {k}", title, bench_memory.neighbours(width, k))
    title = "local neighbours of one image: 16 x 16 cells, 3 x 3 around, 320 images, 128 numbers"
    table.run("memory/local", title, bench_memory.LOCAL)
    title = (
        f"statistics of PaDiM: {bench_memory.IMAGES} images, {bench_memory.POSITIONS} positions, "
        f"{bench_memory.CHANNELS} channels"
    )
    table.run("memory/gaussians", title, bench_memory.GAUSSIANS, 3)


def nfa(table: Table) -> None:
    for shapes, bound in zip(bench_nfa.SHAPES, (4.0, 6.0), strict=False):
        label = " + ".join(f"{c} x {s}²" for c, s in shapes)
        sides = {name: (bench_nfa.side, name, shapes) for name in ("adflow", "adflow without numba", "floor")}
        found = table.run(f"nfa/{label}", f"NFA tree of latents {label}", sides, 25, threads=1)
        name = f"NFA tree, {label}: adflow / one sum of squares and one sort"
        table.bar(name, ratio(found, "adflow", "floor"), bound, at_most=True)


def environment() -> str:
    parts = [f"{cores()} cores of {platform.machine()}", f"Python {platform.python_version()}"]
    for package in ("torch", "numpy", "anomalib", "scikit-learn", "torchmetrics", "ADEval", "timm"):
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            parts.append(f"{package} not installed")
    return ", ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--methods", default=",".join(bench_fit.METHODS), help="of the fits")
    parser.add_argument("--images", type=int, default=83, help="to score")
    parser.add_argument("--cache", type=Path, help="JSON file of results")
    given = parser.parse_args()
    folder, wanted = given.folder.resolve(), given.only.split(",")
    print(environment() + "\n")
    table = Table(given.cache)
    works: dict[str, Callable[[], None]] = {
        "start": lambda: start(table, folder),
        "metrics": lambda: metrics(table),
        "memory": lambda: memory(table),
        "nfa": lambda: nfa(table),
        "predict": lambda: predict(table, folder, given.images),
        "fit": lambda: fit(table, folder, given.methods.split(",")),
    }
    for name, work in works.items():
        if name in wanted:
            work()
    print("\n| bar | wanted | measured | held |\n|---|---|---|---|")
    print("\n".join(table.bars))
    if "grow" in wanted:
        print()
        bench_score.grow(bench_start.fitted(folder), list_images(folder / "test"))


if __name__ == "__main__":
    main()
