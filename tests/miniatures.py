"""Small faithful copies of the layouts of public data sets, quirks included, and of their archives.

Every image is a texture, with a bright defect where its class is bad, so that fitting and scoring have
something to find. Sizes are small; names, suffixes, colours, modes and folders are those of the originals.
"""

from __future__ import annotations

import io
import stat
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

Shape = tuple[int, int]  # (height, width)


def texture(generator: np.random.Generator, shape: Shape, bad: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Return an image [H, W, 3] uint8 and its mask [H, W] bool."""
    height, width = shape
    rows, columns = np.mgrid[:height, :width]
    phase = generator.uniform(0, 2 * np.pi, 2)
    base = 120 + 30 * np.sin(rows / 3 + phase[0]) + 30 * np.sin(columns / 4 + phase[1])
    image = base[..., None] + generator.normal(0, 4, (height, width, 3)) + np.array([0, 8, -8])
    mask = np.zeros(shape, bool)
    if bad:
        size = max(4, min(shape) // 5)
        top, left = generator.integers(size, height - 2 * size), generator.integers(size, width - 2 * size)
        mask[top : top + size, left : left + size] = True
        image[mask] = 250 - image[mask] / 4
    return image.clip(0, 255).astype(np.uint8), mask


def _save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def make_mvtec(
    folder: Path,
    classes: Iterable[str] = ("cable", "screw"),
    shape: Shape = (64, 64),
    train: int = 8,
    good: int = 3,
    bad: int = 3,
) -> Path:
    """Write MVTec AD: screw, grid and zipper are grey; one kind of defect is called ``combined``."""
    generator = np.random.default_rng(1)
    for class_ in classes:
        root = folder / class_

        def put(path: Path, image: np.ndarray, grey: bool = class_ in ("screw", "grid", "zipper")) -> None:
            _save(path, image[..., 0] if grey else image)

        for i in range(train):
            put(root / "train" / "good" / f"{i:03d}.png", texture(generator, shape)[0])
        for i in range(good):
            put(root / "test" / "good" / f"{i:03d}.png", texture(generator, shape)[0])
        for kind in ("combined", "scratch"):
            for i in range(bad):
                image, mask = texture(generator, shape, bad=True)
                put(root / "test" / kind / f"{i:03d}.png", image)
                _save(root / "ground_truth" / kind / f"{i:03d}_mask.png", mask.astype(np.uint8) * 255)
    (folder / "readme.txt").write_text("MVTec AD\n")
    (folder / "license.txt").write_text("CC BY-NC-SA 4.0\n")
    return folder


def make_btad(folder: Path, train: int = 8, good: int = 3, bad: int = 3) -> Path:
    """Write BTAD: 01 .bmp images, .png masks; 02 all .png; 03 all .bmp, not square, masks off 0 and 255."""
    generator = np.random.default_rng(2)
    for class_, (image_suffix, mask_suffix, shape) in {
        "01": (".bmp", ".png", (64, 64)),
        "02": (".png", ".png", (64, 64)),
        "03": (".bmp", ".bmp", (60, 80)),  # 800 x 600 in width x height
    }.items():
        root = folder / class_
        for split, label, count in (("train", "ok", train), ("test", "ok", good), ("test", "ko", bad)):
            for i in range(count):
                image, mask = texture(generator, shape, bad=label == "ko")
                # The originals mix suffixes even within one folder.
                suffix = ".png" if class_ == "01" and i % 3 == 2 else image_suffix
                _save(root / split / label / f"{i:04d}{suffix}", image)
                if label == "ko":
                    levels = mask.astype(np.uint8) * (230 if class_ == "03" else 255)
                    if class_ == "03":
                        levels[~mask] = 20  # anti-aliasing and palettes leave such values
                    _save(root / "ground_truth" / "ko" / f"{i:04d}{mask_suffix}", levels)
    return folder


def make_stc(
    folder: Path,
    scenes: Iterable[str] = ("01", "02"),
    frames: int = 6,
    shape: Shape = (48, 86),
    videos: bool = False,
    digits: int = 3,
) -> Path:
    """Write ShanghaiTech Campus: scene 13 has a training video and no truth.

    Args:
        folder: where.
        scenes: those with truth.
        frames: of every video.
        shape: of a frame; the originals have 480 x 856.
        videos: write training videos as .avi (needs PyAV) instead of decoded frames.
        digits: of a test frame's name.
    """
    generator = np.random.default_rng(3)
    for scene in (*scenes, "13"):
        for number in (1, 2):
            name = f"{scene}_{number:03d}"
            stack = [texture(generator, shape)[0] for _ in range(frames)]
            if videos:
                _write_avi(folder / "training" / "videos" / f"{name}.avi", stack)
            else:
                for i, frame in enumerate(stack):
                    _save(folder / "training" / "frames" / name / f"{i:08d}.jpg", frame)
    for scene in scenes:
        name = f"{scene}_0014"
        masks = []
        for i in range(frames):
            image, mask = texture(generator, shape, bad=i % 2 == 1)
            _save(folder / "testing" / "frames" / name / f"{i:0{digits}d}.jpg", image)
            masks.append(mask)
        for kind, array in (
            ("test_frame_mask", np.array([mask.any() for mask in masks], np.uint8)),
            ("test_pixel_mask", np.array(masks, np.uint8)),
        ):
            path = folder / "testing" / kind / f"{name}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, array)
    return folder


def _write_avi(path: Path, frames: list[np.ndarray]) -> None:
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=24)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuvj420p"
        for array in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def make_lgg(folder: Path, patients: int = 5, slices: int = 9, shape: Shape = (64, 64), nested: bool = True) -> Path:
    """Write LGG-MRI: slices 4 to 6 of a patient show a tumour, the first is nearly black; all of it twice."""
    generator = np.random.default_rng(4)
    for inner in ("kaggle_3m", *(["lgg-mri-segmentation/kaggle_3m"] if nested else [])):
        root = folder / inner
        for patient in range(patients):
            name = f"TCGA_CS_{4941 + patient}_19960909"
            for k in range(1, slices + 1):
                image, mask = texture(generator, shape, bad=4 <= k <= 6)
                image = np.zeros_like(image) if k == 1 else image
                _save(root / name / f"{name}_{k}.tif", image)
                _save(root / name / f"{name}_{k}_mask.tif", mask.astype(np.uint8) * 255)
        (root / "data.csv").write_text("Patient,RNASeqCluster\n")
        (root / "README.md").write_text("LGG Segmentation Dataset\n")
    return folder


def tar_of(folder: Path, suffix: str = "xz", wrap: str | None = None, read_only: bool = True) -> bytes:
    """Return a tar of ``folder``; modes are read-only for files and folders, as MVTec's are."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=f"w:{suffix}") as tar:

        def mode(info: tarfile.TarInfo) -> tarfile.TarInfo:
            if read_only:
                info.mode = 0o555 if info.isdir() else stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH
            return info

        for path in sorted(folder.iterdir()):
            tar.add(path, f"{wrap}/{path.name}" if wrap else path.name, filter=mode)
    return out.getvalue()


def zip_of(folder: Path, wrap: str | None = None) -> bytes:
    """Return a zip of ``folder``."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_file():
                archive.write(path, f"{wrap}/{name}" if wrap else name)
    return out.getvalue()
