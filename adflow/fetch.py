"""Verified, resumable download: the only file that touches the network.

A file of the catalogue comes from the first of its sources that has it. What came is kept when the line
breaks and gone on with; it gets its name in the cache only after its size and sha256 are right. Hub
repositories go through huggingface-hub (``HF_ENDPOINT``, ``HF_TOKEN`` and its cache are honoured),
everything else through urllib, whose proxies come from the environment (``HTTPS_PROXY``, ``NO_PROXY``).
No network: ``ADFLOW_OFFLINE`` or ``HF_HUB_OFFLINE``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import email.utils
import http.client
import os
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from adflow import __version__, _store
from adflow._clock import Progress
from adflow._files import sha256_of, write_error
from adflow._lock import lock
from adflow.errors import ResourceError, UnavailableError
from adflow.zoo import File, Source, home

_CHUNK = 1 << 18
# What else, beside its own errors, huggingface-hub raises for trouble on the line.
_TROUBLE = (OSError, ValueError, RuntimeError)
# These pass by themselves; every other 4xx does not, and the next source is tried at once.
_PASSING = {408, 425, 429, 500, 502, 503, 504}


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to try.

    Attributes:
        attempts: tries in a row that bring no new byte before a source is given up.
        timeout: seconds without a byte after which a connection counts as stalled.
        pause: seconds before the second try; doubles with every further one.
        longest: no pause is longer, whatever a server asks for.
    """

    attempts: int = 5
    timeout: float = 30.0
    pause: float = 1.0
    longest: float = 60.0


class _SourceError(Exception):
    """A source did not give the file; the text says why, ``gone`` that trying it again is pointless."""

    def __init__(self, reason: str, gone: bool = True, wait: float | None = None) -> None:
        super().__init__(reason)
        self.gone = gone
        self.wait = wait


def offline(flag: bool = False) -> bool:
    """Say whether the network is off limits: by ``flag``, ``ADFLOW_OFFLINE`` or ``HF_HUB_OFFLINE``."""
    words = (os.environ.get(name, "") for name in ("ADFLOW_OFFLINE", "HF_HUB_OFFLINE"))
    return flag or any(word.strip().lower() in ("1", "true", "yes", "on") for word in words)


