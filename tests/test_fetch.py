"""Fetching: every way a server, a disk or a second process can misbehave, all on this machine."""

from __future__ import annotations

import hashlib
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from children import start_code
from servers import CONTENT, FAST, SHA, FileServer, file_at, left_behind

from adflow import _store, fetch, zoo
from adflow._lock import lock
from adflow.errors import AdflowError, ResourceError, UnavailableError

pytestmark = pytest.mark.usefixtures("own_home")


# ---- the right file comes, whatever happens on the way


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ([], {}),
        ([("status", 503)], {}),
        ([("status", 500), ("status", 502)], {}),
        ([("status", 429, {"Retry-After": "0"})], {}),
        ([("status", 429, {"Retry-After": "Thu, 01 Jan 1970 00:00:00 GMT"})], {}),
        ([("status", 429, {"Retry-After": "soon"})], {}),
        ([("cut", 0)], {}),
        ([("cut", 1), ("cut", 1), ("cut", 1), ("cut", 1), ("cut", 1)], {}),
        ([("cut", 100_000), ("status", 503), ("cut", 50_000)], {}),
        ([("cut", 100_000)], {"ranges": False}),
        ([("cut", 100_000)], {"etag": None}),
        ([("cut", 100_000)], {"etag": 'W/"weak"'}),
        ([("cut", 100_000)], {"length": False}),
        ([("stall", 100_000, 2.0)], {}),
        ([("cut", 100_000), ("range", 50_000)], {}),
        ([("cut", 100_000), ("status", 416)], {}),
        ([("slow", 64_000, 0.01)], {}),
    ],
    ids=lambda value: str(value)[:60],
)
def test_the_right_file_comes(files: FileServer, tmp_path: Path, script: list[Any], options: dict[str, Any]) -> None:
    files.add("/it", CONTENT, *script, **options)
    path = fetch.fetch(file_at(files.url("/it")), patience=FAST)
    assert path.read_bytes() == CONTENT
    assert path == tmp_path / "home" / "files" / SHA / "it.bin"
    assert left_behind(tmp_path / "home") == []


@pytest.mark.parametrize("tenth", range(10))
def test_cut_at_every_tenth_byte_and_gone_on_with(files: FileServer, tmp_path: Path, tenth: int) -> None:
    """A run that gives up keeps what came; the next run asks for the rest only."""
    at = tenth * len(CONTENT) // 10
    route = files.add("/it", CONTENT, ("cut", at), *[("cut", 0)] * 3)
    file = file_at(files.url("/it"))
    with pytest.raises(UnavailableError, match=r"broke off|closed|reset") as caught:
        fetch.fetch(file, patience=FAST)
    assert ("kept" in (caught.value.hint or "")) == (at > 0)
    part = _store.partial(file, tmp_path / "home")
    assert (part.stat().st_size if part.exists() else 0) == at
    assert fetch.fetch(file, patience=FAST).read_bytes() == CONTENT
    assert route.asked[-1] == (f"bytes={at}-" if at else None)


def test_a_redirect_is_followed(files: FileServer) -> None:
    files.add("/it", CONTENT)
    files.add("/old", b"", ("redirect", files.url("/it")))
    assert fetch.fetch(file_at(files.url("/old")), patience=FAST).read_bytes() == CONTENT


@pytest.mark.parametrize(
    "first",
    [
        [("status", 404)],
        [("status", 403)],
        [("status", 410)],
        [("status", 503)] * 3,
        [("html",)],
        [("cut", 1000)] + [("cut", 0)] * 3,
        [("stall", 0, 2.0)] * 3,
        [("replace", CONTENT[:-1] + b"x")],
        [("replace", CONTENT + b"x")],
        [("redirect", "ftp://127.0.0.1/it")],
    ],
    ids=["404", "403", "410", "503", "html", "cut", "stall", "wrong", "long", "ftp"],
)
def test_the_next_mirror_is_tried(files: FileServer, tmp_path: Path, first: list[Any]) -> None:
    files.add("/a", CONTENT, *first)
    files.add("/b", CONTENT)
    path = fetch.fetch(file_at(files.url("/a"), files.url("/b")), patience=FAST)
    assert path.read_bytes() == CONTENT
    assert left_behind(tmp_path / "home") == []


def test_a_part_of_one_mirror_is_finished_by_the_next(files: FileServer) -> None:
    files.add("/a", CONTENT, ("cut", 1000), *[("status", 503)] * 3)
    route = files.add("/b", CONTENT, etag='"other"')
    assert fetch.fetch(file_at(files.url("/a"), files.url("/b")), patience=FAST).read_bytes() == CONTENT
    assert route.asked == ["bytes=1000-"]


def test_a_file_that_changed_in_between_is_begun_anew(files: FileServer) -> None:
    """Half of the old version, half of the new: the hash notices, and one fresh start mends it."""
    old = bytes(len(CONTENT))
    route = files.add("/it", old, ("cut", 1000), ("replace", CONTENT), etag=None)
    assert fetch.fetch(file_at(files.url("/it")), patience=FAST).read_bytes() == CONTENT
    assert route.asked == [None, "bytes=1000-", None]


