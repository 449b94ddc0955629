"""The hub: what the real client fetches, pushes and pulls."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from miniatures import make_mvtec
from servers import CONTENT, FAST, SHA, FileServer, HubServer, hub_server, left_behind

from adflow import fetch, zoo
from adflow._card import model_card
from adflow.errors import UnavailableError, UsageError
from adflow.tasks.download import download, plan

pytestmark = pytest.mark.usefixtures("own_home")


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


def test_names_from_the_hub_mix_with_neither_from_nor_dry_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--from"):
        download("hub:a/b", source=tmp_path)
    with pytest.raises(UsageError, match="only the hub knows"):
        plan("hub:a/b")