def fetch(
    file: File,
    *,
    cache: Path | None = None,
    no_network: bool = False,
    unverified: bool = False,
    patience: Patience | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> Path:
    """Return ``file`` on this machine, verified; download it if it is not in the cache.

    Args:
        file: from the catalogue.
        cache: folder to keep it in; default `zoo.home`.
        no_network: use only what is here.
        unverified: accept a file that nobody vouches for; its hash is written down and checked ever after.
        patience: how long to try.
        progress: called with (bytes here, bytes in all or 0, file name).
        say: told what the user should know while it waits.

    Raises:
        UnavailableError: no source has it, it is not verified, or the network is off limits.
        ResourceError: the disk is full or not writable.
    """
    cache = cache if cache is not None else home()
    others = [source for source in file.sources if not source.package]
    for source in file.sources:
        if source.package:
            try:
                return _store.from_package(file, source)
            except UnavailableError:
                if not others and source is file.sources[-1]:
                    raise
    found = _store.kept(file, cache)
    if found is not None:
        return found
    if _store.known_hash(file, cache) is None and file.trust == "not verified" and not unverified:
        raise UnavailableError(
            f"nobody has verified {file.name} yet: the catalogue has no sha256 for it",
            hint="Add --unverified to take it as it comes (its hash is written down and checked ever after), "
            "or bring your own copy: --from FILE.",
        )
    if offline(no_network):
        raise UnavailableError(
            f"{file.name} is not on this machine, and the network is off limits",
            hint="Bring it with --from FILE, or run without --offline, ADFLOW_OFFLINE and HF_HUB_OFFLINE.",
        )
    waiting = None if say is None else lambda: say(f"another process is getting {file.name}; waiting for it")
    with lock(cache / "locks" / f"{_store.key(file)}.lock", waiting):
        found = _store.kept(file, cache)
        return found if found is not None else _download(file, cache, patience or Patience(), progress)


def _download(file: File, cache: Path, patience: Patience, progress: Progress | None) -> Path:
    """Try every source in turn."""
    part = _store.partial(file, cache)
    sha256 = _store.known_hash(file, cache)
    if file.bytes is not None:
        _store.room(part.parent, file.bytes - _store.length(part), file.name)
    reasons = []
    for source in (one for one in file.sources if not one.package):
        where = f"hub {source.hub}" if source.hub else urllib.parse.urlsplit(source.url or "").netloc
        # Pieces may be of two versions of the file: a wrong hash then deserves one try from the start.
        for last in (False, True):
            pieced = False
            try:
                if source.hub:
                    promised = _from_hub(source, part, sha256)
                else:
                    promised = None
                    pieced = _get(source.url or "", part, file.bytes, sha256 is not None, patience, progress)
                found, wrong = _store.fault(part, file, sha256 or promised)
            except _SourceError as error:
                reasons.append(f"{where}: {error}")
                break
            except ResourceError:  # no room or no right: leave nothing behind
                shutil.rmtree(part.parent, ignore_errors=True)
                raise
            if wrong is None:
                return _store.keep(part, file, found, str(source), cache)
            shutil.rmtree(part.parent, ignore_errors=True)
            _store.partial(file, cache)
            if last or not pieced:
                reasons.append(f"{where}: {wrong}; deleted")
                break
    here = _store.length(part)
    if not here:
        shutil.rmtree(part.parent, ignore_errors=True)
    kept = f" The {_store.size_text(here)} that came are kept: the same command goes on from there." if here else ""
    raise UnavailableError(
        f"cannot get {file.name}: {'; '.join(reasons)}",
        hint=f"Try again later, or bring it with --from FILE.{kept}",
    )


# ---- plain HTTP


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects, but never from https to an open line, and to nothing but http and https."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        opened = req.full_url.startswith("https://") and not newurl.startswith("https://")
        if opened or not newurl.startswith(("https://", "http://")):
            raise _SourceError(f"redirects to {newurl}, which is not safe to follow")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _get(url: str, part: Path, size: int | None, same: bool, patience: Patience, progress: Progress | None) -> bool:
    """Bring ``part`` up to the whole content of ``url``, starting after the bytes it already holds.

    Args:
        url: http or https.
        part: the partial file; beside it a JSON file remembers which version of which URL it is.
        size: bytes of the whole file, None where it is not known.
        same: every source holds the same bytes (the hash is known), so a part begun elsewhere may go on here.
        patience: how long to try.
        progress: called with (bytes here, bytes in all or 0, file name).

    Returns:
        Whether the content was put together from more than one answer.
    """
    fruitless = 0
    while True:
        before = _store.length(part)
        try:
            _request(url, part, size, same, patience.timeout, progress)
            return before > 0
        except _SourceError as error:
            if error.gone:
                raise
            failure = error
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            failure = _SourceError(_reason(error, patience.timeout))
        except ValueError as error:  # letters that no request may hold
            raise _SourceError(f"cannot be asked for it: {error}") from error
        fruitless = 0 if _store.length(part) > before else fruitless + 1
        if fruitless >= patience.attempts:
            raise _SourceError(str(failure))
        pause = patience.pause * 2 ** max(0, fruitless - 1)
        time.sleep(min(patience.longest, max(pause, failure.wait or 0.0)))


def _request(url: str, part: Path, size: int | None, same: bool, timeout: float, progress: Progress | None) -> None:
    """Make one request and write what it brings."""
    memo = _store.memo(part)
    mine = memo.get("url") == url
    have = _store.length(part) if mine or same else 0
    if have and have == size:
        return
    headers = {"User-Agent": f"adflow/{__version__}", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if mine and memo.get("etag"):
            headers["If-Range"] = memo["etag"]
    opener = urllib.request.build_opener(_Redirects)
    try:
        answer = opener.open(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416 and have:
                # Nothing comes after what we have: it is whole, or it is not this file. The hash tells.
                if size is None and same:
                    return
                part.unlink(missing_ok=True)
                raise _SourceError("refused to go on where we stopped", gone=False) from error
            wait = _retry_after(error.headers.get("Retry-After"))
            raise _SourceError(f"{error.code} {error.reason}", error.code not in _PASSING, wait) from error
    with answer:
        if answer.headers.get_content_type() == "text/html":
            raise _SourceError("answered with a web page instead of the file")
        if answer.status == 206:
            begins = (answer.headers.get("Content-Range") or "").removeprefix("bytes ").split("-")[0]
            if begins != str(have):
                part.unlink(missing_ok=True)
                raise _SourceError("answered with another range than asked for", gone=False)
        else:
            have = 0
        length = answer.headers.get("Content-Length") or ""
        whole = have + int(length) if length.isdigit() else size
        if size is not None and whole != size:
            raise _SourceError(f"offers {whole} bytes, expected {size}")
        if whole is not None and size is None:
            _store.room(part.parent, whole - have, part.name.removesuffix(".part"))
        _store.remember(part, url, answer.headers.get("ETag"))
        _copy(answer, part, have, whole, progress)


def _copy(answer: Any, part: Path, have: int, whole: int | None, progress: Progress | None) -> None:
    """Write the body after the first ``have`` bytes of ``part``."""
    try:
        out = part.open("r+b" if have else "wb")
    except OSError as error:
        raise write_error(part, error) from error
    with out:
        out.truncate(have)
        out.seek(have)
        while chunk := answer.read1(_CHUNK):
            have += len(chunk)
            if whole is not None and have > whole:
                raise _SourceError(f"sends more than the {whole} bytes expected")
            try:
                out.write(chunk)
                out.flush()
            except OSError as error:
                raise write_error(part, error) from error
            if progress is not None:
                progress(have, whole or 0, part.name.removesuffix(".part"))
    if whole is not None and have < whole:
        raise _SourceError(f"broke off after {have} of {whole} bytes", gone=False)


def _reason(error: Exception, timeout: float) -> str:
    inner = getattr(error, "reason", error)
    return f"stalled for {timeout:g} s" if isinstance(inner, TimeoutError) else str(inner) or type(inner).__name__


def _retry_after(value: str | None) -> float | None:
    """Read a Retry-After header: seconds, or a date."""
    try:
        if value is None or value.strip().isdigit():
            return float(value) if value else None
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


# ---- Hugging Face hub


@contextlib.contextmanager
def _hub(what: str) -> Iterator[Any]:
    """Yield huggingface_hub; turn every complaint of its client into one line."""
    import huggingface_hub
    from huggingface_hub import errors

    utils: Any = import_module("huggingface_hub.utils")
    # Its own bars would mix with ours; they are put back as they were.
    bars = not utils.are_progress_bars_disabled()
    if bars:
        utils.disable_progress_bars()
    try:
        yield huggingface_hub
    except errors.GatedRepoError as error:
        raise _SourceError(f"{what} asks you to accept its terms on its page, and for a token (HF_TOKEN)") from error
    except errors.RepositoryNotFoundError as error:
        raise _SourceError(f"{what} does not exist, or is private and needs a token (HF_TOKEN)") from error
    except errors.RevisionNotFoundError as error:
        raise _SourceError(f"{what}: no such revision") from error
    except errors.LocalEntryNotFoundError as error:
        raise _SourceError("the hub cannot be reached") from error
    except errors.EntryNotFoundError as error:
        raise _SourceError(f"{what}: no such file") from error
    except (errors.HfHubHTTPError, getattr(errors, "HTTPError", OSError), *_TROUBLE) as error:
        raise _SourceError(f"{what}: {(str(error) or type(error).__name__).splitlines()[0]}") from error
    finally:
        if bars:
            utils.enable_progress_bars()


def endpoint() -> str | None:
    """Return the hub to talk to: ``HF_ENDPOINT``, read now; None for the public one."""
    return os.environ.get("HF_ENDPOINT") or None


def _from_hub(source: Source, part: Path, sha256: str | None) -> str | None:
    """Put a file of a hub repository into ``part``; return the sha256 that a pinned commit promises."""
    where = f"{source.hub}@{source.revision}"
    with _hub(where) as hub:
        promised = None
        if sha256 is None and source.pinned:
            url = hub.hf_hub_url(
                source.hub, source.path, repo_type=source.type, revision=source.revision, endpoint=endpoint()
            )
            etag = hub.get_hf_file_metadata(url).etag or ""
            # Large files carry their sha256, small ones git's own hash.
            promised = etag if len(etag) == 64 else None
        path = hub.hf_hub_download(
            source.hub,
            source.path,
            repo_type=source.type,
            revision=source.revision,
            endpoint=endpoint(),
            library_name="adflow",
            library_version=__version__,
        )
        blob = Path(path).resolve()
        _store.forget(part)
        try:
            os.link(blob, part)
        except OSError:
            _store.room(part.parent, blob.stat().st_size, source.path or "")
            shutil.copyfile(blob, part)
    wanted = sha256 or promised
    if wanted and sha256_of(part) != wanted:
        blob.unlink(missing_ok=True)  # else the client would hand out the same wrong bytes for ever
    return promised


def pull_detector(
    repo_id: str,
    *,
    revision: str = "main",
    name: str = "detector.safetensors",
    sha256: str | None = None,
    cache: Path | None = None,
    no_network: bool = False,
) -> Path:
    """Return the detector of the hub repository ``repo_id``.

    A detector file cannot run code and carries its own digest, so a hash is not asked for; give one to
    pin it.

    Raises:
        UnavailableError: there is no such repository, revision or file, or the network is off limits.
    """
    source = Source(hub=repo_id, type="model", revision=revision, path=name)
    if offline(no_network):
        raise UnavailableError(f"{source} is not fetched: the network is off limits", hint="Run without --offline.")
    cache = cache if cache is not None else home()
    file = File(name, (source,), sha256)
    with lock(cache / "locks" / f"{_store.key(file)}.lock"):
        part = _store.partial(file, cache)
        try:
            _from_hub(source, part, sha256)
        except _SourceError as error:
            shutil.rmtree(part.parent, ignore_errors=True)
            raise UnavailableError(f"cannot get {source}: {error}") from error
        found, wrong = _store.fault(part, file, sha256)
        if wrong is not None:
            shutil.rmtree(part.parent, ignore_errors=True)
            raise UnavailableError(f"{source}: {wrong}; deleted")
        return _store.keep(part, dataclasses.replace(file, sha256=found), found, str(source), cache)


def push_detector(file: Path, repo_id: str, card: str, *, token: str | None = None, private: bool = False) -> str:
    """Write a detector and its model card to the hub repository ``repo_id``; make it if it is not there.

    Args:
        file: the detector; named ``detector.safetensors`` there.
        repo_id: ``owner/name``.
        card: text of the README, see `adflow._card.model_card`.
        token: default ``HF_TOKEN``, else the one that ``hf auth login`` keeps.
        private: make a new repository private.

    Returns:
        The commit, to pin the detector by.

    Raises:
        UnavailableError: no token, no right, no network.
    """
    if offline():
        raise UnavailableError("publishing needs the network, which is off limits", hint="Unset ADFLOW_OFFLINE.")
    try:
        with _hub(repo_id) as hub:
            token = token or os.environ.get("HF_TOKEN") or hub.get_token()
            if not token:
                raise UnavailableError(
                    f"publishing to {repo_id} needs a token of the hub, none was found",
                    hint="Set HF_TOKEN, or run `hf auth login`.",
                )
            api = hub.HfApi(endpoint=endpoint(), token=token, library_name="adflow", library_version=__version__)
            api.create_repo(repo_id, private=private, exist_ok=True)
            add = hub.CommitOperationAdd
            done = api.create_commit(
                repo_id,
                [add("detector.safetensors", str(file)), add("README.md", card.encode())],
                commit_message="Detector and model card",
            )
            return str(done.oid)
    except _SourceError as error:
        raise UnavailableError(f"cannot publish to {repo_id}: {error}") from error
