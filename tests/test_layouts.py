"""The layouts of public data sets, on miniatures with the quirks of the originals."""

from __future__ import annotations

import json
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from miniatures import make_btad, make_lgg, make_mvtec, make_stc
from PIL import Image

from adflow.cli._inputs import gather
from adflow.data import Dataset, Images, btad, lgg_mri, mvtec, open_data, stc
from adflow.errors import InputError, UnavailableError
from adflow.imaging import read_image, read_mask

MAKERS: dict[str, tuple[Callable[..., Path], list[str]]] = {
    "mvtec": (make_mvtec, ["mvtec/cable", "mvtec/screw"]),
    "btad": (make_btad, ["btad/01", "btad/02", "btad/03"]),
    "stc": (make_stc, ["stc/01", "stc/02"]),
    "lgg-mri": (make_lgg, ["lgg-mri/brain"]),
}


@pytest.mark.parametrize("family", MAKERS)
def test_a_layout_is_recognised_by_its_folder_and_found_by_name(family: str, tmp_path: Path) -> None:
    make, names = MAKERS[family]
    make(tmp_path / family)
    by_name = open_data(family, root=tmp_path)
    by_path = open_data(tmp_path / family)
    assert [one.name for one in by_name] == [one.name for one in by_path] == names
    assert [len(one.train) for one in by_name] == [len(one.train) for one in by_path]
    assert open_data(names[-1], root=tmp_path)[0].fingerprint() == by_name[-1].fingerprint()


@pytest.mark.parametrize("family", MAKERS)
def test_every_sample_reads_and_its_mask_fits(family: str, tmp_path: Path) -> None:
    make, _ = MAKERS[family]
    for one in open_data(make(tmp_path / "test" / "goods" / family)):  # words that misled loaders by their path
        assert {sample.label for sample in one.train} == {0}
        assert {sample.label for sample in one.test} == {0, 1}
        assert not {s.image for s in one.train} & {s.image for s in one.test}
        for sample in (*one.train, *one.test):
            image = read_image(sample.image)
            assert image.ndim == 3 and image.shape[2] == 3
            assert (sample.mask is not None) == (sample.label == 1)
            if sample.mask is not None:
                mask = read_mask(sample.mask, sample.mask_index)
                assert mask.shape == image.shape[:2]
                assert 0 < mask.mean() < 0.5
                # The planted defect is brighter than the rest: image and mask belong together.
                assert image[mask].mean() > image[~mask].mean() + 40
        batch = next(Images(one.test, (32, 48), strict=True).batches(2))
        assert batch.shape == (2, 3, 32, 48)


def test_btad_keeps_its_quirks(tmp_path: Path) -> None:
    make_btad(tmp_path)
    first, second, third = (btad.read(tmp_path, class_) for class_ in ("01", "02", "03"))
    assert {s.image.suffix for s in first.train} == {".bmp", ".png"}
    assert {s.mask.suffix for s in first.test if s.mask} == {".png"}
    assert {s.mask.suffix for s in second.test if s.mask} == {".png"}
    assert {s.mask.suffix for s in third.test if s.mask} == {".bmp"}
    assert read_image(third.train[0].image).shape == (60, 80, 3)
    with Image.open(third.test[-1].mask or "") as mask:
        assert set(np.unique(np.asarray(mask))) == {20, 230}
    assert [s.defect for s in third.test] == [None] * 3 + ["ko"] * 3


def test_btad_says_which_mask_is_missing(tmp_path: Path) -> None:
    make_btad(tmp_path)
    (tmp_path / "03" / "ground_truth" / "ko" / "0001.bmp").unlink()
    with pytest.raises(InputError, match=r"0001\.bmp.* is defective and has no mask"):
        btad.read(tmp_path, "03")


