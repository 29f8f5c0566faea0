"""One data set of the Hub on 127.0.0.1, for the real datasets library: what it asks for when it loads one.

with DatasetServer("me/data", {"train.jsonl": b"..."}) as server:
    subprocess.run([...], env={**os.environ, **server.environment(home)})
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

_COMMIT = "c" * 40


class DatasetServer:
    """The server. `requests` are "METHOD /path", in order."""

    def __init__(self, name: str, files: Mapping[str, bytes]) -> None:
        self.name, self.files = name, dict(files)
        self.requests: list[str] = []
        server = self

        class Handler(_Handler):
            data = server

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> DatasetServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def environment(self, home: Path) -> dict[str, str]:
        """What a process needs to take this server for the Hub."""
        return {
            "HF_ENDPOINT": f"http://127.0.0.1:{self._server.server_address[1]}",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(home),
            "NO_PROXY": "127.0.0.1",
        }

    def entry(self, path: str) -> dict[str, Any]:
        data = self.files[path]
        return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


class _Handler(BaseHTTPRequestHandler):
    data: DatasetServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        return

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlparse(self.path).path)
        self.data.requests.append(f"{self.command} {path}")
        for pattern, answer in (
            (rf"/api/datasets/{self.data.name}(/revision/.+)?", self._info),
            (rf"/api/datasets/{self.data.name}/tree/[^/]+(?P<folder>/.*)?", self._tree),
            (rf"/api/datasets/{self.data.name}/paths-info/.+", self._paths),
            (rf"/datasets/{self.data.name}/resolve/[^/]+/(?P<file>.+)", self._file),
        ):
            found = re.fullmatch(pattern, path)
            if found:
                answer(body, **found.groupdict())
                return
        self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_POST = do_GET  # noqa: N815  the names http.server calls

    def _info(self, _body: bytes) -> None:
        files = [{"rfilename": path} for path in sorted(self.data.files)]
        self._json({"id": self.data.name, "sha": _COMMIT, "private": False, "siblings": files, "tags": []})

    def _tree(self, _body: bytes, folder: str | None) -> None:
        if (folder or "/").strip("/"):
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            return
        self._json([self.data.entry(path) for path in sorted(self.data.files)])

    def _paths(self, body: bytes) -> None:
        text = body.decode()
        asked = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text).get("paths", [])
        self._json([self.data.entry(path) for path in asked if path in self.data.files])

    def _file(self, _body: bytes, file: str) -> None:
        if file not in self.data.files:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        headers = {"X-Repo-Commit": _COMMIT, "ETag": f'"{self.data.entry(file)["oid"]}"'}
        self._send(200, self.data.files[file], headers)

    def _json(self, answer: Any) -> None:
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
