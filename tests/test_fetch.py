"""Download: every way a server, an archive, a disk or a second process can misbehave, all on this machine."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from miniatures import make_btad, make_lgg, make_mvtec, tar_of, zip_of
from servers import FileServer, HubServer, file_server, hub_server

from adflow import _store, fetch, zoo
from adflow._card import model_card
from adflow._lock import lock
from adflow._unpack import unpack
from adflow.errors import AdflowError, InputError, ResourceError, UnavailableError, UsageError
from adflow.tasks.download import download, plan, to_dict

CONTENT = bytes(range(256)) * 1000  # 256 kB
SHA = hashlib.sha256(CONTENT).hexdigest()
FAST = fetch.Patience(attempts=3, timeout=0.3, pause=0.0, longest=0.05)
REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def shared() -> Iterator[FileServer]:
    with file_server() as running:
        yield running


@pytest.fixture
def files(shared: FileServer) -> FileServer:
    shared.routes.clear()
    return shared


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the user's cache, zoo, proxies or tokens."""
    monkeypatch.setenv("ADFLOW_HOME", str(tmp_path / "home"))
    for name in ("ADFLOW_OFFLINE", "HF_HUB_OFFLINE", "ADFLOW_ZOO", "HF_TOKEN", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def file_at(*urls: str, sha256: str | None = SHA, size: int | None = len(CONTENT), **more: Any) -> zoo.File:
    return zoo.File("it.bin", tuple(zoo.Source(url=url) for url in urls), sha256, bytes=size, **more)


def left_behind(home: Path) -> list[str]:
    """Return every file of the cache that is neither a verified file, a receipt nor a lock."""
    found = [p.relative_to(home).as_posix() for p in home.rglob("*") if p.is_file()]
    return [name for name in found if not name.startswith(("files/", "locks/", "first_use/"))]


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


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    place = tmp_path / "small"
    place.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.name != "posix" or os.geteuid() != 0:
        pytest.skip("needs root to mount a small file system")
    ran = subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True)
    if ran.returncode:
        pytest.skip(f"cannot mount a small file system: {ran.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_up_on_the_way(files: FileServer, small_disk: Path) -> None:
    big = bytes(3 << 20)
    files.add("/it", big, length=False)  # the size is not known, so nothing can be checked beforehand
    file = file_at(files.url("/it"), sha256=hashlib.sha256(big).hexdigest(), size=None)
    with pytest.raises(ResourceError, match="disk is full"):
        fetch.fetch(file, cache=small_disk, patience=FAST)
    assert left_behind(small_disk) == []
    assert shutil.disk_usage(small_disk).free > 900_000


def test_unpacking_onto_a_full_disk(small_disk: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "big.bin").write_bytes(os.urandom(2 << 20))
    archive = tmp_path / "big.tar"
    archive.write_bytes(tar_of(source, ""))
    with pytest.raises(ResourceError, match="disk is full"):
        unpack(archive, small_disk / "out")
    assert list(small_disk.iterdir()) == []


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


# ---- two processes, and kill -9

_CHILD = """
import sys
from pathlib import Path
from adflow import fetch, zoo
url, sha = sys.argv[1:]
file = zoo.File("it.bin", (zoo.Source(url=url),), sha)
print(fetch.fetch(file, say=lambda text: print(text, flush=True)))
"""


def _child(code: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-c", code, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)


def _wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_two_processes_share_one_download(files: FileServer) -> None:
    route = files.add("/it", CONTENT, ("slow", 32_000, 0.25))
    first = _child(_CHILD, files.url("/it"), SHA)
    _wait_for(lambda: len(route.asked) == 1)
    second = _child(_CHILD, files.url("/it"), SHA)
    ours, theirs = first.communicate(timeout=30)[0], second.communicate(timeout=30)[0]
    assert (first.returncode, second.returncode) == (0, 0)
    assert len(route.asked) == 1
    assert "another process is getting it.bin" in theirs
    assert ours.splitlines()[-1] == theirs.splitlines()[-1]


def test_killed_in_the_middle_of_a_download(files: FileServer, tmp_path: Path) -> None:
    route = files.add("/it", CONTENT, ("stall", 100_000, 60.0))
    child = _child(_CHILD, files.url("/it"), SHA)
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
    child = _child(code, str(tmp_path / "it.lock"))
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=10)
    took = threading.Event()
    with lock(tmp_path / "it.lock", waiting=took.set):
        assert not took.is_set()


# ---- archives: honest ones


@pytest.mark.parametrize("kind", ["", "gz", "xz", "bz2", "zip"])
def test_honest_archives_come_out_whole_and_writable(tmp_path: Path, kind: str) -> None:
    source = make_mvtec(tmp_path / "source", ["cable"], train=2, good=1, bad=1)
    archive = tmp_path / "archive"
    archive.write_bytes(zip_of(source) if kind == "zip" else tar_of(source, kind))
    out = unpack(archive, tmp_path / "out")
    ours = {p.relative_to(source).as_posix(): p.read_bytes() for p in source.rglob("*") if p.is_file()}
    theirs = {name: (tmp_path / "out" / name).read_bytes() for name in out.names}
    assert theirs == ours
    assert out.bytes == sum(map(len, ours.values()))
    assert all((tmp_path / "out" / name).stat().st_mode & 0o200 for name in out.names)
    (tmp_path / "out" / "cable" / "new.txt").write_text("folders are writable, too")


def test_strip_and_only(tmp_path: Path) -> None:
    source = make_btad(tmp_path / "source", 2, 1, 1)
    archive = tmp_path / "archive"
    archive.write_bytes(zip_of(source, wrap="BTech_Dataset_transformed"))
    out = unpack(archive, tmp_path / "out", strip="BTech_Dataset_transformed", only="02")
    assert out.names and all(name.startswith("02/") for name in out.names)
    with pytest.raises(InputError, match="holds no file under 04/"):
        unpack(archive, tmp_path / "none", strip="BTech_Dataset_transformed", only="04")


# ---- archives: malicious and broken ones


def _tar(*members: tuple[str, bytes, dict[str, Any]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content, fields in (("fine.txt", b"fine", {}), *members):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in fields.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def _zip(*members: tuple[str, bytes, int]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content, mode in (("fine.txt", b"fine", 0o644), *members):
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, content)
    return out.getvalue()


def _encrypted() -> bytes:
    raw = bytearray(_zip(("secret", b"x", 0o644)))
    for mark, place in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        raw[raw.rfind(mark) + place] |= 1
    return bytes(raw)


LINK = {"linkname": "/etc/passwd"}
BOMB = bytes(100 << 20)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: _tar(("../out.txt", b"x", {})), "leads out of its folder"),
        (lambda: _tar(("a/../../out.txt", b"x", {})), "leads out of its folder"),
        (lambda: _tar(("/etc/out.txt", b"x", {})), "leads out of its folder"),
        (lambda: _tar(("C:/out.txt", b"x", {})), "not portable"),
        (lambda: _tar(("..\\out.txt", b"x", {})), "not portable"),
        (lambda: _tar(("a\nb", b"x", {})), "not portable"),
        (lambda: _tar(("link", b"", {"type": tarfile.SYMTYPE, **LINK})), "a link or device"),
        (lambda: _tar(("link", b"", {"type": tarfile.LNKTYPE, **LINK})), "a link or device"),
        (lambda: _tar(("pipe", b"", {"type": tarfile.FIFOTYPE})), "a link or device"),
        (lambda: _tar(("null", b"", {"type": tarfile.CHRTYPE})), "a link or device"),
        (lambda: _tar(("disk", b"", {"type": tarfile.BLKTYPE})), "a link or device"),
        (lambda: _tar(("Fine.TXT", b"x", {})), "one name on many systems"),
        (lambda: _tar(("fine.txt", b"x", {})), "one name on many systems"),
        (lambda: _tar(("fine.txt/a", b"x", {})), "as a file and as a folder"),
        (lambda: _tar(("zeros", BOMB, {})), "swells beyond"),
        (lambda: _tar(("a" * 2_000_000, b"x", {})), "a header of 20000.. bytes"),
        (lambda: _zip(("../out.txt", b"x", 0o644)), "leads out of its folder"),
        (lambda: _zip(("/etc/out.txt", b"x", 0o644)), "leads out of its folder"),
        (lambda: _zip(("link", b"/etc/passwd", 0o120777)), "a link or device"),
        (lambda: _zip(("FINE.txt", b"x", 0o644)), "one name on many systems"),
        (lambda: _zip(("zeros", BOMB, 0o644)), "swells beyond"),
        (_encrypted, "which is encrypted"),
        (lambda: _tar(("more", os.urandom(5000), {}))[:-2000], "is damaged"),
        (lambda: _zip(("more", os.urandom(5000), 0o644))[:-2000], "is damaged"),
        (lambda: b"PK\x03\x04" + bytes(100), "is damaged"),
        (lambda: b"not an archive at all", "is damaged"),
        (lambda: b"", "is damaged"),
        (lambda: _flipped(_zip(("more", os.urandom(5000), 0o644)), 200), "is damaged"),
    ],
)
def test_a_bad_archive_is_refused_whole(tmp_path: Path, make: Callable[[], bytes], says: str) -> None:
    archive = tmp_path / "bad"
    archive.write_bytes(make())
    with pytest.raises((InputError, ResourceError), match=says):
        unpack(archive, tmp_path / "deep" / "out", limit=50 << 20)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["bad", "deep"]


