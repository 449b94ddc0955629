"""ShanghaiTech Campus: one class per camera (scene 01 to 12); training videos, test frames, masks as arrays.

::

    training/videos/SS_VVV.avi              SS scene, VVV video
    training/frames/SS_VVV/00000000.jpg     made by `decode`; how, stands in .adflow.json beside the frames
    testing/frames/SS_VVVV/000.jpg
    testing/test_frame_mask/SS_VVVV.npy     [T] uint8, 1 = abnormal frame
    testing/test_pixel_mask/SS_VVVV.npy     [T, H, W] uint8

Scene 13 has a training video and no truth, so it is no class. Videos are decoded as a stream, frame by frame:
to files by `decode`, as CFLOW-AD does (JPEG loses a little), else whenever frames are read. The 274,515 training
frames are kept as numbers; a `Sample` is made when it is asked for.

W. Liu et al., "Future frame prediction for anomaly detection: a new baseline", CVPR 2018,
https://svip-lab.github.io/dataset/campus_dataset.html
"""

from __future__ import annotations

import bisect
import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt

from adflow._clock import Progress
from adflow._files import encoded, make_folder, write_error
from adflow._video import count
from adflow.data import Chosen, Dataset, Sample
from adflow.data._scan import folders_in
from adflow.errors import InputError, UnavailableError
from adflow.imaging import show

QUALITY = 80  # JPEG, as CFLOW-AD's loader writes training frames
MARKER = ".adflow.json"
_VIDEO = re.compile(r"(\d\d)_(\d+)\.avi")
_FRAME = re.compile(r"(\d+)\.jpg")


