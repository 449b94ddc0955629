"""adflow: find defects in images after seeing only good ones.

A frozen pretrained backbone turns an image into features, a method learns what normal features look like, every
pixel gets an anomaly score, and statistics of held-out good images decide what is a defect.

The names below are loaded on first use, so that ``import adflow`` costs nothing:

    >>> import adflow
    >>> sorted(adflow.__all__)[:3]
    ['AdflowError', 'Calibration', 'Dataset']
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from adflow.backbones import make_backbone
    from adflow.calibration import Calibration
    from adflow.data import Dataset, Images, Sample, open_data
    from adflow.detector import Detector, Energy, FeatureDetector, Scores
    from adflow.detector_file import load_detector
    from adflow.errors import AdflowError

_HOMES = {
    "AdflowError": "errors",
    "Calibration": "calibration",
    "Dataset": "data",
    "Detector": "detector",
    "Energy": "detector",
    "FeatureDetector": "detector",
    "Images": "data",
    "Sample": "data",
    "Scores": "detector",
    "load_detector": "detector_file",
    "make_backbone": "backbones",
    "open_data": "data",
}

__all__ = [
    "AdflowError",
    "Calibration",
    "Dataset",
    "Detector",
    "Energy",
    "FeatureDetector",
    "Images",
    "Sample",
    "Scores",
    "load_detector",
    "make_backbone",
    "open_data",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"adflow.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'adflow' has no attribute {name!r}")
