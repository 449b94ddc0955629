"""What this machine gives to this process; the only place that asks one operating system in particular."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def version_of(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_memory(system: Path = Path("/")) -> int | None:  # a root, for tests
    """Return the bytes of RAM this process can still take; None where the system does not tell (not Linux).

    The least of what the kernel calls available and what the limit of the process's container leaves (control groups,
    version 2 or 1), where file cache that can be dropped counts as free.
    """
    groups = system / "sys/fs/cgroup"
    found = []
    try:
        found.append(_numbers(system / "proc/meminfo")["MemAvailable"] * 1024)
        for limit, held, stat, cache in (
            ("memory.max", "memory.current", "memory.stat", "inactive_file"),
            (
                "memory/memory.limit_in_bytes",
                "memory/memory.usage_in_bytes",
                "memory/memory.stat",
                "total_inactive_file",
            ),
        ):
            if (groups / limit).is_file():
                most = (groups / limit).read_text(encoding="ascii").strip()
                if most.isdigit():  # "max" is no limit
                    used = int((groups / held).read_text(encoding="ascii"))
                    found.append(max(0, int(most) - used + _numbers(groups / stat).get(cache, 0)))
    except (OSError, ValueError, KeyError):
        pass  # what was found until here holds
    return min(found, default=None)


def resident_bytes() -> int:
    """Return the memory this process holds now, in bytes; 0 where the system does not tell (not Linux)."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """Return the most that :func:`resident_bytes` has been, since the start or :func:`forget_peak`; 0 likewise."""
    return _status("VmHWM")


def forget_peak() -> None:
    """Let the peak of resident memory begin anew, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def _status(what: str) -> int:
    try:
        return _numbers(Path("/proc/self/status"))[what] * 1024
    except (OSError, ValueError, KeyError):
        return 0


def _numbers(path: Path) -> dict[str, int]:
    """Return the first number of every line of ``path`` by its name."""
    lines = (line.replace(":", " ").split() for line in path.read_text(encoding="ascii").splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}