def test_if_range_spares_the_detour(files: FileServer) -> None:
    route = files.add("/it", bytes(len(CONTENT)), ("cut", 1000), ("replace", CONTENT), etag='"old"')
    assert fetch.fetch(file_at(files.url("/it")), patience=FAST).read_bytes() == CONTENT
    assert len(route.asked) == 2


def test_no_server_listens_then_the_mirror(files: FileServer) -> None:
    files.add("/it", CONTENT)
    dead = "http://127.0.0.1:9/it"
    assert fetch.fetch(file_at(dead, files.url("/it")), patience=FAST).read_bytes() == CONTENT


def test_what_is_here_is_not_fetched_again(files: FileServer) -> None:
    route = files.add("/it", CONTENT)
    file = file_at(files.url("/it"))
    assert fetch.fetch(file, patience=FAST) == fetch.fetch(file, no_network=True)
    assert len(route.asked) == 1


def test_progress_counts_bytes_to_the_end(files: FileServer) -> None:
    files.add("/it", CONTENT, ("cut", 1000))
    seen: list[tuple[int, int, str]] = []
    fetch.fetch(file_at(files.url("/it")), patience=FAST, progress=lambda *step: seen.append(step))
    assert seen[-1] == (len(CONTENT), len(CONTENT), "it.bin")
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)


