"""Data sets: fetched, unpacked beside, counted, moved; stopped anywhere and finished."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from children import start_code
from miniatures import make_lgg, make_mvtec, tar_of, zip_of
from servers import FAST, FileServer

from adflow import zoo
from adflow.errors import InputError, ResourceError, UnavailableError
from adflow.tasks.download import download, plan, to_dict

pytestmark = pytest.mark.usefixtures("own_home")


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
        (lambda s: (s / "cable/ground_truth/scratch/001_mask.png").unlink(), "the mask of cable/test/scratch/001.png"),
        (lambda s: (s / "screw/test/combined/001.png").unlink(), "of screw/ground_truth/combined/001_mask.png"),
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
        download("mini", source=Path(__file__).parents[1] / "adflow", catalogue=known)


def test_a_bomb_stops_at_the_declared_bytes(files: FileServer, tmp_path: Path) -> None:
    known = catalogue(files, tmp_path)
    entry = known.datasets["mini"]
    object.__setattr__(entry.archive, "unpacked", 1000)
    with pytest.raises(ResourceError, match="swells beyond the 1000 bytes"):
        download("mini", catalogue=known, patience=FAST)
    assert _names(tmp_path / "home" / "data" / "mini") == []


_UNPACK = """
import sys, time
from pathlib import Path
from adflow import _unpack, zoo
from adflow.tasks import download
write = _unpack._write
def slow(archive, content, target, total, allowed):
    print("unpacking", flush=True)
    time.sleep(0.05)
    return write(archive, content, target, total, allowed)
_unpack._write = slow
if sys.argv[1] == "move":
    replace = Path.replace
    def once(self, target):
        done = replace(self, target)
        if self.parent.name == "all.unpacking":
            print("moving", flush=True)
            time.sleep(60)
        return done
    Path.replace = once
    _unpack._write = write
download.download("mini", source=Path(sys.argv[2]), catalogue=zoo.load(Path(sys.argv[3])))
"""


@pytest.mark.parametrize("when", ["unpack", "move"])
def test_killed_in_the_middle_of_unpacking(files: FileServer, tmp_path: Path, when: str) -> None:
    known = catalogue(files, tmp_path)
    archive = tmp_path / "mvtec.tar.xz"
    archive.write_bytes(files.routes["/mvtec.tar.xz"].content)
    theirs = tmp_path / "zoo.yaml"
    plain = known.to_dict()["datasets"]["mini"]
    theirs.write_text(json.dumps({"datasets": {"mini": _as_written(plain)}}))
    child = start_code(_UNPACK, when, str(archive), str(theirs))
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
