"""A Hugging Face Hub on loopback that serves folders as repositories to the huggingface_hub client.

Like the real Hub, it redirects requests for large files to a signed address on a second server,
which ignores tokens and has its own ETags. It counts the bytes sent, and misbehaves on request.

It can also create and fill repositories, as huggingface_hub does without Xet: the Hub says how to
upload each file, large ones go to the second server, and a commit names them by sha256.
"""

import base64
import hashlib
import json
import re
import shutil
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".gguf", ".dat")
BLOCK = 1 << 20
INTERCEPTED = {
    "login page": (b"<html>", "text/html", 200),
    "proxy": (b"<html>", "text/html", 403),
    "deep JSON": (b"[" * 100 + b"]" * 100, "application/json", 200),
}
"""Answers of what is between a client and the Hub, by fault: content, type, status."""


def is_large(path: Path) -> bool:
    """Whether a file is stored with LFS; parts of a GGUF are."""
    return path.suffix in LARGE or ".gguf.part" in path.name


@dataclass
class Fault:
    """Spoils `times` answers with a file's content (all if negative), after `skip` good ones.

    Steps of an upload have names too: create, preupload, batch, put, verify, commit.
    """

    kind: str
    times: int = 1
    after: int = 0
    """Bytes sent before a drop or stall."""
    skip: int = 0


