"""A Hugging Face Hub on 127.0.0.1 for tests: the endpoints that the real clients use, in memory, with faults on purpose.

Repositories have commits, branches, tags, pull requests, LFS objects (and Xet ones, through the client's local backend);
private and gated ones ask for a token; a commit on an old parent is refused; metadata of a README.md is validated by the
rules that the Hub documents. What is not needed by a client here is not there.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import uvicorn
import yaml
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

WRITE_TOKEN, READ_TOKEN = "hf_loopback_write", "hf_loopback_read"
USER = "tester"
LFS_SUFFIXES = {".bin", ".faiss", ".npy", ".parquet", ".pkl", ".pth", ".safetensors"}
"""As the .gitattributes that the Hub gives every new repository."""
CREATED = "2026-01-01T00:00:00.000Z"
LICENSES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m afl-3.0
artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0
cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0
cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0
epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0
odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr unknown other
"""
"""Identifiers that the Hub documents for `license`."""
COLOURS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
REPO = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")


@dataclass(frozen=True)
class File:
    """One file of a commit."""

    size: int
    oid: str
    """Git's SHA-1 of the blob; of the pointer, for LFS."""
    sha256: str | None = None
    """Of the contents, for LFS."""
    data: bytes | None = None
    """None where only the Xet backend has the contents."""


def regular(data: bytes) -> File:
    return File(len(data), hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest(), data=data)


def lfs(sha256: str, size: int, data: bytes | None) -> File:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
    return File(size, regular(pointer).oid, sha256, data)


@dataclass
class Repository:
    """One repository with all its commits."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    """Messages of the commits, oldest first."""
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, File], message: str) -> str:
        """Add a commit; it stands on no branch yet."""
        content = [sorted((path, file.oid) for path, file in files.items()), message, len(self.commits)]
        sha = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        self.commits[sha] = files
        self.log.append(message)
        return sha

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch, tag, pull request or commit id."""
        if revision in self.commits:
            return revision
        return self.branches.get(revision) or self.tags.get(revision) or self.pulls.get(revision)

    def files(self, revision: str = "main") -> dict[str, File]:
        """Path -> file at a revision."""
        return self.commits[self.resolve(revision)]


@dataclass
class Fault:
    """Something that goes wrong for requests whose 'METHOD /path' matches, a number of times."""

    match: str
    times: int = 1
    status: int | None = None
    """Answer this instead."""
    headers: dict[str, str] = field(default_factory=dict)
    before: Callable[[], None] | None = None
    """Do this first, then answer as ever (another writer's commit, say)."""
    drop_at: int | None = None
    """Break the connection after so many bytes of the body."""
    change: Callable[[bytes], bytes] | None = None
    """Send this body instead."""
    skip: int = 0
    """Matching requests that pass unharmed first."""


