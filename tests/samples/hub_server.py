"""A stand-in of the hub's HTTP API that only stores files: huggingface_hub's own client talks to it on loopback.

It knows repositories with branches, commits of ordinary files and of large ones (LFS, the basic transfer), pull
requests, private and gated repositories, tokens, and the error codes by which the client tells these apart.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

TOKENS = {"hf_ann": "ann", "hf_ben": "ben"}
"""Who may do what: the owner of a name writes there, everybody reads what is public."""
LARGE = (".safetensors", ".bin", ".pt", ".pkl")
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Stored:
    """A file: its bytes, and whether they lie apart as a large one."""

    data: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self) -> str:
        """As git names it: of a large file that is the name of the pointer."""
        data = self.data
        if self.large:
            data = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(data)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.oid


@dataclass
class Repository:
    """What is kept of one: files of each commit, and the commit of each branch."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, Stored]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, Stored], message: str) -> str:
        told = json.dumps([sorted((name, one.oid) for name, one in files.items()), message, len(self.commits)])
        name = hashlib.sha1(told.encode()).hexdigest()
        self.commits[name], self.branches[branch] = files, name
        self.messages.append(message)
        return name

    def files(self, revision: str = "main") -> dict[str, Stored]:
        return self.commits[self.branches.get(revision, revision)]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.open: list[socket.socket] = []

    def get_request(self) -> Any:
        found = super().get_request()
        self.open.append(found[0])
        return found