def test_mvtec_reads_grey_classes_as_rgb_and_combined_as_a_defect(tmp_path: Path) -> None:
    make_mvtec(tmp_path)
    screw = mvtec.read(tmp_path, "screw")
    with Image.open(screw.train[0].image) as image:
        assert image.mode == "L"
    assert read_image(screw.train[0].image).shape[2] == 3
    assert {s.defect for s in screw.test} == {None, "combined", "scratch"}


@pytest.mark.parametrize("family", MAKERS)
def test_a_layout_is_fitted_and_evaluated_by_the_commands(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from adflow.cli import run

    make, names = MAKERS[family]
    make(tmp_path / family)
    where = ["--data-root", str(tmp_path), "--runs", str(tmp_path / "runs"), "--quiet"]
    # A row a class is printed, and the planted squares are found: they are far brighter than the texture.
    assert run(["fit", names[-1], "--method", "padim", "--size", "64", *where]) == 0
    capsys.readouterr()
    assert run(["evaluate", names[-1], "--json", *where]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["class"] for row in rows] == [names[-1].partition("/")[2]]
    assert rows[0]["pixel_auroc"] > 0.9


# ---- ShanghaiTech Campus


def test_scene_13_has_no_truth_and_is_no_class(tmp_path: Path) -> None:
    make_stc(tmp_path)
    assert stc.classes(tmp_path) == ["01", "02"]
    with pytest.raises(UnavailableError, match="stc/13"):
        open_data("stc/13", root=tmp_path)


@pytest.mark.parametrize("digits", [1, 3, 4])
def test_frames_are_in_the_order_of_their_numbers(tmp_path: Path, digits: int) -> None:
    make_stc(tmp_path, ["01"], frames=12, digits=digits)
    test = stc.read(tmp_path, "01").test
    assert [int(sample.image.stem) for sample in test] == list(range(12))
    assert all(sample.image.is_file() for sample in test)
    assert [sample.label for sample in test] == [0, 1] * 6
    assert [sample.mask_index for sample in test] == [None if i % 2 == 0 else i for i in range(12)]


def test_frames_are_a_sequence(tmp_path: Path) -> None:
    make_stc(tmp_path, ["01"])
    train = stc.read(tmp_path, "01").train
    every = list(train)
    assert len(every) == len(train) == 12
    assert [train[i] for i in range(-12, 0)] == every
    assert list(train[4:9]) == every[4:9] and list(train[::5][1:]) == every[5::5]
    for index in (12, -13):
        with pytest.raises(IndexError):
            train[index]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: (f / "testing/frames/01_0014/003.jpg").unlink(), "holds 5 frames, but .*01_0014.npy 6"),
        (lambda f: (f / "testing/test_pixel_mask/01_0014.npy").unlink(), "has no mask, expected"),
        (lambda f: np.save(f / "testing/test_frame_mask/01_0014.npy", np.zeros((6, 2))), "has shape"),
        (lambda f: (f / "testing/test_frame_mask/01_0014.npy").write_text("x"), "is not an array file"),
        (lambda f: (f / "testing/test_pixel_mask/01_0014.npy").write_bytes(b""), "is not an array file"),
        (lambda f: (f / "testing/frames/01_0014/last.jpg").touch(), "has no frame number"),
        (lambda f: (f / "testing/frames/01_0014/3.jpg").touch(), "two frames of one number"),
    ],
)
def test_frames_and_masks_must_agree(tmp_path: Path, change: Callable[[Path], object], says: str) -> None:
    make_stc(tmp_path)
    change(tmp_path)
    with pytest.raises(InputError, match=says):
        stc.read(tmp_path, "01")
    assert stc.read(tmp_path, "02").test


