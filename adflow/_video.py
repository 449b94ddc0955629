"""Frames of videos, decoded as a stream; a frame is named like a file: ``clip.avi/00000012``, counted from 0.

Read in about the order of time, a frame costs its own decoding and that of the frames left out before it. Memory does
not depend on the length of a video.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adflow.errors import InputError, UnavailableError

SUFFIXES = (".avi", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
# Decoded frames kept per video, as threads that read side by side ask a little out of order.
_KEPT, _KEPT_BYTES = 256, 96 << 20
_OPEN = 4  # videos


def is_frame(path: Path) -> bool:
    """Return whether ``path`` names a frame of a video."""
    return not path.suffix and path.parent.suffix.lower() in SUFFIXES and path.name.isdecimal()


def frame(video: Path, index: int) -> Path:
    """Return the name of a frame."""
    return video / f"{index:08d}"


def count(video: Path) -> int:
    """Return how many frames a video has: what its header says, else its packets; nothing is decoded.

    Raises:
        UnavailableError: PyAV is not installed.
        InputError: not a video.
    """
    av = _av(video)
    try:
        with av.open(str(video)) as container:
            said = int(container.streams.video[0].frames)
            return said or sum(packet.size > 0 for packet in container.demux(video=0))
    except (av.FFmpegError, IndexError) as error:
        raise InputError(f"{video} is not a video that can be read: {error}") from error


def read(path: Path) -> npt.NDArray[np.uint8]:
    """Return the frame called ``path``: [H, W, 3] uint8 RGB.

    Raises:
        UnavailableError: PyAV is not installed.
        InputError: it cannot be decoded.
    """
    return _reader(path.parent).read(int(path.name))


@functools.lru_cache(_OPEN)
def _reader(video: Path) -> _Reader:
    return _Reader(video)


class _Reader:
    """One open video and the frames decoded last."""

    def __init__(self, video: Path) -> None:
        self.video = video
        self.av = _av(video)
        self.lock = threading.Lock()
        self.kept: OrderedDict[int, Any] = OrderedDict()
        self.container: Any = None
        self.frames: Any = None
        self.next = 0

    def read(self, index: int) -> npt.NDArray[np.uint8]:
        with self.lock:
            try:
                if index not in self.kept:
                    self._decode(index)
                found = self.kept[index]
            except (self.av.FFmpegError, StopIteration, IndexError) as error:
                reason = "it ends before" if isinstance(error, StopIteration) else str(error)
                raise InputError(f"cannot read frame {index} of {self.video}: {reason}") from error
        array: npt.NDArray[np.uint8] = found.to_ndarray(format="rgb24")
        return array

    def _decode(self, index: int) -> None:
        if self.container is None or index < self.next:
            self._open()
        while self.next <= index:
            decoded = next(self.frames)
            self.kept[self.next] = decoded
            self.next += 1
            while len(self.kept) > min(_KEPT, max(2, _KEPT_BYTES // (decoded.width * decoded.height * 3 // 2))):
                self.kept.popitem(last=False)

    def _open(self) -> None:
        if self.container is not None:
            self.container.close()
        self.kept.clear()
        self.container = self.av.open(str(self.video))
        self.frames = self.container.decode(video=0)
        self.next = 0


def _av(video: Path) -> Any:
    try:
        import av
    except ImportError:
        raise UnavailableError(
            f"{video} is a video, and PyAV is not installed", hint="Run `pip install 'adflow[video]'`."
        ) from None
    return av
