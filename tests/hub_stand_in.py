"""A stand-in of the hub's HTTP API on this machine: repositories in memory, uploads by Git LFS."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_test"
LFS_SUFFIXES = (".safetensors", ".onnx", ".engine", ".png")


@dataclass
class Repository:
    """A repository: one branch, whose last commit's files are kept."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    sha: str = "0" * 40
    commits: int = 0


@dataclass
class Hub:
    """What the stand-in holds, and the requests that it has got."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)


@contextmanager
def hub_stand_in() -> Iterator[Hub]:
    """Serve on a free port of this machine until the block ends."""
    hub = Hub()

    class Handler(_Handler):
        held = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    held: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def _answer(self, verb: str) -> None:
        path = self.path.partition("?")[0]
        self.held.requests.append(f"{verb} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for wanted, pattern, method in _ROUTES:
            if verb in wanted and (match := re.fullmatch(pattern, path)):
                if verb in ("POST", "PUT") and not self._known():
                    return self._say(401, {"error": "who are you?"})
                return method(self, *match.groups(), body)
        return self._say(404, {"error": f"no route {verb} {path}"})

    def _known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}" or self.path.startswith("/lfs/")

    def _repository(self, name: str) -> Repository | None:
        """A repository; nobody but its owner learns that a private one is there."""
        found = self.held.repositories.get(name)
        if found is None or (found.private and not self._known()):
            self._say(401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        return found

    def _say(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for key, text in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        there = name in self.held.repositories
        self.held.repositories.setdefault(name, Repository(private=asked.get("visibility") == "private"))
        self._say(409 if there else 200, {"url": f"{self.held.url}/{name}", "id": name})

    def validate(self, _body: bytes) -> None:
        self._say(200, {"errors": [], "warnings": []})

    def info(self, name: str, _revision: str | None, _body: bytes) -> None:
        if (found := self._repository(name)) is not None:
            self._say(200, {"id": name, "sha": found.sha, "private": found.private, "tags": [], "siblings": []})

    def preupload(self, name: str, body: bytes) -> None:
        if self._repository(name) is not None:
            paths = [row["path"] for row in json.loads(body)["files"]]
            modes = ["lfs" if path.endswith(LFS_SUFFIXES) else "regular" for path in paths]
            files = [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in zip(paths, modes, strict=True)]
            self._say(200, {"files": files})

    def batch(self, _name: str, body: bytes) -> None:
        rows = [{"oid": row["oid"], "size": row["size"]} for row in json.loads(body)["objects"]]
        for row in rows:
            row["actions"] = {"upload": {"href": f"{self.held.url}/lfs/{row['oid']}"}}
        self._say(200, {"transfer": "basic", "objects": rows})

    def put(self, oid: str, body: bytes) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.held.objects[oid] = body
        self._say(200, {})

    def commit(self, name: str, body: bytes) -> None:
        if (found := self._repository(name)) is None:
            return
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                found.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                found.files[value["path"]] = self.held.objects[value["oid"]]
        found.commits += 1
        found.sha = hashlib.sha1(body).hexdigest()
        self._say(200, {"commitUrl": f"{self.held.url}/{name}/commit/{found.sha}", "commitOid": found.sha})

    def tree(self, name: str, _body: bytes) -> None:
        if (found := self._repository(name)) is not None:
            self._say(200, [self._entry(path, data) for path, data in found.files.items()])

    def _entry(self, path: str, data: bytes) -> dict[str, Any]:
        row = {"type": "file", "path": path, "size": len(data), "oid": _git_id(data)}
        if path.endswith(LFS_SUFFIXES):
            row["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return row

    def resolve(self, name: str, path: str, _body: bytes) -> None:
        found = self._repository(name)
        if found is None:
            return
        if path not in found.files:
            self._say(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        row = self._entry(path, found.files[path])
        etag = row["lfs"]["oid"] if "lfs" in row else row["oid"]
        self._say(200, found.files[path], {"ETag": f'"{etag}"', "X-Repo-Commit": found.sha})


def _git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES = (
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", rf"/api/models/{_NAME}/preupload/main", _Handler.preupload),
    ("POST", rf"/api/models/{_NAME}/commit/main", _Handler.commit),
    ("GET", rf"/api/models/{_NAME}(?:/revision/(\w+))?", _Handler.info),
    ("GET", rf"/api/models/{_NAME}/tree/\w+", _Handler.tree),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/lfs/(\w+)", _Handler.put),
    ("GET HEAD", rf"/{_NAME}/resolve/\w+/(.+)", _Handler.resolve),
)
