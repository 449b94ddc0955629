"""Data sets by name and by folder, and batches of them."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from adflow import data
from adflow.data import Images, Sample, list_images, open_data
from adflow.data._scan import pair_masks
from adflow.errors import InputError, UnavailableError, UsageError


def picture(path: Path, value: int = 90, size: tuple[int, int] = (12, 10)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).save(path)
    return path


def make_class(root: Path, *, masks: bool = True) -> Path:
    """A class in MVTec layout: 3 training images, 2 good and 2 + 1 defective test images."""
    for name in ("train/good/000", "train/good/001", "train/good/002", "test/good/000", "test/good/001"):
        picture(root / f"{name}.png")
    for name in ("scratch/000", "scratch/001", "dent/000"):
        picture(root / "test" / f"{name}.png")
        if masks:
            picture(root / "ground_truth" / f"{name}_mask.png", 255)
    return root


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADFLOW_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("ADFLOW_DATA", raising=False)


# MVTec layout


def test_mvtec_layout_gives_labels_defects_and_masks_in_order(tmp_path: Path) -> None:
    root = make_class(tmp_path / "screw")
    (one,) = open_data(root)
    assert (one.name, one.family, one.class_, one.root) == ("screw", "folder", "screw", root)
    assert [sample.image.name for sample in one.train] == ["000.png", "001.png", "002.png"]
    assert {(sample.split, sample.label, sample.defect, sample.mask) for sample in one.train} == {
        ("train", 0, None, None)
    }
    found = [(s.label, s.defect, s.image.name, s.mask and s.mask.name) for s in one.test]
    assert found == [
        (0, None, "000.png", None),
        (0, None, "001.png", None),
        (1, "dent", "000.png", "000_mask.png"),
        (1, "scratch", "000.png", "000_mask.png"),
        (1, "scratch", "001.png", "001_mask.png"),
    ]
    assert [s.mask.parent.name for s in one.test if s.mask] == ["dent", "scratch", "scratch"]
    assert one.notes == []


def test_labels_come_from_the_structure_not_from_words_in_the_path(tmp_path: Path) -> None:
    root = make_class(tmp_path / "goods" / "test" / "train" / "bad" / "ground_truth" / "class")
    (one,) = open_data(root)
    assert [sample.label for sample in one.test] == [0, 0, 1, 1, 1]
    assert len(one.train) == 3


def test_a_folder_of_classes_gives_each(tmp_path: Path) -> None:
    make_class(tmp_path / "mine" / "b")
    make_class(tmp_path / "mine" / "a")
    picture(tmp_path / "mine" / "readme" / "x.png")
    found = open_data(tmp_path / "mine")
    assert [one.name for one in found] == ["mine/a", "mine/b"]
    assert [one.class_ for one in found] == ["a", "b"]
    assert open_data(str(tmp_path / "mine/") + "/")[0].name == "mine/a"


def test_the_official_classes_have_their_name_only_inside_a_folder_called_mvtec(tmp_path: Path) -> None:
    make_class(tmp_path / "mvtec_ad" / "screw")
    make_class(tmp_path / "mvtec_ad" / "mine")
    assert [(one.name, one.family) for one in open_data(tmp_path / "mvtec_ad")] == [
        ("mvtec_ad/mine", "folder"),
        ("mvtec/screw", "mvtec"),
    ]


@pytest.mark.parametrize("mask", ["000_mask.png", "000.png", "000.bmp", "000_mask.tif", "000.JPG"])
def test_masks_are_found_by_stem(tmp_path: Path, mask: str) -> None:
    root = tmp_path / "a"
    picture(root / "train/good/000.png")
    picture(root / "test/hole/000.bmp")
    picture(root / "ground_truth/hole" / mask)
    assert [s.mask and s.mask.name for s in open_data(root)[0].test] == [mask]


def test_a_defective_image_without_mask_is_named(tmp_path: Path) -> None:
    root = make_class(tmp_path / "a")
    (root / "ground_truth/scratch/001_mask.png").unlink()
    with pytest.raises(InputError, match=r"test/scratch/001\.png is defective and has no mask; expected one 001_mask"):
        open_data(root)


def test_a_mask_without_image_is_named(tmp_path: Path) -> None:
    root = make_class(tmp_path / "a")
    picture(root / "ground_truth/scratch/007_mask.png")
    with pytest.raises(InputError, match=r"mask .*007_mask\.png belongs to no image in .*scratch"):
        open_data(root)
    (root / "ground_truth/scratch/007_mask.png").rename(root / "ground_truth/scratch/001.png")
    with pytest.raises(InputError, match=r"001\.png is defective and has more than one mask: 001\.png, 001_mask\.png"):
        open_data(root)


def test_masks_of_an_unknown_kind_and_a_kind_without_masks(tmp_path: Path) -> None:
    root = make_class(tmp_path / "a")
    picture(root / "ground_truth/crack/000_mask.png")
    with pytest.raises(InputError, match=r"there are masks in .*crack, but no folder .*test/crack"):
        open_data(root)
    picture(root / "test/crack/000.png")
    open_data(root)
    (root / "ground_truth/crack/000_mask.png").unlink()
    (root / "ground_truth/crack").rmdir()
    with pytest.raises(InputError, match=r"crack/000\.png is defective, but there is no folder .*ground_truth/crack"):
        open_data(root)


def test_without_ground_truth_or_test_images_there_is_a_note(tmp_path: Path) -> None:
    (one,) = open_data(make_class(tmp_path / "a", masks=False))
    assert all(sample.mask is None for sample in one.test)
    assert one.notes == ["no ground_truth folder: pixel metrics are not available"]
    picture(tmp_path / "b/train/good/0.png")
    picture(tmp_path / "b/train/odd/0.png")
    (one,) = open_data(tmp_path / "b")
    assert one.test == []
    assert one.notes == [
        "left out of training: train/odd",
        "no test images: it can be fitted on, not evaluated on",
    ]


def test_masks_of_good_images_do_no_harm(tmp_path: Path) -> None:
    root = make_class(tmp_path / "a")
    picture(root / "ground_truth/good/000_mask.png", 0)
    assert [sample.mask for sample in open_data(root)[0].test[:2]] == [None, None]


# Own folders


def test_any_nesting_of_images_is_good(tmp_path: Path) -> None:
    root = tmp_path / "parts"
    for name in (
        "z.png",
        "a/b/c/1.jpg",
        "a/b/2.JPEG",
        "a/10.webp",
        "2.tif",
        ".hidden.png",
        ".git/x.png",
        "notes.txt",
    ):
        if name.endswith(".txt"):
            (root / name).write_text("x")
        else:
            picture(root / name)
    (one,) = open_data(root)
    names = [sample.image.relative_to(root).as_posix() for sample in one.train]
    assert names == ["2.tif", "a/10.webp", "a/b/2.JPEG", "a/b/c/1.jpg", "z.png"]
    assert (one.name, one.class_, one.family, list(one.test), one.notes) == (
        "parts",
        "parts",
        "folder",
        [],
        [],
    )


def make_parts(root: Path, good: int = 10) -> Path:
    for i in range(good):
        picture(root / f"good/{i:02d}.png")
    picture(root / "bad/0.png")
    picture(root / "bad/1.png")
    return root


def test_good_and_bad_folders(tmp_path: Path) -> None:
    root = make_parts(tmp_path / "parts")
    (one,) = open_data(root)
    assert [s.image.name for s in one.train] == [f"{i:02d}.png" for i in range(8)]
    assert [(s.label, s.defect, s.image.name) for s in one.test] == [
        (0, None, "08.png"),
        (0, None, "09.png"),
        (1, "bad", "0.png"),
        (1, "bad", "1.png"),
    ]
    assert all(s.split == "test" for s in one.test)
    assert one.notes == [
        "no masks: pixel metrics are not available",
        "the last 2 of 10 good images are kept for testing",
    ]


@pytest.mark.parametrize("flat", [True, False])
def test_masks_of_own_folders_flat_or_by_kind(tmp_path: Path, flat: bool) -> None:
    root = make_parts(tmp_path / "parts")
    inner = "masks" if flat else "masks/bad"
    picture(root / inner / "0_mask.png")
    with pytest.raises(InputError, match=r"bad/1\.png is defective and has no mask"):
        open_data(root)
    picture(root / inner / "1.bmp")
    (one,) = open_data(root)
    assert [s.mask and s.mask.name for s in one.test] == [None, None, "0_mask.png", "1.bmp"]
    picture(root / inner / "2.bmp")
    with pytest.raises(InputError, match=r"2\.bmp belongs to no image"):
        open_data(root)


def test_several_kinds_of_defects_under_any_name(tmp_path: Path) -> None:
    root = make_parts(tmp_path / "parts", good=3)
    picture(root / "Kratzer tief/0.png")
    (one,) = open_data(root)
    assert [s.defect for s in one.test] == ["Kratzer tief", "bad", "bad"]
    assert len(one.train) == 3  # too few to spare one for testing
    picture(root / "masks/other/0.png")
    picture(root / "masks/bad/0.png")
    picture(root / "masks/bad/1.png")
    with pytest.raises(InputError, match=r"no folder .*masks/Kratzer tief"):
        open_data(root)
    picture(root / "masks/Kratzer tief/0.png")
    with pytest.raises(InputError, match=r"masks in .*other, but no folder"):
        open_data(root)


def test_train_and_test_folders_without_good(tmp_path: Path) -> None:
    root = tmp_path / "a"
    picture(root / "train/2024/0.png")
    picture(root / "test/OK/1.png")
    picture(root / "test/ko/2.png")
    picture(root / "test/loose.png")
    (one,) = open_data(root)
    assert [s.image.name for s in one.train] == ["0.png"]
    assert [(s.label, s.image.name) for s in one.test] == [(0, "1.png"), (1, "2.png")]
    assert any("1 images directly in" in note for note in one.notes)


def test_train_and_test_folders_in_any_case(tmp_path: Path) -> None:
    root = tmp_path / "a"
    for name in ("Train/0.png", "Test/Good/1.png", "Test/Dent/2.png", "Masks/Dent/2.png"):
        picture(root / name)
    (one,) = open_data(root)
    assert [s.image.name for s in one.train] == ["0.png"]
    assert [(s.label, s.image.name, s.mask is not None) for s in one.test] == [(0, "1.png", False), (1, "2.png", True)]


def test_a_folder_of_own_classes(tmp_path: Path) -> None:
    make_parts(tmp_path / "line" / "nut")
    make_parts(tmp_path / "line" / "bolt")
    make_parts(tmp_path / "line" / "line")
    assert [one.name for one in open_data(tmp_path / "line")] == ["line/bolt", "line/line", "line/nut"]
    assert {len(one.train) for one in open_data(tmp_path / "line")} == {8}


@pytest.mark.parametrize("inner", ["bad", "2024/NG", "masks", "a/b/defects/c"])
def test_defects_are_never_taken_for_good(tmp_path: Path, inner: str) -> None:
    picture(tmp_path / "parts/0.png")
    picture(tmp_path / "parts" / inner / "1.png")
    with pytest.raises(InputError, match=r"1\.png lies in a folder named .* has no folder 'good'"):
        open_data(tmp_path / "parts")


def test_bad_folders_give_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"there is no image in .*empty"):
        open_data(tmp_path / "empty")
    (tmp_path / "hollow/train/good").mkdir(parents=True)
    with pytest.raises(InputError, match=r"there is no image in .*hollow/train/good"):
        open_data(tmp_path / "hollow")
    (tmp_path / "bare/good").mkdir(parents=True)
    with pytest.raises(InputError, match=r"there is no good image in .*bare"):
        open_data(tmp_path / "bare")
    with pytest.raises(InputError, match=r"there is no folder .*nowhere"):
        open_data(tmp_path / "nowhere")
    with pytest.raises(InputError, match="is a file, expected a folder"):
        open_data(picture(tmp_path / "single.png"))


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_a_folder_that_may_not_be_read(tmp_path: Path) -> None:
    picture(tmp_path / "closed/a.png")
    (tmp_path / "closed").chmod(0)
    try:
        with pytest.raises(InputError, match=r"cannot read the folder .*closed"):
            open_data(tmp_path / "closed")
    finally:
        (tmp_path / "closed").chmod(0o755)


def test_links_that_loop_end_and_count_once(tmp_path: Path) -> None:
    root = tmp_path / "parts"
    picture(root / "a/0.png")
    picture(tmp_path / "elsewhere/1.png")
    (root / "a/again").symlink_to(root, target_is_directory=True)
    (root / "b").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (root / "dangling.png").symlink_to(tmp_path / "gone.png")
    (root / "self").symlink_to(root / "self")
    assert [path.relative_to(root).as_posix() for path in list_images(root)] == ["a/0.png", "b/1.png"]


def test_a_link_that_cannot_be_followed_hides_no_other_folder(tmp_path: Path) -> None:
    root = make_parts(tmp_path / "parts")
    (root / "link").symlink_to("x" * 300)  # longer than a name may be
    assert [s.defect for s in open_data(root)[0].test] == [None, None, "bad", "bad"]


@pytest.mark.parametrize("name", ["with space", "quo'te\"s", "new\nline", "ünïcødé 图像", "100%", "a;b&c", "-dash"])
def test_odd_names(tmp_path: Path, name: str) -> None:
    root = make_class(tmp_path / name / name)
    picture(root / f"train/good/{name}.png")
    (one,) = open_data(root)
    assert one.class_ == name
    assert len(one.train) == 4
    assert sum(len(batch) for batch in Images(one.train, (8, 8)).batches(3)) == 4
    (root / "ground_truth/dent/000_mask.png").unlink()
    with pytest.raises(InputError) as caught:
        open_data(root)
    assert "\n" not in str(caught.value)


def test_names_that_are_not_text(tmp_path: Path) -> None:
    odd = os.fsdecode(b"\xff\xfe.png")
    try:
        picture(tmp_path / "a.png").rename(tmp_path / odd)
    except OSError:
        pytest.skip("this file system takes text names only")
    (one,) = open_data(tmp_path)
    assert len(one.fingerprint()) == 64
    assert len(next(Images(one.train, (8, 8)).batches(1))) == 1


def test_pairing_follows_folders_within_a_kind(tmp_path: Path) -> None:
    images = [picture(tmp_path / "i" / name) for name in ("a/0.png", "b/0.png")]
    masks = [picture(tmp_path / "m" / name) for name in ("a/0_mask.png", "b/0_mask.png")]
    assert pair_masks(images, tmp_path / "i", tmp_path / "m") == masks


# Names


def test_names_are_looked_up_in_the_root_then_the_environment_then_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_class(tmp_path / "cache/data/mvtec/cable")
    (one,) = open_data("mvtec/cable")
    assert (one.name, one.family, one.class_) == ("mvtec/cable", "mvtec", "cable")
    assert one.root == tmp_path / "cache/data/mvtec/cable"
    make_class(tmp_path / "env/mvtec_anomaly_detection/cable")
    monkeypatch.setenv("ADFLOW_DATA", str(tmp_path / "env"))
    assert open_data("mvtec/cable")[0].root == tmp_path / "env/mvtec_anomaly_detection/cable"
    make_class(tmp_path / "root/mvtec/cable")
    assert open_data("mvtec/cable", root=tmp_path / "root")[0].root == tmp_path / "root/mvtec/cable"
    # The root may also be the folder of classes itself.
    assert open_data("mvtec/cable", root=tmp_path / "root/mvtec")[0].root == tmp_path / "root/mvtec/cable"
    # What is not in the root is looked for further on.
    make_class(tmp_path / "cache/data/mvtec/screw")
    assert open_data("mvtec/screw", root=tmp_path / "root")[0].root == tmp_path / "cache/data/mvtec/screw"


def test_a_family_means_every_class_that_is_present(tmp_path: Path) -> None:
    for class_ in ("screw", "cable"):
        make_class(tmp_path / "cache/data/mvtec" / class_)
    assert [one.name for one in open_data("mvtec")] == ["mvtec/cable", "mvtec/screw"]


def test_a_path_that_exists_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_class(tmp_path / "cache/data/mvtec/cable")
    make_class(tmp_path / "here/mvtec/cable")
    monkeypatch.chdir(tmp_path / "here")
    assert open_data("mvtec/cable")[0].root == tmp_path / "here/mvtec/cable"
    monkeypatch.chdir(tmp_path / "here/mvtec/cable")
    (one,) = open_data(".")
    assert one.name == "mvtec/cable"
    monkeypatch.chdir(tmp_path / "here/mvtec/cable/train")
    assert open_data("..")[0].name == "mvtec/cable"


def test_known_but_absent_data_names_the_command_that_gets_it(tmp_path: Path) -> None:
    for spec in ("mvtec/cable", "mvtec"):
        with pytest.raises(UnavailableError, match=f"data set {spec} is not here; looked in .*cache") as caught:
            open_data(spec)
        assert f"adflow download {spec}" in (caught.value.hint or "")


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown data set 'mvtek'; did you mean 'mvtec'"):
        open_data("mvtek")
    with pytest.raises(UsageError, match="unknown data set ''"):
        open_data("")
    for spec in ("./mvtek", "foo/bar", "some/deep/path", "x.zip", "mvtec/a/b"):
        with pytest.raises(InputError, match="there is no folder"):
            open_data(spec)
    with pytest.raises(InputError, match="there is no folder"):
        open_data(tmp_path / "mvtec")
    with pytest.raises(UsageError, match="unknown demo texture 'brik'; did you mean 'brick'"):
        open_data("demo/brik")


def test_a_user_who_is_not_there_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="cannot use ~nobody-of-that-name/parts: no home folder"):
        open_data("~nobody-of-that-name/parts")
    monkeypatch.setenv("ADFLOW_HOME", "~nobody-of-that-name")
    with pytest.raises(InputError, match="cannot use ~nobody-of-that-name: no home folder"):
        open_data("mvtec")


def test_every_layout_module_offers_the_three_functions() -> None:
    for name in data._layout_names():
        layout = data._layout(name)
        assert callable(layout.matches), name
        assert callable(layout.classes), name
        assert callable(layout.read), name
    assert data._layout_names()[-1] == "folder"
    assert "mvtec" in data.families()
    assert "demo" in data.families()


def test_only_one_layout_claims_the_mvtec_structure(tmp_path: Path) -> None:
    root = make_class(tmp_path / "mvtec/screw")
    for folder in (root, root.parent):
        claims = [name for name in data._layout_names() if data._layout(name).matches(folder)]
        assert claims == ["mvtec", "folder"]


# Fingerprint


def test_the_fingerprint_tells_files_apart_and_moves_with_the_folder(tmp_path: Path) -> None:
    root = make_class(tmp_path / "a")
    before = open_data(root)[0].fingerprint()
    assert before == open_data(root)[0].fingerprint()
    root.rename(tmp_path / "b")
    root = tmp_path / "b"
    assert open_data(root)[0].fingerprint() == before
    picture(root / "ground_truth/dent/000_mask.png", 255, (120, 100))
    changed = open_data(root)[0].fingerprint()
    assert changed != before
    (root / "train/good/002.png").rename(root / "train/good/003.png")
    assert open_data(root)[0].fingerprint() != changed


# Images


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [picture(tmp_path / f"{i:02d}.png", 10 * i, (12 + i, 10)) for i in range(11)]


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_batches_come_in_order_whatever_the_threads(files: list[Path], workers: int) -> None:
    images = Images(files, (16, 24), workers=workers)
    batches = list(images.batches(4))
    assert [tuple(batch.shape) for batch in batches] == [(4, 3, 16, 24), (4, 3, 16, 24), (3, 3, 16, 24)]
    assert {batch.dtype for batch in batches} == {torch.float32}
    values = torch.cat(batches)[:, 0, 8, 12] * 255
    # 10 i / 255 is rounded to float32 once and scaled back once
    torch.testing.assert_close(values, torch.arange(11) * 10.0, atol=1e-4, rtol=0)
    assert len(images) == 11
    assert images.size == (16, 24)
    again = list(images.batches(11))
    assert torch.equal(again[0], torch.cat(batches))


def test_batches_do_not_share_memory(files: list[Path]) -> None:
    first, second = list(Images(files[:2], (8, 8)).batches(1))
    first.zero_()
    assert second.max() > 0


def test_samples_and_letterbox(files: list[Path]) -> None:
    samples = [Sample(path, "test", None, None, None) for path in files[:2]]
    frames = list(Images(samples, (16, 16), keep_aspect=True).frames())
    assert [frame.path for frame in frames] == files[:2]
    assert [frame.index for frame in frames] == [0, 1]
    assert frames[0].original == (10, 12)
    assert (frames[0].box.top, frames[0].box.height, frames[0].box.width) == (1, 13, 16)


def test_a_corrupt_file_is_skipped_recorded_and_not_tried_again(files: list[Path]) -> None:
    files[3].write_bytes(b"")
    files[7].write_bytes(b"no picture")
    images = Images(files, (8, 8))
    assert len(images) == 11
    assert [len(batch) for batch in images.batches(4)] == [4, 4, 1]
    assert [path for path, _ in images.skipped] == [files[3], files[7]]
    assert images.skipped[0][1] == "is empty (0 bytes), expected an image"
    assert str(files[7]) not in images.skipped[1][1]
    assert len(images) == 9
    picture(files[3], 30)
    assert sum(len(batch) for batch in images.batches(4)) == 9  # the second pass sees what the first one saw
    assert len(images.skipped) == 2


def test_strict_raises_and_names_the_file(files: list[Path]) -> None:
    files[3].write_bytes(b"")
    images = Images(files, (8, 8), strict=True)
    with pytest.raises(InputError, match=r"03\.png is empty"):
        list(images.batches(4))


def test_when_nothing_can_be_read_it_says_so(files: list[Path]) -> None:
    for path in files:
        path.write_bytes(b"no picture")
    images = Images(files, (8, 8))
    for _ in range(2):
        with pytest.raises(InputError, match=r"none of 11 images could be read; the first, .*00\.png: "):
            list(images.batches(4))
    assert len(images.skipped) == 11


def test_no_images_and_silly_batches(files: list[Path]) -> None:
    assert list(Images([], (8, 8)).batches(4)) == []
    with pytest.raises(UsageError, match="batch size 0"):
        list(Images(files, (8, 8)).batches(0))


def test_work_on_each_image_is_done_where_it_is_decoded_and_comes_in_order(files: list[Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    images = Images([files[0], bad, *files[1:]], (8, 8))
    threads = set[str]()

    def work(image: torch.Tensor) -> torch.Tensor:
        threads.add(threading.current_thread().name)
        return image

    found = torch.cat(list(images.each(work, 2)))
    assert torch.equal(found, torch.cat(list(Images(files, (8, 8)).batches(4))))
    assert [path for path, _ in images.skipped] == [bad] and len(images) == len(files)
    assert all(name.startswith("adflow-images") for name in threads)
    with pytest.raises(InputError, match="bad"):
        list(Images([files[0], bad], (8, 8), strict=True).each(work, 2))
    with pytest.raises(ZeroDivisionError):
        list(images.each(lambda image: 1 // 0, 2))


def test_decoding_stays_a_bounded_way_ahead(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    lock = threading.Lock()
    images = Images(files * 20, (8, 8), workers=2)
    decode = images._decode

    def counted(index: int) -> object:
        with lock:
            started.append(index)
        return decode(index)

    monkeypatch.setattr(images, "_decode", counted)
    frames = images.frames()
    next(frames)
    # 2 threads: 5 images are under way when the first is handed out, none beyond.
    assert len(started) <= 5
    frames.close()
    assert len(started) <= 5
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("adflow-images")]


def test_a_batch_is_what_the_files_hold(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (batch,) = Images([tmp_path / "a.png"], (8, 8)).batches(1)
    assert torch.equal(batch[0], torch.from_numpy(pixels.transpose(2, 0, 1)).float() / 255)