class RefusedError(Exception):
    """An answer of an error status."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.response = JSONResponse(
            {"error": message},
            status,
            headers={"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers},
        )


class LoopbackHub:
    """The server's state and its endpoints."""

    def __init__(self) -> None:
        self.url = ""
        self.reset()
        routes = [Route("/{path:path}", self._answer, methods=["GET", "HEAD", "POST", "PUT", "DELETE"])]
        self.app = Starlette(routes=routes)

    def reset(self) -> None:
        """Forget everything."""
        self.repos: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        """'METHOD /path' of every request, in order."""
        self.agents: set[str] = set()
        """User agents of every client that asked."""
        self.ranges: list[str] = []
        """Range headers of downloads."""
        self.sent: dict[str, int] = {}
        """path -> bytes sent of it."""
        self.xet_folder: Path | None = None
        """Where the Xet client's local backend keeps its data; None serves LFS only."""
        self.xet_hashes: dict[str, str] = {}
        """SHA-256 -> Xet hash, of files that will be uploaded through Xet."""

    def repo(self, repo_id: str, repo_type: str = "model") -> Repository:
        """A repository that exists."""
        return self.repos[repo_type, repo_id]

    async def _answer(self, request: Request) -> Response:
        path = request.scope["raw_path"].decode()
        line = f"{request.method} {path}"
        self.requests.append(line)
        self.agents.add(request.headers.get("user-agent", ""))
        fault = next((fault for fault in self.faults if fault.times and re.search(fault.match, line)), None)
        if fault and fault.skip:
            fault.skip -= 1
            fault = None
        if fault:
            fault.times -= 1
            if fault.before:
                fault.before()
            if fault.status:
                return RefusedError(fault.status, f"a fault on purpose: {fault.status}", **fault.headers).response
        for method, pattern, handler in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and request.method in method:
                values = {key: unquote(value) for key, value in match.groupdict(default="").items()}
                body = await request.body()
                try:
                    return handler(self, request, body, fault=fault, **values)
                except RefusedError as refused:
                    return refused.response
        return RefusedError(404, f"the loopback Hub has no {line}").response

    def _open(self, request: Request, kind: str, repo_id: str, *, write: bool = False) -> Repository:
        """A repository, if the request's token may see (or change) it."""
        repo_type = (kind or "models").removesuffix("s")
        repo = self.repos.get((repo_type, repo_id))
        token = self._token(request)
        if repo is None or (repo.private and token is None):
            raise RefusedError(404 if token else 401, "Repository not found", "RepoNotFound")
        if write and token != WRITE_TOKEN:
            raise RefusedError(403 if token else 401, "this token may not write here")
        return repo

    def _token(self, request: Request) -> str | None:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token and token not in {WRITE_TOKEN, READ_TOKEN}:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return token or None

    def _at(self, repo: Repository, revision: str) -> str:
        sha = repo.resolve(revision)
        if sha is None:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def whoami(self, request: Request, body: bytes, **_: Any) -> Response:
        token = self._token(request)
        if token is None:
            raise RefusedError(401, "Invalid username or password.")
        role = "write" if token == WRITE_TOKEN else "read"
        return JSONResponse({"name": USER, "type": "user", "orgs": [{"name": "org"}], "auth": {"accessToken": {"role": role}}})

    def create(self, request: Request, body: bytes, **_: Any) -> Response:
        if self._token(request) != WRITE_TOKEN:
            raise RefusedError(403 if self._token(request) else 401, "this token may not create repositories")
        wanted = json.loads(body)
        repo_id = f"{wanted.get('organization') or USER}/{wanted['name']}"
        key = wanted.get("type") or "model", repo_id
        url = f"{self.url}/{'' if key[0] == 'model' else key[0] + 's/'}{repo_id}"
        if key in self.repos:
            return JSONResponse({"url": url, "error": "You already created this repo"}, 409)
        if key[0] == "space" and wanted.get("sdk") not in {"gradio", "docker", "static"}:
            raise RefusedError(400, "a Space needs an sdk")
        repo = Repository(private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
        repo.branches["main"] = repo.commit({".gitattributes": regular(b"*.safetensors filter=lfs\n")}, "initial commit")
        self.repos[key] = repo
        return JSONResponse({"url": url})

    def validate(self, request: Request, body: bytes, **_: Any) -> Response:
        wanted = json.loads(body)
        errors = card_errors(wanted["content"], wanted.get("repoType", "model"))
        answer = {"errors": [{"message": text} for text in errors], "warnings": []}
        return JSONResponse(answer, 400 if errors else 200)

    def info(self, request: Request, body: bytes, *, kind: str, id: str, rev: str = "", **_: Any) -> Response:
        repo = self._open(request, kind, id)
        sha = self._at(repo, rev or "main")
        return JSONResponse(
            {
                "id": id,
                "modelId": id,
                "sha": sha,
                "private": repo.private,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "createdAt": CREATED,
                "lastModified": CREATED,
                "siblings": [{"rfilename": path} for path in sorted(repo.commits[sha])],
            }
        )

    def refs(self, request: Request, body: bytes, *, kind: str, id: str, **_: Any) -> Response:
        repo = self._open(request, kind, id)

        def listed(refs: dict[str, str], prefix: str) -> list[dict[str, str]]:
            return [{"name": name, "ref": f"refs/{prefix}/{name}", "targetCommit": sha} for name, sha in refs.items()]

        return JSONResponse(
            {"branches": listed(repo.branches, "heads"), "tags": listed(repo.tags, "tags"), "converts": [], "pullRequests": []}
        )

    def tree(self, request: Request, body: bytes, *, kind: str, id: str, rev: str, path: str = "", **_: Any) -> Response:
        repo = self._open(request, kind, id)
        files = repo.commits[self._at(repo, rev)]
        below = f"{path}/" if path else ""
        inside = {name: file for name, file in files.items() if name.startswith(below)}
        if path and not inside:
            raise RefusedError(404, f"{path} does not exist", "EntryNotFound")
        entries: dict[str, dict[str, Any]] = {}
        for name, file in sorted(inside.items()):
            parts = name.removeprefix(below).split("/")
            for depth in range(1, len(parts)):
                folder = below + "/".join(parts[:depth])
                entries[folder] = {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0}
            entries[name] = self._entry(name, file)
        if request.query_params.get("recursive", "").lower() not in {"true", "1"}:
            entries = {name: entry for name, entry in entries.items() if "/" not in name.removeprefix(below)}
        return JSONResponse(list(entries.values()))

    def paths_info(self, request: Request, body: bytes, *, kind: str, id: str, rev: str, **_: Any) -> Response:
        repo = self._open(request, kind, id)
        files = repo.commits[self._at(repo, rev)]
        return JSONResponse([self._entry(path, files[path]) for path in json.loads(body)["paths"] if path in files])

    def _entry(self, path: str, file: File) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "oid": file.oid, "size": file.size}
        if file.sha256:
            entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
            if self.xet_folder and file.sha256 in self.xet_hashes:
                entry["xetHash"] = self.xet_hashes[file.sha256]
        return entry

    def tag(self, request: Request, body: bytes, *, kind: str, id: str, rev: str, **_: Any) -> Response:
        repo = self._open(request, kind, id, write=True)
        name = json.loads(body)["tag"]
        if name in repo.tags:
            raise RefusedError(409, f"Tag {name} already exists")
        repo.tags[name] = self._at(repo, rev)
        return JSONResponse({})

    def branch(self, request: Request, body: bytes, *, kind: str, id: str, rev: str, **_: Any) -> Response:
        repo = self._open(request, kind, id, write=True)
        if rev in repo.branches:
            raise RefusedError(409, f"Branch {rev} already exists")
        start = (json.loads(body) if body else {}).get("startingPoint") or "main"
        repo.branches[rev] = self._at(repo, start)
        return JSONResponse({})

    def preupload(self, request: Request, body: bytes, *, kind: str, id: str, rev: str, **_: Any) -> Response:
        repo = self._open(request, kind, id, write=True)
        files = repo.commits[self._at(repo, rev)]
        answers = []
        for wanted in json.loads(body)["files"]:
            path = wanted["path"]
            mode = "lfs" if Path(path).suffix in LFS_SUFFIXES or wanted["size"] > 10_000_000 else "regular"
            present = files.get(path)
            oid = (present.sha256 or present.oid) if present else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return JSONResponse({"files": answers})

    def lfs_batch(self, request: Request, body: bytes, *, kind: str, id: str, **_: Any) -> Response:
        self._open(request, kind, id, write=True)
        answers = []
        for wanted in json.loads(body)["objects"]:
            answer = dict(wanted)
            if wanted["oid"] not in self.objects:
                href = f"{self.url}/lfs/{wanted['oid']}"
                answer["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            answers.append(answer)
        return JSONResponse({"transfer": "basic", "objects": answers})

    def lfs_put(self, request: Request, body: bytes, *, oid: str, **_: Any) -> Response:
        if hashlib.sha256(body).hexdigest() != oid:
            raise RefusedError(400, "the object is not the one that was announced")
        self.objects[oid] = body
        return Response()

    def lfs_verify(self, request: Request, body: bytes, *, oid: str, **_: Any) -> Response:
        if len(self.objects.get(oid, b"")) != json.loads(body)["size"]:
            raise RefusedError(404, "no such object")
        return JSONResponse({})

    def xet_token(self, request: Request, body: bytes, *, kind: str, id: str, **_: Any) -> Response:
        self._open(request, kind, id)
        if self.xet_folder is None:
            raise RefusedError(404, "no Xet here")
        expires = int(time.time()) + 3600
        headers = {
            "X-Xet-Cas-Url": f"local://{self.xet_folder}",
            "X-Xet-Access-Token": "loopback",
            "X-Xet-Token-Expiration": str(expires),
        }
        answer = {"casUrl": f"local://{self.xet_folder}", "accessToken": "loopback", "exp": expires}
        return JSONResponse(answer, headers=headers)

    def commit(self, request: Request, body: bytes, *, kind: str, id: str, rev: str, **_: Any) -> Response:
        repo = self._open(request, kind, id, write=True)
        head = self._at(repo, rev)
        files = dict(repo.commits[head])
        message = ""
        for line in body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                message = value["summary"]
                if value.get("parentCommit") not in {None, head}:
                    raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = regular(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                data = self.objects.get(value["oid"])
                if data is None and value["oid"] not in self.xet_hashes:
                    raise RefusedError(400, f"the LFS object of {value['path']} was never uploaded")
                files[value["path"]] = lfs(value["oid"], value["size"], data)
            elif key in {"deletedFile", "deletedFolder"}:
                gone = [path for path in files if path == value["path"] or path.startswith(value["path"].rstrip("/") + "/")]
                if not gone:
                    raise RefusedError(400, f"there is no {value['path']} to delete")
                for path in gone:
                    del files[path]
        sha = repo.commit(files, message)
        page = f"{self.url}/{'' if kind == 'models' else kind + '/'}{id}"
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{page}/commit/{sha}", "hookOutput": ""}
        if request.query_params.get("create_pr") == "1":
            number = len(repo.pulls) + 1
            repo.pulls[f"refs/pr/{number}"] = sha
            answer["pullRequestUrl"] = f"{page}/discussions/{number}"
        else:
            repo.branches[rev] = sha
        return JSONResponse(answer)

    def variables(self, request: Request, body: bytes, *, id: str, **_: Any) -> Response:
        repo = self._open(request, "spaces", id, write=request.method == "POST")
        if request.method == "POST":
            wanted = json.loads(body)
            repo.variables[wanted["key"]] = wanted["value"]
        return JSONResponse({key: {"value": value, "updatedAt": CREATED} for key, value in repo.variables.items()})

    def resolve(
        self, request: Request, body: bytes, *, kind: str, id: str, rev: str, path: str, fault: Fault | None, **_: Any
    ) -> Response:
        repo = self._open(request, kind, id)
        sha = self._at(repo, rev)
        if repo.gated and self._token(request) != WRITE_TOKEN:
            raise RefusedError(403, "Access to this repository is restricted", "GatedRepo")
        if path not in repo.commits[sha]:
            raise RefusedError(404, f"{path} does not exist", "EntryNotFound", **{"X-Repo-Commit": sha})
        file = repo.commits[sha][path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file.sha256 or file.oid}"', "Accept-Ranges": "bytes"}
        if file.sha256:
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
            if self.xet_folder and file.sha256 in self.xet_hashes:
                headers["X-Xet-Hash"] = self.xet_hashes[file.sha256]
                headers["X-Xet-Refresh-Route"] = f"{self.url}/api/{kind or 'models'}/{id}/xet-read-token/{sha}"
        if request.method == "HEAD":
            return Response(headers={**headers, "Content-Length": str(file.size)})
        assert file.data is not None, f"{path} is with Xet only"
        data, status = file.data, 200
        if fault and fault.change:
            data = fault.change(data)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
        if wanted:
            self.ranges.append(request.headers["range"])
            first = int(wanted[1])
            last = min(int(wanted[2]) if wanted[2] else len(data) - 1, len(data) - 1)
            if first >= len(data):
                raise RefusedError(416, "range not satisfiable", **{"Content-Range": f"bytes */{len(data)}"})
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        headers["Content-Length"] = str(len(data))
        if fault and fault.drop_at is not None:
            return StreamingResponse(_breaking_off(data, fault.drop_at), status, headers)
        self.sent[path] = self.sent.get(path, 0) + len(data)
        return Response(data, status, headers)


async def _breaking_off(data: bytes, at: int) -> Any:
    """The first bytes of a body, then nothing: the connection breaks."""
    for start in range(0, at, 65536):
        yield data[start : min(start + 65536, at)]
    raise ConnectionResetError("a fault on purpose")


KIND, ID, REV = r"(?P<kind>models|datasets|spaces)", r"(?P<id>[\w.-]+/[\w.-]+)", r"(?P<rev>[^/]+)"
ROUTES: list[tuple[set[str], str, Callable[..., Response]]] = [
    ({"GET"}, r"/api/whoami-v2", LoopbackHub.whoami),
    ({"POST"}, r"/api/repos/create", LoopbackHub.create),
    ({"POST"}, r"/api/validate-yaml", LoopbackHub.validate),
    ({"GET", "POST"}, rf"/api/spaces/{ID}/variables", LoopbackHub.variables),
    ({"GET"}, rf"/api/{KIND}/{ID}(?:/revision/{REV})?", LoopbackHub.info),
    ({"GET"}, rf"/api/{KIND}/{ID}/refs", LoopbackHub.refs),
    ({"GET"}, rf"/api/{KIND}/{ID}/tree/{REV}(?:/(?P<path>.+))?", LoopbackHub.tree),
    ({"POST"}, rf"/api/{KIND}/{ID}/paths-info/{REV}", LoopbackHub.paths_info),
    ({"POST"}, rf"/api/{KIND}/{ID}/tag/{REV}", LoopbackHub.tag),
    ({"POST"}, rf"/api/{KIND}/{ID}/branch/{REV}", LoopbackHub.branch),
    ({"POST"}, rf"/api/{KIND}/{ID}/preupload/{REV}", LoopbackHub.preupload),
    ({"POST"}, rf"/api/{KIND}/{ID}/commit/{REV}", LoopbackHub.commit),
    ({"GET"}, rf"/api/{KIND}/{ID}/xet-(?:read|write)-token/{REV}", LoopbackHub.xet_token),
    ({"POST"}, rf"/(?:(?P<kind>datasets|spaces)/)?{ID}\.git/info/lfs/objects/batch", LoopbackHub.lfs_batch),
    ({"PUT"}, r"/lfs/(?P<oid>[0-9a-f]{64})", LoopbackHub.lfs_put),
    ({"POST"}, r"/lfs/(?P<oid>[0-9a-f]{64})/verify", LoopbackHub.lfs_verify),
    ({"GET", "HEAD"}, rf"/(?:(?P<kind>datasets|spaces)/)?{ID}/resolve/{REV}/(?P<path>.+)", LoopbackHub.resolve),
]


def card_errors(content: str, repo_type: str) -> list[str]:
    """What is wrong with a card's metadata by the Hub's documented rules for models, datasets and Spaces."""
    match = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", content, re.DOTALL)
    if not match:
        return ["there is no metadata block"]
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"the metadata is not YAML: {error}"]
    if not isinstance(data, dict):
        return ["the metadata is no mapping"]
    errors = list(_license_errors(data))
    for key in ("tags", "datasets", "models", "task_categories", "size_categories"):
        if not all(isinstance(value, str) for value in data.get(key, [])) or isinstance(data.get(key), str):
            errors.append(f"{key} must be a list of strings")
    bases = data.get("base_model", [])
    named = [*data.get("models", []), *([bases] if isinstance(bases, str) else bases)]
    named += data.get("datasets", []) if repo_type != "dataset" else []
    errors += [f"{name!r} is no repository id" for name in named if not REPO.fullmatch(str(name))]
    errors += _space_errors(data) if repo_type == "space" else []
    errors += _config_errors(data) if repo_type == "dataset" else []
    errors += _index_errors(data) if repo_type == "model" else []
    return errors


def _license_errors(data: dict[str, Any]) -> Iterator[str]:
    license_id = data.get("license")
    if license_id is not None and license_id not in LICENSES.split():
        yield f"license {license_id!r} is not one of the Hub's"
    if license_id == "other":
        if not re.fullmatch(r"[a-z0-9.-]+", str(data.get("license_name"))):
            yield "license 'other' needs a license_name in lower case"
        if not re.fullmatch(r"LICENSE(\.md)?|https?://.+", str(data.get("license_link"))):
            yield "license 'other' needs a license_link to LICENSE, LICENSE.md or an address"


def _space_errors(data: dict[str, Any]) -> Iterator[str]:
    for key in ("title", "sdk", "emoji"):
        if not isinstance(data.get(key), str):
            yield f"a Space needs {key}"
    for key in ("colorFrom", "colorTo"):
        if data.get(key) not in COLOURS:
            yield f"{key} must be one of {sorted(COLOURS)}"
    if len(data.get("short_description", "")) > 60:
        yield "short_description has more than 60 characters"
    if not isinstance(data.get("python_version", ""), str) or not isinstance(data.get("sdk_version", ""), str):
        yield "versions must be strings"


def _config_errors(data: dict[str, Any]) -> Iterator[str]:
    names = [config.get("config_name") for config in data.get("configs", [])]
    if len(set(names)) != len(names):
        yield "two configurations have one name"
    if sum(bool(config.get("default")) for config in data.get("configs", [])) > 1:
        yield "two configurations are the default"
    for config in data.get("configs", []):
        if not re.fullmatch(r"[^<>:/\\|?*]+", str(config.get("config_name"))):
            yield f"bad config_name {config.get('config_name')!r}"
        if not all(set(file) == {"split", "path"} for file in config.get("data_files", [])):
            yield "data_files needs split and path"


def _index_errors(data: dict[str, Any]) -> Iterator[str]:
    for model in data.get("model-index", []):
        if not isinstance(model.get("name"), str) or not isinstance(model.get("results"), list):
            yield "model-index needs name and results"
            continue
        for result in model["results"]:
            if not isinstance(result.get("task", {}).get("type"), str):
                yield "model-index: a result needs task.type"
            if not {"type", "name"} <= set(result.get("dataset", {})):
                yield "model-index: a result needs dataset.type and dataset.name"
            if not result.get("metrics") or not all({"type", "value"} <= set(metric) for metric in result["metrics"]):
                yield "model-index: a result needs metrics with type and value"


class Server:
    """A `LoopbackHub` served on a bound socket by a thread of its own."""

    def __init__(self, bound: socket.socket | None = None) -> None:
        if bound is None:
            bound = socket.socket()
            bound.bind(("127.0.0.1", 0))
        self.hub = LoopbackHub()
        self.hub.url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        self._server = uvicorn.Server(uvicorn.Config(self.hub.app, log_level="critical", lifespan="off"))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [bound]}, daemon=True)

    def __enter__(self) -> LoopbackHub:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        return self.hub

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(10)
