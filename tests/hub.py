"""A Hugging Face Hub on loopback that serves folders as repositories, to the real huggingface_hub client over HTTP."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """`repositories` maps OWNER/NAME to a folder; `requests` records method and path of what was asked for."""

    daemon_threads = True

    def __init__(self, repositories: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories, self.requests = repositories, list[str]()
        self.corrupt: str | None = None
        """Name of a file that is served with its last byte flipped."""

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT must be."""
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serve(repositories: dict[str, Path]) -> Iterator[Hub]:
    """A running Hub, which stops with the block."""
    with Hub(repositories) as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        for name, folder in self.server.repositories.items():
            if path == f"/api/models/{name}/revision/{COMMIT}":
                return self.answer(json.dumps(self.model_info(name, folder)).encode(), "application/json")
            prefix = f"/{name}/resolve/{COMMIT}/"
            if path.startswith(prefix) and (folder / path[len(prefix) :]).is_file():
                return self.file(folder / path[len(prefix) :])
        return self.answer(b"", "text/plain", 404, {"X-Error-Code": "RepoNotFound"})

    def model_info(self, name: str, folder: Path) -> dict[str, object]:
        siblings = []
        for path in sorted(folder.iterdir()):
            if path.is_file():
                entry: dict[str, object] = {"rfilename": path.name, "size": path.stat().st_size}
                if path.suffix == ".safetensors":
                    entry["lfs"] = {"sha256": _sha256(path), "size": path.stat().st_size, "pointerSize": 130}
                siblings.append(entry)
        return {
            "id": name,
            "modelId": name,
            "sha": COMMIT,
            "private": False,
            "downloads": 0,
            "tags": [],
            "siblings": siblings,
        }

    def file(self, path: Path) -> None:
        data = path.read_bytes()
        if path.name == self.server.corrupt:
            data = data[:-1] + bytes([data[-1] ^ 1])
        headers = {"ETag": f'"{_sha256(path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        begin, wanted = 0, self.headers.get("Range")
        if wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            begin, end = int(first), int(last or len(data) - 1)
            headers["Content-Range"] = f"bytes {begin}-{end}/{len(data)}"
            data = data[begin : end + 1]
        self.answer(data, "application/octet-stream", 206 if wanted else 200, headers)

    def answer(self, body: bytes, kind: str, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
