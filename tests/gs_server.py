"""A server of Google's storage on loopback, as much of its JSON protocol as is used: one bucket, faults on demand."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

Fault = Callable[[str, str], str | int | None]  # (method, path) → None, a status, "cut" or "reset"
PAGE = 3  # objects in an answer, where the storage gives 1000
SAID = {401: "Invalid Credentials", 403: "planted does not have storage.objects.get access"}


class Bucket(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, bytes] = {}
        self.begun: dict[str, tuple[str, bytes]] = {}  # uploads in chunks: its name, and what has come
        self.fault: Fault = lambda method, path: None
        self.asked: list[tuple[str, str]] = []


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Bucket

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:
            self.close_connection = True

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(url.query).items()}
        self.server.asked.append((self.command, self.path))
        self.fault = self.server.fault(self.command, unquote(url.path))
        if isinstance(self.fault, int):
            self.send(self.fault, {"error": {"code": self.fault, "message": SAID.get(self.fault, "planted")}})
        elif self.fault == "reset":
            self.close_connection = True
        elif url.path.startswith("/upload/"):
            self.upload(body)
        else:
            name = unquote(url.path.partition("/b/corpus/o")[2][1:])
            self.object(name, is_content=url.path.startswith("/download/")) if name else self.list()

    def object(self, name: str, is_content: bool) -> None:
        data = self.server.objects.get(name)
        if data is None:
            self.send(404, {"error": {"code": 404, "message": "No such object"}})
        elif self.command == "DELETE":
            del self.server.objects[name]
            self.send(204)
        elif not is_content:
            self.send(200, self.told(name))
        elif wanted := self.headers.get("Range"):
            start, end = wanted.removeprefix("bytes=").split("-")
            begin = int(start) if start else max(len(data) - int(end), 0)
            part = data[begin : int(end) + 1 if start and end else None]
            self.send(206 if part else 416, part)
        else:
            self.send(200, data)

    def list(self) -> None:
        names = sorted(name for name in self.server.objects if name.startswith(self.query.get("prefix", "")))
        start = int(self.query.get("pageToken", 0))
        page: dict[str, Any] = {"items": [self.told(name) for name in names[start : start + PAGE]]}
        more = {"nextPageToken": str(start + PAGE)} if start + PAGE < len(names) else {}
        self.send(200, {"kind": "storage#objects", **page, **more})

    def upload(self, body: bytes) -> None:
        if self.query["uploadType"] == "multipart":
            boundary = b"\n--" + self.headers["Content-Type"].partition('boundary="')[2].rstrip('"').encode()
            told, content = (b"\n" + body).split(boundary)[1:3]
            self.put(json.loads(told.partition(b"\n\n")[2])["name"], content.partition(b"\n\n")[2])
        elif "upload_id" not in self.query:
            number = str(len(self.server.begun))
            self.server.begun[number] = (self.query["name"], b"")
            place = f"http://127.0.0.1:{self.server.server_port}/upload/o?uploadType=resumable&upload_id={number}"
            self.send(200, {}, Location=place)
        elif self.command == "DELETE":
            del self.server.begun[self.query["upload_id"]]
            self.send(499)
        else:
            name, came = self.server.begun[self.query["upload_id"]]
            span, whole = self.headers["Content-Range"].removeprefix("bytes ").split("/")
            came = came[: int(span.partition("-")[0])] + body
            self.server.begun[self.query["upload_id"]] = (name, came)
            self.put(name, came) if len(came) == int(whole) else self.send(308, Range=f"bytes=0-{len(came) - 1}")

    def put(self, name: str, data: bytes) -> None:
        self.server.objects[name] = data
        self.send(200, self.told(name))

    def told(self, name: str) -> dict[str, str]:
        data = self.server.objects[name]
        when = "2030-01-31T12:00:00.000000Z"
        tag = hashlib.sha256(data).hexdigest()[:16]
        return {"name": name, "size": str(len(data)), "etag": tag, "generation": "1", "updated": when}

    def send(self, status: int, content: bytes | dict[str, Any] = b"", **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if self.fault == "cut" else data)
        self.close_connection = self.close_connection or self.fault == "cut"

    do_GET = do_PUT = do_POST = do_DELETE = answer

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def serving() -> Iterator[Bucket]:
    """An empty bucket `gs://corpus`, for a client that asks no other host and does not wait."""
    retry = pytest.importorskip("gcsfs.retry", reason="gcsfs is not installed (just extras)")
    import fsspec

    server = Bucket()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()

    async def at_once(seconds: float) -> None:
        pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
        patch.setenv("NO_GCE_CHECK", "true")
        patch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nowhere")
        patch.setattr(retry, "asyncio", SimpleNamespace(sleep=at_once))
        fsspec.get_filesystem_class("gs").clear_instance_cache()
        yield server
    fsspec.get_filesystem_class("gs").clear_instance_cache()
    server.shutdown()
    server.server_close()
