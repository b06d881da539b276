"""Drive headless Chromium by its DevTools protocol: type, press, read, and take a screenshot. It reaches no network."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

CHROMIUM = shutil.which("chromium")
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync --remote-debugging-port=0 --remote-allow-origins=*"
)


class Page:
    """A page in the browser."""

    def __init__(self, connection: Any) -> None:
        self.connection, self.number = connection, 0

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        self.connection.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self.connection.recv(timeout=600))
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, script: str, seconds: float = 600) -> Any:
        """The value of an expression once it is true."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"still not: {script}\n{self.run('document.body.innerText')}"
            time.sleep(0.1)
        return value

    def type(self, selector: str, text: str) -> None:
        """Replace the text of a field, as a user does."""
        self.wait(f"!!document.querySelector({selector!r})")
        self.run(f"document.querySelector({selector!r}).focus(), document.querySelector({selector!r}).select()")
        self.call("Input.insertText", text=text)

    def press(self, selector: str) -> None:
        self.wait(f"!!document.querySelector({selector!r})")
        self.run(f"document.querySelector({selector!r}).click()")

    def screenshot(self, path: Path, width: int = 1280, height: int = 900) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]))


@contextmanager
def browser(folder: Path, address: str) -> Iterator[Page]:
    """A browser that shows a page of this machine. Every other host is unknown to it."""
    from websockets.sync.client import connect

    assert CHROMIUM is not None
    rules = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    profile = folder / "profile"
    process = subprocess.Popen(
        [CHROMIUM, *OPTIONS.split(), rules, f"--user-data-dir={profile}", "about:blank"], stderr=subprocess.DEVNULL
    )
    try:
        port = profile / "DevToolsActivePort"
        end = time.monotonic() + 600
        while not (port.is_file() and port.read_text("utf-8").strip()):
            assert time.monotonic() < end
            time.sleep(0.1)
        number = port.read_text("utf-8").split()[0]
        with urlopen(f"http://127.0.0.1:{number}/json") as answer:
            (target,) = [one for one in json.load(answer) if one["type"] == "page"]
        with connect(target["webSocketDebuggerUrl"], max_size=None, proxy=None) as connection:
            page = Page(connection)
            page.call("Page.navigate", url=address)
            page.wait(f"document.readyState == 'complete' && location.href.startsWith({address!r})")
            yield page
    finally:
        process.terminate()
        process.wait(timeout=600)
