"""FeatureBank: the features that scoring sees, bit for bit, in RAM or on disk, within the memory limit."""

from __future__ import annotations

import logging
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from conftest import TinyBackbone
from torch import Tensor

from adflow import features
from adflow._extract import finite
from adflow._threads import one_thread
from adflow.backbones import Backbone, make_backbone
from adflow.errors import InputError, ResourceError, UsageError
from adflow.features import FeatureBank, Resources


class Source:
    """Images in batches, as data.Images hands them out."""

    def __init__(self, images: Tensor, announced: int | None = None) -> None:
        self.images = images
        self.announced = announced

    def __len__(self) -> int:
        return len(self.images) if self.announced is None else self.announced

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        yield from torch.split(self.images, batch_size)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def source() -> Source:
    return Source(noise(7, 3, 48, 64))


def alone(backbone: Backbone, image: Tensor) -> list[Tensor]:
    with one_thread():
        return backbone(image[None])


@pytest.mark.parametrize("memory", [1 << 30, 0], ids=["ram", "disk"])
@pytest.mark.parametrize("workers", [1, 3])
def test_features_are_bit_for_bit_those_of_the_image_alone(
    tiny_backbone: Backbone, source: Source, tmp_path: Path, memory: int, workers: int
) -> None:
    with FeatureBank.build(tiny_backbone, source, memory=memory, folder=tmp_path, workers=workers) as bank:
        assert bank.on_disk == (memory == 0)
        assert (len(bank), bank.size, bank.views) == (7, (48, 64), 1)
        assert bank.channels == [8, 12, 16]
        assert bank.grids == [(12, 16), (6, 8), (3, 4)]
        for i in range(7):
            expected = alone(tiny_backbone, source.images[i])
            for level, (row, wanted) in enumerate(zip(bank.pyramid([i]), expected, strict=True)):
                assert torch.equal(row, wanted)
                assert torch.equal(bank.level(level)[i : i + 1], wanted)


def test_lite0_features_in_the_bank_are_those_at_scoring() -> None:
    backbone = make_backbone("lite0")
    images = noise(5, 3, 64, 96)
    with FeatureBank.build(backbone, Source(images), workers=2) as bank:
        for i in range(5):
            assert all(torch.equal(a, b) for a, b in zip(bank.pyramid([i]), alone(backbone, images[i]), strict=True))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_ram_and_disk_hold_the_same_bits(tiny_backbone: Backbone, source: Source, tmp_path: Path, dtype: str) -> None:
    with (
        FeatureBank.build(tiny_backbone, source, dtype=dtype) as ram,
        FeatureBank.build(tiny_backbone, source, dtype=dtype, memory=0, folder=tmp_path) as disk,
    ):
        for level in range(3):
            assert ram.level(level).dtype == disk.level(level).dtype == features.DTYPES[dtype]
            assert torch.equal(ram.level(level), disk.level(level))
        order = torch.tensor([6, 0, 3])
        for a, b in zip(ram.pyramid(order), disk.pyramid(order), strict=True):
            assert a.dtype == torch.float32
            assert torch.equal(a, b)
        pairs = zip(
            ram.batches(3, shuffle=True, generator=generator(5)),
            disk.batches(3, shuffle=True, generator=generator(5)),
            strict=True,
        )
        assert all(torch.equal(a, b) for one, two in pairs for a, b in zip(one, two, strict=True))


def test_half_precision_rounds_once(tiny_backbone: Backbone, source: Source) -> None:
    with FeatureBank.build(tiny_backbone, source, dtype="bfloat16") as bank:
        exact = alone(tiny_backbone, source.images[2])
        for found, wanted in zip(bank.pyramid([2]), exact, strict=True):
            assert torch.equal(found, wanted.bfloat16().float())


def test_batches_cover_every_row_once_and_shuffling_follows_the_generator(
    tiny_backbone: Backbone, source: Source
) -> None:
    with FeatureBank.build(tiny_backbone, source) as bank:
        plain = list(bank.batches(3))
        assert [len(levels[0]) for levels in plain] == [3, 3, 1]
        assert torch.equal(torch.cat([levels[1] for levels in plain]), bank.level(1))
        assert [len(levels[0]) for levels in bank.batches(3, drop_last=True)] == [3, 3]
        one = torch.cat([levels[0] for levels in bank.batches(2, shuffle=True, generator=generator(1))])
        same = torch.cat([levels[0] for levels in bank.batches(2, shuffle=True, generator=generator(1))])
        other = torch.cat([levels[0] for levels in bank.batches(2, shuffle=True, generator=generator(2))])
        assert torch.equal(one, same)
        assert not torch.equal(one, other)
        rows = [int((bank.level(0) == row).flatten(1).all(1).nonzero()) for row in one]
        assert sorted(rows) == list(range(7))
        with pytest.raises(UsageError, match="needs a generator"):
            bank.batches(2, shuffle=True)
        with pytest.raises(UsageError, match="batch_size is 0"):
            bank.batches(0)
        with pytest.raises(InputError, match="row 7 does not exist, expected 0 to 6"):
            bank.pyramid([0, 7])


