"""``demo/brick``, ``demo/grass``, ``demo/gravel``: made on first use, without any download.

scikit-image's wheel carries three photographs of textures (512 x 512, grey, public domain). Good images are
crops of them anywhere, under slightly varying light, zoom and noise. Good images for training and for testing are
drawn alike, as from one camera over one wall: that is what a promise about false alarms needs (crops of two
separate halves of a photograph are a shift: several times the promised number). Into some test crops
four kinds of defect are blended, with exact masks:

scratch
    a thin, nearly straight groove: dark core, bright edge, depth that comes and goes
stain
    an irregular blot that darkens or bleaches what lies under it, with a rim
patch
    a piece of another of the three textures, matched to the brightness and contrast around it
thread
    a long curled fibre that casts a soft shadow

The same recipe gives the same bytes every time. It is for trying things out and for tests, not for comparing
methods: the crops of one photograph are much alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import secrets
import shutil
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage

from adflow._files import make_folder, write_error
from adflow.data import Dataset, mvtec
from adflow.errors import UnavailableError, unknown
from adflow.imaging import read_image
from adflow.zoo import home

TEXTURES = ("brick", "grass", "gravel")
DEFECTS = ("patch", "scratch", "stain", "thread")
SIDE = 256
TRAIN, GOOD, EACH = 100, 20, 6  # images: training, good test, test per kind of defect
# To be raised with any change of the pixels: older copies are then made anew.
RECIPE = "adflow demo, recipe 3"

_PHOTO = 512
_MARK = "recipe.txt"
_VISIBLE = 8  # grey levels: what changed by less is not called defect
_SMALLEST = 100  # pixels of a defect
_ABANDONED = 3600  # seconds after which the half-made copy of a killed process is removed

Plane = npt.NDArray[np.float64]


def open_texture(texture: str) -> Dataset:
    """Return ``demo/<texture>``, making it in the cache folder when it is not there yet.

    Raises:
        UsageError: no such texture.
        UnavailableError: this installation of scikit-image does not carry the photographs.
        ResourceError: the cache folder cannot be written.
    """
    if texture not in TEXTURES:
        raise unknown("demo texture", texture, TEXTURES)
    folder = home() / "data" / "demo" / texture
    if _recipe_of(folder) != RECIPE:
        _place(texture, folder)
    return dataclasses.replace(mvtec.read(folder, texture), name=f"demo/{texture}", family="demo")


def build(texture: str, folder: Path) -> None:
    """Write the data set for ``texture`` into the new ``folder``, in MVTec layout."""
    photos = {name: _photo(name) for name in TEXTURES}
    rng = np.random.default_rng([TEXTURES.index(texture), 20240501])
    for split, count in (("train", TRAIN), ("test", GOOD)):
        for number in range(count):
            clean = _crop(photos[texture], rng)
            _save(_Light(rng).expose(clean), folder / split / "good" / f"{number:03d}.png")
    for kind in DEFECTS:
        for number in range(EACH):
            picture, mask = _defective(kind, texture, photos, number, rng)
            _save(picture, folder / "test" / kind / f"{number:03d}.png")
            _save(mask.astype(np.uint8) * 255, folder / "ground_truth" / kind / f"{number:03d}_mask.png")
    (folder / _MARK).write_text(RECIPE + "\n", encoding="utf-8")


def _defective(
    kind: str, texture: str, photos: dict[str, Plane], number: int, rng: np.random.Generator
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """Return a picture with a defect and its mask; one that cannot be seen is drawn again."""
    foreign = photos[TEXTURES[(TEXTURES.index(texture) + 1 + number % 2) % len(TEXTURES)]]
    while True:
        clean = _crop(photos[texture], rng)
        marred = _MAKERS[kind](clean, foreign, rng)
        light = _Light(rng)
        picture, reference = light.expose(marred), light.expose(clean)
        mask = _mask(picture, reference)
        if mask.sum() >= _SMALLEST:
            return picture, mask


def _place(texture: str, folder: Path) -> None:
    """Build beside ``folder``, then move; when another process was faster its copy stands."""
    make_folder(folder.parent)
    for old in folder.parent.glob(".*.partial"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > _ABANDONED:
                shutil.rmtree(old, ignore_errors=True)
    beside = folder.parent / f".{texture}.{secrets.token_hex(6)}.partial"
    outdated = beside.with_name(f".{texture}.{secrets.token_hex(6)}.old.partial")
    try:
        build(texture, beside)
        if folder.exists() and _recipe_of(folder) != RECIPE:
            with contextlib.suppress(FileNotFoundError):
                folder.rename(outdated)
        try:
            beside.rename(folder)
        except OSError:
            if _recipe_of(folder) != RECIPE:
                raise
    except OSError as error:
        raise write_error(folder, error) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(outdated, ignore_errors=True)


def _recipe_of(folder: Path) -> str | None:
    try:
        return (folder / _MARK).read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _photo(name: str) -> Plane:
    """Return a photograph from scikit-image's wheel, [512, 512] in 0..255, without importing the package."""
    spec = importlib.util.find_spec("skimage")
    for place in (spec and spec.submodule_search_locations) or []:
        path = Path(place) / "data" / f"{name}.png"
        if path.is_file():
            return read_image(path)[..., 0].astype(np.float64)
    raise UnavailableError(
        f"this installation of scikit-image does not carry {name}.png, from which the demo is made",
        hint="Install scikit-image from its wheel: pip install --force-reinstall scikit-image",
    )


