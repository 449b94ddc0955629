"""adflow commands in processes of their own that can be killed, starved and watched; a thousand of them in minutes.

One process imports everything and runs each kind of command once; every further run is forked from it and starts
warm. A fault is set off at the n-th time a run is about to touch the file system: Python tells (audit events) before
it opens a file for writing, renames, removes or makes something. POSIX only; tests skip elsewhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
WRITES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}


@dataclass
class Run:
    """How a run ended: exit code (negative: the signal), what it said, and what it wrote in order."""

    code: int
    out: str
    err: str
    seconds: float
    events: list[tuple[str, str]] = field(default_factory=list)

    def json(self) -> dict[str, Any]:
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found

    @property
    def clean(self) -> bool:
        """Whether it ended in one of the ways that the README documents."""
        lines = [line for line in self.err.splitlines() if line.startswith("error ")]
        good = self.code == 0 or (2 <= self.code <= 8 and len(lines) == 1)
        return good and "Traceback" not in self.err + self.out


class Children:
    """Starts runs; use in a ``with`` statement.

    Args:
        warm: commands that the first process runs itself, so that no child compiles or loads anything twice.
    """

    def __init__(self, warm: list[list[str]] | None = None) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="adflow-children-")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "NO_COLOR": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.count = 0
        self._ask({"warm": warm or []})

    def start(self, *argv: object, fault: dict[str, Any] | None = None, **where: Any) -> int:
        """Start a run; ``where`` may hold ``cwd`` and ``env``. Returns its number."""
        self.count += 1
        base = Path(self.folder.name) / str(self.count)
        for suffix in (".out", ".err"):
            base.with_suffix(suffix).touch()
        request = {"argv": [str(a) for a in argv], "base": str(base), "fault": fault, **where}
        self._ask({"start": self.count, **request})
        return self.count

    def wait(self, number: int, *, timeout: float = 300, kill_after: float | None = None) -> Run:
        """Wait for a run, or kill it ``kill_after`` seconds after its start. Hanging is a failure."""
        answer = self._ask({"wait": number, "timeout": timeout, "kill_after": kill_after})
        base = Path(self.folder.name) / str(number)
        out, err = (base.with_suffix(s).read_text(encoding="utf-8", errors="replace") for s in (".out", ".err"))
        assert not answer["hung"], f"a run did not end within {timeout} s:\n{err}"
        events = base.with_suffix(".events")
        lines = events.read_text(encoding="utf-8").splitlines() if events.exists() else []
        for path in base.parent.glob(f"{number}.*"):
            path.unlink()
        return Run(answer["code"], out, err, answer["seconds"], [tuple(json.loads(line)) for line in lines])

    def run(self, *argv: object, fault: dict[str, Any] | None = None, timeout: float = 300,
            kill_after: float | None = None, **where: Any) -> Run:  # fmt: skip
        """Start a run and wait for it."""
        return self.wait(self.start(*argv, fault=fault, **where), timeout=timeout, kill_after=kill_after)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the process that runs are forked from has died"
        found = json.loads(line)
        assert isinstance(found, dict)
        return found

    def __enter__(self) -> Children:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.folder.cleanup()


# ---- the process that runs are forked from


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a command prints is data of that command
    running: dict[int, tuple[int, float]] = {}
    from adflow import cli

    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        if "warm" in request:
            for argv in request["warm"]:
                with Path(os.devnull).open("w") as nothing, contextlib.redirect_stdout(nothing):
                    assert cli.run(argv) == 0, argv
        elif "start" in request:
            sys.stderr.flush()
            began = time.monotonic()
            pid = os.fork()
            if pid == 0:
                _child(request)
            running[request["start"]] = (pid, began)
        else:
            pid, began = running.pop(request["wait"])
            answer = _await(pid, began, request["timeout"], request["kill_after"])
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _await(pid: int, began: float, timeout: float, kill_after: float | None) -> dict[str, Any]:
    """Wait for a child by its descriptor, which also works for one that ended long ago."""
    handle = os.pidfd_open(pid)
    try:
        left = max(0.0, (timeout if kill_after is None else kill_after) - (time.monotonic() - began))
        hung = not select.select([handle], [], [], left)[0]
    finally:
        os.close(handle)
    if hung:
        os.kill(pid, 9)
    _, status = os.waitpid(pid, 0)
    seconds = time.monotonic() - began
    code = os.waitstatus_to_exitcode(status)
    return {"code": code, "seconds": seconds, "hung": hung and kill_after is None}


def _child(request: dict[str, Any]) -> None:
    import signal
    import traceback

    code = 99
    try:
        base = Path(request["base"])
        for name, descriptor in ((".out", 1), (".err", 2)):
            file = os.open(base.with_suffix(name), os.O_WRONLY | os.O_CREAT)
            os.dup2(file, descriptor)
        sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
        sys.stderr = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="backslashreplace")
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if request.get("cwd"):
            os.chdir(request["cwd"])
        os.environ.update(request.get("env") or {})
        fault = request.get("fault") or {}
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        _limits(fault)
        if fault:
            sys.addaudithook(_Fault(fault, base.with_suffix(".events")))
        from adflow import cli

        try:
            code = cli.run(request["argv"])
        except BaseException:
            traceback.print_exc()
            code = 1
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
    finally:
        os._exit(code)


def _limits(fault: dict[str, Any]) -> None:
    import resource

    if "file_bytes" in fault:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["file_bytes"], fault["file_bytes"]))
    if "more_memory" in fault:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + fault["more_memory"],) * 2)
    if "user" in fault:
        # That user may not be able to read the sources.
        for name in ("download", "fit", "score", "segment", "evaluate", "export"):
            import_module(f"adflow.tasks.{name}")
            import_module(f"adflow.cli.{name}")
        os.setgid(fault["user"])
        os.setuid(fault["user"])


class _Fault:
    """An audit hook: counts what is about to be written, and at one count kills or refuses.

    Keys: ``at`` (count from 0), ``kill``, or ``errno`` (with ``stays``: every later write fails too), ``log``.
    """

    def __init__(self, fault: dict[str, Any], log: Path) -> None:
        self.fault = fault
        self.seen = 0
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if fault.get("log") else None

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or path == os.devnull:
                return
        elif event not in WRITES:
            return
        # Closing by number, or a path below a descriptor, says nothing about a place.
        names = [os.fsdecode(p) for p in arguments[:2] if isinstance(p, str | bytes | os.PathLike)]
        if not names or (event == "open" and isinstance(arguments[0], int)):
            return
        here, self.seen = self.seen, self.seen + 1
        if self.log is not None:
            name = names[1] if event == "os.rename" else names[0]
            name = str(Path.cwd() / name)
            os.write(self.log, (json.dumps([event, name]) + "\n").encode())
        at = self.fault.get("at")
        if at is None or here < at:
            return
        if self.fault.get("kill") and here == at:
            os.kill(os.getpid(), 9)
        number = self.fault.get("errno")
        if number and (here == at or self.fault.get("stays")) and event not in ("os.remove", "os.rmdir"):
            raise OSError(number, os.strerror(number), names[0])


def start_code(code: str, *arguments: str) -> subprocess.Popen[str]:
    """Start Python on ``code``, warnings as errors, to be killed or waited for; what it prints can be read."""
    command = [sys.executable, "-W", "error", "-c", code, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=HERE.parents[1])


def tree(folder: Path, leave_out: tuple[str, ...] = ()) -> dict[str, bytes]:
    """Every file below ``folder`` by its relative name, with its content."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in leave_out
    }


def left_over(folder: Path) -> list[str]:
    """Temporary files and lock files below ``folder``."""
    return [str(p.relative_to(folder)) for p in folder.rglob(".*") if ".partial" in p.name or ".lock" in p.name]


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own with ``size`` (of mount's tmpfs) at ``folder``; raises when it may not be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


if __name__ == "__main__":
    _serve()
