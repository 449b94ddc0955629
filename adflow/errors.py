"""Every error that adflow raises on purpose, and the exit code the command line gives for it.

::

    AdflowError               1
    ├── UsageError            2   an unknown name, or options that contradict each other
    ├── InputError            3   a path, image, data set or value that cannot be used
    │   └── DetectorFileError 3   a detector file or exported bundle that is not one, or is damaged
    ├── UnavailableError      4   weights, data or an optional package that are not on this machine
    ├── ResourceError         5   disk full, no permission, out of memory, a limit that cannot be kept
    ├── GateError             6   a metric below what ``--fail-under`` asks, or a regression
    ├── PartialError          7   some cells or classes failed, the rest is done
    └── TrainingError         8   a loss that is not finite and could not be recovered

Anything else that escapes is a bug and shows its traceback. The library raises; only the command line prints.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AdflowError(Exception):
    """What went wrong in one line, and the next step.

    Args:
        message: what, what was found, and what was expected.
        hint: the next command to type or thing to do; shown on its own line.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(AdflowError):
    """An unknown name, or options that contradict each other."""

    exit_code = 2


class InputError(AdflowError):
    """A path, image, data set or value that cannot be used."""

    exit_code = 3


class DetectorFileError(InputError):
    """A detector file or exported bundle that is not one, or is damaged."""


class UnavailableError(AdflowError):
    """Weights, data or an optional package that are not on this machine."""

    exit_code = 4


class ResourceError(AdflowError):
    """Disk full, no permission, out of memory, or a limit that cannot be kept."""

    exit_code = 5


class GateError(AdflowError):
    """A metric below what was asked for, or a regression."""

    exit_code = 6


class PartialError(AdflowError):
    """Some cells or classes failed; the rest is done."""

    exit_code = 7


class TrainingError(AdflowError):
    """A loss that is not finite and could not be recovered; the last good weights are kept."""

    exit_code = 8


def unknown(kind: str, found: object, known: Iterable[str]) -> UsageError:
    """Return the error for a name that does not exist, naming the nearest ones.

    >>> print(unknown("method", "cflwo", ["cflow", "uflow"]))
    unknown method 'cflwo'; did you mean 'cflow'? Known: cflow, uflow
    """
    names = sorted(known)
    near = difflib.get_close_matches(str(found), names, n=1)
    guess = f"did you mean '{near[0]}'? " if near else ""
    return UsageError(f"unknown {kind} '{found}'; {guess}Known: {', '.join(names)}")
