"""A full disk and a folder that may not be written to, at every single write, and a disk that is really full."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from children import Children, left_over, small_disk, tree

from .stage import COMMANDS, Count, Stage, all_whole, spread

MOST = 12  # a command is stopped at this many of its writes, and one more, spread evenly
WORDS = {errno.ENOSPC: "the disk is full", errno.EACCES: "no permission"}


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "fit --resume"])
@pytest.mark.parametrize("number", WORDS, ids=["full", "forbidden"])
@pytest.mark.parametrize("older", [False, True], ids=["nothing there", "results there"])
def test_every_write_may_fail(name: str, number: int, older: bool, stage: Callable[[str], Stage], count: Count) -> None:
    """One clear line; nothing half-written; what an earlier run wrote is still there and says what it said."""
    if older and name == "download":
        pytest.skip("does nothing where all is done")
    command = stage(name)
    more = ["--fresh"] if older and name.startswith("evaluate") else []
    command.prepare()
    undisturbed = command.run(fault={"log": True})
    assert undisturbed.code == 0, undisturbed.err
    wanted = command.state()
    if older:
        command.keep()
        undisturbed = command.run(*more, fault={"log": True})
        assert undisturbed.code == 0 and command.state() == wanted
    for at in spread(len(undisturbed.events), MOST):
        command.prepare()
        # A folder that could be moved away a moment ago can be moved back.
        stays = at % 2 == 0 and undisturbed.events[at][0] != "os.rename"
        fault = {"at": at, "errno": number, "stays": stays}
        found = command.run(*more, fault=fault)
        where = (fault, undisturbed.events[at], found.code, found.err)
        assert found.clean, where
        # Some failures do not matter (a lock file that cannot be removed); one that ends the command says why.
        assert not found.code or WORDS[number] in found.err, where
        all_whole(command.out)
        assert [path for path in left_over(command.out) if ".lock" not in path] == [], where
        state = command.state()
        # Of several cells one that fails becomes a row of the table, which says why.
        said = {key for key in wanted if found.code and name == "evaluate --method" and key.startswith("table.")}
        if older or not found.code:
            changed = [key for key in wanted if key not in said and state.get(key) != wanted[key]]
            assert changed == [], (changed, where)
        count(f"{WORDS[number]} at one write", True)


@pytest.mark.parametrize("name", ["fit", "score", "segment", "evaluate", "export", "calibrate", "download --from"])
@pytest.mark.parametrize("free", [8, 32, 128, 512, 2048])
def test_a_disk_that_is_really_full(
    name: str, free: int, stage: Callable[[str], Stage], run: Path, tmp_path: Path, root_user: None, count: Count
) -> None:
    """``free`` KiB and, where it is changed, the old detector."""
    held = (run / "detector.safetensors").stat().st_size // 1024 + 8 if name == "calibrate" else 0
    with small_disk(tmp_path / "disk", f"{held + free}k") as disk:
        command = replace(stage(name), out=disk / "out")
        command.prepare()
        before = command.state()
        found = command.run()
        assert found.clean, (found.code, found.err)
        assert found.code in (0, 5), found.err
        if found.code:
            assert "full" in found.err or "are free" in found.err, found.err
            assert {key: command.state().get(key) for key in before} == before
        all_whole(command.out)
        assert left_over(disk) == []
        count("a disk that is really full", True)


@pytest.mark.parametrize("name", ["fit", "score", "segment", "evaluate", "export", "calibrate"])
def test_files_limited_in_length(name: str, stage: Callable[[str], Stage], count: Count) -> None:
    command = stage(name)
    for length in (3000, 10_000, 30_000, 100_000):
        command.prepare()
        # What a command says goes to files, too: it must be short, and the limit not nothing.
        found = command.run("--quiet", fault={"file_bytes": length})
        assert found.clean and found.code in (0, 5), (length, found.code, found.err)
        assert not found.code or "larger than this system allows" in found.err, (length, found.err)
        all_whole(command.out)
        assert left_over(command.out) == []
        count("files limited in length", True)


@pytest.mark.parametrize("name", ["fit", "score", "segment", "evaluate", "export", "calibrate", "download --from"])
def test_folders_of_another_user(name: str, stage: Callable[[str], Stage], root_user: None, count: Count) -> None:
    """As a user without rights: the output, and the cache, belong to somebody else."""
    command = stage(name)
    command = replace(command, home=command.out / "home")
    command.prepare()
    before = tree(command.out)
    found = command.run(fault={"user": 65534})
    assert found.clean and found.code in (3, 5), (found.code, found.err)
    assert tree(command.out) == before
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
            ["evaluate", parts, "--model", run, "--out", tmp_path / "evaluate"],
        ):
            found = children.run(*argv, fault={"more_memory": more << 20})
            assert found.clean, (more, argv, found.code, found.err)
            if found.code:
                assert found.code == 5 and "memory" in found.err, (more, argv, found.err)
            assert left_over(tmp_path) == []
            count("little memory", True)
