"""A server on 127.0.0.1 that stands in for a package index and for the hub.

with serving(tmp_path, monkeypatch) as server:
    server.files["/path"] = b"content"
"""

import base64
import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Server(ThreadingHTTPServer):
    """Files by path, with ranges; remembers what was asked and how much it sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.status: dict[str, int] = {}
        self.asked: list[str] = []
        self.sent: list[tuple[str, int]] = []  # path and length of each answer
        self.password = ""
        self.ranges = True
        self.go_on = threading.Event()  # unset: a file stops half way
        self.go_on.set()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        """Headers only."""
        self.do_GET()

    def do_GET(self) -> None:
        """The file, or the part of it that is asked for."""
        server = self.server
        path = self.path.partition("?")[0]
        server.asked.append(path)
        body = server.files.get(path, b"")
        status = server.status.get(path, 200 if path in server.files else 404)
        user = base64.b64encode(b"user:" + server.password.encode()).decode()
        if server.password and self.headers["Authorization"] != f"Basic {user}":
            status = 401
        if status in (401, 403, 404):
            body = b""
        start, _, _ = (self.headers["Range"] or "bytes=0-").removeprefix("bytes=").partition("-")
        if server.ranges and status == 200 and (first := int(start)):
            status, body = (206, body[first:]) if first < len(body) else (416, b"")
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        kind = "text/html" if path.endswith("/") else "application/octet-stream"
        self.send_header("Content-Type", "application/json" if "/api/" in path else kind)
        if "gated" in path and status == 403:
            self.send_header("X-Error-Code", "GatedRepo")
        if "nosuch" in path:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        if self.command == "HEAD":
            return
        server.sent.append((path, len(body)))
        middle = len(body) // 2 if len(body) > 1_000_000 else len(body)
        try:
            for piece in (body[:middle], body[middle:]):
                self.wfile.write(piece)
                server.go_on.wait(30)
        except ConnectionError:
            pass  # the client was killed


@contextmanager
def serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server with nothing on it yet, where pip and the hub's library look for files.

    Every cache is inside `tmp_path`.
    """
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_CERT", "REQUESTS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "SPARSERAMP_CACHE": str(tmp_path / "cache"),
        "HOME": str(tmp_path),
        "NO_PROXY": "127.0.0.1",
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_CACHE_DIR": "1",
        "PIP_RETRIES": "0",
        "PIP_INDEX_URL": f"{server.url}/simple",
        "HF_ENDPOINT": server.url,
    }.items():
        monkeypatch.setenv(name, value)
    yield server
    server.go_on.set()
    server.shutdown()
    server.server_close()


def names(folder: Path) -> set[str]:
    """The files in a folder, however deep."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
