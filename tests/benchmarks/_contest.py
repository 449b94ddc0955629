"""Contests: the same work done by several sides, each in a process of its own, in turn.

A side is a top-level function that prepares its work (imports, data, models) and returns a call without arguments;
what the call returns (figures of quality) is kept. Rounds are interleaved: a busy machine slows all sides alike. All
sides inherit the cores of the parent, and get as many threads as there are cores.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Call = Callable[[], "dict[str, Any] | None"]
Sides = Mapping[str, tuple[Any, ...]]  # name -> (function that prepares and returns a Call, its arguments ...)
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


@dataclass
class Outcome:
    """What one side did: seconds per round, peak memory, and the quality it reached.

    Attributes:
        seconds: wall time of each round.
        cpu: processor seconds of each round, all threads and child processes together.
        peak: MB resident at most during the rounds.
        base: MB resident when everything was prepared and no round had begun.
        result: what the last call returned.
        error: why there are no seconds, or None.
    """

    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak: float = 0.0
    base: float = 0.0
    result: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def median(self) -> float:
        """Return the median of the seconds; NaN when the side failed."""
        return statistics.median(self.seconds) if self.seconds else float("nan")

    @property
    def effort(self) -> float:
        """Return the median of the processor seconds: what a busy machine changes least."""
        return statistics.median(self.cpu) if self.cpu else float("nan")

    @property
    def spread(self) -> float:
        """Return half the distance between the quartiles of the rounds, as a share of the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / 2 / self.median


def cores() -> int:
    """Return the cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def contest(
    sides: Sides, rounds: int = 5, warm: bool = True, once: tuple[str, ...] = (), threads: int | None = None
) -> dict[str, Outcome]:
    """Let every side run ``rounds`` times, in turn.

    Args:
        sides: name -> (function that prepares, its arguments ...).
        rounds: how often each runs.
        warm: run each once more before, unmeasured.
        once: sides so slow that one measured round has to do, without warming up.
        threads: of every side; None = as many as there are cores.
    """
    context = multiprocessing.get_context("spawn")
    found = {name: Outcome() for name in sides}
    pipes: dict[str, Connection] = {}
    processes = {}
    with _environment(threads or cores()):
        for name, (make, *arguments) in sides.items():
            pipes[name], child = context.Pipe()
            processes[name] = context.Process(target=_work, args=(child, make, arguments), daemon=False)
            processes[name].start()
            child.close()
            # One after another: preparing side by side would be measured by nobody, but needs all memory at once.
            _answer(pipes[name], found[name])
    try:
        for turn in range(rounds + warm):
            for name, outcome in found.items():
                short = name in once
                if outcome.error or (short and turn != rounds + warm - 1):
                    continue
                pipes[name].send("run" if turn >= warm or short else "warm")
                _answer(pipes[name], outcome)
    finally:
        for name, pipe in pipes.items():
            with contextlib.suppress(OSError):
                pipe.send("stop")
            processes[name].join(timeout=20)
            if processes[name].is_alive():
                processes[name].terminate()
    for name, outcome in found.items():
        if outcome.error:
            print(f"{name}: {outcome.error.strip().splitlines()[-1]}", file=sys.stderr)
    return found


def cached(
    section: str,
    sides: Sides,
    cache: Path | None,
    rounds: int = 1,
    warm: bool = False,
    threads: int | None = None,
) -> dict[str, Outcome]:
    """Return what a JSON file holds of ``sides``, and run the others; what ran without error goes into the file."""
    known = json.loads(cache.read_text()) if cache and cache.exists() else {}
    here = known.setdefault(section, {})
    missing = {name: side for name, side in sides.items() if name not in here}
    fresh = contest(missing, rounds, warm, threads=threads) if missing else {}
    here |= {name: asdict(one) for name, one in fresh.items() if not one.error}
    if cache and fresh:
        cache.write_text(json.dumps(known, indent=1) + "\n")
    return {name: fresh.get(name) or Outcome(**here[name]) for name in sides}


@contextlib.contextmanager
def measured() -> Iterator[dict[str, float]]:
    """Measure a part of a call: the dict holds "seconds", "cpu" and "peak" afterwards, for the call's result."""
    took: dict[str, float] = {}
    cpu, began = _cpu(), time.perf_counter()
    yield took
    took |= {"seconds": time.perf_counter() - began, "cpu": _cpu() - cpu, "peak": _resident("VmHWM")}


