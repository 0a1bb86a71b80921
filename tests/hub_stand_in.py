"""A stand-in of the Hub's HTTP interface on this machine, as far as lesa uses it: repositories with
branches and commits, large files by git-lfs' batch interface, downloads with their etags."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_standin"


class Hub:
    """What it holds: `commits[repo]` by sha (the files of each), `branches[repo]` by name."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.private: dict[str, bool] = {}
        self.url = ""

    def create(self, repo: str, private: bool) -> int:
        if repo in self.commits:
            return 409
        empty = hashlib.sha1(repo.encode()).hexdigest()
        self.commits[repo], self.branches[repo] = {empty: {}}, {"main": empty}
        self.private[repo] = private
        return 200

    def at(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        sha = self.branches.get(repo, {}).get(revision, revision)
        files = self.commits.get(repo, {}).get(sha)
        return None if files is None else (sha, files)

    def commit(self, repo: str, branch: str, lines: list[dict[str, Any]]) -> str:
        _, before = self.at(repo, branch) or ("", {})
        files = dict(before)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
        sha = hashlib.sha1(json.dumps([repo, branch, len(self.commits[repo])]).encode()).hexdigest()
        self.commits[repo][sha], self.branches[repo][branch] = files, sha
        return sha


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, value: Any = None, **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value or {}).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def writable(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.answer(401, {"error": "Invalid credentials"}, X_Error_Message="Invalid credentials")
        return False

    def do_POST(self) -> None:
        path, data = unquote(urlsplit(self.path).path), self.body()
        self.hub.asked.append(f"POST {path}")
        if path == "/api/validate-yaml":
            return self.answer(200, {"warnings": [], "errors": []})
        if not self.writable():
            return None
        if path == "/api/repos/create":
            given = json.loads(data)
            repo = f"{given['organization']}/{given['name']}"
            status = self.hub.create(repo, given.get("visibility") == "private")
            return self.answer(status, {"url": f"{self.hub.url}/{repo}", "error": "it exists"})
        if found := re.fullmatch(r"/api/models/(.+)/branch/(.+)", path):
            repo, branch = found.groups()
            if branch in self.hub.branches[repo]:
                return self.answer(409, {"error": "it exists"})
            self.hub.branches[repo][branch] = self.hub.branches[repo]["main"]
            return self.answer(200)
        if re.fullmatch(r"/api/models/.+/preupload/.+", path):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(data)["files"]
            ]
            return self.answer(200, {"files": files})
        if re.fullmatch(r"/.+\.git/info/lfs/objects/batch", path):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}}
                for one in json.loads(data)["objects"]
            ]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/api/models/(.+)/commit/(.+)", path):
            lines = [json.loads(line) for line in data.splitlines() if line.strip()]
            sha = self.hub.commit(*found.groups(), lines)
            url = f"{self.hub.url}/{found[1]}/commit/{sha}"
            return self.answer(200, {"commitUrl": url, "commitOid": sha, "success": True})
        return self.answer(404, {"error": f"no such path: {path}"})

    def do_PUT(self) -> None:
        oid, data = self.path.rpartition("/")[2], self.body()
        self.hub.asked.append("PUT a large file")
        if hashlib.sha256(data).hexdigest() != oid:
            return self.answer(400, {"error": "another sha256"})
        self.hub.large[oid] = data
        return self.answer(200)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        found = re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path)
        at = self.hub.at(found[1], found[2]) if found else None
        if found is None or found[1] not in self.hub.commits:
            return self.answer(404, {"error": "x"}, X_Error_Code="RepoNotFound")
        if at is None:
            return self.answer(404, {"error": "x"}, X_Error_Code="RevisionNotFound")
        sha, files = at
        if found[3] not in files:
            return self.answer(404, {}, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        data = files[found[3]]
        etag = hashlib.sha256(data).hexdigest()
        return self.answer(200, data, ETag=f'"{etag}"', X_Repo_Commit=sha)

    do_HEAD = do_GET


@contextmanager
def serving() -> Iterator[Hub]:
    """A Hub that answers at `url` for a while."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answers", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
