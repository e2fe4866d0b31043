"""A small Hub on this machine for huggingface_hub's own client: answers, headers and errors as the real one's."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants


@dataclass
class Repo:
    """One repository.

    Attributes:
        revisions: folder by name of branch or tag; a commit's name is made of it.
        token: whoever sends it may see a private repository; None for a public one.
        gated: its files are for those alone whose access was granted: nobody.
        cut: files of which half is sent before the line goes dead.

    """

    revisions: dict[str, Path]
    token: str | None = None
    gated: bool = False
    cut: frozenset[str] = frozenset()

    def find(self, revision: str) -> tuple[str, Path] | None:
        """Return (commit, folder), or None."""
        for name, folder in self.revisions.items():
            commit = hashlib.sha1(str(folder).encode()).hexdigest()
            if revision in (name, commit):
                return commit, folder
        return None


@dataclass
class Request:
    """What a client asked."""

    method: str
    path: str
    authorization: str | None


@dataclass
class Hub:
    """The server's state. `broken` answers everything with 503."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    broken: bool = False

    def files_sent(self):
        """Return the paths of the files that were downloaded, in their repositories."""
        return {
            unquote(request.path).partition("/resolve/")[2].partition("/")[2]
            for request in self.requests
            if request.method == "GET" and "/resolve/" in request.path
        }


class Handler(BaseHTTPRequestHandler):
    """Answers `/api/models/...` and `/owner/name/resolve/...`."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self):
        self._answer()

    def do_HEAD(self):
        self._answer()

    def log_message(self, format, *args):
        """Keep standard error clean."""

    def _answer(self):
        path = urlsplit(self.path).path
        self.hub.requests.append(Request(self.command, path, self.headers.get("Authorization")))
        parts = [unquote(part) for part in path.strip("/").split("/")]
        api = parts[:2] == ["api", "models"]
        owner, name, *rest = parts[2:] if api else parts
        if self.hub.broken:
            return self._error(503, None, "Service unavailable")
        repo = self.hub.repos.get(f"{owner}/{name}")
        authorized = repo is not None and repo.token in (None, (self.headers.get("Authorization") or "")[7:])
        if repo is None or not authorized:
            return self._error(401, "RepoNotFound", "Repository not found")
        kind, revision, *file = rest or ["revision", constants.DEFAULT_REVISION]
        found = repo.find(revision)
        if found is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if api:
            return self._json(self._tree(found[1]) if kind == "tree" else self._info(f"{owner}/{name}", *found))
        if repo.gated:
            code = 403 if self.headers.get("Authorization") else 401
            return self._error(code, "GatedRepo", "Access to this model is restricted")
        return self._file(*found, "/".join(file), repo.cut)

    def _info(self, repo_id, commit, folder):
        siblings = [{"rfilename": entry["path"]} for entry in self._tree(folder)]
        return {"id": repo_id, "modelId": repo_id, "sha": commit, "private": False, "tags": [], "siblings": siblings}

    def _tree(self, folder):
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return [
            {"type": "file", "path": str(path.relative_to(folder)), "size": path.stat().st_size, "oid": etag(path)}
            for path in files
        ]

    def _json(self, value):
        self._send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _error(self, status, code, message):
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self._send(status, headers, json.dumps({"error": message}).encode())

    def _file(self, commit, folder, name, cut):
        path = folder / name
        if not path.is_file():
            return self._error(404, "EntryNotFound", "Entry not found")
        content = path.read_bytes()
        headers = {"ETag": f'"{etag(path)}"', "X-Repo-Commit": commit}
        if name in cut and self.command == "GET":
            self._send(200, headers, content[: len(content) // 2], length=len(content))
            self.close_connection = True
            return None
        return self._send(200, headers, content)

    def _send(self, status, headers, content, length=None):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content) if length is None else length)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def etag(path):
    """Return the name of a file's content in git."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def serve():
    """Start a Hub in a thread; `shutdown` and `server_close` of the server stop it."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    return server, hub