class Hub:
    """The store, and a server in front of it."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.damaged: set[str] = set()
        self.asked: list[tuple[str, str]] = []
        self.full = False
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        # Large files lie with another host, as on the hub: the client sends no token there.
        self.store = f"http://localhost:{self.server.server_address[1]}"

    def add(self, name: str, files: dict[str, bytes], **settings: Any) -> Repository:
        """A repository that somebody has filled."""
        repository = self.repositories.setdefault(name, Repository(**settings))
        stored = {path: Stored(data, path.endswith(LARGE)) for path, data in files.items()}
        repository.commit("main", stored, "first")
        return repository

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        return {path: one.data for path, one in self.repositories[name].files(revision).items()}

    @contextmanager
    def running(self) -> Iterator[Hub]:
        thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.stop()
            thread.join(10)

    def stop(self) -> None:
        """Go away, with connections that are held open too."""
        if self.server.fileno() != -1:
            self.server.shutdown()
            self.server.server_close()
        for each in self.server.open:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    # What is sent back ------------------------------------------------------------------------------------------

    def answer(self, code: int, data: Any = None, **headers: str) -> None:
        body = data if isinstance(data, bytes) else json.dumps(data if data is not None else {}).encode()
        self.send_response(code)
        kind = "application/octet-stream" if isinstance(data, bytes) else "application/json"
        told = {"Content-Type": kind, "Content-Length": str(len(body))}
        for name, value in (told | {name.replace("_", "-"): value for name, value in headers.items()}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, code: int, message: str, error: str | None = None) -> None:
        headers = {"X_Error_Message": message} | ({} if error is None else {"X_Error_Code": error})
        self.answer(code, {"error": message}, **headers)

    # Who asks, and for what -------------------------------------------------------------------------------------

    @property
    def user(self) -> str | None:
        return TOKENS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def sent(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def repository(self, name: str, writes: bool = False) -> Repository | None:
        """The repository, or None where the answer is given already."""
        found, owner = self.hub.repositories.get(name), name.partition("/")[0]
        if found is None or (found.private and self.user != owner):
            if self.user is None:  # as on the hub, which does not tell a stranger what there is
                self.refuse(401, "Invalid username or password.", "RepoNotFound")
            else:
                self.refuse(404, "Repository not found", "RepoNotFound")
            return None
        if writes and self.user is None:
            self.refuse(401, "Invalid username or password.")
            return None
        return found

    def revision(self, repository: Repository, given: str) -> str | None:
        name = unquote(given)
        found = repository.branches.get(name, name if name in repository.commits else None)
        if found is None:
            self.refuse(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return found

    def do_GET(self) -> None:
        self.begin()

    def do_HEAD(self) -> None:
        self.begin()

    def do_POST(self) -> None:
        self.begin()

    def do_PUT(self) -> None:
        self.begin()

    def begin(self) -> None:
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        self.body = self.sent()
        self.hub.asked.append((self.command, parts.path))
        if self.headers.get("Authorization") and self.user is None:
            self.refuse(401, "Invalid credentials in Authorization header")
            return
        for method, pattern, do in ROUTES:
            if method in (self.command, "GET" if self.command == "HEAD" else "") and (
                found := re.fullmatch(pattern, parts.path)
            ):
                do(self, *found.groups())
                return
        self.refuse(404, f"no such route: {self.command} {parts.path}")

    # Reading ----------------------------------------------------------------------------------------------------

    def info(self, name: str, revision: str | None = None) -> None:
        repository = self.repository(name)
        found = None if repository is None else self.revision(repository, revision or "main")
        if repository is not None and found is not None:
            files = [{"rfilename": path} for path in repository.commits[found]]
            self.answer(200, {"_id": "0", "id": name, "modelId": name, "sha": found, "private": repository.private,
                              "tags": [], "downloads": 0, "likes": 0, "siblings": files})  # fmt: skip

    def tree(self, name: str, revision: str) -> None:
        repository = self.repository(name)
        found = None if repository is None else self.revision(repository, revision)
        if repository is not None and found is not None:
            self.answer(200, [self.entry(path, one) for path, one in sorted(repository.commits[found].items())])

    def entry(self, path: str, one: Stored) -> dict[str, Any]:
        large = {"oid": one.sha256, "size": len(one.data), "pointerSize": 130}
        return {"type": "file", "path": path, "size": len(one.data), "oid": one.oid, **({"lfs": large} if one.large
                                                                                        else {})}  # fmt: skip

    def resolve(self, name: str, revision: str, path: str) -> None:
        repository = self.repository(name)
        if repository is None:
            return
        if repository.gated and self.user != name.partition("/")[0]:
            self.refuse(401 if self.user is None else 403, f"Access to model {name} is restricted", "GatedRepo")
            return
        found = self.revision(repository, revision)
        if found is None:
            return
        one = repository.commits[found].get(unquote(path))
        if one is None:
            self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=found)
        elif one.large:
            link = {"X_Linked_Etag": f'"{one.sha256}"', "X_Linked_Size": str(len(one.data))}
            self.answer(302, b"", X_Repo_Commit=found, Location=f"{self.hub.store}/large/{one.sha256}", **link)
        else:
            data = self.spoiled(unquote(path), one.data)
            self.answer(200, data, X_Repo_Commit=found, ETag=f'"{one.oid}"')

    def fetch(self, oid: str) -> None:
        data = next((one.data for repository in self.hub.repositories.values() for files in repository.commits.values()
                     for one in files.values() if one.sha256 == oid), None)  # fmt: skip
        if data is None:
            self.refuse(404, "no such object")
        else:
            self.answer(200, self.spoiled(oid, data), ETag=f'"{oid}"')

    def spoiled(self, name: str, data: bytes) -> bytes:
        return data[:-1] + bytes([data[-1] ^ 1]) if name in self.hub.damaged else data

    # Writing ----------------------------------------------------------------------------------------------------

    def create(self) -> None:
        asked = json.loads(self.body)
        if self.user is None:
            self.refuse(401, "Invalid username or password.")
            return
        owner = asked.get("organization") or self.user
        name = f"{owner}/{asked['name']}"
        if owner != self.user:
            self.refuse(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        elif name in self.hub.repositories:
            self.answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
        else:
            private = bool(asked.get("private")) or asked.get("visibility") == "private"
            self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
            self.hub.repositories[name].private = private
            self.answer(200, {"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def branch(self, name: str, branch: str) -> None:
        repository = self.repository(name, writes=True)
        if repository is None:
            return
        if unquote(branch) in repository.branches:
            self.refuse(409, "Reference already exists")
            return
        repository.branches[unquote(branch)] = repository.branches["main"]
        self.answer(201)

    def preupload(self, name: str, revision: str) -> None:
        repository = self.repository(name, writes=True)
        found = None if repository is None else self.revision(repository, revision)
        if repository is not None and found is not None:
            held, out = repository.commits[found], []
            for each in json.loads(self.body)["files"]:
                path = each["path"]
                base64.b64decode(each["sample"], validate=True)
                one = held.get(path)
                out.append({"path": path, "uploadMode": "lfs" if path.endswith(LARGE) else "regular",
                            "shouldIgnore": False, "oid": None if one is None else one.etag})  # fmt: skip
            self.answer(200, {"files": out})

    def batch(self, name: str) -> None:
        if self.repository(name, writes=True) is None:
            return
        out = []
        for each in json.loads(self.body)["objects"]:
            there = each["oid"] in self.hub.large
            upload = {"href": f"{self.hub.store}/large/{each['oid']}"}
            verify = {"href": f"{self.hub.url}/verify/{name}"}
            out.append({**each, **({} if there else {"actions": {"upload": upload, "verify": verify}})})
        self.answer(200, {"transfer": "basic", "objects": out})

    def store(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            self.refuse(400, "the content does not match its name")
        else:
            self.hub.large[oid] = self.body
            self.answer(200, b"")

    def verify(self, name: str) -> None:
        asked = json.loads(self.body)
        there = len(self.hub.large.get(asked["oid"], b"")) == asked["size"]
        self.answer(200) if there else self.refuse(404, "no such object")

    def commit(self, name: str, revision: str) -> None:
        repository = self.repository(name, writes=True)
        if repository is None:
            return
        asks = self.query.get("create_pr") == ["1"]
        if self.user != name.partition("/")[0] and not asks:
            self.refuse(403, "You don't have write access to this repository")
            return
        if self.hub.full:
            self.refuse(403, "Private repository storage limit reached")
            return
        if (found := self.revision(repository, revision)) is None:
            return
        files, message = dict(repository.commits[found]), ""
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            match operation["key"]:
                case "header":
                    message = value["summary"]
                case "file":
                    files[value["path"]] = Stored(base64.b64decode(value["content"], validate=True), False)
                case "lfsFile":
                    files[value["path"]] = Stored(self.hub.large[value["oid"]], True)
                case "deletedFile":
                    del files[value["path"]]
                case other:
                    self.refuse(400, f"unknown operation {other}")
                    return
        pulls = sum(each.startswith("refs/pr/") for each in repository.branches)
        place = f"refs/pr/{pulls + 1}" if asks else unquote(revision)
        made = repository.commit(place, files, message)
        pull = {"pullRequestUrl": f"{self.hub.url}/{name}/discussions/{pulls + 1}"} if asks else {}
        self.answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{made}", "commitOid": made, **pull})

    def check_card(self) -> None:
        text = json.loads(self.body)["content"]
        good = re.match(r"---\n.*?\n---\n", text, re.S)
        self.answer(200, {"errors": [], "warnings": []}) if good else self.answer(
            400, {"errors": [{"message": "there is no metadata"}], "warnings": []}
        )


NAME = r"([\w.-]+/[\w.-]+)"
REV = r"([^/]+)"
ROUTES: list[tuple[str, str, Any]] = [
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.check_card),
    ("GET", f"/api/models/{NAME}", _Handler.info),
    ("GET", f"/api/models/{NAME}/revision/{REV}", _Handler.info),
    ("GET", f"/api/models/{NAME}/tree/{REV}", _Handler.tree),
    ("POST", f"/api/models/{NAME}/branch/{REV}", _Handler.branch),
    ("POST", f"/api/models/{NAME}/preupload/{REV}", _Handler.preupload),
    ("POST", f"/api/models/{NAME}/commit/{REV}", _Handler.commit),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("GET", f"/{NAME}/resolve/{REV}/(.+)", _Handler.resolve),
    ("GET", "/large/([0-9a-f]{64})", _Handler.fetch),
    ("PUT", "/large/([0-9a-f]{64})", _Handler.store),
    ("POST", f"/verify/{NAME}", _Handler.verify),
]


@contextmanager
def hub_at(patch: pytest.MonkeyPatch, cache: str, token: str | None = "hf_ann") -> Iterator[Hub]:
    """A running hub to which this process and those that it starts go, with an empty cache."""
    from huggingface_hub import constants

    with Hub().running() as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": cache, "HF_HOME": cache, "HF_HUB_DISABLE_XET": "1",
                    "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # fmt: skip
        for name, value in settings.items():
            patch.setenv(name, value)
        for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"):
            patch.delenv(name, raising=False)
        if token is not None:
            patch.setenv("HF_TOKEN", token)
        # The client reads its surroundings once, when it is imported.
        patch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", cache)
        patch.setattr(constants, "HF_TOKEN_PATH", f"{cache}/token")
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield hub
