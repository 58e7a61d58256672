"""A server of the Hugging Face hub's protocol on loopback: repositories in memory, faults on demand."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

LARGE = {".bin", ".safetensors", ".tar", ".parquet", ".wav"}  # kept apart from git, and sent from another host
Fault = Callable[[str, str], str | int | None]  # (method, path) → None, a status, or one of these:
# "cut", "ignored", "whole" whatever range is asked for, "page" of HTML, "never"


@dataclass
class Repository:
    """Every commit of it stays."""

    private: bool = False
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{}])

    def files(self, revision: str) -> dict[str, bytes]:
        return self.commits[-1 if revision == "main" else int(revision)]

    @property
    def sha(self) -> str:
        return f"{len(self.commits) - 1:040d}"


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}  # by "models/OWNER/NAME", "datasets/…" or "buckets/…"
        self.stored: dict[str, bytes] = {}  # large files by their sha256
        self.fault: Fault = lambda method, path: None
        self.asked: list[tuple[str, str]] = []
        self.sent = 0  # bytes of large files
        self.closing = threading.Event()

    def holds(self, name: str, folder: Path) -> Repository:
        """A repository with the files of a folder."""
        found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.repositories[name] = Repository(commits=[found])
        self.stored |= {_sha256(data): data for data in found.values()}
        return self.repositories[name]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # which waits 40 ms before each body
    server: Hub

    def answer(self) -> None:
        body = self.body()
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((self.command, path))
        self.fault = self.server.fault(self.command, path)
        if isinstance(self.fault, int):
            self.send(self.fault, {"error": "planted"}, X_Error_Message="planted")
            return
        if self.fault == "never":
            self.server.closing.wait()
            return
        if self.fault == "page":
            self.send(200, b"<html>Log in</html>")
            return
        for pattern, way in WAYS.items():
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                way(self, body, **found.groupdict())
                return
        self.send(404, {"error": f"{self.command} {path} is not known here"})

    do_GET = do_PUT = do_POST = do_HEAD = answer

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size + 2)[:-2])
        self.rfile.readline()
        return b"".join(parts)

    def send(self, status: int, content: Any = b"", **headers: str) -> int:
        """Of the content what is asked for, or half of it; so many bytes."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        if (asked := self.headers.get("Range")) and status == 200 and self.fault not in ("whole", "page"):
            first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", asked).groups()  # type: ignore[union-attr]
            data, status = data[int(first) : int(last or len(data)) + 1], 206
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.fault == "cut":
            data, self.close_connection = data[: len(data) // 2], True
        return 0 if self.command == "HEAD" else self.wfile.write(data)

    def repository(self, kind: str, repo: str) -> Repository:
        return self.server.repositories[f"{kind}/{repo}"]

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        repo = f"{wanted['organization']}/{wanted['name']}"
        name = f"{wanted.get('type', 'model')}s/{repo}"
        stood = name in self.server.repositories
        self.server.repositories.setdefault(name, Repository(wanted.get("visibility") == "private"))
        self.send(409 if stood else 200, {"url": f"http://{self.headers['Host']}/{repo}"})

    def info(self, body: bytes, kind: str, repo: str, revision: str | None = None) -> None:
        if f"{kind}/{repo}" not in self.server.repositories:
            self.send(404, {}, X_Error_Code="RepoNotFound")
            return
        found = self.repository(kind, repo)
        if revision and revision != "main" and not revision.isdigit():
            self.send(404, {}, X_Error_Code="RevisionNotFound")
            return
        about = {"id": repo, "private": found.private, "tags": [], "downloads": 0, "likes": 0}
        of_bucket = {"createdAt": "2030-01-31T00:00:00.000Z", "size": 0, "totalFiles": 0}
        sha = found.sha if revision in (None, "main") else revision
        self.send(200, {**about, **(of_bucket if kind == "buckets" else {"sha": sha})})

    def tree(self, body: bytes, kind: str, repo: str, folder: str | None, revision: str = "main") -> None:
        files = self.repository(kind, repo).files(revision)
        root = PurePosixPath(folder or ".")
        deep = parse_qs(urlsplit(self.path).query).get("recursive") == ["true"]
        below = [path for path in map(PurePosixPath, files) if path.is_relative_to(root)]
        all_ = {*below, *(parent for path in below for parent in path.parents if root in parent.parents)}
        listed = sorted(path for path in all_ if deep or path.parent == root)
        rows = [_row(str(path), files.get(str(path))) for path in listed]
        self.send(200, rows) if rows or not folder else self.send(404, {}, X_Error_Code="EntryNotFound")

    def file(self, body: bytes, kind: str | None, repo: str, name: str, revision: str = "main") -> None:
        found = self.repository(kind or "models", repo)
        data = found.files(revision).get(name)
        if data is None:
            self.send(404, {}, X_Error_Code="EntryNotFound")
            return
        digest = _sha256(data)
        about = {"X_Repo_Commit": found.sha if revision == "main" else revision, "ETag": f'"{digest}"'}
        if PurePosixPath(name).suffix not in LARGE:
            self.send(200, data, **about)
            return
        where = f"http://localhost:{self.server.server_port}/stored/{digest}"
        self.send(302, b"", **about, Location=where, X_Linked_ETag=f'"{digest}"', X_Linked_Size=str(len(data)))

    def large(self, body: bytes, digest: str) -> None:
        self.server.sent += self.send(200, self.server.stored[digest])

    def modes(self, body: bytes) -> None:
        rows = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if PurePosixPath(file["path"]).suffix in LARGE else "regular",
                "shouldIgnore": self.server.fault("IGNORE", file["path"]) == "ignored",
            }
            for file in json.loads(body)["files"]
        ]
        self.send(200, {"files": rows})

    def uploads(self, body: bytes) -> None:
        host = f"http://{self.headers['Host']}"
        rows = [
            {**file, "actions": {"upload": {"href": f"{host}/stored/{file['oid']}"}}}
            for file in json.loads(body)["objects"]
        ]
        self.send(200, {"objects": rows})

    def store(self, body: bytes, digest: str) -> None:
        assert _sha256(body) == digest
        self.server.stored[digest] = body
        self.send(200)

    def commit(self, body: bytes, kind: str, repo: str) -> None:
        found, new = self.repository(kind, repo), {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                new[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                new[value["path"]] = self.server.stored[value["oid"]]
        found.commits.append({**found.commits[-1], **new})
        url = f"http://{self.headers['Host']}/{repo}/commit/{found.sha}"
        self.send(200, {"commitUrl": url, "commitOid": found.sha, "pullRequestUrl": None})

    def log_message(self, *args: Any) -> None:
        pass


BUCKETS = r"(?P<kind>buckets)"
REPO, KIND, REVISION = r"(?P<repo>[\w.-]+/[\w.-]+)", r"(?P<kind>models|datasets)", r"(?P<revision>\w+)"
WAYS: dict[str, Callable[..., None]] = {
    r"POST /api/repos/create": Handler.create,
    r"POST /api/validate-yaml": lambda handler, body: handler.send(200, {"errors": [], "warnings": []}),
    rf"GET /api/{KIND}/{REPO}(/revision/{REVISION})?": Handler.info,
    rf"GET /api/{BUCKETS}/{REPO}": Handler.info,
    rf"GET /api/{BUCKETS}/{REPO}/tree(/(?P<folder>.+))?": Handler.tree,
    rf"GET /{BUCKETS}/{REPO}/resolve/(?P<name>.+)": Handler.file,
    rf"GET /api/{KIND}/{REPO}/tree/{REVISION}(/(?P<folder>.+))?": Handler.tree,
    r"POST /api/.+/preupload/main": Handler.modes,
    rf"POST /api/{KIND}/{REPO}/commit/main": Handler.commit,
    r"POST /.+\.git/info/lfs/objects/batch": Handler.uploads,
    r"PUT /stored/(?P<digest>\w+)": Handler.store,
    r"(HEAD|GET) /stored/(?P<digest>\w+)": Handler.large,
    rf"(HEAD|GET) /((?P<kind>datasets)/)?{REPO}/resolve/{REVISION}/(?P<name>.+)": Handler.file,
}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _row(path: str, data: bytes | None) -> dict[str, Any]:
    """As the hub lists it: a folder where there is no content."""
    if data is None:
        return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}
    row = {"type": "file", "path": path, "size": len(data), "xetHash": _sha256(data)}
    if PurePosixPath(path).suffix in LARGE:
        row["lfs"] = {"oid": _sha256(data), "size": len(data), "pointerSize": 130}
    return {**row, "oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}


@contextmanager
def serving(cache: Path) -> Iterator[Hub]:
    """The hub of this process, which keeps what it fetches in `cache`."""
    from huggingface_hub import constants

    from shards import hub as of_the_hub

    hub = Hub()
    threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{hub.server_port}"

    def forget() -> None:
        of_the_hub.filesystem.cache_clear()
        of_the_hub._commit.cache_clear()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        forget()
        yield hub
        forget()
    hub.closing.set()
    hub.shutdown()
    hub.server_close()
