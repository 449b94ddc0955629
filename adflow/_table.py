"""A table in words and its looks: terminal, Markdown, LaTeX, CSV. Escaping lives here.

Names of classes and files come from the outside. A terminal obeys control characters, a spreadsheet starts
formulas, Markdown and LaTeX have signs of their own: each look shows such a name as the text it is.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    import pandas as pd

MISSING = "–"


@dataclass(frozen=True)
class TextTable:
    """A table in words, the common step before any of its looks.

    Attributes:
        headings: one per column; the first `names` columns are text, the others numbers.
        names: how many leading columns are names.
        body: one list of cells per line.
        means: the closing lines.
        notes: what must be said under the table.
        title: what stands above it.
    """

    headings: list[str]
    names: int
    body: list[list[str]]
    means: list[list[str]]
    notes: list[str]
    title: str = ""

    def rich(self) -> Group:
        """Return the table and its notes for a terminal."""
        # Titles and cells hold names of files and classes: Text keeps rich from reading [markup] in them.
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False, header_style="bold")
        for column, heading in enumerate(self.headings):
            number = column >= self.names
            table.add_column(
                Text(one_line(heading, keep="\n")),
                justify="right" if number else "left",
                no_wrap=number,
                overflow="fold",
                vertical="bottom",
            )
        for line in self.body:
            table.add_row(*(Text(one_line(cell)) for cell in line))
        if self.means and self.body:
            table.add_section()
        for line in self.means:
            table.add_row(*(Text(one_line(cell)) for cell in line), style="bold")
        title = [Text(one_line(self.title), style="italic")] if self.title else []
        return Group(*title, table, *(Text(one_line(note), style="dim") for note in self.notes))

    def markdown(self) -> str:
        """Return a GitHub table."""
        lines = [[escape_markdown(cell) for cell in line] for line in [self.headings, *self.body]]
        closing = [[f"**{escape_markdown(cell)}**" if cell else "" for cell in line] for line in self.means]
        ruler = ["---" if column < self.names else "---:" for column in range(len(self.headings))]
        table = "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], ruler, *lines[1:], *closing])
        above = f"{escape_markdown(self.title)}\n\n" if self.title else ""
        below = "".join(f"\n{escape_markdown(note)}  " for note in self.notes)
        return f"{above}{table}\n{below}\n" if below else f"{above}{table}\n"

    def latex(self) -> str:
        """Return a LaTeX table (packages: booktabs)."""
        columns = "l" * self.names + "r" * (len(self.headings) - self.names)
        lines = [" & ".join(escape_latex(cell) for cell in line) + r" \\" for line in self.body]
        closing = [" & ".join(escape_latex(cell) for cell in line) + r" \\" for line in self.means]
        caption = " ".join(escape_latex(words) for words in [self.title, *self.notes] if words)
        return "\n".join([
            r"\begin{table}",
            r"  \centering",
            rf"  \caption{{{caption}}}",
            rf"  \begin{{tabular}}{{{columns}}}",
            r"    \toprule",
            "    " + " & ".join(escape_latex(heading) for heading in self.headings) + r" \\",
            r"    \midrule",
            *("    " + line for line in lines),
            *([r"    \midrule"] if lines and closing else []),
            *("    " + line for line in closing),
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
            "",
        ])  # fmt: skip


def one_line(text: object, keep: str = "") -> str:
    """Return text without control characters; a terminal would obey them."""
    letters = ((letter if letter.isprintable() or letter in keep else " ") for letter in str(text))
    return "".join(letters)


def escape_markdown(text: object) -> str:
    r"""Return text that a GitHub table shows as it is.

    >>> print(escape_markdown("a|b <i> metal_nut"))
    a\|b &lt;i&gt; metal_nut
    """
    words = " ".join(one_line(text).split())
    words = words.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join("\\" + letter if letter in "\\|*`[]" else letter for letter in words)


def escape_latex(text: object) -> str:
    r"""Return text that LaTeX prints as it is.

    >>> print(escape_latex("metal_nut 50 % ± 1"))
    metal\_nut 50 \% $\pm$ 1
    """
    special = {letter: "\\" + letter for letter in "&%$#_{}"}
    special |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {"±": r"$\pm$", MISSING: "--", "−": "$-$", "<": r"\textless{}", ">": r"\textgreater{}"}
    return "".join(special.get(letter, letter) for letter in " ".join(one_line(text).split()))


def number(value: Any) -> float | None:
    """Return a finite float, or None for anything that is not a number."""
    if value is None or isinstance(value, (str, bytes, Mapping, Sequence)):
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def plain(value: Any) -> Any:
    """Return what JSON can hold: NumPy scalars as Python's, what is not finite as None, the rest as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset, np.ndarray)):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def csv_cell(value: Any) -> Any:
    """Return a value for CSV; text that a spreadsheet would run gets a quote in front (OWASP, "CSV Injection").

    >>> csv_cell("=1+1"), csv_cell(0.5), csv_cell([1, 2])
    ("'=1+1", 0.5, '[1, 2]')
    """
    if isinstance(value, str) and value.lstrip(" ")[:1] in ("=", "+", "-", "@", "\t", "\r", "\n"):
        return "'" + value
    return json.dumps(plain(value)) if isinstance(value, (dict, list, tuple)) else value


def frame_to_csv(frame: pd.DataFrame) -> str:
    """Return CSV that is safe to open in a spreadsheet, see :func:`csv_cell`."""
    import pandas as pd  # takes a quarter of a second: not with this module, which every table of a command needs

    frame = frame.copy()
    for name in frame:
        if frame[name].dtype == object or not pd.api.types.is_numeric_dtype(frame[name]):
            frame[name] = frame[name].astype(object).map(csv_cell)
    frame.columns = pd.Index([csv_cell(str(name)) for name in frame.columns])
    stream = io.StringIO()
    frame.to_csv(stream, index=False, lineterminator="\n")
    return stream.getvalue()


def show(value: float | None, percent: bool = True, std: float | None = None) -> str:
    """Return one number for people, with its deviation where there is one.

    >>> show(0.98623), show(0.5, std=0.0125), show(float("nan")), show(1.234, percent=False)
    ('98.6', '50.0 ±1.2', '–', '1.23')
    """
    found, spread = number(value), number(std)
    if found is None:
        return MISSING
    # "+ 0.0" turns the negative zero of a small negative number into zero.
    words = f"{round(found * 100, 1) + 0.0:.1f}" if percent else f"{found:.3g}"
    if spread is not None:
        words += f" ±{spread * 100:.1f}" if percent else f" ±{spread:.2g}"
    return words


def widest(cells: Iterable[str]) -> int:
    """Return the number of letters of the longest cell."""
    return max((len(line) for cell in cells for line in cell.split("\n")), default=0)
