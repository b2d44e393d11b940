"""A stand-in for the Hugging Face Hub on the loopback: the endpoints that pushing and pulling use.

The client is the real huggingface_hub. What it commits is kept, and given back when it is asked
for.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Keep repositories in memory, and note what was asked.

    Attributes:
        url: Address, for ``endpoint=``.
        repos: Repository to its files.
        created: Bodies of the requests that made repositories.
        asked: Method and path of every request.
        refuse: Status that is answered to everything; 0 for none.
        sizes: Sizes that are claimed for files, in place of the true ones.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.created: list[dict] = []
        self.asked: list[tuple[str, str]] = []
        self.tokens: set[str] = set()
        self.refuse, self.sizes = 0, {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.headers.get("Transfer-Encoding") == "chunked":
                    body = _chunks(self.rfile)
                hub.answer(self, "POST", body)

            def do_GET(self) -> None:
                hub.answer(self, "GET", b"")

            def do_HEAD(self) -> None:
                hub.answer(self, "HEAD", b"")

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def is_private(self, number: int) -> bool:
        """Tell whether a repository was made private, in the words of older and newer clients."""
        made = self.created[number]
        return made.get("private") is True or made.get("visibility") == "private"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler, method: str, body: bytes) -> None:
        path = unquote(urlparse(handler.path).path)
        self.asked.append((method, path))
        self.tokens.add(handler.headers.get("Authorization", ""))
        if self.refuse:
            return _send(handler, self.refuse, b'{"error": "no"}')
        if path == "/api/validate-yaml":
            return _send(handler, 200, b'{"errors": [], "warnings": []}')
        if path == "/api/repos/create":
            wanted = json.loads(body)
            self.created.append(wanted)
            name = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
            self.repos.setdefault(name, {})
            return _send(handler, 200, json.dumps({"url": f"{self.url}/{name}"}).encode())
        parts = path.removeprefix("/api/models/").strip("/").split("/")
        repo = "/".join(parts[:2])
        if repo not in self.repos:
            return _send(handler, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
        files = self.repos[repo]
        if method == "POST" and parts[2] == "preupload":
            listed = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return _send(handler, 200, json.dumps({"files": listed}).encode())
        if method == "POST" and parts[2] == "commit":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    files[value["path"]] = base64.b64decode(value["content"])
            reply = {"commitUrl": f"{self.url}/{repo}/commit/{SHA}", "commitOid": SHA}
            return _send(handler, 200, json.dumps(reply).encode())
        if path.startswith("/api/models/"):
            siblings = [
                {"rfilename": name, "size": self.sizes.get(name, len(data)), "blobId": "0"}
                for name, data in files.items()
            ]
            reply = {"id": repo, "sha": SHA, "siblings": siblings}
            return _send(handler, 200, json.dumps(reply).encode())
        return self.give(handler, files, "/".join(parts[4:]))

    def give(self, handler: BaseHTTPRequestHandler, files: dict[str, bytes], name: str) -> None:
        """Send a file, as ``/user/name/resolve/REVISION/FILE`` does."""
        if name not in files:
            return _send(handler, 404, b"", {"X-Error-Code": "EntryNotFound"})
        etag = hashlib.sha256(files[name]).hexdigest()
        return _send(handler, 200, files[name], {"ETag": f'"{etag}"', "X-Repo-Commit": SHA})


def _chunks(stream) -> bytes:
    body = b""
    while size := int(stream.readline().split(b";")[0], 16):
        body += stream.read(size)
        stream.readline()
    stream.readline()
    return body


def _send(handler, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
    handler.send_response(status)
    for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)