def _flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :]


# ---- data sets: fetch, unpack, count, move


def catalogue(
    files: FileServer, tmp_path: Path, *, verified: bool = True, sha256: str | None = "", train: int = 4
) -> zoo.Zoo:
    """Serve a two-class MVTec as one archive and as one per class; return the zoo that describes it."""
    source = tmp_path / "source"
    if not source.exists():
        make_mvtec(source, train=4, good=2, bad=2)
    archive = tar_of(source)
    (tmp_path / "one").mkdir(exist_ok=True)
    if not (tmp_path / "one" / "cable").exists():
        shutil.copytree(source / "cable", tmp_path / "one" / "cable")
    alone = tar_of(tmp_path / "one")
    files.add("/mvtec.tar.xz", archive)
    files.add("/cable.tar.xz", alone)
    one = {
        "name": "cable.tar.xz",
        "sources": [{"url": files.url("/cable.tar.xz")}],
        "sha256": hashlib.sha256(alone).hexdigest() if sha256 == "" else sha256,
        "bytes": len(alone),
    }
    whole = {
        "name": "mvtec.tar.xz",
        "sources": [{"url": files.url("/mvtec.tar.xz")}],
        "sha256": hashlib.sha256(archive).hexdigest(),
        "bytes": len(archive),
    }
    counts = {"train": train, "good": 2, "defective": 4, "masks": 4}
    entry = {
        "title": "Mini",
        "paper": {"title": "t", "year": 2019, "url": "https://example.org"},
        "licence": {"name": "CC0", "url": "https://example.org", "commercial": True, "note": "Free."},
        "layout": "mvtec",
        "archive": whole,
        "folders": {
            "train": ["{class}/train/good/*"],
            "good": ["{class}/test/good/*"],
            "defective": ["{class}/test/*/*", "!{class}/test/good/*"],
            "masks": ["{class}/ground_truth/*/*"],
        },
        "classes": {
            "cable": {"counts": counts, "verified": verified, "archive": one},
            "screw": {"counts": counts, "verified": verified},
        },
    }
    return zoo.Zoo(*zoo.decode({"version": 1, "datasets": {"mini": entry}}))


