"""SIGKILL at every write and at random moments: the rerun ends with the bytes of an undisturbed run.

Two ways: at the n-th time a command is about to touch the file system (every state between two writes), and after a
random time (inside writes and computations).
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
from children import Children, left_over, tree
from miniatures import make_mvtec
from PIL import Image
from servers import Route, file_server

from adflow.detector_file import read_header

Count = Callable[[str, bool], None]
# Random kills of each command, besides one at every write (at most MOST of them, spread evenly).
RANDOM, MOST = 4, 6

FIT = ["fit", "{parts}", "-m", "cflow", "--set", "steps=30", "--size", "64", "--out", "{out}/run"]
COMMANDS: dict[str, list[str]] = {
    "download": ["download", "mvtec/cable", "--zoo", "{zoo}", "--data-root", "{out}"],
    "download --from": ["download", "mvtec/cable", "--from", "{archive}", "--zoo", "{zoo}", "--data-root", "{out}"],
    "fit": FIT,
    "fit --resume": [*FIT, "--resume"],
    "score": ["score", "{parts}/test", "--model", "{run}", "--out", "{out}"],
    "segment": ["segment", "{parts}/test", "--model", "{run}", "--threshold", "1", "--out", "{out}"],
    "evaluate": ["evaluate", "{parts}", "--model", "{run}", "--out", "{out}"],
    "evaluate --method": ["evaluate", "{parts}", "-m", "padim", "--seeds", "0,1", "--size", "64", "--out", "{out}"],
    "export": ["export", "{run}", "--format", "onnx", "--images", "{parts}/test", "--out", "{out}/onnx"],
    "calibrate": ["calibrate", "{out}/d.safetensors", "{parts}/test/good"],
}


@pytest.fixture(scope="module")
def places(parts: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """An archive like MVTec's on a server, and a catalogue entry that vouches for it."""
    folder = tmp_path_factory.mktemp("archive")
    make_mvtec(folder / "data", ["cable"], train=6)
    archive = folder / "cable.tar.xz"
    with tarfile.open(archive, "w:xz") as packed:
        packed.add(folder / "data" / "cable", "cable")
    content = archive.read_bytes()
    with file_server() as server:
        server.routes["/cable.tar.xz"] = Route(content)
        file = {
            "name": archive.name,
            "sources": [{"url": server.url("/cable.tar.xz")}],
            "sha256": hashlib.sha256(content).hexdigest(),
            "bytes": len(content),
        }
        counts = {"train": 6, "good": 3, "defective": 6, "masks": 6}
        zoo = {"datasets": {"mvtec": {"classes": {"cable": {"counts": counts, "archive": file}}}}}
        (folder / "zoo.yaml").write_text(json.dumps(zoo))
        yield {"archive": str(archive), "zoo": str(folder / "zoo.yaml"), "parts": str(parts), "run": str(run)}


# What things cost, and when; sums over files that hold these.
COSTS = {"created", "date", "seconds", "fit_seconds", "ms_per_image", "milliseconds", "cost", "command", "check"}


def timeless(name: str, content: bytes, scratch: Path) -> Any:
    """What a file says, without times and costs."""
    if name.endswith(".safetensors"):
        (scratch / "t.safetensors").write_bytes(content)
        with safetensors.safe_open(scratch / "t.safetensors", framework="np") as stored:
            tensors = {key: stored.get_tensor(key).tobytes() for key in stored.keys()}  # noqa: SIM118
            return tensors, _without(json.loads(stored.metadata()["adflow"]))
    if name.endswith(".json"):
        return _without(json.loads(content))
    if re.search(r"(^|/)(table|report)\.\w+$", name):
        return "there"  # fit time is one of its columns; the others are in table.json
    return content


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without(v) for k, v in value.items() if k not in COSTS and k != "detector_sha256"}
    return [_without(item) for item in value] if isinstance(value, list) else value


def all_whole(out: Path) -> None:
    """Whatever stands under a good name can be read to its end."""
    for name, content in tree(out).items():
        if "/." in f"/{name}":
            continue
        if name.endswith(".jsonl"):
            assert not content or content.endswith(b"\n")
            [json.loads(line) for line in content.splitlines()]
        elif name.endswith(".json"):
            json.loads(content)
        elif name.endswith((".png", ".jpg")):
            Image.open(io.BytesIO(content)).load()
        elif name.endswith(".safetensors"):
            read_header(out / name)
        elif name.endswith(".html"):
            assert content.rstrip().endswith(b"</html>")


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_and_run_again(
    name: str, children: Children, places: dict[str, str], run: Path, tmp_path: Path, count: Count
) -> None:
    home, out, bundle = tmp_path / "home", tmp_path / "out", tmp_path / "bundle"
    where = {"env": {"ADFLOW_HOME": str(home)}} if name.startswith("download") else {}
    argv = [word.format(out=out, **places) for word in COMMANDS[name]]

    def prepare() -> None:
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(home, ignore_errors=True)
        out.mkdir()
        if name == "calibrate":
            shutil.copyfile(run / "detector.safetensors", out / "d.safetensors")
        if name == "export" and bundle.exists():  # an older bundle is there
            shutil.copytree(bundle, out / "onnx")

    def state() -> dict[str, Any]:
        return {key: timeless(key, content, tmp_path) for key, content in tree(out).items()}

    prepare()
    undisturbed = children.run(*argv, fault={"log": True}, **where)
    assert undisturbed.code == 0, undisturbed.err
    wanted = state()
    assert wanted and left_over(out) == []
    if name == "export":
        shutil.copytree(out / "onnx", bundle)
    last = len(undisturbed.events) - 1
    steps = sorted({round(i * last / min(MOST, last)) for i in range(min(MOST, last) + 1)})
    moments = random.Random(name)
    kills: list[dict[str, Any]] = [{"fault": {"at": at, "kill": True}} for at in steps]
    kills += [{"kill_after": moments.uniform(0.02, undisturbed.seconds)} for _ in range(RANDOM)]
    for kill in kills:
        prepare()
        killed = children.run(*argv, **kill, **where)
        assert killed.code in (-9, 0), killed.err
        all_whole(out)
        again = children.run(*argv, **where)
        assert again.code == 0, (kill, again.err)
        found = state()
        assert set(found) == set(wanted), kill
        assert found == wanted, (kill, [key for key in wanted if found[key] != wanted[key]])
        assert left_over(out) == [], kill
        if killed.code == -9:
            count(f"SIGKILL during {name}", True)