def test_many_frames_index_fast_and_small(tmp_path: Path) -> None:
    """A tenth of the 274,515 training frames; none of them is opened."""
    make_stc(tmp_path, ["01"], frames=2)
    for number in range(100, 133):
        folder = tmp_path / "training" / "frames" / f"01_{number:03d}"
        folder.mkdir()
        first = folder / "00000000.jpg"
        first.touch()
        for i in range(1, 832):
            (folder / f"{i:08d}.jpg").hardlink_to(first)
    tracemalloc.start()
    began = time.process_time()
    train = stc.read(tmp_path, "01").train
    took, (kept, _) = time.process_time() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(train) == 4 + 33 * 832
    assert train[-1].image.name == "00000831.jpg"
    assert took < 2.0  # 0.2 s here with tracing, which doubles it
    assert kept < 12 * len(train)  # bytes; 5 a frame are stored, a Sample would take 500


def test_videos_need_pyav_and_are_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stc, "find_spec", lambda name: None)
    make_stc(tmp_path)
    (tmp_path / "training" / "videos").mkdir()
    (tmp_path / "training" / "videos" / "01_099.avi").touch()
    with pytest.raises(UnavailableError, match=r"1 training videos of scene 01 .* 01_099\.avi") as caught:
        stc.read(tmp_path, "01")
    assert "adflow download stc/01" in (caught.value.hint or "")
    assert stc.read(tmp_path, "02").notes == ["training frames: made by another tool, stride and quality not recorded"]


def test_videos_are_decoded_as_a_stream(tmp_path: Path) -> None:
    pytest.importorskip("av", reason="PyAV (extra `video`) is not installed")
    make_stc(tmp_path, frames=7, videos=True)
    assert stc.decode(tmp_path, scenes=["01"], stride=3, quality=90) == 2
    assert stc.decode(tmp_path, scenes=["01"], stride=3, quality=90) == 0
    frames = tmp_path / "training" / "frames" / "01_001"
    assert sorted(p.name for p in frames.glob("*.jpg")) == ["00000000.jpg", "00000003.jpg", "00000006.jpg"]
    facts = json.loads((frames / stc.MARKER).read_text())
    assert facts == {"video": "01_001.avi", "frames": 3, "stride": 3, "quality": 90}
    assert stc.read(tmp_path, "01").notes == ["training frames: every 3. frame, JPEG quality 90"]
    assert stc.read(tmp_path, "02").notes == ["training frames: every frame, decoded when it is read"]
    assert stc.prepare(tmp_path) == ["2 training videos decoded, every frame, JPEG quality 80"]
    assert len(stc.read(tmp_path, "02").train) == 14
    assert not (tmp_path / "training" / "frames" / "13_001").exists()


def test_frames_of_videos_are_images_wherever_images_are(tmp_path: Path) -> None:
    """Read by threads and with a stride, in and out of order: frame 11 is frame 11."""
    pytest.importorskip("av", reason="PyAV (extra `video`) is not installed")
    make_stc(tmp_path, frames=40, videos=True)
    train = stc.read(tmp_path, "02").train
    video = tmp_path / "training" / "videos" / "02_001.avi"
    assert len(train) == 80 and train[11].image == video / "00000011" and not train[11].image.exists()
    stc.decode(tmp_path, scenes=["02"], quality=95)
    files = [read_image(tmp_path / "training" / "frames" / "02_001" / f"{i:08d}.jpg").astype(int) for i in range(40)]
    for source in (train[:40:7], [train[i] for i in (30, 11, 35, 0)]):
        for frame in Images(source, (48, 86), workers=3).frames():
            far = [np.abs(frame.array.transpose(1, 2, 0) * 255 - file).mean() for file in files]
            assert int(np.argmin(far)) == int(frame.path.name), frame.path
    with pytest.raises(InputError, match="it ends before"):
        read_image(video / "00000040")
    assert [s.image.name for s in gather([str(video)], None, stride=9)] == [f"{i:08d}" for i in range(0, 40, 9)]
    assert len(gather([str(video.parent)], None)) == 6 * 40  # a folder of videos: scenes 01, 02, 13, two each


