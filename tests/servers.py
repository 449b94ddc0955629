"""Servers for the tests: a file server that can misbehave, and a hub that the real client talks to."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from adflow import fetch, zoo

CONTENT = bytes(range(256)) * 1000  # 256 kB
SHA = hashlib.sha256(CONTENT).hexdigest()
FAST = fetch.Patience(attempts=3, timeout=0.3, pause=0.0, longest=0.05)
LARGE = 1 << 16  # the hub keeps larger files apart (LFS) and knows their sha256


@dataclass
class Route:
    """One file and what happens to the requests for it, in order; after the script all goes well.

    Steps: ``("status", code, headers)``, ``("cut", bytes)`` (of this answer), ``("stall", bytes, seconds)``,
    ``("slow", bytes, seconds)`` (pieces and pauses), ``("hold", bytes, event)`` (the rest once the event is set),
    ``("redirect", url)``, ``("html",)``, ``("replace", content)``, ``("range", first)``, ``("ok",)``.
    """

    content: bytes
    script: list[tuple[Any, ...]] = field(default_factory=list)
    etag: str | None = '"v1"'
    ranges: bool = True
    length: bool = True
    asked: list[str | None] = field(default_factory=list)  # the Range header of every request


class _Quiet(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def reply(self, code: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


class _Files(_Quiet):
    def do_GET(self) -> None:
        route: Route | None = self.server.routes.get(unquote(urlsplit(self.path).path))
        if route is None:
            return self.reply(404)
        route.asked.append(self.headers.get("Range"))
        step = route.script.pop(0) if route.script else ("ok",)
        if step[0] == "status":
            return self.reply(step[1], b"no", step[2] if len(step) > 2 else {})
        if step[0] == "redirect":
            return self.reply(302, b"", {"Location": step[1]})
        if step[0] == "html":
            return self.reply(200, b"<html>sign in</html>", {"Content-Type": "text/html; charset=utf-8"})
        if step[0] == "replace":
            route.content, route.etag = step[1], f'"{len(step[1])}-new"'
        first = 0
        asked = self.headers.get("Range")
        same = self.headers.get("If-Range") in (None, route.etag)
        if asked and route.ranges and same:
            first = int(asked.removeprefix("bytes=").rstrip("-"))
            if first >= len(route.content):
                return self.reply(416, b"", {"Content-Range": f"bytes */{len(route.content)}"})
        if step[0] == "range":
            first = step[1]
        body = route.content[first:]
        self.send_response(206 if first or step[0] == "range" else 200)
        self.send_header("Content-Type", "application/octet-stream")
        if route.etag:
            self.send_header("ETag", route.etag)
        if first or step[0] == "range":
            self.send_header("Content-Range", f"bytes {first}-{len(route.content) - 1}/{len(route.content)}")
        if route.length:
            self.send_header("Content-Length", str(len(body)))
        else:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        if step[0] == "cut":
            self.wfile.write(body[: step[1]])
            return self.hang_up()
        if step[0] == "stall":
            self.wfile.write(body[: step[1]])
            self.wfile.flush()
            self.server.stopping.wait(step[2])
            return self.hang_up()
        if step[0] == "hold":
            self.wfile.write(body[: step[1]])
            self.wfile.flush()
            step[2].wait(30)
            body = body[step[1] :]
        if step[0] == "slow":
            for start in range(0, len(body), step[1]):
                self.wfile.write(body[start : start + step[1]])
                self.wfile.flush()
                time.sleep(step[2])
            return None
        self.wfile.write(body)
        return None


class FileServer:
    """Files by path; `url` gives the address of one."""

    def __init__(self, server: Any) -> None:
        self._server = server
        self.routes: dict[str, Route] = server.routes
        self.base = f"http://127.0.0.1:{server.server_address[1]}"

    def add(self, path: str, content: bytes, *script: tuple[Any, ...], **options: Any) -> Route:
        route = Route(content, list(script), **options)
        self.routes[path] = route
        return route

    def url(self, path: str) -> str:
        return self.base + path


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that hang up are part of the play


@contextmanager
def file_server() -> Iterator[FileServer]:
    """Run a file server for the length of the body."""
    server: Any = _Server(("127.0.0.1", 0), _Files)
    server.routes, server.stopping = {}, threading.Event()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield FileServer(server)
    finally:
        server.stopping.set()
        server.shutdown()
        server.server_close()


# -- a hub


@dataclass
class Repo:
    """Commits of one repository, newest last: (40-digit id, files)."""

    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)

    def commit(self, files: dict[str, bytes]) -> str:
        whole = {**(self.commits[-1][1] if self.commits else {}), **files}
        text = json.dumps([len(self.commits), sorted((k, hashlib.sha1(v).hexdigest()) for k, v in whole.items())])
        oid = hashlib.sha1(text.encode()).hexdigest()
        self.commits.append((oid, whole))
        return oid

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision == "main" and self.commits:
            return self.commits[-1]
        return next((one for one in self.commits if one[0] == revision), None)


class _Hub(_Quiet):
    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.log.append(f"{self.command} {self.path}")
        path = unquote(urlsplit(self.path).path).strip("/")
        kind = "model"
        if path.startswith("datasets/"):
            kind, path = "dataset", path.removeprefix("datasets/")
        parts = path.split("/")
        if parts[:1] == ["api"] and len(parts) >= 4:
            repo = self.server.repos.get((parts[1].rstrip("s"), "/".join(parts[2:4])))
            found = repo.at(parts[5] if len(parts) > 5 else "main") if repo else None
            if found is None:
                return self.missing("RevisionNotFound" if repo else "RepoNotFound")
            info = {"id": "/".join(parts[2:4]), "sha": found[0], "private": False, "siblings": []}
            info["siblings"] = [{"rfilename": name} for name in found[1]]
            return self.reply(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
        if len(parts) < 5 or parts[2] != "resolve":
            return self.reply(404)
        repo = self.server.repos.get((kind, "/".join(parts[:2])))
        if repo is None:
            return self.missing("RepoNotFound")
        if "/".join(parts[:2]) in self.server.gated:
            return self.missing("GatedRepo", 403)
        found = repo.at(parts[3])
        if found is None:
            return self.missing("RevisionNotFound")
        name = "/".join(parts[4:])
        if name not in found[1]:
            return self.missing("EntryNotFound", extra={"X-Repo-Commit": found[0]})
        content = found[1][name]
        headers = {
            "X-Repo-Commit": found[0],
            "Content-Type": "application/octet-stream",
            "Accept-Ranges": "bytes",
        }
        if len(content) > LARGE:
            headers["X-Linked-Etag"] = headers["ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
            headers["X-Linked-Size"] = str(len(content))
        else:
            blob = b"blob %d\0" % len(content) + content
            headers["ETag"] = f'"{hashlib.sha1(blob).hexdigest()}"'
        if self.command == "GET" and self.server.corrupt.get(name, 0):
            self.server.corrupt[name] -= 1
            content = content[:-1] + bytes([content[-1] ^ 1])
        asked = self.headers.get("Range")
        if asked and self.command == "GET":
            first = int(asked.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            return self.reply(206, content[first:], headers)
        if self.command == "HEAD":
            self.send_response(200)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            return None
        return self.reply(200, content, headers)

    def do_POST(self) -> None:
        self.server.log.append(f"POST {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path).path.strip("/")
        if path == "api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            return self.reply(401, b"", {"X-Error-Message": "Invalid username or password."})
        if path == "api/repos/create":
            asked = json.loads(body)
            owner = asked.get("organization") or self.server.user
            name = f"{owner}/{asked['name']}"
            key = (asked.get("type") or "model", name)
            if key in self.server.repos:
                return self.json({"error": "exists", "url": f"{self.server.base}/{name}"}, 409)
            self.server.repos[key] = Repo()
            self.server.repos[key].commit({".gitattributes": b""})
            return self.json({"url": f"{self.server.base}/{name}", "name": name})
        parts = path.split("/")
        if path.endswith("/info/lfs/objects/batch"):
            asked = json.loads(body)
            objects = [
                {
                    **one,
                    "authenticated": True,
                    "actions": {"upload": {"href": f"{self.server.base}/lfs/{one['oid']}", "header": {}}},
                }
                for one in asked["objects"]
            ]
            return self.json({"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")
        if len(parts) >= 6 and parts[4] == "preupload":
            files = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["size"] > LARGE else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for one in json.loads(body)["files"]
            ]
            return self.json({"files": files, "commitOid": None})
        if len(parts) >= 6 and parts[4] == "commit":
            files = {}
            for line in body.splitlines():
                one = json.loads(line)
                if one["key"] == "file":
                    files[one["value"]["path"]] = base64.b64decode(one["value"]["content"])
                if one["key"] == "lfsFile":
                    files[one["value"]["path"]] = self.server.lfs[one["value"]["oid"]]
            repo = self.server.repos[(parts[1].rstrip("s"), "/".join(parts[2:4]))]
            oid = repo.commit(files)
            return self.json(
                {
                    "success": True,
                    "commitOid": oid,
                    "commitUrl": f"{self.server.base}/{parts[2]}/{parts[3]}/commit/{oid}",
                }
            )
        return self.reply(404)

    def do_PUT(self) -> None:
        self.server.log.append(f"PUT {self.path}")
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        oid = self.path.rsplit("/", 1)[1]
        if hashlib.sha256(content).hexdigest() != oid:
            return self.reply(422)
        self.server.lfs[oid] = content
        return self.reply(200)

    def json(self, value: Any, code: int = 200, kind: str = "application/json") -> None:
        self.reply(code, json.dumps(value).encode(), {"Content-Type": kind})

    def missing(self, what: str, code: int = 404, extra: dict[str, str] | None = None) -> None:
        self.reply(code, b"", {"X-Error-Code": what, "X-Error-Message": what, **(extra or {})})


class HubServer:
    """A hub: `add` makes repositories, ``base`` goes into HF_ENDPOINT, only ``token`` may write."""

    def __init__(self, server: Any) -> None:
        self._server = server
        self.base: str = server.base
        self.token: str = server.token
        self.repos: dict[tuple[str, str], Repo] = server.repos
        self.log: list[str] = server.log
        self.gated: set[str] = server.gated
        self.corrupt: dict[str, int] = server.corrupt  # file name -> how many answers get a wrong byte

    def add(self, repo_id: str, files: dict[str, bytes], kind: str = "model") -> str:
        return self.repos.setdefault((kind, repo_id), Repo()).commit(files)


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """Run a hub for the length of the body."""
    server: Any = _Server(("127.0.0.1", 0), _Hub)
    server.base = f"http://127.0.0.1:{server.server_address[1]}"
    server.repos, server.log, server.lfs, server.gated, server.corrupt = {}, [], {}, set(), {}
    server.user, server.token = "me", "hf_local"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield HubServer(server)
    finally:
        server.shutdown()
        server.server_close()


def file_at(*urls: str, sha256: str | None = SHA, size: int | None = len(CONTENT), **more: Any) -> zoo.File:
    return zoo.File("it.bin", tuple(zoo.Source(url=url) for url in urls), sha256, bytes=size, **more)


def left_behind(home: Path) -> list[str]:
    """Return every file of the cache that is neither a verified file, a receipt nor a lock."""
    found = [p.relative_to(home).as_posix() for p in home.rglob("*") if p.is_file()]
    return [name for name in found if not name.startswith(("files/", "locks/", "first_use/"))]