def _names(folder: Path) -> list[str]:
    return sorted(
        p.relative_to(folder).as_posix()
        for p in folder.rglob("*")
        if p.is_file() and ".adflow" not in p.relative_to(folder).parts
    )


def test_a_data_set_arrives_counted_and_readable(files: FileServer, tmp_path: Path) -> None:
    from adflow.data import mvtec

    known = catalogue(files, tmp_path)
    done = download("mini", catalogue=known, patience=FAST)
    place = tmp_path / "home" / "data" / "mini"
    assert (done.paths, done.already, done.notes) == ([place], False, [])
    assert _names(place) == _names(tmp_path / "source")
    assert [len(mvtec.read(place, c).train) for c in mvtec.classes(place)] == [4, 4]
    assert json.loads((place / ".adflow" / "all.json").read_text())["files"] == len(_names(place))
    assert not list((tmp_path / "home" / "files").iterdir())  # the archive is not kept
    assert download("mini", catalogue=known, patience=FAST).already
    assert download("mini/cable", catalogue=known, patience=FAST).already


def test_one_class_comes_from_its_own_archive(files: FileServer, tmp_path: Path) -> None:
    known = catalogue(files, tmp_path)
    download("mini/cable", catalogue=known, patience=FAST)
    assert files.routes["/mvtec.tar.xz"].asked == []
    assert sorted(p.name for p in (tmp_path / "home/data/mini").iterdir()) == [".adflow", "cable"]
    assert not download("mini", catalogue=known, patience=FAST).already
    assert download("mini/screw", catalogue=known, patience=FAST).already


