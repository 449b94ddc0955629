"""The command line: a thin skin over :mod:`adflow.tasks`, and the only place that catches errors.

Exit codes: 0 done, 1 an error without a code of its own, 2 usage, 3 input, 4 not available here, 5 resources,
6 a gate failed, 7 done in part, 8 training failed, 130 interrupted. See :mod:`adflow.errors`.
"""

from __future__ import annotations

import errno
import io
import os
import sys

import typer

from adflow.cli import calibrate, doctor, download, evaluate, export, fit, listing, score, segment
from adflow.errors import AdflowError, InputError, ResourceError

app = typer.Typer(
    name="adflow",
    help="Find defects in images after seeing only good ones.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="First time here? Type: adflow fit demo/brick && adflow evaluate demo/brick",
)
app.command("download")(download.download)
app.command("fit")(fit.fit)
app.command("calibrate")(calibrate.calibrate)
app.command("score")(score.score)
app.command("segment")(segment.segment)
app.command("evaluate")(evaluate.evaluate)
app.command("export")(export.export)
app.command("list")(listing.list_)
app.command("doctor")(doctor.doctor)


# Releases of typer carry a click of their own: its errors are found through the one that typer names.
_CLICK_ERROR: type[typer.BadParameter] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)

_INTERRUPTED = 130


def _version(show: bool) -> None:
    if show:
        from adflow import __version__

        typer.echo(f"adflow {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    pass


def run(arguments: list[str]) -> int:
    """Run one command; return its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of files, and our own words, may hold what the terminal's encoding has not.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = typer.main.get_command(app).main(arguments, prog_name="adflow", standalone_mode=False)
        if code == _INTERRUPTED:  # what newer releases of typer make of Ctrl-C
            raise KeyboardInterrupt
        sys.stdout.flush()  # here, where a reader that has gone can be told from a bug
        return code if isinstance(code, int) else 0
    except _CLICK_ERROR as error:
        error.show(sys.stderr)
        return error.exit_code
    except AdflowError as error:
        return _tell(error)
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write("interrupted; nothing half-written was left. The same command starts or goes on again.\n")
        return _INTERRUPTED
    except (BrokenPipeError, SystemExit) as error:
        # The reader of our output (head, less) has gone, for which typer and rich exit: not an error.
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            raise
        _drop_output()
        return 0
    except OSError as error:
        if error.filename is None and error.errno == errno.ENOSPC:  # of stdout: files are written by adflow._files
            _drop_output()
            return _tell(ResourceError("cannot write the output: the disk is full", hint="Free some space."))
        if error.filename is None:
            raise
        # No permission, a name too long, a share that is gone: the machine's state, wherever it was met.
        kind = ResourceError if isinstance(error, PermissionError) else InputError
        return _tell(kind(f"cannot use {error.filename}: {error.strerror}", hint="Look at the path and its rights."))
    except (MemoryError, ImportError, RuntimeError) as error:
        whose = _short_of_memory(error)
        if whose is None:
            raise
        return _tell(_out_of_memory(whose))


def _drop_output() -> None:
    """Lead what stdout still holds nowhere: Python must not complain of it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _short_of_memory(error: Exception) -> str | None:
    """Return what ran out of memory, or None when that is not what the error says."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's, of GPUs
        return "the device"
    # Linux, Windows, torch's C++ parts, oneDNN, a thread's stack, a library that is loaded.
    words = ("can't allocate memory", "not enough memory", "bad_alloc", "out of memory", "could not create a primitive",
             "can't start new thread", "failed to map segment")  # fmt: skip
    return "the machine" if isinstance(error, MemoryError) or any(word in str(error) for word in words) else None


def _out_of_memory(whose: str) -> ResourceError:
    return ResourceError(
        f"out of memory on {whose}", hint="Give a smaller --size, --feature-memory or --workers, or fewer images."
    )


def _tell(error: AdflowError) -> int:
    lines = [str(error), *([error.hint] if error.hint else [])]
    try:
        from rich.console import Console
        from rich.markup import escape

        from adflow.cli._console import visible

        console = Console(stderr=True, highlight=False, soft_wrap=True)
        for start, line in zip(("[bold red]error[/bold red] ", "[dim]  →[/dim] "), lines, strict=False):
            console.print(start + escape(visible(line)))
    except MemoryError:
        sys.stderr.write("error " + "\n  ".join(lines) + "\n")
    return error.exit_code
