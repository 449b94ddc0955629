"""One panel a picture: the photograph, where adflow looked twice, and what it decided.

The left half is the photograph with the ground truth, if there is one; the right half is the same
photograph in grey under a heat map. Grey means as good as the good ones; colour begins where the score
leaves the ordinary, so any colour on the right is heat. All panels of a class share one `Scale`: the same
colour is the same score in every one of them.

Nothing depends on colour alone. The heat map is viridis, whose brightness rises with the score; the two
contours differ in hue (vermilion, sky blue), in line (solid, dashed) and both have a dark edge; the verdict
is a word, a colour and a shape. Vermilion, blue and sky blue are from the palette of Okabe and Ito ("Color
Universal Design", 2008, https://jfly.uni-koeln.de/color/), which people with any common colour blindness
can tell apart.

Everything here is a pure function of its arguments, so that panels can be drawn in many threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from adflow._drawing import (
    INK,
    PAPER,
    SKY_BLUE,
    VERMILION,
    Colour,
    Verdict,
    contour,
    flat,
    headline,
    line_sample,
    number,
    printable,
    write,
)
from adflow._files import atomic_write, encoded
from adflow.errors import InputError

# Eleven points of viridis (S. van der Walt and N. Smith, "A Better Default Colormap for Matplotlib", SciPy
# 2015, https://bids.github.io/colormap/, CC0); colours in between are interpolated linearly.
VIRIDIS: tuple[Colour, ...] = (
    (68, 1, 84), (72, 36, 117), (65, 68, 135), (53, 95, 141), (42, 120, 142), (33, 145, 140),
    (34, 168, 132), (68, 191, 112), (122, 209, 81), (189, 223, 38), (253, 231, 37),
)  # fmt: skip

SMALLEST = 192  # longer side of a picture in a panel, px: less leaves no room for the words
THINNEST = 8  # shorter side, px: a picture one pixel high is drawn this high, distorted but visible
WIDE = 1.6  # pictures wider than this times their height stand one above the other
OPAQUE = 0.72  # how much of the grey photograph the hottest colour covers: its texture stays visible


@dataclass(frozen=True, slots=True)
class Scale:
    """The one colour scale of a class: which score is transparent, which is an alarm, which is the hottest.

    Args:
        low: scores up to here are ordinary and stay transparent.
        high: scores from here on have the hottest colour. Must be above `low`.
        threshold: score from which a pixel counts as defective; None draws no mark on the colour bar.
        unit: what the numbers beside the colour bar count.
        zero: the score that is written as 0 beside the colour bar.
        one: the score that is written as 1. `zero` 0 and `one` 1 write scores as they are.

    Raises:
        InputError: a number that is not finite, `low` not below `high`, or `zero` equal to `one`.
    """

    low: float
    high: float
    threshold: float | None = None
    unit: str = "anomaly score"
    zero: float = 0.0
    one: float = 1.0

    def __post_init__(self) -> None:
        numbers = [self.low, self.high, self.zero, self.one, self.threshold or 0.0]
        if not all(map(math.isfinite, numbers)) or self.low >= self.high or self.zero == self.one:
            raise InputError(f"{self} is no colour scale: it needs finite numbers, low < high, zero != one")

    @classmethod
    def from_alarm(cls, ordinary: float, threshold: float) -> Scale:
        """Return the scale whose unit is the alarm level, from what calibration knows (no test image).

        Args:
            ordinary: a middling score of normal pixels, say their median; written as 0.
            threshold: score from which a pixel is an alarm; written as 1. The colours run from 0.5 to 3.
        """
        if not (math.isfinite(ordinary) and math.isfinite(threshold)):
            raise InputError(f"a colour scale needs finite levels, found {ordinary} and {threshold}")
        # A threshold at or below the ordinary score (nothing learned, all flagged) still gives a scale.
        smallest = max(abs(ordinary), abs(threshold), 1e-12) * 1e-6
        step = max(threshold - ordinary, smallest)
        zero = threshold - step
        unit = "times the alarm level (0 = ordinary)"
        return cls(zero + 0.5 * step, zero + 3 * step, threshold, unit, zero, threshold)

    @classmethod
    def from_nfa(cls, epsilon: float = 1.0, worst: float = 6.0) -> Scale:
        """Return the scale for maps of -log10 NFA: alarm where under `epsilon` false regions are expected.

        Args:
            epsilon: expected false regions per normal image at the alarm level.
            worst: decades beyond the alarm level at which the hottest colour is reached.
        """
        level = -math.log10(epsilon)
        return cls(level - 1, level + worst, level, "log10 of 1 / expected false regions (NFA)")

    def label(self, score: float) -> float:
        """Return `score` as it is written beside the colour bar."""
        return (score - self.zero) / (self.one - self.zero)

    def _levels(self, score_map: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        """Return the map in 256 steps of the scale; what is not a number counts as ordinary."""
        steps = np.asarray(score_map, dtype=np.float32) - np.float32(self.low)
        steps *= np.float32(255 / (self.high - self.low))
        np.nan_to_num(steps, copy=False, nan=0.0, posinf=255.0, neginf=0.0)
        return np.clip(steps, 0, 255, out=steps).astype(np.uint8)

    def _opacity(self) -> npt.NDArray[np.uint8]:
        """Return the opacity of each of the 256 steps: none at `low`, full from the alarm level on."""
        full = 127.5
        if self.threshold is not None:
            full = 255 * min(max((self.threshold - self.low) / (self.high - self.low), 0.05), 1.0)
        opacity: npt.NDArray[np.uint8] = np.clip(np.arange(256) / full, 0, 1)
        return (opacity * 255 * OPAQUE).astype(np.uint8)


def overlay(
    image: npt.NDArray[Any],
    score_map: npt.NDArray[Any],
    *,
    scale: Scale,
    mask: npt.NDArray[Any] | None = None,
    truth: npt.NDArray[Any] | None = None,
    title: str = "",
    score: float | None = None,
    threshold: float | None = None,
    verdict: Verdict | None = None,
    overlay_size: int | tuple[int, int] | None = None,
) -> Image.Image:
    """Draw the panel of one image.

    The arrays show the same field of view; where their sizes differ they are stretched onto the image.

    Args:
        image: [H, W, 3] or [H, W]; uint8, or float in [0, 1].
        score_map: [h, w], higher = more anomalous. NaN counts as ordinary.
        scale: the colour scale, the same for every image of a class.
        mask: [h, w], true where adflow found a defect.
        truth: [h, w], true where a person marked a defect; None: unknown.
        title: usually the image's name. The bundled font has ASCII only: accents are dropped, other signs
            become "?".
        score: score of the whole image.
        threshold: image score from which an image is defective.
        verdict: "good", "defect" or None for no verdict.
        overlay_size: longer side of each picture in px, or (height, width) of the box it is fitted into; None
            keeps the image's size (at least 192 px, so that the words fit).

    Raises:
        InputError: an array of another shape than said above, or a size below 1.
    """
    photo, shape = _photo(image), np.asarray(image).shape[:2]
    size = _picture_size((int(shape[0]), int(shape[1])), overlay_size)
    height, width = size
    enlarging = height * width >= 4 * shape[0] * shape[1]
    sharp = Image.Resampling.NEAREST if enlarging else Image.Resampling.BICUBIC
    photo = photo.resize((width, height), sharp, reducing_gap=2.0)
    levels = Image.fromarray(scale._levels(flat(score_map, "score_map")))
    levels = levels.resize((width, height), Image.Resampling.BILINEAR)
    heat = Image.merge("RGB", [levels.point(list(channel)) for channel in _viridis().T])
    grey = photo.convert("L").convert("RGB")
    hot = np.array(Image.composite(heat, grey, levels.point(list(scale._opacity()))))
    plain = np.array(photo)

    line = max(2, round(max(size) / 192))
    if mask is not None:
        contour(hot, mask, "mask", VERMILION, line, dashed=False)
    if truth is not None:
        contour(plain, truth, "truth", SKY_BLUE, line, dashed=True)
        contour(hot, truth, "truth", SKY_BLUE, line, dashed=True)
    legend = [("found by adflow", VERMILION, False)] * (mask is not None)
    legend += [("marked by hand", SKY_BLUE, True)] * (truth is not None)
    return _panel(plain, hot, scale, legend, printable(title), score, threshold, verdict)


def write_overlay(path: Path, *args: Any, **options: Any) -> Path:
    """Write the panel that `overlay` draws from the other arguments; the suffix of `path` chooses the format.

    The file appears whole or not at all. Safe to call from many threads, one path each.

    Raises:
        InputError: a suffix that is no image format, or bad arguments of `overlay`.
        ResourceError: the disk is full, or writing is not permitted.
    """
    path = Path(path)
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise InputError(f"cannot write the overlay {path.name}: the name must end in .png, .jpg or .webp")
    panel = overlay(*args, **options)
    with atomic_write(path) as temporary:
        # Level 1 takes a third of the time of the default 6 and makes photographs about a tenth larger.
        temporary.write_bytes(encoded(panel, path.suffix, compress_level=1, quality=90))
    return path


def _photo(image: npt.NDArray[Any]) -> Image.Image:
    """Return any of the accepted arrays as an 8-bit RGB picture."""
    array = np.asarray(image)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3) or 0 in array.shape:
        raise InputError(f"an overlay needs an image of shape [H, W, 3] or [H, W], found {array.shape}")
    if array.dtype != np.uint8:
        array = (np.clip(np.nan_to_num(array.astype(np.float32)), 0, 1) * 255 + 0.5).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")


def _picture_size(shape: tuple[int, int], wanted: int | tuple[int, int] | None) -> tuple[int, int]:
    """Return (height, width) at which an image of `shape` stands in the panel."""
    height, width = shape
    if wanted is None:
        factor = 1.0
    elif isinstance(wanted, int):
        factor = wanted / max(shape)
    else:
        factor = min(wanted[0] / height, wanted[1] / width)
    if factor <= 0:
        raise InputError(f"overlay_size must be at least 1, found {wanted}")
    factor = max(factor, SMALLEST / max(shape))
    return max(THINNEST, round(height * factor)), max(THINNEST, round(width * factor))


def _viridis() -> npt.NDArray[np.uint8]:
    """Return the colour of each of the 256 steps of a scale, [256, 3]."""
    at = np.linspace(0, 255, len(VIRIDIS))
    channels = [np.interp(np.arange(256), at, channel) for channel in zip(*VIRIDIS, strict=True)]
    colours: npt.NDArray[np.uint8] = np.rint(np.stack(channels, axis=1)).astype(np.uint8)
    return colours


def _ticks(scale: Scale, count: int) -> list[float]:
    """Return round labels within the scale, about `count` of them."""
    first, last = sorted((scale.label(scale.low), scale.label(scale.high)))
    step = 10 ** math.floor(math.log10((last - first) / max(count, 1)))
    step *= next(factor for factor in (1, 2, 5, 10) if (last - first) / (factor * step) <= max(count, 1))
    start = math.ceil(first / step - 1e-9)
    return [index * step for index in range(start, math.floor(last / step + 1e-9) + 1)]


def _panel(
    plain: npt.NDArray[np.uint8],
    hot: npt.NDArray[np.uint8],
    scale: Scale,
    legend: Sequence[tuple[str, Colour, bool]],
    title: str,
    score: float | None,
    threshold: float | None,
    verdict: Verdict | None,
) -> Image.Image:
    """Put the two pictures, the verdict above and the colour bar below onto one sheet."""
    height, width = plain.shape[:2]
    stacked = width > WIDE * height
    inside = max(width if stacked else 2 * width + 8, 2 * SMALLEST + 8)
    em = int(min(max(inside / 46, 13), 72))
    gap = em // 2
    head = round(em * 2.6) if verdict or score is not None else 0
    name = round(em * 1.7) if title else gap
    foot = round(em * 4.4)
    tall = 2 * height + gap if stacked else height
    sheet = Image.new("RGB", (inside + 2 * gap, head + name + tall + foot), PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(em)

    if head:
        headline(draw, sheet.width, head, em, verdict, score, threshold)
    if title:
        write(draw, (gap, head + name / 2), title, font, INK, "lm", sheet.width - 2 * gap)
    top = head + name
    if stacked:
        left = gap + (inside - width) // 2
        sheet.paste(Image.fromarray(plain), (left, top))
        sheet.paste(Image.fromarray(hot), (left, top + height + gap))
    else:
        half = (inside - 8) // 2
        sheet.paste(Image.fromarray(plain), (gap + (half - width) // 2, top))
        sheet.paste(Image.fromarray(hot), (gap + half + 8 + (half - width) // 2, top))
    top += tall + em // 2
    middle = gap + inside // 2
    for row, (words, colour, dashed) in enumerate(legend):
        y = top + em * 0.7 + row * em * 1.6
        line_sample(draw, (gap, y), em, colour, dashed)
        write(draw, (gap + 3.4 * em, y), words, font, INK, "lm", middle - 5 * em)
    _colour_bar(sheet, (middle + gap, top, gap + inside, top + em), scale, em)
    return sheet


def _colour_bar(sheet: Image.Image, box: tuple[int, int, int, int], scale: Scale, em: int) -> None:
    """Draw the bar as the colours look on mid grey, its ticks, the alarm level and the unit."""
    left, top, right, bottom = box
    opacity = scale._opacity()[:, None].astype(np.float32) / 255
    strip = _viridis() * opacity + 140 * (1 - opacity)
    bar = Image.fromarray(strip.astype(np.uint8)[None])
    sheet.paste(bar.resize((right - left, bottom - top), Image.Resampling.BILINEAR), (left, top))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(max(11, round(em * 0.85)))

    def place(score: float) -> float:
        return left + (score - scale.low) / (scale.high - scale.low) * (right - left - 1)

    for label in _ticks(scale, max(2, (right - left) // (4 * em))):
        x = place(scale.zero + label * (scale.one - scale.zero))
        words = number(label)
        half = font.getlength(words) / 2
        draw.line((x, bottom, x, bottom + em // 4), fill=INK)
        x = min(max(x, left + half), right - half)
        draw.text((x, bottom + em * 0.3), words, font=font, fill=INK, anchor="ma")
    if scale.threshold is not None and scale.low <= scale.threshold <= scale.high:
        x = place(scale.threshold)
        thick = max(2, em // 7)
        draw.rectangle((x - thick / 2 - 1, top - 3, x + thick / 2 + 1, bottom + 2), fill=PAPER)
        draw.rectangle((x - thick / 2, top - 3, x + thick / 2, bottom + 2), fill=INK)
        draw.text((x + thick + 3, (top + bottom) / 2), "alarm", font=font, fill=PAPER, anchor="lm",
                  stroke_width=max(1, em // 10), stroke_fill=INK)  # fmt: skip
    write(draw, (left, bottom + em * 1.75), printable(scale.unit), font, INK, "la", right - left)