HEAD = "| work | side | seconds | spread | processor s | x the first | peak MB | quality |\n" + "|---" * 8 + "|"


def show(work: str, found: Mapping[str, Outcome]) -> None:
    """Print a Markdown table of one comparison."""
    print(f"\n{HEAD}\n" + "\n".join(lines(work, found)), flush=True)


def lines(work: str, found: Mapping[str, Outcome]) -> list[str]:
    """Return one row per side: medians, processor seconds as a multiple of the first side's, memory, quality.

    Memory is all that the process held at most, and in brackets what the rounds added to it.
    """
    table = []
    first = next(iter(found.values()))
    for name, one in found.items():
        if one.error:
            reason = one.error.strip().splitlines()[-1][:120]
            table.append(f"| {work} | {name} | did not run: {reason} | | | | | |")
            continue
        spread = f"±{100 * one.spread:.0f} %" if len(one.seconds) > 1 else "one run"
        quality = ", ".join(f"{key} {_number(value)}" for key, value in one.result.items())
        table.append(
            f"| {work} | {name} | {one.median:.3g} | {spread} | {one.effort:.3g} | {one.effort / first.effort:.2f} | "
            f"{one.peak:.0f} (+{one.peak - one.base:.0f}) | {quality} |"
        )
    return table


def _number(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _answer(pipe: Connection, outcome: Outcome) -> None:
    try:
        answer = pipe.recv()
    except EOFError:
        outcome.error = "the process ended without an answer (out of memory?)"
        return
    if "error" in answer:
        outcome.error = answer["error"]
    elif "base" in answer:
        outcome.base = answer["base"]
    elif answer["measured"]:
        outcome.seconds.append(answer["seconds"])
        outcome.cpu.append(answer["cpu"])
        outcome.peak = max(outcome.peak, answer["peak"])
        outcome.result = answer["result"] or {}


def _work(pipe: Connection, make: Callable[..., Call], arguments: list[Any]) -> None:
    """Prepare, then run whenever told to. Runs in the child; its temporary files vanish with it."""
    try:
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            tempfile.tempdir = folder
            _serve(pipe, make, arguments)
    except BaseException:
        pipe.send({"error": traceback.format_exc()})


def _serve(pipe: Connection, make: Callable[..., Call], arguments: list[Any]) -> None:
    with _hush():
        call = make(*arguments)
    pipe.send({"base": _resident("VmRSS")})
    while (word := pipe.recv()) != "stop":
        _forget_peak()
        with _hush():
            cpu, began = _cpu(), time.perf_counter()
            result = call()
            seconds, used = time.perf_counter() - began, _cpu() - cpu
        result = result or {}
        # Where only a part of the call counts, the side measured it (see measured).
        answer = {"seconds": seconds, "cpu": used, "peak": _resident("VmHWM")}
        answer = {key: result.pop(key, value) for key, value in answer.items()}
        pipe.send(answer | {"result": result, "measured": word == "run"})


def _cpu() -> float:
    times = os.times()  # in steps of 10 ms: used for child processes (loaders of data) only
    return time.process_time() + times.children_user + times.children_system


def _resident(key: str) -> float:
    """Return VmRSS (now) or VmHWM (peak) of this process in MB; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) / 1024
    return 0.0


def _forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


@contextlib.contextmanager
def _environment(threads: int) -> Iterator[None]:
    """Set thread counts for children: they are read when numpy and torch are loaded."""
    before = dict(os.environ)
    os.environ.update(dict.fromkeys(_THREADS, str(threads)), OMP_WAIT_POLICY="PASSIVE", PYTHONWARNINGS="ignore")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _hush() -> Iterator[None]:
    """Drop what libraries print; ``BENCH_TALK=1`` lets them talk."""
    if os.environ.get("BENCH_TALK"):
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    with Path(os.devnull).open("w") as nowhere:
        saved = [(number, os.dup(number)) for number in (1, 2)]
        try:
            for number, _ in saved:
                os.dup2(nowhere.fileno(), number)
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in saved:
                os.dup2(copy, number)
                os.close(copy)
