"""Headless Chromium, driven through its debugging pipe, without a network."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, _NAMES)), None)
_TIMEOUT = 60  # seconds


class Browser:
    """One page of a new browser. `problems` are its exceptions and its requests to a network."""

    def __init__(self, width: int, height: int) -> None:
        self.problems: list[str] = []
        self._buffer = b""
        self._number = 0
        self._session = ""
        self._home = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._start()
        self._attach()
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
        """Load a file."""
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
        """Wait until a JavaScript expression is true."""
        deadline = time.monotonic() + _TIMEOUT
        while not self.run(condition):
            assert time.monotonic() < deadline, condition
            time.sleep(0.1)

    def click(self, text: str) -> None:
        """Click the link or button with exactly this text."""
        find = (
            "[...document.querySelectorAll('a, button')]"
            f".find(each => each.innerText.trim() == {json.dumps(text)})"
        )
        self.wait(f"!!{find}")
        self.run(f"{find}.click()")

    def screenshot(self, path: Path) -> None:
        """Save the page as PNG."""
        data = self._call("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))

    def _start(self) -> None:
        """Start Chromium, which reads commands from descriptor 3 and answers on 4."""
        assert CHROMIUM is not None
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        options = (
            "--headless --no-sandbox --disable-gpu --remote-debugging-pipe --no-first-run"
            " --disable-dev-shm-usage --host-resolver-rules='MAP * ~NOTFOUND'"
            f" --user-data-dir={self._home.name}"
        )
        command = f"exec {CHROMIUM} {options} about:blank 3<&{theirs_in} 4>&{theirs_out}"
        self._process = subprocess.Popen(
            ["bash", "-c", command],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)

    def _attach(self) -> None:
        """Open a session with the page, and subscribe to its events."""
        targets = self._call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        attached = self._call("Target.attachToTarget", targetId=page, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self._call(f"{domain}.enable")

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        session = {"sessionId": self._session} if self._session else {}
        os.write(self._out, json.dumps(message | session).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return dict(answer["result"])
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        """Record an event if it is a problem."""
        if event.get("method") == "Runtime.exceptionThrown":
            exception = event["params"]["exceptionDetails"].get("exception", {})
            self.problems.append(str(exception.get("description")))
        if event.get("method") == "Network.requestWillBeSent":
            url = event["params"]["request"]["url"]
            if not url.startswith(("file:", "data:", "blob:", "about:")):
                self.problems.append(f"requests {url}")

    def _receive(self) -> dict[str, Any]:
        """The next message."""
        while b"\0" not in self._buffer:
            data = os.read(self._in, 1 << 20)
            assert data, "the browser has ended"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))
