"""A server that speaks the Hugging Face Hub's protocol, for the real huggingface_hub client on 127.0.0.1.

    with HubServer(users={"hf_token": "me"}) as hub:
        subprocess.run([...], env={**os.environ, **hub.environment("hf_token")})
        hub.repositories["me/model"].branches["main"]  # path -> bytes

Weights (*.safetensors) go through LFS whatever their size. Each file's content is its own; commits are whole or not at
all. `fail_after` and `fail_with` make it break down in the middle.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

NAME = r"(?P<name>[^/]+/[^/]+)"


@dataclass
class Repository:
    """One repository: the files of each branch, and how many commits each got."""

    is_private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {".gitattributes": b""}})
    messages: list[str] = field(default_factory=list)

    def commit_id(self, branch: str) -> str:
        content = sorted((path, hashlib.sha1(data).hexdigest()) for path, data in self.branches[branch].items())
        return hashlib.sha1(repr((len(self.messages), content)).encode()).hexdigest()


class HubServer:
    """The server.

    Args:
        users: token -> user name.
        read_only_tokens: tokens that may not write.
    """

    def __init__(self, users: Mapping[str, str], read_only_tokens: tuple[str, ...] = ()) -> None:
        self.users = dict(users)
        self.read_only_tokens = read_only_tokens
        self.repositories: dict[str, Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[str] = []  # "METHOD /path", in order
        self.fail_after: int | None = None  # requests that are still answered
        self.fail_with: int | None = None  # this status from then on; None drops the connection
        self.is_full = False  # large files are refused
        self.fail_on = ""  # only requests that contain this count, and fail
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self, token: str, home: str) -> dict[str, str]:
        """What a process needs to take this server for the Hub."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": token,
            "HF_HOME": home,
            "NO_PROXY": "127.0.0.1",
        }

    def sent(self, pattern: str) -> list[str]:
        """The requests whose "METHOD /path" matches."""
        return [request for request in self.requests if re.search(pattern, request)]

    def must_fail(self, request: str) -> bool:
        with self.lock:
            self.requests.append(request)
            if self.fail_after is None or self.fail_on not in request:
                return False
            self.fail_after -= 1
            return self.fail_after < 0


class RefusedError(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        pass

    Handler.hub = hub
    return Handler


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        return

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815  the names http.server calls

    def _answer(self) -> None:
        path = unquote(urlparse(self.path).path)
        body = self._body()
        if self.hub.must_fail(f"{self.command} {path}"):
            if self.hub.fail_with is None:
                self.close_connection = True
                self.connection.close()
                return
            self._send(self.hub.fail_with, {"error": "out of order"}, {"X-Error-Message": "out of order"})
            return
        try:
            for method, pattern, function in _ROUTES:
                found = re.fullmatch(pattern, path)
                if found and self.command in method.split():
                    with self.hub.lock:
                        status, answer, headers = function(self, body, **found.groupdict())
                    self._send(status, answer, headers)
                    return
            raise RefusedError(404, "EntryNotFound", f"no such address: {self.command} {path}")
        except RefusedError as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            self._send(refused.status, {"error": refused.message}, {k: v for k, v in headers.items() if v})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, answer: Any, headers: Mapping[str, str]) -> None:
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        kind = "octet-stream" if isinstance(answer, bytes) else "json"
        self.send_header("Content-Type", f"application/{kind}")
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    @property
    def user(self) -> str:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in self.hub.users:
            raise RefusedError(401, "", "Invalid username or password.")
        return self.hub.users[token]

    def may_write(self, name: str) -> None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if name.split("/")[0] != self.user or token in self.hub.read_only_tokens:
            raise RefusedError(403, "", "You don't have the rights to write here")

    def repository(self, name: str) -> Repository:
        repository = self.hub.repositories.get(name)
        is_visible = repository is not None and (not repository.is_private or self._is_owner(name))
        if repository is None or not is_visible:
            raise RefusedError(
                404 if self.headers.get("Authorization") else 401, "RepoNotFound", "Repository not found"
            )
        return repository

    def branch(self, name: str, revision: str) -> tuple[Repository, str]:
        repository = self.repository(name)
        for branch in repository.branches:
            if revision in (branch, repository.commit_id(branch)):
                return repository, branch
        raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def _is_owner(self, name: str) -> bool:
        return self.user == name.split("/")[0]


Answer = tuple[int, Any, Mapping[str, str]]


def _who_am_i(request: _Handler, _body: bytes) -> Answer:
    return 200, {"type": "user", "name": request.user, "orgs": [], "auth": {"accessToken": {"role": "write"}}}, {}


def _create(request: _Handler, body: bytes) -> Answer:
    given = json.loads(body)
    name = f"{given.get('organization') or request.user}/{given['name']}"
    request.may_write(name)
    status = 409 if name in request.hub.repositories else 200
    request.hub.repositories.setdefault(name, Repository(is_private=given.get("visibility") == "private"))
    return status, {"url": f"{request.hub.url}/{name}", "name": name}, {}


def _validate_yaml(_request: _Handler, body: bytes) -> Answer:
    if "license: nonsense" in json.loads(body)["content"]:
        return 400, {"errors": [{"message": '"license" must be one of [apache-2.0, mit]'}], "warnings": []}, {}
    return 200, {"errors": [], "warnings": []}, {}


