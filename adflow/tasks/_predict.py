"""python predict.py IMAGE...: one line of JSON an image: score, verdict, marked share of the pixels.

Needs numpy, onnxruntime and pillow only. For 8-bit grey or RGB pictures; `adflow score --model .` reads all kinds and
gives p-values and regions. Exits with 1 where a picture could not be read.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

FOLDER = Path(__file__).resolve().parent


def read(name: str, takes: dict[str, Any]) -> np.ndarray:
    """Return a picture as the model takes it, [1, H, W, 3]."""
    picture: Image.Image = Image.open(name)
    if picture.mode not in ("1", "L", "P", "RGB") or "transparency" in picture.info:
        raise ValueError(f"expected 8-bit grey or RGB without transparency, found mode {picture.mode}")
    picture = ImageOps.exif_transpose(picture).convert("RGB")
    if not takes["any_size"]:
        height, width = takes["size"]
        for size in (width, picture.height), (width, height):  # columns first
            picture = picture.resize(size, Image.Resampling.BILINEAR)
    pixels = np.asarray(picture)[None]
    return pixels.astype(np.float32) / 255 if takes["type"] == "float32" else pixels


def main(names: list[str]) -> int:
    """Write what the model says of each picture; return the exit code."""
    about = json.loads((FOLDER / "metadata.json").read_text(encoding="utf-8"))
    session = onnxruntime.InferenceSession(str(FOLDER / about["model"]), providers=["CPUExecutionProvider"])
    failed = 0
    for name in names:
        try:
            pixels = read(name, about["input"])
        except Exception as error:  # Pillow raises many kinds
            sys.stderr.write(f"{name}: left out: {error}\n")
            failed = 1
            continue
        score, verdict, mask = session.run(["score", "verdict", "mask"], {"images": pixels})
        label = about["labels"][int(verdict[0])] if about["thresholds"]["image"] is not None else None
        found = {"image": name, "score": float(score[0]), "verdict": label, "marked": float(mask[0].mean())}
        sys.stdout.write(json.dumps(found) + "\n")
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) if len(sys.argv) > 1 else __doc__)
