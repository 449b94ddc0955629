"""A full disk and a folder that may not be written to, at every single write, and a disk that is really full."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from children import Children, left_over, small_disk, tree

from .test_kill import COMMANDS, all_whole, places

Count = Callable[[str, bool], None]
__all__ = ["places"]
MOST = 12  # writes of one command that are made to fail, spread evenly


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "fit --resume"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES], ids=["full", "forbidden"])
def test_every_write_may_fail(
    name: str, number: int, children: Children, places: dict[str, str], run: Path, tmp_path: Path, count: Count
) -> None:
    home, out = tmp_path / "home", tmp_path / "out"
    where = {"env": {"ADFLOW_HOME": str(home)}} if name.startswith("download") else {}
    argv = [word.format(out=out, **places) for word in COMMANDS[name]]

    def prepare() -> None:
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(home, ignore_errors=True)
        out.mkdir()
        if name == "calibrate":
            shutil.copyfile(run / "detector.safetensors", out / "d.safetensors")

    prepare()
    undisturbed = children.run(*argv, fault={"log": True}, **where)
    assert undisturbed.code == 0
    count_of = len(undisturbed.events)
    for at in sorted({round(i * (count_of - 1) / min(MOST, count_of)) for i in range(min(MOST, count_of) + 1)}):
        prepare()
        fault = {"at": at, "errno": number, "stays": at % 2 == 0}
        found = children.run(*argv, fault=fault, **where)
        assert found.clean, (fault, undisturbed.events[at], found.code, found.err)
        # Some failures do not matter (a lock file that cannot be removed); one that ends the command says why.
        if found.code:
            words = "disk is full" if number == errno.ENOSPC else "no permission"
            assert words in found.err, (fault, undisturbed.events[at], found.err)
        all_whole(out)
        assert [p for p in left_over(out) if ".lock" not in p] == [], (fault, undisturbed.events[at])
        count(f"{'full disk' if number == errno.ENOSPC else 'no permission'} at one write", True)


@pytest.mark.parametrize("name", ["fit", "score", "segment", "evaluate", "export", "calibrate", "download --from"])
@pytest.mark.parametrize("size", ["8k", "32k", "128k", "512k", "2m"])
def test_a_disk_that_is_really_full(
    name: str, size: str, children: Children, places: dict[str, str], run: Path, tmp_path: Path, root_user: None,
    count: Count,
) -> None:  # fmt: skip
    with small_disk(tmp_path / "disk", size) as disk:
        out = disk / "out"
        argv = [word.format(out=out, **places) for word in COMMANDS[name]]
        if name == "calibrate":
            out.mkdir()
            try:
                shutil.copyfile(run / "detector.safetensors", out / "d.safetensors")
            except OSError:
                pytest.skip("not even the old detector fits")
        found = children.run(*argv, env={"ADFLOW_HOME": str(tmp_path / "home")})
        assert found.clean, (found.code, found.err)
        assert found.code in (0, 5), found.err
        if found.code:
            assert "full" in found.err or "are free" in found.err, found.err
        all_whole(out) if out.exists() else None
        assert left_over(disk) == []
        count("a disk that is really full", True)


@pytest.mark.parametrize("name", ["fit", "score", "segment", "evaluate", "export"])
def test_files_limited_in_length(
    name: str, children: Children, places: dict[str, str], run: Path, tmp_path: Path, count: Count
) -> None:
    # What a command says goes to files, too: it must be short, and the limit not nothing.
    argv = [word.format(out=tmp_path / "out", **places) for word in COMMANDS[name]] + ["--quiet"]
    for length in (3000, 10_000, 30_000, 100_000):
        found = children.run(*argv, fault={"file_bytes": length})
        assert found.clean and found.code in (0, 5), (length, found.code, found.err)
        assert left_over(tmp_path / "out") == []
        count("files limited in length", True)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


@pytest.mark.parametrize("name", ["fit", "score", "segment", "evaluate", "export", "download --from"])
def test_folders_of_another_user(
    name: str, children: Children, places: dict[str, str], parts: Path, tmp_path: Path, root_user: None, count: Count
) -> None:
    """As a user without rights: the output, and the cache, belong to somebody else."""
    out = tmp_path / "out"
    out.mkdir(mode=0o755)
    argv = [word.format(out=out, **places) for word in COMMANDS[name]]
    home = {"ADFLOW_HOME": str(out / "home")} if name.startswith("download") else {}
    found = children.run(*argv, fault={"user": 65534}, env=home)
    assert found.clean and found.code in (3, 5), (found.code, found.err)
    assert tree(out) == {}
    count("folders of another user", True)


def test_little_memory(children: Children, parts: Path, run: Path, tmp_path: Path, count: Count) -> None:
    """Ever less memory: a result, or one line that names what helps."""
    # With next to nothing Python itself waits for ever for a thread that could not begin.
    for more in (64, 128, 256, 512, 1024):
        for argv in (
            ["fit", parts, "-m", "padim", "--size", "512", "--out", tmp_path / "fit"],
            ["fit", parts, "-m", "patchcore", "--size", "256", "--out", tmp_path / "fit"],
            ["score", parts / "test", "--model", run, "--out", tmp_path / "score"],
            ["segment", parts / "test", "--model", run, "--threshold", "1", "--out", tmp_path / "segment"],
        ):
            found = children.run(*argv, fault={"more_memory": more << 20})
            assert found.clean, (more, argv, found.code, found.err)
            if found.code:
                assert found.code == 5 and "memory" in found.err, (more, argv, found.err)
            assert left_over(tmp_path) == []
            count("little memory", True)
