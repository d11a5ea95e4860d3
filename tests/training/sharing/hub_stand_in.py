"""A hub on loopback: it takes repositories and commits, gives their files back, and can be made to fail."""

import base64
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_stand_in"


class Hub:
    """What was pushed, and what goes wrong."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}  # by repository
        self.private: dict[str, bool] = {}
        self.fault: int | str = ""  # a status, or 'cut': of commits
        self.asked: list[str] = []
        self.url = ""


@contextmanager
def hub_stand_in() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, status: int, content: Any = None, **headers: str) -> None:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def do_POST(self) -> None:
            hub.asked.append(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.answer(401, {"error": "Invalid username or password."})
            parts = self.path.strip("/").split("/")
            if self.path == "/api/repos/create":
                asked = json.loads(body)
                repo = "/".join(filter(None, (asked.get("organization"), asked["name"])))
                if repo in hub.files:
                    return self.answer(409, {"error": "exists", "url": f"{hub.url}/{repo}"})
                hub.files[repo], hub.private[repo] = (
                    {},
                    bool(asked.get("private") or asked.get("visibility") == "private"),
                )
                return self.answer(200, {"url": f"{hub.url}/{repo}", "name": repo})
            if self.path == "/api/validate-yaml":
                return self.answer(200, {"warnings": [], "errors": []})
            if parts[-2] == "preupload":
                files = json.loads(body)["files"]
                modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
                return self.answer(200, {"files": modes})
            if hub.fault == "cut":
                self.connection.shutdown(socket.SHUT_RDWR)
                return None
            if hub.fault:
                return self.answer(int(hub.fault), {"error": "something is wrong here"})
            repo = "/".join(parts[2:4])
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    hub.files[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{hub.url}/{repo}/commit/{COMMIT}"
            return self.answer(200, {"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})

        def do_GET(self) -> None:
            hub.asked.append(self.path)
            parts = self.path.partition("?")[0].strip("/").split("/")
            repo = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
            if repo not in hub.files:
                return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            if "tree" in parts:
                files = hub.files[repo].items()
                listed = [{"type": "file", "path": n, "size": len(c), "oid": sha1(c).hexdigest()} for n, c in files]
                return self.answer(200, listed)
            if parts[0] == "api":
                siblings = [{"rfilename": name} for name in hub.files[repo]]
                return self.answer(200, {"id": repo, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})
            content = hub.files[repo].get("/".join(parts[4:]))
            if content is None:
                return self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
            etag = sha1(content).hexdigest()
            return self.answer(200, content, ETag=f'"{etag}"', X_Repo_Commit=COMMIT)

        do_HEAD = do_GET

    return Handler
