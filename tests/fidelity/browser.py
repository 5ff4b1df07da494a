"""A headless Chromium, spoken to over a pipe in its own protocol: nothing else has to be installed.

https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import base64
import json
import os
import select
import subprocess
import time
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu",
    "--disable-dev-shm-usage", "--hide-scrollbars", "--font-render-hinting=none",
    # Root, as in containers, has no sandbox; the pages are ours, from files
    "--no-sandbox", "--no-zygote",
)  # fmt: skip


class Browser:
    """One process; pages are opened one at a time."""

    def __init__(self, program: Path, profile: Path) -> None:
        self._number = 0
        self._buffer = b""
        self._events: list[dict[str, Any]] = []
        self._log = (profile / "log").open("w+b")
        # Chromium reads commands from its descriptor 3 and answers into 4
        self._process = subprocess.Popen(
            ["sh", "-c", 'exec "$0" "$@" 3<&0 4>&1 </dev/null >&2',
             program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, bufsize=0,
            env=_environment(program),
        )  # fmt: skip

    def open(self, page: Path, *, width: int = 1280, dark: bool = False, media: str = "") -> Page:
        return Page(self, page, width, dark, media)

    def send(self, method: str, session: str = "", **params: Any) -> dict[str, Any]:
        """A command and its answer; events that come meanwhile are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:
            self._events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    def wait(self, event: str, session: str) -> None:
        while not any(self._is(e, event, session) for e in self._events):
            self._events.append(self._read())

    def events(self, session: str, *names: str) -> list[dict[str, Any]]:
        return [e for e in self._events if any(self._is(e, name, session) for name in names)]

    @staticmethod
    def _is(event: dict[str, Any], name: str, session: str) -> bool:
        return event.get("method") == name and event.get("sessionId") == session

    def _read(self, seconds: float = 60) -> dict[str, Any]:
        end = time.monotonic() + seconds
        answers = self._process.stdout
        assert answers is not None
        while b"\0" not in self._buffer:
            ready, *_ = select.select([answers], [], [], max(0, end - time.monotonic()))
            piece = answers.read(1 << 20) if ready else b""
            if not piece:
                self._log.seek(0)
                log = self._log.read().decode(errors="replace")[-2000:]
                raise RuntimeError(f"the browser {'ended' if ready else 'hangs'}:\n{log}")
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def close(self) -> None:
        try:
            self.send("Browser.close")
            self._process.wait(20)
        finally:
            self._process.kill()
            self._process.communicate()
            self._log.close()


class Page:
    """A page from a file, loaded."""

    def __init__(self, browser: Browser, file: Path, width: int, dark: bool, media: str) -> None:
        self._browser = browser
        target = browser.send("Target.createTarget", url="about:blank")["targetId"]
        attached = browser.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self._width = width
        self._resize(900)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", media=media, features=features)
        self.send("Page.navigate", url=file.as_uri())
        browser.wait("Page.loadEventFired", self._session)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.send(method, self._session, **params)

    def evaluate(self, expression: str) -> Any:
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def complaints(self) -> list[dict[str, Any]]:
        """Whatever the page or the browser wrote to the console, exceptions, and its dialogs."""
        return self._browser.events(
            self._session,
            "Log.entryAdded",
            "Runtime.consoleAPICalled",
            "Runtime.exceptionThrown",
            "Page.javascriptDialogOpening",
        )

    def requests(self) -> list[str]:
        """Addresses that the page asked for."""
        sent = self._browser.events(self._session, "Network.requestWillBeSent")
        return [event["params"]["request"]["url"] for event in sent]

    def screenshot(self, file: Path) -> None:
        """All of the page."""
        self._resize(self.evaluate("document.documentElement.scrollHeight"))
        answer = self.send("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(answer["data"]))

    def _resize(self, height: int) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=self._width, height=height, deviceScaleFactor=1, mobile=self._width < 600,
        )  # fmt: skip


def _environment(program: Path) -> dict[str, str]:
    """`./run test-page` puts libraries and a font beside the browser that it gets."""
    beside = program.parent
    environment = dict(os.environ)
    if (beside / "lib").is_dir():
        environment["LD_LIBRARY_PATH"] = str(beside / "lib")
    if (beside / "fonts.conf").exists():
        environment["FONTCONFIG_FILE"] = str(beside / "fonts.conf")
    return environment
