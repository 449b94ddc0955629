"""Unpacking: honest archives come out whole, and of the others nothing does."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from miniatures import make_btad, make_mvtec, tar_of, zip_of

from adflow._unpack import unpack
from adflow.errors import InputError, ResourceError

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


def test_folders_without_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adflow._unpack.MEMBERS", 10)
    archive = tmp_path / "folders"
    archive.write_bytes(_tar(*((f"{i}", b"", {"type": tarfile.DIRTYPE}) for i in range(10))))
    with pytest.raises(InputError, match="more than 10 files and folders"):
        unpack(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unpacking_onto_a_full_disk(small_disk: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "big.bin").write_bytes(os.urandom(2 << 20))
    archive = tmp_path / "big.tar"
    archive.write_bytes(tar_of(source, ""))
    with pytest.raises(ResourceError, match="disk is full"):
        unpack(archive, small_disk / "out")
    assert list(small_disk.iterdir()) == []