class Frames(Sequence[Sample]):
    """The frames of several videos as a sequence of samples, stored as numbers.

    Args:
        split: "train" or "test".
        videos: per video its folder, the frame numbers [T], the digits of a file name, and for test
            videos the labels [T] and the file of the pixel masks.
    """

    def __init__(self, split: str, videos: Sequence[_Video]) -> None:
        self._split = split
        self._videos = videos
        self._ends = np.cumsum([len(video.numbers) for video in videos], dtype=np.int64).tolist()

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Chosen: ...
    def __getitem__(self, index: int | slice) -> Sample | Chosen:
        """Return the sample at ``index``, or a sequence for a slice."""
        if isinstance(index, slice):
            return Chosen(self, range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        which = bisect.bisect_right(self._ends, index)
        video = self._videos[which]
        place = index - (self._ends[which - 1] if which else 0)
        image = video.folder / f"{int(video.numbers[place]):0{int(video.digits[place])}d}{video.suffix}"
        bad = video.labels is not None and bool(video.labels[place])
        mask = video.masks if bad else None
        return Sample(image, self._split, int(bad), "abnormal" if bad else None, mask, place if mask else None)


class _Video:
    """The frames of one video; see `Frames`."""

    __slots__ = ("digits", "folder", "labels", "masks", "numbers", "suffix")

    def __init__(self, folder: Path) -> None:
        self.suffix = "" if folder.is_file() else ".jpg"
        if folder.is_file():
            self._keep(folder, np.array([(i, 8) for i in range(count(folder))], dtype=np.int32).reshape(-1, 2))
            return
        names = []
        try:
            with os.scandir(folder) as entries:
                names = [entry.name for entry in entries if entry.name.endswith(".jpg")]
        except OSError as error:
            raise InputError(f"cannot read the folder {show(folder)}: {error.strerror or error}") from error
        odd = next((name for name in names if not _FRAME.fullmatch(name)), None)
        if odd is not None:
            raise InputError(f"{show(folder / odd)} has no frame number, expected a name such as 000.jpg")
        # By number, not by name: the width of the number is not the same in every copy.
        pairs = np.array(sorted((int(name[:-4]), len(name) - 4) for name in names), dtype=np.int32).reshape(-1, 2)
        self._keep(folder, pairs)
        if len(np.unique(self.numbers)) != len(names):
            raise InputError(f"{show(folder)} holds two frames of one number")

    def _keep(self, folder: Path, pairs: npt.NDArray[np.int32]) -> None:
        self.folder = folder
        self.numbers: npt.NDArray[np.int32] = pairs[:, 0].copy()
        self.digits: npt.NDArray[np.uint8] = pairs[:, 1].astype(np.uint8)
        self.labels: npt.NDArray[np.bool_] | None = None
        self.masks: Path | None = None


def matches(folder: Path) -> bool:
    """Tell whether ``folder`` holds the training part and the test frames."""
    return (folder / "testing" / "frames").is_dir() and any(
        (folder / "training" / name).is_dir() for name in ("videos", "frames")
    )


def classes(folder: Path) -> list[str]:
    """Return the scenes that have both training and test videos, sorted: 01 to 12 where all are there."""
    if not matches(folder):
        return []
    tested = {name[:2] for name in folders_in(folder / "testing" / "frames") if _scene(name)}
    return sorted(tested & {name[:2] for name in (*_videos(folder), *_decoded(folder))})


def read(folder: Path, class_: str) -> Dataset:
    """Read one scene; training videos that have not been decoded to files are decoded as they are read.

    Raises:
        UnavailableError: there are such videos, and PyAV is not installed.
        InputError: frames and masks do not agree in number, or a mask is missing; names the video.
    """
    decoded = [name for name in _decoded(folder) if _scene(name) == class_]
    missing = [name for name in _videos(folder) if _scene(name) == class_ and name not in decoded]
    if missing and find_spec("av") is None:
        raise UnavailableError(
            f"{len(missing)} training videos of scene {class_} are not decoded, first {missing[0]}.avi",
            hint=f"Run `pip install 'adflow[video]'`, then the same command, or `adflow download stc/{class_}`.",
        )
    places = {name: folder / "training" / "frames" / name for name in decoded}
    places |= {name: folder / "training" / "videos" / f"{name}.avi" for name in missing}
    train = [_Video(places[name]) for name in sorted(places)]
    frames = folder / "testing" / "frames"
    test = [_tested(folder, frames / name) for name in folders_in(frames) if _scene(name) == class_]
    if not any(len(video.numbers) for video in train):
        raise InputError(f"there is no training frame of scene {class_} in {show(folder)}")
    notes = [f"training frames: {how}" for how in sorted({_how(video.folder) for video in train})]
    return Dataset(f"stc/{class_}", "stc", class_, folder, Frames("train", train), Frames("test", test), notes)


def prepare(folder: Path, scenes: Iterable[str] | None = None, progress: Progress | None = None) -> list[str]:
    """Decode what is missing of ``scenes`` (None: of every class); return what the user should know."""
    wanted = set(classes(folder) if scenes is None else scenes)
    done = decode(folder, scenes=wanted, progress=progress)
    return [f"{done} training videos decoded, every frame, JPEG quality {QUALITY}"] if done else []


def decode(
    folder: Path,
    *,
    scenes: Iterable[str] | None = None,
    stride: int = 1,
    quality: int = QUALITY,
    progress: Progress | None = None,
) -> int:
    """Decode training videos to JPEG, one frame in memory at a time; return how many there were to decode.

    A video's folder appears when all of its frames are written, so an interrupted run goes on where it
    stopped.

    Args:
        folder: the data set.
        scenes: "01", "02", ...; None: all.
        stride: keep every n-th frame.
        quality: of the JPEG files, 1 to 95.
        progress: called with (videos done, videos in all, name).

    Raises:
        UnavailableError: PyAV is not installed.
        InputError: a video cannot be decoded; names it.
        ResourceError: the disk is full or not writable.
    """
    wanted = None if scenes is None else set(scenes)
    there = set(_decoded(folder))
    names = [n for n in _videos(folder) if (wanted is None or _scene(n) in wanted) and n not in there]
    if not names:
        return 0
    try:
        import av
    except ImportError:
        raise UnavailableError(
            f"{len(names)} videos must be decoded, and PyAV is not installed",
            hint="Run `pip install 'adflow[video]'`, then the same command.",
        ) from None
    frames = make_folder(folder / "training" / "frames")
    for done, name in enumerate(names):
        if progress is not None:
            progress(done, len(names), name)
        video = folder / "training" / "videos" / f"{name}.avi"
        beside = frames / f".{name}.partial"
        shutil.rmtree(beside, ignore_errors=True)
        make_folder(beside)
        written = 0
        try:
            with av.open(str(video)) as container:
                for index, frame in enumerate(container.decode(video=0)):
                    if index % stride == 0:
                        (beside / f"{index:08d}.jpg").write_bytes(encoded(frame.to_image(), ".jpg", quality=quality))
                        written += 1
            if written:
                facts = {"video": video.name, "frames": written, "stride": stride, "quality": quality}
                (beside / MARKER).write_text(json.dumps(facts) + "\n", encoding="utf-8")
                beside.replace(frames / name)
        except av.FFmpegError as error:
            shutil.rmtree(beside, ignore_errors=True)
            raise InputError(f"{show(video)} cannot be decoded: {error}", hint="Get the data set again.") from error
        except OSError as error:
            shutil.rmtree(beside, ignore_errors=True)
            raise write_error(frames, error) from error
        if not written:
            shutil.rmtree(beside, ignore_errors=True)
            raise InputError(f"{show(video)} holds no frame", hint="Get the data set again.")
    if progress is not None:
        progress(len(names), len(names), "")
    return len(names)


def _tested(folder: Path, frames: Path) -> _Video:
    """Return a test video with its labels, after checking that frames and both masks agree in number."""
    video = _Video(frames)
    by_frame = folder / "testing" / "test_frame_mask" / f"{frames.name}.npy"
    by_pixel = folder / "testing" / "test_pixel_mask" / f"{frames.name}.npy"
    for path in (by_frame, by_pixel):
        try:
            array = np.lib.format.open_memmap(path, mode="r")  # [T] or [T, H, W]; only the header is read
        except FileNotFoundError:
            raise InputError(f"{show(frames)} has no mask, expected {show(path)}") from None
        except (OSError, ValueError) as error:
            raise InputError(f"{show(path)} is not an array file: {error}") from error
        if array.ndim != (1 if path == by_frame else 3):
            raise InputError(f"{show(path)} has shape {array.shape}, expected [T] per frame or [T, H, W] per pixel")
        if len(array) != len(video.numbers):
            raise InputError(f"{show(frames)} holds {len(video.numbers)} frames, but {show(path)} {len(array)}")
        if path == by_frame:
            video.labels = np.asarray(array) != 0
    video.masks = by_pixel
    return video


def _videos(folder: Path) -> list[str]:
    try:
        return sorted(p.stem for p in (folder / "training" / "videos").iterdir() if _VIDEO.fullmatch(p.name))
    except OSError:
        return []


def _decoded(folder: Path) -> list[str]:
    return [name for name in folders_in(folder / "training" / "frames") if _scene(name)]


def _scene(name: str) -> str | None:
    found = re.fullmatch(r"(\d\d)_\d+", name)
    return found[1] if found else None


def _how(frames: Path) -> str:
    """Say how the frames of one video were made."""
    if frames.is_file():
        return "every frame, decoded when it is read"
    try:
        facts = json.loads((frames / MARKER).read_text(encoding="utf-8"))
        every = "every frame" if facts["stride"] == 1 else f"every {facts['stride']}. frame"
        return f"{every}, JPEG quality {facts['quality']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "made by another tool, stride and quality not recorded"
