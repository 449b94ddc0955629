"""How the command line speaks: data on stdout, talk on stderr, one place that prints.

Colours and progress bars appear on a terminal only; ``NO_COLOR`` is honoured by rich.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

Step = Callable[[int, int, str], None]


def visible(text: str) -> str:
    r"""Write control characters as escapes: a terminal would obey those that the name of a file holds.

    >>> visible("a\x1b[31mred\nb")
    'a\\x1b[31mred\nb'
    """
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


class Talk:
    """The voice of one command.

    Args:
        json: stdout carries one JSON object and nothing else.
        quiet: only errors on stderr.
        verbose: details on stderr.
    """

    def __init__(self, *, json: bool = False, quiet: bool = False, verbose: bool = False) -> None:
        self.json, self.quiet, self.verbose = json, quiet, verbose
        self.err = Console(stderr=True, highlight=False, soft_wrap=True)
        self.out = Console(highlight=False, soft_wrap=False)

    def say(self, text: str) -> None:
        """Tell the user something; plain text."""
        if not self.quiet:
            self.err.print(escape(visible(text)))

    def detail(self, text: str) -> None:
        """Tell the user something only ``--verbose`` wants to know."""
        if self.verbose and not self.quiet:
            self.err.print(escape(visible(text)), style="dim")

    def warn(self, text: str) -> None:
        """Tell the user what may be wrong."""
        if not self.quiet:
            self.err.print(f"[yellow]warning[/yellow] {escape(visible(text))}")

    def next(self, command: str) -> None:
        """Name the command to type next."""
        if not self.quiet:
            self.err.print(f"[dim]next:[/dim] {escape(visible(command))}")

    def data(self, value: dict[str, Any], table: Any = None) -> None:
        """Print the result: the JSON object with ``--json``, else ``table`` (a rich table or text)."""
        if self.json:
            print_json(value)
        elif isinstance(table, str):
            # As it is: paths and addresses must not be broken into lines or read as markup.
            sys.stdout.write(visible(table) + "\n")
        elif table is not None:
            self.out.print(table)

    @contextlib.contextmanager
    def progress(self, what: str) -> Iterator[Step]:
        """Yield a callable (done, total, message) that draws a bar with the time left, on a terminal only.

        The bar shows up after two seconds: shorter work needs none.
        """
        if self.quiet or not self.err.is_terminal:
            yield lambda done, total, message: None
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.err,
            transient=True,
        )
        began = time.monotonic()
        tasks: dict[str, Any] = {}
        live = False

        def step(done: int, total: int, message: str) -> None:
            nonlocal live
            if not live and time.monotonic() - began > 2:
                bar.start()
                live = True
            if message not in tasks:
                tasks[message] = bar.add_task(escape(visible(f"{what}: {message}")), total=total)
            bar.update(tasks[message], completed=done, total=total)

        try:
            yield step
        finally:
            if live:
                bar.stop()


def command() -> str:
    """Return what the user typed, as a shell takes it."""
    return shlex.join(["adflow", *sys.argv[1:]])


def image_table(
    columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str | Text]]], below: str | None = None
) -> Group:
    """Return a table with a line per image and right-aligned ``columns``, and a line of text ``below`` it.

    Images are written as they lie below the folder they have in common, and that once above them: long paths would
    break every line.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from adflow.imaging import show

    try:
        root = PurePath(os.path.commonpath([PurePath(image).parent for image, _ in rows]))
    except ValueError:  # no image, paths of several drives, or relative ones beside absolute ones
        root = PurePath()
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("image", overflow="fold")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for image, cells in rows:
        table.add_row(Text(show(str(PurePath(image).relative_to(root)) if root.parts else image)), *cells)
    lines = [f"in {show(str(root))}" if root.parts else None, below]
    first, last = (Text(line or "", style="dim") for line in lines)
    return Group(*([first] if first else []), table, *([last] if last else []))


def print_json(value: Any) -> None:
    """Print one JSON object; what JSON cannot say (NaN, infinity) becomes null."""
    unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    sys.stdout.write(json.dumps(_plain(value), ensure_ascii=not unicode, default=str, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