def _crop(photo: Plane, rng: np.random.Generator) -> Plane:
    """Return a crop from anywhere, zoomed to [256, 256]; mirrored half of the time."""
    side = rng.uniform(176, 190)
    x, y = rng.random(2) * (_PHOTO - side)
    whole = Image.fromarray(photo.astype(np.float32))
    box = (x, y, x + side, y + side)
    plane = np.asarray(whole.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box), dtype=np.float64)
    return plane[:, ::-1].copy() if rng.random() < 0.5 else plane


class _Light:
    """One exposure: gain, gamma, a slow gradient over the field of view, and sensor noise."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.gain = rng.uniform(0.95, 1.05)
        self.gamma = rng.uniform(0.96, 1.04)
        ramp = np.linspace(-1, 1, SIDE)
        angle = rng.uniform(0, 2 * math.pi)
        self.field = 1 + 0.03 * (math.cos(angle) * ramp[None, :] + math.sin(angle) * ramp[:, None])
        self.noise = 1.5 * rng.standard_normal((SIDE, SIDE))

    def expose(self, plane: Plane) -> npt.NDArray[np.uint8]:
        """Return the picture, [256, 256] uint8."""
        bright = 255 * (np.clip(plane, 0, 255) / 255) ** self.gamma
        return np.clip(np.rint(bright * self.gain * self.field + self.noise), 0, 255).astype(np.uint8)


def _mask(picture: npt.NDArray[np.uint8], reference: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Return where the picture visibly differs from the same exposure without the defect.

    Gaps of a few pixels, where the defect happens to agree with what it covers, are closed, holes filled, and
    specks of fewer than 12 pixels dropped.
    """
    changed = np.abs(picture.astype(np.int16) - reference.astype(np.int16)) >= _VISIBLE
    disk = np.hypot(*np.mgrid[-3:4, -3:4]) <= 3
    closed = ndimage.binary_fill_holes(ndimage.binary_closing(np.pad(changed, 4), disk)[4:-4, 4:-4])
    labels, count = ndimage.label(closed, structure=np.ones((3, 3)))
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    keep = sizes >= 12
    keep[0] = False
    return np.asarray(keep[labels])


def _clouds(rng: np.random.Generator, cells: int) -> Plane:
    """Return smooth random hills, [256, 256], mean 0 and standard deviation 1."""
    seeds = rng.standard_normal((cells, cells)).astype(np.float32)
    hills = Image.fromarray(seeds).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    plane = np.asarray(hills, dtype=np.float64)
    return np.asarray((plane - plane.mean()) / plane.std())


def _blot(rng: np.random.Generator, radius: float, edge: float) -> Plane:
    """Return the coverage (0 to 1) of an irregular blot whose border is ``edge`` pixels soft."""
    x, y = rng.uniform(0.2 * SIDE, 0.8 * SIDE, size=2)
    turn, stretch = rng.uniform(0, math.pi), rng.uniform(1.0, 1.7)
    dy, dx = np.mgrid[:SIDE, :SIDE] - np.array([y, x])[:, None, None]
    along = (math.cos(turn) * dx + math.sin(turn) * dy) / stretch
    across = (-math.sin(turn) * dx + math.cos(turn) * dy) * math.sqrt(stretch)
    distance = np.hypot(along, across) + 0.22 * radius * _clouds(rng, 9) + 0.08 * radius * _clouds(rng, 24)
    ramp = np.clip((radius - distance) / edge + 0.5, 0, 1)
    return np.asarray(ramp * ramp * (3 - 2 * ramp))


