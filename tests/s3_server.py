"""A server of the S3 protocol on loopback, behind a door that fails, stalls and cuts answers short on demand."""

from __future__ import annotations

import http.client
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

Fault = Callable[[str, str], str | None]  # (method, path) → None, "slow", "cut" or one of ERRORS
ERRORS = {
    "error": (500, "InternalError"),
    "refused": (400, "InvalidRequest"),
    "denied": (403, "AccessDenied"),
    "expired": (400, "ExpiredToken"),
    "archived": (403, "InvalidObjectState"),
    "moved": (301, "PermanentRedirect"),
    "elsewhere": (400, "AuthorizationHeaderMalformed"),
}
SLOW_SECONDS = 0.1


class Door(ThreadingHTTPServer):
    """Forwards every request to `port`, unless `fault` has other plans; remembers what was asked."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behind = port
        self.fault: Fault = lambda method, path: None
        self.asked: list[tuple[str, str]] = []
        self.sent = Counter[str]()  # path → bytes of it that were read


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Door

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:
            self.close_connection = True

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append((self.command, self.path))
        fault = self.server.fault(self.command, self.path)
        if fault in ERRORS:
            status, code = ERRORS[fault]
            self._answer(status, {}, f"<Error><Code>{code}</Code><Message>planted</Message></Error>".encode())
            return
        if fault == "slow":
            time.sleep(SLOW_SECONDS)
        connection = http.client.HTTPConnection("127.0.0.1", self.server.behind)
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        content = answer.read()
        if self.command == "GET":
            self.server.sent[self.path.partition("?")[0]] += len(content)
        kept = {name: value for name, value in answer.getheaders() if name.lower() not in ("connection", "server")}
        self._answer(answer.status, kept, content, cut=fault == "cut")
        connection.close()

    def _answer(self, status: int, headers: dict[str, str], content: bytes, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "date", "transfer-encoding"):
                self.send_header(name, value)
        stated = next((value for name, value in headers.items() if name.lower() == "content-length"), len(content))
        self.send_header("Content-Length", str(stated))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = cut

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def serving() -> Iterator[Door]:
    """An empty bucket `s3://corpus` for this process and its children; every answer may be tampered with."""
    server = pytest.importorskip("moto.server", reason="moto is not installed (just extras)")
    pytest.importorskip("s3fs", reason="s3fs is not installed (just extras)")
    import boto3
    import fsspec

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = server.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    moto.start()
    port = moto.get_host_and_port()[1]
    door = Door(port)
    threading.Thread(target=door.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{door.server_port}")
        patch.setenv("AWS_MAX_ATTEMPTS", "1")  # so that faults reach our own patience
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fsspec.filesystem("s3").clear_instance_cache()
        boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}").create_bucket(Bucket="corpus")
        yield door
    fsspec.filesystem("s3").clear_instance_cache()
    door.shutdown()
    door.server_close()
    moto.stop()
