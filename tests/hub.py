"""A stand-in for the Hub on loopback, for the unmodified client: enough to create a repo, commit and download."""

import base64
import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


def _sha1(value: bytes | str) -> str:
    return hashlib.sha1(value if isinstance(value, bytes) else value.encode()).hexdigest()


class LocalHub(ThreadingHTTPServer):
    """
    `repos`: id -> commits [(sha, message, {path: (kind, bytes or sha256, size)})]; `blobs`: sha256 -> bytes.

    A client process needs `environment` before it imports huggingface_hub.
    """

    def __init__(self, user: str = "tester"):
        self.user, self.log, self.repos, self.blobs = user, [], {}, {}
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def environment(self, home) -> dict[str, str]:
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": "hf_local",
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        }

    def files(self, repo_id: str) -> set[str]:
        """The paths in the newest commit."""
        return set(self.repos[repo_id][-1][2])

    def ever(self, repo_id: str) -> set[str]:
        """The paths that any commit has held."""
        return set().union(*(files for _, _, files in self.repos[repo_id]))

    def content(self, repo_id: str, path: str) -> bytes:
        kind, value, _ = self.repos[repo_id][-1][2][path]
        return self.blobs[value] if kind == "lfs" else value


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

    def _missing(self, code):
        self._send(404, {"error": code}, headers=[("X-Error-Code", code)])

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
        hub, path, body = self.server, unquote(urlsplit(self.path).path), self._body()
        hub.log.append(f"{self.command} {path}")
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if match := re.match(r"/api/models/([^/]+/[^/]+)/?(.*)$", path):
            return self._api(*match.groups(), body)
        if match := re.match(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch$", path):
            objects = [
                {
                    **item,
                    "actions": {
                        "upload": {"href": f"{hub.endpoint}/lfs/{item['oid']}"},
                        "verify": {"href": f"{hub.endpoint}/verify"},
                    },
                }
                for item in json.loads(body)["objects"]
            ]
            return self._send(200, {"transfer": "basic", "objects": objects})
        if path == "/verify":
            return self._send(200, {})
        if path.startswith("/lfs/"):
            hub.blobs[path[5:]] = body
            return self._send(200, {})
        if match := re.match(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)$", path):
            return self._resolve(*match.groups())
        self._missing("EntryNotFound")

    def _create(self, request):
        repo_id = f"{request.get('organization') or self.server.user}/{request['name']}"
        answer = {"url": f"{self.server.endpoint}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.server.repos:
            return self._send(409, answer)
        self.server.repos[repo_id] = [(_sha1(repo_id), "initial commit", {})]
        self._send(200, answer)

    def _api(self, repo_id, rest, body):
        hub = self.server
        if repo_id not in hub.repos:
            return self._missing("RepoNotFound")
        sha, _, files = hub.repos[repo_id][-1]
        if rest.startswith("preupload/"):
            modes = [
                {
                    "path": item["path"],
                    "shouldIgnore": False,
                    "oid": None,
                    "uploadMode": "lfs" if item["path"].endswith((".safetensors", ".bin")) else "regular",
                }
                for item in json.loads(body)["files"]
            ]
            return self._send(200, {"files": modes})
        if rest.startswith("commit/"):
            sha = self._commit(repo_id, dict(files), body)
            url = f"{hub.endpoint}/{repo_id}/commit/{sha}"
            return self._send(200, {"success": True, "commitOid": sha, "commitUrl": url})
        if rest.startswith("tree/"):
            tree = [{"type": "file", "path": name, "size": v[2], "oid": _sha1(name)} for name, v in files.items()]
            return self._send(200, tree)
        if rest == "" or rest.startswith("revision/"):
            siblings = [{"rfilename": name} for name in files]
            info = {"id": repo_id, "sha": sha, "private": False, "tags": [], "downloads": 0, "likes": 0}
            return self._send(200, info | {"siblings": siblings})
        self._missing("EntryNotFound")

    def _commit(self, repo_id, files, body) -> str:
        message = ""
        for line in map(json.loads, body.splitlines()):
            key, value = line["key"], line["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                content = base64.b64decode(value["content"])
                files[value["path"]] = ("regular", content, len(content))
            elif key == "lfsFile":
                files[value["path"]] = ("lfs", value["oid"], value["size"])
            elif key == "deletedFile":
                files.pop(value["path"], None)
        self.server.repos[repo_id].append((_sha1(body + str(time.time()).encode()), message, files))
        return self.server.repos[repo_id][-1][0]

    def _resolve(self, repo_id, path):
        hub = self.server
        if repo_id not in hub.repos:
            return self._missing("RepoNotFound")
        sha, _, files = hub.repos[repo_id][-1]
        if path not in files:
            return self._missing("EntryNotFound")
        kind, value, size = files[path]
        etag = f'"{value if kind == "lfs" else _sha1(value)}"'
        headers = [("X-Repo-Commit", sha), ("ETag", etag), ("X-Linked-Etag", etag), ("X-Linked-Size", str(size))]
        self._send(200, data=hub.blobs[value] if kind == "lfs" else value, headers=headers)

    do_GET = do_POST = do_PUT = do_HEAD = _handle
