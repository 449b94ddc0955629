"""What tests share: a tiny random backbone (only tests may build one), pictures, a server, little memory and disk."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import children
import pytest
import torch
from servers import FileServer, file_server
from torch import Tensor, nn
from torch.nn import functional as F

from adflow import _threads
from adflow.backbones import Backbone, make_backbone


class TinyNet(nn.Module):
    """Four strided convolutions; maps at strides 4, 8 and 16 with 8, 12 and 16 channels."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stem = nn.Conv2d(3, 8, 3, 2, 1)
            self.stages = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in ((8, 8), (8, 12), (12, 16)))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.leaky_relu(self.stem(x), 0.1)
        pyramid = []
        for stage in self.stages:
            # Rescaled, so that deep maps of a random net neither vanish nor explode.
            x = F.leaky_relu(2 * stage(x), 0.1)
            pyramid.append(x)
        return pyramid


class TinyBackbone(Backbone):
    """A seeded random net as a backbone, for law tests."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__("tiny", ("t1", "t2", "t3"), [8, 12, 16], [4, 8, 16], f"{seed:064x}", TinyNet(seed))


@dataclass
class TinyImages:
    """Normal pictures, and one like them with a planted defect."""

    normal: Tensor  # [N, 3, H, W] float32 in [0, 1]
    defective: Tensor  # [1, 3, H, W]
    mask: Tensor  # [H, W] bool

    def __len__(self) -> int:
        return len(self.normal)

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        yield from self.normal.split(batch_size)


def make_tiny_images(count: int = 12, height: int = 64, width: int = 64, seed: int = 0) -> TinyImages:
    """Soft waves whose phase differs a little per picture, plus noise; the defect is a bright square."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(height).view(1, 1, -1, 1) / 64
    x = torch.arange(width).view(1, 1, 1, -1) / 64
    phase = 0.3 * torch.rand(count + 1, 3, 1, 1, generator=generator)
    waves = 0.5 + 0.2 * torch.sin(12 * x + phase) + 0.2 * torch.cos(9 * y + 2 * phase)
    pictures = (waves + 0.02 * torch.randn(waves.shape, generator=generator)).clamp(0, 1)
    defective = pictures[-1:].clone()
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[height // 2 : height // 2 + 14, width // 4 : width // 4 + 14] = True
    defective[:, :, mask] = torch.tensor([1.0, 0.0, 1.0]).view(1, 3, 1)
    return TinyImages(pictures[:-1].contiguous(), defective, mask)


@pytest.fixture(scope="module")
def tiny_backbone() -> Backbone:
    return TinyBackbone()


@pytest.fixture
def tiny_images() -> TinyImages:
    return make_tiny_images()


@pytest.fixture(scope="module")
def lite0() -> Backbone:
    return make_backbone("lite0")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread per operation of torch: the number can change the last bits."""
    with _threads.one_thread():
        yield


@pytest.fixture(scope="module")
def _shared_files() -> Iterator[FileServer]:
    with file_server() as running:
        yield running


@pytest.fixture
def files(_shared_files: FileServer) -> FileServer:
    _shared_files.routes.clear()
    return _shared_files


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the user's cache, zoo, proxies or tokens."""
    monkeypatch.setenv("ADFLOW_HOME", str(tmp_path / "home"))
    for name in ("ADFLOW_OFFLINE", "HF_HUB_OFFLINE", "ADFLOW_ZOO", "HF_TOKEN", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("needs root to mount a small file system")
    try:
        with children.small_disk(tmp_path / "small", "1m") as disk:
            yield disk
    except subprocess.CalledProcessError as error:
        pytest.skip(f"cannot mount a small file system: {error.stderr.decode().strip()}")


@pytest.fixture
def little_memory() -> Iterator[None]:
    """At most 3 GiB more: what takes all memory must fail here, not end the machine's other work."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (3 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
