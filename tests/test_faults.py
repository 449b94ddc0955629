"""Full disks, two processes at one place, damaged files, odd names: what unattended work meets, in seconds.

The long campaigns (kills, every byte, thousands of inputs) are in tests/extended.
"""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TinyBackbone
from PIL import Image
from rich.console import Console
from safetensors import SafetensorError

from adflow import cli
from adflow._files import atomic_write, replace_folder, write_text
from adflow._lock import claim, lock
from adflow.cli import _console
from adflow.cli._console import Talk
from adflow.data import Sample
from adflow.detector import Detector, Scores
from adflow.errors import InputError, ResourceError
from adflow.overlays import Scale, write_overlay
from adflow.pipeline import run
from adflow.tasks.segment import output_names

# ---- writing


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EFBIG, "File too large"), "larger than this system allows"),
        (OSError(errno.EROFS, "Read-only file system"), "read-only"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "disk is full"),
        (SafetensorError("I/O error: Permission denied (os error 13)"), "no permission"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="the numbers are those of POSIX")
def test_what_writers_complain_of_is_one_line(error: Exception, words: str, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=words) as found, atomic_write(tmp_path / "a.bin") as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert "a.bin" in str(found.value) and found.value.hint and list(tmp_path.iterdir()) == []


def test_a_writer_that_loses_the_number_of_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    complaint = OSError("encoder error -2 when writing image file")  # Pillow
    with pytest.raises(InputError, match="encoder error"), atomic_write(tmp_path / "a.png"):
        raise complaint
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 0}))
    with pytest.raises(ResourceError, match="the disk is full"), atomic_write(tmp_path / "a.png"):
        raise complaint


