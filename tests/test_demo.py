"""The data set that is made on first use."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from adflow.data import demo, open_data
from adflow.errors import ResourceError, UnavailableError
from adflow.imaging import read_image, read_mask


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ADFLOW_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer images, where their number does not matter."""
    for name, count in (("TRAIN", 3), ("GOOD", 2), ("EACH", 1)):
        monkeypatch.setattr(demo, name, count)


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    parts = [path.relative_to(folder).as_posix().encode() + path.read_bytes() for path in files]
    return hashlib.sha256(b"".join(parts)).hexdigest()


@pytest.mark.parametrize("texture", demo.TEXTURES)
def test_counts_masks_and_sizes(texture: str, cache: Path) -> None:
    (one,) = open_data(f"demo/{texture}")
    assert (one.name, one.family, one.class_) == (f"demo/{texture}", "demo", texture)
    assert one.root == cache / "data/demo" / texture
    assert one.notes == []
    assert len(one.train) == demo.TRAIN
    kinds = Counter(sample.defect for sample in one.test)
    assert kinds == {None: demo.GOOD, **dict.fromkeys(demo.DEFECTS, demo.EACH)}
    assert len({sample.image.read_bytes() for sample in (*one.train, *one.test)}) == len(one.train) + len(one.test)
    for sample in one.test:
        image = read_image(sample.image)
        assert image.shape == (256, 256, 3)
        if sample.mask is None:
            assert sample.label == 0
            continue
        mask = read_mask(sample.mask)
        assert mask.shape == (256, 256)
        # Large enough to be seen, small enough to be a defect of the part and not another part.
        assert 100 <= mask.sum() <= 8000, sample.image
        assert ndimage.label(mask, np.ones((3, 3)))[1] <= 8, sample.image


def test_the_same_bytes_every_time(tmp_path: Path) -> None:
    demo.build("brick", tmp_path / "a")
    demo.build("brick", tmp_path / "b")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_masks_are_exactly_where_the_picture_changed() -> None:
    photos = {name: demo._photo(name) for name in demo.TEXTURES}
    for kind, make in demo._MAKERS.items():
        rng = np.random.default_rng(3)
        clean = demo._crop(photos["gravel"], rng)
        marred = make(clean, photos["brick"], rng)
        light = demo._Light(rng)
        picture, reference = light.expose(marred), light.expose(clean)
        mask = demo._mask(picture, reference)
        difference = np.abs(picture.astype(int) - reference)
        assert mask.any(), kind
        assert difference[~mask].max() < 4 * demo._VISIBLE, kind  # only lone specks are left out
        assert (difference[~mask] >= demo._VISIBLE).sum() < 30, kind
        assert (difference[mask] >= demo._VISIBLE).mean() > 0.6, kind  # the rest are gaps that were closed


def test_good_images_for_training_and_testing_are_drawn_alike(cache: Path) -> None:
    (one,) = open_data("demo/brick")
    means = {
        split: [float(read_image(s.image).mean()) for s in samples if not s.label]
        for split, samples in (("train", one.train), ("test", one.test))
    }
    # One distribution: the mean brightness of 20 test images lies within three standard errors of the training's.
    spread = np.std(means["train"]) / np.sqrt(len(means["test"]))
    assert abs(np.mean(means["train"]) - np.mean(means["test"])) < 3 * spread


@pytest.mark.usefixtures("small")
def test_demo_means_all_textures_and_is_made_once(cache: Path) -> None:
    found = open_data("demo")
    assert [one.name for one in found] == ["demo/brick", "demo/grass", "demo/gravel"]
    stamp = (cache / "data/demo/brick/recipe.txt").stat().st_mtime_ns
    assert open_data("demo/brick")[0].fingerprint() == found[0].fingerprint()
    assert (cache / "data/demo/brick/recipe.txt").stat().st_mtime_ns == stamp
    assert sorted(path.name for path in (cache / "data/demo").iterdir()) == ["brick", "grass", "gravel"]


@pytest.mark.usefixtures("small")
def test_an_older_recipe_and_a_half_copy_are_made_anew(cache: Path) -> None:
    folder = cache / "data/demo/brick"
    (folder / "train/good").mkdir(parents=True)
    Image.new("L", (9, 9)).save(folder / "train/good/old.png")
    (one,) = open_data("demo/brick")
    assert len(one.train) == demo.TRAIN
    assert not (folder / "train/good/old.png").exists()
    (folder / "recipe.txt").write_text("adflow demo, recipe 0\n")
    Image.new("L", (9, 9)).save(folder / "train/good/old.png")
    assert len(open_data("demo/brick")[0].train) == demo.TRAIN
    assert [path.name for path in folder.parent.iterdir()] == ["brick"]


def test_a_failure_leaves_nothing_behind(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fail(picture: np.ndarray, path: Path) -> None:
        calls.append(path)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")

    monkeypatch.setattr(demo, "_save", fail)
    with pytest.raises(ResourceError, match="the disk is full"):
        open_data("demo/brick")
    assert list((cache / "data/demo").iterdir()) == []


@pytest.mark.usefixtures("small")
def test_what_a_killed_process_left_is_removed_after_a_while(cache: Path) -> None:
    for name, age in ((".brick.aa.partial", 2 * demo._ABANDONED), (".brick.bb.partial", 0)):
        left = cache / "data/demo" / name
        left.mkdir(parents=True)
        if age:
            os.utime(left, (left.stat().st_mtime - age,) * 2)
    open_data("demo/brick")
    assert sorted(path.name for path in (cache / "data/demo").iterdir()) == [".brick.bb.partial", "brick"]


def _open(home: str) -> str:
    os.environ["ADFLOW_HOME"] = home
    return open_data("demo/brick")[0].fingerprint()


def test_two_processes_at_once(cache: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        first, second = pool.map(_open, [str(cache)] * 2, chunksize=1)
    assert first == second
    assert [path.name for path in (cache / "data/demo").iterdir()] == ["brick"]


def test_without_the_photographs_it_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match=r"does not carry brick\.png"):
        open_data("demo/brick")
