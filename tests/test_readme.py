"""What the documentation shows is what the program does."""

from __future__ import annotations

import doctest
import importlib
import re
import shlex
import textwrap
from pathlib import Path

import pytest
import typer

from adflow import cli, methods

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
SOURCES = sorted((ROOT / "adflow").rglob("*.py"))
EXAMPLES = [path.relative_to(ROOT) for path in SOURCES if ">>> " in path.read_text(encoding="utf-8")]


def methods_table() -> str:
    """The README's table of methods, from what the methods say of themselves."""
    lines = ["| method | year | learns | `--null gaussian` | fit | score |", "|---|---|---|---|---|---|"]
    for row in methods.facts():
        null = "yes" if row.get("null") else "no"
        cells = [f"`{row['name']}`", row["year"], row["learns"], null, row["fit_cost"], row["score_cost"]]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def test_the_table_of_methods_is_up_to_date() -> None:
    assert methods_table() in README


@pytest.mark.parametrize("path", EXAMPLES, ids=str)
def test_examples_in_docstrings(path: Path) -> None:
    parts = path.with_suffix("").parts
    result = doctest.testmod(importlib.import_module(".".join(part for part in parts if part != "__init__")))
    assert result.attempted and not result.failed


def test_commands_and_options_exist() -> None:
    group = typer.main.get_command(cli.app)
    lines = [line for kind, block in BLOCKS if kind in ("bash", "yaml") for line in block.splitlines()]
    parts = [part.strip() for line in lines for part in re.split(r"&&|#", line)]
    commands = [part for part in parts if part.startswith("adflow ")]
    assert len(commands) >= 8
    for command in commands:
        words = shlex.split(command)
        verb = group.commands[words[1]]  # type: ignore[attr-defined]
        known = {option for parameter in verb.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for word in words[2:]:
            if word.startswith("-"):
                assert word.split("=")[0] in known, f"{command}: {word}"


def test_files_named_exist() -> None:
    named = set(re.findall(r"\btests/[\w/]+(?:\.py)?", README))
    assert named and [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_method_of_ones_own_is_the_tested_one() -> None:
    from test_methods import TOY

    assert textwrap.dedent(TOY).strip() in README