def test_a_proxy_of_the_environment_is_used(files: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    files.add("/it", CONTENT)  # a proxy is asked for the whole address; this server looks at its path only
    monkeypatch.setenv("http_proxy", files.base)
    monkeypatch.delenv("NO_PROXY")
    assert fetch.fetch(file_at("http://far.invalid/it"), patience=FAST).read_bytes() == CONTENT


# ---- one clear error, and nothing left behind


@pytest.mark.parametrize(
    ("script", "size", "says"),
    [
        ([("status", 404)], len(CONTENT), "404 Not Found"),
        ([("status", 401)], len(CONTENT), "401"),
        ([("replace", CONTENT[:-1] + b"x")], len(CONTENT), "sha256 of it.bin is .*zoo.yaml says .*deleted"),
        (
            [("replace", CONTENT[:-1])],
            len(CONTENT),
            f"offers {len(CONTENT) - 1} bytes, expected {len(CONTENT)}",
        ),
        ([("replace", CONTENT[:-1])], None, "sha256 of it.bin is"),
        ([("html",)], None, "a web page instead of the file"),
        ([("stall", 0, 2.0)] * 3, None, "stalled for 0.3 s"),
        ([("redirect", "file:///etc/passwd")], None, "not allowed|not safe to follow"),
        ([("status", 429, {"Retry-After": "9999"})] * 3, None, "429 Too Many Requests"),
    ],
    ids=["404", "401", "hash", "short", "hash-unsized", "html", "stall", "file-redirect", "429"],
)
def test_one_clear_error(files: FileServer, tmp_path: Path, script: list[Any], size: int | None, says: str) -> None:
    files.add("/it", CONTENT, *script)
    with pytest.raises(UnavailableError, match=says) as caught:
        fetch.fetch(file_at(files.url("/it"), size=size), patience=FAST)
    assert "\n" not in str(caught.value)
    assert "127.0.0.1" in str(caught.value)
    assert left_behind(tmp_path / "home") == []


def test_a_server_that_never_stops_is_stopped(files: FileServer, tmp_path: Path) -> None:
    files.add("/it", CONTENT + b"more", length=False)
    with pytest.raises(UnavailableError, match="more than the 256000 bytes"):
        fetch.fetch(file_at(files.url("/it")), patience=FAST)


def test_every_source_is_named_with_its_reason(files: FileServer) -> None:
    files.add("/a", CONTENT, ("status", 404))
    with pytest.raises(UnavailableError, match=r"404 Not Found; .*refused"):
        fetch.fetch(file_at(files.url("/a"), "http://127.0.0.1:9/it"), patience=FAST)


@pytest.mark.parametrize("name", ["ADFLOW_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_asks_nobody(files: FileServer, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    route = files.add("/it", CONTENT)
    monkeypatch.setenv(name, "1")
    with pytest.raises(UnavailableError, match="off limits"):
        fetch.fetch(file_at(files.url("/it")), patience=FAST)
    assert route.asked == []


def test_a_full_disk_is_seen_before_the_first_byte(
    files: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    route = files.add("/it", CONTENT)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(_store.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ResourceError, match=r"needs 256 kB in .*, but only 1 kB are free"):
        fetch.fetch(file_at(files.url("/it")), patience=FAST)
    assert route.asked == []
    assert left_behind(tmp_path / "home") == []


def test_a_disk_that_fills_up_on_the_way(files: FileServer, small_disk: Path) -> None:
    big = bytes(3 << 20)
    files.add("/it", big, length=False)  # the size is not known, so nothing can be checked beforehand
    file = file_at(files.url("/it"), sha256=hashlib.sha256(big).hexdigest(), size=None)
    with pytest.raises(ResourceError, match="disk is full"):
        fetch.fetch(file, cache=small_disk, patience=FAST)
    assert left_behind(small_disk) == []
    assert shutil.disk_usage(small_disk).free > 900_000


def test_a_folder_that_may_not_be_written(files: FileServer, tmp_path: Path) -> None:
    files.add("/it", CONTENT)
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where a folder should be")
    with pytest.raises(AdflowError, match="cannot write"):
        fetch.fetch(file_at(files.url("/it")), cache=blocked, patience=FAST)


def test_a_read_only_file_system(files: FileServer, small_disk: Path) -> None:
    files.add("/it", CONTENT)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(ResourceError, match="read-only"):
        fetch.fetch(file_at(files.url("/it")), cache=small_disk, patience=FAST)


# ---- what vouches for a file


def test_a_file_nobody_verified_is_refused_then_pinned(files: FileServer, tmp_path: Path) -> None:
    files.add("/it", CONTENT)
    file = file_at(files.url("/it"), sha256=None, size=None)
    with pytest.raises(UnavailableError, match="nobody has verified") as caught:
        fetch.fetch(file, patience=FAST)
    assert "--unverified" in (caught.value.hint or "")
    path = fetch.fetch(file, unverified=True, patience=FAST)
    assert fetch.fetch(file) == path  # known by now
    shutil.rmtree(path.parent)
    files.add("/it", CONTENT + b"x")
    with pytest.raises(UnavailableError, match="its first download says"):
        fetch.fetch(file, unverified=True, patience=FAST)


def test_the_first_digits_of_a_hash_vouch_for_a_file(files: FileServer) -> None:
    files.add("/it", CONTENT)
    good = file_at(files.url("/it"), sha256=None, sha256_starts=SHA[:8])
    assert fetch.fetch(good, patience=FAST).read_bytes() == CONTENT
    bad = file_at(files.url("/it") + "?", sha256=None, sha256_starts="0" * 8)
    with pytest.raises(UnavailableError, match="starts with 00000000"):
        fetch.fetch(bad, patience=FAST)


def test_weights_inside_a_package_are_found_and_checked() -> None:
    file = zoo.load().backbones["lite0"].weights[0]
    assert fetch.fetch(file, no_network=True).stat().st_size == file.bytes


@pytest.mark.parametrize("module", ["no_such_package", "no_such_package.inner", ""])
def test_a_package_that_is_not_there_gives_way_to_the_next_source(files: FileServer, module: str) -> None:
    package = zoo.Source(package="no-such-package", module=module, path="it.bin")
    with pytest.raises(UnavailableError, match="no-such-package, which is not installed"):
        fetch.fetch(zoo.File("it.bin", (package,), SHA))
    assert _store.package_file(package) is None
    files.add("/it", CONTENT)
    file = zoo.File("it.bin", (package, zoo.Source(url=files.url("/it"))), SHA)
    assert fetch.fetch(file, patience=FAST).read_bytes() == CONTENT


def test_an_address_that_cannot_be_asked_is_one_clear_error(files: FileServer) -> None:
    with pytest.raises(UnavailableError, match="cannot be asked for it"):
        fetch.fetch(file_at(files.url("/größe.bin")), patience=FAST)


# ---- two processes, and kill -9

_CHILD = """
import sys
from pathlib import Path
from adflow import fetch, zoo
url, sha = sys.argv[1:]
file = zoo.File("it.bin", (zoo.Source(url=url),), sha)
print(fetch.fetch(file, say=lambda text: print(text, flush=True)))
"""


def _wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_two_processes_share_one_download(files: FileServer) -> None:
    go = threading.Event()
    route = files.add("/it", CONTENT, ("hold", 1000, go))
    first = start_code(_CHILD, files.url("/it"), SHA)
    _wait_for(lambda: len(route.asked) == 1)
    second = start_code(_CHILD, files.url("/it"), SHA)
    assert second.stdout is not None
    assert "another process is getting it.bin" in second.stdout.readline()
    go.set()
    ours, theirs = first.communicate(timeout=30)[0], second.communicate(timeout=30)[0]
    assert (first.returncode, second.returncode) == (0, 0)
    assert len(route.asked) == 1
    assert ours.splitlines()[-1] == theirs.splitlines()[-1]


def test_killed_in_the_middle_of_a_download(files: FileServer, tmp_path: Path) -> None:
    route = files.add("/it", CONTENT, ("stall", 100_000, 60.0))
    child = start_code(_CHILD, files.url("/it"), SHA)
    file = zoo.File("it.bin", (zoo.Source(url=files.url("/it")),), SHA)
    part = _store.partial(file, tmp_path / "home")
    _wait_for(lambda: part.exists() and part.stat().st_size == 100_000)
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=10)
    assert fetch.fetch(file, patience=FAST).read_bytes() == CONTENT
    assert route.asked == [None, "bytes=100000-"]
    assert left_behind(tmp_path / "home") == []


def test_a_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    code = "import sys,time\nfrom pathlib import Path\nfrom adflow._lock import lock\n"
    code += "with lock(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"
    child = start_code(code, str(tmp_path / "it.lock"))
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=10)
    took = threading.Event()
    with lock(tmp_path / "it.lock", waiting=took.set):
        assert not took.is_set()