def test_a_class_without_own_archive_takes_its_part_of_the_whole(files: FileServer, tmp_path: Path) -> None:
    download("mini/screw", catalogue=catalogue(files, tmp_path), patience=FAST)
    assert sorted(p.name for p in (tmp_path / "home/data/mini").iterdir()) == [".adflow", "screw"]


def test_an_unverified_class_archive_is_refused_with_the_way_out(files: FileServer, tmp_path: Path) -> None:
    known = catalogue(files, tmp_path, sha256=None)
    with pytest.raises(UnavailableError, match=r"cable\.tar\.xz") as caught:
        download("mini/cable", catalogue=known, patience=FAST)
    assert "--unverified" in (caught.value.hint or "")
    assert not download("mini/cable", catalogue=known, unverified=True, patience=FAST).already


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: (s / "cable/train/good/001.png").unlink(), "missing: cable/train/good/001.png"),
        (lambda s: (s / "cable/train/good/notes.txt").touch(), "extra: cable/train/good/notes.txt"),
        (lambda s: (s / "cable/ground_truth/scratch/001_mask.png").unlink(), "cable/test/scratch/001.png"),
        (lambda s: (s / "screw/test/combined/001.png").unlink(), "combined/001_mask.png|001.png"),
        (lambda s: shutil.rmtree(s / "screw/test/good"), "has 0 good files, expected 2; there is none"),
    ],
    ids=["missing", "extra", "mask", "image", "folder"],
)
def test_a_missing_or_extra_file_is_named(
    files: FileServer, tmp_path: Path, change: Callable[[Path], None], says: str
) -> None:
    make_mvtec(tmp_path / "source", train=4, good=2, bad=2)
    change(tmp_path / "source")
    with pytest.raises(InputError, match=says):
        download("mini", catalogue=catalogue(files, tmp_path), patience=FAST)
    assert _names(tmp_path / "home" / "data" / "mini") == []


def test_counts_that_are_only_quoted_are_told(files: FileServer, tmp_path: Path) -> None:
    known = catalogue(files, tmp_path, verified=False, train=5)
    notes = download("mini", catalogue=known, patience=FAST).notes
    assert len(notes) == 2 and "has 4 train files, expected 5" in notes[0]


def test_from_archive_folder_and_unpacked_data_set(files: FileServer, tmp_path: Path) -> None:
    known = catalogue(files, tmp_path)
    archive = tmp_path / "brought" / "mvtec.tar.xz"
    archive.parent.mkdir()
    archive.write_bytes(files.routes["/mvtec.tar.xz"].content)
    for i, source in enumerate((archive, archive.parent, tmp_path / "source", tmp_path)):
        if source == tmp_path:
            archive.unlink()
        done = download("mini", source=source, catalogue=known, root=tmp_path / f"root{i}", no_network=True)
        assert _names(done.paths[0]) == _names(tmp_path / "source"), source
    assert archive.parent.exists() and (tmp_path / "source").exists()
    assert files.routes["/mvtec.tar.xz"].asked == []


@pytest.mark.parametrize(
    ("content", "says"), [(b"damaged", "not an archive"), (None, "is not the file of the catalogue")]
)
def test_from_a_wrong_archive(files: FileServer, tmp_path: Path, content: bytes | None, says: str) -> None:
    known = catalogue(files, tmp_path)
    path = tmp_path / "mvtec.tar.xz"
    path.write_bytes(content or files.routes["/cable.tar.xz"].content)
    with pytest.raises(InputError, match=says):
        download("mini", source=path, catalogue=known)
    with pytest.raises(InputError, match="there is no file or folder"):
        download("mini", source=tmp_path / "nowhere", catalogue=known)
    with pytest.raises(InputError, match="holds neither"):
        download("mini", source=REPOSITORY / "adflow", catalogue=known)


