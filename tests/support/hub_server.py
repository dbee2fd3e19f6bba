"""A stand-in for the Hugging Face Hub on 127.0.0.1: repositories in memory, by the requests that its client makes."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_a_test"
COMMIT = "1" * 40


class StandIn(ThreadingHTTPServer):
    """Repositories by name: files by name. `gated` answers with 403, `private` with 401 unless the token is sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(path)
        parts = path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        repo = "/".join(parts[2:4] if api else parts[:2])
        rest = parts[4:] if api else parts[2:]
        files = self.server.repos.get(repo)
        authorised = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        revision = rest[1] if len(rest) > 1 else "main"
        if files is None or (repo in self.server.private and not authorised):
            self._answer(401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif repo in self.server.gated:
            self._answer(403, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
        elif revision not in ("main", "v1", COMMIT):
            self._answer(404, {"error": "no revision"}, {"X-Error-Code": "RevisionNotFound"})
        elif rest[:1] == ["tree"]:
            self._answer(200, [dict(type="file", path=n, size=len(b), oid=_oid(b)) for n, b in files.items()])
        elif api:
            self._answer(200, dict(id=repo, sha=COMMIT, siblings=[dict(rfilename=n) for n in files]))
        elif (name := "/".join(rest[2:])) in files:
            headers = {"ETag": f'"{_oid(files[name])}"', "X-Repo-Commit": COMMIT}
            self._answer(200, files[name], headers)
        else:
            self._answer(404, {"error": "no file"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid credentials"})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            repo = "/".join(filter(None, [asked.get("organization"), asked["name"]]))
            self.server.repos.setdefault(repo, {})
            self._answer(200, dict(url=f"{self.server.url}/{repo}", name=repo, id=repo))
        elif path == "/api/validate-yaml":
            self._answer(200, dict(warnings=[], errors=[]))
        elif "/preupload/" in path:
            named = [dict(path=f["path"], uploadMode="regular", shouldIgnore=False) for f in json.loads(body)["files"]]
            self._answer(200, dict(files=named))
        elif "/commit/" in path:
            repo = "/".join(path.split("/")[3:5])
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.repos[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{self.server.url}/{repo}/commit/{COMMIT}"
            self._answer(200, dict(success=True, commitOid=COMMIT, commitUrl=url))
        else:
            self._answer(404, {"error": path})

    def _answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        blob = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(blob))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(blob)


def _oid(blob: bytes) -> str:
    return hashlib.sha1(blob).hexdigest()


@contextmanager
def stand_in() -> Iterator[StandIn]:
    """A server that answers while the context lasts."""
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.02))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
