"""What Windows and macOS do otherwise: no fork, no links, processes that start from nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from cli.conftest import write_part

# In a process of its own: the way processes start can be set once, and what is taken away is gone for all.
ELSEWHERE = """
import multiprocessing, os, sys

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    for name in ("fork", "forkpty", "symlink", "link", "mkfifo", "chown", "sched_getaffinity"):
        if hasattr(os, name):
            delattr(os, name)
    from adflow import cli

    data, out = sys.argv[1:]
    size = ["--size", "64", "-q"]
    for argv in (
        ["fit", data, "-m", "padim", *size, "--workers", "2", "--out", out + "/run"],
        ["score", data + "/test", "--model", out + "/run", "--workers", "2", "--out", out + "/scores", "-q"],
        ["evaluate", data, "-m", "padim,local", *size, "--jobs", "2", "--out", out + "/table", "-q"],
    ):
        assert cli.run(argv) == 0, argv
"""


def test_all_works_without_fork_and_links(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    write_part(tmp_path / "parts" / "train" / "good", 12, rng)
    write_part(tmp_path / "parts" / "test" / "good", 2, rng)
    write_part(tmp_path / "parts" / "test" / "spot", 2, rng, defect=True)
    script = tmp_path / "elsewhere.py"
    script.write_text(ELSEWHERE, encoding="utf-8")
    environment = os.environ | {"ADFLOW_HOME": str(tmp_path / "home")}
    command = [sys.executable, str(script), str(tmp_path / "parts"), str(tmp_path / "out")]
    found = subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert len(list((tmp_path / "out" / "table" / "cells").glob("*.json"))) == 2