def test_a_bomb_stops_at_the_declared_bytes(files: FileServer, tmp_path: Path) -> None:
    known = catalogue(files, tmp_path)
    entry = known.datasets["mini"]
    object.__setattr__(entry.archive, "unpacked", 1000)
    with pytest.raises(ResourceError, match="swells beyond the 1000 bytes"):
        download("mini", catalogue=known, patience=FAST)
    assert _names(tmp_path / "home" / "data" / "mini") == []


_UNPACK = """
import os, sys, time
from pathlib import Path
from adflow import _unpack, zoo
from adflow.tasks import download
sys.path.insert(0, sys.argv[1])
write, moved = _unpack._write, download._move
def slow(archive, content, target, total, allowed):
    print("unpacking", flush=True)
    time.sleep(0.05)
    return write(archive, content, target, total, allowed)
_unpack._write = slow
if sys.argv[2] == "move":
    replace = Path.replace
    def once(self, target):
        done = replace(self, target)
        if self.parent.name == "all.unpacking":
            print("moving", flush=True)
            time.sleep(60)
        return done
    Path.replace = once
    _unpack._write = write
download.download("mini", source=Path(sys.argv[3]), catalogue=zoo.load(Path(sys.argv[4])))
"""


@pytest.mark.parametrize("when", ["unpack", "move"])
def test_killed_in_the_middle_of_unpacking(files: FileServer, tmp_path: Path, when: str) -> None:
    known = catalogue(files, tmp_path)
    archive = tmp_path / "mvtec.tar.xz"
    archive.write_bytes(files.routes["/mvtec.tar.xz"].content)
    theirs = tmp_path / "zoo.yaml"
    plain = known.to_dict()["datasets"]["mini"]
    theirs.write_text(json.dumps({"datasets": {"mini": _as_written(plain)}}))
    child = _child(_UNPACK, str(REPOSITORY / "tests"), when, str(archive), str(theirs))
    assert child.stdout is not None
    for _ in range(5 if when == "unpack" else 1):
        assert child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=10)
    place = tmp_path / "home" / "data" / "mini"
    assert (place / ".adflow" / "all.unpacking").is_dir()
    done = download("mini", source=archive, catalogue=known)
    assert not done.already
    assert _names(place) == _names(tmp_path / "source")
    assert sorted(p.name for p in (place / ".adflow").iterdir()) == ["all.json", "lock"]