def test_a_broken_video_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    pytest.importorskip("av", reason="PyAV (extra `video`) is not installed")
    make_stc(tmp_path, ["01"], videos=True)
    (tmp_path / "training" / "videos" / "01_002.avi").write_bytes(b"RIFF, but no video")
    with pytest.raises(InputError, match=r"01_002\.avi cannot be decoded"):
        stc.decode(tmp_path)
    assert [p.name for p in (tmp_path / "training" / "frames").iterdir()] == ["01_001"]


def test_frames_without_their_marker_never_stand_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("av", reason="PyAV (extra `video`) is not installed")
    make_stc(tmp_path, ["01"], videos=True)
    monkeypatch.setattr(stc, "MARKER", "x" * 300)  # longer than a name may be
    with pytest.raises(InputError, match="cannot write"):
        stc.decode(tmp_path)
    assert list((tmp_path / "training" / "frames").iterdir()) == []


def test_without_pyav_the_way_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_stc(tmp_path, ["01"])
    (tmp_path / "training" / "videos").mkdir()
    (tmp_path / "training" / "videos" / "01_099.avi").touch()
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UnavailableError, match="PyAV is not installed") as caught:
        stc.prepare(tmp_path)
    assert "adflow[video]" in (caught.value.hint or "")


# ---- LGG-MRI


def _patients(one: Dataset, split: str) -> set[str]:
    return {s.image.parent.name for s in (one.train if split == "train" else one.test)}


def test_lgg_is_divided_by_patient(tmp_path: Path) -> None:
    one = lgg_mri.read(make_lgg(tmp_path, patients=10))
    assert (len(_patients(one, "train")), len(_patients(one, "test"))) == (8, 2)
    assert not _patients(one, "train") & _patients(one, "test")
    assert any("our own split by patient (seed 0): 8 to fit on, 2 to test on" in note for note in one.notes)
    assert any(note.startswith("90 slices: ") for note in one.notes)


def test_lgg_split_is_seeded(tmp_path: Path) -> None:
    make_lgg(tmp_path, patients=10, nested=False)
    splits = [_patients(lgg_mri.read(tmp_path, seed=seed), "test") for seed in (0, 0, 1, 2)]
    assert splits[0] == splits[1]
    assert len({frozenset(split) for split in splits}) > 1


def test_lgg_ignores_its_nested_copy(tmp_path: Path) -> None:
    once = lgg_mri.read(make_lgg(tmp_path / "a", nested=False))
    twice = lgg_mri.read(make_lgg(tmp_path / "b"))
    assert (len(once.train), len(once.test)) == (len(twice.train), len(twice.test))
    assert not any("lgg-mri-segmentation" in str(s.image) for s in (*twice.train, *twice.test))


@pytest.mark.parametrize(("margin", "numbers"), [(0, {2, 3, 7, 8, 9}), (2, {2, 8, 9}), (3, {9}), (1, {2, 3, 7, 8, 9})])
def test_lgg_keeps_its_distance_from_tumours(tmp_path: Path, margin: int, numbers: set[int]) -> None:
    """Slices 4 to 6 show a tumour and slice 1 is black: the ends of the head hold no brain."""
    one = lgg_mri.read(make_lgg(tmp_path, nested=False), margin=margin)
    assert {int(s.image.stem.rsplit("_", 1)[1]) for s in one.train} == numbers
    tested = {(int(s.image.stem.rsplit("_", 1)[1]), s.label) for s in one.test}
    assert tested == {(2, 0), (3, 0), (4, 1), (5, 1), (6, 1), (7, 0), (8, 0), (9, 0)}


@pytest.mark.parametrize(
    ("name", "says"), [("_3_mask.tif", "slice without a mask"), ("_3.tif", "mask without a slice")]
)
def test_lgg_names_a_lone_file(tmp_path: Path, name: str, says: str) -> None:
    make_lgg(tmp_path, nested=False)
    next((tmp_path / "kaggle_3m").glob(f"*4943*/*{name}")).unlink()
    with pytest.raises(InputError, match=f"TCGA_CS_4943.* is a {says}"):
        lgg_mri.read(tmp_path)
