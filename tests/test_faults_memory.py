"""Too little memory: what can shrink without changing a result shrinks and says so, all else names the setting."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from conftest import TinyBackbone, make_tiny_images

from adflow import features
from adflow._extract import Extraction
from adflow._rows import RamStore
from adflow._system import free_memory
from adflow._threads import in_halves
from adflow.errors import ResourceError
from adflow.features import FeatureBank


def machine(root: Path, available: int, files: dict[str, str]) -> Path:
    (root / "proc").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable:  {available} kB\nHugePages_Total: 0\n")
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_free_memory_is_what_kernel_and_container_leave(tmp_path: Path) -> None:
    assert free_memory(tmp_path) is None
    assert free_memory(machine(tmp_path / "plain", 1000, {})) == 1_024_000
    v2 = {"memory.max": "900000\n", "memory.current": "700000\n", "memory.stat": "anon 1\ninactive_file 100000\n"}
    assert free_memory(machine(tmp_path / "v2", 1000, v2)) == 300_000
    assert free_memory(machine(tmp_path / "free", 1000, v2 | {"memory.max": "max\n"})) == 1_024_000
    v1 = {
        "memory/memory.limit_in_bytes": "500000",
        "memory/memory.usage_in_bytes": "600000",
        "memory/memory.stat": "total_inactive_file 50000",
    }
    assert free_memory(machine(tmp_path / "v1", 1000, v1)) == 0
    assert free_memory(machine(tmp_path / "odd", 1000, {"memory.max": "5", "memory.current": "?"})) == 1_024_000


def bank(tmp_path: Path, **options: object) -> FeatureBank:
    return FeatureBank.build(TinyBackbone(), make_tiny_images(6), folder=tmp_path, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("trouble", ["little is free", "allocation fails"])
def test_features_go_to_disk_when_ram_is_short_and_stay_the_same(
    trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with bank(tmp_path) as in_ram:
        assert not in_ram.on_disk
        wanted = [in_ram.level(i).clone() for i in range(3)]
    if trouble == "little is free":
        monkeypatch.setattr(features, "free_memory", lambda: 100_000)
    else:
        # Petabytes: the allocator's own refusal.
        monkeypatch.setattr(features, "RamStore", lambda shape, dtype, rows: RamStore(shape, dtype, 1 << 45))
    with caplog.at_level(logging.WARNING, "adflow"), bank(tmp_path) as shrunk:
        monkeypatch.undo()
        assert shrunk.on_disk and all(torch.equal(shrunk.level(i), wanted[i]) for i in range(3))
    assert "go to disk" in caplog.text and "RAM" in caplog.text


def test_images_that_do_not_fit_on_the_gpu_pass_in_halves(caplog: pytest.LogCaptureFixture) -> None:
    class Small(TinyBackbone):
        def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
            if len(images) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().forward(images)

    images = make_tiny_images(11)
    plain, small = (Extraction(net(), None, None, 1, 1) for net in (TinyBackbone, Small))
    wanted, found = list(plain._in_batches(images)), list(small._in_batches(images))
    assert [size for size, _ in found] == [size for size, _ in wanted] and len(found) == 11
    for (_, mine), (_, theirs) in zip(found, wanted, strict=True):
        for level, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(level, other)  # kernels round differently for another batch size
    assert "11 images at once are too many for the GPU: 5 are tried" in caplog.text
    with pytest.raises(torch.OutOfMemoryError):
        in_halves(lambda _: small.backbone(images.normal[:4]), images.normal[:1])


def test_no_room_in_ram_and_on_disk_names_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "free_memory", lambda: 1000)
    monkeypatch.setattr(features.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(ResourceError, match=r"free in .*of RAM are free") as error:
        bank(tmp_path)
    assert "--feature-dtype" in str(error.value.hint)