def test_stopped_between_the_last_move_and_the_receipt(
    files: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = catalogue(files, tmp_path)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("adflow.tasks.download.write_text", stop)
        download("mini", catalogue=known, patience=FAST)
    asked = len(files.routes["/mvtec.tar.xz"].asked)
    assert not download("mini", catalogue=known, patience=FAST).already
    place = tmp_path / "home" / "data" / "mini"
    assert _names(place) == _names(tmp_path / "source")
    assert sorted(p.name for p in (place / ".adflow").iterdir()) == ["all.json", "lock"]
    assert len(files.routes["/mvtec.tar.xz"].asked) == asked  # the archive was still there


def _as_written(entry: dict[str, Any]) -> dict[str, Any]:
    """Turn a plain entry back into what zoo.yaml holds: without names and empty fields."""

    def file(raw: dict[str, Any] | None) -> dict[str, Any] | None:
        if raw is None:
            return None
        kept = {key: raw[key] for key in ("name", "sha256", "bytes")}
        return {**kept, "sources": [{"url": source["url"]} for source in raw["sources"]]}

    classes = {k: {**v, "archive": file(v["archive"])} for k, v in entry["classes"].items()}
    rest = {key: value for key, value in entry.items() if key not in ("name", "see_also")}
    return {**rest, "archive": file(entry["archive"]), "classes": classes}


def test_a_dry_run_touches_nothing(files: FileServer, tmp_path: Path) -> None:
    from adflow.cli.download import describe

    known = catalogue(files, tmp_path)
    found = plan("mini/cable", catalogue=known)
    assert (found.here, found.bytes) == (False, len(files.routes["/cable.tar.xz"].content))
    assert found.destination == tmp_path / "home" / "data" / "mini" / "cable"
    text = describe(found)
    for part in (
        "checked by sha256",
        "CC0 (commercial use allowed). Free.",
        "4 train",
        str(found.destination),
    ):
        assert part in text
    assert json.loads(json.dumps(to_dict(found)))["counts"]["cable"]["train"] == 4
    assert not (tmp_path / "home").exists()
    assert all(route.asked == [] for route in files.routes.values())
    download("mini/cable", catalogue=known, patience=FAST)
    assert plan("mini/cable", catalogue=known).here


def test_every_shipped_entry_has_a_plan() -> None:
    known = zoo.load()
    for name in [*known.names(), "mvtec/cable", "stc/01"]:
        assert plan(name, catalogue=known).licence.note


def test_lgg_with_its_nested_copy_is_counted_once(files: FileServer, tmp_path: Path) -> None:
    make_lgg(tmp_path / "lgg")
    known = zoo.load()
    entry = known.datasets["lgg-mri"]
    object.__setattr__(entry, "classes", {"brain": zoo.DataClass({"slices": 45, "masks": 45}, True)})
    archive = tmp_path / "archive.zip"
    archive.write_bytes(zip_of(tmp_path / "lgg"))
    assert not download("lgg-mri", source=archive, catalogue=known, unverified=True).already


# ---- the hub


@pytest.fixture(scope="module")
def _hub_running() -> Iterator[HubServer]:
    with hub_server() as running:
        yield running


@pytest.fixture
def hub(_hub_running: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """The real client, pointed at a local hub through HF_ENDPOINT, with a cache of its own."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_ENDPOINT", _hub_running.base)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    # Xet, the client's other way for large files, needs a storage server of its own; LFS is the common one.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for held in (_hub_running.repos, _hub_running.log, _hub_running.gated, _hub_running.corrupt):
        held.clear()
    return _hub_running


def at_hub(revision: str, sha256: str | None = SHA, path: str = "model.bin", repo: str = "a/b") -> zoo.File:
    return zoo.File("it.bin", (zoo.Source(hub=repo, type="model", revision=revision, path=path),), sha256)


def test_a_file_of_the_hub_comes_verified(hub: HubServer, tmp_path: Path) -> None:
    hub.add("a/b", {"model.bin": CONTENT})
    path = fetch.fetch(at_hub("main"))
    assert path.read_bytes() == CONTENT
    assert left_behind(tmp_path / "home") == []
    asked = len(hub.log)
    assert fetch.fetch(at_hub("main")) == path and len(hub.log) == asked


def test_a_data_set_repository(hub: HubServer) -> None:
    hub.add("a/b", {"model.bin": CONTENT}, "dataset")
    source = zoo.Source(hub="a/b", type="dataset", revision="main", path="model.bin")
    assert fetch.fetch(zoo.File("it.bin", (source,), SHA)).read_bytes() == CONTENT


def test_a_pinned_commit_vouches_for_a_file_without_hash(hub: HubServer, tmp_path: Path) -> None:
    old = hub.add("a/b", {"model.bin": CONTENT})
    hub.add("a/b", {"model.bin": CONTENT[::-1]})
    assert fetch.fetch(at_hub(old, sha256=None)).read_bytes() == CONTENT
    with pytest.raises(UnavailableError, match="nobody has verified"):
        fetch.fetch(at_hub("main", sha256=None))
    shutil.rmtree(tmp_path / "home" / "files")
    shutil.rmtree(tmp_path / "home" / "first_use")
    shutil.rmtree(tmp_path / "hf")
    hub.corrupt["model.bin"] = 1
    with pytest.raises(UnavailableError, match=r"sha256 of it\.bin"):
        fetch.fetch(at_hub(old, sha256=None))
    assert fetch.fetch(at_hub(old, sha256=None)).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("file", "says"),
    [
        (at_hub("main", repo="a/none"), "does not exist, or is private"),
        (at_hub("f" * 40), "no such revision"),
        (at_hub("main", path="none.bin"), "no such file"),
        (at_hub("main", repo="a/gated"), "asks you to accept its terms"),
        (at_hub("main", sha256="0" * 64), "sha256 of it.bin is"),
    ],
    ids=["repo", "revision", "file", "gated", "hash"],
)
def test_the_hub_says_no_in_one_line(hub: HubServer, tmp_path: Path, file: zoo.File, says: str) -> None:
    hub.add("a/b", {"model.bin": CONTENT})
    hub.add("a/gated", {"model.bin": CONTENT})
    hub.gated.add("a/gated")
    with pytest.raises(UnavailableError, match=says) as caught:
        fetch.fetch(file)
    assert "\n" not in str(caught.value)
    assert left_behind(tmp_path / "home") == []


def test_a_hub_that_is_down_then_the_mirror(hub: HubServer, files: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client is patient for 20 s
    files.add("/it", CONTENT)
    both = (*at_hub("main").sources, zoo.Source(url=files.url("/it")))
    assert fetch.fetch(zoo.File("it.bin", both, SHA), patience=FAST).read_bytes() == CONTENT


def card() -> str:
    return model_card(
        name="cflow on mvtec/cable",
        method="cflow",
        backbone="lite0",
        dataset="mvtec/cable",
        licence="CC BY-NC-SA 4.0",
        licence_note="Research and teaching only.",
        measured={"image_auroc": 0.91234, "aupro": 0.9},
        provenance={"adflow": "0.1.0", "seed": 0},
    )


# The client's own LFS upload calls its HTTP library in a deprecated way.
@pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")
def test_a_detector_is_pushed_with_its_card_and_pulled(hub: HubServer, tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    path.write_bytes(CONTENT)  # larger than the hub keeps in git: it goes the way of large files
    commit = fetch.push_detector(path, "me/cable", card(), token=hub.token)
    assert any(line.startswith("PUT /lfs/") for line in hub.log)
    assert fetch.pull_detector("me/cable", revision=commit).read_bytes() == CONTENT
    assert fetch.pull_detector("me/cable", revision=commit, sha256=SHA).read_bytes() == CONTENT
    with pytest.raises(UnavailableError, match="sha256 of detector"):
        fetch.pull_detector("me/cable", sha256="0" * 64)
    again = fetch.push_detector(path, "me/cable", card() + "more\n", token=hub.token)
    assert again != commit
    done = download(f"hub:me/cable@{commit}")
    assert done.paths[0].read_bytes() == CONTENT


@pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")
def test_a_pulled_detector_scores_like_the_pushed_one(hub: HubServer, tmp_path: Path) -> None:
    import torch

    from adflow.cli import run
    from adflow.data import Images, mvtec
    from adflow.detector_file import load_detector

    data = make_mvtec(tmp_path / "data" / "mvtec", ["cable"], good=1, bad=1)
    where = ["--data-root", str(data.parent), "--runs", str(tmp_path / "runs"), "--quiet"]
    assert run(["fit", "mvtec/cable", "--method", "padim", "--size", "64", *where]) == 0
    (pushed,) = (tmp_path / "runs").rglob("detector.safetensors")
    commit = fetch.push_detector(pushed, "me/cable", card(), token=hub.token)
    pulled = fetch.pull_detector("me/cable", revision=commit)
    images = next(Images(mvtec.read(data, "cable").test, (64, 64)).batches(8))
    ours, theirs = (load_detector(path).score(images) for path in (pushed, pulled))
    assert pulled != pushed
    assert torch.equal(ours.map, theirs.map) and torch.equal(ours.image, theirs.image)


def test_the_card_reads_back_as_a_model_index(hub: HubServer) -> None:
    from huggingface_hub import ModelCard

    data = ModelCard(card()).data
    assert data.eval_results is not None
    found = {r.metric_name: (r.metric_type, r.metric_value, r.dataset_name) for r in data.eval_results}
    assert found["image AUROC"] == ("roc_auc", 0.9123, "mvtec/cable")
    head = data.to_dict()
    assert (head["license"], head["library_name"]) == ("cc-by-nc-sa-4.0", "adflow")


def test_publishing_without_a_token_is_refused_in_one_line(hub: HubServer, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="needs a token of the hub, none was found") as caught:
        fetch.push_detector(tmp_path / "mine", "me/cable", card())
    assert "HF_TOKEN" in (caught.value.hint or "")
    assert hub.log == []


def test_publishing_with_a_wrong_token_is_refused_in_one_line(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"x")
    with pytest.raises(UnavailableError, match="cannot publish to me/cable") as caught:
        fetch.push_detector(tmp_path / "mine", "me/cable", card(), token="hf_wrong")
    assert "\n" not in str(caught.value)


def test_names_from_the_hub_do_not_mix_with_from(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--from"):
        download("hub:a/b", source=tmp_path)
