"""A small stand-in for the Hugging Face Hub on the loopback interface, with faults to inject.

It keeps repositories in memory and speaks as much of the protocol as huggingface_hub 2.4 asks of it: create, preupload,
LFS, commit, model info, tree, resolve. A Space is a repository called "spaces/user/name". Run it as
`with Hub() as hub:` and point HF_ENDPOINT at `hub.url`.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin")


class Hub:
    """The server; `repos[name][revision]` maps paths to bytes, `log` lists requests as "METHOD path".

    `fault(pattern, kind, times)` makes the next requests that match fail: kind is a status, "cut" (the connection is
    reset half-way through the body) or "corrupt" (a body of the right length with other bytes); a status may be a pair
    with the X-Error-Code to send.
    """

    def __init__(self):
        self.repos, self.blobs, self.log, self.faults, self.commits = {}, {}, [], [], []
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def fault(self, pattern, kind, times=1):
        self.faults.append([re.compile(pattern), kind, times])

    def take_fault(self, line):
        with self.lock:
            for fault in self.faults:
                if fault[2] > 0 and fault[0].search(line):
                    fault[2] -= 1
                    return fault[1]
        return None

    def add(self, repo, files, revision="main"):
        """Put files (path to bytes) in a repository, as a commit of its own."""
        branches = self.repos.setdefault(repo, {"main": {}})
        branches[revision] = {**branches.get(revision, branches["main"]), **files}
        self.commits.append((repo, revision, sorted(files)))

    def sha(self, repo, revision):
        files = self.repos[repo][revision]
        digest = hashlib.sha1(repo.encode())
        for path, data in sorted(files.items()):
            digest.update(path.encode() + hashlib.sha1(data).digest())
        return digest.hexdigest()

    def find(self, repo, revision):
        """The files of a branch or commit; None when there is no such revision."""
        branches = self.repos[repo]
        for name, files in branches.items():
            if revision in (name, self.sha(repo, name)):
                return files
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else what follows the head of an answer waits 40 ms
    hub: Hub

    def log_message(self, *_):
        pass

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except ConnectionError:
            self.close_connection = True

    def _dispatch(self):
        self.path_only = unquote(urlsplit(self.path).path)
        line = f"{self.command} {self.path_only}"
        self.path_only = self.path_only.replace("/api/spaces/", "/api/models/spaces/", 1)
        self.hub.log.append(line)
        self.kind = self.hub.take_fault(line)
        length = int(self.headers.get("Content-Length") or 0)
        if self.kind == "cut" and self.command in ("PUT", "POST"):
            self.rfile.read(length // 2)
            return self._reset()
        self.body = self.rfile.read(length)
        if self.kind is not None and not isinstance(self.kind, str):
            status, code = self.kind if isinstance(self.kind, tuple) else (self.kind, None)
            return self._json({"error": f"injected {status}"}, status, {"X-Error-Code": code} if code else {})
        for method, pattern, handler in _ROUTES:
            match = re.fullmatch(pattern, self.path_only)
            if method == self.command and match:
                return getattr(self, handler)(**match.groupdict())
        return self._json({"error": "not found"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = _dispatch

    def _reset(self):
        """Close with RST, as when a cable is pulled."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def _send(self, data, status=200, headers=(), size=None):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if size is None else size))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.kind == "cut":
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            return self._reset()
        self.wfile.write(data)

    def _json(self, value, status=200, headers=()):
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **dict(headers)})

    def _error(self, code, status=404):
        self._json({"error": code}, status, {"X-Error-Code": code})

    def _files(self, repo, revision):
        """The files asked for, or None after an answer that says why not."""
        if repo not in self.hub.repos:
            return self._error("RepoNotFound")
        files = self.hub.find(repo, revision)
        return self._error("RevisionNotFound") if files is None else files

    def create(self):
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        exists = name in self.hub.repos
        self.hub.repos.setdefault(name, {"main": {}})
        answer = {"url": f"{self.hub.url}/{name}", "name": name, "id": name}
        self._json(answer, 409 if exists else 200)

    def branch(self, repo, revision):
        branches = self.hub.repos[repo]
        if revision in branches:
            return self._json({"error": "exists"}, 409)
        branches[revision] = dict(branches["main"])
        self._json({})

    def yaml(self):
        self._json({"errors": [], "warnings": []})

    def whoami(self):
        self._json({"name": "user", "type": "user", "auth": {"accessToken": {"role": "write"}}})

    def preupload(self, repo, revision):
        files = json.loads(self.body)["files"]
        modes = ["lfs" if f["path"].endswith(LFS_SUFFIXES) else "regular" for f in files]
        self._json({"files": [dict(path=f["path"], uploadMode=m, shouldIgnore=False) for f, m in zip(files, modes)]})

    def lfs_batch(self, repo):
        objects = []
        for asked in json.loads(self.body)["objects"]:
            entry = dict(oid=asked["oid"], size=asked["size"])
            if asked["oid"] not in self.hub.blobs:
                upload = {"href": f"{self.hub.url}/lfs/{asked['oid']}"}
                entry["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs-verify"}}
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid):
        data = self.body[:-1] + bytes([self.body[-1] ^ 255]) if self.kind == "corrupt" else self.body
        if hashlib.sha256(data).hexdigest() != oid:
            return self._json({"error": "checksum of the upload differs"}, 422)
        self.hub.blobs[oid] = data
        self._send(b"")

    def lfs_verify(self):
        asked = json.loads(self.body)
        self._json({}, 200 if len(self.hub.blobs.get(asked["oid"], b"")) == asked["size"] else 404)

    def commit(self, repo, revision):
        files, head = {}, {}
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                head = value
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        if "create_pr=1" in self.path:
            revision = "refs/pr/1"
        self.hub.add(repo, files, revision)
        answer = {"commitOid": self.hub.sha(repo, revision), "commitUrl": f"{self.hub.url}/{repo}/commit/{revision}"}
        if revision.startswith("refs/pr"):
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/1"
        self._json({**answer, "hookOutput": head.get("summary", "")})

    def info(self, repo, revision="main"):
        files = self._files(repo, revision)
        if files is not None:
            name = next(n for n in self.hub.repos[repo] if revision in (n, self.hub.sha(repo, n)))
            siblings = [self._sibling(path, data) for path, data in sorted(files.items())]
            self._json({"id": repo, "sha": self.hub.sha(repo, name), "siblings": siblings, "private": False})

    @staticmethod
    def _sibling(path, data):
        entry = {"rfilename": path, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
        if path.endswith(LFS_SUFFIXES):
            entry["lfs"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 134}
        return entry

    def tree(self, repo, revision, folder=""):
        files = self._files(repo, revision)
        if files is not None:
            rows = [self._sibling(path, data) for path, data in files.items() if path.startswith(folder.strip("/"))]
            self._json([{"type": "file", "path": r["rfilename"], "oid": r["blobId"], **r} for r in rows])

    def resolve(self, repo, revision, path):
        files = self._files(repo, revision)
        if files is None:
            return None
        if path not in files:
            return self._error("EntryNotFound")
        data = files[path]
        name = next(n for n in self.hub.repos[repo] if revision in (n, self.hub.sha(repo, n)))
        digest = hashlib.sha256(data) if path.endswith(LFS_SUFFIXES) else hashlib.sha1(data)
        headers = {"X-Repo-Commit": self.hub.sha(repo, name), "ETag": f'"{digest.hexdigest()}"'}
        if self.kind == "corrupt":
            data = data[:-8] + bytes(b ^ 255 for b in data[-8:])
        self._send(data, headers=headers)


_REPO, _REV = r"(?P<repo>(?:spaces/)?[^/]+/[^/]+)", r"(?P<revision>refs/[^/]+/[^/]+|[^/]+)"
_ROUTES = [
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "yaml"),
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", f"/api/models/{_REPO}/branch/(?P<revision>.+)", "branch"),
    ("POST", f"/api/models/{_REPO}/preupload/{_REV}", "preupload"),
    ("POST", f"/{_REPO}.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]+)", "lfs_put"),
    ("POST", "/lfs-verify", "lfs_verify"),
    ("POST", f"/api/models/{_REPO}/commit/{_REV}", "commit"),
    ("GET", f"/api/models/{_REPO}", "info"),
    ("GET", f"/api/models/{_REPO}/revision/{_REV}", "info"),
    ("GET", f"/api/models/{_REPO}/tree/{_REV}(?P<folder>.*)", "tree"),
    ("HEAD", f"/{_REPO}/resolve/{_REV}/(?P<path>.+)", "resolve"),
    ("GET", f"/{_REPO}/resolve/{_REV}/(?P<path>.+)", "resolve"),
]
