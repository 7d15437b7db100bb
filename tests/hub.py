"""
A stand-in for the Hub on loopback, for the unmodified client: repositories with branches, private ones, LFS objects.

It answers as the real one does where a push or a download depends on it: an object that is there needs no upload, what
is sent must have the digest it is named by, a commit may only name objects that are there, a branch that is not there
is an error, and who may not see a private repository is told that there is none. No Xet (HF_HUB_DISABLE_XET=1).
"""

import base64
import hashlib
import json
import math
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml


MODEL = r"([^/]+/[^/]+)"
LARGE = (".safetensors", ".bin", ".pt", ".pth")


def _sha1(value: bytes | str) -> str:
    return hashlib.sha1(value if isinstance(value, bytes) else value.encode()).hexdigest()


def git_hash(content: bytes) -> str:
    return _sha1(b"blob %d\0" % len(content) + content)


@dataclass
class Repo:
    """`branches`: name -> commits [(sha, message, {path: (kind, bytes or sha256, size)})], the newest last."""

    private: bool
    branches: dict = field(default_factory=dict)

    def find(self, revision: str):
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for commits in self.branches.values() for c in commits if c[0] == revision), None)


class LocalHub(ThreadingHTTPServer):
    """
    `repos`: id -> Repo; `blobs`: sha256 -> bytes; `log`: "METHOD /path" of every request; `before_upload`: called with
    the sha256 of an object before it is taken, for tests that end the sender there; if it returns False, it is not.

    A client process needs `environment` before it imports huggingface_hub.
    """

    daemon_threads = True

    def __init__(self, user: str = "tester", token: str = "hf_local"):
        self.user, self.tokens = user, {token: user, "hf_stranger": "stranger"}
        self.log, self.repos, self.blobs, self.before_upload = [], {}, {}, None
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # a client that was killed

    def environment(self, home) -> dict[str, str]:
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": next(iter(self.tokens)),
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        }

    def commits(self, repo_id: str, branch: str = "main") -> list:
        return self.repos[repo_id].branches[branch]

    def files(self, repo_id: str, branch: str = "main") -> set[str]:
        """The paths in the newest commit."""
        return set(self.commits(repo_id, branch)[-1][2])

    def ever(self, repo_id: str) -> set[str]:
        """The paths that any commit has held."""
        branches = self.repos[repo_id].branches.values()
        return {path for commits in branches for _, _, files in commits for path in files}

    def content(self, repo_id: str, path: str, branch: str = "main") -> bytes:
        kind, value, _ = self.commits(repo_id, branch)[-1][2][path]
        return self.blobs[value] if kind == "lfs" else value

    def requests(self, part: str) -> list[str]:
        return [line for line in self.log if part in line]


