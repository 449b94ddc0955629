"""Folders and file names that nobody expects, and two processes at one place."""

from __future__ import annotations

import csv
import html.parser
import json
import os
import time
from pathlib import Path

import pytest
from children import Children, left_over, tree
from servers import Route, file_server

from adflow.data import list_images, open_data
from adflow.detector_file import load_detector
from adflow.errors import AdflowError

from .stage import Count

NAMES = [
    "plain", "with space", " leading", "trailing ", "comma,semi;colon", 'double"quote', "single'quote", "tab\there",
    "new\nline", "carriage\rreturn", "escape\x1b[31mred", "bell\x07", "<script>alert(1)<script>",
    "<img src=x onerror=alert(1)>", "&amp;&#x27;", "=1+1", "+1", "-1", "@SUM(A1)", "=cmd|' calc'!A0",
    "äöü", "e\u0301", "é", "日本", "🙂", "\u202egnp", "UPPER", "upper", "100%", "%s%n", "{out}", "$HOME",
    "`id`", "$(id)", "a" * 200, "back\\slash", "dots..", "CON", "nul", "\ufeffbom",
    "[bold]rich", "[link=x]y", "[red]", "*", "?", "|pipe", "#hash", "~tilde", "--option",
]  # fmt: skip


def folder_of(names: list[str], place: Path, picture: bytes) -> list[Path]:
    place.mkdir(parents=True, exist_ok=True)
    found = []
    for name in dict.fromkeys(names):
        path = place / f"{name}.png"
        path.write_bytes(picture)
        found.append(path)
    stray = os.fsencode(place) + b"/caf\xe9 \xff.png"  # not text in any encoding we know of
    Path(os.fsdecode(stray)).write_bytes(picture)
    return [*found, Path(os.fsdecode(stray))]


class _Tags(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, list[tuple[str, str | None]]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, attrs))


