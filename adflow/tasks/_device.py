"""Which device the work runs on."""

from __future__ import annotations

import torch

from adflow.detector import Detector
from adflow.errors import UnavailableError, UsageError


def choose_device(name: str = "auto") -> torch.device:
    """Return the torch device called ``name``: cpu, cuda, cuda:N, mps, or auto for the fastest there is.

    Raises:
        UsageError: not a device name.
        UnavailableError: this machine has no such device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"unknown device '{name}', expected cpu, cuda, cuda:1, mps or auto") from None
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if device.type not in there:
        raise UsageError(f"unknown device '{name}', expected cpu, cuda, cuda:1, mps or auto")
    if not there[device.type]:
        raise UnavailableError(f"this machine has no device '{name}'", hint="Use --device cpu or --device auto.")
    return device


def has_bf16(device: torch.device) -> bool:
    """Return whether ``device`` computes in bfloat16 itself; emulated, it is slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def set_precision(detector: Detector, name: str) -> str | None:
    """Let a detector's backbone compute in ``name``, "float32" or "bf16"; return what the user should know of it.

    Raises:
        UsageError: another precision.
        InputError: the detector is a bundle, which has its own.
    """
    if name == "bf16" and not has_bf16(detector.device()):
        return "this processor has no bfloat16 arithmetic: float32 is used, which is faster here"
    if name != "float32":
        detector.backbone.to_precision(name)
    return None