class _Refused(Exception):
    """An answer that is no success: status, error code of the Hub, message."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LocalHub

    def log_message(self, *args):
        pass

    def _send(self, code, value=None, data=None, headers=()):
        data = json.dumps(value).encode() if data is None else data
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        for name, text in headers:
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _body(self) -> bytes:
        if not self.headers.get("Transfer-Encoding"):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _handle(self):
        path, body = unquote(urlsplit(self.path).path), self._body()
        self.server.log.append(f"{self.command} {path}")
        try:
            self._route(path, body)
        except _Refused as refused:
            status, code, message = refused.args
            headers = [("X-Error-Code", code)] if code else []
            self._send(status, {"error": message, "errors": [{"message": message}]}, headers=headers)

    def _route(self, path, body):
        hub = self.server
        if path == "/api/validate-yaml":
            _validate(json.loads(body)["content"])
            return self._send(200, {"errors": [], "warnings": []})
        if path == "/api/whoami-v2":
            return self._send(200, {"name": self._who(), "type": "user"})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if match := re.match(rf"/api/models/{MODEL}/?(.*)$", path):
            return self._api(*match.groups(), body)
        if match := re.match(rf"/{MODEL}\.git/info/lfs/objects/batch$", path):
            self._repo(match[1], write=True)
            return self._batch(json.loads(body)["objects"])
        if path == "/verify":
            item = json.loads(body)
            if len(hub.blobs.get(item["oid"], b"")) != item["size"]:
                raise _Refused(404, None, "no such object")
            return self._send(200, {})
        if path.startswith("/lfs/"):
            if hub.before_upload is not None and hub.before_upload(path[5:]) is False:
                raise _Refused(403, None, "not taken")
            if hashlib.sha256(body).hexdigest() != path[5:]:
                raise _Refused(400, None, "content does not have the digest it is named by")
            hub.blobs[path[5:]] = body
            return self._send(200, {})
        if match := re.match(rf"/{MODEL}/resolve/([^/]+)/(.+)$", path):
            return self._resolve(*match.groups())
        raise _Refused(404, "EntryNotFound", path)

    # ---- who may do what ----

    def _who(self, needed=True) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        user = self.server.tokens.get(token)
        if user is None and (token or needed):
            raise _Refused(401, None, "Invalid username or password.")
        return user

    def _repo(self, repo_id, write=False) -> Repo:
        user, repo = self._who(needed=write), self.server.repos.get(repo_id)
        if repo is None or (repo.private and user != self.server.user):
            # nobody is told whether it exists; without a token the Hub says 401
            raise _Refused(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and user != self.server.user:
            raise _Refused(403, None, "You don't have the rights to write here")
        return repo

    # ---- repositories ----

    def _create(self, request):
        if self._who() != self.server.user:
            raise _Refused(403, None, "You don't have the rights to create a model here")
        repo_id = f"{request.get('organization') or self.server.user}/{request['name']}"
        answer = {"url": f"{self.server.endpoint}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.server.repos:
            return self._send(409, answer)
        private = request.get("visibility") == "private" or bool(request.get("private"))
        first = (_sha1(repo_id), "initial commit", {".gitattributes": ("regular", b"", 0)})
        self.server.repos[repo_id] = Repo(private, {"main": [first]})
        self._send(200, answer)

    def _api(self, repo_id, rest, body):
        what, _, revision = rest.partition("/")
        writes = self.command == "POST" and what in ("preupload", "commit", "branch")
        repo = self._repo(repo_id, write=writes)
        if what == "branch":
            if revision in repo.branches:
                return self._send(409, {"error": "Reference already exists"})
            repo.branches[revision] = list(repo.branches["main"])
            return self._send(200, {})
        revision = revision.split("/")[0] if what == "tree" else revision
        found = repo.find(revision or "main") if not writes else repo.branches.get(revision, [None])[-1]
        if found is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        sha, _, files = found
        if what == "preupload":
            modes = [_upload_mode(item, files) for item in json.loads(body)["files"]]
            return self._send(200, {"files": modes})
        if what == "commit":
            sha = self._commit(repo.branches[revision], body)
            url = f"{self.server.endpoint}/{repo_id}/commit/{sha}"
            return self._send(200, {"success": True, "commitOid": sha, "commitUrl": url})
        if what == "tree":
            tree = [{"type": "file", "path": name, "size": v[2], "oid": _oid(v)} for name, v in files.items()]
            return self._send(200, tree)
        if what in ("", "revision"):
            siblings = [{"rfilename": name, "size": v[2], "blobId": _oid(v)} for name, v in files.items()]
            info = {"id": repo_id, "sha": sha, "private": repo.private, "tags": [], "downloads": 0, "likes": 0}
            return self._send(200, info | {"siblings": siblings})
        raise _Refused(404, "EntryNotFound", rest)

    def _batch(self, objects):
        hub, answers = self.server, []
        for item in objects:
            upload = {"href": f"{hub.endpoint}/lfs/{item['oid']}"}
            actions = {"actions": {"upload": upload, "verify": {"href": f"{hub.endpoint}/verify"}}}
            answers.append(item | ({} if item["oid"] in hub.blobs else actions))
        self._send(200, {"transfer": "basic", "objects": answers})

    def _commit(self, commits, body) -> str:
        files, message = dict(commits[-1][2]), ""
        for line in map(json.loads, body.splitlines()):
            key, value = line["key"], line["value"]
            if key == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, commits[-1][0]):
                    raise _Refused(412, None, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                content = base64.b64decode(value["content"])
                if value["path"] == "README.md":
                    _validate(content.decode())
                files[value["path"]] = ("regular", content, len(content))
            elif key == "lfsFile":
                if value["oid"] not in self.server.blobs:
                    raise _Refused(400, None, f"LFS pointer of {value['path']} points to a file that does not exist")
                files[value["path"]] = ("lfs", value["oid"], value["size"])
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise _Refused(404, "EntryNotFound", "A file with this name doesn't exist")
        commits.append((_sha1(body + str(time.time_ns()).encode()), message, files))
        return commits[-1][0]

    def _resolve(self, repo_id, revision, path):
        found = self._repo(repo_id).find(revision)
        if found is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        sha, _, files = found
        if path not in files:
            raise _Refused(404, "EntryNotFound", path)
        kind, value, size = files[path]
        etag = f'"{_oid(files[path])}"'
        headers = [("X-Repo-Commit", sha), ("ETag", etag), ("X-Linked-Etag", etag), ("X-Linked-Size", str(size))]
        self._send(200, data=self.server.blobs[value] if kind == "lfs" else value, headers=headers)

    do_GET = do_POST = do_PUT = do_HEAD = _handle


def _oid(entry) -> str:
    kind, value, _ = entry
    return value if kind == "lfs" else git_hash(value)


def _upload_mode(item, files) -> dict:
    """Large and binary files as LFS objects; the oid lets the client leave out what has not changed."""
    binary = b"\0" in base64.b64decode(item["sample"])
    mode = "lfs" if binary or item["path"].endswith(LARGE) or item["size"] > 10_000_000 else "regular"
    oid = _oid(files[item["path"]]) if item["path"] in files else None
    return {"path": item["path"], "shouldIgnore": False, "oid": oid, "uploadMode": mode}


def _validate(content: str) -> None:
    """The checks that the Hub makes on a model card's metadata, as far as they are documented."""

    def refuse_unless(fine, message):
        if not fine:
            raise _Refused(400, None, f'"{message}"')

    if not content.startswith("---\n"):
        return  # only a warning
    try:
        data = yaml.safe_load(content[4:].split("\n---", 1)[0])
    except yaml.YAMLError as error:
        raise _Refused(400, None, f"not YAML: {error}") from error
    refuse_unless(isinstance(data, dict), "metadata must be an object")
    for key in ("license", "pipeline_tag", "library_name", "base_model"):
        refuse_unless(data.get(key) is None or isinstance(data[key], str), f"{key} must be a string")
    refuse_unless(re.fullmatch(r"[a-z0-9.\-]+", data.get("license") or "other"), "license must be a known identifier")
    for key in ("tags", "datasets", "metrics"):
        refuse_unless(all(isinstance(item, str) for item in data.get(key) or []), f"{key} must be strings")
    for name in [data.get("base_model"), *(data.get("datasets") or [])]:
        refuse_unless(name is None or re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", name), f"{name} is no id")
    for model in data.get("model-index") or []:
        refuse_unless(isinstance(model.get("name"), str) and model["name"], "model-index needs a name")
        refuse_unless(isinstance(model.get("results"), list), "model-index needs results")
        for result in model["results"]:
            refuse_unless(isinstance(result.get("task", {}).get("type"), str), "a result needs task.type")
            for key in ("type", "name"):
                refuse_unless(isinstance(result.get("dataset", {}).get(key), str), f"a result needs dataset.{key}")
            refuse_unless(result.get("metrics"), "a result needs metrics")
            for metric in result["metrics"]:
                refuse_unless(isinstance(metric.get("type"), str), "a metric needs a type")
                value = metric.get("value")
                refuse_unless(isinstance(value, int | float) and math.isfinite(value), "a metric needs a number")


def connect(hub: LocalHub, monkeypatch, home) -> None:
    """Point huggingface_hub, already imported in this process, at the stand-in, with an empty cache at `home`."""
    from huggingface_hub import constants
    from transformers.utils import hub as transformers_hub

    monkeypatch.setenv("HF_TOKEN", next(iter(hub.tokens)))
    for name, value in {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(transformers_hub, "_hf_api", None)