def test_names_of_every_kind(children: Children, parts: Path, run: Path, tmp_path: Path, count: Count) -> None:
    """As file names, and as the names of kinds of defect: every table can be read back, nothing is run or lost."""
    picture = (parts / "test" / "good" / "000.png").read_bytes()
    odd = tmp_path / "odd 'parts' <b>,\n="
    files = folder_of(NAMES, odd, picture)
    out = tmp_path / "out"
    score = children.run("score", odd, "--model", run, "--out", out, "--top", "0", fault={"log": True})
    assert score.code == 0, score.err
    assert "\x1b" not in score.out and "\x07" not in score.out, "a name must not reach the terminal as it is"
    assert all(Path(path).is_relative_to(out) for _, path in score.events), "written outside of --out"
    rows = [json.loads(line) for line in (out / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["image"] for row in rows} == {str(path) for path in files}
    with (out / "scores.csv").open(encoding="utf-8", newline="") as stream:
        table = list(csv.DictReader(stream))
    assert len(table) == len(files) and all(row["verdict"] in ("good", "defect") for row in table)

    cut = children.run(
        "segment", odd, "--model", run, "--threshold", "1", "--out", tmp_path / "cut", fault={"log": True}
    )
    assert cut.code == 0, cut.err
    assert all(Path(path).is_relative_to(tmp_path / "cut") for _, path in cut.events)
    with (tmp_path / "cut" / "images.jsonl").open(encoding="utf-8") as stream:
        masks = {row["image"]: row["mask"] for row in map(json.loads, stream)}
    assert len({mask.casefold() for mask in masks.values()}) == len(files), "two images share a mask"
    assert all((tmp_path / "cut" / mask).is_file() for mask in masks.values())

    # In a data set: names of files and of kinds, on the page and in all tables.
    data = tmp_path / "data"
    for name in ("train/good", "test/good"):
        folder_of([n for n in NAMES if "/" not in n][:12], data / name, picture)
    for kind in ("<script>alert(1)<script>", "=1+1", 'a"b', "kind,1", "new\nline"):
        folder_of(NAMES[10:20], data / "test" / kind, (parts / "test" / "spot" / "000.png").read_bytes())
    seen = children.run(
        "evaluate", data, "--model", run, "--out", tmp_path / "eva", "--per-defect", fault={"log": True}
    )
    assert seen.code == 0, seen.err
    assert all(Path(path).is_relative_to(tmp_path / "eva") for _, path in seen.events)
    page = _Tags()
    page.feed((tmp_path / "eva" / "report.html").read_text(encoding="utf-8"))
    assert not any(key == "onerror" for _, attributes in page.tags for key, _ in attributes)
    plain = children.run("evaluate", parts, "--model", run, "--out", tmp_path / "plain")
    assert plain.code == 0, plain.err
    usual = _Tags()
    usual.feed((tmp_path / "plain" / "report.html").read_text(encoding="utf-8"))
    scripts = [sum(tag == "script" for tag, _ in one.tags) for one in (page, usual)]
    assert scripts[0] == scripts[1], "a name became a script"
    for name in tree(tmp_path / "eva"):
        if name.endswith(".csv"):
            with (tmp_path / "eva" / name).open(encoding="utf-8", newline="") as stream:
                cells = [cell for row in csv.reader(stream) for cell in row]
            assert not any(cell[:1] in ("=", "+", "@") or (cell[:1] == "-" and not _number(cell)) for cell in cells)
    for _ in files:
        count("file names of every kind", True)


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def test_relative_and_absolute_paths_together(
    children: Children, parts: Path, run: Path, tmp_path: Path, count: Count
) -> None:
    good = parts / "test" / "good"
    found = children.run(
        "segment",
        "000.png",
        good / "001.png",
        "--model",
        run,
        "--threshold",
        "1",
        "--out",
        tmp_path / "o",
        cwd=str(good),
    )
    assert found.code == 0, found.err
    assert len(list((tmp_path / "o" / "masks").rglob("*.png"))) == 2
    count("odd folders", True)


def test_links_that_loop_and_folders_that_may_not_be_read(
    children: Children, parts: Path, run: Path, tmp_path: Path, root_user: None, count: Count
) -> None:
    picture = (parts / "test" / "good" / "000.png").read_bytes()
    root = tmp_path / "loop"
    folder_of(["a"], root / "x" / "y", picture)
    (root / "x" / "y" / "up").symlink_to(root)
    (root / "self").symlink_to(root / "self")
    (root / "gone.png").symlink_to(root / "nothing.png")
    (root / "b.png").symlink_to(root / "x" / "y" / "a.png")
    os.mkfifo(root / "pipe.png")
    (root / "folder.png").mkdir()
    assert len(list_images(root)) == 3
    found = children.run("score", root, "--model", run, "--out", tmp_path / "o", timeout=30)
    assert found.code == 0, found.err
    count("odd folders", True)
    closed = tmp_path / "closed"
    folder_of(["a"], closed, picture)
    for mode, place in ((0o000, closed), (0o000, closed / "a.png"), (0o400, closed), (0o100, closed)):
        closed.chmod(0o755)
        place.chmod(mode)
        for argv in (["score", closed], ["fit", closed], ["score", closed / "a.png"], ["evaluate", closed]):
            options = [] if argv[0] == "fit" else ["--model", run]
            tmp_path.chmod(0o777)
            found = children.run(*argv, *options, "--out", tmp_path / "p", fault={"user": 65534})
            assert found.clean, (oct(mode), place, argv, found.code, found.err)
            count("odd folders", True)
        place.chmod(0o755)


@pytest.mark.parametrize("what", ["images", "other files", "folders"])
def test_a_hundred_thousand_entries(what: str, tmp_path: Path, count: Count) -> None:
    place = tmp_path / "many"
    place.mkdir()
    for i in range(100_000):
        if what == "folders":
            (place / f"{i}").mkdir()
        else:
            os.close(os.open(place / f"{i}.{'png' if what == 'images' else 'txt'}", os.O_CREAT | os.O_WRONLY))
    began = time.process_time()
    try:
        found = len(open_data(place)[0].train)
    except AdflowError:
        found = 0
    assert found == (100_000 if what == "images" else 0)
    # 6 s were measured; the loose limit catches work that grows with the square.
    assert time.process_time() - began < 30
    count("folders of 100,000 entries", True)


# ---- two processes


def test_two_fits_to_one_place(children: Children, parts: Path, tmp_path: Path, count: Count) -> None:
    for _ in range(6):
        out = tmp_path / "one"
        argv = ["fit", parts, "-m", "padim", "--size", "64", "--out", out, "--seed"]
        pair = [children.start(*argv, seed) for seed in (0, 1)]
        ended = [children.wait(number) for number in pair]
        assert sorted(one.code for one in ended) in ([0, 0], [0, 5]), [one.err for one in ended]
        for one in ended:
            assert one.code == 0 or "another process is writing to" in one.err
        summary = json.loads((out / "fit.json").read_text())
        assert load_detector(out / "detector.safetensors").provenance["seed"] == summary["seed"]
        assert left_over(out) == []
        count("two processes at one place", True)


def test_two_downloads_of_one_entry(children: Children, places: dict[str, str], tmp_path: Path, count: Count) -> None:
    for i in range(4):
        out = tmp_path / str(i)
        home = {"ADFLOW_HOME": str(tmp_path / f"home{i}")}
        argv = ["download", "mvtec/cable", "--zoo", places["zoo"], "--data-root", out]
        pair = [children.start(*argv, env=home) for _ in range(2)]
        assert [children.wait(number).code for number in pair] == [0, 0]
        assert len([name for name in tree(out) if name.endswith(".png")]) == 21
        count("two processes at one place", True)


def test_scoring_while_the_detector_is_replaced(children: Children, parts: Path, tmp_path: Path, count: Count) -> None:
    out = tmp_path / "run"
    fit = ["fit", parts, "-m", "padim", "--size", "64", "--out", out, "--seed"]
    expected = {}
    for seed in (0, 1):
        assert children.run(*fit, seed).code == 0
        result = children.run("score", parts / "test", "--model", out, "--out", tmp_path / "s", "--json")
        expected[seed] = [row["score"] for row in result.json()["rows"]]
    for i in range(12):
        fitting = children.start(*fit, i % 2)
        if i % 3:  # at some of the rounds in the middle of the fit, at others from its start
            time.sleep(0.1 * i)
        result = children.run("score", parts / "test", "--model", out, "--out", tmp_path / "s", "--json")
        assert result.code == 0, result.err
        assert [row["score"] for row in result.json()["rows"]] in expected.values()
        assert children.wait(fitting).code == 0
        count("score while fit replaces the detector", True)


def test_a_folder_of_results_is_not_shared(
    children: Children, parts: Path, run: Path, tmp_path: Path, count: Count
) -> None:
    for command in (["segment", parts / "test", "--threshold", "1"], ["score", parts / "test"], ["evaluate", parts]):
        pair = [children.start(*command, "--model", run, "--out", tmp_path / command[0]) for _ in range(2)]
        ended = [children.wait(number) for number in pair]
        assert all(one.clean and one.code in (0, 5) for one in ended) and any(one.code == 0 for one in ended)
        assert left_over(tmp_path / command[0]) == []
        count("two processes at one place", True)


def test_servers_that_answer_nonsense(children: Children, tmp_path: Path, count: Count) -> None:
    scripts = [[("status", code, {})] * 9 for code in (400, 403, 404, 410, 500, 503)]
    scripts += [[("cut", 10)] * 20, [("html",)] * 9, [("replace", b"x" * 100)] * 9, [("range", 7)] * 9]
    with file_server() as server:
        for i, script in enumerate(scripts):
            server.routes[f"/{i}"] = Route(bytes(1000), list(script))
            entry = {"name": "w.pth", "sources": [{"url": server.url(f"/{i}")}], "sha256": "0" * 64, "bytes": 1000}
            (tmp_path / "zoo.yaml").write_text(json.dumps({"backbones": {"resnet18": {"weights": [entry]}}}))
            home = {"ADFLOW_HOME": str(tmp_path / "home")}
            found = children.run("download", "resnet18", "--zoo", tmp_path / "zoo.yaml", env=home, timeout=90)
            assert found.clean and found.code in (3, 4), (script[0], found.err)
            assert not list((tmp_path / "home" / "files").rglob("*.pth"))
            count("servers that answer nonsense", True)
