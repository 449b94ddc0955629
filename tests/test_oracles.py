"""Parity with the original implementations, on arrays they produced.

The folder is read from ``ADFLOW_ORACLES`` (default ``../shared/oracles``); where it is absent every test here is
skipped, visibly. Cases, shapes and parameters are taken from the files, so that the same tests run on another set.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(os.environ.get("ADFLOW_ORACLES", Path(__file__).parents[2] / "shared" / "oracles"))


def oracle(name: str) -> dict[str, np.ndarray]:
    """Return all arrays of ``name``.npz, or skip the test when the file is not here."""
    path = FOLDER / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"no oracle file {path}; set ADFLOW_ORACLES to a folder that holds it")
    with np.load(path) as arrays:
        return {key: arrays[key] for key in arrays.files}


def weights(name: str) -> dict[str, "object"]:
    """Return the state dict of ``name``.safetensors as torch tensors, or skip the test."""
    from safetensors.torch import load_file

    path = FOLDER / f"{name}.safetensors"
    if not path.exists():
        pytest.skip(f"no oracle file {path}; set ADFLOW_ORACLES to a folder that holds it")
    return load_file(path)