@pytest.mark.skipif(sys.platform != "linux", reason="limits the length of files as Linux does")
def test_a_picture_whose_last_bytes_do_not_fit_is_not_written(tmp_path: Path) -> None:
    """Pillow writes such a JPEG in part and says nothing."""
    import resource

    path, panel = tmp_path / "a.jpg", np.zeros((64, 64, 3), np.uint8)
    write = partial(write_overlay, path, panel, np.zeros((64, 64)), scale=Scale.from_alarm(0.0, 1.0))
    length = write().stat().st_size
    path.unlink()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (1, length // 2, length - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        try:
            with pytest.raises(ResourceError, match="larger than this system allows"):
                write()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_replaced_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new, place, old = (tmp_path / name for name in ("new", "place", "old"))
    for folder in (new, place):
        folder.mkdir()
        (folder / "a").write_text(folder.name)
    move = Path.replace

    def refuse(self: Path, target: Path) -> Path:
        if self == new:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return move(self, target)

    with monkeypatch.context() as patch, pytest.raises(PermissionError):
        patch.setattr(Path, "replace", refuse)
        replace_folder(new, place, old)
    assert (place / "a").read_text() == "place" and not old.exists()
    replace_folder(new, place, old)
    assert (place / "a").read_text() == "new" and [path.name for path in tmp_path.iterdir()] == ["place"]


def test_other_errors_of_a_writer_pass_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(KeyError), atomic_write(tmp_path / "a.bin"):
        raise KeyError("a bug")


def test_file_names_that_are_not_text_can_be_written_down(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    write_text(tmp_path / "a.jsonl", json.dumps({"image": name}, ensure_ascii=False))
    assert json.loads((tmp_path / "a.jsonl").read_text(encoding="utf-8")) == {"image": name}


# ---- two processes, one place


def test_a_folder_is_written_by_one_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with claim(folder):
        with pytest.raises(ResourceError, match=r"another process is writing to .*out"), claim(folder):
            pass
        assert [path.name for path in folder.iterdir()] == [".adflow.lock"]
    assert not folder.exists(), "a folder made for nothing is taken away"
    folder.mkdir()
    with claim(folder):
        pass
    assert list(folder.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    keep = [".hidden", "a.partial", ".0123456789ab.partial.d/x", "masks/a.png", "other/.0123456789ab.partial.png"]
    stale = [".0123456789ab.partial.json", ".adflow.lock", "masks/deep/.ba9876543210.partial.png"]
    for name in (*keep, *stale):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    with claim(tmp_path, "masks"):
        pass
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == set(keep)


COUNT = """
import sys
from pathlib import Path
from adflow._lock import claim
from adflow.errors import ResourceError
folder, left = Path(sys.argv[1]), 200
while left:
    try:
        with claim(folder):
            number = folder / "number"
            number.write_text(str(int(number.read_text()) + 1))
            left -= 1
    except ResourceError:
        continue
"""


def test_claims_that_come_and_go_never_overlap(tmp_path: Path) -> None:
    """The lock file is removed each time: a lock on a removed file must not count."""
    (tmp_path / "number").write_text("0")
    others = [subprocess.Popen([sys.executable, "-c", COUNT, str(tmp_path)]) for _ in range(2)]
    assert [process.wait(60) for process in others] == [0, 0]
    assert (tmp_path / "number").read_text() == "400"


def test_a_file_system_without_locks_does_not_stop_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("adflow._lock._hold", refuse)
    with claim(tmp_path / "out"), lock(tmp_path / "a.lock"):
        pass


# ---- scoring


class _Odd(Detector):
    """Gives NaN for white images, and runs out of memory beyond two at once."""

    def __init__(self) -> None:
        super().__init__(TinyBackbone())
        self.size = (8, 8)

    def fit(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError

    def device(self) -> Any:
        return type("Gpu", (), {"type": "a GPU"})

    def score(self, images: torch.Tensor, boxes: Any = None) -> Scores:
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self._score(images, boxes)

    def _score(self, images: torch.Tensor, boxes: Any) -> Scores:
        maps = images.mean(1)
        maps[maps > 0.99] = float("nan")
        return Scores(maps, maps.amax((1, 2)))


def grey(folder: Path, *levels: int) -> list[Sample]:
    found = []
    for i, level in enumerate(levels):
        Image.fromarray(np.full((8, 8), level, np.uint8)).save(folder / f"{i}.png")
        found.append(Sample(folder / f"{i}.png", "test", None, None, None))
    return found


def test_a_score_that_is_not_finite_is_an_error_of_its_image(tmp_path: Path) -> None:
    samples = grey(tmp_path, 100, 255, 50)
    found = list(run(_Odd(), samples))
    assert [one.error is None for one in found] == [True, False, True]
    assert "1.png: its score is not finite" in str(found[1].error) and found[1].map.size == 0
    with pytest.raises(InputError, match="not finite"):
        list(run(_Odd(), samples, strict=True))


def test_batches_that_do_not_fit_on_the_gpu_are_halved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = grey(tmp_path, *range(0, 250, 25))
    found = [one.image for one in run(_Odd(), samples, batch_size=8)]
    assert found == [pytest.approx(level / 255) for level in range(0, 250, 25)]
    assert "too many for the GPU" in caplog.text


def test_masks_stay_in_their_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for names in (
        ["a.png", str(tmp_path / "x" / "b.png")],
        ["../a.png", "x/b.png"],
        ["x/../../a.png", "x/b.png"],
        ["../../../../../../../../a.png", "b.png"],
        ["a.png"],
    ):
        found = list(output_names([Path(name) for name in names]).values())
        assert len(set(found)) == len(names)
        assert not any(Path(name).is_absolute() or ".." in Path(name).parts for name in found), found


# ---- the command line


@pytest.mark.parametrize("argv", [["fit", "x/y", "--seed", "abc"], ["fit", "--nope"], ["nope"], ["score"]])
def test_typing_errors_are_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(argv) == 2
    captured = capsys.readouterr()
    assert "Usage: adflow" in captured.err and captured.out == ""


def test_a_path_that_cannot_be_used_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for error, code in ((PermissionError(errno.EACCES, "Permission denied", "a/b"), 5),
                        (OSError(errno.EIO, "Input/output error", "a/b"), 3)):  # fmt: skip

        def fail(*_: object, error: OSError = error) -> None:
            raise error

        monkeypatch.setattr("adflow.methods.facts", fail)
        assert cli.run(["list", "methods"]) == code
        assert f"cannot use a/b: {error.strerror}" in capsys.readouterr().err
    assert cli.run(["fit", "x" * 5000]) in (2, 3)
    assert capsys.readouterr().err.count("error ") == 1


def test_a_name_is_not_obeyed_by_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["fit", "no\x1b[2Jsuch/\x07folder"]) == 3
    captured = capsys.readouterr()
    Talk().warn("skipped \x1b]0;title\x07.png")
    Talk().data({}, "a\x1b[31m.png\nb")
    both = captured.err + "".join(capsys.readouterr())
    assert "\x1b" not in both and "\x07" not in both and "a\\x1b[31m.png\nb" in both


def test_a_bar_shows_names_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream, talk = io.StringIO(), Talk()
    talk.err = Console(file=stream, force_terminal=True, width=200)
    monkeypatch.setattr(_console, "time", SimpleNamespace(monotonic=itertools.count(0, 10).__next__))
    with talk.progress("plates[old]") as step:
        step(1, 2, "fit[/b]")  # a closing tag that nothing opened would be an error of the markup
    assert "plates[old]: fit[/b]" in stream.getvalue()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_json_can_be_read_back_whatever_the_terminal_shows(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = {"name": "é–🙂" + os.fsdecode(b"\xff")}
    monkeypatch.setattr("adflow.methods.facts", lambda: [odd])
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    assert cli.run(["list", "methods", "--json"]) == 0
    stream.flush()
    assert json.loads(stream.buffer.getvalue().decode(encoding))["methods"][0]["name"] == odd["name"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_reader_that_has_gone_is_no_error(form: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "adflow", "list", "methods", *form]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 0 and "rror" not in done.stderr and "ignored" not in done.stderr, done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_on_a_full_disk_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "adflow", "list", "methods", "--json"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 5 and "the disk is full" in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_ctrl_c_is_said_and_has_its_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("adflow.methods.facts", stop)
    assert cli.run(["list", "methods"]) == 130
    assert "nothing half-written was left" in capsys.readouterr().err


def test_out_of_memory_names_the_settings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for error in (
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
        RuntimeError("std::bad_alloc"),
        RuntimeError("could not create a primitive"),
        RuntimeError("can't start new thread"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    ):

        def fail(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr("adflow.methods.facts", fail)
        assert cli.run(["list", "methods"]) == 5, error
        assert "--feature-memory" in capsys.readouterr().err
    for bug in (RuntimeError("shapes differ"), ImportError("no module")):
        monkeypatch.setattr("adflow.methods.facts", lambda bug=bug: (_ for _ in ()).throw(bug))
        with pytest.raises(type(bug)):
            cli.run(["list", "methods"])
    monkeypatch.setattr("adflow.methods.facts", lambda: (_ for _ in ()).throw(MemoryError()))
    monkeypatch.setattr("rich.console.Console.print", lambda *_, **__: (_ for _ in ()).throw(MemoryError()))
    assert cli.run(["list", "methods"]) == 5
    assert "out of memory" in capsys.readouterr().err