def test_the_limit_decides_and_the_note_says_why(
    tiny_backbone: Backbone, source: Source, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # 7 rows of 8x12x16 + 12x6x8 + 16x3x4 float32 numbers.
    needed = 7 * (8 * 12 * 16 + 12 * 6 * 8 + 16 * 3 * 4) * 4
    with caplog.at_level(logging.INFO, "adflow"):
        ram = FeatureBank.build(tiny_backbone, source, memory=needed, folder=tmp_path)
        disk = FeatureBank.build(tiny_backbone, source, memory=needed - 1, folder=tmp_path)
        half = FeatureBank.build(tiny_backbone, source, memory=needed // 2, dtype="bfloat16")
    assert (ram.on_disk, disk.on_disk, half.on_disk) == (False, True, False)
    assert "kept in RAM" in ram.note and "limit" in ram.note
    assert str(tmp_path) in disk.note and "limit" in disk.note and "float32" in disk.note
    assert [record.message for record in caplog.records] == [ram.note, disk.note, half.note]
    for bank in (ram, disk, half):
        bank.close()


def test_a_bank_on_disk_leaves_no_file_behind(tiny_backbone: Backbone, source: Source, tmp_path: Path) -> None:
    bank = FeatureBank.build(tiny_backbone, source, memory=0, folder=tmp_path / "deep" / "er")
    level = bank.level(0)
    kept = level.clone()
    bank.close()
    assert torch.equal(level, kept)  # a mapped level outlives the bank
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    with pytest.raises(InputError, match="has been closed"):
        bank.pyramid([0])
    with pytest.raises(InputError, match="has been closed"):
        bank.level(0)


def test_writing_to_a_mapped_level_does_not_reach_the_bank(
    tiny_backbone: Backbone, source: Source, tmp_path: Path
) -> None:
    with FeatureBank.build(tiny_backbone, source, memory=0, folder=tmp_path) as bank:
        before = bank.pyramid([0])[0]
        bank.level(0).zero_()
        assert torch.equal(bank.pyramid([0])[0], before)


def test_a_killed_process_leaves_no_file_behind(tmp_path: Path) -> None:
    code = """
        import os, sys, torch
        sys.path.insert(0, sys.argv[2])
        from conftest import TinyBackbone, make_tiny_images
        from adflow.features import FeatureBank
        def stop(done, total, message):
            if done == 5:
                os.kill(os.getpid(), 9)
        FeatureBank.build(TinyBackbone(), make_tiny_images(), memory=0, folder=sys.argv[1], progress=stop)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path), str(Path(__file__).parent)]
    assert subprocess.run(command, check=False).returncode == -9
    assert list(tmp_path.iterdir()) == []


def test_building_and_reading_on_disk_needs_ram_for_a_few_images_only(tmp_path: Path) -> None:
    # 128 MiB of features and 96 MiB of images, made one by one; a bank that gathers them would need it all.
    code = """
        import resource, sys, torch
        from torch import nn
        from adflow.backbones import Backbone
        from adflow.features import FeatureBank
        class Widen(nn.Module):
            def forward(self, x):
                return [x.mean(1, keepdim=True).repeat(1, 16, 1, 1)[:, :, ::2, ::2]]
        class Stream:
            def __init__(self, count):
                self.count = count
            def __len__(self):
                return self.count
            def batches(self, size):
                for start in range(0, self.count, size):
                    yield torch.full((min(size, self.count - start), 3, 128, 128), start / self.count)
        backbone = Backbone("widen", ("x",), [16], [2], "0" * 64, Widen())
        FeatureBank.build(backbone, Stream(8), memory=0, folder=sys.argv[1]).close()  # loads what is loaded once
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with FeatureBank.build(backbone, Stream(512), memory=0, folder=sys.argv[1]) as bank:
            assert len(bank) == 512
            assert sum(float(levels[0].sum()) for levels in bank.batches(16)) > 0
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
    """
    pytest.importorskip("resource", reason="needs Unix's resource module")
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    # Two batches of 16 rows of 256 KiB, as stored and as read, plus the allocator's slack.
    assert grown < 48, f"{grown} MiB"


def test_no_room_on_disk_is_said_before_anything_is_written(
    tiny_backbone: Backbone, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(features.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ResourceError, match=r"more than the 1000 B free in .* limit for RAM is 0 B"):
        FeatureBank.build(tiny_backbone, source, memory=0, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_up_is_one_clear_error(
    tiny_backbone: Backbone, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adflow import _rows

    with Path("/dev/full").open("r+b", buffering=0) as full:
        monkeypatch.setattr(_rows.tempfile, "TemporaryFile", lambda **options: full)
        with pytest.raises(ResourceError, match="the disk is full"):
            FeatureBank.build(tiny_backbone, source, memory=0, folder=tmp_path)


def test_a_folder_that_cannot_be_made_is_one_clear_error(
    tiny_backbone: Backbone, source: Source, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        FeatureBank.build(tiny_backbone, source, memory=0, folder=tmp_path / "file" / "below")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_single_number_that_is_not_finite_is_seen(bad: float) -> None:
    level = torch.zeros(1, 2, 3, 3)
    assert torch.equal(finite(level, torch.float32, 7), level)
    level[0, 1, 2, 2] = bad
    with pytest.raises(InputError, match="features of image 7 are not finite"):
        finite(level, torch.float32, 7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("memory", [1 << 30, 0])
def test_features_that_are_not_finite_name_the_image(
    tiny_backbone: Backbone, source: Source, tmp_path: Path, bad: float, memory: int
) -> None:
    source.images[4, 1, 5, 5] = bad
    with pytest.raises(InputError, match="features of image 4 are not finite"):
        FeatureBank.build(tiny_backbone, source, memory=memory, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_features_too_large_for_float16_say_what_to_do(tiny_backbone: Backbone, source: Source) -> None:
    source.images[3] *= 1e7
    with pytest.raises(InputError, match=r"image 3 reach .* too large for torch\.float16") as caught:
        FeatureBank.build(tiny_backbone, source, dtype="float16")
    assert "bfloat16" in str(caught.value.hint)
    FeatureBank.build(tiny_backbone, source, dtype="bfloat16").close()


def test_wrong_requests_are_refused(tiny_backbone: Backbone, source: Source) -> None:
    with pytest.raises(InputError, match="no image"):
        FeatureBank.build(tiny_backbone, Source(torch.empty(0, 3, 8, 8)))
    with pytest.raises(UsageError, match="'float8'"):
        FeatureBank.build(tiny_backbone, source, dtype="float8")
    with pytest.raises(UsageError, match="views is 3"):
        FeatureBank.build(tiny_backbone, source, views=3)
    with pytest.raises(UsageError, match="views is 0"):
        FeatureBank.build(tiny_backbone, source, views=0)
    with pytest.raises(UsageError, match="needs a generator"):
        FeatureBank.build(tiny_backbone, source, augment=lambda image, g: image)


def test_only_images_that_can_be_divided_are_spread(tiny_backbone: Backbone, source: Source) -> None:
    class Divided(Source):
        skipped: ClassVar[list[Any]] = []

        def each(self, work: Callable[[Tensor], Any], workers: int) -> Iterator[Any]:
            return map(work, self.images.split(1))

        def part(self, start: int, stop: int) -> Source:
            return Source(self.images[start:stop])

        def leave_out(self, skipped: object) -> None:
            pass

    elsewhere = FeatureBank.build(tiny_backbone, source)
    resources = Resources(spread=lambda backbone, images, dtype, progress: elsewhere)
    divided = Divided(source.images)
    assert resources.build(tiny_backbone, divided) is elsewhere
    views = {"views": 2, "augment": lambda image, _: image, "generator": torch.Generator().manual_seed(0)}
    for images, how in ((source, {}), (divided, views)):
        with resources.build(tiny_backbone, images, **how) as here:  # type: ignore[arg-type]
            assert here is not elsewhere and here.views == (2 if how else 1)
            assert torch.equal(here.level(0)[:: here.views], elsewhere.level(0))


def test_images_of_different_sizes_are_refused(tiny_backbone: Backbone) -> None:
    class Mixed(Source):
        def batches(self, batch_size: int) -> Iterator[Tensor]:
            yield self.images
            yield noise(1, 3, 64, 64)

    with pytest.raises(InputError, match="image 7 is 64x64, the ones before 48x64"):
        FeatureBank.build(tiny_backbone, Mixed(noise(7, 3, 48, 64), 8))


@pytest.mark.parametrize("memory", [1 << 30, 0])
def test_fewer_images_than_announced_give_a_shorter_bank(tiny_backbone: Backbone, tmp_path: Path, memory: int) -> None:
    with FeatureBank.build(tiny_backbone, Source(noise(3, 3, 48, 64), 5), memory=memory, folder=tmp_path) as bank:
        assert len(bank) == len(bank.level(0)) == 3
        assert sum(len(levels[0]) for levels in bank.batches(2)) == 3


def test_augmented_views_are_seeded_and_independent_of_threads(tiny_backbone: Backbone, source: Source) -> None:
    def augment(image: Tensor, g: torch.Generator) -> Tensor:
        return (image + 0.1 * torch.randn(image.shape, generator=g)).clamp(0, 1)

    def build(seed: int, workers: int) -> FeatureBank:
        return FeatureBank.build(
            tiny_backbone, source, views=3, augment=augment, generator=generator(seed), workers=workers
        )

    one, same, other = build(0, 1), build(0, 3), build(1, 1)
    assert (len(one), one.views) == (21, 3)
    assert torch.equal(one.level(0), same.level(0))
    assert not torch.equal(one.level(0), other.level(0))
    plain = alone(tiny_backbone, source.images[2])[0]
    distances = [float((one.level(0)[row] - plain).abs().mean()) for row in range(21)]
    assert sorted(sorted(range(21), key=distances.__getitem__)[:3]) == [6, 7, 8]  # rows of image 2
    assert not torch.equal(one.level(0)[6], one.level(0)[7])


def test_every_image_passes_the_net_alone_with_one_thread(source: Source) -> None:
    # Other nets than the default one round differently with more threads or in a batch.
    seen: list[tuple[int, int]] = []

    class Watch(torch.nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            seen.append((len(x), torch.get_num_threads()))
            return [x]

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        FeatureBank.build(Backbone("watch", ("x",), [3], [1], "0" * 64, Watch()), source).close()
    finally:
        torch.set_num_threads(before)
    assert seen == [(1, 1)] * 7


def test_a_bad_view_names_its_image(tiny_backbone: Backbone, source: Source) -> None:
    source.images[4, 1, 5, 5] = float("nan")
    with pytest.raises(InputError, match="features of image 4 are not finite"):
        FeatureBank.build(tiny_backbone, source, views=2, augment=lambda image, g: image.clone(), generator=generator())


def test_progress_counts_every_row(tiny_backbone: Backbone, source: Source) -> None:
    seen: list[tuple[int, int, str]] = []
    FeatureBank.build(tiny_backbone, source, progress=lambda *args: seen.append(args)).close()
    assert seen == [(i, 7, "features") for i in range(1, 8)]


def test_a_failing_source_leaves_threads_and_settings_as_they_were(tiny_backbone: Backbone, tmp_path: Path) -> None:
    class Broken(Source):
        def batches(self, batch_size: int) -> Iterator[Tensor]:
            yield self.images
            raise KeyboardInterrupt

    before, threads = torch.get_num_threads(), threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        FeatureBank.build(tiny_backbone, Broken(noise(7, 3, 48, 64), 9), memory=0, folder=tmp_path)
    assert torch.get_num_threads() == before
    assert threading.active_count() == threads
    assert list(tmp_path.iterdir()) == []


def test_the_backbone_and_the_random_state_are_left_alone(tiny_backbone: Backbone, source: Source) -> None:
    weights = {key: value.clone() for key, value in tiny_backbone.state_dict().items()}
    state = torch.get_rng_state()
    FeatureBank.build(tiny_backbone, source).close()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, weights[key]) for key, value in tiny_backbone.state_dict().items())


def test_many_threads_may_read_at_once(tiny_backbone: Backbone, source: Source, tmp_path: Path) -> None:
    with FeatureBank.build(tiny_backbone, source, memory=0, folder=tmp_path) as bank:
        wanted = [bank.pyramid([i])[0] for i in range(7)]
        wrong: list[int] = []

        def read() -> None:
            wrong.extend(i for _ in range(50) for i in range(7) if not torch.equal(bank.pyramid([i])[0], wanted[i]))

        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_features_made_on_a_gpu_lie_in_ram(source: Source) -> None:
    with FeatureBank.build(TinyBackbone().cuda(), source) as bank:
        assert bank.level(0).device.type == "cpu"
        assert len(bank) == 7


def test_parts_are_consecutive_images_and_are_merged_in_order(
    tiny_backbone: Backbone, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Seen(list[torch.Tensor]):
        merge = list.extend

    monkeypatch.setattr(features, "PART", 2)
    with FeatureBank.build(tiny_backbone, source) as whole:
        bank = whole.subset([4, 0, 1, 3, 2])
        parts = list(bank.parts(lambda part: (part.first, len(part))))
        assert parts == [(0, 2), (2, 2), (4, 1)]
        seen = bank.merged(lambda part: Seen(part.level(1).split(1)))
        assert torch.equal(torch.cat(seen), bank.level(1))
