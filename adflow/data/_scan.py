"""Find images in folders, and the mask of each defective image: shared by the layouts."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from pathlib import Path

from adflow.errors import InputError
from adflow.imaging import IMAGE_SUFFIXES, show


def list_images(folder: Path | str, suffixes: Iterable[str] = IMAGE_SUFFIXES) -> list[Path]:
    """Return every image below ``folder``, sorted by its path relative to it.

    Hidden files and folders are left out. Links are followed, each folder is entered once: a link that
    leads back into its own parents ends there.

    Raises:
        InputError: the folder does not exist or may not be read.
    """
    folder, wanted = Path(folder), frozenset(suffixes)
    found: list[tuple[tuple[str, ...], Path]] = []
    waiting: list[tuple[tuple[str, ...], Path]] = [((), folder)]
    entered: set[tuple[int, int]] = set()
    while waiting:
        parts, here = waiting.pop()
        try:
            stat = here.stat()
            if (stat.st_dev, stat.st_ino) in entered:
                continue
            entered.add((stat.st_dev, stat.st_ino))
            # What is a folder stands in the listing: no question per file, which a network drive would answer slowly.
            with os.scandir(here) as listing:
                entries = [(entry.name, *_kind(entry)) for entry in listing]
        except OSError as error:
            raise InputError(f"cannot read the folder {show(here)}: {error.strerror or error}") from error
        for name, is_folder, is_file in entries:
            if name.startswith("."):
                continue
            if is_folder:
                waiting.append(((*parts, name), here / name))
            elif is_file and Path(name).suffix.lower() in wanted:
                found.append(((*parts, name), here / name))
    return [path for _, path in sorted(found)]


def _kind(entry: os.DirEntry[str]) -> tuple[bool, bool]:
    """Return whether an entry is a folder, and whether a file; neither where a link leads nowhere or to itself."""
    try:
        return entry.is_dir(), entry.is_file()
    except OSError:
        return False, False


def folders_in(folder: Path) -> list[str]:
    """Return the names of the visible folders in ``folder``, sorted; empty where it cannot be read."""
    try:
        with os.scandir(folder) as listing:
            return sorted(entry.name for entry in listing if not entry.name.startswith(".") and _kind(entry)[0])
    except OSError:
        return []


def class_folders(folder: Path, inside: str) -> list[str]:
    """Return the classes in ``folder``, sorted: the folders that have a folder ``inside``, or itself where it has."""
    if (folder / inside).is_dir():
        return [folder.name]
    return [name for name in folders_in(folder) if (folder / name / inside).is_dir()]


def pair_masks(images: list[Path], image_root: Path, mask_root: Path) -> list[Path]:
    """Return the mask of every image, in the order of ``images``.

    The mask of ``image_root/a/b.png`` is ``mask_root/a/b`` or ``mask_root/a/b_mask`` with any image suffix.
    (BTAD's class 03 has .bmp masks for .bmp images, MVTec has ``_mask``, others neither.)

    Raises:
        InputError: an image without a mask, an image with two, or a mask without an image; the message
            names one.
    """
    if not mask_root.is_dir():
        if not images:
            return []
        raise InputError(
            f"{show(images[0])} is defective, but there is no folder {show(mask_root)} with its mask",
            hint="Add the masks, or remove the ground-truth folder altogether to do without pixel metrics.",
        )
    masks = list_images(mask_root)
    at: dict[Path, list[Path]] = {}
    for mask in masks:
        at.setdefault(mask.relative_to(mask_root).with_suffix(""), []).append(mask)
    paired: list[Path] = []
    for image in images:
        key = image.relative_to(image_root).with_suffix("")
        found = at.get(key, []) + at.get(key.with_name(f"{key.name}_mask"), [])
        if len(found) != 1:
            what = "no mask" if not found else "more than one mask: " + ", ".join(show(m.name) for m in found)
            raise InputError(
                f"{show(image)} is defective and has {what}; "
                f"expected one {show(key.name)}_mask.png (or .bmp, .tif, without _mask) in {show(mask_root)}",
                hint="Add the mask, or remove the image.",
            )
        paired.append(found[0])
    left = sorted(set(masks) - set(paired))
    if left:
        others = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
        raise InputError(
            f"mask {show(left[0])}{others} belongs to no image in {show(image_root)}",
            hint="Add the image, or remove the mask.",
        )
    return paired


def no_stray_masks(mask_root: Path, image_root: Path, kinds: Collection[str]) -> None:
    """Check that only kinds of defects that there are have masks.

    Raises:
        InputError: another has; names its folder.
    """
    for stray in folders_in(mask_root):
        if stray not in kinds and list_images(mask_root / stray):
            raise InputError(
                f"there are masks in {show(mask_root / stray)}, but no folder {show(image_root / stray)}",
                hint="Add the images, or remove the masks.",
            )
