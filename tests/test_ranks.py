"""Two processes fit one detector together: features, gradients and skipped files are those of one process."""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import TinyBackbone
from PIL import Image
from torch import nn

from adflow import _ranks
from adflow.data import Images
from adflow.features import FeatureBank
from adflow.methods._train import train


def pictures(folder: Path) -> list[Path]:
    """37 pictures (two exchanges and a rest), the 20th cannot be read."""
    rng = np.random.default_rng(0)
    paths = [folder / f"{i:02}.png" for i in range(37)]
    for path in paths:
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(path)
    paths[20].write_bytes(b"no image")
    return paths


def together(paths: list[Path]) -> dict[str, Any]:
    """What both processes do: a bank, and a training whose last batches cannot be shared."""
    images = Images(paths, (32, 32), workers=0)
    with FeatureBank.build(TinyBackbone(), images, workers=1) as bank:
        features = [bank.level(k).clone() for k in range(3)]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7, momentum=0.0), nn.Linear(7, 1)).eval()
    generator = torch.Generator().manual_seed(1)
    batches = (("any", torch.randn(11 if step < 20 else 1, 5, generator=generator), None) for step in range(30))
    train(net, lambda b: (net(b[1]) - b[1][:, :1]).square().mean(), batches, steps=30, lr=0.01, clip=0.5)
    return {
        "features": features,
        "skipped": images.skipped,
        "weights": [p.detach().clone() for p in net.parameters()],
    }


def _second(store: str, paths: list[Path], sender: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=1, world_size=2)
    found = together(paths)
    dist.destroy_process_group()
    # As numpy: tensors travel through shared memory that the sender must outlive.
    sender.send({k: [t.numpy() if isinstance(t, torch.Tensor) else t for t in v] for k, v in found.items()})


@pytest.mark.filterwarnings("ignore::UserWarning")  # gloo and the device of a barrier
def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    paths = pictures(tmp_path)
    alone = together(paths)
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe()
    store = str(tmp_path / "store")
    other = context.Process(target=_second, args=(store, paths, sender), daemon=True)
    other.start()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=2)
    try:
        assert (_ranks.rank(), _ranks.world()) == (0, 2)
        first = together(paths)
    finally:
        dist.destroy_process_group()
    second = receiver.recv()
    other.join(20)
    for mine, whole, theirs in zip(first["features"], alone["features"], second["features"], strict=True):
        assert torch.equal(mine, whole) and np.array_equal(mine.numpy(), theirs) and len(mine) == 36
    assert first["skipped"] == alone["skipped"] == second["skipped"] and len(first["skipped"]) == 1
    for mine, whole, theirs in zip(first["weights"], alone["weights"], second["weights"], strict=True):
        assert np.array_equal(mine.numpy(), theirs)
        # Gradients are summed in another order: float32 rounding through 30 Adam steps of 0.01.
        torch.testing.assert_close(mine, whole, rtol=0, atol=1e-4)


def test_shares_of_a_batch_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = ("head", [torch.arange(7), torch.arange(14).view(7, 2)], None)
    monkeypatch.setattr(_ranks, "world", lambda: 3)
    parts, weights = [], []
    for rank in range(3):
        monkeypatch.setattr(_ranks, "rank", lambda rank=rank: rank)
        (name, tensors, nothing), weight = _ranks.share(batch)
        assert name == "head" and nothing is None and weight == len(tensors[0]) / 7
        parts.append(tensors)
        weights.append(weight)
    assert sum(weights) == pytest.approx(1)
    assert torch.equal(torch.cat([p[1] for p in parts]), batch[1][1])
    uneven = (torch.zeros(6), torch.zeros(5))
    assert _ranks.share(uneven) == (uneven, 1 / 3)
    assert _ranks.share(torch.zeros(2))[1] == 1 / 3


def test_one_process_is_left_alone() -> None:
    assert (_ranks.rank(), _ranks.world(), _ranks.silent(), _ranks.gathered(3)) == (0, 1, False, [3])
    with _ranks.together("cpu") as device:
        assert device == "cpu" and not dist.is_initialized()
    assert "torch.distributed.run" not in sys.modules
