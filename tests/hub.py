"""A Hugging Face Hub on loopback that serves folders as repositories, to the real huggingface_hub client over HTTP.

As the real one does, it keeps large files elsewhere: a request for one is redirected to a signed address on a second server,
which knows nothing of tokens and has its own ETags. It counts the bytes that it sends, and misbehaves on request.

With a folder for them, repositories can be made and filled, as huggingface_hub does it without Xet: it is told for each file how it
is to come, large ones are put to the second server, and a commit names them by their sha256.
"""

import base64
import hashlib
import json
import re
import shutil
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
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


@dataclass
class Fault:
    """How the next `times` answers with a file's content go wrong, once `skip` have gone well; below 0 all of them."""

    kind: str
    times: int = 1
    after: int = 0
    """Bytes that are sent first, where it is the sending that fails (drop, stall)."""
    skip: int = 0


class Hub(ThreadingHTTPServer):
    """`repositories` maps OWNER/NAME to a folder; `requests` records method and path of what was asked for."""

    daemon_threads = True

    def __init__(self, repositories: dict[str, Path], new: Path | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.new = new
        """Where repositories that are made go."""
        self.private: set[str] = set()
        """Repositories that are not there for who has no token."""
        self.commits: list[list[str]] = []
        """What each commit that came has added, sorted."""
        self.received: Counter[str] = Counter()
        """Bytes of each object that came, by its sha256."""
        self.repositories, self.requests = repositories, list[str]()
        self.sent: Counter[str] = Counter()
        """Bytes of each file that went out, from either server."""
        self.faults: defaultdict[str, list[Fault]] = defaultdict(list)
        """By file name; under `api` those of the answers about repositories."""
        self.gated: set[str] = set()
        """Repositories that need a token."""
        self.tokens: list[tuple[str, str]] = []
        """(`hub` or `cdn`, the Authorization header) of every request that had one."""
        self.digests: dict[Path, str] = {}
        """What is said of files; to be given for one that is too large to be hashed here."""
        self.names: dict[str, str] = {}
        """What a file is called in the listing, where that is another name."""
        self.branches = {"main": COMMIT}
        self.signature = 0
        """Of the addresses that are valid; a fault of kind `expired` moves on to the next."""
        self.stopping = threading.Event()
        self.cdn = _Cdn(self)

    def object(self, oid: str) -> Path:
        """Where an uploaded large file lies."""
        assert self.new is not None
        return self.new / "objects" / oid

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT must be."""
        return f"http://127.0.0.1:{self.server_port}"

    def digest(self, path: Path) -> str:
        """sha256 of a large file, the git id of a small one."""
        if path not in self.digests:
            content = path.read_bytes()
            small = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            self.digests[path] = (
                hashlib.sha256(content).hexdigest() if path.suffix in LARGE else small
            )
        return self.digests[path]


class _Cdn(ThreadingHTTPServer):
    """Where the large files lie."""

    daemon_threads = True

    def __init__(self, hub: Hub) -> None:
        super().__init__(("127.0.0.1", 0), _CdnHandler)
        self.hub = hub


@contextmanager
def serve(repositories: dict[str, Path], new: Path | None = None) -> Iterator[Hub]:
    """A running Hub, which stops with the block; `new` is the folder of repositories that are made."""
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
    """What both servers do: answers, and files with their faults."""

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
        """What came with a request, in blocks."""
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
        """In which of these ways the answer on `name` is to go wrong."""
        for fault in self.hub.faults[name]:
            if fault.kind in kinds and fault.skip > 0:
                fault.skip -= 1
            elif fault.kind in kinds and fault.times:
                fault.times -= 1
                return fault
        return None

    def refused(self, name: str) -> bool:
        """Answer with an error, where one is due."""
        if self.fails(name, "busy"):
            self.answer(b"", "text/plain", 429, {"Retry-After": "1"})
        elif self.fails(name, "busy until"):
            self.answer(
                b"", "text/plain", 429, {"Retry-After": formatdate(time.time() + 2, usegmt=True)}
            )
        elif self.fails(name, "broken"):
            self.answer(b"", "text/plain", 500)
        else:
            return False
        return True

    def file(self, path: Path, etag: str) -> None:
        """A file or, with a Range, a part of it, as well as the faults let it."""
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
        for name, folder in self.hub.repositories.items():
            for branch, commit in {COMMIT: COMMIT, **self.hub.branches}.items():
                if path in (f"/api/models/{name}/revision/{branch}", f"/api/models/{name}"):
                    return (
                        self.refused("api")
                        or self.gate(name)
                        or self.model_info(name, folder, commit)
                    )
            if path == f"/api/models/{name}/tree/main" and not self.is_hidden(name):
                return self.refused("api") or self.say(self.tree(folder))
            for prefix in (
                f"/{name}/resolve/{COMMIT}/",
                f"/api/resolve-cache/models/{name}/{COMMIT}/",
            ):
                if path.startswith(prefix) and (folder / path[len(prefix) :]).is_file():
                    return self.gate(name) or self.resolve(folder / path[len(prefix) :], name, path)
            if path.startswith((f"/{name}/", f"/api/models/{name}/")) and not self.is_hidden(name):
                return self.answer(b"", "text/plain", 404, {"X-Error-Code": "RevisionNotFound"})
        return self.answer(b"", "text/plain", 404, {"X-Error-Code": "RepoNotFound"})

    def do_POST(self) -> None:
        path, content = unquote(urlsplit(self.path).path), b"".join(self.content())
        self.hub.requests.append(f"POST {path}")
        if path == "/api/validate-yaml":
            return self.validate(json.loads(content)["content"])
        if not (token := self.headers.get("Authorization")):
            return self.answer(b"", "text/plain", 401)
        self.hub.tokens.append((self.where, token))
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
        """As far as we know what the Hub minds: front matter that is a mapping, with strings where it wants them."""
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
        """How each file is to come, and the digest of what is there by its name."""
        answers = []
        for file in files:
            there = folder / str(file["path"])
            mode = (
                "lfs" if there.suffix in LARGE or int(str(file["size"])) > 10_000_000 else "regular"
            )
            known = {"oid": self.hub.digest(there)} if there.exists() else {}
            answers.append(
                {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **known}
            )
        self.say({"files": answers})

    def batch(self, asked: dict[str, list[dict[str, object]]]) -> None:
        """Where to put each object that is not there yet."""
        objects = []
        for entry in asked["objects"]:
            if not self.hub.object(str(entry["oid"])).exists():
                put = f"http://127.0.0.1:{self.hub.cdn.server_port}/put/{entry['oid']}?signature={self.hub.signature}"
                verify = self.path.replace(".git/info/lfs/objects/batch", "/verify")
                entry["actions"] = {
                    "upload": {"href": put},
                    "verify": {"href": f"{self.hub.endpoint}{verify}"},
                }
            objects.append(entry)
        self.say({"transfer": "basic", "objects": objects})

    def commit(self, folder: Path, lines: list[dict[str, dict[str, str]]]) -> None:
        """Add what the lines say, all or nothing."""
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
                assert kind == "file"  # nothing of ours deletes
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

    def tree(self, folder: Path) -> list[dict[str, object]]:
        found: list[dict[str, object]] = []
        for path in sorted(folder.rglob("*")):
            entry: dict[str, object] = {
                "type": "directory",
                "path": str(path.relative_to(folder)),
                "oid": "0" * 40,
                "size": 0,
            }
            if path.is_file():
                size, digest = path.stat().st_size, self.hub.digest(path)
                large = {"oid": "0" * 40, "lfs": {"oid": digest, "size": size, "pointerSize": 134}}
                entry |= {
                    "type": "file",
                    "size": size,
                    **(large if path.suffix in LARGE else {"oid": digest}),
                }
            found.append(entry)
        return found

    def gate(self, name: str) -> bool:
        """Answer that a token is needed, where one is missing."""
        closed = name in self.hub.gated and not self.headers.get("Authorization")
        if closed:
            self.answer(b"", "text/plain", 401, {"X-Error-Code": "GatedRepo"})
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
                if path.suffix in LARGE:
                    entry["lfs"] = {
                        "sha256": self.hub.digest(path),
                        "size": path.stat().st_size,
                        "pointerSize": 130,
                    }
                entry["blobId"] = "0" * 40 if path.suffix in LARGE else self.hub.digest(path)
                siblings.append(entry)
        known = {"private": False, "downloads": 0, "tags": [], "siblings": siblings}
        self.answer(
            json.dumps({"id": name, "modelId": name, "sha": commit, **known}).encode(),
            "application/json",
        )

    def resolve(self, path: Path, name: str, asked: str) -> None:
        """A large file is elsewhere, for as long as the signature holds; a small one is in a cache on this host."""
        headers = {"ETag": f'"{self.hub.digest(path)}"', "X-Repo-Commit": COMMIT}
        if path.suffix in LARGE:
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(path.stat().st_size)}
            address = f"http://127.0.0.1:{self.hub.cdn.server_port}/{name}/{path.name}?signature={self.hub.signature}"
            self.answer(b"", "text/plain", 302, {**headers, "Location": address})
        elif asked.startswith("/api/"):
            self.file(path, headers["ETag"])
        else:
            self.answer(
                b"",
                "text/plain",
                307,
                {**headers, "Location": f"/api/resolve-cache/models/{name}/{COMMIT}/{path.name}"},
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
        """Take an object whose content is what its address says."""
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
        folder = self.hub.repositories[path.strip("/").rpartition("/")[0]]
        return self.file(folder / name, f'"cdn-{self.hub.digest(folder / name)[:16]}"')
