"""A real headless Chromium over its debugging pipe: opens a file without any network, runs scripts in it, takes pictures."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


class Browser:
    """One page of a browser of its own; `problems` are exceptions in it and what it wanted from the network."""

    def __init__(self, width: int, height: int) -> None:
        assert CHROMIUM is not None
        self._home = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        options = (
            "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --remote-debugging-pipe --no-first-run"
            f" --host-resolver-rules='MAP * ~NOTFOUND' --user-data-dir={self._home.name}"
        )
        self._process = subprocess.Popen(
            ["bash", "-c", f"exec {CHROMIUM} {options} about:blank 3<&{theirs_in} 4>&{theirs_out}"],
            pass_fds=(theirs_in, theirs_out), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        self._buffer, self._number, self._session, self.problems = b"", 0, "", list[str]()
        target = next(
            t for t in self._call("Target.getTargets")["targetInfos"] if t["type"] == "page"
        )["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Network"):
            self._call(f"{domain}.enable")
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(timeout=20)
        os.close(self._out)
        os.close(self._in)
        self._home.cleanup()

    def open(self, path: Path) -> None:
        self._call("Page.navigate", url=path.resolve().as_uri())
        self.wait("document.readyState == 'complete'")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self._call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until a JavaScript expression is true."""
        deadline = time.monotonic() + 60
        while not self.run(condition):
            assert time.monotonic() < deadline, condition
            time.sleep(0.1)

    def click(self, words: str) -> None:
        """The innermost thing on the page that has exactly these words."""
        find = f"[...document.querySelectorAll('a, button')].find(each => each.innerText.trim() == {json.dumps(words)})"
        self.wait(f"!!{find}")
        self.run(f"{find}.click()")

    def screenshot(self, path: Path) -> None:
        path.write_bytes(
            base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"])
        )

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        os.write(
            self._out,
            json.dumps(
                {**message, **({"sessionId": self._session} if self._session else {})}
            ).encode()
            + b"\0",
        )
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            if answer.get("method") == "Runtime.exceptionThrown":
                self.problems.append(
                    str(
                        answer["params"]["exceptionDetails"].get("exception", {}).get("description")
                    )
                )
            if answer.get("method") == "Network.requestWillBeSent":
                url = answer["params"]["request"]["url"]
                if not url.startswith(("file:", "data:", "blob:", "about:")):
                    self.problems.append(f"asks for {url}")

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            data = os.read(self._in, 1 << 20)
            assert data, "the browser has ended"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))