def _preupload(request: _Handler, body: bytes, name: str, revision: str) -> Answer:
    request.may_write(name)
    repository, branch = request.branch(name, revision)
    files = []
    for file in json.loads(body)["files"]:
        path, known = file["path"], repository.branches[branch].get(file["path"])
        mode = "lfs" if path.endswith(".safetensors") else "regular"
        files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": _oid(path, known)})
    return 200, {"files": files}, {}


def _lfs_batch(request: _Handler, body: bytes, name: str) -> Answer:
    request.may_write(name)
    answers = []
    for item in json.loads(body)["objects"]:
        answer = {"oid": item["oid"], "size": item["size"]}
        if request.hub.is_full:
            answers.append(answer | {"error": {"code": 403, "message": "Private repository storage limit reached"}})
            continue
        if item["oid"] not in request.hub.lfs:
            url = request.hub.url
            answer["actions"] = {
                "upload": {"href": f"{url}/lfs/{item['oid']}"},
                "verify": {"href": f"{url}/lfs-verify/{item['oid']}"},
            }
        answers.append(answer)
    return 200, {"transfer": "basic", "objects": answers}, {}


def _lfs_put(request: _Handler, body: bytes, oid: str) -> Answer:
    if hashlib.sha256(body).hexdigest() != oid:
        raise RefusedError(400, "", "content and hash differ")
    request.hub.lfs[oid] = body
    return 200, b"", {}


def _lfs_verify(request: _Handler, body: bytes, oid: str) -> Answer:
    if len(request.hub.lfs.get(oid, b"")) != json.loads(body)["size"]:
        raise RefusedError(404, "", "not here")
    return 200, {}, {}


def _commit(request: _Handler, body: bytes, name: str, revision: str) -> Answer:
    request.may_write(name)
    repository, branch = request.branch(name, revision)
    files = dict(repository.branches[branch])
    summary = ""
    for line in body.splitlines():
        operation = json.loads(line)
        value = operation["value"]
        if operation["key"] == "header":
            summary = value["summary"]
        elif operation["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif operation["key"] == "lfsFile":
            if value["oid"] not in request.hub.lfs:
                raise RefusedError(400, "", f"no such LFS object: {value['oid']}")
            files[value["path"]] = request.hub.lfs[value["oid"]]
        elif operation["key"] == "deletedFile":
            del files[value["path"]]
        else:
            raise RefusedError(400, "", f"unknown operation {operation['key']}")
    repository.branches[branch] = files
    repository.messages.append(summary)
    commit = repository.commit_id(branch)
    return 200, {"success": True, "commitOid": commit, "commitUrl": f"{request.hub.url}/{name}/commit/{commit}"}, {}


def _make_branch(request: _Handler, _body: bytes, name: str, revision: str) -> Answer:
    request.may_write(name)
    repository = request.repository(name)
    if revision in repository.branches:
        raise RefusedError(409, "", "Reference already exists")
    if revision.endswith(".lock"):  # one of the names git has no branch for
        raise RefusedError(400, "", "Invalid branch name")
    repository.branches[revision] = dict(repository.branches["main"])
    return 200, {}, {}


def _info(request: _Handler, _body: bytes, name: str, revision: str = "main") -> Answer:
    repository, branch = request.branch(name, revision)
    files = [{"rfilename": path} for path in sorted(repository.branches[branch])]
    commit = repository.commit_id(branch)
    return 200, {"id": name, "sha": commit, "private": repository.is_private, "siblings": files, "tags": []}, {}


def _tree(request: _Handler, _body: bytes, name: str, revision: str) -> Answer:
    repository, branch = request.branch(name, revision)
    files = []
    for path, data in sorted(repository.branches[branch].items()):
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _oid(path, data)}
        if path.endswith(".safetensors"):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        files.append(entry)
    return 200, files, {}


def _resolve(request: _Handler, _body: bytes, name: str, revision: str, path: str) -> Answer:
    repository, branch = request.branch(name, revision)
    data = repository.branches[branch].get(path)
    if data is None:
        raise RefusedError(404, "EntryNotFound", "Entry not found")
    etag = f'"{_oid(path, data)}"'
    headers = {"X-Repo-Commit": repository.commit_id(branch), "ETag": etag, "Content-Length": str(len(data))}
    if path.endswith(".safetensors"):
        headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(len(data))}
    return 200, data, headers


def _oid(path: str, data: bytes | None) -> str | None:
    if data is None:
        return None
    if path.endswith(".safetensors"):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


_ROUTES = (
    ("GET", r"/api/whoami-v2", _who_am_i),
    ("POST", r"/api/repos/create", _create),
    ("POST", r"/api/validate-yaml", _validate_yaml),
    ("POST", rf"/api/models/{NAME}/preupload/(?P<revision>.+)", _preupload),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", _lfs_batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", _lfs_put),
    ("POST", r"/lfs-verify/(?P<oid>\w+)", _lfs_verify),
    ("POST", rf"/api/models/{NAME}/commit/(?P<revision>.+)", _commit),
    ("POST", rf"/api/models/{NAME}/branch/(?P<revision>.+)", _make_branch),
    ("GET", rf"/api/models/{NAME}/revision/(?P<revision>.+)", _info),
    ("GET", rf"/api/models/{NAME}/tree/(?P<revision>.+)", _tree),
    ("GET", rf"/api/models/{NAME}", _info),
    ("GET HEAD", rf"/{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _resolve),
)
