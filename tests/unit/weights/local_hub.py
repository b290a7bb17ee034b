"""A model hub on this machine that speaks the few requests a pull makes, and can break off, lie or fall silent."""

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse


class LocalHub:
    """Repos as {id: {revision: {file: bytes}}}. `sent` counts the bytes of each file that went out."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.gated: set[str] = set()
        self.sent: Counter[str] = Counter()
        self.lies: dict[str, bytes] = {}
        self.down_after: int | None = None
        self.bytes_per_s: float | None = None
        self.silent = False
        self.url = ""

    def commit(self, repo: str, revision: str) -> str:
        content = b"".join(name.encode() + data for name, data in sorted(self.repos[repo][revision].items()))
        return hashlib.sha1(content).hexdigest()

    def find(self, repo: str, revision: str) -> str | None:
        return next((r for r in self.repos[repo] if revision in (r, self.commit(repo, r))), None)

    def info(self, repo: str, revision: str) -> dict:
        siblings = []
        for name, data in self.repos[repo][revision].items():
            git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            entry = {"rfilename": name, "size": len(data), "blobId": git}
            if name.endswith((".safetensors", ".gguf", ".bin")):
                entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            siblings.append(entry)
        return {"id": repo, "modelId": repo, "sha": self.commit(repo, revision), "siblings": siblings}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LocalHub

    def log_message(self, *_args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self.hub.silent:
            time.sleep(60)
            return
        parts = unquote(urlparse(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self.model(f"{parts[2]}/{parts[3]}", parts[5] if len(parts) > 5 else "main")
        elif len(parts) != 5:
            self.answer(404, b"", {})
        else:
            self.file(f"{parts[0]}/{parts[1]}", parts[3], parts[4])

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def model(self, repo: str, revision: str) -> None:
        if repo in self.hub.gated:
            self.refuse(403, "GatedRepo")
        elif repo not in self.hub.repos:
            self.refuse(404, "RepoNotFound")
        elif (found := self.hub.find(repo, revision)) is None:
            self.refuse(404, "RevisionNotFound")
        else:
            self.answer(200, json.dumps(self.hub.info(repo, found)).encode(), {"Content-Type": "application/json"})

    def file(self, repo: str, revision: str, name: str) -> None:
        found = self.hub.find(repo, revision)
        assert found is not None
        data = self.hub.lies.get(name, self.hub.repos[repo][found][name])
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        total = sum(self.hub.sent.values())
        if self.hub.down_after is not None and total >= self.hub.down_after:
            self.refuse(503, "Down")
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        for at in range(start, len(data), 65536):
            piece = data[at : at + 65536]
            if self.hub.down_after is not None and sum(self.hub.sent.values()) + len(piece) > self.hub.down_after:
                self.hub.down_after = 0
                self.close_connection = True
                return
            self.hub.sent[name] += len(piece)
            self.wfile.write(piece)
            if self.hub.bytes_per_s:
                time.sleep(len(piece) / self.hub.bytes_per_s)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        """Clients that are killed or give up are what the tests are about."""


@contextmanager
def serving() -> Iterator[LocalHub]:
    """A hub that listens on a free port of this machine while the block runs."""
    hub = LocalHub()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