class Hub(ThreadingHTTPServer):
    """`repositories` maps OWNER/NAME to a folder; `requests` logs method and path."""

    daemon_threads = True

    def __init__(self, repositories: dict[str, Path], new: Path | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.new = new
        """Folder for created repositories."""
        self.private: set[str] = set()
        """Repositories that are hidden without a token."""
        self.commits: list[list[str]] = []
        """Sorted file names of each received commit."""
        self.received: Counter[str] = Counter()
        """Received bytes of each uploaded object, by sha256."""
        self.repositories, self.requests = repositories, list[str]()
        self.sent: Counter[str] = Counter()
        """Bytes sent of each file, from both servers."""
        self.faults: defaultdict[str, list[Fault]] = defaultdict(list)
        """Faults by file name; `api` for answers about repositories, `access` about the token."""
        self.gated: set[str] = set()
        """Repositories that need a token."""
        self.closed: set[str] = set()
        """Repositories that do not accept the token either."""
        self.user: object = {"name": "Owner"}
        """Whose the token is, as `whoami` tells it."""
        self.foreign: set[str] = set()
        """Repositories that the token may not write to."""
        self.rejects_tokens = False
        """Whether every token is a revoked one."""
        self.renamed: dict[str, str] = {}
        """New names of repositories by their old ones."""
        self.mirror: Callable[[Path], str] | None = None
        """The ETag of a file, empty for none, on a mirror that serves large files itself."""
        self.tokens: list[tuple[str, str]] = []
        """(`hub` or `cdn`, Authorization header) of every request with a token."""
        self.digests: dict[Path, str] = {}
        """Digests in answers; set one for a file that is too large to hash."""
        self.names: dict[str, str] = {}
        """Wrong names in the listing, by file name."""
        self.branches = {"main": COMMIT}
        self.signature = 0
        """The signature that addresses need; a fault `expired` increments it."""
        self.stopping = threading.Event()
        self.cdn = _Cdn(self)

    def object(self, oid: str) -> Path:
        """Path of an uploaded large file."""
        assert self.new is not None
        return self.new / "objects" / oid

    @property
    def endpoint(self) -> str:
        """The value for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_port}"

    def address(self, path: str) -> str:
        """Signed address on the second server."""
        return f"http://127.0.0.1:{self.cdn.server_port}/{path}?signature={self.signature}"

    def digest(self, path: Path) -> str:
        """sha256 of a large file, git id of a small one."""
        if path not in self.digests:
            content = path.read_bytes()
            small = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            self.digests[path] = hashlib.sha256(content).hexdigest() if is_large(path) else small
        return self.digests[path]


class _Cdn(ThreadingHTTPServer):
    """Serves the large files."""

    daemon_threads = True

    def __init__(self, hub: Hub) -> None:
        super().__init__(("127.0.0.1", 0), _CdnHandler)
        self.hub = hub


@contextmanager
def serve(repositories: dict[str, Path], new: Path | None = None) -> Iterator[Hub]:
    """Run a Hub until the block ends; `new` is the folder for created repositories."""
    with Hub(repositories, new) as hub, hub.cdn as cdn:
        threads = [
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
            for server in (hub, cdn)
        ]
        for thread in threads:
            thread.start()
        try:
            yield hub
        finally:
            hub.stopping.set()
            hub.shutdown()
            cdn.shutdown()
            for thread in threads:
                thread.join()


class _Answering(BaseHTTPRequestHandler):
    """Shared by both servers: answers, and files with faults."""

    protocol_version = "HTTP/1.1"
    hub: Hub
    where: str

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if token := self.headers.get("Authorization"):
            self.hub.tokens.append((self.where, token))
        self.route(unquote(urlsplit(self.path).path))

    def route(self, path: str) -> None:
        raise NotImplementedError

    def content(self) -> Iterator[bytes]:
        """The body of a request, in blocks."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length", 0))
        while left and (block := self.rfile.read(min(BLOCK, left))):
            left -= len(block)
            yield block

    def say(self, value: object, status: int = 200) -> None:
        self.answer(json.dumps(value).encode(), "application/json", status)

    def answer(
        self, body: bytes, kind: str, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        self.head(
            status, {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}
        )
        if self.command != "HEAD":
            self.wfile.write(body)

    def head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()

    def fails(self, name: str, *kinds: str) -> Fault | None:
        """The fault of one of these kinds that is due for `name`."""
        for fault in self.hub.faults[name]:
            if fault.kind in kinds and fault.skip > 0:
                fault.skip -= 1
            elif fault.kind in kinds and fault.times:
                fault.times -= 1
                return fault
        return None

    def refused(self, name: str) -> bool:
        """Answer with an error if one is due."""
        if self.fails(name, "busy"):
            self.answer(b"", "text/plain", 429, {"Retry-After": "1"})
        elif self.fails(name, "busy until"):
            self.answer(
                b"", "text/plain", 429, {"Retry-After": formatdate(time.time() + 2, usegmt=True)}
            )
        elif self.fails(name, "busy for hours"):
            self.answer(b"", "text/plain", 429, {"Retry-After": "7300"})
        elif self.fails(name, "broken"):
            self.answer(b"", "text/plain", 500)
        elif self.fails(name, "unheard"):
            self.close_connection = True
        elif self.fails(name, "full"):
            said = "Private repository storage limit reached, please upgrade your plan"
            self.answer(b"", "text/plain", 403, {"X-Error-Message": said})
        elif self.fails(name, "too large"):
            said = "Your file exceeds the maximum size of 500 GB"
            self.answer(b"", "text/plain", 413, {"X-Error-Message": said})
        elif self.fails(name, "denied"):
            said = "Forbidden: you must have write access to this repository"
            self.answer(b"", "text/plain", 403, {"X-Error-Message": said})
        else:
            return False
        return True

    def file(self, path: Path, etag: str) -> None:
        """Send a file or, with a Range header, a part of it, with the faults that are due."""
        name, size = path.name, path.stat().st_size
        if self.command == "GET" and self.refused(name):
            return
        begin, end = 0, size
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted and not self.fails(name, "whole"):
            begin, end = int(wanted[1]), int(wanted[2]) + 1
        else:
            wanted = None
        if wanted and self.fails(name, "wrong range"):
            begin, end = max(begin - 1, 0), max(begin - 1, 0) + end - begin
        headers = {
            "ETag": '"other"' if self.fails(name, "etag") else etag,
            "Content-Type": "application/octet-stream",
        }
        if not headers["ETag"]:
            del headers["ETag"]
        if wanted:
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
        if self.fails(name, "short"):
            end -= (end - begin) // 2
        self.head(
            206 if wanted else 200,
            {**headers, "Content-Length": str(end - begin), "Accept-Ranges": "bytes"},
        )
        if self.command == "GET":
            self.body(path, begin, end)

    def body(self, path: Path, begin: int, end: int) -> None:
        name, position, stop = path.name, begin, end
        breaks = self.fails(name, "drop", "stall")
        if breaks:
            stop = min(end, begin + breaks.after)
        spoiled = self.fails(name, "content")
        with path.open("rb") as file:
            file.seek(begin)
            while position < stop and (block := file.read(min(BLOCK, stop - position))):
                position += len(block)
                if spoiled and position == end:
                    block = block[:-1] + bytes([block[-1] ^ 1])
                try:
                    self.wfile.write(block)
                except OSError:
                    self.close_connection = True
                    return
                self.hub.sent[name] += len(block)
        if breaks:
            if breaks.kind == "stall":
                self.hub.stopping.wait(30)
            self.close_connection = True


class _Handler(_Answering):
    server: Hub
    where = "hub"

    @property
    def hub(self) -> Hub:  # type: ignore[override]
        return self.server

    def route(self, path: str) -> None:
        self.hub.requests.append(f"{self.command} {path}")
        if self.is_elsewhere(path):
            return None
        if path == "/api/whoami-v2":
            status = 200 if self.headers.get("Authorization") else 401
            return self.intercepted() or self.say(self.hub.user, status)
        if asked := re.fullmatch("/api/models/(.+)/auth-check/write", path):
            return self.intercepted() or self.may_write(asked[1])
        for name, folder in self.hub.repositories.items():
            for branch, commit in {COMMIT: COMMIT, **self.hub.branches}.items():
                asked = (f"/api/models/{name}/revision/{branch}", f"/api/models/{name}")
                if path in asked and not self.is_hidden(name):
                    return (
                        self.refused("api")
                        or self.gate(name)
                        or self.model_info(name, folder, commit)
                    )
            for prefix in (
                f"/{name}/resolve/{COMMIT}/",
                f"/api/resolve-cache/models/{name}/{COMMIT}/",
            ):
                if path.startswith(prefix) and (folder / path[len(prefix) :]).is_file():
                    return self.gate(name) or self.resolve(folder / path[len(prefix) :], name, path)
            if path.startswith((f"/{name}/", f"/api/models/{name}/")) and not self.is_hidden(name):
                return self.answer(b"", "text/plain", 404, {"X-Error-Code": "RevisionNotFound"})
        return self.answer(b"", "text/plain", 404, {"X-Error-Code": "RepoNotFound"})

    def is_elsewhere(self, path: str) -> bool:
        """Answer that the token is invalid, or that the repository was renamed."""
        if self.hub.rejects_tokens and self.headers.get("Authorization"):
            said = {"X-Error-Message": "Invalid credentials in Authorization header"}
            self.answer(b"", "text/plain", 401, said)
            return True
        for old, new in self.hub.renamed.items():
            if path.startswith((f"/{old}/", f"/api/models/{old}/")) or path.endswith(f"/{old}"):
                self.answer(b"", "text/plain", 307, {"Location": path.replace(old, new, 1)})
                return True
        return False

    def intercepted(self) -> bool:
        """Answer as something between here and the Hub would, with a fault of `access`."""
        fault = self.fails("access", *INTERCEPTED)
        if fault:
            self.answer(*INTERCEPTED[fault.kind])
        return fault is not None

    def may_write(self, name: str) -> None:
        """Say whether the token may. Without one, every repository might be a private one."""
        token, missing = self.headers.get("Authorization"), name not in self.hub.repositories
        if missing or not token:
            missed = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            return self.answer(b"", "text/plain", 404 if token else 401, missed)
        if name in self.hub.foreign:
            said = "Forbidden: pass a token that can write"
            headers = {"X-Request-Id": "1", "X-Error-Message": said}
            return self.answer(b"", "text/plain", 403, headers)
        return self.answer(b"", "text/plain")

    def do_POST(self) -> None:
        path, content = unquote(urlsplit(self.path).path), b"".join(self.content())
        self.hub.requests.append(f"POST {path}")
        if path == "/api/validate-yaml":
            return self.validate(json.loads(content)["content"])
        if not (token := self.headers.get("Authorization")):
            return self.answer(b"", "text/plain", 401)
        self.hub.tokens.append((self.where, token))
        if self.is_elsewhere(path) or self.refused(re.sub(r"/main$", "", path).rpartition("/")[2]):
            return None
        if path == "/api/repos/create":
            return self.create(json.loads(content))
        for name, folder in self.hub.repositories.items():
            if path == f"/api/models/{name}/preupload/main":
                return self.preupload(folder, json.loads(content)["files"])
            if path == f"/{name}.git/info/lfs/objects/batch":
                return self.batch(json.loads(content))
            if path == f"/{name}/verify":
                there = self.hub.object(json.loads(content)["oid"])
                return self.answer(b"", "text/plain", 200 if there.exists() else 404)
            if path == f"/api/models/{name}/commit/main":
                return self.commit(folder, [json.loads(line) for line in content.splitlines()])
        return self.answer(b"", "text/plain", 404, {"X-Error-Code": "RepoNotFound"})

    def validate(self, card: str) -> None:
        """Check a model card by the Hub's known rules: a mapping with some string values."""
        match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
        try:
            data = yaml.safe_load(match[1]) if match else None
        except yaml.YAMLError as error:
            data = str(error)
        texts = (
            "license",
            "license_name",
            "license_link",
            "pipeline_tag",
            "library_name",
            "base_model_relation",
            "quantized_by",
        )
        wrong = (
            [
                f"{key} must be a string"
                for key in texts
                if not isinstance((data or {}).get(key, ""), str)
            ]
            if match
            else []
        )
        if not isinstance(data, dict):
            wrong = ["no front matter"]
        self.say(
            {"errors": [{"message": text} for text in wrong], "warnings": []}, 400 if wrong else 200
        )

    def create(self, asked: dict[str, str]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        address = {"url": f"{self.hub.endpoint}/{name}"}
        if name in self.hub.repositories:
            return self.say({**address, "error": "You already created this model repo"}, 409)
        assert self.hub.new is not None
        self.hub.repositories[name] = self.hub.new / name
        self.hub.repositories[name].mkdir(parents=True)
        (self.hub.repositories[name] / ".gitattributes").write_text(
            "*.gguf filter=lfs diff=lfs merge=lfs -text\n"
        )
        if asked.get("visibility") == "private":
            self.hub.private.add(name)
        return self.say(address)

    def preupload(self, folder: Path, files: list[dict[str, object]]) -> None:
        """Say how to upload each file, and the digest of the existing one."""
        answers = []
        for file in files:
            there = folder / str(file["path"])
            mode = "lfs" if is_large(there) or int(str(file["size"])) > 10_000_000 else "regular"
            known = {"oid": self.hub.digest(there)} if there.exists() else {}
            answers.append(
                {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **known}
            )
        self.say({"files": answers})

    def batch(self, asked: dict[str, list[dict[str, object]]]) -> None:
        """Give upload addresses for missing objects."""
        objects = []
        for entry in asked["objects"]:
            if not self.hub.object(str(entry["oid"])).exists():
                put = self.hub.address(f"put/{entry['oid']}")
                verify = self.path.replace(".git/info/lfs/objects/batch", "/verify")
                entry["actions"] = {
                    "upload": {"href": put},
                    "verify": {"href": f"{self.hub.endpoint}{verify}"},
                }
            objects.append(entry)
        self.say({"transfer": "basic", "objects": objects})

    def commit(self, folder: Path, lines: list[dict[str, dict[str, str]]]) -> None:
        """Add the files of a commit, all or none."""
        files = [(line["key"], line["value"]) for line in lines[1:]]
        if any(
            kind == "lfsFile" and not self.hub.object(value["oid"]).exists()
            for kind, value in files
        ):
            return self.say({"error": "an lfs object is missing"}, 400)
        for kind, value in files:
            path = folder / value["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "lfsFile":
                shutil.copyfile(self.hub.object(value["oid"]), path)
            else:
                assert kind == "file"  # our programs never delete
                path.write_bytes(base64.b64decode(value["content"]))
            self.hub.digests.pop(path, None)
        self.hub.commits.append(sorted(value["path"] for _, value in files))
        name = str(folder.relative_to(self.hub.new or "/"))
        return self.say(
            {
                "success": True,
                "commitOid": COMMIT,
                "commitUrl": f"{self.hub.endpoint}/{name}/commit/{COMMIT}",
            }
        )

    def is_hidden(self, name: str) -> bool:
        return name in self.hub.private and not self.headers.get("Authorization")

    def gate(self, name: str) -> bool:
        """Answer that a token is needed, if it is missing."""
        token = self.headers.get("Authorization")
        closed = name in self.hub.closed or (name in self.hub.gated and not token)
        if closed:
            self.answer(b"", "text/plain", 403 if token else 401, {"X-Error-Code": "GatedRepo"})
        return closed

    def model_info(self, name: str, folder: Path, commit: str) -> None:
        siblings = []
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                listed = str(path.relative_to(folder))
                entry: dict[str, object] = {
                    "rfilename": self.hub.names.get(listed, listed),
                    "size": path.stat().st_size,
                }
                if is_large(path):
                    entry["lfs"] = {
                        "sha256": self.hub.digest(path),
                        "size": path.stat().st_size,
                        "pointerSize": 130,
                    }
                entry["blobId"] = "0" * 40 if is_large(path) else self.hub.digest(path)
                siblings.append(entry)
        known = {
            "private": name in self.hub.private,
            "downloads": 0,
            "tags": [],
            "siblings": siblings,
        }
        self.answer(
            json.dumps({"id": name, "modelId": name, "sha": commit, **known}).encode(),
            "application/json",
        )

    def resolve(self, path: Path, name: str, asked: str) -> None:
        """Redirect a large file to the second server, a small one to a cache on this one."""
        headers = {"ETag": f'"{self.hub.digest(path)}"', "X-Repo-Commit": COMMIT}
        if self.hub.mirror:
            self.file(path, self.hub.mirror(path))
        elif is_large(path):
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(path.stat().st_size)}
            inside = path.relative_to(self.hub.repositories[name])
            address = self.hub.address(f"{name}/{inside}")
            self.answer(b"", "text/plain", 302, {**headers, "Location": address})
        elif asked.startswith("/api/"):
            self.file(path, headers["ETag"])
        else:
            self.answer(
                b"",
                "text/plain",
                307,
                {
                    **headers,
                    "Location": asked.replace(
                        f"/{name}/resolve/", f"/api/resolve-cache/models/{name}/", 1
                    ),
                },
            )

    def head(self, status: int, headers: dict[str, str]) -> None:
        super().head(status, {"X-Repo-Commit": COMMIT, **headers})


class _CdnHandler(_Answering):
    server: _Cdn
    where = "cdn"

    @property
    def hub(self) -> Hub:  # type: ignore[override]
        return self.server.hub

    def do_PUT(self) -> None:
        """Accept an object if its content matches its address."""
        if token := self.headers.get("Authorization"):
            self.hub.tokens.append((self.where, token))
        oid, parts = urlsplit(self.path).path.rpartition("/")[2], list[bytes]()
        breaks = self.fails("put", "stall")
        for block in self.content():
            self.hub.received[oid] += len(block)
            parts.append(block)
            if breaks:
                self.hub.stopping.wait(60)
                self.close_connection = True
                return None
        if self.refused("put"):
            return None
        if hashlib.sha256(b"".join(parts)).hexdigest() != oid:
            return self.answer(b"", "text/plain", 400)
        self.hub.object(oid).parent.mkdir(exist_ok=True)
        self.hub.object(oid).write_bytes(b"".join(parts))
        return self.answer(b"", "text/plain")

    def route(self, path: str) -> None:
        name = path.rpartition("/")[2]
        if self.fails(name, "expired"):
            self.hub.signature += 1
        if parse_qs(urlsplit(self.path).query)["signature"] != [str(self.hub.signature)]:
            return self.answer(b"", "text/plain", 403)
        owner, repository, *inside = path.strip("/").split("/")
        file = self.hub.repositories[f"{owner}/{repository}"].joinpath(*inside)
        return self.file(file, f'"cdn-{self.hub.digest(file)[:16]}"')
