"""Pieces that panels are drawn with: colours, outlines, words and the headline."""

from __future__ import annotations

import unicodedata
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from adflow.errors import InputError

Verdict = Literal["good", "defect"]
Colour = tuple[int, int, int]

BLUE: Colour = (0, 114, 178)
VERMILION: Colour = (213, 94, 0)
SKY_BLUE: Colour = (86, 180, 233)
INK: Colour = (26, 28, 33)
PAPER: Colour = (255, 255, 255)
SLATE: Colour = (84, 90, 102)


def flat(array: npt.NDArray[Any], name: str) -> npt.NDArray[Any]:
    array = np.asarray(array)
    if array.ndim != 2 or 0 in array.shape:
        raise InputError(f"an overlay needs {name} of shape [H, W], found {array.shape}")
    return array


def _grow(mask: npt.NDArray[np.bool_], pixels: int) -> npt.NDArray[np.bool_]:
    """Return the mask grown by `pixels` to every side, corners included (separable, so two passes)."""
    for _ in range(pixels):
        rows = mask.copy()
        rows[1:] |= mask[:-1]
        rows[:-1] |= mask[1:]
        mask = rows.copy()
        mask[:, 1:] |= rows[:, :-1]
        mask[:, :-1] |= rows[:, 1:]
    return mask


def contour(
    picture: npt.NDArray[np.uint8], mask: npt.NDArray[Any], name: str, colour: Colour, line: int, dashed: bool
) -> None:
    """Draw the outline of `mask` into `picture` [H, W, 3]: `line` px of colour with a dark edge around it."""
    region = flat(mask, name).astype(bool)
    height, width = picture.shape[:2]
    if region.shape != (height, width):
        # Any touched pixel counts: nearest-neighbour reduction would lose a defect of a few pixels.
        shrinking = region.shape[0] > height or region.shape[1] > width
        method = Image.Resampling.BOX if shrinking else Image.Resampling.NEAREST
        stretched = Image.fromarray(region.astype(np.uint8) * 255).resize((width, height), method)
        region = np.asarray(stretched) > 0
    rows, columns = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
    if rows.size == 0:
        return
    pad = line + 2
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    # Only the box around the mask is worked on. The line lies outside the mask: what is marked stays visible.
    box = np.pad(region[top:bottom, left:right], pad)
    ring = _grow(box, line) & ~box
    edge = _grow(box, line + 1) & ~box & ~ring
    y0, x0 = max(top - pad, 0), max(left - pad, 0)
    y1, x1 = min(bottom + pad, height), min(right + pad, width)
    window = np.s_[y0 - top + pad : y1 - top + pad, x0 - left + pad : x1 - left + pad]
    box, ring, edge = box[window], ring[window], edge[window]
    y, x = np.ogrid[y0:y1, x0:x1]
    # Where a mask runs into the image's border there is no outside: the line is drawn on the border itself.
    ring |= box & ((y < line) | (y >= height - line) | (x < line) | (x >= width - line))
    part = picture[y0:y1, x0:x1]
    if dashed:
        # Slanted stripes: an edge would have to run at exactly slope -2 to fall between them, and then the
        # gaps, which are dark, still show it. A solid contour that is there already shows through the gaps.
        gaps = ring & ((2 * x + y) // (6 * line) % 2 != 0)
        ring = ring & ~gaps
        edge = (edge | gaps) & (part != VERMILION).any(axis=2)
    part[edge] = INK
    part[ring] = colour


def printable(text: str) -> str:
    """Return `text` on one line in the letters the bundled font has: ASCII, accents dropped, the rest "?"."""
    plain = unicodedata.normalize("NFKD", text.replace("ß", "ss"))
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    words = "".join(" " if letter.isspace() else letter for letter in plain).split()
    return " ".join("".join(letter if " " < letter <= "~" else "?" for letter in word) for word in words)


def number(value: float) -> str:
    """Return a number in four significant digits or fewer, without an exponent where it can be avoided.

    >>> number(0.123456), number(1234.5), number(2.0), number(1e-9)
    ('0.1235', '1234', '2', '1e-09')
    """
    return f"{value:.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"


def write(
    draw: ImageDraw.ImageDraw,
    at: tuple[float, float],
    words: str,
    font: Any,
    colour: Colour,
    anchor: str,
    room: float,
) -> None:
    """Write `words`, shortened in the middle to fit into `room` px: both ends tell a file apart."""
    if font.getlength(words) > room:
        # Halving: each measurement of a long path would otherwise cost more than the rest of the panel.
        fits, too_long = 0, len(words)
        while too_long - fits > 1:
            keep = (fits + too_long) // 2
            short = words[: keep // 2] + "..." + words[len(words) - (keep - keep // 2) :]
            fits, too_long = (keep, too_long) if font.getlength(short) <= room else (fits, keep)
        words = words[: fits // 2] + "..." + words[len(words) - (fits - fits // 2) :]
    draw.text(at, words, font=font, fill=colour, anchor=anchor)


def headline(
    draw: ImageDraw.ImageDraw,
    width: int,
    height: int,
    em: int,
    verdict: Verdict | None,
    score: float | None,
    threshold: float | None,
) -> None:
    """Draw the headline: a triangle or a ticked disc, the word, the score and the alarm level."""
    middle, left = height / 2, em / 2
    draw.rectangle((0, 0, width, height - 1), fill={"good": BLUE, "defect": VERMILION, None: SLATE}[verdict])
    if verdict == "defect":
        side = 1.9 * em
        corners = [(left, middle + side * 0.43), (left + side, middle + side * 0.43)]
        draw.polygon([*corners, (left + side / 2, middle - side * 0.45)], fill=PAPER)
        x, thick = left + side / 2, max(1.0, em * 0.11)
        nail = [(x - thick, middle - em * 0.35), (x + thick, middle - em * 0.35), (x, middle + em * 0.35)]
        draw.polygon(nail, fill=VERMILION)
        thick *= 0.8
        draw.rectangle((x - thick, middle + em * 0.45, x + thick, middle + em * 0.62), fill=VERMILION)
    elif verdict == "good":
        r = 0.85 * em
        x = left + r
        draw.ellipse((x - r, middle - r, x + r, middle + r), fill=PAPER)
        tick = [(x - r * 0.5, middle), (x - r * 0.1, middle + r * 0.42), (x + r * 0.5, middle - r * 0.4)]
        draw.line(tick, fill=BLUE, width=max(2, em // 6), joint="curve")
    if verdict:
        left += 2.4 * em
        font = ImageFont.load_default(round(em * 1.6))
        draw.text((left, middle), verdict.upper(), font=font, fill=PAPER, anchor="lm", stroke_width=em // 18)
        left += font.getlength(verdict.upper()) + em
    if score is not None:
        words = f"score {number(score)}"
        words += "" if threshold is None else f", alarm from {number(threshold)}"
        font = ImageFont.load_default(em)
        write(draw, (width - em / 2, middle), words, font, PAPER, "rm", width - left - em / 2)


def line_sample(draw: ImageDraw.ImageDraw, at: tuple[float, float], em: int, colour: Colour, dashed: bool) -> None:
    """Draw a piece of a contour for the legend."""
    x, y = at
    thick = max(2, em // 6)
    draw.rectangle((x, y - thick / 2 - 1, x + 2.8 * em, y + thick / 2 + 1), fill=INK)
    for piece in range(4):
        start = x + 1 + piece * 0.7 * em
        end = min(start + (0.4 if dashed else 0.7) * em, x + 2.8 * em - 1)
        draw.rectangle((start, y - thick / 2, end, y + thick / 2), fill=colour)