def _curve(rng: np.random.Generator, length: float, curl: float) -> list[tuple[float, float]]:
    """Return the points of a random curve; ``curl`` says how much it bends (radian in 10 px)."""
    x, y = rng.uniform(0.25 * SIDE, 0.75 * SIDE, size=2)
    heading = rng.uniform(0, 2 * math.pi)
    # Start half a length back, so that most of the curve is inside the picture.
    x, y = x - 0.5 * length * math.cos(heading), y - 0.5 * length * math.sin(heading)
    bend, points = 0.0, [(x, y)]
    for _ in range(int(length / 2)):
        bend = 0.9 * bend + 0.2 * curl * float(rng.standard_normal()) * 0.45
        heading += bend
        x, y = x + 2 * math.cos(heading), y + 2 * math.sin(heading)
        points.append((x, y))
    return points


def _stroke(points: list[tuple[float, float]], width: float) -> Plane:
    """Return the coverage (0 to 1) of a line of ``width`` pixels through ``points``, antialiased."""
    fine = 4
    canvas = Image.new("L", (SIDE * fine, SIDE * fine))
    line = [(x * fine, y * fine) for x, y in points]
    ImageDraw.Draw(canvas).line(line, fill=255, width=max(1, round(width * fine)), joint="curve")
    return np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float64) / 255


def _around(plane: Plane) -> Plane:
    """Return the local brightness: the plane without its texture."""
    return np.asarray(ndimage.gaussian_filter(plane, 12, mode="reflect"))


def _scratch(clean: Plane, foreign: Plane, rng: np.random.Generator) -> Plane:
    points = _curve(rng, rng.uniform(80, 170), curl=0.05)
    width = rng.uniform(2.0, 3.4)
    side = 1 if rng.random() < 0.5 else -1
    depth = np.clip(0.8 + 0.35 * _clouds(rng, 12), 0.25, 1)
    core = _stroke(points, width) * depth
    rim = _stroke([(x + side * width * 0.7, y + side * width * 0.7) for x, y in points], width * 0.8) * depth
    ground = _around(clean)
    spread = clean.std()
    plane = clean + 0.8 * rim * (ground + 1.9 * spread - clean)
    plane = plane + 0.9 * core * (ground - 2.1 * spread - plane)
    return np.asarray(plane)


def _stain(clean: Plane, foreign: Plane, rng: np.random.Generator) -> Plane:
    plane: Plane
    radius = rng.uniform(18, 36)
    cover = _blot(rng, radius, edge=rng.uniform(4, 9))
    rim = 4 * cover * (1 - cover)
    mottle = 1 + 0.12 * _clouds(rng, 20)
    strength = rng.uniform(0.28, 0.45)
    if rng.random() < 0.65:
        plane = clean * (1 - strength * cover * mottle) * (1 - 0.22 * rim)
    else:
        plane = clean + (232 - clean) * 0.9 * strength * cover * mottle
    return plane


def _patch(clean: Plane, foreign: Plane, rng: np.random.Generator) -> Plane:
    cover = _blot(rng, rng.uniform(20, 32), edge=rng.uniform(2, 4))
    other = _crop(foreign, rng)
    inside = cover > 0.5
    spread = max(clean[inside].std(), 14.0)
    other = (other - other[inside].mean()) / max(other[inside].std(), 1.0) * spread + clean[inside].mean()
    return np.asarray(clean + cover * (other - clean))


def _thread(clean: Plane, foreign: Plane, rng: np.random.Generator) -> Plane:
    points = _curve(rng, rng.uniform(110, 230), curl=0.35)
    width = rng.uniform(2.0, 3.6)
    fibre = _stroke(points, width)
    shine = _stroke([(x - 0.25 * width, y - 0.25 * width) for x, y in points], 0.4 * width)
    fall = rng.uniform(1.5, 3.0)
    shifted = _stroke([(x + fall, y + fall) for x, y in points], width)
    shadow = Image.fromarray((255 * shifted).astype(np.uint8)).filter(ImageFilter.GaussianBlur(1.5))
    dark = np.asarray(shadow, dtype=np.float64) / 255
    tone = rng.uniform(20, 50) if rng.random() < 0.5 else rng.uniform(205, 235)
    plane = clean * (1 - 0.4 * dark)
    plane = plane + 0.93 * fibre * (tone - plane)
    return np.asarray(plane + 0.35 * shine * (tone + 30 - plane))


_MAKERS = {"scratch": _scratch, "stain": _stain, "patch": _patch, "thread": _thread}


def _save(picture: npt.NDArray[np.uint8], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)
