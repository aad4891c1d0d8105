"""A Hugging Face hub on 127.0.0.1: the few endpoints that huggingface_hub uses to list and fetch a model's files."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + 34 * "0"
REPO = "acme/tiny"

_INFO = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/revision/(?P<revision>[^/]+)")
_RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


class FakeHub(ThreadingHTTPServer):
    """One repository, and what can go wrong with it.

    Attributes:
        files: name -> content; names ending in .safetensors, .gguf or .bin are stored with LFS (SHA-256).
        served: name -> content sent instead of `files`' own, for damage on the way.
        cut: name -> byte counts after which a transfer of that file breaks off, used up one by one.
        refuse: every connection is dropped without an answer.
        error: (status, X-Error-Code) answered to every request for information.
        requests: (method, path, Range header) in the order of arrival.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.served: dict[str, bytes] = {}
        self.cut: dict[str, list[int]] = {}
        self.revisions = {"main": COMMIT, COMMIT: COMMIT}
        self.refuse = False
        self.error: tuple[int, str] | None = None
        self.requests: list[tuple[str, str, str | None]] = []
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def stop(self) -> None:
        self.shutdown()
        self.thread.join()
        self.server_close()

    def fetched(self, name: str) -> list[str | None]:
        """The Range headers of the transfers of one file."""
        return [span for method, path, span in self.requests if method == "GET" and path.endswith(f"/{name}")]

    def digest(self, name: str) -> str:
        data = self.files[name]
        if is_lfs(name):
            return hashlib.sha256(data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A dropped connection is part of the play."""


def is_lfs(name: str) -> bool:
    return name.endswith((".safetensors", ".gguf", ".bin"))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub = self.server
        path = unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path, self.headers.get("Range")))
        if hub.refuse:
            self.close_connection = True
        elif hub.error:
            self._error(*hub.error)
        elif match := _INFO.fullmatch(path):
            self._info(match["repo"], match["revision"])
        elif (match := _RESOLVE.fullmatch(path)) and match["file"] in hub.files:
            self._file(match["file"])
        else:
            self._error(404, "EntryNotFound")

    def _error(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code})

    def _info(self, repo: str, revision: str) -> None:
        hub = self.server
        if repo != REPO:
            return self._error(404, "RepoNotFound")
        if revision not in hub.revisions:
            return self._error(404, "RevisionNotFound")
        siblings = [
            {
                "rfilename": name,
                "size": len(data),
                "blobId": hub.digest(name)[:40],
                "lfs": {"sha256": hub.digest(name), "size": len(data), "pointerSize": 130} if is_lfs(name) else None,
            }
            for name, data in hub.files.items()
        ]
        body = {"id": repo, "sha": hub.revisions[revision], "siblings": siblings}
        return self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _file(self, name: str) -> None:
        hub = self.server
        data = hub.served.get(name, hub.files[name])
        headers = {"ETag": f'"{hub.digest(name)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        start, total = 0, len(data)
        if span := self.headers.get("Range"):
            start = int(span.removeprefix("bytes=").rstrip("-"))
            headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
        cuts = hub.cut.get(name)
        limit = cuts.pop(0) if cuts and self.command == "GET" else None
        self._send(206 if start else 200, data[start:], headers, limit)

    def _send(self, status: int, body: bytes, headers: dict[str, str], limit: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:limit])
        if limit is not None:
            self.close_connection = True
