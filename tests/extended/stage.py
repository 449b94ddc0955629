"""Commands that are killed, starved and refused, each in folders of its own, and what must hold for what they leave."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from children import Children, Run, tree
from miniatures import make_mvtec
from PIL import Image
from servers import FileServer

from adflow.detector_file import read_header

Count = Callable[[str, bool], None]

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


def serve_archive(server: FileServer, folder: Path) -> dict[str, str]:
    """Put an archive like MVTec's on a server, and write a catalogue that vouches for it."""
    make_mvtec(folder / "data", ["cable"], train=6)
    archive = folder / "cable.tar.xz"
    with tarfile.open(archive, "w:xz") as packed:
        packed.add(folder / "data" / "cable", "cable")
    content = archive.read_bytes()
    server.add("/cable.tar.xz", content)
    file = {
        "name": archive.name,
        "sources": [{"url": server.url("/cable.tar.xz")}],
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
    }
    counts = {"train": 6, "good": 3, "defective": 6, "masks": 6}
    zoo = {"datasets": {"mvtec": {"classes": {"cable": {"counts": counts, "archive": file}}}}}
    (folder / "zoo.yaml").write_text(json.dumps(zoo))
    return {"archive": str(archive), "zoo": str(folder / "zoo.yaml")}


@dataclass
class Stage:
    """One command, and the folders it writes to, which can be put back to what they were."""

    name: str
    places: dict[str, str]
    children: Children
    out: Path
    home: Path
    older: Path
    """Results of an earlier run, once :meth:`keep` was called."""

    def prepare(self) -> None:
        """Put the folders back: empty, or with the older results."""
        shutil.rmtree(self.out, ignore_errors=True)
        shutil.rmtree(self.home, ignore_errors=True)
        if self.older.exists():
            shutil.copytree(self.older, self.out)
            return
        self.out.mkdir(parents=True)
        if self.name == "calibrate":
            shutil.copyfile(Path(self.places["run"]) / "detector.safetensors", self.out / "d.safetensors")

    def keep(self) -> None:
        """From now on, what is there now is there before each run."""
        shutil.copytree(self.out, self.older)

    def run(self, *more: str, **how: Any) -> Run:
        """Run the command; ``how`` goes to :meth:`Children.run`."""
        argv = [word.format(out=self.out, **self.places) for word in COMMANDS[self.name]]
        env = {"env": {"ADFLOW_HOME": str(self.home)}} if self.name.startswith("download") else {}
        return self.children.run(*argv, *more, **env, **how)

    def state(self) -> dict[str, Any]:
        """What the files say, without times and costs."""
        return {name: timeless(name, content) for name, content in tree(self.out).items()}


# What things cost, and when; sums over files that hold these.
COSTS = {"created", "date", "seconds", "fit_seconds", "ms_per_image", "milliseconds", "cost", "command", "check"}


def timeless(name: str, content: bytes) -> Any:
    """What a file says, without times and costs."""
    if name.endswith(".safetensors"):
        with tempfile.NamedTemporaryFile() as copy:
            Path(copy.name).write_bytes(content)
            with safetensors.safe_open(copy.name, framework="np") as stored:
                tensors = {key: stored.get_tensor(key).tobytes() for key in stored.keys()}  # noqa: SIM118
                return tensors, without_costs(json.loads(stored.metadata()["adflow"]))
    if name.endswith(".json"):
        return without_costs(json.loads(content))
    if re.search(r"(^|/)(table|report)\.\w+$", name):
        return "there"  # fit time is one of its columns; the others are in table.json
    return content


def without_costs(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_costs(v) for k, v in value.items() if k not in COSTS and k != "detector_sha256"}
    return [without_costs(item) for item in value] if isinstance(value, list) else value


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


def spread(count: int, most: int) -> list[int]:
    """At most ``most`` + 1 of the numbers 0 to ``count`` - 1, evenly, first and last among them."""
    parts = min(most, count - 1)
    return sorted({round(i * (count - 1) / parts) for i in range(parts + 1)}) if parts else [0]
